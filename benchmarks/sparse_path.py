"""What an exact sparse head costs: beside scikit-learn's saga and glm-saga, along a path of six levels, and in chunks.

    OMP_NUM_THREADS=2 python benchmarks/sparse_path.py

a. One penalty, n=4,000, K=120, L=10, from nothing: `ElasticNetPath` in single precision until the optimality conditions
   (KKT) hold to 1e-5, scikit-learn's ``saga`` for as few epochs as bring it to the same objective within 1e-4, and
   ``glm-saga`` (PyPI) until then or for a budget of epochs. All get the same standardised scores. The contenders take
   turns and ratios are taken within a turn; one function in double precision judges all of them.
b. The six levels of the ANEC protocol (VLG-CBM) at n=16,000, K=400, L=50. Fails where a level's number of effective
   concepts (NEC), before pruning, is not within 2 %.
c. One penalty at n=200,000, K=512, L=100, read in chunks from a file, in a process of its own: seconds and peak memory
   beside the bound in the docstring of `ElasticNetPath`. Fails above the bound. Only with ``--part large`` or ``--large``.

Scores are drawn: factors of decaying strength make concepts correlate, and labels are drawn from a softmax on a few
concepts a class, so that no classifier is perfect.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sklearn
import torch
from torch import Tensor

from cbm_lightning.sparsity import ElasticNet, ElasticNetPath, SparseSolution
from cbm_lightning.sparsity.design import Design
from cbm_lightning.sparsity.families import make_family
from cbm_lightning.sparsity.solver import Problem, solve

ALPHA, TOL, EQUAL = 0.99, 1e-5, 1e-4
LEVELS = [5, 10, 15, 20, 25, 30]
SINGLE = {"samples": 4_000, "concepts": 120, "classes": 10}
PATH = {"samples": 16_000, "concepts": 400, "classes": 50}
LARGE = {"samples": 200_000, "concepts": 512, "classes": 100}
Array = np.ndarray[Any, Any]


class Head(NamedTuple):
    """A linear head as a contender left it, for the scores it was given."""

    weight: Array
    bias: Array
    seconds: float
    effort: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["a", "b"], choices=["a", "b", "large"])
    parser.add_argument("--large", action="store_true", help="also the part 'large'")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender of a, and fits of b")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the stochastic solvers")
    parser.add_argument("--nec", type=float, default=20, help="effective concepts at the penalty of a")
    parser.add_argument("--saga_epochs", type=int, default=500, help="budget of glm-saga")
    parser.add_argument("--saga_step", type=float, default=0.1, help="step size of glm-saga, .1 in label-free CBM")
    parser.add_argument("--sklearn_epochs", type=int, default=20_000, help="scikit-learn gives up after as many")
    parser.add_argument("--share", type=float, default=0.05, help="penalty of 'large' as a share of the largest")
    parser.add_argument("--chunk_size", type=int, help="rows at a time of 'large'; left out, the package chooses")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(large_alone(options)))
        return
    print(f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, {torch.get_num_threads()} threads")
    if "a" in options.part:
        single(options)
    if "b" in options.part:
        levels(options)
    if options.large or "large" in options.part:
        large(options)


# ---------------------------------------------------------------- data and judge


class DrawnConcepts:
    """Correlated concept scores and labels that depend on fifteen of them a class.

    Concept k is ``sqrt(.7) * a unit mix of K / 4 factors + sqrt(.3) * noise`` in its own units; factor j counts with
    variance ``1 / j``. The label is drawn from a softmax of a sparse normal teacher on the concepts.
    """

    def __init__(self, concepts: int, classes: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        mix = self.rng.normal(size=(concepts // 4, concepts)) / np.sqrt(np.arange(1, concepts // 4 + 1))[:, None]
        self.mix = mix / np.linalg.norm(mix, axis=0)
        self.teacher = self.rng.normal(size=(classes, concepts))
        self.teacher *= self.rng.random((classes, concepts)).argsort(1) < 15
        self.shift, self.unit = self.rng.normal(size=concepts), self.rng.lognormal(size=concepts)

    def draw(self, samples: int) -> tuple[Array, Array]:
        """``[n, K]`` float32 scores and ``[n]`` labels of the next samples."""
        factors = self.rng.normal(size=(samples, len(self.mix)))
        scores = 0.7**0.5 * factors @ self.mix + 0.3**0.5 * self.rng.normal(size=(samples, self.mix.shape[1]))
        logits = scores @ self.teacher.T
        labels = (logits + self.rng.gumbel(size=logits.shape)).argmax(1)
        return (self.shift + self.unit * scores).astype(np.float32), labels


def judge(x: Array, y: Array, solution: SparseSolution | Head, lam: float) -> tuple[float, float]:
    """Objective, and largest violation of the optimality conditions, in double precision.

    A `Head` reads the scores as they are, a `SparseSolution` standardises them.
    """
    weight, bias, *_ = (np.asarray(a, dtype=np.float64) for a in (solution.weight, solution.bias))
    mean, scale = 0.0, 1.0
    if isinstance(solution, SparseSolution):
        mean, scale = solution.mean.double().numpy(), solution.scale.double().numpy()
    loss, by_weight, by_bias = 0.0, np.zeros_like(weight), np.zeros_like(bias)
    for start in range(0, len(x), 8192):
        rows, truth = (x[start : start + 8192] - mean) / scale, y[start : start + 8192]
        logits = rows @ weight.T + bias
        logits -= logits.max(1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(1, keepdims=True))
        at = np.arange(len(truth)), truth
        loss -= logits[at].sum() / len(x)
        derivative = np.exp(logits) / len(x)
        derivative[at] -= 1 / len(x)
        by_weight += derivative.T @ rows
        by_bias += derivative.sum(0)
    pull, l1 = by_weight + lam * (1 - ALPHA) * weight, lam * ALPHA
    miss = np.where(weight == 0, np.maximum(np.abs(pull) - l1, 0), np.abs(pull + l1 * np.sign(weight)))
    objective = loss + l1 * np.abs(weight).sum() + lam * (1 - ALPHA) / 2 * np.square(weight).sum()
    return float(objective), float(max(miss.max(), np.abs(by_bias).max()))


# ---------------------------------------------------------------- a. one penalty


def single(options: argparse.Namespace) -> None:
    """Time every contender, in turns."""
    x, y = DrawnConcepts(SINGLE["concepts"], SINGLE["classes"], options.seed).draw(SINGLE["samples"])
    x = ((x - x.mean(0, dtype=np.float64)) / x.std(0, ddof=1, dtype=np.float64)).astype(np.float32)
    searched = ElasticNetPath(nec=options.nec, alpha=ALPHA).fit(x, y)
    lam = searched.at_nec(options.nec).lam
    exact = ElasticNetPath(lambdas=lam, alpha=ALPHA, dtype="float64", tol=1e-9, max_iter=10_000).fit(x, y)
    eigenvalue = np.linalg.eigvalsh(np.cov(x.T))[-1]
    print(
        f"\na. {SINGLE}, lambda {lam:.3g} ({lam / searched.lambda_max_:.2g} of the largest), largest eigenvalue of the "
        f"correlations {eigenvalue:.1f}, training accuracy {exact.score(x, y):.3f}"
    )
    wanted = judge(x, y, fit_ours(x, y, lam), lam)[0]
    epochs = fewest_epochs(x, y, lam, wanted, options)
    contenders: dict[str, Callable[[], Head]] = {
        "ElasticNetPath": lambda: fit_ours(x, y, lam),
        "its solver alone": solver_alone(x, y, lam),
        "scikit-learn saga": lambda: fit_sklearn(x, y, lam, epochs, options.seed),
    }
    if importlib.util.find_spec("glm_saga"):
        contenders["glm-saga"] = lambda: fit_glm_saga(x, y, lam, wanted, options)
    else:
        print("glm-saga is left out, it is not installed: pip install 'cbm-lightning[bench]'")
    heads = take_turns(contenders, options.repeats)
    seconds = {name: [head.seconds for head in turns] for name, turns in heads.items()}
    best = exact.solution_.objective
    print(f"\n{'':20}{'seconds':>24}{'objective / ours - 1':>22}{'/ optimum - 1':>15}{'KKT':>10}   NEC  effort")
    for name, turns in heads.items():
        objective, kkt = judge(x, y, turns[-1], lam)
        gaps = f"{objective / wanted - 1:>22.1e}{objective / best - 1:>15.1e}{kkt:>10.1e}"
        nec = (np.abs(turns[-1].weight) > 1e-5).sum() / SINGLE["classes"]
        print(f"{name:20}{spread(seconds[name], 3):>24}{gaps}{nec:>6.1f}  {turns[-1].effort}")
    for own in ("ElasticNetPath", "its solver alone"):
        for name in [name for name in seconds if "saga" in name]:
            ratio = [other / ours for other, ours in zip(seconds[name], seconds[own], strict=True)]
            print(f"{name} / {own}: {spread(ratio, 1)}")


def fit_ours(x: Array, y: Array, lam: float) -> Head:
    """The estimator: check, standardise, solve."""
    start = time.perf_counter()
    path = ElasticNetPath(lambdas=lam, alpha=ALPHA, tol=TOL).fit(x, y)
    seconds = time.perf_counter() - start
    return Head(path.coef_, path.intercept_, seconds, f"{path.solution_.iterations} steps")


def solver_alone(x: Array, y: Array, lam: float) -> Callable[[], Head]:
    """On a design that is made before the clock starts; its Gram matrix is not."""
    design, labels, penalty = Design(x), torch.from_numpy(y), ElasticNet(ALPHA)
    prevalence = torch.bincount(labels) / len(labels)

    def turn() -> Head:
        start = time.perf_counter()
        problem = Problem(design, labels, make_family("multinomial"), prevalence, intercept=True)
        solved = solve(problem, penalty, lam, tol=TOL)
        seconds = time.perf_counter() - start
        weight = solved.point.weight / design.scale
        bias = solved.point.bias - weight @ design.mean
        return Head(weight.numpy(), bias.numpy(), seconds, f"{solved.iterations} steps")

    return turn


def fit_sklearn(x: Array, y: Array, lam: float, epochs: int, seed: int) -> Head:
    """As many epochs as asked for, in single precision like ours."""
    from sklearn.linear_model import LogisticRegression

    named = {} if tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 8) else {"penalty": "elasticnet"}
    model = LogisticRegression(
        C=1 / (len(x) * lam), l1_ratio=ALPHA, solver="saga", tol=0.0, max_iter=epochs, random_state=seed, **named
    )
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tol=0 is never met
        model.fit(x, y)
    return Head(model.coef_, model.intercept_, time.perf_counter() - start, f"{epochs} epochs")


def fewest_epochs(x: Array, y: Array, lam: float, wanted: float, options: argparse.Namespace) -> int:
    """Epochs that scikit-learn needs to come as low, found by doubling and halving; the most allowed if it does not."""

    def enough(epochs: int) -> bool:
        return judge(x, y, fit_sklearn(x, y, lam, epochs, options.seed), lam)[0] <= wanted * (1 + EQUAL)

    few, many = 0, 8
    while not enough(many):
        few, many = many, 2 * many
        if many > options.sklearn_epochs:
            return int(options.sklearn_epochs)
    while many - few > max(1, many // 50):
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many


class Shuffled:
    """Batches of scores, labels and row numbers as glm-saga wants them, without the cost of a `DataLoader`."""

    def __init__(self, x: Array, y: Array, seed: int) -> None:
        self.x, self.y = torch.from_numpy(x), torch.from_numpy(y)
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for rows in torch.randperm(len(self.y), generator=self.generator).split(256):
            yield self.x[rows], self.y[rows], rows


def fit_glm_saga(x: Array, y: Array, lam: float, wanted: float, options: argparse.Namespace) -> Head:
    """Rounds of epochs, each from where the last one stopped; the look at the objective between them is not timed."""
    from glm_saga.elasticnet import glm_saga

    loader, linear = Shuffled(x, y, options.seed), torch.nn.Linear(x.shape[1], int(y.max()) + 1)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    # its path of one penalty is the largest, which it takes from here and divides by alpha
    metadata = {
        "X": {"num_examples": len(x)},
        "y": {"num_classes": len(linear.bias)},
        "max_reg": {"nongrouped": lam * ALPHA},
    }
    state, seconds, epochs = None, 0.0, 0
    while True:
        some = min(10, options.saga_epochs - epochs)
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # softmax without a dimension
            found = glm_saga(
                linear,
                loader,
                options.saga_step,
                some,
                ALPHA,
                k=1,
                do_zero=False,
                tol=0.0,
                metadata=metadata,
                state=state,
            )
        seconds, epochs, state = seconds + time.perf_counter() - start, epochs + some, found["state"]
        head = Head(*(p.detach().numpy().copy() for p in linear.parameters()), seconds, f"{epochs} epochs")
        if epochs >= options.saga_epochs or judge(x, y, head, lam)[0] <= wanted * (1 + EQUAL):
            return head


# ---------------------------------------------------------------- b. six levels


def levels(options: argparse.Namespace) -> None:
    """One search for all levels of the protocol, and what it found."""
    drawn = DrawnConcepts(PATH["concepts"], PATH["classes"], options.seed)
    (x, y), (test_x, test_y) = drawn.draw(PATH["samples"]), drawn.draw(4000)
    seconds = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        path = ElasticNetPath(nec=LEVELS, alpha=ALPHA, tol=TOL).fit(x, y)
        seconds.append(time.perf_counter() - start)
    steps = sum(solution.iterations for solution in path.path_)
    print(f"\nb. {PATH}: {spread(seconds, 1)} s for six levels, {len(path.path_)} penalties, {steps} steps in all\n")
    print("level  NEC found    lambda  KKT, own  KKT, double  steps  test accuracy, pruned")
    accuracies, missed = [], []
    for level in LEVELS:
        found = path.at_nec(level, prune=False)
        logits = path.at_nec(level).logits(torch.from_numpy(test_x))
        accuracies.append(float(np.mean(logits.argmax(1).numpy() == test_y)))
        kkt = judge(x, y, found, found.lam)[1]
        row = f"{level:>5}{found.nec:>11.2f}{found.lam:>10.2e}{found.kkt:>10.1e}{kkt:>13.1e}{found.iterations:>7}"
        print(f"{row}{accuracies[-1]:>23.3f}")
        if not level <= found.nec <= 1.02 * level:
            missed.append(level)
    print(
        f"ANEC {statistics.mean(accuracies):.3f}, and {path.path_[-1].lam / path.lambda_max_:.2g} of the largest penalty"
    )
    if missed:
        sys.exit(f"the number of effective concepts is not within 2 % at the levels {missed}")


# ---------------------------------------------------------------- c. in chunks


def large(options: argparse.Namespace) -> None:
    """Write the scores piece by piece, fit them in a process of its own."""
    samples, concepts, classes = LARGE.values()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        x = np.memmap(folder / "scores", np.float32, "w+", shape=(samples, concepts))
        y, drawn = np.empty(samples, np.int64), DrawnConcepts(concepts, classes, options.seed)
        for start in range(0, samples, 10_000):
            x[start : start + 10_000], y[start : start + 10_000] = drawn.draw(min(10_000, samples - start))
        x.flush()
        np.save(folder / "labels.npy", y)
        command = [sys.executable, __file__, "--alone", scratch, "--share", str(options.share)]
        if options.chunk_size:
            command += ["--chunk_size", str(options.chunk_size)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    chunk = found["chunk_size"]
    bound = 4 * (4 * samples * classes + 3 * chunk * (concepts + classes) + 4 * concepts**2 + 20 * concepts * classes)
    print(
        f"\nc. {LARGE}, {x.nbytes / 1e6:.0f} MB of scores in chunks of {chunk} rows: {found['seconds']:.1f} s, "
        f"{found['steps']} steps, NEC {found['nec']:.1f}, KKT {found['kkt']:.1e} ({found['double']:.1e} in double "
        f"precision)\npeak memory {found['peak'] / 1e6:.0f} MB beyond the {found['before'] / 1e6:.0f} MB before, bound "
        f"{bound / 1e6:.0f} MB"
    )
    if found["peak"] > bound:
        sys.exit("the stated bound of the memory is exceeded")


def large_alone(options: argparse.Namespace) -> dict[str, float]:
    """Fit in this process, and by how much its own memory grew; pages of the file are the system's to drop."""
    samples, concepts, classes = LARGE.values()
    x = np.memmap(options.alone / "scores", np.float32, "r", shape=(samples, concepts))
    y = np.load(options.alone / "labels.npy")
    path = ElasticNetPath(n_lambdas=1, eps=options.share, alpha=ALPHA, tol=TOL, chunk_size=options.chunk_size)
    # libraries load and threads start here, not in what is measured
    ElasticNetPath(n_lambdas=1, eps=0.5, chunk_size=500).fit(*DrawnConcepts(concepts, classes, 0).draw(1000))
    before, start = anonymous_memory(), time.perf_counter()
    peak, over = [before], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            peak[0] = max(peak[0], anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    path.fit(x, y)
    seconds = time.perf_counter() - start
    over.set()
    watcher.join()
    solution = path.solution_
    return {
        "seconds": seconds,
        "before": before,
        "peak": peak[0] - before,
        "chunk_size": Design(x[:1], chunk_size=options.chunk_size).chunk_size,
        "steps": solution.iterations,
        "nec": solution.nec,
        "kkt": solution.kkt,
        "double": judge(x, y, solution, solution.lam)[1],
    }


def anonymous_memory() -> int:
    """Bytes of this process that are in memory and belong to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


# ---------------------------------------------------------------- measuring


def take_turns(contenders: dict[str, Callable[[], Head]], repeats: int) -> dict[str, list[Head]]:
    """What each contender left in each turn, after a cheap one that is not counted; the order rotates."""
    names = list(contenders)
    for name in names[:2]:
        contenders[name]()
    heads: dict[str, list[Head]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            heads[name].append(contenders[name]())
    return heads


def spread(values: list[float], digits: int) -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()

"""What an exact sparse head costs: beside scikit-learn's saga and glm-saga, along a path of six levels, and in chunks.

    OMP_NUM_THREADS=2 python benchmarks/sparse_path.py --part a b large

a. One penalty, n=4,000, K=120, L=10, from nothing: `ElasticNetPath` in single precision until the optimality conditions
   (KKT) hold to 1e-5; scikit-learn's ``saga`` for as few epochs as bring its objective within 1e-4 and within 1e-6 of
   that, and as bring its KKT to 1e-5; ``glm-saga`` (PyPI) to within 1e-4 or for a budget of epochs. All get the same
   standardised scores. They take turns, ratios are taken within a turn; one function in double precision judges all.
b. The six levels of the ANEC protocol (VLG-CBM) at n=16,000, K=400, L=50. Fails where a level's number of effective
   concepts (NEC) before pruning is not within 2 %.
large. One penalty at n=200,000, K=512, L=100, read in chunks from a file, in a process of its own: seconds and peak
   memory beside the bound in the docstring of `ElasticNetPath`. Fails above the bound.

Scores are drawn, see `DrawnConcepts`, and correlate mildly or as strongly as the similarities of CLIP embeddings with
concept texts do. Labels are drawn too, so that no classifier is perfect.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import itertools
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
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from cbm_lightning.sparsity import ElasticNet, ElasticNetPath, SparseSolution
from cbm_lightning.sparsity.design import CHUNK_NUMBERS, Design
from cbm_lightning.sparsity.families import make_family
from cbm_lightning.sparsity.problem import Problem
from cbm_lightning.sparsity.solver import solve

ALPHA, TOL, EQUAL, SAME = 0.99, 1e-5, 1e-4, 1e-6
LEVELS = [5, 10, 15, 20, 25, 30]
SINGLE, PATH, LARGE = (4_000, 120, 10), (16_000, 400, 50), (200_000, 512, 100)
# how fast factors lose strength, and the share of a concept's variance that is its own
CORRELATIONS = {"mild": (1.0, 0.3), "strong": (3.0, 0.01)}
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
    parser.add_argument("--large", action="store_true", help="the same as naming this part too")
    parser.add_argument("--correlation", nargs="+", choices=list(CORRELATIONS), help="both for a, else mild")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender of a, and fits of b")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the stochastic solvers")
    parser.add_argument("--lam", type=float, default=0.0007 / ALPHA, help="penalty of a; that of Label-free CBM")
    parser.add_argument("--nec", type=float, help="the penalty of a leaves so many effective concepts instead")
    parser.add_argument("--saga_epochs", type=int, default=500, help="budget of glm-saga")
    parser.add_argument("--sklearn_epochs", type=int, default=4000, help="scikit-learn gives up after as many")
    parser.add_argument("--share", type=float, default=0.05, help="penalty of 'large' as a share of the largest")
    parser.add_argument("--chunk_size", type=int, help="rows at a time of 'large'; left out, the package chooses")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(large_alone(options)))
        return
    print(f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, {torch.get_num_threads()} threads")
    for part, measure in {"a": single, "b": levels, "large": large}.items():
        if part in options.part or (part == "large" and options.large):
            for correlation in options.correlation or (CORRELATIONS if part == "a" else ["mild"]):
                measure(correlation, options)


class DrawnConcepts:
    """Concept scores, and labels from a softmax on fifteen concepts a class.

    A concept is a mix of K / 4 factors, the j-th of variance ``j ** -decay``, and own noise, in units of its own.
    """

    def __init__(self, concepts: int, classes: int, correlation: str, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        decay, self.noise = CORRELATIONS[correlation]
        strengths = np.arange(1, concepts // 4 + 1) ** (-decay / 2)
        mix = strengths[:, None] * self.rng.normal(size=(len(strengths), concepts))
        self.mix = mix / np.linalg.norm(mix, axis=0)
        self.teacher = self.rng.normal(size=(classes, concepts))
        self.teacher *= self.rng.random((classes, concepts)).argsort(1) < 15
        self.shift, self.unit = self.rng.normal(size=concepts), self.rng.lognormal(size=concepts)

    def draw(self, samples: int) -> tuple[Array, Array]:
        """``[n, K]`` float32 scores and ``[n]`` labels of the next samples."""
        factors = self.rng.normal(size=(samples, len(self.mix)))
        own = self.rng.normal(size=(samples, len(self.shift)))
        scores = (1 - self.noise) ** 0.5 * factors @ self.mix + self.noise**0.5 * own
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


def single(correlation: str, options: argparse.Namespace) -> None:
    """Time every contender, in turns."""
    x, y = DrawnConcepts(*SINGLE[1:], correlation, options.seed).draw(SINGLE[0])
    x = ((x - x.mean(0, dtype=np.float64)) / x.std(0, ddof=1, dtype=np.float64)).astype(np.float32)
    given = {"lambdas": options.lam} if options.nec is None else {"nec": options.nec}
    searched = ElasticNetPath(alpha=ALPHA, **given).fit(x, y)
    lam = searched.solution_.lam
    exact = ElasticNetPath(lambdas=lam, alpha=ALPHA, dtype="float64", tol=1e-8, max_iter=10_000).fit(x, y)
    best = judge(x, y, exact.solution_, lam)[0]
    share = np.linalg.eigvalsh(np.corrcoef(x.T))[-1] / x.shape[1]
    print(
        f"\na. n, K, L {SINGLE}, {correlation} correlation (the first component has {share:.0%} of the "
        f"variance), lambda {lam:.2e}, {lam / searched.lambda_max_:.1%} of the largest, accuracy in training "
        f"{exact.score(x, y):.3f}"
    )
    wanted = judge(x, y, fit_ours(x, y, lam), lam)[0]
    contenders = {"ElasticNetPath": lambda: fit_ours(x, y, lam), "its solver alone": solver_alone(x, y, lam)}
    for name, epochs in fewest_epochs(x, y, lam, wanted, options).items():
        contenders[f"sklearn saga, {name}"] = functools.partial(fit_sklearn, x, y, lam, epochs, options.seed)
    if importlib.util.find_spec("glm_saga"):
        step = min((0.1, 0.03, 0.01), key=lambda step: judge(x, y, fit_glm_saga(x, y, lam, step, 20, options), lam))
        contenders[f"glm-saga, {EQUAL:g}"] = lambda: fit_glm_saga(x, y, lam, step, options.saga_epochs, options, wanted)
    else:
        print("glm-saga is left out, it is not installed: pip install 'cbm-lightning[bench]'")
    heads = take_turns(contenders, options.repeats)
    print(f"\n{'':24}{'seconds':>24}{'objective / ours - 1':>22}{'/ optimum - 1':>15}{'KKT':>9}{'NEC':>6}  effort")
    for name, turns in heads.items():
        (objective, kkt), nec = judge(x, y, turns[-1], lam), (np.abs(turns[-1].weight) > 1e-5).sum() / SINGLE[2]
        gaps = f"{objective / wanted - 1:>22.1e}{objective / best - 1:>15.1e}{kkt:>9.1e}{nec:>6.1f}"
        print(f"{name:24}{spread([head.seconds for head in turns], 3):>24}{gaps}  {turns[-1].effort}")
    for name, own in itertools.product(list(heads)[2:], list(heads)[:2]):
        ratio = [other.seconds / ours.seconds for other, ours in zip(heads[name], heads[own], strict=True)]
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
    """As many epochs as asked for; in double precision, in which it is faster and gets further than in single."""
    named = {} if tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 8) else {"penalty": "elasticnet"}
    model = LogisticRegression(
        C=1 / (len(x) * lam), l1_ratio=ALPHA, solver="saga", tol=0.0, max_iter=epochs, random_state=seed, **named
    )
    x = x.astype(np.float64)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tol=0 is never met
        model.fit(x, y)
    return Head(model.coef_, model.intercept_, time.perf_counter() - start, f"{epochs} epochs")


def fewest_epochs(x: Array, y: Array, lam: float, wanted: float, options: argparse.Namespace) -> dict[str, int]:
    """Epochs that scikit-learn needs for our objective, roughly and to 1e-6, and for our KKT; to 10 %."""

    @functools.cache
    def reached(epochs: int) -> dict[str, bool]:
        objective, kkt = judge(x, y, fit_sklearn(x, y, lam, epochs, options.seed), lam)
        gap = objective / wanted - 1
        return {f"{EQUAL:g}": gap <= EQUAL, f"{SAME:g}": gap <= SAME, "KKT": kkt <= TOL}

    found = {}
    for criterion in reached(8):
        few, many = 0, 8
        while many < options.sklearn_epochs and not reached(many)[criterion]:
            few, many = many, min(2 * many, options.sklearn_epochs)
        while many - few > max(1, many // 10):
            middle = (few + many) // 2
            few, many = (few, middle) if reached(middle)[criterion] else (middle, many)
        found[criterion] = many
    return found


class Shuffled:
    """Batches of scores, labels and row numbers as glm-saga wants them, without the cost of a `DataLoader`."""

    def __init__(self, x: Array, y: Array, seed: int) -> None:
        self.x, self.y = torch.from_numpy(x), torch.from_numpy(y)
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for rows in torch.randperm(len(self.y), generator=self.generator).split(256):
            yield self.x[rows], self.y[rows], rows


def fit_glm_saga(
    x: Array, y: Array, lam: float, step: float, budget: int, options: argparse.Namespace, wanted: float = -np.inf
) -> Head:
    """Rounds of epochs, each from where the last one stopped; the look at the objective between them is not timed."""
    from glm_saga.elasticnet import glm_saga

    loader, linear = Shuffled(x, y, options.seed), torch.nn.Linear(x.shape[1], SINGLE[2])
    for parameter in linear.parameters():
        torch.nn.init.zeros_(parameter)
    # a path of one penalty holds the largest only, which it takes from here and divides by alpha
    metadata = {"X": {"num_examples": len(x)}, "y": {"num_classes": SINGLE[2]}, "max_reg": {"nongrouped": lam * ALPHA}}
    given = {"k": 1, "do_zero": False, "tol": 0.0, "metadata": metadata}
    state, seconds, epochs = None, 0.0, 0
    while True:
        some = min(10, budget - epochs)
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # softmax without a dimension
            state = glm_saga(linear, loader, step, some, ALPHA, state=state, **given)["state"]
        seconds, epochs = seconds + time.perf_counter() - start, epochs + some
        parameters = (parameter.detach().numpy().copy() for parameter in linear.parameters())
        head = Head(*parameters, seconds, f"{epochs} epochs, step {step}")
        if epochs >= budget or judge(x, y, head, lam)[0] <= wanted * (1 + EQUAL):
            return head


def levels(correlation: str, options: argparse.Namespace) -> None:
    """One search for all levels of the protocol, and what it found."""
    drawn = DrawnConcepts(*PATH[1:], correlation, options.seed)
    (x, y), (test_x, test_y) = drawn.draw(PATH[0]), drawn.draw(4000)
    seconds = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        path = ElasticNetPath(nec=LEVELS, alpha=ALPHA, tol=TOL).fit(x, y)
        seconds.append(time.perf_counter() - start)
    steps = sum(solution.iterations for solution in path.path_)
    print(
        f"\nb. n, K, L {PATH}, {correlation} correlation: {spread(seconds, 1)} s for six levels, {len(path.path_)} "
        f"penalties, {steps} steps in all\n"
    )
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
    print(f"ANEC {statistics.mean(accuracies):.3f}")
    if missed:
        sys.exit(f"the number of effective concepts is not within 2 % at the levels {missed}")


def large(correlation: str, options: argparse.Namespace) -> None:
    """Write the scores piece by piece, fit them in a process of its own."""
    samples, concepts, classes = LARGE
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        x = np.memmap(folder / "scores", np.float32, "w+", shape=(samples, concepts))
        y, drawn = np.empty(samples, np.int64), DrawnConcepts(concepts, classes, correlation, options.seed)
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
    numbers = 4 * samples * classes + 3 * chunk * (concepts + 3 * classes) + 4 * concepts**2 + 20 * concepts * classes
    bound = 4 * (numbers + 2**24)
    print(
        f"\nlarge. n, K, L {LARGE}, {correlation} correlation, {x.nbytes / 1e6:.0f} MB of scores in chunks of {chunk} "
        f"rows: {found['seconds']:.1f} s, {found['steps']} steps, NEC {found['nec']:.1f}, KKT {found['kkt']:.1e} "
        f"({found['double']:.1e} in double precision)\npeak memory {found['peak'] / 1e6:.0f} MB beyond the "
        f"{found['before'] / 1e6:.0f} MB before, bound {bound / 1e6:.0f} MB"
    )
    if found["peak"] > bound:
        sys.exit("the stated bound of the memory is exceeded")


def large_alone(options: argparse.Namespace) -> dict[str, float]:
    """Fit in this process, and by how much its own memory grew; pages of the file are the system's to drop."""
    samples, concepts, classes = LARGE
    x = np.memmap(options.alone / "scores", np.float32, "r", shape=(samples, concepts))
    y = np.load(options.alone / "labels.npy")
    path = ElasticNetPath(n_lambdas=1, eps=options.share, alpha=ALPHA, tol=TOL, chunk_size=options.chunk_size)
    # libraries load and threads start here, not in what is measured
    ElasticNetPath(n_lambdas=1, eps=0.5, chunk_size=500).fit(*DrawnConcepts(concepts, classes, "mild", 0).draw(1000))
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
        "chunk_size": options.chunk_size or CHUNK_NUMBERS // concepts,
        "steps": solution.iterations,
        "nec": solution.nec,
        "kkt": solution.kkt,
        "double": judge(x, y, solution, solution.lam)[1],
    }


def anonymous_memory() -> int:
    """Bytes of this process that are in memory and belong to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


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

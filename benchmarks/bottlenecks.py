"""What each bottleneck costs: time of a training step and of a prediction, and memory, beside the linear bottleneck.

    OMP_NUM_THREADS=1 python benchmarks/bottlenecks.py --figure benchmarks/bottleneck_growth.png

Every model gets the same drawn features (512 numbers, and 7 x 7 tokens of 512, as a ResNet-18 makes at 224 pixels), so
that what is timed is bottleneck, head, losses and optimizer, without the backbone that all of them share. A training
step is forward, losses, backward and Adam; a prediction is what a test step computes, in inference mode, with its
optimisation and its samples. The contenders take turns, and each ratio is taken within a turn; the table gives
medians. ``peak`` is what the process of one method alone holds more after its training steps than before the model was
made (a process a method, looked at every half millisecond; parameters and Adam's state included). Each method runs with
its default options: 100
samples where concepts are sampled (50 embeddings in one of them), 6 rollout steps at most, and so on.

The figure shows how a training step grows with the number of concepts.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from cbm_lightning import CBMModule, ConceptSet, bottlenecks
from cbm_lightning.backbones.base import Backbone
from cbm_lightning.bottlenecks import Bottleneck
from cbm_lightning.randomness import step_generator
from cbm_lightning.types import Batch, FeatureDims, Features

WIDTH, GRID, CLASSES = 512, (7, 7), 200
PLAIN = "linear"
METHODS: dict[str, Callable[[], Bottleneck]] = {
    PLAIN: lambda: bottlenecks.LinearBottleneck(),
    "embedding": lambda: bottlenecks.EmbeddingBottleneck(),
    "intcem": lambda: bottlenecks.InterventionAwareBottleneck(),
    "probcbm": lambda: bottlenecks.ProbabilisticBottleneck(),
    "ecbm": lambda: bottlenecks.EnergyBottleneck(),
    "scbm": lambda: bottlenecks.StochasticBottleneck(),
    "scbm, global": lambda: bottlenecks.StochasticBottleneck(covariance="global"),
    "autoregressive": lambda: bottlenecks.AutoregressiveBottleneck(),
    "similarity": lambda: bottlenecks.SimilarityBottleneck(),
    "sparse_cbm": lambda: bottlenecks.ConceptLayerBottleneck(),
    "botcl": lambda: bottlenecks.SlotBottleneck(),
    "sl_cbm": lambda: bottlenecks.SpatialBottleneck(),
}
WARM_UP = 2


class GivenFeatures(Backbone):
    """Promises features that the batches bring."""

    def __init__(self) -> None:
        super().__init__()
        self.dims = FeatureDims(WIDTH, WIDTH, GRID)

    def encode(self, x: Tensor) -> Features:
        """Never called."""
        raise RuntimeError("the batches bring their features")


def make(method: str, concepts: int) -> CBMModule:
    """The model of a method with its default options."""
    torch.manual_seed(0)
    vectors = torch.randn(concepts, WIDTH)
    concept_set = ConceptSet([f"concept {k}" for k in range(concepts)], embeddings=vectors)
    return CBMModule(GivenFeatures(), METHODS[method](), concepts=concept_set, num_classes=CLASSES)


def draw(size: int, concepts: int) -> Batch:
    """One batch of drawn features, annotations and labels."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(size, GRID[0] * GRID[1], WIDTH, generator=generator)
    annotations = (torch.rand(size, concepts, generator=generator) < 0.5).float()
    label = torch.randint(0, CLASSES, (size,), generator=generator)
    return {"tokens": tokens, "embedding": tokens.mean(1), "concepts": annotations, "label": label}


class Steps:
    """Training steps and predictions of one method."""

    def __init__(self, method: str, concepts: int, batch_size: int) -> None:
        self.model, self.batch = make(method, concepts), draw(batch_size, concepts)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.count = 0

    def train(self) -> None:
        """One training step."""
        model, batch = self.model.train(), self.model.read_batch(self.batch)
        self.count += 1
        with model.bottleneck.drawing(step_generator(0, self.count)):
            output = model.bottleneck(model.encode(batch), batch.get("concepts"))
            total, _ = model.losses(model.head(output), output, batch)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()

    def predict(self) -> None:
        """One prediction."""
        with torch.inference_mode():
            self.model.eval()(self.batch)


def timed(work: Callable[[], None]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    work()
    return 1000.0 * (time.perf_counter() - start)


def compare(methods: Sequence[str], concepts: int, options: argparse.Namespace) -> pd.DataFrame:
    """Milliseconds of each method at one number of concepts, a row a method, with ratios within a turn."""
    steps = {method: Steps(method, concepts, options.batch_size) for method in methods}
    found: dict[str, dict[str, list[float]]] = {}
    for kind in ("train", "predict"):
        times: dict[str, list[float]] = {method: [] for method in methods}
        for turn in range(WARM_UP + options.repeats):
            shift = turn % len(methods)
            for method in [*methods[shift:], *methods[:shift]]:
                elapsed = timed(getattr(steps[method], kind))
                if turn >= WARM_UP:
                    times[method].append(elapsed)
        found[kind] = times
    rows = []
    for method in methods:
        row: dict[str, object] = {"method": method, "K": concepts}
        for kind, times in found.items():
            ratios = [mine / plain for mine, plain in zip(times[method], times[PLAIN], strict=True)]
            row[f"{kind} ms"] = statistics.median(times[method])
            row[f"{kind} ratio"] = statistics.median(ratios)
        row["weights"] = sum(weight.numel() for weight in steps[method].model.parameters())
        rows.append(row)
    return pd.DataFrame(rows)


def peak(method: str, options: argparse.Namespace) -> float:
    """MiB that a process of its own holds at most beyond what it held before the model was made."""
    arguments = ["--peak_of", method, "--concepts", str(options.concepts), "--batch_size", str(options.batch_size)]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak"])


def report_peak(method: str, options: argparse.Namespace) -> None:
    """Print the peak of this process."""
    batch = draw(options.batch_size, options.concepts)
    (batch["tokens"] @ batch["tokens"][0].T).sum()  # what the first product allocates belongs to no method
    before, highest, done = resident(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.0005):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    steps = Steps(method, options.concepts, options.batch_size)
    for _ in range(3):
        steps.train()
    steps.predict()
    done.set()
    watcher.join()
    print(json.dumps({"peak": highest - before}))


def resident() -> float:
    """MiB that this process holds now (Linux). Its high-water mark would be that of the imports."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def draw_growth(table: pd.DataFrame, path: Path) -> None:
    """Milliseconds of a training step and of a prediction by the number of concepts, logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("train", "predict"), strict=True):
        for i, (method, rows) in enumerate(table.groupby("method", sort=False)):
            # the colours repeat after ten
            style = "-" if i < 10 else "--"
            axes.plot(rows["K"], rows[f"{kind} ms"], style, marker="o", markersize=3, label=method)
        axes.set(xscale="log", yscale="log", xlabel="concepts", ylabel="ms a batch")
        axes.set_title({"train": "training step", "predict": "prediction"}[kind])
        axes.set_xticks(sorted(set(table["K"])), [str(k) for k in sorted(set(table["K"]))])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=112)
    parser.add_argument("--growth", type=int, nargs="*", default=[32, 64, 128, 256, 512])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10, help="turns of each method")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--figure", type=Path, help="where to draw the growth")
    parser.add_argument("--peak_of", choices=list(METHODS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    if options.peak_of:
        report_peak(options.peak_of, options)
        return
    methods = [PLAIN, *(method for method in options.methods if method != PLAIN)]
    table = compare(methods, options.concepts, options)
    table["peak MiB"] = [peak(method, options) for method in methods]
    print(table.round(2).to_string(index=False))
    if options.growth:
        few = argparse.Namespace(**{**vars(options), "repeats": max(options.repeats // 3, 2)})
        grown = pd.concat([compare(methods, concepts, few) for concepts in options.growth])
        print(grown.pivot(index="method", columns="K", values="train ms").loc[methods].round(1).to_string())
        print(grown.pivot(index="method", columns="K", values="predict ms").loc[methods].round(1).to_string())
        if options.figure:
            draw_growth(grown, options.figure)


if __name__ == "__main__":
    main()

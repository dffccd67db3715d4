"""How much faster is the descent of an ECBM than a Python loop over its concepts? Same steps, same answer.

    OMP_NUM_THREADS=1 python benchmarks/energy_inference.py

The loop is inference as the released code of Xu et al. (ICLR 2024) writes it: a linear map of its own for each concept,
all concept embeddings concatenated for the joint energy, and torch's Adam on automatic gradients; but with soft
mixtures in the joint energy and the best point kept, so that both descend on the same function. Both start from pooled
features. They take turns, and the ratio is taken turn by turn: median, and quartiles in brackets. Weights are drawn,
for time does not depend on them. Nothing was tuned.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, relu

from cbm_lightning import ConceptSet
from cbm_lightning.bottlenecks import EnergyBottleneck
from cbm_lightning.bottlenecks.ecbm_inference import Held, Point, descend
from cbm_lightning.types import FeatureDims, Features

WEIGHTS = (1.0, 1.0, 0.01)
STEP_SIZE = 0.1


def vectorised(bottleneck: EnergyBottleneck, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Logits of concepts and classes by the package's descent."""
    with torch.inference_mode():
        terms = bottleneck.terms(Features(x))
        zeros = torch.zeros(len(x), len(bottleneck.concepts))
        nothing = torch.zeros_like(zeros, dtype=torch.bool)
        start = Point(zeros, torch.zeros(len(x), len(bottleneck.class_embeddings)))
        weights = torch.tensor(WEIGHTS).expand(len(x), 3)
        held = Held(nothing, zeros, nothing)
        found = descend(terms, start, held, weights, bottleneck.activation, steps=steps, step_size=STEP_SIZE)
    return found.logits, found.classes


class Loop:
    """The same descent, concept by concept.

    Args:
        bottleneck: Whose weights it takes over.
    """

    def __init__(self, bottleneck: EnergyBottleneck) -> None:
        self.bottleneck = bottleneck.requires_grad_(False)
        self.maps = [nn.Linear(bottleneck.embedding_size, 1, bias=False) for _ in bottleneck.concepts]
        for own, weight in zip(self.maps, bottleneck.concept_weight, strict=True):
            own.requires_grad_(False).weight.copy_(weight.unsqueeze(0))

    def energy(self, x: Tensor, pairs: Tensor, classes: Tensor) -> Tensor:
        """``[B]`` the weighted energy of concept logits ``[B, K, 2]`` and class logits ``[B, L]``."""
        own = self.bottleneck
        u = normalize(classes.softmax(-1) @ own.class_embeddings, dim=-1)
        probs = pairs.softmax(-1)
        z, evidence = own.to_class(x), own.to_concepts(x)
        energy = WEIGHTS[0] * (relu(z + z * u) @ own.class_weight)
        mixed = []
        for k, own_map in enumerate(self.maps):
            v = probs[:, k, :1] * own.concept_embeddings[k, 0] + probs[:, k, 1:] * own.concept_embeddings[k, 1]
            mixed.append(v)
            v = normalize(v, dim=-1)
            energy = energy + WEIGHTS[1] * own_map(relu(evidence + evidence * v)).squeeze(-1)
        h = own.to_joint(torch.cat(mixed, -1))
        return energy + WEIGHTS[2] * (relu(h + h * u) @ own.joint_weight)

    def __call__(self, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Logits of concepts and classes."""
        pairs = torch.zeros(len(x), len(self.maps), 2, requires_grad=True)
        classes = torch.zeros(len(x), len(self.bottleneck.class_embeddings), requires_grad=True)
        optimizer = torch.optim.Adam([pairs, classes], lr=STEP_SIZE)
        lowest, best = torch.full((len(x),), torch.inf), [pairs.detach().clone(), classes.detach().clone()]
        for step in range(steps + 1):
            energy = self.energy(x, pairs, classes)
            better = energy.detach() < lowest
            lowest = torch.where(better, energy.detach(), lowest)
            best = [
                torch.where(better.view(-1, *[1] * (now.ndim - 1)), now.detach(), old)
                for now, old in zip((pairs, classes), best, strict=True)
            ]
            if step < steps:
                optimizer.zero_grad()
                energy.sum().backward()
                optimizer.step()
        return best[0][..., 1] - best[0][..., 0], best[1]


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.no_grad()
def made(concepts: int, options: argparse.Namespace) -> tuple[EnergyBottleneck, Tensor]:
    """A bottleneck with drawn weights, and pooled features."""
    torch.manual_seed(0)
    bottleneck = EnergyBottleneck(options.embedding_size).eval()
    bottleneck.build(FeatureDims(options.width), ConceptSet([str(k) for k in range(concepts)]), options.classes)
    return bottleneck, torch.randn(options.batch_size, options.width)


def row(concepts: int, options: argparse.Namespace) -> dict[str, str | int]:
    """Both at one number of concepts."""
    bottleneck, x = made(concepts, options)
    with torch.no_grad():
        loop = Loop(bottleneck)
    fast, slow = vectorised(bottleneck, x, options.steps), loop(x, options.steps)
    apart = max(float((a - b).abs().max()) for a, b in zip(fast, slow, strict=True))
    times = [
        (seconds(lambda: vectorised(bottleneck, x, options.steps)), seconds(lambda: loop(x, options.steps)))
        for _ in range(options.turns)
    ]
    ours, theirs = torch.tensor(times, dtype=torch.float64).unbind(1)
    return {
        "K": concepts,
        "ms a step": quartiles(1e3 * ours / options.steps),
        "loop": quartiles(1e3 * theirs / options.steps),
        "times faster": quartiles(theirs / ours),
        "logits differ by": f"{apart:.0e}",
    }


def quartiles(values: Tensor) -> str:
    """Median, with the quartiles in brackets."""
    low, middle, high = values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)).tolist()
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, nargs="+", default=[32, 112, 512])
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--embedding_size", type=int, default=512)
    parser.add_argument("--width", type=int, default=2048, help="of the pooled features")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(pd.DataFrame([row(concepts, options) for concepts in options.concepts]).to_string(index=False))


if __name__ == "__main__":
    run()

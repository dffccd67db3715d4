"""Do exact maps point at the parts that concepts are about? Photographs of ten species with their part locations.

    OMP_NUM_THREADS=2 python benchmarks/cub_points.py --shared ../shared

The recipe `cub_joint` on frozen features, as `cub10.py` trains it: mobilenetv2_100 with iNaturalist bird weights at 224
pixels (a grid of 7 x 7) and a linear bottleneck. `SaliencyStudy` then measures exact maps on all official test
photographs. The attributes of single images are derived, not original (see `tests/cub_tree.py`), and only their votes
are used, which are the published ones: part locations are real, and so are the class-level concepts, from which the
models learn and which say what is present.

Keypoint distance (Furby et al. 2023) is in diagonals of the image, the less the better. Concept location (Aysel et al.
2025) is the share of the three most important concepts whose point lies in the most active 1, 3 or 6 twelfths of their
map, the more the better. Chance is a place drawn uniformly, and a weak rival, for these photographs are crops around a
bird. So three more rivals point at the same concepts of the same images:

* ``centre``: the closer to the middle of the image, the more active.
* ``untrained``: exact maps of the bottleneck with random weights.
* ``swapped``: each concept has the exact map of another one of the same image that is about other parts. Maps that are
  better than these tell parts of a bird apart.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from cbm_lightning import CBMModule
from cbm_lightning.data import CUB200
from cbm_lightning.data.cub_parts import candidate_parts
from cbm_lightning.saliency import ExactMaps, SaliencyMethod, SaliencyStudy
from cbm_lightning.saliency.randomisation import randomised
from cbm_lightning.saliency.study import Counted
from cbm_lightning.saliency.subject import Subject

sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import cub10
from cub_tree import write_cub_tree

ALPHAS = (1, 3, 6)
COUNTED: tuple[Counted, ...] = ("present", "predicted")
Found = dict[tuple[str, str], dict[str, Any]]


class Centre(SaliencyMethod):
    """The middle of the image, whatever it shows."""

    concept_specific = False

    def attribute(self, subject: Subject, image: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
        """The same map for all pairs."""
        y, x = (torch.arange(size) - (size - 1) / 2 for size in image.shape[2:])
        return -torch.hypot(y[:, None], x).expand(len(rows), -1, -1)


class Untrained(ExactMaps):
    """Exact maps of random weights."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def attribute(self, subject: Subject, image: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
        """The bottleneck's own maps, while it is random."""
        with randomised(subject.bottleneck, self.seed):
            return super().attribute(subject, image, rows, concepts)


class Swapped(ExactMaps):
    """Exact maps of other concepts; ``apart [K, K]`` says which two are about different parts."""

    def __init__(self, apart: Tensor, seed: int) -> None:
        self.apart, self.seed = apart, seed

    def attribute(self, subject: Subject, image: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
        """The map of another pair of the same image, drawn; its own where the image has no fitting one."""
        fits = (rows[:, None] == rows) & self.apart[concepts][:, concepts]
        fits |= torch.eye(len(rows), dtype=torch.bool) & ~fits.any(1, keepdim=True)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.multinomial(fits.float(), 1, generator=generator)[:, 0]
        return super().attribute(subject, image, rows, concepts[drawn])


def encode_once(model: CBMModule) -> None:
    """Have the model remember the features of its last images, which every study of a batch asks for."""
    encode, last = model.encode, []

    def remembering(batch: dict[str, Any]) -> Any:
        if not last or not torch.equal(last[0], batch["image"]):
            last[:] = [batch["image"], encode(batch)]
        return last[1]

    model.encode = remembering  # type: ignore[method-assign]


def studies(model: CBMModule, data: CUB200, seed: int) -> dict[tuple[str, str], list[SaliencyStudy]]:
    """For each kind of maps and what is counted a study of each alpha; the first measures distances too."""
    parts = candidate_parts(data.concept_set.names, data.part_names).float()
    methods: dict[str, SaliencyMethod] = {
        "exact": ExactMaps(),
        "centre": Centre(),
        "untrained": Untrained(seed),
        "swapped": Swapped(parts @ parts.T == 0, seed),
    }
    wanted: list[dict[str, Any]] = [{"concept_location": {"alpha": alpha}} for alpha in ALPHAS]
    wanted[0]["keypoint_distance"] = {}
    return {
        (maps, counted): [
            SaliencyStudy(model, method, metrics, counted=counted, images_at_once=data.batch_size) for metrics in wanted
        ]
        for counted in COUNTED
        for maps, method in methods.items()
    }


def measure(model: CBMModule, tree: Path, seed: int) -> Found:
    """Study a trained model on all test photographs."""
    data = CUB200(str(tree), classes=list(range(1, 11)), parts=True, augment=False, batch_size=16).follow(model)
    data.setup()
    encode_once(model.eval())
    made = studies(model, data, seed)
    for batch in data.test_dataloader():
        with torch.no_grad():
            prediction = model(batch)
        for row in made.values():
            for study in row:
                study.update(batch, prediction)
    found = {}
    for key, row in made.items():
        results = [study.compute() for study in row]
        counts = results[0].counts["keypoint_distance"]
        found[key] = {
            "pairs": int(counts.sum()),
            "concepts": int((counts > 0).sum()),
            "chance": results[0].chance["keypoint_distance"],
            "values": [results[0].values["keypoint_distance"], *(r.values["concept_location"] for r in results)],
        }
    return found


def report(found: list[Found], accuracies: list[float]) -> None:
    """Means over the seeds of training, and their standard deviation."""
    print(f"\nlabel accuracy {cell(accuracies)}, {len(found)} seeds\n")
    locations = "".join(f" | location, {alpha}/12 ({alpha / 12:.3f})" for alpha in ALPHAS)
    print(f"| counted | maps | pairs (concepts) | keypoint distance (chance){locations} |")
    print("| --- " * (4 + len(ALPHAS)) + "|")
    for key in found[0]:
        several = [one[key] for one in found]
        distances, *shares = zip(*(one["values"] for one in several), strict=True)
        pairs = sum(one["pairs"] for one in several) / len(several)
        concepts = sum(one["concepts"] for one in several) / len(several)
        chance = cell([one["chance"] for one in several], spread=False)
        cells = [f"{pairs:.0f} ({concepts:.0f})", f"{cell(distances)} ({chance})", *map(cell, shares)]
        print("| " + " | ".join([key[1], f"`{key[0]}`", *cells]) + " |")


def cell(values: Any, spread: bool = True) -> str:
    """Mean and standard deviation."""
    numbers = torch.tensor([float(value) for value in values])
    return f"{numbers.mean():.3f}" + (f" ± {numbers.std(correction=0):.3f}" if spread else "")


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/cub10")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # the command line is called from Python below
    found, accuracies = [], []
    with tempfile.TemporaryDirectory() as scratch:
        tree, config = Path(scratch) / "cub", Path(scratch) / "cub10.yaml"
        write_cub_tree(tree, options.shared / "data" / "cub10")
        config.write_text(yaml.safe_dump(cub10.overrides(options.shared.resolve(), tree, False, options.epochs)))
        for seed in range(options.seeds):
            cli, metrics = cub10.train("cub_joint", config, seed, Path(scratch) / "runs")
            accuracies.append(metrics["test/label_acc"])
            found.append(measure(cli.model, tree, seed))
    report(found, accuracies)


if __name__ == "__main__":
    run()

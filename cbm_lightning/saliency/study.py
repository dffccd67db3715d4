"""How well a saliency method places the concepts of a model, over the batches of a split."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from cbm_lightning.saliency.evidence import read_evidence
from cbm_lightning.saliency.maps import attribute, differentiable
from cbm_lightning.saliency.measures import DEFAULT, MEASURES, NEEDS, Seen, make_metrics
from cbm_lightning.saliency.methods.base import SaliencyMethod
from cbm_lightning.saliency.pairs import upsample
from cbm_lightning.saliency.randomisation import randomised
from cbm_lightning.saliency.subject import Localisable, Subject, check_image
from cbm_lightning.types import Batch, Prediction

if TYPE_CHECKING:
    import pandas as pd

Counted = Literal["present", "predicted"]
Wanted = Sequence[str] | Mapping[str, Mapping[str, Any] | None]


@dataclass(frozen=True)
class SaliencyResult:
    """What a study found, over all processes; all tensors are on the CPU.

    Attributes:
        names: ``K`` concept names.
        values: Metric to its value, the mean over concepts (over images or classes for some), NaN where nothing was
            measured.
        chance: Metric to what chance would score.
        per_concept: Metric to ``[K]`` values, NaN where a concept was not measured; metrics of maps only.
        chance_per_concept: The same for chance.
        counts: Metric to ``[K]`` int64, how many pairs were measured.
    """

    names: tuple[str, ...]
    values: dict[str, Tensor]
    chance: dict[str, Tensor]
    per_concept: dict[str, Tensor]
    chance_per_concept: dict[str, Tensor]
    counts: dict[str, Tensor]

    def scalars(self) -> dict[str, Tensor]:
        """``METRIC`` and ``METRIC_chance`` for logging, NaN where no pair could be measured."""
        return self.values | {f"{name}_chance": value for name, value in self.chance.items()}

    def table(self) -> pd.DataFrame:
        """A row a metric: ``metric``, ``value``, ``chance``, ``concepts`` and ``pairs`` measured."""
        import pandas as pd

        rows = []
        for name, value in self.values.items():
            counts = self.counts.get(name)
            measured = {} if counts is None else {"concepts": int((counts > 0).sum()), "pairs": int(counts.sum())}
            rows.append({"metric": name, "value": float(value), "chance": float(self.chance[name]), **measured})
        return pd.DataFrame(rows, columns=["metric", "value", "chance", "concepts", "pairs"])

    def concept_table(self) -> pd.DataFrame:
        """A row a concept: ``concept``, ``pairs`` (images that count), and each metric beside its chance level."""
        import pandas as pd

        columns: dict[str, Any] = {"concept": list(self.names)}
        if self.counts:
            columns["pairs"] = torch.stack(list(self.counts.values())).amax(0).tolist()
        for name, values in self.per_concept.items():
            columns[name] = values.tolist()
            columns[f"{name}_chance"] = self.chance_per_concept[name].tolist()
        return pd.DataFrame(columns)


class SaliencyStudy:
    """Makes the maps of concepts that images show, and measures them; no Trainer is needed.

    A pair of an image and a concept counts if the batch's masks, boxes or points show the concept and the annotation
    does not deny it; in a batch without them, if the annotation (or, without one, the model) says that it is there.

    Args:
        model: A `CBMModule`, or what has the members of `Localisable`.
        method: A saliency method or its short name.
        metrics: Short names, or short name to options; `measures.MEASURES` lists them. By default pointing game, energy
            in mask, pixel AUROC and IoU at half maximum where there are masks, keypoint distance where there are
            points.
        concepts: Names or positions of the concepts whose maps are measured; all by default. Metrics without maps
            (concept existence and importance) look at all.
        counted: ``"present"``, or ``"predicted"``: only where the model says so too (a probability of one half).
        images_at_once: Images whose maps are in memory at a time.
        seed: Of the random bottleneck in the metric ``randomisation``.

    Raises:
        ValueError: A name is unknown (near matches are listed), or an option is out of range.
        TypeError: The model lacks what saliency needs.

    Example:
        >>> from cbm_lightning import CBMModule
        >>> from cbm_lightning.data import RenderedBirds
        >>> birds = RenderedBirds(num_test=4, masks=True)
        >>> birds.setup("test")
        >>> model = CBMModule("timm/test_resnet.r160_in1k", data=birds)
        >>> study = SaliencyStudy(model, "grad_cam")
        >>> for batch in birds.test_dataloader():
        ...     study.update(batch)
        >>> sorted(study.compute().values)
        ['energy_in_mask', 'iou_at_half_max', 'pixel_auroc', 'pointing_game']
    """

    def __init__(
        self,
        model: Localisable,
        method: str | SaliencyMethod = "auto",
        metrics: Wanted | None = None,
        concepts: Sequence[str | int] | None = None,
        counted: Counted = "present",
        images_at_once: int = 16,
        seed: int = 0,
    ) -> None:
        if counted not in get_args(Counted):
            raise ValueError(f"counted: expected one of {get_args(Counted)}, got {counted!r}")
        if images_at_once < 1:
            raise ValueError(f"images_at_once: expected at least 1, got {images_at_once}")
        self.subject = Subject(model)
        self.method = SaliencyMethod.make(method)
        self.concepts = self.subject.find(concepts)
        self.counted, self.images_at_once, self.seed = counted, images_at_once, seed
        self._sizes = (len(self.subject.concepts), int(getattr(model, "num_classes", 2)))
        self._real = self.subject.concepts.is_real()
        # the default depends on what batches bring
        self._default = metrics is None
        self.metrics = make_metrics(metrics or (), *self._sizes)

    def update(self, batch: Batch, prediction: Prediction | None = None) -> None:
        """Make and measure the maps of a batch.

        Args:
            batch: As `CBMModule.read_batch` reads it, on the model's device: with ``image``, and ``concept_masks``,
                ``concept_boxes``, ``concept_points``, ``concepts`` and ``label`` as far as there are any.
            prediction: Of the batch, if it is known already.

        Raises:
            ValueError: The batch lacks what a metric needs, or the model what the method needs.
        """
        if not isinstance(batch, Mapping):
            raise TypeError(f"batch: expected a dict, as read_batch of the model makes it, got {type(batch).__name__}")
        if "image" not in batch:
            raise ValueError(f"image: concepts are localised in images, and the batch has only {sorted(batch)}")
        image = check_image(batch["image"])
        evidence = read_evidence(batch, self._sizes[0])
        if self._default:
            given = {"masks": evidence.masks, "points": evidence.points}
            self._add([name for kind, names in DEFAULT.items() if given[kind] is not None for name in names])
        if not self.metrics:
            return
        if prediction is None:
            with differentiable(self.subject.model), torch.no_grad():
                prediction = self.subject.predict(batch)
        known = {
            "masks": evidence.masks,
            "points": evidence.points,
            "annotations": self._annotations(batch),
            "labels": batch.get("label"),
            "probs": prediction.concepts.probs.float(),
            "values": self.subject.values(prediction),
            "classes": self.subject.classes(prediction),
            "importance": self.subject.importance(prediction),
        }
        weight = self.subject.weight()
        metrics = self._measurable({**known, "weight": weight}, batch)
        wanted = self._wanted(known, evidence.shown())
        for start in range(0, len(image), self.images_at_once):
            rows = slice(start, start + self.images_at_once)
            some = {name: None if value is None else value[rows] for name, value in known.items()}
            seen = self._see(image[rows], some, wanted[rows], weight)
            for name, metric in metrics.items():
                MEASURES[name].update(metric.to(image.device), seen)

    def compute(self) -> SaliencyResult:
        """What was found; a collective call where there are several processes."""
        self._agree()
        values, chance, each, each_chance, counts = (dict[str, Tensor]() for _ in range(5))
        metric: Any
        for name, metric in self.metrics.items():
            if hasattr(metric, "summary"):
                found = metric.summary()
                values[name], chance[name] = found.value.cpu(), found.chance.cpu()
                each[name], each_chance[name] = found.per_concept.cpu(), found.chance_per_concept.cpu()
                counts[name] = found.counts.cpu()
                continue
            with warnings.catch_warnings():
                # a process that saw no batch has its part in the sum all the same
                warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
                value, level = metric.compute(), metric.chance()
            several = value if isinstance(value, dict) else {name: value}
            values |= {key: one.cpu() for key, one in several.items()}
            chance |= {key: (level[key] if isinstance(level, dict) else level).cpu() for key in several}
        return SaliencyResult(tuple(self.subject.concepts.names), values, chance, each, each_chance, counts)

    def reset(self) -> None:
        """Forget what was measured."""
        for metric in self.metrics.values():
            metric.reset()

    def _add(self, names: Sequence[str]) -> None:
        made = make_metrics([name for name in names if name not in self.metrics], *self._sizes)
        # the same order everywhere, for processes take turns metric by metric
        everything = self.metrics | made
        self.metrics = {name: everything[name] for name in sorted(everything, key=list(MEASURES).index)}

    def _agree(self) -> None:
        """Have the same metrics as all other processes, of which one may have seen no batch."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        device = next(self.subject.backbone.parameters(), torch.empty(0)).device
        if self._default:
            here = torch.tensor([float(name in self.metrics) for name in MEASURES], device=device)
            torch.distributed.all_reduce(here, torch.distributed.ReduceOp.MAX)
            self._add([name for name, wanted in zip(MEASURES, here.tolist(), strict=True) if wanted])
        for metric in self.metrics.values():
            metric.to(device)

    def _annotations(self, batch: Batch) -> Tensor | None:
        """``[B, K]`` float annotations; NaN for real-valued concepts, which are neither there nor not."""
        found: Tensor | None = batch.get("concepts")
        return None if found is None else found.float().masked_fill(self._real.to(found.device), torch.nan)

    def _measurable(self, known: Mapping[str, Tensor | None], batch: Batch) -> dict[str, Metric]:
        """The metrics whose needs are met: all that were asked for, or an error; of the default what there is."""
        found = {}
        for name, metric in self.metrics.items():
            missing = [need for need in MEASURES[name].needs if known[need] is None]
            if not missing:
                found[name] = metric
            elif not self._default:
                needed = " and ".join(NEEDS[need] for need in missing)
                raise ValueError(
                    f"metrics: {name} needs {needed}; {type(self.subject.model).__name__} and a batch of "
                    f"{sorted(batch)} do not bring that"
                )
        return found

    def _wanted(self, known: Mapping[str, Tensor | None], shown: Tensor | None) -> Tensor:
        """``[B, K]`` bool, the pairs that count."""
        probs, annotations = known["probs"], known["annotations"]
        assert probs is not None
        predicted = probs >= 0.5
        if shown is None:
            shown = predicted if annotations is None else annotations >= 0.5
        elif annotations is not None:
            # the part may be there without the concept; NaN is not below one half
            shown = shown & ~(annotations < 0.5)
        chosen = torch.zeros_like(shown)
        chosen[:, self.concepts] = True
        return shown & chosen & (predicted if self.counted == "predicted" else chosen)

    def _see(self, image: Tensor, known: dict[str, Any], wanted: Tensor, weight: Tensor | None) -> Seen:
        size = (image.shape[-2], image.shape[-1])
        rows, concepts = wanted.nonzero(as_tuple=True)

        def made() -> Tensor:
            return upsample(attribute(self.subject, image, self.method, rows, concepts), size)

        def again() -> Tensor:
            with randomised(self.subject.bottleneck, self.seed):
                return made()

        def score(pixels: Tensor) -> Tensor:
            with differentiable(self.subject.model), torch.no_grad():
                return self.subject.logits(pixels)

        for name in ("masks", "points"):
            known[name] = None if known[name] is None else known[name][rows, concepts]
        return Seen(score, image, made(), rows, concepts, again=again, weight=weight, **known)

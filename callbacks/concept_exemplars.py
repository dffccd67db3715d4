"""`ConceptExemplars`: the images that activate each concept most, for people to see what it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn.functional import interpolate
from torchmetrics.utilities.distributed import gather_all_tensors

from cbm_lightning.bottlenecks.activation import ConceptActivation
from cbm_lightning.callbacks.evaluation import NamedEvaluation, Stage
from cbm_lightning.callbacks.exemplars_figure import Exemplars, draw_exemplars
from cbm_lightning.callbacks.loggers import log_figure, to_bytes
from cbm_lightning.callbacks.passes import Positions, flatten, prediction_of
from cbm_lightning.callbacks.prediction_table import displayable
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.types import ConceptOutput

# pixels of the longer side of what is kept of an image
THUMBNAIL = 128


class ConceptExemplars(NamedEvaluation):
    """Logs a picture of the images of an evaluation that activate each concept most.

    The picture ``{val,test}/exemplars/figure`` has a row a concept. Where the model has exact maps of its concepts
    (those it computes with, or those of a linear bottleneck), an image is bright where the concept was found. Concepts
    are ranked by their score, so that saturated probabilities make no ties; members of a categorical group by their log
    probability. Under each image stands the probability, or the value of a real-valued concept. The picture goes to
    every logger, or to files, see `loggers`.

    It looks at all samples of the first loader and keeps thumbnails of the best so far, so memory does not grow with
    the data; the picture is the same on any number of processes.

    Args:
        images: Images a concept.
        concepts: Which concepts: their names, or how many, the first ones of the concept set.
        stages: Where to run: ``"val"``, ``"test"`` or both.
        every_n_epochs: Run in every n-th validation of a fit.
        name: Stands in the log keys, so that several can work in one Trainer.

    Attributes:
        result: What the latest picture shows, a row a concept, on the first process; empty before the first.

    Raises:
        ValueError: An option is out of range, a concept does not exist, or (with the first batch) there are no images.
        TypeError: The LightningModule has no ``concept_set`` or ``read_batch``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ConceptExemplars(images=8)], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        images: int = 5,
        concepts: int | Sequence[str] = 20,
        stages: Sequence[Stage] = ("test",),
        every_n_epochs: int = 1,
        name: str = "exemplars",
    ) -> None:
        super().__init__(stages, name, every_n_epochs)
        if isinstance(concepts, str):
            raise ValueError(f"concepts: expected a list of names or a number, got {concepts!r}")
        number = concepts if isinstance(concepts, int) else len(concepts)
        for field, value in {"images": images, "concepts": number}.items():
            if value < 1:
                raise ValueError(f"{field}: expected at least 1, got {value}")
        self.images = images
        self.concepts = concepts if isinstance(concepts, int) else list(concepts)
        self.result: list[Exemplars] = []
        self._kept: dict[str, Tensor] = {}
        self._positions: Positions | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the concepts against the model, and the name against other callbacks of this kind."""
        self.refuse_namesakes(trainer)
        needed = ("concept_set", "read_batch")
        if missing := [name for name in needed if not hasattr(pl_module, name)]:
            raise TypeError(
                f"{type(self).__name__} needs a module that predicts concepts, {type(pl_module).__name__} has no "
                f"{missing}: use CBMModule, or give it concept_set, read_batch and a call that returns a Prediction"
            )
        self._chosen(cast(Any, pl_module).concept_set)

    def begin(self, trainer: Trainer, pl_module: LightningModule, stage: Stage, loaders: Any) -> None:
        """Forget what was kept; start if this stage is wanted and it is this epoch's turn."""
        self._kept, self._positions = {}, None
        if stage in self.stages and (self.due(trainer) or trainer.sanity_checking):
            self._positions = Positions(flatten(loaders)[0], trainer.world_size, trainer.global_rank)

    def take(
        self, trainer: Trainer, pl_module: LightningModule, stage: Stage, outputs: Any, batch: Any, dataloader_idx: int
    ) -> None:
        """Keep the images of a batch that are among the best so far."""
        if self._positions is None or dataloader_idx > 0:
            return
        module = cast(Any, pl_module)
        content = module.read_batch(batch)
        image = content.get("image")
        if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[1] not in (1, 3):
            raise ValueError(
                f"{type(self).__name__} shows images [B, 1 or 3, H, W], and the batch has none, only "
                f"{sorted(content)}; evaluate on the images themselves"
            )
        position, first = self._positions.take(len(image))
        with isolate_rng(), torch.inference_mode(False), torch.no_grad():
            output = prediction_of(trainer, module, outputs, content).concepts.float()
            best = self._best(module, output, image, position.to(image.device), first.to(image.device))
            self._kept = top(self._kept, best, self.images)

    def finish(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Gather what all processes kept, and draw it."""
        if self._positions is None:
            return
        self._positions, kept = None, {name: part.to(pl_module.device) for name, part in self._kept.items()}
        self._kept = {}
        kept = top({}, gather_columns(kept), self.images)
        if not trainer.is_global_zero or not kept:
            return
        concepts: ConceptSet = cast(Any, pl_module).concept_set
        self.result = []
        for row, k in enumerate(self._chosen(concepts)):
            # what is no sample of its own, or was scored NaN, ranks below everything
            shown = kept["score"][row] > -torch.inf
            maps = kept["map"][row, shown].cpu() if "map" in kept else None
            images, values = kept["image"][row, shown].cpu(), kept["value"][row, shown].cpu()
            self.result.append(Exemplars(concepts.names[k], images, values, maps))
        log_figure(trainer, f"{stage}/{self.name}/figure", draw_exemplars(self.result))

    def _chosen(self, concepts: ConceptSet) -> list[int]:
        if isinstance(self.concepts, int):
            return list(range(min(self.concepts, len(concepts))))
        return [concepts.index(name) for name in self.concepts]

    def _best(
        self, module: Any, output: ConceptOutput, image: Tensor, position: Tensor, first: Tensor
    ) -> dict[str, Tensor]:
        """The best of a batch, columns as `top` wants them."""
        chosen = self._chosen(module.concept_set)
        score = ranking(output, module.concept_set)[:, chosen].nan_to_num(-torch.inf, torch.inf, -torch.inf)
        score = score.masked_fill(~first[:, None], -torch.inf)
        place = score.T.sort(dim=1, descending=True, stable=True).indices[:, : self.images]  # [K, n]
        stats = getattr(getattr(module, "backbone", None), "image_stats", None)
        rows, where = place.unique(return_inverse=True)
        small = thumbnails(displayable(image[rows], stats() if stats else None))
        columns = torch.tensor(chosen, device=place.device)[:, None]
        best = {
            "score": score.T.gather(1, place),
            "value": output.probs[place, columns],
            "position": position[place],
            "image": small[where],
        }
        maps = maps_of(module, output)
        return best if maps is None else {**best, "map": maps[place, columns]}


def ranking(output: ConceptOutput, concepts: ConceptSet) -> Tensor:
    """``[B, K]`` scores by which images are ranked: logits, or log probabilities within categorical groups."""
    if not concepts.categorical_groups():
        return output.logits
    activation = ConceptActivation(concepts).to(output.logits.device)
    return torch.where(activation.categorical, activation.log_softmax(output.logits), output.logits)


def maps_of(module: Any, output: ConceptOutput) -> Tensor | None:
    """``[B, K, h, w]`` maps that come with a prediction, None where the model has none."""
    found = output.maps
    exact = getattr(getattr(module, "bottleneck", None), "concept_maps", None)
    if exact is not None:
        with suppress(ValueError):
            found = exact(output)
    return None if found is None else found.detach().float()


def thumbnails(images: Tensor) -> Tensor:
    """``[n, 3, H, W]`` images as uint8 of at most `THUMBNAIL` pixels a side."""
    height, width = images.shape[-2:]
    scale = THUMBNAIL / max(height, width)
    if scale >= 1:
        return to_bytes(images)
    floats = images.float() / 255 if images.dtype == torch.uint8 else images
    size = (max(round(height * scale), 1), max(round(width * scale), 1))
    return to_bytes(interpolate(floats, size=size, mode="bilinear", antialias=True, align_corners=False))


def top(kept: dict[str, Tensor], new: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """The best of what was kept and what is new, for each concept.

    Args:
        kept: Columns ``[K, n, ...]``, among them ``score`` and ``position``; empty at first.
        new: The same columns.
        number: How many to keep a concept.

    Returns:
        Columns ``[K, min(n, number), ...]``, highest score first, of equal ones the lowest position.
    """
    joined = {name: torch.cat([kept[name], new[name]], 1) for name in new} if kept else new
    if not joined:
        return {}
    rows = torch.arange(len(joined["score"]), device=joined["score"].device)[:, None]
    order = joined["position"].sort(dim=1, stable=True).indices
    order = order.gather(1, joined["score"][rows, order].sort(dim=1, descending=True, stable=True).indices)[:, :number]
    return {name: part[rows, order] for name, part in joined.items()}


def gather_columns(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Columns ``[K, n, ...]`` of all processes side by side; a collective call."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return columns
    return {name: torch.cat(gather_all_tensors(part.contiguous()), 1) for name, part in columns.items()}

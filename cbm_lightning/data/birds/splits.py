"""A split of rendered birds: which birds, how they are drawn and annotated, and the rows that are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from cbm_lightning.data.birds.annotate import Annotation, Vocabulary
from cbm_lightning.data.birds.attributes import EVENTS, check_share
from cbm_lightning.data.birds.captions import mention
from cbm_lightning.data.birds.population import Birds, Population
from cbm_lightning.data.birds.render import render, visible_groups
from cbm_lightning.data.birds.rules import Combination
from cbm_lightning.data.birds.scene import Nuisances, Scene, animate, class_background, happening
from cbm_lightning.data.birds.style import Style
from cbm_lightning.randomness import Randomness

_SMALLEST = 32


@dataclass(frozen=True)
class BirdSplit:
    """Makes one split.

    Args:
        population: The birds.
        vocabulary: The concepts, over the groups of the birds followed by background and occluder.
        nuisances: What befalls the pictures.
        annotation: How concepts are annotated.
        class_values: ``[L, G]`` values that stand for those of each bird of a class; None annotates each bird.
        excluded: Combinations that no bird may show.
        forced: Combinations of which one is imposed on a share of the birds.
        forced_share: That share.
        swap: Share of birds with a substituted value.
        style: How pictures look.
        size: Pixels a side ``H``.
        frames: Frames a clip ``T``.
        captions: Store what captions need.
        parts: Store part maps.
        details: Store all that is known.

    Raises:
        ValueError: A size or a share is out of range.
    """

    population: Population
    vocabulary: Vocabulary
    nuisances: Nuisances
    annotation: Annotation
    class_values: Tensor | None = None
    excluded: Sequence[Combination] = ()
    forced: Sequence[Combination] = ()
    forced_share: float = 0.0
    swap: float = 0.0
    style: Style = field(default_factory=Style)
    size: int = 64
    frames: int = 1
    captions: bool = False
    parts: bool = False
    details: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (("size", self.size, _SMALLEST), ("frames", self.frames, 1)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        check_share(self.forced_share, "held_out_test")
        check_share(self.swap, "swap_test")

    def restyled(self, style: Style) -> BirdSplit:
        """The same birds in another style."""
        return replace(self, style=style, nuisances=replace(self.nuisances, scale=style.scale))

    def annotations(self, randomness: Randomness) -> tuple[Tensor, Tensor]:
        """``(concepts [N, K], labels [N])``; draws no picture."""
        birds, scene = self._sample(randomness)
        return self._annotate(birds, scene, randomness)[0], birds.labels

    def rows(self, randomness: Randomness) -> dict[str, Tensor]:
        """All that is stored, one row a sample: what `BirdBatches` reads and passes on."""
        birds, scene = self._sample(randomness)
        concepts, certainty = self._annotate(birds, scene, randomness)
        agrees = scene.background == class_background(birds.labels)
        rows = {"label": birds.labels, "concepts": concepts, "group": 2 * birds.labels + agrees}
        if self.annotation.annotator_noise is not None:
            rows["certainty"] = certainty
        shown = (self.vocabulary.of_weights(self._weights(scene)) > 0)[:, None]
        if self.frames > 1:
            ongoing, progress = happening(self.population.groups, birds.values, self.frames, randomness)
            clip = animate(scene, ongoing, progress, randomness)
            during = self._during(ongoing)
            shown = shown & during
            rows["frame_concepts"] = concepts[:, None] * during
        else:
            clip = scene
        each = Randomness(randomness.seed, randomness.name, randomness.index.repeat_interleave(self.frames))
        pictures = render(clip, self.size, self.style, each)
        rows["frames"] = pictures.colours.reshape(-1, self.frames, *pictures.colours.shape[1:])
        if self.parts:
            rows |= {"frame_parts": pictures.parts.reshape(-1, self.frames, self.size, self.size), "shown": shown}
        first = slice(None, None, self.frames)
        visible = visible_groups(pictures.bare[first], pictures.left[first], self.vocabulary.groups, scene.hidden)
        if self.captions:
            spoken = len(self.population.groups)
            rows |= {"values": birds.values, "mentioned": mention(visible[:, :spoken], randomness)}
        if self.details:
            rows |= self._details(birds, scene, randomness) | {"visible": visible[:, self.vocabulary.group]}
        return rows

    def _sample(self, randomness: Randomness) -> tuple[Birds, Scene]:
        birds = self.population.sample(
            randomness,
            excluded=self.excluded,
            forced=self.forced,
            forced_share=self.forced_share,
            swap=self.swap,
        )
        return birds, self.nuisances.sample(birds, self.population.groups, randomness)

    def _weights(self, scene: Scene) -> Tensor:
        """``[N, G, V]`` with what probability each value is named, background and occluder included."""
        nuisances = torch.stack([scene.background, (scene.leaf[:, 2] > 0).long()], dim=1)
        return torch.cat([scene.weights, one_hot(nuisances, scene.weights.shape[-1]).float()], dim=1)

    def _annotate(self, birds: Birds, scene: Scene, randomness: Randomness) -> tuple[Tensor, Tensor]:
        weights = self._weights(scene)
        if self.class_values is not None:
            weights = one_hot(self.class_values[birds.labels], weights.shape[-1]).float()
        return self.annotation.annotate(weights, self.vocabulary, randomness)

    def _during(self, ongoing: Tensor) -> Tensor:
        """``[N, T, K]`` bool: True for what lasts, and for an event while it goes on."""
        groups = self.vocabulary.groups
        event = torch.tensor(
            [EVENTS.index(groups[g]) if groups[g] in EVENTS else -1 for g in self.vocabulary.group.tolist()]
        )
        return pad(ongoing, (0, 1), value=True)[..., event]

    def _details(self, birds: Birds, scene: Scene, randomness: Randomness) -> dict[str, Tensor]:
        weights, vocabulary = self._weights(scene), self.vocabulary
        swapped = (birds.swapped >= 0).nonzero()[:, 0]
        group = birds.swapped[swapped]
        added, removed = torch.full_like(birds.swapped, -1), torch.full_like(birds.swapped, -1)
        added[swapped] = vocabulary.index(group, birds.values[swapped, group])
        removed[swapped] = vocabulary.index(group, birds.own[swapped, group])
        return {
            "true_concepts": Annotation().annotate(weights, vocabulary, randomness)[0],
            "soft_concepts": vocabulary.of_weights(weights),
            "background": scene.background,
            "hidden_group": scene.hidden,
            "swapped_group": birds.swapped,
            "added_concept": added,
            "removed_concept": removed,
            "domain": torch.full_like(birds.labels, int(self.style != Style())),
        }

"""What a picture of a bird depends on, as tensors: what it shows, pose, tints, background, what is in front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import pi

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from cbm_lightning.data.birds.attributes import ATTRIBUTES, BACKGROUND, EVENTS, Group, Part, check_share
from cbm_lightning.data.birds.population import Birds
from cbm_lightning.randomness import Randomness

Rows = slice | Tensor
_FLAP_ANGLE = 1.3
_HOP_HEIGHT = 0.2


@dataclass(frozen=True)
class Scene:
    """What is drawn, one row a picture. Lengths are in half picture widths, y points down, angles are in radians.

    Attributes:
        weights: ``[N, G, V]`` share with which each value of each group is shown; rows of ``G`` add up to one.
        hidden: ``[N]`` position of the group that is not to be seen, -1 for none.
        centre: ``[N, 2]`` where the bird is.
        scale: ``[N]`` its size.
        angle: ``[N]`` how far it is turned.
        mirror: ``[N]`` 1 if it looks to the right, -1 if to the left.
        wing: ``[N]`` how far the wing is raised.
        tints: ``[N, parts, 3]`` factors of the colours.
        background: ``[N]`` which background.
        texture: ``[N, 4]`` phases of its texture.
        leaf: ``[N, 4]`` centre, half length and angle of the occluding leaf, half length 0 for none.
        passer: ``[N, 4]`` the same of a leaf passing by.
    """

    weights: Tensor
    hidden: Tensor
    centre: Tensor
    scale: Tensor
    angle: Tensor
    mirror: Tensor
    wing: Tensor
    tints: Tensor
    background: Tensor
    texture: Tensor
    leaf: Tensor
    passer: Tensor

    def __len__(self) -> int:
        return len(self.weights)

    def rows(self, rows: Rows) -> Scene:
        """Some of the pictures."""
        return Scene(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


@dataclass(frozen=True)
class Nuisances:
    """How often the picture hides, blends or correlates what it shows.

    Args:
        occlusion: Share of pictures with a leaf in front of the bird.
        hide_part: Share of pictures in which one group is not to be seen: its part is left out, or loses its colour.
        ambiguity: Share of pictures in which one group is a blend of two values.
        background_match: Probability that the background is the one of the class; otherwise it is any of the others.
        scale: Factor of the bird's size.

    Raises:
        ValueError: A share is out of [0, 1].
    """

    occlusion: float = 0.15
    hide_part: float = 0.0
    ambiguity: float = 0.0
    background_match: float = 0.25
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("occlusion", "hide_part", "ambiguity", "background_match"):
            check_share(getattr(self, name), name)

    def sample(self, birds: Birds, groups: Sequence[Group], randomness: Randomness) -> Scene:
        """The scenes of some birds with values of ``groups``, the ten attributes first."""
        number = len(birds.labels)
        hides = randomness.happens("hide", self.hide_part)
        mirror = 1.0 - 2.0 * randomness.choice("mirror", 2)
        # birds are longer before their origin than behind it
        middle = torch.stack([-0.05 * mirror, torch.zeros(number)], dim=1)
        return Scene(
            weights=self._weights(birds, groups, randomness),
            hidden=torch.where(hides, randomness.choice("hide/group", len(ATTRIBUTES)), -1),
            centre=middle + randomness.between("centre", -0.06, 0.06, 2),
            scale=self.scale * randomness.between("scale", 0.9, 1.05)[:, 0],
            angle=randomness.between("angle", -0.2, 0.2)[:, 0],
            mirror=mirror,
            wing=torch.zeros(number),
            tints=self._tints(randomness),
            background=self._background(birds.labels, randomness),
            texture=randomness.between("texture", 0.0, 2 * pi, 4),
            leaf=self._leaf(randomness),
            passer=torch.zeros(number, 4),
        )

    def _weights(self, birds: Birds, groups: Sequence[Group], randomness: Randomness) -> Tensor:
        """One-hot values, of an ambiguous group shared between its value and another at ``1 - alpha`` and ``alpha``."""
        sizes = torch.tensor([len(group.values) for group in groups])
        weights = one_hot(birds.values, int(sizes.max())).float()
        rows = randomness.happens("ambiguous", self.ambiguity).nonzero()[:, 0]
        group = randomness.choice("ambiguous/group", len(ATTRIBUTES))[rows]
        step = 1 + (randomness.uniform("ambiguous/step", 1)[rows, 0] * (sizes[group] - 1)).long()
        value = birds.values[rows, group]
        alpha = randomness.uniform("ambiguous/alpha", 1)[rows, 0]
        weights[rows, group, value] = 1 - alpha
        weights[rows, group, (value + step) % sizes[group]] = alpha
        return weights

    def _background(self, labels: Tensor, randomness: Randomness) -> Tensor:
        kinds = len(BACKGROUND.values)
        matches = randomness.happens("background", self.background_match)
        other = 1 + randomness.choice("background/other", kinds - 1)
        return torch.where(matches, class_background(labels), (class_background(labels) + other) % kinds)

    def background_law(self, classes: int) -> Tensor:
        """``[L, backgrounds]`` probability of each background in each class."""
        kinds = len(BACKGROUND.values)
        law = torch.full((classes, kinds), (1 - self.background_match) / (kinds - 1), dtype=torch.double)
        law[torch.arange(classes), class_background(torch.arange(classes))] = self.background_match
        return law

    def _leaf(self, randomness: Randomness) -> Tensor:
        present = randomness.happens("leaf", self.occlusion)
        place = randomness.between("leaf/place", -0.55, 0.55, 2)
        length = randomness.between("leaf/length", 0.34, 0.46)
        angle = randomness.between("leaf/angle", 0.0, pi)
        return torch.cat([place, length * present[:, None], angle], dim=1)

    @staticmethod
    def _tints(randomness: Randomness) -> Tensor:
        light = randomness.between("light", 0.88, 1.08)
        own = randomness.between("tints", -0.07, 0.07, 3 * len(Part))
        return light[:, :, None] + own.reshape(-1, len(Part), 3)


def class_background(labels: Tensor) -> Tensor:
    """``[N]`` the background that goes with each class."""
    return labels % len(BACKGROUND.values)


def happening(groups: Sequence[Group], values: Tensor, frames: int, randomness: Randomness) -> tuple[Tensor, Tensor]:
    """When the events of a clip happen.

    Args:
        groups: The groups of the birds, events among them.
        values: ``[N, G]``.
        frames: Frames a clip ``T``; the first shows no event.
        randomness: Samples and streams.

    Returns:
        Two ``[N, T, events]`` tensors: bool, whether each event goes on in a frame; and how far it is, in (0, 1).
    """
    length = max(1, frames // 3)
    start = 1 + (randomness.uniform("events", len(EVENTS)) * (frames - length)).long()
    since = torch.arange(frames)[None, :, None] - start[:, None]
    present = values[:, [groups.index(event) for event in EVENTS]] == 1
    return (since >= 0) & (since < length) & present[:, None], (since + 0.5) / length


def animate(scene: Scene, ongoing: Tensor, progress: Tensor, randomness: Randomness) -> Scene:
    """The scenes of all frames, ``[N * T]`` rows, frames of a clip one after the other.

    Args:
        scene: ``N`` scenes at rest.
        ongoing: ``[N, T, events]`` from `happening`.
        progress: The same.
        randomness: Samples and streams.
    """
    frames = ongoing.shape[1]
    clip = scene.rows(torch.arange(len(scene)).repeat_interleave(frames))
    flap, hop, passing = (ongoing * (progress * pi).sin().clamp(min=0)).flatten(0, 1).unbind(1)
    lift = torch.stack([torch.zeros_like(hop), -_HOP_HEIGHT * hop], dim=1)
    height = randomness.between("passer/height", -0.1, 0.4).repeat_interleave(frames)
    across = 1.8 * progress[..., 2].flatten() - 0.9
    passer = torch.stack([across, height, 0.38 * (passing > 0), 0.6 * across], dim=1)
    moved = {"centre": clip.centre + lift, "wing": _FLAP_ANGLE * flap, "passer": passer}
    return Scene(**{field.name: moved.get(field.name, getattr(clip, field.name)) for field in fields(clip)})

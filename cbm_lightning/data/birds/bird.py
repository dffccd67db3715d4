"""Drawing birds: a scene becomes pictures and part maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cbm_lightning.data.birds.attributes import ATTRIBUTES, Part
from cbm_lightning.data.birds.backgrounds import backgrounds
from cbm_lightning.data.birds.canvas import Canvas, Ink, Pose, ellipse, taper, turn
from cbm_lightning.data.birds.scene import Scene

_RIM = 0.035
_RIM_TONE = 0.4
_GREY = torch.tensor([0.62, 0.60, 0.58])
_CREAM = torch.tensor([0.97, 0.93, 0.82])
_WHITE = torch.tensor([0.98, 0.98, 0.96])
_COLOURS = torch.tensor([[0.86, 0.17, 0.15], [0.99, 0.82, 0.12], [0.15, 0.38, 0.90], [0.14, 0.14, 0.17]])
_FIXED = {
    Part.TAIL: torch.tensor([0.50, 0.40, 0.42]),
    Part.LEGS: torch.tensor([0.36, 0.20, 0.12]),
    Part.CREST: torch.tensor([0.93, 0.36, 0.70]),
    Part.BEAK: torch.tensor([0.97, 0.56, 0.10]),
    Part.EYE: torch.tensor([0.05, 0.05, 0.06]),
    Part.OCCLUDER: torch.tensor([0.45, 0.50, 0.16]),
    Part.PASSER: torch.tensor([0.70, 0.38, 0.14]),
}
# length, half width at the foot, bend of the beak; length, half width at the end, notch of the tail
_BEAKS = torch.tensor([[0.30, 0.25, -0.04], [0.48, 0.08, 0.02], [0.34, 0.14, 0.40]])
_TAILS = torch.tensor([[0.30, 0.30, -0.06], [0.48, 0.10, 0.00], [0.46, 0.24, 0.30]])
_POSITION = {group.name: position for position, group in enumerate(ATTRIBUTES)}
_SHOULDER = (0.12, 0.06)


class Drawing(NamedTuple):
    """Drawn scenes.

    Attributes:
        colours: ``[N, 3, H, H]`` in [0, 1].
        parts: ``[N, H, H]`` uint8, what each pixel shows (see `Part`).
        bare: ``[N, parts]`` pixels of each part before anything comes in front of the bird.
        left: ``[N, parts]`` pixels of each part in the end.
    """

    colours: Tensor
    parts: Tensor
    bare: Tensor
    left: Tensor


class _Birds:
    """The birds of some scenes, on one canvas, part by part from back to front."""

    def __init__(self, canvas: Canvas, scene: Scene) -> None:
        self.canvas = canvas
        self.scene = scene
        self.pose = Pose(torch.arange(len(scene)), scene.centre, scene.scale, scene.angle, scene.mirror)

    def share(self, group: str) -> Tensor:
        """``[N, V]`` with what share each value of a group is shown; nothing of it where hidden."""
        position = _POSITION[group]
        weights = self.scene.weights[:, position, : len(ATTRIBUTES[position].values)]
        return weights * ~self.is_hidden(group)[:, None]

    def present(self, group: str) -> Tensor:
        """``[N]`` with what share the second value of a group of two is shown."""
        return self.share(group)[:, 1]

    def is_hidden(self, group: str) -> Tensor:
        """``[N]`` bool."""
        return self.scene.hidden == _POSITION[group]

    def colour(self, group: str) -> Tensor:
        """``[N, 3]`` colour of a colour group, grey where hidden."""
        return _blend(self.share(group), _COLOURS) + self.is_hidden(group)[:, None] * _GREY

    def paint(
        self,
        part: Part,
        shape: Callable[[Tensor, Tensor], Ink],
        around: tuple[float, float],
        radius: float,
        *,
        colour: Tensor | None = None,
        group: str | None = None,
        opacity: Tensor | None = None,
    ) -> None:
        """Paint a part; where ``group`` is hidden, what is left of the part is marked as such."""
        colour = _FIXED[part] if colour is None else colour
        number = torch.full((len(self.scene),), int(part), dtype=torch.uint8)
        if group is not None:
            number[self.is_hidden(group)] = int(Part.HIDDEN)
        tinted = colour * self.scene.tints[:, part]
        self.canvas.paint(shape, self.pose, around, radius, tinted, number, opacity)

    def draw(self) -> None:
        """All parts of the bird, back to front."""
        self.tail()
        self.legs()
        self.body()
        self.belly()
        self.wing()
        self.head()

    def cover(self) -> None:
        """What is in front of the bird."""
        self.leaf(Part.OCCLUDER, self.scene.leaf)
        self.leaf(Part.PASSER, self.scene.passer)

    def tail(self) -> None:
        """A fan, a long strip or a fork, behind the body."""
        length, width, notch = _blend(self.share("tail"), _TAILS).unbind(1)
        length = length + 0.12 * ~self.is_hidden("tail")

        def shape(x: Tensor, y: Tensor) -> Ink:
            back, up = turn(x, y, torch.pi + 0.12, (-0.28, 0.10))
            along = (back / length.clamp(min=1e-3)[:, None]).clamp(0, 1)
            side = up.abs() - (0.07 + (width[:, None] - 0.07) * along)
            across = 1 - (up.abs() / width.clamp(min=1e-3)[:, None]).clamp(0, 1)
            end = back - (length[:, None] - notch[:, None] * across)
            return _edged(torch.maximum(torch.maximum(side, end), -back))

        self.paint(Part.TAIL, shape, (-0.58, 0.12), 0.42, opacity=(~self.is_hidden("tail")).float())

    def legs(self) -> None:
        """Two bars with feet."""
        length = 0.12 + 0.26 * self.present("legs")

        def shape(x: Tensor, y: Tensor) -> Ink:
            y = y - 0.34
            bars = torch.minimum((x - 0.10).abs(), (x + 0.10).abs()) - 0.030
            feet = torch.minimum((x - 0.15).abs(), (x + 0.05).abs()) - 0.09
            foot = torch.maximum(feet, (y - length[:, None]).abs() - 0.030)
            bar = torch.maximum(bars, torch.maximum(-y, y - length[:, None]))
            return Ink(torch.minimum(bar, foot), torch.ones_like(x))

        self.paint(Part.LEGS, shape, (0.05, 0.55), 0.26, opacity=(~self.is_hidden("legs")).float())

    def body(self) -> None:
        """An egg, lit from above."""

        def shape(x: Tensor, y: Tensor) -> Ink:
            x, y = turn(x, y, -0.30, (0.02, 0.10))
            return _edged(ellipse(x, y, 0.44, 0.32), 1.06 - 0.35 * y)

        self.paint(Part.BODY, shape, (0.02, 0.10), 0.46, colour=self.colour("body colour"), group="body colour")

    def belly(self) -> None:
        """A pale patch with spots or stripes."""
        _, spotted, striped = self.share("belly pattern").unbind(1)

        def shape(x: Tensor, y: Tensor) -> Ink:
            x, y = turn(x, y, -0.30, (0.10, 0.245))
            spots = ((x * 38).cos() * (y * 38 + 0.8).cos() * 3).clamp(0, 1)
            stripes = ((x * 42).cos() * 2).clamp(0, 1)
            marks = spotted[:, None] * spots + striped[:, None] * stripes
            return Ink(ellipse(x, y, 0.29, 0.155), 1 - 0.8 * marks)

        self.paint(Part.BELLY, shape, (0.10, 0.245), 0.32, colour=_CREAM, group="belly pattern")

    def wing(self) -> None:
        """A leaf-shaped wing that turns about the shoulder, and its bar."""
        raised = self.scene.wing[:, None] - 0.10

        def shape(x: Tensor, y: Tensor) -> Ink:
            x, y = turn(x, y, raised, _SHOULDER)
            return _edged(ellipse(x + 0.24, y, 0.32, 0.165), 1.04 - 0.5 * y)

        def bar(x: Tensor, y: Tensor) -> Ink:
            x, y = turn(x, y, raised, _SHOULDER)
            x = x + 0.24 + 1.4 * y.square()
            return Ink(torch.maximum(x.abs() - 0.062, y.abs() - 0.13), torch.ones_like(x))

        self.paint(Part.WING, shape, _SHOULDER, 0.60, colour=self.colour("wing colour"), group="wing colour")
        self.paint(Part.WING_BAR, bar, _SHOULDER, 0.42, colour=_WHITE, opacity=self.present("wing bar"))

    def head(self) -> None:
        """Crest, beak, head, ring and eye."""
        crest, ring = self.present("crest"), self.present("eye ring")
        length, width, bend = _blend(self.share("beak"), _BEAKS).unbind(1)

        def plumes(x: Tensor, y: Tensor) -> Ink:
            distance = torch.full_like(x, 9.0)
            for angle, reach in ((-2.35, 0.40), (-1.95, 0.44), (-1.55, 0.36)):
                u, v = turn(x, y, angle, (0.36, -0.30))
                plume = taper(u, v, reach * crest, 0.10 * crest, 0.0 * crest)
                distance = torch.minimum(distance, plume)
            return Ink(distance, torch.ones_like(x))

        def beak(x: Tensor, y: Tensor) -> Ink:
            u, v = turn(x, y, 0.10, (0.55, -0.24))
            return _edged(taper(u, v, length, width, bend))

        def skull(x: Tensor, y: Tensor) -> Ink:
            y = y + 0.27
            return _edged(ellipse(x - 0.40, y, 0.23, 0.22), 1.05 - 0.4 * y)

        def disc(radius: float) -> Callable[[Tensor, Tensor], Ink]:
            return lambda x, y: Ink(ellipse(x - 0.46, y + 0.31, radius, radius), torch.ones_like(x))

        self.paint(Part.CREST, plumes, (0.26, -0.52), 0.30, opacity=(crest > 0).float())
        self.paint(Part.BEAK, beak, (0.76, -0.18), 0.44, opacity=(~self.is_hidden("beak")).float())
        self.paint(Part.HEAD, skull, (0.40, -0.27), 0.25, colour=self.colour("head colour"), group="head colour")
        self.paint(Part.EYE_RING, disc(0.115), (0.46, -0.31), 0.13, colour=_WHITE, opacity=ring)
        self.paint(Part.EYE, disc(0.052), (0.46, -0.31), 0.07)

    def leaf(self, part: Part, leaves: Tensor) -> None:
        """A leaf in front of everything, where there is one; ``leaves [N, 4]`` as in `Scene`."""
        rows = (leaves[:, 2] > 0).nonzero()[:, 0]
        x, y, length, angle = leaves[rows].unbind(1)
        pose = Pose(rows, torch.stack([x, y], dim=1), length, angle, torch.ones_like(x))
        number = torch.full((len(rows),), int(part), dtype=torch.uint8)

        def shape(x: Tensor, y: Tensor) -> Ink:
            edge = ellipse(x, y, 1.0, 0.48)
            vein = ((y.abs() - 0.03) / 0.06).clamp(0, 1)
            return Ink(edge, 0.72 + 0.28 * vein * (1 + 0.5 * y))

        self.canvas.paint(shape, pose, (0.0, 0.0), 1.0, _FIXED[part] * self.scene.tints[rows, part], number)


def draw(scene: Scene, size: int) -> Drawing:
    """Draw scenes, pictures of ``size`` pixels a side."""
    light = scene.tints[:, Part.BACKGROUND]
    canvas = Canvas(backgrounds(scene.background, scene.texture, light, size))
    birds = _Birds(canvas, scene)
    birds.draw()
    bare = _areas(canvas, len(scene))
    birds.cover()
    colours = canvas.colours.reshape(-1, size, size, 3).permute(0, 3, 1, 2)
    parts = canvas.parts.reshape(-1, size, size)
    return Drawing(colours.clamp(0, 1), parts, bare, _areas(canvas, len(scene)))


def _areas(canvas: Canvas, number: int) -> Tensor:
    """``[N, parts]`` pixels of each part."""
    index = canvas.parts.reshape(number, -1).long() + len(Part) * torch.arange(number)[:, None]
    return torch.bincount(index.flatten(), minlength=number * len(Part)).reshape(number, len(Part))


def _blend(weights: Tensor, table: Tensor) -> Tensor:
    """``[N, P]`` rows of a table ``[V, P]`` averaged by weights ``[N, V]``."""
    return (weights[:, :, None] * table).sum(1)


def _edged(distance: Tensor, tone: Tensor | float = 1.0) -> Ink:
    """A shape with a dark rim."""
    rim = ((distance + _RIM) / _RIM).clamp(0, 1)
    return Ink(distance, tone * (1 - (1 - _RIM_TONE) * rim.square()))

"""Where in a backbone the image is last a map: found by running it, so that nobody names layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cbm_lightning.saliency.subject import Subject

Grid = tuple[int, int]

# class, distillation and register tokens before the patches
_MOST_PREFIX_TOKENS = 16


@dataclass(frozen=True)
class MapLayer:
    """A place in a backbone whose output is a map of the image.

    Attributes:
        module: The module.
        call: Which of its calls in a forward pass, from 0.
        grid: ``(h, w)`` of its output.
        channels_last: Whether it returns ``[B, h, w, D]``, not ``[B, D, h, w]``.
        prefix: Tokens before the patches where it returns a sequence ``[B, prefix + h*w, D]``; None for a map.
    """

    module: nn.Module
    call: int
    grid: Grid
    channels_last: bool = False
    prefix: int | None = None

    def cells(self, output: Tensor) -> Tensor:
        """``[B, h*w, D]`` of its output, without prefix tokens."""
        if self.prefix is not None:
            return output[:, self.prefix :]
        return output.flatten(1, 2) if self.channels_last else output.flatten(2).transpose(1, 2)


def find_map(subject: Subject, image: Tensor, name: str | None = None) -> MapLayer:
    """The last place where the image is still a map on which the concept scores depend.

    For a convolutional network it is the map before pooling; for a vision transformer that reads its class token, the
    normed tokens that enter the last attention, after which patches reach the class token no more.

    Args:
        subject: The model.
        image: ``[1, C, H, W]`` an image to run it on.
        name: Name of a module in the backbone, to be used instead.

    Raises:
        ValueError: There is no such place; the message says what to do.
    """
    modules = dict(subject.backbone.named_modules())
    if name is not None and name not in modules:
        raise ValueError(f"layer: the backbone has no module {name!r}; it has {[m for m in modules if m][:20]}, ...")
    seen: list[tuple[nn.Module, int, Tensor]] = []
    calls: Counter[nn.Module] = Counter()

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad and output.ndim in (3, 4):
            seen.append((module, calls[module], output))
        calls[module] += 1

    chosen = modules.values() if name is None else [modules[name]]
    with ExitStack() as hooks, _eager():
        for module in dict.fromkeys(chosen):
            hooks.callback(module.register_forward_hook(keep).remove)
        features = subject.features(image.detach().clone().requires_grad_())
        logits = subject.output(features).logits
    width = None if features.tokens is None else features.tokens.shape[-1]
    grids = _grids(features.grid, [output for *_, output in seen])
    slopes = _slopes(logits, [output for *_, output in seen])
    for (module, call, output), slope in zip(reversed(seen), reversed(slopes), strict=True):
        layer = _as_layer(module, call, output, grids, width)
        if layer is not None and slope is not None and bool(layer.cells(slope).any()):
            return layer
    where = "the backbone" if name is None else f"layer {name!r}"
    raise ValueError(
        f"grad_cam: {where} has no feature map on which the concept scores depend; it needs a convolutional network or "
        "a transformer with patch tokens. Use a method that needs none, such as gradient or occlusion"
    )


@contextmanager
def graph_from(layer: MapLayer) -> Iterator[list[Tensor]]:
    """Run the backbone without a graph up to a layer, and with one from there on.

    Yields:
        A list that holds the layer's output, a leaf of the graph, after the forward pass.
    """
    calls = 0
    found: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        nonlocal calls
        calls += 1
        if calls - 1 != layer.call:
            return None
        # outlives the hook, up to the end of the no_grad block around the pass
        torch.set_grad_enabled(True)
        found.append(output.detach().requires_grad_())
        # what follows may work in place, which a leaf would refuse
        return found[0].clone()

    handle = layer.module.register_forward_hook(cut)
    try:
        with _eager(), torch.no_grad():
            yield found
    finally:
        handle.remove()


def _eager() -> Any:
    """Compiled modules would not see the hooks."""
    stance = getattr(torch.compiler, "set_stance", None)
    return ExitStack() if stance is None else stance("force_eager")


def _grids(grid: tuple[int, ...] | None, outputs: list[Tensor]) -> list[Grid]:
    """The grids that count: that of the tokens, or without tokens all that occur in maps, the latest first."""
    if grid is not None:
        return [(grid[0], grid[1])] if len(grid) == 2 else []
    maps = [(output.shape[2], output.shape[3]) for output in outputs if output.ndim == 4]
    return list(dict.fromkeys(size for size in reversed(maps) if min(size) > 1))


def _slopes(logits: Tensor, outputs: list[Tensor]) -> list[Tensor | None]:
    if not logits.requires_grad or not outputs:
        return [None] * len(outputs)
    # unequal factors, so that scores whose sum is constant do not cancel
    factors = torch.linspace(1.0, 2.0, logits.shape[-1]).to(logits)
    return list(torch.autograd.grad((logits * factors).sum(), outputs, allow_unused=True))


def _as_layer(module: nn.Module, call: int, output: Tensor, grids: list[Grid], width: int | None) -> MapLayer | None:
    shape = output.shape
    if output.ndim == 4:
        first, last = tuple(shape[2:]) in grids, tuple(shape[1:3]) in grids
        if first and not (last and shape[3] == width):
            return MapLayer(module, call, (shape[2], shape[3]))
        return MapLayer(module, call, (shape[1], shape[2]), channels_last=True) if last else None
    # projections to queries, keys and values, or inside an MLP, are no states of the tokens
    if not isinstance(module, nn.Linear):
        for h, w in grids:
            if 0 <= shape[1] - h * w <= _MOST_PREFIX_TOKENS:
                return MapLayer(module, call, (h, w), prefix=shape[1] - h * w)
    return None

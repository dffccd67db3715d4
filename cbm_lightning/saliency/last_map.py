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
        image: ``[1, C, H, W]`` like those to come; noise of its shape is looked at, so that all images have one place.
        name: Name of a module in the backbone, to be used instead.

    Raises:
        ValueError: There is no such place; the message says what to do.
    """
    modules = dict(subject.backbone.named_modules(remove_duplicate=False))
    if name is not None and name not in modules:
        raise ValueError(f"layer: the backbone has no module {name!r}; it has {[m for m in modules if m][:20]}, ...")
    seen: list[tuple[nn.Module, int, Tensor]] = []
    calls: Counter[nn.Module] = Counter()

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        # attention over tokens is square like a map; what dropout passes on was seen before
        if isinstance(module, (nn.Softmax, nn.Dropout)):
            return
        if isinstance(output, Tensor) and output.requires_grad and output.ndim in (3, 4):
            seen.append((module, calls[module], output))
        calls[module] += 1

    # of noise, for on a black image every unit may be silent and pass no slope on
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).to(image)
    with ExitStack() as hooks, eager():
        for module in dict.fromkeys(modules.values()):
            hooks.callback(module.register_forward_hook(keep).remove)
        features = subject.features(noise.requires_grad_())
        logits = subject.output(features).logits
    outputs = [output for *_, output in seen]
    # a layer that was named may have any resolution
    grids = _grids(features.grid if name is None else None, outputs, (image.shape[-2], image.shape[-1]))
    found: list[tuple[int, MapLayer]] = []
    for (module, call, output), slope in zip(reversed(seen), reversed(_slopes(logits, outputs)), strict=True):
        if name is not None and module is not modules[name]:
            continue
        layer = _as_layer(module, call, output, grids, features.tokens)
        if layer is not None and slope is not None and bool(layer.cells(slope).any()):
            if _same(layer.cells(output), features.tokens):
                return layer
            found.append((layer.cells(output).shape[-1], layer))
    # the one channel of a gate says where to look for all concepts, not for one
    if wide := [layer for channels, layer in found if channels > 1] or [layer for _, layer in found]:
        return wide[0]
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
        with eager(), torch.no_grad():
            yield found
    finally:
        handle.remove()


def eager() -> Any:
    """Compiled modules would not see the hooks."""
    stance = getattr(torch.compiler, "set_stance", None)
    return ExitStack() if stance is None else stance("force_eager")


def _grids(grid: tuple[int, ...] | None, outputs: list[Tensor], size: Grid) -> list[Grid]:
    """The grids that count: that of the tokens, or without tokens all that occur in maps, the latest first.

    A map has the proportions of the image; what has not is something else, such as the keys of attention heads.
    """
    if grid is not None and max(grid) > 1:
        return [(grid[0], grid[1])] if len(grid) == 2 else []
    found = []
    for shape in (output.shape for output in reversed(outputs) if output.ndim == 4):
        for h, w in ((shape[2], shape[3]), (shape[1], shape[2])):
            if min(h, w) > 1 and h <= size[0] and w <= size[1] and abs(h - w * size[0] / size[1]) <= 1:
                found.append((h, w))
                break
    return list(dict.fromkeys(found))


def _slopes(logits: Tensor, outputs: list[Tensor]) -> list[Tensor | None]:
    if not logits.requires_grad or not outputs:
        return [None] * len(outputs)
    # unequal factors, so that scores whose sum is constant do not cancel
    factors = torch.linspace(1.0, 2.0, logits.shape[-1]).to(logits)
    return list(torch.autograd.grad((logits * factors).sum(), outputs, allow_unused=True))


def _same(cells: Tensor, tokens: Tensor | None) -> bool:
    """Whether a layer's output is what the backbone returns as tokens."""
    return tokens is not None and cells.shape == tokens.shape and torch.equal(cells, tokens)


def _as_layer(
    module: nn.Module, call: int, output: Tensor, grids: list[Grid], tokens: Tensor | None
) -> MapLayer | None:
    shape = output.shape
    if output.ndim == 4:
        first = MapLayer(module, call, (shape[2], shape[3]))
        last = MapLayer(module, call, (shape[1], shape[2]), channels_last=True)
        fits = [layer for layer in (first, last) if layer.grid in grids]
        if len(fits) == 2:
            return last if _same(last.cells(output), tokens) else first
        return fits[0] if fits else None
    # projections to queries, keys and values, or inside an MLP, are no states of the tokens
    if not isinstance(module, nn.Linear):
        for h, w in grids:
            if 0 <= shape[1] - h * w <= _MOST_PREFIX_TOKENS:
                return MapLayer(module, call, (h, w), prefix=shape[1] - h * w)
    return None

"""Reading the attention weights of a vision transformer while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from cbm_lightning.saliency.last_map import eager

_ARGUMENTS = (
    "query",
    "key",
    "value",
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "average_attn_weights",
    "is_causal",
)


@contextmanager
def attention_weights(backbone: nn.Module) -> Iterator[list[Tensor]]:
    """Catch the attention of each layer, in the order in which they run.

    Known are ``torch.nn.MultiheadAttention`` (open_clip) and modules with the flag ``fused_attn`` and a dropout
    ``attn_drop`` of the weights (timm), which are told not to fuse inside the block.

    Yields:
        A list that fills with ``[B, heads, T, T]``.
    """
    caught: list[Tensor] = []

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        named = dict(zip(_ARGUMENTS, args, strict=False))
        return (), {**named, **kwargs, "need_weights": True, "average_attn_weights": False}

    def take_second(module: nn.Module, args: Any, output: Any) -> None:
        caught.append(output[1])

    def take(module: nn.Module, args: Any, output: Tensor) -> None:
        caught.append(output)

    with ExitStack() as undo, eager():
        for module in backbone.modules():
            if isinstance(module, nn.MultiheadAttention):
                undo.callback(module.register_forward_pre_hook(ask, with_kwargs=True).remove)
                undo.callback(module.register_forward_hook(take_second).remove)
            elif isinstance(dropout := getattr(module, "attn_drop", None), nn.Module):
                if hasattr(module, "fused_attn"):
                    undo.callback(setattr, module, "fused_attn", module.fused_attn)
                    setattr(module, "fused_attn", False)  # noqa: B010 (a plain flag, which nn.Module's types do not know)
                undo.callback(dropout.register_forward_hook(take).remove)
        yield caught

"""Attention rollout: which patches reach the class token."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from cbm_lightning.saliency.attention import attention_weights
from cbm_lightning.saliency.last_map import eager
from cbm_lightning.saliency.methods.base import SaliencyMethod
from cbm_lightning.saliency.subject import Subject


class AttentionRollout(SaliencyMethod):
    """Attention of all layers multiplied, residual connections as identities (Abnar and Zuidema 2020).

    It follows what reaches the pooled vector, whatever the concept: all concepts of an image have the same map, which
    therefore says where the model looks, not where it looks for a concept. For transformers whose every layer attends
    globally (ViT, DeiT, EVA, CLIP).
    """

    name = "attention_rollout"
    concept_specific = False

    def attribute(self, subject: Subject, image: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
        """One map an image, in the resolution of the patches.

        Raises:
            ValueError: The backbone is no such transformer.
        """
        with torch.no_grad(), attention_weights(subject.backbone) as layers:
            features = subject.features(image)
        tokens, grid = features.tokens, features.grid
        count = 0 if tokens is None else tokens.shape[1]
        # attention within windows folds them into the batch
        shapes = {(len(weights), *weights.shape[-2:]) for weights in layers}
        total = layers[0].shape[-1] if layers else 0
        if tokens is None or grid is None or total < count or shapes != {(len(image), total, total)}:
            raise ValueError(
                "method: attention_rollout needs a vision transformer whose every layer attends globally, from timm or "
                "open_clip; use grad_cam"
            )
        rolled = torch.eye(total).to(layers[0])
        for weights in layers:
            mixed = weights.mean(1) + torch.eye(total).to(weights)
            rolled = mixed / mixed.sum(-1, keepdim=True) @ rolled
        prefix = total - count
        # without a class token every patch reaches the pooled vector
        reach = rolled[:, _read(subject, image[:1], total)].mean(1)
        maps: Tensor = reach[:, prefix:].unflatten(1, grid)[rows]
        return maps


def _read(subject: Subject, image: Tensor, total: int) -> Tensor:
    """``[total]`` bool, the tokens of the last layer that the pooled vector depends on."""
    outputs: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.ndim == 3 and first.shape[1] == total:
            outputs.append(first)

    with ExitStack() as hooks, eager():
        for module in subject.backbone.modules():
            if hasattr(module, "attn_drop") or isinstance(module, nn.MultiheadAttention):
                hooks.callback(module.register_forward_hook(keep).remove)
        pooled = subject.features(image.clone().requires_grad_()).pooled
    factors = torch.linspace(1.0, 2.0, pooled.shape[1]).to(pooled)
    (slope,) = torch.autograd.grad((pooled * factors).sum(), outputs[-1])
    return slope.abs().amax(2)[0] > 0

"""Attention rollout: which patches reach the class token."""

from __future__ import annotations

import torch
from torch import Tensor

from cbm_lightning.saliency.attention import attention_weights
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
        averaged = prefix == 0 or _is_mean(features.pooled, tokens)
        reach = rolled[:, prefix:].mean(1) if averaged else rolled[:, 0]
        maps: Tensor = reach[:, prefix:].unflatten(1, grid)[rows]
        return maps


def _is_mean(pooled: Tensor, tokens: Tensor) -> bool:
    mean = tokens.mean(1)
    return mean.shape == pooled.shape and torch.allclose(mean, pooled, rtol=1e-2, atol=1e-3)

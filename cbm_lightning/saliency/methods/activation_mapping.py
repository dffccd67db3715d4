"""Concept activation mapping: the bottleneck asked about each cell alone."""

from __future__ import annotations

import torch
from torch import Tensor

from cbm_lightning.saliency.methods.base import SaliencyMethod
from cbm_lightning.saliency.subject import Subject
from cbm_lightning.types import Features


class ActivationMapping(SaliencyMethod):
    """The concept score of each cell as if it were the whole image.

    For a CLIP model and concept texts it is the similarity of each token with the text (for tokens of one length the
    CoAM of Aysel et al. 2025 up to a factor), standardised as scores are; for a linear bottleneck it is the exact map
    with the bias. The backbone must embed its tokens where it embeds images (``OpenClipBackbone(tokens="projected")``).
    It needs no gradient, and works for any bottleneck that reads the pooled vector alone; where that is not the mean of
    the tokens it is a reading of the model, not an account of its score.
    """

    name = "activation_mapping"

    def attribute(self, subject: Subject, image: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
        """Scores of cells.

        Raises:
            ValueError: There are no tokens on a grid, or they have another width than the pooled vector.
        """
        with torch.no_grad():
            features = subject.features(image)
            tokens, pooled = features.tokens, features.pooled
            if tokens is None or features.grid is None:
                raise ValueError(
                    "method: activation_mapping needs patch tokens on a grid, and this backbone returns none; use "
                    "grad_cam, or a backbone with tokens"
                )
            if tokens.shape[-1] != pooled.shape[-1]:
                raise ValueError(
                    f"method: activation_mapping needs tokens as wide as the pooled vector, got {tokens.shape[-1]} and "
                    f"{pooled.shape[-1]}; embed them in the same space (tokens='projected'), or use grad_cam"
                )
            batch, cells, _ = tokens.shape
            scores = subject.output(Features(tokens.flatten(0, 1))).logits
            return features.as_map(scores.unflatten(0, (batch, cells)))[rows, concepts]

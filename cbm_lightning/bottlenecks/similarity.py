"""A bottleneck without concept labels: the similarity of image and concept texts in a CLIP space."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cbm_lightning.backbones.text import OpenClipTextEncoder
from cbm_lightning.bottlenecks.scalar import Link, ScalarBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.types import Batch, ConceptOutput, FeatureDims, Features, LossContext


class Standardizer(nn.Module):
    """Subtracts the mean and divides by the standard deviation of all training samples so far, column by column."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("squares", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, width]`` standardised; updates the statistics first in training mode (Chan's parallel update)."""
        if self.training:
            with torch.no_grad():
                rows, batch = x.detach().float(), len(x)
                shift = rows.mean(0) - self.mean
                total = self.count + batch
                self.squares += rows.var(0, correction=0) * batch + shift.square() * self.count * batch / total
                self.mean += shift * batch / total
                self.count += batch
        return (x - self.mean.to(x)) * self.factor().to(x)

    def factor(self) -> Tensor:
        """``[width]`` one over the standard deviation; one before any data, and for a constant column."""
        spread = (self.squares / self.count.clamp(min=1)).sqrt()
        return torch.where(spread > 1e-8, spread, 1.0).reciprocal()


class SimilarityBottleneck(ScalarBottleneck):
    """Cosine similarity of the pooled image embedding with a text embedding a concept; needs no concept labels.

    The texts become a buffer ``[K, D]`` of the checkpoint, so that no text encoder is needed afterwards. Similarities
    of CLIP models crowd into a narrow band with an offset of its own for each text; ``standardize`` removes it.
    ``probs`` is the sigmoid of the score: a ranking, calibrated only where annotations were trained on.

    Args:
        text_encoder: Encodes the concept texts at construction. Without it the concept set must bring ``embeddings``.
        link: What the head reads; see `ScalarBottleneck`.
        standardize: Standardise each similarity by its training statistics; else multiply by ``scale``.
        scale: Factor on the cosine without standardisation (100 is the temperature CLIP models end at).
        randint: See `Bottleneck`; needs annotated concepts.
        randint_scope: See `Bottleneck`.

    Raises:
        ValueError: From `build`, the text embeddings do not have the width of the pooled features.
        RuntimeError: From `forward`, there never were texts: neither encoded, nor given, nor loaded.
    """

    needs_concepts = False
    texts: Tensor

    def __init__(
        self,
        text_encoder: OpenClipTextEncoder | None = None,
        link: Link = "logits",
        standardize: bool = True,
        scale: float = 100.0,
        *,
        randint: float = 0.0,
        randint_scope: Literal["sample", "batch"] = "sample",
    ) -> None:
        super().__init__(link, randint=randint, randint_scope=randint_scope)
        # the encoder is only needed once, so it is no submodule: its weights stay out of the checkpoint
        self._encode = None if text_encoder is None else text_encoder.encode
        self.standardize = standardize
        self.scale = scale
        self.needs_concepts = randint > 0

    def portable_init_args(self) -> dict[str, Any]:
        """Without the encoder: the checkpoint brings its embeddings."""
        return {**super().portable_init_args(), "text_encoder": None}

    def build(self, dims: FeatureDims, concepts: ConceptSet, num_classes: int) -> None:
        """Encode the concept texts once."""
        self.build_values(concepts)
        given = concepts.embeddings if self._encode is None else self._encode(concepts.prompts())
        # no longer needed: a model is copied with all that it holds
        self._encode = self._init_args["text_encoder"] = None
        if given is not None and given.shape != (len(concepts), dims.pooled):
            raise ValueError(
                f"text embeddings: expected [{len(concepts)}, {dims.pooled}] to match {len(concepts)} concepts and the "
                f"width of the pooled features, got {list(given.shape)}; take text encoder and backbone from one model"
            )
        texts = torch.zeros(len(concepts), dims.pooled) if given is None else normalize(given.detach().float(), dim=-1)
        self.register_buffer("texts", texts)
        self._ready = given is not None
        self.normalizer = Standardizer(len(concepts)) if self.standardize else None

    def forward(self, features: Features, concepts: Tensor | None = None) -> ConceptOutput:
        """Compare the pooled features with the texts."""
        self._ready = self._ready or bool(self.texts.any())  # loaded from a checkpoint since
        if not self._ready:
            raise RuntimeError(
                "the concept texts were never encoded: pass text_encoder, or a concept set with embeddings, or load a "
                "checkpoint before the first batch"
            )
        # half precision would round away the little by which cosines of CLIP models differ
        with torch.autocast(features.pooled.device.type, enabled=False):
            cosine = normalize(features.pooled.float(), dim=-1) @ self.texts.float().T
            logits = cosine * self.scale if self.normalizer is None else self.normalizer(cosine)
        return self.make_output(features, logits.to(features.pooled.dtype))

    def concept_maps(self, output: ConceptOutput) -> Tensor:
        """What each token adds to the similarity with the text; standardisation shifts scores, which has no place."""
        features = output.features
        length = features.pooled.float().norm(dim=-1).clamp(min=1e-12)
        cells = features.averaged_tokens().float() @ self.texts.float().T / length[:, None, None]
        return features.as_map(cells * (self.scale if self.normalizer is None else self.normalizer.factor()))

    def losses(self, output: ConceptOutput, batch: Batch, context: LossContext) -> dict[str, Tensor]:
        """No concept loss: the texts say what the concepts mean."""
        return {}

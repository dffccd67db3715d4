"""A trained concept layer on CLIP similarities, with losses that leave few concepts active (Semenov et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from cbm_lightning.backbones.text import OpenClipTextEncoder
from cbm_lightning.bottlenecks.scalar import Link
from cbm_lightning.bottlenecks.similarity import SimilarityBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.heads import LinearHead
from cbm_lightning.types import Batch, ConceptOutput, FeatureDims, Features, LossContext

Regularizer = Literal["gumbel", "gumbel_reference", "contrastive", "l1", "similarity"]


class ConceptLayerBottleneck(SimilarityBottleneck):
    """A linear layer ``z = W a`` on the similarities ``a`` of an image with concept texts (Semenov et al. 2024).

    The concept bottleneck layer of "Sparse Concept Bottleneck Models: Gumbel Tricks in Contrastive Learning".

    No concept is annotated: the layer learns from the label, and from unsupervised losses that keep few concepts
    active. ``W [K, K]``, without biases, starts as the identity, so that each ``z`` begins as the similarity with the
    text that gives it its name (a random start, as in the official code, has no such tie). The head reads ``z``; by
    default it is linear without biases, as in the paper.

    Each regularizer is a loss of its name, whose weight is ``loss_weights`` of the module:

    - ``gumbel``: entropy of the Gumbel-softmax of ``z``, over the concepts of each image and over the images of each
      concept, each divided by its largest value and averaged: 0 where each image has one concept and each concept one
      image, 1 where nothing stands out. Our reading of what the paper wants of its loss; see the next one.
    - ``gumbel_reference``: the formula of the official code, half the sum over both axes of the mean of minus the
      log of the Gumbel-softmax. Uniform ``z`` minimise it, so it flattens activations; for comparison only.
    - ``contrastive``: the symmetric cross-entropy of CLIP between images and concepts, where the partner of an image
      is the concept of the largest similarity ``a``, and the partner of a concept the image of the largest one. (The
      official code pairs the first image with the first concept, and so on.)
    - ``l1``: the sum of the absolute weights of the layer, divided by ``K``.
    - ``similarity``: minus the cubed cosine between ``z`` and ``a`` over the batch, concept by concept, which keeps
      them alike (the measure of Label-free CBM, Oikarinen et al. 2023).

    Args:
        text_encoder: See `SimilarityBottleneck`.
        regularizer: One of those above, several, or none (``[]``).
        temperature: Of the Gumbel-softmax.
        supervised: Add the concept loss on annotations, which batches must bring then.
        link: What the head reads; see `ScalarBottleneck`.
        standardize: See `SimilarityBottleneck`; the layer then sees numbers around zero, whatever the CLIP model.
        scale: See `SimilarityBottleneck`.
        randint: See `Bottleneck`; needs annotated concepts.
        randint_scope: See `Bottleneck`.

    Raises:
        ValueError: A regularizer is unknown or repeated, or the temperature is not positive.

    Example:
        >>> concepts = ConceptSet(["red", "round"], embeddings=torch.eye(2, 8))
        >>> bottleneck = ConceptLayerBottleneck(regularizer=["gumbel", "l1"])
        >>> bottleneck.build(FeatureDims(8), concepts, num_classes=3)
        >>> bottleneck(Features(torch.randn(4, 8))).values.shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        text_encoder: OpenClipTextEncoder | None = None,
        regularizer: Regularizer | Sequence[Regularizer] = "gumbel",
        temperature: float = 1.0,
        supervised: bool = False,
        link: Link = "logits",
        standardize: bool = True,
        scale: float = 100.0,
        *,
        randint: float = 0.0,
        randint_scope: Literal["sample", "batch"] = "sample",
    ) -> None:
        super().__init__(text_encoder, link, standardize, scale, randint=randint, randint_scope=randint_scope)
        self.regularizers: list[str] = [regularizer] if isinstance(regularizer, str) else list(regularizer)
        if unknown := [name for name in self.regularizers if name not in get_args(Regularizer)]:
            raise ValueError(f"regularizer: expected some of {get_args(Regularizer)}, got {unknown}")
        if len(set(self.regularizers)) < len(self.regularizers):
            raise ValueError(f"regularizer: each may be named once, got {self.regularizers}")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        self.temperature = temperature
        self.supervised = supervised
        self.needs_concepts = supervised or randint > 0

    def default_head(self) -> LinearHead:
        """A linear head without biases."""
        return LinearHead(bias=False)

    def build(self, dims: FeatureDims, concepts: ConceptSet, num_classes: int) -> None:
        """Encode the concept texts once, and make the layer."""
        super().build(dims, concepts, num_classes)
        self.layer = nn.Linear(len(concepts), len(concepts), bias=False)
        nn.init.eye_(self.layer.weight)

    def forward(self, features: Features, concepts: Tensor | None = None) -> ConceptOutput:
        """Compare the pooled features with the texts, and mix the similarities."""
        similarity = super().forward(features).logits
        return self.make_output(features, self.layer(similarity)).replace(extras={"similarity": similarity})

    def concept_maps(self, output: ConceptOutput) -> Tensor:
        """What each token adds to ``z``: the maps of the similarities, mixed as they are."""
        maps: Tensor = torch.einsum("km,bmhw->bkhw", self.layer.weight.float(), super().concept_maps(output))
        return maps

    def losses(self, output: ConceptOutput, batch: Batch, context: LossContext) -> dict[str, Tensor]:
        """The regularizers by name, and the concept loss with ``supervised``."""
        z = output.logits
        with torch.autocast(z.device.type, enabled=False):
            losses: dict[str, Tensor] = {
                name: self._regularize(name, z.float(), output.extras) for name in self.regularizers
            }
        if self.supervised:
            losses["concept"] = context.concept_loss(z, batch["concepts"])
        return losses

    def diagnostics(self, output: ConceptOutput) -> dict[str, Tensor]:
        """``effective_concepts``, from 1 to ``K``: the exponential of the entropy of ``softmax(z)`` an image.

        It counts the concepts that stand out at the upper end, as in a list of the top concepts of an image; a head on
        ``z`` may still read the others.
        """
        log = output.logits.float().log_softmax(-1)
        return {"effective_concepts": (-(log.exp() * log).sum(-1)).exp().mean()}

    def _regularize(self, name: str, z: Tensor, extras: dict[str, Tensor]) -> Tensor:
        similarity = extras["similarity"].float()
        match name:
            case "gumbel":
                return gumbel_entropy(z, self.temperature, self.generator)
            case "gumbel_reference":
                return reference_gumbel_loss(z, self.temperature, self.generator)
            case "contrastive":
                return partner_loss(z, similarity)
            case "similarity":
                return -cubed_cosine(z, similarity)
            case _:
                return self.layer.weight.abs().sum() / len(self.layer.weight)


def gumbel_log_softmax(z: Tensor, dim: int, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Log of the Gumbel-softmax (Jang et al. 2017, equation 2) of ``[B, K]`` scores; without a generator, no noise."""
    if generator is not None:
        # drawn where the generator lives
        uniform = torch.rand(z.shape, generator=generator).clamp(min=torch.finfo(torch.float32).tiny)
        z = z - (-uniform.log()).log().to(z)
    return (z / temperature).log_softmax(dim)


def gumbel_entropy(z: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Entropy of the Gumbel-softmax of ``[B, K]`` over either axis, as a share of the largest, in [0, 1]."""
    shares = []
    for dim in (0, 1):
        if z.shape[dim] > 1:
            log = gumbel_log_softmax(z, dim, temperature, generator)
            shares.append(-(log.exp() * log).sum(dim).mean() / math.log(z.shape[dim]))
    # one image of one concept has nothing to choose from
    return torch.stack(shares).mean() if shares else z.sum() * 0.0


def reference_gumbel_loss(z: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Half the sum over both axes of the mean of minus the log of the Gumbel-softmax, as in the official code."""
    return -0.5 * sum(
        (gumbel_log_softmax(z, dim, temperature, generator).mean() for dim in (0, 1)), start=z.new_zeros(())
    )


def partner_loss(z: Tensor, similarity: Tensor) -> Tensor:
    """Symmetric cross-entropy of ``[B, K]`` scores with the partners of the largest similarity ``[B, K]``."""
    of_images, of_concepts = similarity.argmax(1), similarity.argmax(0)
    return (cross_entropy(z, of_images) + cross_entropy(z.T, of_concepts)) / 2


def cubed_cosine(z: Tensor, similarity: Tensor) -> Tensor:
    """Mean over the concepts of the cosine of cubed, centred columns of two ``[B, K]``, in [-1, 1]."""
    a, b = (normalize(standardized(x).pow(3), dim=0) for x in (z, similarity))
    return (a * b).sum(0).mean()


def standardized(x: Tensor) -> Tensor:
    """Columns of ``[B, K]`` centred and of length 1 (0 for a constant one)."""
    return normalize(x - x.mean(0), dim=0)

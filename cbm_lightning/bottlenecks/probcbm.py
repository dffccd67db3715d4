"""Probabilistic Concept Bottleneck Models (Kim et al., ICML 2023): a Gaussian embedding a concept."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize, softmax

from cbm_lightning.bottlenecks.activation import ConceptActivation
from cbm_lightning.bottlenecks.base import Bottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.heads import LabelHead, PrototypeHead
from cbm_lightning.labels import mean_over_samples
from cbm_lightning.types import (
    Batch,
    ConceptOutput,
    FeatureDims,
    Features,
    Intervention,
    LossContext,
    ValueLayout,
    masked_mean,
)

Inference = Literal["mean", "sample"]

# as in the official code: the variance may not overflow before it is learned
MAX_LOG_VARIANCE = 10.0


class ProbabilisticBottleneck(Bottleneck):
    """A Gaussian in a space of embeddings for each concept (Probabilistic CBM, arXiv 2306.01574).

    Mean (of length 1) and variances come from attention over the tokens, by weights that each concept has for itself.
    The probability of a concept is a softmax over scaled negative distances to two learned anchors of length 1,
    ``p_k = mean_s softmax(-a |z_ks - v_kj|)[present]`` over samples ``z_ks`` of the Gaussian. The variance says how
    uncertain the concept is: ``uncertainty`` is its geometric mean over the dimensions, and the prototype head that
    goes with it turns the variances into an uncertainty of the label.

    A correction puts the anchor, or for a soft one the mix of both, in the place of the embedding, without variance.
    The paper trains in two phases, concepts and then the head, see the recipe ``probcbm``; RandInt mixes anchors into
    the samples that the head is trained on. The losses are ``concept`` and ``kl``, the divergence of the Gaussian from
    the standard normal one: ``loss_weights: {kl: 5.0e-5}`` in the paper. As means have length 1 whatever happens, it
    holds the variances alone, and keeps them from vanishing. Members of a categorical group, which the paper does not
    have, share a softmax over their differences of distances.

    ``extras`` keep ``mean`` and ``log_variance [B, K, D]``, the latter minus infinity where the head reads what is
    certain; ``maps`` the attention behind the mean, a hint and no exact account.

    Args:
        embedding_size: Dimensions ``D`` of the embedding of a concept.
        samples: Embeddings ``S`` drawn for an input in training, and in evaluation with ``inference: sample``.
        inference: Evaluation takes the means alone (the official code), or averages over samples, whose noise is fixed
            and the same for all inputs (the paper's equation).
        scale: Where the learned factor on the distances starts.
        randint: Probability with which the head reads the anchor that is true in training; 0.5 in the official code.
        randint_scope: ``"sample"`` draws anew for each input and embedding drawn of it; ``"batch"`` once for all.

    Raises:
        ValueError: ``embedding_size`` is below 2, ``samples`` below 1, ``scale`` not positive or ``inference``
            unknown; from `build`, the backbone has no tokens or a concept is real-valued; from `forward`, the batch
            brings features without tokens.

    Example:
        >>> bottleneck = ProbabilisticBottleneck(embedding_size=4)
        >>> bottleneck.build(FeatureDims(8, tokens=8), ConceptSet(["red", "round"]), num_classes=3)
        >>> tokens = torch.randn(5, 9, 8)
        >>> output = bottleneck.eval()(Features(tokens.mean(1), tokens, grid=(3, 3)))
        >>> output.values.shape, output.uncertainty.shape, output.maps.shape
        (torch.Size([5, 8]), torch.Size([5, 2]), torch.Size([5, 2, 3, 3]))
    """

    noise: Tensor

    def __init__(
        self,
        embedding_size: int = 16,
        samples: int = 50,
        inference: Inference = "mean",
        scale: float = 5.0,
        *,
        randint: float = 0.5,
        randint_scope: Literal["sample", "batch"] = "sample",
    ) -> None:
        super().__init__(randint=randint, randint_scope=randint_scope)
        if embedding_size < 2:
            raise ValueError(f"embedding_size: expected at least 2, got {embedding_size}")
        if samples < 1:
            raise ValueError(f"samples: expected at least 1, got {samples}")
        if inference not in get_args(Inference):
            raise ValueError(f"inference: expected one of {get_args(Inference)}, got {inference!r}")
        if not 0.0 < scale < math.inf:
            raise ValueError(f"scale: expected a positive number, got {scale}")
        self.embedding_size = embedding_size
        self.samples = samples
        self.inference = inference
        self.initial_scale = scale

    def build(self, dims: FeatureDims, concepts: ConceptSet, num_classes: int) -> None:
        """Make the stem, the heads of mean and variance, and the anchors."""
        if dims.tokens is None:
            raise ValueError(
                "backbone: ProbabilisticBottleneck reads tokens, and this backbone has none; choose one with a feature "
                "map or patch tokens (its stage, if it is a TimmBackbone), or use LinearBottleneck"
            )
        if concepts.is_real().any():
            real = [name for name, kind in zip(concepts.names, concepts.kinds, strict=True) if kind == "real"]
            raise ValueError(
                f"concepts {real} are real-valued; anchors stand for absent and present. Use LinearBottleneck"
            )
        number, width = len(concepts), self.embedding_size
        self.concepts = concepts
        self.layout = ValueLayout(number, width)
        self.activation = ConceptActivation(concepts)
        self.stem = nn.Linear(dims.tokens, number * width, bias=False)
        self.norm = nn.BatchNorm1d(number * width)
        self.mean_head = MeanHead(number, width)
        self.variance_head = VarianceHead(number, width)
        self.anchors = nn.Parameter(nn.init.trunc_normal_(torch.empty(2, number, width), std=width**-0.5))
        self.scale = nn.Parameter(torch.tensor(float(self.initial_scale)))
        if self.inference == "sample":
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(self.samples, 1, self.layout.size, generator=generator)
            self.register_buffer("noise", noise, persistent=False)

    def default_head(self) -> LabelHead:
        """Classification by distance, like the concepts."""
        return PrototypeHead()

    def forward(self, features: Features, concepts: Tensor | None = None) -> ConceptOutput:
        """Predict the Gaussians, draw from them where it is time to, and compare with the anchors."""
        tokens = self.concept_tokens(features)
        with torch.autocast(tokens.device.type, enabled=False):
            each = (len(self.concepts), self.embedding_size)
            average = masked_mean(tokens, features.mask).unflatten(-1, each)
            cells = tokens.unflatten(-1, each).transpose(1, 2)
            mean, attention = self.mean_head(cells, average, features.mask)
            log_variance = self.variance_head(cells, average, features.mask).clamp(max=MAX_LOG_VARIANCE)
            values, sampled = self.draw(mean.flatten(1), log_variance.flatten(1))
            logits = self.scores(values)
            logits = self.average(logits) if sampled else logits
        on_grid = features.grid is not None and len(features.grid) == 2
        return ConceptOutput(
            features,
            logits,
            self.activation(logits),
            values,
            sample_dim=sampled,
            maps=features.as_map(attention.transpose(1, 2)) if on_grid else None,
            uncertainty=log_variance.mean(-1).exp(),
            extras={"mean": mean, "log_variance": log_variance},
        )

    def concept_tokens(self, features: Features) -> Tensor:
        """``[B, N, K*D]`` what each concept sees in each token, in single precision."""
        if features.tokens is None:
            raise ValueError(
                "tokens: ProbabilisticBottleneck reads tokens, and the batch brings pooled features alone; give it "
                "`tokens [B, N, D]` or images"
            )
        tokens = self.stem(features.tokens)
        if features.mask is None:
            tokens = self.norm(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        else:
            # padding may not count in the statistics
            real = features.mask.unsqueeze(-1)
            tokens = torch.zeros_like(tokens).masked_scatter(real, self.norm(tokens[features.mask]))
        seen: Tensor = tokens.relu().float()
        return seen

    def draw(self, mean: Tensor, log_variance: Tensor) -> tuple[Tensor, bool]:
        """What the head reads, ``[S, B, V]`` samples or the means ``[B, V]``, and whether it is samples."""
        training = self.training or self.generator is not None
        if not training and self.inference == "mean":
            return mean, False
        if training:
            # on the CPU, so that every device draws the same
            noise = torch.randn(self.samples, *mean.shape, generator=self.generator).to(mean)
        else:
            noise = self.noise.to(mean)
        return torch.addcmul(mean, noise, (0.5 * log_variance).exp()), True

    def scores(self, values: Tensor) -> Tensor:
        """``[..., K]`` how much closer ``[..., K*D]`` embeddings are to "present" than to "absent", scaled: a logit."""
        embeddings = values.unflatten(-1, (len(self.concepts), self.embedding_size))
        absent, present = (torch.linalg.vector_norm(embeddings - anchor, dim=-1) for anchor in self.unit_anchors())
        scores: Tensor = self.scale.float() * (absent - present)
        return scores

    def average(self, logits: Tensor) -> Tensor:
        """``[B, K]`` scores whose probabilities are the mean over samples of those of ``[S, B, K]`` scores."""
        mean = mean_over_samples(logits, "multilabel")
        if not self.activation.has_groups:
            return mean
        members = torch.logsumexp(self.activation.log_softmax(logits), 0) - math.log(len(logits))
        return torch.where(self.activation.categorical, members, mean)

    def unit_anchors(self) -> Tensor:
        """``[2, K, D]`` the anchors of length 1, "absent" first."""
        return normalize(self.anchors.float(), dim=-1)

    def intervene(self, output: ConceptOutput, intervention: Intervention) -> ConceptOutput:
        """Put anchors in the place of embeddings; a concept that is taken out (NaN) is read as the zero vector.

        The mask may be one a sample, ``[S, B, K]``; then the output has samples too. A concept is certain, and its
        ``probs`` are those it is corrected to, where all samples are corrected.
        """
        mask, unknown = intervention.mask, intervention.values.isnan().unsqueeze(-1)
        told = intervention.values if intervention.logits is None else self.activation(intervention.logits)
        absent, present = self.unit_anchors()
        # NaN would spread to the gradients of the anchors, even where it is not read
        share = told.nan_to_num(nan=0.0).to(absent).unsqueeze(-1)
        fixed = torch.lerp(absent, present, share).masked_fill(unknown, 0.0)
        values = torch.where(
            mask.repeat_interleave(self.embedding_size, -1), fixed.flatten(-2).to(output.values), output.values
        )
        whole = mask.all(0) if mask.ndim > output.probs.ndim else mask
        known = whole & ~unknown.squeeze(-1)
        log_variance = output.extras["log_variance"].masked_fill(whole.unsqueeze(-1), -torch.inf)
        return output.replace(
            values=values,
            sample_dim=values.ndim > 2,
            probs=torch.where(known, told.to(output.probs), output.probs),
            uncertainty=None if output.uncertainty is None else output.uncertainty.masked_fill(known, 0.0),
            extras={**output.extras, "log_variance": log_variance},
        )

    def concept_maps(self, output: ConceptOutput) -> None:
        """None: attention is not all that a score comes from, the mean over all cells is part of it too."""
        return

    def training_mask(self, concepts: Tensor, generator: torch.Generator) -> Tensor | None:
        """``[S, B, K]`` bool, which embeddings drawn of an input give way to the anchor; ``[B, K]`` a batch."""
        if self.randint == 0.0 or self.randint_scope == "batch":
            return super().training_mask(concepts, generator)
        draw = torch.rand(self.samples, *concepts.shape, generator=generator)
        return (draw < self.randint).to(concepts.device)

    def losses(self, output: ConceptOutput, batch: Batch, context: LossContext) -> dict[str, Tensor]:
        """The concept loss of the averaged probabilities, and ``kl``: summed over dimensions, a mean over the rest."""
        mean, log_variance = output.extras["mean"], output.extras["log_variance"]
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(-1).mean()
        return super().losses(output, batch, context) | {"kl": kl}

    def diagnostics(self, output: ConceptOutput) -> dict[str, Tensor]:
        """``concept_uncertainty``, the mean over samples and concepts."""
        return {} if output.uncertainty is None else {"concept_uncertainty": output.uncertainty.mean()}


class ConceptLinear(nn.Module):
    """A linear map a concept, ``[B, K, ..., inputs]`` to ``[B, K, ..., outputs]``."""

    def __init__(self, concepts: int, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        bound = math.sqrt(6.0 / (inputs + outputs))  # Xavier, as in the official code
        self.weight = nn.Parameter(torch.empty(concepts, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(concepts, outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map each concept by its own weights, in single precision."""
        mapped: Tensor = torch.einsum("bk...i,kio->bk...o", x, self.weight.float())
        if self.bias is None:
            return mapped
        between = (1,) * (mapped.ndim - 3)
        shifted: Tensor = mapped + self.bias.float().unflatten(0, (len(self.bias), *between))
        return shifted


class AttentionPool(nn.Module):
    """A weighted mean of the tokens a concept, weighted by ``softmax(w2 tanh(w1 x))``."""

    def __init__(self, concepts: int, width: int) -> None:
        super().__init__()
        self.first = ConceptLinear(concepts, width, width, bias=False)
        self.second = ConceptLinear(concepts, width, 1, bias=False)

    def forward(self, cells: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """``[B, K, D]`` pooled and ``[B, K, N]`` attention of ``cells [B, K, N, D]``."""
        scores = self.second(self.first(cells).tanh()).squeeze(-1)
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(1), -torch.inf)
        attention = softmax(scores, -1)
        return torch.einsum("bkn,bknd->bkd", attention, cells), attention


class MeanHead(nn.Module):
    """The mean of each concept's Gaussian: ``l2norm(LayerNorm(fc(average) + sigmoid(fc(attended))))``."""

    def __init__(self, concepts: int, width: int) -> None:
        super().__init__()
        self.pool = AttentionPool(concepts, width)
        self.base = ConceptLinear(concepts, width, width)
        self.residual = ConceptLinear(concepts, width, width)
        self.gain = nn.Parameter(torch.ones(concepts, width))
        self.shift = nn.Parameter(torch.zeros(concepts, width))

    def forward(self, cells: Tensor, average: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """``[B, K, D]`` of length 1, and the attention ``[B, K, N]``."""
        attended, attention = self.pool(cells, mask)
        mixed = layer_norm(self.base(average) + self.residual(attended).sigmoid(), average.shape[-1:])
        return normalize(mixed * self.gain.float() + self.shift.float(), dim=-1), attention


class VarianceHead(nn.Module):
    """The logarithms of the variances of each concept's Gaussian: ``fc(attended) + fc(average)``."""

    def __init__(self, concepts: int, width: int) -> None:
        super().__init__()
        self.pool = AttentionPool(concepts, width)
        self.base = ConceptLinear(concepts, width, width)
        self.residual = ConceptLinear(concepts, width, width)

    def forward(self, cells: Tensor, average: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, K, D]``, of any size."""
        attended, _ = self.pool(cells, mask)
        mapped: Tensor = self.residual(attended) + self.base(average)
        return mapped

"""Stochastic concept bottleneck models (Vandenhirtz et al., NeurIPS 2024): a Gaussian over all concept scores."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn.functional import logsigmoid, softplus

from cbm_lightning.bottlenecks.activation import ConceptActivation
from cbm_lightning.bottlenecks.base import Bottleneck
from cbm_lightning.bottlenecks.draws import CERTAIN, ConceptNoise
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.interventions.gaussian import condition, stable_cholesky
from cbm_lightning.interventions.values import percentiles
from cbm_lightning.randomness import Randomness
from cbm_lightning.types import Batch, ConceptOutput, FeatureDims, Features, Intervention, LossContext, ValueLayout

Covariance = Literal["amortized", "global", "empirical"]

# smallest entry on the diagonal of a factor, and smallest eigenvalue of a covariance of annotations
SMALLEST, FLOOR = 1e-6, 1e-3
# weights of the amortised covariance: with gradients and Adam's moments these take 4 GiB
MOST_WEIGHTS = 2**28


class StochasticBottleneck(Bottleneck):
    """Concept scores with a joint normal distribution, so that one correction moves the others (arXiv 2406.19272).

    ``eta ~ N(mu(x), L L')``; concepts are drawn from ``eta`` as 0 or 1, ``samples`` times, and the head averages its
    label probabilities over the draws. A gradient passes the draws by a relaxation at a temperature that falls from 1
    exponentially, and straight through to 0 and 1. In evaluation the draws are fixed. Members of a categorical group
    are drawn one a group, by the softmax of their scores.

    Losses: ``concept``, minus the mean over annotated samples of ``log 1/S sum_s prod_k p(c_k | eta_s)``, a sum over
    concepts (the official code leaves ``log S`` out, which moves no gradient), and ``precision``, the mean absolute
    entry of the inverse covariance off its diagonal, which keeps the dependencies sparse. The module's own
    ``concept_loss`` is not used, for the likelihood is that of all concepts together. The label loss is exact: minus
    the log of the averaged probability.

    A correction is read by the head exactly as it is told, and conditions the scores of the others on its own score:
    that of a value strategy (``ConfidenceRegionValues`` is the paper's), or by itself the 5th or 95th percentile of
    that concept's predicted scores in the latest training epoch, ``value_range [2, K]``, soft corrections in between.
    All corrections are conditioned on at once, from the predicted moments. ``distribution`` remains the predicted one,
    ``uncertainty`` becomes the standard deviation of each score given the corrections. What is taken out (NaN) says
    nothing of the others.

    Args:
        covariance: ``"amortized"``, predicted for each input; ``"global"``, learned, the same for all, initialised from
            the annotations; or ``"empirical"``, that of the annotations (of ``logit(.05 + .9 c)``), not learned. The
            annotations are those of the first training.
        samples: Number ``S`` of draws.
        temperature: The temperature that the relaxation ends at, in (0, 1].
        temperature_share: After which share of the training it is reached, in (0, 1].
        randint: See `Bottleneck`; none in the paper. Corrections in training condition the others with a gradient.
        randint_scope: See `Bottleneck`.

    Attributes:
        temperature: Scalar buffer, the current temperature; stands still while the bottleneck does not train.

    Raises:
        ValueError: An option is out of range, or (from `build`) a concept is real-valued, or the amortised covariance
            would need more than 268 million weights.

    Example:
        >>> bottleneck = StochasticBottleneck(samples=50)
        >>> bottleneck.build(FeatureDims(8), ConceptSet(["red", "round"]), num_classes=3)
        >>> output = bottleneck(Features(torch.randn(4, 8)))
        >>> output.values.shape, output.distribution.covariance_matrix.shape
        (torch.Size([50, 4, 2]), torch.Size([4, 2, 2]))
    """

    annotated: Tensor
    temperature: Tensor
    value_range: Tensor
    normal: Tensor
    factor: Tensor

    def __init__(
        self,
        covariance: Covariance = "amortized",
        samples: int = 100,
        temperature: float = 0.5,
        temperature_share: float = 1.0,
        *,
        randint: float = 0.0,
        randint_scope: Literal["sample", "batch"] = "sample",
    ) -> None:
        super().__init__(randint=randint, randint_scope=randint_scope)
        if covariance not in get_args(Covariance):
            raise ValueError(f"covariance: expected one of {get_args(Covariance)}, got {covariance!r}")
        if samples < 1:
            raise ValueError(f"samples: expected at least 1, got {samples}")
        for name, share in (("temperature", temperature), ("temperature_share", temperature_share)):
            if not 0.0 < share <= 1.0:
                raise ValueError(f"{name}: expected a number in (0, 1], got {share}")
        self.covariance = covariance
        self.samples = samples
        self.last_temperature, self.temperature_share = temperature, temperature_share
        self.needs_annotations = covariance != "amortized"
        self.statistics_size = 16384

    def build(self, dims: FeatureDims, concepts: ConceptSet, num_classes: int) -> None:
        """Make the map to the means, what the covariance is made of, and the fixed noise."""
        count, entries = len(concepts), len(concepts) * (len(concepts) + 1) // 2
        self._check(dims, concepts)
        self.concepts = concepts
        self.layout = ValueLayout(count)
        self.activation = ConceptActivation(concepts)
        self.mean = nn.Linear(dims.pooled, count)
        if self.covariance == "amortized":
            self.spread = nn.Linear(dims.pooled, entries)
            with torch.no_grad():
                # the official initialisation: at first nearly the same for all inputs
                self.spread.weight.mul_(0.01)
        elif self.covariance == "global":
            self.entries = nn.Parameter(torch.zeros(entries))
        else:
            self.register_buffer("factor", torch.eye(count))
        self.register_buffer("annotated", torch.tensor(0.0))
        self.register_buffer("temperature", torch.tensor(1.0))
        # "absent" and "present" are probabilities of 5 and 95 % until training predictions say better
        self.register_buffer("value_range", torch.tensor([0.05, 0.95]).logit()[:, None].repeat(1, count))
        self.noise = ConceptNoise(concepts, self.samples, "stochastic bottleneck")
        normal = Randomness(0, "stochastic bottleneck", torch.arange(self.samples)).normal("scores", count)
        self.register_buffer("normal", normal, persistent=False)

    def _check(self, dims: FeatureDims, concepts: ConceptSet) -> None:
        if concepts.is_real().any():
            real = [name for name, kind in zip(concepts.names, concepts.kinds, strict=True) if kind == "real"]
            raise ValueError(
                f"concepts {real} are real-valued; a stochastic bottleneck draws 0 or 1. Use LinearBottleneck"
            )
        weights = len(concepts) * (len(concepts) + 1) // 2 * dims.pooled
        if self.covariance == "amortized" and weights > MOST_WEIGHTS:
            raise ValueError(
                f"covariance: 'amortized' needs {weights / 1e6:.0f} million weights for {len(concepts)} concepts and "
                f"features of width {dims.pooled}, at most {MOST_WEIGHTS / 1e6:.0f} million are allowed; choose "
                "'global' or 'empirical', or fewer concepts"
            )

    # ---------------------------------------------------------------- the distribution

    def scale(self, features: Tensor) -> Tensor:
        """``[B, K, K]`` Cholesky factors of the covariance for pooled features ``[B, D]``, in single precision."""
        count = len(self.concepts)
        if self.covariance == "empirical":
            return self.factor.float().expand(len(features), -1, -1)
        entries = (self.spread(features) if self.covariance == "amortized" else self.entries.unsqueeze(0)).float()
        row, column = torch.tril_indices(count, count, device=entries.device)
        lower = entries.new_zeros(len(entries), count, count)
        lower = lower.index_put((torch.arange(len(entries), device=row.device)[:, None], row, column), entries)
        diagonal = softplus(lower.diagonal(dim1=-2, dim2=-1)) + SMALLEST
        return (lower.tril(-1) + torch.diag_embed(diagonal)).expand(len(features), -1, -1)

    def forward(self, features: Features, concepts: Tensor | None = None) -> ConceptOutput:
        """Predict the distribution of the scores, and draw concepts from it."""
        mean = self.mean(features.pooled).float()
        scale = self.scale(features.pooled)
        with torch.autocast(mean.device.type, enabled=False):
            normal, noise = self._noise(len(mean))
            scores = self._scores(mean, scale, normal)
            drawn = self._drawn(scores, noise)
            probs = self.activation(scores).mean(1)
            uncertainty = scale.norm(dim=-1)
        extras = {"mean": mean, "scale": scale}
        if self._draws:
            extras["scores"] = scores
        distribution = MultivariateNormal(mean, scale_tril=scale, validate_args=False)
        return ConceptOutput(
            features,
            mean,
            probs,
            drawn.transpose(0, 1).to(self.mean.weight.dtype),
            sample_dim=True,
            uncertainty=uncertainty,
            distribution=distribution,
            extras=extras,
        )

    @property
    def _draws(self) -> bool:
        """Whether this is a training step, in which noise is drawn."""
        return self.training or self.generator is not None

    def _noise(self, rows: int) -> tuple[Tensor, Tensor]:
        """Standard normal noise and that of `ConceptNoise`: ``[B, S, K]``, or ``[S, K]`` in evaluation."""
        if not self._draws:
            return self.normal.float(), self.noise.fixed.float()
        shape = (rows, self.samples, len(self.concepts))
        normal = torch.randn(shape, generator=self.generator, dtype=torch.float32)
        return normal.to(self.normal.device), self.noise.draw(rows, self.samples, self.generator)

    @staticmethod
    def _scores(mean: Tensor, scale: Tensor, normal: Tensor) -> Tensor:
        """``[B, S, K]`` samples of the scores."""
        return mean.unsqueeze(1) + normal @ scale.mT

    def _drawn(self, scores: Tensor, noise: Tensor) -> Tensor:
        """``[B, S, K]`` hard concepts: relaxed Bernoulli variables, rounded straight through."""
        return self.activation.harden(self.activation((scores + noise) / self.temperature))

    # ---------------------------------------------------------------- corrections

    def intervene(self, output: ConceptOutput, intervention: Intervention) -> ConceptOutput:
        """Draw again, given the corrections and those that the output has already; see the class."""
        mask, extras = intervention.mask, output.extras
        values = intervention.values.to(output.probs.dtype)
        low, high = self.value_range.to(values)
        scores = low + (high - low) * values if intervention.logits is None else intervention.logits.to(values.dtype)
        before = extras.get("corrected")
        if before is not None:
            before = before & ~extras["told"].isnan()
            values = torch.where(mask, values, extras["told"])
            scores = torch.where(mask, scores, extras["told_scores"])
            mask = mask | extras["corrected"]
        values, scores = (torch.where(mask, x, 0.0) for x in (values, scores))
        told = mask & ~values.isnan()
        with torch.autocast(values.device.type, enabled=False):
            probs, drawn, spread = self._given(output, told, values, scores)
        touched = told.any(1, keepdim=True)
        held = torch.where(told, values, 0.0)
        old, plain = output.probs, output.values.transpose(0, 1)
        if before is not None and bool((freed := before.any(1, keepdim=True) & ~touched).any()):
            # all that was told is taken back: nothing of it may remain
            with torch.autocast(values.device.type, enabled=False):
                normal, noise = self._noise(len(values))
                fresh = self._scores(extras["mean"], extras["scale"], normal)
                old = torch.where(freed, self.activation(fresh).mean(1), old)
                plain = torch.where(freed.unsqueeze(1), self._drawn(fresh, noise), plain)
        free = torch.where(touched.unsqueeze(1), drawn, plain)
        return output.replace(
            probs=torch.where(told, held, torch.where(touched, probs, old)),
            values=torch.where(mask.unsqueeze(1), held.unsqueeze(1), free).transpose(0, 1).to(output.values.dtype),
            uncertainty=torch.where(told, 0.0, torch.where(touched, spread, extras["scale"].norm(dim=-1))),
            extras={**extras, "corrected": mask, "told": values, "told_scores": scores},
        )

    def _given(
        self, output: ConceptOutput, told: Tensor, values: Tensor, scores: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities ``[B, K]``, draws ``[B, S, K]`` and standard deviations ``[B, K]``, given what was told."""
        if not told.any() or told.all():
            # nothing to condition on, or nothing left to condition
            drawn = output.values.transpose(0, 1)
            return output.probs, drawn, torch.zeros_like(output.probs)
        mean, factor = self._conditional(output, told, scores)
        normal, noise = self._noise(len(mean))
        samples = self._scores(mean, factor, normal)
        # of a categorical group the member that was told is drawn
        certain = values.logit().clamp(-CERTAIN, CERTAIN)
        samples = torch.where(told.unsqueeze(1), certain.unsqueeze(1), samples)
        return self.activation(samples).mean(1), self._drawn(samples, noise), factor.norm(dim=-1)

    @staticmethod
    def _conditional(output: ConceptOutput, told: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``[B, K]`` and factor ``[B, K, K]`` of the scores of the free concepts; the others' mean nothing."""
        mean, scale = output.extras["mean"], output.extras["scale"]
        device = mean.device
        # double precision: what is nearly explained is a small difference, and mps has none
        home = torch.device("cpu") if device.type == "mps" else device
        mean, scale, told, scores = (x.to(home) for x in (mean, scale, told, scores))
        scale = scale.double()
        given, left = condition(mean, scale @ scale.mT, told, scores)
        # ones in the place of the corrected concepts, so that the factorisation exists and passes gradients
        factor = stable_cholesky(left + torch.diag_embed(told.to(left)))
        return given.float().to(device), factor.float().to(device)

    # ---------------------------------------------------------------- training

    def losses(self, output: ConceptOutput, batch: Batch, context: LossContext) -> dict[str, Tensor]:
        """The joint likelihood of the concepts and, unless the covariance is fixed, the size of its inverse."""
        mean, scale = output.extras["mean"], output.extras["scale"]
        with torch.autocast(mean.device.type, enabled=False):
            scores = output.extras.get("scores")
            if scores is None:
                scores = self._scores(mean, scale, self.normal.float())
            losses = {"concept": self._joint_loss(scores, batch["concepts"])}
            if self.covariance != "empirical":
                losses["precision"] = precision_size(scale if self.covariance == "amortized" else scale[:1])
        return losses

    def _joint_loss(self, scores: Tensor, concepts: Tensor) -> Tensor:
        """Minus the log-likelihood of ``[B, K]`` annotations under ``[B, S, K]`` samples of the scores."""
        known = ~concepts.isnan()
        target = torch.where(known, concepts, 0.0).to(scores.dtype).unsqueeze(1)
        each = target * logsigmoid(scores) + (1.0 - target) * logsigmoid(-scores)
        if self.activation.has_groups:
            each = torch.where(self.activation.categorical, target * self.activation.log_softmax(scores), each)
        joint = (each * known.unsqueeze(1)).sum(-1).logsumexp(1) - math.log(scores.shape[1])
        return -joint.sum() / known.any(1).sum().clamp(min=1)

    def fit_annotations(self, concepts: Tensor) -> None:
        """Start from the covariance of the annotations, on the logit scale; only once, for what was learned stays."""
        if self.annotated:
            return
        self.annotated.fill_(1.0)
        factor = stable_cholesky(annotation_covariance(concepts).unsqueeze(0))[0]
        if self.covariance == "empirical":
            self.factor.copy_(factor)
            return
        # softplus and its inverse: the first covariance is that of the annotations exactly
        diagonal = (factor.diagonal() - SMALLEST).clamp(min=SMALLEST)
        lower = factor.tril(-1) + torch.diag(diagonal + (-torch.expm1(-diagonal)).log())
        row, column = torch.tril_indices(*lower.shape)
        with torch.no_grad():
            self.entries.copy_(lower[row, column])

    def fit_statistics(self, logits: Tensor, probs: Tensor) -> None:
        """Set ``value_range`` to the 5th and 95th percentile of the predicted scores, concept by concept."""
        self.value_range.copy_(percentiles(logits.float(), (0.05, 0.95)))

    def on_progress(self, fraction: float) -> None:
        """Lower the temperature."""
        if self.training:
            self.temperature.fill_(self.last_temperature ** min(fraction / self.temperature_share, 1.0))


def precision_size(scale: Tensor) -> Tensor:
    """Mean absolute entry off the diagonal of the inverse covariance, of Cholesky factors ``[B, K, K]``; scalar."""
    count = scale.shape[-1]
    inverse = torch.linalg.solve_triangular(scale, torch.eye(count).to(scale), upper=False)
    precision = (inverse.mT @ inverse).abs()
    off = precision.sum((-2, -1)) - precision.diagonal(dim1=-2, dim2=-1).sum(-1)
    size: Tensor = (off / max(count * (count - 1), 1)).mean()
    return size


def annotation_covariance(concepts: Tensor) -> Tensor:
    """Covariance of annotations as scores ``logit(.05 + .9 c)`` (SCBM, arXiv 2406.19272).

    Args:
        concepts: ``[N, K]`` in [0, 1], NaN where unknown: each pair of concepts counts the samples that know both.

    Returns:
        ``[K, K]`` in double precision on the CPU, with eigenvalues of at least 0.001.
    """
    concepts = concepts.double().cpu()
    known = (~concepts.isnan()).double()
    scores = (0.05 + 0.9 * concepts).logit().nan_to_num(nan=0.0)
    centred = (scores - scores.sum(0) / known.sum(0).clamp(min=1.0)) * known
    covariance = centred.mT @ centred / (known.mT @ known - 1.0).clamp(min=1.0)
    # pairs that count different samples need not make a covariance, nor do concepts that never vary
    values, vectors = torch.linalg.eigh(covariance)
    floored: Tensor = vectors @ torch.diag(values.clamp(min=FLOOR)) @ vectors.mT
    return floored

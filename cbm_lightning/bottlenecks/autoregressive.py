"""The autoregressive concept bottleneck (Havasi et al., NeurIPS 2022): each concept given the ones before it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, logsigmoid, one_hot

from cbm_lightning.bottlenecks.activation import ConceptActivation
from cbm_lightning.bottlenecks.base import Bottleneck
from cbm_lightning.bottlenecks.draws import CERTAIN, ConceptNoise
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.types import Batch, ConceptOutput, FeatureDims, Features, Intervention, LossContext, ValueLayout

# keeps logits of probabilities finite
EDGE = 1e-6


class AutoregressiveBottleneck(Bottleneck):
    """Concepts one after another, ``p(c_k | x, c_1 ... c_{k-1})``, in the order of the concept set.

    Each concept has a network of one hidden layer on the features and the concepts before it ("Addressing Leakage in
    Concept Bottleneck Models"). A categorical group is drawn at once, by a softmax. The concepts are
    drawn as 0 or 1, ``samples`` times, and the head averages its label probabilities over the draws; in evaluation the
    draws are fixed, ``probs`` are means of the probabilities along them and ``logits`` their logits.

    In training the networks see the annotated concepts (teacher forcing; ``logits`` and ``probs`` are given these),
    drawn as 0 or 1 where they are soft and from the model itself where they are unknown, and the loss ``concept`` is
    the module's, concept by concept. It is the likelihood of all concepts, in evaluation too. As in the paper, train
    it with ``phases: independent``. Where the head trains on predictions it reads ``training_samples`` draws, of which
    a gradient passes each straight through to its probability.

    A correction is read by the head exactly as it is told, and so it is by the networks of all later concepts, which
    are drawn anew. Draws in which the corrected concepts were unlikely given those before them count for less: they are
    weighed by that likelihood, and ``samples`` of them are chosen in proportion to their weights, systematically and
    with fixed positions, so that the draws remain equally weighted. With many surprising corrections few different
    draws remain. Values on the logit scale are not needed, and not read. What is taken out (NaN) says nothing of the
    others.

    Args:
        hidden: Width of each hidden layer.
        samples: Number of draws in evaluation.
        training_samples: Number of draws in a training step, which are made one concept after another.
        randint: See `Bottleneck`; none in the paper.
        randint_scope: See `Bottleneck`.

    Raises:
        ValueError: A number is below 1, or (from `build`) a concept is real-valued.

    Example:
        >>> bottleneck = AutoregressiveBottleneck(samples=50)
        >>> bottleneck.build(FeatureDims(8), ConceptSet(["red", "round"]), num_classes=3)
        >>> output = bottleneck.eval()(Features(torch.randn(4, 8)))
        >>> output.values.shape
        torch.Size([50, 4, 2])
    """

    visible: Tensor

    def __init__(
        self,
        hidden: int = 50,
        samples: int = 100,
        training_samples: int = 1,
        *,
        randint: float = 0.0,
        randint_scope: Literal["sample", "batch"] = "sample",
    ) -> None:
        super().__init__(randint=randint, randint_scope=randint_scope)
        for name, number in (("hidden", hidden), ("samples", samples), ("training_samples", training_samples)):
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        self.hidden, self.samples, self.training_samples = hidden, samples, training_samples

    def build(self, dims: FeatureDims, concepts: ConceptSet, num_classes: int) -> None:
        """Make the networks, those of all concepts side by side."""
        if concepts.is_real().any():
            real = [name for name, kind in zip(concepts.names, concepts.kinds, strict=True) if kind == "real"]
            raise ValueError(
                f"concepts {real} are real-valued; an autoregressive bottleneck draws 0 or 1. Use LinearBottleneck"
            )
        count = len(concepts)
        self.concepts = concepts
        self.layout = ValueLayout(count)
        self.activation = ConceptActivation(concepts)
        groups = concepts.categorical_groups()
        grouped = {k for members in groups for k in members}
        # what is drawn at once, in the order of the first member
        self.steps = sorted(groups + [[k] for k in range(count) if k not in grouped])
        visible = torch.zeros(count, count)
        for place, members in enumerate(self.steps):
            earlier = [k for step in self.steps[:place] for k in step]
            visible[torch.tensor(members)[:, None], torch.tensor(earlier, dtype=torch.long)] = 1.0
        self.register_buffer("visible", visible, persistent=False)
        self.from_features = nn.Linear(dims.pooled, count * self.hidden)
        self.from_concepts = nn.Parameter(torch.empty(count, self.hidden, count))
        self.out_weight = nn.Parameter(torch.empty(count, self.hidden))
        self.out_bias = nn.Parameter(torch.empty(count))
        with torch.no_grad():
            # each network as nn.Linear starts, by the number of its own inputs
            inner = ((dims.pooled + visible.sum(1)) ** -0.5)[:, None, None]
            for weight in (*self.from_features.parameters(), self.from_concepts):
                parts = weight.view(count, self.hidden, -1)
                parts.copy_((2.0 * torch.rand_like(parts) - 1.0) * inner)
            for weight in (self.out_weight, self.out_bias):
                nn.init.uniform_(weight, -(self.hidden**-0.5), self.hidden**-0.5)
        self.noise = ConceptNoise(concepts, self.samples, "autoregressive bottleneck")

    # ---------------------------------------------------------------- the networks

    def scores(self, features: Features, concepts: Tensor) -> Tensor:
        """``[B, K]`` logits of each concept given those before it, of ``concepts [B, K]``: all networks at once."""
        weight = self.from_concepts * self.visible.unsqueeze(1)
        inner = self._seen(features) + torch.einsum("bj,khj->bkh", concepts.to(weight.dtype), weight)
        return ((leaky_relu(inner) * self.out_weight).sum(-1) + self.out_bias).float()

    def _seen(self, features: Features) -> Tensor:
        """``[B, K, h]`` what the features give to each hidden unit."""
        seen: Tensor = self.from_features(features.pooled).unflatten(1, (len(self.concepts), self.hidden))
        return seen

    def _draw(self, features: Features, noise: Tensor, told: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draw the concepts one step after another.

        Args:
            features: Of ``B`` inputs.
            noise: ``[B, S, K]`` or ``[1, S, K]``, see `ConceptNoise`.
            told: ``[B, K]`` what is known, NaN where nothing is; all are drawn without it.

        Returns:
            Draws and logits, both ``[B, S, K]``.
        """
        # taken apart once: the gradient of a slice is as large as the whole
        seen, networks = self._seen(features).unbind(1), self.from_concepts.unbind(0)
        drawn: list[Tensor] = []
        logits: list[Tensor] = []
        order: list[int] = []
        for members in self.steps:
            inner = torch.stack([seen[k] for k in members], 1).unsqueeze(1)
            if drawn:
                weight = torch.stack([networks[k][:, order] for k in members])
                inner = inner + torch.einsum("bsj,mhj->bsmh", torch.stack(drawn, -1).to(weight.dtype), weight)
            found = (leaky_relu(inner) * self.out_weight[members]).sum(-1) + self.out_bias[members]
            found = found.float().expand(-1, noise.shape[1], -1)
            values = self._choose(found, noise[:, :, members], None if told is None else told[:, None, members])
            drawn += values.unbind(-1)
            logits += found.unbind(-1)
            order += members
        back = sorted(range(len(order)), key=order.__getitem__)
        return tuple(torch.stack([column[k] for k in back], -1) for column in (drawn, logits))  # type: ignore[return-value]

    @staticmethod
    def _choose(logits: Tensor, noise: Tensor, told: Tensor | None) -> Tensor:
        """``[B, S, m]`` a binary concept, or one member of a group, with the gradient of the probabilities."""
        if logits.shape[-1] == 1:
            probs, hard = logits.sigmoid(), logits + noise >= 0
        else:
            if told is not None:
                # who is known to be the one is chosen, who is known not to be is not
                certain = told.logit().clamp(-CERTAIN, CERTAIN)
                logits = torch.where(told.isnan(), logits, certain)
            probs, hard = logits.softmax(-1), one_hot((logits + noise).argmax(-1), logits.shape[-1])
        drawn = hard.to(probs) + (probs - probs.detach())
        return drawn if told is None else torch.where(told.isnan(), drawn, told)

    # ---------------------------------------------------------------- predictions

    @property
    def _draws(self) -> bool:
        """Whether this is a training step, in which noise is drawn."""
        return self.training or self.generator is not None

    def _noise(self, rows: int, samples: int) -> Tensor:
        """``[B, S, K]``, or ``[1, S, K]`` in evaluation."""
        return self.noise.draw(rows, samples, self.generator) if self._draws else self.noise.fixed.float().unsqueeze(0)

    def forward(self, features: Features, concepts: Tensor | None = None) -> ConceptOutput:
        """Draw the concepts; in a training step with annotations, score each of them given those before it."""
        rows = len(features.pooled)
        drawn, found = self._draw(features, self._noise(rows, self.training_samples))
        probs = self.activation(found).mean(1)
        if self._draws and concepts is not None:
            logits = self.scores(features, self._annotated(features, concepts))
            probs = self.activation(logits)
        else:
            logits = self._score_of(probs)
        values = drawn.transpose(0, 1).to(self.out_weight.dtype)
        return ConceptOutput(features, logits, probs, values, sample_dim=True)

    def _score_of(self, probs: Tensor) -> Tensor:
        """``[B, K]`` logits of probabilities; their logarithms in a categorical group."""
        probs = probs.clamp(EDGE, 1.0 - EDGE)
        return torch.where(self.activation.categorical, probs.log(), probs.logit())

    def _annotated(self, features: Features, concepts: Tensor) -> Tensor:
        """``[B, K]`` annotations as the networks see them: 0 or 1, the model's own draw where there is none."""
        rows = len(concepts)
        noise = self._noise(rows, 1)[:, :1].expand(rows, -1, -1)
        known = self._choose_soft(concepts.float(), noise[:, 0])
        if not known.isnan().any():
            return known
        with torch.no_grad():
            drawn, _ = self._draw(features, noise, known)
        return drawn[:, 0]

    def _choose_soft(self, concepts: Tensor, noise: Tensor) -> Tensor:
        """``[B, K]`` soft annotations drawn as 0 or 1, NaN where unknown."""
        hard = self.activation.harden(self.activation(self._score_of(concepts.nan_to_num(nan=0.5)) + noise))
        sure = (concepts == 0) | (concepts == 1) | concepts.isnan()
        return torch.where(sure, concepts, hard)

    # ---------------------------------------------------------------- corrections

    def intervene(self, output: ConceptOutput, intervention: Intervention) -> ConceptOutput:
        """Draw again, given the corrections and those that the output has already; see the class."""
        mask, values = intervention.mask, intervention.values.to(output.probs.dtype)
        before = output.extras.get("corrected")
        if before is not None:
            before = before & ~output.extras["told"].isnan()
            values = torch.where(mask, values, output.extras["told"])
            mask = mask | output.extras["corrected"]
        told = torch.where(mask, values, torch.nan)
        known, held = ~told.isnan(), told.nan_to_num(nan=0.0)
        plain = output.values.transpose(0, 1)
        old = output.probs
        if before is not None and bool((freed := before.any(1, keepdim=True) & ~known.any(1, keepdim=True)).any()):
            # all that was told is taken back: nothing of it may remain
            fresh = self(output.features)
            old = torch.where(freed, fresh.probs, old)
            plain = torch.where(freed.unsqueeze(1), fresh.values.transpose(0, 1), plain)
        probs, drawn = old, plain
        if known.any() and not known.all():
            touched = known.any(1, keepdim=True)
            probs, drawn = self._given(output.features, told, plain.shape[1])
            probs = torch.where(touched, probs, old)
            drawn = torch.where(touched.unsqueeze(1), drawn, plain)
        return output.replace(
            probs=torch.where(known, held, probs),
            values=torch.where(mask.unsqueeze(1), held.unsqueeze(1), drawn).transpose(0, 1).to(output.values.dtype),
            extras={**output.extras, "corrected": mask, "told": torch.where(mask, values, 0.0)},
        )

    def _given(self, features: Features, told: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """Probabilities ``[B, K]`` and draws ``[B, S, K]``, given ``told [B, K]`` (NaN where nothing is known)."""
        drawn, logits = self._draw(features, self._noise(len(told), samples), told)
        with torch.autocast(logits.device.type, enabled=False):
            weight = self._likelihood(logits, told.unsqueeze(1)).softmax(1)
        known = ~told.isnan()
        # probabilities have less noise, but know nothing of what was told after them, or of their own group
        informed = known.to(logits) @ self.visible.to(logits) > 0
        if self.activation.has_groups:
            membership = self.activation.membership.to(logits)
            informed = informed | ((known.to(logits) @ membership) @ membership.T > 0)
        each = torch.where(informed.unsqueeze(1), drawn, self.activation(logits))
        probs = (weight.unsqueeze(-1) * each).sum(1)
        chosen = systematic(weight.detach())
        return probs, drawn.gather(1, chosen.unsqueeze(-1).expand(-1, -1, drawn.shape[-1]))

    def _likelihood(self, logits: Tensor, told: Tensor) -> Tensor:
        """``[B, S]`` log-probability of ``told [B, 1, K]``, minus the cross-entropy of what is soft."""
        known, target = ~told.isnan(), told.nan_to_num(nan=0.0)
        each = target * logsigmoid(logits) + (1.0 - target) * logsigmoid(-logits)
        if not self.activation.has_groups:
            return (each * known).sum(-1)
        log_probs, membership = self.activation.log_softmax(logits), self.activation.membership.to(logits)
        joint = (torch.where(self.activation.categorical, target * log_probs, each) * known).sum(-1)
        # of a group that only members that do not hold are known of: that it is one of the others
        ruled_out = ((log_probs.exp() * known) @ membership).clamp(max=1.0 - EDGE)
        unsettled = (target * known) @ membership == 0
        return joint + ((-ruled_out).log1p() * unsettled).sum(-1)

    # ---------------------------------------------------------------- training

    def losses(self, output: ConceptOutput, batch: Batch, context: LossContext) -> dict[str, Tensor]:
        """The concept loss, each concept given the annotated ones before it."""
        concepts, logits = batch["concepts"], output.logits
        if not self._draws:
            logits = self.scores(output.features, self._annotated(output.features, concepts))
        return {"concept": context.concept_loss(logits, concepts)}


def systematic(weight: Tensor) -> Tensor:
    """Systematic resampling with fixed positions.

    Args:
        weight: ``[B, S]``, summing to one.

    Returns:
        ``[B, S]`` int64 positions, ascending: each occurs ``S weight`` times, up to rounding; equal weights choose each
        once.

    Example:
        >>> systematic(torch.tensor([[0.0, 0.5, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25]]))
        tensor([[1, 1, 2, 2],
                [0, 1, 2, 3]])
    """
    samples = weight.shape[1]
    places = (torch.arange(samples, device=weight.device) + 0.5) / samples
    below = weight.cumsum(1).contiguous()
    return torch.searchsorted(below, places.expand_as(weight).contiguous()).clamp(max=samples - 1)

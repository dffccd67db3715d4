"""The data that flows through a concept bottleneck model, and the shape legend of the package.

Shape letters: ``B`` batch, ``K`` concepts, ``L`` classes, ``D`` feature width, ``N`` tokens, ``H W`` pixels,
``h w`` grid cells, ``G`` groups, ``S`` samples, ``T`` time, ``V`` width of what the head reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Batch = dict[str, Any]
"""One batch: ``image [B,C,H,W]`` (or ``embedding [B,D]``, ``tokens [B,N,D]``), ``concepts [B,K]`` with NaN where not
annotated, ``label [B]``, optional ``concept_masks [B,K,H,W]`` (or ``concept_boxes [B,K,4]``, ``concept_points
[B,K,2]``), ``certainty [B,K]``, ``group [B]``, ``index [B]``."""


class FeatureDims(NamedTuple):
    """What a backbone promises about its `Features`, so that no user ever types a width.

    Attributes:
        pooled: Width of the pooled vector.
        tokens: Width of a token, or None if the backbone has no tokens. Differs from ``pooled`` in many models.
        grid: ``(h, w)`` of the tokens at the backbone's own input size, or None.
    """

    pooled: int
    tokens: int | None = None
    grid: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Features:
    """What a backbone makes of an input.

    Attributes:
        pooled: ``[B, Dp]``, one vector an input.
        tokens: ``[B, N, Dt]``, patch tokens or the cells of a feature map in raster order, without prefix tokens.
        mask: ``[B, N]`` bool, True where a token is real (padding is False); None means all are real.
        grid: ``(h, w)`` with ``h * w == N`` for images, ``(t, h, w)`` for videos.
    """

    pooled: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None
    grid: tuple[int, ...] | None = None

    def averaged_tokens(self) -> Tensor:
        """``[B, N, D]`` the tokens of an image if ``pooled`` is their mean: what is linear in ``pooled`` has maps then.

        Masked tokens are zero, the others are scaled up for them: the mean of what is returned is ``pooled``.

        Raises:
            ValueError: There are no tokens on a grid, or ``pooled`` is something else than their mean.
        """
        if self.tokens is None or self.grid is None or len(self.grid) != 2:
            raise ValueError(
                "exact maps need patch tokens on a grid, and this backbone returns none; choose another backbone or "
                "stage, or a method that needs no tokens, such as grad_cam"
            )
        tokens = self.tokens
        if self.mask is not None:
            real = self.mask.to(tokens)
            tokens = tokens * (real * (real.shape[1] / real.sum(1, keepdim=True).clamp(min=1.0))).unsqueeze(-1)
        exact = tokens.dtype in (torch.float32, torch.float64)
        mean = tokens.mean(1)
        if (
            mean.shape != self.pooled.shape
            or (mean - self.pooled).norm() > (1e-3 if exact else 3e-2) * self.pooled.norm()
        ):
            raise ValueError(
                "exact maps need a pooled vector that is the mean of the tokens, and this backbone pools in another "
                "way; train it with pool='token_mean', or use a method that needs no such thing, such as grad_cam"
            )
        return tokens

    def as_map(self, cells: Tensor) -> Tensor:
        """``[B, N, K]`` numbers a token to maps ``[B, K, h, w]``.

        Raises:
            ValueError: The tokens lie on no grid of two dimensions.
        """
        if self.grid is None or len(self.grid) != 2:
            raise ValueError(f"expected tokens on a grid (h, w), got the grid {self.grid}")
        maps: Tensor = cells.transpose(1, 2).unflatten(2, self.grid)
        return maps


class ValueLayout(NamedTuple):
    """How a bottleneck lays out what the head reads: ``K`` blocks of ``width`` numbers, then ``extra`` free ones.

    Attributes:
        concepts: Number of concepts ``K``.
        width: Numbers a concept (1 for scalar bottlenecks, the embedding size for embedding bottlenecks).
        extra: Trailing dimensions that belong to no concept (hybrid bottlenecks) and are never intervened on.
    """

    concepts: int
    width: int = 1
    extra: int = 0

    @property
    def size(self) -> int:
        """``V``, the whole width."""
        return self.concepts * self.width + self.extra


@dataclass(frozen=True)
class ConceptOutput:
    """What a bottleneck makes of `Features`. Immutable: an intervention returns a new one.

    Attributes:
        features: The features it came from, so that an intervention never runs the backbone again.
        logits: ``[B, K]`` concept scores, for losses.
        probs: ``[B, K]`` in [0, 1] (the predicted value itself for real-valued concepts), for metrics.
        values: What the head reads, ``[B, V]``; or ``[S, B, V]``, ``[B, T, V]``, ``[S, B, T, V]``, as named below.
        sample_dim: True if ``values`` begins with an axis of samples.
        time_dim: True if ``values`` has a time axis after the batch axis.
        maps: ``[B, K, h, w]`` where each concept looks, if the bottleneck computes it.
        uncertainty: ``[B, K]``, if the bottleneck estimates it.
        distribution: A ``torch.distributions`` object over the logits or embeddings, if there is one.
        label_logits: ``[B, L]`` from bottlenecks that own the label energy; the head passes them through.
        extras: Anything else the bottleneck wants to find again in `intervene` or `losses`; tensors begin with the
            batch axis.
    """

    features: Features
    logits: Tensor
    probs: Tensor
    values: Tensor
    sample_dim: bool = False
    time_dim: bool = False
    maps: Tensor | None = None
    uncertainty: Tensor | None = None
    distribution: Any = None
    label_logits: Tensor | None = None
    extras: dict[str, Any] = field(default_factory=dict)

    def replace(self, **changes: Any) -> ConceptOutput:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def detach(self) -> ConceptOutput:
        """A copy that passes no gradient on: neither the values nor the features, which a side channel may read."""
        tokens = self.features.tokens
        features = replace(
            self.features, pooled=self.features.pooled.detach(), tokens=None if tokens is None else tokens.detach()
        )
        own = None if self.label_logits is None else self.label_logits.detach()
        return replace(self, features=features, values=self.values.detach(), label_logits=own)

    def tensors(self) -> list[Tensor]:
        """Its tensors, those of the features and extras included, without a ``distribution``'s."""
        held = [getattr(self.features, f.name) for f in fields(Features)]
        held += [getattr(self, f.name) for f in fields(self)] + list(self.extras.values())
        return [x for x in held if isinstance(x, Tensor)]

    def map(self, change: Callable[[Tensor], Tensor]) -> ConceptOutput:
        """A copy with every tensor changed, those of the features included; a ``distribution`` stays as it is."""

        def changed(x: Any) -> Any:
            return change(x) if isinstance(x, Tensor) else x

        features = replace(self.features, **{f.name: changed(getattr(self.features, f.name)) for f in fields(Features)})
        own = {f.name: changed(getattr(self, f.name)) for f in fields(self)}
        extras = {name: changed(value) for name, value in self.extras.items()}
        return replace(self, **{**own, "features": features, "extras": extras})

    def float(self) -> ConceptOutput:
        """A copy out of the graph, in single precision what mixed precision computed in half."""
        half = (torch.float16, torch.bfloat16)
        return self.map(lambda x: x.detach().float() if x.dtype in half else x.detach())

    @property
    def can_join(self) -> bool:
        """Whether `cat` can join it with others: it has no distribution, and extras are tensors a sample."""
        batch = len(self.logits)
        extras = all(isinstance(x, Tensor) and x.ndim > 0 and len(x) == batch for x in self.extras.values())
        return self.distribution is None and extras

    def fits(self, other: ConceptOutput) -> bool:
        """Whether `cat` can join the two: both can be joined, and tokens, say, are as many."""
        mine, theirs = ([(x.shape[1 + self.sample_dim :], x.dtype) for x in o.tensors()] for o in (self, other))
        return self.can_join and other.can_join and mine == theirs

    @classmethod
    def cat(cls, outputs: Sequence[ConceptOutput]) -> ConceptOutput:
        """The outputs of several batches as one; all of them from one bottleneck, see `can_join`."""
        if len(outputs) == 1:
            return outputs[0]
        first = outputs[0]

        def joined(get: Callable[[ConceptOutput], Tensor | None], dim: int = 0) -> Any:
            parts = [get(output) for output in outputs]
            return None if parts[0] is None else torch.cat([part for part in parts if part is not None], dim)

        features = Features(
            joined(lambda o: o.features.pooled),
            joined(lambda o: o.features.tokens),
            joined(lambda o: o.features.mask),
            first.features.grid,
        )
        return first.replace(
            features=features,
            values=joined(lambda o: o.values, dim=int(first.sample_dim)),
            extras={name: torch.cat([output.extras[name] for output in outputs]) for name in first.extras},
            **{
                name: joined(lambda o, name=name: getattr(o, name))  # type: ignore[misc]
                for name in ("logits", "probs", "maps", "uncertainty", "label_logits")
            },
        )


@dataclass(frozen=True)
class Intervention:
    """A correction of concepts.

    Attributes:
        mask: ``[B, K]`` (or ``[B, T, K]``) bool, True where a person corrects. ``[S, B, K]`` in training steps of
            bottlenecks that draw another mask for each of their samples.
        values: Same shape, in data space: 0 or 1, a probability, or the value of a real concept. Read only where
            ``mask`` is True. NaN takes the concept out: the head reads zero there, so it contributes nothing.
        logits: Same shape or None; replaces ``values`` on the logit scale where a value strategy chose it.
    """

    mask: Tensor
    values: Tensor
    logits: Tensor | None = None


class Prediction(NamedTuple):
    """What a whole model says of a batch.

    Attributes:
        logits: ``[B, L]`` class logits (``[B, 1]`` for a binary label).
        concepts: The `ConceptOutput` that they were computed from.
    """

    logits: Tensor
    concepts: ConceptOutput


class ClassFacts(NamedTuple):
    """What is known of the classes beside their number.

    Attributes:
        names: Their names in label order, or None.
        descriptions: A sentence a class for a text encoder, or None.
        embeddings: ``[L, D]`` vectors of such sentences, computed elsewhere, or None.
    """

    names: list[str] | None = None
    descriptions: list[str] | None = None
    embeddings: Tensor | None = None


class LinearEffects(NamedTuple):
    """The two halves of a rank-one update: correcting one concept moves the class logits along one line.

    Attributes:
        directions: ``[B, K, m]`` (``[1, K, m]`` if all samples share it), the line along which the numbers of a concept
            move when it is corrected; its length means nothing.
        weight: ``[L, K, m]``, how each number of a concept weighs on each class logit.
    """

    directions: Tensor
    weight: Tensor


class Contributions(NamedTuple):
    """An exact additive account of the class logits: ``concepts.sum(-1) + sum(other.values()) == logits``.

    Attributes:
        concepts: ``[B, L, K]`` what each concept adds to each class logit.
        other: What no concept accounts for, by name (``bias``, ``unsupervised``, ``residual``), each ``[B, L]``.
    """

    concepts: Tensor
    other: dict[str, Tensor]


@dataclass(frozen=True)
class LossContext:
    """What a bottleneck may use in its losses beside its own output.

    Attributes:
        concept_loss: The configured supervised loss, ``concept_loss(logits, concepts) -> scalar``.
        label_loss: The module's loss of the label, ``label_loss(logits [B, L], label) -> scalar``.
        head: The label head; ``head(output) -> [B, L]``.
        label_logits: ``[B, L]`` predicted from the (possibly intervened) output.
    """

    concept_loss: nn.Module
    label_loss: Callable[[Tensor, Tensor], Tensor]
    head: nn.Module
    label_logits: Tensor


def masked_mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of ``[B, N, D]`` over the tokens that ``mask [B, N]`` calls real (all without one), ``[B, D]``."""
    if mask is None:
        return tokens.mean(1)
    weight = mask.to(tokens).unsqueeze(-1)
    return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1.0)

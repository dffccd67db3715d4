"""Intervention-aware Concept Embedding Models (Espinosa Zarlenga et al., NeurIPS 2023): trained to be corrected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from cbm_lightning.bottlenecks.embedding import EmbeddingBottleneck
from cbm_lightning.bottlenecks.intcem_policy import QueryPolicy, Rehearsal
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.heads import LabelHead
from cbm_lightning.labels import label_outcomes
from cbm_lightning.types import Batch, ConceptOutput, FeatureDims, LossContext


class InterventionAwareBottleneck(EmbeddingBottleneck):
    """A concept embedding model that learns which concept to ask about, and what to do with the answer (IntCEM).

    Paper: "Learning to Receive Help: Intervention-Aware Concept Embedding Models" (arXiv 2309.16928). Every
    training step rehearses corrections: some units are corrected at random, then ``T`` more are chosen by the policy,
    a network on the embeddings and on what was corrected so far, and drawn by a straight-through Gumbel-softmax. Two
    losses come of it, beside the concept loss:

    - ``label`` takes the place of the module's: ``[CE_0 + gamma^T CE_T] / (1 + gamma^T)``, the loss of the uncorrected
      prediction and that after the last correction, whose gradient reaches the policy too.
    - ``imitation``: at each step the policy is to choose the unit whose correction makes the true label likeliest.
      The paper weighs it with .1, 1 or 5: ``loss_weights: {imitation: 1, concept: 5}``.

    ``T`` is drawn from 1 to ``min(horizon, max_horizon) - 1`` (at least 1) as in the official code, and the horizon
    grows while the bottleneck trains. A concept without annotation is never asked about. In evaluation this is an
    `EmbeddingBottleneck` with a policy for interventions: ``policies: [prior]``, with the same ``unit``. Where only the
    head trains, the module's own label loss counts, and the imitation loss moves nothing.

    Args:
        embedding_size: Length ``m`` of each vector.
        shared_scorer: One scorer for all concepts, or one a concept (IntCEM).
        unit: The policy asks about a ``"group"`` of the concept set at a time, or about a single ``"concept"``.
        hidden: Widths of the policy's hidden layers; ``[128, 128, 64, 64]`` for CUB in the paper.
        batch_norm: Normalise the input of each of the policy's linear maps over the batch.
        initial_mask: Probability with which a unit is corrected from the start; it takes the place of RandInt.
        horizon: Upper end of the number of corrections at the start of training.
        horizon_growth: Factor on the horizon in every training step.
        max_horizon: No more than ``max_horizon - 1`` corrections are chosen by the policy in a step.
        num_rollouts: Trajectories a training step, over which both losses are averaged.
        gamma: How much more each further correction makes an error after it weigh.
        discount: Weight of the imitation loss of each step of a trajectory, relative to the step before.

    Raises:
        ValueError: A number is out of range or the unit unknown, or (from `build`) a concept is real-valued.

    Example:
        >>> from cbm_lightning.types import Features
        >>> bottleneck = InterventionAwareBottleneck(embedding_size=4, hidden=[16])
        >>> bottleneck.build(FeatureDims(8), ConceptSet(["red", "blue", "round"], {"colour": ["red", "blue"]}), 3)
        >>> output = bottleneck.eval()(Features(torch.randn(5, 8)))
        >>> bottleneck.query_scores(output, torch.zeros(5, 3, dtype=torch.bool)).shape  # the colour, or the shape?
        torch.Size([5, 2])
    """

    needs_label = True
    horizon: Tensor
    membership: Tensor

    def __init__(
        self,
        embedding_size: int = 16,
        shared_scorer: bool = False,
        unit: Literal["concept", "group"] = "group",
        hidden: Sequence[int] = (256, 128),
        batch_norm: bool = True,
        initial_mask: float = 0.25,
        horizon: float = 2.0,
        horizon_growth: float = 1.005,
        max_horizon: int = 6,
        num_rollouts: int = 1,
        gamma: float = 1.1,
        discount: float = 1.0,
    ) -> None:
        super().__init__(embedding_size, shared_scorer, randint=0.0)
        if unit not in ("concept", "group"):
            raise ValueError(f"unit: expected 'concept' or 'group', got {unit!r}")
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden: expected widths of at least 1, got {list(hidden)}")
        if not 0.0 <= initial_mask <= 1.0:
            raise ValueError(f"initial_mask: expected a probability in [0, 1], got {initial_mask}")
        least = {"horizon": (horizon, 1.0), "horizon_growth": (horizon_growth, 1.0), "max_horizon": (max_horizon, 2)}
        for name, (number, lowest) in {**least, "num_rollouts": (num_rollouts, 1)}.items():
            if number < lowest:
                raise ValueError(f"{name}: expected at least {lowest}, got {number}")
        for name, number in {"gamma": gamma, "discount": discount}.items():
            if number <= 0:
                raise ValueError(f"{name}: expected a positive number, got {number}")
        self.unit, self.hidden, self.batch_norm = unit, list(hidden), batch_norm
        self.initial_mask, self.num_rollouts, self.gamma, self.discount = initial_mask, num_rollouts, gamma, discount
        self.first_horizon, self.horizon_growth, self.max_horizon = horizon, horizon_growth, max_horizon

    def build(self, dims: FeatureDims, concepts: ConceptSet, num_classes: int) -> None:
        """Make the embeddings, the scorers and the policy."""
        super().build(dims, concepts, num_classes)
        groups = (
            list(concepts.group_indices().values()) if self.unit == "group" else [[k] for k in range(len(concepts))]
        )
        membership = torch.zeros(len(groups), len(concepts))
        for row, members in enumerate(groups):
            membership[row, members] = 1.0
        self.register_buffer("membership", membership, persistent=False)
        self.register_buffer("horizon", torch.tensor(float(self.first_horizon)))
        self.policy = QueryPolicy(self.layout.size, len(concepts), len(groups), self.hidden, self.batch_norm)

    def query_scores(self, output: ConceptOutput, mask: Tensor) -> Tensor:
        """``[B, U]`` raw scores of the learned policy, for units that were asked about too.

        Args:
            output: The output with the corrections so far.
            mask: ``[B, K]`` bool, the corrections so far.
        """
        return self.policy(output.values, mask)  # type: ignore[no-any-return]

    def losses(self, output: ConceptOutput, batch: Batch, context: LossContext) -> dict[str, Tensor]:
        """The concept loss, and in a training step what comes of the rehearsed corrections."""
        found = super().losses(output, batch, context)
        if self.generator is None:
            return found
        head, label = cast(LabelHead, context.head), batch["label"]
        known = ~batch["concepts"].isnan()
        truth = torch.where(known, batch["concepts"], 0.0).float()
        rehearsal = Rehearsal(output, truth, known, label_outcomes(label, head.task), head, self.membership.float())
        start = rehearsal.random_start(self.initial_mask, self.generator)
        before, labels, imitations = context.label_loss(context.label_logits, label), [], []
        horizon = int(self.horizon)
        for _ in range(self.num_rollouts):
            steps = self._steps(min(horizon, self.max_horizon))
            mask = rehearsal.at_random(start, horizon, self.generator)
            imitation, mask = rehearsal.play(self.policy, mask, steps, self.discount, self.generator)
            after = context.label_loss(head(output.replace(values=rehearsal.values(mask))), label)
            weight = self.gamma**steps
            labels.append((before + weight * after) / (1 + weight))
            imitations.append(imitation)
        found["imitation"] = torch.stack(imitations).mean()
        if self.training:
            found["label"] = torch.stack(labels).mean()
            self.horizon.mul_(self.horizon_growth).clamp_(max=float(len(self.membership) + 1))
        return found

    def _steps(self, end: int) -> int:
        """How many corrections the policy chooses: from 1 to below ``end``, and below the number of units."""
        end = max(2, min(end, len(self.membership)))
        return int(torch.randint(1, end, (), generator=self.generator))

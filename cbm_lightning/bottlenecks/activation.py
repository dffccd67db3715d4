"""From concept scores to probabilities, by the kind of each concept."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cbm_lightning.concepts import ConceptSet


class ConceptActivation(nn.Module):
    """Sigmoid for binary concepts, softmax within a categorical group, the score itself for real-valued concepts.

    Args:
        concepts: The concept set that says which is which.

    Example:
        >>> concepts = ConceptSet(["red", "blue", "size"], {"colour": ["red", "blue"]}, ["categorical"] * 2 + ["real"])
        >>> ConceptActivation(concepts)(torch.tensor([[0.0, 0.0, 3.0]]))
        tensor([[0.5000, 0.5000, 3.0000]])
    """

    real: Tensor
    categorical: Tensor
    membership: Tensor

    def __init__(self, concepts: ConceptSet) -> None:
        super().__init__()
        groups = concepts.categorical_groups()
        # [K, G] numbers rather than indices: weight averaging blends buffers, which integers do not survive
        membership = torch.zeros(len(concepts), max(len(groups), 1))
        for g, members in enumerate(groups):
            membership[members, g] = 1.0
        self.has_groups = bool(groups)
        self.has_real = bool(concepts.is_real().any())
        self.register_buffer("real", concepts.is_real(), persistent=False)
        self.register_buffer("categorical", membership.any(1), persistent=False)
        self.register_buffer("membership", membership, persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        """``[..., K]`` logits to ``[..., K]`` probabilities (or values of real-valued concepts)."""
        probs = logits.sigmoid()
        if self.has_groups:
            probs = torch.where(self.categorical, self.log_softmax(logits).exp(), probs)
        return torch.where(self.real, logits, probs) if self.has_real else probs

    def log_softmax(self, logits: Tensor) -> Tensor:
        """``[..., K]`` log-probabilities within the categorical groups; other entries are zero."""
        positions = torch.arange(logits.shape[-1], device=logits.device)
        own = self._by_group(logits).log_softmax(-1)[..., self.membership.argmax(1), positions]
        return torch.where(self.categorical, own, 0.0)

    def harden(self, probs: Tensor) -> Tensor:
        """0 or 1 by threshold (one half) or largest of a group, with the gradient of ``probs`` (straight-through).

        Of equally large members of a group the first one holds.
        """
        hard = probs >= 0.5
        if self.has_groups:
            positions = torch.arange(probs.shape[-1], device=probs.device)
            largest = self._by_group(probs).argmax(-1)[..., self.membership.argmax(1)]
            hard = torch.where(self.categorical, largest == positions, hard)
        # the difference is zero exactly; added one by one, its terms would round
        straight = hard.to(probs) + (probs - probs.detach())
        return torch.where(self.real, probs, straight) if self.has_real else straight

    def _by_group(self, x: Tensor) -> Tensor:
        """``[..., G, K]`` the entries of each group, minus infinity elsewhere."""
        return x.unsqueeze(-2).masked_fill(~self.membership.T.bool(), -torch.inf)

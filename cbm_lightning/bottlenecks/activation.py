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
        shifted = logits - self._group_peak(logits.detach())
        total = torch.where(self.categorical, shifted, -torch.inf).exp() @ self.membership.to(logits.dtype)  # [..., G]
        spread = torch.where(self.categorical, total[..., self.membership.argmax(1)], 1.0)
        return torch.where(self.categorical, shifted - spread.log(), 0.0)

    def harden(self, probs: Tensor) -> Tensor:
        """0 or 1 by threshold (one half) or largest of a group, with the gradient of ``probs`` (straight-through)."""
        hard = (probs >= 0.5).to(probs)
        if self.has_groups:
            largest = (probs == self._group_peak(probs.detach())).to(probs)
            hard = torch.where(self.categorical, largest, hard)
        hard = hard + probs - probs.detach()
        return torch.where(self.real, probs, hard) if self.has_real else hard

    def _group_peak(self, x: Tensor) -> Tensor:
        """``[..., K]`` the largest entry of each one's own group; entries in no group see an arbitrary number."""
        inside = self.membership.T.bool()  # [G, K]
        peak = x.unsqueeze(-2).masked_fill(~inside, -torch.inf).amax(-1)  # [..., G]
        return peak[..., self.membership.argmax(1)]

"""UCP: the concept whose probability is nearest one half."""

from __future__ import annotations

from torch import Tensor

from cbm_lightning.interventions.policies.base import Policy
from cbm_lightning.interventions.state import State


def closeness_to_half(probs: Tensor) -> Tensor:
    """``1 / |p - 1/2|^2`` (Shin et al. 2023), infinite at one half."""
    return (probs - 0.5).square().reciprocal()


class UCP(Policy):
    """Uncertainty of Concept Prediction (Shin et al., ICML 2023, section 3.2; cem's UncertaintyMaximizer).

    Knows nothing of the label. Real-valued concepts, whose predictions are no probabilities, come last.

    Args:
        adaptive: Score again after each correction, which only matters where corrections move other concepts (SCBM).
        label: Name in logs and figures.

    Example:
        >>> closeness_to_half(torch.tensor([0.5, 0.9]))
        tensor([   inf, 6.2500])
    """

    name = "ucp"

    def __init__(self, *, adaptive: bool = False, label: str | None = None) -> None:
        super().__init__(adaptive=adaptive, label=label)

    def score(self, state: State) -> Tensor:
        """Closeness to one half."""
        real = state.subject.concepts.is_real().to(state.probs.device)
        return state.by_unit(closeness_to_half(state.probs).masked_fill(real, 0.0))

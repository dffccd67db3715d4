"""Gates that close for good: stochastic switches with a penalty on how many are open."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class HardConcrete(nn.Module):
    """Hard-concrete gates in [0, 1], exactly 0 or 1 with positive probability (Louizos et al. 2018).

    In training a gate is drawn anew for each sample; in evaluation it is deterministic. The draws come from torch's
    global generator, like those of dropout.

    Args:
        size: Number of gates.
        drop: Probability, in (0, 1), with which a gate starts closed (before it is stretched).
        temperature: How soft the draws are, above 0; a buffer, so that `TemperatureSchedule` can move it.
        stretch: The interval, around [0, 1], that draws are stretched to before they are cut off.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> gates = HardConcrete(3).eval()
        >>> gates(samples=2)
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]], grad_fn=<ExpandBackward0>)
    """

    temperature: Tensor

    def __init__(
        self, size: int, drop: float = 0.5, temperature: float = 2 / 3, stretch: tuple[float, float] = (-0.1, 1.1)
    ) -> None:
        super().__init__()
        if not 0.0 < drop < 1.0:
            raise ValueError(f"drop: expected a probability in (0, 1), got {drop}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        if not -math.inf < stretch[0] < 0 < 1 < stretch[1] < math.inf:
            raise ValueError(f"stretch: expected an interval around [0, 1], got {stretch}")
        self.log_alpha = nn.Parameter(torch.full((size,), math.log((1 - drop) / drop)))
        self.low, self.high = stretch
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def forward(self, samples: int) -> Tensor:
        """``[samples, size]`` gates."""
        if not self.training:
            return self.settled().expand(samples, -1)
        noise = torch.rand(samples, len(self.log_alpha), device=self.log_alpha.device, dtype=self.log_alpha.dtype)
        return self._cut(((torch.logit(noise, 1e-6) + self.log_alpha) / self.temperature).sigmoid())

    def settled(self) -> Tensor:
        """``[size]`` gates of evaluation."""
        return self._cut(self.log_alpha.sigmoid())

    def open_probability(self) -> Tensor:
        """``[size]`` probability that a drawn gate is not closed; their sum is the expected l0 norm."""
        return (self.log_alpha - self.temperature * math.log(-self.low / self.high)).sigmoid()

    def _cut(self, soft: Tensor) -> Tensor:
        return (soft * (self.high - self.low) + self.low).clamp(0.0, 1.0)

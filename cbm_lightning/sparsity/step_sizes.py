"""How far an optimizer moves a weight for a unit of gradient, which proximal steps must match."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def step_sizes(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> float | Tensor:
    """By what an optimizer multiplies a lasting gradient in each of its steps.

    With this size, weights that a proximal step no longer moves are those at which gradient and penalty balance. For
    SGD it is the learning rate, over one minus the momentum, for Adam, AdamW, NAdam and (after its first steps) RAdam
    ``lr / (sqrt(v) + eps)`` with the bias-corrected second moment ``v``, an entry each. All other optimizers count as
    SGD; those that scale gradients in a way of their own (Adagrad, RMSprop) give the strength another meaning.

    Args:
        optimizer: Has made a step.
        group: The parameter's group of options.
        parameter: One of the group's.
    """
    state = optimizer.state[parameter]
    rate = float(group["lr"])
    second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if isinstance(second, Tensor) and second.shape == parameter.shape and "betas" in group:
        corrected: Tensor = second / (1.0 - group["betas"][1] ** float(state["step"]))
        sizes: Tensor = rate / (corrected.sqrt() + group["eps"])
        return sizes
    momentum = float(group.get("momentum", 0.0))
    return rate * (1.0 - float(group.get("dampening", 0.0) if momentum else 0.0)) / (1.0 - momentum)

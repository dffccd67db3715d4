"""Small sparse problems, and their objective and optimality conditions written down once more, in float64 NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import expit, log_softmax, softmax
from torch import Tensor

Array = np.ndarray[Any, Any]


def golden(shared: Path, name: str) -> dict[str, Array]:
    """The arrays of a fixture, as they are."""
    with np.load(shared / "golden" / "dev" / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def linear_problem(
    n: int = 120, k: int = 12, classes: int = 3, seed: int = 0, useful: int = 4
) -> tuple[Tensor, Tensor]:
    """``[n, k]`` scores in units of their own and ``[n]`` labels that a few of them tell, with noise."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, k, generator=generator)
    truth = torch.zeros(k, classes)
    truth[:useful] = 2 * torch.randn(useful, classes, generator=generator)
    noise = torch.randn(n, classes, generator=generator)
    units = torch.logspace(-0.5, 0.5, k)
    return z * units + 0.3 * units.flip(0), (z @ truth + noise).argmax(1)


def several_labels(n: int = 120, k: int = 12, labels: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``[n, k]`` scores and ``[n, labels]`` of 0 and 1."""
    x, _ = linear_problem(n, k, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    truth = torch.randn(k, labels, generator=generator)
    return x, ((x - x.mean(0)) @ truth + torch.randn(n, labels, generator=generator) > 0).long()


def objective(
    weight: Array, bias: Array, x: Array, y: Array, lam: float, alpha: float, *, group: bool = False, ovr: bool = False
) -> float:
    """Mean loss plus penalty; ``y`` is ``[n]``, or ``[n, L]`` of 0 and 1 where ``ovr``."""
    weight, bias, x = (np.asarray(a, dtype=np.float64) for a in (weight, bias, x))
    logits = x @ weight.T + bias
    if ovr:
        loss = (np.logaddexp(0, logits) - y * logits).sum(1).mean()
    else:
        loss = -log_softmax(logits, axis=1)[np.arange(len(y)), y].mean()
    l1 = np.linalg.norm(weight, axis=0).sum() if group else np.abs(weight).sum()
    return float(loss + lam * (alpha * l1 + (1 - alpha) / 2 * np.square(weight).sum()))


def violation(
    weight: Array, bias: Array, x: Array, y: Array, lam: float, alpha: float, *, group: bool = False, ovr: bool = False
) -> float:
    """By how much the conditions of an optimum are missed, the largest over weights and biases."""
    weight, bias, x = (np.asarray(a, dtype=np.float64) for a in (weight, bias, x))
    logits = x @ weight.T + bias
    off = expit(logits) - y if ovr else softmax(logits, axis=1) - np.eye(len(weight))[y]
    off /= len(x)
    slope = off.T @ x + lam * (1 - alpha) * weight
    if group:
        norms = np.linalg.norm(weight, axis=0)
        zero = norms == 0
        missed = [max(np.linalg.norm(slope[:, k]) - lam * alpha, 0.0) for k in np.flatnonzero(zero)]
        unit = weight[:, ~zero] / norms[~zero]
        missed += np.linalg.norm(slope[:, ~zero] + lam * alpha * unit, axis=0).tolist()
        return float(max(*missed, np.abs(off.sum(0)).max()))
    zero = weight == 0
    at_zero = np.clip(np.abs(slope[zero]) - lam * alpha, 0.0, None)
    elsewhere = np.abs(slope[~zero] + lam * alpha * np.sign(weight[~zero]))
    return float(max(at_zero.max(initial=0.0), elsewhere.max(initial=0.0), np.abs(off.sum(0)).max()))

"""The measures of localisation, each with its formula once more for one pair, in loops over pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from cbm_lightning.saliency.localisation import (
    energy_in_mask,
    half_max_overlap,
    iou_at_mass,
    pixel_auroc,
    pixel_average_precision,
    pointing_game,
    rank_accuracy,
    top_k_intersection,
)
from cbm_lightning.saliency.scores import Scores

Measure = Callable[[Tensor, Tensor], Scores]
Loop = Callable[[np.ndarray, np.ndarray], float]


def dilated(a: np.ndarray, tolerance: float) -> np.ndarray:
    inside = np.argwhere(a)
    near = [math.dist(p, q) <= tolerance for p in np.ndindex(a.shape) for q in inside]
    return np.array(near).reshape(a.size, len(inside)).any(1).reshape(a.shape)


def first_maximum(s: np.ndarray) -> tuple[int, ...]:
    return max(np.ndindex(s.shape), key=lambda p: (s[p], -p[0], -p[1]))


def hit(s: np.ndarray, a: np.ndarray, tolerance: float = 0) -> float:
    return float(dilated(a, tolerance)[first_maximum(s)])


def share_inside(s: np.ndarray, a: np.ndarray) -> float:
    return sum(max(s[p], 0) for p in np.ndindex(s.shape) if a[p]) / sum(max(v, 0) for v in s.flat)


def top(s: np.ndarray, k: int) -> list[tuple[int, ...]]:
    return sorted(np.ndindex(s.shape), key=lambda p: (-s[p], p))[:k]


def share_of_top(s: np.ndarray, a: np.ndarray, k: int | None = None) -> float:
    k = int(a.sum()) if k is None else k
    return sum(bool(a[p]) for p in top(s, k)) / k


def mass_iou(s: np.ndarray, a: np.ndarray, mass: float) -> float:
    positive = s.clip(min=0)
    size = next(n for n in range(1, s.size + 1) if sum(positive[p] for p in top(s, n)) >= mass * positive.sum())
    chosen = positive >= positive[top(s, size)[-1]]
    return (chosen & a).sum() / (chosen | a).sum()


def half_max(s: np.ndarray, a: np.ndarray, kind: str, soft: bool) -> float:
    s = s.clip(min=0) / s.max()
    if not soft:
        s = np.array([1.0 if v > 0.5 else v if v == 0.5 else 0.0 for v in s.flat]).reshape(s.shape)
    inside, union = (s * a).sum(), np.maximum(s, a).sum()
    return {"iou": inside / union, "dice": 2 * inside / (union + inside), "precision": inside / s.sum()}[kind]


def by_sklearn(score: Callable[..., float], s: np.ndarray, a: np.ndarray) -> float:
    return score(a.flatten(), s.flatten())


MEASURES: dict[str, tuple[Measure, Loop]] = {
    "pointing": (pointing_game, hit),
    "pointing near": (partial(pointing_game, tolerance=1), partial(hit, tolerance=1)),
    "pointing far": (partial(pointing_game, tolerance=2.5), partial(hit, tolerance=2.5)),
    "energy": (energy_in_mask, share_inside),
    "rank": (rank_accuracy, share_of_top),
    "top 1": (partial(top_k_intersection, k=1), partial(share_of_top, k=1)),
    "top 7": (partial(top_k_intersection, k=7), partial(share_of_top, k=7)),
    **{
        f"mass {mass}": (partial(iou_at_mass, mass=mass), partial(mass_iou, mass=mass)) for mass in (0.05, 0.5, 0.95, 1)
    },
    **{
        f"{kind}{' soft' * soft}": (
            partial(half_max_overlap, kind=kind, soft=soft),
            partial(half_max, kind=kind, soft=soft),
        )
        for kind in ("iou", "dice", "precision")
        for soft in (False, True)
    },
    "auroc": (pixel_auroc, partial(by_sklearn, roc_auc_score)),
    "ap": (pixel_average_precision, partial(by_sklearn, average_precision_score)),
}
BY_AREA = ("pointing", "energy", "rank", "top 1", "top 7", "precision", "precision soft")
every_measure = pytest.mark.parametrize("name", MEASURES)


def pairs(n: int = 12, height: int = 6, width: int = 9, levels: int | None = None) -> tuple[Tensor, Tensor]:
    """Signed maps, with many ties if there are few levels, that lean towards their masks."""
    masks = torch.rand(n, height, width) < torch.linspace(0.02, 0.7, n)[:, None, None]
    masks[:, 0, 1], masks[:, 5, 8] = True, False
    maps = torch.randn(n, height, width) + 0.5 * masks
    # one hit and one far miss
    masks[0] = False
    masks[0, 0, 1] = True
    maps[0, 5, 8] = maps[1, 0, 1] = 5.0
    if levels:
        maps = (maps * levels).round() / levels
    return maps, masks

"""Keeping the largest weights: of a whole head, or a number of concepts a class."""

from __future__ import annotations

import torch
from torch import Tensor

from cbm_lightning.sparsity.nec import kept


def keep_largest(weight: Tensor, nec: float) -> Tensor:
    """``[L, K]`` bool, the largest weights of the whole head, so many that a class has ``nec`` concepts on average.

    This is the pruning of VLG-CBM (Srivastava et al. 2024): one threshold for all classes, so that some may be left
    without a concept. Zeros are never kept.

    Args:
        weight: ``[L, K]``, or ``[L, K, m]``, whose concepts are judged by the 2-norm of their ``m`` numbers.
        nec: In [0, K].

    Raises:
        ValueError: ``nec`` is negative or above the number of concepts.

    Example:
        >>> keep_largest(torch.tensor([[3.0, -2.0, 0.1], [0.2, 0.3, -1.0]]), nec=1.5).int()
        tensor([[1, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
    """
    size = _sizes(weight)
    classes, concepts = size.shape
    if not 0 <= nec <= concepts:
        raise ValueError(f"nec: expected a number of effective concepts in [0, {concepts}], got {nec}")
    mask = torch.zeros(size.numel(), dtype=torch.bool, device=weight.device)
    mask[size.flatten().topk(round(nec * classes)).indices] = True
    return mask.view_as(size) & (size > 0)


def keep_top_k(weight: Tensor, k: int) -> Tensor:
    """``[L, K]`` bool, the ``k`` largest weights of every class; zeros are never kept.

    The projection onto the heads with at most ``k`` concepts a class is ``weight * keep_top_k(weight, k)``.

    Args:
        weight: See `keep_largest`.
        k: In [0, K].

    Raises:
        ValueError: ``k`` is negative or above the number of concepts.

    Example:
        >>> keep_top_k(torch.tensor([[3.0, -2.0, 0.1], [0.2, 0.3, -1.0]]), k=1).int()
        tensor([[1, 0, 0],
                [0, 0, 1]], dtype=torch.int32)
    """
    size = _sizes(weight)
    if not 0 <= k <= size.shape[1]:
        raise ValueError(f"k: expected a number of concepts in [0, {size.shape[1]}], got {k}")
    mask = torch.zeros_like(size, dtype=torch.bool)
    return mask.scatter_(1, size.topk(k, 1).indices, True) & (size > 0)


def _sizes(weight: Tensor) -> Tensor:
    """``[L, K]`` size of each concept's weights.

    Raises:
        ValueError: The weights have another shape, or are not finite.
    """
    kept(weight)
    return weight.abs() if weight.ndim == 2 else torch.linalg.vector_norm(weight, dim=2)

"""Mutual information of discrete and continuous variables, in nats, as a mean over samples.

Three estimators: counts for two discrete variables, Ross (2014, PLoS ONE 9(2)) for a continuous and a discrete one,
and Kraskov, Stoegbauer and Grassberger (2004, Phys. Rev. E 69, their first) for two continuous ones. Each returns what
every sample contributes, whose mean is the estimate; their spread is its uncertainty.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEIGHBOURS = 3
_JITTER = 1e-10


def is_discrete(x: Tensor) -> bool:
    """Whether all numbers of ``[N]`` or ``[N, E]`` are integers, as those of hard concepts and annotations are.

    What never varies is discrete too: neighbours at no distance would make its information far less than none.
    """
    return bool(((x - x.round()).abs() < 1e-9).all() or (x == x[:1]).all())


def entropy(x: Tensor) -> float:
    """Entropy in nats of the discrete variable ``[N]`` (or rows ``[N, E]``) by counts.

    Example:
        >>> round(entropy(torch.tensor([0, 1, 0, 1])), 4)
        0.6931
    """
    counts = torch.unique(x, dim=0, return_counts=True)[1].double()
    shares = counts / counts.sum()
    return float(-(shares * shares.log()).sum())


def mutual_information(x: Tensor, y: Tensor, neighbours: int = NEIGHBOURS, seed: int = 0) -> Tensor:
    """``[N]`` contributions of samples to I(x; y), by the estimator that suits the kinds of the variables.

    A variable is discrete if all its numbers are integers, or the same. The mean of the contributions is the estimate;
    unlike the published code it is not cut off at zero here, for a cut is no mean.

    Args:
        x: ``[N]`` or ``[N, E]``.
        y: The same; ``E`` may be another.
        neighbours: ``k`` of the two estimators of nearest neighbours.
        seed: Of the noise, 1e-10 standard deviations, that tells equal continuous numbers apart.

    Returns:
        NaN for samples that do not count (those whose discrete value nobody else has, where x or y is continuous).

    Example:
        >>> x = torch.tensor([0.0, 0, 1, 1])
        >>> round(mutual_information(x, x).mean().item(), 4)
        0.6931
    """
    x, y = (part.detach().cpu().double().reshape(len(part), -1) for part in (x, y))
    generator = torch.Generator().manual_seed(seed)
    if is_discrete(x) and is_discrete(y):
        return discrete_information(codes(x), codes(y))
    if is_discrete(x):
        return mixed_information(jitter(y, generator), codes(x), neighbours)
    if is_discrete(y):
        return mixed_information(jitter(x, generator), codes(y), neighbours)
    return continuous_information(jitter(x, generator), jitter(y, generator), neighbours)


def codes(x: Tensor) -> Tensor:
    """``[N]`` int64, a number from 0 on for each different row of ``[N, E]``."""
    found: Tensor = torch.unique(x, dim=0, return_inverse=True)[1]
    return found


def jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    """``[N, E]`` about zero, with noise far below its spread (not its mean, which may be zero or huge)."""
    x = x - x.mean(0)
    scale = x.std(0, correction=0)
    return x + _JITTER * scale * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def discrete_information(x: Tensor, y: Tensor) -> Tensor:
    """``[N]`` contributions ``log p(x, y) / (p(x) p(y))`` by counts, of codes ``[N]``."""
    joint = torch.zeros(int(x.max()) + 1, int(y.max()) + 1, dtype=torch.float64)
    joint.index_put_((x, y), torch.ones(len(x), dtype=torch.float64), accumulate=True)
    joint = joint / len(x)
    return (joint[x, y] / (joint.sum(1)[x] * joint.sum(0)[y])).log()


def mixed_information(x: Tensor, y: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """``[N]`` contributions to I(x; y) of continuous ``x [N, E]`` and codes ``y [N]``; NaN where a code occurs once.

    Ross 2014: psi(N) - psi(N_y) + psi(k) - psi(m), where m counts the samples, itself included, that are closer than
    the k-th of the same code.
    """
    result = torch.full((len(x),), torch.nan, dtype=torch.float64)
    count = torch.bincount(y)[y]
    kept = count > 1
    x, y, count = x[kept], y[kept], count[kept]
    if len(x) == 0:
        return result
    k = (count - 1).clamp(max=neighbours)
    radius = torch.empty(len(x), dtype=torch.float64)
    distances = None if x.shape[1] == 1 else torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    for code in y.unique():
        same = y == code
        number = int(k[same][0])
        if distances is None:
            radius[same] = _neighbour_on_a_line(x[same, 0], number)
        else:
            # the nearest is the sample itself
            radius[same] = distances[same][:, same].kthvalue(number + 1, 1).values
    # strictly closer than the neighbour itself
    inside = radius.nextafter(torch.zeros_like(radius))
    m = _within(x[:, 0], inside) if distances is None else (distances <= inside[:, None]).sum(1).clamp(min=1)
    psi = torch.special.digamma
    result[kept] = psi(torch.tensor(float(len(x)), dtype=torch.float64)) - psi(count.double()) + psi(k.double())
    result[kept] -= psi(m.double())
    return result


def continuous_information(x: Tensor, y: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """``[N]`` contributions to I(x; y) of continuous ``x [N, E]`` and ``y [N, E']``, in the maximum norm.

    Kraskov et al. 2004, equation 8: psi(N) + psi(k) - psi(n_x + 1) - psi(n_y + 1).
    """
    distances = [torch.cdist(part, part, p=math.inf) for part in (x, y)]
    k = min(neighbours, len(x) - 1)
    radius = torch.maximum(*distances).kthvalue(k + 1, 1).values
    inside = radius.nextafter(torch.zeros_like(radius))[:, None]
    psi = torch.special.digamma
    constant = psi(torch.tensor([float(len(x)), float(k)], dtype=torch.float64)).sum()
    # the count has the sample itself in it, which is the "+ 1"
    counts = [(part <= inside).sum(1).clamp(min=1).double() for part in distances]
    found: Tensor = constant - psi(counts[0]) - psi(counts[1])
    return found


def _neighbour_on_a_line(x: Tensor, k: int) -> Tensor:
    """``[n]`` distance from each number to the k-th nearest other: the smallest reach of k + 1 neighbours in order."""
    order = x.argsort()
    edge = x.new_full((k,), math.inf)
    line = torch.cat([-edge, x[order], edge])
    windows = line.unfold(0, k + 1, 1)
    own = x[order]
    reach = [torch.maximum(own - windows[j : j + len(x), 0], windows[j : j + len(x), -1] - own) for j in range(k + 1)]
    radius = torch.empty_like(x)
    radius[order] = torch.stack(reach).amin(0)
    return radius


def _within(x: Tensor, radius: Tensor) -> Tensor:
    """``[n]`` how many of ``x [n]`` are no farther from each than its radius, itself included."""
    # the neighbour that sets the radius lies outside, and a sum that is rounded must not let it in
    radius = radius - 4 * torch.finfo(x.dtype).eps * x.abs().max()
    line = x.sort().values
    above = torch.searchsorted(line, x + radius, right=True)
    count: Tensor = above - torch.searchsorted(line, x - radius)
    return count.clamp(min=1)

"""Sparsemax without sorting.

Sparsemax (Martins and Astudillo, 2016, arXiv 1602.02068) projects logits onto the probability
simplex: ``w = max(0, z - tau)`` with ``tau`` such that the weights sum to one. The usual way to
find ``tau`` sorts the logits; with a codebook of 16,000 codes and 196 patches per window the sort
costs more than the network. ``f(tau) = sum(max(0, z - tau)) - 1`` is convex, decreasing and
piecewise linear, so a Newton step from anywhere lands left of the root, and from there the steps
climb monotonically onto the exact answer after finitely many (Michelot, 1986): the support only
ever shrinks. A part of the logits tells where to start, so that few steps see them all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MAX_STEPS = 64
# With fewer logits a better start is not worth finding.
_FEW = 1024
_SAMPLED_PART = 16
_SAMPLE_STEPS = 6
# Numbers worked on at a time: with their scratch space they stay in a core's cache.
_BLOCK = 1 << 18


def sparsemax_threshold(z: Tensor) -> Tensor:
    """Find the exact sparsemax threshold of each row.

    Parameters
    ----------
    z
        float[..., K] logits.

    Returns
    -------
    Tensor
        float[..., 1]; ``max(0, z - threshold)`` sums to one along the last axis.
    """
    top = z.amax(-1, keepdim=True)
    rows = (z - top).clamp_min_(-1).reshape(-1, z.shape[-1])
    return top + torch.cat([_search(part) for part in _blocks(rows)]).view(top.shape)


def project_(z: Tensor) -> Tensor:
    """Overwrite logits by their sparsemax along the last axis; no gradient.

    Parameters
    ----------
    z
        float[..., K] logits, contiguous.

    Returns
    -------
    Tensor
        ``z``, which now holds the weights.
    """
    for part in _blocks(z.view(-1, z.shape[-1])):
        # With logits far from zero the sums would lose the digits that the weights are made of.
        part.sub_(part.amax(-1, keepdim=True)).clamp_min_(-1)
        part.sub_(_search(part)).clamp_min_(0)
    return z


def _blocks(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, _BLOCK // rows.shape[-1]))


def _search(z: Tensor) -> Tensor:
    """Find the thresholds float[R, 1] of rows float[R, K], logits in -1..0 with a largest of zero.

    What lies lower has no weight anyway: the largest alone would weigh one.
    """
    tau = _guess(z)
    excess = torch.empty_like(z)
    count = torch.zeros_like(tau)
    for _ in range(_MAX_STEPS):
        torch.sub(z, tau, out=excess)
        total = excess.clamp_min_(0).sum(-1, keepdim=True)
        new_count = excess.gt_(0).sum(-1, keepdim=True)
        if torch.equal(new_count, count):
            # The same again in one sum, without what the steps have rounded.
            return (excess.mul_(z).sum(-1, keepdim=True) - 1) / count
        count = new_count
        tau = tau + (total - 1) / count
    return tau


def _guess(z: Tensor) -> Tensor:
    """Guess the thresholds from a part of each row; in [-1, 0), so that the support is not empty.

    The part is treated as the whole is, with its share of the weight.
    """
    lowest = torch.full_like(z[:, :1], -1)
    if z.shape[-1] < _FEW:
        return lowest
    part = z[:, : z.shape[-1] // _SAMPLED_PART]
    share = part.shape[-1] / z.shape[-1]
    tau = part.amax(-1, keepdim=True) - share
    for _ in range(_SAMPLE_STEPS):
        excess = (part - tau).clamp_min_(0)
        total = excess.sum(-1, keepdim=True)
        tau = tau + (total - share) / excess.gt_(0).sum(-1, keepdim=True).clamp_min_(1)
    return torch.where((tau > -1) & (tau < 0), tau, lowest)


class _Sparsemax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        weights = project_(z.clone(memory_format=torch.contiguous_format))
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        support = weights > 0
        inside = torch.where(support, grads[0], 0)
        mean = inside.sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
        return torch.where(support, inside - mean, 0)


def sparsemax(z: Tensor) -> Tensor:
    """Project logits onto the simplex along the last axis.

    Parameters
    ----------
    z
        float[..., K] logits.

    Returns
    -------
    Tensor
        float[..., K], not negative, sums to one; most entries are exactly zero where the logits
        spread by much more than one.
    """
    result: Tensor = _Sparsemax.apply(z)
    return result

"""Sparsemax without sorting.

Sparsemax (Martins and Astudillo, 2016, arXiv 1602.02068) projects logits onto the probability
simplex: ``w = max(0, z - tau)`` with ``tau`` such that the weights sum to one. The usual way to
find ``tau`` sorts the logits; with a codebook of 16,000 codes and 196 patches per window the sort
costs more than the network. ``f(tau) = sum(max(0, z - tau)) - 1`` is convex, decreasing and
piecewise linear, so Newton's method from the left of the root climbs monotonically and lands on
the exact answer after finitely many steps (Michelot, 1986): the support only ever shrinks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MAX_STEPS = 64


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
    return top + _search(z - top)


def _search(z: Tensor) -> Tensor:
    """Find the threshold of rows whose largest logit is zero.

    With logits far from zero the sums would lose the digits that the weights are made of.
    """
    tau = torch.full_like(z[..., :1], -1)
    count = torch.zeros_like(tau)
    for _ in range(_MAX_STEPS):
        above = z > tau
        new_count = above.sum(-1, keepdim=True).to(z.dtype)
        if torch.equal(new_count, count):
            break
        count = new_count
        tau = (torch.where(above, z, 0).sum(-1, keepdim=True) - 1) / count
    return tau


class _Sparsemax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        z = z - z.amax(-1, keepdim=True)
        weights = (z - _search(z)).clamp_min_(0)
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

"""The shared codebook of soundscape concepts: where image, text and audio meet.

After Sat2Sound (arXiv 2505.13777) and the finite discrete tokens that it builds on: every modality
maps its tokens to queries, compares them with one dictionary of codes, and becomes the weighted
sum of the codes it attends to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundmap.nn.sparsemax import project_, sparsemax

# Numbers held at a time where logits pass through: few enough for a processor's cache, enough
# rows for a matrix product to be worth starting.
_POOL_BLOCK = 1 << 18
_EACH_BLOCK = 1 << 22
_LEAST_CODES = 256


class QueryMap(nn.Sequential):
    """Tokens of one modality to queries: norm, linear, GELU, norm, linear."""

    def __init__(self, token_dim: int, dim: int) -> None:
        super().__init__(
            nn.LayerNorm(token_dim),
            nn.Linear(token_dim, dim),
            nn.GELU(),
            nn.LayerNorm(dim),
            nn.Linear(dim, dim),
        )


class Codebook(nn.Module):
    """One dictionary of codes, shared by all modalities.

    Without gradients, logits are made and used up part by part: all 16,000 of all tokens of a
    batch never stand in memory together.

    Parameters
    ----------
    size
        Number of codes, K.
    dim
        Length of a code, D.
    temperature
        Divides the scaled logits; the larger, the more codes share the weight.
    """

    def __init__(self, size: int, dim: int, temperature: float) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(size, dim))
        self.scale = dim**-0.5 / temperature

    def logits(self, queries: Tensor) -> Tensor:
        """Compare queries with codes: float[..., D] to float[..., K]."""
        # Scaling the queries, not the K logits of each, saves a pass over the largest array.
        return (queries * self.scale) @ self.codes.T

    def largest(self, queries: Tensor, mask: Tensor | None = None) -> Tensor:
        """Find each code's largest logit over a set of tokens.

        Parameters
        ----------
        queries
            float[B, N, D].
        mask
            bool[B, N], False for padding. The published model multiplies logits by it, so that
            padding has logits of zero, which take part like any other: where a row has padding,
            no code's largest logit is below zero.

        Returns
        -------
        Tensor
            float[B, K].
        """
        if mask is not None:
            # The same as multiplying logits: a query of zero has no others.
            queries = queries * mask[..., None]
        if self._learns_from(queries) or not queries.numel():
            return self.logits(queries).amax(-2)
        batch, count, dim = queries.shape
        # Codes times tokens is a little faster than tokens times codes, of which there are more.
        tokens = (queries * self.scale).reshape(-1, dim).T
        out = queries.new_empty(len(self.codes), batch)
        step = max(_LEAST_CODES, _POOL_BLOCK // tokens.shape[1])
        for codes, part in zip(self.codes.split(step), out.split(step), strict=True):
            torch.amax((codes @ tokens).view(-1, batch, count), -1, out=part)
        return out.T.contiguous()

    def mix(self, logits: Tensor) -> Tensor:
        """Turn logits into weighted sums of codes: float[..., K] to float[..., D], any length."""
        return sparsemax(logits) @ self.codes

    def combine(self, logits: Tensor) -> Tensor:
        """Turn logits into unit vectors: float[..., K] to float[..., D]."""
        return F.normalize(self.mix(logits), dim=-1)

    def pool(self, queries: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embed a set of tokens as one: each code takes its largest logit over the tokens.

        Parameters
        ----------
        queries, mask
            See `largest`.

        Returns
        -------
        Tensor
            float[B, D], unit vectors.
        """
        return self.combine(self.largest(queries, mask))

    def each(self, queries: Tensor) -> Tensor:
        """Embed every token by itself: float[..., D] to unit vectors float[..., D]."""
        if self._learns_from(queries):
            return self.combine(self.logits(queries))
        dim = queries.shape[-1]
        out = queries.new_empty(queries.shape)
        step = max(1, _EACH_BLOCK // len(self.codes))
        parts = zip(
            queries.reshape(-1, dim).split(step), out.view(-1, dim).split(step), strict=True
        )
        for part, found in parts:
            torch.mm(project_(self.logits(part)), self.codes, out=found)
        return F.normalize(out, dim=-1)

    def _learns_from(self, queries: Tensor) -> bool:
        """Whether gradients will be asked for, which need the logits as a whole."""
        return torch.is_grad_enabled() and (queries.requires_grad or self.codes.requires_grad)

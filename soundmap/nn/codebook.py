"""The shared codebook of soundscape concepts: where image, text and audio meet.

After Sat2Sound (arXiv 2505.13777) and the finite discrete tokens that it builds on: every modality
maps its tokens to queries, compares them with one dictionary of codes, and becomes the weighted
sum of the codes it attends to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundmap.nn.sparsemax import sparsemax


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

    def combine(self, logits: Tensor) -> Tensor:
        """Turn logits into unit vectors: float[..., K] to float[..., D]."""
        return F.normalize(sparsemax(logits) @ self.codes, dim=-1)

    def pool(self, queries: Tensor) -> Tensor:
        """Embed a set of tokens as one: each code takes its largest logit over the tokens.

        Parameters
        ----------
        queries
            float[B, N, D].

        Returns
        -------
        Tensor
            float[B, D], unit vectors.
        """
        return self.combine(self.logits(queries).amax(dim=-2))

    def each(self, queries: Tensor) -> Tensor:
        """Embed every token by itself: float[..., D] to unit vectors float[..., D]."""
        return self.combine(self.logits(queries))

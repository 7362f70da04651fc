"""Metadata of a window: encodings of place, month, hour and source, and the layers that fuse them.

After Sat2Sound (arXiv 2505.13777). Every field becomes one more token behind the image's, and
three post-norm transformer layers let them see each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundmap.nn.vit import Attention, Mlp

FIELDS = ("asource", "tsource", "latlong", "month", "time")
"""All fields, in the order of their tokens: which archive the audio and the caption came from,
place, month, hour."""

_SOURCES = {"asource": 4, "tsource": 3}
_ENCODED = {"latlong": 4, "month": 2, "time": 2}
_HIDDEN = 64
_LAYERS = 3
_HEADS = 8
_MLP_RATIO = 2
_NORM_EPS = 1e-5


def encode_latlong(lonlat: Tensor) -> Tensor:
    """Encode places: float64[B, 2] degrees, longitude first, to float32[B, 4].

    ``[sin(pi lat/90), cos(pi lat/90), sin(pi lon/180), cos(pi lon/180)]``, computed in float64, as
    the published model does; it makes both poles one place.
    """
    lon, lat = (lonlat.double() * math.pi).unbind(-1)
    angles = torch.stack([lat / 90, lon / 180], -1)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2).float()


def encode_month(month: Tensor) -> Tensor:
    """Encode months 1 to 12: int[B] to float32[B, 2], a turn of the circle per 12."""
    return _circle(month, 12)


def encode_hour(hour: Tensor) -> Tensor:
    """Encode local hours 0 to 23: int[B] to float32[B, 2].

    A turn of the circle per 23, not 24, as the published model was trained: hours 0 and 23 are one.
    """
    return _circle(hour, 23)


def _circle(number: Tensor, period: int) -> Tensor:
    angle = number.double() * (2 * math.pi / period)
    return torch.stack([angle.sin(), angle.cos()], -1).float()


@dataclass(frozen=True)
class Metadata:
    """Encoded metadata of a batch of windows."""

    values: Mapping[str, Tensor]
    """Field -> float32[B, 4] (latlong), float32[B, 2] (month, time) or int64[B] (sources); a field
    that is left out is masked everywhere."""
    valid: Mapping[str, Tensor]
    """Field -> bool[B]; a field that is left out is valid wherever it has a value."""

    def part(self, start: int, stop: int) -> Metadata:
        """Keep the windows from one position to another."""
        return Metadata(
            {k: v[start:stop] for k, v in self.values.items()},
            {k: v[start:stop] for k, v in self.valid.items()},
        )


class FuserLayer(nn.Module):
    """One post-norm transformer layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = Attention(width, _HEADS)
        self.norm1 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.mlp = Mlp(width, _MLP_RATIO * width)
        self.norm2 = nn.LayerNorm(width, eps=_NORM_EPS)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Attend to the tokens that may be seen: float[B, N, width], bool[B, 1, 1, N]."""
        x = self.norm1(x + self.attn(x, seen=seen))
        out: Tensor = self.norm2(x + self.mlp(x))
        return out


class MetadataFuser(nn.Module):
    """Lets image tokens and metadata tokens see each other.

    Parameters
    ----------
    fields
        Which metadata the model knows, a part of `FIELDS` in its order.
    width
        Channels of a token.
    """

    def __init__(self, fields: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.fields = fields
        self.embed = nn.ModuleDict()
        for name in fields:
            if name in _SOURCES:
                self.embed[name] = nn.Embedding(_SOURCES[name], width)
            else:
                self.embed[name] = nn.Sequential(
                    nn.Linear(_ENCODED[name], _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, width)
                )
        self.layers = nn.ModuleList(FuserLayer(width) for _ in range(_LAYERS))

    def tokens(self, metadata: Metadata, like: Tensor) -> tuple[Tensor, Tensor]:
        """Turn metadata into tokens.

        Parameters
        ----------
        metadata
            Of B windows.
        like
            float[B, N, width], the image tokens that they will follow.

        Returns
        -------
        tuple of Tensor
            float[B, M, width], zero where not valid, and bool[B, M], whether each is valid.
        """
        batch, _, width = like.shape
        tokens, valid = [], []
        for name in self.fields:
            if name in metadata.values:
                token = self.embed[name](metadata.values[name]).expand(batch, width)
                ok = metadata.valid.get(name)
                known = token.new_ones(batch, dtype=torch.bool) if ok is None else ok.expand(batch)
            else:
                token = like.new_zeros(batch, width)
                known = like.new_zeros(batch, dtype=torch.bool)
            tokens.append(token * known[:, None])
            valid.append(known)
        return torch.stack(tokens, 1), torch.stack(valid, 1)

    def forward(self, tokens: Tensor, metadata: Metadata) -> Tensor:
        """Fuse metadata into image tokens.

        A token that is not valid is not attended to, but has an output, which the pooling over
        tokens sees. Where the not valid ones stand last in every row of the batch that output is
        zero, else it is what the layers make of it: the published model was evaluated like that
        (a shortcut of PyTorch's own encoder sets the zeros), so its numbers are only met by doing
        the same. All windows of a map have the same fields masked, so nothing there depends on
        which windows are encoded together.

        Parameters
        ----------
        tokens
            float[B, N, width].
        metadata
            Of the B windows.

        Returns
        -------
        Tensor
            float[B, N + M, width]: image tokens, then one of each field.
        """
        extra, valid = self.tokens(metadata, tokens)
        return self.fuse(tokens, extra, valid)

    def fuse(self, tokens: Tensor, extra: Tensor, valid: Tensor) -> Tensor:
        """Fuse metadata tokens float[B, M, width] with validity bool[B, M]; see `forward`."""
        out = self.mix(tokens, extra, valid)
        stand_last = bool((valid[:, 1:] <= valid[:, :-1]).all())
        if stand_last and not bool(valid.all()):
            seen = F.pad(valid, (tokens.shape[1], 0), value=True)
            out = out * seen[..., None]
        return out

    def mix(self, tokens: Tensor, extra: Tensor, valid: Tensor) -> Tensor:
        """Run the layers over all tokens and set nothing to zero: float[B, N + M, width]."""
        seen = F.pad(valid, (tokens.shape[1], 0), value=True)[:, None, None]
        x = torch.cat([tokens, extra.to(tokens.dtype)], 1)
        for layer in self.layers:
            x = layer(x, seen)
        return x

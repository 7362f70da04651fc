"""A small audio tower: convolutions over the log-mel picture, then a few transformer blocks.

It learns from few recordings, so what it need not learn is taken from it: how loud a clip was
recorded, and how much silence follows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundmap.nn.codebook import QueryMap
from soundmap.nn.mel import MEL_BANDS
from soundmap.nn.vit import Block

_DEPTH_DB = 70.0
"""Range below the loudest band of a clip that is looked at; what lies deeper is silence."""
_SPREAD_DB = 15.0
"""Usual standard deviation of a clip's decibels; brings the picture near unit variance."""


@dataclass(frozen=True)
class AudioConfig:
    """Size of the small audio tower."""

    stem: tuple[int, ...] = (24, 48, 72, 96)
    """Channels of the 3 x 3 convolutions; each halves frames and bands."""
    width: int = 128
    depth: int = 1
    heads: int = 4
    mlp_ratio: float = 2.0

    @property
    def frames(self) -> int:
        """Frames of ten milliseconds that a token stands for."""
        return int(2 ** len(self.stem))

    @property
    def bands(self) -> int:
        """Bins of frequency that are left after the convolutions."""
        return MEL_BANDS // self.frames


def level(mel: Tensor) -> tuple[Tensor, Tensor]:
    """Take the recording's loudness out of its picture, and find the frames with sound in them.

    Parameters
    ----------
    mel
        float[B, 1, frames, bands], decibels.

    Returns
    -------
    tuple of Tensor
        The picture, float[B, 1, frames, bands], of mean zero over frames with sound, cut off 70
        dB below its loudest band; and bool[B, frames], where there is sound.
    """
    floor = mel.amax((2, 3), keepdim=True) - _DEPTH_DB
    heard = (mel > floor).any(3, keepdim=True)
    mel = mel.maximum(floor)
    count = heard.sum((2, 3), keepdim=True) * mel.shape[3]
    mean = (mel * heard).sum((2, 3), keepdim=True) / count
    return (mel - mean) / _SPREAD_DB, heard[:, 0, :, 0]


def fill_silence(tokens: Tensor, heard: Tensor) -> Tensor:
    """Replace tokens of silence by the tokens of sound, over and over in their order.

    A clip that is followed by silence so comes to what the clip repeated would.

    Parameters
    ----------
    tokens
        float[B, T, width].
    heard
        bool[B, T]; at least one in each row.

    Returns
    -------
    Tensor
        float[B, T, width]: the tokens of sound first.
    """
    count = tokens.shape[1]
    # A stable sort of the negation brings the places of sound to the front, in their order.
    order = torch.argsort((~heard).int(), dim=1, stable=True)
    turn = torch.arange(count, device=tokens.device)[None] % heard.sum(1, keepdim=True)
    place = order.gather(1, turn)
    return tokens.gather(1, place[..., None].expand_as(tokens))


class SmallAudioTower(nn.Module):
    """Log-mel pictures of any length to tokens.

    The convolutions keep frequency and time apart; the bins of frequency of one time are then one
    token. Tokens are told nothing of their time: sounds may come at any.
    """

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        previous = 1
        for channels in config.stem:
            layers += [
                nn.Conv2d(previous, channels, 3, 2, 1, bias=False),
                nn.BatchNorm2d(channels),
                nn.GELU(),
            ]
            previous = channels
        self.stem = nn.Sequential(*layers)
        self.join = nn.Linear(previous * config.bands, config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth)
        )

    def forward(self, mel: Tensor) -> Tensor:
        """Encode clips.

        Parameters
        ----------
        mel
            float[B, 1, frames, 64], decibels, from `soundmap.nn.mel.log_mel`; 1001 frames for ten
            seconds.

        Returns
        -------
        Tensor
            float[B, T, width], T the frames over 16, rounded up.
        """
        picture, heard = level(mel)
        grid = self.stem(picture)
        x = self.join(grid.permute(0, 2, 1, 3).flatten(2))
        step = self.config.frames
        some = F.max_pool1d(heard[:, None].float(), step, ceil_mode=True)[:, 0] > 0
        x = fill_silence(x, some)
        for block in self.blocks:
            x = block(x)
        return x


class SmallAudioSide(nn.Module):
    """Small audio tower and query map: clips to queries against the codebook.

    Parameters
    ----------
    config
        Size of the tower.
    dim
        Length of a query, D.
    """

    def __init__(self, config: AudioConfig, dim: int) -> None:
        super().__init__()
        self.tower = SmallAudioTower(config)
        self.query = QueryMap(config.width, dim)

    def queries(self, mel: Tensor) -> Tensor:
        """Turn mel pictures float[B, 1, frames, 64] into queries float[B, T, D]."""
        out: Tensor = self.query(self.tower(mel))
        return out

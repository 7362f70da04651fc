"""Convolutions that see the same in an image however it is turned, by how their weights are tied.

A layer's channels are the same few filters in four directions, so that turning an image by 90
degrees turns what each layer makes of it and passes its channels on to the next direction; the last
layer adds the directions up (group convolutions over p4: Cohen and Welling 2016, arXiv 1602.07576).
Tied weights are trained; written out they are those of plain convolutions, which is all that the
finished model has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from soundmap.errors import InputError
from soundmap.nn.vit import ConvStem

DIRECTIONS = 4


class _Tied(nn.Module):
    """Weights of which the first direction alone learns."""

    def right_inverse(self, whole: Tensor) -> Tensor:
        return whole[: len(whole) // DIRECTIONS].clone()


class _First(_Tied):
    """Filters of pixels, in four directions: float[O / 4, I, k, k] to float[O, I, k, k]."""

    def forward(self, own: Tensor) -> Tensor:
        return torch.cat([torch.rot90(own, r, (2, 3)) for r in range(DIRECTIONS)])


class _Between(_Tied):
    """Filters of what has directions: each is turned, and hears directions one further on."""

    def forward(self, own: Tensor) -> Tensor:
        step = own.shape[1] // DIRECTIONS
        turned = [torch.rot90(own, r, (2, 3)).roll(r * step, 1) for r in range(DIRECTIONS)]
        return torch.cat(turned)


class _Last(nn.Module):
    """Filters that add the directions up: float[O, I / 4, k, k] to float[O, I, k, k]."""

    def forward(self, own: Tensor) -> Tensor:
        return torch.cat([torch.rot90(own, r, (2, 3)) for r in range(DIRECTIONS)], 1)

    def right_inverse(self, whole: Tensor) -> Tensor:
        return whole[:, : whole.shape[1] // DIRECTIONS].clone()


class _Same(_Tied):
    """One number for all four directions of a filter: float[O / 4] to float[O]."""

    def forward(self, own: Tensor) -> Tensor:
        return own.repeat(DIRECTIONS)


def tie(stem: nn.Module) -> None:
    """Tie the weights of convolutions, in place, so that turned images are seen alike.

    Three quarters of the weights are not kept: tie before training.

    Parameters
    ----------
    stem
        Of `soundmap.nn.vit.ViT`.

    Raises
    ------
    InputError
        It has fewer than two convolutions, or a number of channels that is no multiple of four.
    """
    layers = list(stem) if isinstance(stem, ConvStem) else []
    convolutions = [m for m in layers if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    widths = [c.out_channels for c in convolutions[:-1]]
    if not widths or any(width % DIRECTIONS for width in widths):
        raise InputError(
            f"a stem of channels {tuple(widths)} cannot be tied in four directions: it needs two "
            "convolutions or more, each of a multiple of 4 channels"
        )
    for i, convolution in enumerate(convolutions):
        kind = _First() if i == 0 else _Last() if i == len(convolutions) - 1 else _Between()
        parametrize.register_parametrization(convolution, "weight", kind)
    norms = [m for m in layers if isinstance(m, nn.BatchNorm2d)]
    for norm in norms[:-1]:
        for name in ("weight", "bias"):
            parametrize.register_parametrization(norm, name, _Same())


@torch.no_grad()
def tie_statistics(stem: nn.Module) -> None:
    """Give the directions of a filter the same running statistics, in place: their mean."""
    for module in stem.modules():
        if isinstance(module, nn.BatchNorm2d) and parametrize.is_parametrized(module, "weight"):
            for kept in (module.running_mean, module.running_var):
                assert kept is not None
                kept.copy_(kept.view(DIRECTIONS, -1).mean(0).repeat(DIRECTIONS))


def write_out(stem: nn.Module) -> None:
    """Turn tied weights into those of plain convolutions, in place; nothing is computed otherwise.

    A stem that is not tied stays as it is.
    """
    for module in stem.modules():
        for name in ("weight", "bias"):
            if parametrize.is_parametrized(module, name):
                parametrize.remove_parametrizations(module, name)

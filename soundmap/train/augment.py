"""Augmentation on whole batches, and the patchwork that teaches a patch to speak for itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_resize(pixels: Tensor, crop_px: int, window_px: int, rng: torch.Generator) -> Tensor:
    """Cut a random square from every image and resize it to the model's window.

    Parameters
    ----------
    pixels
        uint8[B, 3, H, W].
    crop_px
        Side of the square, at most H and W.

    Returns
    -------
    Tensor
        float32[B, 3, window_px, window_px] in 0..255.
    """
    room = pixels.shape[-1] - crop_px
    offsets = torch.randint(0, room + 1, (len(pixels), 2), generator=rng).tolist()
    crops = torch.stack(
        [p[:, y : y + crop_px, x : x + crop_px] for p, (y, x) in zip(pixels, offsets, strict=True)]
    ).float()
    if crop_px == window_px:
        return crops
    size = (window_px, window_px)
    return F.interpolate(crops, size, mode="bilinear", antialias=True, align_corners=False)


def turn(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Rotate by a random multiple of 90 degrees and flip, each image by itself."""
    out = pixels.clone()
    kind = torch.randint(0, 8, (len(pixels),), generator=rng)
    for k in range(1, 8):
        chosen = kind == k
        if chosen.any():
            part = torch.rot90(pixels[chosen], k % 4, (-2, -1))
            out[chosen] = part.flip(-1) if k >= 4 else part
    return out


def recolour(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Vary light as sensors and seasons do: gain, contrast, saturation, colour cast, haze."""

    def spread(amount: float, channels: int = 1) -> Tensor:
        shape = (len(pixels), channels, 1, 1)
        return (torch.rand(shape, generator=rng) * 2 - 1) * amount

    grey = pixels.mean(1, keepdim=True)
    out = grey + (pixels - grey) * (1 + spread(0.2))
    mean = out.mean((2, 3), keepdim=True)
    out = mean + (out - mean) * (1 + spread(0.2))
    out = out * (1 + spread(0.15)) * (1 + spread(0.04, 3))
    haze = torch.rand((len(pixels), 1, 1, 1), generator=rng).pow(3) * 0.25
    out = out * (1 - haze) + 190 * haze
    return out.clamp_(0, 255)


def hide(pixels: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Blank a random side or rectangle of some images with the mean of the rest.

    Windows at the edge of imagery are filled the same way where a map is made.
    """
    out = pixels.clone()
    side = pixels.shape[-1]
    for i in torch.nonzero(torch.rand(len(pixels), generator=rng) < share)[:, 0].tolist():
        y0, x0 = torch.randint(-side // 2, side // 2, (2,), generator=rng).tolist()
        h, w = torch.randint(side // 4, side, (2,), generator=rng).tolist()
        keep = torch.ones(side, side, dtype=torch.bool)
        keep[max(0, y0) : max(0, y0 + h), max(0, x0) : max(0, x0 + w)] = False
        if keep.float().mean() > 0.3:
            out[i][:, ~keep] = out[i][:, keep].mean(1, keepdim=True)
    return out


@dataclass(frozen=True)
class Patchwork:
    """Windows pieced together from four others each, with the way back to their patches."""

    pixels: Tensor
    """float32[B, 3, W, W]."""
    image: Tensor
    """int64[B, P * P], which window of the batch each patch was taken from."""
    patch: Tensor
    """int64[B, P * P], and which of its patches it was."""


def patchwork(pixels: Tensor, patch_px: int, rng: torch.Generator) -> Patchwork:
    """Piece windows together from quarters of others.

    Four windows are laid side by side, two by two, and a window is cut out of the middle at a
    random whole-patch offset. Every patch keeps its pixels but gets other neighbours and another
    place, so what the model says of it can be held to what it said before.

    Parameters
    ----------
    pixels
        float32[B, 3, W, W].
    patch_px
        Side of a patch.
    """
    batch, _, side, _ = pixels.shape
    n = side // patch_px
    parts = torch.stack([torch.randperm(batch, generator=rng) for _ in range(4)], dim=1)
    dy, dx = torch.randint(1, n, (2,), generator=rng).tolist()
    four = pixels[parts]
    top = torch.cat([four[:, 0], four[:, 1]], dim=-1)
    bottom = torch.cat([four[:, 2], four[:, 3]], dim=-1)
    canvas = torch.cat([top, bottom], dim=-2)
    y, x = dy * patch_px, dx * patch_px
    out = canvas[..., y : y + side, x : x + side].contiguous()
    rows = torch.arange(n) + dy
    cols = torch.arange(n) + dx
    quarter = (rows >= n).long()[:, None] * 2 + (cols >= n).long()[None, :]
    index = (rows % n)[:, None] * n + (cols % n)[None, :]
    image = parts[:, quarter.flatten()]
    patch = index.flatten()[None].expand(batch, -1)
    return Patchwork(out, image, patch)

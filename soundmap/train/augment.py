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


def recolour(pixels: Tensor, rng: torch.Generator, strength: float = 1.0) -> Tensor:
    """Vary light as sensors, seasons and weather do.

    Gain, contrast, saturation and colour cast; bands that run into each other, as leaves do that
    turn brown or grass that dries; a curve of brightness; and haze, a veil of light grey.

    Parameters
    ----------
    pixels
        float32[B, 3, H, W] in 0..255.
    rng
        Where chance comes from.
    strength
        Multiplies all but the haze.

    Returns
    -------
    Tensor
        The same in other light, within 0..255.
    """

    def spread(amount: float, channels: int = 1) -> Tensor:
        shape = (len(pixels), channels, 1, 1)
        return (torch.rand(shape, generator=rng) * 2 - 1) * (amount * strength)

    mean = pixels.mean((2, 3), keepdim=True)
    # One matrix does it all: saturation keeps part of the grey, bands leak into each other.
    saturation = 1 + spread(0.25)[:, 0, 0]
    grey = torch.full((3, 3), 1 / 3)
    leak = torch.randn((len(pixels), 3, 3), generator=rng) * (0.05 * strength)
    leak = leak - leak.mean(2, keepdim=True)
    matrix = saturation[..., None] * (torch.eye(3) - grey) + grey + leak
    gain = (1 + spread(0.15))[:, 0] * (1 + spread(0.06, 3))[..., 0]
    contrast = (1 + spread(0.25))[:, 0]
    matrix = matrix * gain
    # Contrast is about the image's own mean: matrix (mean + contrast (x - mean)).
    offset = (matrix @ mean[..., 0]) * (1 - contrast) + spread(6.0, 3)[..., 0]
    veil = torch.rand((len(pixels), 1, 1), generator=rng).pow(2) * 0.35
    colour = 190 + spread(25.0)[..., 0] + spread(12.0, 3)[..., 0]
    matrix, offset = matrix * contrast * (1 - veil), offset * (1 - veil) + colour * veil
    out = torch.baddbmm(offset, matrix, pixels.flatten(2)).view_as(pixels)
    return out.clamp_(0, 255)


def _between(low: float, high: float, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=rng)


def clear(
    pixels: Tensor, dark_rgb: tuple[int, int, int], share: float, rng: torch.Generator
) -> Tensor:
    """Take the light of the air from some images, and stretch what is left.

    Products that are corrected for the atmosphere are dark where those that are not are grey, and
    viewers stretch them as they like.

    Parameters
    ----------
    pixels
        float32[B, 3, H, W] in 0..255.
    dark_rgb
        Red, green and blue of the darkest ground: what the air adds.
    share
        Part of the images.
    rng
        Where chance comes from.
    """
    chosen = torch.nonzero(torch.rand(len(pixels), generator=rng) < share)[:, 0]

    def draw(low: float, high: float, channels: int = 1) -> Tensor:
        return _between(low, high, (len(chosen), channels, 1, 1), rng)

    # Corrections take more or less of each band: what is dark is not black in all of them.
    part = draw(0.4, 1.0) * draw(0.65, 1.1, 3)
    air = torch.tensor(dark_rgb, dtype=pixels.dtype)[:, None, None] * part
    gain = torch.exp(draw(-0.3, 0.7) + draw(-0.3, 0.3, 3))
    out = pixels.clone()
    out[chosen] = ((pixels[chosen] - air) * gain).clamp_(0, 255)
    return out


def veil(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Lay haze over images: a veil of light grey, thin or thick, and a little more or less light.

    Parameters
    ----------
    pixels
        float32[B, 3, H, W] in 0..255.
    rng
        Where chance comes from.
    """

    def draw(low: float, high: float, channels: int = 1) -> Tensor:
        return _between(low, high, (len(pixels), channels, 1, 1), rng)

    part = draw(0.0, 0.3)
    colour = draw(160, 220) + draw(-10, 10, 3)
    return (pixels * (draw(0.9, 1.1) * (1 - part)) + colour * part).clamp_(0, 255)


def sharpen(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Stretch the contrast of images and give them grain, as aerial pictures have them.

    Parameters
    ----------
    pixels
        float32[B, 3, H, W] in 0..255.
    rng
        Where chance comes from.
    """
    each = (len(pixels), 1, 1, 1)
    mean = pixels.mean((2, 3), keepdim=True)
    stretched = mean + (pixels - mean) * _between(1.0, 2.5, each, rng)
    stretched += _between(-20.0, 50.0, each, rng)
    grain = torch.randn(pixels.shape, generator=rng) * _between(0.0, 15.0, each, rng)
    return (stretched + grain).clamp_(0, 255)


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


def gaps(count: int, side: int, share: float, rng: torch.Generator) -> Tensor:
    """Cut off a side, a corner or a piece of some windows: bool[count, 1, side, side]."""
    missing = torch.zeros(count, 1, side, side, dtype=torch.bool)
    for i in torch.nonzero(torch.rand(count, generator=rng) < share)[:, 0].tolist():
        first = torch.randint(-side // 2, side, (2,), generator=rng)
        size = torch.randint(side // 4, side, (2,), generator=rng)
        y0, x0 = first.clamp(min=0).tolist()
        y1, x1 = (first + size).tolist()
        piece = torch.zeros(side, side, dtype=torch.bool)
        piece[y0 : max(0, y1), x0 : max(0, x1)] = True
        if torch.rand((), generator=rng) < 0.5:
            # All of one side, as at the edge of a scene.
            piece = piece.any(0, keepdim=True).expand(side, side)
        if piece.float().mean() < 0.6:
            missing[i, 0] = piece
    return missing


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

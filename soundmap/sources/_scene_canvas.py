"""Numbers from coordinates: noise, hashes, mosaics, curves and soft brushes on float32 arrays.

These draw the sample scene. All are pure functions; distances are in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.floating[Any]]  # float32 throughout; numpy's types know less of it
Ints = NDArray[np.uint32]
Mask = NDArray[np.bool_]
Integers = NDArray[np.integer[Any]] | Mask
Point = tuple[float, float]
Colour = tuple[float, float, float]
Palette = Sequence[tuple[Colour, float]]


def noise(
    rng: np.random.Generator, size: int, longest: float, slope: float, shortest: float = 0.0
) -> Float:
    """Periodic noise of unit variance: float32[size, size], amplitude ~ 1/f**slope.

    ``longest`` and ``shortest`` are the wavelengths in pixels beyond which it fades.
    """
    fx = np.fft.rfftfreq(size).astype(np.float32)
    f = np.hypot(np.fft.fftfreq(size).astype(np.float32)[:, None], fx[None])
    f[0, 0] = 1.0
    gain = f**-slope / (1 + (1 / (longest * f)) ** 4)
    if shortest:
        gain *= np.exp(-((f * shortest) ** 2) / 2)
    gain[0, 0] = 0
    white = rng.standard_normal((size, size), dtype=np.float32)
    out = np.fft.irfft2(np.fft.rfft2(white) * gain, s=(size, size))
    return np.asarray(out / out.std(), np.float32)


def hashed(*keys: Integers | int) -> Ints:
    """Scramble integers into uint32: the same keys give the same number, everywhere."""
    h: Ints = np.asarray(2166136261, np.uint32)
    with np.errstate(over="ignore"):
        for key in keys:
            h = (h ^ np.asarray(key).astype(np.uint32)) * np.uint32(0x9E3779B1)
            h = h ^ (h >> np.uint32(15))
        h = h * np.uint32(0x85EBCA6B)
        h = h ^ (h >> np.uint32(13))
    return np.asarray(h, np.uint32)


def unit(*keys: Integers | int) -> Float:
    """Hash integers to [0, 1)."""
    return np.asarray(hashed(*keys) >> np.uint32(8), np.float32) * np.float32(2**-24)


def choose(u: Float, palette: Palette) -> Float:
    """Pick a colour for each number in [0, 1), by the palette's shares: float32[3, ...]."""
    shares = np.cumsum([share for _, share in palette])
    picked = np.searchsorted((shares[:-1] / shares[-1]).astype(np.float32), u, side="right")
    bands = [np.array(band, np.float32) for band in zip(*(c for c, _ in palette), strict=True)]
    return np.stack([band[picked] for band in bands])


@dataclass(frozen=True)
class Pieces:
    """A line cut into uneven pieces."""

    index: NDArray[np.int32]
    """Number of the piece."""
    low: Float
    """Distance to the end where the piece begins, in average pieces."""
    high: Float
    """Distance to the end where it stops."""


def cut(t: Float, key: Integers) -> Pieces:
    """Cut a line (one for each key) at uneven places that are about 1 apart."""
    jitter = np.float32(0.7)
    nearest = np.rint(t).astype(np.int32)
    index = nearest - (t < nearest + jitter * (unit(key, nearest) - np.float32(0.5)))
    low = t - (index + jitter * (unit(key, index) - np.float32(0.5)))
    high = index + 1 + jitter * (unit(key, index + 1) - np.float32(0.5)) - t
    return Pieces(index, low.astype(np.float32), high.astype(np.float32))


@dataclass(frozen=True)
class Cells:
    """A mosaic of convex cells around scattered seeds (a Voronoi diagram)."""

    key: NDArray[np.int32]
    """Number of the cell."""
    edge: Float
    """Distance to the cell's edge."""
    pair: Ints
    """A number for the edge, the same from both sides."""
    x: Float
    """Where the cell's seed lies."""
    y: Float


def cells(x: Float, y: Float, spacing: float, salt: int) -> Cells:
    """Give each point the nearest of seeds that lie about ``spacing`` apart."""
    gx, gy = np.floor(x / spacing).astype(np.int32), np.floor(y / spacing).astype(np.int32)
    x0, y0 = int(gx.min()) - 1, int(gy.min()) - 1
    wide, high = int(gx.max()) + 2 - x0, int(gy.max()) + 2 - y0
    ky, kx = np.mgrid[:high, :wide]
    key = ((ky + y0 + 64) * 4096 + kx + x0 + 64).astype(np.int32).ravel()
    seed_x = ((kx.ravel() + x0 + 0.1 + 0.8 * unit(key, salt)) * spacing).astype(np.float32)
    seed_y = ((ky.ravel() + y0 + 0.1 + 0.8 * unit(key, salt + 1)) * spacing).astype(np.float32)

    d1 = np.full(x.shape, np.inf, np.float32)
    d2 = d1.copy()
    n1 = np.zeros(x.shape, np.int32)
    n2 = n1.copy()
    home = (gy - y0) * wide + (gx - x0)
    for step in (dy * wide + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
        n = home + np.int32(step)
        d = (x - seed_x[n]) ** 2 + (y - seed_y[n]) ** 2
        first = d < d1
        n2 = np.where(first, n1, np.where(d < d2, n, n2))
        d2 = np.where(first, d1, np.minimum(d, d2))
        n1 = np.where(first, n, n1)
        d1 = np.minimum(d, d1)
    apart = np.hypot(seed_x[n1] - seed_x[n2], seed_y[n1] - seed_y[n2])
    one, two = key[n1], key[n2]
    pair = hashed(np.minimum(one, two), np.maximum(one, two), salt)
    return Cells(one, (d2 - d1) / (2 * apart), pair, seed_x[n1], seed_y[n1])


def curve(corners: Sequence[Point], per_leg: int = 12) -> NDArray[np.float64]:
    """Draw a smooth (Catmull-Rom) line through the corners: float64[N, 2]."""
    p = np.array([corners[0], *corners, corners[-1]], float)
    a, b, c, d = (q[:, None] for q in (p[:-3], p[1:-2], p[2:-1], p[3:]))
    t = np.linspace(0, 1, per_leg, endpoint=False)[:, None]
    legs = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return np.concatenate([legs.reshape(-1, 2), p[-1:]])


def along(corners: Sequence[Point], size: int, reach: float) -> tuple[Float, Float]:
    """Measure how far each pixel lies from a curve, and how far along it.

    Returns
    -------
    float32[size, size], float32[size, size]
        Distance, negative on the left hand, infinite beyond ``reach``; way from the start.
    """
    line = curve(corners)
    best = np.full((size, size), np.inf, np.float32)
    way = np.zeros((size, size), np.float32)
    start = 0.0
    for a, b in pairwise(line):
        length = float(np.hypot(*(b - a)))
        (x0, y0), (x1, y1) = np.clip(
            [np.minimum(a, b) - reach, np.maximum(a, b) + reach + 1], 0, size
        ).astype(int)
        if x1 > x0 and y1 > y0 and length > 0:
            px = np.arange(x0, x1, dtype=np.float32)[None] + np.float32(0.5 - a[0])
            py = np.arange(y0, y1, dtype=np.float32)[:, None] + np.float32(0.5 - a[1])
            ux, uy = ((b - a) / length).astype(np.float32)
            t = np.clip(px * ux + py * uy, 0, np.float32(length))
            d = np.hypot(px - t * ux, py - t * uy)
            box = (slice(y0, y1), slice(x0, x1))
            nearer = (d < np.abs(best[box])) & (d < reach)
            signed = np.where(py * ux > px * uy, d, -d)
            best[box] = np.where(nearer, signed, best[box])
            way[box] = np.where(nearer, t + np.float32(start), way[box])
        start += length
    return best, way


def band(d: Float, half: float | Float) -> Float:
    """How much of a pixel a line of this half-width covers, from its centre's distance."""
    return np.clip(half + np.float32(0.5) - np.abs(d), 0, 1).astype(np.float32)


def ramp(v: Float) -> Float:
    """Soft step, one pixel wide: 0 below -1/2, 1 above 1/2."""
    return np.clip(v + np.float32(0.5), 0, 1).astype(np.float32)


def grow(mask: Mask, px: int) -> Mask:
    """Widen a mask by a number of pixels (in a square; wraps around)."""
    for axis in (0, 1):
        for _ in range(px):
            mask = mask | np.roll(mask, 1, axis) | np.roll(mask, -1, axis)
    return mask


def blend(img: Float, alpha: Float, colour: Colour | Float) -> None:
    """Paint a colour, or a picture float32[3, H, W], over ``img`` in place where alpha is 1."""
    rows, cols = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    if not rows.size:
        return
    box = (slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1))
    cover = alpha[box].astype(np.float32)
    for layer, paint in zip(img, colour, strict=True):
        part = layer[box]
        top = paint[box] if isinstance(paint, np.ndarray) else np.float32(paint)
        part += cover * (top - part)


def tinted(v: Float, r: float, g: float, b: float) -> Float:
    """One pattern in three bands with a gain each: float32[3, ...]."""
    return np.stack([v * np.float32(gain) for gain in (r, g, b)])


def blur(a: Float, sigma: float) -> Float:
    """Smooth the last two axes with a small Gaussian (edges repeat)."""
    n = int(np.ceil(3 * sigma))
    taps = np.exp(-0.5 * (np.arange(-n, n + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in (-1, -2):
        pad = [(0, 0)] * a.ndim
        pad[axis] = (n, n)
        wide = np.pad(a, pad, mode="edge")
        parts = np.lib.stride_tricks.sliding_window_view(wide, 2 * n + 1, axis=axis)
        a = sum((parts[..., k] * taps[k] for k in range(1, 2 * n + 1)), parts[..., 0] * taps[0])
    return a


def turned(x: Float, y: Float, angle: Float | float) -> tuple[Float, Float]:
    """Coordinates along axes turned by an angle in radians."""
    c, s = np.cos(np.float32(angle)), np.sin(np.float32(angle))
    return x * c + y * s, y * c - x * s


def finer(mask: Mask, factor: int) -> tuple[tuple[slice, slice], Float, Float]:
    """Box around a mask, and x and y of the box's pixels cut into factor x factor."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    r0, r1, c0, c1 = int(rows[0]), int(rows[-1]) + 1, int(cols[0]), int(cols[-1]) + 1
    y = r0 + (np.arange((r1 - r0) * factor, dtype=np.float32) + np.float32(0.5)) / factor
    x = c0 + (np.arange((c1 - c0) * factor, dtype=np.float32) + np.float32(0.5)) / factor
    gx, gy = np.meshgrid(x, y)
    return (slice(r0, r1), slice(c0, c1)), gx, gy


def zoomed(a: Float, box: tuple[slice, slice], factor: int) -> Float:
    """Repeat each pixel of a box factor x factor times."""
    return a[box].repeat(factor, 0).repeat(factor, 1)


def shrunk(a: Float, factor: int) -> Float:
    """Average blocks of factor x factor pixels over the last two axes."""
    h, w = a.shape[-2] // factor, a.shape[-1] // factor
    return a.reshape(*a.shape[:-2], h, factor, w, factor).mean((-3, -1), dtype=np.float32)

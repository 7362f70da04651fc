"""Lay rasters onto a grid exactly: copy where pixels coincide, average or interpolate elsewhere.

Everything here works on colours that are uint8 already and on a validity plane beside them. Both
are resampled together, colours weighted by validity, so that an invalid pixel never lends its
colour to a neighbour, and what share of an output pixel was seen is known.

With bicubic resampling the share is the kernel's own: at a straight edge it crosses one half where
the share of the area does. What is kept has at least half of the kernel's weight, so that colours,
which are divided by it, stay near those of the imagery in spite of the kernel's negative lobes.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Protocol

import numpy as np
import rasterio.crs
from affine import Affine
from numpy.typing import NDArray
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox
from odc.geo.types import Shape2d
from rasterio.warp import Resampling as Gdal
from rasterio.warp import reproject

from soundmap.grid import crs_of, x_period
from soundmap.sources._footprint import (
    Aligned,
    Footprint,
    Kernel,
    Placed,
    footprint,
    kernel,
    placements,
)
from soundmap.sources.base import Image, Resampling

Span = tuple[int, int]

_MAX_SOURCE_PX = 9_000_000
"""Native pixels held at once; a larger request is cut in halves."""

_MIN_SHARE = 0.5 - 1e-4
"""An output pixel is valid from this share of valid area; below half only by rounding error."""

# GDAL's approximate coordinates have an error of up to 1/8 px that moves with the chunk, which
# would make a pixel depend on what else was asked for. SAMPLE_GRID looks for the raster under the
# whole of a chunk, not under its edges only: a chunk around a pole has all else inside.
_WARP_OPTIONS = {
    "tolerance": 1e-3,
    "SAMPLE_GRID": "YES",
    "warp_mem_limit": 128,
}


class PixelReader(Protocol):
    """Native pixels of one raster."""

    def __call__(
        self, row0: int, row1: int, col0: int, col1: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """uint8[3, h, w] (0 where not valid) and bool[h, w] of a window within the raster."""
        ...


class Canvas:
    """A grid being filled by one raster after another; what came first stays.

    Parameters
    ----------
    grid
        The pixels to fill.
    piecewise
        What is put are pieces of one raster: they just add up.
    """

    def __init__(self, grid: GeoBox, *, piecewise: bool = False) -> None:
        self.grid = grid
        self._piecewise = piecewise
        height, width = grid.shape
        self._pixels = np.zeros((3, height, width), np.uint8)
        self._valid = np.zeros((height, width), np.bool_)
        # Sums of colour x share and of shares, made only once something covers pixels in part.
        self._sums: NDArray[np.float32] | None = None
        self._shares: NDArray[np.float32] | None = None

    @property
    def full(self) -> bool:
        """Whether nothing is left to fill."""
        if self._shares is None:
            return bool(self._valid.all())
        return bool((self._shares >= 1 - 1e-4).all())

    def add_whole(
        self, rows: slice, cols: slice, pixels: NDArray[np.uint8], valid: NDArray[np.bool_]
    ) -> None:
        """Put pixels that are each wholly valid or wholly not."""
        if self._sums is not None:
            share = valid.astype(np.float32)
            self.add_part(rows, cols, pixels.astype(np.float32) * share, share)
            return
        taken = self._valid[rows, cols]
        if taken.any():
            new = valid & ~taken
            np.copyto(self._pixels[:, rows, cols], pixels, where=new)
            taken |= new
        else:
            self._pixels[:, rows, cols] = pixels
            taken[:] = valid

    def add_part(
        self, rows: slice, cols: slice, sums: NDArray[np.float32], shares: NDArray[np.float32]
    ) -> None:
        """Put pixels of which a share (0..1) is valid; ``sums`` is colour times share.

        A later raster gets at most the share that is still free, so rasters that meet inside a
        pixel blend by area.
        """
        if self._sums is None or self._shares is None:
            self._sums = self._pixels.astype(np.float32)
            self._shares = self._valid.astype(np.float32)
        if self._piecewise:
            self._sums[:, rows, cols] += sums
            self._shares[rows, cols] += shares
            return
        before = self._shares[rows, cols]
        free = np.minimum(shares, 1 - before)
        # Most blocks meet an empty canvas: then the division below would only cost time.
        if before.any():
            scale = np.divide(free, shares, out=np.zeros_like(shares), where=shares > 1e-6)
            sums = sums * scale
        self._sums[:, rows, cols] += sums
        before += free

    def lay(self, top: Canvas) -> None:
        """Put what one raster came to by bicubic resampling, in however many pieces.

        Pieces of one raster add up to what it would be in one, for which shares may be negative or
        above 1 until all are there. Between rasters, shares are shares again. ``top`` is used up.
        """
        everywhere = slice(None), slice(None)
        if top._sums is None or top._shares is None:
            self.add_whole(*everywhere, top._pixels, top._valid)
            return
        shares = top._shares.clip(0, 1)
        sums = top._sums
        sums /= np.maximum(top._shares, 1)
        np.clip(sums, 0, 255 * shares, out=sums)
        if self._sums is None and not self._valid.any():
            self._sums, self._shares = sums, shares
            return
        self.add_part(*everywhere, sums, shares)

    def image(self) -> Image:
        """Return the finished picture."""
        if self._sums is None or self._shares is None:
            return Image(self._pixels, self._valid, self.grid)
        valid = self._shares >= _MIN_SHARE
        colour = self._sums / np.where(valid, self._shares, np.float32(1))
        pixels = to_uint8(colour)
        pixels *= valid
        return Image(pixels, valid, self.grid)


def fill(
    canvas: Canvas, native: GeoBox, read: PixelReader, resampling: Resampling = "area"
) -> None:
    """Lay one raster onto the canvas.

    Parameters
    ----------
    canvas
        What to fill.
    native
        The raster's own pixel grid; may be rotated or south-up.
    read
        Gives its native pixels.
    resampling
        How pixels are made that do not coincide with native ones.
    """
    whole = slice(0, canvas.grid.shape[0]), slice(0, canvas.grid.shape[1])
    if resampling == "area":
        for placed in placements(canvas.grid, native):
            if isinstance(placed, Aligned):
                _copy_or_average(canvas, placed, native.shape, read)
            else:
                _warp(canvas, native, read, placed, None, *whole)
        return
    cubic = kernel(canvas.grid, native)
    if cubic is None:
        return
    pieces = None
    for placed in placements(canvas.grid, native, cubic):
        if isinstance(placed, Aligned):
            _copy_or_average(canvas, placed, native.shape, read)
        else:
            pieces = pieces or Canvas(canvas.grid, piecewise=True)
            _warp(pieces, native, read, placed, cubic, *whole)
    if pieces is not None:
        canvas.lay(pieces)


# --------------------------------------------------------------------------- pixels that coincide


def _copy_or_average(canvas: Canvas, at: Aligned, native_shape: Shape2d, read: PixelReader) -> None:
    row0, row1 = _reached(at.row, at.ky, native_shape[0], canvas.grid.shape[0])
    col0, col1 = _reached(at.col, at.kx, native_shape[1], canvas.grid.shape[1])
    per_pixel = abs(at.kx * at.ky)
    cols_at_once = max(1, min(col1 - col0, _MAX_SOURCE_PX // per_pixel))
    rows_at_once = max(1, _MAX_SOURCE_PX // (per_pixel * cols_at_once))
    for r in range(row0, row1, rows_at_once):
        rows = slice(r, min(r + rows_at_once, row1))
        for c in range(col0, col1, cols_at_once):
            cols = slice(c, min(c + cols_at_once, col1))
            _copy_or_average_part(canvas, at, native_shape, read, rows, cols)


def _copy_or_average_part(
    canvas: Canvas,
    at: Aligned,
    native_shape: Shape2d,
    read: PixelReader,
    rows: slice,
    cols: slice,
) -> None:
    row_ends = _span(at.row, at.ky, rows)
    col_ends = _span(at.col, at.kx, cols)
    pixels, valid = _read_padded(
        read, row_ends, col_ends, (0, native_shape[0]), (0, native_shape[1])
    )
    if at.ky < 0:
        pixels, valid = pixels[:, ::-1], valid[::-1]
    if at.kx < 0:
        pixels, valid = pixels[:, :, ::-1], valid[:, ::-1]
    ky, kx = abs(at.ky), abs(at.kx)
    if ky == kx == 1:
        canvas.add_whole(rows, cols, pixels, valid)
        return
    n = ky * kx
    sums = _block_sums(pixels, ky, kx)
    if valid.all():
        whole = np.ones(sums.shape[1:], np.bool_)
        canvas.add_whole(rows, cols, ((2 * sums + n) // (2 * n)).astype(np.uint8), whole)
        return
    counts = _block_sums(valid.view(np.uint8), ky, kx)
    canvas.add_part(rows, cols, (sums / n).astype(np.float32), (counts / n).astype(np.float32))


def _span(offset: int, k: int, part: slice) -> Span:
    ends = offset + k * part.start, offset + k * part.stop
    return min(ends), max(ends)


def _reached(offset: int, k: int, native: int, size: int) -> tuple[int, int]:
    """Output indices that overlap the raster's 0..native."""
    if k > 0:
        first, last = -offset // k, -((offset - native) // k)
    else:
        first, last = (offset - native) // -k, -(-offset // -k)
    return max(0, min(first, size)), max(0, min(last, size))


def _block_sums(a: NDArray[np.uint8], ky: int, kx: int) -> NDArray[np.uint64]:
    """Sums over blocks of ky x kx in the last two axes."""
    *lead, height, width = a.shape
    # 16 bits hold the sum of 257 rows, and numpy adds them several times faster than 64.
    narrow = np.uint16 if ky <= 257 else np.uint64
    rows = a.reshape(*lead, height // ky, ky, width).sum(axis=-2, dtype=narrow)
    out = np.zeros((*rows.shape[:-1], width // kx), np.uint64)
    if kx <= 16:
        for i in range(kx):
            out += rows[..., i::kx]
        return out
    return rows.reshape(*out.shape, kx).sum(axis=-1, dtype=np.uint64)


def _read_padded(
    read: PixelReader,
    rows: Span,
    cols: Span,
    rows_there: Span,
    cols_there: Span,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Read a window that may reach past what is there: beyond, it is not valid."""
    r0, r1 = max(rows[0], rows_there[0]), min(rows[1], rows_there[1])
    c0, c1 = max(cols[0], cols_there[0]), min(cols[1], cols_there[1])
    if (r0, r1) == rows and (c0, c1) == cols:
        return read(r0, r1, c0, c1)
    shape = (rows[1] - rows[0], cols[1] - cols[0])
    pixels, valid = np.zeros((3, *shape), np.uint8), np.zeros(shape, np.bool_)
    if r1 > r0 and c1 > c0:
        inside = (slice(r0 - rows[0], r1 - rows[0]), slice(c0 - cols[0], c1 - cols[0]))
        pixels[:, *inside], valid[inside] = read(r0, r1, c0, c1)
    return pixels, valid


# --------------------------------------------------------------------------- all other grids


def _warp(
    canvas: Canvas,
    native: GeoBox,
    read: PixelReader,
    placed: Placed,
    cubic: Kernel | None,
    rows: slice,
    cols: slice,
) -> None:
    found = footprint(canvas.grid, native, placed, rows, cols, cubic)
    if found is None:
        return
    row0, row1, col0, col1 = found.window
    height = found.rows.stop - found.rows.start
    width = found.cols.stop - found.cols.start
    if (row1 - row0) * (col1 - col0) > _MAX_SOURCE_PX and height * width > 16:
        for half_rows, half_cols in _halves(found.rows, found.cols):
            _warp(canvas, native, read, placed, cubic, half_rows, half_cols)
        return
    for there in _quarter_turns(native, placed, (max(col0, 0), min(col1, native.shape[1]))):
        _warp_window(canvas, native, read, placed, cubic, found, there)


def _quarter_turns(native: GeoBox, placed: Placed, cols: Span) -> list[Span]:
    """Cut columns that go far around the globe: GDAL finds a longitude only if at most half a
    turn separates it from the middle of what it is given. Each piece adds its share.
    """
    period = x_period(crs_of(native))
    if placed.same_crs or period is None:
        return [cols]
    longest = max(1, int(period / 4 / abs(native.affine.a or math.inf)))
    if cols[1] - cols[0] <= 2 * longest:
        return [cols]
    return [(c, min(c + longest, cols[1])) for c in range(cols[0], cols[1], longest)]


def _warp_window(
    canvas: Canvas,
    native: GeoBox,
    read: PixelReader,
    placed: Placed,
    cubic: Kernel | None,
    found: Footprint,
    cols_there: Span,
) -> None:
    row0, row1, col0, col1 = found.window
    height = found.rows.stop - found.rows.start
    width = found.cols.stop - found.cols.start
    rows_there = (0, native.shape[0])
    pad = found.pad_col
    col0, col1 = max(col0, cols_there[0] - pad), min(col1, cols_there[1] + pad)
    pixels, valid = _read_padded(read, (row0, row1), (col0, col1), rows_there, cols_there)
    if not valid.any():
        return
    chunk = native.affine * Affine.translation(col0, row0)
    if placed.same_crs:
        chunk = Affine.translation(placed.shift, 0) * chunk
    target = canvas.grid.affine * Affine.translation(found.cols.start, found.rows.start)
    options = {
        "src_transform": chunk,
        "src_crs": _rasterio_crs(crs_of(native)),
        "dst_transform": target,
        "dst_crs": _rasterio_crs(crs_of(canvas.grid)),
        **_kernel_options(cubic, found.stride),
        **_WARP_OPTIONS,
    }
    if found.certain and valid.all():
        whole = np.zeros((3, height, width), np.uint8)
        reproject(pixels, whole, **options)
        canvas.add_whole(found.rows, found.cols, whole, np.ones((height, width), np.bool_))
        return
    planes = np.empty((4, *valid.shape), np.float32)
    planes[:3] = pixels
    planes[3] = valid
    warped = np.zeros((4, height, width), np.float32)
    reproject(planes, warped, **options)
    shares = warped[3] if cubic is not None else warped[3].clip(0, 1)
    canvas.add_part(found.rows, found.cols, warped[:3], shares)


def _kernel_options(cubic: Kernel | None, stride: float) -> dict[str, object]:
    """Name GDAL's kernel and fix its stretch, which GDAL would estimate anew from each chunk."""
    if cubic is not None:
        return {
            "resampling": Gdal.cubic,
            "XSCALE": repr(1 / cubic.cols),
            "YSCALE": repr(1 / cubic.rows),
            # Its own estimate still decides how many pixels around a chunk it looks at.
            "SOURCE_EXTRA": str(math.ceil(max(cubic.reach_cols, cubic.reach_rows))),
        }
    # GDAL's average weighs pixels by the area covered, so at equal pixel size it is bilinear
    # interpolation: no seam where one gives way to the other.
    average = stride > 1.001
    return {"resampling": Gdal.average if average else Gdal.bilinear, "XSCALE": "1", "YSCALE": "1"}


def _halves(rows: slice, cols: slice) -> list[tuple[slice, slice]]:
    if rows.stop - rows.start >= cols.stop - cols.start:
        middle = (rows.start + rows.stop) // 2
        return [(slice(rows.start, middle), cols), (slice(middle, rows.stop), cols)]
    middle = (cols.start + cols.stop) // 2
    return [(rows, slice(cols.start, middle)), (rows, slice(middle, cols.stop))]


@lru_cache(maxsize=64)
def _rasterio_crs(crs: CRS) -> rasterio.crs.CRS:
    return rasterio.crs.CRS.from_wkt(crs.to_wkt())


def to_uint8(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Round half up and clip to 0..255, in place where it can be."""
    values += np.asarray(0.5, values.dtype)
    return np.clip(values, 0, 255, out=values).astype(np.uint8)

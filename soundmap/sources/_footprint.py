"""Where one raster lies under a grid of pixels: aligned with it, or warped, or a turn away."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox

from soundmap.grid import crs_of, x_period

Floats = NDArray[np.float64]

_ALIGNED_PX = 1e-2
"""Grids whose corners lie this close to pixel corners count as aligned (native pixels)."""

_CUBIC_REACH = 2.0
"""How far a bicubic kernel reaches from its middle, in pixels that it is stretched to."""

_LATTICE_PX = 32
"""Output pixels between points whose place in the raster is computed exactly."""


def outline(grid: GeoBox, crs: CRS) -> tuple[float, float, float, float] | None:
    """Left, bottom, right and top of a grid in a CRS, generously; None if that cannot be told."""
    height, width = grid.shape
    rows, cols = _lattice(0, height), _lattice(0, width)
    x, y = _apply(grid.affine, *np.meshgrid(cols, rows))
    if grid.crs != crs:
        x, y = project(crs_of(grid), crs, x, y)
        if not np.isfinite(x).all():
            return None
        period = x_period(crs)
        if period and x.max() - x.min() > period / 3:
            return None
    # Between points of the lattice the edge may bulge; a tenth of the extent is ample.
    slack_x, slack_y = 0.1 * (x.max() - x.min()), 0.1 * (y.max() - y.min())
    return (
        float(x.min() - slack_x),
        float(y.min() - slack_y),
        float(x.max() + slack_x),
        float(y.max() + slack_y),
    )


def native_extent(grid: GeoBox, native: GeoBox) -> tuple[int, int, int, int] | None:
    """First and end row, first and end column of a raster's pixels (extended) that hold a grid."""
    height, width = grid.shape
    placed = Placed(0.0, grid.crs == native.crs)
    cols, rows = _native_places(grid, native, placed, _lattice(0, height), _lattice(0, width))
    if np.isnan(cols).all():
        return None
    # Rounding error must not add a row.
    return (
        math.floor(np.nanmin(rows) + _ALIGNED_PX),
        math.ceil(np.nanmax(rows) - _ALIGNED_PX),
        math.floor(np.nanmin(cols) + _ALIGNED_PX),
        math.ceil(np.nanmax(cols) - _ALIGNED_PX),
    )


@dataclass(frozen=True)
class Aligned:
    """The grid's pixels are k x k blocks of native ones: native index = offset + k * index."""

    col: int
    row: int
    kx: int
    ky: int

    @property
    def coincides(self) -> bool:
        """Whether each pixel is one native pixel."""
        return abs(self.kx) == abs(self.ky) == 1


@dataclass(frozen=True)
class Placed:
    """The raster, shifted by whole turns of the globe along x."""

    shift: float
    same_crs: bool


@dataclass(frozen=True)
class Kernel:
    """How many native pixels wide the unit of a bicubic kernel is: 1, or more where stretched."""

    cols: float
    rows: float

    @property
    def reach_cols(self) -> float:
        """Native columns that it reaches from its middle."""
        return _CUBIC_REACH * self.cols

    @property
    def reach_rows(self) -> float:
        """Native rows that it reaches from its middle."""
        return _CUBIC_REACH * self.rows


def kernel(grid: GeoBox, native: GeoBox) -> Kernel | None:
    """Stretch a bicubic kernel by how much coarser a grid is than a raster.

    Where both have one CRS this is the same for every part of the grid. Else it is what is typical
    of the grid given, so grids must be tiles that stand still if parts are to be alike.

    Returns
    -------
    Kernel or None
        None if none of the grid has a place in the raster's CRS.
    """
    if grid.crs == native.crs:
        step = ~native.affine * grid.affine
        cols, rows = math.hypot(step.a, step.b), math.hypot(step.d, step.e)
    else:
        height, width = grid.shape
        r, c = _lattice(0, height), _lattice(0, width)
        steps = _Steps.of(
            *_native_places(grid, native, Placed(0.0, False), r, c), r[1] - r[0], c[1] - c[0]
        )
        if steps is None:
            return None
        cols, rows = steps.per_pixel_col, steps.per_pixel_row
    return Kernel(max(1.0, cols), max(1.0, rows))


def placements(
    grid: GeoBox, native: GeoBox, cubic: Kernel | None = None
) -> Iterator[Aligned | Placed]:
    """Ways in which a raster may meet a grid: one, or two where the globe wraps around.

    With a kernel, only pixels that coincide count as aligned, blocks of them do not.
    """
    # Half a pixel beyond its edge a raster still has a share in interpolated pixels.
    reach = 2.0 if cubic is None else 1 + max(cubic.reach_cols, cubic.reach_rows)
    same = grid.crs == native.crs
    period = x_period(crs_of(native))
    # With the same CRS, x of a grid across the dateline runs on past 180, the raster's does not.
    # With another CRS, x is unwrapped around the block, and may again be a turn away.
    turns = [0.0] if period is None else [0.0, -period, period]
    for shift in turns:
        if same:
            affine = ~native.affine * Affine.translation(-shift, 0) * grid.affine
            if not _meets(affine, grid, native, reach):
                continue
            aligned = alignment(affine, grid)
            if aligned is not None and (cubic is None or aligned.coincides):
                yield aligned
                continue
        yield Placed(shift, same)


def _meets(affine: Affine, grid: GeoBox, native: GeoBox, reach: float) -> bool:
    height, width = grid.shape
    corners = [affine * (c, r) for c in (0, width) for r in (0, height)]
    cols, rows = [c for c, _ in corners], [r for _, r in corners]
    return (
        max(cols) > -reach
        and min(cols) < native.shape[1] + reach
        and max(rows) > -reach
        and min(rows) < native.shape[0] + reach
    )


def alignment(affine: Affine, grid: GeoBox) -> Aligned | None:
    """Tell how a grid's pixels are made of whole native ones; None if they are not.

    ``affine`` leads from pixels of the grid to native ones.
    """
    height, width = grid.shape
    kx, ky = round(affine.a), round(affine.e)
    if kx == 0 or ky == 0:
        return None
    col, row = round(affine.c), round(affine.f)
    for c, r in ((0, 0), (width, 0), (0, height), (width, height)):
        x, y = affine * (c, r)
        if abs(x - col - kx * c) > _ALIGNED_PX or abs(y - row - ky * r) > _ALIGNED_PX:
            return None
    return Aligned(col, row, kx, ky)


@dataclass(frozen=True)
class Footprint:
    """Where a part of the output lies in a raster's pixels."""

    rows: slice
    cols: slice
    """The output pixels that the raster may touch."""
    window: tuple[int, int, int, int]
    """row0, row1, col0, col1 in native pixels; reaches past the raster where the output does."""
    pad_col: int
    """Columns of nothing needed around a raster, so that edge pixels lose their share of it."""
    stride: float
    """Native pixels per output pixel, along the coarser output axis."""
    certain: bool
    """Whether every output pixel's place is known and surely within the window."""


def footprint(
    grid: GeoBox,
    native: GeoBox,
    placed: Placed,
    rows: slice,
    cols: slice,
    cubic: Kernel | None = None,
) -> Footprint | None:
    """Where the given part of a grid lies in a raster; None if it touches nothing of it."""
    r, c = _lattice(rows.start, rows.stop), _lattice(cols.start, cols.stop)
    native_col, native_row = _native_places(grid, native, placed, r, c)
    known = np.isfinite(native_col)
    if not known.any():
        return None
    steps = _Steps.of(native_col, native_row, r[1] - r[0], c[1] - c[0])
    if steps is None:
        return None
    height, width = native.shape
    lost = not known.all()
    # A point that could not be placed may hide up to a step of the raster beside its neighbours.
    around_col, around_row = steps.extent_col, steps.extent_row
    pad_col, pad_row = math.ceil(around_col) + 2, math.ceil(around_row) + 2
    if cubic is not None:
        around_col, around_row = (
            max(around_col, cubic.reach_cols),
            max(around_row, cubic.reach_rows),
        )
        # Wherever a kernel still touches the raster, all of it must find pixels or nothing: GDAL
        # makes up for what lies beyond both.
        pad_col = math.ceil(around_col + cubic.reach_cols) + 2
        pad_row = math.ceil(around_row + cubic.reach_rows) + 2
    reach_col = around_col + 2 + (steps.longest_col if lost else steps.bulge_col)
    reach_row = around_row + 2 + (steps.longest_row if lost else steps.bulge_row)
    low_col, high_col = _spans(native_col)
    low_row, high_row = _spans(native_row)
    touched = (
        (high_col > -reach_col)
        & (low_col < width + reach_col)
        & (high_row > -reach_row)
        & (low_row < height + reach_row)
    )
    if not touched.any():
        return None
    i, j = np.flatnonzero(touched.any(axis=1)), np.flatnonzero(touched.any(axis=0))
    i0, i1, j0, j1 = i[0], i[-1] + 1, j[0], j[-1] + 1
    if lost:
        i0, i1 = max(i0 - 1, 0), min(i1 + 1, touched.shape[0])
        j0, j1 = max(j0 - 1, 0), min(j1 + 1, touched.shape[1])
    return Footprint(
        rows=slice(math.floor(r[i0]), math.ceil(r[i1])),
        cols=slice(math.floor(c[j0]), math.ceil(c[j1])),
        window=(
            max(math.floor(low_row[touched].min() - reach_row), -pad_row),
            min(math.ceil(high_row[touched].max() + reach_row), height + pad_row),
            max(math.floor(low_col[touched].min() - reach_col), -pad_col),
            min(math.ceil(high_col[touched].max() + reach_col), width + pad_col),
        ),
        pad_col=pad_col,
        stride=steps.stride,
        certain=not lost and bool(touched[i0:i1, j0:j1].all()),
    )


@dataclass(frozen=True)
class _Steps:
    """How native places change from one point of the lattice to the next."""

    stride: float
    extent_col: float
    extent_row: float
    """Native pixels that one output pixel reaches over."""
    per_pixel_col: float
    per_pixel_row: float
    """Native pixels per output pixel along native columns and rows, whatever the turn."""
    bulge_col: float
    bulge_row: float
    """How far a place between points may lie beyond them."""
    longest_col: float
    longest_row: float

    @classmethod
    def of(cls, col: Floats, row: Floats, per_row: float, per_col: float) -> _Steps | None:
        col_right, row_right = np.diff(col, axis=1), np.diff(row, axis=1)
        col_down, row_down = np.diff(col, axis=0), np.diff(row, axis=0)
        if not (np.isfinite(col_right).any() and np.isfinite(col_down).any()):
            return None
        right = (_typical(col_right) / per_col, _typical(row_right) / per_col)
        down = (_typical(col_down) / per_row, _typical(row_down) / per_row)
        longest_col = max(_largest(col_right), _largest(col_down))
        longest_row = max(_largest(row_right), _largest(row_down))
        return cls(
            stride=max(math.hypot(*right), math.hypot(*down)),
            extent_col=right[0] + down[0],
            extent_row=right[1] + down[1],
            per_pixel_col=math.hypot(right[0], down[0]),
            per_pixel_row=math.hypot(right[1], down[1]),
            bulge_col=min(
                longest_col,
                _largest(np.diff(col_right, axis=1)) + _largest(np.diff(col_down, axis=0)),
            ),
            bulge_row=min(
                longest_row,
                _largest(np.diff(row_right, axis=1)) + _largest(np.diff(row_down, axis=0)),
            ),
            longest_col=longest_col,
            longest_row=longest_row,
        )


def _typical(steps: Floats) -> float:
    return float(np.nanmedian(np.abs(steps)))


def _largest(steps: Floats) -> float:
    finite = np.abs(steps[np.isfinite(steps)])
    return float(finite.max()) if finite.size else 0.0


def _spans(places: Floats) -> tuple[Floats, Floats]:
    """Least and greatest over the four corners of each square; NaN where no corner is known."""
    corners = (places[:-1, :-1], places[:-1, 1:], places[1:, :-1], places[1:, 1:])
    return np.fmin.reduce(corners), np.fmax.reduce(corners)


def _lattice(start: int, stop: int) -> Floats:
    return np.linspace(start, stop, max(5, math.ceil((stop - start) / _LATTICE_PX) + 1))


def _native_places(
    grid: GeoBox,
    native: GeoBox,
    placed: Placed,
    rows: Floats,
    cols: Floats,
) -> tuple[Floats, Floats]:
    """Native column and row of lattice points; NaN where a point has no place in the CRS."""
    x, y = _apply(grid.affine, *np.meshgrid(cols, rows))
    if not placed.same_crs:
        x, y = project(crs_of(grid), crs_of(native), x, y)
        period = x_period(crs_of(native))
        middle = x[x.shape[0] // 2, x.shape[1] // 2]
        if period and np.isfinite(middle):
            x = middle + (x - middle + period / 2) % period - period / 2
    return _apply(~native.affine, x - placed.shift, y)


def project(source: CRS, target: CRS, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Coordinates in another CRS; NaN in both where a point has none."""
    px, py = source.transformer_to_crs(target)(x, y)
    lost = ~(np.isfinite(px) & np.isfinite(py))
    return np.where(lost, np.nan, px), np.where(lost, np.nan, py)


def _apply(affine: Affine, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    return affine.a * x + affine.b * y + affine.c, affine.d * x + affine.e * y + affine.f

"""Bring the numbers of a model's cells to the cells of a map that are none of them.

Where, and at how many places, a cell of the map is looked up follows from the cell alone: so it
gets the same number whatever else is mapped with it, in units of any size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from soundmap.grid import pixel_lonlat, project_lonlat
from soundmap.lattice import Lattice, Span

# Cells this much larger than the model's are averaged, others interpolated.
_AVERAGE_FROM = 1.5
# How much larger is found out once for a square of so many cells a side.
_SQUARE = 16
_PLACES_AT_ONCE = 16384
# Sizes that differ by rounding alone count as the same.
_SAME = 1e-6
CARRIED_CELLS = 2
"""How far values are carried beyond the imagery's edge, in the model's cells."""

Bools = NDArray[np.bool_]
Values = NDArray[np.float32]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Places:
    """Where cells of a map lie on a lattice: so many places in each of them."""

    cells: NDArray[np.int64]
    """int64[N], the cells, counted row by row in their own grid."""
    row: Floats
    """float64[N, n * n], rows of the lattice; a whole number is the middle of a cell."""
    col: Floats
    """float64[N, n * n], columns; not finite where a place is off the Earth."""


def places_on(lattice: Lattice, grid: GeoBox, chosen: Bools) -> tuple[Places, ...]:
    """Place cells on a lattice, each at the same places whatever grid it is in.

    Cells larger than the model's get places as close to each other as the model's cells are. Every
    place is projected exactly: GDAL approximates along a row, and differently for each row's
    length.

    Parameters
    ----------
    lattice
        The model's cells.
    grid
        The cells of the map, north-up.
    chosen
        bool[h, w], which of them.

    Returns
    -------
    tuple of Places
        Cells with as many places together.
    """
    rows, cols = np.nonzero(chosen)
    counts = _places_along(lattice, grid, rows, cols)
    found = []
    for count in np.unique(counts):
        these = counts == count
        inner = (np.arange(count) + 0.5) / count
        down, right = (part.ravel() for part in np.meshgrid(inner, inner, indexing="ij"))
        lon, lat = pixel_lonlat(grid, cols[these, None] + right, rows[these, None] + down)
        row, col = (part.reshape(lon.shape) for part in _on_lattice(lattice, lon, lat))
        found.append(Places(rows[these] * grid.shape[1] + cols[these], row, col))
    return tuple(found)


def _on_lattice(lattice: Lattice, lon: Floats, lat: Floats) -> tuple[Floats, Floats]:
    """Row and column, float64[N] each, of places; a whole number is the middle of a cell."""
    x, y = project_lonlat(lattice.crs, lon.ravel(), lat.ravel()).T
    width, height = lattice.cell
    return (lattice.anchor[1] - y) / height - 0.5, (x - lattice.anchor[0]) / width - 0.5


def _places_along(
    lattice: Lattice, grid: GeoBox, rows: NDArray[np.int64], cols: NDArray[np.int64]
) -> NDArray[np.int64]:
    """How many places along a side each cell gets: int64[N]."""
    a, _, c, _, e, f, *_ = grid.affine
    # Squares are counted from the origin of the CRS, so that no grid can move them.
    square_row = np.floor((f / e + rows + 0.5) / _SQUARE + _SAME).astype(np.int64)
    square_col = np.floor((c / a + cols + 0.5) / _SQUARE + _SAME).astype(np.int64)
    both = np.column_stack([square_row, square_col])
    squares, member = np.unique(both, axis=0, return_inverse=True)
    row = (squares[:, 0] + 0.5) * _SQUARE - f / e
    col = (squares[:, 1] + 0.5) * _SQUARE - c / a
    size = np.zeros(len(squares))
    for down, right in ((0.5, 0.0), (0.0, 0.5)):
        ends = [
            _on_lattice(lattice, *pixel_lonlat(grid, col + side * right, row + side * down))
            for side in (-1, 1)
        ]
        step = np.hypot(ends[1][0] - ends[0][0], ends[1][1] - ends[0][1])
        size = np.maximum(size, np.where(np.isfinite(step), step, 0.0))
    averaged = size > _AVERAGE_FROM * (1 + _SAME)
    counts = np.where(averaged, np.ceil(size * (1 - _SAME)), 1).astype(np.int64)
    return np.asarray(counts[member.ravel()])


def span_under(places: tuple[Places, ...]) -> Span | None:
    """Smallest span of lattice cells that places are interpolated from; None if there is none."""
    row = np.concatenate([p.row.ravel() for p in places]) if places else np.empty(0)
    col = np.concatenate([p.col.ravel() for p in places]) if places else np.empty(0)
    known = np.isfinite(row) & np.isfinite(col)
    if not known.any():
        return None
    row, col = row[known], col[known]
    low, high = (np.floor(row.min()), np.floor(col.min())), (row.max(), col.max())
    bottom, right = (int(np.ceil(value)) + 1 for value in high)
    return Span(int(low[0]), bottom, int(low[1]), right)


def cells_under(places: tuple[Places, ...], span: Span) -> Bools:
    """Which cells of a span places are interpolated from: bool[h, w]."""
    height, width = span.shape
    under = np.zeros((height, width), bool)
    for group in places:
        known = np.isfinite(group.row) & np.isfinite(group.col)
        row, col = group.row[known] - span.row0, group.col[known] - span.col0
        for r in (np.floor(row), np.ceil(row)):
            for c in (np.floor(col), np.ceil(col)):
                inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
                under[r[inside].astype(np.int64), c[inside].astype(np.int64)] = True
    return under


def with_neighbours_of_gaps(under: Bools, valid: Bools) -> Bools:
    """Add what a value is carried from to cells without imagery: bool[h, w]."""
    gaps = under & ~valid
    if not gaps.any():
        return under
    side = 2 * CARRIED_CELLS + 1
    near = sliding_window_view(np.pad(gaps, CARRIED_CELLS), (side, side)).any(axis=(2, 3))
    return np.asarray(under | near)


def warp(
    values: Values, span: Span, places: tuple[Places, ...]
) -> tuple[Values, NDArray[np.int64]]:
    """Bring values from a lattice to the cells of a map.

    Values are carried two of the model's cells out over the imagery's edge, for cells that are half
    beyond it. A cell is the mean of its places, each interpolated between known values.

    Parameters
    ----------
    values
        float32[C, h, w] of the span's cells, NaN where there is none.
    span
        Which cells of the lattice they are.
    places
        From `places_on`.

    Returns
    -------
    tuple
        float32[C, N], NaN where nothing is known near, and int64[N], the cells that they belong to.
    """
    if np.isnan(values[0][cells_under(places, span)]).any():
        values = _spread(values)
    results, cells = [], []
    for group in places:
        # A few cells at a time: what fits the caches is faster, and little is held.
        step = max(1, _PLACES_AT_ONCE // group.row.shape[1])
        for start in range(0, len(group.cells), step):
            part = slice(start, start + step)
            row, col = group.row[part] - span.row0, group.col[part] - span.col0
            fine = _bilinear(values, row.ravel(), col.ravel()).reshape(len(values), *row.shape)
            known = np.isfinite(fine)
            count = known.sum(axis=2)
            total = np.where(known, fine, 0).sum(axis=2)
            mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
            results.append(mean.astype(np.float32))
            cells.append(group.cells[part])
    return np.concatenate(results, axis=1), np.concatenate(cells)


def _spread(values: Values) -> Values:
    """Carry values some cells out over the imagery's edge."""
    height, width = values.shape[1:]
    out = np.pad(values, ((0, 0), (1, 1), (1, 1)), constant_values=np.nan)
    for _ in range(CARRIED_CELLS):
        known = np.isfinite(out[0])
        near = sliding_window_view(known, (3, 3)).any(axis=(2, 3))
        rows, cols = np.nonzero(near & ~known[1:-1, 1:-1])
        total = np.zeros((len(out), len(rows)), np.float32)
        count = np.zeros(len(rows), np.float32)
        for down in range(3):
            for right in range(3):
                there = known[rows + down, cols + right]
                count += there
                total[:, there] += out[:, rows[there] + down, cols[there] + right]
        out[:, rows + 1, cols + 1] = total / count
    return out[:, 1 : height + 1, 1 : width + 1]


def _bilinear(values: Values, row: Floats, col: Floats) -> Values:
    """Interpolate float32[C, H, W] at fractional cells: float32[C, N], from known cells."""
    height, width = values.shape[1:]
    known_at = np.isfinite(row) & np.isfinite(col)
    row0 = np.floor(np.where(known_at, row, -9)).astype(np.int64)
    col0 = np.floor(np.where(known_at, col, -9)).astype(np.int64)
    total = np.zeros((len(values), len(row)), np.float32)
    weights = np.zeros(len(row), np.float32)
    for down in (0, 1):
        for right in (0, 1):
            r, c = row0 + down, col0 + right
            inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
            r, c = np.where(inside, r, 0), np.where(inside, c, 0)
            near = (1 - np.abs(row - r)) * (1 - np.abs(col - c))
            known = inside & np.isfinite(values[0, r, c])
            weight = np.where(known, near, 0).astype(np.float32)
            total += np.where(known, values[:, r, c], 0) * weight
            weights += weight
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Values = np.where(weights > 0, total / weights, np.float32(np.nan))
    return result

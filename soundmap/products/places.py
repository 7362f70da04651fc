"""What a finished map says of places: the mean of a polygon's cells, the cell under a point.

Shapes are brought to cell coordinates, where cell (row, column) is the square from (column, row)
to (column + 1, row + 1), and are asked there. The map is read block by block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyproj
import shapely
import xarray as xr
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from pyproj.exceptions import ProjError

from soundmap.errors import InputError
from soundmap.grid import crs_of, x_period

_BLOCK = 512
"""Edge in cells of what is read of a map at once."""

_MAX_STEP_M = 2000.0
"""Edges are cut to this length before they are bent into another CRS: a step of 2 km strays from
its curve by less than 0.1 m."""

_METRES_PER_DEGREE = 111_320.0

# A longitude step this long within one edge of a lon/lat file is read as a polygon drawn across
# the 180th meridian, as regions are.
_SEAM_JUMP = 300 / 360

_MANY_CELLS = 1_000_000
_WHOLE = 0.99

_POINTS = (shapely.GeometryType.POINT, shapely.GeometryType.MULTIPOINT)
_POLYGONS = (shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Shapes = NDArray[np.object_]


@dataclass(frozen=True)
class PlaceValues:
    """What a map says of N places. A place has a value or one reason why not."""

    values: Floats
    """float64[N, C], NaN for places without a value."""
    empty: Bools
    """bool[N], there is no geometry."""
    other: Bools
    """bool[N], neither polygon nor point."""
    off_map: Bools
    """bool[N], no cell of the map there."""
    nodata: Bools
    """bool[N], cells without a value alone."""
    partly: Bools
    """bool[N], has a value, but lies in part off the map or on nodata."""
    spots: Ints
    """int64[N], the same number for points in one cell; polygons have one each."""


def values_at(values: xr.DataArray, grid: GeoBox, shapes: Shapes, crs: pyproj.CRS) -> PlaceValues:
    """Read a map at places.

    Parameters
    ----------
    values
        float32[concept, y, x], NaN where there is no value; read in parts.
    grid
        Its cells.
    shapes
        N polygons and points, also of many parts, None for none; polygons across the 180th
        meridian may be cut there, run on over it, or jump to its other side.
    crs
        CRS of the shapes.

    Returns
    -------
    PlaceValues
        A polygon has the mean of the cells whose centres lie inside, its outline included; if no
        centre does, of the cells that it touches. A point has the cell that holds it; several
        points have the mean of theirs.
    """
    kinds = np.array([shapely.get_type_id(one) for one in shapes], dtype=np.int64)
    empty = shapely.is_missing(shapes) | shapely.is_empty(shapes)
    areal, dotted = np.isin(kinds, _POLYGONS) & ~empty, np.isin(kinds, _POINTS) & ~empty
    total = _Sums(len(shapes), values.shape[0])
    size = (int(grid.shape[0]), int(grid.shape[1]))
    period = x_period(crs_of(grid))
    period_cells = abs(period / grid.affine.a) if period else None

    polygons = _Polygons.of(shapes, areal, crs, grid, period_cells)
    points = _cells_of_points(shapes, dotted, crs, grid, period_cells)
    for rows, cols in _blocks_with(polygons, points, size):
        block = _read(values, rows, cols)
        total.add_cells(block, rows, cols, points)
        for owner, shape in polygons.within(rows, cols):
            total.add_inside(block, rows, cols, owner, shape)

    slivers = polygons.touched(total.cells == 0, size)
    for rows, cols in _blocks_with(None, slivers, size):
        total.add_cells(_read(values, rows, cols), rows, cols, slivers)

    known = total.valid > 0
    return PlaceValues(
        values=total.means(),
        empty=empty,
        other=~(empty | areal | dotted),
        off_map=(areal | dotted) & (total.cells == 0),
        nodata=(total.cells > 0) & ~known,
        partly=known & ((total.valid < total.cells) | polygons.cut(len(shapes), size)),
        spots=_spots(len(shapes), points, size),
    )


@dataclass(frozen=True)
class _Cells:
    """Cells on the map that features have, each once."""

    owner: Ints
    row: Ints
    col: Ints

    @classmethod
    def of(cls, owner: Ints, row: Ints, col: Ints) -> _Cells:
        found = np.unique(np.stack([owner, row, col]), axis=1)
        return cls(found[0], found[1], found[2])

    def within(self, rows: slice, cols: slice) -> _Cells:
        kept = (self.row >= rows.start) & (self.row < rows.stop)
        kept &= (self.col >= cols.start) & (self.col < cols.stop)
        return _Cells(self.owner[kept], self.row[kept], self.col[kept])


class _Sums:
    """Sums over the cells of each feature."""

    def __init__(self, features: int, concepts: int) -> None:
        self.total = np.zeros((features, concepts))
        self.valid = np.zeros(features, np.int64)
        self.cells = np.zeros(features, np.int64)

    def add_cells(
        self, block: NDArray[np.float32], rows: slice, cols: slice, cells: _Cells
    ) -> None:
        inside = cells.within(rows, cols)
        found = block[:, inside.row - rows.start, inside.col - cols.start].T
        ok = np.isfinite(found).all(axis=1)
        np.add.at(self.cells, inside.owner, 1)
        np.add.at(self.valid, inside.owner[ok], 1)
        np.add.at(self.total, inside.owner[ok], found[ok])

    def add_inside(
        self,
        block: NDArray[np.float32],
        rows: slice,
        cols: slice,
        owner: int,
        shape: shapely.Geometry,
    ) -> None:
        col0, row0, col1, row1 = _window(shape)
        row0, row1 = max(row0, rows.start), min(row1, rows.stop)
        col0, col1 = max(col0, cols.start), min(col1, cols.stop)
        inside = _centres_inside(shape, row0, row1, col0, col1)
        if not inside.any():
            return
        part = block[
            :,
            row0 - rows.start : row1 - rows.start,
            col0 - cols.start : col1 - cols.start,
        ][:, inside]
        ok = np.isfinite(part).all(axis=0)
        self.cells[owner] += part.shape[1]
        self.valid[owner] += int(ok.sum())
        self.total[owner] += part[:, ok].sum(axis=1, dtype=np.float64)

    def means(self) -> Floats:
        count = self.valid[:, None]
        return np.divide(self.total, count, out=np.full(self.total.shape, np.nan), where=count > 0)


@dataclass(frozen=True)
class _Polygons:
    """Polygons in cell coordinates, near the map; one across the map's seam may be there twice."""

    owner: Ints
    shapes: Shapes
    tree: shapely.STRtree

    @classmethod
    def of(
        cls, shapes: Shapes, chosen: Bools, crs: pyproj.CRS, grid: GeoBox, period: float | None
    ) -> _Polygons:
        owner = np.flatnonzero(chosen)
        drawn, placed = _polygons_to_cells(shapes[chosen], crs, grid, period)
        owner, drawn = owner[placed], drawn[placed]
        index, moved = _turned(drawn, period, int(grid.shape[1]))
        height = float(grid.shape[0])
        bounds = shapely.bounds(moved).reshape(-1, 4)
        near = (bounds[:, 3] > 0) & (bounds[:, 1] < height)
        kept = moved[near]
        shapely.prepare(kept)
        return cls(owner[index[near]], kept, shapely.STRtree(kept))

    def within(self, rows: slice, cols: slice) -> Iterator[tuple[int, shapely.Geometry]]:
        box = shapely.box(cols.start, rows.start, cols.stop, rows.stop)
        for i in np.sort(self.tree.query(box, predicate="intersects")):
            yield int(self.owner[i]), self.shapes[i]

    def touched(self, wanted: Bools, shape: tuple[int, int]) -> _Cells:
        """Cells that polygons touch which hold no cell's centre, on the map or beside it."""
        found: list[tuple[int, Ints, Ints]] = []
        for i in np.flatnonzero(wanted[self.owner]):
            one = self.shapes[i]
            col0, row0, col1, row1 = _window(one)
            # One that is so large has centres inside, but none of them on the map.
            if (row1 - row0) * (col1 - col0) > _MANY_CELLS:
                continue
            if _centres_inside(one, row0, row1, col0, col1).any():
                continue
            row0, row1 = max(row0, 0), min(row1, shape[0])
            col0, col1 = max(col0, 0), min(col1, shape[1])
            row, col = (part.ravel() for part in np.mgrid[row0:row1, col0:col1])
            cells = shapely.box(col, row, col + 1, row + 1)
            hit = shapely.intersects(one, cells) & ~shapely.touches(one, cells)
            found.append((int(self.owner[i]), row[hit], col[hit]))
        owner = [np.full(len(row), one, np.int64) for one, row, _ in found]
        none = np.zeros(0, np.int64)
        return _Cells.of(
            np.concatenate([none, *owner]),
            np.concatenate([none, *(row for _, row, _ in found)]),
            np.concatenate([none, *(col for _, _, col in found)]),
        )

    def cut(self, features: int, shape: tuple[int, int]) -> Bools:
        """Whether polygons reach beyond the map's edge: bool[features]."""
        bounds = shapely.bounds(self.shapes).reshape(-1, 4)
        height, width = shape
        beyond = (bounds[:, :2] < 0).any(axis=1)
        beyond |= (bounds[:, 2] > width) | (bounds[:, 3] > height)
        inside, area = np.zeros(features), np.zeros(features)
        frame = shapely.box(0, 0, width, height)
        for i in np.flatnonzero(beyond):
            inside[self.owner[i]] += shapely.area(shapely.intersection(self.shapes[i], frame))
            area[self.owner[i]] = shapely.area(self.shapes[i])
        return inside < _WHOLE * area


def _window(shape: shapely.Geometry) -> tuple[int, int, int, int]:
    """First column and row, and last ones plus one, of cells that a shape may touch."""
    left, top, right, bottom = shapely.bounds(shape)
    return math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)


def _centres_inside(shape: shapely.Geometry, row0: int, row1: int, col0: int, col1: int) -> Bools:
    col, row = np.meshgrid(np.arange(col0, col1) + 0.5, np.arange(row0, row1) + 0.5)
    return np.asarray(shapely.intersects_xy(shape, col, row))


def _read(values: xr.DataArray, rows: slice, cols: slice) -> NDArray[np.float32]:
    return np.asarray(values[:, rows, cols].to_numpy(), dtype=np.float32)


def _blocks_with(
    polygons: _Polygons | None, cells: _Cells, shape: tuple[int, int]
) -> Iterator[tuple[slice, slice]]:
    """Blocks of the map that any feature needs, row by row."""
    height, width = shape
    wide = -(-width // _BLOCK)
    busy = set(np.unique(cells.row // _BLOCK * wide + cells.col // _BLOCK).tolist())
    for number in range(-(-height // _BLOCK) * wide):
        row, col = number // wide * _BLOCK, number % wide * _BLOCK
        rows, cols = slice(row, min(row + _BLOCK, height)), slice(col, min(col + _BLOCK, width))
        if number in busy or (
            polygons is not None and next(polygons.within(rows, cols), None) is not None
        ):
            yield rows, cols


def _spots(features: int, points: _Cells, size: tuple[int, int]) -> Ints:
    """One number for single points in the same cell, another for each of the rest."""
    height, width = size
    spots = height * width + np.arange(features, dtype=np.int64)
    single = np.bincount(points.owner, minlength=features)[points.owner] == 1
    spots[points.owner[single]] = points.row[single] * width + points.col[single]
    return spots


# --- into cell coordinates -------------------------------------------------------------------


def _to_cells(crs: pyproj.CRS, grid: GeoBox, xy: Floats) -> Floats:
    """Cell coordinates (column, row) of places float64[N, 2]; not finite where there are none."""
    target = crs_of(grid).proj
    if crs != target:
        try:
            transformer = pyproj.Transformer.from_crs(crs, target, always_xy=True)
        except ProjError as error:
            raise InputError(
                f"places in {crs.name} cannot be brought to the map's CRS, {target.name}"
            ) from error
        xy = np.column_stack(transformer.transform(xy[:, 0], xy[:, 1]))
    affine = grid.affine
    return np.column_stack([(xy[:, 0] - affine.c) / affine.a, (xy[:, 1] - affine.f) / affine.e])


def _cells_of_points(
    shapes: Shapes, chosen: Bools, crs: pyproj.CRS, grid: GeoBox, period: float | None
) -> _Cells:
    xy, index = shapely.get_coordinates(shapes[chosen], return_index=True)
    col, row = _to_cells(crs, grid, xy).T
    height, width = grid.shape
    if period:
        col = np.where(np.isfinite(col), col % period, col)
    on = (col >= 0) & (col < width) & (row >= 0) & (row < height)
    owner = np.flatnonzero(chosen)[index[on]]
    return _Cells.of(owner.astype(np.int64), row[on].astype(np.int64), col[on].astype(np.int64))


def _polygons_to_cells(
    shapes: Shapes, crs: pyproj.CRS, grid: GeoBox, period: float | None
) -> tuple[Shapes, Bools]:
    """Polygons in cell coordinates, and whether each could be drawn there.

    One that leaves what the map's CRS can show, or goes around a pole of it, cannot.
    """
    if crs.is_geographic:
        turn = 2 * math.pi / crs.axis_info[0].unit_conversion_factor
        shapes, _ = _unrolled(shapes, turn, _SEAM_JUMP)
    shapes = np.array([_valid(one) for one in shapes], dtype=object)
    if crs != crs_of(grid).proj:
        unit_m = crs.axis_info[0].unit_conversion_factor
        if crs.is_geographic:
            unit_m = math.degrees(unit_m) * _METRES_PER_DEGREE
        shapes = shapely.segmentize(shapes, _MAX_STEP_M / unit_m)
    drawn = shapely.transform(shapes, lambda xy: _to_cells(crs, grid, xy))
    xy, index = shapely.get_coordinates(drawn, return_index=True)
    placed = ~shapely.is_empty(drawn)
    placed[index[~np.isfinite(xy).all(axis=1)]] = False
    if period:
        drawn[placed], closed = _unrolled(drawn[placed], period, 0.5)
        placed[np.flatnonzero(placed)[~closed]] = False
    return drawn, placed


def _valid(shape: shapely.Geometry) -> shapely.Geometry:
    """The same area as valid polygons."""
    if shapely.is_valid(shape):
        return shape
    parts = shapely.get_parts(shapely.get_parts([shapely.make_valid(shape)]))
    return shapely.union_all(parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON])


def _unrolled(shapes: Shapes, period: float, jump: float) -> tuple[Shapes, Bools]:
    """Walk each ring with continuous x, where x comes again after ``period``.

    Parameters
    ----------
    shapes
        Polygons [N].
    period
        What x grows by in going once around.
    jump
        Share of the period from which on a step is one to the other side.

    Returns
    -------
    tuple
        The polygons, and bool[N] whether each ring came back to where it began.
    """
    polygons, shape_of = shapely.get_parts(shapes, return_index=True)
    rings, polygon_of = shapely.get_rings(polygons, return_index=True)
    if not len(rings):
        return shapes, np.ones(len(shapes), dtype=bool)
    xy, ring = shapely.get_coordinates(rings, return_index=True)
    step = np.diff(xy[:, 0])
    # One of a whole period is the edge of a box around the globe.
    far = (np.abs(step) > jump * period) & (np.abs(step) < period * (1 - 1e-9))
    far &= ring[1:] == ring[:-1]
    if not far.any():
        return shapes, np.ones(len(shapes), dtype=bool)
    turns = np.concatenate([[0.0], np.cumsum(np.where(far, -np.round(step / period), 0.0))])
    starts = np.flatnonzero(np.append(True, ring[1:] != ring[:-1]))
    turns -= turns[starts][ring]
    ends = np.append(starts[1:], len(ring)) - 1
    closed = np.ones(len(shapes), dtype=bool)
    closed[shape_of[polygon_of[turns[ends] != 0]]] = False
    turns[turns[ends][ring] != 0] = 0

    x = xy[:, 0] + turns * period
    # Holes go to the turn of their shell: each polygon's first ring.
    left = np.minimum.reduceat(x, starts)
    shell = np.flatnonzero(np.append(True, polygon_of[1:] != polygon_of[:-1]))
    behind = np.ceil((left[shell][polygon_of] - left) / period - 1e-6)
    x += behind[ring] * period
    moved = np.column_stack([x, xy[:, 1]])
    return shapely.transform(shapes, lambda _: moved), closed


def _turned(shapes: Shapes, period: float | None, width: int) -> tuple[Ints, Shapes]:
    """Polygons moved by whole turns to wherever they meet the map's columns, and which each is."""
    bounds = shapely.bounds(shapes).reshape(-1, 4)
    left, right = bounds[:, 0], bounds[:, 2]
    if not period:
        index = np.flatnonzero((right > 0) & (left < width))
        return index, shapes[index]
    first = np.floor(-right / period).astype(np.int64) + 1
    last = np.ceil((width - left) / period).astype(np.int64) - 1
    count = np.maximum(last - first + 1, 0)
    index = np.repeat(np.arange(len(shapes)), count)
    begin = np.cumsum(count) - count
    turn = first[index] + np.arange(len(index)) - begin[index]
    moved = shapes[index]
    by = np.repeat(turn * period, shapely.get_num_coordinates(moved))
    return index, shapely.transform(moved, lambda xy: xy + np.column_stack([by, 0 * by]))

"""What a run has to do: which units of the grid touch the region, and what they will cost.

A unit is a square block of cells that one task computes and writes. The units tile the grid, so
every cell is in exactly one; those off the region are left out. A plan holds only indices, and
builds a unit when it is asked for it: a hundred thousand units cost no more than an array.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import shapely
from numpy.typing import NDArray
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox
from shapely.geometry.base import BaseGeometry

from soundmap.area import Area
from soundmap.errors import InputError, UsageError
from soundmap.grid import (
    block,
    crs_of,
    pixel_lonlat,
    pixel_xy,
    points_all_over,
    project_lonlat,
    within_map,
    x_period,
)
from soundmap.region import Region, polygons_of, region_from_geobox

# In cells: how closely curved outlines are followed, and by how much units are widened for it.
_CURVE_TOLERANCE = 0.02
_WIDEN = 0.05
# In cells: units that share no more than this with the region only touch its edge.
_EDGE = 1e-6
_EDGE_SAMPLES = 48
# In degrees: beyond it the inside and the outside of an outline can be mistaken for each other.
_HEMISPHERE = 80.0
_MAX_ROUNDS = 20
_LONLAT = CRS("EPSG:4326")
_MAX_NEW_POINTS = 2_000_000

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Unit:
    """A block of cells that one task computes and writes."""

    index: tuple[int, int]
    """Row and column of the unit among all units of the grid."""
    row0: int
    """First row of cells."""
    row1: int
    """Row of cells after the last."""
    col0: int
    """First column of cells."""
    col1: int
    """Column of cells after the last."""
    cells: GeoBox
    """The cells' own grid, shape ``(row1 - row0, col1 - col0)``."""


class UnitSequence(Sequence[Unit]):
    """The units of a plan, row by row; each is built when it is asked for."""

    def __init__(self, grid: GeoBox, unit_cells: int, indices: Ints) -> None:
        """Keep the grid, the unit's side in cells and int64[N, 2] unit rows and columns."""
        self._grid = grid
        self._unit_cells = unit_cells
        self._indices = indices.copy()
        self._indices.flags.writeable = False

    @property
    def indices(self) -> Ints:
        """int64[N, 2]: row and column of every unit, read-only."""
        return self._indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, key: int) -> Unit: ...
    @overload
    def __getitem__(self, key: slice) -> UnitSequence: ...
    def __getitem__(self, key: int | slice) -> Unit | UnitSequence:
        if isinstance(key, slice):
            return UnitSequence(self._grid, self._unit_cells, self._indices[key])
        row, col = self._indices[key].tolist()
        side = self._unit_cells
        height, width = self._grid.shape
        row0, row1 = row * side, min((row + 1) * side, height)
        col0, col1 = col * side, min((col + 1) * side, width)
        cells = block(self._grid, row0, row1, col0, col1)
        return Unit((row, col), row0, row1, col0, col1, cells)

    def at(self, positions: Ints) -> UnitSequence:
        """Choose units by their positions, int64[M]."""
        return UnitSequence(self._grid, self._unit_cells, self._indices[positions])

    def __iter__(self) -> Iterator[Unit]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"<{len(self)} units of up to {self._unit_cells} x {self._unit_cells} cells>"


@dataclass(frozen=True)
class Plan:
    """Everything that a run will compute, and what identifies it."""

    grid: GeoBox
    """All output cells."""
    unit_cells: int
    """Side of a unit, in cells."""
    region: Region
    """What was asked for, the mask aside."""
    area: Area | None
    """Cells whose centre lies outside are nodata; None: every cell of the units is wanted."""
    units: UnitSequence
    """The units that region and mask touch; none if they lie off the grid."""
    fingerprint: str
    """SHA-256, in hexadecimal, of ``facts``."""
    facts: Mapping[str, str]
    """All that decides the numbers: what the caller gave, and the geometry."""


def make_plan(
    region: Region,
    grid: GeoBox,
    unit_cells: int,
    facts: Mapping[str, str] | None = None,
    mask: Region | None = None,
) -> Plan:
    """Plan the units of a grid that a region touches.

    Parameters
    ----------
    region
        The area to map.
    grid
        All output cells, in any CRS.
    unit_cells
        Side of a unit in cells; at the grid's far edges units are cut off.
    facts
        What else decides the numbers (model, bank, source, options), as text.
    mask
        Where values are wanted within the region, such as land: units off it are left out, and
        cells whose centre lies off it are nodata.

    Returns
    -------
    Plan
        Without a unit if the region does not touch the grid, or the mask not both.

    Raises
    ------
    UsageError
        If ``unit_cells`` is less than 1.
    InputError
        If the grid has no CRS.
    """
    if unit_cells < 1:
        raise UsageError(f"a unit needs at least one cell, not {unit_cells}")
    crs_of(grid)
    geometry: BaseGeometry = region.geometry
    if mask is not None:
        geometry = polygons_of(shapely.intersection(geometry, mask.geometry))
    units = UnitSequence(grid, unit_cells, _touched(geometry, grid, unit_cells))
    area = Area(geometry) if mask is not None or region.clip else None
    everything = _all_facts(facts or {}, grid, unit_cells, region, mask)
    return Plan(grid, unit_cells, region, area, units, _digest(everything), everything)


def fingerprint_of(
    facts: Mapping[str, str],
    grid: GeoBox,
    unit_cells: int,
    region: Region,
    mask: Region | None = None,
) -> str:
    """Identity of a run: SHA-256 over the facts, the grid, the unit size, the region and the mask.

    The labels of region and mask and the order of their parts do not count.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    return _digest(_all_facts(facts, grid, unit_cells, region, mask))


def _all_facts(
    facts: Mapping[str, str], grid: GeoBox, unit_cells: int, region: Region, mask: Region | None
) -> dict[str, str]:
    # Runs without a mask keep the fingerprints that they had before there were masks.
    of_mask = {} if mask is None else {"mask": _digest_of_area(mask)}
    return (
        dict(facts)
        | of_mask
        | {
            "grid_crs": _crs_text(grid),
            "grid_affine": " ".join(repr(float(v)) for v in tuple(grid.affine)[:6]),
            "grid_shape": " ".join(str(n) for n in grid.shape),
            "unit_cells": str(unit_cells),
            "region": _digest_of_area(region),
            "region_clip": str(region.clip).lower(),
        }
    )


def _digest_of_area(region: Region) -> str:
    area = shapely.to_wkb(shapely.normalize(region.geometry), byte_order=1)
    return hashlib.sha256(area).hexdigest()


def _digest(facts: Mapping[str, str]) -> str:
    text = json.dumps(dict(facts), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _crs_text(grid: GeoBox) -> str:
    crs = crs_of(grid).proj
    # The WKT of one EPSG code changes with the release of PROJ; its code does not.
    code = crs.to_authority(min_confidence=100)
    return ":".join(code) if code else crs.to_wkt()


def _touched(geometry: BaseGeometry, grid: GeoBox, unit_cells: int) -> Ints:
    """Row and column of the units that lon/lat polygons touch, int64[N, 2], row by row."""
    height, width = grid.shape
    shape = (-(-height // unit_cells), -(-width // unit_cells))
    if not height or not width or geometry.is_empty:
        return np.empty((0, 2), dtype=np.int64)
    area = _in_pixels(geometry, grid)
    if area is None:
        return _touched_by_samples(geometry, grid, unit_cells, shape)
    # Curved outlines are a little off; straight ones, in degrees, are where they are.
    exact = crs_of(grid).geographic
    found = _touched_by_halving(area, grid, unit_cells, shape, -_EDGE if exact else _WIDEN)
    if exact and not len(found):
        # A region thinner than the margin still belongs somewhere.
        found = _touched_by_halving(area, grid, unit_cells, shape, _EDGE)
    return found


def _touched_by_halving(
    area: BaseGeometry, grid: GeoBox, side: int, shape: tuple[int, int], widen: float
) -> Ints:
    """Quarter the grid down to single units, and drop what is off the area on the way.

    ``area`` is in pixel coordinates. Blocks wholly inside are not quartered further, so that the
    work goes with the length of the outline, not with the number of units.
    """
    shapely.prepare(area)
    height, width = grid.shape
    nodes = np.array([[0, shape[0], 0, shape[1]]], dtype=np.int64)  # row0, row1, col0, col1
    found: list[Ints] = []
    while len(nodes):
        row0, row1, col0, col1 = nodes.T
        boxes = shapely.box(
            col0 * side - widen,
            row0 * side - widen,
            np.minimum(col1 * side, width) + widen,
            np.minimum(row1 * side, height) + widen,
        )
        near = shapely.intersects(area, boxes)
        nodes, boxes = nodes[near], boxes[near]
        single = (nodes[:, 1] - nodes[:, 0] == 1) & (nodes[:, 3] - nodes[:, 2] == 1)
        done = single | shapely.covers(area, boxes)
        found.append(nodes[single][:, [0, 2]])
        for r0, r1, c0, c1 in nodes[done & ~single].tolist():
            found.append(np.mgrid[r0:r1, c0:c1].reshape(2, -1).T)
        row0, row1, col0, col1 = nodes[~done].T
        row, col = (row0 + row1 + 1) // 2, (col0 + col1 + 1) // 2
        quarters = [
            (top, bottom, left, right)
            for top, bottom in ((row0, row), (row, row1))
            for left, right in ((col0, col), (col, col1))
        ]
        nodes = np.concatenate([np.column_stack(q) for q in quarters])
        nodes = nodes[(nodes[:, 1] > nodes[:, 0]) & (nodes[:, 3] > nodes[:, 2])]
    indices = np.concatenate(found)
    return indices[np.lexsort((indices[:, 1], indices[:, 0]))]


def _touched_by_samples(
    geometry: BaseGeometry, grid: GeoBox, side: int, shape: tuple[int, int]
) -> Ints:
    """Units that may touch the region, where the region cannot be drawn on the grid's map.

    Corners, edge middles and centre of every unit are brought to lon/lat. A unit is kept if its
    centre is nearer to the region than one and a half times the farthest of them; units at the
    edge of the Earth are sampled more closely. Too many rather than too few.
    """
    height, width = grid.shape
    edge_rows = np.minimum(np.arange(2 * shape[0] + 1) * side / 2, height)
    edge_cols = np.minimum(np.arange(2 * shape[1] + 1) * side / 2, width)
    col, row = np.meshgrid(edge_cols, edge_rows)
    samples = np.stack(pixel_lonlat(grid, col, row))
    nine = np.stack(
        [
            samples[:, i : i + 2 * shape[0] : 2, j : j + 2 * shape[1] : 2]
            for i in range(3)
            for j in range(3)
        ]
    )  # [9, 2, rows, cols] of units
    around = shapely.union_all([_moved(geometry, 360.0 * turn) for turn in (-1, 0, 1)])
    shapely.prepare(around)

    keep = _hit_by_points(geometry, grid, side, shape)
    on_earth = np.isfinite(nine).all(axis=1)  # [9, rows, cols]
    whole = on_earth.all(axis=0)
    lon, lat = nine[:, 0][:, whole], nine[:, 1][:, whole]
    reach = 1.5 * _apart(lon - lon[4], lat - lat[4]).max(axis=0)
    keep[whole] |= shapely.dwithin(around, shapely.points(lon[4], lat[4]), reach)

    some = np.pad(on_earth.any(axis=0), 1)
    beside = np.zeros(shape, dtype=bool)
    for i in range(3):
        for j in range(3):
            beside |= some[i : i + shape[0], j : j + shape[1]]
    for i, j in np.argwhere(beside & ~whole & ~keep).tolist():
        row0, row1 = i * side, min((i + 1) * side, height)
        col0, col1 = j * side, min((j + 1) * side, width)
        # The cells' own centres, unless there are too many of them.
        rows = np.linspace(row0 + 0.5, row1 - 0.5, min(row1 - row0, _EDGE_SAMPLES))
        cols = np.linspace(col0 + 0.5, col1 - 0.5, min(col1 - col0, _EDGE_SAMPLES))
        lon, lat = pixel_lonlat(grid, *np.meshgrid(cols, rows))
        steps = [_apart(np.diff(lon, axis=k), np.diff(lat, axis=k)).ravel() for k in (0, 1)]
        far = 1.5 * float(np.nanmax(np.concatenate([*steps, [0.0]])))
        known = np.isfinite(lon)
        near = shapely.dwithin(around, shapely.points(lon[known], lat[known]), far)
        keep[i, j] = bool(np.any(near))
    return np.argwhere(keep)


def _apart(lon: Floats, lat: Floats) -> Floats:
    """Length in degrees of steps in longitude, the short way round, and latitude."""
    turn = np.abs(lon)
    length: Floats = np.hypot(np.minimum(turn, 360 - turn), lat)
    return length


def _hit_by_points(
    geometry: BaseGeometry, grid: GeoBox, side: int, shape: tuple[int, int]
) -> NDArray[np.bool_]:
    """Units, bool[rows, cols], on which points spread over the region come to lie."""
    lonlat = points_all_over(geometry)
    x, y = project_lonlat(crs_of(grid), lonlat[:, 0], lonlat[:, 1]).T
    a, b, c, d, e, f, *_ = ~grid.affine
    hit = np.zeros(shape, dtype=bool)
    with np.errstate(invalid="ignore"):
        unit = np.floor(np.column_stack([d * x + e * y + f, a * x + b * y + c]) / side)
        unit = unit[((unit >= 0) & (unit < shape)).all(axis=1)].astype(np.int64)
    hit[unit[:, 0], unit[:, 1]] = True
    return hit


def _in_pixels(geometry: BaseGeometry, grid: GeoBox) -> BaseGeometry | None:
    """Lon/lat polygons in the grid's pixel coordinates; None where that cannot be trusted."""
    to_pixels = ~grid.affine
    tolerance = _CURVE_TOLERANCE * math.sqrt(abs(grid.affine.determinant))
    period = x_period(crs_of(grid))
    if period:
        placed = _project_polygons(within_map(geometry, crs_of(grid)), grid, tolerance)
        if placed is not None:
            placed = _copies_over(placed, grid, period)
    else:
        near = _near_grid(geometry, grid)
        placed = None if near is None else _project_polygons(near, grid, tolerance)
    if placed is None or placed.is_empty:
        return placed
    a, b, c, d, e, f, *_ = to_pixels

    def convert(xy: Floats) -> Floats:
        x, y = xy.T
        return np.column_stack([a * x + b * y + c, d * x + e * y + f])

    return shapely.transform(placed, convert)


def _copies_over(area: BaseGeometry, grid: GeoBox, period: float) -> BaseGeometry:
    """Repeat an area along x as often as the globe comes again on the grid."""
    left, _, right, _ = area.bounds if not area.is_empty else (0.0, 0.0, 0.0, 0.0)
    bounds = grid.boundingbox
    first = math.floor((bounds.left - right) / period)
    last = math.ceil((bounds.right - left) / period)
    shifts = [period * turn for turn in range(first, last + 1)]
    # A copy that no more than touches the grid adds nothing, unless it is all there is.
    edge = _EDGE * abs(grid.affine.a)
    over = [s for s in shifts if min(right + s, bounds.right) - max(left + s, bounds.left) > edge]
    copies = [_moved(area, shift) for shift in over or shifts]
    return copies[0] if len(copies) == 1 else shapely.union_all(copies)


def _moved(area: BaseGeometry, along_x: float) -> BaseGeometry:
    return shapely.transform(area, lambda xy: xy + np.array([along_x, 0.0]))


def _near_grid(geometry: BaseGeometry, grid: GeoBox) -> BaseGeometry | None:
    """The part of a region around the grid; None if the grid is about as large as its map.

    Far from the grid a projection may fold or tear the region, which would then lie where it
    does not belong.
    """
    height, width = grid.shape
    margin = 2 + max(height, width) // 20
    wide = block(grid, -margin, height + margin, -margin, width + margin)
    col, row = np.meshgrid(
        np.linspace(-margin, width + margin, 17), np.linspace(-margin, height + margin, 17)
    )
    lon, lat = pixel_lonlat(wide, col + margin, row + margin)
    if not np.isfinite(lon).all() or _widest_angle(lon, lat) > _HEMISPHERE:
        return None
    back = project_lonlat(crs_of(grid), lon, lat)
    x, y = pixel_xy(grid, col, row)
    off = np.hypot(back[:, 0] - x.ravel(), back[:, 1] - y.ravel())
    if not (off <= _CURVE_TOLERANCE * math.sqrt(abs(grid.affine.determinant))).all():
        return None
    try:
        footprint = region_from_geobox(wide, "grid").geometry
    except InputError:
        return None
    if shapely.covers(footprint, geometry):
        return geometry
    near = shapely.intersection(geometry, footprint)
    parts = shapely.get_parts(near)
    return shapely.union_all(parts[shapely.get_dimensions(parts) == 2])


def _widest_angle(lon: Floats, lat: Floats) -> float:
    """Largest angle at the Earth's centre, in degrees, between the middle point and another."""
    lon, lat = np.radians(lon.ravel()), np.radians(lat.ravel())
    directions = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])
    cosines = directions[:, len(lon) // 2] @ directions
    return math.degrees(math.acos(np.clip(cosines.min(), -1, 1)))


def _project_polygons(
    geometry: BaseGeometry, grid: GeoBox, tolerance: float
) -> BaseGeometry | None:
    """Lon/lat polygons in the grid's CRS; None if the edge of the map tears them.

    Edges are halved until the straight edge lies within ``tolerance`` CRS units of the true,
    curved one.
    """
    if geometry.is_empty or crs_of(grid) == _LONLAT:
        # Straight edges stay straight, and what was valid stays so: nothing to be built anew.
        return geometry
    polygons = shapely.segmentize(shapely.get_parts(geometry), 5.0)
    rings, ring_polygon = shapely.get_rings(polygons, return_index=True)
    lonlat, ring = shapely.get_coordinates(rings, return_index=True)
    xy = project_lonlat(crs_of(grid), lonlat[:, 0], lonlat[:, 1])
    active = ring[1:] == ring[:-1]
    limit = 2 * len(xy) + _MAX_NEW_POINTS
    for _ in range(_MAX_ROUNDS):
        edges = np.flatnonzero(active)
        if not len(edges) or len(xy) > limit or not np.isfinite(xy).all():
            break
        worst = np.zeros(len(edges))
        for share in (0.5, 0.25):
            true = lonlat[edges] + share * (lonlat[edges + 1] - lonlat[edges])
            off = project_lonlat(crs_of(grid), true[:, 0], true[:, 1])
            off -= xy[edges] + share * (xy[edges + 1] - xy[edges])
            worst = np.maximum(worst, np.hypot(off[:, 0], off[:, 1]))
        active[:] = False
        active[edges[~(worst <= tolerance)]] = True
        edges = np.flatnonzero(active)
        middle = (lonlat[edges] + lonlat[edges + 1]) / 2
        lonlat = np.insert(lonlat, edges + 1, middle, axis=0)
        middle = project_lonlat(crs_of(grid), middle[:, 0], middle[:, 1])
        xy = np.insert(xy, edges + 1, middle, axis=0)
        ring = np.insert(ring, edges + 1, ring[edges])
        active = np.insert(active, edges + 1, True)
    if active.any() or not np.isfinite(xy).all():
        return None
    shells: Any = shapely.linearrings(xy, indices=ring)
    return shapely.union_all(shapely.make_valid(shapely.polygons(shells, indices=ring_polygon)))

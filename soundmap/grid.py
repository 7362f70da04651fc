"""Grids of cells, and what is true of them on the ground.

The grid type is :class:`odc.geo.geobox.GeoBox` (CRS, affine, shape). Everything here is a pure
function. Longitudes and latitudes are WGS 84 degrees, x before y.

In some CRSs the globe repeats along x: longitude itself, and the cylindrical projections such as
Web Mercator. There a grid may run on over the edge of the map (longitude 177 to 183), and
:func:`x_period` tells after how much x the same place comes again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyproj
import shapely
from affine import Affine
from numpy.typing import ArrayLike, NDArray
from odc.geo.crs import CRS, SomeCRS, norm_crs_or_error
from odc.geo.geobox import GeoBox
from odc.geo.geom import BoundingBox
from pyproj.exceptions import ProjError
from shapely.geometry.base import BaseGeometry

from soundmap.errors import InputError, UsageError

WEB_MERCATOR_LAT = 85.06
"""Mercator maps end at this latitude; regions are cut there."""

# Edges this close to a grid line, in cells, count as on it: 0.3 / 0.1 is not exactly 3.
_SNAP = 1e-6
_FAR_AWAY = 1e9
_PROBE_M = 100.0
_WGS84 = CRS(4326)
_METRES_PER_DEGREE = 111_320.0

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def metres_per_unit(crs: SomeCRS, x: float, y: float) -> tuple[float, float]:
    """True ground metres per CRS unit, along x and along y, at one point.

    Measured as a geodesic of about 100 m on the CRS's own ellipsoid.

    Parameters
    ----------
    crs
        Any CRS of the Earth: degrees, metres, feet.
    x, y
        The point, in units of ``crs``.

    Returns
    -------
    tuple of float
        Metres per unit along x and along y; NaN where the point is off the Earth.
    """
    across, along = _ground_metres(norm_crs_or_error(crs), [x, x], [y, y], [1, 0], [0, 1])
    return float(across), float(along)


def ground_gsd_m(gbox: GeoBox) -> float:
    """True ground metres per pixel at the centre of a grid: the square root of a pixel's area.

    Raises
    ------
    InputError
        If the grid has no CRS or its centre is off the Earth.
    """
    height, width = gbox.shape
    x, y = (float(v) for v in pixel_xy(gbox, width / 2, height / 2))
    mx, my = metres_per_unit(crs_of(gbox), x, y)
    gsd_m = math.sqrt(abs(gbox.affine.determinant) * mx * my)
    if not math.isfinite(gsd_m):
        raise InputError(f"the grid's centre, {x:.10g} {y:.10g} in {gbox.crs}, is off the Earth")
    return gsd_m


def is_locally_metric(place: GeoBox | BoundingBox, tol: float = 0.02) -> bool:
    """Whether one CRS unit is one true metre, in every direction, at the centre and corners.

    Parameters
    ----------
    place
        A grid, or bounds that carry a CRS.
    tol
        Largest relative error that still counts as true.
    """
    bounds = place.boundingbox if isinstance(place, GeoBox) else place
    crs = crs_of(place)
    if not crs.projected:
        return False
    xs = np.array([bounds.left, bounds.right, (bounds.left + bounds.right) / 2])
    ys = np.array([bounds.bottom, bounds.top, (bounds.bottom + bounds.top) / 2])
    px, py = xs[[0, 0, 1, 1, 2]], ys[[0, 1, 0, 1, 2]]
    # The diagonals find the maps that keep x and y true but slant them, such as sinusoidal ones.
    half = math.sqrt(0.5)
    for ux, uy in ((1.0, 0.0), (0.0, 1.0), (half, half), (half, -half)):
        metres = _ground_metres(crs, px, py, np.full(5, ux), np.full(5, uy))
        if not (np.abs(metres - 1) <= tol).all():  # NaN, off the Earth, is not metric either
            return False
    return True


def local_metric_crs(lon: float, lat: float) -> CRS:
    """CRS in true metres around a point: its UTM zone, or UPS beyond 84° north and 80° south.

    Zones are the plain 6° ones; the exceptions of Norway and Svalbard are left out, so that the
    zone follows from longitude alone.
    """
    if not (math.isfinite(lon) and -90 <= lat <= 90):
        raise UsageError(f"longitude {lon:.10g}, latitude {lat:.10g} is not a place on the Earth")
    return CRS(int(utm_zone_key(lon, lat)))


def utm_zone_key(lon: ArrayLike, lat: ArrayLike) -> NDArray[np.int32]:
    """EPSG code of :func:`local_metric_crs` for many points.

    Returns
    -------
    int32 array
        Shape of ``lon`` and ``lat`` broadcast; 0 where a coordinate is not finite.
    """
    lon, lat = np.broadcast_arrays(np.asarray(lon, float), np.asarray(lat, float))
    known = np.isfinite(lon) & np.isfinite(lat)
    zone = np.floor((np.where(known, lon, 0.0) + 180) / 6).astype(np.int32) % 60 + 1
    key = np.where(lat >= 0, 32600, 32700) + zone
    key = np.where(lat > 84, 32661, np.where(lat < -80, 32761, key))
    return np.where(known, key, 0).astype(np.int32)


def _ground_metres(crs: CRS, x: ArrayLike, y: ArrayLike, ux: ArrayLike, uy: ArrayLike) -> Floats:
    """Metres on the ground per step (ux, uy), float64[N]."""
    x, y, ux, uy = (np.asarray(v, dtype=float) for v in (x, y, ux, uy))
    geodetic = _geodetic(crs)
    geod = geodetic.get_geod()
    if geod is None:
        raise InputError(f"the CRS {crs} has no ellipsoid to measure distances on")
    to_lonlat = _transformer(crs, geodetic)
    degrees = _degrees_per_unit(geodetic)
    unit_m = crs.proj.axis_info[0].unit_conversion_factor
    if not crs.projected:
        unit_m = _degrees_per_unit(crs.proj) * _METRES_PER_DEGREE
    step = _PROBE_M / unit_m

    metres = np.full(x.shape, np.nan)
    # Centred where possible; at the edge of the Earth, such as a pole in degrees, one-sided.
    for back, ahead in ((0.5, 0.5), (1.0, 0.0), (0.0, 1.0)):
        lon0, lat0 = to_lonlat(x - back * step * ux, y - back * step * uy)
        lon1, lat1 = to_lonlat(x + ahead * step * ux, y + ahead * step * uy)
        ends = np.stack([lon0, lat0, lon1, lat1]) * degrees
        ok = np.isfinite(ends).all(axis=0) & (np.abs(ends[1::2]) <= 90).all(axis=0)
        ok &= np.isnan(metres)
        if ok.any():
            metres[ok] = geod.inv(*ends[:, ok])[2] / step
    return metres


def snap_grid(
    bounds: BoundingBox, cell: float, anchor: tuple[float, float] = (0.0, 0.0), mode: str = "cover"
) -> GeoBox:
    """North-up grid over bounds, on the lines ``anchor + k * cell``.

    Grids of one cell size and anchor share their cells, whatever their bounds.

    Parameters
    ----------
    bounds
        Area in a CRS, which becomes the grid's.
    cell
        Cell size in CRS units.
    anchor
        x and y of one grid corner.
    mode
        ``cover``: whole cells, outward, so that nothing is lost. ``nearest``: each edge goes to
        the nearest line. Always at least one cell.

    Raises
    ------
    UsageError
        If ``cell`` is not a positive number or ``mode`` is unknown.
    """
    if not (math.isfinite(cell) and cell > 0):
        raise UsageError(f"the cell size must be a positive number, not {cell:.10g}")
    if mode not in ("cover", "nearest"):
        raise UsageError(f"mode must be 'cover' or 'nearest', not {mode!r}")
    crs = crs_of(bounds)
    col0, col1 = _snap_range(bounds.left, bounds.right, cell, anchor[0], mode)
    row0, row1 = _snap_range(bounds.bottom, bounds.top, cell, anchor[1], mode)
    affine = Affine(cell, 0, anchor[0] + col0 * cell, 0, -cell, anchor[1] + row1 * cell)
    return GeoBox((row1 - row0, col1 - col0), affine, crs)


def _snap_range(low: float, high: float, cell: float, anchor: float, mode: str) -> tuple[int, int]:
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise UsageError(f"a grid cannot have an edge from {low:.10g} to {high:.10g}")
    low, high = (low - anchor) / cell, (high - anchor) / cell
    if mode == "cover":
        first, last = math.floor(low + _SNAP), math.ceil(high - _SNAP)
    else:
        first, last = math.floor(low + 0.5), math.floor(high + 0.5)
    if last <= first:
        first = math.floor((low + high) / 2)
        last = first + 1
    return first, last


def block(gbox: GeoBox, row0: int, row1: int, col0: int, col1: int) -> GeoBox:
    """Part of a grid: rows ``row0`` to ``row1`` and columns ``col0`` to ``col1``, ends excluded."""
    a, b, _, d, e, *_ = gbox.affine
    x, y = pixel_xy(gbox, col0, row0)
    affine = Affine(a, b, float(x), d, e, float(y))
    return GeoBox((row1 - row0, col1 - col0), affine, gbox.crs)


def blocks(
    shape: tuple[int, int], block_cells: int
) -> Iterator[tuple[tuple[int, int], tuple[slice, slice]]]:
    """Square blocks that tile an array, row by row; those at the far edges are smaller.

    Yields
    ------
    tuple
        Index of the block (row, column), and its slices of the array.
    """
    height, width = shape
    for i, row in enumerate(range(0, height, block_cells)):
        for j, col in enumerate(range(0, width, block_cells)):
            rows = slice(row, min(row + block_cells, height))
            yield (i, j), (rows, slice(col, min(col + block_cells, width)))


def cell_lonlat(gbox: GeoBox) -> tuple[Floats, Floats]:
    """Longitude and latitude of every cell's centre.

    Returns
    -------
    tuple of float64[H, W]
        Longitudes in [-180, 180) and latitudes, in degrees; NaN where a centre is off the Earth.
    """
    height, width = gbox.shape
    col, row = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return pixel_lonlat(gbox, col, row)


def pixel_xy(gbox: GeoBox, col: ArrayLike, row: ArrayLike) -> tuple[Floats, Floats]:
    """CRS coordinates of places in pixel coordinates; (0, 0) is the grid's first corner."""
    a, b, c, d, e, f, *_ = gbox.affine
    col, row = np.asarray(col, float), np.asarray(row, float)
    return a * col + b * row + c, d * col + e * row + f


def pixel_lonlat(gbox: GeoBox, col: Floats, row: Floats) -> tuple[Floats, Floats]:
    """Longitude and latitude of places in pixel coordinates; (0, 0) is the grid's first corner.

    Returns
    -------
    tuple of float64 arrays
        In the shape of ``col`` and ``row``; as in :func:`cell_lonlat`.
    """
    to_lonlat = _transformer(crs_of(gbox), _WGS84.proj)
    lon, lat = to_lonlat(*pixel_xy(gbox, col, row))
    on_earth = np.isfinite(lon) & (np.abs(lat) <= 90)
    lon, lat = np.where(on_earth, lon, np.nan), np.where(on_earth, lat, np.nan)
    return np.where(lon == 180, -180.0, _within_180(lon)), lat


def region_bounds(geometry: BaseGeometry, crs: SomeCRS) -> BoundingBox:
    """Bounds of a lon/lat region in a CRS, with the bulge of edges that are curved there.

    Parameters
    ----------
    geometry
        Lon/lat polygons, cut at ±180.
    crs
        Any CRS of the Earth. Where the globe repeats along x, a region across the edge of the
        map gets one continuous box, such as longitude 177 to 183.

    Returns
    -------
    BoundingBox
        What does not project into the CRS (beyond 85.06° in Web Mercator) is left out.

    Raises
    ------
    InputError
        If nothing of the region projects into the CRS.
    """
    target = norm_crs_or_error(crs)
    period = x_period(target)
    area = within_map(geometry, target)
    if area.is_empty:
        raise InputError(f"the region lies outside of what {target} can show")
    if period:
        area = _in_one_piece(area)
    points = points_all_over(area)
    xy = project_lonlat(target, points[:, 0], points[:, 1])
    # Some projections put their far side at 1e23 m rather than at infinity.
    xy = xy[(np.abs(xy) < _FAR_AWAY).all(axis=1)]
    if not len(xy):
        raise InputError(f"the region lies outside of what {target} can show")
    (left, bottom), (right, top) = xy.min(axis=0), xy.max(axis=0)
    if period:
        edge = _periodic(target).edge
        turns = math.floor((left - edge) / period + 1e-9)
        left, right = left - turns * period, right - turns * period
        if right - left > period * (1 - 1e-9):
            left, right = edge, edge + period
    return BoundingBox(float(left), float(bottom), float(right), float(top), target)


def points_all_over(geometry: BaseGeometry) -> Floats:
    """Points, float64[N, 2], along the outline of polygons and spread over their inside."""
    west, south, east, north = geometry.bounds
    # A curve strays from its chord by the square of the step: a thousandth of the extent leaves
    # less than a ten-millionth of it.
    step = max(east - west, north - south, 1e-6) / 1000
    outline = shapely.get_coordinates(shapely.segmentize(geometry, step))
    # Where a map shows only a part of the region, the outline alone may not show at all.
    x, y = np.meshgrid(np.linspace(west, east, 65), np.linspace(south, north, 65))
    within = shapely.intersects_xy(geometry, x, y)
    return np.vstack([outline, np.column_stack([x[within], y[within]])])


def within_map(geometry: BaseGeometry, crs: SomeCRS) -> BaseGeometry:
    """Leave out of lon/lat polygons what a Mercator map stretches to infinity."""
    if "Mercator" not in _cylindrical_method(norm_crs_or_error(crs)):
        return geometry
    band = shapely.box(-180, -WEB_MERCATOR_LAT, 180, WEB_MERCATOR_LAT)
    parts = shapely.get_parts(shapely.intersection(geometry, band))
    # Polygons that only touch the band's edge leave a line there.
    return shapely.union_all(parts[shapely.get_dimensions(parts) == 2])


def _in_one_piece(geometry: BaseGeometry) -> BaseGeometry:
    """Bring the parts west of an ocean's width of nothing around to the east, past 180°.

    Only for regions that meet (nearly) at the 180th meridian and leave a quarter of the globe
    free elsewhere; others stay within ±180.
    """
    parts = shapely.get_parts(geometry)
    extent = shapely.bounds(parts)
    extent = extent[np.argsort(extent[:, 0])]
    west, east = extent[:, 0], np.maximum.accumulate(extent[:, 2])
    gaps = west[1:] - east[:-1]
    if not len(gaps) or west[0] + 360 - east[-1] > 10 or gaps.max() < 90:
        return geometry
    cut = west[int(gaps.argmax()) + 1]
    one_turn = np.array([360.0, 0.0])
    turned = [
        shapely.transform(p, lambda xy: xy + one_turn) if p.bounds[0] < cut else p for p in parts
    ]
    return shapely.union_all(turned)


def x_period(crs: SomeCRS) -> float | None:
    """CRS units along x after which the same place comes again; None where it does not."""
    target = norm_crs_or_error(crs)
    return _periodic(target).period if target.geographic or _cylindrical_method(target) else None


def project_lonlat(crs: SomeCRS, lon: ArrayLike, lat: ArrayLike) -> Floats:
    """Coordinates of lon/lat points in a CRS, not finite where they do not project.

    Where the globe repeats along x, longitudes may run on over ±180 and x runs on with them.

    Returns
    -------
    float64[N, 2]
        x and y.
    """
    target = norm_crs_or_error(crs)
    lon, lat = np.asarray(lon, float).ravel(), np.asarray(lat, float).ravel()
    # PROJ refuses longitudes of more than ten radians.
    x, y = _transformer(_WGS84, target.proj)(_within_180(lon), lat)
    if x_period(target):
        cycle = _periodic(target)
        turns = np.round((cycle.origin + lon / 360 * cycle.period - x) / cycle.period)
        x = np.where(np.isfinite(x), x + np.nan_to_num(turns) * cycle.period, x)
    return np.column_stack([x, y])


@dataclass(frozen=True)
class _Periodic:
    """How x follows longitude where the globe repeats: ``origin + lon / 360 * period``."""

    origin: float
    period: float
    edge: float


@lru_cache(maxsize=32)
def _periodic(crs: CRS) -> _Periodic:
    operation = _projection(crs)
    middle = next(
        (
            math.degrees(p.value * p.unit_conversion_factor)
            for p in (operation.params if operation else [])
            if p.name.startswith("Longitude of")
        ),
        0.0,
    )
    lon = np.concatenate([[0.0, middle], np.arange(-180.0, 181.0)])
    x, _ = _transformer(_WGS84, crs.proj)(lon, np.zeros_like(lon))
    period = 360 * float(np.median(np.diff(x[2:])))  # passes over the one step at the map's edge
    return _Periodic(float(x[0]), period, float(x[1]) - period / 2)


def _cylindrical_method(crs: CRS) -> str:
    """Name of the projection if it is cylindrical and upright, else nothing."""
    operation = _projection(crs)
    name = operation.method_name if operation else ""
    upright = not any(word in name for word in ("Transverse", "Oblique", "Space", "Hotine"))
    return name if upright and ("Mercator" in name or "ylindrical" in name) else ""


@lru_cache(maxsize=32)
def _projection(crs: CRS) -> Any:
    plane = crs.proj.source_crs if crs.proj.is_bound else crs.proj
    plane = plane.sub_crs_list[0] if plane and plane.is_compound else plane
    return plane.coordinate_operation if plane and crs.projected else None


@lru_cache(maxsize=32)
def _geodetic(crs: CRS) -> pyproj.CRS:
    geodetic = crs.proj.geodetic_crs
    if geodetic is None:
        raise InputError(f"the CRS {crs} cannot be placed on the Earth")
    return pyproj.CRS(geodetic)


@lru_cache(maxsize=64)
def _transformer(
    source: CRS, target: pyproj.CRS
) -> Callable[[Floats, Floats], tuple[Floats, Floats]]:
    """Function from x, y of one CRS to another; what cannot be brought over is not finite."""
    try:
        transformer = pyproj.Transformer.from_crs(source.proj, target, always_xy=True)
    except ProjError as error:
        raise InputError(f"{source} cannot be brought to {target.name}: {error}") from error

    def convert(x: Floats, y: Floats) -> tuple[Floats, Floats]:
        x, y = transformer.transform(x, y)
        return np.asarray(x), np.asarray(y)

    return convert


def _within_180(lon: Floats) -> Floats:
    return np.where(np.abs(lon) > 180, (lon + 180) % 360 - 180, lon)


def _degrees_per_unit(crs: pyproj.CRS) -> float:
    return math.degrees(crs.axis_info[0].unit_conversion_factor)


def crs_of(place: GeoBox | BoundingBox) -> CRS:
    """CRS of a grid or bounds; InputError if there is none."""
    if place.crs is None:
        raise InputError("the grid has no CRS: give the imagery one (gdal_edit -a_srs EPSG:...)")
    return place.crs

"""Where to map: a bounding box, a polygon file or a raster's own footprint, as lon/lat geometry.

Every region is polygons in longitude and latitude (EPSG:4326), cut at the 180th meridian so
that no part crosses it. Straight lines in a file's own CRS become curves on the globe; they are
followed to within :data:`CURVE_TOLERANCE_M`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyproj
import shapely
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from pyproj.exceptions import ProjError
from shapely.geometry import MultiPolygon, Polygon
from shapely.geometry.base import BaseGeometry

from soundmap.errors import InputError, UsageError

CURVE_TOLERANCE_M = 0.1
"""How far, in metres, an outline may stray from the true curve when it is brought to lon/lat.

For the footprint of a coarse raster it may be a hundredth of a pixel, if that is more.
"""

# A longitude step this long inside one edge of a lon/lat file is read as a polygon drawn across
# the 180th meridian without being cut there; shorter ones are taken as drawn.
_SEAM_JUMP_DEG = 300.0
_CRACK_DEG = 1e-9
_METRES_PER_DEGREE = 111_320.0
_MAX_ROUNDS = 24
_MAX_POINTS = 4_000_000
_FOOTPRINT_LATTICE = 128

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Region:
    """An area to map."""

    geometry: Polygon | MultiPolygon
    """Longitude and latitude in degrees (EPSG:4326); valid; no part crosses ±180."""
    label: str
    """How to name it to a person: ``bbox -9.25 38.69 -9.09 38.8``, ``amsterdam.geojson``."""
    clip: bool
    """True for polygon files: cells whose centre lies outside are nodata."""


def region_from_bbox(west: float, south: float, east: float, north: float) -> Region:
    """Region of a longitude/latitude box.

    Parameters
    ----------
    west, south, east, north
        Degrees. A box across the 180th meridian has either ``west > 0 > east`` (177 to -178) or
        an east beyond 180 (177 to 182).

    Returns
    -------
    Region
        Not clipped: every cell that the box needs gets a value.

    Raises
    ------
    UsageError
        If the box is reversed, empty, out of range or not finite.

    Examples
    --------
    >>> region_from_bbox(-9.25, 38.69, -9.09, 38.80).label
    'bbox -9.25 38.69 -9.09 38.8'
    """
    west, south, east, north = (float(v) for v in (west, south, east, north))
    label = _bbox_text(west, south, east, north)
    order = "the order is west south east north, in degrees"
    if not all(math.isfinite(v) for v in (west, south, east, north)):
        raise UsageError(f"{label}: every value must be a finite number; {order}")
    if not (-90 <= south <= 90 and -90 <= north <= 90):
        raise UsageError(f"{label}: south and north must lie within -90 and 90; {order}")
    if not (-180 <= west <= 180 and -180 <= east <= 360):
        raise UsageError(
            f"{label}: west and east must lie within -180 and 180 (east may run to 360 for a box "
            f"across the 180th meridian); {order}"
        )
    if south == north or west == east:
        same = "south and north" if south == north else "west and east"
        raise UsageError(f"{label}: has no area, {same} are the same; {order}")
    if south > north:
        hint = _bbox_text(min(west, east), north, max(west, east), south)
        raise UsageError(f"{label}: reversed, south is above north; did you mean {hint}?")
    if west > east:
        if not (west > 0 > east and east + 360 - west < 180):
            hint = _bbox_text(east, south, west, north)
            raise UsageError(f"{label}: reversed, west is right of east; did you mean {hint}?")
        east += 360
    if east - west > 360:
        raise UsageError(f"{label}: is wider than the globe; {order}")
    geometry = split_antimeridian(shapely.box(west, south, east, north))
    return Region(_as_area(geometry, label), label, clip=False)


def region_of_globe() -> Region:
    """Region of the whole Earth; not clipped."""
    return Region(shapely.box(-180, -90, 180, 90), "globe", clip=False)


def region_from_file(spec: str, where: str | None = None) -> Region:
    """Region of the polygons in a vector file.

    Parameters
    ----------
    spec
        ``FILE`` or ``FILE:LAYER``. Any format that GDAL reads (GeoJSON, GeoPackage, shapefile,
        also zipped), in any CRS. All polygons of the layer are taken together.
    where
        Which features, as the condition of an SQL query: ``NAME = 'Portugal'``. None: all.

    Returns
    -------
    Region
        Clipped: cells outside the polygons are nodata.

    Raises
    ------
    InputError
        If the file is missing or unreadable, the layer is unknown or must be chosen, there is
        no CRS, or nothing in it encloses an area.
    UsageError
        If ``where`` cannot be understood or holds for no feature.
    """
    if where is not None and not where.strip():
        raise UsageError("--where is empty: give a condition like NAME = 'Portugal'")
    path, layer = _split_spec(spec)
    geometries, crs = _read_polygons(path, layer, where)
    label = os.path.basename(path.rstrip("/")) + (f":{layer}" if layer else "")
    label += f" where {where}" if where else ""

    types = sorted({g.geom_type for g in geometries})
    polygons = shapely.get_parts(shapely.get_parts(geometries))
    polygons = polygons[shapely.get_type_id(polygons) == shapely.GeometryType.POLYGON]
    if not len(polygons):
        raise InputError(
            f"{spec}: holds only {' and '.join(types)} geometries; a region needs polygons"
        )
    if not np.isfinite(shapely.get_coordinates(polygons)).all():
        raise InputError(f"{spec}: some coordinates are not finite numbers; repair the file")
    merged = _union(_polygons_only(shapely.make_valid(polygons)))
    if merged.is_empty:
        raise InputError(f"{spec}: its polygons enclose no area")
    if crs.is_geographic:
        _check_degrees(merged, crs, spec)
    return Region(_as_area(_place_on_globe(merged, crs, spec), spec), label, clip=True)


def region_from_geobox(gbox: GeoBox, label: str) -> Region:
    """Footprint of a raster grid.

    Parameters
    ----------
    gbox
        Any grid with a CRS; it may be rotated, south-up, hold a pole or cross ±180. Parts of it
        that lie off the Earth (the corners of a full-disc image) are left out.
    label
        Name of the raster, for messages.

    Raises
    ------
    InputError
        If the grid has no CRS or no part of it lies on the Earth.
    """
    if gbox.crs is None:
        raise InputError(f"{label}: has no CRS; assign one (gdal_edit -a_srs EPSG:... {label})")
    crs = pyproj.CRS(gbox.crs.proj)
    height, width = gbox.shape
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], dtype=float)
    outline = Polygon(_apply(gbox, corners))
    pixel_m = math.sqrt(abs(gbox.affine.determinant)) * crs.axis_info[0].unit_conversion_factor
    tolerance_m = max(CURVE_TOLERANCE_M, 0.01 * pixel_m)
    try:
        geometry = _place_on_globe(outline, crs, label, tolerance_m)
    except InputError:
        pieces = _pieces_on_earth(gbox, crs, label)
        geometry = _place_on_globe(pieces, crs, label, tolerance_m)
    return Region(_as_area(geometry, label), label, clip=False)


def split_antimeridian(geometry: BaseGeometry) -> BaseGeometry:
    """Cut lon/lat polygons at the 180th meridian and bring every part within ±180.

    Longitudes may run on over ±180 (170 to 190, or 0 to 360). Latitudes are cut at ±90. Parts
    that come to lie on each other are merged.
    """
    if geometry.is_empty:
        return geometry
    west, south, east, north = geometry.bounds
    if west >= -180 and east <= 180 and south >= -90 and north <= 90:
        return geometry
    # Rounding in files leaves 180.0000001: cutting it off is better than a sliver at -180.
    slack = 1e-6
    first = math.floor((west + slack + 180) / 360)
    last = max(first, math.ceil((east - slack - 180) / 360))
    parts = []
    for turn in range(first, last + 1):
        window = shapely.box(turn * 360 - 180, -90, turn * 360 + 180, 90)
        part = shapely.intersection(geometry, window)
        parts.append(_shifted(part, -360.0 * turn) if turn else part)
    return shapely.union_all(_polygons_only(np.asarray(parts, dtype=object)))


def _bbox_text(*values: float) -> str:
    return "bbox " + " ".join(f"{v:.10g}" for v in values)


def _as_area(geometry: BaseGeometry, name: str) -> Polygon | MultiPolygon:
    if not shapely.is_valid(geometry):
        geometry = shapely.union_all(_polygons_only(np.array([shapely.make_valid(geometry)])))
    if not isinstance(geometry, Polygon | MultiPolygon) or geometry.is_empty:
        raise InputError(f"{name}: encloses no area on the globe")
    return geometry


def _union(polygons: NDArray[np.object_]) -> BaseGeometry:
    """Union of polygons of which most keep to themselves, as those of a coastline do."""
    return shapely.disjoint_subset_union_all(polygons)


def polygons_of(geometry: BaseGeometry) -> BaseGeometry:
    """Leave out of a geometry all points and lines: polygons, or an empty one."""
    parts = _polygons_only(np.array([geometry]))
    return parts[0] if len(parts) == 1 else MultiPolygon(list(parts))


def _polygons_only(geometries: NDArray[np.object_]) -> NDArray[np.object_]:
    parts = shapely.get_parts(shapely.get_parts(geometries))
    kept: NDArray[np.object_] = parts[
        (shapely.get_type_id(parts) == shapely.GeometryType.POLYGON) & ~shapely.is_empty(parts)
    ]
    return kept


def _shifted(geometry: BaseGeometry, degrees: float) -> BaseGeometry:
    return shapely.transform(geometry, lambda lonlat: lonlat + np.array([degrees, 0.0]))


def _apply(gbox: GeoBox, pixels: Floats) -> Floats:
    a, b, c, d, e, f, *_ = gbox.affine
    col, row = pixels.T
    return np.column_stack([a * col + b * row + c, d * col + e * row + f])


# --- reading files ---------------------------------------------------------------------------


def _split_spec(spec: str) -> tuple[str, str | None]:
    if os.path.exists(spec) or "://" in spec or spec.startswith("/vsi"):
        return spec, None
    path, _, layer = spec.rpartition(":")
    if path and layer and os.path.exists(path):
        return path, layer
    raise InputError(f"{spec}: no such file")


def _read_polygons(
    path: str, layer: str | None, where: str | None
) -> tuple[NDArray[np.object_], pyproj.CRS]:
    """Non-empty geometries of one layer, 2-D, with their CRS."""
    # pyogrio brings pandas along, which would slow down every start of the program.
    import pyogrio

    try:
        layer = _choose_layer(path, layer, pyogrio.list_layers(path))
        columns = None if where is None else pyogrio.read_info(path, layer=layer)["fields"]
        try:
            frame: Any = pyogrio.read_dataframe(
                path, layer=layer, columns=[], force_2d=True, on_invalid="fix", where=where
            )
        except ValueError as error:
            if columns is None:
                raise
            raise UsageError(
                f"--where {where!r} cannot be understood: write it like NAME = 'Portugal', with "
                f"columns of {path}: {', '.join(columns) or 'it has none'}"
            ) from error
    except (InputError, UsageError):
        raise
    except Exception as error:  # whatever GDAL, GEOS and pyogrio raise: the file is no good
        reason = " ".join(str(error).split()).split(";")[0].removeprefix(f"{path}: ")
        raise InputError(f"{path}: cannot be read as a vector file: {reason}") from error

    if "geometry" not in frame:
        raise InputError(f"{path}: holds a table without geometries; a region needs polygons")
    geometries = np.asarray(frame.geometry.array, dtype=object)
    if not len(geometries):
        if columns is not None:
            raise UsageError(
                f"--where {where!r} holds for no feature of {path}; its columns are "
                f"{', '.join(columns)}"
            )
        raise InputError(f"{path}: has no features")
    geometries = geometries[~(shapely.is_missing(geometries) | shapely.is_empty(geometries))]
    if not len(geometries):
        raise InputError(f"{path}: its geometries are all empty")
    if frame.crs is None:
        raise InputError(
            f"{path}: has no CRS; say which it is, for example with "
            f"ogr2ogr -a_srs EPSG:4326 with_crs.gpkg {path}"
        )
    return geometries, pyproj.CRS(frame.crs)


def _choose_layer(path: str, wanted: str | None, layers: NDArray[np.object_]) -> str:
    names = [str(name) for name, _ in layers]
    if not names:
        raise InputError(f"{path}: has no layers")
    if wanted is not None:
        if wanted not in names:
            raise InputError(f"{path}: has no layer {wanted!r}; it has {', '.join(names)}")
        return wanted
    if len(names) == 1:
        return names[0]
    areal = [str(name) for name, kind in layers if kind and "Polygon" in kind]
    if len(areal) == 1:
        return areal[0]
    raise InputError(
        f"{path}: has {len(names)} layers; choose one as {path}:LAYER, from {', '.join(names)}"
    )


def _check_degrees(geometry: BaseGeometry, crs: pyproj.CRS, spec: str) -> None:
    west, south, east, north = np.array(geometry.bounds) * _degrees_per_unit(crs)
    if south < -90.001 or north > 90.001 or west < -540 or east > 540:
        raise InputError(
            f"{spec}: coordinates such as {west:.6g}, {south:.6g} are not degrees, but the file "
            f"says that its CRS is {crs.name}; correct the file's CRS"
        )


# --- onto the globe --------------------------------------------------------------------------


@lru_cache(maxsize=32)
def _to_lonlat(crs: pyproj.CRS) -> Callable[[Floats], Floats]:
    """Function from float64[N, 2] x, y of ``crs`` to float64[N, 2] lon, lat."""
    try:
        transformer = pyproj.Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    except ProjError as error:
        raise InputError(f"the CRS {crs.name} cannot be placed on the Earth") from error
    per_unit = _degrees_per_unit(crs) if crs.is_geographic else 0.0

    def convert(xy: Floats) -> Floats:
        lon, lat = transformer.transform(xy[:, 0], xy[:, 1])
        if per_unit:
            # A change of datum may bring 183° to -177°; the outline must stay in one piece.
            lon = lon + 360 * np.round((xy[:, 0] * per_unit - lon) / 360)
        return np.column_stack([lon, lat])

    return convert


def _degrees_per_unit(crs: pyproj.CRS) -> float:
    return math.degrees(crs.axis_info[0].unit_conversion_factor)


def _wrapped(degrees: Floats) -> Floats:
    return (degrees + 180) % 360 - 180


def _place_on_globe(
    geometry: BaseGeometry, crs: pyproj.CRS, name: str, tolerance_m: float = CURVE_TOLERANCE_M
) -> BaseGeometry:
    """Bring polygons of any CRS to lon/lat, cut at ±180, poles inside included.

    Each ring is walked with continuous longitudes. One that comes back 360° further on goes
    around a pole, and is closed over it.
    """
    polygons = shapely.orient_polygons(shapely.get_parts(geometry))
    rings, ring_polygon = shapely.get_rings(polygons, return_index=True)
    xy, ring = shapely.get_coordinates(rings, return_index=True)
    to_lonlat = _to_lonlat(crs)
    lonlat = to_lonlat(xy)
    if not np.isfinite(lonlat).all():
        raise InputError(f"{name}: some of its outline lies off the Earth in {crs.name}")
    if not crs.is_geographic:
        lonlat, ring = _follow_curves(xy, lonlat, ring, to_lonlat, tolerance_m)

    step = np.diff(lonlat[:, 0])
    same = ring[1:] == ring[:-1]
    least, most = (_SEAM_JUMP_DEG, 360 - 1e-6) if crs.is_geographic else (180.0, math.inf)
    jumps = same & (np.abs(step) > least) & (np.abs(step) < most)
    special = np.unique(ring_polygon[ring[1:][jumps]])

    plain_ring = ~np.isin(ring_polygon, special)
    plain_point = plain_ring[ring]
    parts: list[BaseGeometry] = []
    if plain_ring.any():
        renumber = np.cumsum(plain_ring) - 1
        outlines: Any = shapely.linearrings(
            lonlat[plain_point], indices=renumber[ring[plain_point]]
        )
        owner = np.unique(ring_polygon[plain_ring], return_inverse=True)[1]
        parts.extend(np.atleast_1d(shapely.polygons(outlines, indices=owner)))
    step = np.where(jumps, _wrapped(step), step)
    for polygon in special:
        shell, *holes = (
            _close_over_pole(lonlat[ring == r], step[same & (ring[1:] == r)], hole=bool(i))
            for i, r in enumerate(np.flatnonzero(ring_polygon == polygon))
        )
        parts.append(shapely.difference(shell, shapely.union_all(holes)))
    valid = _polygons_only(shapely.make_valid(np.asarray(parts, dtype=object)))
    return _union(np.array([split_antimeridian(part) for part in valid], dtype=object))


def _close_over_pole(lonlat: Floats, step: Floats, *, hole: bool) -> BaseGeometry:
    """Polygon of one ring, with given longitude steps, cut at ±180."""
    lon = lonlat[0, 0] + np.concatenate([[0.0], np.cumsum(step)])
    points = np.column_stack([lon, lonlat[:, 1]])
    turn = lon[-1] - lon[0]
    if abs(turn) > 180:
        # Shells run anticlockwise: eastward around the north pole, westward around the south.
        pole = 90.0 if (turn > 0) != hole else -90.0
        points = np.vstack([points, [(lon[-1], pole), (lon[0], pole)]])
    area = _polygons_only(np.array([shapely.make_valid(Polygon(points))]))
    cut = shapely.get_parts(split_antimeridian(shapely.union_all(area)))
    # Where the ring closed, 360° apart, rounding would leave a crack as thin as a number's end.
    return shapely.union_all(cut, grid_size=_CRACK_DEG)


def _follow_curves(
    xy: Floats,
    lonlat: Floats,
    ring: NDArray[np.int64],
    to_lonlat: Callable[[Floats], Floats],
    tolerance_m: float,
) -> tuple[Floats, NDArray[np.int64]]:
    """Halve edges until the straight lon/lat edge lies on the true, curved one.

    Returns the lon/lat of all points, float64[M, 2], and the ring of each.
    """
    active = ring[1:] == ring[:-1]
    for _ in range(_MAX_ROUNDS):
        edges = np.flatnonzero(active)
        if not len(edges) or len(xy) > _MAX_POINTS:
            break
        worst = np.zeros(len(edges))
        for share in (0.5, 0.25):
            true = to_lonlat(xy[edges] + share * (xy[edges + 1] - xy[edges]))
            lon, lat = lonlat[edges].T
            lon = lon + share * _wrapped(lonlat[edges + 1, 0] - lon)
            lat = lat + share * (lonlat[edges + 1, 1] - lat)
            off_x = _wrapped(true[:, 0] - lon) * np.cos(np.radians(true[:, 1]))
            worst = np.maximum(worst, np.hypot(off_x, true[:, 1] - lat))
        active[:] = False
        active[edges[worst * _METRES_PER_DEGREE > tolerance_m]] = True
        edges = np.flatnonzero(active)
        middle = (xy[edges] + xy[edges + 1]) / 2
        xy = np.insert(xy, edges + 1, middle, axis=0)
        lonlat = np.insert(lonlat, edges + 1, to_lonlat(middle), axis=0)
        ring = np.insert(ring, edges + 1, ring[edges])
        active = np.insert(active, edges + 1, True)
    return lonlat, ring


def _pieces_on_earth(gbox: GeoBox, crs: pyproj.CRS, name: str) -> BaseGeometry:
    """What is on the Earth of a grid whose outline leaves it, in the grid's CRS."""
    height, width = gbox.shape
    rows = np.linspace(0, height, _FOOTPRINT_LATTICE + 1)
    cols = np.linspace(0, width, _FOOTPRINT_LATTICE + 1)
    col, row = np.meshgrid(cols, rows)
    xy = _apply(gbox, np.column_stack([col.ravel(), row.ravel()]))
    finite = np.isfinite(_to_lonlat(crs)(xy))
    on_earth = (finite[:, 0] & finite[:, 1]).reshape(col.shape)
    whole = on_earth[:-1, :-1] & on_earth[1:, :-1] & on_earth[:-1, 1:] & on_earth[1:, 1:]
    if not whole.any():
        raise InputError(f"{name}: no part of it lies on the Earth in {crs.name}")
    corner = xy.reshape(*col.shape, 2)
    quads = np.stack(
        [corner[:-1, :-1], corner[:-1, 1:], corner[1:, 1:], corner[1:, :-1], corner[:-1, :-1]],
        axis=2,
    )[whole]
    return shapely.union_all(shapely.polygons(quads))

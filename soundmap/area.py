"""Which cells of a grid lie in a region, asked of one unit after another.

A coastline of the whole globe has a million points and a run a hundred thousand units. So the
polygons are cut once into small pieces, found by their bounds: a unit asks the few pieces near it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from shapely.geometry.base import BaseGeometry

from soundmap.grid import cell_lonlat

# Points of a piece: few enough to prepare it anew in each unit, many enough that few are near.
_MOST_POINTS = 256
_LEAST_DEG = 1e-6
_MOST_GROWTH = 3
_SEAM = 180.0

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


class Area:
    """Polygons, cut small, that tell of any grid which of its cells lie inside.

    It pickles, and may be asked from several threads at once.

    Parameters
    ----------
    geometry
        Lon/lat polygons in degrees, valid, cut at ±180.

    Examples
    --------
    >>> grid = GeoBox((1, 3), Affine(1, 0, 0, 0, -1, 1), "EPSG:4326")
    >>> Area(shapely.box(0, 0, 2, 1)).mask(grid)
    array([[ True,  True, False]])
    """

    def __init__(self, geometry: BaseGeometry) -> None:
        self._index(_cut(geometry))

    def _index(self, pieces: NDArray[np.object_]) -> None:
        self._pieces = pieces
        self._tree = shapely.STRtree(pieces)
        # The first query may build the tree, which threads must not do at once.
        self._tree.query(shapely.Point(0, 0))

    def __getstate__(self) -> dict[str, Any]:
        return {"pieces": shapely.to_wkb(self._pieces)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._index(shapely.from_wkb(state["pieces"]))

    def __repr__(self) -> str:
        return f"<Area of {len(self._pieces)} pieces>"

    def mask(self, gbox: GeoBox) -> Bools:
        """Which cells have their centre inside.

        Parameters
        ----------
        gbox
            Any grid; it may run on over the 180th meridian.

        Returns
        -------
        bool[H, W]
            True on the outline, too; False where a centre is off the Earth.
        """
        lon, lat = cell_lonlat(gbox)
        inside = np.zeros(lon.shape, dtype=bool)
        known = np.isfinite(lon)
        if not known.any():
            return inside
        groups = [known]
        if lon[known].max() - lon[known].min() > _SEAM:
            # Across the seam one hull would reach around the globe.
            groups = [known & (lon < 0), known & (lon >= 0)]
        for group in groups:
            inside[group] = self._holds(lon[group], lat[group])
        seam = known & (lon == -_SEAM) & ~inside
        if seam.any():
            inside[seam] = self._holds(np.full(int(seam.sum()), _SEAM), lat[seam])
        return inside

    def _holds(self, lon: Floats, lat: Floats) -> Bools:
        """Tell which points, at least one, lie inside: bool[N]."""
        hull = shapely.box(lon.min(), lat.min(), lon.max(), lat.max())
        inside = np.zeros(lon.shape, dtype=bool)
        # Copies, because preparing builds an index inside a geometry that other threads may use.
        near = shapely.from_wkb(shapely.to_wkb(self._pieces[self._tree.query(hull)]))
        if shapely.covers(near, hull).any():
            return ~inside
        shapely.prepare(near)
        for piece, (west, south, east, north) in zip(near, shapely.bounds(near), strict=True):
            asked = (lon >= west) & (lon <= east) & (lat >= south) & (lat <= north) & ~inside
            inside[asked] = shapely.intersects_xy(piece, lon[asked], lat[asked])
        return inside


def _cut(geometry: BaseGeometry) -> NDArray[np.object_]:
    """Halve polygons, the longer side first, until each has few points."""
    rest = shapely.get_parts(geometry)
    done: list[NDArray[np.object_]] = []
    # Long thin spikes are cut again and again: an end must come before memory does.
    most = _MOST_GROWTH * (int(shapely.get_num_coordinates(geometry)) + _MOST_POINTS)
    while len(rest):
        west, south, east, north = shapely.bounds(rest).T
        large = shapely.get_num_coordinates(rest) > _MOST_POINTS
        # Where many edges meet in one point cutting leaves as many.
        large &= np.maximum(east - west, north - south) > _LEAST_DEG
        held = int(shapely.get_num_coordinates(np.concatenate([*done, rest])).sum())
        large &= held <= most
        done.append(rest[~large])
        rest = rest[large]
        west, south, east, north = shapely.bounds(rest).T
        wide = east - west >= north - south
        x, y = (west + east) / 2, (south + north) / 2
        lower = shapely.box(west, south, np.where(wide, x, east), np.where(wide, north, y))
        upper = shapely.box(np.where(wide, x, west), np.where(wide, south, y), east, north)
        halves = [shapely.intersection(rest, half) for half in (lower, upper)]
        rest = shapely.get_parts(shapely.get_parts(np.concatenate(halves)))
        rest = rest[shapely.get_type_id(rest) == shapely.GeometryType.POLYGON]
    return np.concatenate([np.empty(0, dtype=object), *done])

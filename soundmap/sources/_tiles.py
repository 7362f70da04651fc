"""Warping in tiles that stand still, so that a pixel's value does not depend on what is read."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from affine import Affine
from odc.geo.geobox import GeoBox

from soundmap.sources.base import Image

# GDAL places pixels to within an eighth of a source pixel, by straight lines along each row of
# what it warps. Rows of one fixed length and start always get the same lines.
_TILE_PX = 256


def read_in_tiles(grid: GeoBox, read: Callable[[GeoBox], Image]) -> Image:
    """Fill a grid from tiles counted from the origin of its CRS.

    Parameters
    ----------
    grid
        The pixels wanted, north-up.
    read
        Fills a tile.

    Returns
    -------
    Image
        The same pixels for every grid that shares them.
    """
    a = grid.affine
    height, width = grid.shape
    col, row = a.c / a.a, a.f / a.e
    # Grids of one lattice differ by whole pixels; the part left over is the lattice's own.
    part_col, part_row = (round(v - math.floor(v + 1e-6), 6) for v in (col, row))
    col0, row0 = round(col - part_col), round(row - part_row)
    pixels = np.zeros((3, height, width), np.uint8)
    valid = np.zeros((height, width), np.bool_)
    for top in range(row0 // _TILE_PX * _TILE_PX, row0 + height, _TILE_PX):
        for left in range(col0 // _TILE_PX * _TILE_PX, col0 + width, _TILE_PX):
            corner = Affine(a.a, 0, (left + part_col) * a.a, 0, a.e, (top + part_row) * a.e)
            tile = read(GeoBox((_TILE_PX, _TILE_PX), corner, grid.crs))
            rows = slice(max(top, row0), min(top + _TILE_PX, row0 + height))
            cols = slice(max(left, col0), min(left + _TILE_PX, col0 + width))
            there, here = _shifted(rows, cols, top, left), _shifted(rows, cols, row0, col0)
            pixels[:, *here] = tile.pixels[:, *there]
            valid[here] = tile.valid[there]
    return Image(pixels, valid, grid)


def _shifted(rows: slice, cols: slice, row: int, col: int) -> tuple[slice, slice]:
    return slice(rows.start - row, rows.stop - row), slice(cols.start - col, cols.stop - col)

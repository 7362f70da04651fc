"""Where a map's cells lie and at which ground sampling distance imagery is read for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import shapely
from affine import Affine
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox
from odc.geo.geom import BoundingBox
from pyproj.exceptions import CRSError

from soundmap.encoder import InputSpec, Reading
from soundmap.errors import InputError, UsageError
from soundmap.grid import (
    crs_of,
    is_locally_metric,
    metres_per_unit,
    region_bounds,
    snap_grid,
    x_period,
)
from soundmap.lattice import Lattice, stride_of
from soundmap.region import Region, polygons_of, region_from_geobox
from soundmap.sources.base import SourceInfo

# A window of 64 such pixels is wider than 60 km: no model could name the sound of that.
_COARSEST_GSD_M = 1000.0
# Imagery that covers this share of the way around the globe is taken to go all around.
_AROUND = 0.95
# Cells whose sides differ by no more than this share of what was asked are true.
_TRUE = 0.02
# Imagery held at once for a unit, pixels along one side.
_UNIT_PX = 2048
_MOST_UNIT_CELLS = 512
# So that a map of all land, a cell per window, has fewer than a hundred thousand units.
_LEAST_UNIT_CELLS = 24
# Windows of models whose patches need all of their window overlap: with units of so many windows a
# side, those that straddle a border and are encoded twice are few.
_WINDOWS_PER_UNIT = 18
# Windows of models whose patches need little context: so many cells, and their margin, a side.
_TILE_CELLS = 64


@dataclass(frozen=True)
class Layout:
    """The cells of a map and how imagery is read for them."""

    grid: GeoBox
    """All output cells, north-up."""
    region: Region
    """What is mapped."""
    lattice: Lattice | None
    """Where windows lie; None: in each cell's own UTM or polar zone."""
    reading: Reading
    unit_cells: int
    """Side of a unit of work in cells."""
    cell_m: float
    """Ground metres along a cell, as asked for or as the model has it."""
    ground_m: tuple[float, float]
    """Ground metres across and along a cell in the middle of the map; elsewhere a CRS of degrees
    has narrower or wider ones."""


def parse_crs(text: str) -> CRS:
    """Read a CRS as a user writes it: "EPSG:32633", "32633", or WKT.

    Raises
    ------
    UsageError
        It is not a CRS with coordinates on the ground.
    """
    try:
        crs = CRS(f"EPSG:{text}" if text.strip().isdigit() else text)
        usable = crs.geographic or crs.projected
    except (CRSError, ValueError, TypeError) as error:
        raise UsageError(
            f"--crs {text!r} is not a CRS: give auto or a code like EPSG:32633"
        ) from error
    if not usable:
        raise UsageError(
            f"--crs {text!r} is neither geographic nor projected: give EPSG:32633, say"
        )
    return crs


def cell_px_of(spec: InputSpec, detail: str) -> int:
    """Pixels along a cell: of a patch, or of a window."""
    return spec.patch_px if detail == "patch" else spec.window_px


def lattice_of(
    spec: InputSpec,
    detail: str,
    crs: CRS,
    cell: tuple[float, float],
    anchor: tuple[float, float],
) -> Lattice:
    """Lay a model's cells and windows out in a CRS."""
    cell_px = cell_px_of(spec, detail)
    if detail == "image":
        return Lattice(crs, cell, anchor, cell_px, 1)
    if spec.context_px is None:
        return Lattice(crs, cell, anchor, cell_px, spec.patches)
    margin = -(-spec.context_px // cell_px)
    return Lattice(crs, cell, anchor, cell_px, _TILE_CELLS, margin)


def choose_layout(
    info: SourceInfo,
    spec: InputSpec,
    region: Region | None,
    *,
    detail: str = "patch",
    crs: str = "auto",
    resolution_m: float | None = None,
    gsd_m: float | None = None,
    scale: int = 1,
) -> Layout:
    """Choose the cells of a map.

    With ``crs="auto"`` and no resolution, cells are counted from the imagery's corner, so that maps
    of parts share the cells of the whole. They are whole multiples of its pixels and nothing is
    resampled, but for models that were trained on resized crops: these read pixels of just the
    size that the resizing made.

    Parameters
    ----------
    info
        The imagery.
    spec
        What the model reads.
    region
        What to map; None: all of the imagery.
    detail
        "patch" or "image".
    crs
        "auto": the imagery's own.
    resolution_m
        Cell size in ground metres; None: the model's own.
    gsd_m
        Metres per pixel to read imagery at; None: chosen by the model's card.
    scale
        How many native tiles wide a window is.

    Raises
    ------
    UsageError
        An option cannot be used.
    InputError
        The region lies off the imagery, or the imagery is too coarse.
    """
    native = info.native_grid
    if native is None or native.crs is None:
        raise InputError(f"{info.name} has no pixel grid of its own: give a raster")
    if info.native_gsd_m > _COARSEST_GSD_M:
        raise InputError(
            f"{info.name} has pixels of {info.native_gsd_m / 1000:.3g} km: too coarse to tell what "
            f"a place sounds like; use imagery of {_COARSEST_GSD_M:g} m or finer"
        )
    if resolution_m is not None and not (math.isfinite(resolution_m) and resolution_m > 0):
        raise UsageError(f"--resolution {resolution_m} is not a positive number of metres")
    cell_px = cell_px_of(spec, detail)
    reading = spec.reading(info.native_gsd_m, gsd_m, scale)
    own_cell_m = cell_px * reading.gsd_m
    cell_m = resolution_m or own_cell_m

    out_crs = native.crs if crs == "auto" else parse_crs(crs)
    own = out_crs == native.crs
    anchor = _corner(native) if own else (0.0, 0.0)
    bounds = _imagery_bounds(native, out_crs, info.name)
    part = None if region is None else _part_of(region, native, out_crs, bounds, info.name)
    if own and resolution_m is None:
        cell = _own_cell(info, own_cell_m, spec)
    else:
        cell = _cell_of_size(cell_m, part or bounds, crs, out_crs)
    if _goes_around(bounds) and not is_locally_metric(part or bounds):
        # Else the cells on either side of the seam would be counted from different lines.
        period = x_period(out_crs) or cell[0]
        cell = period / max(1, round(period / cell[0])), cell[1]
    grid = _snap(bounds, cell, anchor, "nearest" if own else "cover")
    if region is not None and part is not None:
        grid = _common(_snap(part, cell, anchor, "cover"), grid, region, info.name)

    lattice = None
    if is_locally_metric(grid):
        own_cell = cell
        if not own or resolution_m is not None:
            own_cell = own_cell_m / cell_m * cell[0], own_cell_m / cell_m * cell[1]
        lattice = lattice_of(spec, detail, out_crs, own_cell, anchor)
    side = int(_unit_px(spec, detail) * reading.gsd_m / cell_m)
    return Layout(
        grid=grid,
        region=_mapped(region, grid, native, info.name),
        lattice=lattice,
        reading=reading,
        unit_cells=min(_MOST_UNIT_CELLS, max(_LEAST_UNIT_CELLS, side)),
        cell_m=cell_m,
        ground_m=_ground_m(grid),
    )


def _part_of(
    region: Region, native: GeoBox, crs: CRS, imagery: BoundingBox, name: str
) -> BoundingBox:
    """Bounds of the part of a region that has imagery, on the turn of the globe that this is on.

    Far from the imagery its CRS may show nothing, or fold: a region's other end does not count.
    """
    footprint = region_from_geobox(native, name).geometry
    here = polygons_of(shapely.intersection(region.geometry, footprint))
    if here.is_empty:
        raise _off(region, name)
    bounds = region_bounds(here, crs)
    period = x_period(crs)
    if period is None:
        return bounds
    middle = (bounds.left + bounds.right) / 2, (imagery.left + imagery.right) / 2
    turn = period * round((middle[1] - middle[0]) / period)
    if _goes_around(imagery):
        # Imagery on both sides of the seam: the part lies in one piece, at its own place.
        turn = 0.0
    return BoundingBox(bounds.left + turn, bounds.bottom, bounds.right + turn, bounds.top, crs)


def _goes_around(bounds: BoundingBox) -> bool:
    """Whether imagery reaches (nearly) around the globe, where this shows in its CRS."""
    period = x_period(crs_of(bounds))
    return period is not None and bounds.span_x > _AROUND * period


def _own_cell(info: SourceInfo, own_cell_m: float, spec: InputSpec) -> tuple[float, float]:
    """Width and height of the model's cells in the imagery's own CRS.

    They are whole pixels where that keeps them square on the ground.
    """
    native = info.native_grid
    assert native is not None
    width, height = _pixel_size(native)
    middle = native.boundingbox
    centre = (middle.left + middle.right) / 2, (middle.bottom + middle.top) / 2
    across, along = metres_per_unit(crs_of(native), *centre)
    if not abs(across / along - 1) > _TRUE:
        # Alike in both directions, or unknown.
        factor = own_cell_m / info.native_gsd_m
        if not spec.resized:
            factor = max(1, round(factor))
        return width * factor, height * factor
    factors = own_cell_m / (width * across), own_cell_m / (height * along)
    whole = tuple(max(1, round(factor)) for factor in factors)
    if all(abs(w / f - 1) <= _TRUE for w, f in zip(whole, factors, strict=True)):
        factors = whole[0], whole[1]
    return width * factors[0], height * factors[1]


def _cell_of_size(
    cell_m: float, place: BoundingBox, crs_name: str, crs: CRS
) -> tuple[float, float]:
    """Width and height in CRS units of a cell so many ground metres wide in a place's middle."""
    middle = (place.left + place.right) / 2, (place.bottom + place.top) / 2
    across, along = metres_per_unit(crs, *middle)
    if not (math.isfinite(across) and math.isfinite(along)):
        raise UsageError(
            f"--crs {crs_name} does not reach the region: choose one made for the place"
        )
    return cell_m / across, cell_m / along


def _ground_m(grid: GeoBox) -> tuple[float, float]:
    """Ground metres across and along a cell in the middle of a grid."""
    bounds = grid.boundingbox
    middle = (bounds.left + bounds.right) / 2, (bounds.bottom + bounds.top) / 2
    across, along = metres_per_unit(crs_of(grid), *middle)
    return grid.affine.a * across, -grid.affine.e * along


def _mapped(region: Region | None, grid: GeoBox, native: GeoBox, name: str) -> Region:
    """Region whose units are computed.

    A box asks for all cells of its grid, the corners too that bulge over its curved outline: were
    these left out by whole units, the map would depend on the size of the units.
    """
    if region is None:
        return region_from_geobox(native, name)
    return region if region.clip else region_from_geobox(grid, region.label)


def _unit_px(spec: InputSpec, detail: str) -> int:
    """Imagery pixels along a unit."""
    if detail == "image" or spec.context_px is not None:
        return _UNIT_PX
    stride = stride_of(spec.patches)
    cells = stride * -(-_WINDOWS_PER_UNIT * spec.patches // stride)
    return max(_UNIT_PX, cells * spec.patch_px)


def _corner(native: GeoBox) -> tuple[float, float]:
    bounds = native.boundingbox
    return bounds.left, bounds.top


def _pixel_size(native: GeoBox) -> tuple[float, float]:
    """Width and height of a pixel in CRS units; for a rotated grid, of a square of its area."""
    a = native.affine
    if a.b or a.d:
        side = math.sqrt(abs(a.determinant))
        return side, side
    return abs(a.a), abs(a.e)


def _imagery_bounds(native: GeoBox, crs: CRS, name: str) -> BoundingBox:
    if crs == native.crs:
        return native.boundingbox
    return region_bounds(region_from_geobox(native, name).geometry, crs)


def _snap(
    bounds: BoundingBox, cell: tuple[float, float], anchor: tuple[float, float], mode: str
) -> GeoBox:
    """Snap in units of cells, as their width and height may differ."""
    (width, height), (x, y) = cell, anchor
    # Rows are counted downwards, so that half a cell at the bottom is rounded as one to the right.
    counted = BoundingBox(
        (bounds.left - x) / width,
        (y - bounds.top) / height,
        (bounds.right - x) / width,
        (y - bounds.bottom) / height,
        bounds.crs,
    )
    grid = snap_grid(counted, 1.0, (0.0, 0.0), mode)
    col, row = round(grid.affine.c), round(grid.affine.f) - grid.shape[0]
    affine = Affine(width, 0, x + col * width, 0, -height, y - row * height)
    return GeoBox(grid.shape, affine, bounds.crs)


def _common(asked: GeoBox, imagery: GeoBox, region: Region, name: str) -> GeoBox:
    """Cells of both grids, which share their lines."""
    a, b = asked.boundingbox, imagery.boundingbox
    width, height = asked.affine.a, -asked.affine.e
    left, right = max(a.left, b.left), min(a.right, b.right)
    if _goes_around(b):
        # The same imagery comes again on either side.
        left, right = a.left, a.right
    bottom, top = max(a.bottom, b.bottom), min(a.top, b.top)
    cols, rows = round((right - left) / width), round((top - bottom) / height)
    if cols < 1 or rows < 1:
        raise _off(region, name)
    # The corner is taken from a grid line, not computed anew, so that it agrees to the last bit.
    return GeoBox((rows, cols), Affine(width, 0, left, 0, -height, top), asked.crs)


def _off(region: Region, name: str) -> InputError:
    return InputError(
        f"the region ({region.label}) lies off the imagery {name}: `rio info --bounds` or "
        "`gdalinfo` shows what the imagery covers"
    )

"""One unit of work: read imagery, cut windows, encode, score.

Reading is a step of its own, so that a runner can read the next unit while one is encoded.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import rasterio.warp
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox

from soundmap.encoder import Conditions, Encoder
from soundmap.grid import (
    cell_lonlat,
    crs_of,
    pixel_lonlat,
    project_lonlat,
    region_mask,
    utm_zone_key,
)
from soundmap.lattice import Lattice, Span
from soundmap.layout import cell_px_of, lattice_of
from soundmap.plan import Plan, Unit
from soundmap.scoring import ConceptBank, score
from soundmap.sources.base import Image, Source

# A cell has imagery if at least this share of its pixels is valid.
_LEAST_VALID = 0.5
# Pixels handed to the encoder at once: enough to keep its threads busy, little to hold.
_BATCH_PX = 640 * 64 * 64
# Cells scored at once.
_SCORE_CELLS = 4096
# Imagery validity is sampled so finely along a cell where cells are warped.
_MASK_SAMPLES = 8
# Cells this much larger than the model's are averaged, others interpolated.
_AVERAGE_FROM = 1.5


Vectors = NDArray[np.float32] | None


@dataclass(frozen=True)
class Job:
    """All that a worker needs to compute units: plain data that pickles."""

    plan: Plan
    source: Source
    model: str
    """Bundled name or folder."""
    bank: ConceptBank
    value: str
    detail: str
    """"patch": a cell per patch; "image": a cell per window."""
    lattice: Lattice | None
    """Where windows lie; None: in the UTM or polar zone of every cell, at ``gsd_m``."""
    gsd_m: float
    """Metres per pixel at which imagery is read."""
    told_gsd_m: float
    """Metres per pixel that the model is told."""
    store: str
    """Path of the store that is written."""
    conditions: Conditions = field(default_factory=Conditions)
    """Month, hour and scale."""
    precision: str = "auto"
    """What the encoder computes with."""


@dataclass(frozen=True)
class Block:
    """Imagery under a span of lattice cells, with the margin that its windows need."""

    lattice: Lattice
    span: Span
    image: Image | None
    """Of the cells that the span's windows cover; None once they are encoded."""
    chosen: NDArray[np.bool_] | None
    """bool[h, w] over the unit's cells that this block is to fill; None: all of them."""


@dataclass(frozen=True)
class UnitInput:
    """All imagery of a unit."""

    blocks: tuple[Block, ...]
    wanted: NDArray[np.bool_]
    """bool[h, w], False for cells off the region or, where cells are warped, off the imagery."""
    warped: bool

    def without_imagery(self) -> UnitInput:
        """Let go of the pixels, which scoring does not need."""
        return replace(self, blocks=tuple(replace(b, image=None) for b in self.blocks))


def read_unit(job: Job, unit: Unit, encoder: Encoder) -> UnitInput:
    """Read the imagery of a unit.

    Raises
    ------
    SourceError
        The imagery could not be read.
    """
    region = job.plan.region
    wanted = np.ones(unit.cells.shape, bool)
    if region.clip:
        wanted = region_mask(region.geometry, unit.cells)
    direct = job.lattice.span_of(unit.cells) if job.lattice else None
    if job.lattice and direct:
        return UnitInput((_read_block(job, encoder, job.lattice, direct, None),), wanted, False)
    wanted &= _valid_cells(job.source, unit.cells)
    blocks = []
    if wanted.any():
        lon, lat = cell_lonlat(unit.cells)
        if job.lattice:
            blocks.append(_read_around(job, encoder, job.lattice, unit.cells, None))
        else:
            zones = utm_zone_key(lon, lat)
            for zone in np.unique(zones[wanted]):
                lattice = _zone_lattice(job, encoder, int(zone))
                blocks.append(_read_around(job, encoder, lattice, unit.cells, zones == zone))
    return UnitInput(tuple(blocks), wanted, True)


def encode_unit(job: Job, data: UnitInput, encoder: Encoder) -> list[Vectors]:
    """Embed every cell under a unit: the part that takes the time.

    Returns
    -------
    list
        For every block of the unit float32[h, w, D], NaN where there is no imagery, or None if
        that is everywhere.
    """
    wanted = None if data.warped else data.wanted
    return [encode_block(block, encoder, job, wanted) for block in data.blocks]


def score_unit(
    job: Job, unit: Unit, data: UnitInput, encoded: list[Vectors]
) -> NDArray[np.float32] | None:
    """Turn a unit's embeddings into the values of its cells.

    Returns
    -------
    ndarray or None
        float32[C, h, w], NaN where there is no imagery or no region; None if that is everywhere.
    """
    if not data.warped:
        return None if encoded[0] is None else _scored(encoded[0], job)
    result = np.full((len(job.bank), *unit.cells.shape), np.nan, np.float32)
    for block, vectors in zip(data.blocks, encoded, strict=True):
        if vectors is None:
            continue
        values = _spread(_scored(vectors, job))
        warped = _warp(values, block.lattice.cells(block.span), unit.cells)
        chosen = data.wanted if block.chosen is None else data.wanted & block.chosen
        result[:, chosen] = warped[:, chosen]
    return None if np.isnan(result).all() else result


def _scored(vectors: NDArray[np.float32], job: Job) -> NDArray[np.float32]:
    """Score a few rows at a time: what fits the caches is many times faster than all at once."""
    height, width, _ = vectors.shape
    result = np.empty((len(job.bank), height, width), np.float32)
    step = max(1, _SCORE_CELLS // width)
    for row in range(0, height, step):
        values = score(vectors[row : row + step], job.bank, job.value)
        result[:, row : row + step] = values.transpose(2, 0, 1)
    return result


def encode_block(
    block: Block, encoder: Encoder, job: Job, wanted: NDArray[np.bool_] | None
) -> NDArray[np.float32] | None:
    """Embed every cell of a block.

    Parameters
    ----------
    block
        Imagery.
    wanted
        bool[h, w], cells to embed; None: all.

    Returns
    -------
    ndarray or None
        float32[h, w, D], unit vectors, NaN where there is no imagery; None if that is everywhere.
    """
    lattice, span, image = block.lattice, block.span, block.image
    assert image is not None
    tiling = lattice.tiling(span)
    covered, (height, width), px = tiling.covered, tiling.shape, lattice.cell_px
    rows, cols = covered.shape
    valid = image.valid.reshape(rows, px, cols, px).mean(axis=(1, 3)) >= _LEAST_VALID
    inner = (
        slice(span.row0 - covered.row0, span.row1 - covered.row0),
        slice(span.col0 - covered.col0, span.col1 - covered.col0),
    )
    needed = np.zeros_like(valid)
    needed[inner] = valid[inner] if wanted is None else valid[inner] & wanted
    if not needed.any():
        return None
    core = _core(tiling.weights > 0)
    corners = np.array(
        [
            (row, col)
            for row, col in tiling.corners.tolist()
            if needed[row : row + height, col : col + width][core].any()
        ],
        np.int64,
    )
    if lattice.margin is not None and not image.valid.all():
        spare_px = lattice.margin * px - (encoder.spec.context_px or 0)
        image = extend_edges(image, spare_px, encoder.spec.fill_rgb)
    total = np.zeros((rows, cols, encoder.dim), np.float32)
    weights = tiling.weights[core][..., None]
    places = None
    if "lonlat" in encoder.spec.metadata:
        middle = corners + np.array([height, width]) / 2
        places = np.stack(pixel_lonlat(lattice.cells(covered), middle[:, 1], middle[:, 0]), 1)
    given = job.conditions
    batch_size = max(1, _BATCH_PX // (height * width * px * px))
    for start in range(0, len(corners), batch_size):
        batch = corners[start : start + batch_size]
        pixels = cut_windows(image, batch * px, (height * px, width * px))
        encoding = encoder.encode_images(
            pixels,
            None if places is None else places[start : start + batch_size],
            given.month,
            given.hour,
            given.scale,
            gsd_m=job.told_gsd_m,
            details=(job.detail,),
        )
        parts = encoding.patches
        if parts is None:
            assert encoding.image is not None
            parts = encoding.image[:, None, None, :]
        for (row, col), part in zip(batch.tolist(), parts, strict=True):
            place = total[row : row + height, col : col + width][core]
            if lattice.margin is None:
                place += part[core] * weights
            else:
                place[...] = part[core]
    result = total[inner]
    if lattice.margin is None:
        result /= np.maximum(np.linalg.norm(result, axis=-1, keepdims=True), 1e-12)
    if not needed[inner].all():
        result[~needed[inner]] = np.nan
    return result


def _core(counted: NDArray[np.bool_]) -> tuple[slice, slice]:
    """The rows and columns of a window that count: all but its margin."""
    rows, cols = np.flatnonzero(counted.any(axis=1)), np.flatnonzero(counted.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(cols[0]), int(cols[-1]) + 1)


def cut_windows(
    image: Image, corners: NDArray[np.int64], shape: tuple[int, int]
) -> NDArray[np.uint8]:
    """Cut windows; what is not valid takes the mean colour of the rest of its window.

    Parameters
    ----------
    image
        Imagery.
    corners
        int64[B, 2], row and column of each window's upper left pixel.
    shape
        Rows and columns of pixels of a window.

    Returns
    -------
    ndarray
        uint8[B, 3, rows, cols].
    """
    rows, cols = corners.T
    pixels = sliding_window_view(image.pixels, shape, axis=(1, 2))[:, rows, cols]
    out = np.ascontiguousarray(pixels.transpose(1, 0, 2, 3))
    masks = sliding_window_view(image.valid, shape)[rows, cols]
    for i in np.flatnonzero(~masks.all(axis=(1, 2))):
        mask = masks[i]
        if mask.any():
            out[i][:, ~mask] = np.rint(out[i][:, mask].mean(axis=1, keepdims=True)).astype(np.uint8)
    return out


def extend_edges(image: Image, reach_px: int, beyond: tuple[int, int, int]) -> Image:
    """Fill what is not valid, each pixel from its near surroundings alone.

    Pixels next to valid ones take the mean of these, ring by ring; further out stands one colour.
    As nothing depends on the window, or on how much was read, a cell at the imagery's edge has
    the same number in every map.

    Parameters
    ----------
    image
        Imagery.
    reach_px
        How many rings are filled.
    beyond
        Red, green and blue of all that lies further out.

    Returns
    -------
    Image
        Valid everywhere.
    """
    height, width = image.valid.shape
    pixels = np.pad(image.pixels, ((0, 0), (1, 1), (1, 1)))
    known = np.pad(image.valid, 1)
    steps = ((-1, 0), (1, 0), (0, -1), (0, 1))
    for _ in range(reach_px):
        ring = np.zeros_like(known)
        for dy, dx in steps:
            ring |= np.roll(known, (dy, dx), (0, 1))
        ring &= ~known
        ring[[0, -1], :] = ring[:, [0, -1]] = False
        rows, cols = np.nonzero(ring)
        if not len(rows):
            break
        total = np.zeros((3, len(rows)), np.float32)
        count = np.zeros(len(rows), np.float32)
        for dy, dx in steps:
            there = known[rows + dy, cols + dx]
            total += pixels[:, rows + dy, cols + dx] * there
            count += there
        pixels[:, rows, cols] = np.rint(total / count).astype(np.uint8)
        known |= ring
    inner = (slice(1, height + 1), slice(1, width + 1))
    filled = np.ascontiguousarray(pixels[(slice(None), *inner)])
    filled[:, ~known[inner]] = np.array(beyond, np.uint8)[:, None]
    return Image(filled, np.ones_like(image.valid), image.grid)


def _read_block(
    job: Job, encoder: Encoder, lattice: Lattice, span: Span, chosen: NDArray[np.bool_] | None
) -> Block:
    pixels = lattice.pixels(lattice.tiling(span).covered)
    # As the crops were resized that such a model was trained on.
    image = job.source.read(pixels, "cubic") if encoder.spec.resized else job.source.read(pixels)
    return Block(lattice, span, image, chosen)


def _read_around(
    job: Job,
    encoder: Encoder,
    lattice: Lattice,
    cells: GeoBox,
    chosen: NDArray[np.bool_] | None,
) -> Block:
    """Read what lies under cells of another grid, with a cell to spare for interpolation."""
    corners = cells.pad(1)
    keep = np.zeros(corners.shape, bool)
    if chosen is None:
        keep[[0, -1], :] = keep[:, [0, -1]] = True
    else:
        keep = np.asarray(sliding_window_view(np.pad(chosen, 2), (3, 3)).any(axis=(2, 3)))
    lon, lat = cell_lonlat(corners)
    keep &= np.isfinite(lon) & np.isfinite(lat)
    xy = project_lonlat(lattice.crs, lon[keep], lat[keep])
    xy = xy[np.isfinite(xy).all(axis=1)]
    left, bottom = xy.min(axis=0)
    right, top = xy.max(axis=0)
    span = lattice.span_covering(left, bottom, right, top).grown(1)
    return _read_block(job, encoder, lattice, span, chosen)


def _zone_lattice(job: Job, encoder: Encoder, zone: int) -> Lattice:
    side_m = cell_px_of(encoder.spec, job.detail) * job.gsd_m
    return lattice_of(encoder.spec, job.detail, CRS(f"EPSG:{zone}"), (side_m, side_m), (0.0, 0.0))


def _valid_cells(source: Source, cells: GeoBox) -> NDArray[np.bool_]:
    """Tell which cells have imagery under at least half of them."""
    rows, cols = cells.shape
    n = _MASK_SAMPLES
    fine = source.read(cells.zoom_to((rows * n, cols * n))).valid
    share = fine.reshape(rows, n, cols, n).mean(axis=(1, 3))
    return np.asarray(share >= _LEAST_VALID)


def _spread(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Carry values two cells out over the imagery's edge, for cells that are half beyond it."""
    out = values.copy()
    for _ in range(2):
        padded = np.pad(out, ((0, 0), (1, 1), (1, 1)), constant_values=np.nan)
        near = sliding_window_view(padded, (3, 3), axis=(1, 2))
        known = np.isfinite(near)
        count = known.sum(axis=(3, 4))
        total = np.where(known, near, 0).sum(axis=(3, 4))
        fill = np.isnan(out) & (count > 0)
        out[fill] = total[fill] / count[fill]
    return out


def _warp(values: NDArray[np.float32], grid: GeoBox, cells: GeoBox) -> NDArray[np.float32]:
    """Bring scores from the model's cells to those of the map.

    Every place is projected exactly, so that a cell's number does not depend on what else is
    warped with it: GDAL approximates along a row, and differently for each row's length.
    """
    height, width = cells.shape
    x, y = cells.affine * (width / 2, height / 2)
    to_grid = rasterio.warp.transform(cells.crs, grid.crs, [x, x + cells.affine.a], [y, y])
    ratio = np.hypot(*np.diff(to_grid, axis=1)[:, 0]) / grid.affine.a
    # Larger cells are the mean over places as close as the model's own cells.
    n = int(np.ceil(ratio)) if ratio > _AVERAGE_FROM else 1
    lon, lat = cell_lonlat(cells.zoom_to((height * n, width * n)))
    xy = project_lonlat(crs_of(grid), lon.ravel(), lat.ravel())
    a, _, c, _, e, f, *_ = ~grid.affine
    col, row = a * xy[:, 0] + c - 0.5, e * xy[:, 1] + f - 0.5
    fine = _bilinear(values, row, col).reshape(-1, height, n, width, n)
    known = np.isfinite(fine)
    count = known.sum(axis=(2, 4))
    total = np.where(known, fine, 0).sum(axis=(2, 4))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def _bilinear(
    values: NDArray[np.float32], row: NDArray[np.float64], col: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Interpolate float32[C, H, W] at fractional cell centres: float32[C, N], from known cells."""
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
        result: NDArray[np.float32] = np.where(weights > 0, total / weights, np.float32(np.nan))
    return result

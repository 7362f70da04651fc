"""One unit of work: read imagery, cut windows, encode, score.

Reading is a step of its own, so that a runner can read the next unit while one is encoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox

from soundmap.encoder import Conditions, Encoder
from soundmap.grid import cell_lonlat, pixel_lonlat, utm_zone_key
from soundmap.lattice import Lattice, Span
from soundmap.layout import cell_px_of, lattice_of
from soundmap.plan import Plan, Unit
from soundmap.scoring import ConceptBank, score
from soundmap.sources.base import Image, Source
from soundmap.warp import (
    CARRIED_CELLS,
    Places,
    cells_under,
    places_on,
    span_under,
    warp,
    with_neighbours_of_gaps,
)

# A cell has imagery if at least this share of its pixels is valid.
_LEAST_VALID = 0.5
# Pixels handed to the encoder at once: enough to keep its threads busy, little to hold.
_BATCH_PX = 640 * 64 * 64
# Cells scored at once.
_SCORE_CELLS = 4096
MASK_SAMPLES = 8
"""Imagery validity is sampled so finely along a cell where cells are warped."""

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
    places: tuple[Places, ...] = ()
    """Where the unit's cells lie on the lattice that this block is to fill; none if they are cells
    of the lattice."""


@dataclass(frozen=True)
class UnitInput:
    """All imagery of a unit."""

    blocks: tuple[Block, ...]
    wanted: NDArray[np.bool_]
    """bool[h, w], False for cells off the region or, where cells are warped, off the imagery; no
    block is read where none is wanted."""
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
    wanted = np.ones(unit.cells.shape, bool)
    if job.plan.area is not None:
        wanted = job.plan.area.mask(unit.cells)
    if not wanted.any():
        return UnitInput((), wanted, True)
    direct = job.lattice.span_of(unit.cells) if job.lattice else None
    if job.lattice and direct:
        return UnitInput((_read_block(job, encoder, job.lattice, direct),), wanted, False)
    wanted &= _valid_cells(job.source, unit.cells)
    blocks = []
    for lattice, chosen in lattices(job, encoder, unit.cells, wanted):
        block = _read_around(job, encoder, lattice, unit.cells, chosen)
        if block is not None:
            blocks.append(block)
    return UnitInput(tuple(blocks), wanted, True)


def lattices(
    job: Job, encoder: Encoder, cells: GeoBox, wanted: NDArray[np.bool_]
) -> Iterator[tuple[Lattice, NDArray[np.bool_]]]:
    """Give the lattices that cells of a map are warped from, and which cells, bool[h, w], each."""
    if not wanted.any():
        return
    if job.lattice:
        yield job.lattice, wanted
        return
    zones = utm_zone_key(*cell_lonlat(cells))
    for zone in np.unique(zones[wanted]):
        yield _zone_lattice(job, encoder, int(zone)), wanted & (zones == zone)


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
    rows, cols = unit.cells.shape
    result = np.full((len(job.bank), rows * cols), np.nan, np.float32)
    for block, vectors in zip(data.blocks, encoded, strict=True):
        if vectors is not None:
            values, cells = warp(_scored(vectors, job), block.span, block.places)
            result[:, cells] = values
    return None if np.isnan(result).all() else result.reshape(-1, rows, cols)


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
        bool[h, w], cells to embed; None: all, or where they are warped those that are needed.

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
    valid = _valid_share(image.valid, px)
    inner = (
        slice(span.row0 - covered.row0, span.row1 - covered.row0),
        slice(span.col0 - covered.col0, span.col1 - covered.col0),
    )
    if block.places:
        wanted = with_neighbours_of_gaps(cells_under(block.places, span), valid[inner])
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
    batch_size = batch_of(height * width * px * px)
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


def batch_of(window_px: int) -> int:
    """How many windows of so many pixels are encoded at once."""
    return max(1, _BATCH_PX // window_px)


def _valid_share(valid: NDArray[np.bool_], px: int) -> NDArray[np.bool_]:
    """Tell which cells have imagery: bool[H, W] of pixels to bool[H / px, W / px]."""
    rows, cols = (size // px for size in valid.shape)
    share = valid.reshape(rows, px, cols, px).mean(axis=(1, 3))
    return np.asarray(share >= _LEAST_VALID)


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
    job: Job, encoder: Encoder, lattice: Lattice, span: Span, places: tuple[Places, ...] = ()
) -> Block:
    pixels = lattice.pixels(lattice.tiling(span).covered)
    # As the crops were resized that such a model was trained on.
    image = job.source.read(pixels, "cubic") if encoder.spec.resized else job.source.read(pixels)
    return Block(lattice, span, image, places)


def _read_around(
    job: Job, encoder: Encoder, lattice: Lattice, cells: GeoBox, chosen: NDArray[np.bool_]
) -> Block | None:
    """Read what lies under cells of another grid; None if they have no place on the lattice."""
    places = places_on(lattice, cells, chosen)
    span = span_under(places)
    if span is None:
        return None
    block = _read_block(job, encoder, lattice, span, places)
    assert block.image is not None
    covered = lattice.tiling(span).covered
    inner = (
        slice(span.row0 - covered.row0, span.row1 - covered.row0),
        slice(span.col0 - covered.col0, span.col1 - covered.col0),
    )
    valid = _valid_share(block.image.valid, lattice.cell_px)[inner]
    if valid[cells_under(places, span)].all():
        return block
    # At the imagery's edge values are carried out of cells that no other cell needs.
    return _read_block(job, encoder, lattice, span.grown(CARRIED_CELLS), places)


def _zone_lattice(job: Job, encoder: Encoder, zone: int) -> Lattice:
    side_m = cell_px_of(encoder.spec, job.detail) * job.gsd_m
    return lattice_of(encoder.spec, job.detail, CRS(f"EPSG:{zone}"), (side_m, side_m), (0.0, 0.0))


def _valid_cells(source: Source, cells: GeoBox) -> NDArray[np.bool_]:
    """Tell which cells have imagery under at least half of them."""
    rows, cols = cells.shape
    n = MASK_SAMPLES
    return _valid_share(source.read(cells.zoom_to((rows * n, cols * n))).valid, n)

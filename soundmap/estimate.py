"""What a run will take, told before it starts: windows, bytes, memory, time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np

from soundmap.encoder import Encoder
from soundmap.errors import SourceError
from soundmap.grid import block, crs_of, ground_gsd_m
from soundmap.lattice import Span
from soundmap.layout import cell_px_of, lattice_of
from soundmap.pipeline import MASK_SAMPLES, Job, batch_of, lattices
from soundmap.plan import Plan, Unit
from soundmap.scoring import score
from soundmap.warp import places_on

# So many units are counted one by one; of more, as many are looked at, spread over all.
_COUNTED_UNITS = 256
# Cells along a side at which it is asked how much of a unit is wanted.
_SAMPLED_CELLS = 16
# Compressed maps take 0.2 to 0.67 of what they hold, by scene; overviews are in it.
_PACKED_SHARE = 0.6
# Units computed side by side in one process, and what they need besides imagery and vectors.
_UNITS_AT_ONCE = 2
_BARE_BYTES = 700e6
# Three colours and validity, and as much again while it is resampled.
_IMAGE_BYTES = 8
# A run of fewer windows is over before its pace is known.
_TINY_RUN = 16
_PROBE_SECONDS = 0.7
# Encoded to find the pace: this part of what is encoded at once in a run.
_PROBED_PARTS = 4
_PROBED_PX = 512
_PROBED_CELLS = 4096
# Cutting, storing and telling take this much on top of reading, encoding and scoring.
_BESIDES = 1.15


@dataclass(frozen=True)
class Estimate:
    """What a plan will cost."""

    units: int
    """Tasks."""
    cells: int
    """Cells in all units, off the region too."""
    windows: int
    """Windows of imagery that the model sees."""
    window_px: int
    """Pixels of a window."""
    read_px: int
    """Pixels of imagery that are read."""
    bytes_out: int
    """Size of the output before compression."""
    bytes_packed: int
    """A guess of its size in the end."""
    memory_bytes: int
    """A guess of what a process needs at most."""
    seconds: float | None = None
    """How long all units take on this machine; None if that is not known."""


@dataclass(frozen=True)
class _Work:
    """What is done for a unit."""

    cells: int
    wanted: float
    """Cells that get a value if there is imagery."""
    windows: float
    encoded_px: float
    read_px: int
    held_bytes: int
    """Imagery, with its validity, and vectors."""


def estimate(job: Job, encoder: Encoder, dtype: str) -> Estimate:
    """Count what a job will cost.

    Parameters
    ----------
    job
        What is to be computed.
    encoder
        Its model.
    dtype
        "float32" or "uint8".
    """
    plan = job.plan
    side, (height, width) = plan.unit_cells, plan.grid.shape
    rows, cols = plan.units.indices.T
    cells = int(
        (np.minimum(height - rows * side, side) * np.minimum(width - cols * side, side)).sum()
    )
    count = len(plan.units)
    looked_at = np.unique(np.linspace(0, max(0, count - 1), _COUNTED_UNITS).astype(int))[:count]
    works = [_work(job, encoder, unit) for unit in plan.units.at(looked_at)]
    more = count / max(1, len(works))
    windows = sum(work.windows for work in works)
    wanted = sum(work.wanted for work in works) / max(1, sum(work.cells for work in works))
    values = len(job.bank)
    bytes_out = cells * values * (4 if dtype == "float32" else 1)
    held = max((work.held_bytes for work in works), default=0) + side**2 * values * 4
    return Estimate(
        units=count,
        cells=cells,
        windows=math.ceil(windows * more),
        window_px=round(sum(work.encoded_px for work in works) / windows) if windows else 0,
        read_px=round(sum(work.read_px for work in works) * more),
        bytes_out=bytes_out,
        bytes_packed=round(bytes_out * _PACKED_SHARE * wanted),
        memory_bytes=round(_BARE_BYTES + _UNITS_AT_ONCE * held),
    )


def _work(job: Job, encoder: Encoder, unit: Unit) -> _Work:
    px = cell_px_of(encoder.spec, job.detail)
    cells = math.prod(unit.cells.shape)
    share = _share(job.plan, unit)
    span = job.lattice.span_of(unit.cells) if job.lattice else None
    lattice, looked_up_px = job.lattice, 0
    if lattice is None or span is None:
        # Warped cells lie anywhere on the model's own. One more on each side is interpolated from.
        ground_m = math.sqrt(cells) * ground_gsd_m(unit.cells)
        own = math.ceil(ground_m / (px * job.gsd_m)) + 1
        lattice = lattice_of(encoder.spec, job.detail, crs_of(unit.cells), (1.0, 1.0), (0.0, 0.0))
        span = Span(0, own, 0, own)
        looked_up_px = cells * MASK_SAMPLES**2
    tiling = lattice.tiling(span)
    windows = len(tiling.corners) * share
    covered = math.prod(tiling.covered.shape)
    return _Work(
        cells=cells,
        wanted=cells * share,
        windows=windows,
        encoded_px=windows * math.prod(tiling.shape) * px**2,
        read_px=covered * px**2 + looked_up_px,
        held_bytes=covered * (_IMAGE_BYTES * px**2 + 4 * encoder.dim),
    )


def _share(plan: Plan, unit: Unit) -> float:
    """How much of a unit is wanted, 0 to 1."""
    if plan.area is None:
        return 1.0
    rows, cols = (min(_SAMPLED_CELLS, size) for size in unit.cells.shape)
    return float(plan.area.mask(unit.cells.zoom_to((rows, cols))).mean())


def with_time(cost: Estimate, job: Job, encoder: Encoder) -> Estimate:
    """Add how long a run takes here: reads, encodes and scores a little, in about a second.

    Tiny runs are left without: finding out would take longer than the run.
    """
    if cost.windows < _TINY_RUN:
        return cost
    seconds = (
        cost.read_px * _read_seconds(job, encoder)
        + cost.windows * _encode_seconds(cost, job, encoder)
        + cost.cells * _score_seconds(job, encoder)
    )
    return replace(cost, seconds=seconds * _BESIDES)


def _read_seconds(job: Job, encoder: Encoder) -> float:
    """Time to read a pixel: of a tile, after another one whose reading opened the files."""
    side = -(-_PROBED_PX // cell_px_of(encoder.spec, job.detail))
    seconds = 0.0
    for position in (len(job.plan.units) // 3, 2 * len(job.plan.units) // 3):
        cells = job.plan.units[position].cells
        height, width = cells.shape
        middle = block(cells, height // 2, height // 2 + 1, width // 2, width // 2 + 1)
        for lattice, _ in lattices(job, encoder, middle, np.ones((1, 1), bool)):
            (place,) = places_on(lattice, middle, np.ones((1, 1), bool))
            if not np.isfinite(place.row[0, 0] + place.col[0, 0]):
                continue
            row, col = int(place.row[0, 0]), int(place.col[0, 0])
            tile = lattice.pixels(Span(row, row + side, col, col + side))
            started = time.perf_counter()
            try:
                job.source.read(tile)
            except SourceError:
                # The run will tell of it; here it is only not known how long reading takes.
                continue
            seconds = (time.perf_counter() - started) / math.prod(tile.shape)
    return seconds


def _encode_seconds(cost: Estimate, job: Job, encoder: Encoder) -> float:
    """Time to encode a window."""
    patch_px = encoder.spec.patch_px
    side = max(1, round(math.sqrt(cost.window_px) / patch_px)) * patch_px
    # Enough to share out to all threads, as a run does: a window by itself is much slower.
    count = -(-batch_of(side * side) // _PROBED_PARTS)
    noise = np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    lonlat = np.zeros((count, 2)) if "lonlat" in encoder.spec.metadata else None
    given = job.conditions

    def encode() -> float:
        started = time.perf_counter()
        encoder.encode_images(
            noise,
            lonlat,
            given.month,
            given.hour,
            given.scale,
            gsd_m=job.told_gsd_m,
            details=(job.detail,),
        )
        return time.perf_counter() - started

    encode()  # pays for what is set up once
    times = [encode()]
    while sum(times) < _PROBE_SECONDS:
        times.append(encode())
    return sum(times) / len(times) / count


def _score_seconds(job: Job, encoder: Encoder) -> float:
    """Time to score a cell."""
    vectors = np.random.default_rng(0).normal(size=(_PROBED_CELLS, 1, encoder.dim))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    started = time.perf_counter()
    score(vectors.astype(np.float32), job.bank, job.value)
    return (time.perf_counter() - started) / _PROBED_CELLS

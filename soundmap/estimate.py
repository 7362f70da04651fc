"""What a run will take, told before it starts: windows, bytes, memory, time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np

from soundmap.encoder import Conditions, Encoder, InputSpec
from soundmap.grid import crs_of, ground_gsd_m
from soundmap.lattice import Span, Tiling
from soundmap.layout import Layout, cell_px_of, lattice_of
from soundmap.pipeline import batch_of
from soundmap.plan import Plan, Unit

# So many units are counted one by one; of more, as many are looked at, spread over all.
_COUNTED_UNITS = 256
# Cells along a side at which it is asked how much of a unit is wanted.
_SAMPLED_CELLS = 16
# Compressed maps take 0.2 to 0.67 of what they hold, by scene; overviews are in it.
_PACKED_SHARE = 0.6
# Units computed side by side in one process, and what they need besides imagery and vectors.
_UNITS_AT_ONCE = 2
_BARE_BYTES = 700e6
# A run of fewer windows is over before its pace is known.
_TINY_RUN = 16
_PROBE_SECONDS = 0.7
# Encoded to find the pace: this part of what is encoded at once in a run.
_PROBED_PARTS = 4
# Reading, scoring and storing take this much on top of encoding.
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
    bytes_out: int
    """Size of the output before compression."""
    bytes_packed: int
    """A guess of its size in the end."""
    memory_bytes: int
    """A guess of what a process needs at most."""
    seconds: float | None = None
    """How long all units take on this machine; None if that is not known."""


def estimate(
    plan: Plan, layout: Layout, spec: InputSpec, dim: int, detail: str, values: int, dtype: str
) -> Estimate:
    """Count what a plan will cost.

    Parameters
    ----------
    plan
        The plan.
    layout
        What it was made from.
    spec, dim
        What the model reads, and the length of its vectors.
    detail
        "patch" or "image".
    values
        Output values per cell: concepts, times months and hours if there are any.
    dtype
        "float32" or "uint8".
    """
    side = plan.unit_cells
    height, width = plan.grid.shape
    rows, cols = plan.units.indices.T
    cells = int(
        (np.minimum(height - rows * side, side) * np.minimum(width - cols * side, side)).sum()
    )
    count = len(plan.units)
    looked_at = np.unique(np.linspace(0, max(0, count - 1), _COUNTED_UNITS).astype(int))[:count]
    shares = [(unit, _share(plan, unit)) for unit in plan.units.at(looked_at)]
    tilings = [(_tiling(layout, spec, detail, unit), share) for unit, share in shares]
    wanted = sum(unit.cells.shape[0] * unit.cells.shape[1] * share for unit, share in shares)
    of_cells = sum(unit.cells.shape[0] * unit.cells.shape[1] for unit, _ in shares)
    windows = sum(len(tiling.corners) * share for tiling, share in tilings)
    px = cell_px_of(spec, detail)
    pixels = sum(len(t.corners) * t.shape[0] * t.shape[1] * px**2 * s for t, s in tilings)
    more = count / max(1, len(looked_at))
    bytes_out = cells * values * (4 if dtype == "float32" else 1)
    return Estimate(
        units=count,
        cells=cells,
        windows=math.ceil(windows * more),
        window_px=round(pixels / windows) if windows else 0,
        bytes_out=bytes_out,
        bytes_packed=round(bytes_out * _PACKED_SHARE * (wanted / of_cells if of_cells else 0)),
        memory_bytes=round(
            _BARE_BYTES
            + _UNITS_AT_ONCE
            * (side**2 * values * 4 + max((_held(t, px, dim) for t, _ in tilings), default=0))
        ),
    )


def _share(plan: Plan, unit: Unit) -> float:
    """How much of a unit is wanted, 0 to 1."""
    if plan.area is None:
        return 1.0
    rows, cols = (min(_SAMPLED_CELLS, size) for size in unit.cells.shape)
    return float(plan.area.mask(unit.cells.zoom_to((rows, cols))).mean())


def _tiling(layout: Layout, spec: InputSpec, detail: str, unit: Unit) -> Tiling:
    """The windows of a unit: as they will lie, or where cells are warped about as many."""
    span = layout.lattice.span_of(unit.cells) if layout.lattice else None
    if layout.lattice and span:
        return layout.lattice.tiling(span)
    own_cell_m = cell_px_of(spec, detail) * layout.reading.gsd_m
    rows, cols = unit.cells.shape
    ground_m = math.sqrt(rows * cols) * ground_gsd_m(unit.cells)
    # A cell more on each side, which those at the border are interpolated from.
    cells = math.ceil(ground_m / own_cell_m) + 1
    lattice = lattice_of(spec, detail, crs_of(unit.cells), (1.0, 1.0), (0.0, 0.0))
    return lattice.tiling(Span(0, cells, 0, cells))


def _held(tiling: Tiling, cell_px: int, dim: int) -> int:
    """Bytes of a unit's imagery, with its validity, and of its vectors."""
    rows, cols = tiling.covered.shape
    return rows * cols * (4 * cell_px**2 + 4 * dim)


def with_time(
    cost: Estimate, encoder: Encoder, detail: str, conditions: Conditions, told_gsd_m: float
) -> Estimate:
    """Add how long a run takes here, from how long a few windows take: about a second.

    Tiny runs are left without: finding out would take longer than the run.
    """
    if cost.windows < _TINY_RUN:
        return cost
    patch_px = encoder.spec.patch_px
    side = max(1, round(math.sqrt(cost.window_px) / patch_px)) * patch_px
    # Enough to share out to all threads, as a run does: a window by itself is much slower.
    count = -(-batch_of(side * side) // _PROBED_PARTS)
    noise = np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    places = np.zeros((count, 2)) if "lonlat" in encoder.spec.metadata else None

    def encode() -> float:
        started = time.perf_counter()
        encoder.encode_images(
            noise,
            places,
            conditions.month,
            conditions.hour,
            conditions.scale,
            gsd_m=told_gsd_m,
            details=(detail,),
        )
        return time.perf_counter() - started

    encode()  # pays for what is set up once
    times = [encode()]
    while sum(times) < _PROBE_SECONDS:
        times.append(encode())
    seconds = sum(times) / len(times) / count
    return replace(cost, seconds=seconds * cost.windows * _BESIDES)

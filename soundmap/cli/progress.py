"""How a run is shown while it goes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from rich.markup import escape

from soundmap.api import Listener
from soundmap.cli.amounts import duration, size
from soundmap.cli.bar import Bar
from soundmap.estimate import Estimate
from soundmap.grid import block, ground_gsd_m
from soundmap.layout import Layout
from soundmap.plan import Plan
from soundmap.runner import UnitReport
from soundmap.stores.zarr_store import Status

# Sides of a cell that differ by more than this share are both named.
_SQUARE = 0.02


class ConsoleListener(Bar, Listener):
    """Shows what a run takes, a bar with units, km2/s and time left, and what went wrong."""

    def __init__(self, quiet: bool) -> None:
        super().__init__(quiet, "units", "left", tells_left=False)
        self.wants_time = not quiet
        self._pace = Pace(0)
        self._plan: Plan | None = None

    def estimated(self, cost: Estimate, layout: Layout) -> None:
        """Say what is about to happen."""
        rows, cols = layout.grid.shape
        self.say(
            f"{escape(layout.region.label)}: {rows:,} x {cols:,} cells of {_cell_text(layout)}, "
            f"about {cost.windows:,} windows in {cost.units:,} units"
        )
        time_text = "" if cost.seconds is None else f"about {duration(cost.seconds)}, "
        self.say(
            f"Takes {time_text}{size(cost.memory_bytes)} of memory for each process; the map up to "
            f"{size(cost.bytes_out)} before compression, about {size(cost.bytes_packed)} after"
        )
        if layout.reading.warning:
            self.say(f"[yellow]Warning:[/yellow] {escape(layout.reading.warning)}")

    def planned(self, plan: Plan, cost: Estimate, layout: Layout, left: int) -> None:
        """Set the bar up."""
        done = cost.units - left
        if done:
            rest = ""
            if cost.seconds is not None:
                rest = f", about {duration(cost.seconds * left / cost.units)} are left"
            self.say(f"Going on: {done:,} units were done before{rest}")
        self._pace, self._plan = Pace(left), plan
        self.begin("mapping", cost.units, done)

    def reported(self, report: UnitReport) -> None:
        """Count a unit."""
        assert self._plan is not None
        self._pace.count(report, _ground_km2(self._plan, report.index))
        self.update(advance=1, pace=self._pace.area_text, left=self._pace.left_text)
        if report.error:
            self.say(f"[red]Failed[/red] unit {report.index}: {escape(report.error)}")

    def noted(self, text: str) -> None:
        """Print a note."""
        self.say(f"[yellow]Note:[/yellow] {escape(text)}")

    def exporting(self) -> None:
        """Say that the file is being written."""
        self.update(description="writing", left="")


class Pace:
    """How fast this run is, and how long it will still take.

    Units without imagery are over at once. They come in stretches, as imagery does, so the share
    of them that is met so far is no measure of the rest: what is left is reckoned as if it held
    imagery throughout, at the pace of the units that did.

    Parameters
    ----------
    left
        Units still to do.
    clock
        Seconds that pass, as `time.monotonic` counts them.
    """

    def __init__(self, left: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._left = left
        self._clock = clock
        self._started = clock()
        self._spent_s = 0.0
        self._full = 0
        self._full_s = 0.0
        self._empty_s = 0.0
        self._km2 = 0.0

    def count(self, report: UnitReport, km2: float) -> None:
        """Count a unit and the ground that it covers."""
        self._left -= 1
        self._spent_s = self._clock() - self._started
        if report.status == Status.DONE:
            self._full += 1
            self._full_s += report.seconds
            self._km2 += km2
        else:
            self._empty_s += report.seconds

    @property
    def area_text(self) -> str:
        """Ground mapped in a second."""
        return f"{self._km2 / max(1e-6, self._spent_s):.3g} km2/s"

    @property
    def left_seconds(self) -> float | None:
        """Seconds still to go; None before a unit with imagery is done."""
        if not self._full:
            return None
        # Units run side by side: what passed is shared out by what each of them took.
        of_full_s = self._spent_s * self._full_s / max(1e-9, self._full_s + self._empty_s)
        return self._left * of_full_s / self._full

    @property
    def left_text(self) -> str:
        """How long it will still take, in words."""
        seconds = self.left_seconds
        return "" if seconds is None else f"{duration(seconds)} left"


def _ground_km2(plan: Plan, index: tuple[int, int]) -> float:
    """Ground under a unit; in degrees it differs from row to row."""
    (row, col), side = index, plan.unit_cells
    height, width = plan.grid.shape
    row1, col1 = min((row + 1) * side, height), min((col + 1) * side, width)
    cells = block(plan.grid, row * side, row1, col * side, col1)
    return math.prod(cells.shape) * ground_gsd_m(cells) ** 2 / 1e6


def _cell_text(layout: Layout) -> str:
    across, along = layout.ground_m
    if abs(across / layout.cell_m - 1) <= _SQUARE and abs(along / layout.cell_m - 1) <= _SQUARE:
        return f"{layout.cell_m:.4g} m"
    return f"{across:.4g} x {along:.4g} m"

"""How a run is shown while it goes."""

from __future__ import annotations

import time

from rich.markup import escape

from soundmap.api import Listener
from soundmap.cli.bar import Bar
from soundmap.layout import Layout
from soundmap.plan import Estimate, Plan
from soundmap.runner import UnitReport


class ConsoleListener(Bar, Listener):
    """Shows the plan, a bar with units, km2/s and time left, and what went wrong."""

    def __init__(self, quiet: bool) -> None:
        super().__init__(quiet, "units")
        self._cell_km2 = 0.0
        self._cells = 0
        self._started = time.monotonic()

    def planned(self, plan: Plan, cost: Estimate, layout: Layout, left: int) -> None:
        """Say what is about to happen."""
        rows, cols = plan.grid.shape
        self._cell_km2 = (layout.cell_m / 1000) ** 2
        self.say(
            f"{escape(layout.region.label)}: {rows} x {cols} cells of {layout.cell_m:.4g} m, about "
            f"{cost.windows:,} windows in {cost.units} units, up to "
            f"{cost.bytes_out / 1e6:,.1f} MB before compression"
        )
        if layout.reading.warning:
            self.say(f"[yellow]Warning:[/yellow] {escape(layout.reading.warning)}")
        if left < cost.units:
            self.say(f"Going on: {cost.units - left} units were done before")
        self.begin("mapping", cost.units, cost.units - left)
        self._started = time.monotonic()

    def reported(self, report: UnitReport) -> None:
        """Count a unit."""
        self._cells += report.cells
        km2 = self._cells * self._cell_km2
        pace = f"{km2 / max(1e-6, time.monotonic() - self._started):.3g} km2/s"
        self.update(advance=1, pace=pace)
        if report.error:
            self.say(f"[red]Failed[/red] unit {report.index}: {escape(report.error)}")

    def noted(self, text: str) -> None:
        """Print a note."""
        self.say(f"[yellow]Note:[/yellow] {escape(text)}")

    def exporting(self) -> None:
        """Say that the file is being written."""
        self.update(description="writing")

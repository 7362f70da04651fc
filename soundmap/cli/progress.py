"""How a run is shown while it goes."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from soundmap.api import Listener
from soundmap.layout import Layout
from soundmap.plan import Estimate, Plan
from soundmap.runner import UnitReport


class ConsoleListener(Listener):
    """Shows the plan, a bar with units, km2/s and time left, and what went wrong."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("units"),
            TextColumn("{task.fields[pace]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._cell_km2 = 0.0
        self._cells = 0
        self._started = time.monotonic()

    def __enter__(self) -> ConsoleListener:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def planned(self, plan: Plan, cost: Estimate, layout: Layout, left: int) -> None:
        """Say what is about to happen."""
        rows, cols = plan.grid.shape
        self._cell_km2 = (layout.cell_m / 1000) ** 2
        self.console.print(
            f"{layout.region.label}: {rows} x {cols} cells of {layout.cell_m:.4g} m, about "
            f"{cost.windows:,} windows in {cost.units} units, up to "
            f"{cost.bytes_out / 1e6:,.1f} MB before compression",
            highlight=False,
            soft_wrap=True,
        )
        if layout.reading.warning:
            self.console.print(
                f"[yellow]Warning:[/yellow] {layout.reading.warning}",
                highlight=False,
                soft_wrap=True,
            )
        if left < cost.units:
            self.console.print(f"Going on: {cost.units - left} units were done before")
        self._task = self._bar.add_task(
            "mapping", total=cost.units, completed=cost.units - left, pace=""
        )
        self._started = time.monotonic()

    def reported(self, report: UnitReport) -> None:
        """Count a unit."""
        self._cells += report.cells
        km2 = self._cells * self._cell_km2
        pace = f"{km2 / max(1e-6, time.monotonic() - self._started):.3g} km2/s"
        if self._task is not None:
            self._bar.update(self._task, advance=1, pace=pace)
        if report.error:
            self.console.print(
                f"[red]Failed[/red] unit {report.index}: {report.error}",
                highlight=False,
                soft_wrap=True,
            )

    def noted(self, text: str) -> None:
        """Print a note."""
        self.console.print(f"[yellow]Note:[/yellow] {text}", highlight=False, soft_wrap=True)

    def exporting(self) -> None:
        """Say that the file is being written."""
        if self._task is not None:
            self._bar.update(self._task, description="writing")

"""What a user asks for, and who hears how it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from soundmap.encoder import DEFAULT_MODEL, Conditions
from soundmap.estimate import Estimate
from soundmap.layout import Layout
from soundmap.plan import Plan
from soundmap.runner import UnitReport

DETAILS = ("patch", "image")
DTYPES = ("float32", "uint8")


class Listener:
    """Hears how a run goes. Override what you need."""

    def estimated(self, cost: Estimate, layout: Layout) -> None:
        """It is known what the run will take; nothing has been written."""

    def planned(self, plan: Plan, cost: Estimate, layout: Layout, left: int) -> None:
        """Work is about to start; ``left`` of the plan's units are still to do."""

    def reported(self, report: UnitReport) -> None:
        """A unit is done, empty or failed."""

    def noted(self, text: str) -> None:
        """Tell the user something about the choices that were made."""

    def exporting(self) -> None:
        """All units are done and the map is being written."""


@dataclass(frozen=True)
class Request:
    """What to map, how, and where to; the fields are the options of ``soundmap predict``."""

    out: Path
    imagery: str | None = None
    bbox: tuple[float, float, float, float] | None = None
    region: str | None = None
    where: str | None = None
    mask: str | None = None
    model: str = DEFAULT_MODEL
    concepts: str | Sequence[str] | None = None
    text: tuple[str, ...] = ()
    audio: tuple[str, ...] = ()
    value: str | None = None
    detail: str = "patch"
    crs: str = "auto"
    resolution: float | None = None
    gsd: float | None = None
    scale: int = 1
    month: int | None = None
    hour: int | None = None
    bands: tuple[int, ...] | None = None
    rescale: tuple[float, float] | None = None
    dtype: str = "float32"
    precision: str = "auto"
    overwrite: bool = False
    dry_run: bool = False
    workers: int | None = None
    scheduler: str | None = None

    @property
    def conditions(self) -> Conditions:
        """Month, hour and scale."""
        return Conditions(self.month, self.hour, self.scale)

"""What a user asks for, and who hears how it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from soundmap.encoder import DEFAULT_MODEL, Conditions
from soundmap.layout import Layout
from soundmap.plan import Estimate, Plan
from soundmap.runner import UnitReport

DETAILS = ("patch", "image")
DTYPES = ("float32", "uint8")


class Listener:
    """Hears how a run goes. Override what you need."""

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
    workers: int | None = None
    scheduler: str | None = None

    @property
    def conditions(self) -> Conditions:
        """Month, hour and scale."""
        return Conditions(self.month, self.hour, self.scale)


# Units and reasons that are named at the end of a run; all are told when they happen.
_NAMED_UNITS = 20
_NAMED_REASONS = 3


def list_failures(failures: Sequence[UnitReport]) -> str:
    """Name the units that failed, by their row and column, with the reasons, on one line.

    Parameters
    ----------
    failures
        Reports of units that failed, in any order.

    Returns
    -------
    str
        Of many units, or reasons, the first and how many more; empty if nothing failed.

    Examples
    --------
    >>> reports = [UnitReport((0, c), Status.FAILED, 64, 1.0, "a.tif: gone") for c in (2, 1)]
    >>> list_failures(reports)
    'units (0, 1), (0, 2): a.tif: gone'
    """
    by_reason: dict[str, list[tuple[int, int]]] = {}
    for report in sorted(failures, key=lambda report: report.index):
        by_reason.setdefault(report.error, []).append(report.index)
    said = []
    for reason, units in list(by_reason.items())[:_NAMED_REASONS]:
        named = ", ".join(map(str, units[:_NAMED_UNITS]))
        more = f" and {len(units) - _NAMED_UNITS:,} more" if len(units) > _NAMED_UNITS else ""
        said.append(f"{'unit' if len(units) == 1 else 'units'} {named}{more}: {reason}")
    if len(by_reason) > _NAMED_REASONS:
        said.append(f"{len(by_reason) - _NAMED_REASONS:,} more reasons")
    return "; ".join(said)

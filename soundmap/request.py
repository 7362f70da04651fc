"""What a user asks for, and who hears how it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from soundmap.encoder import DEFAULT_MODEL, Conditions
from soundmap.errors import InputError
from soundmap.estimate import Estimate
from soundmap.layout import Layout
from soundmap.plan import Plan
from soundmap.runner import UnitReport
from soundmap.stores.ledger import read_job
from soundmap.stores.place import located
from soundmap.stores.work import is_unfinished, target_of, work_path

# Where and whether a run computes, and where its store is, are not of the job: they may change.
_NOT_RECORDED = ("out", "workers", "scheduler", "dry_run")
# Fields that may name files.
_FILES = ("imagery", "region", "mask", "concepts", "audio")
# Words that they may hold instead, whatever files have the same name.
_WORDS = ("sample", "globe")
# Units and reasons that are named at the end of a run; all are told when they happen.
_NAMED_UNITS = 20
_NAMED_REASONS = 3

DETAILS = ("patch", "image")
DTYPES = ("float32", "uint8")


class Listener:
    """Hears how a run goes. Override what you need."""

    wants_time = False
    """Whether it is to be found out beforehand how long a run takes, which itself takes a second or
    two."""

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

    out: str | Path
    """A local ``.tif`` or ``.zarr``, or the ``s3://`` address of a ``.zarr``."""
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
    shards: bool = False
    overwrite: bool = False
    dry_run: bool = False
    workers: int | None = None
    scheduler: str | None = None

    @property
    def conditions(self) -> Conditions:
        """Month, hour and scale."""
        return Conditions(self.month, self.hour, self.scale)


def record(request: Request, model: str) -> dict[str, Any]:
    """Write a request as JSON can hold it, so that it can be repeated from any folder.

    Parameters
    ----------
    request
        The request; where it computes and writes is left out.
    model
        Its model, named so that it is found from any folder.
    """
    held: dict[str, Any] = {}
    for item in fields(request):
        value = getattr(request, item.name)
        if item.name in _NOT_RECORDED:
            continue
        if item.name in _FILES:
            value = _from_any_folder(value)
        held[item.name] = list(value) if isinstance(value, tuple) else value
    return held | {"model": model}


def recorded(
    path: str | Path,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    overwrite: bool = False,
) -> Request:
    """Read back what an unfinished run was asked for.

    Parameters
    ----------
    path
        The map's own name, the store of the run beside it, or an address.
    workers, scheduler
        Where to compute from now on.
    overwrite
        Whether the map may take the place of another when it is whole. It may, too, if that was
        allowed when the run was begun.

    Raises
    ------
    InputError
        There is no unfinished run, or what it was asked for cannot be read.
    """
    target = target_of(located(path))
    if not is_unfinished(target):
        there = "is finished: there is nothing to go on with"
        if isinstance(target, Path) and not target.exists():
            there = "no unfinished run is here: begin one with --imagery and --out"
        raise InputError(f"{path}: {there}")
    held = read_job(work_path(target)).get("request")
    known = {item.name for item in fields(Request)} - set(_NOT_RECORDED)
    if not isinstance(held, dict) or not set(held) <= known:
        raise InputError(
            f"{path}: what it was asked for is not known here: repeat the command that began it"
        )
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in held.items()
    }
    values["overwrite"] = overwrite or bool(values.get("overwrite"))
    return Request(out=target, workers=workers, scheduler=scheduler, **values)


def _from_any_folder(value: Any) -> Any:
    """Make relative paths in a field absolute; names stay names."""
    if isinstance(value, list | tuple):
        return [_from_any_folder(one) for one in value]
    if not isinstance(value, str) or value in _WORDS or "://" in value:
        return value
    if Path(value).exists() or any(sign in value for sign in "*?"):
        return str(Path(value).absolute())
    file, colon, layer = value.rpartition(":")
    if colon and Path(file).exists():
        return f"{Path(file).absolute()}:{layer}"
    name, equals, file = value.partition("=")
    if equals and Path(file).exists():
        return f"{name}={Path(file).absolute()}"
    return value


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

"""What a run writes down about itself beside the data, in ``.soundmap/`` of its store.

::

    status/          what became of every unit; the one thing that decides what is done again
    partials/        statistics of chunks
    failed/ROW.COL   why a unit failed, one line each
    job.json         what was asked for
    pace.json        how fast it went, over all starts
    lock             held by the process that runs

All is written by the parent alone, each file beside its place and then renamed, so that a kill at
any moment leaves the file of before. A mark costs the same at the last unit as at the first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from soundmap.stores.place import Location, child, read_bytes, read_many, write_bytes

PRIVATE = ".soundmap"
"""Folder in a store that is there as long as a run is not finished."""
MARKER = ("status", ".zarray")
"""The file of the folder that goes first when the run ends: without it, all units are settled."""

_JOB = "job.json"
_PACE = "pace.json"
FAILED = "failed"
"""Folder of reasons."""
_LONGEST_REASON = 500
# Written so seldom, it costs nothing; a kill loses no more than this of it.
_PACE_SECONDS = 5.0


@dataclass(frozen=True)
class Pace:
    """How fast a run went, summed over all its starts."""

    starts: int = 0
    """How often it was started."""
    computed: int = 0
    """Units that were computed."""
    empty: int = 0
    """Units in which there was nothing to compute."""
    failed: int = 0
    """Units that failed, each time anew."""
    cells: int = 0
    """Cells of the computed units."""
    unit_seconds: float = 0.0
    """Seconds that units took, from reading to writing, summed over all workers."""
    wall_seconds: float = 0.0
    """Seconds that the clock showed meanwhile."""

    @property
    def seconds_per_unit(self) -> float | None:
        """Seconds of the clock per computed unit; None before the first.

        Empty units count for nothing: they take next to no time, and would make the rest look
        fast.
        """
        return self.wall_seconds / self.computed if self.computed else None


class Ledger:
    """Notes of a run, taken in its parent process. It counts time from when it is made."""

    def __init__(self, store: Location) -> None:
        self._folder = child(store, PRIVATE)
        self._before = read_pace(store)
        self._pace = replace(self._before, starts=self._before.starts + 1)
        self._began = time.monotonic()
        # So that even a short run has a first note early.
        self._saved = -_PACE_SECONDS

    def reason(self, index: tuple[int, int], error: str) -> None:
        """Write down why a unit failed, cut to one line of a few hundred characters."""
        line = " ".join(error.split()) or "no reason was given"
        if len(line) > _LONGEST_REASON:
            line = line[: _LONGEST_REASON - 1] + "…"
        write_bytes(child(self._folder, FAILED, _reason_name(index)), line.encode())

    def count(self, *, computed: bool, failed: bool, seconds: float, cells: int) -> None:
        """Count a unit; saved now and then."""
        pace = self._pace
        self._pace = replace(
            pace,
            computed=pace.computed + computed,
            failed=pace.failed + failed,
            empty=pace.empty + (not computed and not failed),
            cells=pace.cells + (cells if computed else 0),
            unit_seconds=pace.unit_seconds + seconds,
        )
        if time.monotonic() - self._began - self._saved >= _PACE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the pace down."""
        self._saved = time.monotonic() - self._began
        pace = replace(self._pace, wall_seconds=self._before.wall_seconds + self._saved)
        write_bytes(child(self._folder, _PACE), json.dumps(asdict(pace)).encode())


def read_pace(store: Location) -> Pace:
    """Read how fast a run went; zeros where nothing is noted."""
    held = _read_json(child(store, PRIVATE, _PACE))
    known = {item.name for item in fields(Pace)}
    try:
        return Pace(**{name: value for name, value in held.items() if name in known})
    except TypeError:
        return Pace()


def read_reasons(store: Location, indices: Sequence[tuple[int, int]]) -> list[str]:
    """Read why units failed, in their order; "" where that is not known."""
    names = [_reason_name(index) for index in indices]
    held = read_many(child(store, PRIVATE, FAILED), names)
    return [held.get(name, b"").decode(errors="replace") for name in names]


def write_job(store: Location, job: Mapping[str, Any]) -> None:
    """Write down what was asked for, as JSON."""
    text = json.dumps(dict(job), indent=1, ensure_ascii=False)
    write_bytes(child(store, PRIVATE, _JOB), text.encode())


def read_job(store: Location) -> dict[str, Any]:
    """Read what was asked for; empty where it is not known."""
    return _read_json(child(store, PRIVATE, _JOB))


def _read_json(location: Location) -> dict[str, Any]:
    data = read_bytes(location)
    try:
        held = json.loads(data or b"{}")
    except ValueError:
        return {}
    return held if isinstance(held, dict) else {}


def _reason_name(index: tuple[int, int]) -> str:
    return f"{int(index[0])}.{int(index[1])}"

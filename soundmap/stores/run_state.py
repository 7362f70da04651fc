"""How far a run is: units done, empty, failed and left, its pace, and the time that is left."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from soundmap.errors import InputError
from soundmap.stores import place
from soundmap.stores.info import describe
from soundmap.stores.ledger import Pace, read_job, read_pace, read_reasons
from soundmap.stores.lock import is_running
from soundmap.stores.place import Location
from soundmap.stores.work import is_unfinished, target_of, work_path
from soundmap.stores.zarr_store import Status, open_store


@dataclass(frozen=True)
class FailedUnit:
    """A unit that could not be computed."""

    index: tuple[int, int]
    """Row and column of the unit."""
    reason: str
    """One line; "" where it is not known."""


@dataclass(frozen=True)
class RunState:
    """How far a run is."""

    target: Location
    """The map that is made."""
    finished: bool
    """Whether the map is whole. Units are not known any more, then, and all counts are 0."""
    running: bool
    """Whether a process of this machine is at it. False where that cannot be told: runs on other
    machines, in object stores and on some network mounts."""
    units: int
    """Units that there are to do in all."""
    done: int
    empty: int
    """Units without imagery or off the region."""
    left: int
    """Units that nobody has tried yet."""
    failed: tuple[FailedUnit, ...]
    """Units that failed, and are tried again when the run goes on."""
    pace: Pace
    """How fast it went, over all its starts."""

    @property
    def seconds_left(self) -> float | None:
        """Seconds until all units are computed, at the pace so far; None where none is known."""
        each = self.pace.seconds_per_unit
        if each is None:
            return None
        return each * (self.left + len(self.failed))


def run_state(path: str | Path) -> RunState:
    """Tell how far a run is.

    Parameters
    ----------
    path
        The map's own name, the store of the run beside it, or an address.

    Raises
    ------
    InputError
        There is neither a map nor a run.
    """
    location = place.located(path)
    target = target_of(location)
    if not is_unfinished(target):
        if isinstance(target, Path) and not target.exists():
            raise InputError(f"{path}: no map and no unfinished run of that name: check the path")
        describe(target)
        return RunState(target, True, False, 0, 0, 0, 0, (), Pace())
    store = open_store(work_path(target))
    status = store.status()
    rows, cols = np.nonzero(status == Status.FAILED)
    indices = list(zip(rows.tolist(), cols.tolist(), strict=True))
    done, empty = (int((status == kind).sum()) for kind in (Status.DONE, Status.EMPTY))
    planned = read_job(store.path).get("units")
    # Stores of before this was noted tell only how many the grid has.
    units = planned if isinstance(planned, int) else status.size
    settled = store.settled()
    return RunState(
        target=target,
        finished=False,
        running=is_running(store.path),
        units=units,
        done=units - empty if settled else done,
        empty=empty,
        left=0 if settled else max(0, units - done - empty - len(indices)),
        failed=tuple(
            FailedUnit(index, reason)
            for index, reason in zip(indices, read_reasons(store.path, indices), strict=True)
        ),
        pace=read_pace(store.path),
    )


def to_json(state: RunState) -> str:
    """Write a run's state as JSON."""
    facts = dataclasses.asdict(state) | {
        "target": str(state.target),
        "seconds_per_unit": state.pace.seconds_per_unit,
        "seconds_left": state.seconds_left,
    }
    return json.dumps(facts, indent=2, ensure_ascii=False)

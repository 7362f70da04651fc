"""One unit from reading to writing, and which of its faults end the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from soundmap.encoder import Encoder
from soundmap.errors import SoundmapError, SourceError
from soundmap.pipeline import Job, UnitInput, encode_unit, score_unit
from soundmap.plan import Unit
from soundmap.stores.zarr_store import Status

# An exception's own text may be long, and a run may have many.
_LONGEST_REASON = 300


@dataclass(frozen=True)
class UnitReport:
    """What came of a unit; all that a worker sends back."""

    index: tuple[int, int]
    """Row and column of the unit."""
    status: Status
    """Done, empty or failed."""
    cells: int
    """Cells of the unit."""
    seconds: float
    """Time from reading to writing."""
    error: str = ""
    """Why it failed, one line."""


OnReport = Callable[[UnitReport], None]
Read = Callable[[], UnitInput]
"""Gives the imagery of one unit."""
Write = Callable[[int, int, NDArray[np.float32]], None]
"""Stores a block of values: row and column of its first cell, and float32[C, h, w]."""


class Stopped(BaseException):
    """The run has ended while a unit was under way: nothing of it is written any more.

    Not an `Exception`: it is no fault of the unit, and must not be reported as one.
    """


class Gate:
    """Lets units write until the run is stopped, and tells whether one is writing."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._writers = 0

    def check(self) -> None:
        """Raise `Stopped` once the run is."""
        if self._stopped.is_set():
            raise Stopped

    def stop(self) -> None:
        """Let nothing begin to write any more."""
        self._stopped.set()

    @property
    def writing(self) -> bool:
        """Whether a unit that came before the stop still writes."""
        return self._writers > 0

    def __enter__(self) -> None:
        # Counted first and checked after, so that whoever stops the run sees every writer.
        with self._lock:
            self._writers += 1
        try:
            self.check()
        except Stopped:
            self.__exit__()
            raise

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._writers -= 1


def run_unit(
    job: Job, unit: Unit, encoder: Encoder, read: Read, write: Write, gate: Gate
) -> UnitReport:
    """Compute a unit and store it.

    Parameters
    ----------
    job
        What is computed.
    unit
        One unit of its plan.
    encoder
        The model, loaded.
    read, write
        Give the unit's imagery, and store its values.
    gate
        Closed when the run is stopped.

    Returns
    -------
    UnitReport
        Failed, with the reason, where the imagery could not be read, and where anything
        unexpected happened: a fault that one unit meets is no reason to lose the others.

    Raises
    ------
    SoundmapError
        The output, the arguments or the model are wrong: every other unit would fail as well.
    Stopped
        The run has ended meanwhile.
    """
    started = time.monotonic()
    try:
        gate.check()
        data = read()
        gate.check()
        encoded = encode_unit(job, data, encoder)
        values = score_unit(job, unit, data.without_imagery(), encoded)
        if values is None:
            return report(unit, Status.EMPTY, started)
        with gate:
            write(unit.row0, unit.col0, values)
    except SourceError as error:
        return report(unit, Status.FAILED, started, one_line(error))
    except SoundmapError:
        raise
    except Exception as error:
        return report(unit, Status.FAILED, started, f"{type(error).__name__}: {one_line(error)}")
    return report(unit, Status.DONE, started)


def report(unit: Unit, status: Status, started: float, error: str = "") -> UnitReport:
    """Report of a unit that was begun at ``started`` on the monotonic clock."""
    rows, cols = unit.cells.shape
    return UnitReport(unit.index, status, rows * cols, time.monotonic() - started, error)


def one_line(error: BaseException) -> str:
    """Text of an exception as one line of bounded length."""
    text = " ".join(str(error).split()) or "no more is known"
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."

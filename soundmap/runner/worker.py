"""What a process of a Dask cluster does: takes a run's job once, then unit after unit of it.

A unit's task names the run and the unit, nothing more. What it takes to compute the unit stands in
this module, per process: the job, the open store and the model. A process computes one unit at a
time, which has the encoder to itself, and reads the imagery of the next one meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import platform
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from soundmap import __version__
from soundmap.encoder import Encoder, load_encoder
from soundmap.errors import ModelError, RunFailed, SoundmapError
from soundmap.pipeline import Job, UnitInput, read_unit
from soundmap.runner.here import single_blas
from soundmap.runner.unit import Gate, Stopped, UnitReport, one_line, run_unit
from soundmap.stores.zarr_store import ZarrStore, open_store

if TYPE_CHECKING:
    from distributed import Worker

# Runs that a process remembers. More are left over only by clients that were killed.
_RUNS = 4
_LOOK_SECONDS = 0.02


class JobUnknown(Exception):
    """The process does not have the job of that run, or no longer."""


@dataclass
class Session:
    """A run, as a worker process knows it."""

    job: Job
    store: ZarrStore
    threads: int
    """Threads to encode with."""
    gate: Gate = field(default_factory=Gate)
    _reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "read-ahead"))
    _ahead: tuple[int, Future[UnitInput]] | None = None

    def compute(self, position: int, following: int | None) -> UnitReport:
        """Compute a unit, and meanwhile read the one that is likely to come next.

        Raises
        ------
        SoundmapError
            What would fail every other unit as well.
        Stopped
            The run has ended.
        """
        encoder = _encoder(self.job.model, self.threads, self.job.precision)
        if encoder.id != self.job.bank.encoder_id:
            raise ModelError(
                f"{self.job.model} is another model on {platform.node()} than where the run "
                "began: install the same one"
            )
        unit = self.job.plan.units[position]
        known, self._ahead = self._ahead, None

        def read() -> UnitInput:
            if known is not None and known[0] == position:
                data = known[1].result()
            else:
                data = read_unit(self.job, unit, encoder)
            if following is not None:
                later = self.job.plan.units[following]
                self._ahead = following, self._reader.submit(read_unit, self.job, later, encoder)
            return data

        return run_unit(self.job, unit, encoder, read, self._write, self.gate)

    def _write(self, row0: int, col0: int, block: NDArray[np.float32]) -> None:
        # The client may have been killed, and its map have been finished, or begun anew with other
        # settings, while this unit was computed: nothing of it belongs there any more.
        try:
            now = open_store(self.job.store).schema
        except SoundmapError as error:
            raise RunFailed(f"the run's store was removed meanwhile: {one_line(error)}") from error
        then = self.store.schema
        if (now.fingerprint, now.created) != (then.fingerprint, then.created):
            raise RunFailed(f"{self.job.store}: was begun anew by another run meanwhile")
        self.store.write(row0, col0, block)

    def close(self) -> None:
        """End what is under way at its next step; nothing begins to write any more."""
        self.gate.stop()
        self._ahead = None
        self._reader.shutdown(wait=False, cancel_futures=True)


_sessions: OrderedDict[str, Session] = OrderedDict()
# Held while a unit is computed: a process may have several Dask threads, and several runs.
_computing = threading.Lock()


@lru_cache(maxsize=2)
def _encoder(model: str, threads: int, precision: str) -> Encoder:
    # Kept for the life of the process, so that weights are read once.
    return load_encoder(model, threads=threads, precision=precision)


def packed(job: Job) -> bytes:
    """Pickle a job, which the scheduler then hands on as it is."""
    from distributed.protocol.pickle import dumps

    data: bytes = dumps(job)
    return data


def welcome(run: str, payload: bytes, version: str) -> None:
    """Take a run's job, for all the units to come. A Dask task, one per worker and run.

    Parameters
    ----------
    run
        Name of the run.
    payload
        The job, packed.
    version
        Of soundmap, where the run began.

    Raises
    ------
    RunFailed
        This worker cannot take part; the message says why.
    """
    from distributed import get_worker
    from distributed.protocol.pickle import loads

    worker = get_worker()
    here = f"the worker at {worker.address} cannot take part"
    if version != __version__:
        raise RunFailed(f"{here}: it has soundmap {__version__}, not {version}: install the same")
    single_blas()
    job: Job = loads(payload)
    try:
        store = open_store(job.store, "r+")
    except SoundmapError as error:
        raise RunFailed(
            f"{here}: {one_line(error)}: --out must lie where every worker finds it under the same "
            "name, on a shared disk or in object storage"
        ) from error
    _sessions[run] = Session(job, store, threads_of(worker.state.nthreads))
    while len(_sessions) > _RUNS:
        _sessions.popitem(last=False)[1].close()


def threads_of(nthreads: int) -> int:
    """Threads to encode with, in a worker of so many Dask threads: no more than it has cores."""
    return max(1, min(nthreads, usable_cores()))


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def stop_profiler(dask_worker: Worker) -> None:
    """Have a worker no longer look at what its threads do; called in its event loop.

    It walks the stacks of all threads a hundred times a second while a task runs, which can lock
    up Python 3.11 for good (github.com/python/cpython/issues/106883).
    """
    for name in ("profile", "profile-cycle"):
        callback = dask_worker.periodic_callbacks.get(name)
        if callback is not None:
            callback.stop()


def compute(run: str, position: int, following: int | None, topic: str) -> None:
    """Compute a unit and send the report as an event. A Dask task, one per unit.

    An event is pushed to the client at once. A result would lie here until it is fetched, and be
    lost with this process, and the unit's work with it.

    Parameters
    ----------
    run
        Name of the run.
    position
        Of the unit in ``plan.units``.
    following
        The unit to read meanwhile, if there is one.
    topic
        Where the client listens.

    Raises
    ------
    JobUnknown
        `welcome` was not called in this process, or too many runs came since.
    SoundmapError
        What would fail every other unit as well.
    """
    from distributed import get_worker

    session = _sessions.get(run)
    if session is None:
        raise JobUnknown(run)
    try:
        with _computing:
            report = session.compute(position, following)
    except Stopped:
        return
    message = {
        "unit": position,
        "status": int(report.status),
        "seconds": report.seconds,
        "error": report.error,
    }
    get_worker().log_event(topic, message)


async def forget(run: str) -> None:
    """Drop a run, and return when nothing of it is being written here any more.

    Called in a worker's event loop, which goes on while a unit is computed.
    """
    session = _sessions.pop(run, None)
    if session is not None:
        session.close()
        while session.gate.writing:
            await asyncio.sleep(_LOOK_SECONDS)

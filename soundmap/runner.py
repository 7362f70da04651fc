"""Push units through an executor, few in flight. The only module that imports Dask."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from threadpoolctl import threadpool_limits

from soundmap.encoder import Encoder, load_encoder
from soundmap.errors import RunFailed, SoundmapError, SourceError, UsageError
from soundmap.pipeline import Job, encode_unit, read_unit, score_unit
from soundmap.plan import Unit
from soundmap.sources import stop_waiting
from soundmap.stores.zarr_store import Status, ZarrStore, open_store

if TYPE_CHECKING:
    import distributed
    from distributed import Client

_CONNECT_SECONDS = 5
# One to encode while another is read or stored.
_UNITS_AT_ONCE = 2
# Enough to keep a worker busy while its last report travels, few enough to lose little.
_IN_FLIGHT_PER_WORKER = 2


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


@dataclass(frozen=True)
class Cluster:
    """A Dask cluster that answers."""

    client: Client
    threads: int
    """Threads that each worker encodes with."""


OnReport = Callable[[UnitReport], None]


def run_here(job: Job, units: Sequence[Unit], encoder: Encoder, on_report: OnReport) -> None:
    """Compute units in this process, two at a time.

    While one is read, scored or stored, the other keeps the encoder's threads busy.

    Parameters
    ----------
    job
        What to compute.
    units
        Which units of its plan.
    encoder
        The model, loaded.
    on_report
        Called for every unit once its data are stored, in this thread.
    """
    store = open_store(job.store, "r+")
    waiting = iter(units)
    # In this order: what waits to try a read again is stopped before the pool waits for it.
    with (
        _single_blas(),
        ThreadPoolExecutor(_UNITS_AT_ONCE, "unit") as pool,
        _nothing_waits_when_stopped(),
    ):

        def submit(count: int) -> set[Future[UnitReport]]:
            return {
                pool.submit(_run_unit, job, unit, encoder, store)
                for unit in itertools.islice(waiting, count)
            }

        running = submit(_UNITS_AT_ONCE)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            faults = [task.exception() for task in done if task.exception()]
            if faults:
                # What the others are storing meanwhile is not lost.
                done |= wait(running).done
            for task in done:
                if task.exception() is None:
                    on_report(task.result())
            for fault in faults:
                if fault is not None:
                    raise fault
            running |= submit(len(done))


@contextlib.contextmanager
def _nothing_waits_when_stopped() -> Iterator[None]:
    try:
        yield
    except BaseException:
        stop_waiting()
        raise


def _run_unit(job: Job, unit: Unit, encoder: Encoder, store: ZarrStore) -> UnitReport:
    started = time.monotonic()
    try:
        data = read_unit(job, unit, encoder)
    except SourceError as error:
        return _report(unit, Status.FAILED, started, str(error))
    encoded = encode_unit(job, data, encoder)
    values = score_unit(job, unit, data.without_imagery(), encoded)
    if values is None:
        return _report(unit, Status.EMPTY, started)
    store.write(unit.row0, unit.col0, values)
    return _report(unit, Status.DONE, started)


def _single_blas() -> AbstractContextManager[object]:
    """Keep NumPy's matrix products on the thread that asks for them.

    Their own threads would wait for cores that encoding keeps busy.
    """
    return threadpool_limits(limits=1, user_api="blas")


def _report(unit: Unit, status: Status, started: float, error: str = "") -> UnitReport:
    rows, cols = unit.cells.shape
    return UnitReport(unit.index, status, rows * cols, time.monotonic() - started, error)


@lru_cache(maxsize=2)
def _encoder(model: str, threads: int, precision: str) -> Encoder:
    # Kept for the life of the worker process, so that weights are read once.
    return load_encoder(model, threads=threads, precision=precision)


def _run_on_worker(job: Job, position: int, threads: int) -> UnitReport:
    _single_blas()
    encoder = _encoder(job.model, threads, job.precision)
    return _run_unit(job, job.plan.units[position], encoder, open_store(job.store, "r+"))


def run_on_cluster(
    cluster: Cluster, job: Job, positions: Sequence[int], on_report: OnReport
) -> None:
    """Compute units on a Dask cluster, a bounded number in flight.

    Parameters
    ----------
    cluster
        From `connect`.
    job
        What to compute; its store must be reachable from every worker under the same path.
    positions
        Which units of its plan, as positions in ``plan.units``.
    on_report
        Called for every unit, in this thread.

    Raises
    ------
    RunFailed
        The cluster lost a unit, or itself.
    """
    from distributed import as_completed

    client = cluster.client
    shared = client.scatter(job, broadcast=True, hash=False)

    def submit(position: int) -> distributed.Future[UnitReport]:
        # Not pure: writing is what the task is for, and a unit may be asked for again.
        return client.submit(_run_on_worker, shared, position, cluster.threads, pure=False)

    waiting = iter(positions)
    in_flight = max(1, len(client.nthreads())) * _IN_FLIGHT_PER_WORKER
    flow = as_completed([submit(p) for p in itertools.islice(waiting, in_flight)], loop=client.loop)
    for task in flow:
        try:
            report = task.result()
        except SoundmapError:
            raise
        except Exception as error:
            # Workers lost, tasks cancelled, connections closed: Dask has a class for each.
            raise RunFailed(
                f"the cluster lost a unit ({type(error).__name__}: {error}): see the logs of its "
                "workers; the same command goes on with what is left"
            ) from error
        on_report(report)
        for position in itertools.islice(waiting, 1):
            flow.add(submit(position))


def check_workers(workers: int | None, scheduler: str | None) -> None:
    """Refuse impossible clusters before any work is done.

    Raises
    ------
    UsageError
        Both are given, or the number is not between 1 and four per core.
    """
    if workers is None:
        return
    if scheduler:
        raise UsageError(
            "--workers starts processes here, --scheduler uses others: give one of them"
        )
    most = 4 * (os.cpu_count() or 1)
    if not 1 <= workers <= most:
        raise UsageError(f"--workers {workers} is impossible here: give 1 to {most}")


@contextlib.contextmanager
def connect(workers: int | None, scheduler: str | None) -> Iterator[Cluster | None]:
    """Start processes on this machine, or join the cluster whose scheduler is named.

    Yields
    ------
    Cluster or None
        None if neither is asked for.

    Raises
    ------
    UsageError
        The number of workers is impossible, nobody answers, or the cluster has no worker.
    """
    check_workers(workers, scheduler)
    if not workers and not scheduler:
        yield None
        return
    with _quiet_dask(), contextlib.ExitStack() as stack:
        client = _join(scheduler) if scheduler else _start(workers or 1, stack)
        stack.enter_context(client)
        try:
            client.wait_for_workers(1, timeout=_CONNECT_SECONDS)
        except TimeoutError as error:
            raise UsageError(
                f"the Dask cluster at {scheduler or 'this machine'} has no worker: start one with "
                "`dask worker ADDRESS`"
            ) from error
        yield Cluster(client, max(1, (os.cpu_count() or 1) // workers) if workers else 1)


def _join(scheduler: str) -> Client:
    from distributed import Client

    try:
        return Client(scheduler, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"no Dask scheduler answers at {scheduler!r}: start one with `dask scheduler` "
            "and give the tcp:// address that it prints"
        ) from error


def _start(workers: int, stack: contextlib.ExitStack) -> Client:
    from distributed import Client, LocalCluster

    cluster = stack.enter_context(
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
        )
    )
    return Client(cluster, set_as_default=False)


@contextlib.contextmanager
def _quiet_dask() -> Iterator[None]:
    logger = logging.getLogger("distributed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)

"""Units in this process, two at a time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from functools import partial

from threadpoolctl import threadpool_limits

from soundmap.encoder import Encoder
from soundmap.pipeline import Job, read_unit
from soundmap.plan import Unit
from soundmap.runner.unit import Gate, OnReport, UnitReport, run_unit
from soundmap.sources import stop_waiting
from soundmap.stores.zarr_store import open_store

# One to encode while another is read or stored.
_UNITS_AT_ONCE = 2


def run_here(job: Job, units: Sequence[Unit], encoder: Encoder, on_report: OnReport) -> None:
    """Compute units in this process, two at a time.

    While one is read, scored or stored, the other keeps the encoder's threads busy. The next is
    begun once a report is taken, so that no more than two units are ever under way or unreported.

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

    Raises
    ------
    SoundmapError
        What would fail every other unit as well; see `soundmap.runner.unit.run_unit`. Units that
        were stored meanwhile are reported before.
    """
    store = open_store(job.store, "r+")
    waiting = iter(units)
    gate = Gate()

    def one(unit: Unit) -> UnitReport:
        read = partial(read_unit, job, unit, encoder)
        return run_unit(job, unit, encoder, read, store.write, gate)

    with single_blas(), ThreadPoolExecutor(_UNITS_AT_ONCE, "unit") as pool:

        def submit(count: int) -> set[Future[UnitReport]]:
            return {pool.submit(one, unit) for unit in itertools.islice(waiting, count)}

        try:
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
        except BaseException:
            # The pool is waited for: what waits to try a read again must not be.
            stop_waiting()
            raise
        finally:
            # Interrupted: what is under way ends at its next step, and writes nothing more.
            gate.stop()


def single_blas() -> AbstractContextManager[object]:
    """Keep NumPy's matrix products on the thread that asks for them.

    Their own threads would wait for cores that encoding keeps busy.
    """
    return threadpool_limits(limits=1, user_api="blas")

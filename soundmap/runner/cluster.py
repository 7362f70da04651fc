"""A Dask cluster to work on: processes started here, or the one whose scheduler is named."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from soundmap.errors import UsageError
from soundmap.runner.worker import usable_cores

if TYPE_CHECKING:
    from distributed import Client

_CONNECT_SECONDS = 10
_PATIENCE_SECONDS = 300.0
# For queues in which workers wait for hours.
PATIENCE_VARIABLE = "SOUNDMAP_WORKER_PATIENCE_S"
# Python code that holds its lock for seconds must not make a worker look dead, nor may Dask hold
# back units because a process has memory in use that Dask knows nothing of. A worker that takes
# nearly all of the memory is still ended and replaced (`terminate`).
_SETTINGS: dict[str, Any] = {
    "distributed.worker.profile.enabled": False,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.scheduler.worker-ttl": "10 minutes",
}


@dataclass(frozen=True)
class Cluster:
    """A Dask cluster that answers."""

    client: Client
    name: str
    """The scheduler's address, for messages."""
    patience_s: float = _PATIENCE_SECONDS
    """How long a run whose last worker has left waits for another."""


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

    The environment variable ``SOUNDMAP_WORKER_PATIENCE_S`` says for how many seconds a run without
    a worker waits for one, at its start (5 if it is not set) and later (300).

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
    patience_s = _patience()
    with _quiet_dask(), contextlib.ExitStack() as stack:
        client = _join(scheduler) if scheduler else _start(workers or 1, stack)
        stack.callback(_leave, client)
        first_s = _CONNECT_SECONDS if patience_s is None else patience_s
        try:
            client.wait_for_workers(1, timeout=max(1, first_s))
        except TimeoutError as error:
            raise UsageError(
                f"the Dask cluster at {scheduler or 'this machine'} has no worker: start one with "
                f"`dask worker ADDRESS`, or set {PATIENCE_VARIABLE} to wait longer for one"
            ) from error
        yield Cluster(
            client,
            scheduler or "this machine",
            _PATIENCE_SECONDS if patience_s is None else patience_s,
        )


def _patience() -> float | None:
    text = os.environ.get(PATIENCE_VARIABLE, "")
    try:
        seconds = float(text) if text else None
    except ValueError:
        seconds = -1.0
    if seconds is not None and not 0 <= seconds < float("inf"):
        raise UsageError(f"{PATIENCE_VARIABLE} is {text!r}: give a number of seconds, 3600 say")
    return seconds


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
            threads_per_worker=max(1, usable_cores() // workers),
            processes=True,
            # Any free port, so that two runs at once do not get into each other's way.
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        )
    )
    return Client(cluster, set_as_default=False)


def _leave(client: Client) -> None:
    # What it has to say when its scheduler is gone was said before.
    with contextlib.suppress(Exception):
        client.close(timeout=_CONNECT_SECONDS)


@contextlib.contextmanager
def _quiet_dask() -> Iterator[None]:
    import dask
    import distributed  # noqa: F401  (sets the levels of its loggers)

    names = [n for n in logging.root.manager.loggerDict if n.partition(".")[0] == "distributed"]
    levels = {name: logging.getLogger(name).level for name in ("distributed", *names)}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with dask.config.set(_SETTINGS), warnings.catch_warnings():
            # A job of 100,000 units is large to Dask; it goes to each worker once.
            warnings.filterwarnings("ignore", message="Sending large graph")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)

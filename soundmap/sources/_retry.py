"""Trying again what may pass: how often, how long, and how a wait is ended."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    wait_exponential,
    wait_random,
)

from soundmap.errors import SourceError, UsageError

T = TypeVar("T")

_HOPELESS_TRIES = 2
_HOPELESS_WAIT_S = 0.1
_LONGEST_WAIT_S = 20.0

_stopping = threading.Condition()
_stops = 0


class PassingError(SourceError):
    """A read that failed for a reason that may pass."""


class _Stopped(SourceError):
    """Somebody stops the run."""


@dataclass(frozen=True)
class Patience:
    """How long a source goes on trying what may pass."""

    tries: int = 5
    """How often a read is tried in all."""
    first_wait_s: float = 1.0
    """Seconds before the second try, about; each wait is twice the one before, up to 20 s."""
    longest_s: float = 180.0
    """Seconds after which no further try is begun."""

    @classmethod
    def from_environment(cls) -> Patience:
        """Take ``SOUNDMAP_READ_TRIES``, ``_WAIT_S`` and ``_LONGEST_S``; what is not set stays.

        Raises
        ------
        UsageError
            One of them is no number, or too small.
        """
        return cls(
            tries=int(_number("SOUNDMAP_READ_TRIES", cls.tries, 1)),
            first_wait_s=_number("SOUNDMAP_READ_WAIT_S", cls.first_wait_s, 0),
            longest_s=_number("SOUNDMAP_READ_LONGEST_S", cls.longest_s, 0),
        )


def _number(name: str, default: float, least: float) -> float:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= least):
        raise UsageError(f"{name}={text!r} in the environment: give a number from {least:g} up")
    return value


def read_patiently(read: Callable[[], T], patience: Patience) -> T:
    """Call ``read`` until it goes well or there is no use in it.

    A `PassingError` is tried again with growing, uneven waits, so that many workers do not all come
    back at once. Any other `SourceError` gets one quick second try, for a file that was just being
    replaced. Nothing may be locked by the caller: others would wait, too.

    Raises
    ------
    SourceError
        The last failure; it says how often the read was tried.
    """
    # A stop that comes during a try counts, too.
    pause = partial(_pause, stops_before=_stops)

    def stop(state: RetryCallState) -> bool:
        tries = patience.tries if _passing(state) else min(_HOPELESS_TRIES, patience.tries)
        waited = state.seconds_since_start or 0.0
        return state.attempt_number >= tries or waited >= patience.longest_s

    growing = wait_exponential(patience.first_wait_s, max=_LONGEST_WAIT_S) + wait_random(
        0, patience.first_wait_s
    )

    def wait(state: RetryCallState) -> float:
        return growing(state) if _passing(state) else min(_HOPELESS_WAIT_S, patience.first_wait_s)

    retrying = Retrying(
        retry=retry_if_exception_type(SourceError), stop=stop, wait=wait, sleep=pause, reraise=True
    )
    try:
        return retrying(read)
    except _Stopped:
        raise
    except SourceError as error:
        tries = retrying.statistics["attempt_number"]
        if tries == 1:
            raise
        raise SourceError(f"{error} (tried {tries} times)") from error


def _passing(state: RetryCallState) -> bool:
    assert state.outcome is not None
    return isinstance(state.outcome.exception(), PassingError)


def stop_waiting() -> None:
    """End the reads under way in this process, as soon as they would wait to try again.

    For whoever stops a run: a thread that waits cannot be interrupted otherwise.
    """
    global _stops
    with _stopping:
        _stops += 1
        _stopping.notify_all()


def _pause(seconds: float, stops_before: int) -> None:
    with _stopping:
        if _stopping.wait_for(lambda: _stops != stops_before, timeout=seconds):
            raise _Stopped("reading was stopped while it waited to try again")

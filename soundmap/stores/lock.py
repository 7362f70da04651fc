"""One run on one map at a time, by locks that die with the process that holds them.

They are advisory locks of the file system (``flock``). Where it has none (Windows, some network
mounts), and in object stores, nothing keeps two runs apart.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from soundmap.errors import OutputError
from soundmap.stores.ledger import PRIVATE
from soundmap.stores.place import Location

try:
    import fcntl
except ImportError:  # Windows has no such locks.
    fcntl = None  # type: ignore[assignment]

_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_LOOK_SECONDS = 0.1


class RunLock:
    """The right to write a store: taken at once or refused, given up with the process.

    Parameters
    ----------
    store
        The store; one that is finished, or in an object store, needs no lock and gives none.
    target
        The map that it will be, for the message.

    Raises
    ------
    OutputError
        Another run holds it.
    """

    def __init__(self, store: Location, target: Location) -> None:
        self._file: int | None = None
        if fcntl is None or not isinstance(store, Path) or not (store / PRIVATE).is_dir():
            return
        file = os.open(store / PRIVATE / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(file)
        except OSError as error:
            os.close(file)
            if error.errno in _HELD:
                raise OutputError(
                    f"{target}: another run is writing it: wait for it, or stop it first"
                ) from error
            return
        self._file = file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def release(self) -> None:
        """Let others write."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _take(file: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    # Somebody may only have looked whether it is held.
    time.sleep(_LOOK_SECONDS)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_running(store: Location) -> bool:
    """Tell whether a run on this machine is writing a store; False where that cannot be told."""
    if fcntl is None or not isinstance(store, Path):
        return False
    try:
        file = os.open(store / PRIVATE / "lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _HELD
    finally:
        os.close(file)
    return False


@contextlib.contextmanager
def one_at_a_time(store: Location) -> Iterator[None]:
    """Begin or end runs beside a store one after the other; each takes a moment."""
    if fcntl is None or not isinstance(store, Path):
        yield
        return
    folder = os.open(store.absolute().parent, os.O_RDONLY)
    try:
        # Some network mounts lock no folders.
        with contextlib.suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)

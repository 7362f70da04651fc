"""GDAL as it is used here: settings, opening, and what its errors mean."""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioIOError
from rasterio.io import DatasetReader

NETWORK = (
    *("/vsicurl/", "/vsicurl_streaming/", "/vsis3/", "/vsigs/", "/vsiaz/", "/vsiadls/"),
    *("/vsioss/", "/vsiswift/", "/vsiwebhdfs/", "/vsihdfs/"),
)
"""How names begin that GDAL reads over a network."""

_SETTINGS: dict[str, Any] = {
    # GDAL's cache is one for the whole process and would grow to 5 % of the memory. Kept small, so
    # that memory does not grow with the raster; the price is that a wide raster stored in strips
    # (2,100 rows x 10,000 px x RGB = 63 MB) is decoded again for every unit along a row.
    "GDAL_CACHEMAX": 40 * 1024 * 1024,
    # GDAL waits for ever by default. A server is given up when silent, not when slow: a limit on
    # the whole of a request would never let a large one through a thin line.
    "GDAL_HTTP_CONNECTTIMEOUT": "10",
    "GDAL_HTTP_LOW_SPEED_LIMIT": "1000",
    "GDAL_HTTP_LOW_SPEED_TIME": "20",
    "GDAL_HTTP_TIMEOUT": "300",
    # A read is many requests: one that is refused for the moment is best asked again by itself.
    "GDAL_HTTP_MAX_RETRY": "3",
    "GDAL_HTTP_RETRY_DELAY": "0.5",
    # GDAL remembers for the life of the process that a file did not answer, as if it did not exist,
    # and the part that came of an answer that was cut short. So nothing is kept of closed files.
    "CPL_VSIL_CURL_NON_CACHED": ":".join(NETWORK),
}

_SERVICES = frozenset(
    {"DAAS", "EEDA", "EEDAI", "HTTP", "OGCAPI", "PLMOSAIC", "STACIT", "STACTA"}
    | {"WCS", "WMS", "WMTS"}
)
"""Drivers that take a file for the description of a web service and ask that."""

_HERE = re.escape(__name__) + "$"

_STATUS = re.compile(r"HTTP (?:response|error) code(?: on \S+)?: (\d{3})")
_PASSING_STATUS = frozenset({408, 425, 429})

_PASSING_ERRNO = frozenset(
    getattr(errno, name)
    for name in (
        *("EAGAIN", "EHOSTDOWN", "EHOSTUNREACH", "EINTR", "EIO", "ENETDOWN", "ENETUNREACH"),
        *("ENOTCONN", "EREMOTEIO", "ESTALE", "ETIMEDOUT"),
    )
    if hasattr(errno, name)
)
"""What a network mount answers while its server or its network is away."""


def settings() -> rasterio.Env:
    """Give the settings to read with, as a context; what the caller has set himself is kept.

    Those are environment variables of the same names, and a `rasterio.Env` around the call.
    """
    own = rasterio.env.getenv() if rasterio.env.hasenv() else {}
    return rasterio.Env(
        **{k: v for k, v in _SETTINGS.items() if k not in os.environ and k not in own}
    )


# GDAL keeps the files of all open VRTs in one pool, a file that could not be opened, too: as long
# as any VRT is open, who asks for that file again is told "failure" without a message, which
# rasterio takes for success. Of 200 such reads in three threads 180 returned other pixels or none
# as if all were well (GDAL 3.10, rasterio 1.4.4). Looking at a VRT's header can have that effect on
# the first read. The pool goes when the last VRT is closed. So VRTs are handled one at a time, even
# a failure that rasterio made nothing of counts, and after any failure all of them are closed.
_vrts = threading.RLock()
_holders: weakref.WeakSet[HoldsVrts] = weakref.WeakSet()

_FAILED = re.compile(r"signalled an error: err_no=(\d+), msg=(.*)", re.DOTALL)
_FAILED_TO_OPEN = frozenset({3, 4, *range(11, 18)})
"""GDAL's numbers for files that could not be read or opened, and for what servers answer."""


class HoldsVrts(Protocol):
    """Who keeps VRTs open between reads."""

    def close_vrts(self) -> None:
        """Close them."""
        ...


def holds_vrts(holder: HoldsVrts) -> None:
    """Let an object know when the VRTs that it holds must be closed."""
    _holders.add(holder)


@contextmanager
def alone(vrt: bool) -> Iterator[None]:
    """Hold the lock under which VRTs are opened, read and closed; for other rasters do nothing.

    Raises
    ------
    RasterioIOError
        GDAL could not open something that belongs to the VRT, and rasterio made nothing of it.
    """
    if not vrt:
        yield
        return
    with _vrts:
        try:
            with _listening() as failures:
                yield
            if failures:
                raise RasterioIOError(failures[0])
        except BaseException:
            for holder in list(_holders):
                holder.close_vrts()
            raise


@contextmanager
def _listening() -> Iterator[list[str]]:
    """Hear of failures from rasterio's log, where alone they can be heard of."""
    failures: list[str] = []
    me = threading.get_ident()
    logs = [logging.getLogger(f"rasterio.{name}") for name in ("_env", "_err")]
    levels = [(log.level, log.getEffectiveLevel()) for log in logs]

    def hear(record: logging.LogRecord) -> bool:
        found = _FAILED.search(record.getMessage()) if record.thread == me else None
        if found and int(found[1]) in _FAILED_TO_OPEN:
            failures.append(found[2].strip("'\""))
        # Others hear what they would have heard.
        return record.levelno >= shown

    shown = max(effective for _, effective in levels)
    for log in logs:
        log.addFilter(hear)
        log.setLevel(min(logging.INFO, log.getEffectiveLevel()))
    try:
        yield failures
    finally:
        for log, (level, _) in zip(logs, levels, strict=True):
            log.removeFilter(hear)
            log.setLevel(level)


def _unlock_after_fork() -> None:
    global _vrts
    _vrts = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_after_fork)


def open_dataset(path: Path | str) -> DatasetReader:
    """Open for reading. What is not georeferenced gets an error elsewhere, not a warning.

    Raises
    ------
    RasterioError
        It is no raster, or the description of a web service.
    """
    # Not by a context that puts filters back: they belong to the whole process, and threads that
    # open files at once would leave them changed, or have to wait for one that does not answer.
    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning, module=_HERE)
    # rasterio tries whether a nodata value fits its type.
    with np.errstate(over="ignore"):
        return DatasetReader(str(path), driver=_drivers())


def _drivers() -> list[str]:
    with rasterio.Env() as env:
        return sorted(set(env.drivers()) - _SERVICES)


def reason(error: BaseException) -> str:
    """What GDAL said, without the wrapping of rasterio and without the path."""
    # The innermost says what happened, those around it what was given up for it.
    inner = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    text = " ".join(str(getattr(inner, "errmsg", None) or inner).split())
    text = text.split("' ", 1)[-1] if text.startswith(("'", "`")) else text
    return text.rstrip(".") or type(inner).__name__


def may_pass(error: BaseException, path: Path, remote: bool) -> bool:
    """Tell whether what GDAL failed at may go well some seconds later.

    Parameters
    ----------
    error
        What rasterio raised.
    path
        The file that was read.
    remote
        Whether its pixels come over a network.

    Returns
    -------
    bool
        For what comes over a network: all but answers such as 403 and 404. For files: whether the
        file system itself does not answer; damaged bytes stay damaged.
    """
    if remote:
        found = _STATUS.search(reason(error))
        if found is None:
            return True
        status = int(found[1])
        return status in _PASSING_STATUS or status >= 500
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as cause:
        return cause.errno in _PASSING_ERRNO
    return False

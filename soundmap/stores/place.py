"""Where stores are kept: folders here, or an object store (``s3://bucket/key``).

The only module that knows fsspec. A location is a `pathlib.Path`, or the address as a string;
what a worker elsewhere opens is the address and its own environment, never a connection.

Objects of S3 appear whole or not at all, there are no folders, and nothing can be renamed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from soundmap.errors import MissingExtra, OutputError

Location = Path | str
"""A local path, or the address of an object as text."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
# Of one try; how many there are is the environment's to say (AWS_MAX_ATTEMPTS).
_CONNECT_SECONDS = 10
_READ_SECONDS = 60
PARTIAL = ".partial"
"""How names of files end that are being written, Zarr's own and ours."""


def is_remote(target: str | Path) -> bool:
    """Tell whether a target is an address rather than a path here."""
    return _SCHEME.match(str(target)) is not None


def located(target: str | Path) -> Location:
    """Turn what a user gave into a location.

    Raises
    ------
    OutputError
        It is an address, but not one of S3, or it names no object.
    """
    text = str(target)
    scheme = _SCHEME.match(text)
    if scheme is None:
        return Path(target)
    if scheme[1].lower() != "s3":
        raise OutputError(
            f"{text}: maps are written to local folders and to s3:// addresses: give one of these"
        )
    # A path loses one of the two slashes of an address.
    bucket, _, key = text[scheme.end() :].strip("/").partition("/")
    if not bucket or not key:
        raise OutputError(f"{text}: names no map in a bucket: give s3://BUCKET/NAME.zarr")
    return f"s3://{bucket}/{key}"


def child(location: Location, *names: str) -> Location:
    """Name what lies inside a location."""
    if isinstance(location, Path):
        return location.joinpath(*names)
    return "/".join((location, *names))


def last_name(location: Location) -> str:
    """Name a location without what it lies in."""
    return location.name if isinstance(location, Path) else location.rpartition("/")[2]


def absolute(location: Location) -> str:
    """Write a location so that processes in other folders find it."""
    return str(location.absolute()) if isinstance(location, Path) else location


def is_file(location: Location) -> bool:
    """Tell whether there is a file or object of this very name."""
    if isinstance(location, Path):
        return location.is_file()
    return bool(_s3().isfile(location))


def names_in(location: Location) -> list[str]:
    """Name all that lies directly inside; none where there is nothing."""
    if isinstance(location, Path):
        return sorted(entry.name for entry in location.iterdir()) if location.is_dir() else []
    try:
        found = _s3().ls(location, detail=False)
    except FileNotFoundError as error:
        # By the server itself: a bucket that is not there, which must not pass for an empty one.
        if error.__cause__ is not None:
            raise
        return []
    return sorted({name.rstrip("/").rpartition("/")[2] for name in found})


def read_bytes(location: Location) -> bytes | None:
    """Read a small file; None where there is none."""
    try:
        if isinstance(location, Path):
            return location.read_bytes()
        return bytes(_s3().cat_file(location))
    except FileNotFoundError:
        return None


def read_many(location: Location, names: Sequence[str]) -> dict[str, bytes]:
    """Read small files of one folder by name; those that are not there are left out."""
    if isinstance(location, Path):
        found = {name: read_bytes(location / name) for name in names}
        return {name: data for name, data in found.items() if data is not None}
    keys = {f"{location}/{name}".removeprefix("s3://"): name for name in names}
    if not keys:
        return {}
    held = _s3().cat(list(keys), on_error="omit")
    # Of a single file, the bytes alone come back.
    held = held if isinstance(held, dict) else {next(iter(keys)): held}
    return {keys[key]: bytes(data) for key, data in held.items()}


def write_bytes(location: Location, data: bytes) -> None:
    """Write a small file, whole or not at all, over what is there; its folder must be there."""
    if not isinstance(location, Path):
        _s3().pipe_file(location, data)
        return
    made = location.with_name(f"{location.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        made.write_bytes(data)
        made.replace(location)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


def remove(location: Location) -> None:
    """Remove a file, or a folder with all that it holds; nothing where there is none.

    Raises
    ------
    OSError
        It is there, and could not be removed.
    """
    if isinstance(location, Path):
        if location.is_dir() and not location.is_symlink():
            shutil.rmtree(location)
        else:
            location.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        _s3().rm(location, recursive=True)


def remove_file(location: Location) -> None:
    """Remove one file or object; nothing where there is none."""
    if isinstance(location, Path):
        location.unlink(missing_ok=True)
    else:
        _s3().rm_file(location)


def upload(folder: Path, location: str, last: Sequence[str]) -> None:
    """Put the files of a folder into an object store, those named ``last`` after all others."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for closing in (False, True):
        chosen = [f for f in files if (f.relative_to(folder).as_posix() in last) == closing]
        if chosen:
            keys = [f"{location}/{path.relative_to(folder).as_posix()}" for path in chosen]
            _s3().pipe({k: path.read_bytes() for k, path in zip(keys, chosen, strict=True)})


def sweep(location: Location) -> None:
    """Remove the halves of files that killed writers left; nothing may be writing there."""
    if not isinstance(location, Path):
        return
    for folder, _, names in os.walk(location):
        for name in names:
            if name.endswith(PARTIAL):
                Path(folder, name).unlink(missing_ok=True)


def zarr_location(location: Location, read_only: bool) -> Any:
    """Give what Zarr opens: the path itself, or a store of objects."""
    if isinstance(location, Path):
        return location
    from zarr.storage import FsspecStore

    return FsspecStore(
        _s3(asynchronous=True), read_only=read_only, path=location.removeprefix("s3://")
    )


def storage_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """Errors that mean: storage does not do what it was asked; for ``except``, with ``more``.

    What the libraries under S3 raise is known only once they are loaded.
    """
    found: list[type[Exception]] = [OSError, *more]
    for module, name in (
        ("botocore.exceptions", "BotoCoreError"),
        ("botocore.exceptions", "ClientError"),
        ("aiohttp", "ClientError"),
        ("asyncio", "TimeoutError"),
    ):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def reason_of(error: Exception) -> str:
    """Say in a few words why storage refused."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split()).rstrip(".:")


def advice(location: Location) -> str:
    """Say what to do where a location cannot be written."""
    if isinstance(location, Path):
        return "make room or choose another output"
    return (
        "check the bucket, the keys (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE) and "
        "the server (AWS_ENDPOINT_URL)"
    )


@contextlib.contextmanager
def writing(location: Location, what: str = "could not be written") -> Iterator[None]:
    """Turn refusals by storage into one line.

    Raises
    ------
    OutputError
        Storage refused.
    """
    try:
        yield
    except OutputError:
        raise
    except storage_errors() as error:
        forget_connections()
        raise OutputError(f"{location}: {what} ({reason_of(error)}): {advice(location)}") from error


def forget_connections() -> None:
    """Open new connections from here on: keys may have come, or changed, in the meantime."""
    _connect.cache_clear()


def _s3(asynchronous: bool = False) -> Any:
    # The environment is part of the key: a connection made without keys is not taken for one with.
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    return _connect(asynchronous, os.getpid(), settings)


@lru_cache(maxsize=8)
def _connect(asynchronous: bool, _process: int, _settings: Iterable[tuple[str, str]]) -> Any:
    try:
        from s3fs import S3FileSystem
    except ImportError as error:
        raise MissingExtra("s3fs", "cloud", "a map in s3://") from error
    system = S3FileSystem(
        asynchronous=asynchronous,
        # fsspec would hand out a connection of other keys, and listings of before.
        skip_instance_cache=True,
        use_listings_cache=False,
        # More would ask for the size of each object before it is read; Zarr asks for many at once.
        max_concurrency=1,
        config_kwargs={"connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS},
    )
    if asynchronous:
        atexit.register(_close, system)
    return system


def _close(system: Any) -> None:
    """Close a connection that Zarr used, which would be complained of at the program's end."""
    from zarr.core.sync import sync

    with contextlib.suppress(Exception):
        sync(system._s3creator.__aexit__(None, None, None), timeout=1)

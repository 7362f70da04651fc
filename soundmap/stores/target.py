"""Where a map goes: check the place before a run, and put the finished map there after it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal

from soundmap.errors import OutputError
from soundmap.stores import place
from soundmap.stores.ledger import PRIVATE
from soundmap.stores.place import child, last_name

Kind = Literal["geotiff", "zarr"]

_SUFFIXES: dict[str, Kind] = {".tif": "geotiff", ".tiff": "geotiff", ".zarr": "zarr"}
_ZARR_MARKERS = (".zgroup", ".zarray", "zarr.json")


def check_target(path: str | Path, overwrite: bool = False) -> Kind:
    """Check that a map can be written to ``path``, and say which kind it is.

    Leaves nothing behind. At an address, a run that is not finished may go on: only what is
    finished, or not a map, is in its way.

    Raises
    ------
    OutputError
        The suffix is unknown, the folder is missing or cannot be written to, something is there
        already and ``overwrite`` is off, or what is there is not a map and must not be replaced.
    """
    location = place.located(path)
    suffix = Path(last_name(location)).suffix.lower()
    kind = _SUFFIXES.get(suffix)
    if kind is None:
        raise OutputError(f"{path}: unknown output type: name it .tif (GeoTIFF) or .zarr (Zarr)")
    if not isinstance(location, Path):
        _check_remote(location, kind, overwrite)
        return kind
    path = location
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OutputError(f"{path}: folder {folder} does not exist: make it or choose another")
    try:
        # Asking for permission bits lies for root and for read-only mounts; a file does not.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(
            f"{path}: cannot write in folder {folder} ({reason}): choose another folder"
        ) from error
    if path.exists() or path.is_symlink():
        _check_replaceable(path, kind, overwrite)
    return kind


def publish(tmp: str | Path, target: str | Path, overwrite: bool = False) -> None:
    """Rename a finished map into place, file or folder.

    What was there stays until the new one is in place, and is put back if that fails.

    Parameters
    ----------
    tmp
        The finished map, in the same folder as ``target``.
    target
        Its final name.
    overwrite
        Whether an older map of that name may be replaced.

    Raises
    ------
    OutputError
        The target is taken, or the rename failed.
    """
    tmp, target = Path(tmp), Path(target)
    aside = aside_path(target)
    try:
        if not target.exists():
            os.rename(tmp, target)
            _remove(aside)
            return
        if not overwrite:
            raise OutputError(f"{target}: exists already: add --overwrite or choose another name")
        if not tmp.is_dir() and not target.is_dir():
            os.replace(tmp, target)
            return
        # A folder cannot replace a folder in one step: the old one steps aside first.
        _remove(aside)
        os.rename(target, aside)
        try:
            os.rename(tmp, target)
        except BaseException:
            os.rename(aside, target)
            raise
        _remove(aside)
    except OutputError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{target}: could not be put in place ({reason})") from error


def aside_path(target: Path) -> Path:
    """Where an older folder waits while the new one takes its place."""
    return target.with_name(f".{target.name}.old")


def _check_replaceable(path: Path, kind: Kind, overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(f"{path}: exists already: add --overwrite or choose another name")
    if kind == "geotiff" and not path.is_file():
        raise OutputError(f"{path}: is a folder, not a GeoTIFF to replace: choose another name")
    if kind == "zarr" and not any((path / name).is_file() for name in _ZARR_MARKERS):
        raise OutputError(f"{path}: is not a Zarr store, so it is left alone: choose another name")


def _check_remote(address: str, kind: Kind, overwrite: bool) -> None:
    if kind == "geotiff":
        raise OutputError(
            f"{address}: a GeoTIFF is written to a folder: name a .zarr there, or write the file "
            "here and copy it"
        )
    with place.writing(address, "cannot be written"):
        names = place.names_in(address)
        probe = child(address, PRIVATE, f"probe-{os.getpid()}")
        place.write_bytes(probe, b"")
        with contextlib.suppress(*place.storage_errors()):
            # Some keys may write and not remove.
            place.remove_file(probe)
    if not names or PRIVATE in names:
        return
    if not overwrite:
        raise OutputError(f"{address}: exists already: add --overwrite or choose another name")
    if not any(marker in names for marker in _ZARR_MARKERS):
        raise OutputError(
            f"{address}: is not a Zarr store, so it is left alone: choose another name"
        )


def _remove(path: Path) -> None:
    # Also clears what a killed run left. The new map matters more than leftovers of an old one.
    shutil.rmtree(path, ignore_errors=True)

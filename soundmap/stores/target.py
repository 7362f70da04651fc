"""Where a map goes: check the place before a run, and put the finished map there after it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Literal

from soundmap.errors import OutputError

Kind = Literal["geotiff", "zarr"]

_SUFFIXES: dict[str, Kind] = {".tif": "geotiff", ".tiff": "geotiff", ".zarr": "zarr"}
_ZARR_MARKERS = (".zgroup", ".zarray", "zarr.json")


def check_target(path: str | Path, overwrite: bool = False) -> Kind:
    """Check that a map can be written to ``path``, and say which kind it is.

    Leaves nothing behind.

    Raises
    ------
    OutputError
        The suffix is unknown, the folder is missing or cannot be written to, something is there
        already and ``overwrite`` is off, or what is there is not a map and must not be replaced.
    """
    # A path loses one of the two slashes of an address.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise OutputError(f"{path}: maps are written to local folders: give a file path")
    path = Path(path)
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise OutputError(f"{path}: unknown output type: name it .tif (GeoTIFF) or .zarr (Zarr)")
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
    aside = target.with_name(f".{target.name}.old")
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


def _check_replaceable(path: Path, kind: Kind, overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(f"{path}: exists already: add --overwrite or choose another name")
    if kind == "geotiff" and not path.is_file():
        raise OutputError(f"{path}: is a folder, not a GeoTIFF to replace: choose another name")
    if kind == "zarr" and not any((path / name).is_file() for name in _ZARR_MARKERS):
        raise OutputError(f"{path}: is not a Zarr store, so it is left alone: choose another name")


def _remove(path: Path) -> None:
    # Also clears what a killed run left. The new map matters more than leftovers of an old one.
    shutil.rmtree(path, ignore_errors=True)

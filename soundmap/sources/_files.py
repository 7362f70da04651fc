"""Which files a name stands for: a path, a folder, a glob."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from glob import glob
from pathlib import Path

from soundmap.errors import InputError, UsageError
from soundmap.sources._references import check_file

_SUFFIXES = "asc bil ecw img j2k jp2 kea mbtiles sid tif tiff vrt"

RASTER_SUFFIXES = frozenset("." + name for name in _SUFFIXES.split())
"""What counts as a raster in a folder. Pictures (PNG, JPEG) there are mostly previews: a
glob names those."""

_SIDECARS = (".xml", ".ovr", ".msk", ".tfw", ".prj", ".wld", ".jgw", ".pgw", ".qml", ".json")


@dataclass(frozen=True)
class Rasters:
    """The files that imagery was named by."""

    paths: tuple[Path, ...]
    """In order of name; at least one."""
    folder: Path | None = None
    """The folder that was named; what lies in it must not lead out of it."""


def find_rasters(spec: str) -> Rasters:
    """Find the files that a path, folder or glob names.

    Raises
    ------
    UsageError
        It is a web address or another name that only GDAL would understand.
    InputError
        Nothing is there, or something that is no regular file; or a link in a folder leads out
        of it.
    """
    if not spec.strip():
        raise UsageError("no imagery was named: give a raster, a folder, a glob, or sample")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", spec) or spec.startswith(("/vsi", "<")):
        raise UsageError(
            f"{spec[:200]}: imagery is read from local files in this version; download it first, "
            "or write a VRT file that points to it (gdal_translate -of VRT)"
        )
    path = Path(spec).expanduser()
    if _is(Path.is_dir, path):
        return Rasters(tuple(_in_folder(spec, path)), path)
    if _is(Path.exists, path) or _is(Path.is_symlink, path):
        check_file(path)
        return Rasters((path,))
    if re.search(r"[*?\[]", spec):
        matches = map(Path, glob(str(path), recursive=True))
        found = [p for p in matches if not (p.is_dir() or p.name.lower().endswith(_SIDECARS))]
        if not found:
            raise InputError(f"{spec}: no file matches this pattern")
        return Rasters(tuple(_checked(found)))
    raise InputError(f"{spec}: no such file or folder{_alike(path)}")


def _in_folder(spec: str, folder: Path) -> list[Path]:
    try:
        names = list(folder.iterdir())
    except OSError as error:
        raise InputError(f"{spec}: cannot be read ({(error.strerror or '').lower()})") from error
    # Hidden files are what systems and unfinished copies leave behind.
    shown = [p for p in names if not p.name.startswith(".")]
    found = _checked(p for p in shown if p.suffix.lower() in RASTER_SUFFIXES and not p.is_dir())
    if not found:
        raise InputError(
            f"{spec}: the folder holds no rasters "
            f"(looked for {' '.join(sorted(RASTER_SUFFIXES))}, not in subfolders)"
        )
    root = folder.resolve()
    for p in found:
        if p.is_symlink() and not p.resolve().is_relative_to(root):
            raise InputError(
                f"{p}: is a link to {p.resolve()}, outside the folder that was given as imagery; "
                f'if that is meant, give a glob, e.g. "{folder / ("*" + p.suffix)}"'
            )
    return found


def _checked(paths: Iterable[Path]) -> list[Path]:
    found = sorted(paths)
    for path in found:
        check_file(path)
    return found


def _is(question: Callable[[Path], bool], path: Path) -> bool:
    """Ask about a path that may be too long or otherwise impossible."""
    try:
        return question(path)
    except OSError:
        return False


def _alike(path: Path) -> str:
    """A hint for a mistyped name."""
    try:
        names = sorted(p.name for p in path.parent.iterdir())
    except OSError:
        return "" if _is(Path.is_dir, path.parent) else f" (there is no folder {path.parent})"
    close = get_close_matches(path.name, names, n=1, cutoff=0.7)
    return f"; did you mean {path.parent / close[0]}?" if close else ""

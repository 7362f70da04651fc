"""Imagery: sources that fill any grid with pixels, and how one is named."""

from __future__ import annotations

import re
from glob import glob
from pathlib import Path

from soundmap.errors import InputError, UsageError
from soundmap.sources.base import Image, Source, SourceInfo

__all__ = ["Image", "Source", "SourceInfo", "find_rasters", "open_source"]

_SUFFIXES = "asc bil ecw img j2k jp2 kea mbtiles sid tif tiff vrt"

RASTER_SUFFIXES = frozenset("." + name for name in _SUFFIXES.split())
"""What counts as a raster in a folder. Pictures (PNG, JPEG) there are mostly previews: a
glob names those."""

_SIDECARS = (".xml", ".ovr", ".msk", ".tfw", ".prj", ".wld", ".jgw", ".pgw", ".qml", ".json")


def open_source(
    spec: str,
    bands: tuple[int, ...] | None = None,
    rescale: tuple[float, float] | None = None,
) -> Source:
    """Open imagery by its name. Reads headers only.

    Parameters
    ----------
    spec
        ``sample`` for the scene made by code (a file of that name is ``./sample``); else a raster,
        a VRT, a folder of rasters (not its subfolders) or a glob pattern. Several rasters
        make one mosaic, in which the first in order of name wins.
    bands
        Three bands (red, green, blue) or one (grey), counted from 1; None chooses.
    rescale
        Stored numbers that become 0 and 255; None takes uint8 as it is, and anything else by
        percentiles of the whole source.

    Raises
    ------
    UsageError
        The spec is a web address, or ``bands`` or ``rescale`` do not fit.
    InputError
        Nothing is there, or it cannot be used as georeferenced imagery.
    """
    if spec == "sample":
        if bands is not None or rescale is not None:
            raise UsageError("--bands and --rescale are for rasters; the sample takes neither")
        # Imported when named: rasters do not need the sample's code, nor it theirs.
        from soundmap.sources.sample import SampleSource

        return SampleSource()
    from soundmap.sources.raster import RasterSource

    paths = find_rasters(spec)
    name = paths[0].name if len(paths) == 1 else f"{Path(spec).name or spec} ({len(paths)} rasters)"
    return RasterSource(paths, name=name, bands=bands, rescale=rescale)


def find_rasters(spec: str) -> list[Path]:
    """Files that a path, folder or glob names, in order of name.

    Raises
    ------
    UsageError
        It is a web address or another path that only GDAL would understand.
    InputError
        Nothing is there.
    """
    if not spec.strip():
        raise UsageError("no imagery was named: give a raster, a folder, a glob, or sample")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", spec) or spec.startswith("/vsi"):
        raise UsageError(
            f"{spec}: imagery is read from local files in this version; download it first, or "
            "write a VRT file that points to it (gdal_translate -of VRT)"
        )
    path = Path(spec).expanduser()
    if path.is_dir():
        found = [
            p
            for p in path.iterdir()
            # Hidden files are what systems and unfinished copies leave behind.
            if p.suffix.lower() in RASTER_SUFFIXES and p.is_file() and not p.name.startswith(".")
        ]
        if not found:
            raise InputError(
                f"{spec}: the folder holds no rasters "
                f"(looked for {' '.join(sorted(RASTER_SUFFIXES))}, not in subfolders)"
            )
        return sorted(found)
    if path.exists():
        return [path]
    if re.search(r"[*?\[]", spec):
        found = [
            p
            for p in map(Path, glob(str(path), recursive=True))
            if p.is_file() and not p.name.lower().endswith(_SIDECARS)
        ]
        if not found:
            raise InputError(f"{spec}: no file matches this pattern")
        return sorted(found)
    raise InputError(f"{spec}: no such file or folder{_alike(path)}")


def _alike(path: Path) -> str:
    """A hint for a mistyped name."""
    from difflib import get_close_matches

    if not path.parent.is_dir():
        return f" (there is no folder {path.parent})"
    names = sorted(p.name for p in path.parent.iterdir())
    close = get_close_matches(path.name, names, n=1, cutoff=0.7)
    return f"; did you mean {path.parent / close[0]}?" if close else ""

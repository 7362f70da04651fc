"""Imagery: sources that fill any grid with pixels, and how one is named."""

from __future__ import annotations

from pathlib import Path

from soundmap.errors import UsageError
from soundmap.sources._files import find_rasters
from soundmap.sources._retry import Patience, stop_waiting
from soundmap.sources.base import Image, Source, SourceInfo

__all__ = [
    "Image",
    "Patience",
    "Source",
    "SourceInfo",
    "find_rasters",
    "open_source",
    "stop_waiting",
]


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
        Nothing is there, it cannot be used as georeferenced imagery, or it leads where imagery
        must not come from (docs/imagery.md).
    SourceError
        Imagery on the network does not answer.
    """
    if spec == "sample":
        if bands is not None or rescale is not None:
            raise UsageError("--bands and --rescale are for rasters; the sample takes neither")
        # Imported when named: rasters do not need the sample's code, nor it theirs.
        from soundmap.sources.sample import SampleSource

        return SampleSource()
    from soundmap.sources.raster import RasterSource

    found = find_rasters(spec)
    n = len(found.paths)
    name = found.paths[0].name if n == 1 else f"{Path(spec).name or spec} ({n} rasters)"
    return RasterSource(found.paths, name=name, bands=bands, rescale=rescale, within=found.folder)

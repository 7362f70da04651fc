"""What every imagery source promises, and how one is named on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox


@dataclass(frozen=True)
class Image:
    """Pixels with their validity and their place on the ground."""

    pixels: NDArray[np.uint8]
    """uint8[3, H, W], red, green, blue; 0 where not valid."""
    valid: NDArray[np.bool_]
    """bool[H, W]; False where the imagery has nothing."""
    grid: GeoBox
    """Where the pixels lie: shape (H, W)."""


@dataclass(frozen=True)
class SourceInfo:
    """What is known of a source without reading its pixels."""

    name: str
    """Short human name, e.g. the file name."""
    native_grid: GeoBox | None
    """The imagery's own pixel grid, as stored (north-up, south-up or rotated); None if endless."""
    native_gsd_m: float
    """True ground metres per native pixel at the centre."""
    attribution: str = ""
    """Who must be credited, as text; empty if unknown."""
    licence: str = ""
    """Licence as text; empty if unknown."""
    facts: dict[str, str] = field(default_factory=dict)
    """All that decides the pixels (files, digests, bands, rescale): part of a run's fingerprint."""


@runtime_checkable
class Source(Protocol):
    """Imagery that can fill any grid.

    Three promises. Constructing one opens no pixel data (headers only). ``read`` may be called
    from several threads at once. The object pickles, and the copy reads the same pixels.
    """

    @property
    def info(self) -> SourceInfo:
        """Facts known without reading pixels."""
        ...

    def read(self, grid: GeoBox) -> Image:
        """Fill ``grid`` with pixels.

        Outside the imagery the result is not valid: that is absence, not an error. The grid may
        be in any CRS and of any pixel size: coarser than the imagery is averaged, finer or
        shifted is interpolated (bilinear).

        Raises
        ------
        SourceError
            The pixels could not be read.
        """
        ...

"""What every imagery source promises, and how one is named on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

Resampling = Literal["area", "cubic"]
"""How pixels come about that are not the imagery's own.

``area``: coarser ones are the mean of the imagery under them, by area; finer or shifted ones are
interpolated between the nearest (bilinear). For models that were trained on imagery as it is.

``cubic``: bicubic, a = -0.5, antialiased: where pixels are coarser (by 5 % or more) the kernel is
stretched by as much, as Pillow's ``BICUBIC`` does. A pixel takes from imagery up to two of its own
sizes away, so it is crisper than a mean. For models that were trained on crops resized so.
"""


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

    Four promises. Constructing one opens no pixel data (headers only). ``read`` may be called
    from several threads at once. The object pickles, and the copy reads the same pixels. What may
    pass (a network, a server) is tried again within ``read``, with growing waits and for a bounded
    time: whoever calls it never tries again.
    """

    @property
    def info(self) -> SourceInfo:
        """Facts known without reading pixels."""
        ...

    def read(self, grid: GeoBox, resampling: Resampling = "area") -> Image:
        """Fill ``grid`` with pixels.

        Outside the imagery the result is not valid: that is absence, not an error. The grid may
        be in any CRS and of any pixel size. Pixels that are the imagery's own are copied, others
        made as ``resampling`` says. A pixel never depends on what else was asked for, and what
        is not valid never lends it its colour.

        Raises
        ------
        SourceError
            The pixels could not be read, tried as often as was of use; one line.
        """
        ...

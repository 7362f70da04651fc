"""A source made of an array, for tests: counts its reads and fails when told to."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from soundmap.errors import SourceError
from soundmap.grid import ground_gsd_m
from soundmap.sources._resample import Canvas, fill
from soundmap.sources.base import Image, Resampling, SourceInfo


class FakeSource:
    """Pixels in memory.

    Parameters
    ----------
    pixels
        uint8[3, H, W], red, green, blue; or uint8[H, W], grey.
    grid
        Where they lie: shape (H, W).
    valid
        bool[H, W]; all valid if not given.
    fail_on
        Numbers of the reads, counted from 1, that raise `SourceError`.
    name, attribution, licence
        What ``info`` says.

    Examples
    --------
    >>> grid = GeoBox((4, 4), Affine(10, 0, 500000, 0, -10, 5000000), "EPSG:32633")
    >>> source = FakeSource(np.full((4, 4), 7, np.uint8), grid, fail_on={2})
    >>> source.read(grid).pixels.max()
    np.uint8(7)
    >>> source.reads
    1
    """

    def __init__(
        self,
        pixels: NDArray[np.uint8],
        grid: GeoBox,
        valid: NDArray[np.bool_] | None = None,
        *,
        fail_on: Collection[int] = (),
        name: str = "fake",
        attribution: str = "",
        licence: str = "",
    ) -> None:
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[None], 3, axis=0)
        if pixels.dtype != np.uint8 or pixels.shape != (3, *grid.shape):
            raise ValueError(f"pixels must be uint8[3, {grid.shape[0]}, {grid.shape[1]}]")
        self._valid = np.ones(grid.shape, np.bool_) if valid is None else valid.astype(np.bool_)
        self._pixels = pixels * self._valid
        self._fail_on = frozenset(fail_on)
        digest = hashlib.sha256(self._pixels.tobytes() + self._valid.tobytes()).hexdigest()[:16]
        self._info = SourceInfo(
            name=name,
            native_grid=grid,
            native_gsd_m=ground_gsd_m(grid),
            attribution=attribution,
            licence=licence,
            facts={"pixels": digest},
        )
        self.grids: list[GeoBox] = []
        """Every grid asked for, in order."""
        self.resamplings: list[Resampling] = []
        """How each was to be filled."""
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def info(self) -> SourceInfo:
        """Facts known without reading pixels."""
        return self._info

    @property
    def reads(self) -> int:
        """How many reads were asked for, failed ones too."""
        return len(self.grids)

    def read(self, grid: GeoBox, resampling: Resampling = "area") -> Image:
        """Fill ``grid`` with pixels, or fail if this read was to.

        Raises
        ------
        SourceError
            The number of this read is in ``fail_on``.
        """
        with self._lock:
            self.grids.append(grid)
            self.resamplings.append(resampling)
            number = len(self.grids)
        if number in self._fail_on:
            raise SourceError(f"{self._info.name}: read {number} was told to fail")
        canvas = Canvas(grid)
        if self._info.native_grid is not None:
            fill(canvas, self._info.native_grid, self._window, resampling)
        return canvas.image()

    def _window(
        self, row0: int, row1: int, col0: int, col1: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        return self._pixels[:, row0:row1, col0:col1], self._valid[row0:row1, col0:col1]

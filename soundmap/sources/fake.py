"""Sources for tests: one made of an array, and one that spoils another's reads."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from soundmap.errors import SourceError
from soundmap.grid import crs_of, ground_gsd_m
from soundmap.sources._resample import Canvas, fill
from soundmap.sources._retry import PassingError, Patience, read_patiently
from soundmap.sources.base import Image, Resampling, Source, SourceInfo


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


class FaultySource:
    """Another source, of whose reads some fail: by chance, or for ever in some places.

    As a source on a network does, it tries again itself what may pass. Whether a try fails by
    chance is decided by the seed, the grid and how often this process tried it, so that a run
    meets the same faults whatever the order of its units and the number of its workers.

    Parameters
    ----------
    source
        Where pixels come from.
    share
        Share of tries that fail by chance, 0 to 1.
    broken
        Places, in the CRS of the source's grid: reads that touch one never go well.
    seed
        Of the chances.
    patience
        How often reads are tried; by default five times, without waiting.
    log
        A file that gets a line for every read that was asked for: the process, "read" or "failed",
        and the grid's bounds. Whole lines, whichever processes write them.

    Examples
    --------
    >>> grid = GeoBox((4, 4), Affine(10, 0, 500000, 0, -10, 5000000), "EPSG:32633")
    >>> whole = FakeSource(np.full((4, 4), 7, np.uint8), grid)
    >>> FaultySource(whole, share=0.3).read(grid).pixels.max()
    np.uint8(7)
    >>> FaultySource(whole, broken=[grid[:1, :1]]).read(grid)
    Traceback (most recent call last):
        ...
    soundmap.errors.SourceError: fake: a fault, and not by chance (tried 5 times)
    """

    def __init__(
        self,
        source: Source,
        *,
        share: float = 0.0,
        broken: Sequence[GeoBox] = (),
        seed: int = 0,
        patience: Patience | None = None,
        log: Path | None = None,
    ) -> None:
        self._source = source
        self._share = share
        self._broken = tuple((crs_of(place), place.extent) for place in broken)
        self._seed = seed
        self._patience = patience or Patience(first_wait_s=0)
        self._log = log
        self._start()

    def _start(self) -> None:
        self._tried: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_tried", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def info(self) -> SourceInfo:
        """Those of the source within."""
        return self._source.info

    def read(self, grid: GeoBox, resampling: Resampling = "area") -> Image:
        """Fill ``grid`` with pixels, or fail.

        Raises
        ------
        SourceError
            Each try failed.
        """
        place = ",".join(f"{edge:.3f}" for edge in grid.extent.boundingbox)
        try:
            image = read_patiently(lambda: self._try(grid, place, resampling), self._patience)
        except SourceError:
            self._note("failed", place)
            raise
        self._note("read", place)
        return image

    def _try(self, grid: GeoBox, place: str, resampling: Resampling) -> Image:
        with self._lock:
            self._tried[place] += 1
            nth = self._tried[place]
        if any(grid.extent.to_crs(crs).intersects(box) for crs, box in self._broken):
            raise PassingError(f"{self.info.name}: a fault, and not by chance")
        if random.Random(f"{self._seed} {place} {nth}").random() < self._share:
            raise PassingError(f"{self.info.name}: a fault by chance")
        return self._source.read(grid, resampling)

    def _note(self, outcome: str, place: str) -> None:
        if self._log is not None:
            with self._log.open("ab", buffering=0) as file:
                # One write to a file that is appended to is not mixed with those of others.
                file.write(f"{os.getpid()} {outcome} {place}\n".encode())

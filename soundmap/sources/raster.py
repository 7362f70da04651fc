"""Imagery from files: anything that GDAL opens, one raster or many as a mosaic."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox
from rasterio.errors import RasterioError
from rasterio.windows import Window

from soundmap.errors import SourceError, UsageError
from soundmap.grid import crs_of, ground_gsd_m, x_period
from soundmap.sources._footprint import native_extent, outline
from soundmap.sources._rasterfile import (
    GDAL_OPTIONS,
    RasterFile,
    inspect,
    open_dataset,
    reason,
)
from soundmap.sources._resample import Canvas, fill
from soundmap.sources._rescale import Rescale, from_sample, given
from soundmap.sources._tiles import read_in_tiles
from soundmap.sources.base import Image, SourceInfo

_OPEN_FILES = 32
"""Files kept open between reads."""

_LISTED_FILES = 20
"""Mosaics of more files name them by one digest."""

_READ_WHOLE_PX = 150_000_000
"""Sources up to this size are read whole for their percentiles, larger ones in many places."""

_SAMPLE_PX = 2_000_000
"""About how many pixels the percentiles are taken over."""

_SAMPLE_PLACES = 600


class RasterSource:
    """One raster, or several as one mosaic.

    Where several lie over each other, the first one with a valid pixel wins, in the order given.
    The mosaic's native grid is the first raster's, extended to all of them; rasters in other
    CRS or pixel sizes are resampled when read.

    Numbers other than uint8 are stretched to 0..255 by ``rescale``, or between the 2nd and the 98th
    percentile of the valid pixels of the whole source, over its three bands together. If any
    raster needs the stretch, all get it. The percentiles are taken once, when first needed: by
    ``read``, ``info`` or pickling.

    Parameters
    ----------
    paths
        Raster files, first wins.
    name
        What to call the source; the file's name if not given.
    bands
        Three bands (red, green, blue) or one (grey), counted from 1. If not given: by colour
        interpretation, else by name (red, green, blue or B04, B03, B02), else the first three.
        One or two bands of data are shown as grey, from the first. Alpha is never data.
    rescale
        The stored numbers that become 0 and 255.

    Raises
    ------
    InputError
        A file is missing, not a raster, not georeferenced or cut short.
    UsageError
        A file has no such band, or ``rescale`` is not two rising numbers.

    Examples
    --------
    >>> source = RasterSource(["lisbon.tif"])                       # doctest: +SKIP
    >>> source.read(source.info.native_grid[:224, :224]).pixels.shape   # doctest: +SKIP
    (3, 224, 224)
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        name: str = "",
        bands: tuple[int, ...] | None = None,
        rescale: tuple[float, float] | None = None,
    ) -> None:
        if not paths:
            raise UsageError("no raster files were given")
        self._name = name or Path(paths[0]).name
        self._given = None if rescale is None else given(rescale)
        # Workers may run in another directory.
        self._files = tuple(inspect(Path(os.path.abspath(p)), bands) for p in paths)
        self._stretch: tuple[Rescale | None] | None = None
        self._info: SourceInfo | None = None
        self._start()

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._handles = _Handles()
        self._groups = _by_crs(self._files)

    def __getstate__(self) -> dict[str, Any]:
        # Found out here once, not by every copy anew.
        self._rescale()
        keep = ("_name", "_given", "_files", "_stretch", "_info")
        return {key: self.__dict__[key] for key in keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __repr__(self) -> str:
        return f"RasterSource({self._name!r})"

    @property
    def info(self) -> SourceInfo:
        """Name, native grid, credits, and all that decides the pixels."""
        with self._lock:
            if self._info is None:
                self._info = self._describe()
            return self._info

    def read(self, grid: GeoBox) -> Image:
        """Fill ``grid`` with pixels.

        Where the grid's pixels are the raster's own they are copied; where they are blocks of
        k x k of them, averaged. Any other grid is warped: averaged by area where it is coarser,
        bilinear where it is finer or shifted. A pixel is valid if half of its area is, and
        its colour is that of the valid part.

        Parameters
        ----------
        grid
            The pixels wanted, in any CRS.

        Returns
        -------
        Image
            uint8[3, H, W] and validity bool[H, W].

        Raises
        ------
        SourceError
            A file could not be read.
        """
        a = grid.affine
        if not (a.b or a.d) and any(f.grid.crs != grid.crs for f in self._files):
            near = {file.path for file in self._near(grid)}
            return read_in_tiles(grid, lambda tile: self._read(tile, near))
        return self._read(grid)

    def _read(self, grid: GeoBox, among: Container[Path] | None = None) -> Image:
        rescale = self._rescale()
        canvas = Canvas(grid)
        with rasterio.Env(**GDAL_OPTIONS):
            for file in self._near(grid):
                if among is not None and file.path not in among:
                    continue
                with self._handles.borrow(file.path) as dataset:
                    try:
                        fill(canvas, file.grid, partial(file.window, dataset, rescale))
                    except RasterioError as error:
                        raise SourceError(
                            f"{file.path}: could not be warped ({reason(error)})"
                        ) from error
                if len(self._files) > 1 and canvas.full:
                    break
        return canvas.image()

    def close(self) -> None:
        """Close the files that are kept open between reads; a later read opens them again."""
        self._handles.close()

    def _near(self, grid: GeoBox) -> Iterator[RasterFile]:
        if len(self._files) == 1:
            yield self._files[0]
            return
        near = [group.members[group.touched(grid)] for group in self._groups]
        for index in np.sort(np.concatenate(near)):
            yield self._files[index]

    def _rescale(self) -> Rescale | None:
        with self._lock:
            if self._stretch is None:
                self._stretch = (self._find_rescale(),)
            return self._stretch[0]

    def _find_rescale(self) -> Rescale | None:
        scaled = [f for f in self._files if f.scaled]
        if not scaled or self._given is not None:
            return self._given
        if all(f.dtype == "uint8" for f in scaled):
            return None
        total = sum(math.prod(f.grid.shape) for f in scaled)
        with rasterio.Env(**GDAL_OPTIONS):
            samples = [self._sample(f, total) for f in scaled]
        return from_sample(np.concatenate(samples))

    def _sample(self, file: RasterFile, total: int) -> NDArray[Any]:
        """Valid numbers spread over one raster, as many as its part of the source deserves."""
        height, width = file.grid.shape
        thinning = max(1.0, math.sqrt(total / _SAMPLE_PX))
        with self._handles.borrow(file.path) as dataset:
            if total <= _READ_WHOLE_PX or max(file.overviews, default=1) >= thinning / 2:
                shape = (math.ceil(height / thinning), math.ceil(width / thinning))
                windows = [Window(0, 0, width, height)]
            else:
                share = height * width / total
                windows = _spread(file, max(1, round(_SAMPLE_PLACES * share)))
                per_window = max(1, _SAMPLE_PX * share / len(windows))
                thin = max(1.0, math.sqrt(windows[0].height * windows[0].width / per_window))
                shape = (
                    math.ceil(windows[0].height / thin),
                    math.ceil(windows[0].width / thin),
                )
            parts = []
            for window in windows:
                values, valid = file.values(dataset, window, shape)
                parts.append(values[:, valid].ravel())
        return np.concatenate(parts)

    def _describe(self) -> SourceInfo:
        first = self._files[0]
        grid = _union(self._files)
        rescale = self._rescale()
        files = "; ".join(f"{f.path.name}:{f.digest()}" for f in self._files)
        if len(self._files) > _LISTED_FILES:
            files = f"digest of all: {hashlib.sha256(files.encode()).hexdigest()[:16]}"
        facts = {
            "files": files,
            "bands": _joined(f"{','.join(map(str, f.bands))} ({f.bands_how})" for f in self._files),
            "rescale": str(rescale) if rescale else "none (uint8 as stored)",
            "resampling": "average where coarser, else bilinear",
        }
        if len(self._files) > 1:
            facts["mosaic"] = f"{len(self._files)} rasters, the first valid pixel wins"
        return SourceInfo(
            name=self._name,
            native_grid=grid,
            native_gsd_m=ground_gsd_m(grid if len(self._files) == 1 else first.grid),
            attribution=_joined(f.attribution for f in self._files),
            licence=_joined(f.licence for f in self._files),
            facts=facts,
        )


def _joined(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(t for t in texts if t))


class _Handles:
    """Open datasets, each lent to one reader at a time, since GDAL forbids sharing them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: deque[tuple[Path, rasterio.DatasetReader]] = deque()
        self._pid = os.getpid()

    @contextmanager
    def borrow(self, path: Path) -> Iterator[rasterio.DatasetReader]:
        dataset = self._take(path)
        try:
            yield dataset
        except BaseException:
            # A handle that failed may hold half-read state: the next try gets a new one.
            dataset.close()
            raise
        self._give(path, dataset)

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, deque()
        for _, dataset in idle:
            dataset.close()

    def _take(self, path: Path) -> rasterio.DatasetReader:
        with self._lock:
            if self._pid != os.getpid():
                # After a fork, parent and child would move one another's file position. Closing
                # could move it too, so the parent's handles are left alone for good.
                _ABANDONED.append(self._idle)
                self._idle, self._pid = deque(), os.getpid()
            for i in range(len(self._idle) - 1, -1, -1):
                if self._idle[i][0] == path:
                    dataset = self._idle[i][1]
                    del self._idle[i]
                    return dataset
        try:
            return open_dataset(path)
        except RasterioError as error:
            raise SourceError(f"{path}: could not be opened again ({reason(error)})") from error

    def _give(self, path: Path, dataset: rasterio.DatasetReader) -> None:
        spare = None
        with self._lock:
            self._idle.append((path, dataset))
            if len(self._idle) > _OPEN_FILES:
                spare = self._idle.popleft()[1]
        if spare is not None:
            spare.close()


_ABANDONED: list[object] = []


class _Group:
    """Rasters of one CRS with their bounds in it, to find quickly which ones a grid may touch."""

    def __init__(self, crs: CRS, members: list[int], grids: list[GeoBox]) -> None:
        self.members = np.array(members)
        self._crs = crs
        self._bounds = np.array([tuple(g.extent.boundingbox) for g in grids])
        self._period = x_period(crs)

    def touched(self, grid: GeoBox) -> NDArray[np.bool_]:
        around = outline(grid, self._crs)
        if around is None:
            return np.ones(len(self.members), np.bool_)
        left, bottom, right, top = around
        west, south, east, north = self._bounds.T
        high = (south < top) & (north > bottom)
        turns = [0.0] if self._period is None else [0.0, -self._period, self._period]
        wide = [(west + t < right) & (east + t > left) for t in turns]
        return high & np.logical_or.reduce(wide)


def _by_crs(files: Sequence[RasterFile]) -> list[_Group]:
    members: dict[CRS, list[int]] = {}
    for i, file in enumerate(files):
        members.setdefault(crs_of(file.grid), []).append(i)
    return [_Group(crs, ids, [files[i].grid for i in ids]) for crs, ids in members.items()]


def _union(files: Sequence[RasterFile]) -> GeoBox:
    """The first raster's pixel grid, extended to hold all of them."""
    first = files[0].grid
    if len(files) == 1:
        return first
    spans = [e for e in (native_extent(f.grid, first) for f in files) if e is not None]
    row0, row1 = min(s[0] for s in spans), max(s[1] for s in spans)
    col0, col1 = min(s[2] for s in spans), max(s[3] for s in spans)
    affine = first.affine * Affine.translation(col0, row0)
    return GeoBox((row1 - row0, col1 - col0), affine, first.crs)


def _spread(file: RasterFile, n: int) -> list[Window]:
    """About ``n`` windows evenly over a raster, each within one row of its blocks."""
    height, width = file.grid.shape
    rows, cols = min(256, file.block_px[0], height), min(256, width)
    aspect = height * cols / (width * rows)
    down = max(1, min(height // rows, round(math.sqrt(n * aspect))))
    across = max(1, min(width // cols, math.ceil(n / down)))
    return [
        Window(int(c), int(r) // rows * rows if r + rows < height else int(r), cols, rows)
        for r in np.linspace(0, height - rows, down)
        for c in np.linspace(0, width - cols, across)
    ]

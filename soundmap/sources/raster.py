"""Imagery from files: anything that GDAL opens, one raster or many as a mosaic."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from rasterio.errors import RasterioError
from rasterio.windows import Window

from soundmap.errors import SourceError, UsageError
from soundmap.grid import ground_gsd_m
from soundmap.sources._gdal import alone, holds_vrts, open_dataset, reason, settings
from soundmap.sources._mosaic import Mosaic, union
from soundmap.sources._rasterfile import RasterFile, inspect
from soundmap.sources._resample import Canvas, fill
from soundmap.sources._rescale import Rescale, from_sample, given
from soundmap.sources._retry import Patience, read_patiently
from soundmap.sources._tiles import read_in_tiles
from soundmap.sources.base import Image, Resampling, SourceInfo

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
    within
        The folder that VRTs must not refer out of; None: they may refer anywhere.
    patience
        How long reads are tried again; if not given, as the environment says (docs/imagery.md).

    Raises
    ------
    InputError
        A file is missing, not a raster, not georeferenced, cut short, or refers to what must not
        be read.
    SourceError
        What a VRT refers to does not answer.
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
        within: Path | None = None,
        patience: Patience | None = None,
    ) -> None:
        if not paths:
            raise UsageError("no raster files were given")
        self._patience = patience or Patience.from_environment()
        self._name = name or Path(paths[0]).name
        self._given = None if rescale is None else given(rescale)
        # Workers may run in another directory.
        files = [Path(os.path.abspath(p)) for p in paths]
        self._files = tuple(
            read_patiently(partial(inspect, f, bands, within), self._patience) for f in files
        )
        self._stretch: tuple[Rescale | None] | None = None
        self._info: SourceInfo | None = None
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._handles = _Handles()
        self._mosaic = Mosaic(self._files)

    def __getstate__(self) -> dict[str, Any]:
        # Found out here once, not by every copy anew.
        self._rescale()
        keep = ("_name", "_given", "_files", "_stretch", "_info", "_patience")
        return {key: self.__dict__[key] for key in keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __repr__(self) -> str:
        return f"RasterSource({self._name!r})"

    @property
    def info(self) -> SourceInfo:
        """Name, native grid, credits, and all that decides the pixels."""
        # Found without holding the lock, since it may mean to wait for a network: two threads at
        # once find the same.
        if self._info is None:
            found = self._describe()
            with self._lock:
                self._info = self._info or found
        return self._info

    def read(self, grid: GeoBox, resampling: Resampling = "area") -> Image:
        """Fill ``grid`` with pixels.

        Where the grid's pixels are the raster's own they are copied. By area, blocks of k x k of
        them are averaged, and any other grid is warped: averaged where it is coarser, bilinear
        where it is finer or shifted; a pixel is valid if half of its area is. By bicubic
        resampling all other grids are warped; a pixel is valid if half of its kernel's weight is on
        valid ones. Its colour is that of the valid part.

        Parameters
        ----------
        grid
            The pixels wanted, in any CRS.
        resampling
            How pixels are made that are not the raster's own.

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
            near = frozenset(self._mosaic.near(grid, resampling))
            return read_in_tiles(grid, lambda tile: self._read(tile, resampling, near))
        return self._read(grid, resampling)

    def _read(
        self, grid: GeoBox, resampling: Resampling, among: Container[int] | None = None
    ) -> Image:
        canvas = Canvas(grid)
        read_file = partial(self._window, self._rescale())
        near = self._mosaic.near(grid, resampling)
        if among is not None:
            near = [i for i in near if i in among]
        with settings():
            for run in self._mosaic.runs(near, resampling):
                try:
                    fill(canvas, run.grid, partial(run.window, read_file), resampling)
                except RasterioError as error:
                    names = ", ".join(str(part.file.path) for part in run.parts[:3])
                    raise SourceError(f"{names}: could not be warped ({reason(error)})") from error
                if len(self._files) > 1 and canvas.full:
                    break
        return canvas.image()

    def _window(
        self, rescale: Rescale | None, file: RasterFile, *window: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        def read() -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
            with self._handles.borrow(file) as dataset:
                return file.window(dataset, rescale, *window)

        return read_patiently(read, self._patience)

    def close(self) -> None:
        """Close the files that are kept open between reads; a later read opens them again."""
        self._handles.close()

    def _rescale(self) -> Rescale | None:
        if self._stretch is None:
            found = self._find_rescale()
            with self._lock:
                self._stretch = self._stretch or (found,)
        return self._stretch[0]

    def _find_rescale(self) -> Rescale | None:
        scaled = [f for f in self._files if f.scaled]
        if not scaled or self._given is not None:
            return self._given
        if all(f.dtype == "uint8" for f in scaled):
            return None
        total = sum(math.prod(f.grid.shape) for f in scaled)
        with settings():
            samples = [self._sample(f, total) for f in scaled]
        return from_sample(np.concatenate(samples))

    def _sample(self, file: RasterFile, total: int) -> NDArray[Any]:
        """Valid numbers spread over one raster, as many as its part of the source deserves."""
        height, width = file.grid.shape
        thinning = max(1.0, math.sqrt(total / _SAMPLE_PX))
        if total <= _READ_WHOLE_PX or max(file.overviews, default=1) >= thinning / 2:
            shape = (math.ceil(height / thinning), math.ceil(width / thinning))
            windows = [Window(0, 0, width, height)]
        else:
            share = height * width / total
            windows = _spread(file, max(1, round(_SAMPLE_PLACES * share)))
            per_window = max(1, _SAMPLE_PX * share / len(windows))
            thin = max(1.0, math.sqrt(windows[0].height * windows[0].width / per_window))
            shape = (math.ceil(windows[0].height / thin), math.ceil(windows[0].width / thin))

        def read(window: Window) -> NDArray[Any]:
            with self._handles.borrow(file) as dataset:
                values, valid = file.values(dataset, window, shape)
            return values[:, valid].ravel()

        return np.concatenate([read_patiently(partial(read, w), self._patience) for w in windows])

    def _describe(self) -> SourceInfo:
        first = self._files[0]
        grid = union(self._files)
        rescale = self._rescale()
        digests = [read_patiently(f.digest, self._patience) for f in self._files]
        files = "; ".join(f"{f.path.name}:{d}" for f, d in zip(self._files, digests, strict=True))
        if len(self._files) > _LISTED_FILES:
            files = f"digest of all: {hashlib.sha256(files.encode()).hexdigest()[:16]}"
        facts = {
            "files": files,
            "bands": _joined(f"{','.join(map(str, f.bands))} ({f.bands_how})" for f in self._files),
            "rescale": str(rescale) if rescale else "none (uint8 as stored)",
            "resampling": "by area (average where coarser, else bilinear) or antialiased bicubic",
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
        holds_vrts(self)

    @contextmanager
    def borrow(self, file: RasterFile) -> Iterator[rasterio.DatasetReader]:
        try:
            with alone(file.vrt):
                dataset = self._take(file)
                try:
                    yield dataset
                except BaseException:
                    # A handle that failed may hold half-read state: the next try gets a new one.
                    dataset.close()
                    raise
                self._give(file.path, dataset)
        except RasterioError as error:
            raise file.failure("read", error) from error

    def close(self) -> None:
        self._close(lambda dataset: True)

    def close_vrts(self) -> None:
        self._close(lambda dataset: bool(dataset.driver == "VRT"))

    def _close(self, chosen: Callable[[rasterio.DatasetReader], bool]) -> None:
        with self._lock:
            held, self._idle = self._idle, deque()
            self._idle.extend((path, dataset) for path, dataset in held if not chosen(dataset))
        for _, dataset in held:
            if chosen(dataset):
                with alone(dataset.driver == "VRT"):
                    dataset.close()

    def _take(self, file: RasterFile) -> rasterio.DatasetReader:
        with self._lock:
            if self._pid != os.getpid():
                # After a fork, parent and child would move one another's file position. Closing
                # could move it too, so the parent's handles are left alone for good.
                _ABANDONED.append(self._idle)
                self._idle, self._pid = deque(), os.getpid()
            for i in range(len(self._idle) - 1, -1, -1):
                if self._idle[i][0] == file.path:
                    dataset = self._idle[i][1]
                    del self._idle[i]
                    return dataset
        try:
            return open_dataset(file.path)
        except RasterioError as error:
            raise file.failure("opened again", error) from error

    def _give(self, path: Path, dataset: rasterio.DatasetReader) -> None:
        spare = None
        with self._lock:
            self._idle.append((path, dataset))
            if len(self._idle) > _OPEN_FILES:
                spare = self._idle.popleft()[1]
        if spare is not None:
            with alone(spare.driver == "VRT"):
                spare.close()


_ABANDONED: list[object] = []


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

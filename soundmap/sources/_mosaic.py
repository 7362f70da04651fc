"""Several rasters as one: which of them a grid may touch, and which share one lattice of pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox

from soundmap.grid import crs_of, x_period
from soundmap.sources._footprint import alignment, native_extent, outline
from soundmap.sources._rasterfile import RasterFile
from soundmap.sources.base import Resampling

_CUBIC_MARGIN_PX = 3
"""How far beyond a grid, or beyond a raster, a bicubic kernel may reach: in pixels of either."""

ReadFile = Callable[[RasterFile, int, int, int, int], tuple[NDArray[np.uint8], NDArray[np.bool_]]]
"""Native pixels of a window of a raster, and their validity."""


@dataclass(frozen=True)
class Part:
    """A raster in a run."""

    file: RasterFile
    row: int
    col: int
    """Where its first pixel lies in the run's."""


@dataclass(frozen=True)
class Run:
    """Rasters that follow each other in the mosaic's order and share one lattice of pixels."""

    grid: GeoBox
    """The lattice, over all of them."""
    parts: tuple[Part, ...]

    def window(
        self, read: ReadFile, row0: int, row1: int, col0: int, col1: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Colours uint8[3, h, w] (0 where not valid) and validity bool[h, w]; the first wins."""
        if len(self.parts) == 1 and self.parts[0].file.grid == self.grid:
            return read(self.parts[0].file, row0, row1, col0, col1)
        shape = (row1 - row0, col1 - col0)
        pixels, valid = np.zeros((3, *shape), np.uint8), np.zeros(shape, np.bool_)
        for part in self.parts:
            height, width = part.file.grid.shape
            r0, r1 = max(row0, part.row), min(row1, part.row + height)
            c0, c1 = max(col0, part.col), min(col1, part.col + width)
            if r0 >= r1 or c0 >= c1:
                continue
            here = slice(r0 - row0, r1 - row0), slice(c0 - col0, c1 - col0)
            taken = valid[here]
            if taken.all():
                continue
            colours, seen = read(
                part.file, r0 - part.row, r1 - part.row, c0 - part.col, c1 - part.col
            )
            np.copyto(pixels[:, *here], colours, where=seen & ~taken)
            taken |= seen
        return pixels, valid


class Mosaic:
    """Rasters in order, the first wins.

    Resampled by area, each raster stands alone: rasters that meet inside a pixel blend by area,
    without a seam. A bicubic kernel sees further than its pixel, so rasters of one lattice are
    joined before they are resampled.
    """

    def __init__(self, files: Sequence[RasterFile]) -> None:
        self._files = files
        self._groups = _by_crs(files)

    def near(self, grid: GeoBox, resampling: Resampling) -> list[int]:
        """Numbers of the rasters that a grid may touch, in order."""
        if len(self._files) == 1:
            return [0]
        cubic = resampling == "cubic"
        near = [group.members[group.touched(grid, cubic)] for group in self._groups]
        return [int(i) for i in np.sort(np.concatenate(near))]

    def runs(self, numbers: Iterable[int], resampling: Resampling) -> Iterator[Run]:
        """Rasters by their numbers, in order, joined where they are to be."""
        if resampling == "area":
            for i in numbers:
                yield Run(self._files[i].grid, (Part(self._files[i], 0, 0),))
            return
        for k, members in groupby(numbers, key=lambda i: self._in_runs[i][0]):
            # The lattice's extent stays that of all of them, whichever are wanted.
            yield replace(self._all_runs[k], parts=tuple(self._in_runs[i][1] for i in members))

    @cached_property
    def _all_runs(self) -> list[Run]:
        return _runs(self._files)

    @cached_property
    def _in_runs(self) -> list[tuple[int, Part]]:
        """Number of the run that each raster is in, and its part there."""
        return [(k, part) for k, run in enumerate(self._all_runs) for part in run.parts]


class _Group:
    """Rasters of one CRS with their bounds in it, to find quickly which ones a grid may touch."""

    def __init__(self, crs: CRS, members: list[int], grids: list[GeoBox]) -> None:
        self.members = np.array(members)
        self._crs = crs
        self._bounds = np.array([tuple(g.extent.boundingbox) for g in grids])
        margins = [(abs(a.a) + abs(a.b), abs(a.d) + abs(a.e)) for a in (g.affine for g in grids)]
        self._margins = _CUBIC_MARGIN_PX * np.array(margins)
        self._period = x_period(crs)

    def touched(self, grid: GeoBox, cubic: bool) -> NDArray[np.bool_]:
        around = outline(grid.pad(_CUBIC_MARGIN_PX) if cubic else grid, self._crs)
        if around is None:
            return np.ones(len(self.members), np.bool_)
        left, bottom, right, top = around
        west, south, east, north = self._bounds.T
        if cubic:
            wide_x, wide_y = self._margins.T
            west, south, east, north = west - wide_x, south - wide_y, east + wide_x, north + wide_y
        high = (south < top) & (north > bottom)
        turns = [0.0] if self._period is None else [0.0, -self._period, self._period]
        wide = [(west + t < right) & (east + t > left) for t in turns]
        return high & np.logical_or.reduce(wide)


def _by_crs(files: Sequence[RasterFile]) -> list[_Group]:
    members: dict[CRS, list[int]] = {}
    for i, file in enumerate(files):
        members.setdefault(crs_of(file.grid), []).append(i)
    return [_Group(crs, ids, [files[i].grid for i in ids]) for crs, ids in members.items()]


def _runs(files: Sequence[RasterFile]) -> list[Run]:
    runs: list[Run] = []
    parts: list[Part] = []
    for file in files:
        place = _place(file, parts[0].file) if parts else None
        if parts and place is None:
            runs.append(_joined(parts))
            parts = []
        parts.append(place or Part(file, 0, 0))
    return [*runs, _joined(parts)]


def _place(file: RasterFile, first: RasterFile) -> Part | None:
    """Where a raster's pixels lie among another's; None if they are none of its lattice."""
    if file.grid.crs != first.grid.crs:
        return None
    at = alignment(~first.grid.affine * file.grid.affine, file.grid)
    return Part(file, at.row, at.col) if at and at.kx == at.ky == 1 else None


def _joined(parts: Sequence[Part]) -> Run:
    """One lattice over all parts, whose places are given in the first one's pixels."""
    row, col = min(p.row for p in parts), min(p.col for p in parts)
    height = max(p.row + p.file.grid.shape[0] for p in parts) - row
    width = max(p.col + p.file.grid.shape[1] for p in parts) - col
    first = parts[0].file.grid
    grid = GeoBox((height, width), first.affine * Affine.translation(col, row), first.crs)
    return Run(grid, tuple(Part(p.file, p.row - row, p.col - col) for p in parts))


def union(files: Sequence[RasterFile]) -> GeoBox:
    """The first raster's pixel grid, extended to hold all of them."""
    first = files[0].grid
    if len(files) == 1:
        return first
    spans = [e for e in (native_extent(f.grid, first) for f in files) if e is not None]
    row0, row1 = min(s[0] for s in spans), max(s[1] for s in spans)
    col0, col1 = min(s[2] for s in spans), max(s[3] for s in spans)
    affine = first.affine * Affine.translation(col0, row0)
    return GeoBox((row1 - row0, col1 - col0), affine, first.crs)

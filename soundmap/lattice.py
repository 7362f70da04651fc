"""Where windows of imagery lie: on a lattice that no region, unit or worker can move.

The cells that the model itself gives (one per patch, or one per window) are counted from a fixed
anchor of a CRS. Windows start at every ``stride``-th cell, so neighbours overlap; where they do,
their embeddings are mixed with weights that add up to one. As the lattice does not depend on what
is mapped, a cell gets the same number in every map of one imagery.

Models whose patches know nothing of each other beyond a few pixels need no lattice of windows: a
cell's number is the same wherever the window lies, and no window's border can show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox

# Overlapping windows may cost this many times the bare number of windows. Units re-encode windows
# that straddle their borders on top of that, which together stays below 1.5.
_MOST_OVERLAP_COST = 1.4


@dataclass(frozen=True)
class Span:
    """Rows and columns of lattice cells, half open."""

    row0: int
    row1: int
    col0: int
    col1: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.row1 - self.row0, self.col1 - self.col0

    def grown(self, cells: int) -> Span:
        """Widen by some cells on every side."""
        return Span(self.row0 - cells, self.row1 + cells, self.col0 - cells, self.col1 + cells)


def stride_of(cells_per_window: int) -> int:
    """Cells from one window's start to the next, for windows of so many cells a side."""
    return max(1, math.ceil(cells_per_window / math.sqrt(_MOST_OVERLAP_COST)))


def taper(cells_per_window: int) -> NDArray[np.float32]:
    """Weights of a window's cells along one side: float32[cells], one but on the overlap.

    The falling end of one window and the rising end of the next add up to one.
    """
    overlap = cells_per_window - stride_of(cells_per_window)
    weights = np.ones(cells_per_window, np.float32)
    if overlap:
        ramp = np.arange(1, overlap + 1, dtype=np.float32) / (overlap + 1)
        weights[:overlap] = ramp
        weights[-overlap:] = ramp[::-1]
    return weights


@dataclass(frozen=True)
class Tiling:
    """The windows that cover a span."""

    covered: Span
    """Cells that the windows cover together, their margins too."""
    corners: NDArray[np.int64]
    """int64[N, 2], row and column of each window's first cell, counted from ``covered``."""
    shape: tuple[int, int]
    """Rows and columns of cells of a window."""
    weights: NDArray[np.float32]
    """float32[rows, cols], what a window's cells count; all that lie on one cell add up to one."""


@dataclass(frozen=True)
class Lattice:
    """The cells and windows of a model in one CRS."""

    crs: CRS
    cell: tuple[float, float]
    """Width and height of a cell in CRS units, positive."""
    anchor: tuple[float, float]
    """x and y of the corner where row 0 and column 0 meet; rows count downwards."""
    cell_px: int
    """Pixels of imagery along a cell."""
    cells_per_window: int
    """Cells along a window: the model's patches, or 1 where a cell is a whole window."""
    margin: int | None = None
    """Cells of context on each side that a cell depends on. None: a cell depends on its whole
    window, so windows keep to the lattice. A number: on no more than that, so windows may lie
    anywhere, and are laid side by side with so many cells cut off all around."""

    @property
    def stride(self) -> int:
        """Cells from one window's start to the next."""
        return stride_of(self.cells_per_window) if self.margin is None else self.cells_per_window

    def span_of(self, grid: GeoBox) -> Span | None:
        """Locate a grid whose cells are cells of this lattice; None for any other grid."""
        a = grid.affine
        width, height = self.cell
        same_size = np.allclose((a.a, -a.e), (width, height), rtol=1e-9, atol=0)
        if a.b or a.d or not same_size or grid.crs != self.crs:
            return None
        col, row = (a.c - self.anchor[0]) / width, (self.anchor[1] - a.f) / height
        # Cells counted far from the anchor carry rounding of the grid's own numbers.
        if abs(col - round(col)) > 1e-3 or abs(row - round(row)) > 1e-3:
            return None
        rows, cols = grid.shape
        return Span(round(row), round(row) + rows, round(col), round(col) + cols)

    def span_covering(self, left: float, bottom: float, right: float, top: float) -> Span:
        """Smallest span that covers a box in CRS units."""
        width, height = self.cell
        return Span(
            math.floor((self.anchor[1] - top) / height),
            math.ceil((self.anchor[1] - bottom) / height),
            math.floor((left - self.anchor[0]) / width),
            math.ceil((right - self.anchor[0]) / width),
        )

    def tiling(self, span: Span) -> Tiling:
        """Lay windows over a span."""
        rows, row_size, row_weights = self._along(span.row0, span.row1)
        cols, col_size, col_weights = self._along(span.col0, span.col1)
        covered = Span(rows[0], rows[-1] + row_size, cols[0], cols[-1] + col_size)
        starts = np.array([(r - rows[0], c - cols[0]) for r in rows for c in cols], np.int64)
        weights = row_weights[:, None] * col_weights[None, :]
        return Tiling(covered, starts, (row_size, col_size), weights)

    def _along(self, low: int, high: int) -> tuple[list[int], int, NDArray[np.float32]]:
        """Starts of windows that cover cells low to high, a window's size, and its weights."""
        side = self.cells_per_window
        if self.margin is None:
            step = self.stride
            first, last = (low - side) // step + 1, -(-high // step)
            return [k * step for k in range(first, last)], side, taper(side)
        # Even shares, so that a small map is not read far beyond its edge.
        count = -(-(high - low) // side)
        core = -(-(high - low) // count)
        weights = np.pad(np.ones(core, np.float32), self.margin)
        starts = [low - self.margin + k * core for k in range(count)]
        return starts, core + 2 * self.margin, weights

    def cells(self, span: Span) -> GeoBox:
        """Grid of the cells of a span."""
        return self._grid(span, 1)

    def pixels(self, span: Span) -> GeoBox:
        """Grid of the imagery pixels under a span."""
        return self._grid(span, self.cell_px)

    def _grid(self, span: Span, parts: int) -> GeoBox:
        width, height = self.cell
        x = self.anchor[0] + span.col0 * width
        y = self.anchor[1] - span.row0 * height
        rows, cols = span.shape
        affine = Affine(width / parts, 0, x, 0, -height / parts, y)
        return GeoBox((rows * parts, cols * parts), affine, self.crs)

"""Windows on the lattice: every cell covered, weights that add up to one, a fixed place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox

from soundmap.grid import block
from soundmap.lattice import Lattice, Span, Tiling, stride_of, taper

UTM = CRS("EPSG:32633")
LATTICE = Lattice(UTM, (80.0, 80.0), (499_980.0, 5_600_040.0), 8, 8)

sides = st.integers(1, 20)
starts = st.integers(-300, 300)
lengths = st.integers(1, 70)


@st.composite
def spans(draw: st.DrawFn) -> Span:
    row, col = draw(starts), draw(starts)
    return Span(row, row + draw(lengths), col, col + draw(lengths))


@st.composite
def lattices(draw: st.DrawFn) -> Lattice:
    width = draw(st.sampled_from([2.4, 80.0, 1.0 / 3, 1234.5678]))
    height = width * draw(st.sampled_from([1.0, 1.001, 0.5]))
    anchor = draw(st.floats(-1e6, 1e6)), draw(st.floats(-1e7, 1e7))
    side = draw(sides)
    return Lattice(UTM, (width, height), anchor, draw(st.integers(1, 16)), side)


margins = st.one_of(st.none(), st.integers(0, 5))


def counts(lattice: Lattice, span: Span) -> np.ndarray:
    """Add up the weights of all windows over the cells that they cover."""
    tiling = lattice.tiling(span)
    rows, cols = tiling.shape
    total = np.zeros(tiling.covered.shape)
    for row, col in tiling.corners.tolist():
        # Not clipped: every window lies within what is read.
        assert total[row : row + rows, col : col + cols].shape == tiling.shape
        total[row : row + rows, col : col + cols] += tiling.weights
    return total


def inside(span: Span, covered: Span) -> tuple[slice, slice]:
    assert covered.row0 <= span.row0
    assert span.row1 <= covered.row1
    assert covered.col0 <= span.col0
    assert span.col1 <= covered.col1
    return (
        slice(span.row0 - covered.row0, span.row1 - covered.row0),
        slice(span.col0 - covered.col0, span.col1 - covered.col0),
    )


@given(spans(), sides, margins)
def test_weights_over_any_cell_add_up_to_one(span: Span, side: int, margin: int | None) -> None:
    """So every cell is covered, and misses no window that has a say in it."""
    lattice = replace(LATTICE, cells_per_window=side, margin=margin)
    total = counts(lattice, span)[inside(span, lattice.tiling(span).covered)]
    assert total.shape == span.shape
    np.testing.assert_allclose(total, 1, atol=1e-6)


@given(spans(), sides, margins)
def test_no_window_is_in_vain(span: Span, side: int, margin: int | None) -> None:
    lattice = replace(LATTICE, cells_per_window=side, margin=margin)
    tiling = lattice.tiling(span)
    rows, cols = inside(span, tiling.covered)
    wanted = np.zeros(tiling.covered.shape, bool)
    wanted[rows, cols] = True
    height, width = tiling.shape
    for row, col in tiling.corners.tolist():
        part = wanted[row : row + height, col : col + width]
        assert (part & (tiling.weights > 0)).any()
    assert len(np.unique(tiling.corners, axis=0)) == len(tiling.corners)


@given(spans(), sides)
def test_windows_of_a_whole_keep_to_the_lattice(span: Span, side: int) -> None:
    lattice = replace(LATTICE, cells_per_window=side)
    tiling = lattice.tiling(span)
    assert tiling.shape == (side, side)
    first = np.array([tiling.covered.row0, tiling.covered.col0])
    assert not ((tiling.corners + first) % lattice.stride).any()


@given(spans(), sides, st.integers(0, 5))
def test_windows_with_margins_lie_side_by_side(span: Span, side: int, margin: int) -> None:
    """Each cell counts in one window, at least the margin away from the window's border."""
    lattice = replace(LATTICE, cells_per_window=side, margin=margin)
    tiling = lattice.tiling(span)
    rows, cols = tiling.shape
    counted = np.zeros(tiling.shape)
    counted[margin : rows - margin, margin : cols - margin] = 1
    np.testing.assert_array_equal(tiling.weights, counted)
    assert max(tiling.shape) <= side + 2 * margin
    # Shares are even: little is read beyond the span and its margin.
    windows = [len(np.unique(tiling.corners[:, axis])) for axis in (0, 1)]
    for read, cells, number in zip(tiling.covered.shape, span.shape, windows, strict=True):
        assert read - 2 * margin - cells < number
    assert tiling.covered.row0 == span.row0 - margin
    assert tiling.covered.col0 == span.col0 - margin


@pytest.mark.parametrize("side", range(1, 65))
def test_taper(side: int) -> None:
    weights = taper(side)
    assert weights.dtype == np.float32
    assert weights.shape == (side,)
    assert (weights > 0).all()
    assert (weights <= 1).all()
    np.testing.assert_array_equal(weights, weights[::-1])
    overlap = side - stride_of(side)
    assert 0 <= overlap <= side // 2
    # No step larger than the ramp's: an abrupt weight would show as a seam.
    if overlap:
        assert np.abs(np.diff(weights)).max() <= 1 / (overlap + 1) + 1e-6


@pytest.mark.parametrize("side", [8, 14, 16, 28])
def test_whole_windows_overlap(side: int) -> None:
    assert stride_of(side) < side


@given(starts, starts, st.sampled_from([(8, None), (64, 3), (64, 1), (64, 5)]))
def test_overlap_costs_little(row: int, col: int, kind: tuple[int, int | None]) -> None:
    """Of a unit of 256 cells, wherever it begins: at most 1.5 times its own imagery."""
    lattice = replace(LATTICE, cells_per_window=kind[0], margin=kind[1])
    tiling = lattice.tiling(Span(row, row + 256, col, col + 256))
    assert len(tiling.corners) * np.prod(tiling.shape) <= 1.5 * 256**2


def test_a_cell_that_is_a_window_is_seen_once() -> None:
    lattice = replace(LATTICE, cells_per_window=1)
    assert lattice.stride == 1
    assert taper(1).tolist() == [1]
    tiling = lattice.tiling(Span(3, 9, -4, 2))
    assert tiling.covered == Span(3, 9, -4, 2)
    assert len(tiling.corners) == 36
    assert tiling.shape == (1, 1)


@given(lattices(), spans())
def test_spans_round_trip(lattice: Lattice, span: Span) -> None:
    cells, pixels = lattice.cells(span), lattice.pixels(span)
    assert lattice.span_of(cells) == span
    assert cells.crs == lattice.crs
    assert cells.shape == span.shape
    assert pixels.shape == tuple(n * lattice.cell_px for n in span.shape)
    np.testing.assert_allclose(pixels.boundingbox.bbox, cells.boundingbox.bbox, rtol=1e-12)
    assert lattice.span_of(block(cells, 0, 1, 0, 1)) == Span(
        span.row0, span.row0 + 1, span.col0, span.col0 + 1
    )


@given(spans(), st.floats(-0.4, 0.4), st.floats(-0.4, 0.4))
def test_other_grids_have_no_span(span: Span, dx: float, dy: float) -> None:
    cells = LATTICE.cells(span)
    a = cells.affine
    others = {
        "crs": GeoBox(cells.shape, a, "EPSG:32634"),
        "half": GeoBox(cells.shape, a * Affine.scale(0.5), UTM),
        "larger": GeoBox(cells.shape, a * Affine.scale(1.001), UTM),
        "south-up": GeoBox(cells.shape, a * Affine.scale(1, -1), UTM),
        "turned": GeoBox(cells.shape, a * Affine.rotation(1), UTM),
    }
    if max(abs(dx), abs(dy)) > 0.01:
        others["shifted"] = GeoBox(cells.shape, a * Affine.translation(dx, dy), UTM)
    for name, grid in others.items():
        assert LATTICE.span_of(grid) is None, name


def test_rounding_far_from_the_anchor_is_forgiven() -> None:
    lattice = replace(LATTICE, cell=(80.1, 79.9), anchor=(0.1, 0.3))
    span = Span(-70_000, -69_990, 6_000, 6_010)
    a = lattice.cells(span).affine
    moved = Affine(a.a, 0, a.c + 1e-4, 0, a.e, a.f - 1e-4)
    assert lattice.span_of(GeoBox((10, 10), moved, UTM)) == span


@given(spans(), st.data())
def test_lattice_does_not_depend_on_what_is_mapped(span: Span, data: st.DataObject) -> None:
    """A part's windows are windows of the whole, at the same place on the ground."""
    row0 = data.draw(st.integers(span.row0, span.row1 - 1))
    row1 = data.draw(st.integers(row0 + 1, span.row1))
    col0 = data.draw(st.integers(span.col0, span.col1 - 1))
    col1 = data.draw(st.integers(col0 + 1, span.col1))
    part, whole = LATTICE.tiling(Span(row0, row1, col0, col1)), LATTICE.tiling(span)

    def places(tiling: Tiling) -> set[tuple[float, float]]:
        corner = LATTICE.pixels(tiling.covered).boundingbox
        assert LATTICE.span_of(LATTICE.cells(tiling.covered)) == tiling.covered
        rows, cols = tiling.corners.T
        return set(zip(corner.left + cols * 80, corner.top - rows * 80, strict=True))

    assert places(part) <= places(whole)
    # And those of the whole that are missing do not touch the part.
    first = np.array([whole.covered.row0, whole.covered.col0])
    for row, col in (whole.corners + first).tolist():
        if row < row1 and row + 8 > row0 and col < col1 and col + 8 > col0:
            x, y = LATTICE.anchor[0] + col * 80, LATTICE.anchor[1] - row * 80
            assert (x, y) in places(part)


@given(
    lattices(),
    st.floats(-1e6, 1e6),
    st.floats(-1e6, 1e6),
    st.floats(0, 5e4),
    st.floats(0, 5e4),
)
def test_span_covering(
    lattice: Lattice, left: float, bottom: float, width: float, height: float
) -> None:
    right, top = left + width, bottom + height
    span = lattice.span_covering(left, bottom, right, top)
    box = lattice.cells(
        Span(span.row0, max(span.row1, span.row0 + 1), span.col0, max(span.col1, span.col0 + 1))
    ).boundingbox
    eps = 1e-6
    assert box.left <= left + eps
    assert box.right >= right - eps
    assert box.bottom <= bottom + eps
    assert box.top >= top - eps
    # And no cell more than that needs.
    assert box.left > left - lattice.cell[0] - eps
    assert box.top < top + lattice.cell[1] + eps


def test_grown() -> None:
    assert Span(2, 5, -1, 4).grown(3) == Span(-1, 8, -4, 7)
    assert Span(2, 5, -1, 4).shape == (3, 5)

"""One unit of work, against plain references computed cell by cell."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from soundmap.area import Area
from soundmap.grid import cell_lonlat
from soundmap.lattice import stride_of, taper
from soundmap.pipeline import cut_windows, extend_edges
from soundmap.region import Region, region_from_bbox
from soundmap.scoring import score
from soundmap.sources.base import Image
from soundmap.sources.fake import FakeSource
from soundmap.testing.fake_encoder import FakeEncoder
from soundmap.testing.fake_map import axes_bank, colours_of, compute, compute_unit, make_job

# 27 rows of cells, and 20 columns and five eighths of one more.
SHAPE = (216, 165)
CELLS = (27, 21)
GRID = GeoBox(SHAPE, Affine(10, 0, 499_980, 0, -10, 5_600_040), "EPSG:32633")
BEYOND = (124, 116, 104)

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def whole_windows(**options: Any) -> FakeEncoder:
    """An encoder whose patches depend on all of their window."""
    return FakeEncoder(4, context=0.4, **options)


def local_patches(**options: Any) -> FakeEncoder:
    """An encoder whose patches depend on 11 px around them."""
    return FakeEncoder(4, context=0.4, context_px=11, **options)


both = pytest.mark.parametrize("make_encoder", [whole_windows, local_patches])


def scene(seed: int = 0) -> tuple[Pixels, Mask]:
    """Coloured noise with holes: a disc, a slanted edge, and speckle of every density."""
    rng = np.random.default_rng(seed)
    rough = rng.integers(0, 256, (3, SHAPE[0] // 6, SHAPE[1] // 5 + 1))
    coarse = rough.repeat(6, axis=1).repeat(5, axis=2)[:, : SHAPE[0], : SHAPE[1]]
    pixels = (coarse // 2 + rng.integers(0, 128, (3, *SHAPE))).astype(np.uint8)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    valid = (y - 60) ** 2 + (x - 50) ** 2 > 22**2
    valid &= x + 0.6 * y < 265
    valid &= rng.random(SHAPE) < np.where(y > 150, x / SHAPE[1], 1)
    return pixels, valid


def cells_valid(valid: Mask, cell_px: int = 8) -> Mask:
    """Which cells have at least half of their pixels."""
    rows, cols = round(valid.shape[0] / cell_px), round(valid.shape[1] / cell_px)
    found = np.zeros((rows, cols), bool)
    for r in range(rows):
        for c in range(cols):
            part = valid[r * cell_px : (r + 1) * cell_px, c * cell_px : (c + 1) * cell_px]
            found[r, c] = part.sum() >= cell_px**2 / 2
    return found


PAD = 64


def padded(pixels: Pixels, valid: Mask, pad: int = PAD) -> tuple[Pixels, Mask]:
    return np.pad(pixels * valid, ((0, 0), (pad, pad), (pad, pad))), np.pad(valid, pad)


def by_whole_windows(pixels: Pixels, valid: Mask, encoder: FakeEncoder) -> NDArray[np.float64]:
    """Embed cell by cell with the weighted sum over all windows of the lattice that hold it."""
    pixels, valid = padded(pixels, valid)
    step, weights = stride_of(8), taper(8).astype(float)
    known: dict[tuple[int, int], NDArray[np.float32]] = {}

    def window(k: int, j: int) -> NDArray[np.float32]:
        if (k, j) not in known:
            row, col = PAD + k * step * 8, PAD + j * step * 8
            part = pixels[:, row : row + 64, col : col + 64].copy()
            there = valid[row : row + 64, col : col + 64]
            for band in part:
                band[~there] = np.rint(band[there].mean())
            patches = encoder.encode_images(part[None]).patches
            assert patches is not None
            known[k, j] = patches[0]
        return known[k, j]

    result = np.full((*CELLS, encoder.dim), np.nan)
    for r, c in np.argwhere(cells_valid(valid[PAD:-PAD, PAD:-PAD])):
        total = np.zeros(encoder.dim)
        for k in range(-2, r // step + 1):
            for j in range(-2, c // step + 1):
                i, n = r - k * step, c - j * step
                if i < 8 and n < 8:
                    total += weights[i] * weights[n] * window(k, j)[i, n]
        result[r, c] = total / np.linalg.norm(total)
    return result


def rings(pixels: Pixels, valid: Mask, count: int) -> Pixels:
    """Fill next to what is known with the mean of it, ring by ring; one colour beyond."""
    pixels, valid = pixels.copy(), valid.copy()
    height, width = valid.shape
    for _ in range(count):
        before = valid.copy()
        for y, x in np.argwhere(~before):
            near = [
                pixels[:, y + dy, x + dx].astype(float)
                for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1))
                if 0 <= y + dy < height and 0 <= x + dx < width and before[y + dy, x + dx]
            ]
            if near:
                pixels[:, y, x] = np.rint(np.mean(near, axis=0))
                valid[y, x] = True
    pixels[:, ~valid] = np.array(BEYOND)[:, None]
    return pixels


def by_local_patches(pixels: Pixels, valid: Mask, encoder: FakeEncoder) -> NDArray[np.float64]:
    """Embed cell by cell from the pixels around it."""
    there = cells_valid(valid)
    # Two cells of margin hold the 11 px that a patch depends on, and 5 px to spare.
    pixels = rings(*padded(pixels, valid, 16), 5)
    result = np.full((*CELLS, encoder.dim), np.nan)
    for r, c in np.argwhere(there):
        row, col = 16 + r * 8, 16 + c * 8
        own = pixels[:, row : row + 8, col : col + 8].mean(axis=(1, 2))
        around = pixels[:, row - 11 : row + 19, col - 11 : col + 19].mean(axis=(1, 2))
        result[r, c] = encoder.embed(0.6 * own + 0.4 * around)
    return result


REFERENCES = {whole_windows: by_whole_windows, local_patches: by_local_patches}


@pytest.fixture(scope="module")
def references() -> dict[Any, NDArray[np.float64]]:
    return {make: reference(*scene(), make()) for make, reference in REFERENCES.items()}


@both
@pytest.mark.parametrize("value", ["similarity", "probability", "share"])
def test_values_equal_a_plain_reference(make_encoder: Any, value: str, references: Any) -> None:
    pixels, valid = scene()
    encoder = make_encoder()
    job = make_job(FakeSource(pixels, GRID, valid), encoder, value=value)
    found = compute(job, encoder)
    assert job.plan.grid.shape == CELLS
    vectors = references[make_encoder].astype(np.float32)
    expected = np.moveaxis(score(vectors, axes_bank(), value), -1, 0)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6)
    assert set(encoder.told_m) == {10.0}


@both
@given(unit_cells=st.integers(2, 40), batch=st.integers(1, 9), tile=st.integers(1, 30))
@settings(max_examples=8)
def test_units_batches_and_tiles_change_nothing(
    make_encoder: Any, references: Any, unit_cells: int, batch: int, tile: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("soundmap.pipeline._BATCH_PX", batch * 64 * 64)
        patch.setattr("soundmap.layout._TILE_CELLS", tile)
        encoder = make_encoder()
        job = make_job(FakeSource(scene()[0], GRID, scene()[1]), encoder, unit_cells=unit_cells)
        found = compute(job, encoder)
    np.testing.assert_allclose(
        found, np.moveaxis(references[make_encoder], -1, 0), rtol=0, atol=3e-6
    )


@both
@pytest.mark.parametrize("detail", ["patch", "image"])
def test_units_of_16_and_64_give_the_same_numbers(make_encoder: Any, detail: str) -> None:
    pixels, valid = (np.tile(a, (3, 3)) for a in scene())
    grid = GeoBox(valid.shape, GRID.affine, GRID.crs)
    small, large = (
        compute(make_job(FakeSource(pixels, grid, valid), e, unit_cells=n, detail=detail), e)
        for e, n in ((make_encoder(), 16), (make_encoder(), 64))
    )
    np.testing.assert_allclose(small, large, rtol=0, atol=1e-6)


@both
def test_image_detail(make_encoder: Any) -> None:
    pixels, valid = scene()
    encoder = make_encoder()
    source = FakeSource(pixels, GRID, valid)
    found = compute(make_job(source, encoder, detail="image", unit_cells=2), encoder)
    # 216 px are three windows and three eighths; 165 are two and more than half of a third.
    assert found.shape[1:] == (3, 3)
    assert encoder.windows == np.isfinite(found[0]).sum()
    pixels, valid = padded(pixels, valid)
    for r in range(3):
        for c in range(3):
            there = valid[PAD + r * 64 :, PAD + c * 64 :][:64, :64]
            if there.sum() < 64 * 64 / 2:
                assert np.isnan(found[:, r, c]).all()
                continue
            window = pixels[:, PAD + r * 64 :, PAD + c * 64 :][:, :64, :64].copy()
            for band in window:
                band[~there] = np.rint(band[there].mean())
            image = make_encoder().encode_images(window[None]).image
            np.testing.assert_allclose(found[:, r, c], image[0], rtol=0, atol=1e-6)


@both
@pytest.mark.parametrize("missing", [0, 31, 32, 33, 63, 64])
def test_a_cell_needs_half_of_its_pixels(make_encoder: Any, missing: int) -> None:
    valid = np.ones(SHAPE, bool)
    cell = np.arange(64).reshape(8, 8)
    places = [(0, 0), (7, 7), (13, 12), (26, 3), (14, 20)]
    for r, c in places:
        # The rightmost column has but five eighths of its pixels to begin with.
        part = valid[r * 8 : r * 8 + 8, c * 8 : c * 8 + 8]
        part &= (cell >= missing)[:, : part.shape[1]]
    encoder = make_encoder()
    found = compute(make_job(FakeSource(scene()[0], GRID, valid), encoder), encoder)
    bare = np.isnan(found).all(axis=0)
    assert np.array_equal(bare, np.isnan(found).any(axis=0))
    np.testing.assert_array_equal(bare, ~cells_valid(valid))
    assert bare.sum() == (0 if missing == 0 else 1 if missing <= 32 else 5)


@both
@pytest.mark.parametrize(("side", "cells"), [(99, 12), (100, 13), (101, 13)])
def test_cells_at_every_edge_need_half_of_their_pixels(
    make_encoder: Any, side: int, cells: int
) -> None:
    """On the right as at the bottom: 100 px are twelve and a half cells."""
    grid = GeoBox((side, side), GRID.affine, GRID.crs)
    encoder = make_encoder()
    found = compute(make_job(FakeSource(scene()[0][:, :side, :side], grid), encoder), encoder)
    assert found.shape[1:] == (cells, cells)
    # The corner itself may have half of its rows and half of its columns: a quarter.
    assert np.isfinite(found[:, :-1]).all()
    assert np.isfinite(found[:, :, :-1]).all()


@both
def test_what_is_not_valid_does_not_bleed(make_encoder: Any) -> None:
    """One colour stays one colour, however much of it is missing."""
    valid = scene()[1]
    colour = np.array(BEYOND, np.uint8)[:, None, None]
    encoder = make_encoder()
    source = FakeSource(np.broadcast_to(colour, (3, *SHAPE)), GRID, valid)
    found = compute(make_job(source, encoder, unit_cells=9), encoder)
    there = cells_valid(valid)
    expected = np.broadcast_to(np.array(BEYOND)[:, None], (3, there.sum()))
    np.testing.assert_allclose(colours_of(found[:, there]), expected, atol=1e-3)


def test_local_patches_at_the_edge_take_their_neighbours_colour() -> None:
    """The colour of what lies beyond is not that of the imagery: it may count for little."""
    valid = np.ones(SHAPE, bool)
    valid[:, 80:] = False
    encoder = local_patches()
    source = FakeSource(np.full((3, *SHAPE), 20, np.uint8), GRID, valid)
    found = colours_of(compute(make_job(source, encoder), encoder))
    assert np.abs(found[:, 2:-2, 2:9] - 20).max() < 1e-3
    # 6 of the 30 columns around the last cell lie beyond the five that are filled.
    assert np.abs(found[:, 2:-2, 9] - 20).max() < 0.4 * 6 / 30 * 105


@both
def test_windows_without_needed_cells_are_not_encoded(make_encoder: Any) -> None:
    pixels = scene()[0]
    valid = np.zeros(SHAPE, bool)
    valid[:64, :64] = True
    encoder = make_encoder()
    found = compute(make_job(FakeSource(pixels, GRID, valid), encoder, unit_cells=100), encoder)
    assert np.isfinite(found[0]).sum() == 64
    if make_encoder is whole_windows:
        # Windows start at every seventh cell: at -7, 0 and 7.
        assert encoder.windows == 9
    else:
        assert encoder.windows == 1
    none = make_encoder()
    job = make_job(FakeSource(pixels, GRID, np.zeros(SHAPE, bool)), none)
    for unit in job.plan.units:
        assert compute_unit(job, unit, none) is None
    assert none.windows == 0


def test_tiles_without_needed_cells_are_not_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soundmap.layout._TILE_CELLS", 9)
    valid = np.zeros(SHAPE, bool)
    valid[80:88, 80:88] = True
    encoder = local_patches()
    compute(make_job(FakeSource(scene()[0], GRID, valid), encoder), encoder)
    assert encoder.windows == 1


def lonlat_box(grid: GeoBox) -> tuple[float, float, float, float]:
    lon, lat = cell_lonlat(grid)
    return float(lon.min()), float(lat.min()), float(lon.max()), float(lat.max())


@both
@given(st.data())
@settings(max_examples=10)
def test_a_part_equals_the_whole(make_encoder: Any, references: Any, data: st.DataObject) -> None:
    row0, col0 = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 15))
    rows, cols = data.draw(st.integers(1, 27 - row0)), data.draw(st.integers(1, 21 - col0))
    affine = GRID.affine * Affine.translation(col0 * 8, row0 * 8) * Affine.scale(8)
    box = lonlat_box(GeoBox((rows, cols), affine, GRID.crs))
    region = region_from_bbox(box[0] - 1e-7, box[1] - 1e-7, box[2] + 1e-7, box[3] + 1e-7)
    encoder = make_encoder()
    source = FakeSource(scene()[0], GRID, scene()[1])
    job = make_job(source, encoder, region=region, unit_cells=data.draw(st.integers(3, 30)))
    corner = ~(GRID.affine * Affine.scale(8)) * (job.plan.grid.affine.c, job.plan.grid.affine.f)
    col, row = (round(v) for v in corner)
    np.testing.assert_allclose(corner, (col, row), atol=1e-6)
    height, width = job.plan.grid.shape
    assert row <= row0
    assert col <= col0
    assert row + height >= row0 + rows
    assert col + width >= col0 + cols
    expected = np.moveaxis(references[make_encoder], -1, 0)
    np.testing.assert_allclose(
        compute(job, encoder),
        expected[:, row : row + height, col : col + width],
        rtol=0,
        atol=3e-6,
    )


@both
def test_clipped_polygon(make_encoder: Any, references: Any) -> None:
    west, south, east, north = lonlat_box(GRID)
    triangle = shapely.Polygon([(west, south), (east, south + 0.003), (west + 0.01, north)])
    region = Region(triangle, "triangle.geojson", clip=True)
    encoder = make_encoder()
    job = make_job(FakeSource(scene()[0], GRID, scene()[1]), encoder, region=region, unit_cells=5)
    found = compute(job, encoder)
    inside = Area(triangle).mask(job.plan.grid)
    assert 0.2 < inside.mean() < 0.8
    corner = ~(GRID.affine * Affine.scale(8)) * (job.plan.grid.affine.c, job.plan.grid.affine.f)
    col, row = (round(v) for v in corner)
    height, width = job.plan.grid.shape
    expected = np.moveaxis(references[make_encoder], -1, 0).copy()
    expected = expected[:, row : row + height, col : col + width]
    expected[:, ~inside] = np.nan
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6)


@both
def test_south_up_imagery(make_encoder: Any, references: Any) -> None:
    pixels, valid = scene()
    affine = GRID.affine * Affine.translation(0, SHAPE[0]) * Affine.scale(1, -1)
    encoder = make_encoder()
    source = FakeSource(pixels[:, ::-1], GeoBox(SHAPE, affine, GRID.crs), valid[::-1])
    found = compute(make_job(source, encoder), encoder)
    np.testing.assert_allclose(
        found, np.moveaxis(references[make_encoder], -1, 0), rtol=0, atol=3e-6
    )


def test_job_is_plain_data() -> None:
    encoder = local_patches()
    job = make_job(FakeSource(*scene()[:1], GRID, scene()[1]), encoder)
    copy = pickle.loads(pickle.dumps(job))
    np.testing.assert_array_equal(compute(copy, encoder), compute(job, encoder))


class TestCutWindows:
    def test_corners(self) -> None:
        pixels, _ = scene()
        image = Image(pixels, np.ones(SHAPE, bool), GRID)
        corners = np.array([[0, 0], [3, 40], [216 - 16, 165 - 24]])
        found = cut_windows(image, corners, (16, 24))
        assert found.shape == (3, 3, 16, 24)
        for window, (row, col) in zip(found, corners, strict=True):
            np.testing.assert_array_equal(window, pixels[:, row : row + 16, col : col + 24])

    def test_gaps_take_the_mean_of_their_window(self) -> None:
        pixels, valid = scene()
        before = pixels.copy()
        corners = np.array([[40, 30], [150, 10], [150, 100], [50, 45]])
        found = cut_windows(Image(pixels, valid, GRID), corners, (16, 16))
        for window, (row, col) in zip(found, corners, strict=True):
            there = valid[row : row + 16, col : col + 16]
            part = pixels[:, row : row + 16, col : col + 16]
            np.testing.assert_array_equal(window[:, there], part[:, there])
            if there.any():
                for band, kept in zip(window, part, strict=True):
                    assert (band[~there] == np.rint(kept[there].mean())).all()
        np.testing.assert_array_equal(pixels, before)


class TestExtendEdges:
    def test_rings(self) -> None:
        pixels, valid = (a[..., 40:110, 20:90] for a in scene())
        image = Image(pixels * valid, valid, GRID)
        for count in (0, 1, 4):
            found = extend_edges(image, count, (1, 2, 3))
            assert found.valid.all()
            expected = rings(pixels * valid, valid, count)
            beyond = (expected == np.array(BEYOND)[:, None, None]).all(axis=0) & ~valid
            expected[:, beyond] = np.array((1, 2, 3))[:, None]
            np.testing.assert_array_equal(found.pixels, expected)
        np.testing.assert_array_equal(image.valid, valid)

    @given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 8))
    @settings(max_examples=20)
    def test_how_much_was_read_does_not_matter(self, row: int, col: int, count: int) -> None:
        pixels, valid = scene()
        whole = extend_edges(Image(pixels * valid, valid, GRID), count, BEYOND).pixels
        rows, cols = slice(row + 60, row + 110), slice(col, col + 50)
        part = Image((pixels * valid)[:, rows, cols], valid[rows, cols], GRID)
        found = extend_edges(part, count, BEYOND).pixels
        inner = slice(count, 50 - count)
        np.testing.assert_array_equal(found[:, inner, inner], whole[:, rows, cols][:, inner, inner])

    def test_nothing_valid(self) -> None:
        nothing = Image(np.zeros((3, 5, 6), np.uint8), np.zeros((5, 6), bool), GRID)
        found = extend_edges(nothing, 3, (9, 8, 7))
        assert (found.pixels == np.array([9, 8, 7])[:, None, None]).all()

"""Imagery read by antialiased bicubic resampling, for models that were trained on resized crops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from hypothesis import example, given
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from PIL import Image as Picture

from soundmap.encoder import InputSpec
from soundmap.sources._resample import Canvas
from soundmap.sources.base import Image
from soundmap.sources.fake import FakeSource
from soundmap.sources.raster import RasterSource
from soundmap.testing.fake_encoder import FakeEncoder
from soundmap.testing.fake_map import compute, make_job

UTM = "EPSG:32633"
NATIVE = Affine(10, 0, 500000, 0, -10, 5500000)
SHAPE = (47, 53)

Write = Callable[..., Path]

SCENE = np.random.default_rng(5).choice(np.array([0, 255], np.uint8), (3, *SHAPE))
SCENE[1] = np.random.default_rng(7).integers(0, 256, SHAPE)
HOLES = np.random.default_rng(6).random(SHAPE) > 0.3
SOLID = FakeSource(SCENE, GeoBox(SHAPE, NATIVE, UTM))
PIERCED = FakeSource(SCENE, GeoBox(SHAPE, NATIVE, UTM), HOLES)

both = pytest.mark.parametrize("source", [SOLID, PIERCED], ids=["solid", "pierced"])


def clear(number: float) -> float:
    """Pixels that lie within 0.01 px of native ones count as those: leave no such doubt."""
    return round(number) if abs(number - round(number)) < 0.02 else number


step = st.floats(0.3, 6).map(clear)
offset = st.floats(-20, 50).map(clear)
steps, offsets = st.tuples(step, step), st.tuples(offset, offset)


def placed(
    step: tuple[float, float], offset: tuple[float, float], shape: tuple[int, int]
) -> GeoBox:
    affine = NATIVE * Affine.translation(offset[1], offset[0]) * Affine.scale(step[1], step[0])
    return GeoBox(shape, affine, UTM)


def weights(n: int, native: int, offset: float, step: float, stretch: float) -> np.ndarray:
    """Weights of native pixels, as if imagery went on beyond its edges (Keys 1981, eq. 15)."""
    beyond = 60
    middle = offset + step * (np.arange(n)[:, None] + 0.5)
    x = np.abs((np.arange(-beyond, native + beyond)[None] + 0.5 - middle) / stretch)
    w = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2)
    w[x >= 2] = 0
    total = w.sum(axis=1, keepdims=True)
    return (w / np.where(total == 0, 1, total))[:, beyond:-beyond]


def step_between(one: Image, other: Image) -> np.ndarray:
    seen = one.valid & other.valid
    return np.abs(one.pixels.astype(int) - other.pixels)[:, seen]


# --------------------------------------------------------------------------- what it comes to


@both
@given(step=steps, offset=offsets, shape=st.tuples(st.integers(1, 40), st.integers(1, 40)))
@example(step=(8 / 7, 8 / 7), offset=(0, 0), shape=(40, 40))
@example(step=(4, 2), offset=(0, 0), shape=(11, 26))
@example(step=(1, 1), offset=(0.5, 0.5), shape=(40, 40))
def test_kernel(
    source: FakeSource,
    step: tuple[float, float],
    offset: tuple[float, float],
    shape: tuple[int, int],
) -> None:
    """The plain definition: weights over valid pixels, what is black and white stays in range."""
    valid = HOLES if source is PIERCED else np.ones(SHAPE, bool)
    image = source.read(placed(step, offset, shape), "cubic")
    # GDAL leaves kernels alone that would be stretched by 5 % or less both ways.
    stretch = (1, 1) if max(step) <= 1 / 0.95 else (max(step[0], 1), max(step[1], 1))
    rows = weights(shape[0], SHAPE[0], offset[0], step[0], stretch[0])
    cols = weights(shape[1], SHAPE[1], offset[1], step[1], stretch[1])
    shares = rows @ valid @ cols.T
    sure = np.abs(shares - 0.5) > 2e-3
    assert np.array_equal(image.valid[sure], (shares >= 0.5)[sure])
    colour = rows @ (SCENE * valid) @ cols.T / np.where(image.valid, shares, 1)
    step_off = np.abs(image.pixels - np.clip(colour, 0, 255))[:, image.valid]
    assert step_off.max(initial=0) <= 0.51
    assert not image.pixels[:, ~image.valid].any()


@both
@given(
    step=steps,
    offset=offsets,
    rows=st.tuples(st.integers(0, 29), st.integers(1, 30)),
    cols=st.tuples(st.integers(0, 29), st.integers(1, 30)),
)
def test_pixels_do_not_depend_on_what_else_is_read(
    source: FakeSource,
    step: tuple[float, float],
    offset: tuple[float, float],
    rows: tuple[int, int],
    cols: tuple[int, int],
) -> None:
    grid = placed(step, offset, (30, 30))
    cut = (slice(rows[0], min(30, sum(rows))), slice(cols[0], min(30, sum(cols))))
    whole, part = source.read(grid, "cubic"), source.read(grid[cut], "cubic")
    # A share, or a colour, may stand within rounding of one half.
    assert np.mean(part.valid != whole.valid[cut]) <= 0.02
    inside = Image(whole.pixels[:, *cut], whole.valid[cut], part.grid)
    step_off = step_between(inside, part)
    assert step_off.max(initial=0) <= 1
    assert np.count_nonzero(step_off) <= 1 + 0.001 * step_off.size


@pytest.mark.parametrize("step", [300 / 224, 256 / 224, 900 / 224, 1500 / 224, 20])
def test_as_pillow(step: float) -> None:
    rough = np.random.default_rng(0).integers(60, 200, (400, 400, 3)).astype(np.uint8)
    source = FakeSource(rough.transpose(2, 0, 1), GeoBox((400, 400), NATIVE, UTM))
    n = int(380 / step)
    grid = GeoBox((n, n), NATIVE * Affine.translation(7, 3) * Affine.scale(step), UTM)
    box = (7, 3, 7 + n * step, 3 + n * step)
    whole = Picture.fromarray(rough).resize((n, n), Picture.Resampling.BICUBIC, box=box)
    # Away from the raster's edge, and by itself as well.
    for cut in (slice(2, n - 2), slice(n // 2, n // 2 + 1)):
        read = source.read(grid[cut, cut], "cubic")
        step_off = np.abs(
            read.pixels.astype(int) - np.asarray(whole).transpose(2, 0, 1)[:, cut, cut]
        )
        assert step_off.max() <= 1


def test_stretched_along_the_rasters_own_axes() -> None:
    """A raster that lies on its side, of oblong pixels, gives what it gives upright."""
    upright = GeoBox(SHAPE, Affine(10, 0, 500000, 0, -25, 5500000), UTM)
    # Row r and column c of the other are column r and row c of this one.
    other = GeoBox(SHAPE[::-1], Affine(0, 10, 500000, -25, 0, 5500000), UTM)
    grid = GeoBox((20, 18), Affine(27, 0, 500003, 0, -52, 5499990), UTM)
    one = FakeSource(SCENE, upright, HOLES).read(grid, "cubic")
    two = FakeSource(SCENE.transpose(0, 2, 1), other, HOLES.T).read(grid, "cubic")
    assert one.valid.mean() > 0.8
    assert np.array_equal(one.valid, two.valid)
    assert step_between(one, two).max() <= 1


LATTICES = {
    "north-up": GeoBox((160, 180), NATIVE, UTM),
    "south-up": GeoBox((160, 180), Affine(10, 0, 500000, 0, 10, 5498400), UTM),
    "rotated": GeoBox((160, 180), NATIVE * Affine.rotation(30), UTM),
    "degrees": GeoBox((160, 180), Affine(14e-5, 0, 15, 0, -9e-5, 49.653), "EPSG:4326"),
    "another zone": GeoBox((160, 180), NATIVE, UTM).to_crs("EPSG:32632"),
}


@pytest.mark.parametrize("step", [0.6, 1.0, 8 / 7, 3.0, 7.3])
@pytest.mark.parametrize("lattice", LATTICES)
def test_flat_stays_flat(lattice: str, step: float) -> None:
    """Beside holes, at edges, at any size and turn: what is not valid never bleeds."""
    native = LATTICES[lattice]
    rng = np.random.default_rng(3)
    valid = rng.random(native.shape) > 0.1
    valid[40:70, 50:90] = False
    pixels = np.where(valid, np.array([9, 130, 255], np.uint8)[:, None, None], 77)
    grid = GeoBox((40, 40), NATIVE * Affine.translation(20.4, 13.7) * Affine.scale(step), UTM)
    image = FakeSource(pixels.astype(np.uint8), native, valid).read(grid, "cubic")
    assert image.valid.any()
    assert (image.pixels[:, image.valid] == [[9], [130], [255]]).all()


def test_black_and_white_do_not_wrap_around() -> None:
    """Beside an edge the kernel overshoots: below black and above white."""
    pixels = np.zeros(SHAPE, np.uint8)
    pixels[:, 26:] = 255
    valid = np.ones(SHAPE, bool)
    valid[20, 20] = False
    grid = placed((0.5, 0.5), (4.1, 10.3), (70, 70))
    for seen in (np.ones(SHAPE, bool), valid):
        image = FakeSource(pixels, GeoBox(SHAPE, NATIVE, UTM), seen).read(grid, "cubic")
        assert (np.diff(image.pixels[0].astype(int), axis=1) >= 0).all()


@pytest.mark.parametrize("west", [-180, 0])
@pytest.mark.parametrize("step", [0.7, 1.6, 5.0])
def test_across_the_edge_of_the_globe(west: int, step: float) -> None:
    """The kernel reaches around, whichever pixels are asked for."""
    rough = np.random.default_rng(0).integers(0, 256, (3, 60, 360)).astype(np.uint8)
    world = FakeSource(rough, GeoBox((60, 360), Affine(1, 0, west, 0, -1, 30), "EPSG:4326"))
    seam = west + 360
    turned = FakeSource(
        np.roll(rough, 180, axis=2),
        GeoBox((60, 360), Affine(1, 0, seam - 180, 0, -1, 30), "EPSG:4326"),
    )
    n = 20
    grid = GeoBox((3, n), Affine(step, 0, seam - (n / 2 + 0.8) * step, 0, -step, 3), "EPSG:4326")
    expected = turned.read(grid, "cubic")
    assert expected.valid.all()
    assert step_between(world.read(grid, "cubic"), expected).max() <= 1
    for col in range(n):
        part = world.read(grid[:, col : col + 1], "cubic")
        there = Image(expected.pixels[:, :, [col]], expected.valid[:, [col]], part.grid)
        assert step_between(part, there).max() <= 1


# --------------------------------------------------------------------------- mosaics


def tiles(write: Write, stored: np.ndarray, side: int) -> list[Path]:
    return [
        write(f"{r:02}{c:02}.tif", stored[:, r : r + side, c : c + side], nodata=0,
              transform=NATIVE * Affine.translation(c, r))
        for r in range(0, stored.shape[1], side) for c in range(0, stored.shape[2], side)
    ]  # fmt: skip


@pytest.mark.parametrize("crs", [UTM, "EPSG:4326", "EPSG:32632"])
@pytest.mark.parametrize("scale", [0.8, 1.0, 8 / 7, 3.3])
def test_tiles_join_without_seams(write: Write, crs: str, scale: float) -> None:
    stored = np.random.default_rng(1).integers(1, 256, (3, 60, 60)).astype(np.uint8)
    stored[:, 15:24, 30:50] = 0
    together = RasterSource([write("all.tif", stored, nodata=0)])
    apart = RasterSource(tiles(write, stored, 20))
    grid = together.info.native_grid.to_crs(crs).zoom_out(scale).translate_pix(0.37, 0.21)
    one, other = together.read(grid, "cubic"), apart.read(grid, "cubic")
    assert np.array_equal(one.valid, other.valid)
    assert np.array_equal(one.pixels, other.pixels)


@pytest.mark.parametrize("scale", [0.45, 8 / 7, 4.0])
@pytest.mark.parametrize("crs", [UTM, "EPSG:4326"])
def test_tiles_that_only_the_kernel_touches_are_read(write: Write, scale: float, crs: str) -> None:
    stored = np.random.default_rng(1).integers(1, 256, (3, 60, 60)).astype(np.uint8)
    source = RasterSource(tiles(write, stored, 20))
    grid = source.info.native_grid.to_crs(crs).zoom_out(scale)
    whole = source.read(grid, "cubic")
    rows, cols = grid.shape
    for row, col in np.random.default_rng(2).integers(0, (rows, cols), (40, 2)).tolist():
        pixel = source.read(grid[row : row + 1, col : col + 1], "cubic")
        there = Image(
            whole.pixels[:, row : row + 1, col : col + 1],
            whole.valid[row : row + 1, col : col + 1],
            pixel.grid,
        )
        assert pixel.valid == there.valid
        assert step_between(pixel, there).max(initial=0) <= 1


def test_first_valid_pixel_wins(write: Write) -> None:
    """Native pixels are chosen first, then resampled together."""
    rng = np.random.default_rng(4)
    one, two = rng.integers(1, 256, (2, 3, 40, 40)).astype(np.uint8)
    one[:, 12:19] = 0
    at = NATIVE * Affine.translation(17, -9)
    source = RasterSource(
        [write("a.tif", one, nodata=0), write("b.tif", two, nodata=0, transform=at)]
    )
    joined = source.read(source.info.native_grid)
    plain = FakeSource(joined.pixels, joined.grid, joined.valid)
    grid = joined.grid.zoom_out(8 / 7)
    found, expected = source.read(grid, "cubic"), plain.read(grid, "cubic")
    assert np.array_equal(found.valid, expected.valid)
    assert step_between(found, expected).max() <= 1


def test_unlike_rasters_blend(write: Write) -> None:
    """Two flat ones of different lattices, overlapping in part: nothing beyond their colours."""
    one = np.full((3, 40, 40), 90, np.uint8)
    one[:, ::7, ::5] = 0
    one[:, 20:] = 0
    two = np.full((3, 50, 50), 110, np.uint8)
    at = NATIVE * Affine.translation(3.3, 8.6) * Affine.scale(0.9)
    source = RasterSource(
        [write("a.tif", one, nodata=0), write("b.tif", two, nodata=0, transform=at)]
    )
    for scale in (0.7, 8 / 7, 3.0):
        image = source.read(source.info.native_grid.zoom_out(scale), "cubic")
        found = image.pixels[:, image.valid]
        assert found.min() == 90
        assert found.max() == 110


def test_pieces_of_one_raster_add_up() -> None:
    """What overshoots in one piece is missing in the next; rasters above cannot take it away."""
    grid = GeoBox((1, 3), NATIVE, UTM)
    everywhere = (slice(0, 1), slice(0, 3))
    pieces = Canvas(grid, piecewise=True)
    pieces.add_part(
        *everywhere,
        np.array([[[105.0, -5.0, 0.0]]] * 3, np.float32),
        np.array([[1.05, -0.05, 0.0]], np.float32),
    )
    pieces.add_part(
        *everywhere,
        np.array([[[-6.0, 126.0, 0.0]]] * 3, np.float32),
        np.array([[-0.05, 1.05, 0.0]], np.float32),
    )
    canvas = Canvas(grid)
    canvas.lay(pieces)
    below = Canvas(grid, piecewise=True)
    below.add_part(
        *everywhere, np.full((3, 1, 3), 262.5, np.float32), np.full((1, 3), 1.05, np.float32)
    )
    canvas.lay(below)
    assert canvas.image().pixels[0].tolist() == [[99, 121, 250]]


# --------------------------------------------------------------------------- who asks for it


class Resized(FakeEncoder):
    """An encoder that was trained on crops of another size."""

    @property
    def spec(self) -> InputSpec:
        return replace(super().spec, native_px=80, gsd_m=((10.0, 10.0),))


@pytest.mark.parametrize("crs", ["auto", "EPSG:4326"])
def test_maps_ask_for_what_the_model_was_trained_on(crs: str) -> None:
    grid = GeoBox((300, 300), Affine(10, 0, 499_980, 0, -10, 5_600_040), UTM)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 300, 300)).astype(np.uint8)
    windows: dict[str, set[str]] = {}
    for encoder in (FakeEncoder(4), Resized(4)):
        source = FakeSource(pixels, grid)
        job = make_job(source, encoder, crs=crs)
        compute(job, encoder)
        asked = zip(source.grids, source.resamplings, strict=True)
        # Cells of the map itself are looked at too, for where there is imagery.
        of_cells = job.plan.grid.crs if crs != "auto" else None
        windows[type(encoder).__name__] = {how for g, how in asked if g.crs != of_cells}
        if of_cells is not None:
            looked = zip(source.grids, source.resamplings, strict=True)
            assert {how for g, how in looked if g.crs == of_cells} == {"area"}
    assert windows == {"FakeEncoder": {"area"}, "Resized": {"cubic"}}

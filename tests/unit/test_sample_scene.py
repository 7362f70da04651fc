"""The sample scene: the same each time, with a true layout, textured, and served as imagery."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox

from soundmap.sources import open_source
from soundmap.sources._scene import NAMES, SIZE, scene_layout, scene_pixels
from soundmap.sources.base import Source
from soundmap.sources.sample import SAMPLE_GRID, SampleSource

AREAS = {name: number for number, name in NAMES.items() if number}
CELL = 8

_FINGERPRINT = """
import hashlib
from soundmap.sources._scene import scene_layout, scene_pixels
print(hashlib.sha256(scene_pixels().tobytes() + scene_layout()[0].tobytes()).hexdigest())
"""


def whole_cells(layout: np.ndarray, number: int) -> np.ndarray:
    """bool[rows, cols]: cells that lie wholly inside one area."""
    n = SIZE // CELL
    return (layout.reshape(n, CELL, n, CELL) == number).all((1, 3))


def test_pixels_and_layout_fit_together() -> None:
    pixels, (layout, names) = scene_pixels(), scene_layout()
    assert pixels.shape == (3, SIZE, SIZE)
    assert layout.shape == (SIZE, SIZE)
    assert pixels.dtype == layout.dtype == np.uint8
    assert names == NAMES
    assert set(np.unique(layout)) == set(NAMES)


def test_another_process_draws_the_same() -> None:
    here = hashlib.sha256(scene_pixels().tobytes() + scene_layout()[0].tobytes()).hexdigest()
    run = subprocess.run(
        [sys.executable, "-c", _FINGERPRINT], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == here


def test_is_drawn_once_and_not_changed_by_callers() -> None:
    assert scene_pixels() is scene_pixels()
    with pytest.raises(ValueError, match="read-only"):
        scene_pixels()[0, 0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        scene_layout()[0][0, 0] = 1
    scene_layout()[1].clear()
    assert scene_layout()[1] == NAMES


@pytest.mark.parametrize("area", AREAS)
def test_every_area_is_large_enough_to_judge(area: str) -> None:
    layout, _ = scene_layout()
    share = (layout == AREAS[area]).mean()
    assert share > (0.015 if area in {"river", "motorway"} else 0.02)
    assert whole_cells(layout, AREAS[area]).sum() > 100


def test_what_belongs_to_no_area_is_little() -> None:
    assert (scene_layout()[0] == 0).mean() < 0.06


# Contrast within 8 x 8 px: what real 10 m imagery of the same cover has in its median cell, halved.
@pytest.mark.parametrize(
    ("area", "least"),
    [
        ("sea", 0.35),
        ("river", 0.35),
        ("forest", 1.1),
        ("fields", 2.6),
        ("town", 7.0),
        ("industry", 11.6),
        ("motorway", 4.0),
    ],
)
def test_no_area_is_flat(area: str, least: float) -> None:
    n = SIZE // CELL
    grey = scene_pixels().mean(0).reshape(n, CELL, n, CELL).std((1, 3))
    assert np.median(grey[whole_cells(scene_layout()[0], AREAS[area])]) > least


def test_colours_are_those_of_the_real_covers() -> None:
    # Mean red, green, blue of real patches; a landscape may differ from it, but not by much.
    real = {
        "sea": (37, 61, 82),
        "forest": (39, 63, 75),
        "fields": (131, 119, 117),
        "town": (88, 96, 107),
        "industry": (117, 121, 131),
    }
    pixels, (layout, _) = scene_pixels(), scene_layout()
    for area, colour in real.items():
        mean = pixels[:, layout == AREAS[area]].mean(1)
        assert np.abs(mean - colour).max() < 20, (area, mean)


def test_info_is_known_without_drawing() -> None:
    info = SampleSource().info
    assert info.native_grid == SAMPLE_GRID
    assert SAMPLE_GRID.shape == (SIZE, SIZE)
    assert SAMPLE_GRID.crs is not None
    assert SAMPLE_GRID.crs.to_epsg() == 32631
    assert info.native_gsd_m == pytest.approx(10, rel=0.002)
    assert info.attribution == "soundmap sample scene (synthetic)"
    assert info.licence == "CC0-1.0"
    assert info.facts


def test_keeps_the_promises_of_a_source() -> None:
    source = open_source("sample")
    assert isinstance(source, Source)
    packed = pickle.dumps(source)
    assert len(packed) < 500
    grid = SAMPLE_GRID[100:164, 300:364]
    np.testing.assert_array_equal(pickle.loads(packed).read(grid).pixels, source.read(grid).pixels)


def test_own_pixels_are_copied() -> None:
    whole = SampleSource().read(SAMPLE_GRID)
    np.testing.assert_array_equal(whole.pixels, scene_pixels())
    assert whole.valid.all()
    assert whole.grid == SAMPLE_GRID


def test_a_read_can_be_changed_without_harm_to_the_next() -> None:
    grid = SAMPLE_GRID[:32, :32]
    first = SampleSource().read(grid)
    before = first.pixels.copy()
    first.pixels[:] = 0
    np.testing.assert_array_equal(SampleSource().read(grid).pixels, before)


@given(
    row=st.integers(-80, SIZE + 40),
    col=st.integers(-80, SIZE + 40),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
)
def test_part_reads_equal_the_whole(row: int, col: int, height: int, width: int) -> None:
    affine = SAMPLE_GRID.affine * Affine.translation(col, row)
    image = SampleSource().read(GeoBox((height, width), affine, SAMPLE_GRID.crs))
    framed = np.pad(scene_pixels(), ((0, 0), (200, 200), (200, 200)))
    rows = slice(row + 200, row + 200 + height)
    cols = slice(col + 200, col + 200 + width)
    np.testing.assert_array_equal(image.pixels, framed[:, rows, cols])
    inside = np.pad(np.ones((SIZE, SIZE), bool), 200)
    np.testing.assert_array_equal(image.valid, inside[rows, cols])


def test_coarser_reads_are_averages() -> None:
    grid = GeoBox((128, 128), SAMPLE_GRID.affine * Affine.scale(8), SAMPLE_GRID.crs)
    image = SampleSource().read(grid)
    mean = scene_pixels().reshape(3, 128, 8, 128, 8).mean((2, 4))
    assert image.valid.all()
    assert np.abs(image.pixels - mean).max() <= 1


def test_other_projections_show_the_same_place() -> None:
    grid = GeoBox.from_bbox(
        SAMPLE_GRID.geographic_extent.boundingbox, "EPSG:4326", shape=(400, 250)
    )
    image = SampleSource().read(grid)
    assert 0.9 < image.valid.mean() <= 1
    assert not image.pixels[:, ~image.valid].any()
    # The coast stays in the west: deep sea is darker than land.
    west, east = image.pixels[:, 150:250, 10:40], image.pixels[:, 150:250, 120:200]
    assert west.mean() + 20 < east.mean()


def test_elsewhere_nothing_is_valid() -> None:
    grid = GeoBox((16, 16), Affine(10, 0, 300_000, 0, -10, 5_000_000), "EPSG:32632")
    image = SampleSource().read(grid)
    assert not image.valid.any()
    assert not image.pixels.any()


def test_threads_may_read_at_once() -> None:
    grids = [SAMPLE_GRID[i : i + 200, i : i + 200] for i in range(0, 800, 100)]
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(SampleSource().read, grids))
    for i, image in zip(range(0, 800, 100), images, strict=True):
        np.testing.assert_array_equal(image.pixels, scene_pixels()[:, i : i + 200, i : i + 200])

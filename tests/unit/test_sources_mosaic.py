"""Mosaics, what a source tells of itself, and its copies in other processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.enums import ColorInterp

from soundmap.sources import raster
from soundmap.sources.raster import RasterSource

C = ColorInterp

UTM = "EPSG:32633"
NATIVE = Affine(10, 0, 500000, 0, -10, 5500000)

Write = Callable[..., Path]


def noise(
    shape: tuple[int, ...], dtype: str = "uint8", low: int = 0, high: int = 256, seed: int = 0
) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def whole(source: RasterSource) -> tuple[np.ndarray, np.ndarray]:
    image = source.read(source.info.native_grid)
    return image.pixels, image.valid


# --------------------------------------------------------------------------- mosaics


def test_first_valid_pixel_wins(write: Write) -> None:
    one, two = noise((3, 20, 20), low=1), noise((3, 20, 20), low=1, seed=1)
    one[:, 5:9] = 0
    paths = [
        write("a.tif", one, nodata=0),
        write("b.tif", two, nodata=0, transform=NATIVE * Affine.translation(10, -4)),
    ]
    source = RasterSource(paths)
    assert source.info.native_grid.shape == (24, 30)
    assert source.info.native_grid.affine == NATIVE * Affine.translation(0, -4)
    expected = np.zeros((3, 24, 30), np.uint8)
    expected[:, :20, 10:] = two
    there = np.zeros((24, 30), bool)
    there[4:, :20] = one.any(axis=0)
    expected[:, 4:, :20] = np.where(there[4:, :20], one, expected[:, 4:, :20])
    pixels, valid = whole(source)
    assert np.array_equal(pixels, expected)
    assert np.array_equal(valid, expected.any(axis=0))


@pytest.mark.parametrize("crs", [UTM, "EPSG:4326", "EPSG:32632"])
@pytest.mark.parametrize("scale", [0.8, 1.0, 2.0, 3.3])
def test_tiles_join_without_seams(write: Write, crs: str, scale: float) -> None:
    stored = noise((3, 60, 60), low=1)
    paths = [
        write(f"{r}{c}.tif", stored[:, r : r + 20, c : c + 20],
              transform=NATIVE * Affine.translation(c, r))
        for r in (0, 20, 40) for c in (0, 20, 40)
    ]  # fmt: skip
    together = RasterSource([write("all.tif", stored)])
    grid = together.info.native_grid.to_crs(crs).zoom_out(scale).translate_pix(0.37, 0.21)
    tiles = RasterSource(paths)
    assert tiles.info.native_grid == together.info.native_grid
    one, other = together.read(grid), tiles.read(grid)
    assert np.mean(one.valid != other.valid) < 0.01
    both = one.valid & other.valid
    assert np.abs(one.pixels.astype(int) - other.pixels)[:, both].max() <= 1


def test_unlike_rasters_make_one_mosaic(write: Write) -> None:
    stored = noise((1, 30, 30), "uint16", low=100, high=3000)
    degrees = Affine(0.0001, 0, 14.9995, 0, -0.0001, 49.66)
    paths = [
        write("a.tif", noise((4, 20, 20)), colours=(C.red, C.green, C.blue, C.alpha)),
        write("b.tif", stored, crs="EPSG:4326", transform=degrees, nodata=0),
    ]
    source = RasterSource(paths)
    assert source.info.native_grid.crs == UTM
    assert source.info.facts["bands"] == "1,2,3 (by colour interpretation); 1 (the only one)"
    assert "percentiles" in source.info.facts["rescale"]
    assert whole(source)[1].sum() > 400


def test_only_rasters_near_the_grid_are_opened(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [
        write(f"{i}.tif", noise((3, 20, 20)), transform=NATIVE * Affine.translation(20 * i, 0))
        for i in range(9)
    ]
    source = RasterSource(paths)
    grid = source.info.native_grid[5:15, 85:95]
    opened = []
    monkeypatch.setattr(raster, "open_dataset", lambda p: opened.append(p.name) or rasterio.open(p))
    assert source.read(grid).valid.all()
    assert opened == ["4.tif"]
    source.read(grid)
    assert opened == ["4.tif"], "handles are kept"
    source.read(grid.to_crs("EPSG:4326"))
    assert set(opened) <= {"3.tif", "4.tif", "5.tif"}


def test_few_files_stay_open(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raster, "_OPEN_FILES", 3)
    paths = [
        write(f"{i}.tif", noise((3, 4, 4)), transform=NATIVE * Affine.translation(4 * i, 0))
        for i in range(8)
    ]
    source = RasterSource(paths)
    whole(source)
    assert len(source._handles._idle) == 3
    source.close()
    assert not source._handles._idle
    assert whole(source)[1].all()


# --------------------------------------------------------------------------- facts


def test_facts_follow_the_pixels(write: Write) -> None:
    stored = noise((3, 200, 200))
    path = write("a.tif", stored)
    before = RasterSource([path]).info
    assert RasterSource([path]).info == before
    os.utime(path, ns=(1, 1))
    assert RasterSource([path]).info == before, "a copy is the same imagery"
    stored[:, 0, 0] ^= 1
    assert RasterSource([write("a.tif", stored)]).info.facts != before.facts
    path = write("a.tif", noise((3, 200, 200)), mask=np.eye(200, dtype=bool))
    assert RasterSource([path]).info.facts != before.facts


def test_facts_of_many_files_are_short(write: Write) -> None:
    paths = [write(f"{i}.tif", noise((1, 4, 4), seed=i)) for i in range(30)]
    facts = [RasterSource(p).info.facts["files"] for p in (paths, paths[::-1])]
    assert facts[0] != facts[1], "their order decides the pixels"
    assert len(facts[0]) < 100


def test_credits(write: Write) -> None:
    path = write(
        "a.tif", noise((3, 8, 8)), tags={"ATTRIBUTION": "Somebody", "LICENCE": "CC BY 4.0"}
    )
    info = RasterSource(
        [path, write("b.tif", noise((3, 8, 8)), tags={"TIFFTAG_COPYRIGHT": "X"})]
    ).info
    assert info.attribution == "Somebody; X"
    assert info.licence == "CC BY 4.0"


# --------------------------------------------------------------------------- processes


def test_copies_carry_the_stretch(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    source = RasterSource([write("a.tif", noise((3, 30, 30), "uint16", high=5000))])
    copy = pickle.loads(pickle.dumps(source))
    monkeypatch.setattr(raster, "from_sample", lambda values: pytest.fail("found out again"))
    assert np.array_equal(whole(copy)[0], whole(source)[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_processes_open_their_own_files(write: Write) -> None:
    source = RasterSource([write("a.tif", noise((3, 300, 300)), compress="deflate")])
    before = whole(source)[0]
    parent = list(source._handles._idle)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert np.array_equal(pool.apply(whole, (source,))[0], before)
    assert list(source._handles._idle) == parent
    assert np.array_equal(whole(source)[0], before)

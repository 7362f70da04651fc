"""The contract of sources, kept by those that come with soundmap."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from affine import Affine
from odc.geo.geobox import GeoBox

from soundmap.errors import SourceError
from soundmap.sources import Source, _rasterfile
from soundmap.sources.fake import FakeSource, FaultySource
from soundmap.sources.raster import RasterSource
from soundmap.testing.source_contract import SourceContract

UTM = "EPSG:32633"

Write = Callable[..., Path]


def scene(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Blurred noise with a hole: uint8[3, H, W] and bool[H, W]."""
    rng = np.random.default_rng(seed)
    rough = rng.integers(1, 256, (3, height + 4, width + 4)).astype(float)
    soft = sum(rough[:, i : i + height, j : j + width] for i in range(5) for j in range(5)) / 25
    valid = np.ones((height, width), bool)
    valid[height // 2 : height // 2 + 17, width // 3 : width // 3 + 21] = False
    return soft.astype(np.uint8) * valid, valid


class OfRasters(SourceContract):
    """Rasters made in a temporary folder."""

    @pytest.fixture(autouse=True)
    def _rasters(self, write: Write) -> None:
        self.paths = self.make(write)

    def make(self, write: Write) -> list[Path]:
        raise NotImplementedError

    def make_source(self) -> Source:
        return RasterSource(self.paths)

    def watch_pixels(self, monkeypatch: pytest.MonkeyPatch) -> list[object] | None:
        seen: list[object] = []
        read = _rasterfile._read_bands

        def watched(*args: object) -> object:
            seen.append(args)
            return read(*args)

        monkeypatch.setattr(_rasterfile, "_read_bands", watched)
        return seen


class TestGeoTiff(OfRasters):
    def make(self, write: Write) -> list[Path]:
        pixels, _ = scene(150, 170)
        grid = Affine(10, 0, 500000, 0, -10, 5500000)
        return [
            write(
                "a.tif",
                pixels,
                transform=grid,
                nodata=0,
                tiled=True,
                blockxsize=64,
                blockysize=64,
            )
        ]


class TestRotated(OfRasters):
    def make(self, write: Write) -> list[Path]:
        pixels, _ = scene(150, 170)
        grid = Affine.translation(500000, 5500000) * Affine.rotation(30) * Affine.scale(10, -10)
        return [write("a.tif", pixels, transform=grid, crs=UTM, nodata=0)]


class TestSouthUpLonLatUint16(OfRasters):
    def make(self, write: Write) -> list[Path]:
        pixels, _ = scene(150, 170)
        grid = Affine(0.001, 0, 13, 0, 0.001, 53)
        return [
            write(
                "a.tif",
                pixels.astype(np.uint16) * 30,
                transform=grid,
                crs="EPSG:4326",
                nodata=0,
            )
        ]


class TestMosaicOfUnlikeRasters(OfRasters):
    rounding = 1

    def make(self, write: Write) -> list[Path]:
        one, _ = scene(100, 120)
        two, _ = scene(160, 180, seed=1)
        grid = Affine(10, 0, 500000, 0, -10, 5500000)
        other = Affine(0.0001, 0, 15.0105, 0, -0.00007, 49.653)
        return [
            write("a.tif", one, transform=grid, crs=UTM, nodata=0),
            write(
                "b.tif",
                two.astype(np.float32) + 10,
                transform=other,
                crs="EPSG:4326",
                nodata=10,
            ),
        ]

    def test_coarser_is_averaged(self, source: Source) -> None:
        """Where two rasters share a pixel, the second lends its colour over the whole of it."""
        grid = self.grid_within(source)
        rows, cols = grid.shape[0] // 4, grid.shape[1] // 4
        fine, coarse = source.read(grid), source.read(grid.zoom_out(4))
        mean = fine.pixels.reshape(3, rows, 4, cols, 4).mean(axis=(2, 4))
        whole = fine.valid.reshape(rows, 4, cols, 4).all(axis=(1, 3))
        step = np.abs(coarse.pixels - mean)[:, whole & coarse.valid]
        assert np.mean(step > 1) < 0.1
        assert step.mean() < 0.7

    def test_coarser_is_antialiased(self, source: Source) -> None:
        """Nor do two lattices make one kernel where they meet."""
        grid = self.grid_within(source)
        fine, coarse = source.read(grid, "area"), source.read(grid.zoom_out(4), "cubic")
        rows, cols = coarse.valid.shape
        mean = fine.pixels.reshape(3, rows, 4, cols, 4).mean(axis=(2, 4))
        whole = fine.valid.reshape(rows, 4, cols, 4).all(axis=(1, 3))
        assert np.abs(coarse.pixels - mean)[:, whole & coarse.valid].mean() < 6


class TestVrtOverNetwork(OfRasters):
    """A server fails what it is asked for; what was read from other sources stays known to GDAL."""

    @pytest.fixture(autouse=True)
    def _server(
        self,
        file_server: Any,
        write_vrt: Callable[..., str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.server = file_server
        (served,) = self.paths
        file_server.files["a.tif"] = served.read_bytes()
        vrt = tmp_path / "a.vrt"
        vrt.write_text(
            write_vrt([(f"/vsicurl/{file_server.url}/a.tif", (0, 0), (150, 170))], (150, 170))
        )
        self.paths = [vrt]
        # Of requests that GDAL asks again by itself a source sees nothing.
        monkeypatch.setenv("GDAL_HTTP_MAX_RETRY", "0")

    def make(self, write: Write) -> list[Path]:
        pixels, _ = scene(150, 170)
        return [write("a.tif", pixels, tiled=True, blockxsize=64, blockysize=64)]

    def fail_next(self, source: Source, times: int | None) -> bool:
        left = itertools.count(times or 0, -1)
        failing = times is None
        self.server.fault = lambda asked: 503 if failing or next(left) > 0 else None
        return True


class TestFaulty(SourceContract):
    def make_source(self) -> Source:
        pixels, valid = scene(100, 120)
        grid = GeoBox(valid.shape, Affine(10, 0, 500000, 0, -10, 5500000), UTM)
        return FaultySource(FakeSource(pixels, grid, valid), share=0.3)


class TestFake(SourceContract):
    def make_source(self) -> Source:
        pixels, valid = scene(100, 120)
        grid = GeoBox(valid.shape, Affine(10, 0, 500000, 0, -10, 5500000), UTM)
        return FakeSource(pixels, grid, valid)

    def test_counts_and_fails(self) -> None:
        grid = GeoBox((8, 8), Affine(10, 0, 500000, 0, -10, 5500000), UTM)
        source = FakeSource(np.full((8, 8), 9, np.uint8), grid, fail_on={2})
        assert source.read(grid).pixels.tolist() == np.full((3, 8, 8), 9).tolist()
        with pytest.raises(SourceError, match="read 2"):
            source.read(grid)
        source.read(grid[:4])
        assert source.reads == 3
        assert source.grids[2].shape == (4, 8)

    def test_refuses_other_shapes(self) -> None:
        grid = GeoBox((8, 8), Affine(10, 0, 500000, 0, -10, 5500000), UTM)
        with pytest.raises(ValueError, match=r"uint8\[3, 8, 8\]"):
            FakeSource(np.zeros((8, 9), np.uint8), grid)


class TestSample(SourceContract):
    def make_source(self) -> Source:
        sample = pytest.importorskip("soundmap.sources.sample")
        return sample.SampleSource()

"""Units computed by a Dask cluster make the same map as those computed here."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
import xarray as xr
from affine import Affine

import soundmap
from soundmap.errors import SoundmapError
from soundmap.sources import open_source

CONCEPTS = ["birdsong", "road traffic"]
TEXT = ["church bells"]


@pytest.fixture(scope="module")
def strip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample scene side by side to 4200 x 2296 px: 3 x 2 units, one without imagery."""
    sample = open_source("sample")
    grid = sample.info.native_grid
    assert grid is not None
    pixels = np.tile(sample.read(grid).pixels, (1, 3, 5))[:, :2296, :4200].clip(1)
    # Imagery lies around the borders of units, at 2048 and 4096 px, so that windows straddle them.
    pixels[:, :1850] = 0
    pixels[:, 2048:, :2048] = 0
    path = tmp_path_factory.mktemp("imagery") / "strip.tif"
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=3,
        height=pixels.shape[1],
        width=pixels.shape[2],
        dtype="uint8",
        nodata=0,
        crs="EPSG:32631",
        transform=Affine(10, 0, 499_200, 0, -10, 6_039_040),
        tiled=True,
        compress="zstd",
    ) as dataset:
        dataset.write(pixels)
    return path


@pytest.fixture(scope="module")
def here(strip: Path) -> xr.DataArray:
    return soundmap.predict(strip, concepts=CONCEPTS, text=TEXT)


def test_the_map_has_several_units(here: xr.DataArray) -> None:
    assert here.sizes == {"concept": 3, "y": 287, "x": 525}
    known = np.isfinite(here.to_numpy()[0])
    # What is known lies in five of the six units of 256 cells.
    units = [known[r : r + 256, c : c + 256] for r in (0, 256) for c in (0, 256, 512)]
    assert [bool(unit.any()) for unit in units] == [True, True, True, False, True, True]
    assert known.mean() < 0.2


def test_two_processes(
    command: Callable[..., subprocess.CompletedProcess[str]],
    strip: Path,
    here: xr.DataArray,
    tmp_path: Path,
) -> None:
    options = ["--concepts", ",".join(CONCEPTS), "--text", TEXT[0], "--workers", 2]
    result = command("predict", "--imagery", strip, *options, "--out", tmp_path / "map.tif")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    values = soundmap.open(tmp_path / "map.tif")["probability"].to_numpy()
    np.testing.assert_allclose(values, here.to_numpy(), atol=1e-6)
    assert {p.name for p in tmp_path.iterdir()} == {"map.tif", "map.qml"}


def test_a_cluster_that_runs_elsewhere(strip: Path, here: xr.DataArray, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        values = soundmap.predict(
            strip,
            concepts=CONCEPTS,
            text=TEXT,
            scheduler=cluster.scheduler_address,
            out=tmp_path / "map.zarr",
        )
        np.testing.assert_allclose(values.to_numpy(), here.to_numpy(), atol=1e-6)


def test_a_cluster_without_workers_is_refused(
    town: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr("soundmap.runner.cluster._CONNECT_SECONDS", 2)
    with (
        distributed.LocalCluster(n_workers=0, processes=True, dashboard_address=None) as cluster,
        pytest.raises(SoundmapError, match="worker"),
    ):
        soundmap.predict(town, scheduler=cluster.scheduler_address, out=tmp_path / "map.tif")
    assert not list(tmp_path.iterdir())


def test_a_failed_unit_is_reported_and_the_rest_is_kept(
    command: Callable[..., subprocess.CompletedProcess[str]], strip: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.tif"
    with rasterio.open(strip) as dataset:
        # A tile of the last unit, some of which only it reads.
        offset = int(dataset.get_tag_item("BLOCK_OFFSET_16_8", "TIFF", bidx=1))
    data = bytearray(strip.read_bytes())
    data[offset : offset + 64] = bytes(64)
    damaged.write_bytes(data)
    folder = tmp_path / "out"
    folder.mkdir()
    args = ["--imagery", damaged, "--concepts", "birdsong", "--quiet", "--out", folder / "map.tif"]
    for workers in (["--workers", 1], []):
        result = command("predict", *args, *workers)
        assert result.returncode == 1
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
        assert "units could not be computed" in result.stderr
        assert "damaged.tif" in result.stderr
        # No map, but what was done, hidden, for the next try.
        assert [p.name for p in folder.iterdir()] == [".map.tif.part.zarr"]

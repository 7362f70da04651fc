"""What tests of the whole program share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine

from soundmap.cli import main

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run ``soundmap ARGS...`` in this process, which saves the time of a start."""

    def call(*args: object) -> subprocess.CompletedProcess[str]:
        words = ["soundmap", *map(str, args)]
        monkeypatch.setattr(sys, "argv", words)
        code = 0
        capfd.readouterr()
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return call


@pytest.fixture
def program(project: Path) -> Command:
    """Run ``soundmap ARGS...`` as a program of its own."""

    def call(*args: object, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "soundmap", *map(str, args)]
        return subprocess.run(
            words, cwd=project, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    return call


@pytest.fixture(scope="session")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raster of 256 x 192 px of 10 m: 32 x 24 cells, some structure, no nodata."""
    path = tmp_path_factory.mktemp("imagery") / "town.tif"
    height, width = 192, 256
    generator = np.random.default_rng(3)
    blocks = generator.integers(20, 200, (3, height // 16, width // 16))
    pixels = np.kron(blocks, np.ones((1, 16, 16))) + generator.normal(0, 9, (3, height, width))
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=3,
        height=height,
        width=width,
        dtype="uint8",
        crs="EPSG:32633",
        transform=Affine(10, 0, 500_000, 0, -10, 5_500_000),
        tiled=True,
        blockxsize=64,
        blockysize=64,
        compress="deflate",
    ) as dataset:
        dataset.write(pixels.clip(0, 255).astype(np.uint8))
    return path

"""Imagery that fails: what may pass is tried again, what stays broken is named, and no more.

The imagery is a VRT over /vsicurl, read from a server on loopback that now and then answers 500,
hangs past the timeout, or cuts an answer short.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine

import soundmap
from soundmap.sources import open_source

Command = Callable[..., "subprocess.CompletedProcess[str]"]

SEED = int(os.environ.get("SOUNDMAP_TEST_SEED", random.SystemRandom().randrange(10**6)))
UNIT_PX = 64
# The raster of 192 x 256 px becomes 3 x 4 units; these three lie apart.
BROKEN = ((0, 3), (1, 0), (2, 2))
PATCH_PX = 16
CONCEPTS = ["birdsong", "road traffic"]
FAULTS: tuple[int | str, ...] = (500, 503, 429, "cut", "cut", "hang")


def at_random(
    share: float, kinds: tuple[int | str, ...] = (500, 503, 429, "cut", "cut", "hang")
) -> Any:
    """Let a share of all requests fail; one asked again fails anew by chance."""
    print(f"SOUNDMAP_TEST_SEED={SEED}")

    def fault(asked: Any) -> int | str | None:
        chance = random.Random(f"{SEED} {asked.name} {asked.span} {asked.nth}")
        return chance.choice(FAULTS) if chance.random() < share else None

    return fault


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soundmap.layout._MOST_UNIT_CELLS", UNIT_PX // 8)
    monkeypatch.setattr("soundmap.layout._LEAST_UNIT_CELLS", UNIT_PX // 8)


@pytest.fixture
def imagery(town: Path, tmp_path: Path, file_server: Any, write_vrt: Callable[..., str]) -> Path:
    """The town, served; over it three patches of its own pixels, each within one unit."""
    with rasterio.open(town) as dataset:
        pixels, profile = dataset.read(), dataset.profile
    file_server.files["town.tif"] = town.read_bytes()
    sources = [("town.tif", (0, 0), pixels.shape[1:])]
    for i, (unit_row, unit_col) in enumerate(BROKEN):
        row, col = (UNIT_PX * n + (UNIT_PX - PATCH_PX) // 2 for n in (unit_row, unit_col))
        patch = pixels[:, row : row + PATCH_PX, col : col + PATCH_PX]
        path = tmp_path / "patch.tif"
        options = {"height": PATCH_PX, "width": PATCH_PX, "tiled": False, "blockysize": PATCH_PX}
        place = profile["transform"] * Affine.translation(col, row)
        kept = {k: v for k, v in profile.items() if not k.startswith("block")}
        with rasterio.open(path, "w", **{**kept, **options, "transform": place}) as dataset:
            dataset.write(patch)
        file_server.files[f"patch{i}.tif"] = path.read_bytes()
        path.unlink()
        sources.append((f"patch{i}.tif", (row, col), (PATCH_PX, PATCH_PX)))
    folder = tmp_path / "imagery"
    folder.mkdir()
    served = [(f"/vsicurl/{file_server.url}/{name}", *place) for name, *place in sources]
    vrt = folder / "town.vrt"
    vrt.write_text(write_vrt(served, pixels.shape[1:]))
    return vrt


def test_pixels_are_the_local_files_whatever_the_network_does(
    town: Path, imagery: Path, file_server: Any
) -> None:
    file_server.fault = at_random(0.3)
    remote, local = open_source(str(imagery)), open_source(str(town))
    grid = local.info.native_grid
    generator = random.Random(SEED)
    for _ in range(12):
        row, col = generator.randrange(130), generator.randrange(190)
        part = grid[row : row + 60, col : col + 60]
        one, other = remote.read(part), local.read(part)
        assert np.array_equal(one.pixels, other.pixels)
        assert np.array_equal(one.valid, other.valid)
        # Or the files would be asked for but once.
        remote.close()
    met = {asked.fault for asked in file_server.asked}
    assert {500, "hang", "cut"} < met
    assert 0.2 < np.mean([asked.fault is not None for asked in file_server.asked]) < 0.4


def test_a_run_through_faults(
    command: Command,
    town: Path,
    imagery: Path,
    tmp_path: Path,
    file_server: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOUNDMAP_READ_TRIES", "6")
    out = tmp_path / "map.tif"
    broken = {f"patch{i}.tif" for i in range(len(BROKEN))}
    by_chance = at_random(0.3)
    file_server.fault = lambda asked: 500 if asked.name in broken else by_chance(asked)
    args = ["predict", "--imagery", imagery, "--concepts", ",".join(CONCEPTS), "--out", out]

    result = command(*args)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    said = result.stderr.splitlines()[-1]
    assert said.startswith("Error: 3 of 12 units could not be computed: ")
    assert sorted(re.findall(r"\((\d), (\d)\)", said)) == [(str(r), str(c)) for r, c in BROKEN]
    assert re.search(r"town\.vrt: could not be read \(.*500.*tried \d times\)", said)
    assert "the same command tries the rest again" in said
    assert not out.exists()
    # What those units need and no others has been asked for more than once, and in vain.
    for name in broken:
        tried = [asked for asked in file_server.asked if asked.name == name]
        assert len(tried) > 1
        assert {asked.fault for asked in tried} == {500}

    file_server.forget()
    assert command(*args).returncode == 1
    again = {asked.name for asked in file_server.asked if asked.name.endswith(".tif")}
    assert again == {*broken, "town.tif"}

    file_server.forget()
    file_server.fault = by_chance
    result = command(*args)
    assert result.returncode == 0
    assert "Going on: 9 units were done before" in result.stderr
    undisturbed = soundmap.predict(town, concepts=CONCEPTS)
    values = soundmap.open(out)["probability"].to_numpy()
    np.testing.assert_array_equal(values, undisturbed.to_numpy())

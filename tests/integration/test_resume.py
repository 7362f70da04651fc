"""A run that was stopped goes on where it was, and ends in the same map."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
import xarray as xr
from safetensors.numpy import load_file, save_file

import soundmap
from soundmap.api import Listener, Request, run
from soundmap.encoder import find_model
from soundmap.errors import PlanMismatch, RunFailed, SourceError
from soundmap.estimate import Estimate
from soundmap.layout import Layout
from soundmap.plan import Plan
from soundmap.runner import UnitReport
from soundmap.sources.base import Image
from soundmap.sources.raster import RasterSource
from soundmap.stores.work import work_path

CONCEPTS = ["birdsong", "road traffic"]

pytestmark = pytest.mark.usefixtures("small_units")

# The raster of 32 x 24 cells becomes 4 x 3 units.
UNIT_CELLS = 8
UNITS = 12


class Log(Listener):
    """Remembers what it hears, and stops the run after some units."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.left = -1
        self.units: list[tuple[int, int]] = []

    def planned(self, plan: Plan, cost: Estimate, layout: Layout, left: int) -> None:
        assert len(plan.units) == UNITS
        self.left = left

    def reported(self, report: UnitReport) -> None:
        self.units.append(report.index)
        if len(self.units) == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture
def request_(town: Path, tmp_path: Path) -> Request:
    return Request(out=tmp_path / "map.tif", imagery=str(town), concepts=CONCEPTS)


@pytest.fixture(scope="module")
def undisturbed(town: Path) -> xr.DataArray:
    return soundmap.predict(town, concepts=CONCEPTS)


def stop(request: Request, after: int) -> Log:
    log = Log(after)
    with pytest.raises(KeyboardInterrupt):
        run(request, log)
    return log


def values_of(request: Request) -> np.ndarray:
    return soundmap.open(request.out)["probability"].to_numpy()


def left_behind(request: Request) -> set[str]:
    return {p.name for p in request.out.parent.iterdir()}


def test_the_same_call_finishes_a_stopped_run(request_: Request, undisturbed: xr.DataArray) -> None:
    first = stop(request_, after=1)
    assert left_behind(request_) == {work_path(request_.out).name}
    assert work_path(request_.out).name.startswith(".")
    second = Log()
    run(request_, second)
    # Whatever was reported as done is not done again; together they did every unit once.
    assert second.left == len(second.units) == UNITS - len(set(first.units))
    assert not set(first.units) & set(second.units)
    assert len(set(first.units) | set(second.units)) == UNITS
    np.testing.assert_array_equal(values_of(request_), undisturbed.to_numpy())
    assert work_path(request_.out).name not in left_behind(request_)


def test_no_unit_is_reported_twice(request_: Request) -> None:
    first = stop(request_, after=3)
    assert len(first.units) == len(set(first.units))
    second = Log()
    run(request_, second)
    assert len(second.units) == len(set(second.units))


def test_a_run_may_be_stopped_again_and_again(request_: Request, undisturbed: xr.DataArray) -> None:
    lefts = [stop(request_, after=2).left for _ in range(3)]
    assert lefts == sorted(set(lefts), reverse=True)
    run(request_)
    np.testing.assert_array_equal(values_of(request_), undisturbed.to_numpy())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"value": "similarity"}, "value"),
        ({"concepts": ["birdsong"]}, "concepts"),
        ({"dtype": "uint8"}, "dtype"),
        ({"detail": "image"}, "detail"),
        ({"bands": (1, 1, 1)}, "bands"),
        ({"bbox": (15.0, 49.64, 15.02, 49.65)}, "region"),
    ],
)
def test_another_setting_is_refused_by_its_name(
    request_: Request, change: dict[str, object], named: str
) -> None:
    first = stop(request_, after=1)
    other = dataclasses.replace(request_, **change)  # type: ignore[arg-type]
    with pytest.raises(PlanMismatch, match=rf"{named}.*--overwrite") as caught:
        run(other)
    assert "\n" not in str(caught.value)
    # The stopped run is still there to be finished.
    log = Log()
    run(request_, log)
    assert log.left == UNITS - len(set(first.units))


def test_other_imagery_of_the_same_name_is_refused(request_: Request, tmp_path: Path) -> None:
    with rasterio.open(request_.imagery) as dataset:
        profile, pixels = dataset.profile, dataset.read()
    path = tmp_path / "imagery" / "town.tif"
    path.parent.mkdir()
    for shade in (0, 1):
        with rasterio.open(path, "w", **profile) as copy:
            copy.write(pixels // (shade + 1))
        one = dataclasses.replace(request_, imagery=str(path))
        if shade:
            with pytest.raises(PlanMismatch, match="imagery files"):
                run(one)
        else:
            stop(one, after=1)


def test_another_size_of_the_raster_is_refused(request_: Request, tmp_path: Path) -> None:
    with rasterio.open(request_.imagery) as dataset:
        profile, pixels = dataset.profile, dataset.read()
    path = tmp_path / "imagery" / "town.tif"
    path.parent.mkdir()
    one = dataclasses.replace(request_, imagery=str(path))
    for height in (192, 128):
        profile["height"] = height
        with rasterio.open(path, "w", **profile) as copy:
            copy.write(pixels[:, :height])
        if height == 192:
            stop(one, after=1)
            continue
        with pytest.raises(PlanMismatch, match=r"another .*grid.*imagery files.*repeat"):
            run(one)


def test_another_model_of_the_same_name_is_refused(request_: Request, tmp_path: Path) -> None:
    bundled = find_model("soundmap-small").folder
    folder = tmp_path / "models" / "own"
    shutil.copytree(bundled, folder)
    # Asked for by phrase: the bank beside the weights would refuse to serve others.
    one = dataclasses.replace(
        request_, model=str(folder), concepts=None, text=("bells",), value="similarity"
    )
    stop(one, after=1)
    # The same weights but for one number.
    weights = load_file(folder / "model.safetensors")
    first = next(name for name, held in weights.items() if held.dtype == np.float32)
    weights[first] = weights[first] * np.float32(1.0001)
    save_file(weights, folder / "model.safetensors")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    card = json.loads((folder / "model.json").read_text())
    old = hashlib.sha256((bundled / "model.safetensors").read_bytes()).hexdigest()
    (folder / "model.json").write_text(json.dumps(card).replace(old, digest))
    for listing in folder.glob("*SUMS*"):
        listing.write_text(listing.read_text().replace(old, digest))
    with pytest.raises(PlanMismatch, match=r"model \(soundmap-small \w+ there, .* now\): "):
        run(one)


def test_another_bank_of_the_same_concepts_is_refused(request_: Request, tmp_path: Path) -> None:
    bank = tmp_path / "imagery" / "sounds.json"
    bank.parent.mkdir()
    one = dataclasses.replace(request_, concepts=str(bank), value="similarity")
    for prompt in ("church bells", "bells of a church"):
        bank.write_text(json.dumps({"concepts": [{"name": "bells", "prompts": [prompt]}]}))
        if prompt == "church bells":
            stop(one, after=1)
            continue
        with pytest.raises(PlanMismatch, match="another concepts: repeat"):
            run(one)


def test_overwrite_starts_anew(request_: Request) -> None:
    stop(request_, after=3)
    other = dataclasses.replace(request_, value="similarity", overwrite=True)
    log = Log()
    run(other, log)
    assert log.left == len(log.units) == UNITS
    assert list(soundmap.open(request_.out).data_vars) == ["similarity"]
    assert work_path(request_.out).name not in left_behind(request_)


@pytest.mark.parametrize("name", ["map.tif", "map.zarr"])
def test_an_older_map_stays_until_the_new_one_is_whole(request_: Request, name: str) -> None:
    request_ = dataclasses.replace(request_, out=request_.out.with_name(name))
    run(request_)
    older = values_of(request_)
    other = dataclasses.replace(request_, concepts=CONCEPTS[::-1], overwrite=True)
    stop(other, after=2)
    np.testing.assert_array_equal(values_of(request_), older)
    run(other)
    np.testing.assert_array_equal(values_of(request_), older[::-1])


def test_units_that_failed_are_tried_again_by_the_same_call(
    request_: Request, undisturbed: xr.DataArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    read = RasterSource.read

    def failing(self: RasterSource, grid: object) -> Image:
        reads.append(grid)
        if len(reads) in (3, 7, UNITS):
            raise SourceError("town.tif: the disk is tired")
        return read(self, grid)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(RasterSource, "read", failing)
        with pytest.raises(RunFailed, match=r"3 of 12 units .*the disk is tired.* tries the rest"):
            run(request_)
    assert left_behind(request_) == {work_path(request_.out).name}
    log = Log()
    run(request_, log)
    assert log.left == len(log.units) == 3
    np.testing.assert_array_equal(values_of(request_), undisturbed.to_numpy())


def test_a_program_that_is_killed_goes_on(
    town: Path,
    tmp_path: Path,
    project: Path,
    undisturbed: xr.DataArray,
    command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    # A program of its own, killed without warning while it waits after its fourth unit.
    script = f"""
import sys, time
from pathlib import Path
import soundmap.layout
soundmap.layout._MOST_UNIT_CELLS = soundmap.layout._LEAST_UNIT_CELLS = {UNIT_CELLS}
from soundmap.api import Listener, Request, run

class Slow(Listener):
    count = 0
    def reported(self, report):
        self.count += 1
        if self.count == 4:
            print("now", flush=True)
            time.sleep(60)

run(Request(Path(sys.argv[2]), sys.argv[1], concepts={CONCEPTS!r}), Slow())
"""
    out = tmp_path / "map.tif"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(town), str(out)],
        cwd=project,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    assert [p.name for p in tmp_path.iterdir()] == [work_path(out).name]
    result = command("predict", "--imagery", town, "--concepts", ",".join(CONCEPTS), "--out", out)
    assert result.returncode == 0
    assert "Going on: 4 units were done before" in result.stderr
    values = soundmap.open(out)["probability"].to_numpy()
    np.testing.assert_array_equal(values, undisturbed.to_numpy())


def test_ctrl_c_says_how_to_go_on(
    command: Callable[..., subprocess.CompletedProcess[str]],
    town: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(self: object, report: UnitReport) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("soundmap.cli.progress.ConsoleListener.reported", interrupt)
    result = command("predict", "--quiet", "--imagery", town, "--out", tmp_path / "map.zarr")
    assert result.returncode == 130
    # Below the ^C that the terminal shows.
    assert result.stderr.strip().count("\n") == 0
    assert "the same command goes on from there" in result.stderr

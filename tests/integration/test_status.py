"""`soundmap status` tells how far a map is, and `soundmap predict MAP` goes on with it."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from odc.geo.geobox import GeoBox

import soundmap
from soundmap.api import Listener, Request, run
from soundmap.errors import InputError, OutputError, PlanMismatch, RunFailed, SourceError
from soundmap.runner import UnitReport
from soundmap.sources.base import Image
from soundmap.sources.raster import RasterSource
from soundmap.stores.run_state import run_state
from soundmap.stores.work import work_path

Command = Callable[..., "subprocess.CompletedProcess[str]"]

CONCEPTS = "birdsong,road traffic"
pytestmark = pytest.mark.usefixtures("small_units")

# The raster of 32 x 24 cells becomes 4 x 3 units.
UNITS = 12


@pytest.fixture(scope="module")
def undisturbed(town: Path) -> xr.DataArray:
    return soundmap.predict(town, concepts=CONCEPTS)


class Stop(Listener):
    def __init__(self, after: int) -> None:
        self.after = after

    def reported(self, report: UnitReport) -> None:
        self.after -= 1
        if not self.after:
            raise KeyboardInterrupt


def stopped(out: Path, town: Path, after: int = 5) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Request(out=out, imagery=str(town), concepts=CONCEPTS), Stop(after))


def failing(monkeypatch: pytest.MonkeyPatch, rows: set[int], reason: str) -> None:
    """Fail every read of imagery for some rows of units."""
    read = RasterSource.read

    def tired(self: RasterSource, grid: GeoBox) -> Image:
        bounds = grid.boundingbox
        # Metres below the raster's upper edge; a unit has 8 cells of 80 m.
        if int((5_500_000 - (bounds.top + bounds.bottom) / 2) / 640) in rows:
            raise SourceError(reason)
        return read(self, grid)

    monkeypatch.setattr(RasterSource, "read", tired)


@pytest.mark.parametrize("name", ["map.tif", "map.zarr"])
def test_a_stopped_run_is_told_and_gone_on_with(
    command: Command,
    town: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: xr.DataArray,
    name: str,
) -> None:
    # Begun in one folder, with a relative name, and gone on with from another.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    relative = Path(os.path.relpath(town))
    stopped(Path(name), relative)
    monkeypatch.chdir(tmp_path)
    out = Path("here") / name

    for asked in (out, work_path(out)):
        state = json.loads(command("status", asked, "--json").stdout)
        assert (state["units"], state["done"], state["left"]) == (UNITS, 5, UNITS - 5)
        assert (state["finished"], state["running"], state["failed"]) == (False, False, [])
        assert state["pace"]["computed"] == 5
        assert state["pace"]["starts"] == 1
        assert 0 < state["seconds_left"] < 100 * state["pace"]["unit_seconds"]
    text = command("status", out).stdout
    assert "done  5" in text
    assert "time left" in text
    assert f"soundmap predict {out}" in text
    with pytest.raises(InputError, match=r"not finished: `soundmap predict .*here"):
        soundmap.open(out)

    result = command("predict", out)
    assert result.returncode == 0, result.stderr
    assert "Going on: 5 units were done before" in result.stderr
    values = soundmap.open(out)["probability"].to_numpy()
    np.testing.assert_array_equal(values, undisturbed.to_numpy())
    assert [entry.name for entry in (tmp_path / "here").iterdir() if entry.suffix != ".qml"] == [
        name
    ]
    assert command("status", out).stdout == f"{out}: finished\n"


def test_failed_units_are_listed_with_their_reasons(
    command: Command, town: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "map.zarr"
    request = Request(out=out, imagery=str(town), concepts=CONCEPTS)
    with monkeypatch.context() as patch:
        failing(patch, {1}, "town.tif: the disk\nis tired " + "x" * 3000)
        with pytest.raises(RunFailed):
            run(request)
    state = run_state(out)
    assert state.left == 0
    assert [unit.index[0] for unit in state.failed] == [1] * 4
    assert state.done == UNITS - 4
    for unit in state.failed:
        assert unit.reason.startswith("town.tif: the disk is tired x")
        assert len(unit.reason) <= 500
    text = command("status", out).stdout
    assert "failed  4" in text
    assert "(1, 2)  town.tif: the disk is tired" in text
    # What was tried again and came right is no failure any more.
    sounds = soundmap.resume(out)
    assert sounds.dims == ("concept", "y", "x")
    assert not sounds.isnull().any()
    assert command("status", out).stdout == f"{out}: finished\n"


def test_the_recorded_run_is_not_to_be_changed(
    command: Command, town: Path, tmp_path: Path
) -> None:
    out = tmp_path / "map.tif"
    stopped(out, town)
    result = command("predict", out, "--text", "bells", "--dtype", "uint8")
    assert result.returncode == 2
    assert "--text, --dtype" in result.stderr
    assert result.stderr.count("\n") == 1
    assert command("predict", out, "--out", "other.tif").returncode == 2
    assert run_state(out).done == 5


def test_what_is_not_there_or_finished_is_said(
    command: Command, town: Path, tmp_path: Path
) -> None:
    for verb in ("status", "predict"):
        result = command(verb, tmp_path / "map.tif")
        assert result.returncode == 1
        assert "no unfinished run" in result.stderr or "no map and no unfinished" in result.stderr
        assert result.stderr.count("\n") == 1
    assert command("status", town).returncode == 1
    assert "not a soundmap map" in command("status", town).stderr
    run(Request(out=tmp_path / "map.zarr", imagery=str(town), concepts=CONCEPTS))
    result = command("predict", tmp_path / "map.zarr")
    assert result.returncode == 1
    assert "is finished" in result.stderr
    assert command("predict").returncode == 2


def test_going_on_never_throws_work_away(
    town: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Begun with --overwrite, which would start anew where anything differs.
    out = tmp_path / "map.tif"
    request = Request(out=out, imagery=str(town), concepts=CONCEPTS, overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        run(request, Stop(5))
    monkeypatch.setattr("soundmap.layout._MOST_UNIT_CELLS", 16)
    monkeypatch.setattr("soundmap.layout._LEAST_UNIT_CELLS", 16)
    with pytest.raises(PlanMismatch, match="--overwrite"):
        soundmap.resume(out)
    assert run_state(out).done == 5


def test_two_runs_on_one_map_are_kept_apart(
    command: Command, town: Path, tmp_path: Path, undisturbed: xr.DataArray
) -> None:
    out = tmp_path / "map.zarr"
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Listener):
        def reported(self, report: UnitReport) -> None:
            begun.set()
            assert go_on.wait(60)

    request = Request(out=out, imagery=str(town), concepts=CONCEPTS)
    first = threading.Thread(target=run, args=(request, Slow()))
    first.start()
    try:
        assert begun.wait(60)
        for other in (request, Request(out=out, imagery="sample", overwrite=True)):
            with pytest.raises(OutputError, match="another run is writing it"):
                run(other)
        assert run_state(out).running
        assert "being made now" in command("status", out).stdout
    finally:
        go_on.set()
        first.join()
    np.testing.assert_array_equal(
        soundmap.open(out)["probability"].to_numpy(), undisturbed.to_numpy()
    )

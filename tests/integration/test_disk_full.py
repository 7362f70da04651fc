"""A full disk, one that was taken away, one that is read-only: a clear end, and nothing is lost.

With real file systems: a small tmpfs that the test mounts, which only root may. Elsewhere the tests
are skipped.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox

import soundmap
from soundmap.api import Listener, Request, run
from soundmap.errors import OutputError
from soundmap.estimate import Estimate
from soundmap.layout import Layout
from soundmap.plan import Plan
from soundmap.runner import UnitReport
from soundmap.stores.geotiff import export_cog
from soundmap.stores.run_state import run_state
from soundmap.stores.zarr_store import create
from soundmap.testing.fake_map import fake_schema

Command = Callable[..., "subprocess.CompletedProcess[str]"]

CONCEPTS = "birdsong,road traffic"
pytestmark = pytest.mark.usefixtures("small_units")

# The raster of 32 x 24 cells becomes 4 x 3 units.
UNITS = 12


SCHEMA = replace(
    fake_schema(),
    grid=GeoBox((700, 800), Affine(10, 0, 500_000, 0, -10, 5_500_000), "EPSG:32633"),
    chunk_cells=800,
)


@pytest.fixture(scope="module")
def undisturbed(town: Path) -> xr.DataArray:
    return soundmap.predict(town, concepts=CONCEPTS)


def system(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    if not shutil.which("mount") or os.geteuid():
        pytest.skip("only root may mount a small disk")
    try:
        system("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no disk can be mounted here: {error.stderr.strip()}")
    try:
        yield path
    finally:
        # A test may have taken it away itself.
        subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)


def fill_up(disk: Path) -> Path:
    """Fill a disk to the last byte, and return what fills it."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(b"\0" * size) == size:
                    pass
            except OSError:
                continue
    return ballast


class Then(Listener):
    """Does something at a moment of a run."""

    def __init__(
        self, action: Callable[[], object], *, after: int = 0, at_export: bool = False
    ) -> None:
        self.action = action
        self.after = after
        self.at_export = at_export
        self.left = 0

    def planned(self, plan: Plan, cost: Estimate, layout: Layout, left: int) -> None:
        self.left = left

    def reported(self, report: UnitReport) -> None:
        self.after -= 1
        if not self.after:
            self.action()

    def exporting(self) -> None:
        if self.at_export:
            self.action()


def values_of(path: Path) -> np.ndarray:
    return soundmap.open(path)["probability"].to_numpy()


@pytest.mark.parametrize("name", ["map.tif", "map.zarr"])
def test_full_in_the_middle_of_a_run(
    disk: Path, town: Path, undisturbed: xr.DataArray, command: Command, name: str
) -> None:
    out = disk / name
    request = Request(out=out, imagery=str(town), concepts=CONCEPTS)
    with pytest.raises(OutputError, match=r"No space left on device.*make room") as caught:
        run(request, Then(lambda: fill_up(disk), after=4))
    assert "\n" not in str(caught.value)
    assert not out.exists()
    state = run_state(out)
    # The unit at which it was seen is not among them.
    assert 4 <= state.done < UNITS
    assert not state.failed

    # Still full: the same end at once, and what is done stays done.
    result = command("predict", out, "--quiet")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "free there" in result.stderr or "No space left" in result.stderr
    assert run_state(out).done == state.done

    (disk / "ballast").unlink()
    log = Then(lambda: None)
    run(request, log)
    assert log.left == UNITS - state.done
    np.testing.assert_array_equal(values_of(out), undisturbed.to_numpy())
    assert {entry.name for entry in disk.iterdir()} <= {name, "map.qml"}


@pytest.mark.parametrize("name", ["map.tif", "map.zarr"])
def test_full_in_the_middle_of_the_export(
    disk: Path, town: Path, undisturbed: xr.DataArray, name: str
) -> None:
    out = disk / name
    request = Request(out=out, imagery=str(town), concepts=CONCEPTS)
    run(request)
    older = values_of(out)
    other = dataclasses.replace(request, concepts=CONCEPTS.split(",")[::-1], overwrite=True)
    with pytest.raises(OutputError, match=r"No space left|could not be written") as caught:
        run(other, Then(lambda: fill_up(disk), at_export=True))
    assert "\n" not in str(caught.value)
    # The older map is as it was, and all of the new one's work is kept.
    np.testing.assert_array_equal(values_of(out), older)
    assert run_state(out).done == UNITS
    (disk / "ballast").unlink()
    log = Then(lambda: None)
    run(other, log)
    assert log.left == 0
    np.testing.assert_array_equal(values_of(out), undisturbed.to_numpy()[::-1])
    assert {entry.name for entry in disk.iterdir()} <= {name, "map.qml"}


def test_an_export_that_fits_by_half(disk: Path, town: Path, undisturbed: xr.DataArray) -> None:
    # However much room there is, the file is whole or the export says no.
    out = disk / "map.tif"
    request = Request(out=out, imagery=str(town), concepts=CONCEPTS)
    outcomes = set()
    for spare in (0, 4096, 8192, 16384, 32768, 65536):

        def leave(room: int = spare) -> None:
            ballast = fill_up(disk)
            os.truncate(ballast, ballast.stat().st_size - room)

        try:
            run(request, Then(leave, at_export=True))
            np.testing.assert_array_equal(values_of(out), undisturbed.to_numpy())
            outcomes.add("whole")
            break
        except OutputError:
            outcomes.add("refused")
            assert not out.exists()
        finally:
            (disk / "ballast").unlink(missing_ok=True)
    assert outcomes == {"refused", "whole"}


def test_overviews_that_do_not_fit(
    disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # GDAL raises errors of another class here, and libtiff prints a line for each block.
    store = create(tmp_path / "map.zarr", SCHEMA, (1, 1))
    values = np.random.default_rng(0).random(SCHEMA.shape, dtype=np.float32)
    store.write(0, 0, values)
    store.finish()
    out = disk / "map.tif"
    for spare in (1 << 15, 1 << 18, 1 << 20, 3 << 20):
        ballast = fill_up(disk)
        os.truncate(ballast, ballast.stat().st_size - spare)
        with pytest.raises(OutputError, match=r"map\.tif: .*No space left.*make room") as caught:
            export_cog(store, out)
        assert "\n" not in str(caught.value)
        ballast.unlink()
        assert list(disk.iterdir()) == []
    assert capfd.readouterr().err == ""
    system("mount", "-o", "remount,size=64m", disk)
    export_cog(store, out)
    with rasterio.open(out) as dataset:
        np.testing.assert_array_equal(dataset.read(), store.read())


def test_a_disk_that_is_taken_away(disk: Path, town: Path, undisturbed: xr.DataArray) -> None:
    out = disk / "map.zarr"
    request = Request(out=out, imagery=str(town), concepts=CONCEPTS)
    kept = disk.parent / "kept"
    kept.mkdir()

    def take_away() -> None:
        # Kept under another name, as a network mount is kept by its server.
        system("mount", "--bind", disk, kept)
        system("umount", "-l", disk)

    try:
        with pytest.raises(OutputError, match="put it back") as caught:
            run(request, Then(take_away, after=4))
        assert "\n" not in str(caught.value)
        # Nothing goes on in the folder that was below the disk.
        assert list(disk.iterdir()) == []
        system("mount", "--bind", kept, disk)
        log = Then(lambda: None)
        run(request, log)
        assert 0 < log.left <= UNITS - 3
        np.testing.assert_array_equal(values_of(out), undisturbed.to_numpy())
    finally:
        subprocess.run(["umount", "-l", str(kept)], check=False, capture_output=True)
        subprocess.run(["umount", "-l", str(disk)], check=False, capture_output=True)


def test_a_disk_that_becomes_read_only(disk: Path, town: Path, undisturbed: xr.DataArray) -> None:
    out = disk / "map.zarr"
    request = Request(out=out, imagery=str(town), concepts=CONCEPTS)

    def close() -> None:
        # A second mount over the first, since files that are open for writing forbid to change it.
        system("mount", "--bind", disk, disk)
        system("mount", "-o", "remount,bind,ro", disk)

    with pytest.raises(OutputError, match="Read-only file system") as caught:
        run(request, Then(close, after=4))
    assert "\n" not in str(caught.value)
    done = run_state(out).done
    with pytest.raises(OutputError, match="Read-only file system"):
        run(request)
    system("umount", disk)
    log = Then(lambda: None)
    run(request, log)
    assert log.left == UNITS - done
    np.testing.assert_array_equal(values_of(out), undisturbed.to_numpy())

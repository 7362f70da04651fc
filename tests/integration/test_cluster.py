"""Units computed by a Dask cluster, whose workers come and go, make the same map."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import rasterio

import soundmap
from soundmap.errors import SoundmapError
from soundmap.stores.work import work_path

if TYPE_CHECKING:
    from tests.integration.conftest import Stage, Undisturbed

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_MOST_UNIT_CELLS", "_LEAST_UNIT_CELLS"):
        monkeypatch.setattr(f"soundmap.layout.{name}", 8)


@pytest.mark.usefixtures("small_units")
def test_processes_started_here(
    command: Command, town: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    options = ["--concepts", "birdsong,road traffic", "--workers", 2]
    result = command("predict", "--imagery", town, *options, "--out", tmp_path / "map.tif")
    assert result.returncode == 0, result.stderr
    assert "12 units" in result.stderr
    assert "Traceback" not in result.stderr
    values = soundmap.open(tmp_path / "map.tif")["probability"].to_numpy()
    np.testing.assert_array_equal(values, undisturbed.values)
    assert {p.name for p in tmp_path.iterdir()} == {"map.tif", "map.qml"}


def test_one_worker_or_four_make_the_same_bytes(stage: Stage, undisturbed: Undisturbed) -> None:
    """In one process, in one of a cluster with two threads, in four with one each."""
    stage.start_cluster(0)
    stage.start_worker(threads=2)
    stage.finish()
    assert len(stage.processes_seen()) == 1
    stage.check(undisturbed.files)
    stage.begin_anew()
    stage.start_cluster(4)
    stage.finish()
    assert len(stage.processes_seen()) == 4
    stage.check(undisturbed.files)


def test_workers_join_and_leave(stage: Stage, undisturbed: Undisturbed) -> None:
    stage.start_cluster(1)
    stage.hold.touch()
    client = stage.client()
    stage.wait_for(lambda: stage.computed())
    joins = stage.start_worker()
    stage.wait_for(lambda: len(stage.processes_seen()) == 2)
    stage.kill(stage.workers[0], again=1)
    stage.hold.unlink()
    client.join(stage.PATIENCE_SECONDS)
    assert client.exitcode == 0, stage.log
    assert stage.processes_seen() == {stage.workers[0].pid, joins.pid}
    stage.check(undisturbed.files)


def test_a_run_whose_last_worker_left_waits_for_another(
    stage: Stage, undisturbed: Undisturbed
) -> None:
    stage.start_cluster(1)
    patient = stage.client(patience_s=60, quiet=False)
    stage.wait_for(lambda: stage.computed())
    stage.kill(stage.workers[0], again=1)
    note = "no worker is left: waiting up to 1 min for another"
    stage.wait_for(lambda: note in " ".join(stage.log.split()))
    stage.start_worker()
    patient.join(stage.PATIENCE_SECONDS)
    assert patient.exitcode == 0, stage.log
    stage.check(undisturbed.files)


def test_a_run_without_workers_gives_up_and_can_go_on(
    stage: Stage, undisturbed: Undisturbed
) -> None:
    stage.start_cluster(1)
    client = stage.client(patience_s=1)
    stage.wait_for(lambda: stage.computed().total() > 2)
    stage.kill(stage.workers[0], again=1)
    client.join(stage.PATIENCE_SECONDS)
    assert client.exitcode == 1
    assert stage.log.count("\n") == 1
    assert "has had no worker for 1 s: start some; what is done is kept" in stage.log
    stage.start_worker()
    stage.finish()
    stage.check(undisturbed.files)


def test_units_go_to_the_workers_that_declare_a_gpu(stage: Stage, undisturbed: Undisturbed) -> None:
    stage.start_cluster(1)
    gpu = stage.start_worker(GPU=1.0)
    stage.wait_for(lambda: stage.present("worker") == 2)
    stage.finish()
    assert stage.processes_seen() == {gpu.pid}
    stage.check(undisturbed.files)


def test_two_runs_on_one_cluster_keep_apart(stage: Stage, undisturbed: Undisturbed) -> None:
    stage.start_cluster(2)
    other = stage.folder / "other.zarr"
    clients = [stage.client(), stage.client("--value", "share", out=other)]
    for client in clients:
        client.join(stage.PATIENCE_SECONDS)
        assert client.exitcode == 0, stage.log
    assert stage.files(stage.out) == undisturbed.files
    shares = soundmap.open(other)["share"].to_numpy()
    np.testing.assert_allclose(shares.sum(axis=0), 1, atol=1e-3)
    assert stage.computed().total() == 2 * stage.UNITS


def test_the_job_goes_to_each_worker_once(stage: Stage, undisturbed: Undisturbed) -> None:
    arrivals = stage.folder / "arrivals"
    stage.watch += f"""
from soundmap.sources.raster import RasterSource
arrive = RasterSource.__setstate__

def arriving(self, state):
    with open({str(arrivals)!r}, "a") as file:
        file.write(f"{{os.getpid()}}\\n")
    arrive(self, state)

RasterSource.__setstate__ = arriving
"""
    stage.start_cluster(2)
    stage.finish()
    assert sorted(map(int, arrivals.read_text().split())) == sorted(w.pid for w in stage.workers)
    stage.check(undisturbed.files)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
def test_a_stopped_client_leaves_nobody_writing(
    stage: Stage, undisturbed: Undisturbed, number: signal.Signals, code: int
) -> None:
    stage.start_cluster(2)
    client = stage.client()
    stage.wait_for(lambda: stage.computed().total() > 3)
    # What is under way does not end before the client is gone.
    stage.hold.touch()
    assert client.pid is not None
    subprocess.run(["kill", f"-{int(number)}", str(client.pid)], check=True)
    client.join(stage.PATIENCE_SECONDS)
    assert client.exitcode == code, stage.log
    # A terminal that shows ^C gets a line's end first.
    said = stage.log.strip()
    assert said == "Stopped. What is done is kept: the same command goes on from there."
    work = work_path(stage.out)
    before = {p: p.stat().st_mtime_ns for p in work.rglob("*")}
    stage.hold.unlink()
    time.sleep(3 * stage.UNIT_SECONDS)
    assert {p: p.stat().st_mtime_ns for p in work.rglob("*")} == before
    stage.allowed_again = 2
    # The same workers serve the next.
    stage.finish()
    stage.check(undisturbed.files)


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


def test_a_failed_unit_is_reported_and_the_rest_is_kept(stage: Stage, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.tif"
    with rasterio.open(stage.imagery) as dataset:
        # The last tile, which the last unit and its neighbours read.
        offset = int(dataset.get_tag_item("BLOCK_OFFSET_3_2", "TIFF", bidx=1))
    data = bytearray(stage.imagery.read_bytes())
    data[offset : offset + 64] = bytes(64)
    damaged.write_bytes(data)
    stage.imagery = damaged
    said = []
    for cluster in (False, True):
        if cluster:
            stage.start_cluster(1)
        before = len(stage.log)
        client = stage.client()
        client.join(stage.PATIENCE_SECONDS)
        assert client.exitcode == 1
        said.append(stage.log[before:])
        assert said[-1].startswith("Error: ")
        assert said[-1].count("\n") == 1
        assert "of 12 units could not be computed" in said[-1]
        assert "damaged.tif" in said[-1]
        # No map, but what was done, hidden, for the next try.
        assert [p.name for p in stage.out.parent.iterdir()] == [work_path(stage.out).name]
    assert said[0].split(" units")[0] == said[1].split(" units")[0]
    assert len(stage.computed()) >= 8

"""What a run writes down about itself, and how it is kept apart from others."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from odc.geo.geobox import GeoBox

from soundmap.errors import OutputError, PlanMismatch
from soundmap.request import Request, record, recorded
from soundmap.stores import place
from soundmap.stores.ledger import Ledger, read_job, read_pace, read_reasons
from soundmap.stores.lock import RunLock, is_running
from soundmap.stores.run_state import run_state
from soundmap.stores.work import Work, begin, complete, work_path
from soundmap.stores.zarr_store import Status, create, open_store
from soundmap.testing.fake_map import fake_schema

SCHEMA = replace(
    fake_schema(),
    grid=GeoBox((70, 90), Affine(140, 0, 500_000, 0, -140, 4_300_000), "EPSG:32629"),
    extra={"settings": json.dumps({"value": "probability", "model": "small 1234"})},
)
UNITS = (3, 3)
WORK = Work(SCHEMA, UNITS, job={"units": 7, "request": {"imagery": "town.tif"}})


def test_reasons_are_one_line_of_bounded_length(tmp_path: Path) -> None:
    store = create(tmp_path / "a.zarr", SCHEMA, UNITS)
    store.mark((0, 1), Status.FAILED, "the disk\n\n  is tired\t" + "é" * 9999)
    store.mark((2, 2), Status.FAILED)
    store.mark((1, 1), Status.FAILED, "first")
    store.mark((1, 1), Status.FAILED, "then this")
    first, second, third, none = read_reasons(store.path, [(0, 1), (2, 2), (1, 1), (0, 0)])
    assert first.startswith("the disk is tired é")
    assert len(first) == 500
    assert (second, third, none) == ("no reason was given", "then this", "")


def test_a_mark_costs_the_same_at_the_last_unit_as_at_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Counted in bytes of files written, which is what grows if a file does.
    side = 400
    grid = GeoBox((side * 16, side * 16), Affine(10, 0, 0, 0, -10, 0), "EPSG:32629")
    schema = dataclasses.replace(SCHEMA, grid=grid, chunk_cells=16)
    store = create(tmp_path / "a.zarr", schema, (side, side))
    written: list[int] = []

    replace = os.replace

    def counted(source: Path, target: Path) -> None:
        written.append(os.stat(source).st_size)
        replace(source, target)

    monkeypatch.setattr(os, "replace", counted)

    def cost(rows: range) -> int:
        written.clear()
        for row in rows:
            store.mark((row, row), Status.FAILED, "x" * 100, seconds=1.0, cells=256)
        return sum(written)

    early, late = cost(range(40)), cost(range(side - 40, side))
    assert early > 0
    assert late <= 1.5 * early
    # A row of chunks of the status, a reason, and at times the pace.
    assert late / 40 < 8192


def test_pace_is_summed_over_starts_and_leaves_empty_units_out(tmp_path: Path) -> None:
    store = create(tmp_path / "a.zarr", SCHEMA, UNITS)
    for start in (1, 2):
        ledger = Ledger(store.path)
        time.sleep(0.05)
        ledger.count(computed=True, failed=False, seconds=3.0, cells=1024)
        ledger.count(computed=False, failed=False, seconds=0.1, cells=1024)
        ledger.count(computed=False, failed=True, seconds=2.0, cells=1024)
        ledger.save()
        pace = read_pace(store.path)
        assert (pace.starts, pace.computed, pace.empty, pace.failed) == (start,) * 4
        assert pace.cells == 1024 * start
        assert pace.unit_seconds == pytest.approx(5.1 * start)
        assert pace.wall_seconds >= 0.05 * start
        assert pace.seconds_per_unit == pytest.approx(pace.wall_seconds / start)


def test_state_counts_the_units_of_the_plan_not_those_of_the_grid(tmp_path: Path) -> None:
    target = tmp_path / "map.zarr"
    with begin(target, WORK, overwrite=False) as store:
        store.mark((0, 0), Status.DONE, seconds=2.0, cells=1024)
        store.mark((0, 1), Status.EMPTY)
        store.mark((0, 2), Status.FAILED, "tired")
        state = run_state(target)
        assert state.running
    state = run_state(target)
    assert (state.units, state.done, state.empty, state.left) == (7, 1, 1, 4)
    assert [(unit.index, unit.reason) for unit in state.failed] == [((0, 2), "tired")]
    assert not state.running
    # What failed is tried again: five units, each at the pace of the one that was computed.
    assert state.seconds_left == pytest.approx(5 * state.pace.wall_seconds)


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"computed": 1, "more": 2}'])
def test_damaged_notes_are_read_as_none(tmp_path: Path, damage: str) -> None:
    store = create(tmp_path / "a.zarr", SCHEMA, UNITS)
    for name in ("job.json", "pace.json"):
        (tmp_path / "a.zarr" / ".soundmap" / name).write_text(damage)
    assert read_pace(store.path).starts == 0
    assert "request" not in read_job(store.path)


def test_a_run_keeps_others_off_until_it_ends(tmp_path: Path) -> None:
    target = tmp_path / "map.zarr"
    with begin(target, WORK, overwrite=False) as store:
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="another run"):
                begin(target, WORK, overwrite).__enter__()
        store.mark((0, 0), Status.DONE)
    with begin(target, WORK, overwrite=False) as store:
        assert store.status()[0, 0] == Status.DONE


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    store = create(tmp_path / "a.zarr", SCHEMA, UNITS)
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from soundmap.stores.lock import RunLock\n"
        "lock = RunLock(Path(sys.argv[1]), Path('map.zarr'))\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(store.path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert is_running(store.path)
        with pytest.raises(OutputError, match=r"map\.zarr: another run is writing it"):
            RunLock(store.path, Path("map.zarr"))
        process.kill()
    assert not is_running(store.path)
    RunLock(store.path, Path("map.zarr")).release()


def test_other_settings_are_named_with_what_they_were(tmp_path: Path) -> None:
    target = tmp_path / "map.zarr"
    with begin(target, WORK, overwrite=False):
        pass
    settings = {"value": "share", "model": "small 5678", "concepts": "a" * 64}
    other = dataclasses.replace(
        SCHEMA, fingerprint="beef", extra={"settings": json.dumps(settings)}
    )
    named = (
        r"another concepts, model \(small 1234 there, small 5678 now\), "
        r"value \(probability there, share now\): repeat"
    )
    with pytest.raises(PlanMismatch, match=named):
        begin(target, dataclasses.replace(WORK, schema=other), overwrite=False).__enter__()


def test_a_run_that_cannot_be_read_is_not_thrown_away(tmp_path: Path) -> None:
    target = tmp_path / "map.zarr"
    with begin(target, WORK, overwrite=False) as store:
        store.mark((0, 0), Status.DONE)
    attributes = work_path(target) / ".zattrs"  # type: ignore[operator]
    held = attributes.read_bytes()
    attributes.write_bytes(b"{}")
    with pytest.raises(OutputError, match="cannot be read"):
        begin(target, WORK, overwrite=False).__enter__()
    attributes.write_bytes(held)
    with begin(target, WORK, overwrite=False) as store:
        assert store.status()[0, 0] == Status.DONE
    attributes.write_bytes(b"{}")
    with begin(target, WORK, overwrite=True) as store:
        assert (store.status() == Status.PENDING).all()


def test_halves_of_files_are_swept_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "map.zarr"
    with begin(target, WORK, overwrite=False) as store:
        store.write(0, 0, np.ones((2, 32, 32), np.float32))
        chunks = work_path(target) / "probability" / "0" / "0"  # type: ignore[operator]
        (chunks / "0.3f6c.partial").write_bytes(b"half")
        (work_path(target) / ".zattrs.77aa.partial").write_bytes(b"half")  # type: ignore[operator]
        complete(store, target, overwrite=False)
    assert not list(target.rglob("*.partial"))
    assert open_store(target).read()[0, 0, 0] == 1


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    place.write_bytes(path, b"old")
    with pytest.raises(TypeError):
        place.write_bytes(path, "no bytes")  # type: ignore[arg-type]
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("notes", b"old")]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("city.zarr", Path("city.zarr")),
        ("a:b/city.zarr", Path("a:b/city.zarr")),
        ("s3://maps/city.zarr", "s3://maps/city.zarr"),
        ("S3://maps/a/city.zarr/", "s3://maps/a/city.zarr"),
        (Path("s3://maps/city.zarr"), "s3://maps/city.zarr"),
    ],
)
def test_addresses_and_paths_are_told_apart(given: str | Path, meant: str | Path) -> None:
    assert place.located(given) == meant
    assert place.is_remote(given) == isinstance(meant, str)


def test_a_recorded_request_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("town.tif", "parks.gpkg", "bell.wav", "sample"):
        Path(name).touch()
    request = Request(
        out="map.zarr",
        imagery="town.tif",
        region="parks.gpkg:north",
        bbox=(1.5, 2.25, 0.1, 4.0),
        concepts=("birdsong", "wind"),
        text=("bells",),
        audio=("bell=bell.wav", "other.wav"),
        month=7,
        dtype="uint8",
        workers=3,
        scheduler="tcp://a:1",
    )
    job = {"units": 9, "request": json.loads(json.dumps(record(request, "soundmap-small")))}
    with begin(tmp_path / "map.zarr", dataclasses.replace(WORK, job=job), overwrite=False):
        pass
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = recorded("../map.zarr", workers=1)
    assert again == dataclasses.replace(
        request,
        out=Path("../map.zarr"),
        imagery=str(tmp_path / "town.tif"),
        region=f"{tmp_path / 'parks.gpkg'}:north",
        audio=(f"bell={tmp_path / 'bell.wav'}", "other.wav"),
        workers=1,
        scheduler=None,
    )
    monkeypatch.chdir(tmp_path)
    for word in ("sample", "tiles/*.tif", "https://example.org/a.tif"):
        held = record(dataclasses.replace(request, imagery=word), "soundmap-small")["imagery"]
        assert held == (str(tmp_path / word) if "*" in word else word)

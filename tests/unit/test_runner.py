"""Units pushed through: each reported once, failures kept apart, errors let through."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from affine import Affine
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from soundmap.concepts import bank_of
from soundmap.encoder.bank_files import Concept
from soundmap.errors import ModelError, OutputError, RunFailed, UsageError
from soundmap.layout import choose_layout
from soundmap.pipeline import Job
from soundmap.plan import make_plan
from soundmap.runner import UnitReport, check_workers, run_here, worker
from soundmap.runner.cluster import PATIENCE_VARIABLE, connect
from soundmap.runner.unit import Gate, Stopped, one_line
from soundmap.sources.base import Image, Resampling
from soundmap.sources.fake import FakeSource
from soundmap.stores.schema import MapSchema
from soundmap.stores.zarr_store import Status, ZarrStore, create
from soundmap.testing.fake_encoder import FakeEncoder

# 20 x 29 cells; units of 8 cells: 3 x 4, those at the far edges cut off.
SHAPE = (160, 232)
GRID = GeoBox(SHAPE, Affine(10, 0, 499_980, 0, -10, 5_600_040), "EPSG:32633")
UNITS = (3, 4)


@dataclass(frozen=True)
class Run:
    """A job with its parts, ready to run."""

    job: Job
    source: FakeSource
    encoder: FakeEncoder
    store: ZarrStore

    def here(self, on_report: Callable[[UnitReport], None] | None = None) -> list[UnitReport]:
        reports: list[UnitReport] = []
        run_here(self.job, self.job.plan.units, self.encoder, on_report or reports.append)
        return reports


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., Run]:
    def make(fail_on: Collection[int] = (), source: Any = None, name: str = "map") -> Run:
        pixels = np.random.default_rng(0).integers(0, 256, (3, *SHAPE), dtype=np.uint8)
        valid = np.ones(SHAPE, bool)
        # The unit in the middle of the second row has no imagery.
        valid[64:128, 128:192] = False
        source = source or FakeSource(pixels, GRID, valid, fail_on=fail_on)
        encoder = FakeEncoder(context_px=11, context=0.3)
        layout = choose_layout(source.info, encoder.spec, None)
        concepts = [Concept(n, "text", "#ff0000", (n,)) for n in ("rain", "wind")]
        bank = bank_of(encoder, concepts, None)
        schema = MapSchema(
            concepts=bank.names,
            groups=bank.groups,
            colours=bank.colours,
            calibrations=bank.calibration,
            value="similarity",
            formula="s . e",
            detail="patch",
            dtype="float32",
            grid=layout.grid,
            chunk_cells=8,
            model="fake",
            model_hash=encoder.id,
            imagery="fake",
            attribution="",
            licence="",
            gsd_m=10.0,
            software="soundmap",
            created="2026-01-02T03:04:05+00:00",
        )
        store = create(tmp_path / f"{name}.zarr", schema, UNITS)
        job = Job(
            plan=make_plan(layout.region, layout.grid, 8),
            source=source,
            model="fake",
            bank=bank,
            value="similarity",
            detail="patch",
            lattice=layout.lattice,
            gsd_m=layout.reading.gsd_m,
            told_gsd_m=layout.reading.told_m,
            store=str(store.path),
        )
        assert len(job.plan.units) == 12
        return Run(job, source, encoder, store)

    return make


Prepare = Callable[..., Run]


def test_every_unit_is_reported_once(prepare: Prepare) -> None:
    run = prepare()
    reports = run.here()
    reports.sort(key=lambda r: r.index)
    assert [r.index for r in reports] == [(r, c) for r in range(3) for c in range(4)]
    statuses = {r.index: r.status for r in reports}
    assert statuses.pop((1, 2)) == Status.EMPTY
    assert set(statuses.values()) == {Status.DONE}
    assert [r.cells for r in reports[:4]] == [64, 64, 64, 40]
    assert [r.cells for r in reports[8:]] == [32, 32, 32, 20]
    assert all(r.seconds >= 0 and not r.error for r in reports)
    values = run.store.read()
    missing = np.zeros(values.shape[1:], bool)
    missing[8:16, 16:24] = True
    np.testing.assert_array_equal(np.isnan(values).all(axis=0), missing)
    assert run.source.reads == 12


def test_data_are_stored_before_the_report(prepare: Prepare) -> None:
    run = prepare()
    seen: list[UnitReport] = []

    def on_report(report: UnitReport) -> None:
        assert threading.current_thread() is threading.main_thread()
        row, col = report.index
        block = run.store.read(slice(row * 8, row * 8 + 8), slice(col * 8, col * 8 + 8))
        assert np.isfinite(block).all() == (report.status == Status.DONE)
        seen.append(report)

    run.here(on_report)
    assert len(seen) == 12


@pytest.mark.parametrize("fail_on", [{1}, {2}, {12}, {3, 4, 9}, set(range(1, 13))])
def test_a_failed_read_fails_its_unit_alone(prepare: Prepare, fail_on: set[int]) -> None:
    whole = prepare(name="whole")
    whole.here()
    run = prepare(fail_on)
    reports = run.here()
    assert sorted(r.index for r in reports) == [(r, c) for r in range(3) for c in range(4)]
    failed = {r.index: r for r in reports if r.status == Status.FAILED}
    # Two units are read at once, so which of two neighbours fails is left open.
    assert len(failed) == len(fail_on)
    for report in failed.values():
        assert "was told to fail" in report.error
        assert "\n" not in report.error
    expected = whole.store.read()
    for row, col in failed:
        expected[:, row * 8 : row * 8 + 8, col * 8 : col * 8 + 8] = np.nan
    np.testing.assert_array_equal(run.store.read(), expected)


def test_failed_units_can_be_run_again(prepare: Prepare) -> None:
    run = prepare({2, 8})
    failed = [r.index for r in run.here() if r.status == Status.FAILED]
    again = [u for u in run.job.plan.units if u.index in failed]
    reports: list[UnitReport] = []
    run_here(run.job, again, run.encoder, reports.append)
    assert {(r.index, r.status) for r in reports} <= {
        (i, s) for i in failed for s in (Status.DONE, Status.EMPTY)
    }
    assert len(reports) == len(failed) == 2
    whole = prepare(name="whole")
    whole.here()
    np.testing.assert_array_equal(run.store.read(), whole.store.read())


def test_no_units(prepare: Prepare) -> None:
    run = prepare()
    reports: list[UnitReport] = []
    run_here(run.job, [], run.encoder, reports.append)
    assert not reports
    assert run.source.reads == 0


class FullDisk:
    """A store that takes some units and then no more."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.written: list[tuple[int, int]] = []

    def write(self, row0: int, col0: int, block: NDArray[np.float32]) -> None:
        if len(self.written) == self.room:
            raise OutputError("map.zarr: no space left on device: make room")
        self.written.append((row0 // 8, col0 // 8))


@pytest.mark.parametrize("room", [0, 1, 5, 10])
def test_write_errors_end_the_run(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """What is stored by then is reported, once, and nothing that is not."""
    run = prepare()
    disk = FullDisk(room)
    monkeypatch.setattr("soundmap.runner.here.open_store", lambda path, mode: disk)
    reports: list[UnitReport] = []
    with pytest.raises(OutputError, match="no space left"):
        run_here(run.job, run.job.plan.units, run.encoder, reports.append)
    assert sorted(r.index for r in reports if r.status == Status.DONE) == sorted(disk.written)
    assert len(disk.written) == room


@pytest.mark.parametrize("number", [1, 4, 12])
def test_errors_of_the_listener_end_the_run(prepare: Prepare, number: int) -> None:
    run = prepare()
    seen: list[tuple[int, int]] = []

    def on_report(report: UnitReport) -> None:
        seen.append(report.index)
        if len(seen) == number:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.here(on_report)
    assert len(set(seen)) == len(seen), "a unit was reported twice"


class Faulty(FakeSource):
    """Has a fault in its code, which shows in one read."""

    def read(self, grid: GeoBox, resampling: Resampling = "area") -> Image:
        if self.reads == 4:
            self.grids.append(grid)
            raise ZeroDivisionError("a fault\n  in two lines")
        return super().read(grid, resampling)


def test_other_errors_fail_their_unit_and_are_named(prepare: Prepare) -> None:
    """A fault that one unit meets is no reason to lose the others."""
    run = prepare(source=Faulty(np.zeros((3, *SHAPE), np.uint8), GRID))
    reports = run.here()
    failed = [r for r in reports if r.status == Status.FAILED]
    assert [r.error for r in failed] == ["ZeroDivisionError: a fault in two lines"]
    assert len({r.index for r in reports}) == len(reports) == 12


def test_encoder_errors_fail_their_units(prepare: Prepare) -> None:
    run = prepare()

    class Tired(FakeEncoder):
        def encode_images(self, *args: Any, **kwargs: Any) -> Any:
            if self.windows >= 3:
                raise MemoryError
            return super().encode_images(*args, **kwargs)

    reports: list[UnitReport] = []
    run_here(run.job, run.job.plan.units, Tired(context_px=11), reports.append)
    failed = [r for r in reports if r.status == Status.FAILED]
    assert {r.error for r in failed} == {"MemoryError: no more is known"}
    done = [r for r in reports if r.status == Status.DONE]
    # Two units are under way at once, so the third window and the fourth may be encoded together.
    assert 3 <= len(done) <= 4
    assert len(reports) == 12
    stored = np.isfinite(run.store.read()).all(axis=0)
    assert stored.sum() == sum(r.cells for r in done)


def test_a_wrong_model_ends_the_run(prepare: Prepare) -> None:
    run = prepare()

    class Damaged(FakeEncoder):
        def encode_images(self, *args: Any, **kwargs: Any) -> Any:
            raise ModelError("its weights are damaged")

    reports: list[UnitReport] = []
    with pytest.raises(ModelError, match="damaged"):
        run_here(run.job, run.job.plan.units, Damaged(context_px=11), reports.append)
    assert len(reports) <= 1


def test_long_reasons_are_cut() -> None:
    assert one_line(ValueError("a\n  b\t c")) == "a b c"
    assert len(one_line(ValueError("x" * 10_000))) == 300


def test_nothing_begins_to_write_once_the_gate_is_shut() -> None:
    gate = Gate()
    with gate:
        assert gate.writing
        gate.stop()
        # What had begun is known to be writing still.
        assert gate.writing
    assert not gate.writing
    with pytest.raises(Stopped), gate:
        raise AssertionError("was let in")
    assert not gate.writing


def test_an_interrupted_run_writes_no_more(prepare: Prepare) -> None:
    run = prepare()
    goes_on = threading.Event()

    class Slow(FakeEncoder):
        def encode_images(self, *args: Any, **kwargs: Any) -> Any:
            if self.windows >= 1:
                goes_on.wait(20)
            return super().encode_images(*args, **kwargs)

    seen: list[UnitReport] = []

    def on_report(report: UnitReport) -> None:
        seen.append(report)
        # The other unit ends once this one's interruption has been dealt with.
        threading.Timer(0.3, goes_on.set).start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_here(run.job, run.job.plan.units, Slow(context_px=11), on_report)
    assert goes_on.is_set(), "units go on after the run has ended"
    stored = np.isfinite(run.store.read()).all(axis=0)
    assert stored.sum() == sum(r.cells for r in seen)


def test_reading_does_not_run_ahead(prepare: Prepare) -> None:
    """Two units at once, so that what is held in memory does not grow with the map."""
    run = prepare()
    ahead: list[int] = []

    class Watched(FakeEncoder):
        def encode_images(self, *args: Any, **kwargs: Any) -> Any:
            ahead.append(run.source.reads - self.windows)
            return super().encode_images(*args, **kwargs)

    run_here(run.job, run.job.plan.units, Watched(context_px=11), lambda report: None)
    # Two under way, one that is being reported, and the unit without imagery, which has no window.
    assert max(ahead) <= 4


@pytest.fixture
def session(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Run, worker.Session]]]:
    sessions = []

    def make(**options: Any) -> tuple[Run, worker.Session]:
        run = prepare(**options)
        worker._encoder.cache_clear()
        monkeypatch.setattr(worker, "load_encoder", lambda *args, **kwargs: run.encoder)
        sessions.append(worker.Session(run.job, run.store, 1))
        return run, sessions[-1]

    yield make
    worker._encoder.cache_clear()
    for one in sessions:
        one.close()


MakeSession = Callable[..., tuple[Run, worker.Session]]


def test_a_worker_does_the_same(prepare: Prepare, session: MakeSession) -> None:
    here = prepare(name="here")
    expected = here.here()
    run, there = session(fail_on={3})
    reports = [there.compute(i, i + 1 if i < 11 else None) for i in range(12)]
    assert reports[2].status == Status.FAILED
    assert "was told to fail" in reports[2].error
    kept = [(r.index, r.status, r.cells) for r in expected if r.index != (0, 2)]
    assert [(r.index, r.status, r.cells) for r in reports if r.index != (0, 2)] == sorted(kept)
    values = here.store.read()
    values[:, :8, 16:24] = np.nan
    np.testing.assert_array_equal(run.store.read(), values)
    # What was read ahead was not read again.
    assert run.source.reads == 12


def test_a_worker_given_another_unit_than_it_read_ahead(session: MakeSession) -> None:
    run, there = session()
    there.compute(0, 1)
    report = there.compute(7, None)
    assert report.index == (1, 3)
    assert report.status == Status.DONE
    assert run.source.reads == 3
    assert np.isfinite(run.store.read(slice(8, 16), slice(24, 29))).all()


def test_a_worker_writes_into_no_other_run(session: MakeSession) -> None:
    run, there = session()
    there.compute(0, None)
    shutil.rmtree(run.store.path)
    with pytest.raises(RunFailed, match="removed meanwhile"):
        there.compute(1, None)
    assert not run.store.path.exists()
    schema = replace(run.store.schema, created="2026-01-02T03:04:06+00:00")
    anew = create(run.store.path, schema, UNITS)
    with pytest.raises(RunFailed, match="begun anew"):
        there.compute(1, None)
    assert np.isnan(anew.read()).all()


def test_another_model_on_a_worker_is_refused(
    session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, there = session()
    other = FakeEncoder(8, context_px=11)
    monkeypatch.setattr(worker, "load_encoder", lambda *args, **kwargs: other)
    with pytest.raises(ModelError, match="another model"):
        there.compute(0, None)


def test_a_stopped_session_computes_nothing(session: MakeSession) -> None:
    run, there = session()
    there.close()
    with pytest.raises(Stopped):
        there.compute(0, None)
    assert run.source.reads == 0


def test_threads_of_a_worker() -> None:
    cores = worker.usable_cores()
    assert worker.threads_of(1) == 1
    assert worker.threads_of(cores) == worker.threads_of(10 * cores) == cores


class TestCheckWorkers:
    most = 4 * (os.cpu_count() or 1)

    @pytest.mark.parametrize("workers", [None, 1, 2, most])
    def test_possible(self, workers: int | None) -> None:
        check_workers(workers, None)

    def test_scheduler_alone(self) -> None:
        check_workers(None, "tcp://127.0.0.1:8786")

    @pytest.mark.parametrize("workers", [0, -1, most + 1, 10**9])
    def test_impossible(self, workers: int) -> None:
        with pytest.raises(UsageError) as caught:
            check_workers(workers, None)
        assert str(caught.value) == (
            f"--workers {workers} is impossible here: give 1 to {self.most}"
        )

    def test_both(self) -> None:
        with pytest.raises(UsageError, match="give one of them"):
            check_workers(2, "tcp://127.0.0.1:8786")


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan"])
def test_an_impossible_patience_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, text)
    with pytest.raises(UsageError, match=PATIENCE_VARIABLE), connect(1, None):
        pass

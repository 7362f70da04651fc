"""Units pushed through: each reported once, failures kept apart, errors let through."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from affine import Affine
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

import soundmap.runner as runner
from soundmap.concepts import bank_of
from soundmap.encoder.bank_files import Concept
from soundmap.errors import OutputError, UsageError
from soundmap.layout import choose_layout
from soundmap.pipeline import Job
from soundmap.plan import make_plan
from soundmap.runner import UnitReport, check_workers, run_here
from soundmap.sources.base import Image
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
    monkeypatch.setattr(runner, "open_store", lambda path, mode: disk)
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


def test_other_errors_of_a_source_end_the_run(prepare: Prepare) -> None:
    """A fault in code is not an outage: it is not hidden in a report."""
    faulty = prepare()

    class Faulty(FakeSource):
        def read(self, grid: GeoBox) -> Image:
            if self.reads == 4:
                raise ZeroDivisionError("a fault")
            return super().read(grid)

    pixels = np.zeros((3, *SHAPE), np.uint8)
    run = replace(faulty, job=replace(faulty.job, source=Faulty(pixels, GRID)))
    reports: list[UnitReport] = []
    with pytest.raises(ZeroDivisionError, match="a fault"):
        run.here(reports.append)
    # All units before it were read, stored and reported.
    assert sorted(r.index for r in reports) == [(0, c) for c in range(4)]


def test_encoder_errors_end_the_run_after_what_is_stored(prepare: Prepare) -> None:
    run = prepare()

    class Tired(FakeEncoder):
        def encode_images(self, *args: Any, **kwargs: Any) -> Any:
            if self.windows >= 3:
                raise MemoryError
            return super().encode_images(*args, **kwargs)

    reports: list[UnitReport] = []
    tired = Tired(context_px=11)
    with pytest.raises(MemoryError):
        run_here(run.job, run.job.plan.units, tired, reports.append)
    # Two units are under way at once, so the third window and the fourth may be encoded together.
    assert {(0, 0), (0, 1)} <= {r.index for r in reports}
    assert 3 <= len(reports) <= 4
    stored = np.isfinite(run.store.read()).all(axis=0)
    assert stored.sum() == sum(r.cells for r in reports)


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


def test_a_worker_does_the_same(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    here = prepare(name="here")
    expected = here.here()
    run = prepare(fail_on={3})
    runner._encoder.cache_clear()
    monkeypatch.setattr(runner, "load_encoder", lambda model, threads, precision: run.encoder)
    reports = [runner._run_on_worker(run.job, i, 1) for i in range(12)]
    runner._encoder.cache_clear()
    assert reports[2].status == Status.FAILED
    assert "was told to fail" in reports[2].error
    kept = [(r.index, r.status, r.cells) for r in expected if r.index != (0, 2)]
    assert [(r.index, r.status, r.cells) for r in reports if r.index != (0, 2)] == sorted(kept)
    values = here.store.read()
    values[:, :8, 16:24] = np.nan
    np.testing.assert_array_equal(run.store.read(), values)


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

"""What a run is said to take, before it starts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from affine import Affine
from odc.geo.geobox import GeoBox

from soundmap.estimate import estimate, with_time
from soundmap.pipeline import Job, encode_unit, read_unit
from soundmap.plan import make_plan
from soundmap.region import Region, region_from_bbox, region_from_geobox
from soundmap.sources.fake import FakeSource
from soundmap.testing.fake_encoder import FakeEncoder
from soundmap.testing.fake_map import compute, make_job

METRIC = GeoBox((400, 600), Affine(10, 0, 500_000, 0, -10, 5_600_000), "EPSG:32633")
DEGREES = GeoBox((400, 600), Affine(1.6e-4, 0, 15, 0, -9e-5, 55), "EPSG:4326")


def job_on(grid: GeoBox, encoder: FakeEncoder, mask: Region | None = None, **options: Any) -> Job:
    pixels = np.random.default_rng(1).integers(0, 256, grid.shape, dtype=np.uint8)
    job = make_job(FakeSource(pixels, grid), encoder, **options)
    if mask is None:
        return job
    plan = job.plan
    return replace(job, plan=make_plan(plan.region, plan.grid, plan.unit_cells, {}, mask))


@pytest.mark.parametrize("context_px", [None, 11], ids=["whole windows", "local patches"])
@pytest.mark.parametrize("detail", ["patch", "image"])
@pytest.mark.parametrize("grid", [METRIC, DEGREES], ids=["metric", "warped"])
def test_windows_and_pixels_are_about_those_of_the_run(
    grid: GeoBox, detail: str, context_px: int | None
) -> None:
    encoder = FakeEncoder(4, context_px=context_px)
    job = job_on(grid, encoder, detail=detail, unit_cells=16)
    cost = estimate(job, encoder, "float32")
    compute(job, encoder)
    assert 0.6 * encoder.windows <= cost.windows <= 1.7 * encoder.windows
    assert isinstance(job.source, FakeSource)
    read_px = sum(math.prod(g.shape) for g in job.source.grids)
    # At the edge of imagery a warped unit is read once more, with what values are carried from.
    assert 0.3 * read_px <= cost.read_px <= 1.7 * read_px
    rows, cols = job.plan.grid.shape
    assert cost.cells == rows * cols
    assert cost.bytes_out == rows * cols * 4 * 4
    assert cost.bytes_packed < cost.bytes_out < cost.memory_bytes


def test_what_is_off_the_mask_is_not_counted() -> None:
    encoder = FakeEncoder(4)
    half = replace(region_from_bbox(14, 40, 15.0422, 60), clip=True)
    whole = estimate(job_on(METRIC, encoder, detail="image", unit_cells=8), encoder, "uint8")
    job = job_on(METRIC, encoder, half, detail="image", unit_cells=8)
    masked = estimate(job, encoder, "uint8")
    assert 0.4 * whole.windows < masked.windows < 0.7 * whole.windows
    assert 0.4 * whole.bytes_packed < masked.bytes_packed < 0.7 * whole.bytes_packed
    compute(job, encoder)
    assert 0.6 * encoder.windows <= masked.windows <= 1.7 * encoder.windows


def test_many_units_are_reckoned_from_some(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = FakeEncoder(4)
    job = job_on(DEGREES, encoder, unit_cells=2)
    some = estimate(job, encoder, "float32")
    assert some.units > 600
    monkeypatch.setattr("soundmap.estimate._COUNTED_UNITS", some.units)
    every = estimate(job, encoder, "float32")
    assert every != some
    assert every.windows == pytest.approx(some.windows, rel=0.05)
    assert every.bytes_out == some.bytes_out


def test_nothing_costs_nothing() -> None:
    encoder = FakeEncoder(4)
    job = job_on(METRIC, encoder, region_from_bbox(100, 0, 101, 1))
    cost = estimate(job, encoder, "float32")
    assert (cost.units, cost.cells, cost.windows, cost.bytes_out) == (0, 0, 0, 0)
    assert with_time(cost, job, encoder).seconds is None


def test_units_off_the_mask_are_never_read() -> None:
    encoder = FakeEncoder(4)
    for grid in (METRIC, replace_crs(METRIC)):
        plan = job_on(grid, encoder, unit_cells=8).plan
        # Land under one unit, and under less than half of the cells around it.
        corner = plan.grid.affine * Affine.translation(15.75, 7.75)
        around = GeoBox((1, 1), corner * Affine.scale(8.5), grid.crs)
        land = replace(region_from_geobox(around, "land"), clip=True)
        job = job_on(grid, encoder, land, unit_cells=8)
        assert {u.index for u in job.plan.units} == {(r, c) for r in (0, 1, 2) for c in (1, 2, 3)}
        for unit in job.plan.units:
            encode_unit(job, read_unit(job, unit, encoder), encoder)
        assert isinstance(job.source, FakeSource)
        # One read, or two where cells are warped: whether there is imagery, and the imagery.
        assert len(job.source.grids) == (1 if job.lattice else 2)


def replace_crs(grid: GeoBox) -> GeoBox:
    """A grid of as many pixels in degrees, over about the same place."""
    return GeoBox(grid.shape, Affine(1.4e-4, 0, 15.0, 0, -9e-5, 50.55), "EPSG:4326")

"""Plans: every cell of the region is in exactly one unit, wherever on the globe it lies."""

from __future__ import annotations

import math
import pickle
import time
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import shapely
from affine import Affine
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox

from soundmap.area import Area
from soundmap.errors import InputError, UsageError
from soundmap.grid import (
    cell_lonlat,
    local_metric_crs,
    project_lonlat,
    region_bounds,
    snap_grid,
    x_period,
)
from soundmap.plan import Plan, fingerprint_of, make_plan
from soundmap.region import Region, region_from_bbox, region_from_file, split_antimeridian

# Degrees, repeating maps (one with its edge elsewhere), true metres on the spot, both poles, and
# maps that the globe only fits on when torn.
SYSTEMS = [
    "EPSG:4326",
    "EPSG:3857",
    "local",
    "EPSG:3832",
    "EPSG:32661",
    "EPSG:32761",
    "EPSG:3035",
    "EPSG:8857",
    "+proj=geos +h=35785831 +lon_0=20 +sweep=y +datum=WGS84",
]


def times_planned(plan: Plan) -> NDArray[np.int64]:
    """How many units hold each cell, int64[H, W], having checked that units lie as they say."""
    count = np.zeros(plan.grid.shape, dtype=np.int64)
    side = plan.unit_cells
    previous = (-1, -1)
    for unit in plan.units:
        assert unit.index > previous
        previous = unit.index
        assert (unit.row0, unit.col0) == (unit.index[0] * side, unit.index[1] * side)
        assert unit.cells.shape == (unit.row1 - unit.row0, unit.col1 - unit.col0)
        assert 0 < unit.cells.shape[0] <= side
        assert 0 < unit.cells.shape[1] <= side
        a, b, c, d, e, f, *_ = plan.grid.affine
        at = (a * unit.col0 + b * unit.row0 + c, d * unit.col0 + e * unit.row0 + f)
        assert (unit.cells.affine.c, unit.cells.affine.f) == pytest.approx(at, rel=1e-12)
        assert unit.cells.crs == plan.grid.crs
        count[unit.row0 : unit.row1, unit.col0 : unit.col1] += 1
    return count


def cells_of_points(
    grid: GeoBox, lon: NDArray[np.float64], lat: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Row and column, int64[N, 2], of those places that lie on the grid."""
    assert grid.crs is not None
    xy = project_lonlat(grid.crs, lon, lat)
    period = x_period(grid.crs)
    if period:
        left = grid.boundingbox.left
        xy[:, 0] -= np.floor((xy[:, 0] - left) / period + 1e-9) * period
    a, _, c, _, e, f, *_ = grid.affine
    with np.errstate(invalid="ignore"):
        place = np.column_stack([(xy[:, 1] - f) / e, (xy[:, 0] - c) / a])
    # A hair off an edge, by rounding, is in the cell inside it.
    size = np.array(grid.shape)
    known = np.isfinite(place).all(axis=1)
    known &= (place > -1e-3).all(axis=1) & (place < size + 1e-3).all(axis=1)
    return np.clip(np.floor(place[known]), 0, size - 1).astype(np.int64)


def grid_over(region: Region, system: str, cells: float, anchor: float) -> GeoBox:
    """Grid of about ``cells`` along its longer side over a region."""
    west, south, east, north = region.geometry.bounds
    if system == "local":
        lon = 179.9 if west == -180 and east == 180 else (west + east) / 2
        crs = local_metric_crs(lon, (south + north) / 2)
    else:
        crs = CRS(system)
    try:
        bounds = region_bounds(region.geometry, crs)
    except InputError:
        assume(False)
    span = max(bounds.span_x, bounds.span_y)
    # Cells thinner than the digits of their coordinates cannot be told apart by anyone.
    digits = 1e-12 * max(abs(v) for v in bounds.bbox)
    return snap_grid(bounds, max(span / cells, 1e3 * digits, 1e-9), (anchor, -anchor))


@st.composite
def boxes(draw: st.DrawFn) -> tuple[float, float, float, float]:
    """Boxes anywhere: slivers, poles, the 180th meridian, the globe."""
    scale = st.floats(-9, math.log10(360)).map(lambda e: min(10**e, 360.0))
    width, height = draw(scale), min(draw(scale), 180.0)
    west = draw(
        st.one_of(
            st.floats(-180, 179.9), st.just(-180.0), st.floats(0, 1).map(lambda s: 180 - s * width)
        )
    )
    west = min(max(west, -180.0), 180 - 1e-9)
    width = min(width, 360 - west)
    south = draw(
        st.one_of(
            st.floats(-90, 90 - height),
            st.just(-90.0),
            st.just(90 - height),
            st.floats(0, 1).map(lambda s: -s * height),
        )
    )
    south = min(max(south, -90.0), 90 - height)
    return west, south, west + width, south + height


class TestEveryCellOnce:
    @settings(max_examples=150)
    @given(
        box=boxes(), system=st.sampled_from(SYSTEMS), cells=st.floats(1, 120),
        unit=st.integers(1, 40), anchor=st.floats(-1, 1),
    )  # fmt: skip
    @example(box=(177.0, -19.0, 183.0, -16.0), system="EPSG:4326", cells=60.0, unit=7, anchor=0.0)
    @example(box=(-180.0, -90.0, 180.0, 90.0), system="EPSG:4326", cells=90.0, unit=8, anchor=0.0)
    @example(box=(-180.0, -90.0, 180.0, 90.0), system="local", cells=90.0, unit=8, anchor=0.0)
    @example(box=(-180.0, -90.0, 180.0, 90.0), system="EPSG:3035", cells=90.0, unit=8, anchor=0.0)
    @example(box=(-180.0, 80.0, 180.0, 90.0), system="local", cells=90.0, unit=8, anchor=0.0)
    @example(box=(0.0, -90.0, 360.0, -70.0), system="EPSG:32761", cells=90.0, unit=9, anchor=0.5)
    @example(box=(0.0, 0.0, 1e-9, 10.0), system="EPSG:4326", cells=100.0, unit=10, anchor=0.0)
    def test_any_box_any_cell_any_unit(
        self, box: tuple[float, float, float, float], system: str, cells: float, unit: int,
        anchor: float,
    ) -> None:  # fmt: skip
        region = region_from_bbox(*box)
        grid = grid_over(region, system, cells, anchor)
        plan = make_plan(region, grid, unit)
        count = times_planned(plan)
        assert count.max() == 1  # never twice, and a region always has a unit
        assert (count[Area(region.geometry).mask(grid)] == 1).all()
        # Not only centres: any place in the box lies in a planned cell.
        share = np.array([0.01, 0.25, 0.5, 0.75, 0.99])
        lon, lat = np.meshgrid(
            box[0] + share * (box[2] - box[0]), box[1] + share * (box[3] - box[1])
        )
        at = cells_of_points(grid, lon.ravel(), lat.ravel())
        assert (count[at[:, 0], at[:, 1]] == 1).all()

    @settings(max_examples=100)
    @given(
        centre=st.tuples(
            st.one_of(st.floats(-180, 180), st.floats(-1, 1).map(lambda d: 180 + d)),
            st.one_of(st.floats(-85, 85), st.sampled_from([-88.0, 88.0])),
        ),
        radii=st.lists(st.floats(0.05, 1), min_size=3, max_size=12),
        size=st.floats(-3, 1.5).map(lambda e: 10**e), hole=st.booleans(),
        system=st.sampled_from(SYSTEMS), cells=st.floats(1, 120), unit=st.integers(1, 30),
        anchor=st.floats(-1, 1),
    )  # fmt: skip
    def test_any_polygon(
        self, centre: tuple[float, float], radii: list[float], size: float, hole: bool,
        system: str, cells: float, unit: int, anchor: float,
    ) -> None:  # fmt: skip
        angle = np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
        star = np.column_stack([np.cos(angle), np.sin(angle)]) * np.array(radii)[:, None] * size
        drawn = shapely.Polygon(star + centre, [star[::-1] * 0.4 + centre] if hole else None)
        geometry = split_antimeridian(shapely.make_valid(drawn))
        assume(geometry.area > 0)
        region = Region(geometry, "star", clip=True)
        grid = grid_over(region, system, cells, anchor)
        plan = make_plan(region, grid, unit)
        count = times_planned(plan)
        assert count.max() <= 1
        assert (count[Area(geometry).mask(grid)] == 1).all()
        if system != "EPSG:4326":
            return
        # In degrees it is plain which units the polygon touches: no other is planned.
        turns = [np.array([360.0 * k, 0.0]) for k in (-1, 0, 1)]
        around = shapely.union_all(
            [shapely.transform(geometry, lambda xy, by=by: xy + by) for by in turns]
        )
        reach = 1e-3 * grid.affine.a
        assert all(
            shapely.dwithin(around, shapely.box(*u.cells.boundingbox.bbox), reach)
            for u in plan.units
        )


class TestMasked:
    @settings(max_examples=60)
    @given(
        box=boxes(), system=st.sampled_from(SYSTEMS), cells=st.floats(1, 80),
        unit=st.integers(1, 20), west=st.floats(-180, 179), span=st.floats(0.01, 180),
        south=st.floats(-90, 80), height=st.floats(0.01, 100),
    )  # fmt: skip
    @example(
        box=(170.0, -20.0, 190.0, -10.0), system="EPSG:4326", cells=50.0, unit=6, west=175.0,
        span=10.0, south=-30.0, height=17.0,
    )  # fmt: skip
    @example(
        box=(-180.0, 60.0, 180.0, 90.0), system="EPSG:32661", cells=50.0, unit=6, west=-180.0,
        span=360.0, south=80.0, height=10.0,
    )  # fmt: skip
    def test_units_are_where_region_and_mask_both_are(
        self, box: tuple[float, float, float, float], system: str, cells: float, unit: int,
        west: float, span: float, south: float, height: float,
    ) -> None:  # fmt: skip
        region = region_from_bbox(*box)
        mask = region_from_bbox(west, south, west + span, min(90, south + height))
        mask = replace(mask, clip=True)
        grid = grid_over(region, system, cells, 0.0)
        plan = make_plan(region, grid, unit, {}, mask)
        count = times_planned(plan)
        assert count.max(initial=0) <= 1
        both = Area(region.geometry).mask(grid) & Area(mask.geometry).mask(grid)
        # On an outline that is not both's own, rounding decides.
        sharp = shapely.buffer(shapely.intersection(region.geometry, mask.geometry), -1e-9)
        inside = Area(sharp).mask(grid) if not sharp.is_empty else np.zeros(grid.shape, bool)
        assert (count[inside] == 1).all()
        if plan.area is not None and len(plan.units):
            wanted = plan.area.mask(grid)
            assert (both | ~wanted).all()
            assert (count[wanted] == 1).all()
        # Nothing is planned that the region alone would not have.
        alone = {u.index for u in make_plan(region, grid, unit).units}
        assert {u.index for u in plan.units} <= alone

    def test_units_off_the_mask_are_left_out(self) -> None:
        grid = GeoBox((100, 100), Affine(0.01, 0, 4, 0, -0.01, 53), "EPSG:4326")
        region = region_from_bbox(4.0, 52.0, 4.35, 53.0)
        land = replace(region_from_bbox(4.25, 52.55, 5, 52.65), clip=True)
        plan = make_plan(region, grid, 10, {}, land)
        assert [unit.index for unit in plan.units] == [(3, 2), (3, 3), (4, 2), (4, 3)]
        assert plan.area is not None
        wanted = plan.area.mask(grid)
        assert wanted.sum() == 10 * 10
        assert wanted[35:45, 25:35].all()

    def test_region_and_mask_apart_leave_nothing(self) -> None:
        grid = GeoBox((100, 100), Affine(0.01, 0, 4, 0, -0.01, 53), "EPSG:4326")
        region = region_from_bbox(4.0, 52.0, 4.5, 53.0)
        for west in (4.5, 4.7):  # they share an edge; they do not meet
            land = replace(region_from_bbox(west, 52, 5, 53), clip=True)
            assert len(make_plan(region, grid, 10, {}, land).units) == 0


class TestTouching:
    def test_units_off_the_region_are_left_out(self) -> None:
        grid = GeoBox((100, 100), Affine(0.01, 0, 4, 0, -0.01, 53), "EPSG:4326")
        plan = make_plan(region_from_bbox(4.25, 52.55, 4.35, 52.65), grid, 10)
        assert [unit.index for unit in plan.units] == [(3, 2), (3, 3), (4, 2), (4, 3)]

    def test_a_shared_edge_is_no_touch(self) -> None:
        grid = GeoBox((100, 100), Affine(0.01, 0, 4, 0, -0.01, 53), "EPSG:4326")
        plan = make_plan(region_from_bbox(4.2, 52.5, 4.3, 52.6), grid, 10)
        assert [unit.index for unit in plan.units] == [(4, 2)]

    def test_a_sliver_on_a_shared_edge_is_not_lost(self) -> None:
        grid = GeoBox((100, 100), Affine(0.01, 0, 4, 0, -0.01, 53), "EPSG:4326")
        region = region_from_bbox(4.3, 52.5, 4.3 + 1e-12, 52.6)
        assert any(unit.index[1] in (2, 3) for unit in make_plan(region, grid, 10).units)

    def test_a_hole_is_left_out(self) -> None:
        ring = shapely.box(4, 52, 5, 53).difference(shapely.box(4.15, 52.15, 4.85, 52.85))
        grid = GeoBox((100, 100), Affine(0.01, 0, 4, 0, -0.01, 53), "EPSG:4326")
        plan = make_plan(Region(ring, "ring", clip=True), grid, 10)
        assert len(plan.units) == 100 - 36

    def test_a_region_off_the_grid_has_no_units(self) -> None:
        for crs, cell, x, y in (("EPSG:4326", 0.01, 4, 53), ("EPSG:32631", 1000, 5e5, 5.8e6)):
            grid = GeoBox((100, 100), Affine(cell, 0, x, 0, -cell, y), crs)
            assert len(make_plan(region_from_bbox(20, 40, 21, 41), grid, 10).units) == 0

    @pytest.mark.parametrize("left", [-183.0, 177.0, 537.0])
    def test_a_grid_beyond_180_meets_the_region_on_both_sides(self, left: float) -> None:
        grid = GeoBox((10, 60), Affine(0.1, 0, left, 0, -0.1, 1), "EPSG:4326")
        plan = make_plan(region_from_bbox(178, 0, -178, 1), grid, 10)
        assert [unit.index for unit in plan.units] == [(0, 1), (0, 2), (0, 3), (0, 4)]

    @pytest.mark.parametrize(("e", "f"), [(-10, 5_001_000), (10, 5_000_000)])
    def test_north_up_and_south_up_grids(self, e: float, f: float) -> None:
        grid = GeoBox((100, 100), Affine(10, 0, 500_000, 0, e, f), "EPSG:32633")
        corner = region_from_bbox(15.0, 45.153, 15.0012, 45.1538)  # north-western
        (unit,) = make_plan(corner, grid, 10).units
        lon, lat = cell_lonlat(unit.cells)
        assert Area(corner.geometry).mask(unit.cells).any()
        assert lon.max() < 15.0015
        assert lat.min() > 45.15

    def test_the_globe_on_a_small_grid(self) -> None:
        # Far from its zone UTM folds and tears; the region near the grid is what counts.
        grid = GeoBox((100, 100), Affine(10, 0, 5e5, 0, -10, 5e6), "EPSG:32633")
        globe = region_from_bbox(-180, -90, 180, 90)
        assert len(make_plan(globe, grid, 10).units) == 100
        half = region_from_bbox(-180, -90, 15.00635, 90)  # up to the grid's middle
        assert len(make_plan(half, grid, 10).units) in (50, 60)

    def test_the_bulge_of_a_curved_edge_is_planned(self) -> None:
        # In UTM the southern edge of this box sags by a kilometre, ten cells, below its corners.
        region = region_from_bbox(13.5, 45, 16.5, 45.05)
        grid = snap_grid(region_bounds(region.geometry, "EPSG:32633"), 100)
        plan = make_plan(region, grid, 4)
        count = times_planned(plan)
        assert (count[Area(region.geometry).mask(grid)] == 1).all()
        assert count[-4:, :40].max() == 0  # below the south-western corner is nothing

    def test_a_full_disc(self) -> None:
        crs = "+proj=geos +h=35785831 +lon_0=0 +sweep=y +datum=WGS84"
        grid = GeoBox((300, 300), Affine(37_400, 0, -5.61e6, 0, -37_400, 5.61e6), crs)
        count = times_planned(make_plan(region_from_bbox(-180, -90, 180, 90), grid, 10))
        on_earth = np.isfinite(cell_lonlat(grid)[0])
        assert count.max() == 1
        assert (count[on_earth] == 1).all()
        assert count.mean() < on_earth.mean() + 0.2  # space is left out
        east = make_plan(region_from_bbox(40, -20, 60, 20), grid, 10)
        assert 0 < len(east.units) < 150

    def test_real_boundary(self, shared_data: Path) -> None:
        region = region_from_file(str(shared_data / "boundaries/slovenia_border.geojson"))
        grid = snap_grid(region_bounds(region.geometry, "EPSG:32633"), 500)
        plan = make_plan(region, grid, 16)
        count = times_planned(plan)
        mask = Area(region.geometry).mask(grid)
        assert count.max() == 1
        assert (count[mask] == 1).all()
        assert 0.45 < mask.mean() < count.mean() < 0.75


class TestSize:
    def test_a_hundred_thousand_units_take_no_time(self, shared_data: Path) -> None:
        region = region_from_file(str(shared_data / "boundaries/slovenia_border.geojson"))
        grid = snap_grid(region_bounds(region.geometry, "EPSG:32633"), 10)
        start = time.perf_counter()
        plan = make_plan(region, grid, 44)
        seconds = time.perf_counter() - start
        assert len(plan.units) > 100_000
        assert seconds < 3  # about 0.2 s on an idle core
        assert plan.units[-1].index == tuple(plan.units.indices[-1])

    def test_the_globe_at_100_m(self) -> None:
        region = region_from_bbox(-180, -60, 180, 75)
        grid = snap_grid(region_bounds(region.geometry, "EPSG:4326"), 0.001)
        start = time.perf_counter()
        plan = make_plan(region, grid, 512)
        assert time.perf_counter() - start < 3
        assert len(plan.units) == math.ceil(135_000 / 512) * math.ceil(360_000 / 512)


class TestPlan:
    REGION = region_from_bbox(4, 52, 5, 53)
    GRID = GeoBox((100, 100), Affine(0.01, 0, 4, 0, -0.01, 53), "EPSG:4326")
    FACTS: ClassVar = {"model": "abc", "bank": "def"}

    def test_units_are_a_sequence(self) -> None:
        units = make_plan(self.REGION, self.GRID, 30).units
        assert len(units) == 16
        assert units[-1] == units[15] == list(units)[15]
        assert units[-1].cells.shape == (10, 10)
        assert [u.index for u in units[4:8]] == [(1, 0), (1, 1), (1, 2), (1, 3)]
        assert units[3] in units
        with pytest.raises(IndexError):
            units[16]
        with pytest.raises(ValueError, match="read-only"):
            units.indices[0] = 5

    def test_a_plan_travels(self) -> None:
        plan = make_plan(self.REGION, self.GRID, 30, self.FACTS)
        copy = pickle.loads(pickle.dumps(plan))
        assert copy.fingerprint == plan.fingerprint
        assert copy.grid == plan.grid
        assert list(copy.units) == list(plan.units)
        with pytest.raises(FrozenInstanceError):
            plan.unit_cells = 3  # type: ignore[misc]

    def test_the_fingerprint_is_that_of_the_facts(self) -> None:
        plan = make_plan(self.REGION, self.GRID, 30, self.FACTS)
        assert len(plan.fingerprint) == 64
        assert plan.fingerprint == fingerprint_of(self.FACTS, self.GRID, 30, self.REGION)
        assert plan.fingerprint == fingerprint_of(plan.facts, self.GRID, 30, self.REGION)
        assert plan.facts["model"] == "abc"
        assert plan.facts["grid_crs"] == "EPSG:4326"
        assert all(isinstance(v, str) for v in plan.facts.values())

    def test_the_fingerprint_does_not_change_between_releases(self) -> None:
        # If this fails, unfinished runs of the release before can no longer be resumed.
        assert fingerprint_of(self.FACTS, self.GRID, 30, self.REGION) == FINGERPRINT

    def test_what_decides_the_numbers_changes_the_fingerprint(self) -> None:
        prints = {
            fingerprint_of(self.FACTS, self.GRID, 30, self.REGION),
            fingerprint_of({**self.FACTS, "model": "abd"}, self.GRID, 30, self.REGION),
            fingerprint_of(self.FACTS, self.GRID[1:, :], 30, self.REGION),
            fingerprint_of(self.FACTS, self.GRID[:99, :], 30, self.REGION),
            fingerprint_of(self.FACTS, GeoBox((100, 100), self.GRID.affine, 4269), 30, self.REGION),
            fingerprint_of(self.FACTS, self.GRID, 31, self.REGION),
            fingerprint_of(self.FACTS, self.GRID, 30, region_from_bbox(4, 52, 5, 53.01)),
            fingerprint_of(self.FACTS, self.GRID, 30, replace(self.REGION, clip=True)),
        }
        assert len(prints) == 8

    def test_the_mask_is_part_of_the_fingerprint(self) -> None:
        land = replace(region_from_bbox(4, 52, 4.5, 53), clip=True)
        other = replace(region_from_bbox(4, 52, 4.5, 52.9), clip=True)
        without = make_plan(self.REGION, self.GRID, 30, self.FACTS)
        first, second = (
            make_plan(self.REGION, self.GRID, 30, self.FACTS, mask) for mask in (land, other)
        )
        assert len({without.fingerprint, first.fingerprint, second.fingerprint}) == 3
        assert first.fingerprint == fingerprint_of(
            self.FACTS, self.GRID, 30, self.REGION, replace(land, label="other name")
        )
        named = [k for k in first.facts if first.facts[k] != second.facts.get(k)]
        assert named == ["mask"]
        assert "mask" not in without.facts

    def test_units_by_their_positions(self) -> None:
        units = make_plan(self.REGION, self.GRID, 30).units
        some = units.at(np.array([3, 5]))
        assert list(some) == [units[3], units[5]]
        assert len(units.at(np.empty(0, np.int64))) == 0

    def test_what_does_not_leaves_it_alone(self) -> None:
        expected = fingerprint_of(self.FACTS, self.GRID, 30, self.REGION)
        turned = dict(reversed(self.FACTS.items()))
        renamed = replace(self.REGION, label="other")
        other_start = replace(self.REGION, geometry=shapely.box(4, 52, 5, 53, ccw=False))
        assert fingerprint_of(turned, self.GRID, 30, self.REGION) == expected
        assert fingerprint_of(self.FACTS, self.GRID, 30, renamed) == expected
        assert fingerprint_of(self.FACTS, self.GRID, 30, other_start) == expected

    def test_wrong_arguments(self) -> None:
        with pytest.raises(UsageError, match="at least one cell"):
            make_plan(self.REGION, self.GRID, 0)
        with pytest.raises(InputError, match="no CRS"):
            make_plan(self.REGION, GeoBox((2, 2), Affine(1, 0, 0, 0, -1, 0), None), 1)


FINGERPRINT = "72ef3ec92cdcf958c9aab2a6120493b863925fa69b278ab8e29e18f25d8807f0"

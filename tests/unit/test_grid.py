"""Grids: true metres, snapping, blocks, cells on the globe, bounds and masks of regions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from hypothesis import assume, given
from hypothesis import strategies as st
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox
from odc.geo.geom import BoundingBox
from pyproj import Geod
from rasterio.warp import transform_bounds

from soundmap.errors import InputError, UsageError
from soundmap.grid import (
    block,
    blocks,
    cell_lonlat,
    ground_gsd_m,
    is_locally_metric,
    local_metric_crs,
    metres_per_unit,
    project_lonlat,
    region_bounds,
    snap_grid,
    utm_zone_key,
    x_period,
)
from soundmap.region import region_from_bbox, region_from_file

WGS84 = Geod(ellps="WGS84")
FOOT_M = 1200 / 3937


def box_in(crs: str, *edges: float) -> BoundingBox:
    return BoundingBox(*edges, crs=CRS(crs))


class TestTrueMetres:
    @pytest.mark.parametrize(
        ("crs", "x", "y", "expected"),
        [
            ("EPSG:4326", 0, 0, (111_319.49, 110_574.28)),
            ("EPSG:4326", 12, 60, (55_800.0, 111_412.3)),
            ("EPSG:4326", 179.9999, 0, (111_319.49, 110_574.28)),
            ("EPSG:4326", 0, 90, (0, 111_694.0)),
            ("EPSG:3857", 0, 0, (1, 0.99331)),
            ("EPSG:3857", 0, 8_399_737.9, (0.50125, 0.50041)),  # 60° north
            ("EPSG:32633", 500_000, 5_000_000, (1 / 0.9996, 1 / 0.9996)),
            ("EPSG:2263", 984_250, 200_000, (FOOT_M, FOOT_M)),
            ("EPSG:32661", 2_000_000, 2_000_000, (1 / 0.994, 1 / 0.994)),  # the pole itself
            ("EPSG:28992", 155_000, 463_000, (1 / 0.9999079, 1 / 0.9999079)),
        ],
    )
    def test_known_places(
        self, crs: str, x: float, y: float, expected: tuple[float, float]
    ) -> None:
        assert metres_per_unit(crs, x, y) == pytest.approx(expected, rel=2e-4, abs=1e-3)

    def test_off_the_earth_is_nan(self) -> None:
        crs = "+proj=geos +h=35785831 +lon_0=0 +sweep=y +datum=WGS84"
        assert np.isnan(metres_per_unit(crs, 5.6e6, 5.6e6)).all()
        with pytest.raises(InputError, match="off the Earth"):
            ground_gsd_m(GeoBox((2, 2), Affine(1, 0, 5.6e6, 0, -1, 5.6e6), crs))

    def test_gsd_shrinks_with_web_mercator(self) -> None:
        grid = GeoBox((10, 10), Affine(10, 0, -50, 0, -10, 8_399_788), "EPSG:3857")
        assert ground_gsd_m(grid) == pytest.approx(5.008, abs=1e-3)

    def test_gsd_of_rotated_and_of_flipped_pixels(self) -> None:
        turned = Affine.translation(5e5, 5e6) @ Affine.rotation(30) @ Affine.scale(10, -20)
        for affine in (turned, Affine(-10, 0, 5e5, 0, 20, 5e6)):
            gsd_m = ground_gsd_m(GeoBox((10, 10), affine, "EPSG:32633"))
            assert gsd_m == pytest.approx(math.sqrt(200) / 0.9996, rel=1e-5)

    def test_no_crs(self) -> None:
        with pytest.raises(InputError, match="no CRS"):
            ground_gsd_m(GeoBox((2, 2), Affine(1, 0, 0, 0, -1, 0), None))

    @given(st.floats(-179, 179), st.floats(-89, 89))
    def test_degrees_agree_with_long_geodesics(self, lon: float, lat: float) -> None:
        mx, my = metres_per_unit("EPSG:4326", lon, lat)
        _, _, across = WGS84.inv(lon - 0.01, lat, lon + 0.01, lat)
        _, _, along = WGS84.inv(lon, lat - 0.01, lon, lat + 0.01)
        assert (mx, my) == pytest.approx((across / 0.02, along / 0.02), rel=1e-4)

    @pytest.mark.parametrize(
        ("crs", "bounds", "expected"),
        [
            ("EPSG:32633", (4e5, 5e6, 6e5, 5.2e6), True),
            ("EPSG:32661", (1.9e6, 1.9e6, 2.1e6, 2.1e6), True),
            ("EPSG:28992", (1e5, 4e5, 2e5, 5e5), True),
            ("EPSG:3857", (0, 0, 1e4, 1e4), True),  # on the equator
            ("EPSG:3857", (0, 6e6, 1e4, 6.1e6), False),
            ("EPSG:4326", (0, 0, 1, 1), False),
            ("EPSG:2263", (9e5, 1e5, 1e6, 2e5), False),
            ("+proj=geos +h=35785831 +lon_0=0 +datum=WGS84", (3e6, 3e6, 3.1e6, 3.1e6), False),
            ("+proj=sinu +R=6371007.181", (5e6, 5e6, 5.1e6, 5.1e6), False),  # slanted
            ("EPSG:32633", (-3e6, 5e6, 6e5, 5.2e6), False),  # far outside of its zone
        ],
    )
    def test_which_maps_are_metric(
        self, crs: str, bounds: tuple[float, float, float, float], expected: bool
    ) -> None:
        assert is_locally_metric(box_in(crs, *bounds)) is expected
        size = (bounds[2] - bounds[0]) / 10
        grid = GeoBox((10, 10), Affine(size, 0, bounds[0], 0, -size, bounds[1] + 10 * size), crs)
        assert is_locally_metric(grid) is expected


class TestMetricCrs:
    @pytest.mark.parametrize(
        ("lon", "lat", "epsg"),
        [
            (-9.1, 38.7, 32629),
            (151.2, -33.9, 32756),
            (5.3, 60.4, 32631),  # Bergen: no exception for Norway
            (10, 78, 32632),  # nor for Svalbard
            (180, 0, 32601),
            (-180, -0.1, 32701),
            (179.999, 10, 32660),
            (0, 84, 32631),
            (0, 84.01, 32661),
            (0, -80, 32731),
            (0, -80.01, 32761),
            (183, 10, 32601),
        ],
    )
    def test_zones(self, lon: float, lat: float, epsg: int) -> None:
        assert local_metric_crs(lon, lat) == CRS(epsg)
        assert utm_zone_key([lon, np.nan], [lat, 0]).tolist() == [epsg, 0]

    def test_arrays_broadcast(self) -> None:
        keys = utm_zone_key(np.arange(0, 12, 3.0), np.array([[10.0], [-10.0]]))
        assert keys.dtype == np.int32
        assert keys.tolist() == [[32631, 32631, 32632, 32632], [32731, 32731, 32732, 32732]]

    @pytest.mark.parametrize(("lon", "lat"), [(math.nan, 0), (0, 91), (math.inf, 0)])
    def test_no_place(self, lon: float, lat: float) -> None:
        with pytest.raises(UsageError, match="not a place"):
            local_metric_crs(lon, lat)

    @given(st.floats(-180, 180), st.floats(-90, 90))
    def test_the_zone_is_metric_at_its_point(self, lon: float, lat: float) -> None:
        crs = local_metric_crs(lon, lat)
        ((x, y),) = project_lonlat(crs, lon, lat)
        assert metres_per_unit(crs, x, y) == pytest.approx((1, 1), abs=0.01)


class TestSnap:
    def test_cover_goes_outward(self) -> None:
        grid = snap_grid(box_in("EPSG:32633", 503, 1007, 521, 1019), 10)
        assert grid.affine == Affine(10, 0, 500, 0, -10, 1020)
        assert grid.shape == (2, 3)

    def test_nearest_rounds(self) -> None:
        grid = snap_grid(box_in("EPSG:32633", 503, 1007, 527, 1019), 10, mode="nearest")
        assert grid.affine == Affine(10, 0, 500, 0, -10, 1020)
        assert grid.shape == (1, 3)

    def test_rounding_of_decimals_adds_no_cell(self) -> None:
        grid = snap_grid(box_in("EPSG:4326", 0.1, 0.1, 0.3, 0.7), 0.1)
        assert grid.shape == (6, 2)

    def test_anchor(self) -> None:
        grid = snap_grid(box_in("EPSG:32633", 500, 1000, 520, 1020), 10, anchor=(5, 3))
        assert grid.affine == Affine(10, 0, 495, 0, -10, 1023)
        assert grid.shape == (3, 3)

    @pytest.mark.parametrize("cell", [0, -1, math.nan, math.inf])
    def test_wrong_cell(self, cell: float) -> None:
        with pytest.raises(UsageError, match="cell size"):
            snap_grid(box_in("EPSG:4326", 0, 0, 1, 1), cell)

    def test_wrong_mode_and_bounds(self) -> None:
        with pytest.raises(UsageError, match="mode"):
            snap_grid(box_in("EPSG:4326", 0, 0, 1, 1), 1, mode="inward")
        with pytest.raises(UsageError, match="edge"):
            snap_grid(box_in("EPSG:4326", 1, 0, 0, 1), 1)
        with pytest.raises(InputError, match="no CRS"):
            snap_grid(BoundingBox(0, 0, 1, 1), 1)

    @given(
        left=st.floats(-1e7, 1e7), bottom=st.floats(-1e7, 1e7), width=st.floats(0, 1e5),
        height=st.floats(0, 1e5), cell=st.floats(0.5, 1e6), anchor_x=st.floats(-100, 100),
        mode=st.sampled_from(["cover", "nearest"]),
    )  # fmt: skip
    def test_any_bounds(
        self, left: float, bottom: float, width: float, height: float, cell: float,
        anchor_x: float, mode: str,
    ) -> None:  # fmt: skip
        bounds = box_in("EPSG:32633", left, bottom, left + width, bottom + height)
        grid = snap_grid(bounds, cell, (anchor_x, 7.0), mode)
        rows, cols = grid.shape
        assert min(rows, cols) >= 1
        got = grid.boundingbox
        slack = cell * 2e-6 if mode == "cover" else cell * 1.000001
        assert got.left <= bounds.left + slack
        assert got.right >= bounds.right - slack
        assert got.bottom <= bounds.bottom + slack
        assert got.top >= bounds.top - slack
        assert cols <= width / cell + 2
        assert rows <= height / cell + 2
        line = (grid.affine.c - anchor_x) / cell
        assert line == pytest.approx(round(line), abs=1e-6)


class TestBlocks:
    @given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 50))
    def test_blocks_tile_an_array(self, height: int, width: int, side: int) -> None:
        count = np.zeros((height, width), dtype=int)
        for (row, col), (rows, cols) in blocks((height, width), side):
            count[rows, cols] += 1
            assert (rows.start, cols.start) == (row * side, col * side)
            assert count[rows, cols].size > 0
        assert (count == 1).all()

    def test_a_block_lies_where_its_cells_lie(self) -> None:
        affine = Affine.translation(5e5, 5e6) @ Affine.rotation(30) @ Affine.scale(10, -10)
        grid = GeoBox((50, 60), affine, "EPSG:32633")
        part = block(grid, 10, 15, 20, 40)
        assert part.shape == (5, 20)
        for whole, piece in zip(cell_lonlat(grid), cell_lonlat(part), strict=True):
            np.testing.assert_allclose(piece, whole[10:15, 20:40], rtol=0, atol=1e-10)


class TestCells:
    def test_centres(self) -> None:
        lon, lat = cell_lonlat(GeoBox((2, 3), Affine(1, 0, 10, 0, -1, 50), "EPSG:4326"))
        assert lon.tolist() == [[10.5, 11.5, 12.5]] * 2
        assert lat.tolist() == [[49.5] * 3, [48.5] * 3]

    @pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857", "EPSG:4269", "EPSG:3832"])
    def test_beyond_180_longitudes_start_again(self, crs: str) -> None:
        (x0, _), (x1, _) = project_lonlat(crs, [179, 181], [0, 0])
        lon, _ = cell_lonlat(GeoBox((1, 2), Affine((x1 - x0) / 2, 0, x0, 0, -1, 0), crs))
        np.testing.assert_allclose(lon, [[179.5, -179.5]], atol=1e-6)

    def test_off_the_earth_is_nan(self) -> None:
        lon, lat = cell_lonlat(GeoBox((2, 1), Affine(1, 0, 0, 0, -1, 91), "EPSG:4326"))
        assert np.isnan(lon).tolist() == np.isnan(lat).tolist() == [[True], [False]]
        crs = "+proj=geos +h=35785831 +lon_0=0 +sweep=y +datum=WGS84"
        lon, _ = cell_lonlat(GeoBox((9, 9), Affine(1.2e6, 0, -5.4e6, 0, -1.2e6, 5.4e6), crs))
        assert np.isnan(lon[0, 0])
        assert np.isfinite(lon[4, 4])


class TestPeriod:
    @pytest.mark.parametrize(
        ("crs", "period"),
        [
            ("EPSG:4326", 360),
            ("EPSG:3857", 2 * math.pi * 6378137),
            ("EPSG:3832", 2 * math.pi * 6378137),
            ("EPSG:6933", 34_735_060.9),
            ("EPSG:32633", None),
            ("EPSG:3035", None),
            ("EPSG:8857", None),
        ],
    )
    def test_where_the_globe_repeats(self, crs: str, period: float | None) -> None:
        assert x_period(crs) == (period and pytest.approx(period, rel=1e-6))

    @given(
        st.sampled_from(["EPSG:4326", "EPSG:3857", "EPSG:3832", "EPSG:6933"]),
        st.floats(-360, 360), st.floats(-80, 80),
    )  # fmt: skip
    def test_x_runs_on_with_longitude(self, crs: str, lon: float, lat: float) -> None:
        xs = project_lonlat(crs, [lon, lon + 1, lon + 360], [lat] * 3)[:, 0]
        period = x_period(crs)
        assert period is not None
        assert xs[1] - xs[0] == pytest.approx(period / 360, rel=1e-6)
        assert xs[2] - xs[0] == pytest.approx(period, rel=1e-9)


class TestBounds:
    @pytest.mark.parametrize(
        ("box", "crs", "expected"),
        [
            ((-9.25, 38.69, -9.09, 38.8), "EPSG:4326", (-9.25, 38.69, -9.09, 38.8)),
            ((177, -19, -177, -16), "EPSG:4326", (177, -19, 183, -16)),
            ((177, -19, -177, -16), "EPSG:4269", (177, -19, 183, -16)),
            ((-180, -90, 180, 90), "EPSG:4326", (-180, -90, 180, 90)),
            ((-180, 10, -170, 20), "EPSG:4326", (-180, 10, -170, 20)),
            ((-180, 60, 180, 90), "EPSG:3857", (-20037508.3, 8399737.9, 20037508.3, 20048966.1)),
            ((177, 0, -177, 1), "EPSG:3857", (19703549.9, 0, 20371466.8, 111325.1)),
            # Its map's edges are at 30° west, and 180° is in the middle.
            ((177, 0, -177, 1), "EPSG:3832", (3005626.3, 0, 3673543.2, 110579.97)),
            ((-180, -80, 180, 0), "EPSG:3832", (-20037508.3, -15496570.7, 20037508.3, 0)),
            # All longitudes at the pole: a disc.
            ((-180, 84, 180, 90), "EPSG:32661", (1333272, 1333272, 2666728, 2666728)),
        ],
    )
    def test_known_boxes(
        self,
        box: tuple[float, float, float, float],
        crs: str,
        expected: tuple[float, float, float, float],
    ) -> None:
        bounds = region_bounds(region_from_bbox(*box).geometry, crs)
        assert bounds.crs == CRS(crs)
        assert tuple(bounds.bbox) == pytest.approx(
            expected, abs=30 if "EPSG:4" not in crs else 1e-9
        )

    @pytest.mark.parametrize(
        ("box", "crs"),
        [
            ((12, 45, 18, 46), "EPSG:32633"),
            ((12, -46, 18, 46), "EPSG:32633"),
            ((-10, 35, 40, 70), "EPSG:3035"),
            ((-125, 24, -66, 50), "EPSG:5070"),
            ((3, 50, 7, 54), "EPSG:28992"),
        ],
    )
    def test_curved_edges_as_gdal_follows_them(
        self, box: tuple[float, float, float, float], crs: str
    ) -> None:
        bounds = region_bounds(region_from_bbox(*box).geometry, crs)
        expected = transform_bounds("EPSG:4326", crs, *box, densify_pts=2000)
        assert tuple(bounds.bbox) == pytest.approx(expected, abs=1)

    def test_utm_does_not_notice_the_180th_meridian(self) -> None:
        bounds = region_bounds(region_from_bbox(179, 0, -179, 1).geometry, "EPSG:32660")
        ends = [WGS84.inv(177, 0, lon, 0)[2] for lon in (179, 181)]
        assert bounds.left - 5e5 == pytest.approx(ends[0], rel=1e-3)
        assert bounds.right - 5e5 == pytest.approx(ends[1], rel=1e-3)

    def test_real_regions_at_180(self, shared_data: Path) -> None:
        states = region_from_file(str(shared_data / "boundaries/us_states.geojson"))
        west, _, east, _ = region_bounds(states.geometry, "EPSG:4326").bbox
        assert 170 < west < 180 < east < 300  # from the Aleutians to Maine
        world = region_from_file(str(shared_data / "boundaries/ne_110m_countries.geojson"))
        west, _, east, _ = region_bounds(world.geometry, "EPSG:4326").bbox
        assert (west, east) == (-180, 180)

    @pytest.mark.parametrize(
        ("box", "crs"),
        [
            ((0, 86, 10, 88), "EPSG:3857"),
            ((170, -5, 180, 5), "+proj=geos +h=35785831 +lon_0=0 +datum=WGS84"),
        ],
    )
    def test_nothing_to_show(self, box: tuple[float, float, float, float], crs: str) -> None:
        with pytest.raises(InputError, match=r"outside of what .* can show"):
            region_bounds(region_from_bbox(*box).geometry, crs)

    def test_the_globe_on_a_disc(self) -> None:
        crs = "+proj=geos +h=35785831 +lon_0=0 +datum=WGS84"
        bounds = region_bounds(region_from_bbox(-180, -90, 180, 90).geometry, crs)
        assert tuple(bounds.bbox) == pytest.approx((-5.43e6, -5.41e6, 5.43e6, 5.41e6), rel=0.03)

    @given(
        west=st.floats(-180, 179), south=st.floats(-80, 80), width=st.floats(1e-6, 20),
        height=st.floats(1e-6, 4), share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
        crs=st.sampled_from(["EPSG:4326", "EPSG:3857", "EPSG:3035", "EPSG:6933", "local"]),
    )  # fmt: skip
    def test_every_point_of_a_box_is_within(
        self, west: float, south: float, width: float, height: float,
        share: tuple[float, float], crs: str,
    ) -> None:  # fmt: skip
        region = region_from_bbox(west, south, west + width, south + height)
        lon, lat = west + share[0] * width, south + share[1] * height
        target = local_metric_crs(west + width / 2, south) if crs == "local" else CRS(crs)
        # The far side of the globe, where this map tears.
        assume(crs != "EPSG:3035" or (abs(lon) < 120 and south > -20))
        bounds = region_bounds(region.geometry, target)
        ((x, y),) = project_lonlat(target, lon, lat)
        period = x_period(target)
        if period:
            x += period * math.ceil((bounds.left - x) / period - 1e-9)
        slack = 1e-6 * (bounds.span_x + bounds.span_y) + 1e-9 * abs(x)
        assert bounds.left - slack <= x <= bounds.right + slack
        assert bounds.bottom - slack <= y <= bounds.top + slack

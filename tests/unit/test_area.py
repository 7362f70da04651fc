"""Areas: the cells of any grid that lie in polygons of any size, found piece by piece."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import shapely
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox

from soundmap import area as area_module
from soundmap.area import Area
from soundmap.grid import (
    block,
    cell_lonlat,
    local_metric_crs,
    project_lonlat,
    region_bounds,
    snap_grid,
)
from soundmap.region import region_from_bbox, split_antimeridian


def coast(points: int, seed: int) -> shapely.Polygon:
    """A ragged island of a degree's radius around 10° east, 50° north, with a lake."""
    generator = np.random.default_rng(seed)
    angle = np.sort(generator.uniform(0, 2 * np.pi, points))
    radius = generator.uniform(0.6, 1, points)
    ring = np.column_stack([np.cos(angle), np.sin(angle)]) * radius[:, None] + (10, 50)
    lake = shapely.Point(10.1, 50.1).buffer(0.3)
    return shapely.make_valid(shapely.Polygon(ring).difference(lake))


def islands() -> list[shapely.Polygon]:
    """Round ones, of 32,000 points together, beside the ragged one."""
    return [
        shapely.Point(12 + col, 49 + row).buffer(0.4, quad_segs=500)
        for row in range(4)
        for col in range(4)
    ]


class TestPieces:
    @given(
        points=st.integers(4, 400), seed=st.integers(0, 999), most=st.integers(8, 60),
        cells=st.integers(1, 40),
    )  # fmt: skip
    def test_pieces_hold_what_the_whole_holds(
        self, points: int, seed: int, most: int, cells: int
    ) -> None:
        polygon = coast(points, seed)
        side = 2.2 / cells
        grid = GeoBox((cells, cells), Affine(side, 0, 8.9, 0, -side, 51.1), "EPSG:4326")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(area_module, "_MOST_POINTS", most)
            mask = Area(polygon).mask(grid)
        lon, lat = cell_lonlat(grid)
        # A centre on a cut belongs to a piece; one on the outline, by rounding, may not.
        sure = ~shapely.dwithin(polygon.boundary, shapely.points(lon, lat), 1e-12)
        np.testing.assert_array_equal(mask[sure], shapely.intersects_xy(polygon, lon, lat)[sure])

    def test_many_edges_in_one_point_come_to_an_end(self) -> None:
        angle = np.linspace(0, 2 * np.pi, 1201)[:-1]
        tips = np.column_stack([np.cos(angle), np.sin(angle)]).reshape(-1, 2, 2)
        fan = shapely.union_all([shapely.Polygon([(0, 0), *two]) for two in tips])
        area = Area(shapely.make_valid(fan))
        grid = GeoBox((9, 9), Affine(0.25, 0, -1.125, 0, -0.25, 1.125), "EPSG:4326")
        assert 0.2 < area.mask(grid)[1:8, 1:8].mean() < 0.9

    def test_spikes_come_to_an_end(self) -> None:
        polygon = coast(3_000, 4)
        area = Area(polygon)
        points = shapely.get_num_coordinates(area._pieces).sum()
        assert points < 8 * shapely.get_num_coordinates(polygon)
        grid = GeoBox((3, 9), Affine(0.25, 0, 9, 0, -0.25, 50.4), "EPSG:4326")
        lon, lat = cell_lonlat(grid)
        np.testing.assert_array_equal(area.mask(grid), shapely.intersects_xy(polygon, lon, lat))

    def test_a_copy_from_another_process_says_the_same(self) -> None:
        grid = GeoBox((50, 50), Affine(0.04, 0, 9, 0, -0.04, 51), "EPSG:4326")
        area = Area(coast(5000, 1))
        mask = area.mask(grid)
        assert 0 < mask.sum() < mask.size
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(area)).mask(grid), mask)

    def test_threads_ask_at_once(self) -> None:
        grid = GeoBox((120, 120), Affine(0.0167, 0, 9, 0, -0.0167, 51), "EPSG:4326")
        parts = [block(grid, row, row + 8, 0, 120) for row in range(0, 120, 8)]
        area = Area(coast(1500, 2))
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(area.mask, parts * 4))
        whole = np.concatenate(found[: len(parts)])
        np.testing.assert_array_equal(whole, Area(coast(1500, 2)).mask(grid))
        for i, mask in enumerate(found):
            np.testing.assert_array_equal(mask, found[i % len(parts)])

    def test_a_unit_asks_the_pieces_near_it_alone(self) -> None:
        area = Area(shapely.union_all([coast(60, 3), *islands()]))
        asked: list[int] = []
        query = area._tree.query

        class Counting:
            def query(self, hull: shapely.Geometry) -> np.ndarray:
                found = query(hull)
                asked.append(len(found))
                return found

        area._tree = Counting()  # type: ignore[assignment]
        area.mask(GeoBox((10, 10), Affine(0.001, 0, 12.28, 0, -0.001, 49.28), "EPSG:4326"))
        assert len(area._pieces) > 100
        assert max(asked) < 0.05 * len(area._pieces)


class TestCells:
    def test_a_triangle(self) -> None:
        triangle = shapely.Polygon([(0, 0), (4, 0), (0, 4)])
        mask = Area(triangle).mask(GeoBox((4, 4), Affine(1, 0, 0, 0, -1, 4), "EPSG:4326"))
        assert mask.tolist() == [
            [True, False, False, False],
            [True, True, False, False],
            [True, True, True, False],
            [True, True, True, True],
        ]

    @pytest.mark.parametrize("left", [177.0, -183.0, 537.0])
    @pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857"])
    def test_a_grid_beyond_180_meets_the_region(self, left: float, crs: str) -> None:
        region = region_from_bbox(178, -1, -178, 1)
        (x0, _), (x1, _) = project_lonlat(crs, [left, left + 1], [0, 0])
        grid = GeoBox((1, 6), Affine(x1 - x0, 0, x0, 0, -1, 0), crs)
        assert Area(region.geometry).mask(grid).tolist() == [[False, *[True] * 4, False]]

    @pytest.mark.parametrize("box", [(170, 0, 180, 1), (-180, 0, -170, 1), (175, 0, 185, 1)])
    @pytest.mark.parametrize("left", [179.5, -180.5])
    def test_a_centre_on_the_180th_meridian_is_inside(
        self, box: tuple[float, float, float, float], left: float
    ) -> None:
        grid = GeoBox((1, 1), Affine(1, 0, left, 0, -1, 1), "EPSG:4326")
        assert Area(region_from_bbox(*box).geometry).mask(grid).all()

    def test_off_the_earth_is_off_the_region(self) -> None:
        grid = GeoBox((2, 1), Affine(1, 0, 0, 0, -1, 91), "EPSG:4326")
        globe = region_from_bbox(-180, -90, 180, 90).geometry
        assert Area(globe).mask(grid).tolist() == [[False], [True]]

    def test_the_pole_is_covered(self) -> None:
        grid = GeoBox((10, 10), Affine(2e4, 0, 1.9e6, 0, -2e4, 2.1e6), "EPSG:32661")
        assert Area(region_from_bbox(-180, 85, 180, 90).geometry).mask(grid).all()

    @given(
        centre=st.tuples(st.floats(-180, 180), st.floats(-80, 80)),
        radius=st.floats(0.01, 5), cut=st.integers(0, 20),
    )  # fmt: skip
    def test_a_block_has_the_mask_of_its_cells(
        self, centre: tuple[float, float], radius: float, cut: int
    ) -> None:
        disc = split_antimeridian(shapely.Point(centre).buffer(radius))
        crs = local_metric_crs(*centre)
        grid = snap_grid(region_bounds(disc, crs), radius * 111_000 / 10)
        mask = Area(disc).mask(grid)
        assert mask.any()
        rows, cols = grid.shape
        cut = min(cut, rows - 1)
        part = Area(disc).mask(block(grid, cut, rows, 0, cols))
        assert (part == mask[cut:]).all()

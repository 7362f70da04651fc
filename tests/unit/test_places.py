"""What the value of a place is, on a map."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyproj
import pytest
import shapely
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox

from soundmap.products import places
from soundmap.products.places import PlaceValues, values_at

UTM = GeoBox((30, 40), Affine(100, 0, 500_000, 0, -100, 5_503_000), "EPSG:32633")


def numbered(grid: GeoBox) -> xr.DataArray:
    """A map of one concept, each cell holding its number."""
    height, width = grid.shape
    numbers = np.arange(height * width, dtype=np.float32).reshape(1, height, width)
    return xr.DataArray(numbers, dims=("concept", "y", "x"))


def at(grid: GeoBox, shapes: list[Any], crs: str) -> PlaceValues:
    found = np.empty(len(shapes), dtype=object)
    found[:] = shapes
    return values_at(numbered(grid), grid, found, pyproj.CRS(crs))


def moved(shape: Any, source: str, target: str) -> Any:
    to = pyproj.Transformer.from_crs(source, target, always_xy=True).transform
    return shapely.transform(shape, lambda xy: np.column_stack(to(xy[:, 0], xy[:, 1])))


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:4326", "EPSG:3857", "EPSG:2056"])
@pytest.mark.parametrize("block", [512, 7])
def test_a_polygon_has_the_mean_of_the_cells_within(
    crs: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_BLOCK", block)
    generator = np.random.default_rng(5)
    drawn = [
        shapely.affinity.rotate(shapely.box(x, y, x + w, y + h), angle)
        for x, y, w, h, angle in zip(
            generator.uniform(500_000, 503_500, 25),
            generator.uniform(5_500_200, 5_502_000, 25),
            *generator.uniform(300, 900, (2, 25)),
            generator.uniform(0, 90, 25),
            strict=True,
        )
    ]
    drawn.append(shapely.union(drawn[0], shapely.box(503_010, 5_500_010, 503_310, 5_500_310)))
    drawn.append(shapely.difference(drawn[1], shapely.buffer(shapely.centroid(drawn[1]), 120)))
    centres = np.stack(
        np.meshgrid(500_050 + 100 * np.arange(40), 5_502_950 - 100 * np.arange(30)), axis=-1
    ).reshape(-1, 2)
    expected = [
        np.flatnonzero(shapely.intersects_xy(shape, centres[:, 0], centres[:, 1])).mean()
        for shape in drawn
    ]
    found = at(UTM, [moved(shape, "EPSG:32633", crs) for shape in drawn], crs)
    np.testing.assert_allclose(found.values[:, 0], expected)
    assert not found.off_map.any()
    assert len(set(found.spots)) == len(drawn)


def test_a_polygon_between_centres_has_the_cells_that_it_touches() -> None:
    sliver = shapely.box(500_010, 5_502_990, 500_290, 5_502_999)
    inside = shapely.box(500_110, 5_502_910, 500_120, 5_502_920)
    on_edges = shapely.box(500_100, 5_502_900, 500_130, 5_502_930)
    found = at(UTM, [sliver, inside, on_edges], "EPSG:32633")
    np.testing.assert_allclose(found.values[:, 0], [1, 1, 1])
    assert not found.partly.any()


def test_a_point_has_the_cell_that_holds_it() -> None:
    first = shapely.Point(500_001, 5_502_999)
    same = shapely.Point(500_099, 5_502_901)
    several = shapely.MultiPoint([(500_001, 5_502_999), (500_450, 5_502_950), (500_460, 5_502_940)])
    beside = shapely.Point(504_000, 5_502_950)
    found = at(UTM, [first, same, several, beside], "EPSG:32633")
    np.testing.assert_array_equal(found.values[:3, 0], [0, 0, 2])
    assert found.off_map.tolist() == [False, False, False, True]
    assert np.isnan(found.values[3, 0])
    # Points in one cell are one place.
    assert found.spots[0] == found.spots[1]
    assert len(set(found.spots)) == 3


def test_what_has_no_value_says_why() -> None:
    values = numbered(UTM)
    values[0, :5, :5] = np.nan
    shapes = np.array(
        [
            None,
            shapely.Polygon(),
            shapely.LineString([(500_000, 5_502_000), (501_000, 5_502_000)]),
            shapely.box(500_000, 5_502_600, 500_300, 5_502_900),
            shapely.box(500_000, 5_502_000, 500_700, 5_502_800),
            shapely.box(490_000, 5_502_000, 500_200, 5_502_100),
            # Wide, but none of its centres is on the map.
            shapely.box(490_000, 5_502_000, 500_030, 5_502_500),
            shapely.box(0, 0, 1, 1),
            shapely.Point(500_050, 5_502_950),
        ],
        dtype=object,
    )
    found = values_at(values, UTM, shapes, pyproj.CRS("EPSG:32633"))
    assert np.flatnonzero(found.empty).tolist() == [0, 1]
    assert np.flatnonzero(found.other).tolist() == [2]
    assert np.flatnonzero(found.nodata).tolist() == [3, 8]
    assert np.flatnonzero(found.off_map).tolist() == [6, 7]
    assert np.flatnonzero(found.partly).tolist() == [4, 5]
    assert np.flatnonzero(np.isfinite(found.values[:, 0])).tolist() == [4, 5]
    assert found.values[5, 0] == np.mean([360, 361])


SEAM_GRIDS = [
    GeoBox((20, 60), Affine(0.1, 0, 177, 0, -0.1, -16), "EPSG:4326"),
    GeoBox((20, 60), Affine(0.1, 0, -183, 0, -0.1, -16), "EPSG:4326"),
    GeoBox((36, 3600), Affine(0.1, 0, -180, 0, -0.1, -15), "EPSG:4326"),
    GeoBox((30, 60), Affine(10_000, 0, 19_700_000, 0, -10_000, -1_750_000), "EPSG:3857"),
    GeoBox((40, 60), Affine(10_000, 0, 500_000, 0, -10_000, 8_250_000), "EPSG:32760"),
]
ACROSS = {
    "cut": shapely.union(shapely.box(179, -17.5, 180, -17), shapely.box(-180, -17.5, -179, -17)),
    "on": shapely.box(179, -17.5, 181, -17),
    "back": shapely.box(-181, -17.5, -179, -17),
    "jump": shapely.Polygon([(179, -17.5), (-179, -17.5), (-179, -17), (179, -17)]),
}


@pytest.mark.parametrize("grid", SEAM_GRIDS, ids=lambda g: f"{g.crs}-{g.affine.c:.0f}")
@pytest.mark.parametrize("way", ACROSS)
def test_across_the_180th_meridian(grid: GeoBox, way: str) -> None:
    height, width = grid.shape
    col, row = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    to_lonlat = pyproj.Transformer.from_crs(grid.crs.proj, "EPSG:4326", always_xy=True).transform
    lon, lat = to_lonlat(*(grid.affine * (col, row)))
    inside = (lon % 360 > 179) & (lon % 360 < 181) & (lat > -17.5) & (lat < -17)
    assert 20 < inside.sum() < 200
    assert (lon[inside] % 360).min() < 180 < (lon[inside] % 360).max()
    found = at(grid, [ACROSS[way]], "EPSG:4326")
    assert found.values[0, 0] == pytest.approx(np.flatnonzero(inside).mean())
    assert not found.partly[0]


@pytest.mark.parametrize("grid", SEAM_GRIDS, ids=lambda g: f"{g.crs}-{g.affine.c:.0f}")
@pytest.mark.parametrize("turn", [-360, 0, 360])
def test_points_beside_the_180th_meridian(grid: GeoBox, turn: int) -> None:
    found = at(grid, [shapely.Point(lon + turn, -17.21) for lon in (179.96, -179.96)], "EPSG:4326")
    assert not found.off_map.any()
    first, second = found.values[:, 0] % grid.shape[1]
    assert 0 < (second - first) % 3600 <= 1


def test_a_hole_across_the_180th_meridian_stays_in_its_polygon() -> None:
    grid = SEAM_GRIDS[0]
    jump = shapely.Polygon(
        [(178, -18), (-178, -18), (-178, -16), (178, -16)],
        [[(-179.5, -17.5), (-178.5, -17.5), (-178.5, -16.5), (-179.5, -16.5)]],
    )
    hole = shapely.box(180.5, -17.5, 181.5, -16.5)
    expected = at(grid, [shapely.difference(shapely.box(178, -18, 182, -16), hole)], "EPSG:4326")
    assert at(grid, [jump], "EPSG:4326").values == pytest.approx(expected.values)


def test_what_cannot_be_drawn_on_the_map_is_off_it() -> None:
    around_pole = shapely.buffer(shapely.Point(0, 0), 1_500_000)
    found = at(SEAM_GRIDS[2], [around_pole], "EPSG:3976")
    assert found.off_map[0]
    far = at(SEAM_GRIDS[3], [shapely.box(170, -90, 180, -80)], "EPSG:4326")
    assert far.off_map[0]

"""Regions: boxes, polygon files and footprints as lon/lat geometry cut at ±180."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from shapely.geometry import Polygon

from soundmap.errors import InputError, UsageError
from soundmap.region import (
    Region,
    region_from_bbox,
    region_from_file,
    region_from_geobox,
    split_antimeridian,
)

SQUARE = [(4, 52), (5, 52), (5, 53), (4, 53), (4, 52)]


def write_geojson(path: Path, *geometries: dict[str, Any], crs: str | None = None) -> str:
    features = [{"type": "Feature", "properties": {}, "geometry": g} for g in geometries]
    content: dict[str, Any] = {"type": "FeatureCollection", "features": features}
    if crs:
        content["crs"] = {"type": "name", "properties": {"name": crs}}
    path.write_text(json.dumps(content))
    return str(path)


def polygon(*rings: list[tuple[float, float]]) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": [list(ring) for ring in rings]}


def check_sound(region: Region) -> None:
    assert region.geometry.geom_type in ("Polygon", "MultiPolygon")
    assert region.geometry.is_valid
    west, south, east, north = region.geometry.bounds
    assert -180 <= west <= east <= 180
    assert -90 <= south <= north <= 90


class TestBbox:
    def test_a_plain_box(self) -> None:
        region = region_from_bbox(-9.25, 38.69, -9.09, 38.80)
        assert region.geometry.equals(shapely.box(-9.25, 38.69, -9.09, 38.80))
        assert region.label == "bbox -9.25 38.69 -9.09 38.8"
        assert not region.clip

    @pytest.mark.parametrize("east", [-178, 182])
    def test_a_box_across_the_180th_meridian_has_two_parts(self, east: float) -> None:
        region = region_from_bbox(177, -19, east, -16)
        expected = shapely.union_all(
            [shapely.box(177, -19, 180, -16), shapely.box(-180, -19, -178, -16)]
        )
        assert region.geometry.equals(expected)

    def test_the_globe(self) -> None:
        globe = shapely.box(-180, -90, 180, 90)
        assert region_from_bbox(-180, -90, 180, 90).geometry.equals(globe)
        assert region_from_bbox(0, -90, 360, 90).geometry.equals(globe)

    @pytest.mark.parametrize(
        ("box", "words"),
        [
            (
                (-9.09, 38.69, -9.25, 38.80),
                ["reversed", "did you mean bbox -9.25 38.69 -9.09 38.8?"],
            ),
            (
                (-9.25, 38.80, -9.09, 38.69),
                ["reversed", "did you mean bbox -9.25 38.69 -9.09 38.8?"],
            ),
            ((100, 0, -100, 1), []),  # 160° wide across the 180th meridian: fine
            ((100, 0, -70, 1), ["reversed", "did you mean bbox -70 0 100 1?"]),
            ((0, -91, 1, 0), ["south and north", "-90 and 90", "west south east north"]),
            ((38.69, -9.25, 38.80, 190), ["south and north"]),
            ((-181, 0, 1, 1), ["west and east", "-180 and 180"]),
            ((0, 0, 361, 1), ["west and east"]),
            ((-180, 0, 190, 1), ["wider than the globe"]),
            ((5, 52, 5, 53), ["no area", "west and east"]),
            ((5, 52, 6, 52), ["no area", "south and north"]),
            ((math.nan, 52, 6, 53), ["finite"]),
            ((5, 52, math.inf, 53), ["finite"]),
        ],
    )
    def test_a_wrong_box_says_what_is_wrong(
        self, box: tuple[float, float, float, float], words: list[str]
    ) -> None:
        if not words:
            check_sound(region_from_bbox(*box))
            return
        with pytest.raises(UsageError) as error:
            region_from_bbox(*box)
        message = str(error.value)
        assert "\n" not in message
        assert message.startswith("bbox ")
        for word in words:
            assert word in message

    @given(
        west=st.floats(-180, 180), south=st.floats(-90, 90), width=st.floats(0, 400),
        height=st.floats(0, 200),
    )  # fmt: skip
    def test_any_box_is_sound_or_refused(
        self, west: float, south: float, width: float, height: float
    ) -> None:
        try:
            region = region_from_bbox(west, south, west + width, south + height)
        except UsageError:
            return
        check_sound(region)
        assert region.geometry.area == pytest.approx(width * height, rel=1e-6, abs=1e-9)


class TestSplit:
    @given(st.floats(-540, 540), st.floats(1e-3, 359), st.floats(-89, 88), st.floats(1e-3, 1))
    def test_area_is_kept_and_nothing_crosses(
        self, west: float, width: float, south: float, height: float
    ) -> None:
        cut = split_antimeridian(shapely.box(west, south, west + width, south + height))
        assert cut.is_valid
        assert cut.bounds[0] >= -180
        assert cut.bounds[2] <= 180
        assert cut.area == pytest.approx(width * height, rel=1e-6, abs=2e-5)

    def test_rounding_beyond_180_leaves_no_sliver_on_the_other_side(self) -> None:
        cut = split_antimeridian(shapely.box(170, 0, 180.0000001, 1))
        assert cut.equals(shapely.box(170, 0, 180, 1))

    def test_parts_that_come_to_lie_on_each_other_are_merged(self) -> None:
        cut = split_antimeridian(shapely.box(-200, 0, 200, 1))
        assert cut.equals(shapely.box(-180, 0, 180, 1))


class TestFile:
    def test_real_cities(self, shared_data: Path) -> None:
        region = region_from_file(str(shared_data / "boundaries/amsterdam.geojson"))
        check_sound(region)
        assert region.clip
        assert region.label == "amsterdam.geojson"
        assert region.geometry.contains(shapely.Point(4.9, 52.37))

    def test_a_projected_crs_inside_geojson(self, shared_data: Path) -> None:
        region = region_from_file(str(shared_data / "boundaries/slovenia_border.geojson"))
        check_sound(region)
        assert region.geometry.contains(shapely.Point(14.51, 46.05))  # Ljubljana
        assert region.geometry.bounds == pytest.approx((13.37, 45.42, 16.52, 46.86), abs=0.02)

    def test_a_zipped_shapefile_in_feet(self, shared_data: Path) -> None:
        folder = shared_data / "boundaries"
        feet = region_from_file(str(folder / "nyc_boroughs_epsg2263_shapefile.zip"))
        degrees = region_from_file(str(folder / "nyc_boroughs.geojson"))
        check_sound(feet)
        common = feet.geometry.intersection(degrees.geometry).area
        assert common > 0.99 * max(feet.geometry.area, degrees.geometry.area)
        named = region_from_file(str(folder / "nyc_boroughs_epsg2263_shapefile.zip") + ":nybb")
        assert named.geometry.equals(feet.geometry)
        assert named.label == "nyc_boroughs_epsg2263_shapefile.zip:nybb"

    def test_countries_at_the_pole_and_the_180th_meridian(self, shared_data: Path) -> None:
        region = region_from_file(str(shared_data / "boundaries/ne_110m_countries.geojson"))
        check_sound(region)
        for lon, lat in ((0, -89.9), (179.99, -89.9), (-175, 66.5), (179, 68)):
            assert region.geometry.contains(shapely.Point(lon, lat))
        assert not region.geometry.contains(shapely.Point(-150, 0))

    def test_points_are_no_region(self, shared_data: Path) -> None:
        spec = str(shared_data / "boundaries/ne_110m_capital_points.geojson")
        with pytest.raises(
            InputError, match="holds only Point geometries; a region needs polygons"
        ):
            region_from_file(spec)

    def test_geojson_without_crs_is_lonlat_and_bow_ties_are_repaired(self, tmp_path: Path) -> None:
        bow_tie = polygon([(0, 0), (2, 2), (2, 0), (0, 2), (0, 0)])
        region = region_from_file(write_geojson(tmp_path / "a.geojson", bow_tie))
        check_sound(region)
        assert region.geometry.area == pytest.approx(2)

    def test_holes_stay_and_points_beside_polygons_are_left_out(self, tmp_path: Path) -> None:
        hole = [(4.4, 52.4), (4.6, 52.4), (4.6, 52.6), (4.4, 52.6), (4.4, 52.4)]
        collection = {
            "type": "GeometryCollection",
            "geometries": [polygon(SQUARE, hole), {"type": "Point", "coordinates": [0, 0]}],
        }
        region = region_from_file(write_geojson(tmp_path / "a.geojson", collection))
        assert region.geometry.area == pytest.approx(1 - 0.04)

    @pytest.mark.parametrize("east", [-178, 182])
    def test_a_polygon_drawn_across_the_180th_meridian(self, tmp_path: Path, east: float) -> None:
        ring: list[tuple[float, float]] = [(177, -19), (east, -19), (east, -16), (177, -16)]
        spec = write_geojson(tmp_path / "a.geojson", polygon([*ring, ring[0]]))
        expected = region_from_bbox(177, -19, 182, -16)
        assert region_from_file(spec).geometry.equals(expected.geometry)

    def test_a_box_around_the_world_stays_as_drawn(self, tmp_path: Path) -> None:
        ring: list[tuple[float, float]] = [(-180, -60), (180, -60), (180, 60), (-180, 60)]
        spec = write_geojson(tmp_path / "a.geojson", polygon([*ring, ring[0]]))
        assert region_from_file(spec).geometry.equals(shapely.box(-180, -60, 180, 60))

    @pytest.mark.parametrize(
        ("crs", "centre", "pole"),
        [("EPSG::3413", (0, 0), 90), ("EPSG::3031", (0, 0), -90), ("EPSG::3413", (5e5, 0), 90)],
    )
    def test_a_ring_around_a_pole_with_a_hole_at_it(
        self, tmp_path: Path, crs: str, centre: tuple[float, float], pole: float
    ) -> None:
        around = shapely.Point(centre).buffer(1_000_000)
        hole = shapely.Point(0, 0).buffer(100_000)
        geometry = shapely.geometry.mapping(around.difference(hole))
        name = f"urn:ogc:def:crs:{crs}"
        region = region_from_file(write_geojson(tmp_path / "a.geojson", geometry, crs=name))
        check_sound(region)
        assert not region.geometry.contains(shapely.Point(10, pole * 0.9999))
        for lon in (-179.9, -90, 0, 90, 179.9):
            assert region.geometry.contains(shapely.Point(lon, math.copysign(87.5, pole)))

    def test_straight_edges_of_the_file_become_curves(self, tmp_path: Path) -> None:
        ring: list[tuple[float, float]] = [(3e5, 5e6), (7e5, 5e6), (7e5, 5.4e6), (3e5, 5.4e6)]
        spec = write_geojson(
            tmp_path / "a.geojson", polygon([*ring, ring[0]]), crs="urn:ogc:def:crs:EPSG::32633"
        )
        # The southern edge bulges: its middle, on the central meridian, is south of its ends.
        lat = region_from_file(spec).geometry.bounds[1]
        grid = GeoBox((1, 1), Affine(4e5, 0, 3e5, 0, -4e5, 5.4e6), "EPSG:32633")
        assert region_from_geobox(grid, "a").geometry.bounds[1] == pytest.approx(lat, abs=1e-6)
        assert lat < 45.1361

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ([], "has no features"),
            ([{"type": "Polygon", "coordinates": []}], "geometries are all empty"),
            ([polygon([(1, 1), (1, 1), (1, 1), (1, 1)])], "enclose no area"),
            ([{"type": "LineString", "coordinates": [[0, 0], [1, 1]]}], "holds only LineString"),
            ([polygon([(4e5, 5e6), (5e5, 5e6), (5e5, 6e6), (4e5, 5e6)])], "are not degrees"),
        ],
    )
    def test_a_useless_file_says_what_is_wrong(
        self, tmp_path: Path, content: list[dict[str, Any]], words: str
    ) -> None:
        spec = write_geojson(tmp_path / "a.geojson", *content)
        with pytest.raises(InputError, match=words) as error:
            region_from_file(spec)
        assert "a.geojson" in str(error.value)
        assert "\n" not in str(error.value)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"no-such\.geojson: no such file"):
            region_from_file(str(tmp_path / "no-such.geojson"))
        with pytest.raises(InputError, match="no such file"):
            region_from_file("")

    def test_no_vector_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.geojson").write_text("this is not a map")
        with pytest.raises(InputError, match="cannot be read as a vector file") as error:
            region_from_file(str(tmp_path / "a.geojson"))
        assert "\n" not in str(error.value)

    def test_features_are_chosen_by_their_attributes(self, shared_data: Path) -> None:
        countries = str(shared_data / "boundaries/ne_110m_countries.geojson")
        portugal = region_from_file(countries, "NAME = 'Portugal'")
        check_sound(portugal)
        assert portugal.clip
        assert portugal.label == "ne_110m_countries.geojson where NAME = 'Portugal'"
        west, south, east, north = portugal.geometry.bounds
        assert (round(west), round(south), round(east), round(north)) == (-10, 37, -6, 42)
        for where, said in (
            ("NAM = 'Portugal'", "cannot be understood.*columns.*name, iso_a3, continent"),
            ("NAME = 'Atlantis'", "holds for no feature.*columns are name, iso_a3, continent"),
            (" ", "empty"),
        ):
            with pytest.raises(UsageError, match=said) as caught:
                region_from_file(countries, where)
            assert "\n" not in str(caught.value)

    def test_layers(self, tmp_path: Path) -> None:
        import geopandas

        path = tmp_path / "city.gpkg"
        for name, shift in (("parks", 0), ("harbour", 10)):
            frame = geopandas.GeoDataFrame(
                geometry=[shapely.box(shift, 0, shift + 1, 1)], crs="EPSG:4326"
            )
            frame.to_file(path, layer=name)
        assert region_from_file(f"{path}:harbour").geometry.bounds == (10, 0, 11, 1)
        with pytest.raises(InputError, match="has no layer 'roads'; it has parks, harbour"):
            region_from_file(f"{path}:roads")
        with pytest.raises(InputError, match=r"has 2 layers; choose one.*parks, harbour"):
            region_from_file(str(path))

    def test_no_crs(self, tmp_path: Path) -> None:
        import geopandas

        path = tmp_path / "a.shp"
        with pytest.warns(UserWarning, match="crs"):
            geopandas.GeoDataFrame(geometry=[shapely.box(0, 0, 1, 1)]).to_file(path)
        with pytest.raises(InputError, match="has no CRS"):
            region_from_file(str(path))


class TestGeobox:
    def test_utm(self) -> None:
        grid = GeoBox((300, 200), Affine(10, 0, 500_000, 0, -10, 5_000_000), "EPSG:32633")
        region = region_from_geobox(grid, "scene.tif")
        check_sound(region)
        assert (region.label, region.clip) == ("scene.tif", False)
        assert region.geometry.bounds == pytest.approx((15, 45.126, 15.0254, 45.153), abs=1e-3)

    @pytest.mark.parametrize("flip", [1, -1])
    def test_north_up_and_south_up_are_the_same_place(self, flip: int) -> None:
        top = 5_000_000 if flip == 1 else 4_997_000
        grid = GeoBox((300, 200), Affine(10, 0, 5e5, 0, -10 * flip, top), "EPSG:32633")
        other = GeoBox((300, 200), Affine(10, 0, 5e5, 0, -10, 5e6), "EPSG:32633")
        assert shapely.equals_exact(
            region_from_geobox(grid, "a").geometry.normalize(),
            region_from_geobox(other, "b").geometry.normalize(),
            tolerance=1e-9,
        )

    @pytest.mark.parametrize("crs", ["EPSG:32660", "EPSG:32601", "EPSG:3857", "EPSG:4326"])
    def test_across_the_180th_meridian(self, crs: str) -> None:
        box = region_from_bbox(179, 51, 181, 52)
        x, y = {"EPSG:32660": (675_000, 5.7e6), "EPSG:32601": (275_000, 5.7e6)}.get(crs, (0.0, 0.0))
        if crs == "EPSG:3857":
            x, y = 20_037_508.34 - 5e4, 6.7e6
        grid = GeoBox((100, 100), Affine(1000, 0, x, 0, -1000, y), crs)
        if crs == "EPSG:4326":
            grid = GeoBox((100, 100), Affine(0.01, 0, 179.5, 0, -0.01, 51.9), crs)
        region = region_from_geobox(grid, "a")
        check_sound(region)
        assert len(shapely.get_parts(region.geometry)) == 2
        west, _, east, _ = region.geometry.bounds
        assert (west, east) == (-180, 180)
        assert region.geometry.area < 1.5 * box.geometry.area

    def test_a_grid_over_the_pole(self) -> None:
        grid = GeoBox((100, 100), Affine(20_000, 0, 1e6, 0, -20_000, 3e6), "EPSG:32661")
        region = region_from_geobox(grid, "a")
        check_sound(region)
        assert region.geometry.contains(shapely.box(-179.99, 81.5, 179.99, 89.99))

    def test_longitudes_from_0_to_360(self) -> None:
        grid = GeoBox((180, 360), Affine(1, 0, 0, 0, -1, 90), "EPSG:4326")
        assert region_from_geobox(grid, "a").geometry.equals(shapely.box(-180, -90, 180, 90))

    def test_a_full_disc_keeps_the_earth_and_drops_space(self) -> None:
        crs = "+proj=geos +h=35785831 +lon_0=0 +sweep=y +datum=WGS84"
        grid = GeoBox((100, 100), Affine(112_000, 0, -5.6e6, 0, -112_000, 5.6e6), crs)
        region = region_from_geobox(grid, "disc.tif")
        check_sound(region)
        assert region.geometry.contains(shapely.box(-50, -50, 50, 50))

    def test_no_crs_and_no_earth(self) -> None:
        with pytest.raises(InputError, match=r"a\.tif: has no CRS"):
            region_from_geobox(GeoBox((2, 2), Affine(1, 0, 0, 0, -1, 0), None), "a.tif")
        crs = "+proj=geos +h=35785831 +lon_0=0 +sweep=y +datum=WGS84"
        with pytest.raises(InputError, match=r"a\.tif: no part of it lies on the Earth"):
            region_from_geobox(GeoBox((2, 2), Affine(1, 0, 5.6e6, 0, -1, 5.6e6), crs), "a.tif")

    def test_the_outline_follows_the_curves(self) -> None:
        # A point just inside the middle of each edge of a wide grid is inside the footprint.
        grid = GeoBox((1000, 1000), Affine(1000, 0, 0, 0, -1000, 5e6), "EPSG:3035")
        geometry = region_from_geobox(grid, "a").geometry
        assert isinstance(geometry, Polygon)
        from soundmap.grid import pixel_lonlat

        for inset, inside in ((0.01, True), (-0.01, False)):
            at = np.array([inset, 500, 1000 - inset, 500])
            lon, lat = pixel_lonlat(grid, at, np.roll(at, 1))
            assert (shapely.contains_xy(geometry, lon, lat) == inside).all()


def test_importing_is_light() -> None:
    code = (
        "import sys, soundmap.region\n"
        "assert not {'geopandas', 'pandas', 'pyogrio', 'rasterio', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])

"""Maps against reference places: what a place's value is, what counts as true, what is said."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyproj
import pytest
import shapely
from affine import Affine
from odc.geo.geobox import GeoBox

from soundmap.errors import InputError, OutputError, SoundmapError, UsageError
from soundmap.products.audibility import read_tables
from soundmap.products.evaluate_map import MapScore, evaluate_map, to_csv, to_json
from soundmap.products.figures import save
from soundmap.products.reference import Question, read_reference
from soundmap.stores.geotiff import export_cog
from soundmap.stores.schema import MapSchema
from soundmap.stores.zarr_store import create

UTM = GeoBox((30, 40), Affine(100, 0, 500_000, 0, -100, 5_503_000), "EPSG:32633")
CONCEPTS = ("birdsong", "road traffic", "church bells")


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map of three concepts: birdsong rises eastward, road traffic falls, bells are noise."""
    folder = tmp_path_factory.mktemp("map")
    schema = MapSchema(
        concepts=CONCEPTS,
        groups=("biophony", "anthrophony", "anthrophony"),
        colours=("#33a02c", "#e31a1c", "#6a3d9a"),
        calibrations=("platt", "platt", "generic"),
        value="probability",
        formula="sigmoid(a (s . e) + b)",
        detail="patch",
        dtype="float32",
        grid=UTM,
        chunk_cells=64,
        model="soundmap-small",
        model_hash="0123abcd",
        imagery="scene.tif",
        attribution="nobody",
        licence="CC0-1.0",
        gsd_m=10.0,
        software="soundmap 0.1.0",
        created="2026-01-02T03:04:05Z",
    )
    rise = np.broadcast_to(np.linspace(0.1, 0.9, 40, dtype=np.float32), (30, 40))
    noise = np.random.default_rng(8).random((30, 40), dtype=np.float32)
    values = np.stack([rise, 1 - rise, noise])
    values[:, 25:, :4] = np.nan
    store = create(folder / "city.zarr", schema, (1, 1))
    store.write(0, 0, values)
    create(folder / "begun.zarr", schema, (1, 1))
    store.finish()
    export_cog(store, folder / "city.tif")
    return folder / "city.tif"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write a reference of squares, each 3 x 3 cells, with columns; or a text."""

    def make(name: str = "places.gpkg", crs: str = "EPSG:4326", **columns: Any) -> str:
        path = tmp_path / name
        count = len(next(iter(columns.values())))
        x = 500_000 + 400 * (np.arange(count) % 10)
        y = 5_500_600 + 400 * (np.arange(count) // 10)
        frame = gpd.GeoDataFrame(
            columns, geometry=shapely.box(x, y, x + 300, y + 300), crs="EPSG:32633"
        )
        frame.to_crs(crs).to_file(path)
        return str(path)

    return make


def columns_of(count: int = 40) -> dict[str, list[Any]]:
    """Birdsong is audible in the east, with some mistakes, and traffic rated higher in the west."""
    generator = np.random.default_rng(count)
    east = np.arange(count) % 10 / 9
    return {
        "birdsong": (east + generator.normal(0, 0.3, count) > 0.5).astype(int).tolist(),
        "road_traffic": np.rint(5 - 4 * east + generator.normal(0, 1, count)).tolist(),
    }


def test_columns_named_like_concepts(city: Path, write: Callable[..., str]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    columns = columns_of()
    score = evaluate_map(city, write(**columns))
    assert [one.concept for one in score.concepts] == ["birdsong", "road traffic"]
    birdsong, traffic = score.concepts
    # Squares in one column of squares have one value each of the ramp.
    east = np.arange(40) % 10
    assert birdsong.auc is not None
    assert birdsong.average_precision is not None
    assert birdsong.auc.value == pytest.approx(metrics.roc_auc_score(columns["birdsong"], east))
    assert birdsong.average_precision.value == pytest.approx(
        metrics.average_precision_score(columns["birdsong"], east)
    )
    assert birdsong.spearman is None
    assert birdsong.audible == sum(columns["birdsong"])
    assert traffic.spearman is not None
    assert traffic.spearman.value == pytest.approx(
        stats.spearmanr(columns["road_traffic"], -east).statistic
    )
    assert (traffic.auc, traffic.audible) == (None, None)
    for found in (birdsong.auc, birdsong.average_precision, traffic.spearman):
        assert found.low < found.value < found.high
    assert score.mean["auc"].value == birdsong.auc.value
    assert (score.features, score.judged, score.places) == (40, 40, 40)
    assert (score.left_out, score.notes, score.skipped) == ({}, (), {})


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:3857"])
def test_files_crs_and_stores_do_not_matter(
    city: Path, write: Callable[..., str], crs: str
) -> None:
    expected = evaluate_map(city, write(**columns_of())).concepts[0]
    for name in ("places.geojson", "places.shp", "places.fgb"):
        written = "EPSG:4326" if name == "places.geojson" else crs
        # Shapefiles cut names at ten characters.
        file = write(name, written, birdsong=columns_of()["birdsong"])
        found = evaluate_map(city.with_suffix(".zarr"), file).concepts[0]
        if name == "places.fgb":  # which stores features in another order
            assert found.auc is not None
            assert expected.auc is not None
            assert found.auc.value == expected.auc.value
        else:
            assert found == expected


def test_the_seed_decides_and_zero_resamples_give_no_interval(
    city: Path, write: Callable[..., str]
) -> None:
    file = write(**columns_of())
    assert evaluate_map(city, file, seed=3) == evaluate_map(city, file, seed=3)
    other = evaluate_map(city, file, seed=4)
    assert other.mean["auc"] != evaluate_map(city, file, seed=3).mean["auc"]
    plain = evaluate_map(city, file, resamples=0)
    assert plain.mean["auc"].value == other.mean["auc"].value
    assert np.isnan(plain.mean["auc"].low)
    with pytest.raises(UsageError, match="resamples"):
        evaluate_map(city, file, resamples=-1)


def test_a_class_is_heard_as_the_table_says(
    city: Path, write: Callable[..., str], tmp_path: Path
) -> None:
    kinds = ["wood", "road", "town", "lake"] * 10
    file = write(kind=kinds)
    truth = np.isin(kinds, ["wood", "town"])
    tables = {
        "flat.json": '{"wood": ["Birdsong"], "road": ["road traffic"], "town": ["birdsong"]}',
        "reasons.json": '{"wood": {"birdsong": "trees"}, "road": {"road traffic": "cars"},'
        ' "town": {"birdsong": "gardens"}}',
        "sets.json": '{"about": "x", "classes": {"other": {"sea": {"audible": ["birdsong"]}},'
        ' "mine": {"wood": {"audible": ["birdsong"]}, "road": {"audible": ["road traffic"]},'
        ' "town": {"audible": {"birdsong": "gardens"}}}}}',
        "long.csv": "class,concept\nwood,birdsong\nroad,road traffic\ntown,birdsong\n",
        "wide.csv": "Class,birdsong,road traffic\nwood,1,\nroad,0,yes\ntown,true,0\n",
    }
    scores: list[MapScore] = []
    for name, text in tables.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        question = Question(label="kind", audibility=str(tmp_path / name))
        scores.append(evaluate_map(city, file, question))
        birdsong, traffic = scores[-1].concepts
        assert (birdsong.features, birdsong.audible) == (30, truth.sum())
        assert (traffic.features, traffic.audible) == (30, 10)
        assert name in scores[-1].truth
        (reason, number), *others = scores[-1].left_out.items()
        assert number == 10
        assert "lake" in reason
        assert not others
        assert list(scores[-1].skipped) == ["church bells"]
    assert all(one.concepts == scores[0].concepts for one in scores)
    chosen = Question(label="kind", audibility=f"{tmp_path / 'sets.json'}:mine")
    assert evaluate_map(city, file, chosen).concepts == scores[0].concepts


def test_the_table_of_the_maps_model_is_the_default(city: Path, write: Callable[..., str]) -> None:
    score = evaluate_map(city, write(lc=["Forest", "Highway", "SeaLake"] * 8), Question("lc"))
    assert score.truth.endswith("soundmap-small/audibility.json (eurosat) says")
    assert [one.concept for one in score.concepts] == ["birdsong", "road traffic"]
    tables, _ = read_tables("soundmap-small:ucmerced", "")
    assert list(tables) == ["ucmerced"]
    with pytest.raises(UsageError, match="ucmerced"):
        read_tables("soundmap-small:corine", "")


def test_numbers_can_be_classes(city: Path, write: Callable[..., str], tmp_path: Path) -> None:
    table = tmp_path / "corine.json"
    table.write_text('{"311": ["birdsong"], "122": ["road traffic"]}', encoding="utf-8")
    file = write(code=[311.0, 122.0, None] * 8)
    score = evaluate_map(city, file, Question(label="code", audibility=str(table)))
    assert score.judged == 16
    assert score.left_out == {"of which nothing is known": 8}


def test_ratings_from_a_survey(city: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(6)
    lonlat = pyproj.Transformer.from_crs("EPSG:32633", "EPSG:4326", always_xy=True)
    x = generator.uniform(499_000, 504_000, 200)
    lon, lat = lonlat.transform(x, np.full(200, 5_502_050.0))
    cars = np.clip(np.rint(5 - (x - 500_000) / 1000 + generator.normal(0, 1, 200)), 1, 5)
    table = pd.DataFrame({"Longitude": lon, "LATITUDE": lat, "cars": cars, "site": x // 500})
    table.loc[:9, ["Longitude", "LATITUDE"]] = np.nan
    table.loc[10:14, "cars"] = np.nan
    file = tmp_path / "survey.csv"
    table.to_csv(file, index=False, sep=";", encoding="utf-8-sig")
    inside = (x[15:] >= 500_000) & (x[15:] < 504_000)

    ratings = evaluate_map(city, str(file), Question(values=("cars=Road_Traffic",)))
    assert ratings.judged == inside.sum()
    assert ratings.left_out == {
        "without a geometry or coordinates": 10,
        "of which nothing is known": 5,
        "off the map": int((~inside).sum()),
    }
    (traffic,) = ratings.concepts
    assert traffic.spearman is not None
    assert traffic.spearman.value > 0.5
    assert traffic.auc is None
    # Points in one cell are one place.
    assert traffic.places == ratings.places == len(np.unique(x[15:][inside] // 100))

    question = Question(values=("cars=road traffic",), audible_from=3)
    both = evaluate_map(city, str(file), question, place="site")
    (heard,) = both.concepts
    assert heard.spearman is not None
    assert heard.spearman.value == traffic.spearman.value
    assert heard.auc is not None
    assert heard.audible == int((cars[15:][inside] >= 3).sum())
    assert heard.places == 8
    # Fewer places, more doubt.
    assert heard.spearman.high - heard.spearman.low > (traffic.spearman.high - traffic.spearman.low)


def test_the_same_place_asked_again_adds_no_certainty(
    city: Path, write: Callable[..., str], tmp_path: Path
) -> None:
    once = write(**columns_of(20))
    frame = gpd.read_file(once)
    frame["square"] = range(len(frame))
    again = tmp_path / "again.gpkg"
    gpd.GeoDataFrame(pd.concat([frame] * 5), crs=frame.crs).to_file(again)
    expected = evaluate_map(city, once)
    found = evaluate_map(city, str(again), place="square")
    assert found.concepts[0].auc == expected.concepts[0].auc
    assert found.concepts[1].spearman is not None
    assert expected.concepts[1].spearman is not None
    assert found.concepts[1].spearman.low == pytest.approx(expected.concepts[1].spearman.low)
    assert (found.concepts[0].features, found.concepts[0].places) == (100, 20)


def test_what_cannot_be_judged_is_listed(city: Path, write: Callable[..., str]) -> None:
    columns = columns_of(20) | {"church_bells": [3] * 20}
    columns["birdsong"] = [True] * 20
    score = evaluate_map(city, write(**columns))
    assert score.skipped == {
        "birdsong": "audible in every place",
        "church bells": "all ratings are the same",
    }
    assert [one.concept for one in score.concepts] == ["road traffic"]


def test_few_places_have_no_interval(city: Path, write: Callable[..., str]) -> None:
    columns = columns_of(20) | {"birdsong": [1, 1] + [0] * 18}
    score = evaluate_map(city, write(**columns))
    birdsong, traffic = score.concepts
    assert birdsong.auc is not None
    assert np.isnan([birdsong.auc.low, birdsong.auc.high]).all()
    assert traffic.spearman is not None
    assert traffic.spearman.low < traffic.spearman.value
    (note,) = score.notes
    assert note.startswith("Fewer than 5 places")
    assert note.endswith(": birdsong")


def test_words_are_read_as_yes_and_no(city: Path, write: Callable[..., str]) -> None:
    score = evaluate_map(city, write(birdsong=["yes", "No", "TRUE", "", "0", None] * 3))
    assert (score.judged, score.concepts[0].audible) == (12, 6)


def test_scores_are_written(city: Path, write: Callable[..., str], tmp_path: Path) -> None:
    columns = columns_of() | {"church_bells": [1] * 40}
    score = evaluate_map(city, write(**columns), resamples=0)
    facts = json.loads(to_json(score))
    assert facts["map"] == str(city)
    assert facts["concepts"][0]["auc"]["value"] == score.concepts[0].auc.value  # type: ignore[union-attr]
    assert facts["concepts"][0]["auc"]["low"] is None
    assert facts["mean"]["spearman"]["value"] == score.mean["spearman"].value
    assert facts["skipped"] == {"church bells": "audible in every place"}
    birdsong, traffic, bells = csv.DictReader(io.StringIO(to_csv(score)))
    assert float(birdsong["auc"]) == score.concepts[0].auc.value  # type: ignore[union-attr]
    assert (birdsong["places"], birdsong["spearman"], birdsong["auc_low"]) == ("40", "", "")
    assert (traffic["audible"], traffic["auc"]) == ("", "")
    assert (bells["concept"], bells["skipped"]) == ("church bells", "audible in every place")
    save("text", tmp_path / "a.txt")
    with pytest.raises(OutputError, match="cannot be written"):
        save("text", tmp_path / "none" / "a.txt")


# --- mistakes ----------------------------------------------------------------------------------


def texts(folder: Path) -> dict[str, str]:
    """Files that are wrong in one way each: name -> content."""
    return {
        "nothing.csv": "",
        "header.csv": "lon,lat,birdsong\n",
        "noplace.csv": "site,birdsong\na,1\n",
        "xy.csv": "x,y,birdsong\n500100,5500100,1\n",
        "metres.csv": "lon,lat,birdsong\n500100,5500100,1\n",
        "far.csv": "lon,lat,birdsong\n2.1,41.2,1\n2.2,41.3,0\n",
        "words.csv": "lon,lat,birdsong\n15.01,49.66,loud\n",
        "blank.csv": "lon,lat,birdsong\n15.01,49.66,\n",
        "none.csv": "lon,lat,pigeons\n15.01,49.66,1\n",
        "lost.csv": "lon,lat,birdsong\n,,1\n",
        "nodata.csv": "lon,lat,birdsong\n15.001,49.655,1\n15.002,49.655,0\n",
        "one.csv": "lon,lat,kind,birdsong,a\n15.01,49.66,wood,1,3\n",
        "empty.geojson": '{"type": "FeatureCollection", "features": []}',
        "broken.geojson": '{"type": "FeatureCollection", ',
        "bad.json": "[1, 2]",
        "odd.json": '{"wood": 3}',
        "sea.json": '{"sea": ["ocean waves"]}',
        "geese.json": '{"wood": ["geese"]}',
        "two.json": '{"a": {"wood": ["birdsong"]}, "b": {"wood": ["birdsong"]}}',
        "short.csv": "class\nwood\n",
        "maybe.csv": "class,birdsong\nwood,perhaps\n",
    }


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("missing.gpkg", {}, "no such file"),
        ("nothing.csv", {}, "is empty"),
        ("header.csv", {}, "has no rows"),
        ("empty.geojson", {}, "has no features"),
        ("broken.geojson", {}, "cannot be read as a vector file"),
        ("noplace.csv", {}, "no columns lon and lat, or x and y; it has site, birdsong"),
        ("xy.csv", {}, "give it with --crs"),
        ("xy.csv", {"crs": "Mars"}, "'Mars' is not a CRS"),
        ("metres.csv", {}, "500100.*row 1 are not degrees"),
        ("far.csv", {}, r"no place lies on the map .*2\.1000 41\.2000 2\.2000 41\.3000.*15\.0000"),
        ("words.csv", {}, "'loud' in row 1: not a number"),
        ("blank.csv", {}, "'?birdsong'? holds no numbers"),
        ("none.csv", {}, "no column is named like a concept.*it has lon, lat, pigeons"),
        ("lost.csv", {}, "no feature can be judged: 1 without a geometry or coordinates"),
        ("nodata.csv", {}, "no place has a value"),
        ("one.csv", {}, "none of 1 concepts can be judged.*birdsong: audible in every place"),
        ("one.csv", {"place": "sight"}, "no column 'sight'"),
        ("one.csv", {"label": "kinds"}, "no column 'kinds'; did you mean 'kind'"),
        ("one.csv", {"label": "kind"}, r"none of its classes \(wood\) is in .*soundmap-small"),
        ("one.csv", {"label": "kind", "values": ("a",)}, "exclude each other"),
        ("one.csv", {"label": "kind", "audible_from": 3}, "--audible-from exclude each other"),
        ("one.csv", {"audibility": "x"}, "--audibility needs --label"),
        ("one.csv", {"label": "kind", "audibility": "x.json"}, "x.json: there is no such file"),
        ("one.csv", {"label": "kind", "audibility": "bad.json"}, "is not a table"),
        ("one.csv", {"label": "kind", "audibility": "odd.json"}, "is not a table"),
        ("one.csv", {"label": "kind", "audibility": "broken.geojson"}, "needs columns class"),
        ("one.csv", {"label": "kind", "audibility": "sea.json"}, "which has sea"),
        ("one.csv", {"label": "kind", "audibility": "geese.json"}, "none of the map's concepts"),
        ("one.csv", {"label": "kind", "audibility": "two.json"}, "from a, b"),
        ("one.csv", {"label": "kind", "audibility": "short.csv"}, "needs columns class"),
        ("one.csv", {"label": "kind", "audibility": "maybe.csv"}, "'perhaps' in row 1"),
        ("one.csv", {"values": ("a",)}, "no concept 'a'; say which as --value 'a=CONCEPT'"),
        (
            "one.csv",
            {"values": ("a=bird song",)},
            "no concept 'bird song'; did you mean 'birdsong'",
        ),
        ("one.csv", {"values": ("b=birdsong",)}, "no column 'b'"),
        ("one.csv", {"values": ("a=birdsong", "birdsong")}, "two columns, a and birdsong"),
    ],
)
def test_mistakes_are_one_clear_line(
    city: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    options: dict[str, Any],
    message: str,
) -> None:
    for name, text in texts(tmp_path).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    settings = {key: options[key] for key in ("place", "crs") if key in options}
    question = Question(**{key: options[key] for key in options if key not in settings})
    with pytest.raises(SoundmapError, match=message) as caught:
        evaluate_map(city, file, question, **settings)
    assert "\n" not in str(caught.value)


def test_a_file_with_several_layers_asks_which(city: Path, write: Callable[..., str]) -> None:
    file = write(**columns_of(20))
    gpd.read_file(file).to_file(file, layer="more", mode="a")
    with pytest.raises(InputError, match=r"2 layers; choose one as .*places\.gpkg:LAYER"):
        evaluate_map(city, file)
    with pytest.raises(InputError, match="no layer 'less'; it has places, more"):
        evaluate_map(city, f"{file}:less")
    assert evaluate_map(city, f"{file}:more").judged == 20


def test_a_file_without_crs_takes_the_one_given(city: Path, write: Callable[..., str]) -> None:
    file = Path(write("places.shp", "EPSG:32633", birdsong=columns_of()["birdsong"]))
    with pytest.raises(UsageError, match="says that its CRS is WGS 84 / UTM zone 33N"):
        evaluate_map(city, str(file), crs="EPSG:3857")
    assert read_reference(str(file), "EPSG:32633").crs.to_epsg() == 32633
    file.with_suffix(".prj").unlink()
    with pytest.raises(InputError, match="does not say its CRS: give it with --crs"):
        evaluate_map(city, str(file))
    assert evaluate_map(city, str(file), crs="EPSG:32633").judged == 40


def test_what_is_not_a_finished_map(city: Path, write: Callable[..., str], tmp_path: Path) -> None:
    file = write(**columns_of())
    with pytest.raises(InputError, match="is not finished"):
        evaluate_map(city.with_name("begun.zarr"), file)
    with pytest.raises(InputError, match="no such file"):
        evaluate_map(tmp_path / "none.tif", file)
    with pytest.raises(InputError, match="is it a map"):
        evaluate_map(file, file)

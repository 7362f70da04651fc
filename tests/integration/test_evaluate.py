"""`soundmap evaluate`: models as before, and maps against places of real data sets."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import geopandas as gpd
import numpy as np
import pandas as pd
import pyproj
import pytest
import rasterio
import shapely
from affine import Affine

import soundmap
from soundmap.encoder import DEFAULT_MODEL, find_model
from soundmap.products import evaluate
from soundmap.products.evaluate import ConceptScore, SetScore, evaluate_mosaic, read_mosaic_patches
from soundmap.products.labelled import load_audibility

Command = Callable[..., "subprocess.CompletedProcess[str]"]

SCENE = "eurosat_mosaic_thames_estuary_utm31.tif"
SQUARE_PX = 64
CELL_PX = 8


# --- models ------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What `soundmap evaluate` would have judged a model on."""
    heard: list[tuple[object, ...]] = []
    score = SetScore("eurosat test", 7, (ConceptScore("birdsong", 0.75, 3),), 0.5)

    def on_images(encoder: object, card: object, data: Path, split: str) -> tuple[SetScore, ...]:
        heard.append((data, split))
        return (score,)

    monkeypatch.setattr("soundmap.encoder.load_encoder", lambda model: SimpleNamespace())
    monkeypatch.setattr(evaluate, "evaluate_model", on_images)
    monkeypatch.setattr(evaluate, "evaluate_mosaics", lambda model, data: ())
    monkeypatch.setattr(evaluate, "evaluate_sample", lambda model: {"all": (10, 0.9)})
    return heard


@pytest.mark.parametrize("verb", [(), ("model",)])
def test_without_a_verb_it_judges_a_model(
    command: Command, asked: list[tuple[object, ...]], verb: tuple[str, ...]
) -> None:
    result = command("evaluate", *verb, "--data", "DATA", "--split", "val", "--all")
    assert (result.returncode, result.stderr) == (0, "")
    assert asked == [(Path("DATA"), "val")]
    for text in ("eurosat test", "0.750 birdsong", "places where audible", "0.900"):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Missing option '--data'"),
        (["--model", DEFAULT_MODEL], "Missing option '--data'"),
        (["--data"], "--data"),
        (["mpa"], "No such command 'mpa'"),
        (["map"], "Missing argument 'MAP'"),
        (["map", "city.tif"], "Missing option '--reference'"),
        (["map", "city.tif", "--reference", "x", "--json", "-", "--csv", "-"], "name a file"),
    ],
)
def test_what_is_missing_is_said(command: Command, words: list[str], message: str) -> None:
    result = command("evaluate", *words)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_help_names_both(command: Command) -> None:
    shown = command("evaluate", "--help").stdout
    assert "soundmap evaluate --data DATA" in shown
    assert "Judge a finished MAP" in shown
    assert "Judge a model" in shown


# --- maps --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mosaic(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map of the labelled mosaic that is the hardest of the three."""
    path = tmp_path_factory.mktemp("mosaic") / "thames.tif"
    soundmap.predict(shared_data / "scenes" / SCENE, out=path)
    return path


def squares(scenes: Path, scene: str) -> gpd.GeoDataFrame:
    """Labelled squares of a mosaic, as polygons."""
    patches = read_mosaic_patches(scenes)[scene]
    with rasterio.open(scenes / scene) as dataset:
        crs, affine = dataset.crs, dataset.transform
    shapes = []
    for patch in patches:
        left, top = affine * (patch.col, patch.row)
        right, bottom = affine * (patch.col + SQUARE_PX, patch.row + SQUARE_PX)
        shapes.append(shapely.box(left, bottom, right, top))
    return gpd.GeoDataFrame({"label": [p.label for p in patches]}, geometry=shapes, crs=crs)


def test_a_mosaic_gets_the_figures_of_its_own_judgement(
    command: Command, mosaic: Path, shared_data: Path, tmp_path: Path
) -> None:
    file, table = tmp_path / "squares.geojson", tmp_path / "scores.csv"
    squares(shared_data / "scenes", SCENE).to_crs(4326).to_file(file)
    words = ("--reference", file, "--label", "label", "--json", "-", "--csv", table)
    result = command("evaluate", "map", mosaic, *words)
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)

    values = soundmap.open(mosaic)["probability"]
    names = tuple(map(str, values.concept.values))
    audibility = load_audibility(find_model(DEFAULT_MODEL).folder, names)
    patches = read_mosaic_patches(shared_data / "scenes")[SCENE]
    known = evaluate_mosaic(values.to_numpy(), CELL_PX, patches, audibility, SCENE)
    assert (found["judged"], found["places"]) == (known.places, known.places)
    assert [one["concept"] for one in found["concepts"]] == [c.concept for c in known.concepts]
    assert [one["audible"] for one in found["concepts"]] == [c.audible for c in known.concepts]
    mean = found["mean"]["auc"]
    assert mean["value"] == pytest.approx(known.mean_auc, abs=0.03)
    assert mean["low"] < mean["value"] < mean["high"]
    assert len(found["concepts"]) + len(found["skipped"]) == len(names)
    with table.open(encoding="utf-8") as rows:
        written = [row["concept"] for row in csv.DictReader(rows)]
    assert written[: len(known.concepts)] == [c.concept for c in known.concepts]
    assert set(written) == set(names)


def test_a_table_is_shown(
    command: Command, mosaic: Path, shared_data: Path, tmp_path: Path
) -> None:
    file, scores = tmp_path / "squares.gpkg", tmp_path / "scores.json"
    squares(shared_data / "scenes", SCENE).to_file(file, layer="kinds")
    words = ("--reference", f"{file}:kinds", "--label", "label", "--json", scores)
    result = command("evaluate", "map", mosaic, *words)
    assert (result.returncode, result.stderr) == (0, "")
    for text in ("AUC", "average precision", "mean of 26", "74 of 74 features", "Skipped, "):
        assert text in result.stdout
    assert "Spearman" not in result.stdout
    assert result.stdout.splitlines()[-1] == f"Wrote {scores}"
    assert json.loads(scores.read_text(encoding="utf-8"))["places"] == 74


@pytest.fixture(scope="module")
def survey(shared_data: Path) -> Path:
    return shared_data / "tables" / "isd_v1_soundscape_survey.csv"


@pytest.fixture(scope="module")
def london(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map of made-up imagery where the survey's London places are, in British metres."""
    folder = tmp_path_factory.mktemp("london")
    generator = np.random.default_rng(1)
    blocks = generator.integers(20, 200, (3, 28, 28))
    pixels = np.kron(blocks, np.ones((1, 16, 16))) + generator.normal(0, 9, (3, 448, 448))
    options = {"driver": "GTiff", "count": 3, "height": 448, "width": 448, "dtype": "uint8"}
    affine = Affine(10, 0, 528_000, 0, -10, 184_480)
    with rasterio.open(
        folder / "city.tif", "w", crs="EPSG:27700", transform=affine, **options
    ) as dataset:
        dataset.write(pixels.clip(0, 255).astype(np.uint8))
    soundmap.predict(
        folder / "city.tif",
        concepts=["road traffic", "voices in the street", "birdsong"],
        out=folder / "map.tif",
    )
    return folder / "map.tif"


def test_a_survey_of_ratings(command: Command, london: Path, survey: Path) -> None:
    stats = pytest.importorskip("scipy.stats")
    metrics = pytest.importorskip("sklearn.metrics")
    words = "--value", "traffic_noise_1to5=road traffic", "--value", "natural_sounds_1to5=birdsong"
    more = "--audible-from", 3, "--place", "LocationID", "--json", "-"
    result = command("evaluate", "map", london, "--reference", survey, *words, *more)
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)

    table = pd.read_csv(survey)
    placed = table.dropna(subset=["latitude", "longitude"])
    to_map = pyproj.Transformer.from_crs("EPSG:4326", "EPSG:27700", always_xy=True)
    xy = np.column_stack(to_map.transform(placed.longitude, placed.latitude))
    with rasterio.open(london) as dataset:
        values = np.array(list(dataset.sample(xy)))
        values[(values == 0).all(axis=1)] = np.nan
    on = np.isfinite(values).all(axis=1)
    assert found["left_out"]["without a geometry or coordinates"] == len(table) - len(placed)
    told = placed[["traffic_noise_1to5", "natural_sounds_1to5"]].notna().any(axis=1)
    assert found["judged"] == (on & told).sum() > 500
    assert found["places"] == placed.LocationID[on & told].nunique() > 8
    columns = ("traffic_noise_1to5", 0), ("natural_sounds_1to5", 2)
    for one, (column, band) in zip(found["concepts"], columns, strict=True):
        rated = on & placed[column].notna()
        rating, number = placed[column][rated], values[rated, band]
        expected = stats.spearmanr(number, rating).statistic
        assert one["spearman"]["value"] == pytest.approx(expected, abs=1e-9)
        expected = metrics.average_precision_score(rating >= 3, number)
        assert one["average_precision"]["value"] == pytest.approx(expected, abs=1e-9)
        assert one["audible"] == (rating >= 3).sum()
        assert one["spearman"]["low"] < one["spearman"]["value"] < one["spearman"]["high"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--value traffic_noise_1to5=birdsong", "no place lies on the map"),
        ("--value traffic=birdsong", "no column 'traffic'; did you mean 'traffic_noise_1to5'"),
        ("--label LocationId", "no column 'LocationId'; did you mean 'LocationID'"),
        ("--label LocationID", "none of its classes (CarloV,"),
        ("", "no column is named like a concept of the map"),
    ],
)
def test_a_survey_of_another_place_is_one_line(
    command: Command, mosaic: Path, survey: Path, words: str, message: str
) -> None:
    result = command("evaluate", "map", mosaic, "--reference", survey, *words.split())
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""

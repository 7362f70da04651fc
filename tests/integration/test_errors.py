"""Every mistake ends in one clear line, a non-zero exit and an untouched folder."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio

import soundmap

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def refused(result: subprocess.CompletedProcess[str], about: str) -> None:
    """Check that a command ended in one line about ``about``, and in no traceback."""
    assert result.returncode not in (0, None)
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    assert about in lines[0]
    assert not result.stdout


@pytest.fixture
def inputs(tmp_path: Path, town: Path) -> Path:
    """A folder of things that cannot be mapped, and ``town.tif``, which can."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    shutil.copy(town, folder)
    whole = town.read_bytes()
    (folder / "cut.tif").write_bytes(whole[: len(whole) // 2])
    (folder / "text.tif").write_text("this is no raster\n")
    (folder / "empty.tif").touch()
    (folder / "nothing").mkdir()
    with rasterio.open(town) as dataset:
        profile = {**dataset.profile, "crs": None}
        with rasterio.open(folder / "placeless.tif", "w", **profile) as copy:
            copy.write(dataset.read())
    point = {"type": "Point", "coordinates": [15.01, 49.64]}
    for name, features in (
        ("void", []),
        ("points", [{"type": "Feature", "properties": {}, "geometry": point}]),
    ):
        text = json.dumps({"type": "FeatureCollection", "features": features})
        (folder / f"{name}.geojson").write_text(text)
    return folder


MISTAKES = {
    "file missing": ("--imagery {inputs}/twon.tif", "did you mean"),
    "folder missing": ("--imagery {inputs}/away/town.tif", "there is no folder"),
    "not a raster": ("--imagery {inputs}/text.tif", "not a raster"),
    "empty file": ("--imagery {inputs}/empty.tif", "the file is empty"),
    "truncated raster": ("--imagery {inputs}/cut.tif", "cut short"),
    "no CRS": ("--imagery {inputs}/placeless.tif", "no coordinate reference system"),
    "folder without rasters": ("--imagery {inputs}/nothing", "holds no rasters"),
    "pattern without match": ("--imagery {inputs}/x*.tif", "no file matches"),
    "no imagery": ("", "no imagery"),
    "web address": ("--imagery https://example.org/a.tif", "local files"),
    "bbox upside down": ("{town} --bbox 15 49.66 15.02 49.63", "did you mean"),
    "bbox left to right": ("{town} --bbox 15.02 49.63 15 49.66", "did you mean"),
    "bbox beyond the pole": ("{town} --bbox 15 49.63 15.02 95", "within -90 and 90"),
    "bbox beyond the globe": ("{town} --bbox -200 49.63 15.02 49.66", "within -180 and 180"),
    "bbox without area": ("{town} --bbox 15 49.63 15 49.66", "no area"),
    "bbox not a number": ("{town} --bbox 15 nan 15.02 49.66", "finite"),
    "bbox off the imagery": ("{town} --bbox -9.25 38.69 -9.09 38.80", "off the imagery"),
    "bbox beside the imagery": ("{town} --bbox 15.1 49.63 15.2 49.66", "off the imagery"),
    "bbox too short": ("{town} --bbox 15 49.63 15.02", "--bbox"),
    "empty polygon file": ("{town} --region {inputs}/void.geojson", "void.geojson"),
    "points instead of polygons": ("{town} --region {inputs}/points.geojson", "needs polygons"),
    "region missing": ("{town} --region {inputs}/town.geojson", "no such file"),
    "region is a raster": ("{town} --region {inputs}/town.tif", "town.tif"),
    "two regions": (
        "{town} --bbox 15 49.63 15.02 49.66 --region {inputs}/void.geojson",
        "give one of them",
    ),
    "unknown concept": ("{town} --concepts birdsnog", "did you mean 'birdsong'"),
    "concept twice": ("{town} --concepts birdsong,Birdsong", "twice"),
    "concept file missing": ("{town} --concepts {inputs}/own.json", "does not exist"),
    "empty phrase": ("{town} --text ' '", "--text is empty"),
    "unknown model": ("{town} --model soundmap-smal", "soundmap-small"),
    "model folder without model": ("{town} --model {inputs}", "not a model folder"),
    "unknown value": ("{town} --value loudness", "--value"),
    "unknown detail": ("{town} --detail pixel", "--detail"),
    "not a CRS": ("{town} --crs EPSG:1", "--crs"),
    "CRS made for another place": ("{town} --crs EPSG:28992 --bbox 15 -80 16 -79", "off"),
    "negative resolution": ("{town} --resolution -5", "--resolution"),
    "finer than the imagery": ("{town} --gsd 0.5", "--gsd"),
    "two bands": ("{town} --bands 1,2", "--bands"),
    "band that is not there": ("{town} --bands 3,2,9", "no band 9"),
    "reversed rescale": ("{town} --rescale 9,3", "--rescale"),
    "no workers": ("{town} --workers 0", "--workers"),
    "fewer than no workers": ("{town} --workers -1", "--workers"),
    "too many workers": ("{town} --workers 10000", "--workers"),
    "workers and scheduler": (
        "{town} --workers 1 --scheduler tcp://127.0.0.1:9",
        "give one of them",
    ),
    "scheduler of no kind": ("{town} --scheduler junk://127.0.0.1:9", "junk"),
    "unknown option": ("{town} --consepts birdsong", "--consepts"),
}


@pytest.mark.parametrize(("words", "about"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_in_one_line(
    command: Command, inputs: Path, tmp_path: Path, words: str, about: str
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    args = shlex.split(words.format(inputs=inputs, town=f"--imagery {inputs}/town.tif"))
    for name in ("map.tif", "map.zarr"):
        refused(command("predict", *args, "--out", folder / name), about)
        assert not list(folder.iterdir())


def unwritable(tmp_path: Path) -> Path:
    if os.geteuid():
        folder = tmp_path / "locked"
        folder.mkdir(mode=0o500)
        return folder
    # To the superuser no folder is locked but those that the system itself keeps.
    folder = Path("/proc")
    if not folder.is_dir():
        pytest.skip("the superuser may write everywhere here")
    return folder


OUTPUTS = {
    "unknown type": ("map.png", "unknown output type"),
    "no type": ("map", "unknown output type"),
    "folder missing": ("away/map.tif", "does not exist"),
    "file in place of the folder": ("town.tif/map.tif", "does not exist"),
    "unwritable folder": ("locked/map.tif", "cannot write in folder"),
    "unwritable folder for a store": ("locked/map.zarr", "cannot write in folder"),
    "remote store": ("gs://maps/map.zarr", "local folders and to s3://"),
}


@pytest.mark.parametrize(("out", "about"), OUTPUTS.values(), ids=OUTPUTS)
def test_an_impossible_output_is_told_before_the_work(
    command: Command,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    out: str,
    about: str,
) -> None:
    monkeypatch.setattr("soundmap.api.prepare", lambda request: pytest.fail("work was begun"))
    before = sorted(inputs.rglob("*"))
    folder, _, name = out.partition("/")
    target: object = out if "://" in out else inputs / out
    if folder == "locked":
        target = unwritable(tmp_path) / name
    refused(command("predict", "--imagery", inputs / "town.tif", "--out", target), about)
    assert sorted(inputs.rglob("*")) == before


def test_no_output_named(command: Command, inputs: Path) -> None:
    refused(command("predict", "--imagery", inputs / "town.tif"), "--out")


@pytest.fixture
def older(tmp_path: Path, town: Path) -> Path:
    """A folder with older maps, ``map.tif`` and ``map.zarr``, and a folder that is no map."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("map.tif", "map.zarr"):
        soundmap.predict(town, concepts=["birdsong"], out=folder / name)
    (folder / "notes.zarr").mkdir()
    (folder / "notes.zarr" / "diary.txt").write_text("dear diary")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


FAILURES = {
    "mistake": ("--imagery {inputs}/town.tif --concepts birdsnog", "birdsnog"),
    "bad imagery": ("--imagery {inputs}/cut.tif", "cut short"),
    "no imagery there": ("--imagery {inputs}/black.tif", "no valid pixel"),
    "damaged inside": ("--imagery {inputs}/damaged.tif", "damaged.tif"),
}


def test_an_older_map_is_not_replaced_unasked(command: Command, inputs: Path, older: Path) -> None:
    before = contents(older)
    for name in ("map.tif", "map.zarr"):
        result = command("predict", "--imagery", inputs / "town.tif", "--out", older / name)
        refused(result, "add --overwrite")
    result = command(
        "predict", "--imagery", inputs / "town.tif", "--overwrite", "--out", older / "notes.zarr"
    )
    refused(result, "is not a Zarr store")
    assert contents(older) == before


@pytest.mark.parametrize(("words", "about"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("name", ["map.tif", "map.zarr"])
def test_a_failure_leaves_an_older_map_as_it_was(
    command: Command, inputs: Path, older: Path, name: str, words: str, about: str
) -> None:
    spoil(inputs)
    before = contents(older)
    args = words.format(inputs=inputs).split()
    result = command("predict", *args, "--overwrite", "--quiet", "--out", older / name)
    refused(result, about)
    assert contents(older) == before


def spoil(inputs: Path) -> None:
    """Add a raster without a valid pixel, and one whose pixels cannot be decoded."""
    with rasterio.open(inputs / "town.tif") as dataset:
        profile = {**dataset.profile, "nodata": 0}
        with rasterio.open(inputs / "black.tif", "w", **profile) as black:
            black.write(np.zeros((3, *dataset.shape), np.uint8))
        offset = int(dataset.get_tag_item("BLOCK_OFFSET_1_1", "TIFF", bidx=1))
    data = bytearray((inputs / "town.tif").read_bytes())
    data[offset : offset + 200] = bytes(200)
    (inputs / "damaged.tif").write_bytes(data)


@pytest.mark.parametrize("name", ["map.tif", "map.zarr"])
def test_imagery_that_fails_while_read_leaves_nothing(
    command: Command, inputs: Path, tmp_path: Path, name: str
) -> None:
    spoil(inputs)
    folder = tmp_path / "out"
    folder.mkdir()
    result = command("predict", "--imagery", inputs / "damaged.tif", "--out", folder / name)
    assert result.returncode
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert result.stderr.rstrip().endswith(errors[0])
    assert "Traceback" not in result.stderr
    assert not list(folder.iterdir())


# What goes to the terminal past Python, or through logging, shows in a program of its own alone.


def test_libraries_add_nothing_to_the_line(program: Command, inputs: Path, tmp_path: Path) -> None:
    spoil(inputs)
    folder = tmp_path / "out"
    folder.mkdir()
    for name, about in (
        ("text.tif", "not a raster"),
        ("cut.tif", "cut short"),
        ("damaged.tif", "could not be read"),
    ):
        result = program(
            "predict", "--imagery", inputs / name, "--quiet", "--out", folder / "map.tif"
        )
        refused(result, about)
        assert not list(folder.iterdir())


def test_a_scheduler_that_does_not_answer(program: Command, inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    args = ["--imagery", inputs / "town.tif", "--scheduler", "tcp://127.0.0.1:9"]
    result = program("predict", *args, "--out", folder / "map.tif", timeout_s=60)
    refused(result, "no Dask scheduler answers at 'tcp://127.0.0.1:9'")
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("words", "about"),
    [
        ("info {inputs}/away.tif", "no such file"),
        ("info {inputs}/town.tif", "not a soundmap map"),
        ("info {inputs}/text.tif", "cannot be read as a raster"),
        ("info {inputs}/nothing", "not a Zarr store"),
        ("concepts list --model nobody", "nobody"),
        ("evaluate --data {inputs}", "eurosat"),
        ("predcit", "predcit"),
    ],
)
def test_other_verbs_do_likewise(command: Command, inputs: Path, words: str, about: str) -> None:
    refused(command(*words.format(inputs=inputs).split()), about)

"""The command line: verbs explain themselves, options arrive as they were typed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest

import soundmap
from soundmap.api import Request
from soundmap.cli import group, main

Command = Callable[..., "subprocess.CompletedProcess[str]"]

# Nothing of this may be loaded for a page of help, which has to be there at once.
HEAVY = {"torch", "dask", "distributed", "rasterio", "geopandas", "pandas", "xarray", "zarr"}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*args: object) -> subprocess.CompletedProcess[str]:
        words = ["soundmap", *map(str, args)]
        monkeypatch.setattr(sys, "argv", words)
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return subprocess.CompletedProcess(words, code, *capsys.readouterr())

    return call


def verbs(parent: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    context = click.Context(parent)
    for name in parent.list_commands(context):
        one = parent.get_command(context, name)
        assert one is not None
        yield (*path, name)
        if isinstance(one, click.Group):
            yield from verbs(one, (*path, name))


VERBS = list(verbs(group))


def command_of(path: tuple[str, ...]) -> click.Command:
    found: click.Command = group
    for name in path:
        assert isinstance(found, click.Group)
        one = found.get_command(click.Context(found), name)
        assert one is not None
        found = one
    return found


def test_the_verbs() -> None:
    assert {path[0] for path in VERBS} >= {"predict", "info", "models", "concepts", "evaluate"}
    assert ("models", "list") in VERBS
    assert ("concepts", "list") in VERBS


@pytest.mark.parametrize("path", [(), *VERBS], ids=" ".join)
def test_help(command: Command, path: tuple[str, ...]) -> None:
    result = command(*path, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Usage: ")
    assert command(*path, "-h").stdout == result.stdout
    if not isinstance(command_of(path), click.Group) or not path:
        assert f"  soundmap {' '.join(path)}".rstrip() in result.stdout.split("Options:")[1]


@pytest.mark.parametrize("path", VERBS, ids=" ".join)
def test_every_option_is_explained(path: tuple[str, ...]) -> None:
    one = command_of(path)
    assert one.help
    for parameter in one.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


@pytest.mark.parametrize("words", [["--help"], ["predict", "--help"], ["--version"], ["predcit"]])
def test_help_loads_nothing_heavy(project: Path, words: list[str]) -> None:
    script = (
        "import sys\n"
        "from soundmap.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('modules:', *sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=project,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(result.stdout.rpartition("modules: ")[2].split())
    assert "soundmap.cli" in loaded
    assert not HEAVY & loaded


def test_version(command: Command) -> None:
    assert soundmap.__version__ in command("--version").stdout


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What `soundmap predict` would have run."""
    heard: list[Request] = []

    def run(request: Request, listener: object, *, going_on: bool = False) -> Request:
        heard.append(request)
        return request

    monkeypatch.setattr("soundmap.api.run", run)
    return heard


def test_defaults(command: Command, requests: list[Request]) -> None:
    result = command("predict", "--out", "map.tif")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "Wrote map.tif\n"
    assert requests == [Request(out=Path("map.tif"))]


def test_every_option_arrives(command: Command, requests: list[Request]) -> None:
    words = (
        "predict --imagery s2.tif --bbox -9.25 38.69 -9.09 38.80 --region parks.gpkg:parks"
        " --model models/own --concepts birdsong,wind --text bells --text frogs"
        " --audio rain=a.wav --value share --scale 3 --month 7 --hour 6 --precision int8"
        " --detail image --crs EPSG:3035 --resolution 250 --gsd 10 --bands 4,3,2 --rescale 0,3000"
        " --dtype uint8 --out map.zarr --shards --overwrite --workers 3 --scheduler tcp://127.0.0.1:8786"
        " --where pop>5 --mask land.gpkg --dry-run --quiet"
    )
    result = command(*words.split())
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    expected = Request(
        out=Path("map.zarr"),
        imagery="s2.tif",
        bbox=(-9.25, 38.69, -9.09, 38.80),
        region="parks.gpkg:parks",
        where="pop>5",
        mask="land.gpkg",
        model="models/own",
        concepts="birdsong,wind",
        text=("bells", "frogs"),
        audio=("rain=a.wav",),
        value="share",
        detail="image",
        crs="EPSG:3035",
        resolution=250.0,
        gsd=10.0,
        scale=3,
        month=7,
        hour=6,
        bands=(4, 3, 2),
        rescale=(0.0, 3000.0),
        dtype="uint8",
        precision="int8",
        shards=True,
        overwrite=True,
        dry_run=True,
        workers=3,
        scheduler="tcp://127.0.0.1:8786",
    )
    assert requests == [expected]
    # No field of a request is out of reach of the command line.
    default = Request(out=Path("map.tif"))
    assert all(getattr(expected, f.name) != getattr(default, f.name) for f in fields(Request))


@pytest.mark.parametrize(
    ("words", "about"),
    [
        ("--bands 3,2", "--bands"),
        ("--bands red,green,blue", "--bands"),
        ("--bands 1.5,2,3", "--bands"),
        ("--rescale 0", "--rescale"),
        ("--rescale 0-3000", "--rescale"),
        ("--bbox 1 2 3", "--bbox"),
        ("--bbox 1 2 3 north", "--bbox"),
        ("--workers two", "--workers"),
        ("--value loud", "--value"),
        ("--resolution", "--resolution"),
        ("stray.tif", "stray.tif"),
    ],
)
def test_what_cannot_be_read(
    command: Command, requests: list[Request], words: str, about: str
) -> None:
    result = command("predict", *words.split(), "--out", "map.tif")
    assert result.returncode == 2
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert about in result.stderr
    assert not requests


def test_models_list(command: Command) -> None:
    result = command("models", "list")
    assert result.returncode == 0
    assert "soundmap-small" in result.stdout
    assert "Apache-2.0" in result.stdout


def test_concepts_list(command: Command) -> None:
    result = command("concepts", "list")
    assert result.returncode == 0
    for word in ("birdsong", "biophony", "geophony", "anthrophony"):
        assert word in result.stdout
    assert command("concepts", "list", "--model", "soundmap-small").stdout == result.stdout


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small map of the sample scene, as GeoTIFF and as Zarr."""
    folder = tmp_path_factory.mktemp("maps")
    for name in ("map.tif", "map.zarr"):
        soundmap.predict(
            "sample",
            bbox=(3.0, 54.46, 3.02, 54.47),
            concepts=["birdsong", "road traffic"],
            text=["church bells"],
            out=folder / name,
        )
    return folder


@pytest.mark.parametrize("name", ["map.tif", "map.zarr"])
def test_info(command: Command, maps: Path, name: str) -> None:
    result = command("info", maps / name)
    assert (result.returncode, result.stderr) == (0, "")
    for text in ("birdsong", "road traffic", "church bells", "generic", "EPSG:32631"):
        assert text in result.stdout
    for text in ("probability", "soundmap-small", "patch detail", "read at 10 m"):
        assert text in result.stdout


@pytest.mark.parametrize("name", ["map.tif", "map.zarr"])
def test_info_as_json(command: Command, maps: Path, name: str) -> None:
    result = command("info", maps / name, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    info = json.loads(result.stdout)
    assert info["value"] == "probability"
    assert info["model"] == "soundmap-small"
    assert info["crs"] == "EPSG:32631"
    assert [c["name"] for c in info["concepts"]] == ["birdsong", "road traffic", "church bells"]
    assert [c["calibration"] for c in info["concepts"]] == ["platt", "platt", "generic"]
    for concept in info["concepts"]:
        figures = concept["statistics"]
        assert 0 <= figures["minimum"] <= figures["mean"] <= figures["maximum"] <= 1
        assert figures["valid"] == info["shape"][0] * info["shape"][1]
    settings = info["extra"]["settings"]
    assert settings["detail"] == "patch"
    west, south, east, north = info["bounds_lonlat"]
    assert west <= 3.0 < 3.02 <= east
    assert south <= 54.46 < 54.47 <= north


def test_a_picture_is_drawn(command: Command, tmp_path: Path) -> None:
    words = ["--imagery", "sample", "--bbox", 3.0, 54.46, 3.02, 54.47, "--concepts", "birdsong"]
    outs = ["--out", tmp_path / "map.tif", "--picture", tmp_path / "map.png"]
    result = command("predict", *words, *outs)
    assert result.returncode == 0
    assert result.stdout.splitlines() == [
        f"Wrote {tmp_path / f'map.{end}'}" for end in ("tif", "png")
    ]
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")

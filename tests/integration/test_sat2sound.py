"""Maps by models in the published format, on real scenes, asked with recordings and texts."""

from __future__ import annotations

import functools
import json
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio

import soundmap
from soundmap import layout, pipeline
from soundmap.encoder import Encoder, load_encoder

Command = Callable[..., "subprocess.CompletedProcess[str]"]
Converted = Callable[..., Path]

# About two windows wide, so that units can meet in its middle.
KRIVOKLATSKO = ("s2_krivoklatsko_rgb_10m_sharpened_utm33.tif", (13.92, 50.03, 13.96, 50.056))
GORINCHEM = ("gorinchem_nl_ortho_0p25m_epsg28992.tif", None)
PYEONGCHANG = ("pyeongchang_0p6m_epsg3857_cog.tif", None)


@pytest.fixture(scope="module")
def sentinel(converted: Converted) -> Path:
    return converted("nometa", "sat_type=sentinel")


@pytest.fixture(scope="module")
def bing(converted: Converted) -> Path:
    return converted("withmeta")


@pytest.fixture(scope="module")
def encoders() -> Iterator[Callable[..., Encoder]]:
    """Loads a model once for all tests here: that takes longer than to map a small place."""
    load = functools.cache(load_encoder)
    yield load
    load.cache_clear()


@pytest.fixture(autouse=True)
def _keep_encoders(monkeypatch: pytest.MonkeyPatch, encoders: Callable[..., Encoder]) -> None:
    monkeypatch.setattr("soundmap.prepare.load_encoder", encoders)


@pytest.fixture(scope="module")
def clips(shared_data: Path) -> list[str]:
    """Sounds to look for, as `--audio` takes them."""
    other = shared_data / "audio" / "other"
    return [f"{n}={other / f'CT10{n}_binaural_camden_town_london.flac'}" for n in (1, 3)]


@pytest.fixture(scope="module")
def small_flan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder of the right kind and width, but one thin layer and made-up numbers."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("flan")
    letters = {c: i + 2 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, **letters}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder)
    config = T5Config(
        vocab_size=32, d_model=1024, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    torch.manual_seed(4)
    T5EncoderModel(config).save_pretrained(folder)
    return folder


def scene_of(kind: str, detail: str) -> tuple[str, tuple[float, ...] | None]:
    if kind == "sentinel":
        return KRIVOKLATSKO if detail == "patch" else (KRIVOKLATSKO[0], (13.85, 50.0, 13.97, 50.06))
    return GORINCHEM if detail == "patch" else PYEONGCHANG


def region_of(bbox: tuple[float, ...] | None) -> list[object]:
    return [] if bbox is None else ["--bbox", *bbox]


@pytest.mark.parametrize("detail", ["patch", "image"])
@pytest.mark.parametrize("kind", ["sentinel", "bing"])
def test_maps_real_scenes(
    command: Command,
    request: pytest.FixtureRequest,
    shared_data: Path,
    clips: list[str],
    tmp_path: Path,
    kind: str,
    detail: str,
) -> None:
    """The command of the README for such a model gives a valid map, and says what it is."""
    scene, bbox = scene_of(kind, detail)
    folder = request.getfixturevalue(kind)
    out = tmp_path / "map.tif"
    words = ["predict", "--imagery", shared_data / "scenes" / scene, *region_of(bbox)]
    words += ["--model", folder, "--detail", detail, "--out", out]
    words += [word for clip in clips for word in ("--audio", clip)]
    result = command(*words)
    assert result.returncode == 0, result.stderr
    assert "no calibration" in result.stderr
    assert "Warning" not in result.stderr, "the scene is what the model was trained on"
    with rasterio.open(out) as dataset:
        values = dataset.read()
        assert dataset.descriptions == ("1", "3")
        cell_m = dataset.transform.a
        if scene == PYEONGCHANG[0]:
            # A metre of Web Mercator is less on the ground, at 37.6 degrees north.
            cell_m *= math.cos(math.radians(37.6))
    window_m = {"sentinel": 2560, "bing": 180}[kind]
    assert cell_m == pytest.approx(window_m / (14 if detail == "patch" else 1), rel=0.01)
    assert np.isfinite(values).mean() > 0.8
    assert np.nanmin(values) >= -1
    assert np.nanmax(values) <= 1
    assert np.nanstd(values[0]) > 0
    facts = json.loads(command("info", out, "--json").stdout)
    assert facts["value"] == "similarity"
    assert facts["detail"] == detail


def test_month_and_hour_matter_and_are_kept(
    command: Command, bing: Path, shared_data: Path, clips: list[str], tmp_path: Path
) -> None:
    scene = shared_data / "scenes" / GORINCHEM[0]
    maps = {}
    for name, extra in {"none": [], "july": ["--month", 7, "--hour", 6]}.items():
        out = tmp_path / f"{name}.zarr"
        words = ["predict", "--imagery", scene, "--model", bing, "--audio", clips[0], *extra]
        result = command(*words, "--detail", "image", "--scale", 1, "--out", out)
        assert result.returncode == 0, result.stderr
        maps[name] = soundmap.open(out)["similarity"].to_numpy()
    assert np.abs(maps["none"] - maps["july"]).max() > 1e-4
    facts = json.loads(command("info", tmp_path / "july.zarr", "--json").stdout)["extra"]
    assert (facts["month"], facts["hour"]) == ("7", "6")
    facts = json.loads(command("info", tmp_path / "none.zarr", "--json").stdout)["extra"]
    assert "month" not in facts


@pytest.mark.parametrize(
    ("kind", "detail"), [("sentinel", "patch"), ("bing", "patch"), ("sentinel", "image")]
)
def test_units_and_batches_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    shared_data: Path,
    clips: list[str],
    kind: str,
    detail: str,
) -> None:
    scene, bbox = scene_of(kind, detail)
    folder = request.getfixturevalue(kind)
    with_metadata = {"month": 1, "hour": 22} if kind == "bing" else {}

    def mapped() -> np.ndarray:
        return soundmap.predict(
            shared_data / "scenes" / scene,
            bbox=bbox,
            model=str(folder),
            audio=clips[:1],
            detail=detail,
            **with_metadata,
        ).to_numpy()

    whole = mapped()
    # Units as small as the step from one window to the next; batches of one window.
    monkeypatch.setattr(layout, "_UNIT_PX", 16)
    monkeypatch.setattr(layout, "_WINDOWS_PER_UNIT", 0.5)
    monkeypatch.setattr(layout, "_LEAST_UNIT_CELLS", 1)
    monkeypatch.setattr(pipeline, "_BATCH_PX", 1)
    parts = mapped()
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-4)
    assert np.nanstd(whole) > 1e-3, "all cells are alike, so this proves nothing"


def test_texts(
    monkeypatch: pytest.MonkeyPatch, sentinel: Path, small_flan: Path, clips: list[str]
) -> None:
    """A text's vector depends on the text alone; a text and a recording are added."""
    monkeypatch.setenv("SOUNDMAP_TEXT_ENCODER", str(small_flan))
    # Loaded anew: an encoder looks for its text encoder when it is made.
    encoder = load_encoder(str(sentinel))
    texts = ["church bells", "a", "surf on a long beach of shingle"]
    together = encoder.encode_text(texts)
    alone = np.concatenate([encoder.encode_text([text]) for text in texts])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)

    from soundmap.concepts import choose_concepts
    from soundmap.encoder import find_model

    clip = clips[0].partition("=")[2]
    bank = choose_concepts(
        encoder,
        find_model(str(sentinel)),
        "patch",
        None,
        ["church bells"],
        [f"church bells={clip}"],
    )
    both = together[0] + encoder.encode_audio([clip])[0]
    assert bank.names == ("church bells",)
    np.testing.assert_allclose(bank.vectors[0], both / np.linalg.norm(both), rtol=0, atol=1e-5)
    default = choose_concepts(encoder, find_model(str(sentinel)), "patch", "birdsong", [])
    assert default.calibration == ("none",)


class TestMistakes:
    """One clear line each, before anything is computed."""

    def one_line(self, result: subprocess.CompletedProcess[str], *about: str) -> None:
        assert result.returncode != 0
        assert result.stderr.startswith("Error: ")
        assert len(result.stderr.strip().splitlines()) == 1
        for word in about:
            assert word in result.stderr

    def test_hour_without_metadata(self, command: Command, sentinel: Path, tmp_path: Path) -> None:
        words = ["predict", "--imagery", "sample", "--model", sentinel, "--hour", 6]
        result = command(*words, "--out", tmp_path / "map.tif")
        self.one_line(result, "hour", "was not trained with")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("option", "value"), [("--hour", 24), ("--month", 0), ("--month", 13), ("--scale", 2)]
    )
    def test_impossible(
        self, command: Command, bing: Path, tmp_path: Path, option: str, value: int
    ) -> None:
        words = ["predict", "--imagery", "sample", "--model", bing, option, value]
        result = command(*words, "--out", tmp_path / "map.tif")
        self.one_line(result, option.removeprefix("--"), str(value))

    def test_probability_without_calibration(
        self, command: Command, bing: Path, clips: list[str], tmp_path: Path
    ) -> None:
        words = ["predict", "--imagery", "sample", "--model", bing, "--audio", clips[0]]
        result = command(*words, "--value", "probability", "--out", tmp_path / "map.tif")
        self.one_line(result, "calibration", "--value similarity")

    def test_text_encoder_that_is_not_there(
        self, monkeypatch: pytest.MonkeyPatch, command: Command, bing: Path, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("SOUNDMAP_TEXT_ENCODER", str(tmp_path / "nowhere"))
        words = ["predict", "--imagery", "sample", "--model", bing, "--text", "bells"]
        result = command(*words, "--out", tmp_path / "map.tif")
        self.one_line(result, "text encoder", "SOUNDMAP_TEXT_ENCODER", "--audio")

    def test_recordings_need_a_model_that_hears(
        self, command: Command, clips: list[str], tmp_path: Path, project: Path
    ) -> None:
        deaf = tmp_path / "deaf"
        shutil.copytree(project / "models" / "soundmap-small", deaf)
        card = json.loads((deaf / "model.json").read_text())
        card["name"] = "deaf"
        card["architecture"] |= {"audio": False, "audio_tower": None}
        (deaf / "model.json").write_text(json.dumps(card))
        words = ["predict", "--imagery", "sample", "--model", deaf, "--audio", clips[0]]
        result = command(*words, "--out", tmp_path / "map.tif")
        self.one_line(result, "deaf", "--text")


def test_the_bundled_model_takes_recordings(
    command: Command, clips: list[str], tmp_path: Path
) -> None:
    words = ["predict", "--imagery", "sample", "--audio", clips[0]]
    result = command(*words, "--out", tmp_path / "map.tif")
    assert result.returncode == 0, result.stderr
    with rasterio.open(tmp_path / "map.tif") as found:
        assert found.descriptions == (clips[0].partition("=")[0],)
        values = found.read(1)
    assert ((values >= 0) & (values <= 1)).all()

"""`soundmap evaluate retrieval` from Parquet to figures, with a tiny model that sees and hears."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from soundmap.encoder import load_encoder
from soundmap.encoder.card import CARD_FILE, file_sha256
from soundmap.encoder.described import Facts, encode_described
from soundmap.encoder.torch_encoder import TEXT_TABLE, TOKENIZER_FILE, WEIGHTS_FILE, TorchEncoder
from soundmap.nn.audio_small import AudioConfig
from soundmap.nn.metadata import Metadata, encode_hour, encode_latlong, encode_month
from soundmap.nn.model import ModelConfig, SoundModel
from soundmap.nn.vit import ViTConfig
from soundmap.products.embed_samples import load_embeddings
from soundmap.products.retrieval import retrieval

Command = Callable[..., "subprocess.CompletedProcess[str]"]

ROWS = 14
CONFIG = ModelConfig(
    vit=ViTConfig(window_px=16, patch_px=8, width=16, depth=1, heads=2),
    token_dim=16,
    dim=16,
    codes=24,
    temperature=2.0,
    text_dim=256,
    metadata=("asource", "tsource", "latlong", "month", "time"),
    audio=True,
    audio_tower=AudioConfig(stem=(4, 8, 8, 16), width=16, depth=1, heads=2),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with fresh weights, of the published kind but small."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    net = SoundModel(CONFIG)
    for layer in net.modules():
        # Heads of eight split a width of sixteen well enough for a test.
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=0.5)
    state = net.state_dict()
    root = Path(__file__).resolve().parents[2] / "models" / "soundmap-small"
    tokenizer = (root / TOKENIZER_FILE).read_bytes()
    (folder / TOKENIZER_FILE).write_bytes(tokenizer)
    state[TEXT_TABLE] = torch.randn(len(json.loads(tokenizer)["model"]["vocab"]), 256).half()
    save_file({k: v.contiguous() for k, v in state.items()}, str(folder / WEIGHTS_FILE))
    card = {
        "name": "tiny",
        "summary": "",
        "licence": "",
        "architecture": asdict(CONFIG),
        "input": {
            "window_px": 16,
            "patch_px": 8,
            "native_px": 24,
            "gsd_m": [[0.6, 0.6]],
            "scales": [1, 3],
            "metadata": ["lonlat", "month", "hour"],
        },
        "files": {n: file_sha256(folder / n) for n in (WEIGHTS_FILE, TOKENIZER_FILE)},
    }
    (folder / CARD_FILE).write_text(json.dumps(card))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GeoSound in small: one image is broken, one recording and one caption are missing."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("geosound")
    generator = np.random.default_rng(4)
    rows: list[dict[str, Any]] = []
    for i in range(ROWS):
        file = io.BytesIO()
        pixels = generator.integers(0, 256, (72, 72, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        mel = generator.uniform(-80, 0, (2, 1, 1001, 64)).astype(np.float32)
        rows.append(
            {
                "sample_id": f"yfcc-{i}",
                "source": "yfcc",
                "bingmap_image": {
                    "bytes": b"no image" if i == 3 else file.getvalue(),
                    "path": None,
                },
                "mel_features": None if i == 5 else mel.tolist(),
                "audio_caption": "" if i == 7 else f"birds and {('rain', 'cars', 'bells')[i % 3]}",
                "audio_caption_source": "meta",
                "llava_caption_bingmap_zl1": f"one may hear {('rain', 'cars', 'bells')[i % 3]}",
                "latitude": 40.0 + i,
                "longitude": -3.0 * i,
                "date": "2012-05-06 13:00:00" if i % 2 else "2012-07",
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")
    (folder / "data.toml").write_text(
        '[test]\nkind = "parquet"\npath = "test.parquet"\nimagery = "bingmap"\nnative_px = 24\n'
        f'cache = "{folder / "cache"}"\nname = "tiny set"\n[test.splits]\ntest = "test.parquet"\n'
    )
    return folder / "data.toml"


def test_from_parquet_to_figures(command: Command, model: Path, data: Path, tmp_path: Path) -> None:
    kept, bad = tmp_path / "kept.npz", tmp_path / "bad.csv"
    asked = ("--json", tmp_path / "scores.json", "--resamples", 50)
    result = command(
        "evaluate", "retrieval", "--model", model, "--data", data, "--embeddings", kept,
        "--bad-rows", bad, *asked,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "image + audio caption -> audio" in result.stdout
    assert "Samples with image: 13, audio: 12, audio caption: 12" in result.stdout
    assert f"Wrote {kept}" in result.stdout.replace("\n", "")

    score = json.loads((tmp_path / "scores.json").read_text())
    assert score["facts"]["metadata"] == list(CONFIG.metadata)
    assert score["facts"]["told_gsd_m"] == 0.6
    assert sum(score["facts"]["bad_rows"].values()) == 1
    assert len(bad.read_text().splitlines()) == 2
    held = load_embeddings(kept)
    known = held.known["image"] & held.known["audio"] & held.known["audio_caption"]
    assert known.sum() == 11
    images, sounds, texts = (
        held.vectors[kind][known] for kind in ("image", "audio", "audio_caption")
    )
    both = retrieval(images, sounds, texts, "query")
    found = {(one["query"], one["add_text"]): one for one in score["directions"]}
    one = found["image + audio caption", "query"]
    assert one["reported"] == both.image_to_sound.reported()
    assert one["recall_at"]["5"]["value"] == both.image_to_sound.recall_at(5)

    # Again from the vectors alone, and the figures by themselves.
    again = command("evaluate", "retrieval", "--embeddings", kept, "--csv", "-", "--resamples", 50)
    assert (again.returncode, again.stderr) == (0, "")
    rows = list(csv.DictReader(io.StringIO(again.stdout)))
    row = next(r for r in rows if r["add_text"] == "query" and r["figure"] == "recall_5")
    assert float(row["value"]) == one["recall_at"]["5"]["value"]
    assert float(row["high"]) == one["recall_at"]["5"]["high"]


def test_scale_and_metadata_matter(
    command: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    vectors = {}
    for name, more in {"as is": (), "masked": ("--no-metadata",), "wide": ("--scale", 3)}.items():
        kept = tmp_path / f"{name}.npz"
        result = command(
            "evaluate", "retrieval", "--model", model, "--data", data, "--embeddings", kept,
            "--resamples", 0, *more,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        held = load_embeddings(kept)
        vectors[name] = held.vectors
        # Captions of images are of a zoom: there are none of another.
        assert held.known["image_caption"].any() == (name != "wide")
    for name in ("masked", "wide"):
        assert np.abs(vectors[name]["image"] - vectors["as is"]["image"]).max() > 1e-3
        np.testing.assert_allclose(vectors[name]["audio"], vectors["as is"]["audio"], atol=1e-6)


def test_each_window_has_its_own_metadata(model: Path) -> None:
    encoder = load_encoder(str(model), device="cpu", precision="float32")
    assert isinstance(encoder, TorchEncoder)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    facts = [
        Facts((8.0, 50.0), 5, 12, "inat", "qwen"),
        Facts(None, 6, None, "freesound", None),
        Facts((-3.0, 4.0), None, 0, "elsewhere", "Meta"),
    ]
    found = encode_described(encoder, pixels, facts, 0.6, 1)
    masks = {
        "asource": [True, True, False],
        "tsource": [True, False, True],
        "latlong": [True, False, True],
        "month": [True, True, False],
        "time": [True, False, True],
    }
    values = {
        "asource": torch.tensor([1, 3, 0]),
        "tsource": torch.tensor([1, 0, 0]),
        "latlong": encode_latlong(torch.tensor([[8.0, 50.0], [0, 0], [-3.0, 4.0]])),
        "month": encode_month(torch.tensor([5, 6, 1])),
        "time": encode_hour(torch.tensor([12, 0, 0])),
    }
    metadata = Metadata(values, {k: torch.tensor(v) for k, v in masks.items()})
    with torch.inference_mode():
        expected = encoder.model.encode_image(
            torch.from_numpy(pixels), torch.tensor([0.6]), metadata
        )
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    known = encode_described(encoder, pixels[:1], facts[:1], 0.6, 1)
    np.testing.assert_allclose(known, found[:1], atol=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give --data, or --embeddings"),
        (("--embeddings", "none.npz"), "none.npz"),
        (("--embeddings", "none.npz", "--json", "-", "--csv", "-"), "cannot both be printed"),
        (("--data", "none.toml"), "none.toml"),
    ],
)
def test_mistakes_end_in_one_line(command: Command, words: tuple[str, ...], said: str) -> None:
    result = command("evaluate", "retrieval", *words)
    assert result.returncode != 0
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1

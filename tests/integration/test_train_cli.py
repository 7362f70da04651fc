"""``soundmap train`` from files on disk: a run that is killed, and what is said of mistakes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image as Picture
from safetensors.torch import save_file

import soundmap
from soundmap.cli.train import command as verb
from soundmap.errors import SoundmapError

WORDS = ("surf", "wind", "cars", "frogs", "on", "the", "shore", "road")

MODEL_TOML = """
name = "tiny"
concepts = "concepts.txt"

[model]
token_dim = 16
dim = 16
codes = 24
temperature = 10.0
text_dim = 8
audio = true
metadata = ["latlong", "month", "time"]
audio_tower = { stem = [4, 4], width = 8, depth = 0, heads = 2, mlp_ratio = 2.0 }
[model.vit]
window_px = 32
patch_px = 8
width = 16
depth = 1
heads = 2

[text]
encoder = "words"

[input]
zooms = [1, 2]

[optimiser]
lr = 2e-3

[schedule]
warmup_steps = 3

[training]
batch = 8
epochs = 3
save_every = 2
workers = 1
threads = 1
device = "cpu"

[validation]
batch = 8
every = 3
"""
DATA_TOML = """
[train]
kind = "table"
path = "train.csv"
native_px = 32
gsd_m = 2.0

[validation]
kind = "table"
path = "validation.csv"
native_px = 32
gsd_m = 2.0
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a text side and settings, as a user would have them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("train")
    rng = np.random.default_rng(1)
    for split, count in (("train", 34), ("validation", 12)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(
                ["key", "image", "mel", "caption", "image_caption", "lat", "lon", "date"]
            )
            for i in range(count):
                kind = i % 4
                pixels = rng.integers(0, 60, (64, 64, 3)) + 60 * kind
                name = f"{split}_{i}"
                Picture.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png")
                mel = rng.normal(-60, 3, (2, 1, 1001, 64)).astype(np.float32)
                mel[..., 10 * kind : 10 * kind + 6] += 40
                np.save(folder / f"{name}.npy", mel)
                text = f"{WORDS[kind]} on the shore"
                date = f"2020-0{i % 9 + 1}-03 11:00"
                writer.writerow([name, f"{name}.png", f"{name}.npy", text, text, i, 2 * i, date])
    (folder / "train_5.png").write_bytes(b"no picture")
    words = folder / "words"
    words.mkdir()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "on"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(words / "tokenizer.json"))
    table = torch.randn(len(WORDS), 8, generator=torch.Generator().manual_seed(2)).half()
    save_file({"text.table": table}, str(words / "model.safetensors"))
    card = {
        "name": "words",
        "summary": "",
        "licence": "",
        "architecture": {},
        "input": {"window_px": 8, "patch_px": 8, "native_px": 8, "gsd_m": [[1, 1]]},
        "files": {},
    }
    (words / "model.json").write_text(json.dumps(card))
    (folder / "concepts.txt").write_text("surf\ncars: cars on the road\n")
    (folder / "model.toml").write_text(MODEL_TOML)
    (folder / "data.toml").write_text(DATA_TOML)
    return folder


def command(files: Path, out: Path, *more: str, model: str = "model.toml") -> list[str]:
    given = ["--data", str(files / "data.toml"), "--model", str(files / model), "--out", str(out)]
    return [sys.executable, "-m", "soundmap", "train", *given, *more]


def start(line: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        line,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(line: list[str]) -> tuple[int, str, str]:
    process = start(line)
    out, err = process.communicate()
    return process.returncode, out, err


def losses(out: Path) -> list[list[str]]:
    with (out / "metrics.csv").open(newline="") as file:
        return [row[:-2] for row in csv.reader(file)]


def test_killed_and_started_again_it_ends_the_same(files: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, said, err = finish(command(files, whole))
    assert code == 0, err
    assert "trained, 12 steps" in said
    assert "1 row bad" in said
    assert "Validation: loss" in said

    process = start(command(files, parts))
    # Past a checkpoint, and not at one.
    while process.poll() is None:
        lines = (parts / "metrics.csv").read_text().count("\n") if parts.is_dir() and (
            parts / "metrics.csv").exists() else 0  # fmt: skip
        if lines >= 6:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (parts / "model").exists()
    code, said, err = finish(command(files, parts))
    assert code == 0, err
    assert "Going on after step" in err

    assert losses(parts) == losses(whole)
    weights = [(out / "model" / "model.safetensors").read_bytes() for out in (whole, parts)]
    assert weights[0] == weights[1]
    assert (parts / "bad_rows.csv").read_text() == (whole / "bad_rows.csv").read_text()
    assert (parts / "validation.csv").read_text() == (whole / "validation.csv").read_text()

    # The same command again has nothing to do; the model maps.
    threads = torch.get_num_threads()
    given = command(files, parts)[4:]
    said = CliRunner().invoke(verb, given, catch_exceptions=False).output
    torch.set_num_threads(threads)
    assert "was finished before" in said
    out = tmp_path / "map.tif"
    model = str(parts / "model")
    soundmap.predict("sample", model=model, value="similarity", detail="image", out=out)
    assert out.is_file()


def test_mistakes_end_in_one_line(files: Path, tmp_path: Path) -> None:
    def said(model: str, data: str = DATA_TOML) -> str:
        (files / "other.toml").write_text(model)
        (files / "other_data.toml").write_text(data)
        given = ["--data", str(files / "other_data.toml"), "--model", str(files / "other.toml")]
        result = CliRunner().invoke(verb, [*given, "--out", str(tmp_path / "none")])
        assert isinstance(result.exception, SoundmapError), result.exception
        text = str(result.exception)
        assert "\n" not in text
        return text

    assert "is not TOML" in said("batch =")
    assert "unknown key 'optimizer': did you mean 'optimiser'" in said("[optimizer]\nlr = 1")
    assert "recipe: must be 'small'" in said('recipe = "large"')
    assert "needs kind = 'places'" in said('recipe = "small"')
    assert "there is no device 'tpu9'" in said(MODEL_TOML.replace('"cpu"', '"tpu9"'))
    assert "they must be the same" in said(MODEL_TOML.replace("text_dim = 8", "text_dim = 9"))
    assert "has no table [train]" in said(MODEL_TOML, "")
    assert "no_such.csv" in said(MODEL_TOML, DATA_TOML.replace("train.csv", "no_such.csv"))
    assert "[train]: unknown key 'paths'" in said(MODEL_TOML, '[train]\nkind="table"\npaths="x"')
    assert not (tmp_path / "none" / "model").exists()

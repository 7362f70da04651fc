"""Training on four modalities: it learns, resumes exactly, stops early, and says what is wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from soundmap.encoder import load_encoder
from soundmap.encoder.text import StaticText
from soundmap.errors import InputError, PlanMismatch, RunFailed, UsageError
from soundmap.nn.model import ModelConfig
from soundmap.products.samples import FIELDS, BadSample, Sample
from soundmap.train.config import Settings, model_table, settings_from
from soundmap.train.data import RunData, samples_facts
from soundmap.train.processes import Processes
from soundmap.train.start import Start, TextSide, build
from soundmap.train.trainer import TrainReport, train

CLASSES = 12
FRAMES = 64
WORDS = (*(f"sound{i}" for i in range(CLASSES)), "a", "place", "with")
ALONE = Processes(0, 1, torch.device("cpu"))

SETTINGS: dict[str, Any] = {
    "model": {
        "vit": {"window_px": 32, "patch_px": 8, "width": 48, "depth": 1, "heads": 2,
                "mlp_ratio": 2.0},
        "token_dim": 48, "dim": 48, "codes": 64, "temperature": 20.0, "text_dim": 16,
        "audio": True, "audio_tower": {"stem": [8, 16], "width": 32, "depth": 0},
        "metadata": ["latlong", "month", "time"],
    },
    "text": {"encoder": "stub"},
    "input": {"zooms": [1, 3], "hue": 0.02},
    "optimiser": {"lr": 3e-3, "weight_decay": 0.01, "clip_norm": 1.0},
    "training": {"batch": 24, "epochs": 1, "workers": 1, "threads": 1, "save_every": 5},
}  # fmt: skip


class Synthetic:
    """Places of some hidden classes, each with its colours, stripes, tones and word."""

    gsd_m = 1.0
    native_px = 32
    fields = frozenset(FIELDS)

    def __init__(
        self, count: int, seed: int = 0, bad: frozenset[int] = frozenset(), lacking: float = 0.0
    ) -> None:
        self.name = f"synthetic {seed}"
        self.count = count
        self.seed = seed
        self.bad = bad
        self.lacking = lacking

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise BadSample(f"row {index}", "image cannot be read")
        rng = np.random.default_rng((self.seed, index))
        kind = index % CLASSES
        kept = rng.random(4) >= self.lacking
        word = WORDS[kind]
        return Sample(
            key=f"row {index}",
            image=picture(kind, rng) if kept[0] else None,
            mel=tones(kind, rng) if kept[1] else None,
            audio_caption=f"{word} with a place" if kept[2] else "",
            image_captions={1: f"a place with {word}", 3: f"{word} place"} if kept[3] else {},
            lat=float(rng.uniform(-60, 60)),
            lon=float(rng.uniform(-180, 180)),
            month=int(rng.integers(1, 13)),
            hour=int(rng.integers(24)) if kept[0] else None,
        )


def picture(kind: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    colour = np.array([kind % 3, kind // 3 % 2, kind // 6]) * np.array([90, 180, 180]) + 35
    wave = np.sin(np.arange(96) / (2 + kind) * 2) * 25
    image = colour[:, None, None] + wave[None, None] + rng.normal(0, 12, (3, 96, 96))
    return image.clip(0, 255).astype(np.uint8)


def tones(kind: int, rng: np.random.Generator) -> NDArray[np.float32]:
    mel = rng.normal(-60, 4, (2, 1, FRAMES, 64))
    mel[..., 4 + 5 * kind : 7 + 5 * kind] += 35
    return mel.astype(np.float32)


def static_text(folder: Path) -> TextSide:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, WORDS[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    table = np.random.default_rng(5).normal(size=(len(WORDS), 16)).astype(np.float16)
    return TextSide(StaticText.load(path, table), "stub", path, table)


def settings(**changes: Mapping[str, Any] | Any) -> Settings:
    table = dict(SETTINGS)
    for key, value in changes.items():
        table[key] = {**table.get(key, {}), **value} if isinstance(value, Mapping) else value
    return settings_from(table)


@pytest.fixture
def text(tmp_path: Path) -> TextSide:
    return static_text(tmp_path)


@pytest.fixture
def run(
    tmp_path: Path, text: TextSide, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., TrainReport]:
    threads = torch.get_num_threads()
    monkeypatch.setattr("soundmap.train.start._text_side", lambda *_: text)

    def go(
        given: Settings,
        samples: Synthetic,
        validation: Synthetic | None = None,
        name: str = "run",
        listener: Any = None,
        **options: Any,
    ) -> TrainReport:
        facts = {"train": samples_facts(samples)}
        if validation is not None:
            facts["validation"] = samples_facts(validation)
        data = RunData(samples, validation, facts)
        start: Start = build(given)
        return train(given, start, data, tmp_path / name, ALONE, listener, **options)

    yield go
    torch.set_num_threads(threads)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def curve(path: Path) -> list[tuple[str, ...]]:
    keys = ("step", "epoch", "lr", "loss", "it", "at", "ia", "i_at", "fdt", "grad_norm")
    return [tuple(row[k] for k in keys) for row in rows(path / "metrics.csv")]


class Killed(Exception):
    pass


class KillAt:
    """A listener that ends a run in the middle."""

    def __init__(self, step: int) -> None:
        self.at = step
        self.notes: list[str] = []

    def planned(self, steps: int, done: int) -> None:
        self.done = done

    def stepped(self, step: int, loss: float | None, samples: int) -> None:
        if step == self.at:
            raise Killed

    def validated(self, step: int, figures: Mapping[str, float], best: bool) -> None: ...

    def noted(self, text: str) -> None:
        self.notes.append(text)


def test_learns_from_chance_to_nine_in_ten(run: Callable[..., TrainReport]) -> None:
    # Twelve classes of ten: whoever finds the class finds the partner within the first tenth.
    held_out = Synthetic(120, 1)
    given = settings(
        training={"batch": 36, "steps": 45, "save_every": 100},
        validation={"keep": "i2s_recall", "every": 45},
    )
    none = dataclasses.replace(
        given,
        optimiser=dataclasses.replace(given.optimiser, lr=1e-12),
        training=dataclasses.replace(given.training, steps=1),
    )
    before = run(none, Synthetic(480), held_out, name="untrained").figures
    after = run(given, Synthetic(480), held_out).figures
    assert before["i2s_recall"] < 0.3
    assert before["s2i_recall"] < 0.3
    for way in ("i2s", "s2i", "i2st", "i2c"):
        assert after[f"{way}_recall"] >= 0.9
    assert after["loss"] < before["loss"]


def test_the_result_is_a_model_folder(run: Callable[..., TrainReport], tmp_path: Path) -> None:
    report = run(
        settings(training={"steps": 2}, name="tiny", freeze=["vit"]),
        Synthetic(60),
        Synthetic(30, 1),
    )
    encoder = load_encoder(str(report.folder))
    assert encoder.spec.scales == (1, 3)
    assert encoder.spec.metadata == ("lonlat", "month", "hour")
    assert encoder.encode_text(["sound3 place"]).shape == (1, 48)
    windows = np.zeros((2, 3, 32, 32), np.uint8)
    found = encoder.encode_images(windows, month=5, hour=7, lonlat=np.zeros((2, 2)))
    assert found.image is not None
    assert np.isfinite(found.image).all()
    card = json.loads((report.folder / "model.json").read_text())
    assert card["figures"]["i2s_recall"] == pytest.approx(report.figures["i2s_recall"], abs=1e-4)
    assert card["training"]["settings"]["training"]["seed"] == 56
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "finished"
    assert {"seed", "settings", "data", "machine"} <= set(record)
    # What was frozen is as it was made.
    again = build(settings(name="tiny", freeze=["vit"])).model.state_dict()
    kept = {k: v for k, v in encoder.model.state_dict().items() if k.startswith("vit.")}
    assert all(torch.equal(again[k], v) for k, v in kept.items())


def test_goes_on_as_if_never_stopped(run: Callable[..., TrainReport], tmp_path: Path) -> None:
    given = settings(training={"batch": 12, "epochs": 2}, validation={"every": 4, "limit": 24})
    samples, held_out = Synthetic(84, bad=frozenset({3, 50})), Synthetic(24, 1)
    whole = run(given, samples, held_out, name="whole")
    # Between checkpoints, and after the end of an epoch.
    for at in (3, 8, 13):
        with pytest.raises(Killed):
            run(given, samples, held_out, name="parts", listener=KillAt(at))
    parts = run(given, samples, held_out, name="parts")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert len(curve(tmp_path / "whole")) == 14
    assert parts.figures == whole.figures
    assert parts.best_step == whole.best_step
    a, b = ((tmp_path / n / "model" / "model.safetensors").read_bytes() for n in ("parts", "whole"))
    assert a == b
    validations = [rows(tmp_path / n / "validation.csv") for n in ("parts", "whole")]
    assert validations[0] == validations[1]
    bad = rows(tmp_path / "parts" / "bad_rows.csv")
    assert {row["key"] for row in bad} == {"row 3", "row 50"}
    # Nothing is left to do, and nothing is done.
    stamp = (tmp_path / "parts" / "model" / "model.json").stat().st_mtime_ns
    assert run(given, samples, held_out, name="parts").was_finished
    assert (tmp_path / "parts" / "model" / "model.json").stat().st_mtime_ns == stamp


def test_other_settings_or_data_are_refused(run: Callable[..., TrainReport]) -> None:
    given = settings(training={"batch": 12, "steps": 3, "save_every": 1})
    with pytest.raises(Killed):
        run(given, Synthetic(48), listener=KillAt(2))
    other = settings(training={"batch": 12, "steps": 3, "save_every": 1}, optimiser={"lr": 0.004})
    with pytest.raises(PlanMismatch, match=r"optimiser\.lr was 0\.003, now 0\.004"):
        run(other, Synthetic(48))
    with pytest.raises(PlanMismatch, match=r"data\.train\.name was 'synthetic 0'"):
        run(given, Synthetic(48, seed=9))
    with pytest.raises(PlanMismatch, match="cosine_steps was 3, now 6"):
        run(settings(training={"batch": 12, "steps": 6, "save_every": 1}), Synthetic(48))
    # What only says how fast it reads may differ.
    given = settings(training={"batch": 12, "steps": 3, "save_every": 1, "workers": 2})
    assert run(given, Synthetic(48)).steps == 3
    assert run(other, Synthetic(48), overwrite=True).steps == 3


def test_more_steps_go_on_from_a_finished_run(run: Callable[..., TrainReport]) -> None:
    def given(steps: int) -> Settings:
        return settings(training={"batch": 12, "steps": steps}, schedule={"restart_steps": 4})

    run(given(2), Synthetic(48))
    listener = KillAt(0)
    assert run(given(4), Synthetic(48), listener=listener).steps == 4
    assert listener.done == 2


def test_ends_early_when_it_grows_no_better(run: Callable[..., TrainReport]) -> None:
    given = settings(
        optimiser={"lr": 1e-12, "weight_decay": 0.0},
        # Norms keep their running statistics, so that nothing moves at all.
        freeze=["audio"],
        training={"batch": 12, "steps": 30},
        validation={"every": 1, "patience": 3, "keep": "i2s_recall"},
    )
    report = run(given, Synthetic(48), Synthetic(24, 1))
    assert report.stopped_early
    assert report.best_step == 1
    assert report.steps == 4


def test_samples_without_a_modality_take_part_where_they_can(
    run: Callable[..., TrainReport], tmp_path: Path
) -> None:
    class Silent(Synthetic):
        def __getitem__(self, index: int) -> Sample:
            return dataclasses.replace(super().__getitem__(index), mel=None)

    report = run(settings(training={"batch": 12, "steps": 3}), Silent(48, lacking=0.3))
    assert report.left_out == {"at": 3, "ia": 3, "i_at": 3}
    for row in rows(tmp_path / "run" / "metrics.csv"):
        assert row["ia"] == ""
        total = float(row["it"]) / 3 + float(row["fdt"])
        assert float(row["loss"]) == pytest.approx(total, rel=1e-6)
    some = run(settings(training={"batch": 12, "steps": 3}), Synthetic(48, lacking=0.3), name="b")
    assert set(some.left_out) <= {"i_at"}


def test_too_many_bad_rows_end_the_run(run: Callable[..., TrainReport]) -> None:
    bad = frozenset(range(0, 200, 3))
    with pytest.raises(InputError, match=r"rows cannot be used, more than training.most_bad = 0.2"):
        run(settings(), Synthetic(200, bad=bad))
    with pytest.raises(InputError, match="not one of 30 rows can be read"):
        run(settings(training={"most_bad": 1}), Synthetic(30, bad=frozenset(range(30))))


def test_a_loss_that_is_no_number_ends_the_run(run: Callable[..., TrainReport]) -> None:
    given = settings(optimiser={"lr": 1e30, "clip_norm": 0}, training={"batch": 12, "steps": 9})
    with pytest.raises(RunFailed, match=r"lower optimiser\.lr"):
        run(given, Synthetic(48))


@pytest.mark.parametrize(
    ("changes", "rows_", "message"),
    [
        ({"training": {"batch": 64}}, 48, "has 48 rows, and a step takes 64"),
        ({"validation": {"patience": 2}}, 48, "needs samples to validate on"),
        ({"freeze": ["ears"]}, 48, "the model has no part 'ears'"),
        ({"concepts": "no_such.txt"}, 48, "no_such.txt cannot be read"),
        ({"start": "no-such-model", "model": {}}, 48, "no model named 'no-such-model'"),
    ],
)
def test_mistakes_are_told(
    run: Callable[..., TrainReport], changes: dict[str, Any], rows_: int, message: str
) -> None:
    with pytest.raises((InputError, UsageError), match=message):
        run(settings(**changes), Synthetic(rows_))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimiser": {"learning_rate": 1}}, "optimiser: unknown key 'learning_rate'"),
        ({"optimiser": {"lrr": 1}}, "did you mean 'lr'"),
        ({"training": {"batch": 1}}, "training, batch: must be at least 2"),
        ({"training": {"accumulate": 5}}, r"a divisor of the batch \(24\)"),
        ({"training": {"epochs": "many"}}, "epochs: must be a whole number, not 'many'"),
        ({"training": {"metadata_dropout": 1.5}}, "must be a share from 0 to 1"),
        ({"input": {"zooms": []}}, "zooms: must be a list of whole numbers from 1"),
        ({"validation": {"keep": "hope"}}, "keep: must be one of loss"),
        ({"loss": 3}, "loss: must be a table"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(**changes)


def test_architecture_is_checked() -> None:
    with pytest.raises(InputError, match=r"\[model\], vit: unknown key 'widht'"):
        build(settings_from({**SETTINGS, "model": {"vit": {"widht": 3}}}))
    with pytest.raises(InputError, match=r"needs a table \[model\]"):
        build(settings_from({"name": "none"}))
    with pytest.raises(InputError, match=r"needs \[text\] encoder"):
        build(settings_from({**SETTINGS, "text": {}}))


def test_goes_on_from_a_model(
    run: Callable[..., TrainReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run(settings(training={"steps": 1}), Synthetic(48))
    # Its own token vectors are read, too.
    monkeypatch.undo()
    table = {"start": str(report.folder), "freeze": ["codebook"]}
    start = build(settings_from(table))
    assert start.text.table is not None
    assert len(start.text.table) == len(WORDS)
    held = load_encoder(str(report.folder)).model.codebook.codes
    assert torch.equal(start.model.codebook.codes, held)
    assert not start.model.codebook.codes.requires_grad
    deaf = build(settings_from({**table, "model": {"audio": False, "metadata": ["month"]}})).model
    assert deaf.audio is None
    assert deaf.fuser is not None
    with pytest.raises(InputError, match=r"dim is settled by start"):
        build(settings_from({**table, "model": {"dim": 4}}))


def test_tensorboard_is_used_where_it_is(
    run: Callable[..., TrainReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None: ...

        def add_scalar(self, name: str, value: float, step: int) -> None:
            shown.append((name, step))

        def close(self) -> None: ...

    board = ModuleType("torch.utils.tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    listener = KillAt(0)
    run(settings(training={"batch": 12, "steps": 1}), Synthetic(24), listener=listener)
    assert sum("TensorBoard is not installed" in note for note in listener.notes) == 1
    board.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    given = settings(training={"batch": 12, "steps": 2})
    run(given, Synthetic(24), Synthetic(24, 1), name="b")
    assert {("train/loss", 1), ("train/loss", 2), ("validation/i2s_recall", 2)} <= set(shown)


def test_documented_settings_are_the_defaults(project: Path) -> None:
    text = (project / "docs" / "training.md").read_text(encoding="utf-8")
    blocks = [part.split("```")[0] for part in text.split("```toml\n")[1:]]
    table = tomllib.loads(blocks[0])
    assert dataclasses.replace(settings_from(table), model={}) == Settings()
    assert model_table(table["model"], "docs") == ModelConfig()
    for block in blocks[1:]:
        other = tomllib.loads(block)
        if not {"train", "validation"} & set(other) or "patience" in other.get("validation", {}):
            settings_from(other)
            if "model" in other and "start" not in other:
                model_table(other["model"], "docs")

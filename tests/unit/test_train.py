"""Training on little: losses fall, and what was stopped goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from soundmap.encoder.torch_encoder import model_config
from soundmap.errors import InputError
from soundmap.nn.audio_small import AudioConfig
from soundmap.nn.model import ModelConfig, SoundModel
from soundmap.nn.vit import ConvStem, ViTConfig
from soundmap.train.bundle import PHASES as RECIPE_PHASES
from soundmap.train.bundle import Recipe
from soundmap.train.clips import ClipSet, Hearing, balanced, vary
from soundmap.train.feed import Clips, Diet, draw_batch, draw_clips, rows_of
from soundmap.train.loop import Phase, TrainConfig, fit, save_weights
from soundmap.train.phrases import Phrases
from soundmap.train.terms import VIEWS, WEIGHTS, Heads, Shares, step_terms
from tests.unit.little import AUDIBLE, places, rng

CONFIG = ModelConfig(
    vit=ViTConfig(
        window_px=32,
        patch_px=8,
        width=32,
        depth=1,
        heads=2,
        stem=(8, 16, 16),
        stem_strides=(2, 2, 2),
    ),
    token_dim=32,
    dim=32,
    codes=48,
    temperature=2.0,
    text_dim=12,
    local_patches=True,
)


def words() -> Phrases:
    captions = [torch.randn(2, 1, 12, generator=rng(i)) for i in range(3)]
    prompts = [torch.randn(3, 1, 12, generator=rng(9 + i)) for i in range(4)]
    return Phrases(captions, prompts, AUDIBLE)


HEARS = replace(CONFIG, audio=True, audio_tower=AudioConfig((4, 8, 8, 8), 16, 1, 2))
CROPS = {32: ((26, 40, 0.5), (32, 32, 0.5)), 24: ((24, 24, 1.0),)}
WINDOWS = ((32, 0.6), (24, 0.4))


def clips() -> Clips:
    """Three kinds of clips: low, high, and both; and one that nobody recorded."""
    noise = torch.randn(12, 120, 64, generator=rng(4)) * 4 - 60
    labels = torch.arange(12) % 3
    noise[labels != 1, :, :20] += 30
    noise[labels != 0, :, 40:] += 30
    captions = [torch.randn(2, 1, 12, generator=rng(20 + i)) for i in range(4)]
    audible = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]).float()
    phrases = Phrases(captions, words().prompts, audible)
    found = ClipSet(noise, labels, ("birds", "waves", "rain", "cars"), noise[:2] - 10)
    heard = {"places": AUDIBLE @ audible.T > 0}
    how = Hearing(frames=64, mask_frames=8)
    return Clips(found, phrases, heard, pairs=4, others=3, how=how)


def settings(*phases: Phase, **more: Any) -> TrainConfig:
    return TrainConfig(phases, average=0.9, shares=Shares(patchwork=0.5, patches=8), **more)


PHASES = (
    Phase(6, 3e-3, 2, WINDOWS, stem_only=True),
    Phase(80, 3e-3, 2, WINDOWS),
    Phase(10, 2e-3, 1, ((32, 1.0),), fixed_norms=True, weights={"steady": 2.0, "sharp": 1.0}),
)


class TestFit:
    diet = Diet(places(), 12, CROPS, words())

    def losses(self, model: SoundModel, heads: Heads, heard: Clips | None) -> dict[str, float]:
        chance = rng(5)
        batch = draw_batch([self.diet], {32: 1.0}, [torch.arange(12)], chance)
        with torch.no_grad():
            terms = step_terms(
                model, heads, [self.diet], heard, batch, Shares(0.5, 8), chance, VIEWS
            )
        return {key: float(value) for key, value in terms.items()}

    @pytest.mark.parametrize("local", [False, True])
    def test_losses_fall(self, tmp_path: Path, local: bool, monkeypatch: Any) -> None:
        import soundmap.train.loop as loop

        made: list[Heads] = []

        class Kept(Heads):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                made.append(self)

        monkeypatch.setattr(loop, "Heads", Kept)
        config = replace(HEARS, local_patches=local)
        train = settings(*PHASES, save_every=30)
        torch.manual_seed(train.seed)
        fresh, heads = SoundModel(config), Heads(config.dim, 32, {"places": 3}, 4)
        before = self.losses(fresh.eval(), heads, clips())
        weights = {**WEIGHTS, "steady": 1.0, "sharp": 1.0}
        assert set(before) == set(weights)
        assert all(math.isfinite(v) for v in before.values())
        model, spent = fit(config, train, [self.diet], clips(), tmp_path / "run")
        assert not model.training
        assert spent.wall_s > 0
        assert spent.cpu_s > 0
        after = self.losses(model, made[-1], clips())
        # Captions take longer: three at a sharp scale are told apart last.
        for term in ("phrase", "patch_phrase", "label", "clip_label"):
            assert after[term] < 0.8 * before[term], term
        total = [sum(weights[k] * terms[k] for k in terms) for terms in (before, after)]
        assert total[1] < 0.7 * total[0]
        self.check_files(tmp_path / "run", config, model)

    def check_files(self, folder: Path, config: ModelConfig, model: SoundModel) -> None:
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert rows[0]["train"]["phases"][1]["steps"] == 80
        assert model_config(rows[0]["model"]) == config
        assert [row["step"] for row in rows[1:] if "step" in row] == [6, 50, 80, 10]
        # Terms that only some phases have.
        for view in VIEWS:
            assert [view in row for row in rows[1:]] == [False, False, False, True]
        state = load_file(str(folder / "weights.safetensors"))
        for key, value in model.state_dict().items():
            assert torch.equal(state[key], value), key
        names = {"log.jsonl", "weights.safetensors", "checkpoint.pt"}
        assert {p.name for p in folder.iterdir()} == names

    def test_without_recordings(self, tmp_path: Path) -> None:
        model, _ = fit(CONFIG, settings(Phase(2, 1e-3, 1, WINDOWS)), [self.diet], None, tmp_path)
        assert not model.config.audio

    @pytest.mark.parametrize("alike", [False, True])
    @pytest.mark.parametrize("stop", [1, 7, 9, 13])
    def test_stopped_and_gone_on_from(
        self, tmp_path: Path, stop: int, alike: bool, monkeypatch: Any
    ) -> None:
        import soundmap.train.loop as loop

        train = settings(
            Phase(4, 1e-3, 1, WINDOWS, stem_only=True),
            Phase(7, 1e-3, 1, WINDOWS),
            Phase(4, 1e-3, 1, WINDOWS, fixed_norms=True),
            save_every=3,
            turned_alike=alike,
        )
        whole, _ = fit(HEARS, train, [self.diet], clips(), tmp_path / "a")
        original, calls = loop._terms, 0

        def stopped(*args: Any) -> dict[str, Tensor]:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(loop, "_terms", stopped)
        with pytest.raises(KeyboardInterrupt):
            fit(HEARS, train, [self.diet], clips(), tmp_path / "b")
        torch.manual_seed(99)
        again, _ = fit(HEARS, train, [self.diet], clips(), tmp_path / "b")
        # Steps since the last checkpoint are done again, the others are not.
        assert calls <= 15 + 1 + 3
        for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b), name

    @pytest.mark.parametrize("alike", [False, True])
    def test_turned_alike(self, tmp_path: Path, alike: bool) -> None:
        train = settings(*PHASES, turned_alike=alike)
        fit(CONFIG, train, [self.diet], None, tmp_path)
        model = SoundModel(CONFIG)
        model.load_state_dict(load_file(str(tmp_path / "weights.safetensors")))
        # Layers that pass over every second pixel begin with the first, so a turned image is seen
        # from the pixel beside. Without that the same weights compare exactly.
        stem = ConvStem(CONFIG.vit.stem, (1, 1, 1), CONFIG.vit.width)
        stem.load_state_dict(model.vit.patch_embed.state_dict())
        images = model.normalise(torch.from_numpy(self.diet.data.pixels[:4]))
        with torch.no_grad():
            seen, turned = (stem.eval()(x) for x in (images, torch.rot90(images, 1, (2, 3))))
        change = (torch.rot90(seen, 1, (2, 3)) - turned).abs().max() / seen.std()
        assert change < 1e-3 if alike else change > 0.1

    def test_other_settings_do_not_go_on(self, tmp_path: Path) -> None:
        fit(CONFIG, settings(Phase(1, 1e-3, 1, WINDOWS)), [self.diet], None, tmp_path)
        with pytest.raises(InputError, match="made with other settings"):
            fit(CONFIG, settings(Phase(2, 1e-3, 1, WINDOWS)), [self.diet], None, tmp_path)

    def test_phases_to_come_may_change(self, tmp_path: Path) -> None:
        first = Phase(2, 1e-3, 1, WINDOWS, stem_only=True)
        more = Phase(3, 1e-3, 1, WINDOWS)
        whole, _ = fit(CONFIG, settings(first, more), [self.diet], None, tmp_path / "a")
        fit(CONFIG, settings(first), [self.diet], None, tmp_path / "b")
        again, _ = fit(CONFIG, settings(first, more), [self.diet], None, tmp_path / "b")
        for a, b in zip(whole.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_draws(self) -> None:
        phrases = words()
        assert phrases.draw_captions(rng()).shape == (3, 1, 12)
        assert phrases.draw_prompts(rng()).shape == (4, 1, 12)
        seen = set()
        for i in range(40):
            drawn = phrases.draw_prompts(rng(i))[0, 0]
            # Each is near one of those written.
            distance = (phrases.prompts[0][:, 0] - drawn).norm(dim=-1)
            nearest = int(distance.argmin())
            assert float(distance[nearest]) < float(phrases.prompts[0][nearest].norm())
            seen.add(nearest)
        assert seen == {0, 1, 2}

    def test_weights_are_replaced_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.safetensors"
        path.write_bytes(b"older")
        model = SoundModel(CONFIG)
        save_weights(model, path)
        assert set(load_file(str(path))) == set(model.state_dict())
        assert list(tmp_path.iterdir()) == [path]


class TestFeed:
    def test_every_row_once(self) -> None:
        seen = torch.cat([rows_of(12, 4, step, 0) for step in range(6)])
        assert sorted(seen[:12].tolist()) == sorted(seen[12:].tolist()) == list(range(12))
        assert not torch.equal(seen[:12], seen[12:])

    def test_batch(self) -> None:
        diet = Diet(places(), 12, CROPS, words())
        for step in range(8):
            batch = draw_batch([diet, diet], dict(WINDOWS), [torch.arange(12)] * 2, rng(step))
            side = batch.pixels.shape[-1]
            assert batch.pixels.shape == (24, 3, side, side)
            assert [(p.start, p.stop) for p in batch.parts] == [(0, 12), (12, 24)]
            assert torch.equal(batch.labels[:12], torch.from_numpy(diet.data.labels[:12]))
            for group in batch.groups:
                gsd = batch.gsd_m[group.start : group.stop]
                assert len(gsd.unique()) == 1
                low, high = (26, 40) if side == 32 else (24, 24)
                assert low / side * 10 - 1e-4 <= float(gsd[0]) <= high / side * 10 + 1e-4

    def test_clips_are_audible_in_their_images(self) -> None:
        diet, heard = Diet(places(), 12, CROPS, words()), clips()
        batch = draw_batch([diet], {32: 1.0}, [torch.arange(12)], rng())
        for step in range(10):
            drawn = draw_clips(heard, [diet], batch, rng(step))
            assert len(drawn.images) == 4
            assert len(drawn.rows) == 7
            kinds = heard.clips.labels[drawn.rows[:4]]
            places_ = batch.labels[drawn.images]
            expected = heard.heard["places"][places_][:, kinds]
            assert torch.equal(drawn.match, expected)
            assert drawn.match.diagonal().all()


class TestVary:
    def test_new_clips_of_the_same_kind(self) -> None:
        heard = clips()
        rows = torch.arange(12)
        found = vary(heard.clips, rows, heard.how, rng())
        assert found.shape == (12, 1, 64, 64)
        assert torch.isfinite(found).all()
        assert torch.equal(found, vary(heard.clips, rows, heard.how, rng()))
        assert not torch.equal(found, vary(heard.clips, rows, heard.how, rng(1)))
        high = found[..., 45:].mean((1, 2, 3)) - found[..., :15].mean((1, 2, 3))
        assert (high[rows % 3 == 1] > 10).all()
        assert (high[rows % 3 == 0] < -10).all()

    def test_rare_kinds_come_often(self) -> None:
        mels = torch.zeros(18, 8, 64)
        labels = torch.tensor([0] * 16 + [1] * 2)
        found = ClipSet(mels, labels, ("a", "b"), mels[:1])
        drawn = labels[balanced(found, 4000, rng())]
        assert 0.2 < float((drawn == 1).float().mean()) < 0.32


class TestRecipe:
    def test_read(self) -> None:
        assert Recipe.read({"recipe": "small"}) == Recipe()
        steps = [n + 1 for n in range(len(RECIPE_PHASES))]
        found = Recipe.read({"seed": 7, "weight_decay": 1, "eurosat_batch": 8, "steps": steps})
        assert found.train.seed == 7
        assert found.train.weight_decay == 1.0
        assert found.eurosat_batch == 8
        assert [p.steps for p in found.train.phases] == steps
        assert found.model == Recipe().model
        for alike in (False, True):
            assert Recipe.read({"turned_alike": alike}).train.turned_alike is alike

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ({"sead": 1}, "no setting 'sead': did you mean 'seed'"),
            ({"seed": "x"}, "seed = 'x' of the recipe is no int"),
            ({"seed": True}, "no int"),
            ({"turned_alike": 1}, "turned_alike = 1 of the recipe is no bool"),
            ({"steps": [1]}, "give [0-9] numbers, one a phase"),
            ({"steps": [0] * len(RECIPE_PHASES)}, "give [0-9] numbers, one a phase"),
        ],
    )
    def test_mistakes(self, table: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            Recipe.read(table)

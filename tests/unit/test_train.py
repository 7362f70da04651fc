"""Training on little: losses fall, patchwork knows its patches' origin, figures are right."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from soundmap.encoder.torch_encoder import model_config
from soundmap.errors import InputError
from soundmap.nn.audio_small import AudioConfig
from soundmap.nn.model import ModelConfig, SoundModel
from soundmap.nn.vit import ViTConfig
from soundmap.products.evaluate import as_windows, auc, concept_scores
from soundmap.products.labelled import Audibility, LabelledImages, load_audibility
from soundmap.testing.fake_encoder import FakeEncoder
from soundmap.train.augment import (
    Patchwork,
    clear,
    crop_resize,
    gaps,
    hide,
    patchwork,
    recolour,
    turn,
    veil,
)
from soundmap.train.bundle import PHASES as RECIPE_PHASES
from soundmap.train.bundle import Recipe
from soundmap.train.calibrate import calibrate
from soundmap.train.clips import ClipSet, Hearing, balanced, vary
from soundmap.train.feed import Clips, Diet, draw_batch, draw_clips, rows_of
from soundmap.train.loop import Phase, TrainConfig, fit, save_weights
from soundmap.train.losses import (
    agreement_loss,
    caption_loss,
    class_loss,
    match_loss,
    pair_loss,
    phrase_loss,
    spread_loss,
    steady_loss,
)
from soundmap.train.phrases import Phrases
from soundmap.train.terms import WEIGHTS, Heads, Shares, step_terms

CLASSES = ("forest", "sea", "town")
CONCEPTS = ("birds", "waves", "traffic", "wind")
AUDIBLE = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [1, 0, 1, 0]], dtype=torch.float32)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(count: int = 5, side: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=rng(seed), dtype=torch.uint8)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=rng(seed)), dim=-1)


class TestAugment:
    @pytest.mark.parametrize(("crop", "window"), [(32, 32), (20, 20), (20, 32), (32, 16), (45, 64)])
    def test_crop_resize(self, crop: int, window: int) -> None:
        images = pixels(side=64)
        found = crop_resize(images, crop, window, rng())
        assert found.shape == (5, 3, window, window)
        assert found.dtype == torch.float32
        assert found.min() >= 0
        assert found.max() <= 255

    def test_crops_are_parts_of_their_image(self) -> None:
        images = pixels(side=12)
        found = crop_resize(images, 9, 9, rng(3))
        places = set()
        for image, crop in zip(images.float(), found, strict=True):
            at = [
                (y, x)
                for y in range(4)
                for x in range(4)
                if torch.equal(image[:, y : y + 9, x : x + 9], crop)
            ]
            assert len(at) == 1
            places.add(at[0])
        assert len(places) > 1

    def test_flat_images_stay_flat_when_resized(self) -> None:
        flat = torch.full((2, 3, 40, 40), 77, dtype=torch.uint8)
        assert (crop_resize(flat, 31, 64, rng()) - 77).abs().max() < 1e-3

    def test_turn(self) -> None:
        images = pixels(64, 8).float()
        found = turn(images, rng())
        kinds = set()
        for image, turned in zip(images, found, strict=True):
            ways = [torch.rot90(image, k, (-2, -1)) for k in range(4)]
            ways += [way.flip(-1) for way in ways]
            same = [i for i, way in enumerate(ways) if torch.equal(way, turned)]
            assert len(same) == 1
            kinds.add(same[0])
        assert kinds == set(range(8))

    def test_recolour(self) -> None:
        images = pixels(50).float()
        before = images.clone()
        found = recolour(images, rng())
        assert torch.equal(images, before)
        assert found.shape == images.shape
        assert found.min() >= 0
        assert found.max() <= 255
        assert found.isfinite().all()
        changed = (found - images).abs().mean((1, 2, 3))
        assert changed.min() > 0.5
        assert changed.max() < 80
        # Each image by itself, all of its pixels alike.
        grey = torch.full((20, 3, 4, 4), 120.0)
        one = recolour(grey, rng())
        assert (one - one[..., :1, :1]).abs().max() < 1e-3
        assert one[:, 0, 0, 0].std() > 2

    def test_veil(self) -> None:
        images = pixels(60).float()
        found = veil(images, rng())
        assert found.min() >= 0
        assert found.max() <= 255
        # A straight line in the light of the ground, of a slope that haze lowers: by at most three
        # tenths, and a tenth of less light.
        dark, light = (torch.full((60, 3, 2, 2), v) for v in (20.0, 120.0))
        slope = (veil(light, rng()) - veil(dark, rng()))[..., 0, 0] / 100
        assert slope.max() <= 1.1
        assert slope.min() >= 0.9 * 0.7 - 1e-5
        assert slope.std(0).min() > 0.05
        lifted = veil(torch.zeros(60, 3, 2, 2), rng())[:, :, 0, 0]
        assert lifted.max() < 0.3 * 230
        assert lifted.mean() > 10

    def test_clear(self) -> None:
        images = torch.full((200, 3, 2, 2), 90.0)
        assert torch.equal(clear(images, (25, 45, 67), 0.0, rng()), images)
        found = clear(images, (25, 45, 67), 0.4, rng())
        changed = (found != images).flatten(1).any(1)
        assert 50 < int(changed.sum()) < 110
        # Blue air is the brightest: what is left of grey ground is red.
        red, _, blue = found[changed][:, :, 0, 0].mean(0).tolist()
        assert red > blue + 15
        assert clear(torch.zeros(50, 3, 2, 2), (25, 45, 67), 1.0, rng()).max() == 0

    def test_gaps(self) -> None:
        assert not gaps(50, 32, 0.0, rng()).any()
        missing = gaps(400, 32, 0.5, rng())
        assert missing.shape == (400, 1, 32, 32)
        share = missing.float().mean((1, 2, 3))
        assert 120 < int((share > 0).sum()) < 200
        assert share.max() < 0.6
        # Pieces, and whole sides.
        sides = missing.all(2).any(-1)[:, 0]
        assert 40 < int(sides.sum()) < int((share > 0).sum())

    def test_hide(self) -> None:
        images = pixels(60).float()
        before = images.clone()
        found = hide(images, 0.6, rng(1))
        assert torch.equal(images, before)
        changed = 0
        for image, hidden in zip(images, found, strict=True):
            gone = (image != hidden).any(0)
            if not gone.any():
                continue
            changed += 1
            # A rectangle, of the mean colour of all that is left.
            rows, cols = gone.any(1).nonzero()[:, 0], gone.any(0).nonzero()[:, 0]
            area = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(cols[0]), int(cols[-1]) + 1)
            left = torch.ones(32, 32, dtype=torch.bool)
            left[area] = False
            assert left.float().mean() > 0.3
            colour = image[:, left].mean(1)
            assert (hidden[(slice(None), *area)] - colour[:, None, None]).abs().max() < 1e-3
            assert torch.equal(hidden[:, left], image[:, left])
        assert 10 < changed < 60
        assert torch.equal(hide(images, 0.0, rng()), images)


class TestPatchwork:
    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize(("batch", "side", "patch"), [(2, 32, 8), (5, 24, 8), (3, 16, 8)])
    def test_patches_equal_their_origin(self, seed: int, batch: int, side: int, patch: int) -> None:
        images = pixels(batch, side, seed).float()
        found: Patchwork = patchwork(images, patch, rng(seed))
        n = side // patch
        assert found.pixels.shape == images.shape
        assert found.image.shape == found.patch.shape == (batch, n * n)
        for b in range(batch):
            for p in range(n * n):
                y, x = divmod(p, n)
                here = found.pixels[b, :, y * patch :, x * patch :][:, :patch, :patch]
                y, x = divmod(int(found.patch[b, p]), n)
                origin = images[int(found.image[b, p])]
                assert torch.equal(here, origin[:, y * patch :, x * patch :][:, :patch, :patch])

    def test_windows_are_pieced_together(self) -> None:
        found = patchwork(pixels(8).float(), 8, rng())
        assert all(len(set(row.tolist())) > 1 for row in found.image)
        own = torch.arange(16)
        assert not (found.patch == own).all(1).any()


class TestLosses:
    def test_caption_loss_by_hand(self) -> None:
        images, captions = unit(4, 6), unit(3, 6, seed=1)
        labels = torch.tensor([0, 2, 1, 2])
        expected = 0.0
        for image, label in zip(images, labels, strict=True):
            logits = [8 * float(image @ c) for c in captions]
            expected += math.log(sum(math.exp(v) for v in logits)) - logits[int(label)]
        found = caption_loss(images, captions, labels, torch.tensor(8.0))
        assert float(found) == pytest.approx(expected / 4, rel=1e-5)

    def test_caption_loss_of_patches(self) -> None:
        patches, captions = unit(4, 5, 6), unit(3, 6, seed=1)
        labels = torch.randint(0, 3, (4, 5), generator=rng())
        whole = caption_loss(patches, captions, labels, torch.tensor(8.0))
        flat = caption_loss(patches.flatten(0, 1), captions, labels.flatten(), torch.tensor(8.0))
        torch.testing.assert_close(whole, flat)

    def test_phrase_loss_by_hand(self) -> None:
        images, phrases = unit(3, 6), unit(4, 6, seed=1)
        expected = 0.0
        for image, row in zip(images, AUDIBLE, strict=True):
            for phrase, heard in zip(phrases, row, strict=True):
                p = 1 / (1 + math.exp(-(9 * float(image @ phrase) - 2)))
                expected -= math.log(p if heard else 1 - p)
        found = phrase_loss(images, phrases, AUDIBLE, torch.tensor(9.0), torch.tensor(-2.0))
        assert float(found) == pytest.approx(expected / 12, rel=1e-5)
        patches = images[:, None].expand(-1, 5, -1)
        spread = phrase_loss(
            patches, phrases, AUDIBLE[:, None], torch.tensor(9.0), torch.tensor(-2.0)
        )
        torch.testing.assert_close(spread, found)

    @pytest.mark.parametrize("alpha", [0.0, 0.1])
    def test_class_loss(self, alpha: float) -> None:
        logits = torch.randn(5, 5, generator=rng()) * 3
        alone = class_loss(logits, torch.eye(5).bool(), alpha)
        torch.testing.assert_close(alone, pair_loss(logits, alpha))
        # Two of one class: each side's weight is shared out between them.
        match = torch.eye(5).bool()
        match[0, 1] = match[1, 0] = True
        expected = 0.0
        for side in (logits, logits.T):
            log = side.log_softmax(1)
            rows = [(log[0, :2]).mean(), (log[1, :2]).mean(), log[2, 2], log[3, 3], log[4, 4]]
            expected -= float(sum(rows)) / 10
        assert float(class_loss(logits, match, 0.0)) == pytest.approx(expected, rel=1e-5)

    def test_agreement(self) -> None:
        a = unit(4, 5, 6)
        assert float(agreement_loss(a, a)) == pytest.approx(0, abs=1e-6)
        assert float(agreement_loss(a, -a)) == pytest.approx(2, abs=1e-6)

    def test_steady(self) -> None:
        a = torch.randn(40, 5, 6, generator=rng())
        assert float(steady_loss(a, a)) == 0
        # A tenth of a concept's spread, of one concept in six. All patches alike: as a mean, and
        # one by one. Patches that cancel out: one by one alone.
        change = torch.zeros_like(a)
        change[..., 2] = 0.1 * a[..., 2].std()
        assert float(steady_loss(a, a + change)) == pytest.approx(0.0125 / 6, rel=1e-3)
        a = a[:, :2]
        change = torch.zeros_like(a)
        change[..., 2] = torch.tensor([0.1, -0.1]) * a[..., 2].std()
        before, after = a - change / 2, a + change / 2
        assert float(steady_loss(before, after)) == pytest.approx(0.0025 / 6, rel=0.05)

    def test_calling_all_alike_is_not_steadier(self) -> None:
        a, b = torch.randn(2, 8, 5, 6, generator=rng())
        assert float(steady_loss(a / 10, b / 10)) == pytest.approx(float(steady_loss(a, b)))
        # One that tells places apart and changes as much is.
        assert float(steady_loss(a * 2, a * 2 + b)) < float(steady_loss(a, a + b))

    def test_matches_of_any_number(self) -> None:
        match = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]]).bool()
        right = torch.where(match, 30.0, -30.0)
        # Two that share a row cannot both have all of it.
        by_row, by_column = [math.log(2), 0.0, 0.0], [math.log(2), 0.0, 0.0]
        expected = (sum(by_row) / 3 + sum(by_column) / 3) / 2
        assert float(match_loss(right, match)) == pytest.approx(expected, abs=1e-5)
        assert float(match_loss(-right, match)) > 30
        # A place where nothing is heard is no sign of anything, as a row.
        alone = match[:2], right[:2]
        assert float(match_loss(alone[1], alone[0])) < expected + 1e-5
        assert float(match_loss(right, torch.zeros_like(match))) == 0

    def test_spread(self) -> None:
        even = torch.zeros(2, 7, 16)
        assert float(spread_loss(even).mean()) == pytest.approx(0, abs=1e-5)
        one = torch.full((2, 7, 16), -50.0)
        one[..., 3] = 50
        assert float(spread_loss(one).mean()) == pytest.approx(math.log(16), rel=1e-4)


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


def places(count: int = 36, side: int = 40) -> LabelledImages:
    """Three kinds of places that differ in colour and in texture."""
    noise = np.random.default_rng(0)
    labels = np.arange(count) % 3
    colours = np.array([[40, 90, 40], [20, 50, 120], [140, 130, 120]])[labels][..., None, None]
    rough = np.array([25, 4, 60])[labels][:, None, None, None]
    images = colours + noise.normal(size=(count, 3, side, side)) * rough
    return LabelledImages("places", np.clip(images, 0, 255).astype(np.uint8), labels, CLASSES, 10.0)


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
    Phase(10, 2e-3, 1, ((32, 1.0),), fixed_norms=True, weights={"steady": 2.0}),
)


class TestFit:
    diet = Diet(places(), 12, CROPS, words())

    def losses(self, model: SoundModel, heads: Heads, heard: Clips | None) -> dict[str, float]:
        chance = rng(5)
        batch = draw_batch([self.diet], {32: 1.0}, [torch.arange(12)], chance)
        with torch.no_grad():
            terms = step_terms(
                model, heads, [self.diet], heard, batch, Shares(0.5, 8), chance, steady=True
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
        weights = {**WEIGHTS, "steady": 1.0}
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
        # A term that only some phases have.
        assert ["steady" in row for row in rows[1:]] == [False, False, False, True]
        state = load_file(str(folder / "weights.safetensors"))
        for key, value in model.state_dict().items():
            assert torch.equal(state[key], value), key
        names = {"log.jsonl", "weights.safetensors", "checkpoint.pt"}
        assert {p.name for p in folder.iterdir()} == names

    def test_without_recordings(self, tmp_path: Path) -> None:
        model, _ = fit(CONFIG, settings(Phase(2, 1e-3, 1, WINDOWS)), [self.diet], None, tmp_path)
        assert not model.config.audio

    @pytest.mark.parametrize("stop", [1, 7, 9, 13])
    def test_stopped_and_gone_on_from(self, tmp_path: Path, stop: int, monkeypatch: Any) -> None:
        import soundmap.train.loop as loop

        train = settings(
            Phase(4, 1e-3, 1, WINDOWS, stem_only=True),
            Phase(7, 1e-3, 1, WINDOWS),
            Phase(4, 1e-3, 1, WINDOWS, fixed_norms=True),
            save_every=3,
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

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ({"sead": 1}, "no setting 'sead': did you mean 'seed'"),
            ({"seed": "x"}, "seed = 'x' of the recipe is no int"),
            ({"seed": True}, "no int"),
            ({"steps": [1]}, "give [0-9] numbers, one a phase"),
            ({"steps": [0] * len(RECIPE_PHASES)}, "give [0-9] numbers, one a phase"),
        ],
    )
    def test_mistakes(self, table: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            Recipe.read(table)


class TestAuc:
    def brute(self, scores: NDArray[Any], truth: NDArray[np.bool_]) -> float:
        wins = [
            1.0 if a > b else 0.5 if a == b else 0.0 for a in scores[truth] for b in scores[~truth]
        ]
        return sum(wins) / len(wins)

    @given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
    def test_equals_counting_pairs(self, rows: list[tuple[int, bool]]) -> None:
        scores = np.array([score for score, _ in rows], np.float64) / 7
        truth = np.array([kind for _, kind in rows])
        truth[:2] = True, False
        assert auc(scores, truth) == pytest.approx(self.brute(scores, truth), abs=1e-12)
        assert auc(scores.astype(np.float32), truth) == pytest.approx(
            self.brute(scores, truth), abs=1e-12
        )

    def test_extremes(self) -> None:
        truth = np.array([False, False, True, True])
        assert auc(np.array([1.0, 2, 3, 4]), truth) == 1
        assert auc(np.array([4.0, 3, 2, 1]), truth) == 0
        assert auc(np.zeros(4), truth) == 0.5

    def test_concepts_with_one_kind_are_left_out(self) -> None:
        values = np.arange(12.0).reshape(4, 3)
        audible = np.array([[0, 1, 0], [0, 1, 1], [0, 1, 0], [0, 1, 1]], bool)
        found = concept_scores(values, audible, ("none", "all", "some"))
        assert [(c.concept, c.audible) for c in found] == [("some", 2)]
        assert found[0].auc == 0.75


class TestAsWindows:
    def data(self, side: int, gsd_m: float) -> LabelledImages:
        images = pixels(3, side).numpy()
        return LabelledImages("places", images, np.arange(3), CLASSES, gsd_m)

    def test_imagery_of_the_models_own_sampling_is_cut(self) -> None:
        data = self.data(70, 8.0)
        found, told_m = as_windows(data, FakeEncoder())
        np.testing.assert_array_equal(found, data.pixels[:, :, 3:67, 3:67])
        assert told_m == 8.0
        assert found.flags.c_contiguous

    def test_finer_imagery_is_averaged_by_blocks(self) -> None:
        data = self.data(200, 3.0)
        found, told_m = as_windows(data, FakeEncoder())
        assert told_m == 9.0
        assert found.shape == (3, 3, 64, 64)
        assert found.dtype == np.uint8
        for y, x in ((0, 0), (63, 63), (10, 40)):
            block = data.pixels[:, :, 4 + 3 * y :, 4 + 3 * x :][:, :, :3, :3].astype(float)
            np.testing.assert_array_equal(found[:, :, y, x], np.rint(block.mean(axis=(2, 3))))

    def test_images_too_small_for_a_window(self) -> None:
        with pytest.raises(InputError, match="do not fill a window of 64 px"):
            as_windows(self.data(63, 10.0), FakeEncoder())
        with pytest.raises(InputError, match="do not fill a window of 256 px"):
            as_windows(self.data(200, 2.5), FakeEncoder())


def audibility() -> Audibility:
    tables = {
        "places": {
            name: {
                "captions": [name],
                "audible": {c: "" for c, a in zip(CONCEPTS, row, strict=True) if a},
            }
            for name, row in zip(CLASSES, AUDIBLE.tolist(), strict=True)
        }
    }
    return Audibility(CONCEPTS, tables, {"wood": ("forest",), "port": ("sea", "town")})


class TestCalibrate:
    def test_fits_each_concept_and_one_for_all(self) -> None:
        encoder = FakeEncoder(4)
        data = places(60, 64)
        vectors = encoder.embed([[0, 255, 0], [0, 0, 255], [255, 255, 255], [60, 120, 255]])
        found = calibrate(encoder, vectors, audibility(), [data])
        assert set(found) == {
            f"{detail}.{kind}"
            for detail in ("image", "patch")
            for kind in ("scale", "bias", "generic")
        }
        for key, value in found.items():
            assert value.dtype == np.float32
            assert value.shape == ((2,) if key.endswith("generic") else (4,))
            assert np.isfinite(value).all()
        assert (found["image.scale"] > 0).all()
        # Towns alone are bright: traffic is told from colour, on both details.
        image = encoder.encode_images(data.pixels).image
        assert image is not None
        p = 1 / (
            1 + np.exp(-(image @ vectors[2] * found["image.scale"][2] + found["image.bias"][2]))
        )
        assert p[data.labels == 2].min() > 0.8
        assert p[data.labels != 2].max() < 0.2
        again = calibrate(encoder, vectors, audibility(), [data])
        for key, value in found.items():
            np.testing.assert_array_equal(value, again[key])


class TestAudibility:
    def test_matrices(self) -> None:
        table = audibility()
        assert table.classes("places") == CLASSES
        np.testing.assert_array_equal(table.matrix("places"), AUDIBLE.bool().numpy())

    def test_load(self, tmp_path: Path) -> None:
        data = {
            "classes": {"eurosat": audibility().tables["places"]},
            "sample_areas": {"port": ["sea", "town"]},
        }
        (tmp_path / "audibility.json").write_text(json.dumps(data))
        table = load_audibility(tmp_path, CONCEPTS)
        assert table.area_matrix("port").tolist() == [True, True, True, True]
        with pytest.raises(InputError, match="forest lists") as caught:
            load_audibility(tmp_path, ("waves", "traffic", "wind"))
        assert "'birds'" in str(caught.value)

    def test_clips_that_share_a_concept_are_audible(self, tmp_path: Path) -> None:
        clips = {
            "esc": {
                "wren": {"captions": ["a wren"], "concepts": ["birds"]},
                "lorry": {"captions": ["a lorry"], "concepts": ["traffic"]},
                "fire": {"captions": ["fire"], "concepts": []},
            }
        }
        data = {"classes": audibility().tables, "sample_areas": {}, "clips": clips}
        path = tmp_path / "audibility.json"
        path.write_text(json.dumps(data))
        table = load_audibility(tmp_path, CONCEPTS)
        assert table.clip_matrix().tolist() == [
            [True, False, False, False],
            [False, False, True, False],
            [False, False, False, False],
        ]
        found = table.audible_clips("places")
        assert found == {"forest": ("wren",), "sea": (), "town": ("wren", "lorry")}
        clips["esc"]["fire"]["concepts"].append("flames")
        path.write_text(json.dumps(data))
        with pytest.raises(InputError, match="clips of fire list"):
            load_audibility(tmp_path, CONCEPTS)

    def test_bundled_table_fits_the_bundled_concepts(self, project: Path) -> None:
        folder = project / "models" / "soundmap-small"
        concepts = json.loads((folder / "concepts.json").read_text())["concepts"]
        names = tuple(c["name"] for c in concepts)
        table = load_audibility(folder, names)
        for name, classes in table.tables.items():
            # Every class sounds of something, and is described.
            assert table.matrix(name).any(axis=1).all()
            assert all(len(entry["captions"]) > 1 for entry in classes.values())
        # Every concept can be heard somewhere and not elsewhere, or nothing could be fitted.
        both = np.concatenate([table.matrix(name) for name in table.tables])
        assert both.any(axis=0).all()
        assert not both.all(axis=0).any()
        for clip in table.clips.values():
            assert len(clip["captions"]) > 1
        for name in table.tables:
            # Something that was recorded is audible in every class of EuroSAT.
            audible = table.audible_clips(name).values()
            assert all(audible) if name == "eurosat" else any(audible)
        for area in table.sample_areas:
            assert table.area_matrix(area).any()

"""The parts of training: order, views, batches, the objective in parts and over processes."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soundmap.encoder.described import encode_facts
from soundmap.errors import UsageError
from soundmap.nn.audio_small import AudioConfig
from soundmap.nn.mel import CLIP_SAMPLES
from soundmap.nn.model import ModelConfig, SoundModel
from soundmap.nn.vit import ViTConfig
from soundmap.products.embed_samples import facts_of
from soundmap.products.samples import FIELDS, BadRows, Sample, StreamedSamples
from soundmap.train.batches import Collator, Feeder, Rows, epoch_order, split
from soundmap.train.config import InputSettings, LossSettings, ScheduleSettings
from soundmap.train.losses import FourEmbeddings, four_embeddings_loss
from soundmap.train.objective import (
    backward,
    dropped,
    embed,
    hide_metadata,
    log_scales,
    objective,
)
from soundmap.train.optimiser import learning_rate
from soundmap.train.processes import Processes
from soundmap.train.streams import StreamFeeder
from soundmap.train.texts import Captions, join
from soundmap.train.views import Viewer, jitter

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)
CONFIG = ModelConfig(
    vit=ViTConfig(window_px=16, patch_px=8, width=16, depth=1, heads=2, mlp_ratio=2.0),
    token_dim=16,
    dim=16,
    codes=24,
    temperature=5.0,
    text_dim=8,
    metadata=("asource", "latlong", "month", "time"),
    audio=True,
    # Without norms over the batch, which see each part and process by itself.
    audio_tower=AudioConfig(stem=(), width=16, depth=0),
)


class Words:
    """Texts to tokens, a vector per word; "mute" is refused."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def tokens(self, texts: list[str]) -> list[np.ndarray]:
        self.asked += texts
        if "mute" in texts:
            raise UsageError("no word")
        return [
            np.stack(
                [np.random.default_rng(zlib.crc32(w.encode())).normal(size=8) for w in text.split()]
            ).astype(np.float32)
            for text in texts
        ]


class Places:
    """Samples that anybody can make."""

    name = "places"
    gsd_m = 2.0
    native_px = 16
    fields = frozenset(FIELDS)

    def __init__(self, count: int = 40, lacking: bool = False) -> None:
        self.count = count
        self.lacking = lacking

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng(index)
        there = [not self.lacking or (index + k) % 3 > 0 for k in range(4)]
        return Sample(
            key=str(index),
            image=rng.integers(0, 256, (3, 80, 80)).astype(np.uint8) if there[0] else None,
            mel=rng.normal(-50, 9, (2, 1, 20, 64)).astype(np.float32) if there[1] else None,
            audio_caption=f"{index} rings" + " long" * (index % 4) if there[2] else "",
            image_captions={1: f"seen {index}", 3: f"far {index}"} if there[3] else {},
            lat=float(index),
            lon=2.0 * index,
            month=index % 12 + 1 if index % 4 else None,
            hour=index % 24,
            audio_source=("yfcc", "freesound", None)[index % 3],
        )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def viewer(train: bool = True, **changes: Any) -> Viewer:
    return Viewer(InputSettings(zooms=(1, 3), **changes), 16, 16, 2.0, train)


def collator() -> Collator:
    return Collator(Captions(Words(), CPU), CONFIG.metadata, True, CPU)


def a_batch(count: int, lacking: bool = False) -> Any:
    samples = Places(count, lacking)
    return collator().collate([viewer().view(samples[i], 1, 0, i) for i in range(count)])


def a_model() -> SoundModel:
    torch.manual_seed(3)
    return SoundModel(CONFIG)


# ------------------------------------------------------------------------------ order and views


def test_each_epoch_has_every_sample_once_and_an_order_of_its_own() -> None:
    first, second = epoch_order(1, 0, 100), epoch_order(1, 1, 100)
    assert sorted(first) == list(range(100))
    assert (first != second).any()
    assert (first == epoch_order(1, 0, 100)).all()
    assert (first != epoch_order(2, 0, 100)).any()


def test_processes_share_a_step_in_the_order_of_one() -> None:
    rows = Rows(Places(40), viewer(), 7, 0.2)

    def keys(batch: int, rank: int, world: int, start: int, count: int) -> list[list[str]]:
        feeder = Feeder(rows, batch, rank, world, 2)
        steps = feeder.steps(start)
        found = [[view.key for view in next(steps)] for _ in range(count)]
        feeder.close()
        return found

    one = keys(12, 0, 1, 0, 5)
    halves = [keys(6, rank, 2, 0, 5) for rank in (0, 1)]
    assert one == [a + b for a, b in zip(*halves, strict=True)]
    # Begun in the middle, past the end of an epoch (three steps), it goes on alike.
    assert keys(12, 0, 1, 2, 3) == one[2:]


def test_a_view_hangs_on_seed_epoch_and_number_alone() -> None:
    sample = Places()[5]
    views = [viewer().view(sample, *key) for key in ((1, 0, 5), (1, 0, 5), (1, 1, 5), (2, 0, 5))]
    assert views[0].pixels is not None
    assert (views[0].pixels == views[1].pixels).all()
    for other in views[2:]:
        assert (views[0].pixels != other.pixels).any()
    zooms = {viewer().view(sample, 1, epoch, 5).gsd_m for epoch in range(20)}
    assert zooms == {2.0, 6.0}
    for view in views:
        assert view.image_caption == ("seen 5" if view.gsd_m == 2.0 else "far 5")


def test_validation_is_not_jittered_and_takes_the_first_segment() -> None:
    sample = Places()[5]
    assert sample.mel is not None
    for epoch in range(4):
        view = viewer(train=False, mask_frames=8).view(sample, 1, epoch, 5)
        assert (view.mel == sample.mel[0]).all()
    drawn = [viewer().view(sample, 1, epoch, 5).mel for epoch in range(10)]
    assert {bool((mel == sample.mel[0]).all()) for mel in drawn} == {True, False}


def test_waves_are_cut_at_random_and_filled_up_with_silence() -> None:
    wave = np.random.default_rng(0).normal(0, 0.1, 3 * CLIP_SAMPLES // 2).astype(np.float32)
    long = Sample("long", wave=wave)
    mels = [viewer().view(long, 1, epoch, 0).mel for epoch in (0, 0, 1)]
    assert mels[0].shape == (1, 1001, 64)
    assert (mels[0] == mels[1]).all()
    assert (mels[0] != mels[2]).any()
    short = viewer().view(Sample("short", wave=wave[: CLIP_SAMPLES // 4]), 1, 0, 0).mel
    assert (short[0, 300:] == -100).all()


def test_jitter_shifts_colours_within_bounds() -> None:
    grey = np.full((3, 8, 8), 120, np.uint8)
    light = [jitter(grey, InputSettings(), np.random.default_rng(i)).mean() for i in range(60)]
    assert 120 * 0.7 - 2 <= min(light) < 100
    assert 140 < max(light) <= 120 * 1.3 + 2
    none = InputSettings(brightness=0, contrast=0, saturation=0, hue=0)
    assert (jitter(grey, none, np.random.default_rng(1)) == grey).all()


def test_stripes_are_blotted_out() -> None:
    sample = Places()[5]
    view = viewer(mask_frames=10, mask_bands=20).view(sample, 1, 0, 5)
    changed = [(view.mel != one).mean() for one in sample.mel]
    assert 0 < min(changed) < 1


def test_hours_of_freesound_are_not_used() -> None:
    sample = Sample("a", audio_source="freesound", hour=3, month=4)
    facts = facts_of(sample)
    assert (facts.hour, facts.month, facts.audio_source) == (None, 4, "freesound")
    other = facts_of(dataclasses.replace(sample, audio_source="elsewhere", lat=1.0, lon=2.0))
    assert (other.hour, other.lonlat) == (3, (2.0, 1.0))
    told = encode_facts([facts, other], ("asource", "latlong", "time"), torch.device("cpu"))
    assert told.values["asource"].tolist()[0] == 3
    assert {name: known.tolist() for name, known in told.valid.items()} == {
        "asource": [True, False],
        "latlong": [False, True],
        "time": [False, True],
    }


class Stream:
    """A stream of places."""

    name = "stream"
    gsd_m = 2.0
    native_px = 16
    fields = frozenset(FIELDS)

    def __init__(self, count: int) -> None:
        self.samples = Places(count)
        self.bad = BadRows("stream")

    def __iter__(self) -> Iterator[Sample]:
        return (self.samples[i] for i in range(len(self.samples)))

    def shard(self, count: int, index: int) -> StreamedSamples:
        raise NotImplementedError


def test_a_stream_goes_on_where_it_was() -> None:
    def keys(start: int, count: int) -> list[str]:
        feeder = StreamFeeder(Stream(10), viewer(), 1, 4, 0, 1, 1, 5, 0.2)
        steps = feeder.steps(start)
        found = [view.key for _ in range(count) for view in next(steps)]
        feeder.close()
        return found

    whole = keys(0, 5)
    assert sorted(whole[:10]) == sorted(whole[10:]) == sorted(str(i) for i in range(10))
    assert whole[:10] != whole[10:]
    assert keys(3, 2) == whole[12:]


# --------------------------------------------------------------------------------------- texts


def test_captions_are_encoded_once_and_refused_ones_are_missing() -> None:
    words = Words()
    captions = Captions(words, CPU)
    found = captions.states(["a b", "", "mute", "a b"])
    assert [one is None for one in found] == [False, True, True, False]
    captions.states(["a b", "mute", "c"])
    assert words.asked == ["a b", "mute", "c"]
    assert captions.refused == 1
    small = Captions(words, CPU, cache_mb=0)
    assert small.states(["x y", "z"])[0].shape == (2, 8)
    assert len(small._kept) == 1


def test_a_text_comes_to_the_same_in_any_company() -> None:
    model = a_model()
    states = Words().tokens(["one", "one two three four"])
    alone = model.encode_text(torch.from_numpy(states[0])[None])
    together = model.encode_text(join(states))[:1]
    assert torch.allclose(alone, together, atol=1e-6)


# ------------------------------------------------------------------------------- the objective


def test_objective_is_the_published_one_where_nothing_is_missing() -> None:
    rng = torch.Generator().manual_seed(1)
    vectors = torch.randn(12, 4, 8, generator=rng)
    scales = log_scales(a_model())
    image, audio, heard, seen = vectors.unbind(1)
    for settings in (LossSettings(), LossSettings(alpha=0, fdt_weight=0.3, combined=False)):
        found = objective(vectors, torch.ones(12, 4, dtype=torch.bool), scales, settings)
        reference = four_embeddings_loss(
            FourEmbeddings(image=image, audio=audio, audio_caption=heard, image_caption=seen),
            scales,
            alpha=settings.alpha,
            fdt_weight=settings.fdt_weight,
            combined=settings.combined,
        )
        assert found.total is not None
        assert found.total.item() == pytest.approx(reference.total.item(), rel=1e-6)
        assert found.terms["at"] == pytest.approx(reference.at.item(), rel=1e-6)


def test_terms_are_taken_over_the_rows_that_have_both() -> None:
    vectors = torch.randn(9, 4, 8, generator=torch.Generator().manual_seed(1))
    scales = log_scales(a_model())
    has = torch.ones(9, 4, dtype=torch.bool)
    has[5:, 1] = False
    has[1:, 3] = False
    found = objective(vectors, has, scales, LossSettings())
    five = objective(vectors[:5], has[:5], scales, LossSettings())
    assert found.left_out == ("fdt",)
    assert found.terms["ia"] == pytest.approx(five.terms["ia"], rel=1e-6)
    assert found.terms["it"] != pytest.approx(five.terms["it"], rel=1e-3)
    nothing = objective(vectors, torch.zeros(9, 4, dtype=torch.bool), scales, LossSettings())
    assert nothing.total is None
    assert len(nothing.left_out) == 5


@pytest.mark.parametrize("lacking", [False, True])
def test_parts_give_the_gradients_of_the_whole_batch(lacking: bool) -> None:
    batch = a_batch(12, lacking)
    grads = []
    for parts in (1, 3):
        model = a_model().train()
        found = backward(model, batch, LossSettings(), ALONE, parts=parts)
        assert found.total is not None
        loss = found.total.item()
        grads.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    (one, whole), (other, parted) = grads
    assert other == pytest.approx(one, rel=1e-6)
    for name, grad in whole.items():
        if grad is None:
            assert parted[name] is None
            continue
        size = float(grad.abs().max())
        assert torch.allclose(grad, parted[name], rtol=1e-3, atol=1e-4 * size + 1e-7), name


def test_split_keeps_rows_together() -> None:
    batch = a_batch(12, lacking=True)
    model = a_model().train()
    whole = embed(model, batch)
    parts = torch.cat([embed(model, part) for part in split(batch, 4)])
    assert torch.allclose(whole, parts, atol=1e-5)
    assert (whole[~batch.has] == 0).all()


# --------------------------------------------------------------------------- metadata dropout


@pytest.mark.parametrize(
    ("valid", "share", "kept"),
    [(10, 0.5, 5), (8, 0.5, 5), (4, 0.5, 4), (10, 0.0, 10), (10, 0.29, 8), (10, 1.0, 0)],
)
def test_a_share_of_the_batch_is_without_a_field(valid: int, share: float, kept: int) -> None:
    rows = np.arange(10) < valid
    found = dropped(rows, share, np.random.default_rng(1))
    assert found.sum() == kept
    assert not (found & ~rows).any()


def test_half_of_one_is_none() -> None:
    assert dropped(np.array([True]), 0.5, np.random.default_rng(1)).all()


def test_fields_are_hidden_each_by_itself() -> None:
    batch = a_batch(12)
    found = hide_metadata(batch, 0.5, (1, 2), ALONE)
    missing = {name: int((~v).sum()) for name, v in found.metadata.valid.items()}
    # Of the sources two thirds are known, a third of them freesound, whose hours are not.
    assert missing == {"asource": 6, "latlong": 6, "month": 6, "time": 6}
    assert (found.metadata.valid["latlong"] != found.metadata.valid["month"]).any()
    again = hide_metadata(batch, 0.5, (1, 2), ALONE)
    assert all((again.metadata.valid[n] == v).all() for n, v in found.metadata.valid.items())
    other = hide_metadata(batch, 0.5, (1, 3), ALONE)
    assert any((other.metadata.valid[n] != v).any() for n, v in found.metadata.valid.items())


# ------------------------------------------------------------------------------- learning rate


def test_learning_rate_is_that_of_torch() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.AdamW([weight], lr=0.1)
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimiser, 7, eta_min=0.01)
    schedule = ScheduleSettings(restart_steps=7, lowest=0.1)
    for step in range(20):
        assert learning_rate(step, 99, 0.1, schedule) == pytest.approx(theirs.get_last_lr()[0])
        optimiser.step()
        theirs.step()


def test_learning_rate_rises_first() -> None:
    schedule = ScheduleSettings(warmup_steps=4)
    rates = [learning_rate(step, 24, 1.0, schedule) for step in range(24)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 0.01


# ----------------------------------------------------------------------------- two processes

_WORKER = """
import sys
sys.path.insert(0, {here!r})
import test_trainer_parts as parts
parts.worker(sys.argv[1])
"""


def worker(out: str) -> None:
    """One of two processes: a few steps on its half of each batch."""
    from soundmap.train.processes import join_processes, leave

    torch.set_num_threads(1)
    processes = join_processes("cpu")
    losses, model = steps(processes, 12 // processes.world)
    if processes.first:
        torch.save({"losses": losses, "model": model.state_dict()}, out)
    leave(processes)


def steps(processes: Processes, batch: int) -> tuple[list[float], SoundModel]:
    """Train for three steps on the rows of all processes."""
    from soundmap.train.processes import average

    model = a_model().train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    feeder = Feeder(Rows(Places(40, True), viewer(), 7, 0.2), batch, processes.rank,
                    processes.world, 1)  # fmt: skip
    put = collator()
    losses = []
    # Without pseudo-matches: captions that share their telling word tie, and rounding decides.
    weights = LossSettings(alpha=0.0)
    for step, views in zip(range(3), feeder.steps(0), strict=False):
        optimiser.zero_grad()
        made = hide_metadata(put.collate(views), 0.5, (7, step), processes)
        found = backward(model, made, weights, processes, parts=2, seed=(7, step))
        average(model.parameters(), processes)
        optimiser.step()
        assert found.total is not None
        losses.append(float(found.total.detach()))
    feeder.close()
    return losses, model


def test_two_processes_are_one_of_twice_the_batch(tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    here = Path(__file__).resolve().parent
    out = tmp_path / "two.pt"
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
             "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parents[1])}  # fmt: skip
    code = _WORKER.format(here=str(here))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(out)],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    two = torch.load(out, weights_only=True)
    losses, model = steps(ALONE, 12)
    assert two["losses"] == pytest.approx(losses, rel=1e-5)
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight, two["model"][name], rtol=1e-3, atol=1e-5), name

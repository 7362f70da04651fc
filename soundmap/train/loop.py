"""The training loop of the bundled model: images against captions and phrases of what one hears."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from soundmap.encoder.text import StaticText
from soundmap.nn.model import ModelConfig, SoundModel
from soundmap.products.labelled import Audibility, LabelledImages
from soundmap.train.augment import crop_resize, hide, patchwork, recolour, turn
from soundmap.train.losses import agreement_loss, caption_loss, phrase_loss, spread_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """A part of training with its own course of the learning rate: up, then down a cosine."""

    steps: int
    learning_rate: float
    warmup: int
    fixed_norms: bool = False
    """Whether batch norms use their running statistics, as the finished model does."""
    seed_offset: int = 0


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the card keeps it."""

    phases: tuple[Phase, ...] = (
        Phase(2400, 2e-3, warmup=150),
        Phase(900, 1.2e-3, warmup=50, fixed_norms=True, seed_offset=1),
        Phase(900, 1.0e-3, warmup=50, fixed_norms=True, seed_offset=2),
    )
    seed: int = 56
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    average: float = 0.998
    """Decay of the running mean of the weights; the mean is what is kept."""
    patchwork_share: float = 0.25
    """Part of each batch that is also seen as patchwork."""
    threads: int = 1
    save_every: int = 250


@dataclass(frozen=True)
class Diet:
    """How one data set is fed: how many per step, and what crops stand for the window."""

    data: LabelledImages
    batch: int
    crop_px: tuple[int, int]
    """Smallest and largest side of the crop; the GSD told to the model follows from it."""


@dataclass(frozen=True)
class Phrases:
    """Captions and prompts as token vectors, to draw from."""

    captions: list[Tensor]
    """Per class: float32[n, 1, text_dim]."""
    prompts: list[Tensor]
    """Per concept: float32[n, 1, text_dim]."""
    audible: Tensor
    """float32[classes, C]."""

    def draw_captions(self, rng: torch.Generator) -> Tensor:
        """Draw a caption of each class; a quarter are made of prompts of audible concepts."""
        rows = []
        for label, written in enumerate(self.captions):
            if torch.rand((), generator=rng) < 0.75:
                rows.append(_pick(written, rng))
                continue
            concepts = torch.nonzero(self.audible[label])[:, 0]
            chosen = concepts[torch.randperm(len(concepts), generator=rng)[:3]]
            rows.append(
                torch.stack([_pick(self.prompts[int(c)], rng) for c in chosen.tolist()]).mean(0)
            )
        return torch.stack(rows)

    def draw_prompts(self, rng: torch.Generator) -> Tensor:
        """Draw a prompt of each concept: float32[C, 1, text_dim]."""
        return torch.stack([_pick(p, rng) for p in self.prompts])


def _pick(options: Tensor, rng: torch.Generator) -> Tensor:
    return options[int(torch.randint(0, len(options), (), generator=rng))]


def make_phrases(
    text: StaticText, audibility: Audibility, prompts: list[list[str]], dataset: str
) -> Phrases:
    """Encode the captions of a data set's classes and the prompts of the bank once."""

    def encode(texts: list[str]) -> Tensor:
        return torch.stack([torch.from_numpy(tokens) for tokens in text.tokens(texts)])

    table = audibility.tables[dataset]
    return Phrases(
        [encode(entry["captions"]) for entry in table.values()],
        [encode(p) for p in prompts],
        torch.from_numpy(audibility.matrix(dataset)).float(),
    )


def _batches(count: int, batch: int, rng: torch.Generator) -> Iterator[Tensor]:
    while True:
        order = torch.randperm(count, generator=rng)
        for start in range(0, count - batch + 1, batch):
            yield order[start : start + batch]


class _Heads(nn.Module):
    """Scales, offsets and class heads of the losses; they shape training and are then dropped.

    The class heads give the image tower a straight path to the labels while the codebook is still
    finding its codes.
    """

    def __init__(self, dim: int, classes: dict[str, int]) -> None:
        super().__init__()
        self.classes = nn.ModuleDict({name: nn.Linear(dim, n) for name, n in classes.items()})
        self.phrase_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.phrase_bias = nn.Parameter(torch.tensor(-4.0))


def _learning_rate(step: int, phase: Phase) -> float:
    if step < phase.warmup:
        return phase.learning_rate * (step + 1) / phase.warmup
    done = (step - phase.warmup) / max(1, phase.steps - phase.warmup)
    return phase.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def step_loss(
    model: SoundModel,
    heads: _Heads,
    diet: Diet,
    rows: Tensor,
    phrases: Phrases,
    config: TrainConfig,
    rng: torch.Generator,
) -> dict[str, Tensor]:
    """Compute the loss terms of one data set's part of a batch."""
    window, patch = model.config.vit.window_px, model.config.vit.patch_px
    low, high = diet.crop_px
    crop = int(torch.randint(low, high + 1, (), generator=rng))
    pixels = torch.from_numpy(diet.data.pixels[rows.numpy()])
    labels = torch.from_numpy(diet.data.labels[rows.numpy()])
    pixels = recolour(turn(crop_resize(pixels, crop, window, rng), rng), rng)
    gsd = torch.tensor([diet.data.gsd_m * crop / window])

    def tokens(x: Tensor) -> Tensor:
        return model.embed(x.contiguous(memory_format=torch.channels_last))

    captions = model.encode_text(phrases.draw_captions(rng))
    prompts = model.encode_text(phrases.draw_prompts(rng))
    audible = phrases.audible[labels]
    scale, p_scale, p_bias = model.logit_scale.exp(), heads.phrase_scale.exp(), heads.phrase_bias
    head = heads.classes[diet.data.name]

    grid = tokens(hide(pixels, 0.08, rng))
    whole = model.queries(grid, gsd)
    logits = model.codebook.logits(whole)
    image = model.codebook.combine(logits.amax(-2))

    local = model.config.local_patches
    single = model.queries(grid, gsd, local) if local else whole
    patches = model.codebook.each(single)
    every = labels[:, None].expand(-1, patches.shape[1])

    mixed = max(2, int(len(rows) * config.patchwork_share))
    quilt = patchwork(pixels[:mixed], patch, rng)
    piece_queries = model.queries(tokens(quilt.pixels), gsd, local)
    pieces = model.codebook.each(piece_queries)
    origin = labels[:mixed][quilt.image]
    return {
        "caption": caption_loss(image, captions, labels, scale),
        "phrase": phrase_loss(image, prompts, audible, p_scale, p_bias),
        "patch": caption_loss(patches, captions, every, scale)
        + caption_loss(pieces, captions, origin, scale),
        "patch_phrase": phrase_loss(patches, prompts, audible[:, None], p_scale, p_bias)
        + phrase_loss(pieces, prompts, phrases.audible[origin], p_scale, p_bias),
        "label": F.cross_entropy(head(whole.mean(1)), labels)
        + F.cross_entropy(head(single.mean(1)), labels)
        + 0.5 * F.cross_entropy(head(piece_queries).flatten(0, 1), origin.flatten()),
        "agree": agreement_loss(pieces, patches[:mixed][quilt.image, quilt.patch].detach()),
        "spread": spread_loss(logits).mean(),
    }


WEIGHTS = {
    "caption": 1.0,
    "phrase": 2.0,
    "patch": 0.25,
    "patch_phrase": 0.5,
    "label": 1.0,
    "agree": 0.25,
    "spread": 0.02,
}


def fit(
    model_config: ModelConfig,
    config: TrainConfig,
    diets: list[Diet],
    phrases: list[Phrases],
    out: Path,
) -> SoundModel:
    """Train a model, phase after phase.

    First with batch norms on each batch's own statistics; each batch is of one data set, so these
    differ from the mixture that the finished model sees. Then, from the running mean of the
    weights, with the norms fixed to that mixture, so that the rest of the network settles on it.

    Parameters
    ----------
    model_config, config
        Architecture, and how to train.
    diets, phrases
        Data sets and their captions, in the same order.
    out
        Folder for ``weights.safetensors`` (every ``save_every`` steps) and ``log.jsonl``.

    Returns
    -------
    SoundModel
        With the running mean of the weights.
    """
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    out.mkdir(parents=True, exist_ok=True)
    model = SoundModel(model_config)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with (out / "log.jsonl").open("w", encoding="utf-8") as journal:
        journal.write(json.dumps({"model": asdict(model_config), "train": asdict(config)}) + "\n")
        for phase in config.phases:
            model = run_phase(model, phase, config, diets, phrases, out, journal)
    return model.eval()


def run_phase(
    model: SoundModel,
    phase: Phase,
    config: TrainConfig,
    diets: list[Diet],
    phrases: list[Phrases],
    out: Path,
    journal: TextIO,
) -> SoundModel:
    """Train for one phase, with a fresh optimiser and fresh heads; return the running mean."""
    rng = torch.Generator().manual_seed(config.seed + phase.seed_offset)
    heads = _Heads(model.config.dim, {d.data.name: len(d.data.classes) for d in diets})
    mean = copy.deepcopy(model)
    parameters = [*model.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=phase.learning_rate,
        betas=(0.9, 0.98),
    )
    streams = [_batches(len(d.data.labels), d.batch, rng) for d in diets]
    total_batch = sum(d.batch for d in diets)
    started = time.monotonic()
    sums: dict[str, float] = {}
    model.train()
    if phase.fixed_norms:
        _fix_norms(model)
    for step in range(phase.steps):
        for group in optimiser.param_groups:
            group["lr"] = _learning_rate(step, phase)
        for diet, words, stream in zip(diets, phrases, streams, strict=True):
            terms = step_loss(model, heads, diet, next(stream), words, config, rng)
            # A larger share for a small data set than its size alone would give it.
            share = (diet.batch / total_batch) ** 0.5
            loss = torch.stack([WEIGHTS[k] * v for k, v in terms.items()]).sum() * share
            loss.backward()
            for key, value in terms.items():
                key = f"{diet.data.name}.{key}"
                sums[key] = sums.get(key, 0.0) + float(value.detach())
        nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(50.0))
        _follow(mean, model, min(config.average, (step + 1) / (step + 10)))
        if (step + 1) % 50 == 0:
            row = {k: round(v / 50, 4) for k, v in sums.items()}
            row |= {"step": step + 1, "seconds": round(time.monotonic() - started, 1)}
            journal.write(json.dumps(row) + "\n")
            journal.flush()
            log.info("%s", row)
            sums.clear()
        if (step + 1) % config.save_every == 0 or step + 1 == phase.steps:
            save_weights(mean, out / "weights.safetensors")
    return mean


def _fix_norms(model: SoundModel) -> None:
    """Hold batch norms to their running statistics; their scale and offset still learn."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


@torch.no_grad()
def _follow(mean: SoundModel, model: SoundModel, decay: float) -> None:
    for kept, new in zip(mean.state_dict().values(), model.state_dict().values(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(new, 1 - decay)
        else:
            kept.copy_(new)


def save_weights(model: SoundModel, path: Path) -> None:
    """Write the weights, whole or not at all."""
    part = path.with_suffix(".part")
    state = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    save_file(state, str(part))
    part.replace(path)

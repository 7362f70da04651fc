"""What the bundled model is fed: labelled images and clips, drawn by the number of the step.

Everything drawn at random follows from the seed and the step alone, so that a run that was stopped
goes on with the numbers that it would have had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from soundmap.products.labelled import LabelledImages
from soundmap.train.augment import clear, crop_resize, turn
from soundmap.train.clips import ClipSet, Hearing, balanced
from soundmap.train.phrases import Phrases

Crops = tuple[tuple[int, int, float], ...]
"""Smallest side, largest side, and how often."""


@dataclass(frozen=True)
class Diet:
    """How one data set is fed: how many per step, and what crops stand for the window."""

    data: LabelledImages
    batch: int
    crops: Mapping[int, Crops]
    """Side of the window -> sides of the crops that are resized to it. The GSD told to the model
    follows from both."""
    phrases: Phrases
    dark_rgb: tuple[int, int, int] = (0, 0, 0)
    """The darkest ground, about the lowest hundredth of each band: what the air adds to it."""
    cleared: float = 0.0
    """Part of the images that are seen as if corrected for the air."""


@dataclass(frozen=True)
class Clips:
    """How recordings are fed."""

    clips: ClipSet
    phrases: Phrases
    heard: Mapping[str, Tensor]
    """Data set -> bool[classes, classes of clips]: what is audible where."""
    pairs: int = 12
    """Clips that are audible in an image of the batch, and are contrasted with it."""
    others: int = 8
    """Clips of any class."""
    how: Hearing = field(default_factory=Hearing)


@dataclass(frozen=True)
class Group:
    """Images of one data set and one GSD, somewhere in a batch."""

    start: int
    stop: int


@dataclass(frozen=True)
class Batch:
    """Images of all data sets, in windows of one size."""

    pixels: Tensor
    """float32[B, 3, W, W] in 0..255, turned; some of them cleared, else in their own light."""
    gsd_m: Tensor
    """float32[B]."""
    labels: Tensor
    """int64[B]."""
    parts: tuple[slice, ...]
    """Where the images of each data set are."""
    groups: tuple[Group, ...]


def step_rng(seed: int, offset: int, step: int) -> torch.Generator:
    """Chance for one step of one phase, whatever went before."""
    return torch.Generator().manual_seed((seed * 1_000 + offset) * 1_000_003 + step)


def rows_of(count: int, batch: int, step: int, seed: int) -> Tensor:
    """Rows of a step: int64[batch], every row once before any comes again."""
    per_epoch = max(1, count // batch)
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 7_919 + epoch))
    return order[place * batch : (place + 1) * batch]


def draw_batch(
    diets: list[Diet], windows: Mapping[int, float], rows: list[Tensor], rng: torch.Generator
) -> Batch:
    """Crop and turn the images of a step.

    Parameters
    ----------
    diets, rows
        Data sets, and which of their images.
    windows
        Side of the window -> how often; one for the whole batch.
    """
    side = list(windows)[_draw(list(windows.values()), rng)]
    pixels, gsd, labels, parts, groups = [], [], [], [], []
    start = 0
    for diet, chosen in zip(diets, rows, strict=True):
        first = start
        for half in chosen.chunk(2):
            low, high, _ = diet.crops[side][_draw([c[2] for c in diet.crops[side]], rng)]
            crop = int(torch.randint(low, high + 1, (), generator=rng))
            images = torch.from_numpy(diet.data.pixels[half.numpy()])
            seen = turn(crop_resize(images, crop, side, rng), rng)
            pixels.append(clear(seen, diet.dark_rgb, diet.cleared, rng))
            labels.append(torch.from_numpy(diet.data.labels[half.numpy()]))
            gsd.append(torch.full((len(half),), diet.data.gsd_m * crop / side))
            groups.append(Group(start, start + len(half)))
            start += len(half)
        parts.append(slice(first, start))
    return Batch(torch.cat(pixels), torch.cat(gsd), torch.cat(labels), tuple(parts), tuple(groups))


def _draw(weights: list[float], rng: torch.Generator) -> int:
    return int(torch.multinomial(torch.tensor(weights), 1, generator=rng))


@dataclass(frozen=True)
class Heard:
    """Clips of a step: first those paired with images, then others."""

    images: Tensor
    """int64[P], images of the batch that the first P clips are audible in."""
    rows: Tensor
    """int64[N], clips."""
    match: Tensor
    """bool[P, P], which of the first P clips are audible in which of the P images."""
    audible: Tensor
    """bool[B, N], which clips are audible in which images of the batch."""


def draw_clips(clips: Clips, diets: list[Diet], batch: Batch, rng: torch.Generator) -> Heard:
    """Draw images in whose class clips are audible, and a clip for each of them."""
    audible = torch.zeros(len(batch.labels), len(clips.clips.classes), dtype=torch.bool)
    for diet, part in zip(diets, batch.parts, strict=True):
        audible[part] = clips.heard[diet.data.name][batch.labels[part]]
    there = torch.bincount(clips.clips.labels, minlength=audible.shape[1]) > 0
    audible &= there
    # As in the other terms, a small data set counts more than its size alone would give it.
    size = torch.cat(
        [torch.full((p.stop - p.start,), float(p.stop - p.start)) for p in batch.parts]
    )
    able = torch.nonzero(audible.any(1))[:, 0]
    count = min(clips.pairs, len(able))
    chosen = torch.multinomial(size[able] ** -0.5, count, generator=rng) if count else able
    images = able[chosen]
    of_class = clips.clips.rows
    kinds = torch.multinomial(audible[images].float(), 1, generator=rng)[:, 0]
    rows = [
        of_class[k][int(torch.randint(0, len(of_class[k]), (), generator=rng))]
        for k in kinds.tolist()
    ]
    paired = torch.stack(rows) if rows else torch.zeros(0, dtype=torch.int64)
    others = balanced(clips.clips, clips.others, rng)
    drawn = torch.cat([paired, others])
    return Heard(images, drawn, audible[images][:, kinds], audible[:, clips.clips.labels[drawn]])

"""Labelled recordings to train on: their pictures, and what is done to them to make them many."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from soundmap.errors import InputError
from soundmap.nn.mel import CLIP_SAMPLES, log_mel

ESC_INDEX = Path("audio") / "esc_index.csv"
FOREST_INDEX = Path("audio") / "jura_forest_24h.csv"
FOREST = "forest_day"
"""Class of the forest's recordings by day."""
FREE_LICENCES = ("CC0", "CC-BY")
"""Licences of clips whose use in published weights nobody can object to."""
_DAY_HOURS = range(5, 20)


@dataclass(frozen=True)
class ClipSet:
    """Recordings as pictures, and what they are of."""

    mels: Tensor
    """float32[N, frames, 64], decibels, of five seconds each."""
    labels: Tensor
    """int64[N], index into ``classes``."""
    classes: tuple[str, ...]
    background: Tensor
    """float32[M, frames, 64]: recordings to be mixed in, whatever the class."""

    @property
    def rows(self) -> list[Tensor]:
        """Rows of each class."""
        return [torch.nonzero(self.labels == k)[:, 0] for k in range(len(self.classes))]


@dataclass(frozen=True)
class Hearing:
    """How clips are varied."""

    frames: int = 320
    """Length of the stretch that is shown, frames of ten milliseconds."""
    background: float = 0.5
    """Share of clips that a background is mixed into."""
    blend: float = 0.3
    """Share of clips that another clip of the same class is mixed into."""
    masks: int = 2
    """Stripes blotted out, along time and along frequency each."""
    mask_frames: int = 32
    mask_bands: int = 10
    tilt_db: float = 8.0
    """Largest gain or loss from the lowest to the highest band, as of other microphones."""
    bands: int = 3
    """Largest shift along frequency."""


def load_clips(data: Path, classes: tuple[str, ...], leave_out_fold: int | None = None) -> ClipSet:
    """Load the clips whose licence lets weights be published, and the forest day.

    Parameters
    ----------
    data
        Folder that holds ``audio/``.
    classes
        Names to number the clips by; a clip of another class is an error.
    leave_out_fold
        A fold of the clips to keep back, for choosing how to train.

    Raises
    ------
    InputError
        An index or a clip is missing, or a clip has another class.
    """
    mels, labels, background = [], [], []
    for row in _rows(data / ESC_INDEX):
        if row["split"] != "train" or row["clip_licence"] not in FREE_LICENCES:
            continue
        if leave_out_fold is not None and int(row["fold"]) == leave_out_fold:
            continue
        mels.append(picture(data / "audio" / row["file"])[0])
        labels.append(_number(row["category"], classes))
    for row in _rows(data / FOREST_INDEX):
        halves = picture(data / "audio" / row["file"])
        background.extend(halves)
        if int(row["local_time"][11:13]) in _DAY_HOURS:
            mels.extend(halves)
            labels.extend([_number(FOREST, classes)] * len(halves))
    return ClipSet(torch.stack(mels), torch.tensor(labels), classes, torch.stack(background))


def picture(path: Path) -> list[Tensor]:
    """Picture a recording: one float32[501, 64] for every five seconds, the last one filled."""
    from soundmap.encoder.audio import read_clip

    half = CLIP_SAMPLES // 2
    wave = torch.from_numpy(read_clip(path))
    wave = wave[: max(half, len(wave) // half * half)]
    wave = torch.nn.functional.pad(wave, (0, -len(wave) % half))
    return list(log_mel(wave.view(-1, half))[:, 0])


def _number(category: str, classes: tuple[str, ...]) -> int:
    if category not in classes:
        raise InputError(f"the table of clips has no captions for {category!r}: add some")
    return classes.index(category)


def _rows(index: Path) -> list[dict[str, str]]:
    if not index.exists():
        raise InputError(f"{index} not found: --data must name the folder that holds it")
    with index.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def vary(clips: ClipSet, rows: Tensor, how: Hearing, rng: torch.Generator) -> Tensor:
    """Make new clips of old ones.

    A stretch is cut out where there is sound, mixed with another clip of its class and with the
    forest in the power domain, tilted and shifted in frequency, and partly blotted out (after
    SpecAugment, Park et al. 2019).

    Parameters
    ----------
    clips
        What to draw from.
    rows
        int64[B], which clips.
    how
        What is done.
    rng
        Where chance comes from.

    Returns
    -------
    Tensor
        float32[B, 1, frames, 64], decibels.
    """
    of_class = clips.rows
    out = torch.empty(len(rows), 1, how.frames, clips.mels.shape[2])
    for i, row in enumerate(rows.tolist()):
        mel = _stretch(clips.mels[row], how.frames, rng)
        if _chance(how.blend, rng):
            other = of_class[int(clips.labels[row])]
            mel = _add(mel, _stretch(_pick(clips.mels[other], rng), how.frames, rng), 0, 10, rng)
        if _chance(how.background, rng):
            mel = _add(mel, _stretch(_pick(clips.background, rng), how.frames, rng), 5, 30, rng)
        mel = mel + torch.linspace(-0.5, 0.5, mel.shape[1]) * _between(-1, 1, rng) * how.tilt_db
        shift = int(torch.randint(-how.bands, how.bands + 1, (), generator=rng))
        out[i, 0] = _mask(_shift(mel, shift), how, rng)
    return out


def _chance(share: float, rng: torch.Generator) -> bool:
    return bool(torch.rand((), generator=rng) < share)


def _between(low: float, high: float, rng: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng))


def _pick(options: Tensor, rng: torch.Generator) -> Tensor:
    return options[int(torch.randint(0, len(options), (), generator=rng))]


def _stretch(mel: Tensor, frames: int, rng: torch.Generator) -> Tensor:
    """Cut out a stretch around a moment drawn by its loudness, so that it holds the sound."""
    peak = mel.amax(1)
    weight = (peak - peak.max() + 30).clamp_min(0) + 1e-3
    centre = int(torch.multinomial(weight, 1, generator=rng))
    start = centre - int(torch.randint(0, frames, (), generator=rng))
    start = min(max(0, start), len(mel) - frames)
    return mel[start : start + frames]


def _add(mel: Tensor, other: Tensor, low_db: float, high_db: float, rng: torch.Generator) -> Tensor:
    """Mix another sound in, so many decibels below."""
    drop = _between(low_db, high_db, rng)
    other = other - other.max() + mel.max() - drop
    ten = torch.tensor(10.0)
    return 10 * (ten.pow(mel / 10) + ten.pow(other / 10)).clamp_min(1e-10).log10()


def _shift(mel: Tensor, bands: int) -> Tensor:
    if not bands:
        return mel
    rolled = mel.roll(bands, 1)
    if bands > 0:
        rolled[:, :bands] = mel[:, :1]
    else:
        rolled[:, bands:] = mel[:, -1:]
    return rolled


def _mask(mel: Tensor, how: Hearing, rng: torch.Generator) -> Tensor:
    mean = mel.mean()
    mel = mel.clone()
    for axis, widest in ((0, how.mask_frames), (1, how.mask_bands)):
        for _ in range(how.masks):
            width = int(torch.randint(0, widest + 1, (), generator=rng))
            start = int(torch.randint(0, mel.shape[axis] - width + 1, (), generator=rng))
            mel.narrow(axis, start, width).fill_(mean)
    return mel


def balanced(clips: ClipSet, count: int, rng: torch.Generator) -> Tensor:
    """Draw clips so that rare classes come often: by the square root of their number.

    Returns
    -------
    Tensor
        int64[count], rows.
    """
    numbers = torch.bincount(clips.labels, minlength=len(clips.classes)).float()
    weight = numbers[clips.labels].rsqrt()
    return torch.multinomial(weight, count, replacement=True, generator=rng)

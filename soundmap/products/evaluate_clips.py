"""How well a model names clips of known class, and finds them by name."""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from soundmap.encoder import Encoder
from soundmap.errors import InputError, UsageError
from soundmap.products.by_class import (
    FEW,
    RESAMPLES,
    AudibleScore,
    ClassFigure,
    audible_score,
    precision_by_gallery,
    precision_by_query,
)
from soundmap.products.embed_samples import prompt_vectors
from soundmap.products.evaluate import as_windows
from soundmap.products.labelled import LabelledImages
from soundmap.products.scores import Estimate, estimate, resampled

INDEX = Path("audio") / "esc_index.csv"
"""Table of the clips in a data folder: file, category, split, recording, whether in ESC-10."""


class Drawing(TypedDict):
    """How resamples are drawn."""

    places: NDArray[np.int64]
    resamples: int
    seed: int


_COLUMNS = ("file", "category", "split", "freesound_id", "esc10")


@dataclass(frozen=True)
class Clips:
    """Embedded clips of known class."""

    split: str
    vectors: NDArray[np.float32]
    """float32[N, D], unit vectors."""
    labels: NDArray[np.int64]
    """int64[N], index into ``categories``."""
    recordings: NDArray[np.int64]
    """int64[N], which recording each clip was cut from."""
    categories: tuple[str, ...]
    """All that the index knows, by name; the split need not have clips of each."""
    esc10: tuple[str, ...]
    """Those of them that are of ESC-10."""
    left_out: dict[str, str]
    """Clips that could not be read -> why."""


@dataclass(frozen=True)
class ClipScore:
    """How well a model tells classes of clips, from text to audio and back."""

    split: str
    categories: tuple[str, ...]
    """Classes that have a prompt, among which a clip is named."""
    clips: int
    recordings: int
    """What the clips were cut from, and what is resampled."""
    text_to_audio: ClassFigure
    """The prompt of a class is the query, the clips are the gallery."""
    audio_to_text: ClassFigure
    """A clip is the query, the prompts of all classes are the gallery."""
    top1: Estimate
    """Share of clips whose nearest prompt is that of their own class."""
    left_out: dict[str, str]
    """Clips that could not be read -> why."""


def encode_clips(encoder: Encoder, data_folder: Path, split: str) -> Clips:
    """Embed the labelled clips of a data folder.

    Parameters
    ----------
    encoder
        A model with a side for sound.
    data_folder
        Folder that holds ``audio/esc_index.csv``.
    split
        "train" or "test", by recording. Clips of every licence count: they are judged on, only.

    Raises
    ------
    InputError
        The index is missing, is no such table, or has no readable clip of the split.
    UsageError
        The model has no tower for sound.
    """
    every = _index(data_folder / INDEX)
    rows = [row for row in every if row["split"] == split]
    if not rows:
        known = ", ".join(sorted({row["split"] for row in every}))
        raise InputError(f"{data_folder / INDEX} has no clips of split {split!r}; it has {known}")
    categories = tuple(sorted({row["category"] for row in every}))
    vectors: list[NDArray[np.float32]] = []
    kept: list[dict[str, str]] = []
    left_out: dict[str, str] = {}
    for row in rows:
        try:
            vectors.append(encoder.encode_audio([(data_folder / INDEX).parent / row["file"]])[0])
            kept.append(row)
        except InputError as error:
            left_out[row["file"]] = str(error)
    if not kept:
        raise InputError(
            f"{data_folder / INDEX}: none of {len(rows)} clips can be read; the first: "
            f"{next(iter(left_out.values()))}"
        )
    names = [row["freesound_id"] or row["file"] for row in kept]
    return Clips(
        split,
        np.stack(vectors),
        np.array([categories.index(row["category"]) for row in kept]),
        np.unique(names, return_inverse=True)[1].astype(np.int64),
        categories,
        tuple(sorted({row["category"] for row in every if row["esc10"] == "True"})),
        left_out,
    )


def score_clips(
    encoder: Encoder,
    clips: Clips,
    *,
    categories: Sequence[str] | None = None,
    prompts: Mapping[str, Sequence[str]],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ClipScore:
    """Judge a model on embedded clips.

    What is resampled are the recordings that clips were cut from, while galleries stay as they are:
    from text to audio each clip with the precision at its place, from audio to text as queries.

    Parameters
    ----------
    encoder
        The model that embedded the clips.
    clips
        From `encode_clips`.
    categories
        Judge these classes alone: clips and prompts of others are not in the galleries. None: all
        of the index, also those that have no clip in the split: a clip may be mistaken for them.
    prompts
        Class -> texts that describe it; their unit vectors are averaged.
    resamples, seed
        How often to draw recordings, and from which seed.

    Raises
    ------
    UsageError
        A class is unknown or has no prompt, or the split has no clip of any.
    """
    names = tuple(categories) if categories is not None else clips.categories
    unknown = [name for name in names if name not in clips.categories]
    if unknown or not names:
        raise UsageError(
            f"the clips have no class {', '.join(unknown) or '(none was given)'}: choose from "
            f"{', '.join(clips.categories)}"
        )
    silent = [name for name in names if not prompts.get(name)]
    if silent:
        raise UsageError(f"classes without a prompt: {', '.join(silent)}; give each a text")
    number = np.array(
        [names.index(name) if name in names else -1 for name in clips.categories], np.int64
    )
    labels = number[clips.labels]
    kept = labels >= 0
    labels, vectors, recordings = labels[kept], clips.vectors[kept], clips.recordings[kept]
    if not len(labels):
        raise UsageError(f"split {clips.split!r} has no clip of {', '.join(names)}")
    texts = prompt_vectors(encoder, [prompts[name] for name in names])
    right = ((vectors @ texts.T).argmax(axis=1) == labels).astype(np.float64)
    drawn = [
        (counts @ right) / counts.sum(axis=1) for counts in resampled(recordings, resamples, seed)
    ]
    few = len(np.unique(recordings)) < FEW
    again = np.zeros(0) if few else np.concatenate([np.zeros(0), *drawn])
    drawing: Drawing = {"places": recordings, "resamples": resamples, "seed": seed}
    own = np.eye(len(names), dtype=bool)
    return ClipScore(
        clips.split,
        names,
        len(labels),
        len(np.unique(recordings)),
        precision_by_gallery(texts, vectors, labels, names, **drawing),
        precision_by_query(vectors, labels, texts, own, names, **drawing),
        estimate(float(right.mean()), again),
        clips.left_out,
    )


def evaluate_audible(
    encoder: Encoder,
    images: LabelledImages,
    clips: Clips,
    audible: Mapping[str, Collection[str]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> AudibleScore:
    """Judge how labelled images find the clips of what is audible in their class.

    Parameters
    ----------
    encoder
        The model that embedded the clips.
    images
        The queries, each read as one window of a map; they are what is resampled.
    clips
        The gallery, from `encode_clips`, all of it.
    audible
        Class of images -> classes of clips that are audible in it. Images of classes without a clip
        to be found are left out.
    resamples, seed
        How often to draw images, and from which seed.

    Raises
    ------
    UsageError
        The table names a class that there is not, or nothing is audible in any image.
    """
    strange = set(audible) - set(images.classes)
    strange |= {name for names in audible.values() for name in names} - set(clips.categories)
    if strange:
        raise UsageError(
            f"the table of audible clips names {', '.join(sorted(strange))}, which neither the "
            f"images of {images.name} nor the clips have"
        )
    heard = np.array(
        [[name in audible.get(one, ()) for name in clips.categories] for one in images.classes]
    )
    pixels, told_m = as_windows(images, encoder)
    found = encoder.encode_images(pixels, gsd_m=told_m, details=("image",)).image
    assert found is not None
    return audible_score(
        found,
        images.labels,
        clips.vectors,
        heard[:, clips.labels],
        images.classes,
        resamples=resamples,
        seed=seed,
    )


def _index(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise InputError(f"{path} not found: --data must name the folder that holds audio/")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    missing = [name for name in _COLUMNS if rows and name not in rows[0]]
    if missing or not rows:
        raise InputError(f"{path}: is no table of clips: it lacks {', '.join(missing) or 'rows'}")
    return rows

"""The vectors of a set of samples: images, recordings and captions, each where it is known."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from soundmap.encoder import Encoder, InputSpec
from soundmap.encoder.audio import segments
from soundmap.encoder.described import Facts, encode_described, metadata_fields
from soundmap.encoder.preprocess import reference_window
from soundmap.errors import InputError, OutputError, UsageError
from soundmap.nn.mel import MEL_SHAPE, log_mel
from soundmap.products.samples.base import (
    FIELDS,
    BadSample,
    Sample,
    Samples,
    StreamedSamples,
)
from soundmap.products.samples.report import BadRows

KINDS = FIELDS
"""What a sample may have: image, audio, audio_caption, image_caption. Each gets a vector."""

BATCH = 100
"""Samples encoded together, as the published evaluation does."""

T = TypeVar("T")


@dataclass(frozen=True)
class Reading:
    """How samples are read before they are encoded."""

    scale: int = 1
    """How many native tiles wide the centre of an image is that the model sees (the zoom)."""
    metadata: bool = True
    """Whether the model is told place, time and sources of each sample, as far as it takes them."""
    batch: int = BATCH
    mel_index: int = 0
    """Which of the stored spectrograms of a recording is heard."""


@dataclass(frozen=True)
class Embeddings:
    """Unit vectors of samples, and what is missing."""

    keys: tuple[str, ...]
    """Names of the N samples."""
    labels: tuple[str, ...]
    """Class of each, "" where none is known."""
    vectors: Mapping[str, NDArray[np.float32]]
    """Kind -> float32[N, D]; rows that are not known are zero and never compared."""
    known: Mapping[str, NDArray[np.bool_]]
    """Kind -> bool[N]."""
    classes: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Label -> float32[D], the mean of the texts that describe it, a unit vector."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Model, data, reading, and counts of what was left out."""


def embed_samples(
    encoder: Encoder,
    samples: Samples | StreamedSamples,
    reading: Reading | None = None,
    *,
    prompts: Mapping[str, Sequence[str]] | None = None,
    bad: BadRows | None = None,
    progress: Callable[[int], None] | None = None,
) -> Embeddings:
    """Embed everything that the samples have and the model knows.

    Parameters
    ----------
    encoder
        Any; recordings are left out if it has no tower for sound.
    samples
        With a length and an index, or to be read once from the beginning.
    reading
        How they are read.
    prompts
        Label -> texts that describe the class; by default the words of the label.
    bad
        Samples that cannot be read, and captions without a word that the model knows, are added
        here; the counts are in the result's ``facts``, too.
    progress
        Called with the number of samples done.

    Raises
    ------
    UsageError
        The model does not know the scale, or the reading makes no sense.
    InputError
        There is no sample that can be read.
    MissingExtra
        A library that the model needs is not installed.
    """
    reading = reading or Reading()
    if reading.batch < 1 or reading.mel_index < 0:
        raise UsageError(
            f"the batch must be at least 1 and the spectrogram 0 or more, not {reading.batch} and "
            f"{reading.mel_index}"
        )
    bad = BadRows(samples.name) if bad is None else bad
    batches = _Batches(encoder, samples, reading, bad)
    keys: list[str] = []
    labels: list[str] = []
    parts: dict[str, list[NDArray[np.float32]]] = {kind: [] for kind in KINDS}
    known: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for batch in _batched(_readable(samples, bad), reading.batch):
        found = batches.encode(batch)
        for kind in KINDS:
            have = [i in found[kind] for i in range(len(batch))]
            known[kind] += have
            parts[kind] += [found[kind][i] for i in range(len(batch)) if have[i]]
        keys += [one.key for one in batch]
        labels += [one.label or "" for one in batch]
        if progress is not None:
            progress(len(keys))
    if not keys:
        raise InputError(f"{samples.name}: no sample can be read: {bad.summary()}")
    vectors = {}
    for kind in KINDS:
        vectors[kind] = np.zeros((len(keys), encoder.dim), np.float32)
        for row, vector in zip(np.flatnonzero(known[kind]), parts.pop(kind), strict=True):
            vectors[kind][row] = vector
    return Embeddings(
        tuple(keys),
        tuple(labels),
        vectors,
        {kind: np.array(have, bool) for kind, have in known.items()},
        _class_vectors(encoder, labels, prompts or {}),
        batches.facts() | {"bad_rows": dict(bad.counts)},
    )


def label_words(label: str) -> str:
    """Say a label as words: "SeaLake" and "sea_lake" are "sea lake"."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)
    return " ".join(re.split(r"[\s_\-]+", apart)).strip().lower()


def prompt_vectors(encoder: Encoder, prompts: Sequence[Sequence[str]]) -> NDArray[np.float32]:
    """Embed the texts of every class and average them: float32[classes, D], unit vectors."""
    vectors = encoder.encode_text([text for one in prompts for text in one])
    ends = np.cumsum([len(one) for one in prompts])
    means = np.stack([part.mean(axis=0) for part in np.split(vectors, ends[:-1])])
    unit: NDArray[np.float32] = means / np.linalg.norm(means, axis=1, keepdims=True)
    return unit


def _class_vectors(
    encoder: Encoder, labels: Sequence[str], prompts: Mapping[str, Sequence[str]]
) -> dict[str, NDArray[np.float32]]:
    """Vectors of the classes; without those whose own words the model does not know."""
    found = {}
    for name in sorted(set(labels) - {""}):
        try:
            texts = list(prompts.get(name) or [label_words(name)])
            found[name] = prompt_vectors(encoder, [texts])[0]
        except UsageError:
            if name in prompts:
                raise
    return found


def _readable(samples: Samples | StreamedSamples, bad: BadRows) -> Iterator[Sample]:
    if not isinstance(samples, Samples):
        yield from samples
        bad.merge(samples.bad)
        return
    bad.read += len(samples)
    for i in range(len(samples)):
        try:
            yield samples[i]
        except BadSample as error:
            bad.add(error.key, error.reason, error.detail)


class _Batches:
    """Encodes a batch of samples at a time."""

    def __init__(
        self,
        encoder: Encoder,
        samples: Samples | StreamedSamples,
        reading: Reading,
        bad: BadRows,
    ) -> None:
        self._encoder, self._reading, self._bad = encoder, reading, bad
        self._name = samples.name
        spec = encoder.spec
        self._crop_px = samples.native_px * reading.scale
        self._told_m = told_gsd_m(spec, samples.gsd_m, self._crop_px, reading.scale)
        self._fields = metadata_fields(encoder) if reading.metadata else ()
        self._hears = hears(encoder)
        self._padded = self._unheard = 0

    def facts(self) -> dict[str, Any]:
        """What the vectors depend on, and what was left out."""
        return {
            "model": getattr(getattr(self._encoder, "card", None), "name", ""),
            "model_id": self._encoder.id,
            "data": self._name,
            **asdict(self._reading),
            "metadata": list(self._fields),
            "crop_px": self._crop_px,
            "told_gsd_m": self._told_m if self._crop_px else None,
            "images_smaller_than_crop": self._padded,
            "recordings_without_tower": self._unheard,
        }

    def encode(self, batch: Sequence[Sample]) -> dict[str, dict[int, NDArray[np.float32]]]:
        """Embed a batch: kind -> position -> float32[D]."""
        scale = self._reading.scale
        captions = {i: one.image_captions.get(scale, "") for i, one in enumerate(batch)}
        found = {
            "image": self._images(batch),
            "audio": self._sounds(batch),
            "audio_caption": self._texts(batch, {i: s.audio_caption for i, s in enumerate(batch)}),
            "image_caption": self._texts(batch, captions),
        }
        for kind, vectors in found.items():
            for i in [i for i, v in vectors.items() if not (np.isfinite(v).all() and v.any())]:
                self._bad.add(batch[i].key, f"the model gives no finite vector for its {kind}")
                del vectors[i]
        return found

    def _images(self, batch: Sequence[Sample]) -> dict[int, NDArray[np.float32]]:
        chosen = [(i, one.image) for i, one in enumerate(batch) if one.image is not None]
        if not chosen:
            return {}
        side = self._encoder.spec.window_px
        windows = [reference_window(image, self._crop_px, side) for _, image in chosen]
        self._padded += sum(min(image.shape[1:]) < self._crop_px for _, image in chosen)
        facts = [facts_of(batch[i]) if self._fields else Facts() for i, _ in chosen]
        vectors = encode_described(
            self._encoder, np.stack(windows), facts, self._told_m, self._reading.scale
        )
        return {i: vector for (i, _), vector in zip(chosen, vectors, strict=True)}

    def _sounds(self, batch: Sequence[Sample]) -> dict[int, NDArray[np.float32]]:
        if not self._hears:
            self._unheard += sum(s.mel is not None or s.wave is not None for s in batch)
            return {}
        totals: dict[int, NDArray[np.float32]] = {}
        for pieces in _batched(self._pieces(batch), _PIECES):
            vectors = self._encoder.encode_mel(np.stack([mel for _, mel in pieces]))
            for (i, _), vector in zip(pieces, vectors, strict=True):
                totals[i] = totals[i] + vector if i in totals else vector
        return {i: total / (np.linalg.norm(total) or 1) for i, total in totals.items()}

    def _pieces(self, batch: Sequence[Sample]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Spectrograms of ten seconds, and whose they are."""
        wanted = self._reading.mel_index
        for i, one in enumerate(batch):
            if one.mel is not None:
                if wanted < len(one.mel):
                    yield i, one.mel[wanted]
                else:
                    self._bad.add(one.key, f"has no spectrogram number {wanted}")
            elif one.wave is not None:
                for piece in segments(one.wave):
                    yield i, log_mel(torch.from_numpy(piece)[None])[0].numpy()

    def _texts(
        self, batch: Sequence[Sample], texts: Mapping[int, str]
    ) -> dict[int, NDArray[np.float32]]:
        given = {i: text for i, text in texts.items() if text.strip()}
        try:
            found = self._encoder.encode_text(list(given.values())) if given else ()
            return dict(zip(given, found, strict=True))
        except UsageError:
            if len(given) == 1:
                self._bad.add(batch[next(iter(given))].key, "a caption has no word the model knows")
                return {}
        alone = [self._texts(batch, {i: text}) for i, text in given.items()]
        return {i: vector for one in alone for i, vector in one.items()}


_PIECES = 16


def told_gsd_m(spec: InputSpec, gsd_m: float, crop_px: int, scale: int) -> float:
    """Metres per pixel that a model is told of a crop resized to its window.

    Parameters
    ----------
    spec
        What the model reads.
    gsd_m
        Of the images as stored.
    crop_px
        Side of the crop.
    scale
        How many native tiles wide it is.

    Returns
    -------
    float
        For models that were trained on resized crops that of a native tile times the scale, as the
        published evaluation has it; for others what a pixel of the window is.
    """
    return gsd_m * scale if spec.resized else gsd_m * crop_px / spec.window_px


def hears(encoder: Encoder) -> bool:
    """Tell whether a model has a tower for sound."""
    try:
        encoder.encode_mel(np.zeros((0, *MEL_SHAPE), np.float32))
    except UsageError:
        return False
    return True


def facts_of(sample: Sample) -> Facts:
    """Metadata of a sample, as a model may be told them.

    The hour of a Freesound clip is never used: it is the hour of its upload (SPEC 4).
    """
    known = sample.lon is not None and sample.lat is not None
    uploaded = (sample.audio_source or "").casefold() == "freesound"
    return Facts(
        (float(sample.lon or 0), float(sample.lat or 0)) if known else None,
        sample.month,
        None if uploaded else sample.hour,
        sample.audio_source,
        sample.caption_source,
    )


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    batch: list[T] = []
    for one in items:
        batch.append(one)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# --- files -----------------------------------------------------------------------------------


def save_embeddings(embeddings: Embeddings, path: str | Path) -> None:
    """Write vectors to a NumPy archive, rows that are not known left out.

    Raises
    ------
    OutputError
        It cannot be written there.
    """
    arrays: dict[str, Any] = {
        "keys": np.array(embeddings.keys),
        "labels": np.array(embeddings.labels),
        "facts": np.array(json.dumps(embeddings.facts)),
    }
    named = embeddings.classes
    arrays |= {"classes": np.array(list(named)), "class_vectors": np.array(list(named.values()))}
    for kind in KINDS:
        known = embeddings.known[kind]
        arrays |= {f"{kind}_known": known, f"{kind}_vectors": embeddings.vectors[kind][known]}
    try:
        with Path(path).open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{path}: cannot be written ({reason}): choose another file") from error


def load_embeddings(path: str | Path) -> Embeddings:
    """Read vectors that `save_embeddings` wrote.

    Raises
    ------
    InputError
        The file is missing or is something else.
    """
    try:
        with np.load(path, allow_pickle=False) as held:
            keys = tuple(str(one) for one in held["keys"])
            known = {kind: held[f"{kind}_known"].astype(bool) for kind in KINDS}
            vectors = {}
            for kind, rows in known.items():
                part = held[f"{kind}_vectors"]
                if part.ndim != 2 or len(part) != rows.sum() or len(rows) != len(keys):
                    raise ValueError(f"{kind} has {part.shape} for {len(keys)} samples")
                vectors[kind] = np.zeros((len(keys), part.shape[1]), np.float32)
                vectors[kind][rows] = part
            labels = tuple(str(one) for one in held["labels"])
            names = (str(one) for one in held["classes"])
            classes = dict(zip(names, held["class_vectors"], strict=True))
            facts = json.loads(str(held["facts"]))
            return Embeddings(keys, labels, vectors, known, classes, facts)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path}: cannot be read as vectors of `soundmap evaluate retrieval` ({error})"
        ) from error

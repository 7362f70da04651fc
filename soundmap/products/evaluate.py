"""How well a model tells land from sound: against labelled windows and labelled mosaics.

What counts as right is the audibility table of the model's folder: a concept is audible in a
class or it is not. Every concept that is audible in some but not all of the judged places gets an
area under the ROC curve (AUC): the chance that a place where it is audible scores higher than one
where it is not.

How well a model finds the recording of an image, and the image of a recording, is judged by
`soundmap.products.retrieval`; its functions can be had from here, too.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from soundmap.api import predict
from soundmap.encoder import Encoder, ModelCard, find_model
from soundmap.encoder.bank_files import read_bank
from soundmap.errors import InputError
from soundmap.products.embed_samples import prompt_vectors
from soundmap.products.labelled import (
    Audibility,
    LabelledImages,
    load_audibility,
    load_eurosat,
    load_ucmerced,
)
from soundmap.products.retrieval import (
    Direction,
    Retrieval,
    match_ranks,
    nearest,
    recall,
    retrieval,
    top_tenth,
)
from soundmap.products.scores import area_and_precision
from soundmap.scoring import ConceptBank, score
from soundmap.sources.sample import scene_layout

__all__ = [
    "MOSAIC_TABLE",
    "ConceptScore",
    "Direction",
    "MosaicPatch",
    "Retrieval",
    "SetScore",
    "as_windows",
    "auc",
    "class_vectors",
    "concept_scores",
    "draw_cells",
    "evaluate_cells",
    "evaluate_model",
    "evaluate_mosaic",
    "evaluate_mosaics",
    "evaluate_sample",
    "evaluate_windows",
    "match_ranks",
    "nearest",
    "read_mosaic_patches",
    "recall",
    "retrieval",
    "top_tenth",
]

MOSAIC_TABLE = "eurosat_mosaic_patches.csv"
_LABEL_PX = 64
_CELLS_PER_IMAGE = 6


@dataclass(frozen=True)
class ConceptScore:
    """How well one concept is told on one set."""

    concept: str
    auc: float
    audible: int
    """Places where it is audible."""


@dataclass(frozen=True)
class SetScore:
    """Figures of a model on one labelled set."""

    name: str
    places: int
    concepts: tuple[ConceptScore, ...]
    """Concepts that have both kinds of places."""
    top1: float | None
    """Share of places whose nearest class caption is that of their own class."""

    @property
    def mean_auc(self) -> float:
        """Mean over concepts."""
        return float(np.mean([c.auc for c in self.concepts]))


def auc(scores: NDArray[np.floating], truth: NDArray[np.bool_]) -> float:
    """Area under the ROC curve; ties count half (Mann and Whitney 1947).

    Parameters
    ----------
    scores
        float[N].
    truth
        bool[N], both kinds present.
    """
    once = np.ones((1, len(scores)))
    return float(area_and_precision(np.asarray(scores, np.float64), truth, once)[0][0])


def concept_scores(
    values: NDArray[np.floating], audible: NDArray[np.bool_], names: Iterable[str]
) -> tuple[ConceptScore, ...]:
    """Judge every concept that has both kinds of places.

    Parameters
    ----------
    values, audible
        float and bool[places, C].
    names
        Names of the C concepts.
    """
    return tuple(
        ConceptScore(name, auc(values[:, c], audible[:, c]), int(audible[:, c].sum()))
        for c, name in enumerate(names)
        if 0 < audible[:, c].sum() < len(audible)
    )


def as_windows(data: LabelledImages, encoder: Encoder) -> tuple[NDArray[np.uint8], float]:
    """Bring labelled images to the model's window, as a map would read them.

    Returns
    -------
    tuple
        uint8[N, 3, window, window], and the metres per pixel that the model is told.
    """
    reading = encoder.spec.reading(data.gsd_m)
    factor = max(1, round(reading.gsd_m / data.gsd_m))
    side = encoder.spec.window_px
    n, bands, height, width = data.pixels.shape
    if height < side * factor or width < side * factor:
        raise InputError(
            f"{data.name}: images of {width} x {height} px do not fill a window of "
            f"{side * factor} px at {data.gsd_m:g} m"
        )
    y, x = (height - side * factor) // 2, (width - side * factor) // 2
    cut = data.pixels[:, :, y : y + side * factor, x : x + side * factor]
    if factor == 1:
        return np.ascontiguousarray(cut), reading.told_m
    blocks = cut.reshape(n, bands, side, factor, side, factor)
    mean = blocks.mean(axis=(3, 5), dtype=np.float32)
    return np.rint(mean).astype(np.uint8), reading.told_m


def class_vectors(encoder: Encoder, audibility: Audibility, dataset: str) -> NDArray[np.float32]:
    """Embed the captions of every class and average them: float32[classes, D], unit vectors."""
    return prompt_vectors(encoder, [e["captions"] for e in audibility.tables[dataset].values()])


def evaluate_windows(
    encoder: Encoder, bank: ConceptBank, audibility: Audibility, data: LabelledImages, split: str
) -> SetScore:
    """Judge a model on labelled images, each as one window."""
    pixels, told_m = as_windows(data, encoder)
    image = encoder.encode_images(pixels, gsd_m=told_m, details=("image",)).image
    assert image is not None
    audible = audibility.matrix(data.name)[data.labels]
    nearest = (image @ class_vectors(encoder, audibility, data.name).T).argmax(axis=1)
    values = score(image, bank, "probability")
    return SetScore(
        f"{data.name} {split}",
        len(image),
        concept_scores(values, audible, bank.names),
        float((nearest == data.labels).mean()),
    )


def draw_cells(patches: NDArray[np.float32], count: int, seed: int) -> NDArray[np.float32]:
    """Draw some patches of every image: float32[N, count, D] out of float32[N, P, P, D]."""
    flat = patches.reshape(len(patches), -1, patches.shape[-1])
    chosen = np.random.default_rng(seed).integers(0, flat.shape[1], (len(flat), count))
    return np.take_along_axis(flat, chosen[..., None], axis=1)


def evaluate_cells(
    encoder: Encoder, bank: ConceptBank, audibility: Audibility, data: LabelledImages, split: str
) -> SetScore:
    """Judge a model on single cells, which is what a map shows: a few patches of every image.

    A cell counts as showing what its image is labelled as, which is not so of every cell: a field
    beside a motorway is a cell of the motorway's image.

    Parameters
    ----------
    bank
        For cells: of detail "patch".
    """
    pixels, told_m = as_windows(data, encoder)
    patches = encoder.encode_images(pixels, gsd_m=told_m, details=("patch",)).patches
    assert patches is not None
    cells = draw_cells(patches, _CELLS_PER_IMAGE, seed=0)
    values = score(cells.reshape(-1, cells.shape[-1]), bank, "probability")
    audible = audibility.matrix(data.name)[np.repeat(data.labels, _CELLS_PER_IMAGE)]
    name = f"{data.name} {split}, single cells"
    return SetScore(name, len(values), concept_scores(values, audible, bank.names), None)


@dataclass(frozen=True)
class MosaicPatch:
    """A labelled square of a mosaic."""

    label: str
    col: int
    """Left pixel column of the square."""
    row: int
    """Top pixel row."""


def read_mosaic_patches(scenes: Path) -> dict[str, list[MosaicPatch]]:
    """Read which squares of which mosaic show which class.

    Raises
    ------
    InputError
        The table is not there.
    """
    table = scenes / MOSAIC_TABLE
    if not table.exists():
        raise InputError(f"{table} not found: --data must name the folder that holds scenes/")
    patches: dict[str, list[MosaicPatch]] = {}
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            patch = MosaicPatch(row["label"], int(row["col"]), int(row["row"]))
            patches.setdefault(row["scene"], []).append(patch)
    return patches


def evaluate_mosaic(
    values: NDArray[np.float32],
    cell_px: int,
    patches: list[MosaicPatch],
    audibility: Audibility,
    name: str,
) -> SetScore:
    """Judge a finished map of a mosaic: the mean of its cells within each labelled square.

    Parameters
    ----------
    values
        float32[C, H, W], NaN where there is no imagery; cell (0, 0) starts at pixel (0, 0).
    cell_px
        Imagery pixels along a cell.
    patches
        Labelled squares of 64 px.
    """
    classes = audibility.classes("eurosat")
    means, labels = [], []
    for patch in patches:
        # Whole cells alone: one at the rim also shows what lies beside the square.
        row0, col0 = -(-patch.row // cell_px), -(-patch.col // cell_px)
        row1, col1 = (patch.row + _LABEL_PX) // cell_px, (patch.col + _LABEL_PX) // cell_px
        cells = values[:, row0:row1, col0:col1]
        if np.isfinite(cells[0]).any():
            means.append(np.nanmean(cells, axis=(1, 2)))
            labels.append(classes.index(patch.label))
    audible = audibility.matrix("eurosat")[labels]
    return SetScore(
        name, len(means), concept_scores(np.stack(means), audible, audibility.concepts), None
    )


def evaluate_model(
    encoder: Encoder, card: ModelCard, data: Path, split: str = "test"
) -> tuple[SetScore, ...]:
    """Judge a model on a split of EuroSAT and UC Merced, each image as a window.

    Raises
    ------
    InputError
        The data are not in the folder.
    """
    bank = read_bank(card, "image")
    audibility = load_audibility(card.folder, bank.names)
    sets = (
        load_eurosat(data, split, audibility.classes("eurosat")),
        load_ucmerced(data, split, audibility.classes("ucmerced")),
    )
    return tuple(evaluate_windows(encoder, bank, audibility, s, split) for s in sets)


def evaluate_mosaics(model: str, data: Path) -> tuple[SetScore, ...]:
    """Map every labelled mosaic and judge the maps.

    Raises
    ------
    InputError
        The mosaics are not in the folder.
    """
    card = find_model(model)
    results = []
    for scene, patches in sorted(read_mosaic_patches(data / "scenes").items()):
        values = predict(data / "scenes" / scene, model=model)
        audibility = load_audibility(card.folder, tuple(str(n) for n in values.concept.values))
        name = scene.removesuffix(".tif")
        cell_px = card.spec.patch_px
        results.append(evaluate_mosaic(values.to_numpy(), cell_px, patches, audibility, name))
    return tuple(results)


def evaluate_sample(model: str) -> dict[str, tuple[int, float]]:
    """Map the sample scene and compare the strongest sound with what is audible in each area.

    Returns
    -------
    dict
        Area -> number of cells that lie wholly inside it, and the share of them whose strongest
        concept is listed for the area; last, under "all", over all areas.
    """
    card = find_model(model)
    values = predict("sample", model=model)
    audibility = load_audibility(card.folder, tuple(str(n) for n in values.concept.values))
    layout, names = scene_layout()
    px = card.spec.patch_px
    rows, cols = values.shape[1:]
    cells = layout[: rows * px, : cols * px].reshape(rows, px, cols, px)
    whole = (cells == cells[:, :1, :, :1]).all(axis=(1, 3))
    kind = cells[:, 0, :, 0]
    strongest = values.to_numpy().argmax(axis=0)
    result: dict[str, tuple[int, float]] = {}
    hits = total = 0
    for number, area in names.items():
        if area not in audibility.sample_areas:
            continue
        inside = strongest[whole & (kind == number)]
        right = int(audibility.area_matrix(area)[inside].sum())
        result[area] = (len(inside), right / max(1, len(inside)))
        hits, total = hits + right, total + len(inside)
    result["all"] = (total, hits / max(1, total))
    return result

"""Labelled imagery to train and judge on, and the table of what is audible where."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from soundmap.errors import InputError

UCM_SIDE_PX = 256
UCM_GSD_M = 0.3
EUROSAT_GSD_M = 10.0


@dataclass(frozen=True)
class LabelledImages:
    """Images of one size with a land-cover class each."""

    name: str
    """Data set: a key of the audibility table."""
    pixels: NDArray[np.uint8]
    """uint8[N, 3, H, W]."""
    labels: NDArray[np.int64]
    """int64[N], index into ``classes``."""
    classes: tuple[str, ...]
    gsd_m: float
    """Metres per pixel as stored."""


@dataclass(frozen=True)
class Audibility:
    """Which concepts one would expect to hear in which class, and the captions of the classes."""

    concepts: tuple[str, ...]
    tables: dict[str, dict[str, Any]]
    """Data set -> class -> {"captions": [...], "audible": {concept: reason}}."""
    sample_areas: dict[str, tuple[str, ...]]
    """Area of the sample scene -> EuroSAT classes that it shows."""
    clips: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Class of clips -> {"captions": [...], "concepts": [...]}: what it is a recording of."""

    def classes(self, dataset: str) -> tuple[str, ...]:
        """Name the classes of a data set, in table order."""
        return tuple(self.tables[dataset])

    def matrix(self, dataset: str) -> NDArray[np.bool_]:
        """Tell what is audible: bool[classes, concepts]."""
        rows = [
            [concept in entry["audible"] for concept in self.concepts]
            for entry in self.tables[dataset].values()
        ]
        return np.array(rows, dtype=bool)

    def clip_matrix(self) -> NDArray[np.bool_]:
        """Tell what clips are recordings of: bool[classes of clips, concepts]."""
        rows = [[c in clip["concepts"] for c in self.concepts] for clip in self.clips.values()]
        return np.array(rows, dtype=bool).reshape(len(self.clips), len(self.concepts))

    def audible_clips(self, dataset: str) -> dict[str, tuple[str, ...]]:
        """Tell which classes of clips are audible in which class: they share a concept."""
        shared = self.matrix(dataset).astype(int) @ self.clip_matrix().astype(int).T > 0
        names = tuple(self.clips)
        return {
            place: tuple(name for name, heard in zip(names, row, strict=True) if heard)
            for place, row in zip(self.classes(dataset), shared, strict=True)
        }

    def area_matrix(self, area: str) -> NDArray[np.bool_]:
        """Tell what is audible in an area of the sample scene: bool[concepts]."""
        classes = self.classes("eurosat")
        rows = [classes.index(name) for name in self.sample_areas[area]]
        return np.asarray(self.matrix("eurosat")[rows].any(axis=0))


def load_audibility(model_dir: Path, concepts: tuple[str, ...]) -> Audibility:
    """Read ``audibility.json`` of a model folder.

    Raises
    ------
    InputError
        The table names a concept that the bank does not have.
    """
    data = json.loads((model_dir / "audibility.json").read_text(encoding="utf-8"))
    for dataset, classes in data["classes"].items():
        for name, entry in classes.items():
            unknown = set(entry["audible"]) - set(concepts)
            if unknown:
                raise InputError(
                    f"audibility.json: {dataset} class {name} lists {sorted(unknown)}, which the "
                    "concept bank does not have: add them to concepts.json or correct the names"
                )
    clips = {name: clip for part in data.get("clips", {}).values() for name, clip in part.items()}
    for name, clip in clips.items():
        unknown = set(clip["concepts"]) - set(concepts)
        if unknown:
            raise InputError(
                f"audibility.json: clips of {name} list {sorted(unknown)}, which the concept bank "
                "does not have: add them to concepts.json or correct the names"
            )
    areas = {area: tuple(classes) for area, classes in data["sample_areas"].items()}
    return Audibility(concepts, data["classes"], areas, clips)


def _rows(index: Path) -> list[dict[str, str]]:
    if not index.exists():
        raise InputError(f"{index} not found: --data must name the folder that holds it")
    with index.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _decode(data: bytes, side_px: int) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        rgb = image.convert("RGB")
        if rgb.size != (side_px, side_px):
            rgb = rgb.resize((side_px, side_px), Image.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def load_eurosat(root: Path, split: str, classes: tuple[str, ...]) -> LabelledImages:
    """Load one split of EuroSAT (Helber et al. 2019; 64 px at 10 m) from its archives.

    Parameters
    ----------
    root
        Data folder that holds ``eurosat_rgb/``.
    split
        "train", "val", "test" or "map", by place.
    classes
        Class names in the order of the audibility table.

    Raises
    ------
    InputError
        The folder or its index is not there.
    """
    folder = root / "eurosat_rgb"
    wanted = {
        r["file"]: r["label"] for r in _rows(folder / "eurosat_index.csv") if r["split"] == split
    }
    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for name in classes:
        with tarfile.open(folder / f"{name}.tar.xz") as archive:
            for member in archive:
                if member.name not in wanted:
                    continue
                stream = archive.extractfile(member)
                if stream is not None:
                    pixels.append(_decode(stream.read(), 64))
                    labels.append(classes.index(wanted[member.name]))
    return LabelledImages("eurosat", np.stack(pixels), np.array(labels), classes, EUROSAT_GSD_M)


def load_ucmerced(root: Path, split: str, classes: tuple[str, ...]) -> LabelledImages:
    """Load one split of UC Merced (Yang and Newsam 2010; 256 px at 0.3 m).

    The published index has train and test alone; every eighth training image is set aside here
    as "val" and is not in "train".

    Raises
    ------
    InputError
        The folder or its index is not there.
    """
    folder = root / "ucmerced_jpg"
    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for row in _rows(folder / "ucmerced_index.csv"):
        held_out = int("".join(filter(str.isdigit, Path(row["file"]).stem))) % 8 == 7
        actual = "val" if row["split"] == "train" and held_out else row["split"]
        if actual == split:
            pixels.append(_decode((folder / row["file"]).read_bytes(), UCM_SIDE_PX))
            labels.append(classes.index(row["label"]))
    return LabelledImages("ucmerced", np.stack(pixels), np.array(labels), classes, UCM_GSD_M)

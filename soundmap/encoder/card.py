"""Model cards: what a model is, what it reads, where it came from, how good it is."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soundmap.errors import ModelError, UsageError

CARD_FILE = "model.json"
_TOLERANCE = 1.02


@dataclass(frozen=True)
class Reading:
    """At which ground sampling distance imagery is read, and which one the model is told."""

    gsd_m: float
    """Metres per pixel of the windows cut from the imagery."""
    told_m: float
    """Metres per pixel that the model is told: the nearest that it was trained on."""
    warning: str = ""
    """What the user should know; empty if nothing."""


@dataclass(frozen=True)
class InputSpec:
    """What an encoder reads."""

    window_px: int
    """Side of the square that the model sees at once."""
    patch_px: int
    """Side of one patch; the window holds ``window_px // patch_px`` along each side."""
    native_px: int
    """Side of the crop that is resized to ``window_px``; the same where nothing is resized."""
    gsd_m: tuple[tuple[float, float], ...]
    """Ranges of metres per pixel that the model was trained on, finest first."""
    context_px: int | None = None
    """Pixels around a patch that its embedding depends on; None: on all of its window."""
    fill_rgb: tuple[int, int, int] = (124, 116, 104)
    """Colour of what lies beyond the imagery; by default the mean that pixels are normalised by."""
    scales: tuple[int, ...] = (1,)
    """Crops of how many native tiles the model knows."""
    metadata: tuple[str, ...] = ()
    """Names of further inputs: month, hour, lonlat."""

    @property
    def patches(self) -> int:
        """Patches along one side of a window."""
        return self.window_px // self.patch_px

    def reading(self, native_gsd_m: float, requested_m: float | None = None) -> Reading:
        """Choose the ground sampling distance to read imagery at.

        Imagery within a trained range is read as it is. Finer imagery is averaged to the finest
        range that it can fill, by a whole factor if one lands inside, so that no pixel is
        interpolated. Coarser imagery is read as it is, the model is told the nearest it knows, and
        the user is warned.

        Parameters
        ----------
        native_gsd_m
            True metres per pixel of the imagery.
        requested_m
            What the user asks for instead.

        Raises
        ------
        UsageError
            The request is not positive, or finer than the imagery by more than a factor of two.
        """
        if requested_m is not None:
            if not (requested_m > 0 and math.isfinite(requested_m)):
                raise UsageError(f"--gsd {requested_m} is not a positive number of metres")
            if requested_m < native_gsd_m / 2:
                raise UsageError(
                    f"--gsd {requested_m:g} asks for finer pixels than the imagery has "
                    f"({native_gsd_m:.3g} m): leave it out, or give {native_gsd_m:.3g} or more"
                )
            return self._told(requested_m, native_gsd_m)
        for low, high in self.gsd_m:
            if native_gsd_m > high * _TOLERANCE:
                continue
            if native_gsd_m * _TOLERANCE >= low:
                return self._told(native_gsd_m, native_gsd_m)
            # Averaged by a whole factor, or at least so that a patch is whole pixels wide.
            for parts in (1, self.patch_px):
                gsd_m = native_gsd_m / parts * int(high * parts * _TOLERANCE / native_gsd_m)
                if gsd_m * _TOLERANCE >= low:
                    return self._told(gsd_m, native_gsd_m)
            return self._told(high, native_gsd_m)
        return self._told(native_gsd_m, native_gsd_m)

    def _told(self, gsd_m: float, native_gsd_m: float) -> Reading:
        near = [min(max(gsd_m, low), high) for low, high in self.gsd_m]
        told = min(near, key=lambda v: abs(v - gsd_m) / v)
        warning = ""
        if max(gsd_m / told, told / gsd_m) > _TOLERANCE:
            kind = "coarser" if gsd_m > told else "finer"
            warning = (
                f"windows of {gsd_m:.3g} m pixels (imagery: {native_gsd_m:.3g} m) are {kind} than "
                f"what the model was trained on ({self.describe_gsd()}): expect a rougher map"
            )
        return Reading(gsd_m, told, warning)

    def describe_gsd(self) -> str:
        """Say the trained ranges in words, e.g. "1-1.2 m and 7-10 m"."""
        return " and ".join(f"{low:g}-{high:g} m" for low, high in self.gsd_m)


@dataclass(frozen=True)
class ModelCard:
    """The card of a model folder, ``model.json``."""

    name: str
    folder: Path
    summary: str
    licence: str
    spec: InputSpec
    architecture: Mapping[str, Any]
    files: Mapping[str, str]
    """File name -> sha256 of the files that decide the embeddings."""
    data: Mapping[str, Any]
    """The whole card as read: training, data, figures."""

    @property
    def hash(self) -> str:
        """Digest of everything that decides the embeddings."""
        parts = [dict(self.files), self.data["architecture"], self.data["input"]]
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def read_card(folder: Path) -> ModelCard:
    """Read the card of a model folder.

    Raises
    ------
    ModelError
        The folder or its card is missing, or the card lacks something.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        raise ModelError(f"{folder} is not a model folder: it holds no {CARD_FILE}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        given = data["input"]
        spec = InputSpec(
            window_px=int(given["window_px"]),
            patch_px=int(given["patch_px"]),
            native_px=int(given["native_px"]),
            gsd_m=tuple((float(low), float(high)) for low, high in given["gsd_m"]),
            context_px=given.get("context_px"),
            fill_rgb=tuple(given.get("fill_rgb", (124, 116, 104))),
            scales=tuple(given.get("scales", (1,))),
            metadata=tuple(given.get("metadata", ())),
        )
        if not spec.gsd_m:
            raise ValueError("input.gsd_m holds no range")
        return ModelCard(
            name=data["name"],
            folder=folder,
            summary=data["summary"],
            licence=data["licence"],
            spec=spec,
            architecture=dict(data["architecture"]),
            files=dict(data["files"]),
            data=data,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is not a valid model card: {error!r}") from error


def verify_files(card: ModelCard) -> None:
    """Check that every file of a model is what its card says.

    Raises
    ------
    ModelError
        A file is missing or was changed.
    """
    for name, expected in card.files.items():
        path = card.folder / name
        if not path.is_file():
            raise ModelError(f"{path} is missing: the model folder is not complete")
        if file_sha256(path) != expected:
            raise ModelError(
                f"{path} does not match the checksum on the model's card: it is damaged or was "
                "changed; install the model again"
            )


def file_sha256(path: Path) -> str:
    """Digest a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def models_root() -> Path:
    """Find the folder of bundled models: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_models"
    return installed if installed.is_dir() else package.parent / "models"


def bundled_models() -> list[ModelCard]:
    """Read the cards of all bundled models, by name."""
    root = models_root()
    if not root.is_dir():
        return []
    folders = sorted(path.parent for path in root.glob(f"*/{CARD_FILE}"))
    return [read_card(folder) for folder in folders]


def find_model(name: str) -> ModelCard:
    """Find a model by bundled name or folder.

    Raises
    ------
    UsageError
        There is no such model.
    """
    path = Path(name)
    if (models_root() / name / CARD_FILE).is_file() and path.name == name:
        return read_card(models_root() / name)
    if path.is_dir():
        return read_card(path)
    known = ", ".join(card.name for card in bundled_models()) or "none"
    raise UsageError(
        f"no model named {name!r}: give a bundled name ({known}) or the folder of a model"
    )

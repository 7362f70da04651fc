"""Model cards: what a model is, what it reads, where it came from, how good it is."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_data_path

from soundmap.errors import ModelError, UsageError

CARD_FILE = "model.json"
MODELS_VARIABLE = "SOUNDMAP_MODELS"
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

    def reading(
        self, native_gsd_m: float, requested_m: float | None = None, scale: int = 1
    ) -> Reading:
        """Choose the ground sampling distance to read imagery at.

        Imagery within a trained range is read as it is. Finer imagery is averaged to the finest
        range that it can fill, by a whole factor if one lands inside, so that no pixel is
        interpolated. Coarser imagery is read as it is, the model is told the nearest it knows, and
        the user is warned.

        A model that was trained on crops resized to its window (``native_px`` is not
        ``window_px``) reads pixels that are larger than those it is told, by the same factor:
        so its window covers as much ground as the crop did.

        Parameters
        ----------
        native_gsd_m
            True metres per pixel of the imagery.
        requested_m
            What the user asks for instead.
        scale
            How many native tiles wide a window is.

        Raises
        ------
        UsageError
            The request is not positive, or finer than the imagery by more than a factor of two;
            or the scale is not one that the model was trained at.
        """
        if scale not in self.scales:
            known = ", ".join(str(s) for s in self.scales)
            raise UsageError(f"--scale {scale}: this model was trained at scale {known}")
        resize = self.native_px * scale / self.window_px
        if requested_m is not None:
            if not (requested_m > 0 and math.isfinite(requested_m)):
                raise UsageError(f"--gsd {requested_m} is not a positive number of metres")
            if requested_m < native_gsd_m / 2:
                raise UsageError(
                    f"--gsd {requested_m:g} asks for finer pixels than the imagery has "
                    f"({native_gsd_m:.3g} m): leave it out, or give {native_gsd_m:.3g} or more"
                )
            return self._told(requested_m, native_gsd_m, scale)
        for low, high in self.gsd_m:
            if self.resized or scale != 1:
                # A pixel of the imagery that is one of the native tile's stands for it exactly.
                near = high / _TOLERANCE <= native_gsd_m <= high * _TOLERANCE
                gsd_m = (native_gsd_m if near else high) * resize
                if native_gsd_m <= gsd_m:
                    return self._told(gsd_m, native_gsd_m, scale)
                continue
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
        return self._told(native_gsd_m, native_gsd_m, scale)

    @property
    def resized(self) -> bool:
        """Whether windows are crops of another size, resized."""
        return self.native_px != self.window_px

    def _told(self, gsd_m: float, native_gsd_m: float, scale: int = 1) -> Reading:
        # The model knows the size of a native tile's pixel, times the scale.
        resize = self.native_px / self.window_px
        tile_m = gsd_m / resize / scale
        near = [min(max(tile_m, low), high) for low, high in self.gsd_m]
        told = min(near, key=lambda v: abs(v - tile_m) / v)
        warning = ""
        if max(tile_m / told, told / tile_m) > _TOLERANCE:
            kind = "coarser" if tile_m > told else "finer"
            of_crop = f", resized to {told * scale * resize:.3g} m" if self.resized else ""
            warning = (
                f"windows of {gsd_m:.3g} m pixels (imagery: {native_gsd_m:.3g} m) are {kind} than "
                f"what the model was trained on ({self.describe_gsd()}{of_crop}): "
                "expect a rougher map"
            )
        return Reading(gsd_m, told * scale, warning)

    def describe_gsd(self) -> str:
        """Say the trained ranges in words, e.g. "1-1.2 m and 7-10 m"."""
        return " and ".join(
            f"{low:g} m" if low == high else f"{low:g}-{high:g} m" for low, high in self.gsd_m
        )


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
        # Only cards of models that leave texts to another model have this.
        if "text" in self.data:
            parts.append(self.data["text"])
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


def installed_root() -> Path:
    """Find the folder of models that the user has fetched; it need not exist.

    ``SOUNDMAP_MODELS`` if that is set, else a folder of the system's own for a user's data.
    """
    chosen = os.environ.get(MODELS_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    return user_data_path("soundmap", appauthor=False) / "models"


def bundled_models() -> list[ModelCard]:
    """Read the cards of all bundled models, by name."""
    return [read_card(folder) for folder in model_folders(models_root())]


def model_folders(root: Path) -> list[Path]:
    """Find the model folders in a folder, by name."""
    return sorted(path.parent for path in root.glob(f"*/{CARD_FILE}"))


def find_model(name: str) -> ModelCard:
    """Find a model by name, folder or checkpoint.

    Parameters
    ----------
    name
        The name of a bundled or installed model, the folder of one, or a published checkpoint
        (.ckpt), which is converted when it is first asked for and kept with the installed models.

    Raises
    ------
    UsageError
        There is no such model, or it is a published one that is not here.
    ModelError
        Its card is damaged, or the checkpoint cannot be used.
    """
    from soundmap.encoder.published import PUBLISHED

    path = Path(name)
    if path.name == name and name != "..":
        for root in (models_root(), installed_root()):
            if (root / name / CARD_FILE).is_file():
                return read_card(root / name)
    if path.is_dir():
        return read_card(path)
    if path.is_file():
        from soundmap.encoder.convert import converted

        return converted(path)
    if name in PUBLISHED:
        raise UsageError(
            f"{name} is a published model that is not on this machine: "
            f"`soundmap models pull {name}` fetches it"
        )
    roots = (models_root(), installed_root())
    known = [folder.name for root in roots for folder in model_folders(root)]
    close = difflib.get_close_matches(name, [*known, *PUBLISHED], 1)
    guess = f"did you mean {close[0]!r}? Or " if close else ""
    raise UsageError(
        f"no model named {name!r}: {guess}give a name ({', '.join(known) or 'none is here'}; "
        "`soundmap models list` tells which can be fetched), the folder of a model, or a .ckpt file"
    )

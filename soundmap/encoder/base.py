"""What every encoder promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from soundmap.encoder.card import InputSpec
from soundmap.errors import UsageError


@dataclass(frozen=True)
class Encoding:
    """Embeddings of a batch of windows; unit vectors."""

    image: NDArray[np.float32] | None
    """float32[B, D], one per window; None if not asked for."""
    patches: NDArray[np.float32] | None
    """float32[B, P, P, D], one per patch; None if not asked for."""


@dataclass(frozen=True)
class Conditions:
    """What a map is conditioned on, for models that were trained with it."""

    month: int | None = None
    """1 to 12; None: masked."""
    hour: int | None = None
    """0 to 23, local time; None: masked."""
    scale: int = 1
    """How many native tiles wide a window is."""

    def facts(self) -> dict[str, str]:
        """Name what is set."""
        held = {"month": self.month, "hour": self.hour}
        if self.scale != 1:
            held["scale"] = self.scale
        return {name: str(number) for name, number in held.items() if number is not None}


class Encoder(Protocol):
    """Turns windows of imagery and texts into unit vectors of one space."""

    @property
    def id(self) -> str:
        """Digest of everything that decides the embeddings."""
        ...

    @property
    def spec(self) -> InputSpec:
        """What the encoder reads."""
        ...

    @property
    def dim(self) -> int:
        """Length of an embedding, D."""
        ...

    @property
    def share_scale(self) -> float:
        """The model's own learned scale (inverse temperature) of similarities, for ``share``."""
        ...

    def encode_images(
        self,
        pixels: NDArray[np.uint8],
        lonlat: NDArray[np.float64] | None = None,
        month: int | None = None,
        hour: int | None = None,
        scale: int = 1,
        *,
        gsd_m: float | None = None,
        details: tuple[str, ...] = ("image", "patch"),
    ) -> Encoding:
        """Encode windows.

        Parameters
        ----------
        pixels
            uint8[B, 3, window, window], red, green, blue. Where the card gives ``context_px`` and
            patches alone are asked for, windows may have any whole number of patches a side.
        lonlat
            float64[B, 2], longitude and latitude of each window's centre, degrees.
        month
            1 to 12.
        hour
            0 to 23, local time.
        scale
            How many native tiles wide a window is.
        gsd_m
            Metres per pixel that the model is told; by default the coarsest that it knows, times
            the scale.
        details
            Which embeddings to compute: "image", "patch" or both.

        Of lonlat, month and hour a model takes those that its card lists; what is not given is
        masked, as it was for part of the training, and nothing is put in its place.

        Raises
        ------
        UsageError
            The windows have the wrong shape, or something is given that the model lacks.
        """
        ...

    def encode_text(self, texts: list[str]) -> NDArray[np.float32]:
        """Encode texts: float32[N, D], unit vectors."""
        ...

    def encode_audio(self, clips: Sequence[str | Path]) -> NDArray[np.float32]:
        """Encode sound files: float32[N, D], unit vectors.

        Raises
        ------
        UsageError
            The model has no tower for sound.
        """
        ...

    def encode_mel(self, mel: NDArray[np.float32]) -> NDArray[np.float32]:
        """Encode log-mel spectrograms of ten seconds: float32[B, D], unit vectors.

        Parameters
        ----------
        mel
            float32[B, 1, 1001, 64], decibels, as `soundmap.nn.mel.log_mel` makes them; B may be 0.

        Raises
        ------
        UsageError
            The model has no tower for sound, or the shape is another.
        """
        ...


def check_conditions(
    spec: InputSpec,
    name: str,
    windows: int,
    lonlat: NDArray[np.float64] | None,
    month: int | None,
    hour: int | None,
    scale: int,
) -> None:
    """Refuse metadata and scales that a model does not know, or that make no sense.

    Raises
    ------
    UsageError
        They do not fit; ``name`` says whose they are.
    """
    given = {"lonlat": lonlat is not None, "month": month is not None, "hour": hour is not None}
    for kind, is_given in given.items():
        if is_given and kind not in spec.metadata:
            known = " and ".join(spec.metadata) or "no metadata"
            raise UsageError(f"{name} was not trained with {kind} (it takes {known}): leave it out")
    if scale not in spec.scales:
        known = ", ".join(str(s) for s in spec.scales)
        raise UsageError(f"{name} was trained at scale {known}, not {scale}")
    if month is not None and month not in range(1, 13):
        raise UsageError(f"month {month} is not one of 1 to 12")
    if hour is not None and hour not in range(24):
        raise UsageError(f"hour {hour} is not one of 0 to 23")
    if lonlat is None:
        return
    places = np.asarray(lonlat)
    if places.shape != (windows, 2):
        raise UsageError(f"lonlat must be float64[{windows}, 2], not {list(places.shape)}")
    if not (np.abs(places) <= (360, 90)).all():
        raise UsageError("lonlat holds places that are not on the Earth: longitude, then latitude")

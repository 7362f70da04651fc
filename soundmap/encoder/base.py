"""What every encoder promises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from soundmap.encoder.card import InputSpec


@dataclass(frozen=True)
class Encoding:
    """Embeddings of a batch of windows; unit vectors."""

    image: NDArray[np.float32] | None
    """float32[B, D], one per window; None if not asked for."""
    patches: NDArray[np.float32] | None
    """float32[B, P, P, D], one per patch; None if not asked for."""


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
            uint8[B, 3, window, window], red, green, blue.
        lonlat, month, hour, scale
            Further inputs, for models whose card lists them.
        gsd_m
            Metres per pixel that the model is told; the coarsest that it knows if not given.
        details
            Which embeddings to compute: "image", "patch" or both.
        """
        ...

    def encode_text(self, texts: list[str]) -> NDArray[np.float32]:
        """Encode texts: float32[N, D], unit vectors."""
        ...

"""An encoder made of arithmetic, for tests: no weights, no torch, every number can be foretold."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from soundmap.encoder import Encoding, InputSpec
from soundmap.errors import UsageError

# How far colour turns a vector away from the grey one, per unit of full range.
_REACH = 1.5


class FakeEncoder:
    """Embeds a patch by its mean colour, a window by its own, and a text by its letters.

    Parameters
    ----------
    dim
        Length of an embedding, at least 4.
    window_px, patch_px, gsd_m
        What ``spec`` says.
    context
        Share of its surroundings' mean colour in what a patch is embedded by, 0 to 1. With 0 a
        patch speaks for itself.
    context_px
        The surroundings: so many pixels on each side, and what lies beyond the window is black
        there; windows of any size can then be read for patches. None: the whole window, so that
        windows that overlap disagree, as those of a network do.

    Examples
    --------
    >>> fake = FakeEncoder(dim=4)
    >>> fake.encode_images(np.full((1, 3, 64, 64), 255, np.uint8)).patches.shape
    (1, 8, 8, 4)
    >>> fake.windows
    1
    """

    def __init__(
        self,
        dim: int = 16,
        *,
        window_px: int = 64,
        patch_px: int = 8,
        gsd_m: tuple[tuple[float, float], ...] = ((7.0, 10.0),),
        context: float = 0.0,
        context_px: int | None = None,
    ) -> None:
        if dim < 4:
            raise ValueError(f"dim must be at least 4, not {dim}")
        self._dim = dim
        self._spec = InputSpec(window_px, patch_px, window_px, gsd_m, context_px)
        self._context = context
        self.windows = 0
        """How many windows were encoded."""
        self.told_m: list[float | None] = []
        """The GSD told with each batch."""

    @property
    def id(self) -> str:
        """Digest of everything that decides the embeddings."""
        return hashlib.sha256(f"{self._dim} {self._spec} {self._context}".encode()).hexdigest()

    @property
    def spec(self) -> InputSpec:
        """What the encoder reads."""
        return self._spec

    @property
    def dim(self) -> int:
        """Length of an embedding, D."""
        return self._dim

    @property
    def share_scale(self) -> float:
        """Scale of similarities for ``share``."""
        return 10.0

    def embed(self, colours: ArrayLike) -> NDArray[np.float32]:
        """Embed colours.

        Parameters
        ----------
        colours
            float[..., 3], red, green and blue from 0 to 255.

        Returns
        -------
        ndarray
            float32[..., D]: (1, 1.5 r, 1.5 g, 1.5 b, 0, ...) made a unit vector, with r, g and b
            from -0.5 to 0.5.
        """
        offsets = np.asarray(colours, np.float64) / 255 - 0.5
        vectors = np.zeros((*offsets.shape[:-1], self._dim))
        vectors[..., 0] = 1
        vectors[..., 1:4] = _REACH * offsets
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        return vectors.astype(np.float32)

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
        """Encode windows; see `soundmap.encoder.Encoder.encode_images`.

        Raises
        ------
        UsageError
            The windows have the wrong shape or type, or metadata are given.
        """
        self._check_windows(pixels, details)
        if lonlat is not None or month is not None or hour is not None or scale != 1:
            raise UsageError("the fake encoder knows neither place, month, hour nor other scales")
        self.windows += len(pixels)
        self.told_m.append(gsd_m)
        patch = self._spec.patch_px
        count, _, height, width = pixels.shape
        cells = pixels.reshape(count, 3, height // patch, patch, width // patch, patch)
        own = np.moveaxis(cells.mean(axis=(3, 5)), 1, -1)
        whole = own.mean(axis=(1, 2))
        mixed = (1 - self._context) * own + self._context * self._around(pixels, whole)
        return Encoding(
            image=self.embed(whole) if "image" in details else None,
            patches=self.embed(mixed) if "patch" in details else None,
        )

    def _check_windows(self, pixels: NDArray[np.uint8], details: tuple[str, ...]) -> None:
        side, patch = self._spec.window_px, self._spec.patch_px
        right = pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.dtype == np.uint8
        if right and self._spec.context_px is not None and details == ("patch",):
            right = not pixels.shape[2] % patch and not pixels.shape[3] % patch
        elif right:
            right = pixels.shape[2:] == (side, side)
        if not right:
            given_as = f"{pixels.dtype}{list(pixels.shape)}"
            raise UsageError(f"windows must be uint8[B, 3, {side}, {side}], not {given_as}")

    def _around(self, pixels: NDArray[np.uint8], whole: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean colours around the patches, float64[B, rows, cols, 3] or what broadcasts to it."""
        reach, patch = self._spec.context_px, self._spec.patch_px
        if reach is None:
            return whole[:, None, None]
        # Sums over squares are differences of sums from the corner.
        sums = np.pad(pixels.astype(np.int64), ((0, 0), (0, 0), (reach, reach), (reach, reach)))
        sums = np.pad(sums.cumsum(2).cumsum(3), ((0, 0), (0, 0), (1, 0), (1, 0)))
        side = patch + 2 * reach
        low, high = sums[:, :, :-side, :], sums[:, :, side:, :]
        squares = high[..., side:] - high[..., :-side] - low[..., side:] + low[..., :-side]
        return np.moveaxis(squares[:, :, ::patch, ::patch] / side**2, 1, -1)

    def encode_audio(self, clips: Sequence[str | Path]) -> NDArray[np.float32]:
        """Refuse: it hears nothing.

        Raises
        ------
        UsageError
            Always.
        """
        raise UsageError("the fake encoder has no tower for sound")

    def encode_mel(self, mel: NDArray[np.float32]) -> NDArray[np.float32]:
        """Refuse, as `encode_audio` does.

        Raises
        ------
        UsageError
            Always.
        """
        raise UsageError("the fake encoder has no tower for sound")

    def encode_text(self, texts: list[str]) -> NDArray[np.float32]:
        """Encode texts: float32[N, D], unit vectors; case and spaces do not count.

        Raises
        ------
        UsageError
            A text is empty.
        """
        vectors = np.empty((len(texts), self._dim))
        for row, text in zip(vectors, texts, strict=True):
            words = " ".join(text.casefold().split())
            if not words:
                raise UsageError(f"the text {text!r} has no word: give a phrase")
            noise = hashlib.shake_256(words.encode()).digest(4 * self._dim)
            row[:] = np.frombuffer(noise, "<u4") / 2**31 - 1
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        return vectors.astype(np.float32)

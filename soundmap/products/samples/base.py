"""What a sample is, and what a set of samples promises."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from soundmap.errors import InputError, UsageError
from soundmap.products.samples.report import BadRows

FIELDS = ("image", "audio", "audio_caption", "image_caption")
"""The four modalities: what a reader can be asked for. Place, date, sources and label are always
read, being small."""


@dataclass(frozen=True)
class Sample:
    """One place, seen, heard and described; any of it may be missing."""

    key: str
    """What the set calls it; names the row in reports."""
    image: NDArray[np.uint8] | None = None
    """uint8[3, H, W] at the set's own pixels, any size; None: missing, or not asked for."""
    mel: NDArray[np.float32] | None = None
    """float32[S, 1, 1001, 64], log-mel of S segments in dB, as published; None: there is none."""
    wave: NDArray[np.float32] | None = None
    """float32[n], mono at 32 kHz; None: missing, not asked for, or there is ``mel``."""
    audio_caption: str = ""
    """"": missing, or not asked for."""
    image_captions: Mapping[int, str] = field(default_factory=dict)
    """Zoom level (1, 3, 5) -> caption of the image at that zoom; a missing one has no entry."""
    lat: float | None = None
    """Degrees north; None with ``lon``: unknown."""
    lon: float | None = None
    """Degrees east, -180 to 180."""
    month: int | None = None
    """1 to 12; None: unknown."""
    hour: int | None = None
    """0 to 23, local time; None: unknown."""
    audio_source: str | None = None
    """Archive of the recording: yfcc, iNat, aporee or freesound in the published sets."""
    caption_source: str | None = None
    """Who wrote the audio caption: meta, qwen or pengi in the published sets."""
    label: str | None = None
    """Class, in a labelled set."""

    def has(self, name: str) -> bool:
        """Tell whether one of `FIELDS` is there."""
        if name == "image":
            return self.image is not None
        if name == "audio":
            return self.mel is not None or self.wave is not None
        if name == "audio_caption":
            return bool(self.audio_caption)
        if name == "image_caption":
            return bool(self.image_captions)
        raise UsageError(f"{name!r} is none of {', '.join(FIELDS)}")


class BadSample(InputError):
    """A row that cannot be used: it is left out and reported, never filled with zeros.

    Parameters
    ----------
    key
        The row.
    reason
        What is wrong, in words that many rows share: reports count by it.
    detail
        What is wrong with this row in particular.
    """

    def __init__(self, key: str, reason: str, detail: str = "") -> None:
        super().__init__(f"{key}: {reason}" + (f" ({detail})" if detail else ""))
        self.key = key
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str, str]]:
        """Pickle by the arguments, so that the error comes back whole from a worker."""
        return type(self), (self.key, self.reason, self.detail)


@runtime_checkable
class Samples(Protocol):
    """Samples by number. Constructing decodes nothing; access is random, repeatable and safe from
    many threads at once; the object pickles.
    """

    @property
    def name(self) -> str:
        """Name of the set and split, for people."""
        ...

    @property
    def gsd_m(self) -> float:
        """Metres per pixel of the images; NaN if there are none."""
        ...

    @property
    def native_px(self) -> int:
        """Side of the crop at zoom 1, pixels; 0 if there are no images."""
        ...

    @property
    def fields(self) -> frozenset[str]:
        """Those of `FIELDS` that were asked for and that the set has columns or files for."""
        ...

    def __len__(self) -> int:
        """Count rows, bad ones included."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """Read one row.

        Raises
        ------
        BadSample
            The row cannot be used.
        IndexError
            There is no such row.
        """
        ...


@runtime_checkable
class StreamedSamples(Protocol):
    """Samples in one fixed order, read as they come. Each ``iter`` starts anew."""

    @property
    def name(self) -> str:
        """Name of the set and split, for people."""
        ...

    @property
    def gsd_m(self) -> float:
        """Metres per pixel of the images; NaN if there are none."""
        ...

    @property
    def native_px(self) -> int:
        """Side of the crop at zoom 1, pixels; 0 if there are no images."""
        ...

    @property
    def fields(self) -> frozenset[str]:
        """Those of `FIELDS` that were asked for and that the set has columns for."""
        ...

    @property
    def bad(self) -> BadRows:
        """Rows that were left out so far."""
        ...

    def __iter__(self) -> Iterator[Sample]:
        """Read the rows in order; bad ones are left out and recorded in ``bad``."""
        ...

    def shard(self, count: int, index: int) -> StreamedSamples:
        """Take a part: the ``index``-th of ``count`` that together hold every row once."""
        ...


def check_fields(fields: Collection[str], what: str = "fields") -> frozenset[str]:
    """Take names of modalities, or refuse them.

    Raises
    ------
    UsageError
        One is none of `FIELDS`.
    """
    if isinstance(fields, str):
        fields = (fields,)
    for name in fields:
        if name not in FIELDS:
            raise UsageError(f"{what}: {name!r} is none of {', '.join(FIELDS)}")
    return frozenset(fields)


_LACKING = {
    "image": "no image",
    "audio": "no audio",
    "audio_caption": "no audio caption",
    "image_caption": "no image caption",
}


def lacking(sample: Sample, fields: Collection[str]) -> str | None:
    """Say which of some modalities a sample has not, as a reason; None: it has them all."""
    return next(
        (_LACKING[name] for name in FIELDS if name in fields and not sample.has(name)), None
    )

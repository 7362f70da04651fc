"""One row of any table to a sample."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from soundmap.products.samples.base import FIELDS, BadSample, Sample, lacking
from soundmap.products.samples.config import SamplesConfig
from soundmap.products.samples.dates import month_and_hour
from soundmap.products.samples.decoding import Undecodable, decode_audio, decode_image, decode_mel

_PLAIN_NAMES = {
    "key": ("key", "id", "sample_id"),
    "image": ("image", "image_path"),
    "audio": ("audio", "audio_path", "sound"),
    "mel": ("mel", "mel_features"),
    "caption": ("caption", "audio_caption"),
    "image_caption": ("image_caption",),
    "lat": ("lat", "latitude"),
    "lon": ("lon", "longitude", "lng", "long"),
    "date": ("date", "date_recorded", "datetime"),
    "month": ("month",),
    "hour": ("hour",),
    "source": ("source", "audio_source"),
    "caption_source": ("caption_source", "audio_caption_source"),
    "label": ("label", "class"),
    "split": ("split",),
}
"""What columns of a table of one's own are called if nobody says otherwise; case is ignored."""


@dataclass(frozen=True)
class Columns:
    """Which column holds what; None: there is none."""

    key: str | None = None
    image: str | None = None
    audio: str | None = None
    mel: str | None = None
    caption: str | None = None
    image_captions: Mapping[int, str] = field(default_factory=dict)
    """Zoom level -> column."""
    lat: str | None = None
    lon: str | None = None
    date: str | None = None
    month: str | None = None
    hour: str | None = None
    source: str | None = None
    caption_source: str | None = None
    label: str | None = None
    split: str | None = None
    always_source: str | None = None
    """Archive that all recordings are from."""
    timeless: tuple[str, ...] = ()
    """Sources whose clock tells when a sound was handed in, not when it was heard."""

    def present(self, names: Collection[str]) -> Columns:
        """Keep the columns that a table really has."""
        plain = {
            key: None
            for key, value in vars(self).items()
            if isinstance(value, str) and key != "always_source" and value not in names
        }
        captions = {z: name for z, name in self.image_captions.items() if name in names}
        return replace(self, image_captions=captions, **plain)  # type: ignore[arg-type]

    def fields(self) -> frozenset[str]:
        """Tell which modalities there are columns for."""
        there = {
            "image": self.image,
            "audio": self.mel or self.audio,
            "audio_caption": self.caption,
            "image_caption": self.image_captions,
        }
        return frozenset(name for name in FIELDS if there[name])

    def only(self, fields: Collection[str]) -> Columns:
        """Drop the columns of modalities that are not asked for; stored spectrograms win."""
        return replace(
            self,
            image=self.image if "image" in fields else None,
            mel=self.mel if "audio" in fields else None,
            audio=self.audio if "audio" in fields and not self.mel else None,
            caption=self.caption if "audio_caption" in fields else None,
            image_captions=self.image_captions if "image_caption" in fields else {},
        )

    def names(self) -> list[str]:
        """List the columns to read, once each."""
        plain = (v for k, v in vars(self).items() if isinstance(v, str) and k != "always_source")
        return list(dict.fromkeys([*plain, *self.image_captions.values()]))


def published(schema: str, imagery: str) -> Columns:
    """Name the columns of a published set (SPEC section 14)."""
    common = Columns(
        key="sample_id",
        image=f"{imagery}_image",
        audio="audio",
        mel="mel_features",
        caption="audio_caption",
        image_captions={
            zoom: f"llava_caption_{imagery}_zl{zoom}"
            for zoom in ((1,) if schema == "soundingearth" else (1, 3, 5))
        },
        lat="latitude",
        lon="longitude",
        caption_source="audio_caption_source",
    )
    if schema == "soundingearth":
        return replace(common, date="date_recorded", always_source="aporee")
    return replace(common, date="date", source="source", timeless=("freesound",))


def own(mapping: Mapping[str, Any]) -> Columns:
    """Take the columns that a configuration names."""
    plain = {
        "image_captions" if key == "image_caption" else key: value for key, value in mapping.items()
    }
    captions = plain.get("image_captions")
    if isinstance(captions, str):
        plain["image_captions"] = {1: captions}
    return Columns(**plain)


def guessed(names: Iterable[str]) -> Columns:
    """Tell the columns of a table of one's own by their usual names."""
    by_lower = {name.strip().lower(): name for name in reversed(list(names))}
    found: dict[str, Any] = {}
    for key, candidates in _PLAIN_NAMES.items():
        name = next((by_lower[c] for c in candidates if c in by_lower), None)
        if name is not None:
            found[key] = name
    return own(found)


@dataclass(frozen=True)
class RowReader:
    """Makes samples of rows; the same for every form of table."""

    columns: Columns
    """Those to read, of fields that were asked for."""
    required: frozenset[str]
    base: Path
    """Folder that paths in rows start at."""
    longest_s: float

    @classmethod
    def of(cls, columns: Columns, config: SamplesConfig, base: Path) -> RowReader:
        """Read rows as a configuration says."""
        return cls(columns, frozenset(config.required), base, config.longest_s)

    def sample(self, row: Mapping[str, Any], key: str) -> Sample:
        """Make a sample of a row.

        Parameters
        ----------
        row
            Column -> value: Python's own, or an array of numbers; None or "" is missing.
        key
            Name of the row where it does not name itself.

        Raises
        ------
        BadSample
            The row cannot be used.
        """
        c = self.columns
        key = _text(row, c.key) or key
        try:
            lat, lon = _place(row, c)
            source = c.always_source or _text(row, c.source) or None
            month, hour = _when(row, c)
            sample = Sample(
                key=key,
                # The cheap ones first: a row that is bad anyway is not decoded.
                audio_caption=_text(row, c.caption),
                image_captions={
                    zoom: text
                    for zoom, name in c.image_captions.items()
                    if (text := _text(row, name))
                },
                lat=lat,
                lon=lon,
                month=month,
                hour=None if source in c.timeless else hour,
                audio_source=source,
                caption_source=_text(row, c.caption_source) or None,
                label=_text(row, c.label) or None,
            )
            fault = lacking(sample, self.required & {"audio_caption", "image_caption"})
            if fault:
                raise Undecodable(fault)
            mel = decode_mel(_value(row, c.mel), self.base)
            wave = None
            if mel is None:
                wave = decode_audio(_value(row, c.audio), self.base, self.longest_s)
            image = decode_image(_value(row, c.image), self.base)
            sample = replace(sample, mel=mel, wave=wave, image=image)
            fault = lacking(sample, self.required)
            if fault:
                raise Undecodable(fault)
            if c.fields() and not any(sample.has(name) for name in FIELDS):
                raise Undecodable("nothing there")
        except Undecodable as error:
            raise BadSample(key, error.reason, error.detail) from error
        return sample


def _value(row: Mapping[str, Any], name: str | None) -> Any:
    return None if name is None else row.get(name)


def _text(row: Mapping[str, Any], name: str | None) -> str:
    value = _value(row, name)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).strip()


def _number(value: Any) -> float | None:
    """Read a number; None: missing, NaN: there is something else."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _place(row: Mapping[str, Any], c: Columns) -> tuple[float | None, float | None]:
    lat, lon = _number(_value(row, c.lat)), _number(_value(row, c.lon))
    if lat is None and lon is None:
        return None, None
    # So written, NaN and a missing half fail as well.
    if lat is None or lon is None or not (abs(lat) <= 90 and abs(lon) <= 180):
        raise Undecodable(
            "place off the Earth",
            f"latitude {_value(row, c.lat)}, longitude {_value(row, c.lon)}",
        )
    return lat, lon


def _when(row: Mapping[str, Any], c: Columns) -> tuple[int | None, int | None]:
    """Read month and hour; columns of their own win over the date."""
    month, hour = month_and_hour(_value(row, c.date))
    if c.month is not None:
        month = _whole(_value(row, c.month), 1, 12)
    if c.hour is not None:
        hour = _whole(_value(row, c.hour), 0, 23)
    return month, hour


def _whole(value: Any, lowest: int, highest: int) -> int | None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real | str):
        return None
    number = _number(value)
    if number is None or not lowest <= number <= highest or number != int(number):
        return None
    return int(number)

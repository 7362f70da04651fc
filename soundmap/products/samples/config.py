"""What a set of samples is read from, as a TOML file tells it."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from soundmap.errors import InputError
from soundmap.products.samples.base import FIELDS

KINDS = ("parquet", "table", "folder")
SCHEMAS = ("geosound", "soundingearth")
IMAGERY = MappingProxyType(
    {"bingmap": (300, 0.6), "sentinel": (256, 10.0), "googleearth": (256, 0.2)}
)
"""Imagery of the published sets -> side of the crop at zoom 1 in pixels, metres per pixel."""

COLUMNS = (
    "key",
    "image",
    "audio",
    "mel",
    "caption",
    "image_caption",
    "lat",
    "lon",
    "date",
    "month",
    "hour",
    "source",
    "caption_source",
    "label",
    "split",
)
"""What the columns of a table can be said to hold."""

_NAMES_OF_VALIDATION = ("validation", "val", "valid", "dev")


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises
    ------
    InputError
        It cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path} cannot be read ({reason}): give a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from error


def split_name(name: str) -> str:
    """Name a split in one way: "val", "valid" and "dev" are "validation"."""
    plain = name.strip().lower()
    return "validation" if plain in _NAMES_OF_VALIDATION else plain


@dataclass(frozen=True)
class SamplesConfig:
    """Where samples are and what they look like. Read one with `read` or `from_table`."""

    kind: str
    """"parquet": read through Hugging Face ``datasets``; "table": CSV, TSV or Parquet that names
    files; "folder": files paired by name."""
    path: tuple[str, ...]
    """Files, folders or patterns, from ``base`` on; for "parquet" also the name of a data set at
    the hub, or addresses of files."""
    schema: str | None = None
    """Published columns: "geosound" or "soundingearth"; None: told by what columns there are."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """One of `COLUMNS` -> name of the column that holds it; "image_caption" may hold a table of
    zoom levels."""
    imagery: str | None = None
    """Which of the published images: a key of `IMAGERY`."""
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Split that is asked for -> its names in the set, or its files."""
    streaming: bool = False
    """Read rows as they come, without a copy on this disk ("parquet" alone)."""
    native_px: int | None = None
    """Side of the crop at zoom 1, pixels; None: that of the imagery."""
    gsd_m: float | None = None
    """Metres per pixel; None: that of the imagery."""
    required: tuple[str, ...] = ()
    """Modalities without which a row is bad; see `FIELDS`."""
    audio: str = "mel"
    """"mel": stored spectrograms where there are any; "wave": always the sound itself."""
    longest_s: float = 600.0
    """Seconds of a recording that are read, from its beginning."""
    cache: str | None = None
    """Folder for the copy that ``datasets`` makes when not streaming; None: its own."""
    revision: str | None = None
    """Of a data set at the hub: branch, tag or commit."""
    name: str = ""
    """For people; by default made of the path."""
    base: Path = Path()
    """Where relative paths start."""
    where: str = "samples"
    """Names the configuration in errors."""

    @classmethod
    def read(cls, path: str | Path, table: str | None = None) -> SamplesConfig:
        """Read a TOML file. Relative paths start at its folder.

        Parameters
        ----------
        path
            The file.
        table
            Table of the file that describes the set, such as "train"; None: the file itself.

        Raises
        ------
        InputError
            The file cannot be read, or a key is unknown, missing or of no use. The message names
            file and key.
        """
        path = Path(path)
        data = read_toml(path)
        if table is None:
            return cls.from_table(data, str(path), path.parent)
        if not isinstance(data.get(table), dict):
            raise InputError(f"{path} has no table [{table}]: add one with kind and path")
        return cls.from_table(data[table], f"{path}, [{table}]", path.parent)

    @classmethod
    def from_table(
        cls, table: Mapping[str, Any], where: str = "samples", base: str | Path = "."
    ) -> SamplesConfig:
        """Make a configuration of a parsed table.

        Parameters
        ----------
        table
            Keys are the fields of this class, ``base`` and ``where`` apart.
        where
            Names the table in errors.
        base
            Folder that relative paths start at.

        Raises
        ------
        InputError
            A key is unknown, missing or of no use.
        """
        return _Reader(where, Path(base)).config(table)

    @property
    def title(self) -> str:
        """Name of the set, for people."""
        return self.name or ", ".join(self.path)

    def names_of(self, split: str) -> tuple[str, ...]:
        """Tell what a split is called in the set: names or files."""
        for name, values in self.splits.items():
            if split_name(name) == split_name(split):
                return values
        return (split_name(split),)

    def says(self, split: str) -> bool:
        """Tell whether the configuration itself says what a split is called."""
        return any(split_name(name) == split_name(split) for name in self.splits)

    def pixels(self, imagery: str | None = None) -> tuple[int, float]:
        """Side of the crop at zoom 1 in pixels, and metres per pixel.

        Parameters
        ----------
        imagery
            Which of `IMAGERY` it is, where the configuration does not say.

        Raises
        ------
        InputError
            Nobody tells.
        """
        native_px, gsd_m = IMAGERY.get(self.imagery or imagery or "", (None, None))
        native_px, gsd_m = self.native_px or native_px, self.gsd_m or gsd_m
        missing = f"{self.where}, %s: is missing, and images are read: say how many %s"
        if native_px is None:
            raise InputError(missing % ("native_px", "pixels wide a crop is at zoom 1"))
        if gsd_m is None:
            raise InputError(missing % ("gsd_m", "metres wide a pixel is"))
        return native_px, gsd_m


@dataclass(frozen=True)
class _Reader:
    """Turns a parsed table into a configuration, or says what is wrong with it."""

    where: str
    base: Path

    def bad(self, key: str, text: str) -> InputError:
        return InputError(f"{self.where}, {key}: {text}")

    def config(self, table: Mapping[str, Any]) -> SamplesConfig:
        known = [f.name for f in fields(SamplesConfig) if f.name not in ("base", "where")]
        for key in table:
            if key not in known:
                close = difflib.get_close_matches(key, known, 1)
                advice = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
                raise InputError(f"{self.where}: unknown key {key!r}: {advice}")
        for key in ("kind", "path"):
            if key not in table:
                raise self.bad(key, "is missing")
        values: dict[str, Any] = {"base": self.base, "where": self.where}
        for key, value in table.items():
            values[key] = self.value(key, value)
        self.together(values)
        return SamplesConfig(**values)

    def value(self, key: str, value: Any) -> Any:
        choices = {
            "kind": KINDS,
            "schema": SCHEMAS,
            "imagery": tuple(IMAGERY),
            "audio": ("mel", "wave"),
        }
        if key in choices:
            if value not in choices[key]:
                raise self.bad(key, f"must be one of {', '.join(choices[key])}, not {value!r}")
            return value
        if key in ("path", "required"):
            return self.texts(key, value)
        if key == "columns":
            return self.columns(value)
        if key == "splits":
            if not isinstance(value, Mapping):
                raise self.bad(key, f"must be a table, not {value!r}")
            return {name: self.texts(f"splits, {name}", one) for name, one in value.items()}
        if key == "streaming":
            if not isinstance(value, bool):
                raise self.bad(key, f"must be true or false, not {value!r}")
            return value
        if key == "native_px":
            if type(value) is not int or value < 1:
                raise self.bad(key, f"must be a whole number from 1, not {value!r}")
            return value
        if key in ("gsd_m", "longest_s"):
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise self.bad(key, f"must be a number above 0, not {value!r}")
            if not math.isfinite(value):
                raise self.bad(key, f"must be a number above 0, not {value!r}")
            return float(value)
        if not isinstance(value, str):
            raise self.bad(key, f"must be a text, not {value!r}")
        return value

    def texts(self, key: str, value: Any) -> tuple[str, ...]:
        """Read a text, or a list of them."""
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
            raise self.bad(key, f"must be a text or a list of texts, not {value!r}")
        if key != "required" and not all(texts):
            raise self.bad(key, "holds an empty text")
        if key != "required" and not texts:
            raise self.bad(key, "is an empty list")
        for text in texts if key == "required" else ():
            if text not in FIELDS:
                raise self.bad(key, f"{text!r} is none of {', '.join(FIELDS)}")
        return tuple(texts)

    def columns(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise self.bad("columns", f"must be a table, not {value!r}")
        columns: dict[str, Any] = {}
        for name, column in value.items():
            if name not in COLUMNS:
                close = difflib.get_close_matches(name, COLUMNS, 1)
                advice = (
                    f"did you mean {close[0]!r}?" if close else f"known are {', '.join(COLUMNS)}"
                )
                raise self.bad("columns", f"unknown key {name!r}: {advice}")
            if name == "image_caption" and isinstance(column, Mapping):
                columns[name] = {self.zoom(z): self.column(name, c) for z, c in column.items()}
            else:
                columns[name] = self.column(name, column)
        return columns

    def zoom(self, value: Any) -> int:
        if not str(value).isdecimal() or not int(value):
            raise self.bad("columns, image_caption", f"{value!r} is no zoom level such as 1, 3, 5")
        return int(value)

    def column(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise self.bad(f"columns, {name}", f"must be the name of a column, not {value!r}")
        return value

    def together(self, values: Mapping[str, Any]) -> None:
        """Refuse keys that do not go with each other."""
        kind = values["kind"]
        if kind == "folder" and len(values["path"]) != 1:
            raise self.bad("path", "names several folders: give one")
        only = {"streaming": "parquet", "schema": "parquet", "cache": "parquet"}
        for key, needed in (*only.items(), ("revision", "parquet")):
            if values.get(key) and kind != needed:
                raise self.bad(key, f'goes with kind = "{needed}" alone, and this is "{kind}"')
        if values.get("columns") and kind == "folder":
            raise self.bad("columns", 'does not go with kind = "folder", which has no table')
        if values.get("columns") and values.get("schema"):
            raise self.bad("columns", "does not go with schema, which names them already")

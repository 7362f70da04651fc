"""Samples of a plain folder: files that go together by name, classes by folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from soundmap.errors import InputError
from soundmap.products.samples.base import Sample
from soundmap.products.samples.config import SamplesConfig, split_name
from soundmap.products.samples.files import no_split
from soundmap.products.samples.rows import Columns, RowReader, guessed
from soundmap.products.samples.table import check_has, read_table

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".jp2")
SOUNDS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".m4a", ".aac")
"""Suffixes. Whether a file can be read shows when it is; those that cannot are reported."""
_TEXT = ".txt"
_CAPTIONS = ("captions.csv", "captions.tsv")
# Folders that say what kind of file is in them, and nothing of its place or class.
_KIND_FOLDERS = frozenset({"image", "images", "audio", "sound", "sounds", "caption", "captions"})
_IMAGE_FOLDERS = frozenset({"image", "images"})
_SPLITS = frozenset({"train", "training", "validation", "val", "valid", "dev", "test"})
_KEYS = ("key", "file", "stem", "name", "filename", "image", "audio")
"""Columns of captions.csv that name the sample, the first there is."""


@dataclass(frozen=True)
class FolderSamples:
    """See `soundmap.products.samples.base.Samples`."""

    name: str
    gsd_m: float
    native_px: int
    fields: frozenset[str]
    reader: RowReader
    keys: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Any]]

    def __len__(self) -> int:
        """Count rows, bad ones included."""
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        """Read one row; BadSample if it cannot be used."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples: there is no sample {index}")
        key = self.keys[index]
        row = dict(self.rows[key])
        for name in ("caption", "image_caption"):
            if name == "caption" and not self.reader.columns.caption:
                continue
            if name == "image_caption" and not self.reader.columns.image_captions:
                continue
            file = row.get(f"{name}.txt")
            if file is not None and not row.get(name):
                row[name] = file.read_text(encoding="utf-8", errors="replace")
        return self.reader.sample(row, key)


def open_folder(config: SamplesConfig, split: str, wanted: frozenset[str]) -> FolderSamples:
    """Open a folder, or the folder of a split in it.

    Raises
    ------
    InputError
        The folder is missing or holds no samples, has other splits alone, or two of its files
        claim the same place.
    """
    root = config.base / Path(config.path[0]).expanduser()
    if not root.is_dir():
        raise InputError(f"{config.where}, path: {root} is no folder")
    rows: dict[str, dict[str, Any]] = {}
    for start in _starts(config, root, split):
        _collect(start, rows)
        _add_table(config, start, rows)
    if not rows:
        raise InputError(f"{config.where}, path: {root} holds neither images nor sound files")
    held = {name for row in rows.values() for name, value in row.items() if value}
    captioned = "caption" in held or "caption.txt" in held
    described = "image_caption" in held or "image_caption.txt" in held
    columns = Columns(
        image="image" if "image" in held else None,
        audio="audio" if "audio" in held else None,
        caption="caption" if captioned else None,
        image_captions={1: "image_caption"} if described else {},
    )
    light: dict[str, Any] = {name: name for name in _LIGHT if name in held}
    columns = replace(columns, **light)
    check_has(config, columns.fields())
    fields = columns.fields() & wanted
    native_px, gsd_m = config.pixels() if "image" in fields else (0, float("nan"))
    return FolderSamples(
        f"{config.title} {split_name(split)}",
        gsd_m,
        native_px,
        fields,
        RowReader.of(columns.only(wanted), config, root),
        tuple(sorted(rows)),
        rows,
    )


_LIGHT = ("lat", "lon", "date", "month", "hour", "source", "caption_source", "label")


def _starts(config: SamplesConfig, root: Path, split: str) -> list[Path]:
    """Find the folders of a split: those of its name, or the folder itself if none is a split."""
    if config.says(split):
        starts = [root / name for name in config.names_of(split)]
        for start in starts:
            if not start.is_dir():
                raise InputError(f"{config.where}, splits, {split}: {start} is no folder")
        return starts
    splits = {
        inner: split_name(inner.name)
        for inner in sorted(root.iterdir())
        if inner.is_dir() and inner.name.lower() in _SPLITS
    }
    if not splits:
        return [root]
    starts = [inner for inner, name in splits.items() if name == split_name(split)]
    if not starts:
        raise no_split(config, split, splits.values())
    return starts


def _collect(root: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Gather the files below a folder by what they are called."""
    texts = []
    for file in sorted(root.rglob("*")):
        suffix = file.suffix.lower()
        kind = "image" if suffix in IMAGES else "audio" if suffix in SOUNDS else None
        if any(part.startswith(".") for part in file.relative_to(root).parts):
            continue
        if suffix == _TEXT and file.is_file():
            texts.append(file)
        if kind is None or not file.is_file():
            continue
        key = _key(file.relative_to(root))
        row = rows.setdefault(key, {})
        if kind in row:
            raise InputError(
                f"{row[kind]} and {file} are both the {kind} of {key!r}: rename or remove one"
            )
        row[kind] = file
        parents = PurePath(key).parts[:-1]
        if parents:
            row["label"] = parents[0]
    for file in texts:
        # A text that belongs to nothing is a note, such as a licence.
        row = rows.get(_key(file.relative_to(root)), {})
        of_image = file.parent.name.lower() in _IMAGE_FOLDERS or "audio" not in row
        if row:
            row["image_caption.txt" if of_image else "caption.txt"] = file


def _key(inner: PurePath) -> str:
    """Name a sample: its path without suffix and without folders that only tell the kind."""
    folders = [part for part in inner.parts[:-1] if part.lower() not in _KIND_FOLDERS]
    return "/".join([*folders, inner.stem])


def _add_table(config: SamplesConfig, root: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Add what a table in the folder tells of the samples."""
    path = next((root / name for name in _CAPTIONS if (root / name).is_file()), None)
    if path is None:
        return
    table = read_table(path, config)
    lower = [name.lower() for name in table.names]
    naming = next((lower.index(key) for key in _KEYS if key in lower), None)
    if naming is None:
        raise InputError(f"{path} does not say which file a row is about: add a column 'file'")
    columns = guessed(table.names)
    for index in range(len(table.rows)):
        cells = table.row(index)
        if cells is None:
            raise InputError(
                f"{path}, line {table.lines[index]}: {len(table.rows[index])} cells for "
                f"{len(table.names)} columns: mend it"
            )
        inner = PurePath(str(table.rows[index][naming]).strip().replace("\\", "/"))
        known = inner.suffix.lower() in (*IMAGES, *SOUNDS, _TEXT)
        key = _key(inner if known else PurePath(f"{inner}.x"))
        # A row about a file that is not there names it, and is found bad when it is read.
        row = rows.setdefault(
            key, {"audio" if inner.suffix.lower() in SOUNDS else "image": str(inner)}
        )
        for name in ("caption", *_LIGHT):
            column = getattr(columns, name)
            if column is not None and cells[column]:
                row[name] = cells[column]
        for column in columns.image_captions.values():
            row["image_caption"] = cells[column]

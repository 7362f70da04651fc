"""The table of captions: it grows while a run goes on, and tells the next run what is done."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from soundmap.errors import MissingExtra, OutputError, PlanMismatch

COLUMNS = ("image", "caption", "model", "prompt", "error", "settings")
"""Columns of every table; ``settings`` holds what else decides the words."""

PLACE = ("row", "col", "lon", "lat")
"""Columns more for windows of a raster: first pixel, from 0, and centre in degrees."""

PARQUET = (".parquet", ".pq")

Key = tuple[str, ...]


@dataclass(frozen=True)
class Caption:
    """A row of the table: an image with its caption, or with the reason why there is none."""

    image: str
    caption: str = ""
    error: str = ""
    place: tuple[str, ...] = ()
    """Values of the `PLACE` columns, or nothing."""


class CaptionTable:
    """A table of captions on disk.

    Rows are appended and brought to the disk a batch at a time. A row is one line: a last line
    that a kill cut short can be told, and is dropped. A row with an error does not count as done:
    the next run drops it when it tries its image again.

    A Parquet file cannot grow: its rows are collected in ``NAME.part.csv`` beside it.

    Parameters
    ----------
    path
        The table: ``.csv``, ``.parquet`` or ``.pq``.
    common
        What decides the words of all rows: "model", "prompt", and further settings by name.
    places
        Whether rows have a place in a raster.
    overwrite
        Forget what is there.

    Raises
    ------
    OutputError
        The table cannot be written there, or something else is there.
    PlanMismatch
        The table holds captions that were made otherwise; the message says in what.
    MissingExtra
        A Parquet file is wanted and pyarrow is not installed.
    """

    def __init__(
        self, path: Path, common: Mapping[str, str], places: bool, overwrite: bool = False
    ) -> None:
        self.path = path
        self.done: set[Key] = set()
        """Images (and windows) that have a caption."""
        self._common = {key: one_line(value) for key, value in common.items()}
        self._header = COLUMNS + (PLACE if places else ())
        self._file: TextIO | None = None
        self._retried: Container[Key] = ()
        self._parquet = path.suffix.lower() in PARQUET
        self._rows = path.with_name(f"{path.name}.part.csv") if self._parquet else path
        _check_target(path)
        there = (p for p in (self._rows, path) if p.is_file() and p.stat().st_size)
        self._kept = next(there, None)
        if self._kept:
            self._scan(self._kept, overwrite)
        if overwrite:
            self._kept = None

    def _scan(self, path: Path, overwrite: bool) -> None:
        """Find out what is done, and whether a run may go on with it. Changes nothing."""
        rows = _read(path)
        header = next(rows, [])
        if header[: len(COLUMNS)] != list(COLUMNS):
            raise OutputError(
                f"{path} is no table of captions, and is not replaced: choose another --out"
            )
        if overwrite:
            return
        if header != list(self._header):
            kind = "windows of a raster" if "row" in header else "pictures"
            raise PlanMismatch(
                f"{path} has the columns of {kind} ({', '.join(header)}), other ones than this run "
                "writes: choose another --out, or --overwrite to begin anew"
            )
        for number, row in enumerate(rows, 2):
            if len(row) != len(header):
                raise OutputError(
                    f"{path}: record {number} has {len(row)} values and not {len(header)}, so "
                    "something else has changed the table: mend it, or choose another --out"
                )
            if not _failed(row):
                self._compare(row)
                self.done.add(_key(row))

    def _compare(self, row: Sequence[str]) -> None:
        before = {"model": row[2], "prompt": row[3]} | _settings(row[5])
        if before == self._common:
            return
        changed = [
            f"{key} {before.get(key, 'none')!r}, now {self._common.get(key, 'none')!r}"
            for key in before | self._common
            if before.get(key) != self._common.get(key)
        ]
        raise PlanMismatch(
            f"{self.path} holds captions that were made otherwise ({'; '.join(changed)}): choose "
            "another --out, or --overwrite to begin anew"
        )

    def retrying(self, images: Container[Key]) -> CaptionTable:
        """Drop the failed rows of these images, but not before there are new rows.

        A context manager, which closes the table.
        """
        self._retried = images
        return self

    def __enter__(self) -> CaptionTable:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the table."""
        if self._file:
            self._file.close()
            self._file = None

    def _opened(self) -> TextIO:
        """Copy the rows that count to a new file, put it in place, and open it for more."""
        if self._file:
            return self._file
        temporary = self._rows.with_name(f"{self._rows.name}.tmp")
        with temporary.open("w", newline="", encoding="utf-8", errors=_BYTES) as file:
            writer = _writer(file)
            writer.writerow(self._header)
            if self._kept:
                rows = _read(self._kept)
                next(rows)
                writer.writerows(r for r in rows if not (_failed(r) and _key(r) in self._retried))
        os.replace(temporary, self._rows)
        self._file = self._rows.open("a", newline="", encoding="utf-8", errors=_BYTES)
        return self._file

    def append(self, captions: Sequence[Caption]) -> None:
        """Add rows; when this returns they are on the disk.

        Raises
        ------
        OutputError
            The disk is full, or the like.
        """
        common = dict(self._common)
        model, prompt = common.pop("model"), common.pop("prompt")
        settings = "; ".join(f"{key}={value}" for key, value in common.items())
        rows = [
            (c.image, one_line(c.caption), model, prompt, one_line(c.error), settings, *c.place)
            for c in captions
        ]
        try:
            file = self._opened()
            _writer(file).writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def finish(self) -> None:
        """End the writing: see that there is a table, and make the Parquet file if it is one."""
        if not self._file and self._kept == self.path and not _is_torn(self.path):
            return
        try:
            self._opened()
            self.__exit__()
            if self._parquet:
                self._make_parquet()
        except OSError as error:
            raise self._unwritable(error) from error

    def _make_parquet(self) -> None:
        import pandas as pd

        table = pd.read_csv(self._rows, dtype=str, keep_default_na=False, encoding_errors=_BYTES)
        for name in set(PLACE) & set(table.columns):
            table[name] = pd.to_numeric(table[name])
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        table.to_parquet(temporary, index=False)
        os.replace(temporary, self.path)
        self._rows.unlink()

    def _unwritable(self, error: OSError) -> OutputError:
        if isinstance(error, OutputError):
            return error
        return OutputError(f"{self.path} cannot be written: {error.strerror or error}")


# Names of files may hold bytes that are no text; they come back as they went.
_BYTES = "surrogateescape"


def one_line(text: str) -> str:
    """Take line breaks and repeated spaces out."""
    return " ".join(text.split())


def _writer(file: TextIO) -> Any:
    return csv.writer(file, lineterminator="\n")


def _key(row: Sequence[str]) -> Key:
    return (row[0], *row[6:8])


def _failed(row: Sequence[str]) -> bool:
    return bool(row[4])


def _settings(text: str) -> dict[str, str]:
    pairs = (part.partition("=") for part in text.split("; ") if part)
    return {key: value for key, _, value in pairs}


def _read(path: Path) -> Iterator[list[str]]:
    """Header and rows of a table, but for a last line that was cut short."""
    if path.suffix.lower() in PARQUET:
        yield from _read_parquet(path)
        return
    torn = _is_torn(path)
    try:
        with path.open(newline="", encoding="utf-8-sig", errors=_BYTES) as text:
            last: list[str] | None = None
            for row in csv.reader(text):
                if last:
                    yield last
                last = row
            if last and not torn:
                yield last
    except (OSError, csv.Error) as error:
        raise OutputError(f"{path} cannot be read ({error}): choose another --out") from error


def _is_torn(path: Path) -> bool:
    """Whether the last line of a table has no end."""
    if path.suffix.lower() in PARQUET:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() not in (b"\n", b"\r")


def _read_parquet(path: Path) -> Iterator[list[str]]:
    import pandas as pd

    try:
        table = pd.read_parquet(path)
    except Exception as error:
        raise OutputError(f"{path} is no Parquet table: choose another --out") from error
    yield [str(name) for name in table.columns]
    for row in table.itertuples(index=False):
        yield [str(value) for value in row]


def _check_target(path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix not in (".csv", *PARQUET):
        raise OutputError(f"{path}: unknown kind of table: name it .csv or .parquet")
    if suffix in PARQUET:
        require_parquet()
    if path.is_dir():
        raise OutputError(f"{path} is a folder: name a file in it")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OutputError(f"{path}: folder {folder} does not exist: make it or choose another")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"{path}: cannot write in folder {folder} ({error.strerror or error}): choose another"
        ) from error


def require_parquet() -> None:
    """See that Parquet files can be read and written.

    Raises
    ------
    MissingExtra
        They cannot.
    """
    if find_spec("pyarrow") is None:
        raise MissingExtra("pyarrow", "caption", "a Parquet table")

"""Samples listed in a table of one's own, with media in files beside it."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soundmap.errors import InputError, MissingExtra
from soundmap.products.samples.base import BadSample, Sample
from soundmap.products.samples.config import SamplesConfig, split_name
from soundmap.products.samples.files import no_split, split_files
from soundmap.products.samples.rows import Columns, RowReader, guessed, own

_PARQUET = (".parquet", ".pq")
SUFFIXES = (".csv", ".tsv", ".tab", *_PARQUET)
"""Tables that can be read."""
_TABBED = (".tsv", ".tab")


@dataclass(frozen=True)
class Table:
    """One file of rows, in memory: media are named in it, not held."""

    path: Path
    names: tuple[str, ...]
    rows: Sequence[Sequence[Any]]
    lines: Sequence[int]
    """Line that each row ends on; names the row."""

    def row(self, index: int) -> Mapping[str, Any] | None:
        """Column -> value; None if the row has not one cell for each column."""
        cells = self.rows[index]
        return dict(zip(self.names, cells, strict=True)) if len(cells) == len(self.names) else None


@dataclass(frozen=True)
class ListedSamples:
    """See `soundmap.products.samples.base.Samples`."""

    name: str
    gsd_m: float
    native_px: int
    fields: frozenset[str]
    tables: tuple[Table, ...]
    readers: tuple[RowReader, ...]
    """One per table: columns may stand under other names."""
    places: Sequence[tuple[int, int]]
    """Table and row of each sample."""

    def __len__(self) -> int:
        """Count rows, bad ones included."""
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        """Read one row; BadSample if it cannot be used."""
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} rows: there is no row {index}")
        number, place = self.places[index]
        table = self.tables[number]
        key = f"{table.path.name}:{table.lines[place]}"
        row = table.row(place)
        if row is None:
            cells = len(table.rows[place])
            raise BadSample(key, "row malformed", f"{cells} cells for {len(table.names)} columns")
        return self.readers[number].sample(row, key)


def open_table(config: SamplesConfig, split: str, wanted: frozenset[str]) -> ListedSamples:
    """Open the tables of a split.

    Raises
    ------
    InputError
        A table is missing or unreadable, a column that is named is not there, nothing that is
        needed is there, or no row is of the split.
    """
    tables: list[Table] = []
    readers: list[RowReader] = []
    places: list[tuple[int, int]] = []
    there: set[str] = set()
    has = frozenset[str]()
    named = False
    for path in split_files(config, split, SUFFIXES):
        table = read_table(path, config)
        columns = table_columns(config, table.names, path)
        named = named or columns.split is not None
        rows = _rows_of_split(config, split, table, columns.split, there)
        places += [(len(tables), row) for row in rows]
        has |= columns.fields()
        tables.append(table)
        readers.append(RowReader.of(columns.only(wanted), config, path.parent))
    check_has(config, has)
    if not places:
        if named:
            raise no_split(config, split, there)
        raise InputError(f"{config.where}, path: {config.title} holds no rows")
    fields = has & wanted
    native_px, gsd_m = config.pixels() if "image" in fields else (0, float("nan"))
    name = f"{config.title} {split_name(split)}"
    return ListedSamples(
        name, gsd_m, native_px, fields, tuple(tables), tuple(readers), tuple(places)
    )


def check_has(config: SamplesConfig, has: frozenset[str]) -> None:
    """Refuse a set that has no column at all for what is required."""
    for field in config.required:
        if field not in has:
            raise InputError(
                f"{config.where}, required: {config.title} has nothing for {field}: name its "
                "column, or do not require it"
            )


def table_columns(config: SamplesConfig, names: Sequence[str], path: Path) -> Columns:
    """Tell what the columns of a table hold.

    Raises
    ------
    InputError
        One that is named is not there, or none is known.
    """
    if not config.columns:
        columns = guessed(names)
        if not columns.names():
            raise InputError(
                f"{config.where}, columns: is missing, and {path} has no column with a usual name "
                f"(it has {', '.join(names)}): say what they hold"
            )
        return columns
    columns = own(config.columns)
    for name in columns.names():
        if name not in names:
            raise InputError(
                f"{config.where}, columns: {path} has no column {name!r} "
                f"(it has {', '.join(names)})"
            )
    return columns


def read_table(path: Path, config: SamplesConfig) -> Table:
    """Read a table whole.

    Raises
    ------
    InputError
        It cannot be read, or is empty.
    MissingExtra
        It is Parquet and pyarrow is not installed.
    """
    if path.suffix.lower() in _PARQUET:
        return _read_parquet(path, config)
    rows, lines = [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            tabbed = path.suffix.lower() in _TABBED
            reader = csv.reader(file, delimiter="\t" if tabbed else ",", strict=True)
            names = tuple(name.strip() for name in next(reader, []))
            for row in reader:
                if row:
                    rows.append(row)
                    lines.append(reader.line_num)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path} cannot be read as a table ({reason}): save it as UTF-8"
        ) from error
    if not names:
        raise InputError(f"{path} is empty: give a table with a row of names, then the rows")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{path} has the column {twice[0]!r} twice: rename one")
    return Table(path, names, rows, lines)


def _read_parquet(path: Path, config: SamplesConfig) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtra("pyarrow", "train", "reading Parquet") from error
    try:
        schema = pq.read_schema(path)
        columns = table_columns(config, schema.names, path)
        for name in columns.names():
            kind = schema.field(name).type
            if (
                pa.types.is_nested(kind)
                or pa.types.is_binary(kind)
                or pa.types.is_large_binary(kind)
            ):
                raise InputError(
                    f"{config.where}, kind: {path} holds media in its column {name!r}: read it "
                    'with kind = "parquet"'
                )
        table = pq.read_table(path, columns=columns.names())
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read as Parquet ({reason})") from error
    rows = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
    return Table(path, tuple(table.column_names), rows, range(1, len(rows) + 1))


def _rows_of_split(
    config: SamplesConfig, split: str, table: Table, column: str | None, there: set[str]
) -> Sequence[int]:
    """Choose rows by the column that names their split, and note which splits there are."""
    if column is None:
        return range(len(table.rows))
    wanted = {split_name(name) for name in config.names_of(split)}
    number = table.names.index(column)
    said = [_said(row, number) for row in table.rows]
    there.update(name for name in said if name)
    if not any(said):
        return range(len(table.rows))
    # A row that is too short to say is in every split, so that it is reported; one that says
    # nothing is in none.
    return [row for row, name in enumerate(said) if name is None or name in wanted]


def _said(row: Sequence[Any], number: int) -> str | None:
    """Name the split of a row; "": it names none, None: it has no such cell."""
    if len(row) <= number:
        return None
    return split_name(str(row[number])) if row[number] is not None else ""

"""Pictures that lie in a Parquet table themselves, as Hugging Face's ``Image`` keeps them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from soundmap.errors import InputError

COLUMN = "image"
_NAMES = ("sample_id", "key", "id")


@dataclass
class HeldPictures:
    """The pictures of a table, read a row group at a time.

    Pictures are asked for in order, by a few threads: the last two groups are kept.
    """

    table: Path
    _groups: dict[int, list[Any]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def read(self, group: int, row: int) -> io.BytesIO | Path:
        """Give a picture as bytes, or the name of its file where the table holds no more.

        Raises
        ------
        InputError
            The row holds neither.
        """
        with self._lock:
            if group not in self._groups:
                while len(self._groups) > 1:
                    del self._groups[min(self._groups)]
                self._groups[group] = self._file().read_row_group(group, [COLUMN])[0].to_pylist()
            held = self._groups[group][row]
        data, path = (held.get("bytes"), held.get("path")) if isinstance(held, dict) else (held, "")
        if data:
            return io.BytesIO(data)
        if path:
            return self.table.parent / Path(path).expanduser()
        raise InputError(f"the row holds no image (row {row + 1} of row group {group + 1})")

    def names(self) -> Iterator[tuple[str, int, int]]:
        """Name every picture: by its path, else its key, else its row; no two alike.

        Yields
        ------
        tuple
            Name, row group, and row in the group.
        """
        file = self._file()
        key = next((one for one in _NAMES if one in file.schema_arrow.names), None)
        given: list[str] = []
        places: list[tuple[int, int]] = []
        for group in range(file.num_row_groups):
            rows = self._named(file, group, key)
            given += rows
            places += [(group, i) for i in range(len(rows))]
        often = Counter(given)
        for number, (name, place) in enumerate(zip(given, places, strict=True), 1):
            yield (name if name and often[name] == 1 else f"(row {number})", *place)

    def _named(self, file: Any, group: int, key: str | None) -> list[str]:
        """Names of a group's rows, "" where there is none. The bytes are not read for that."""
        import pyarrow.types as types

        has_path = (
            types.is_struct(file.schema_arrow.field(COLUMN).type)
            and file.schema_arrow.field(COLUMN).type.get_field_index("path") >= 0
        )
        wanted = [f"{COLUMN}.path"] * has_path + [key] * (key is not None)
        columns = file.read_row_group(group, wanted).to_pydict() if wanted else {}
        rows = file.metadata.row_group(group).num_rows
        paths = [one["path"] if one else None for one in columns.get(COLUMN, [None] * rows)]
        keys = columns.get(key, [None] * rows)
        return [str(p or (k if k is not None else "")) for p, k in zip(paths, keys, strict=True)]

    def _file(self) -> Any:
        import pyarrow.parquet as pq

        return pq.ParquetFile(self.table)


def held_pictures(table: Path) -> HeldPictures | None:
    """Tell whether a Parquet table holds the pictures themselves, and give them.

    Returns
    -------
    HeldPictures or None
        None where the column names files, or is not there.

    Raises
    ------
    InputError
        The file is no Parquet table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(table)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{table}: no Parquet table ({' '.join(str(error).split())})") from error
    if COLUMN not in schema.names:
        return None
    kind = schema.field(COLUMN).type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return HeldPictures(table)
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return HeldPictures(table)
    return None

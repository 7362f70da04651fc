"""Samples in Parquet, read through Hugging Face ``datasets``: local files, or sets at the hub.

Rows are taken in Arrow's own form, and what is in them is decoded here: the library's decoders for
images and sound are neither needed nor called.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from soundmap.errors import InputError, MissingExtra
from soundmap.products.samples.base import BadSample, Sample, Samples, StreamedSamples
from soundmap.products.samples.config import SamplesConfig, split_name
from soundmap.products.samples.files import is_file_like, no_split, split_files
from soundmap.products.samples.report import BadRows
from soundmap.products.samples.rows import Columns, RowReader, own, published
from soundmap.products.samples.table import check_has

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".parquet", ".pq")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_BATCH_ROWS = 16
"""Rows that are read from Parquet at a time: of the published sets, about 100 MB."""
_LOCK = Lock()


@dataclass(frozen=True)
class ParquetSamples:
    """See `soundmap.products.samples.base.Samples`. Rows lie in a file that is mapped to memory."""

    name: str
    gsd_m: float
    native_px: int
    fields: frozenset[str]
    data: Any
    """``datasets.Dataset`` in Arrow's format, of the wanted columns alone."""
    reader: RowReader
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        """Count rows, bad ones included."""
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        """Read one row; BadSample if it cannot be used."""
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} rows: there is no row {index}")
        return _read(self.reader, self.classes, self.data[index], f"row {index}")


@dataclass(frozen=True)
class ParquetStream:
    """See `soundmap.products.samples.base.StreamedSamples`."""

    name: str
    gsd_m: float
    native_px: int
    fields: frozenset[str]
    data: Any
    """``datasets.IterableDataset`` in Arrow's format, of the wanted columns alone."""
    reader: RowReader
    classes: tuple[str, ...] | None
    bad: BadRows
    part: tuple[int, int] = (1, 0)
    """How many parts the rows are dealt out to, and which this is."""

    def __iter__(self) -> Iterator[Sample]:
        """Read the rows in order; bad ones are left out and recorded in ``bad``."""
        count, mine = self.part
        seen = 0
        for number, row in enumerate(_rows(self.data, self.name)):
            if number % count != mine:
                continue
            seen += 1
            self.bad.read = max(self.bad.read, seen)
            try:
                sample = _read(self.reader, self.classes, row, f"row {number}")
            except BadSample as error:
                self.bad.add(error.key, error.reason, error.detail)
                continue
            yield sample

    def shard(self, count: int, index: int) -> ParquetStream:
        """Take every ``count``-th row, from the ``index``-th on. Parts report for themselves."""
        if not 0 <= index < count:
            raise ValueError(f"part {index} of {count}: count from 0")
        whole, mine = self.part
        return ParquetStream(
            **{
                **vars(self),
                "bad": BadRows(self.bad.name),
                "part": (whole * count, mine + whole * index),
            }
        )


def open_parquet(
    config: SamplesConfig, split: str, wanted: frozenset[str]
) -> Samples | StreamedSamples:
    """Open a split of a set in Parquet.

    Without streaming, ``datasets`` first copies the wanted columns to its cache, once, in a form
    that any row can be read from.

    Raises
    ------
    InputError
        The set or a column is not there or cannot be read, or there is no such split.
    MissingExtra
        ``datasets`` is not installed.
    """
    found = _Set.find(config, split)
    columns = _columns(config, found.features, wanted)
    if config.audio == "wave":
        columns = replace(columns, mel=None)
    check_has(config, columns.fields())
    fields = columns.fields() & wanted
    columns = columns.only(wanted)
    native_px, gsd_m = 0, float("nan")
    if "image" in fields:
        native_px, gsd_m = config.pixels(str(columns.image).removesuffix("_image"))
    name = f"{config.title} {split_name(split)}"
    reader = RowReader.of(columns, config, found.base)
    classes = getattr(found.features.get(columns.label or ""), "names", None)
    common = (name, gsd_m, native_px, fields)
    rest = (reader, tuple(classes) if classes else None)
    data = found.load(columns.names(), config.streaming)
    if config.streaming:
        return ParquetStream(*common, data, *rest, BadRows(name))
    return ParquetSamples(*common, data, *rest)


# --- which columns ---------------------------------------------------------------------------


def _columns(config: SamplesConfig, names: Mapping[str, Any], wanted: frozenset[str]) -> Columns:
    """Tell what the columns of a set hold: as it is configured, or as published."""
    if config.columns:
        columns = own(config.columns)
        for name in columns.names():
            if name not in names:
                raise InputError(
                    f"{config.where}, columns: {config.title} has no column {name!r} "
                    f"(it has {', '.join(names)})"
                )
        return columns
    is_earth = bool({"googleearth_image", "date_recorded", "short_id"} & set(names))
    schema = config.schema or ("soundingearth" if is_earth else "geosound")
    columns = published(schema, _imagery(config, schema, names, wanted)).present(names)
    if not columns.fields() and not columns.label:
        raise InputError(
            f"{config.where}, schema: {config.title} has none of the columns of {schema} "
            f"(it has {', '.join(names)}): say under columns what they hold"
        )
    return columns


def _imagery(
    config: SamplesConfig, schema: str, names: Mapping[str, Any], wanted: frozenset[str]
) -> str:
    """Tell which images of a published set are meant."""
    fitting = ("googleearth",) if schema == "soundingearth" else ("bingmap", "sentinel")
    if config.imagery is not None:
        if config.imagery not in fitting:
            raise InputError(
                f"{config.where}, imagery: {schema} has {' and '.join(fitting)}, "
                f"not {config.imagery!r}"
            )
        return config.imagery
    there = [one for one in fitting if f"{one}_image" in names]
    if len(there) > 1 and wanted & {"image", "image_caption"}:
        raise InputError(f"{config.where}, imagery: is missing: choose {' or '.join(there)}")
    return (there or list(fitting))[0]


# --- where it is -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Set:
    """A split of a set, as ``datasets`` is to be asked for it."""

    config: SamplesConfig
    target: str
    """"parquet", or the name of a set at the hub."""
    arguments: Mapping[str, Any]
    split: str
    """As the set calls it."""
    features: Mapping[str, Any]
    """Column -> its type; in the set's order."""
    base: Path = field(default_factory=Path)
    """Where paths inside the rows start."""

    @classmethod
    def find(cls, config: SamplesConfig, split: str) -> _Set:
        """Find the files or the set, and its columns."""
        is_hub, names = _hub_name(config), config.names_of(split)
        arguments: dict[str, Any] = {}
        base = Path()
        if is_hub:
            if config.revision:
                arguments["revision"] = config.revision
            if config.says(split) and any(is_file_like(name, SUFFIXES) for name in names):
                arguments["data_files"] = {"rows": list(names)}
        elif any("://" in path for path in config.path):
            arguments["data_files"] = {"rows": list(config.path)}
        else:
            files = split_files(config, split, SUFFIXES)
            base = files[0].parent
            arguments["data_files"] = {"rows": [str(file.resolve()) for file in files]}
        target = config.path[0] if is_hub else "parquet"
        parts = _load(config, target, arguments, streaming=True)
        chosen = _choose(config, split, list(parts))
        features = parts[chosen].features
        if features is None:
            features = parts[chosen]._resolve_features().features
        return cls(config, target, arguments, chosen, features, base)

    def load(self, columns: list[str], streaming: bool) -> Any:
        """Open the columns; not streaming, they are first copied to the cache."""
        data = _load(
            self.config,
            self.target,
            {**self.arguments, "columns": columns, "batch_size": _BATCH_ROWS},
            streaming=streaming,
            split=self.split,
        )
        return data.with_format("arrow")


def _hub_name(config: SamplesConfig) -> bool:
    """Tell names of sets at the hub from files: what is here is a file."""
    path = config.path[0]
    return (
        len(config.path) == 1
        and _HUB_NAME.fullmatch(path) is not None
        and not is_file_like(path, SUFFIXES)
        and not (config.base / path).exists()
    )


def _choose(config: SamplesConfig, split: str, there: list[str]) -> str:
    if there == ["rows"]:
        return "rows"
    wanted = {split_name(name) for name in config.names_of(split)}
    for name in there:
        if split_name(name) in wanted:
            return name
    raise no_split(config, split, there)


def _load(config: SamplesConfig, target: str, arguments: Mapping[str, Any], **more: Any) -> Any:
    """Call ``datasets.load_dataset``, quietly, and say in one line why it could not."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "train", "reading samples from Parquet") from error
    cache = str(config.base / Path(config.cache).expanduser()) if config.cache else None
    with _quiet(is_local=target == "parquet"):
        try:
            return datasets.load_dataset(target, cache_dir=cache, **arguments, **more)
        # Whatever the hub, the network, Arrow and the disk have to say.
        except Exception as error:
            cause = error.__cause__ or error
            reason = " ".join(str(cause).split()) or type(cause).__name__
            raise InputError(
                f"{config.where}, path: {config.title} cannot be read as Parquet ({reason[:300]})"
            ) from error


@contextmanager
def _quiet(is_local: bool) -> Iterator[None]:
    """Keep ``datasets`` from drawing in the terminal, and from telling that files here are read."""
    import datasets

    with _LOCK:
        were_shown = datasets.are_progress_bars_disabled() is False
        counted = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
        datasets.disable_progress_bars()
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counted and not is_local
        try:
            yield
        finally:
            datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counted
            if were_shown:
                datasets.enable_progress_bars()


# --- rows ------------------------------------------------------------------------------------


def _rows(data: Any, name: str) -> Iterator[pa.Table]:
    """Take a stream apart, row by row."""
    batches = iter(data.iter(batch_size=_BATCH_ROWS))
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # as in `_load`
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{name}: reading stopped ({reason[:300]})") from error
        if batch is None:
            return
        for row in range(batch.num_rows):
            yield batch.slice(row, 1)


def _read(reader: RowReader, classes: tuple[str, ...] | None, row: pa.Table, key: str) -> Sample:
    """Make a sample of a table of one row."""
    columns = reader.columns
    try:
        cells = {name: _cell(row.column(name)) for name in row.column_names}
    except (ValueError, TypeError, OverflowError) as error:  # Arrow's own are among them
        raise BadSample(key, "row malformed", " ".join(str(error).split())) from error
    label = cells.get(columns.label) if columns.label else None
    if classes and isinstance(label, int) and columns.label:
        cells[columns.label] = classes[label] if 0 <= label < len(classes) else None
    return reader.sample(cells, key)


def _cell(values: pa.ChunkedArray | pa.Array) -> Any:
    """Take the only value out: Python's own, or an array where there are lists of numbers."""
    import pyarrow as pa

    array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if array.null_count:
        return None
    kind = array.type
    if pa.types.is_struct(kind):
        # `field` of a slice is not sliced; `flatten` heeds both slice and gaps.
        parts = zip(kind, array.flatten(), strict=True)
        return {part.name: _cell(value) for part, value in parts}
    if _is_list(kind):
        return _numbers(array)
    return array[0].as_py()


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _numbers(array: pa.Array) -> Any:
    """Lists in lists to an array without going through Python's numbers; uneven ones stay lists."""
    import pyarrow.compute as pc

    whole = array
    shape = []
    while _is_list(array.type):
        lengths = pc.unique(pc.list_value_length(array)).to_pylist()
        if len(lengths) != 1 or lengths[0] is None:
            return whole[0].as_py()
        shape.append(lengths[0])
        array = array.flatten()
    return np.asarray(array.to_numpy(zero_copy_only=False)).reshape(shape)

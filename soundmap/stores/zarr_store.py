"""Maps as Zarr: created once, written a unit at a time from many processes, then finished.

What lies where is told in `soundmap.stores.template`, what a run notes in `soundmap.stores.ledger`.
"""

from __future__ import annotations

import contextlib
import enum
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray

from soundmap.errors import InputError, OutputError, UsageError
from soundmap.stores import place
from soundmap.stores.ledger import MARKER, PRIVATE, Ledger, write_job
from soundmap.stores.place import Location, child
from soundmap.stores.schema import MapSchema
from soundmap.stores.statistics import Statistics, combined, merged, partials
from soundmap.stores.template import Format, consolidate, write_template

ROOT_FILES = (".zgroup", ".zattrs", ".zmetadata", "zarr.json")
"""Written last into an object store: without them nothing is there to open."""


class Status(enum.IntEnum):
    """What became of a unit."""

    PENDING = 0
    DONE = 1
    EMPTY = 2
    FAILED = 3


@dataclass(frozen=True)
class ZarrStore:
    """A handle on a map in a Zarr store. It is plain data and pickles; arrays open on first use.

    Writing is safe from many processes at once as long as each chunk or shard has one writer.
    """

    path: Location
    schema: MapSchema
    units_shape: tuple[int, int]
    """Rows and columns of units."""
    mode: Literal["r", "r+"] = "r"
    zarr_format: Format = 2
    """Version of Zarr; 3 is a map with shards."""
    _arrays: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave open arrays behind: the copy opens its own."""
        return {**self.__dict__, "_arrays": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a frozen instance."""
        self.__dict__.update(state)

    def write(self, row0: int, col0: int, block: NDArray[np.float32]) -> None:
        """Write whole chunks of all concepts.

        Parameters
        ----------
        row0, col0
            Cell of the block's upper left corner; multiples of ``schema.chunk_cells``.
        block
            float32[C, h, w], NaN where there is no value. ``h`` and ``w`` are multiples of
            ``schema.chunk_cells`` unless the block ends with the grid.

        Raises
        ------
        UsageError
            The block does not cover whole chunks, or the store is open for reading only.
        OutputError
            It could not be written.
        """
        self._check_writable()
        self._check_block(row0, col0, block.shape)
        stored = self.schema.pack(block)
        size = self.schema.chunk_cells
        _, height, width = stored.shape
        with place.writing(self.path), self._there():
            values = self._array("values")
            values[:, row0 : row0 + height, col0 : col0 + width] = stored
            sums = self._array("partials")
            for row in range(0, height, size):
                for col in range(0, width, size):
                    chunk = self.schema.unpack(stored[:, row : row + size, col : col + size])
                    sums[(row0 + row) // size, (col0 + col) // size] = partials(chunk)

    def read(
        self,
        rows: slice = slice(None),
        cols: slice = slice(None),
        concepts: slice | Sequence[int] = slice(None),
    ) -> NDArray[np.float32]:
        """Read values: float32[C, h, w], NaN where there are none or none yet."""
        values = self._array("values")
        if isinstance(concepts, slice):
            stored = values[concepts, rows, cols]
        else:
            stored = values.oindex[list(concepts), rows, cols]
        return self.schema.unpack(np.asarray(stored))

    def mark(
        self,
        index: tuple[int, int],
        status: Status,
        error: str = "",
        seconds: float = 0.0,
        cells: int = 0,
    ) -> None:
        """Record what became of a unit. For one process alone, after the unit's data.

        Parameters
        ----------
        index
            Row and column of the unit.
        status
            What became of it.
        error
            Why it failed, one line.
        seconds
            Time that it took.
        cells
            How many cells it has.

        Raises
        ------
        UsageError
            The store is open for reading only.
        OutputError
            It could not be written down: the unit will be computed again.
        """
        self._check_writable()
        with place.writing(self.path), self._there():
            ledger = self.ledger()
            if status == Status.FAILED:
                ledger.reason(index, error)
            self._array("status")[index] = int(status)
            ledger.count(
                computed=status == Status.DONE,
                failed=status == Status.FAILED,
                seconds=seconds,
                cells=cells,
            )

    def ledger(self) -> Ledger:
        """Notes of this run, begun when they are first asked for. For one process alone."""
        if "ledger" not in self._arrays:
            self._arrays["ledger"] = Ledger(self.path)
        notes: Ledger = self._arrays["ledger"]
        return notes

    def status(self) -> NDArray[np.uint8]:
        """Status of every unit, uint8[rows, columns] of :class:`Status`; finished maps are DONE."""
        if self.settled():
            return np.full(self.units_shape, Status.DONE, dtype=np.uint8)
        return np.asarray(self._array("status")[...], dtype=np.uint8)

    def settled(self) -> bool:
        """Tell whether the map holds all that it will: what its run noted is gone, or going."""
        return not place.is_file(child(self.path, PRIVATE, *MARKER))

    def finish(self, keep_status: bool = False) -> tuple[Statistics, ...]:
        """Complete the map: statistics into its attributes, metadata in one file.

        May be repeated, and killed. ``keep_status`` keeps what a run needs to go on; without it
        that goes, and the store holds nothing but the map.

        Raises
        ------
        UsageError
            The store is open for reading only.
        OutputError
            It could not be written.
        """
        self._check_writable()
        with place.writing(self.path):
            place.sweep(self.path)
            if not self.settled():
                group = self._group("r+")
                # A row at a time: those of a country are hundreds of megabytes together.
                sums = self._array("partials")
                rows = [combined(np.asarray(sums[row])) for row in range(sums.shape[0])]
                results = merged(np.stack(rows))
                group.attrs.update(_statistics_attrs(results))
            consolidate(place.zarr_location(self.path, read_only=False), self.zarr_format)
            if not keep_status:
                # The marker first: halves of the rest must not pass for a run with all to do.
                place.remove_file(child(self.path, PRIVATE, *MARKER))
                place.remove(child(self.path, PRIVATE))
                self._arrays.clear()
        return self.statistics()

    def statistics(self) -> tuple[Statistics, ...]:
        """Statistics of every concept, as :meth:`finish` left them; empty before it."""
        return _read_statistics(dict(self._group("r").attrs))

    def _group(self, mode: Literal["r", "r+"]) -> zarr.Group:
        return zarr.open_group(
            place.zarr_location(self.path, read_only=mode == "r"),
            mode=mode,
            zarr_format=self.zarr_format,
            use_consolidated=False,
        )

    def _array(self, name: Literal["values", "status", "partials"]) -> Any:
        if name not in self._arrays:
            inside = (self.schema.value,) if name == "values" else (PRIVATE, name)
            self._arrays[name] = zarr.open_array(
                place.zarr_location(child(self.path, *inside), read_only=self.mode == "r"),
                mode=self.mode,
                # The arrays of a run are of version 2, whatever the map is.
                zarr_format=self.zarr_format if name == "values" else 2,
            )
        return self._arrays[name]

    def _check_writable(self) -> None:
        if self.mode == "r":
            raise UsageError(f"{self.path}: opened for reading: open it with mode 'r+' to write")

    @contextlib.contextmanager
    def _there(self) -> Iterator[None]:
        """See that the store is where it was, before and after something is written."""
        self._check_there()
        try:
            yield
        finally:
            self._check_there()

    def _check_there(self) -> None:
        if not isinstance(self.path, Path) or not self.settled():
            return
        # Zarr makes folders that are missing: below a disk that was taken away, in the folder where
        # the disk used to be.
        # Units that end at the same time find the same, and may remove it first.
        with contextlib.suppress(OSError):
            if not set(ROOT_FILES) & set(place.names_in(self.path)):
                place.remove(self.path)
        raise OutputError(
            f"{self.path}: is gone, or finished meanwhile: if its disk was taken away, put it "
            "back, and the same command goes on"
        )

    def _check_block(self, row0: int, col0: int, shape: tuple[int, ...]) -> None:
        count, height, width = self.schema.shape
        size = self.schema.chunk_cells
        if len(shape) != 3 or shape[0] != count:
            raise UsageError(f"block of shape {shape} given: expected ({count}, rows, columns)")
        for axis, start, length, end in (
            ("rows", row0, shape[1], height),
            ("columns", col0, shape[2], width),
        ):
            stop = start + length
            if start < 0 or length < 1 or stop > end:
                raise UsageError(f"{axis} {start}:{stop} lie outside the map's {end}")
            if start % size or (stop % size and stop != end):
                raise UsageError(
                    f"{axis} {start}:{stop} cut through chunks of {size} cells: write whole chunks"
                )


def create(
    path: str | Path,
    schema: MapSchema,
    units_shape: tuple[int, int],
    *,
    scratch: bool = False,
    shards: bool = False,
    job: Mapping[str, Any] | None = None,
) -> ZarrStore:
    """Create an empty map, all cells without value and all units pending.

    Parameters
    ----------
    path
        A folder or address where there is nothing yet. A folder appears whole or not at all; at an
        address, what a kill leaves is there but cannot be opened.
    schema
        What the map will hold.
    units_shape
        Rows and columns of units, for the status.
    scratch
        For a store that only feeds a GeoTIFF: nothing is compressed, which is faster.
    shards
        Zarr v3, a shard for each unit.
    job
        What was asked for, as JSON can hold it: kept until the map is finished.

    Raises
    ------
    OutputError
        It exists already, or cannot be made.
    """
    location = place.located(path)
    version: Format = 3 if shards else 2
    if location.exists() if isinstance(location, Path) else place.names_in(location):
        raise OutputError(f"{path}: exists already: remove it or choose another name")

    def fill(folder: Path) -> None:
        write_template(folder, schema, units_shape, zarr_format=version, scratch=scratch)
        write_job(folder, job or {})

    with place.writing(location, "could not be made"):
        if isinstance(location, Path):
            # A fixed name, so that the next run clears what a killed one left.
            made = location.with_name(f".{location.name}.new")
            try:
                shutil.rmtree(made, ignore_errors=True)
                made.mkdir()
                fill(made)
                os.rename(made, location)
            finally:
                shutil.rmtree(made, ignore_errors=True)
        else:
            with tempfile.TemporaryDirectory(prefix="soundmap-") as folder:
                fill(Path(folder))
                place.upload(Path(folder), location, last=ROOT_FILES)
    return ZarrStore(location, schema, units_shape, "r+", version)


def open_store(path: str | Path, mode: Literal["r", "r+"] = "r") -> ZarrStore:
    """Open a map that :func:`create` made, finished or not.

    Raises
    ------
    InputError
        There is none, or it is not one of soundmap's.
    """
    location = place.located(path)
    attrs, version = _read_root(location)
    try:
        schema = MapSchema.from_attrs(attrs)
        rows, cols = attrs["units_shape"]
    except InputError as error:
        raise InputError(f"{path}: not a soundmap map: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a soundmap map: its description is damaged") from error
    return ZarrStore(location, schema, (int(rows), int(cols)), mode, version)


def _read_root(location: Location) -> tuple[dict[str, Any], Format]:
    """Return the attributes of a Zarr group and its version; InputError where there is none."""
    if isinstance(location, Path) and not location.exists():
        raise InputError(f"{location}: no such file: check the path")
    try:
        group = zarr.open_group(
            place.zarr_location(location, read_only=True), mode="r", use_consolidated=False
        )
        return dict(group.attrs), group.metadata.zarr_format
    except place.storage_errors(ValueError, KeyError) as error:
        if isinstance(location, Path) or isinstance(error, FileNotFoundError | ValueError):
            raise InputError(f"{location}: not a Zarr store that soundmap can read") from error
        place.forget_connections()
        raise InputError(
            f"{location}: cannot be read ({place.reason_of(error)}): {place.advice(location)}"
        ) from error


def _statistics_attrs(results: Sequence[Statistics]) -> dict[str, list[Any]]:
    def known(number: float) -> float | None:
        return None if np.isnan(number) else float(number)

    return {
        "statistics_minimum": [known(one.minimum) for one in results],
        "statistics_maximum": [known(one.maximum) for one in results],
        "statistics_mean": [known(one.mean) for one in results],
        "statistics_stddev": [known(one.stddev) for one in results],
        "statistics_valid": [one.valid for one in results],
    }


def _read_statistics(attrs: dict[str, Any]) -> tuple[Statistics, ...]:
    def number(value: float | None) -> float:
        return float("nan") if value is None else float(value)

    names = ("minimum", "maximum", "mean", "stddev", "valid")
    columns = [attrs.get(f"statistics_{name}", []) for name in names]
    return tuple(
        Statistics(number(low), number(high), number(mean), number(deviation), int(valid))
        for low, high, mean, deviation, valid in zip(*columns, strict=True)
    )

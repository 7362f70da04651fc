"""Rows that could not be used: counted, listed, and said."""

from __future__ import annotations

import csv
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from soundmap.errors import OutputError

if TYPE_CHECKING:
    from soundmap.products.samples.base import Sample, Samples, StreamedSamples

LISTED = 10_000
"""Rows that a report lists; further ones are only counted."""
_SAID = 6
"""Reasons that the summary names."""
_HEADER = ("key", "reason", "detail")


@dataclass
class BadRows:
    """What was wrong with which rows. Many threads may add rows, and each row is told once."""

    name: str = ""
    """The set, for people."""
    read: int = 0
    """Rows that were looked at, good and bad, once or more often; 0: not counted."""
    counts: Counter[str] = field(default_factory=Counter)
    """Reason -> rows."""
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    """Key, reason and detail of the first rows, `LISTED` at most."""
    _seen: set[tuple[str, str]] = field(default_factory=set, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __len__(self) -> int:
        """Count bad rows."""
        return self.counts.total()

    def __bool__(self) -> bool:
        """Tell whether there are any."""
        return bool(self.counts)

    def add(self, key: str, reason: str, detail: str = "") -> None:
        """Record a row. The same row with the same reason counts once, however often it is met."""
        with self._lock:
            if (key, reason) in self._seen:
                return
            self._seen.add((key, reason))
            self.counts[reason] += 1
            if len(self.rows) < LISTED:
                self.rows.append((key, reason, detail))

    def merge(self, other: BadRows) -> None:
        """Take over the rows of another report, such as that of another process."""
        told = {(key, reason) for key, reason, _ in other.rows}
        for row in other.rows:
            self.add(*row)
        with self._lock:
            for key, reason in other._seen - told - self._seen:
                self._seen.add((key, reason))
                self.counts[reason] += 1
            self.read += other.read

    def summary(self) -> str:
        """Say it in one line."""
        of = f" of {self.read}" if self.read else ""
        name = f"{self.name}: " if self.name else ""
        if not self:
            return f"{name}no bad rows{of}"
        said = [f"{count} {reason}" for reason, count in self.counts.most_common(_SAID)]
        rest = len(self) - sum(count for _, count in self.counts.most_common(_SAID))
        said += [f"{rest} other"] if rest else []
        rows = "row" if len(self) == 1 and not of else "rows"
        return f"{name}{len(self)}{of} {rows} bad: {', '.join(said)}"

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a CSV file with the columns key, reason and detail.

        Where more rows were bad than are listed, a last line without a key tells how many.

        Raises
        ------
        OutputError
            The file cannot be written.
        """
        path = Path(path)
        try:
            with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
                writer = csv.writer(file)
                writer.writerow(_HEADER)
                writer.writerows(self.rows)
                if len(self) > len(self.rows):
                    writer.writerow(("", "not listed", f"{len(self) - len(self.rows)} more rows"))
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(
                f"{path} cannot be written ({reason}): choose another place"
            ) from error

    def __getstate__(self) -> dict[str, object]:
        """Leave out the lock, which does not travel."""
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Come with a lock of its own."""
        self.__dict__.update(state, _lock=threading.Lock())


def check(
    samples: Samples | StreamedSamples,
    fields: Collection[str] = (),
    progress: Callable[[int], None] | None = None,
) -> BadRows:
    """Read every row once, and tell which cannot be used.

    Parameters
    ----------
    samples
        The set; what it was opened for is decoded.
    fields
        Modalities that each row must have, beside those that the set itself requires.
    progress
        Called with the number of rows read so far; of a stream, of those that could be.

    Returns
    -------
    BadRows
        The rows, with ``read`` set. For a stream its own report: ``samples.bad``.

    Raises
    ------
    UsageError
        One of ``fields`` is unknown, or the set was not opened for it or has no such thing.
    """
    from soundmap.products.samples.base import BadSample, Samples, check_fields, lacking

    wanted = check_fields(fields)
    _check_readable(samples, wanted)

    def look(sample: Sample) -> None:
        fault = lacking(sample, wanted)
        if fault:
            raise BadSample(sample.key, fault)

    if isinstance(samples, Samples):
        bad = BadRows(samples.name)
        for index in range(len(samples)):
            try:
                look(samples[index])
            except BadSample as error:
                bad.add(error.key, error.reason, error.detail)
            bad.read = index + 1
            if progress:
                progress(bad.read)
        return bad
    for number, sample in enumerate(samples, 1):
        try:
            look(sample)
        except BadSample as error:
            samples.bad.add(error.key, error.reason, error.detail)
        if progress:
            progress(number)
    return samples.bad


def _check_readable(samples: Samples | StreamedSamples, fields: frozenset[str]) -> None:
    from soundmap.errors import UsageError

    for name in sorted(fields - samples.fields):
        raise UsageError(
            f"{samples.name}: cannot be checked for {name}: the set has none, or was not opened "
            "for it"
        )

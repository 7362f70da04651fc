"""Samples in the order of a run, read ahead by threads, and put together to batches."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soundmap.encoder.described import encode_facts
from soundmap.errors import InputError
from soundmap.nn.metadata import Metadata
from soundmap.products.samples import BadRows, BadSample, Sample, Samples
from soundmap.train.texts import Captions, join
from soundmap.train.views import View, Viewer

MODALITIES = ("image", "audio", "audio_caption", "image_caption")
"""Columns of `Batch.has` and rows of what `soundmap.train.objective.embed` makes."""
_ORDER = 0
_READ_AHEAD = 2
# A share of bad rows says something from so many on.
_ENOUGH_ROWS = 100


def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Order of the samples in an epoch: int64[count], a pure function of its arguments."""
    return np.random.default_rng((seed, epoch, _ORDER)).permutation(count)


@dataclass(frozen=True)
class Batch:
    """A batch on the device. What a row lacks has no place in the arrays of its modality."""

    has: Tensor
    """bool[B, 4], by `MODALITIES`."""
    pixels: Tensor
    """uint8[images, 3, W, W]."""
    gsd_m: Tensor
    """float32[images]."""
    metadata: Metadata
    """Of the images."""
    mel: Tensor
    """float32[recordings, 1, 1001, 64]."""
    audio_caption: Tensor
    """float32[captions, T, text_dim]."""
    image_caption: Tensor

    def __len__(self) -> int:
        """Rows, B."""
        return len(self.has)


class Rows:
    """Samples by number, where rows that cannot be read give way to the next that can.

    What stands in for a bad row depends on the data alone, so it is the same in every run.

    Parameters
    ----------
    samples
        The data.
    viewer
        Makes views of them.
    seed
        Of the run.
    most_bad
        Share of bad rows at which the run ends.
    """

    def __init__(self, samples: Samples, viewer: Viewer, seed: int, most_bad: float) -> None:
        self.samples = samples
        self.viewer = viewer
        self.seed = seed
        self.most_bad = most_bad
        self.bad = BadRows(samples.name)
        """Rows that could not be read; ``read`` counts all that were tried."""
        self._numbers: set[int] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Samples, the bad ones included."""
        return len(self.samples)

    def view(self, epoch: int, index: int) -> View:
        """View of a sample, or of the next good one.

        Raises
        ------
        InputError
            Too many rows are bad.
        """
        sample, number = self._good(index)
        return self.viewer.view(sample, self.seed, epoch, number)

    def _good(self, index: int) -> tuple[Sample, int]:
        count = len(self.samples)
        for step in range(count):
            number = (index + step) % count
            if number in self._numbers:
                continue
            try:
                sample = self.samples[number]
            except BadSample as error:
                with self._lock:
                    self._numbers.add(number)
                    self.bad.add(error.key, error.reason, error.detail)
                    self.bad.read += 1
                refuse_many(self.bad, self.most_bad, count)
                continue
            with self._lock:
                self.bad.read += 1
            return sample, number
        raise InputError(f"{self.samples.name}: not one of {count:,} rows can be read")


def refuse_many(bad: BadRows, most: float, count: int = _ENOUGH_ROWS) -> None:
    """End the run if too many rows are bad.

    Parameters
    ----------
    bad
        Those so far, of how many.
    most
        Share of bad rows that is borne.
    count
        Rows of the whole set, if known.

    Raises
    ------
    InputError
        Too many are bad.
    """
    tried = min(bad.read, max(count, _ENOUGH_ROWS))
    if tried >= min(_ENOUGH_ROWS, count) and len(bad) > most * tried:
        worst, times = bad.counts.most_common(1)[0]
        raise InputError(
            f"{bad.name}: {len(bad):,} of the first {tried:,} rows cannot be used, more than "
            f"training.most_bad = {most:g} allows; most often ({times:,}): {worst}"
        )


class Feeder:
    """Gives the views of a run, batch after batch, while threads read ahead.

    Parameters
    ----------
    rows
        Where samples come from.
    batch
        Samples per process and step.
    rank, world
        Which process this is, of how many. The samples of a step lie one process after the other.
    workers
        Threads.
    """

    def __init__(self, rows: Rows, batch: int, rank: int, world: int, workers: int) -> None:
        self.rows = rows
        self.batch = batch
        self.rank = rank
        self.world = world
        self.per_epoch = len(rows) // (batch * world)
        # One thread of torch each, whatever their number: spectra come out the same.
        self._pool = ThreadPoolExecutor(
            workers, "read", initializer=lambda: torch.set_num_threads(1)
        )

    def steps(self, start: int) -> Iterator[list[View]]:
        """Views of each step, from step ``start`` (from 0) on, without end."""
        return read_ahead(self._pool, self._jobs(start))

    def _jobs(self, start: int) -> Iterator[list[Callable[[], View]]]:
        epoch, skipped = divmod(start, self.per_epoch)
        while True:
            order = epoch_order(self.rows.seed, epoch, len(self.rows))
            for step in range(skipped, self.per_epoch):
                first = (step * self.world + self.rank) * self.batch
                own = order[first : first + self.batch].tolist()
                yield [_job(self.rows, epoch, index) for index in own]
            epoch, skipped = epoch + 1, 0

    def close(self) -> None:
        """Let the threads go."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _job(rows: Rows, epoch: int, index: int) -> Callable[[], View]:
    return lambda: rows.view(epoch, index)


def read_ahead(
    pool: ThreadPoolExecutor, jobs: Iterator[list[Callable[[], View]]]
) -> Iterator[list[View]]:
    """Run lists of jobs in a pool, two lists ahead of the one that is asked for."""
    waiting: deque[list[Future[View]]] = deque()
    jobs = iter(jobs)
    while True:
        for batch in islice(jobs, 1 + _READ_AHEAD - len(waiting)):
            waiting.append([pool.submit(job) for job in batch])
        if not waiting:
            return
        yield [future.result() for future in waiting.popleft()]


class Collator:
    """Puts views together to batches on a device.

    Parameters
    ----------
    captions
        Turns texts into tokens.
    fields
        Metadata that the model takes.
    hears
        Whether the model has a tower for sound.
    device
        Where the batch goes.
    """

    def __init__(
        self, captions: Captions, fields: tuple[str, ...], hears: bool, device: torch.device
    ) -> None:
        self.captions = captions
        self.fields = fields
        self.hears = hears
        self.device = device

    def collate(self, views: list[View]) -> Batch:
        """Put views together."""
        images = [v for v in views if v.pixels is not None]
        mels = [v.mel if self.hears else None for v in views]
        heard = self.captions.states(v.audio_caption for v in views)
        seen = self.captions.states(v.image_caption for v in views)
        columns = ([v.pixels for v in views], mels, heard, seen)
        has = torch.tensor([[one is not None for one in row] for row in zip(*columns, strict=True)])
        return Batch(
            has=has.to(self.device),
            pixels=self._stack([v.pixels for v in images]),
            gsd_m=torch.tensor([v.gsd_m for v in images]).to(self.device),
            metadata=encode_facts([v.facts for v in images], self.fields, self.device),
            mel=self._stack(mels),
            audio_caption=self._tokens(heard),
            image_caption=self._tokens(seen),
        )

    def _stack(self, arrays: list[NDArray[np.uint8] | None] | list[NDArray[np.float32] | None]) -> Tensor:  # noqa: E501  # fmt: skip
        there = [one for one in arrays if one is not None]
        made = torch.from_numpy(np.stack(there)) if there else torch.empty(0)
        return made.to(self.device, non_blocking=True)

    def _tokens(self, states: list[NDArray[np.float32] | None]) -> Tensor:
        there = [one for one in states if one is not None]
        return (join(there) if there else torch.empty(0)).to(self.device)


def split(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into equal parts, row by row."""
    size = len(batch) // parts
    counts = batch.has.view(parts, size, 4).sum(1).tolist()
    done = [0] * 4
    result = []
    for part, numbers in enumerate(counts):
        image, audio, heard, seen = (slice(d, d + n) for d, n in zip(done, numbers, strict=True))
        result.append(
            replace(
                batch,
                has=batch.has[part * size : (part + 1) * size],
                pixels=batch.pixels[image],
                gsd_m=batch.gsd_m[image],
                metadata=batch.metadata.part(image.start, image.stop),
                mel=batch.mel[audio],
                audio_caption=batch.audio_caption[heard],
                image_caption=batch.image_caption[seen],
            )
        )
        done = [d + n for d, n in zip(done, numbers, strict=True)]
    return result

"""Samples that come as a stream, in the order of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch

from soundmap.errors import InputError
from soundmap.products.samples import Sample, StreamedSamples
from soundmap.train.batches import read_ahead, refuse_many
from soundmap.train.views import View, Viewer

_SHUFFLE = 5


class StreamFeeder:
    """Gives the views of a run over a stream, see `soundmap.train.batches.Feeder`.

    Samples are drawn from a buffer that the stream fills up: a pure function of the seed and the
    stream's order. To go on at a later step, what comes before is read again and left out.

    Parameters
    ----------
    samples
        The whole stream; each process takes its part.
    viewer
        Makes views.
    seed
        Of the run.
    batch
        Samples per process and step.
    rank, world
        Which process this is, of how many.
    workers
        Threads that make views. The stream itself is read by one.
    buffer
        Samples to draw from.
    most_bad
        Share of bad rows at which the run ends.
    """

    per_epoch = 0
    """Not known."""

    def __init__(
        self,
        samples: StreamedSamples,
        viewer: Viewer,
        seed: int,
        batch: int,
        rank: int,
        world: int,
        workers: int,
        buffer: int,
        most_bad: float,
    ) -> None:
        self.samples = samples.shard(world, rank) if world > 1 else samples
        self.viewer = viewer
        self.seed = seed
        self.batch = batch
        self.rank = rank
        self.buffer = buffer
        self.most_bad = most_bad
        self._pool = ThreadPoolExecutor(
            workers, "read", initializer=lambda: torch.set_num_threads(1)
        )

    def steps(self, start: int) -> Iterator[list[View]]:
        """Views of each step, from step ``start`` (from 0) on, without end."""
        return read_ahead(self._pool, self._jobs(start))

    def _jobs(self, start: int) -> Iterator[list[Callable[[], View]]]:
        samples = islice(self._samples(), start * self.batch, None)
        while True:
            yield [self._job(*next(samples)) for _ in range(self.batch)]

    def _job(self, sample: Sample, epoch: int, number: int) -> Callable[[], View]:
        return lambda: self.viewer.view(sample, self.seed, epoch, number)

    def _samples(self) -> Iterator[tuple[Sample, int, int]]:
        epoch = 0
        while True:
            rng = np.random.default_rng((self.seed, epoch, self.rank, _SHUFFLE))
            waiting: list[tuple[Sample, int]] = []
            number = -1
            for number, sample in enumerate(self.samples):
                refuse_many(self.samples.bad, self.most_bad)
                if len(waiting) < self.buffer:
                    waiting.append((sample, number))
                    continue
                chosen = int(rng.integers(len(waiting)))
                drawn, waiting[chosen] = waiting[chosen], (sample, number)
                yield drawn[0], epoch, drawn[1]
            if number < 0:
                raise InputError(f"{self.samples.name}: the stream holds no row that can be used")
            for chosen in rng.permutation(len(waiting)).tolist():
                yield waiting[chosen][0], epoch, waiting[chosen][1]
            epoch += 1

    def close(self) -> None:
        """Let the threads go."""
        self._pool.shutdown(wait=False, cancel_futures=True)

"""Judging a model on the way: its loss, and how well it finds what belongs together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from soundmap.nn.model import SoundModel
from soundmap.products.retrieval import Direction, match_ranks, retrieval
from soundmap.products.samples import StreamedSamples
from soundmap.train.batches import Collator, Rows, read_ahead
from soundmap.train.config import LossSettings, ValidationSettings
from soundmap.train.objective import (
    AUDIO,
    AUDIO_CAPTION,
    IMAGE,
    IMAGE_CAPTION,
    embed,
    hide_metadata,
    log_scales,
    objective,
)
from soundmap.train.processes import Processes, gather_objects
from soundmap.train.views import View, Viewer

_VALIDATION = 6
LOSS = "loss"


@dataclass(frozen=True)
class Validator:
    """Judges a model on held-out samples, which are shown the same way every time.

    Parameters
    ----------
    rows
        The samples; or a stream, with its viewer.
    collator
        Puts them together.
    settings, loss
        How.
    processes
        Who share the work: batches in turn.
    pool
        Threads that read.
    seed
        Of the run.
    """

    rows: Rows | tuple[StreamedSamples, Viewer]
    collator: Collator
    settings: ValidationSettings
    loss: LossSettings
    processes: Processes
    pool: ThreadPoolExecutor
    seed: int

    @torch.inference_mode()
    def figures(self, model: SoundModel, lower: bool) -> dict[str, float]:
        """Judge a model in evaluation mode.

        Returns
        -------
        dict
            "loss", the mean over batches; and per direction the paper's R@10% and median rank:
            "i2s" image to recording, "s2i" the other way, "i2st" and "st2i" with the caption added
            to the recording, "i2c" image to image caption. Directions with fewer than two rows
            are missing.
        """
        alone = Processes(0, 1, self.processes.device)
        mine = []
        for number, views in enumerate(self._batches()):
            if number % self.processes.world != self.processes.rank:
                continue
            batch = self.collator.collate(views)
            seed = (self.seed, _VALIDATION, number)
            share = self.settings.metadata_dropout if model.fuser is not None else 0.0
            batch = hide_metadata(batch, share, seed, alone)
            found = embed(model, batch, lower)
            mine.append((number, found.cpu().numpy(), batch.has.cpu().numpy()))
        every = [part for parts in gather_objects(mine, self.processes) for part in parts]
        every.sort(key=lambda part: part[0])
        scales = {k: v.detach().cpu() for k, v in log_scales(model).items()}
        total, rows = 0.0, 0
        for _, found, has in every:
            made = objective(torch.from_numpy(found), torch.from_numpy(has), scales, self.loss)
            if made.total is not None:
                total += float(made.total) * len(has)
                rows += len(has)
        vectors = np.concatenate([part[1] for part in every])
        has = np.concatenate([part[2] for part in every])
        return ({LOSS: total / rows} if rows else {}) | retrieval_figures(vectors, has)

    def _batches(self) -> Iterator[list[View]]:
        """All views in order; those of other processes are not read where they need not be."""
        size = self.settings.batch
        if isinstance(self.rows, Rows):
            rows = self.rows
            count = min(len(rows), self.settings.limit or len(rows))
            chosen = np.linspace(0, len(rows), count, endpoint=False).astype(int).tolist()

            def job(index: int) -> Callable[[], View]:
                return lambda: rows.view(0, index)

            lists: Iterator[list[Callable[[], View]]] = (
                [job(i) for i in chosen[start : start + size]]
                if start // size % self.processes.world == self.processes.rank
                else []
                for start in range(0, count, size)
            )
            yield from read_ahead(self.pool, lists)
            return
        samples, viewer = self.rows
        kept = enumerate(islice(samples, self.settings.limit or None))
        while part := list(islice(kept, size)):
            yield [viewer.view(sample, self.seed, 0, number) for number, sample in part]


def retrieval_figures(vectors: np.ndarray, has: np.ndarray) -> dict[str, float]:
    """Figures of retrieval, see `Validator.figures`.

    Parameters
    ----------
    vectors
        float[N, 4, D], by `soundmap.train.batches.MODALITIES`.
    has
        bool[N, 4].
    """
    result: dict[str, float] = {}

    def tell(name: str, direction: Direction) -> None:
        result[f"{name}_recall"] = direction.recall
        result[f"{name}_median_rank"] = direction.median_rank

    pairs = has[:, IMAGE] & has[:, AUDIO]
    if pairs.sum() > 1:
        both = retrieval(vectors[pairs, IMAGE], vectors[pairs, AUDIO])
        tell("i2s", both.image_to_sound)
        tell("s2i", both.sound_to_image)
    told = pairs & has[:, AUDIO_CAPTION]
    if told.sum() > 1:
        image, sound, caption = (vectors[told, c] for c in (IMAGE, AUDIO, AUDIO_CAPTION))
        both = retrieval(image, sound, caption, "audio")
        tell("i2st", both.image_to_sound)
        tell("st2i", both.sound_to_image)
    described = has[:, IMAGE] & has[:, IMAGE_CAPTION]
    if described.sum() > 1:
        ranks = match_ranks(vectors[described, IMAGE], vectors[described, IMAGE_CAPTION])
        tell("i2c", Direction(ranks))
    return result

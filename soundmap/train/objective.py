"""The objective of Sat2Sound over whatever modalities the samples of a batch have.

Of arXiv 2505.13777 (SPEC 9), with i image and its metadata, a recording, t its caption, c the
image's caption, and L the loss of a pair (`soundmap.train.losses.pair_loss`):

    (L(i, t) + L(a, t) + L(i, a)) / 3  +  L(i, a + t)  +  weight L(i, c)

A term is taken over the rows that have both of its sides. One with fewer than two such rows has
nothing to contrast: it is left out, and the others keep their weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from soundmap.nn.metadata import FIELDS, Metadata
from soundmap.nn.model import SoundModel
from soundmap.train.batches import Batch, split
from soundmap.train.config import LossSettings
from soundmap.train.losses import pair_logits, pair_loss
from soundmap.train.processes import Processes, gather

IMAGE, AUDIO, AUDIO_CAPTION, IMAGE_CAPTION = range(4)
TERMS = ("it", "at", "ia", "i_at", "fdt")
_FORWARD = 3
_HIDE = 4


@dataclass(frozen=True)
class Objective:
    """The loss of a batch."""

    total: Tensor | None
    """Scalar with its gradient; None where no term is left."""
    terms: Mapping[str, float]
    """Value of each term before its weight, by `TERMS`; those left out are missing."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Terms that had fewer than two rows."""
        return tuple(name for name in TERMS if name not in self.terms)


def log_scales(model: SoundModel) -> dict[str, Tensor]:
    """Logarithms of the learned scales by term; a model without sound has one for both of its."""
    if model.config.audio:
        return {"it": model.logit_scale, **model.scales}
    return {"it": model.logit_scale, "fdt": model.logit_scale}


def objective(
    embeddings: Tensor, has: Tensor, scales: Mapping[str, Tensor], settings: LossSettings
) -> Objective:
    """The objective over rows that need not have all modalities.

    Parameters
    ----------
    embeddings
        float[B, 4, D] by `soundmap.train.batches.MODALITIES`, not normalised.
    has
        bool[B, 4].
    scales
        See `log_scales`; terms without a scale are left out.
    settings
        Weights.
    """
    image, audio, heard, seen = embeddings.unbind(1)
    sides: dict[str, tuple[Tensor, Tensor, tuple[int, ...], float]] = {
        "it": (image, heard, (IMAGE, AUDIO_CAPTION), 1 / 3),
        "at": (audio, heard, (AUDIO, AUDIO_CAPTION), 1 / 3),
        "ia": (image, audio, (IMAGE, AUDIO), 1 / 3),
        # Added as they are: the longer of the two weighs more.
        "i_at": (image, audio + heard, (IMAGE, AUDIO, AUDIO_CAPTION), float(settings.combined)),
        "fdt": (image, seen, (IMAGE, IMAGE_CAPTION), settings.fdt_weight),
    }
    total: Tensor | None = None
    terms = {}
    for name, (a, b, needed, weight) in sides.items():
        rows = has[:, list(needed)].all(1)
        if not weight or name not in scales or int(rows.sum()) < 2:
            continue
        loss = pair_loss(pair_logits(a[rows], b[rows], scales[name]), settings.alpha)
        terms[name] = loss
        total = weight * loss if total is None else total + weight * loss
    return Objective(total, {name: float(loss.detach()) for name, loss in terms.items()})


def embed(model: SoundModel, batch: Batch, lower: bool = False) -> Tensor:
    """Embed a batch: float32[B, 4, D], not normalised, zero where a row lacks the modality.

    Parameters
    ----------
    model
        In training mode no metadata token is set to zero after the fuser, as in the published
        training; in evaluation mode it is as where maps are made, see
        `soundmap.nn.metadata.MetadataFuser`.
    batch
        On the model's device.
    lower
        Whether the towers compute in bfloat16. The codebook always computes in float32: with a
        temperature of 1000 logits differ by less than bfloat16 can tell.
    """
    book = model.codebook

    def pooled(queries: Tensor) -> Tensor:
        return book.mix(book.largest(queries.float()))

    def towers() -> torch.autocast:
        return torch.autocast(batch.has.device.type, torch.bfloat16, enabled=lower)

    result = torch.zeros(len(batch), 4, model.config.dim, device=batch.has.device)
    if len(batch.pixels):
        with towers():
            queries = _image_queries(model, batch)
        result = _put(result, IMAGE, batch, pooled(queries))
    if len(batch.mel):
        assert model.audio is not None
        with towers():
            queries = model.audio.queries(batch.mel)
        result = _put(result, AUDIO, batch, pooled(queries))
    for column, tokens in ((AUDIO_CAPTION, batch.audio_caption), (IMAGE_CAPTION, batch.image_caption)):  # noqa: E501  # fmt: skip
        if len(tokens):
            with towers():
                queries = model.text_query(tokens)
            result = _put(result, column, batch, pooled(queries))
    return result


def _put(result: Tensor, column: int, batch: Batch, rows: Tensor) -> Tensor:
    place = torch.nonzero(batch.has[:, column])[:, 0]
    return result.index_put((place, torch.full_like(place, column)), rows.float())


def _image_queries(model: SoundModel, batch: Batch) -> Tensor:
    grid = model.embed(batch.pixels)
    if model.fuser is None or not model.training:
        return model.queries(grid, batch.gsd_m, metadata=batch.metadata)
    tokens = model.tokens(grid, batch.gsd_m)
    extra, valid = model.fuser.tokens(batch.metadata, tokens)
    out: Tensor = model.image_query(model.fuser.mix(tokens, extra, valid))
    return out


def backward(
    model: SoundModel,
    batch: Batch,
    settings: LossSettings,
    processes: Processes,
    *,
    parts: int = 1,
    lower: bool = False,
    seed: tuple[int, ...] = (),
) -> Objective:
    """Compute the objective of a batch and add its gradient to the weights'.

    All rows of all processes are contrasted with each other. A batch that does not fit into memory
    goes through the network in parts: once without gradients, for the embeddings of all; then the
    gradient of the loss by each embedding is found; then once more, part by part, to hand these on
    to the weights (Gao et al. 2021, arXiv 2101.06983). So the loss is that of the whole batch,
    where averaging the losses of parts would contrast each row with its own part alone. It costs
    one more pass. Batch norms take the statistics of each part by itself.

    Parameters
    ----------
    model
        In training mode. Gradients are added, so they are to be cleared before.
    batch
        This process's rows; equally many in each.
    settings
        Weights of the terms.
    processes
        Whose rows are joined. Gradients are not yet averaged over them.
    parts
        How many the batch is cut into; divides its length.
    lower
        See `embed`.
    seed
        Of whatever the network draws at random, the same for both passes over a part.
    """
    device = batch.has.device
    has = gather(batch.has, processes)

    def run(number: int, part: Batch) -> Tensor:
        key = np.random.SeedSequence((*seed, _FORWARD, processes.rank, number))
        torch.manual_seed(int(key.generate_state(1)[0]))
        return embed(model, part, lower)

    if parts == 1:
        found = objective(gather(run(0, batch), processes), has, log_scales(model), settings)
        if found.total is not None:
            found.total.backward()
        return found
    cut = split(batch, parts)
    statistics = [(b, b.clone()) for b in model.buffers()]
    with torch.no_grad():
        first = torch.cat([run(i, part) for i, part in enumerate(cut)])
        for buffer, before in statistics:
            buffer.copy_(before)
    first.requires_grad_()
    found = objective(gather(first, processes), has, log_scales(model), settings)
    if found.total is None:
        return found
    found.total.backward()
    assert first.grad is not None
    for i, (part, grad) in enumerate(zip(cut, first.grad.chunk(parts), strict=True)):
        made = run(i, part)
        if made.requires_grad:
            made.backward(grad.to(device))
    return found


def hide_metadata(batch: Batch, share: float, seed: tuple[int, ...], processes: Processes) -> Batch:
    """Hide each field of metadata for a share of the images of all processes.

    ``int(share * images)`` are without it in the end, those that have none to begin with included;
    which, is drawn for each field by itself (SPEC 4).
    """
    # All processes must send tables of one shape, and those without an image know no fields.
    names = FIELDS if processes.world > 1 else tuple(batch.metadata.valid)
    if not share or not names:
        return batch
    images = batch.has[:, IMAGE]
    table = torch.zeros(len(batch), len(names) + 1, dtype=torch.bool, device=images.device)
    table[:, 0] = images
    for column, name in enumerate(names, 1):
        if name in batch.metadata.valid:
            table[images, column] = batch.metadata.valid[name]
    every = gather(table, processes).cpu().numpy()
    rows = np.flatnonzero(every[:, 0])
    start = processes.rank * len(batch)
    kept = {}
    for column, name in enumerate(names, 1):
        rng = np.random.default_rng((*seed, _HIDE, FIELDS.index(name)))
        valid = every[:, column].copy()
        valid[rows] = dropped(every[rows, column], share, rng)
        own = torch.from_numpy(valid[start : start + len(batch)]).to(images.device)
        if name in batch.metadata.valid:
            kept[name] = own[images]
    return replace(batch, metadata=Metadata(batch.metadata.values, kept))


def dropped(valid: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Hide some more of what is there, so that ``int(share * B)`` are hidden: bool[B] to bool[B].

    Where as many or more are missing already, nothing changes.
    """
    more = int(share * len(valid)) - int((~valid).sum())
    kept = valid.copy()
    if more > 0:
        kept[rng.permutation(np.flatnonzero(valid))[:more]] = False
    return kept

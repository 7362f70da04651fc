"""The objective of the bundled model, term by term, for one step."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundmap.nn.model import SoundModel
from soundmap.train.augment import gaps, hide, patchwork, recolour, sharpen, veil
from soundmap.train.clips import vary
from soundmap.train.feed import Batch, Clips, Diet, Heard, draw_clips
from soundmap.train.losses import (
    agreement_loss,
    caption_loss,
    class_loss,
    match_loss,
    pair_logits,
    phrase_loss,
    spread_loss,
    steady_loss,
)

WEIGHTS = {
    "caption": 1.0,
    "phrase": 2.0,
    "patch": 0.25,
    "patch_phrase": 0.5,
    "label": 1.0,
    "agree": 0.25,
    "spread": 0.02,
    "clip_caption": 0.5,
    "clip_phrase": 1.0,
    "clip_label": 0.5,
    "it": 1 / 6,
    "at": 1 / 6,
    "ia": 1 / 6,
    "i_at": 1 / 2,
    "hears": 0.5,
}
"""Of the terms. The four before the last are those of the published objective at half their weight,
whose fifth, image with image caption, is "caption"."""

VIEWS = ("steady", "sharp")
"""Terms that hold patches to what they are without haze: images as they are fed, and some of them
stretched and grainy, of whose labels nothing is learnt. Each is computed where it has a weight."""

STEM_WEIGHTS = {"label": 1.0}


class Heads(nn.Module):
    """Scales, offsets and class heads of the losses; they shape training and are then dropped.

    The class heads give the towers a straight path to the labels while the codebook is still
    finding its codes.
    """

    def __init__(self, dim: int, width: int, classes: dict[str, int], clips: int = 0) -> None:
        super().__init__()
        self.classes = nn.ModuleDict({name: nn.Linear(dim, n) for name, n in classes.items()})
        self.stem = nn.ModuleDict(
            {n: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, c)) for n, c in classes.items()}
        )
        self.clips = nn.Linear(dim, clips) if clips else None
        self.phrase_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.phrase_bias = nn.Parameter(torch.tensor(-4.0))


@dataclass(frozen=True)
class Shares:
    """How much of a batch is looked at patch by patch."""

    patchwork: float = 0.25
    """Part of each data set's images that is also seen as patchwork, in another light."""
    patches: int = 12
    """Patches of an image that are judged by themselves."""
    veiled: float = 0.45
    """Part of each data set's images that is also seen through haze, in phases that ask for it."""
    cut: float = 0.5
    """Part of those that are cut off somewhere, as at the edge of imagery."""
    beyond_rgb: tuple[int, int, int] = (0, 0, 0)
    """What stands for what lies beyond imagery."""
    hidden: float = 0.08
    """Part of the images of which a piece is blanked."""


def stem_terms(
    model: SoundModel, heads: Heads, diets: list[Diet], batch: Batch, rng: torch.Generator
) -> dict[str, Tensor]:
    """Compute the loss of the convolutions alone: what class they see, on average."""
    grid = _embed(model, recolour(batch.pixels, rng))
    mean = grid.mean((2, 3))
    losses = [
        F.cross_entropy(heads.stem[d.data.name](mean[part]), batch.labels[part])
        for d, part in zip(diets, batch.parts, strict=True)
    ]
    return {"label": _share(losses, batch)}


def _embed(model: SoundModel, pixels: Tensor) -> Tensor:
    return model.embed(pixels.contiguous(memory_format=torch.channels_last))


def _share(losses: list[Tensor], batch: Batch) -> Tensor:
    """Add up by data set, a small one counting more than its size alone would give it."""
    total = len(batch.labels)
    weights = [((part.stop - part.start) / total) ** 0.5 for part in batch.parts]
    return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum()


def _single(
    model: SoundModel, grid: Tensor, whole: Tensor | None, gsd: Tensor, place: Tensor
) -> Tensor:
    """Queries of some patches as a map has them: float[B, n, D] at int64[B, n]."""
    if not model.config.local_patches:
        whole = model.queries(grid, gsd) if whole is None else whole
        return whole.gather(1, place[..., None].expand(-1, -1, whole.shape[-1]))
    some = grid.flatten(2).gather(2, place[:, None].expand(-1, grid.shape[1], -1))
    return model.queries(some[..., None], gsd, True)


def step_terms(
    model: SoundModel,
    heads: Heads,
    diets: list[Diet],
    clips: Clips | None,
    batch: Batch,
    shares: Shares,
    rng: torch.Generator,
    views: Collection[str] = (),
) -> dict[str, Tensor]:
    """Compute all terms of one step.

    Parameters
    ----------
    model, heads
        What learns.
    diets, clips
        What the batch was drawn from, for its texts; and the clips to draw, if any.
    batch
        Images.
    shares
        How much is looked at patch by patch.
    rng
        Where chance comes from.
    views
        Which of `VIEWS` to compute, "sharp" beside "steady" alone.

    Returns
    -------
    dict
        Term -> scalar, not weighted.
    """
    pixels = hide(recolour(batch.pixels, rng), shares.hidden, rng)
    clean = _some(batch, shares.veiled if views else 0.0)
    # Half of them as they are, which is how maps are read; the same through haze is to mean the
    # same. What lies beyond the imagery stays as it is.
    missing = gaps(len(clean), pixels.shape[-1], shares.cut, rng)
    beyond = torch.tensor(shares.beyond_rgb, dtype=pixels.dtype)[:, None, None]
    before_haze = batch.pixels[clean]
    before_haze[::2] = recolour(before_haze[::2], rng)
    pixels[clean] = torch.where(missing, beyond, before_haze)
    quilts = _quilts(model, batch, shares, rng)
    every = _embed(model, torch.cat([pixels, quilts.pixels]))
    grid, quilt_grid = every[: len(pixels)], every[len(pixels) :]
    whole = model.queries(grid, batch.gsd_m)
    logits = model.codebook.logits(whole)
    largest = logits.amax(-2)
    raw = model.codebook.mix(largest)
    image = F.normalize(raw, dim=-1)

    count = grid.shape[2] * grid.shape[3]
    places = torch.randint(0, count, (len(pixels), shares.patches), generator=rng)
    single = _single(model, grid, whole, batch.gsd_m, places)
    patches = model.codebook.each(single)

    chosen = torch.randint(0, count, (len(quilts.pixels), shares.patches), generator=rng)
    pieces_queries = _single(model, quilt_grid, None, quilts.gsd_m, chosen)
    pieces = model.codebook.each(pieces_queries)
    origin, origin_place = quilts.image.gather(1, chosen), quilts.patch.gather(1, chosen)
    with torch.no_grad():
        before = _origin(model, grid, whole, batch, origin, origin_place)

    texts = _texts(model, diets, clips, rng)
    scale, p_scale, p_bias = model.logit_scale.exp(), heads.phrase_scale.exp(), heads.phrase_bias
    patch_scale = model.scales["fdt"].exp() if model.config.audio else scale
    terms: dict[str, list[Tensor]] = {}

    def add(name: str, value: Tensor) -> None:
        terms.setdefault(name, []).append(value)

    for diet, part, captions in zip(diets, batch.parts, texts.captions, strict=True):
        name, labels = diet.data.name, batch.labels[part]
        audible = diet.phrases.audible
        own = (origin[:, 0] >= part.start) & (origin[:, 0] < part.stop)
        theirs = batch.labels[origin[own]]
        spots = labels[:, None].expand(-1, shares.patches)
        head = heads.classes[name]
        add("caption", caption_loss(image[part], captions, labels, scale))
        add("phrase", phrase_loss(image[part], texts.prompts, audible[labels], p_scale, p_bias))
        add(
            "patch",
            caption_loss(patches[part], captions, spots, patch_scale)
            + caption_loss(pieces[own], captions, theirs, patch_scale),
        )
        add(
            "patch_phrase",
            phrase_loss(patches[part], texts.prompts, audible[labels][:, None], p_scale, p_bias)
            + phrase_loss(pieces[own], texts.prompts, audible[theirs], p_scale, p_bias),
        )
        add(
            "label",
            F.cross_entropy(heads.stem[name](grid[part].mean((2, 3))), labels)
            + F.cross_entropy(head(whole[part].mean(1)), labels)
            + F.cross_entropy(head(single[part].mean(1)), labels)
            + 0.5 * F.cross_entropy(head(pieces_queries[own]).flatten(0, 1), theirs.flatten()),
        )
        add("agree", agreement_loss(pieces[own], before[own]))
        add("spread", spread_loss(logits[part]).mean())
    result = {name: _share(values, batch) for name, values in terms.items()}
    phrases = texts.prompts.detach().T

    def seen(view: Tensor, of: Tensor) -> Tensor:
        """Tell how similar the patches drawn of images are to the phrases in another view."""
        queries = _single(model, _embed(model, view), None, batch.gsd_m[of], places[of])
        return model.codebook.each(queries) @ phrases

    if "steady" in views:
        hazy = torch.where(missing, beyond, veil(before_haze, rng))
        result["steady"] = steady_loss(patches[clean] @ phrases, seen(hazy, clean))
    if "sharp" in views:
        some, edge = clean[1::2], missing[1::2]
        sharp = sharpen(before_haze[1::2], rng)
        views_of = [torch.where(edge, beyond, x) for x in (sharp, veil(sharp, rng))]
        before_it, after = seen(torch.cat(views_of), some.repeat(2)).chunk(2)
        result["sharp"] = steady_loss(before_it, after)
    if clips is not None:
        heard = draw_clips(clips, diets, batch, rng)
        result |= _clip_terms(model, heads, clips, heard, raw, texts, rng)
    return result


def _some(batch: Batch, share: float) -> Tensor:
    """Choose the first images of each data set, more of a small one: int64[n]."""
    parts = [torch.arange(part.start, part.stop) for part in batch.parts]
    most = max(len(part) for part in parts)
    shares = [min(1.0, share * (most / max(1, len(part))) ** 0.5) for part in parts]
    return torch.cat([p[: round(len(p) * s)] for p, s in zip(parts, shares, strict=True)])


@dataclass(frozen=True)
class _Quilts:
    pixels: Tensor
    gsd_m: Tensor
    image: Tensor
    """int64[Q, N], of the batch."""
    patch: Tensor


def _quilts(model: SoundModel, batch: Batch, shares: Shares, rng: torch.Generator) -> _Quilts:
    """Piece windows together within groups of one GSD, in another light than the batch's."""
    made = []
    for part in batch.parts:
        group = next(g for g in batch.groups if g.start == part.start)
        most = group.stop - group.start
        count = min(most, max(2, int((part.stop - part.start) * shares.patchwork)))
        images = batch.pixels[group.start : group.start + count]
        quilt = patchwork(recolour(images, rng), model.config.vit.patch_px, rng)
        gsd = batch.gsd_m[group.start : group.start + count]
        made.append(_Quilts(quilt.pixels, gsd, quilt.image + group.start, quilt.patch))
    names = ("pixels", "gsd_m", "image", "patch")
    return _Quilts(*(torch.cat([getattr(q, name) for q in made]) for name in names))


def _origin(
    model: SoundModel, grid: Tensor, whole: Tensor, batch: Batch, image: Tensor, place: Tensor
) -> Tensor:
    """What the model says of patches where they came from: float[Q, n, D]."""
    if not model.config.local_patches:
        return model.codebook.each(whole[image, place])
    tokens = grid.flatten(2).transpose(1, 2)[image, place]
    queries = model.queries(tokens.transpose(1, 2)[..., None], batch.gsd_m[image[:, 0]], True)
    return model.codebook.each(queries)


@dataclass(frozen=True)
class _Texts:
    captions: list[Tensor]
    """Of each data set's classes: float[classes, D], unit vectors."""
    prompts: Tensor
    clip_captions: Tensor
    """Not normalised."""


def _texts(
    model: SoundModel, diets: list[Diet], clips: Clips | None, rng: torch.Generator
) -> _Texts:
    drawn = [d.phrases.draw_captions(rng) for d in diets]
    drawn.append(diets[0].phrases.draw_prompts(rng))
    if clips is not None:
        drawn.append(clips.phrases.draw_captions(rng))
    raw = model.codebook.mix(model.codebook.largest(model.text_query(torch.cat(drawn))))
    parts = list(raw.split([len(d) for d in drawn]))
    last = parts.pop() if clips is not None else raw[:0]
    *captions, prompts = (F.normalize(p, dim=-1) for p in parts)
    return _Texts(captions, prompts, last)


def _clip_terms(
    model: SoundModel,
    heads: Heads,
    clips: Clips,
    heard: Heard,
    images: Tensor,
    texts: _Texts,
    rng: torch.Generator,
) -> dict[str, Tensor]:
    """Clips with their captions, concepts and classes; and with the images they are audible in."""
    assert model.audio is not None
    assert heads.clips is not None
    labels = clips.clips.labels[heard.rows]
    queries = model.audio.queries(vary(clips.clips, heard.rows, clips.how, rng))
    raw = model.codebook.mix(model.codebook.largest(queries))
    audio, captions = F.normalize(raw, dim=-1), F.normalize(texts.clip_captions, dim=-1)
    p_scale, p_bias = heads.phrase_scale.exp(), heads.phrase_bias
    at = model.scales["at"]
    terms = {
        "clip_caption": caption_loss(audio, captions, labels, at.exp()),
        "clip_phrase": phrase_loss(
            audio, texts.prompts, clips.phrases.audible[labels], p_scale, p_bias
        ),
        "clip_label": F.cross_entropy(heads.clips(queries.mean(1)), labels),
    }
    pairs = len(heard.images)
    image, sound, kinds = images[heard.images], raw[:pairs], labels[:pairs]
    caption = texts.clip_captions[kinds]
    same = kinds[:, None] == kinds[None]
    every = pair_logits(images, raw, model.scales["ia"])
    terms["hears"] = match_loss(every, heard.audible)
    if pairs > 1:
        terms |= {
            "it": class_loss(pair_logits(image, caption, model.logit_scale), heard.match),
            "at": class_loss(pair_logits(sound, caption, at), same),
            "ia": class_loss(pair_logits(image, sound, model.scales["ia"]), heard.match),
            "i_at": class_loss(
                pair_logits(image, sound + caption, model.scales["i_at"]), heard.match
            ),
        }
    return terms

"""A picture of a map for readers: panels of some concepts, and the strongest one everywhere."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from soundmap.errors import OutputError, UsageError
from soundmap.stores.qml import DIVERGING_RAMP, RAMP

_INK = (32, 33, 36)
_FAINT = (110, 113, 118)
_NO_DATA = (226, 228, 231)
_FRAME = (190, 193, 198)

_MARGIN = 36
_GAP = 26
_PANEL = 330
_CAPTION = 38
_MOST_PANELS = 6
_MOST_NAMES = 12

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class _Panel:
    caption: str
    image: Image.Image


def render_png(
    values: NDArray[np.float32],
    names: Sequence[str],
    colours: Sequence[str],
    target: str | Path,
    imagery: NDArray[np.uint8] | None = None,
    title: str = "",
    panels: tuple[str, ...] | None = None,
    value: str = "probability",
) -> Path:
    """Draw a map as a PNG.

    Parameters
    ----------
    values
        float32[C, h, w], NaN where there is no value.
    names, colours
        Name and "#rrggbb" of each concept.
    target
        The PNG to write.
    imagery
        uint8[3, H, W] of the same ground, shown first.
    title
        A line above all.
    panels
        Names of the concepts to show; by default up to six, those that are strongest over the
        largest area, each in its own panel on one fixed scale.
    value
        What the numbers are: "probability", "share" or "similarity".

    Raises
    ------
    UsageError
        A panel names no concept of the map, or the arguments do not fit each other.
    OutputError
        The file could not be written.
    """
    if values.ndim != 3 or len(names) != len(values) or len(colours) != len(values):
        raise UsageError(
            f"values of shape {values.shape} given with {len(names)} names "
            f"and {len(colours)} colours: one of each is needed per concept"
        )
    unknown = [name for name in panels or () if name not in names]
    if unknown:
        raise UsageError(f"the map holds no concept {unknown[0]!r}: it holds {', '.join(names)}")

    strongest, areas = _strongest(values)
    chosen = panels if panels is not None else _default_panels(values, names, areas)
    low, ramp = (-1.0, DIVERGING_RAMP) if value == "similarity" else (0.0, RAMP)
    size = _panel_size(values.shape[1:])

    shown = []
    if imagery is not None:
        shown.append(_Panel("imagery", _fit_imagery(imagery, size)))
    if len(values) > 1:
        shown.append(_Panel("strongest sound", _fit_classes(strongest, colours, size)))
    for name in chosen:
        plane = values[list(names).index(name)]
        shown.append(_Panel(_plain(name), _fit_values(plane, low, ramp, size)))

    order = [index for index in np.argsort(-areas, kind="stable") if areas[index] > 0]
    legend = [(_plain(names[i]), colours[i], float(areas[i] / strongest.size)) for i in order]
    missing = 1 - float(areas.sum() / strongest.size)
    entries = _entries(legend, missing) if len(values) > 1 else []
    page = _page(shown, size, entries, _plain(title) if title else "", value, low, ramp)
    target = Path(target)
    try:
        page.save(target, format="PNG", optimize=True)
    except OSError as error:
        raise OutputError(f"{target}: could not be written ({error.strerror or error})") from error
    return target


def _strongest(values: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    # -1 where there is no value; and the number of cells in which each concept is strongest.
    valid = np.isfinite(values).any(axis=0)
    best = np.where(np.isfinite(values), values, -np.inf).argmax(axis=0)
    best = np.where(valid, best, -1)
    return best, np.bincount(best[valid], minlength=len(values))


def _default_panels(
    values: NDArray[np.float32], names: Sequence[str], areas: NDArray[np.int64]
) -> tuple[str, ...]:
    finite = np.where(np.isfinite(values), values, 0.0)
    spread = finite.reshape(len(values), -1).std(axis=1)
    order = sorted(range(len(names)), key=lambda i: (-int(areas[i]), -float(spread[i])))
    return tuple(names[i] for i in order[:_MOST_PANELS])


def _panel_size(shape: tuple[int, ...]) -> tuple[int, int]:
    # Panels of about the same area whatever their proportions, within limits.
    height, width = shape
    stretch = min(max(math.sqrt(width / height), 0.6), 1.6)
    scale = min(_PANEL * stretch / width, _PANEL / stretch / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    # Whole cells stay visible when enlarged, and are averaged when there are more than pixels.
    larger = size[0] >= image.width
    return image.resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.BOX)


def _fit_imagery(imagery: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(imagery.transpose(1, 2, 0)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _fit_classes(
    classes: NDArray[np.int64], colours: Sequence[str], size: tuple[int, int]
) -> Image.Image:
    table = np.array([*(_rgb(colour) for colour in colours), _NO_DATA], dtype=np.uint8)
    return _fit(Image.fromarray(table[classes]), size)


def _fit_values(
    plane: NDArray[np.float32], low: float, ramp: Sequence[str], size: tuple[int, int]
) -> Image.Image:
    valid = np.isfinite(plane)
    weight = np.asarray(_fit(Image.fromarray(valid.astype(np.float32)), size))
    total = np.asarray(_fit(Image.fromarray(np.where(valid, plane, 0).astype(np.float32)), size))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / weight
    table = _table(ramp)
    place = np.nan_to_num((mean - low) / (1.0 - low)) * 255
    pixels = table[np.clip(np.rint(place), 0, 255).astype(int)]
    pixels[weight < 0.5] = _NO_DATA
    return Image.fromarray(pixels)


def _table(ramp: Sequence[str]) -> NDArray[np.uint8]:
    stops = np.array([_rgb(colour) for colour in ramp], dtype=float)
    at = np.linspace(0, len(stops) - 1, 256)
    channels = [np.interp(at, np.arange(len(stops)), stops[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)


def _page(
    shown: Sequence[_Panel],
    size: tuple[int, int],
    entries: Sequence[tuple[str, str]],
    title: str,
    value: str,
    low: float,
    ramp: Sequence[str],
) -> Image.Image:
    columns = min(len(shown), 4 if size[0] <= 400 else 3)
    rows = -(-len(shown) // columns)
    grid_width = columns * size[0] + (columns - 1) * _GAP
    grid_height = rows * (size[1] + _CAPTION) + (rows - 1) * _GAP
    head = 74 if title else 0
    names = _font(20)
    cell = max([200, *(round(names.getlength(text)) for text, _ in entries)]) + 52
    width = 2 * _MARGIN + grid_width + 118
    per_row = max(1, (width - 2 * _MARGIN) // cell)
    foot = 62 + 34 * -(-len(entries) // per_row) if entries else 0

    page = Image.new("RGB", (width, 2 * _MARGIN + head + grid_height + foot), "white")
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((_MARGIN, _MARGIN - 6), _elided(title, _font(36), width), _INK, _font(36))
    top = _MARGIN + head
    for index, panel in enumerate(shown):
        left = _MARGIN + (index % columns) * (size[0] + _GAP)
        y = top + (index // columns) * (size[1] + _CAPTION + _GAP)
        caption = _elided(panel.caption, _font(23), size[0])
        draw.text((left, y), caption, _INK, _font(23))
        page.paste(panel.image, (left, y + _CAPTION))
        box = (left - 1, y + _CAPTION - 1, left + size[0], y + _CAPTION + size[1])
        draw.rectangle(box, outline=_FRAME)
    bar_left = _MARGIN + grid_width + 30
    _draw_bar(page, draw, (bar_left, top + _CAPTION), size[1], value, low, ramp)
    if entries:
        _draw_legend(draw, entries, top + grid_height + 24, cell, per_row)
    return page


def _entries(legend: Sequence[tuple[str, str, float]], missing: float) -> list[tuple[str, str]]:
    # Text and colour of what the legend lists: sounds by falling area, then the rest.
    entries = [(f"{name}  {_percent(share)}", colour) for name, colour, share in legend]
    rest = sum(share for _, _, share in legend[_MOST_NAMES:])
    if rest:
        entries[_MOST_NAMES:] = [(f"{len(legend) - _MOST_NAMES} more  {_percent(rest)}", "#ffffff")]
    if missing > 0:
        entries.append((f"no data  {_percent(missing)}", "#{:02x}{:02x}{:02x}".format(*_NO_DATA)))
    return entries


def _percent(share: float) -> str:
    return "<1 %" if share < 0.01 else f"{100 * share:.0f} %"


def _draw_bar(
    page: Image.Image,
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    height: int,
    value: str,
    low: float,
    ramp: Sequence[str],
) -> None:
    left, top = corner
    strip = _table(ramp)[::-1, None, :]
    bar = Image.fromarray(np.ascontiguousarray(strip)).resize((22, height))
    page.paste(bar, corner)
    draw.rectangle((left - 1, top - 1, left + 22, top + height), outline=_FRAME)
    for step in range(5):
        y = top + height - round(step * height / 4)
        number = f"{low + (1 - low) * step / 4:.2f}".rstrip("0").rstrip(".")
        draw.line((left + 22, y, left + 28, y), fill=_FAINT)
        draw.text((left + 34, y), number, _INK, _font(19), anchor="lm")
    draw.text((left, top - 10), value, _FAINT, _font(19), anchor="lb")


def _draw_legend(
    draw: ImageDraw.ImageDraw,
    entries: Sequence[tuple[str, str]],
    top: int,
    cell: int,
    per_row: int,
) -> None:
    draw.text((_MARGIN, top), "strongest sound, by area", _FAINT, _font(20))
    for index, (text, colour) in enumerate(entries):
        x = _MARGIN + (index % per_row) * cell
        y = top + 38 + (index // per_row) * 34
        draw.rounded_rectangle((x, y, x + 20, y + 20), 4, fill=_rgb(colour), outline=_FRAME)
        draw.text((x + 30, y + 10), text, _INK, _font(20), anchor="lm")


def _elided(text: str, font: Font, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _plain(text: str) -> str:
    # Pillow's own font draws boxes for letters with accents.
    bare = unicodedata.normalize("NFKD", text)
    return bare.encode("ascii", "ignore").decode() or "?"


def _font(size: int) -> Font:
    return ImageFont.load_default(size=size)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)

"""Captions of what one would hear at the place of an image, by a vision-language model.

Sat2Sound is trained with such captions of its images (SPEC of the model, section 14). They say
what a model expects to be heard there, not what was heard.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from soundmap.errors import InputError, ModelError, SoundmapError, UsageError
from soundmap.grid import pixel_lonlat
from soundmap.products.caption_model import DEFAULT_VLM, PRECISIONS, QUESTION, Captioner
from soundmap.products.caption_parquet import HeldPictures, held_pictures
from soundmap.products.caption_table import (
    PARQUET,
    Caption,
    CaptionTable,
    Key,
    require_parquet,
)
from soundmap.sources import open_source
from soundmap.sources.base import Source

__all__ = ["DEFAULT_VLM", "QUESTION", "CaptionListener", "CaptionRequest", "Summary", "caption"]

_SUFFIXES = "avif bmp gif jp2 jpeg jpg png tif tiff webp"

PICTURES = frozenset("." + name for name in _SUFFIXES.split())
"""What counts as a picture in a folder."""

_READERS = 4


@dataclass(frozen=True)
class CaptionRequest:
    """What to caption, how, and where the table goes."""

    images: str
    """A picture, a folder (not its subfolders) or glob of pictures, or a table (CSV, Parquet)
    with a column ``image``; with ``windows``, a raster or what else `open_source` takes."""
    out: Path
    """The table: ``.csv`` or ``.parquet``."""
    model: str = DEFAULT_VLM
    """A repository of the hub, or a folder."""
    prompt: str = QUESTION
    tokens: int = 77
    """Most new tokens of a caption."""
    crop: int | None = None
    """Side of the square in the middle of every picture that is shown; None shows it whole."""
    windows: int | None = None
    """Side of the windows that a raster is cut into, in its own pixels."""
    bands: tuple[int, ...] | None = None
    rescale: tuple[float, float] | None = None
    batch: int = 8
    """Images that are put to the model at once."""
    device: str = "auto"
    precision: str = "auto"
    overwrite: bool = False
    """Forget the captions that are there."""


@dataclass(frozen=True)
class Summary:
    """What came of a run."""

    made: int
    """Captions made now."""
    before: int
    """Images that had a caption."""
    empty: int
    """Windows without imagery in half of their pixels or more."""
    failed: tuple[Caption, ...]
    """Images without a caption, with the reason."""


class CaptionListener:
    """Hears how a run goes; this one does nothing."""

    def planned(self, total: int, left: int) -> None:
        """The images are listed: so many, of which so many are left to do."""

    def loading(self, model: str) -> None:
        """The model is about to be read, which may take minutes."""

    def reported(self, rows: Sequence[Caption], empty: int) -> None:
        """A batch is in the table, and so many windows of it were without imagery."""


@dataclass(frozen=True)
class _Item:
    """An image to be captioned."""

    image: str
    """Its name in the table."""
    read: Callable[[], Image.Image | None]
    """Gives the picture, or None where there is no imagery; raises the reason if it cannot."""
    place: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        return (self.image, *self.place[:2])


def caption(request: CaptionRequest, listener: CaptionListener | None = None) -> Summary:
    """Caption images into a table; a stopped run goes on where it was.

    What the table has is not done again; rows with an error are. A batch is in the table when
    the next one is begun, so a killed run loses one batch at most.

    Parameters
    ----------
    request
        What to caption.
    listener
        Hears how it goes.

    Returns
    -------
    Summary
        Failed images are in it and in the table, with the reason.

    Raises
    ------
    UsageError
        An option does not fit, or a batch does not fit in memory.
    InputError
        There are no images.
    PlanMismatch
        The table holds captions by another model, prompt, or crop.
    ModelError, MissingExtra
        The model is nowhere, or not one for this; or what runs it is not installed.
    OutputError
        The table cannot be written.

    Examples
    --------
    >>> caption(CaptionRequest("photos/", Path("captions.csv"))).made   # doctest: +SKIP
    120
    """
    listener = listener or CaptionListener()
    _check(request)
    if request.windows:
        source = open_source(request.images, request.bands, request.rescale)
        items = _windows(source, request.windows, _label(request.images, request.out))
    else:
        source = None
        items = _pictures(request)
    table = CaptionTable(
        request.out, _common(request, source), source is not None, request.overwrite
    )
    left = [item for item in items if item.key not in table.done]
    listener.planned(len(items), len(left))
    made, empty, failed = 0, 0, list[Caption]()
    captioner: Captioner | None = None
    if left:
        listener.loading(request.model)
        captioner = Captioner(
            request.model, request.prompt, request.tokens, request.device, request.precision
        )
    with table.retrying({item.key for item in left}):
        for batch in _in_batches(left, request.batch):
            assert captioner is not None
            rows = _captions(captioner, batch, sure=made > 0)
            table.append(rows)
            bad = [row for row in rows if row.error]
            made, empty = made + len(rows) - len(bad), empty + len(batch) - len(rows)
            failed += bad
            listener.reported(rows, len(batch) - len(rows))
        table.finish()
    return Summary(made, len(items) - len(left), empty, tuple(failed))


def _check(request: CaptionRequest) -> None:
    counts = {"batch": request.batch, "tokens": request.tokens, "crop": request.crop}
    for name, value in (counts | {"windows": request.windows}).items():
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: give 1 or more")
    if request.crop and request.windows:
        raise UsageError("--crop is for pictures and --windows for rasters: give one of them")
    if (request.bands or request.rescale) and not request.windows:
        raise UsageError("--bands and --rescale are for rasters: give --windows too")
    if not request.prompt.strip():
        raise UsageError("the prompt is empty: give a question")
    if request.precision not in ("auto", *PRECISIONS):
        raise UsageError(
            f"--precision {request.precision!r} is none of auto, {', '.join(PRECISIONS)}"
        )


def _common(request: CaptionRequest, source: Source | None) -> dict[str, str]:
    """All that decides the words, as the table keeps it."""
    folder = Path(request.model).expanduser()
    common = {
        "model": str(folder.resolve()) if folder.is_dir() else request.model,
        "prompt": request.prompt,
        "tokens": str(request.tokens),
    }
    if request.crop:
        common["crop"] = str(request.crop)
    if source:
        facts = json.dumps(source.info.facts, sort_keys=True)
        common["windows"] = str(request.windows)
        common["imagery"] = hashlib.sha256(facts.encode()).hexdigest()[:16]
    return common


# ---- what to caption


def _pictures(request: CaptionRequest) -> list[_Item]:
    """List the pictures, each once."""
    spec, path = request.images, Path(request.images).expanduser()
    if not spec.strip():
        raise UsageError("no images were named: give a folder, a glob, or a table")
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if _is_picture(p))
        if not found:
            raise InputError(
                f"{spec}: the folder holds no pictures ({' '.join(sorted(PICTURES))}); those in "
                f"its subfolders are named by a glob: '{path}/**/*.jpg'"
            )
    elif path.is_file() and path.suffix.lower() in (".csv", *PARQUET):
        return _listed(path, request.crop)
    elif path.is_file():
        found = [path]
    elif re.search(r"[*?\[]", spec):
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not found:
            raise InputError(f"{spec}: no file matches this pattern")
    else:
        raise InputError(f"{spec}: no such file or folder")
    return [
        _Item(_label(str(p), request.out), partial(_read_picture, p, request.crop)) for p in found
    ]


def _is_picture(path: Path) -> bool:
    # Hidden files are what systems and unfinished copies leave behind.
    return path.suffix.lower() in PICTURES and path.is_file() and not path.name.startswith(".")


def _label(path: str, out: Path) -> str:
    """Name an image so that it is found from the table's folder."""
    given = Path(path).expanduser()
    if given.is_absolute() or not given.exists():
        return str(given)
    return Path(os.path.relpath(given, out.absolute().parent)).as_posix()


def _listed(table: Path, crop: int | None) -> list[_Item]:
    """Take the pictures of a table, each once, by the names that they have there."""
    if table.suffix.lower() in PARQUET:
        require_parquet()
        held = held_pictures(table)
        if held is not None:
            return [
                _Item(name, partial(_read_held, held, group, row, crop))
                for name, group, row in held.names()
            ]
    items: dict[str, _Item] = {}
    for number, name in enumerate(_column(table), 1):
        # A picture's name may be relative to the table.
        read: Callable[[], Image.Image | None]
        if name.strip():
            read = partial(_read_picture, table.parent / Path(name).expanduser(), crop)
        else:
            name = f"(row {number})"
            read = partial(_refuse, f"row {number} of {table} names no image")
        items.setdefault(name, _Item(name, read))
    if not items:
        raise InputError(f"{table}: the table has no rows")
    return list(items.values())


def _column(table: Path) -> list[str]:
    if table.suffix.lower() in PARQUET:
        import pandas as pd

        try:
            frame = pd.read_parquet(table)
        except Exception as error:
            raise InputError(f"{table}: no Parquet table ({_one_line(error)})") from error
        columns = [str(name) for name in frame.columns]
        names = frame["image"].tolist() if "image" in columns else []
        # What is missing comes as None or as a number that is not one.
        found = [name if isinstance(name, str) else "" for name in names]
    else:
        try:
            with table.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                columns = list(reader.fieldnames or [])
                found = [row.get("image") or "" for row in reader]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{table}: cannot be read as CSV in UTF-8 ({error})") from error
    if "image" not in columns:
        raise InputError(
            f"{table}: the table has no column 'image' (it has {', '.join(columns) or 'none'})"
        )
    return found


def _refuse(reason: str) -> None:
    raise InputError(reason)


def _read_held(held: HeldPictures, group: int, row: int, crop: int | None) -> Image.Image:
    return _read_picture(held.read(group, row), crop)


def _read_picture(path: Path | BytesIO, crop: int | None) -> Image.Image:
    """Read a picture, as RGB, and cut its middle out.

    Raises
    ------
    InputError
        It cannot be read, is not of 8 bits, or is smaller than the crop.
    """
    if isinstance(path, Path) and not path.exists():
        raise InputError("no such file")
    try:
        with Image.open(path) as opened:
            if opened.mode.startswith(("I", "F")):
                raise InputError(
                    f"not a picture of 8 bits (mode {opened.mode}): captioned as a raster, with "
                    "--windows, or converted"
                )
            # As viewers show it: cameras note how they were held.
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError("not a picture, or of a kind that is not known") from error
    except Exception as error:
        raise InputError(f"cannot be read as a picture: {_one_line(error)}") from error
    if not crop:
        return picture
    width, height = picture.size
    if width < crop or height < crop:
        raise InputError(f"{width} x {height} px are too few for --crop {crop}")
    left, top = (width - crop) // 2, (height - crop) // 2
    return picture.crop((left, top, left + crop, top + crop))


def _windows(source: Source, side: int, label: str) -> list[_Item]:
    """Cut a raster into windows that cover it; the last ones of a row and column overlap."""
    grid = source.info.native_grid
    if grid is None:
        raise UsageError(f"{label} has no end, so it cannot be cut into windows: give a raster")
    height, width = grid.shape
    if height < side or width < side:
        raise UsageError(
            f"--windows {side}: {label} has {width} x {height} px, which do not fill one window"
        )
    rows, cols = np.meshgrid(_starts(height, side), _starts(width, side), indexing="ij")
    rows, cols = rows.ravel(), cols.ravel()
    lon, lat = pixel_lonlat(grid, cols + side / 2, rows + side / 2)
    return [
        _Item(
            label,
            partial(_read_window, source, int(row), int(col), side),
            (str(row), str(col), f"{x:.6f}", f"{y:.6f}"),
        )
        for row, col, x, y in zip(rows, cols, lon, lat, strict=True)
    ]


def _starts(length: int, side: int) -> np.ndarray:
    whole = np.arange(0, length - side + 1, side)
    return whole if length % side == 0 else np.append(whole, length - side)


def _read_window(source: Source, row: int, col: int, side: int) -> Image.Image | None:
    grid = source.info.native_grid
    assert grid is not None
    image = source.read(grid[row : row + side, col : col + side])
    if image.valid.mean() <= 0.5:
        return None
    return Image.fromarray(np.ascontiguousarray(image.pixels.transpose(1, 2, 0)))


# ---- captioning


@dataclass(frozen=True)
class _Loaded:
    item: _Item
    picture: Image.Image | None
    error: str = ""


def _in_batches(items: Sequence[_Item], size: int) -> Iterator[list[_Loaded]]:
    """Read images a batch ahead of the model."""
    with ThreadPoolExecutor(_READERS) as pool:
        ahead = [pool.submit(_load, item) for item in items[:size]]
        for start in range(size, len(items) + size, size):
            now = ahead
            ahead = [pool.submit(_load, item) for item in items[start : start + size]]
            yield [future.result() for future in now]


def _load(item: _Item) -> _Loaded:
    try:
        return _Loaded(item, item.read())
    except (SoundmapError, OSError, MemoryError) as error:
        return _Loaded(item, None, _one_line(error))


def _captions(captioner: Captioner, batch: Iterable[_Loaded], sure: bool) -> list[Caption]:
    """Caption a batch; windows without imagery give no row.

    Parameters
    ----------
    sure
        Whether the model has captioned something: if not, what it refuses is not the image's
        fault.
    """
    batch = list(batch)
    shown = [loaded for loaded in batch if loaded.picture is not None]
    answers = iter(_answers(captioner, [x.picture for x in shown if x.picture], sure))
    rows = []
    for loaded in batch:
        name, place, text, error = loaded.item.image, loaded.item.place, "", loaded.error
        if loaded.picture is not None:
            text, error = next(answers)
        elif not error:
            continue
        rows.append(Caption(name, text, error, place))
    return rows


def _answers(
    captioner: Captioner, pictures: Sequence[Image.Image], sure: bool
) -> list[tuple[str, str]]:
    """Give a caption or the reason why there is none, for each picture."""
    if not pictures:
        return []
    try:
        texts = captioner(pictures)
    except ValueError as error:
        if isinstance(error, SoundmapError):
            raise
        # One of them is at fault, so each is tried by itself.
        if len(pictures) > 1:
            apart = [_answers(captioner, [picture], sure=True)[0] for picture in pictures]
            if sure or any(text for text, _ in apart):
                return apart
        elif sure:
            return [("", f"the model does not take it: {_one_line(error)}")]
        raise ModelError(
            f"{captioner.name} does not work with images and a question: {_one_line(error)}"
        ) from error
    return [(text, "" if text else "the model gave no words") for text in texts]


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]

"""Images, sound and spectrograms out of what a row holds: bytes, paths or numbers.

Each function raises `Undecodable`; the caller knows the row. None in, None out: missing.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from soundmap.encoder.audio import SilentClip, read_clip
from soundmap.errors import InputError
from soundmap.nn.mel import MEL_SHAPE, SAMPLE_RATE, resample

_RASTERS = (".tif", ".tiff", ".vrt", ".jp2", ".img")
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
"""Modes of Pillow that become RGB without loss."""
_TIFF_BANDS = 277
"""The tag of a TIFF that tells how many bands it has."""
_SILENT_DB = -99.9
"""A spectrogram nowhere above this is of nothing: zeros come out at -100 dB."""
_LOUDEST = 2.0**32
_RATES_HZ = (1_000, 1_000_000)


class Undecodable(Exception):
    """What a row holds cannot be used: a reason that many rows share, and the details."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = " ".join(str(detail).split())


def decode_image(value: Any, base: Path) -> NDArray[np.uint8] | None:
    """Decode an image to red, green and blue.

    Parameters
    ----------
    value
        Path, encoded bytes, ``{"bytes": ..., "path": ...}`` or None. Pillow reads it; a raster
        file of three bands or more, rasterio: the first three, which must be 8-bit.
    base
        Folder that relative paths start at.

    Returns
    -------
    ndarray
        uint8[3, H, W].

    Raises
    ------
    Undecodable
        The file is missing, is no image, is cut short, or has more than 8 bits.
    """
    source = _source(value, base, "image")
    if source is None:
        return None
    if isinstance(source, Path) and source.suffix.lower() in _RASTERS:
        pixels = _read_raster(source)
        if pixels is not None:
            return pixels
    data = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(data) as image:
            # Of some rasters with many bands Pillow makes a grey picture of the first.
            bands = getattr(image, "tag_v2", {}).get(_TIFF_BANDS, 1)
            if image.mode in _EIGHT_BIT and bands <= len(image.getbands()):
                upright = ImageOps.exif_transpose(image)
                pixels = np.asarray(upright.convert("RGB"))
                return np.ascontiguousarray(pixels.transpose(2, 0, 1))
            fault = f"mode {image.mode}, {bands} bands: export it as RGB with 8 bits a colour"
    # Whatever a damaged file makes Pillow's decoders raise, struct.error and SyntaxError included.
    except Exception as error:
        fault = str(error) or type(error).__name__
        if isinstance(source, bytes):
            fault = fault.replace(repr(data), "the bytes")
    raise Undecodable("image unreadable", fault)


def _read_raster(path: Path) -> NDArray[np.uint8] | None:
    """Read the first three bands; None: there are fewer, or it is no raster that GDAL reads."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            raster = rasterio.open(path)
    except RasterioError:
        return None
    with raster:
        if raster.count < 3:
            return None
        if set(raster.dtypes[:3]) != {"uint8"}:
            raise Undecodable(
                "image unreadable", f"its bands are {raster.dtypes[0]}: export it with 8 bits"
            )
        try:
            return np.asarray(raster.read((1, 2, 3)))
        except (RasterioError, OSError, ValueError) as error:
            raise Undecodable("image unreadable", error) from error


def decode_audio(value: Any, base: Path, longest_s: float) -> NDArray[np.float32] | None:
    """Decode sound to mono at 32 kHz.

    Parameters
    ----------
    value
        Path, encoded bytes, ``{"bytes": ..., "path": ...}``,
        ``{"array": ..., "sampling_rate": ...}`` or None.
    base
        Folder that relative paths start at.
    longest_s
        Seconds to read at most.

    Returns
    -------
    ndarray
        float32[n].

    Raises
    ------
    Undecodable
        The file is missing, is no sound, is damaged, or all silent.
    """
    if isinstance(value, Mapping) and value.get("array") is not None:
        wave = _from_numbers(value["array"], value.get("sampling_rate"), longest_s)
    else:
        source = _source(value, base, "audio")
        if source is None:
            return None
        try:
            wave = read_clip(io.BytesIO(source) if isinstance(source, bytes) else source, longest_s)
        except SilentClip as error:
            raise Undecodable("audio silent") from error
        except InputError as error:
            raise Undecodable("audio unreadable", error) from error
    if not wave.any():
        raise Undecodable("audio silent")
    return wave


def _from_numbers(array: Any, rate: Any, longest_s: float) -> NDArray[np.float32]:
    try:
        wave = np.asarray(array, np.float32)
        rate = int(rate)
    except (TypeError, ValueError) as error:
        raise Undecodable("audio unreadable", error) from error
    low, high = _RATES_HZ
    if not low <= rate <= high:
        raise Undecodable("audio unreadable", f"{rate} samples per second")
    if wave.ndim == 2:
        # Channels first or last: there are never as many as samples.
        wave = wave.mean(axis=int(wave.shape[0] > wave.shape[1]))
    if wave.ndim != 1 or not wave.size:
        raise Undecodable("audio unreadable", f"an array of shape {list(wave.shape)}")
    wave = wave[: max(1, round(longest_s * rate))]
    # So written, NaN fails as well.
    if not (np.abs(wave) <= _LOUDEST).all():
        raise Undecodable("audio unreadable", "samples that are not finite or too large for sound")
    if rate == SAMPLE_RATE:
        return wave
    with torch.no_grad():
        return resample(torch.from_numpy(np.ascontiguousarray(wave)), rate, SAMPLE_RATE).numpy()


def decode_mel(value: Any, base: Path) -> NDArray[np.float32] | None:
    """Take a stored stack of spectrograms, and check it.

    Parameters
    ----------
    value
        Numbers of shape [S, 1, 1001, 64], in dB, or the path of a ``.npy`` file of them, or None.
    base
        Folder that a relative path starts at.

    Returns
    -------
    ndarray
        float32[S, 1, 1001, 64].

    Raises
    ------
    Undecodable
        The file is missing or no array, the shape is another, a value is not finite, or all of it
        is silence.
    """
    if isinstance(value, str):
        path = _source(value, base, "mel")
        try:
            value = None if path is None else np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise Undecodable("mel unreadable", error) from error
    if value is None:
        return None
    try:
        mel = np.asarray(value, np.float32)
    except (TypeError, ValueError) as error:  # lists of unequal length
        raise Undecodable("mel shape wrong", error) from error
    if mel.ndim != 4 or mel.shape[1:] != MEL_SHAPE or not len(mel):
        raise Undecodable("mel shape wrong", f"{list(mel.shape)}, not [segments, 1, 1001, 64]")
    if not np.isfinite(mel).all():
        raise Undecodable("mel not finite")
    if not (mel > _SILENT_DB).any():
        raise Undecodable("audio silent")
    return mel


def _source(value: Any, base: Path, what: str) -> bytes | Path | None:
    """Tell bytes from paths, and find the file."""
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        value = path if data is None else data
    if value is None:
        return None
    if isinstance(value, bytes | bytearray | memoryview):
        if not len(value):
            raise Undecodable(f"{what} unreadable", "it has no bytes")
        return bytes(value)
    if not isinstance(value, str | Path):
        raise Undecodable(f"{what} unreadable", f"a column of {type(value).__name__}, not of files")
    if not str(value).strip():
        return None
    path = base / Path(value).expanduser()
    try:
        found = path.is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL
        found = False
    if not found:
        raise Undecodable(f"{what} file missing", value)
    return path

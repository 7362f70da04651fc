"""Sound files to the ten-second segments that the audio tower hears.

Files are read in blocks: a recording of any length takes a few megabytes on the way.

The sampling rate is changed by `soundmap.nn.mel.resample`, the windowed sinc of the published
front end, and not by a resampling library. The short filter of the former damps and mirrors what
lies near the Nyquist frequency, and the tower was trained on that: on noise, soxr at either of its
high qualities differs by 2 to 3 % of the signal, by 1.4 dB in the highest mel bands of a 48 kHz
recording and by tens of dB above what a 22 kHz recording holds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from soundmap.errors import InputError, MissingExtra
from soundmap.nn.mel import CLIP_SAMPLES, SAMPLE_RATE, resample

if TYPE_CHECKING:
    from soundfile import SoundFile

SEGMENT_S = CLIP_SAMPLES // SAMPLE_RATE
"""Seconds of a segment."""
SHORTEST_S = 1
"""Seconds that a last piece must have to become a segment beside others."""

_RATES_HZ = (1_000, 1_000_000)
# Samples of all channels together that are decoded at a time.
_PIECE_SAMPLES = 1 << 20
# Whole numbers as large as these are found in float files; their squares still add up in float32.
_LARGEST = 2.0**32


class SilentClip(InputError):
    """A sound file holds nothing but zeros."""


def read_clip(
    path: str | os.PathLike[str] | BinaryIO, longest_s: float | None = None
) -> NDArray[np.float32]:
    """Read a sound file whole, or its beginning.

    Parameters
    ----------
    path
        Anything that libsndfile opens: WAV, FLAC, OGG (Vorbis, Opus), MP3, AIFF and others; by
        name, or as an open binary file.
    longest_s
        Seconds to read at most; None: all. Of a file that is cut, the part that is read alone is
        looked at for faults.

    Returns
    -------
    ndarray
        float32[n], mono (mean of the channels) at 32 kHz, samples as in the file: -1 to 1 is full
        scale. See `read_segments` for recordings too long to hold.

    Raises
    ------
    SilentClip
        All samples are zero.
    InputError
        The file is missing, is no sound, holds none, or holds numbers that are no sound.
    MissingExtra
        soundfile is not installed.
    """
    if longest_s is None:
        return np.concatenate(list(_blocks(path)))
    length = max(1, round(longest_s * SAMPLE_RATE))
    blocks = islice(_blocks(path), -(-length // CLIP_SAMPLES))
    wave = np.concatenate(list(blocks))[:length]
    if not wave.any():
        raise SilentClip(f"{_named(path)} is silent in its first {longest_s:g} s")
    return wave


def read_segments(path: str | os.PathLike[str]) -> Iterator[NDArray[np.float32]]:
    """Read a sound file one segment at a time: the rows of ``segments(read_clip(path))``.

    Whether the file is all silent shows only at its end, so that the last step may raise.

    Parameters
    ----------
    path
        See `read_clip`.

    Yields
    ------
    ndarray
        float32[320000].

    Raises
    ------
    InputError
        The file is missing, is no sound, holds none, or holds numbers that are no sound.
    MissingExtra
        soundfile is not installed.
    """
    for i, block in enumerate(_blocks(path)):
        if i == 0 or len(block) >= SHORTEST_S * SAMPLE_RATE:
            yield np.pad(block, (0, CLIP_SAMPLES - len(block)))


def segments(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cut sound into segments of ten seconds, from its beginning on.

    The last one is filled with zeros at its end. If it would hold less than a second it is left
    out, unless it is the only one.

    Parameters
    ----------
    wave
        float32[n], mono at 32 kHz, n at least 1.

    Returns
    -------
    ndarray
        float32[S, 320000].
    """
    count, rest = divmod(len(wave), CLIP_SAMPLES)
    if rest >= SHORTEST_S * SAMPLE_RATE or count == 0:
        count += 1
    wave = wave[: count * CLIP_SAMPLES]
    padded = np.pad(wave, (0, count * CLIP_SAMPLES - len(wave)))
    return padded.reshape(count, CLIP_SAMPLES)


def _named(path: str | os.PathLike[str] | BinaryIO) -> Path:
    """Name a file in messages."""
    return Path(path) if isinstance(path, str | os.PathLike) else Path("the sound")


def _blocks(source: str | os.PathLike[str] | BinaryIO) -> Iterator[NDArray[np.float32]]:
    """Read mono at 32 kHz in blocks of ten seconds, the last one shorter, none of them empty."""
    path = _named(source)
    heard = False
    with _open(path, source) as file:
        rate = file.samplerate
        # Resampling looks a few samples to either side. A second is a whole number of samples at
        # both rates, so blocks that overlap by seconds join without a seam.
        held = np.empty(0, np.float32)
        before = 0
        while True:
            fresh = _read_mono(file, path, before + (SEGMENT_S + 1) * rate - len(held))
            heard = heard or bool(fresh.any())
            held = np.concatenate([held, fresh])
            if not len(held):
                raise InputError(f"{path} holds no sound, its length is zero: record it again")
            start = before // rate * SAMPLE_RATE
            at_new_rate = resample(torch.from_numpy(held), rate).numpy()
            yield at_new_rate[start : start + CLIP_SAMPLES]
            if len(held) <= before + SEGMENT_S * rate:
                break
            held = held[before + (SEGMENT_S - 1) * rate :]
            before = rate
    if not len(held):
        raise InputError(f"{path} holds no sound, its length is zero: record or export it again")
    if not heard:
        raise SilentClip(
            f"{path} is silent, all of its samples are zero: give one with sound in it"
        )


def _open(path: Path, source: str | os.PathLike[str] | BinaryIO) -> SoundFile:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package is there, its C library is not
        raise MissingExtra("soundfile", "sat2sound", "reading sound files") from error
    if not isinstance(source, str | os.PathLike):
        path_or_file: Path | BinaryIO = source
    elif not path.exists():
        raise InputError(f"{path} does not exist: check the name of the sound file")
    elif path.is_file():
        path_or_file = path
    else:
        what = "a folder" if path.is_dir() else "not a regular file"
        raise InputError(f"{path} is {what}: name a sound file")
    try:
        file = soundfile.SoundFile(path_or_file)
    # TypeError: from its name the file is raw samples without a header.
    except (soundfile.SoundFileError, TypeError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as sound ({_reason(error)}): give a WAV, FLAC, OGG or MP3 file"
        ) from error
    low, high = _RATES_HZ
    if not low <= file.samplerate <= high:
        file.close()
        raise InputError(
            f"{path} states {file.samplerate} samples per second, which is outside {low} to "
            f"{high}: export it again, best at {SAMPLE_RATE}"
        )
    return file


def _read_mono(file: SoundFile, path: Path, count: int) -> NDArray[np.float32]:
    """Read the next samples, fewer at the end of the file, as the mean of the channels."""
    from soundfile import SoundFileError

    pieces = [np.empty(0, np.float32)]
    while count:
        frames = min(count, max(1, _PIECE_SAMPLES // file.channels))
        try:
            piece = file.read(frames, dtype="float32", always_2d=True).mean(axis=1)
        except SoundFileError as error:
            at_s = file.tell() / file.samplerate
            raise InputError(
                f"{path} cannot be read beyond {at_s:.1f} s ({_reason(error)}): the file is "
                "damaged or incomplete"
            ) from error
        # So written, NaN fails as well.
        if not (np.abs(piece) <= _LARGEST).all():
            raise InputError(
                f"{path} holds samples that are not finite or too large for sound: export it again"
            )
        pieces.append(piece)
        count -= len(piece)
        if len(piece) < frames:
            break
    return np.concatenate(pieces)


def _reason(error: Exception) -> str:
    text = str(getattr(error, "error_string", error))
    return " ".join(text.split()).removeprefix("Error : ").rstrip(".")

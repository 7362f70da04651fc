"""What the model is shown of a sample: one crop, one stretch of sound, one caption of each kind.

Everything drawn at random depends on the run's seed, the epoch and the sample's number alone: not
on what was drawn before, nor on which thread or process draws it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Picture
from PIL import ImageEnhance

from soundmap.encoder.described import Facts
from soundmap.encoder.preprocess import reference_window
from soundmap.nn.mel import CLIP_SAMPLES, log_mel
from soundmap.products.embed_samples import facts_of
from soundmap.products.samples import Sample
from soundmap.train.config import InputSettings

_IMAGE, _SOUND = 1, 2


@dataclass(frozen=True)
class View:
    """What is shown of one sample."""

    key: str
    pixels: NDArray[np.uint8] | None
    """uint8[3, W, W]; None where there is no image."""
    gsd_m: float
    """Metres per native pixel times the zoom, as the model is told."""
    mel: NDArray[np.float32] | None
    """float32[1, 1001, 64]; None where there is no recording."""
    audio_caption: str
    image_caption: str
    """Of the same zoom; empty where there is none."""
    facts: Facts
    """Metadata."""


@dataclass(frozen=True)
class Viewer:
    """Makes views of samples.

    Parameters
    ----------
    settings
        What is drawn and how.
    window_px, native_px, gsd_m
        Of the model's window, of the crop at zoom 1, and of a native pixel.
    train
        Whether colours are shifted, and segments of sound drawn. If not, the first segment is
        taken, or the first ten seconds; the zoom is still drawn.
    """

    settings: InputSettings
    window_px: int
    native_px: int
    gsd_m: float
    train: bool = True

    def view(self, sample: Sample, seed: int, epoch: int, index: int) -> View:
        """Make a view of a sample: a pure function of its arguments."""

        def stream(what: int) -> np.random.Generator:
            return np.random.default_rng((seed, epoch, index, what))

        rng = stream(_IMAGE)
        zoom = int(self.settings.zooms[rng.integers(len(self.settings.zooms))])
        pixels = None
        if sample.image is not None:
            pixels = reference_window(sample.image, zoom * self.native_px, self.window_px)
            if self.train:
                pixels = jitter(pixels, self.settings, rng)
                if self.settings.flips:
                    pixels = _turned(pixels, int(rng.integers(8)))
        return View(
            key=sample.key,
            pixels=pixels,
            gsd_m=self.gsd_m * zoom,
            mel=self._mel(sample, stream(_SOUND)),
            audio_caption=sample.audio_caption.strip(),
            image_caption=sample.image_captions.get(zoom, "").strip(),
            facts=facts_of(sample),
        )

    def _mel(self, sample: Sample, rng: np.random.Generator) -> NDArray[np.float32] | None:
        if sample.mel is not None and len(sample.mel):
            which = int(rng.integers(len(sample.mel))) if self.train else 0
            mel = np.array(sample.mel[which], np.float32)
        elif sample.wave is not None:
            wave = np.zeros(CLIP_SAMPLES, np.float32)
            spare = max(0, len(sample.wave) - CLIP_SAMPLES)
            start = int(rng.integers(spare + 1)) if self.train else 0
            part = sample.wave[start : start + CLIP_SAMPLES]
            wave[: len(part)] = part
            with torch.inference_mode():
                mel = log_mel(torch.from_numpy(wave)[None])[0].numpy()
        else:
            return None
        if self.train:
            _mask(mel, 1, self.settings.mask_frames, rng)
            _mask(mel, 2, self.settings.mask_bands, rng)
        return mel


def jitter(
    pixels: NDArray[np.uint8], settings: InputSettings, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Shift brightness, contrast, saturation and hue, in random order (SPEC 2).

    As torchvision's ColorJitter does with pictures: factors are uniform in 1 ± the setting, the hue
    turns by a uniform part of the circle within ± its setting.

    Parameters
    ----------
    pixels
        uint8[3, H, W].
    """
    picture = Picture.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    amounts = (settings.brightness, settings.contrast, settings.saturation)
    factors = [float(rng.uniform(1 - a, 1 + a)) for a in amounts]
    turn = float(rng.uniform(-settings.hue, settings.hue)) if settings.hue else 0.0
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for step in rng.permutation(4):
        if step < 3:
            if amounts[step]:
                picture = kinds[step](picture).enhance(factors[step])
        elif settings.hue:
            hue, saturation, value = picture.convert("HSV").split()
            turned = np.asarray(hue).astype(np.int16) + round(turn * 255)
            hue = Picture.fromarray((turned % 256).astype(np.uint8))
            picture = Picture.merge("HSV", (hue, saturation, value)).convert("RGB")
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def _turned(pixels: NDArray[np.uint8], kind: int) -> NDArray[np.uint8]:
    turned = np.rot90(pixels, kind % 4, (1, 2))
    return np.ascontiguousarray(turned[:, :, ::-1] if kind >= 4 else turned)


def _mask(mel: NDArray[np.float32], axis: int, longest: int, rng: np.random.Generator) -> None:
    """Blot out two stripes with each band's mean, in place."""
    if not longest:
        return
    mean = mel.mean(axis=1, keepdims=True)
    for _ in range(2):
        width = int(rng.integers(longest))
        start = int(rng.integers(max(1, mel.shape[axis] - width)))
        part = [slice(None)] * 3
        part[axis] = slice(start, start + width)
        mel[tuple(part)] = np.broadcast_to(mean, mel.shape)[tuple(part)]

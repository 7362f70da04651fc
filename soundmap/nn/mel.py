"""From sound to what the audio tower reads: resampling and the log-mel picture.

The published audio tower was trained on one particular picture of sound, so every step here
follows its front end to the last digit that float32 allows, see the functions.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_RATE = 32_000
"""Samples per second of everything that the audio tower hears."""
CLIP_SAMPLES = 10 * SAMPLE_RATE
"""Samples of a clip: ten seconds."""
WINDOW = 1024
"""Samples of a frame, and of its Fourier transform."""
HOP = 320
"""Samples from one frame to the next: ten milliseconds."""
MEL_BANDS = 64
MEL_SHAPE = (1, 1001, MEL_BANDS)
"""A clip's spectrogram: channel, frames, bands."""

_MEL_RANGE_HZ = (50.0, 14_000.0)
_FLOOR = 1e-10
# The Slaney scale (Auditory Toolbox, Interval Research TR 1998-010): linear up to 1 kHz in steps
# of 200/3 Hz, then 27 logarithmic steps from 1 to 6.4 kHz.
_BREAK_HZ = 1000.0
_STEP_HZ = 200.0 / 3.0
_BREAK_MEL = _BREAK_HZ / _STEP_HZ
_LOG_STEP = math.log(6.4) / 27.0
# The resampling filter: zero crossings on each side, and its cut-off as a part of the lower
# Nyquist frequency.
_CROSSINGS = 6
_ROLL_OFF = 0.99


@cache
def stft_kernels() -> tuple[Tensor, Tensor]:
    """Cosines and sines of the short-time Fourier transform under a periodic Hann window.

    Returns
    -------
    tuple of Tensor
        Real and imaginary part, float32[513, 1, 1024] each: one convolution kernel per frequency
        from 0 to 16 kHz. Computed in float64. Shared: not to be changed.
    """
    with torch.inference_mode(False):
        sample = torch.arange(WINDOW, device="cpu")
        frequency = torch.arange(WINDOW // 2 + 1, device="cpu")[:, None]
        turn = 2 * math.pi / WINDOW
        # Whole turns are taken out as integers: no digits are lost on the angle.
        angle = (frequency * sample % WINDOW).double() * turn
        hann = (1 - (sample.double() * turn).cos()) / 2
        real, imag = angle.cos() * hann, -angle.sin() * hann
        return real[:, None].float(), imag[:, None].float()


def _mel_to_hz(mel: Tensor) -> Tensor:
    above = _BREAK_HZ * ((mel - _BREAK_MEL) * _LOG_STEP).exp()
    return torch.where(mel < _BREAK_MEL, mel * _STEP_HZ, above)


@cache
def mel_bank() -> Tensor:
    """Triangular filters from 50 to 14,000 Hz on the Slaney mel scale, each of the same area.

    Returns
    -------
    Tensor
        float32[513, 64]: weight of each frequency in each band. Computed in float64. Shared: not
        to be changed.
    """
    with torch.inference_mode(False):
        low, high = _MEL_RANGE_HZ
        ends = (low / _STEP_HZ, _BREAK_MEL + math.log(high / _BREAK_HZ) / _LOG_STEP)
        mels = torch.linspace(*ends, MEL_BANDS + 2, dtype=torch.float64, device="cpu")
        left, centre, right = _mel_to_hz(mels).unfold(0, 3, 1).unbind(-1)
        hz = torch.arange(WINDOW // 2 + 1, dtype=torch.float64, device="cpu")[:, None]
        hz = hz * (SAMPLE_RATE / WINDOW)
        rising = (hz - left) / (centre - left)
        falling = (right - hz) / (right - centre)
        triangle = torch.minimum(rising, falling).clamp_min(0)
        return (triangle * (2 / (right - left))).float()


def log_mel(wave: Tensor) -> Tensor:
    """Picture sound as the audio tower reads it (SPEC 7.1).

    Frames of 1024 samples every 320, mirrored at both ends; power; 64 mel bands; decibels with
    a floor of -100. The transform is a convolution with float32 kernels, as in the published
    front end: where bands are quiet beside loud ones, its rounding shows (1e-4 dB against an
    FFT), and the same operation rounds alike.

    Parameters
    ----------
    wave
        float32[B, n], mono at 32 kHz, samples about -1 to 1; n is `CLIP_SAMPLES` for the tower
        and at least 513.

    Returns
    -------
    Tensor
        float32[B, 1, n // 320 + 1, 64], decibels: 1001 frames for a clip.
    """
    half = WINDOW // 2
    padded = F.pad(wave[:, None], (half, half), mode="reflect")
    real, imag = (F.conv1d(padded, k.to(wave.device), stride=HOP) for k in stft_kernels())
    power = real.square() + imag.square()
    bands = power.transpose(1, 2) @ mel_bank().to(wave.device)
    return 10 * bands.clamp_min(_FLOOR).log10()[:, None]


@cache
def _sinc_filter(rate: int, target: int) -> Tensor:
    """Weights of the input samples around each output sample, float32[taps, phases]."""
    step, phases = _ratio(rate, target)
    cut_off = min(step, phases) * _ROLL_OFF
    half = math.ceil(_CROSSINGS * step / cut_off)
    with torch.inference_mode(False):
        phase = torch.arange(phases, device="cpu")
        tap = torch.arange(-half, half + 1, device="cpu")[:, None]
        nearest = phase * step // phases + tap
        # The published front end has the place of an output sample in float32 and all else in
        # float64. Doing the same makes 1e-5 of the loudest sample at the usual rates.
        place = (phase / phases).double()
        crossing = (nearest.double() / step - place) * cut_off
        crossing = crossing.clamp(-_CROSSINGS, _CROSSINGS)
        window = (crossing * (math.pi / (2 * _CROSSINGS))).cos().square()
        return (torch.sinc(crossing) * window * (cut_off / step)).float()


def _ratio(rate: int, target: int) -> tuple[int, int]:
    shared = math.gcd(rate, target)
    return rate // shared, target // shared


def resample(wave: Tensor, rate: int, target: int = SAMPLE_RATE) -> Tensor:
    """Change the sampling rate with a Hann-windowed sinc (SPEC 7.1).

    An output sample is the sum of the input around it, weighted by a sinc of six zero crossings
    on each side that cuts off at 0.99 of the lower Nyquist frequency. Beyond its ends the input
    counts as zero. Only the weights that are not zero are kept, so that odd pairs of rates, whose
    filter would fill gigabytes as a convolution kernel, cost no more than others.

    Parameters
    ----------
    wave
        float32[..., n].
    rate, target
        Samples per second before and after.

    Returns
    -------
    Tensor
        float32[..., ceil(n * target / rate)]; ``wave`` itself where the rates are equal.
    """
    if rate == target:
        return wave
    step, phases = _ratio(rate, target)
    weights = _sinc_filter(rate, target).to(wave.device)
    half = len(weights) // 2
    count = -(-wave.shape[-1] * phases // step)
    index = torch.arange(count, device=wave.device)
    phase, start = index % phases, index * step // phases
    padded = F.pad(wave, (half, half + 1))
    out = torch.zeros(*wave.shape[:-1], count, dtype=wave.dtype, device=wave.device)
    # One tap of all samples at a time: all taps at once would be dozens of times the sound.
    for tap, weight in enumerate(weights):
        around = padded[..., tap:].index_select(-1, start)
        out.addcmul_(around, weight.index_select(0, phase))
    return out

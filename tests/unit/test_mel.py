"""The log-mel picture and resampling, against their formulas and what is known of sounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from soundmap.nn.mel import (
    CLIP_SAMPLES,
    HOP,
    MEL_BANDS,
    SAMPLE_RATE,
    WINDOW,
    log_mel,
    mel_bank,
    resample,
    stft_kernels,
)

USUAL_RATES = [8_000, 11_025, 16_000, 22_000, 22_050, 24_000, 44_100, 48_000, 96_000, 192_000]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sine(hz: float, rate: int, seconds: float) -> Tensor:
    time = torch.arange(round(rate * seconds), dtype=torch.float64) / rate
    return (0.5 * torch.sin(2 * math.pi * hz * time)).float()


def by_fft(wave: np.ndarray) -> np.ndarray:
    """The same picture in float64, framed by hand and transformed by FFT: float64[frames, 64]."""
    padded = np.pad(wave.astype(np.float64), WINDOW // 2, mode="reflect")
    starts = range(0, len(wave) + 1, HOP)
    hann = np.sin(np.pi * np.arange(WINDOW) / WINDOW) ** 2
    power = [np.abs(np.fft.rfft(padded[i : i + WINDOW] * hann)) ** 2 for i in starts]
    return 10 * np.log10(np.maximum(np.stack(power) @ mel_bank().numpy(), 1e-10))


def slaney_hz(mel: float) -> float:
    return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)


class TestMel:
    @settings(max_examples=15)
    @given(st.integers(513, 3000), st.integers(0, 2**31 - 1))
    def test_equals_fft(self, length: int, seed: int) -> None:
        wave = noise(length, seed=seed)
        found = log_mel(wave[None])[0, 0].numpy()
        expected = by_fft(wave.numpy())
        assert found.shape == expected.shape == (length // HOP + 1, MEL_BANDS)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)

    def test_a_clip_has_1001_frames(self) -> None:
        found = log_mel(noise(1, CLIP_SAMPLES))
        assert found.shape == (1, 1, 1001, 64)
        assert found.dtype == torch.float32

    def test_silence_is_the_floor(self) -> None:
        assert (log_mel(torch.zeros(1, 4000)) == -100).all()

    def test_ten_times_louder_is_20_db_more(self) -> None:
        wave = noise(1, 8000)
        gain = log_mel(10 * wave) - log_mel(wave)
        torch.testing.assert_close(gain, torch.full_like(gain, 20.0), rtol=0, atol=1e-3)

    @pytest.mark.parametrize("hz", [200.0, 1000.0, 3000.0, 9000.0])
    def test_a_tone_is_loudest_in_its_band(self, hz: float) -> None:
        low, high = 50 * 3 / 200, 15 + 27 * math.log(14) / math.log(6.4)
        centres = [slaney_hz(low + (high - low) * (i + 1) / 65) for i in range(64)]
        nearest = int(np.abs(np.array(centres) - hz).argmin())
        picture = log_mel(sine(hz, SAMPLE_RATE, 1.0)[None])[0, 0]
        loudest = picture.mean(0).argmax()
        assert abs(int(loudest) - nearest) <= 1

    def test_time_order(self) -> None:
        wave = torch.zeros(1, SAMPLE_RATE)
        wave[0, 3 * SAMPLE_RATE // 4] = 1
        energy = log_mel(wave)[0, 0].mean(-1)
        assert int(energy.argmax()) == 75

    def test_clips_do_not_mix(self) -> None:
        waves = noise(3, 8000)
        together = log_mel(waves)
        for i in range(3):
            torch.testing.assert_close(together[i], log_mel(waves[i : i + 1])[0], rtol=0, atol=1e-3)

    def test_filters_have_the_same_area(self) -> None:
        bank = mel_bank()
        assert bank.shape == (513, 64)
        assert (bank >= 0).all()
        # Narrow triangles are sampled at few frequencies, so only the wide ones show it.
        area = bank[:, 24:].sum(0) * SAMPLE_RATE / WINDOW
        torch.testing.assert_close(area, torch.ones(40), rtol=0.05, atol=0)
        hz = torch.arange(513) * SAMPLE_RATE / WINDOW
        assert not bank[(hz < 50) | (hz > 14_000)].any()

    def test_constants_serve_both_modes(self) -> None:
        """What is computed first under inference mode can still be differentiated through."""
        stft_kernels.cache_clear()
        mel_bank.cache_clear()
        with torch.inference_mode():
            log_mel(noise(1, 1000))
        wave = noise(1, 1000).requires_grad_()
        log_mel(wave).sum().backward()
        assert wave.grad is not None
        assert wave.grad.isfinite().all()


def by_formula(wave: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Windowed-sinc interpolation written with times in seconds, all pairs of samples, float64."""
    cut_off_hz = 0.99 * min(rate, target)
    count = math.ceil(len(wave) * target / rate)
    apart_s = np.arange(len(wave))[None] / rate - np.arange(count)[:, None] / target
    crossing = apart_s * cut_off_hz
    hann = np.where(np.abs(crossing) < 6, np.cos(np.pi * crossing / 12) ** 2, 0)
    return (np.sinc(crossing) * hann) @ wave.astype(np.float64) * cut_off_hz / rate


class TestResample:
    @given(
        st.sampled_from(USUAL_RATES),
        st.sampled_from([SAMPLE_RATE, SAMPLE_RATE, 44_100]),
        st.integers(1, 300),
        st.integers(0, 2**31 - 1),
    )
    def test_equals_the_formula(self, rate: int, target: int, length: int, seed: int) -> None:
        wave = noise(length, seed=seed)
        found = resample(wave, rate, target).numpy()
        expected = by_formula(wave.numpy(), rate, target) if rate != target else wave.numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)

    @pytest.mark.parametrize("rate", [31_999, 44_101])
    def test_odd_rates(self, rate: int) -> None:
        wave = noise(1000)
        found = resample(wave, rate).numpy()
        np.testing.assert_allclose(found, by_formula(wave.numpy(), rate, 32_000), atol=1e-3)

    def test_the_same_rate_changes_nothing(self) -> None:
        wave = noise(50)
        assert torch.equal(resample(wave, SAMPLE_RATE), wave)

    @pytest.mark.parametrize("rate", USUAL_RATES)
    def test_a_tone_stays_a_tone(self, rate: int) -> None:
        found = resample(sine(1000, rate, 0.2), rate)
        expected = sine(1000, SAMPLE_RATE, 0.2)
        inside = slice(400, -400)
        assert found.shape == expected.shape
        torch.testing.assert_close(found[inside], expected[inside], rtol=0, atol=2e-3)

    def test_what_the_new_rate_cannot_hold_is_taken_out(self) -> None:
        assert resample(sine(21_000, 48_000, 0.2), 48_000)[400:-400].abs().max() < 5e-3

    def test_leading_axes(self) -> None:
        waves = noise(2, 3, 480)
        found = resample(waves, 48_000)
        assert found.shape == (2, 3, 320)
        for i in range(2):
            for j in range(3):
                assert torch.equal(found[i, j], resample(waves[i, j], 48_000))

"""Reading sound files: every format and rate, segments, and what goes wrong with files."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from soundmap.encoder.audio import read_clip, read_segments, segments
from soundmap.errors import InputError, MissingExtra
from soundmap.nn.mel import CLIP_SAMPLES, SAMPLE_RATE, resample

soundfile = pytest.importorskip("soundfile")


def noise(seconds: float, rate: int = SAMPLE_RATE, channels: int = 1) -> NDArray[np.float32]:
    """White noise, float32[n, channels]."""
    rng = np.random.default_rng(0)
    return (0.1 * rng.standard_normal((round(seconds * rate), channels))).astype(np.float32)


Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(
        wave: NDArray[np.float32], rate: int = SAMPLE_RATE, name: str = "clip.wav", **options: str
    ) -> Path:
        path = tmp_path / name
        options = options or ({"subtype": "FLOAT"} if path.suffix == ".wav" else {})
        soundfile.write(path, wave, rate, **options)
        return path

    return write


class TestReading:
    def test_samples_are_those_of_the_file(self, save: Save) -> None:
        wave = noise(1.5)
        found = read_clip(save(wave))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, wave[:, 0])

    def test_whole_numbers_become_parts_of_full_scale(self, save: Save) -> None:
        wave = np.array([-32768, -1, 0, 16384, 32767], np.int16)
        found = read_clip(save(wave, subtype="PCM_16"))
        np.testing.assert_array_equal(found, wave.astype(np.float32) / 32768)

    @pytest.mark.parametrize("channels", [2, 6])
    def test_mono_is_the_mean_of_the_channels(self, save: Save, channels: int) -> None:
        wave = noise(0.5, channels=channels)
        np.testing.assert_allclose(read_clip(save(wave)), wave.mean(axis=1), atol=1e-7)

    @pytest.mark.parametrize(
        ("name", "options", "worst"),
        [
            ("clip.flac", {}, 1e-4),
            ("clip.aiff", {}, 1e-4),
            ("clip.ogg", {}, 0.05),
            ("clip.mp3", {}, 0.05),
            ("clip.opus", {"format": "OGG", "subtype": "OPUS"}, 0.05),
        ],
    )
    def test_formats(self, save: Save, name: str, options: dict[str, str], worst: float) -> None:
        time = np.arange(48_000) / 48_000
        wave = (0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
        found = read_clip(save(wave, 48_000, name, **options))
        expected = resample(torch.from_numpy(wave), 48_000).numpy()
        assert len(found) == len(expected)
        # Lossy formats swing at the ends.
        inside = slice(2000, -2000)
        np.testing.assert_allclose(found[inside], expected[inside], rtol=0, atol=worst)

    @pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 44_101])
    def test_blocks_join_without_a_seam(self, save: Save, rate: int) -> None:
        wave = noise(11.7, rate)
        expected = resample(torch.from_numpy(wave[:, 0]), rate).numpy()
        np.testing.assert_allclose(read_clip(save(wave, rate)), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("samples", [79_999, 80_001, 87_999, 88_000, 88_001, 160_001])
    def test_lengths_about_a_block(self, save: Save, samples: int) -> None:
        wave = noise(21, 8000)[:samples]
        expected = resample(torch.from_numpy(wave[:, 0]), 8000).numpy()
        np.testing.assert_allclose(read_clip(save(wave, 8000)), expected, rtol=0, atol=1e-6)

    def test_a_name_as_text(self, save: Save) -> None:
        assert len(read_clip(str(save(noise(0.1))))) == SAMPLE_RATE // 10

    def test_long_recordings_take_no_more_memory(self, save: Save) -> None:
        peaks = []
        for seconds in (25, 75):
            path = save(noise(seconds, 8_000, channels=2), 8_000)
            tracemalloc.start()
            count = sum(1 for _ in read_segments(path))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert count == -(-seconds // 10)
        assert peaks[1] < 1.1 * peaks[0]


class TestSegments:
    @pytest.mark.parametrize(
        ("seconds", "count"),
        [(0.01, 1), (0.99, 1), (3, 1), (10, 1), (10.99, 1), (11, 2), (20, 2), (25, 3)],
    )
    def test_count(self, seconds: float, count: int) -> None:
        wave = noise(seconds)[:, 0]
        found = segments(wave)
        assert found.shape == (count, CLIP_SAMPLES)
        assert found.dtype == np.float32
        kept = min(len(wave), count * CLIP_SAMPLES)
        np.testing.assert_array_equal(found.reshape(-1)[:kept], wave[:kept])
        assert not found.reshape(-1)[kept:].any()

    @given(st.integers(1, 1_500_000))
    def test_less_than_a_second_is_left_out_and_no_more(self, length: int) -> None:
        found = segments(np.ones(length, np.float32))
        kept = int(found.sum(dtype=np.float64))
        assert kept <= length < kept + SAMPLE_RATE
        if length <= CLIP_SAMPLES:
            assert kept == length

    @pytest.mark.parametrize("seconds", [0.3, 10, 10.5, 11, 21.2])
    def test_one_at_a_time_is_the_same(self, save: Save, seconds: float) -> None:
        path = save(noise(seconds))
        np.testing.assert_array_equal(
            np.stack(list(read_segments(path))), segments(read_clip(path))
        )

    def test_never_a_random_crop(self, save: Save) -> None:
        path = save(noise(14.7))
        np.testing.assert_array_equal(segments(read_clip(path)), segments(read_clip(path)))


def spoilt(value: float) -> NDArray[np.float32]:
    wave = noise(1)
    wave[777] = value
    return wave


class TestErrors:
    def refused(self, path: Path, words: str) -> None:
        for read in (read_clip, lambda p: list(read_segments(p))):
            with pytest.raises(InputError) as caught:
                read(path)
            message = str(caught.value)
            assert message.startswith(str(path))
            assert words in message
            assert "\n" not in message

    def test_missing(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "none.wav", "does not exist")

    def test_folder(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "is a folder")

    @pytest.mark.parametrize("content", [b"", b"no sound in here\n" * 50, bytes(5000)])
    @pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.ogg", "a.txt", "a.raw"])
    def test_not_sound(self, tmp_path: Path, name: str, content: bytes) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        self.refused(path, "cannot be read as sound")

    @pytest.mark.parametrize("name", ["zero.wav", "zero.ogg"])
    def test_no_length(self, save: Save, name: str) -> None:
        self.refused(save(noise(0), name=name), "its length is zero")

    @pytest.mark.parametrize("seconds", [0.5, 10.5])
    def test_silence(self, save: Save, seconds: float) -> None:
        self.refused(save(0 * noise(seconds)), "is silent")

    def test_silence_around_sound_is_fine(self, save: Save) -> None:
        wave = 0 * noise(25)
        wave[15 * SAMPLE_RATE] = 0.1
        assert len(segments(read_clip(save(wave)))) == 3

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
    def test_samples_that_are_no_sound(self, save: Save, value: float) -> None:
        self.refused(save(spoilt(value)), "not finite or too large")

    def test_damage_beyond_the_first_block(self, save: Save) -> None:
        path = save(noise(30), name="clip.flac")
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * 2 // 3])
        self.refused(path, "damaged or incomplete")

    @pytest.mark.parametrize("rate", [100, 2_000_000])
    def test_rates_that_no_sound_has(self, save: Save, rate: int) -> None:
        self.refused(save(noise(1, 1000), rate), f"states {rate} samples per second")

    def test_without_soundfile(self, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
        path = save(noise(0.1))
        monkeypatch.setitem(sys.modules, "soundfile", None)
        with pytest.raises(MissingExtra, match=r"pip install 'soundmap\[sat2sound\]'"):
            read_clip(path)


class TestRealClips:
    @pytest.mark.parametrize(
        ("name", "seconds"),
        [
            ("jura_forest_24h/S4A03895_20190522_060000.ogg", 10),
            ("esc10_ccby/rain", 5),
            ("esc50_part_ccbync/church_bells", 5),
            ("other/CT101_binaural_camden_town_london.flac", 3),
        ],
    )
    def test_one_segment(self, shared_data: Path, name: str, seconds: float) -> None:
        path = shared_data / "audio" / name
        if path.is_dir():
            path = sorted(path.glob("*.ogg"))[0]
        wave = read_clip(path)
        assert len(wave) == seconds * SAMPLE_RATE
        assert np.isfinite(wave).all()
        assert 1e-5 < wave.std() < 0.5
        (only,) = read_segments(path)
        np.testing.assert_array_equal(only[: len(wave)], wave)

    def test_two_ears(self, shared_data: Path) -> None:
        path = shared_data / "audio" / "other" / "CT102_binaural_camden_town_london.flac"
        both, rate = soundfile.read(path, dtype="float32")
        assert both.shape[1] == 2
        assert rate == SAMPLE_RATE
        np.testing.assert_allclose(read_clip(path), both.mean(axis=1), rtol=0, atol=1e-7)

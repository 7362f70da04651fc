"""The small audio tower: loudness, silence and length do not sway it; models hold it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from soundmap.encoder.card import CARD_FILE, file_sha256, read_card
from soundmap.encoder.torch_encoder import (
    TEXT_TABLE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    TorchEncoder,
    model_config,
)
from soundmap.nn.audio_small import AudioConfig, SmallAudioTower, fill_silence, level
from soundmap.nn.mel import SAMPLE_RATE, log_mel
from soundmap.nn.model import ModelConfig, SoundModel
from soundmap.nn.vit import ViTConfig

TOWER = AudioConfig(stem=(4, 8, 8, 16), width=16, depth=1, heads=2)
CONFIG = ModelConfig(
    vit=ViTConfig(
        window_px=16, patch_px=8, width=16, depth=1, heads=2, stem=(4, 8, 8), stem_strides=(2, 2, 2)
    ),
    token_dim=16,
    dim=16,
    codes=24,
    temperature=2.0,
    text_dim=256,
    local_patches=True,
    audio=True,
    audio_tower=TOWER,
)


def noise(seconds: float, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(1, int(seconds * SAMPLE_RATE), generator=rng) * 0.1


def tower() -> SmallAudioTower:
    torch.manual_seed(0)
    return SmallAudioTower(TOWER).eval()


class TestLevel:
    def test_loudness_is_taken_out(self) -> None:
        quiet, loud = (level(log_mel(noise(2) * gain))[0] for gain in (0.01, 1.0))
        torch.testing.assert_close(quiet, loud, atol=1e-3, rtol=0)
        assert abs(float(loud.mean())) < 1e-3

    def test_silence_is_found_and_does_not_count(self) -> None:
        wave = torch.cat([noise(1), torch.zeros(1, SAMPLE_RATE)], 1)
        picture, heard = level(log_mel(wave))
        assert heard[0, :100].all()
        # A frame sees half a window to either side.
        assert not heard[0, 103:].any()
        assert abs(float(picture[0, 0, heard[0]].mean())) < 1e-4

    def test_all_silent(self) -> None:
        picture, heard = level(log_mel(torch.zeros(1, SAMPLE_RATE)))
        assert heard.all()
        assert torch.equal(picture, torch.zeros_like(picture))


class TestFillSilence:
    def test_sound_is_repeated_in_its_order(self) -> None:
        tokens = torch.arange(12.0).view(2, 6, 1)
        heard = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1]]).bool()
        found = fill_silence(tokens, heard)[..., 0]
        assert found.tolist() == [[1, 2, 5, 1, 2, 5], [6, 7, 8, 9, 10, 11]]


class TestTower:
    @pytest.mark.parametrize(("seconds", "count"), [(10, 63), (5, 32), (0.3, 2)])
    def test_shape(self, seconds: float, count: int) -> None:
        assert tower()(log_mel(noise(seconds))).shape == (1, count, 16)

    @torch.no_grad()
    def test_padding_adds_nothing(self) -> None:
        short = noise(5)
        padded = torch.cat([short, torch.zeros(1, 5 * SAMPLE_RATE)], 1)
        model = SoundModel(CONFIG).eval()
        alone, filled = (model.encode_audio(log_mel(wave)) for wave in (short, padded))
        assert float((alone * filled).sum()) > 0.999

    def test_every_weight_learns(self) -> None:
        net = tower().train()
        net(log_mel(torch.cat([noise(1), noise(1, 1)]))).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in net.parameters())


class TestModel:
    def test_needs_no_other_library(self) -> None:
        code = (
            "import sys; sys.modules['transformers'] = None\n"
            "from soundmap.nn.model import ModelConfig, SoundModel\n"
            "from soundmap.nn.audio_small import AudioConfig\n"
            "from soundmap.nn.vit import ViTConfig\n"
            "vit = ViTConfig(width=64, depth=1, heads=1)\n"
            "SoundModel(ModelConfig(vit, 8, 8, 8, audio=True, audio_tower=AudioConfig()))"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_card_states_the_tower(self) -> None:
        told = json.loads(json.dumps(asdict(CONFIG)))
        assert model_config(told) == CONFIG
        assert model_config(json.loads(json.dumps(asdict(replace(CONFIG, audio_tower=None)))))

    def test_has_the_scales_of_the_objective(self) -> None:
        assert set(SoundModel(CONFIG).scales) == {"at", "ia", "i_at", "fdt"}


@pytest.fixture
def folder(tmp_path: Path, project: Path) -> Path:
    """A model folder with fresh weights."""
    torch.manual_seed(1)
    state = SoundModel(CONFIG).state_dict()
    bundled = project / "models" / "soundmap-small"
    tokenizer = (bundled / TOKENIZER_FILE).read_bytes()
    (tmp_path / TOKENIZER_FILE).write_bytes(tokenizer)
    size = len(json.loads(tokenizer)["model"]["vocab"])
    state[TEXT_TABLE] = torch.randn(size, 256).half()
    save_file({k: v.contiguous() for k, v in state.items()}, str(tmp_path / WEIGHTS_FILE))
    card = {
        "name": "hears",
        "summary": "",
        "licence": "",
        "architecture": asdict(CONFIG),
        "input": {"window_px": 16, "patch_px": 8, "native_px": 16, "gsd_m": [[10, 10]]},
        "files": {n: file_sha256(tmp_path / n) for n in (WEIGHTS_FILE, TOKENIZER_FILE)},
    }
    (tmp_path / CARD_FILE).write_text(json.dumps(card))
    return tmp_path


class TestEncoder:
    def test_encodes_clips(self, folder: Path, tmp_path: Path) -> None:
        soundfile = pytest.importorskip("soundfile")
        encoder = TorchEncoder(read_card(folder), device="cpu", precision="float32")
        # The tower for sound is left out until a clip is to be encoded.
        assert encoder.model.audio is None
        for name, wave in {"a": noise(3), "b": noise(12, 1)}.items():
            soundfile.write(tmp_path / f"{name}.wav", wave[0].numpy(), SAMPLE_RATE)
        clips = [tmp_path / "a.wav", tmp_path / "b.wav"]
        found = encoder.encode_audio(clips)
        assert found.shape == (2, 16)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(encoder.encode_audio(clips[1:]), found[1:], atol=1e-6)
        assert encoder.encode_text(["birdsong"]).shape == (1, 16)

"""The audio side against the published model: every stage from the wave to the embedding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from soundmap.errors import ModelError
from soundmap.nn.audio import UNUSED, AudioSide, tower_state
from soundmap.nn.codebook import Codebook
from soundmap.nn.mel import CLIP_SAMPLES, log_mel, mel_bank, resample, stft_kernels
from soundmap.nn.sparsemax import sparsemax

pytest.importorskip("transformers")

TOWER = "audio_encoder.model.audio_enc."
QUERY = "fdt.audio_query_model.q_map."
# Where oneDNN does not do the convolutions, quiet mel bands beside loud ones round otherwise.
MEL_TOLERANCE_DB = 1e-4 if torch.backends.mkldnn.is_available() else 5e-4


def published(filler: ModuleType, folder: Path, prefix: str) -> dict[str, Tensor]:
    """Stand-in weights whose published names begin alike, without that beginning."""
    keys = json.loads((folder / "keys_withmeta.json").read_text())
    own = {key: spec for key, spec in keys.items() if key.startswith(prefix)}
    return {
        key.removeprefix(prefix): torch.from_numpy(np.array(value))
        for key, value in filler.state(own).items()
    }


def close(found: Tensor, expected: np.ndarray, tolerance: float) -> None:
    """Hold the largest difference below a part of the largest expected value."""
    assert found.shape == expected.shape
    worst = float(np.abs(found.numpy() - expected).max() / np.abs(expected).max())
    assert worst < tolerance


def close_stats(found: Tensor, expected: np.ndarray) -> None:
    """Compare mean and standard deviation of each clip over everything that it has."""
    flat = found.double().flatten(1)
    stats = torch.stack([flat.mean(1), flat.std(1, unbiased=False)], dim=1)
    np.testing.assert_allclose(stats.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def golden(sat2sound: Path) -> Iterator[Any]:
    with np.load(sat2sound / "golden_audio.npz") as arrays:
        yield arrays


@pytest.fixture(scope="module")
def weights(filler: ModuleType, sat2sound: Path) -> dict[str, Tensor]:
    return published(filler, sat2sound, TOWER)


@pytest.fixture(scope="module")
def mel(golden: Any) -> Tensor:
    waves = torch.zeros(2, CLIP_SAMPLES)
    for wave, name in zip(waves, ("wave_a_i16", "wave_b_i16"), strict=True):
        samples = torch.from_numpy(golden[name].astype(np.float32) / 32768)
        wave[: len(samples)] = samples
    return log_mel(waves)


@pytest.fixture(scope="module")
def side(filler: ModuleType, sat2sound: Path, weights: dict[str, Tensor]) -> AudioSide:
    side = AudioSide(1024).eval().requires_grad_(False)
    side.tower.load_state_dict(tower_state(weights))
    side.query.load_state_dict(published(filler, sat2sound, QUERY))
    return side


@dataclass
class Run:
    """What went into and came out of each part of the tower in one pass over both clips."""

    given: dict[str, Any]
    made: dict[str, Any]
    hidden: Tensor


@pytest.fixture(scope="module")
def run(side: AudioSide, mel: Tensor) -> Run:
    given: dict[str, Any] = {}
    made: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Any, ...], output: Any) -> None:
            given[name] = inputs[0] if inputs else None
            made[name] = output[0] if isinstance(output, tuple) else output

        return hook

    parts = side.tower.encoder.named_modules()
    hooks = [part.register_forward_hook(keep(name)) for name, part in parts]
    hidden = side.tower(mel)
    for hook in hooks:
        hook.remove()
    return Run(given, made, hidden)


class TestFrontEnd:
    def test_constants(self, weights: dict[str, Tensor]) -> None:
        real, imag = stft_kernels()
        spectrum = "audio_feats_extractor.mel_trans.stft.conv"
        assert torch.equal(real, weights[f"{spectrum}_real.weight"])
        assert torch.equal(imag, weights[f"{spectrum}_imag.weight"])
        assert torch.equal(mel_bank(), weights["audio_feats_extractor.log_trans.melW"])

    def test_mel(self, golden: Any, mel: Tensor) -> None:
        found = mel.numpy()
        tolerance = {"rtol": 0, "atol": MEL_TOLERANCE_DB}
        np.testing.assert_allclose(found[0], golden["mel_a"], **tolerance)
        np.testing.assert_allclose(found[1:, 0, :40], golden["mel_b.head"], **tolerance)
        np.testing.assert_allclose(found[1:, 0, -3:], golden["mel_b.tail"], **tolerance)
        close_stats(mel[1:], golden["mel_b.stats"])

    @pytest.mark.parametrize("rate", [16_000, 22_050, 44_100, 48_000])
    def test_resampling(self, golden: Any, rate: int) -> None:
        found = resample(torch.from_numpy(golden[f"resample.in.{rate}"]), rate).numpy()
        np.testing.assert_allclose(found, golden[f"resample.out.{rate}"], rtol=0, atol=1e-6)


class TestStages:
    def test_folded_picture(self, golden: Any, run: Run) -> None:
        picture = run.given["patch_embed"]
        assert tuple(picture.shape) == tuple(golden["image.shape"])
        close(picture[:, 0, :80:4, :64], golden["image.corner"], 1e-5)
        close_stats(picture, golden["image.stats"])

    def test_patches(self, golden: Any, run: Run) -> None:
        close(run.made["patch_embed"][:, :8], golden["patch.head"], 1e-5)
        close_stats(run.made["patch_embed"], golden["patch.stats"])

    @pytest.mark.parametrize("stage", [0, 1, 2])
    def test_stage(self, golden: Any, run: Run, stage: int) -> None:
        found = run.made[f"layers.{stage}"]
        close(found[:, :8, :64], golden[f"layer{stage}.x.head"], 1e-5)
        close_stats(found, golden[f"layer{stage}.x.stats"])

    @pytest.mark.parametrize("stage", [0, 1, 2])
    def test_value_branch_of_earlier_stages(
        self, golden: Any, side: AudioSide, run: Run, stage: int
    ) -> None:
        """Thrown away by the published model; its values show that ours of the last is meant so."""
        layer = side.tower.encoder.layers[stage]
        block = layer.blocks[-1]
        hidden = run.given[f"layers.{stage}.blocks.{len(layer.blocks) - 1}"]
        values = block.attention.self.value(block.layernorm_before(hidden))
        hidden = hidden + block.attention.output.dense(values)
        grid = 64 >> stage
        found = layer.downsample(hidden + block.layernorm_after(hidden), (grid, grid))
        close(found[:, :8, :64], golden[f"layer{stage}.v.head"], 1e-5)
        close_stats(found, golden[f"layer{stage}.v.stats"])

    def test_value_branch_of_the_last_stage(self, golden: Any, run: Run) -> None:
        found = run.made["layers.3"]
        close(found[:, :8, :64], golden["layer3.v.head"], 1e-5)
        close_stats(found, golden["layer3.v.stats"])

    def test_ordinary_branch_of_the_last_stage(
        self, golden: Any, side: AudioSide, run: Run, weights: dict[str, Tensor]
    ) -> None:
        """What the tower leaves out, from the weights that it leaves out: these are known, too."""
        encoder = side.tower.encoder
        block = type(encoder.layers[0].blocks[0])(encoder.config, 768, (8, 8), 32).eval()
        # The names of a block that is not the last, whose parts are all kept.
        last, other = "layers.3.blocks.1.", "layers.0.blocks.0."
        own = {key.replace(last, other): v for key, v in weights.items() if key.startswith(last)}
        renamed = tower_state(own).items()
        state = {name.removeprefix(f"encoder.{other}"): value for name, value in renamed}
        index = block.attention.self.relative_position_index
        block.load_state_dict(state | {"attention.self.relative_position_index": index})
        with torch.no_grad():
            found = block(run.given["layers.3.blocks.1"], (8, 8))[0]
        close(found[:, :8, :64], golden["layer3.x.head"], 1e-5)
        close_stats(found, golden["layer3.x.stats"])
        close(encoder.norm(found).amax(dim=1), golden["maxpooled_unused"], 1e-5)

    def test_tokens(self, golden: Any, run: Run) -> None:
        close(run.hidden, golden["hidden"], 1e-5)
        close_stats(run.hidden, golden["hidden.stats"])


class TestEmbedding:
    def test_embedding(
        self, golden: Any, filler: ModuleType, side: AudioSide, mel: Tensor, run: Run
    ) -> None:
        codebook = Codebook(16_000, 1024, 1000.0).requires_grad_(False)
        codebook.codes.copy_(torch.from_numpy(filler.draw("fdt.space_dict", (16_000, 1024))))
        queries = side.query(run.hidden)
        close(queries[:, :4, :128], golden["query.head"], 1e-5)
        pooled = codebook.logits(queries).amax(dim=-2)
        close(pooled, golden["pooled_logits"], 1e-5)
        weight = sparsemax(pooled)
        assert np.abs((weight > 0).sum(-1).numpy() - golden["nnz"]).max() <= 2
        expected = np.zeros(weight.shape, np.float32)
        expected[golden["sparse.row"], golden["sparse.col"]] = golden["sparse.val"]
        np.testing.assert_allclose(weight.numpy(), expected, rtol=0, atol=1e-7)
        close(weight @ codebook.codes, golden["embed"], 1e-5)
        unit = codebook.combine(pooled)
        np.testing.assert_allclose(unit.numpy(), golden["embed_l2"], rtol=0, atol=1e-6)
        assert (unit.numpy() * golden["embed_l2"]).sum(-1).min() > 0.999999


class TestTower:
    def test_a_clip_does_not_depend_on_its_batch(
        self, side: AudioSide, mel: Tensor, run: Run
    ) -> None:
        alone = side.queries(mel[1:])
        torch.testing.assert_close(alone, side.query(run.hidden)[1:], rtol=0, atol=2e-5)

    def test_the_last_block_does_not_attend(self, side: AudioSide) -> None:
        block = side.tower.encoder.layers[-1].blocks[-1]
        parts = {name.rpartition(".")[0] for name in block.state_dict()}
        assert parts == {
            "layernorm_before",
            "attention.self.value",
            "attention.output.dense",
            "layernorm_after",
        }


class TestNames:
    def test_each_weight_is_used_once_or_known_as_unused(
        self, side: AudioSide, weights: dict[str, Tensor]
    ) -> None:
        left_out = {key for key in weights if any(fnmatchcase(key, p) for p in UNUSED)}
        state = tower_state(weights)
        assert state.keys() == side.tower.state_dict().keys()
        used = sum(weights[key].numel() for key in weights.keys() - left_out)
        # Of the last block's query, key and value only the value is kept.
        assert sum(value.numel() for value in state.values()) == used - 2 * (768 * 768 + 768)
        stale = [p for p in UNUSED if not any(fnmatchcase(key, p) for key in weights)]
        assert stale == []

    def test_thirds_are_query_key_and_value(self, weights: dict[str, Tensor]) -> None:
        state = tower_state(weights)
        qkv = weights["layers.2.blocks.3.attn.qkv.weight"]
        for i, name in enumerate(("query", "key", "value")):
            third = state[f"encoder.layers.2.blocks.3.attention.self.{name}.weight"]
            assert torch.equal(third, qkv[384 * i : 384 * (i + 1)])
            assert third.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr()

    @pytest.mark.parametrize(
        "key",
        [
            "layers.0.blocks.0.norm3.weight",
            "layers.0.upsample.norm.weight",
            "bn1.weight",
            "blocks.0.norm1.weight",
            "audio_projection.weight",
            "",
        ],
    )
    def test_unknown_names_are_told(self, weights: dict[str, Tensor], key: str) -> None:
        with pytest.raises(ModelError, match=f"no place for {key}"):
            tower_state(weights | {key: torch.zeros(1)})

    def test_what_cannot_be_split_is_told(self) -> None:
        for value in (torch.zeros(287, 96), torch.tensor(1.0)):
            with pytest.raises(ModelError, match=r"blocks\.0\.attn\.qkv\.weight"):
                tower_state({"layers.0.blocks.0.attn.qkv.weight": value})

    def test_missing_names_are_told(self, side: AudioSide, weights: dict[str, Tensor]) -> None:
        less = {key: v for key, v in weights.items() if key != "bn0.running_mean"}
        with pytest.raises(RuntimeError, match=r"Missing key.*encoder\.batch_norm\.running_mean"):
            side.tower.load_state_dict(tower_state(less))

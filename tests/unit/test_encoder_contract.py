"""The contract of encoders, kept by those that come with soundmap."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace

from soundmap.encoder import DEFAULT_MODEL, Encoder, find_model, load_encoder
from soundmap.encoder.card import file_sha256, read_card
from soundmap.encoder.torch_encoder import TEXT_TABLE, TorchEncoder, model_config
from soundmap.errors import ModelError, UsageError
from soundmap.nn.model import ModelConfig, SoundModel
from soundmap.nn.vit import ViTConfig
from soundmap.testing.encoder_contract import EncoderContract
from soundmap.testing.fake_encoder import FakeEncoder
from soundmap.train.bundle import Recipe, write_model
from soundmap.train.loop import Spent

TINY = ModelConfig(
    vit=ViTConfig(
        window_px=32, patch_px=8, width=16, depth=1, heads=2, stem=(4, 8, 8), stem_strides=(2, 2, 2)
    ),
    token_dim=16,
    dim=24,
    codes=32,
    temperature=0.5,
    text_dim=12,
)
WORDS = ("[UNK]", "church", "bells", "birdsong", "traffic")


def write_tiny(folder: Path, config: ModelConfig = TINY) -> Path:
    """Write a model folder with random weights."""
    folder.mkdir()
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(3)
    model = SoundModel(config)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            # As after training, so that folding it in the convolutions has something to fold.
            layer.running_mean.uniform_(-0.5, 0.5)
            layer.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.uniform_(layer.bias, -0.5, 0.5)
    table = np.random.default_rng(0).normal(size=(len(WORDS), 12)).astype(np.float16)
    table[0] = 0
    write_model(folder, model.eval(), table, Recipe(model=config), Spent())
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tiny_local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "local"
    return write_tiny(folder, replace(TINY, local_patches=True))


@pytest.fixture(scope="module")
def tiny_metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Knows place, month and hour, and was trained on larger crops, of one tile and of three."""
    folder = tmp_path_factory.mktemp("models") / "metadata"
    write_tiny(folder, replace(TINY, metadata=("asource", "latlong", "month", "time")))
    card = json.loads((folder / "model.json").read_text())
    own = {"native_px": 40, "scales": [1, 3], "metadata": ["lonlat", "month", "hour"]}
    card["input"] |= own | {"gsd_m": [[10, 10]]}
    (folder / "model.json").write_text(json.dumps(card))
    return folder


@pytest.fixture(scope="module")
def bundled() -> Encoder:
    return load_encoder(DEFAULT_MODEL, device="cpu", precision="float32")


class TestFake(EncoderContract):
    tolerance = 1e-7

    def make_encoder(self) -> Encoder:
        return FakeEncoder()


class TestFakeWithContext(EncoderContract):
    tolerance = 1e-7

    def make_encoder(self) -> Encoder:
        return FakeEncoder(
            32, window_px=224, patch_px=16, gsd_m=((0.6, 0.6), (10, 10)), context=0.4
        )


class TestFakeWithNearContext(EncoderContract):
    tolerance = 1e-7

    def make_encoder(self) -> Encoder:
        return FakeEncoder(context=0.4, context_px=11)


class TestTorch(EncoderContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tiny: Path) -> None:
        self.folder = tiny

    def make_encoder(self) -> Encoder:
        return load_encoder(str(self.folder), device="cpu", threads=1)


class TestTorchOnThreads(TestTorch):
    def make_encoder(self) -> Encoder:
        return load_encoder(str(self.folder), device="cpu", threads=3)


class TestTorchOfLocalPatches(EncoderContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tiny_local: Path) -> None:
        self.folder = tiny_local

    def make_encoder(self) -> Encoder:
        return load_encoder(str(self.folder), device="cpu", threads=2)

    def test_card_says_how_far_a_patch_sees(self) -> None:
        assert self.make_encoder().spec.context_px == 7


class TestTorchWithMetadata(EncoderContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tiny_metadata: Path) -> None:
        self.folder = tiny_metadata

    def make_encoder(self) -> Encoder:
        return load_encoder(str(self.folder), device="cpu", threads=2)


class TestBundled(EncoderContract):
    @pytest.fixture(autouse=True)
    def _load(self, bundled: Encoder, tmp_path: Path) -> None:
        self.bundled = bundled
        time_s = np.arange(3 * 32000) / 32000
        noise = np.random.default_rng(0).normal(size=len(time_s))
        waves = {
            "hum": np.sin(2 * np.pi * 120 * time_s),
            "chirps": np.sin(2 * np.pi * 4000 * time_s) * (time_s % 0.5 < 0.1),
            "hiss": noise,
        }
        for name, wave in waves.items():
            soundfile.write(tmp_path / f"{name}.wav", 0.2 * wave, 32000)
        self.clips = tuple(str(tmp_path / f"{name}.wav") for name in waves)

    def make_encoder(self) -> Encoder:
        return self.bundled


def test_fake_counts_and_foretells() -> None:
    fake = FakeEncoder(dim=4)
    pixels = np.zeros((2, 3, 64, 64), np.uint8)
    pixels[0, :, :, 32:] = 200
    encoding = fake.encode_images(pixels, gsd_m=8.0)
    assert fake.windows == 2
    assert fake.told_m == [8.0]
    assert encoding.patches is not None
    assert encoding.image is not None
    np.testing.assert_array_equal(encoding.patches[0, 0, 7], fake.embed((200, 200, 200)))
    np.testing.assert_array_equal(encoding.patches[0, 0, 0], fake.embed((0, 0, 0)))
    np.testing.assert_array_equal(encoding.image[0], fake.embed((100, 100, 100)))
    near = FakeEncoder(dim=4, context=0.5).encode_images(pixels).patches
    assert near is not None
    np.testing.assert_allclose(near[0, 0, 0], fake.embed((50, 50, 50)), atol=1e-7)
    with pytest.raises(ValueError, match="at least 4"):
        FakeEncoder(dim=3)


def test_fake_needs_no_torch(project: Path) -> None:
    code = (
        "import sys; from soundmap.testing.fake_encoder import FakeEncoder; "
        "FakeEncoder().encode_text(['rain']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("local", [False, True])
def test_encoder_runs_the_network_of_the_folder(
    local: bool, request: pytest.FixtureRequest
) -> None:
    """Batch norms folded into convolutions and threads change nothing but the last digits."""
    tiny = request.getfixturevalue("tiny_local" if local else "tiny")
    encoder = load_encoder(str(tiny), device="cpu", threads=2)
    state = load_file(str(tiny / "model.safetensors"))
    table = state.pop(TEXT_TABLE)
    model = SoundModel(model_config(dict(read_card(tiny).architecture)))
    model.load_state_dict(state)
    model.eval()
    pixels = np.random.default_rng(5).integers(0, 256, (40, 3, 32, 32), dtype=np.uint8)
    found = encoder.encode_images(pixels, gsd_m=9.0)
    with torch.inference_mode():
        x, gsd_m = torch.from_numpy(pixels), torch.tensor([9.0])
        image = model.encode_image(x, gsd_m).numpy()
        patches = model.encode_patches(x, gsd_m).numpy().reshape(40, 4, 4, 24)
        # A text is the mean of its known words; "and" is not one.
        text = model.encode_text(table[[1, 2]].float().mean(0)[None, None]).numpy()
    np.testing.assert_allclose(found.image, image, atol=2e-5)
    np.testing.assert_allclose(found.patches, patches, atol=2e-5)
    np.testing.assert_allclose(encoder.encode_text(["Church and BELLS"]), text, atol=1e-6)


def test_told_gsd_matters_and_has_a_default(tiny: Path) -> None:
    encoder = load_encoder(str(tiny), device="cpu", threads=1)
    pixels = np.random.default_rng(5).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    coarsest = encoder.spec.gsd_m[-1][1]
    default = encoder.encode_images(pixels).image
    np.testing.assert_array_equal(default, encoder.encode_images(pixels, gsd_m=coarsest).image)
    assert not np.allclose(default, encoder.encode_images(pixels, gsd_m=1.0).image, atol=1e-4)


def test_bfloat16_is_near(tiny: Path) -> None:
    pixels = np.random.default_rng(5).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    full, low = (
        load_encoder(str(tiny), device="cpu", threads=1, precision=p).encode_images(pixels).image
        for p in ("float32", "bfloat16")
    )
    assert full is not None
    assert low is not None
    assert low.dtype == np.float32
    assert (full * low).sum(-1).min() > 0.98


def test_unknown_precision(tiny: Path) -> None:
    with pytest.raises(UsageError, match="none of auto, float32, bfloat16, int8"):
        TorchEncoder(read_card(tiny), "cpu", 1, "float16")


def test_unknown_words(tiny: Path) -> None:
    with pytest.raises(UsageError, match="'zzz' has no word that the model knows"):
        load_encoder(str(tiny), device="cpu", threads=1).encode_text(["church zzz", "zzz"])


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """Copy the tiny model, to be spoilt."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def fails(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_encoder(str(folder), device="cpu", threads=1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_damaged_files(copy: Path, name: str) -> None:
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[:-7] + b"x" * 7)
    assert "does not match the checksum" in fails(copy)
    (copy / name).write_bytes(whole[: len(whole) // 2])
    assert "does not match the checksum" in fails(copy)
    (copy / name).unlink()
    message = fails(copy)
    assert "is missing" in message
    assert name in message


def rewrite(folder: Path, **changes: object) -> None:
    card = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(card | changes))


def test_weights_that_do_not_fit_the_card(copy: Path) -> None:
    architecture = json.loads((copy / "model.json").read_text())["architecture"]
    rewrite(copy, architecture=architecture | {"codes": 31})
    assert "does not fit its card" in fails(copy)
    rewrite(copy, architecture=architecture | {"quantum": True})
    assert "unknown architecture" in fails(copy)
    rewrite(copy, architecture={"dim": 24})
    assert "unknown architecture" in fails(copy)


def test_tokeniser_of_another_model(copy: Path) -> None:
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "rain": 1}, unk_token="[UNK]"))
    tokenizer.save(str(copy / "tokenizer.json"))
    names = ("model.safetensors", "tokenizer.json")
    rewrite(copy, files={n: file_sha256(copy / n) for n in names})
    assert "different models" in fails(copy)


def test_hash_follows_the_weights(tiny: Path, copy: Path) -> None:
    assert read_card(copy).hash == read_card(tiny).hash
    rewrite(copy, files={"model.safetensors": "0" * 64})
    assert read_card(copy).hash != read_card(tiny).hash
    assert find_model(str(copy)).name == "soundmap-small"

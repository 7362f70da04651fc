"""``soundmap caption`` with small vision-language models, made here at random, by the real way."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("transformers")

Command = Callable[..., "subprocess.CompletedProcess[str]"]
Maker = Callable[[str], Path]

WORDS = "What kinds of sound would a person hear at the ? . place birds wind waves bells rain"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
START, END, PAD, UNKNOWN, MARK = "<s>", "</s>", "<pad>", "<unk>", "<image>"


def tokenizer() -> Any:
    """Whole words, and as many more as make answers differ."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    special = [PAD, START, END, UNKNOWN, MARK]
    words = [*special, *dict.fromkeys(WORDS.split()), *(f"sound{i}" for i in range(200))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[MARK],
    )


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices so small are slower in several threads than in one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Folders of models: "llava"; "llava_next", whose images take as many tokens as they need."""
    import torch
    import transformers as t

    root = tmp_path_factory.mktemp("models")
    words = tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2}
    vision = t.CLIPVisionConfig(**size, image_size=28, patch_size=14)
    text = t.LlamaConfig(
        **size,
        vocab_size=len(words),
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    parts: dict[str, Any] = {"vision_config": vision, "text_config": text, "image_token_index": 4}
    crop = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    frame = {"patch_size": 14, "vision_feature_select_strategy": "default"}
    frame |= {"num_additional_image_tokens": 1}

    def call(kind: str) -> Path:
        folder = root / kind
        if folder.exists():
            return folder
        torch.manual_seed(5)
        template = None if kind == "llava_plain" else TEMPLATE
        if kind.startswith("llava_next"):
            grids = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
            model: Any = t.LlavaNextForConditionalGeneration(t.LlavaNextConfig(**parts, **grids))
            images: Any = t.LlavaNextImageProcessor(**crop, **grids)
            processor: Any = t.LlavaNextProcessor(images, words, chat_template=template, **frame)
        else:
            model = t.LlavaForConditionalGeneration(t.LlavaConfig(**parts))
            images = t.CLIPImageProcessor(**crop)
            processor = t.LlavaProcessor(images, words, chat_template=template, **frame)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    return call


@pytest.fixture(scope="module")
def llava(make: Maker) -> Path:
    return make("llava")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(2)
    for i, shape in enumerate([(40, 40), (30, 80), (90, 30), (120, 60), (50, 44)]):
        blocks = generator.integers(0, 255, (shape[0] // 10, shape[1] // 10, 3), dtype=np.uint8)
        picture = Image.fromarray(blocks).resize((shape[1], shape[0]), Image.Resampling.NEAREST)
        picture.save(folder / f"{i}.png")
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def captions(path: Path) -> list[str]:
    return [row["caption"] for row in rows(path)]


def refused(result: subprocess.CompletedProcess[str], *about: str) -> None:
    assert result.returncode not in (0, None)
    assert not result.stdout
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == lines[0]
    for text in about:
        assert text in lines[0]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that a model was shown."""
    from soundmap.products.caption_model import Captioner

    sizes: list[int] = []
    inner = Captioner.__call__

    def count(self: Captioner, pictures: Sequence[Image.Image]) -> list[str]:
        sizes.append(len(pictures))
        return inner(self, pictures)

    monkeypatch.setattr(Captioner, "__call__", count)
    return sizes


class TestCaptions:
    def test_a_folder(
        self, command: Command, llava: Path, photos: Path, tmp_path: Path, shown: list[int]
    ) -> None:
        out = tmp_path / "out.csv"
        call = ("caption", "--images", photos, "--out", out, "--model", llava, "--batch", 2)
        done = command(*call, "--tokens", 6)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"Wrote {out}: 5 captions made\n"
        assert not re.search("warning|Loading weights", done.stderr, re.IGNORECASE), done.stderr
        found = rows(out)
        assert len({row["caption"] for row in found}) > 1
        for row in found:
            assert 1 <= len(row["caption"].split()) <= 6
            # The answer alone: neither the question nor what frames it.
            assert "assistant" not in row["caption"]
            assert row["model"] == str(llava)
            assert row["settings"] == "tokens=6"
        assert shown == [2, 2, 1]
        # Half of it undone by hand, as a kill would leave it.
        whole = out.read_bytes()
        out.write_bytes(b"".join(whole.splitlines(keepends=True)[:4])[:-20])
        again = command(*call, "--tokens", 6)
        assert "3 captions made, 2 were there" in again.stdout
        assert out.read_bytes() == whole
        assert shown[3:] == [2, 1]
        assert command(*call, "--tokens", 6, "--quiet").stderr == ""
        refused(command(*call), "tokens '6', now '77'")
        refused(command(*call, "--tokens", 6, "--prompt", "Why?"), "prompt", "now 'Why?'")

    @pytest.mark.parametrize("kind", ["llava", "llava_next"])
    def test_words_do_not_depend_on_the_batch_nor_on_the_run(
        self, command: Command, make: Maker, photos: Path, tmp_path: Path, kind: str
    ) -> None:
        found = []
        for number, batch in enumerate((1, 3, 5, 5)):
            out = tmp_path / f"{number}.csv"
            done = command(
                *("caption", "--images", photos, "--out", out, "--model", make(kind)),
                *("--batch", batch, "--tokens", 12),
            )
            assert done.returncode == 0, done.stderr
            found.append(captions(out))
        assert found[0] == found[1] == found[2] == found[3]
        assert len(set(found[0])) > 1

    def test_images_of_different_length_are_padded_on_the_left(
        self, make: Maker, photos: Path
    ) -> None:
        from soundmap.products.caption_model import Captioner

        captioner = Captioner(str(make("llava_next")), "What sound?", tokens=3)
        pictures = [Image.open(photos / f"{i}.png").convert("RGB") for i in range(4)]
        inputs = captioner._processor(
            images=[[p] for p in pictures], text=[captioner._words] * 4, padding=True
        )
        padded = [row.count(0) for row in inputs["input_ids"]]
        assert max(padded) > 0
        assert all(set(row[:n]) <= {0} for row, n in zip(inputs["input_ids"], padded, strict=True))
        assert captioner(pictures) == [captioner([p])[0] for p in pictures]

    @pytest.mark.parametrize(
        ("kind", "prompt", "framed"),
        [
            ("llava", "What sound?", "user: <image> What sound? assistant:"),
            ("llava_plain", "What sound?", "<image>\nWhat sound?"),
            ("llava", "Q: <image> hear A:", "Q: <image> hear A:"),
        ],
    )
    def test_how_the_question_is_put(
        self, make: Maker, kind: str, prompt: str, framed: str
    ) -> None:
        from soundmap.products.caption_model import Captioner

        captioner = Captioner(str(make(kind)), prompt)
        assert captioner._words == framed
        assert not captioner._text_options

    def test_the_first_token_is_not_written_twice(self, make: Maker, tmp_path: Path) -> None:
        from soundmap.products.caption_model import Captioner

        folder = shutil.copytree(make("llava"), tmp_path / "llava")
        (folder / "chat_template.jinja").write_text("{{ bos_token }}" + TEMPLATE)
        captioner = Captioner(str(folder), "What sound?")
        assert captioner._words.startswith(START)
        assert captioner._text_options == {"add_special_tokens": False}

    @pytest.mark.parametrize("precision", ["bfloat16", "float16"])
    def test_precision(self, llava: Path, photos: Path, precision: str) -> None:
        import torch

        from soundmap.products.caption_model import Captioner

        captioner = Captioner(str(llava), "What sound?", tokens=4, precision=precision)
        assert captioner._model.dtype == getattr(torch, precision)
        assert captioner([Image.open(photos / "0.png").convert("RGB")])[0]

    def test_windows_of_a_raster(
        self, command: Command, llava: Path, town: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "w.csv"
        done = command(
            *("caption", "--images", town, "--windows", 96, "--out", out),
            *("--model", llava, "--tokens", 3),
        )
        assert done.returncode == 0, done.stderr
        found = rows(out)
        assert [(row["row"], row["col"]) for row in found] == [
            (row, col) for row in ("0", "96") for col in ("0", "96", "160")
        ]
        assert all(row["caption"] and row["image"] == str(town) for row in found)

    def test_bad_images_are_told(
        self, command: Command, llava: Path, photos: Path, tmp_path: Path
    ) -> None:
        folder, out = shutil.copytree(photos, tmp_path / "photos"), tmp_path / "out.csv"
        (folder / "1.png").write_text("broken")
        done = command(
            *("caption", "--images", folder, "--out", out, "--model", llava, "--tokens", 3)
        )
        assert done.returncode == 1
        assert done.stdout == f"Wrote {out}: 4 captions made, 1 failed\n"
        assert f"Error: 1 image has no caption; the reasons stand in {out}" in done.stderr
        assert [bool(row["error"]) for row in rows(out)] == [False, True, False, False, False]


class TestModelsThatDoNot:
    @pytest.fixture
    def caption(self, command: Command, photos: Path, tmp_path: Path) -> Command:
        def call(model: object, *more: object) -> subprocess.CompletedProcess[str]:
            out = tmp_path / "out.csv"
            result = command("caption", "--images", photos, "--out", out, "--model", model, *more)
            assert not out.exists()
            return result

        return call

    @pytest.fixture
    def broken(self, llava: Path, tmp_path: Path) -> Path:
        """A copy to be broken."""
        return shutil.copytree(llava, tmp_path / "broken")

    def test_of_another_kind(self, caption: Command, project: Path, tmp_path: Path) -> None:
        from transformers import CLIPVisionConfig

        CLIPVisionConfig().save_pretrained(tmp_path / "clip")
        refused(caption(tmp_path / "clip"), "is a clip_vision_model model, which does not tell")
        refused(caption(project / "models" / "soundmap-small"), "no config.json")

    def test_with_code_of_its_own(self, caption: Command, broken: Path) -> None:
        config = json.loads((broken / "config.json").read_text())
        config |= {"model_type": "new", "auto_map": {"AutoConfig": "code.Config"}}
        (broken / "config.json").write_text(json.dumps(config))
        (broken / "code.py").write_text("raise SystemExit('it ran')")
        refused(caption(broken), "code of its own, which soundmap does not run")

    def test_with_weights_that_can_run_code(self, caption: Command, broken: Path) -> None:
        (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
        refused(caption(broken), "no weights as safetensors")

    def test_cut_short(self, caption: Command, broken: Path) -> None:
        path = broken / "model.safetensors"
        path.write_bytes(path.read_bytes()[:5000])
        refused(caption(broken), "damaged or not whole")

    def test_with_weights_missing(self, caption: Command, broken: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = broken / "model.safetensors"
        state = load_file(path)
        lost = next(key for key in state if "projector" in key)
        save_file({k: v for k, v in state.items() if k != lost}, path, metadata={"format": "pt"})
        refused(caption(broken), "1 of its weights are missing", "projector")

    def test_without_a_processor(self, caption: Command, broken: Path) -> None:
        (broken / "processor_config.json").unlink()
        refused(caption(broken), "broken", "processor")

    def test_whose_template_takes_no_image(self, caption: Command, broken: Path) -> None:
        (broken / "chat_template.jinja").write_text("{{ raise_exception('words alone') }}")
        refused(caption(broken), "chat template", "words alone")

    def test_that_takes_no_question(self, caption: Command, llava: Path) -> None:
        # The mark for an image twice, and one image.
        refused(caption(llava, "--prompt", "<image> <image>"), "does not work with images")

    def test_nowhere(
        self, program: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for key in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
            monkeypatch.delenv(key, raising=False)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        result = program(
            *("caption", "--images", photos, "--out", tmp_path / "out.csv"), timeout_s=60
        )
        refused(
            result,
            "the vision-language model llava-hf/llava-1.5-7b-hf is not on this machine",
            "127.0.0.1:9 cannot be reached",
            "hf download llava-hf/llava-1.5-7b-hf --local-dir DIR",
            "--model DIR",
        )

    def test_in_the_cache_of_the_hub(
        self,
        command: Command,
        llava: Path,
        photos: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        import huggingface_hub as hub

        monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
        held = tmp_path / "models--some--llava"
        (held / "refs").mkdir(parents=True)
        (held / "refs" / "main").write_text("abc")
        snapshot = Path(shutil.copytree(llava, held / "snapshots" / "abc"))
        call = ("caption", "--images", photos / "0.png", "--model", "some/llava", "--tokens", 3)
        done = command(*call, "--out", tmp_path / "1.csv")
        assert done.returncode == 0, done.stderr
        assert rows(tmp_path / "1.csv")[0]["model"] == "some/llava"
        (snapshot / "model.safetensors").unlink()
        index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(command(*call, "--out", tmp_path / "2.csv"), "offline mode is on (HF_HUB_OFFLINE)")

    def test_neither_a_folder_nor_a_name(self, caption: Command) -> None:
        refused(caption("./none/of/these"), "is neither a folder nor the name of a repository")

    def test_no_gpu(self, caption: Command, llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        refused(caption(llava, "--device", "cuda"), "finds no GPU on this machine")

    def test_too_large_a_batch(
        self,
        command: Command,
        llava: Path,
        photos: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from soundmap.products.caption_model import Captioner

        def full(*_: object) -> list[str]:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

        monkeypatch.setattr(Captioner, "_answer", full)
        call = ("caption", "--images", photos, "--out", tmp_path / "out.csv", "--model", llava)
        refused(command(*call, "--batch", 4), "a batch of 4 images", "try --batch 2")
        refused(command(*call, "--batch", 1), "a smaller --model")

"""A vision-language model that answers one question about pictures."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from soundmap.encoder.repository import repository_folder
from soundmap.errors import MissingExtra, ModelError, UsageError

DEFAULT_VLM = "llava-hf/llava-1.5-7b-hf"
"""The model that the paper captioned with."""

QUESTION = (
    "What kinds of sound would a person hear at the place that this aerial image shows? "
    "Answer in at most two sentences."
)
"""What the paper asked it, in other words."""

PRECISIONS = ("float32", "bfloat16", "float16")

# All that transformers may read, but no weights that are pickles, and not a second copy of them.
_FILES = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "model.safetensors",
    "model-*.safetensors",
)
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class Captioner:
    """Answers a question about pictures, by greedy decoding.

    The words of a picture do not depend on the pictures that it is put to the model with, but for
    rounding: shorter rows of a batch are padded on the left and the padding is masked.

    Parameters
    ----------
    name
        A repository of the hub, or a folder, with a model for images and text to text.
    prompt
        The question. It is put into the model's chat template, or behind its mark for an image; a
        prompt that holds that mark itself is taken as it stands.
    tokens
        Most new tokens of an answer.
    device
        "auto", "cpu" or "cuda".
    precision
        "auto" (float16 on a GPU, float32 on processors), "float32", "bfloat16" or "float16".

    Raises
    ------
    UsageError
        There is no such device or precision.
    ModelError
        The model is nowhere, damaged, or of another kind.
    MissingExtra
        The libraries that run it are not installed.
    """

    def __init__(
        self,
        name: str = DEFAULT_VLM,
        prompt: str = QUESTION,
        tokens: int = 77,
        device: str = "auto",
        precision: str = "auto",
    ) -> None:
        if find_spec("transformers") is None:
            raise MissingExtra("transformers", "caption", "captioning images")
        import torch

        self.name = name
        self.tokens = tokens
        self.device = _choose_device(device)
        dtype = getattr(torch, choose_precision(precision, self.device))
        folder = repository_folder(
            name,
            what="the vision-language model",
            extra="caption",
            files=_FILES,
            whole=_is_whole,
            advice="give it with --model DIR",
        )
        # After the files are found: it takes seconds.
        import transformers

        with _quiet_library():
            _check_kind(transformers, folder, name)
            self._processor = _read_processor(transformers, folder, name)
            self._model = _read_model(transformers, folder, name, dtype, self.device)
            self._words, self._in_lists, self._text_options = self._frame(prompt)
        tokenizer = self._processor.tokenizer
        if not self._model.config.is_encoder_decoder:
            # Answers go on from the last token: padding there would be answered as well.
            tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Answer the question for each of a batch of RGB pictures, of any sizes.

        Raises
        ------
        UsageError
            The batch does not fit in memory.
        ValueError
            The model's own code does not take one of the pictures.
        """
        import torch

        try:
            with _quiet_library(), torch.inference_mode():
                return self._answer(pictures)
        except (MemoryError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            if isinstance(error, MemoryError) or any(sign in reason for sign in _MEMORY):
                smaller = len(pictures) // 2
                how = f"--batch {smaller}" if smaller else "a smaller --model, or --precision"
                raise UsageError(
                    f"a batch of {len(pictures)} images does not fit in the memory of "
                    f"{self.device}: try {how}"
                ) from error
            if "CUDA" in reason:
                # The device answers nothing more after that, whatever it is asked.
                raise ModelError(f"{self.name} failed on the GPU: {reason[:200]}") from error
            raise ValueError(reason) from error
        except (TypeError, IndexError, KeyError) as error:
            raise ValueError(" ".join(str(error).split())) from error

    def _answer(self, pictures: Sequence[Image.Image]) -> list[str]:
        inputs = self._processor(
            images=[[picture] for picture in pictures] if self._in_lists else list(pictures),
            text=[self._words] * len(pictures),
            padding=True,
            return_tensors="pt",
            **self._text_options,
        ).to(self.device, self._model.dtype)
        found = self._model.generate(
            **inputs,
            max_new_tokens=self.tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self._processor.tokenizer.pad_token_id,
        )
        asked = inputs["input_ids"]
        # Most models give the question back before the answer, some the answer alone.
        if found.shape[1] >= asked.shape[1] and bool((found[:, : asked.shape[1]] == asked).all()):
            found = found[:, asked.shape[1] :]
        texts = self._processor.tokenizer.batch_decode(found, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _frame(self, prompt: str) -> tuple[str, bool, dict[str, Any]]:
        """Put the question as the model was trained to read it.

        Returns
        -------
        tuple
            The text; whether the processor takes a list of pictures for every text, as all with a
            chat template do; and what its tokenizer must be told.
        """
        processor = self._processor
        mark = getattr(processor, "image_token", None)
        has_template = bool(getattr(processor, "chat_template", None))
        if mark and str(mark) in prompt:
            text = prompt
        elif has_template:
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            try:
                text = processor.apply_chat_template(
                    [{"role": "user", "content": content}],
                    add_generation_prompt=True,
                    tokenize=False,
                )
            except Exception as error:
                raise ModelError(
                    f"the chat template of {self.name} does not take an image and a question: "
                    f"{_first_line(error)}"
                ) from error
        else:
            text = f"{mark}\n{prompt}" if mark else prompt
        start = processor.tokenizer.bos_token
        # Some templates write the token that tokenizers put first: it must not stand twice.
        written = bool(start) and text.startswith(start)
        return text, has_template, {"add_special_tokens": False} if written else {}


def choose_precision(precision: str, device: str) -> str:
    """Say what to compute with.

    Raises
    ------
    UsageError
        There is no such precision.
    """
    if precision == "auto":
        return "float32" if device == "cpu" else "float16"
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is none of auto, {', '.join(PRECISIONS)}")
    return precision


def _choose_device(device: str) -> str:
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {device!r} is none of auto, cpu, cuda")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda: PyTorch finds no GPU on this machine: use cpu or auto")
    return device


def _is_whole(folder: Path) -> bool:
    """Whether all files of a model are in a folder of the hub's cache."""
    if not (folder / "config.json").is_file():
        return False
    if not any((folder / name).is_file() for name in _PROCESSORS):
        return False
    if (folder / _WEIGHTS).is_file():
        return True
    try:
        parts = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError):
        return False
    return all((folder / part).is_file() for part in parts)


def _check_kind(transformers: Any, folder: Path, name: str) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{name} is no folder of a transformers model (it has no config.json): name another "
            f"with --model, such as {DEFAULT_VLM}"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        if "trust_remote_code" in str(error):
            reason = "it comes with code of its own, which soundmap does not run"
        else:
            reason = _first_line(error)
        raise ModelError(
            f"{name} cannot be used: {reason}: name another with --model, such as {DEFAULT_VLM}"
        ) from error
    if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ModelError(
            f"{name} is a {config.model_type} model, which does not tell what an image shows: name "
            f"a vision-language model with --model, such as {DEFAULT_VLM}"
        )


def _read_processor(transformers: Any, folder: Path, name: str) -> Any:
    try:
        processor = transformers.AutoProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        if "orchvision" in str(error):
            raise ModelError(
                f"{name} prepares its images with torchvision, which is not installed: "
                "pip install torchvision"
            ) from error
        raise ModelError(
            f"the processor of {name} cannot be read, fetch the model again: {_first_line(error)}"
        ) from error
    if not (hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")):
        raise ModelError(
            f"{name} has no processor that takes images and words together: its "
            "preprocessor_config.json is missing, or it is another kind of model"
        )
    return processor


def _read_model(transformers: Any, folder: Path, name: str, dtype: Any, device: str) -> Any:
    if not (folder / _WEIGHTS).is_file() and not (folder / _INDEX).is_file():
        raise ModelError(
            f"{name} has no weights as safetensors ({_WEIGHTS}), and others are not read, since "
            "they can run code: convert them, or name another with --model"
        )
    try:
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model = model.to(device)
    except Exception as error:
        if any(sign in str(error) for sign in _MEMORY) or isinstance(error, MemoryError):
            raise ModelError(
                f"{name} does not fit in the memory of {device}: name a smaller --model, or try "
                "--precision bfloat16"
            ) from error
        raise ModelError(
            f"{name} is damaged or not whole: fetch it again ({_first_line(error)})"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        # The library would fill them with random numbers, and the answers would be babble.
        raise ModelError(
            f"{name} is not whole: {len(missing)} of its weights are missing ({missing[0]}): "
            "fetch it again"
        )
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _quiet_library() -> Iterator[None]:
    """Keep transformers from warning of what is chosen on purpose, and from its own bars."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).strip().partition("\n")[0].split())[:200] or type(error).__name__

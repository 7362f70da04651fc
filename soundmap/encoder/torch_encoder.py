"""A model folder run by PyTorch. Torch stops here: NumPy in, NumPy out."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from soundmap.encoder.base import Encoding, check_conditions
from soundmap.encoder.card import InputSpec, ModelCard, verify_files
from soundmap.encoder.flan import FlanText
from soundmap.encoder.memory import keep_freed_memory
from soundmap.encoder.text import StaticText, TextTokens
from soundmap.errors import MissingExtra, ModelError, UsageError
from soundmap.nn.audio_small import AudioConfig
from soundmap.nn.metadata import Metadata, encode_hour, encode_latlong, encode_month
from soundmap.nn.model import ModelConfig, SoundModel
from soundmap.nn.vit import ViTConfig

WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
TEXT_TABLE = "text.table"
# Weights of the tower for sound: read when the first clip is to be encoded.
_SOUND_PARTS = ("audio.", "scales.")
PRECISIONS = ("float32", "bfloat16", "int8")
# Few enough that activations stay near one core, many enough that operators are worth starting.
_PASS_PX = 32 * 64 * 64
# Spectrograms in one pass.
_PASS_CLIPS = 16
# Largest change of a probability that the lower precision may cause.
_MAX_CHANGE = 0.01


def model_config(architecture: dict[str, Any]) -> ModelConfig:
    """Build the architecture that a card states.

    Raises
    ------
    ModelError
        The card names something that this version does not know.
    """
    try:
        values = dict(architecture)
        vit = dict(values.pop("vit"))
        vit["stem"] = tuple(vit.get("stem", ()))
        vit["stem_strides"] = tuple(vit.get("stem_strides", ()))
        values["metadata"] = tuple(values.get("metadata", ()))
        if values.get("audio_tower") is not None:
            tower = dict(values["audio_tower"])
            tower["stem"] = tuple(tower["stem"])
            values["audio_tower"] = AudioConfig(**tower)
        return ModelConfig(vit=ViTConfig(**vit), **values)
    except (KeyError, TypeError) as error:
        raise ModelError(f"the model's card states an unknown architecture: {error}") from error


def cpu_has_bfloat16() -> bool:
    """Tell whether this processor multiplies bfloat16 in hardware."""
    if torch.cuda.is_available():
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name)()) for name in checks if hasattr(torch.cpu, name))


def _fold_batch_norms(model: SoundModel) -> None:
    stem = model.vit.patch_embed
    if not isinstance(stem, nn.Sequential):
        return
    folded: list[nn.Module] = []
    for layer in stem:
        if isinstance(layer, nn.BatchNorm2d):
            conv = folded.pop()
            assert isinstance(conv, nn.Conv2d)
            folded.append(fuse_conv_bn_eval(conv, layer))
        else:
            folded.append(layer)
    model.vit.patch_embed = nn.Sequential(*folded)


def read_weights(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Read some of a model's weights, by name.

    Raises
    ------
    ModelError
        The file is missing or damaged.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged ({error}): install the model again") from error


def _fill(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise ModelError(f"{path} does not fit its card: {detail}") from error
    module.eval().requires_grad_(False)


class TorchEncoder:
    """A model on this machine's processor or GPU.

    Parameters
    ----------
    card
        The model.
    device
        "auto" takes a GPU where there is one.
    threads
        Windows are shared out to this many threads, each of which runs the network by itself:
        several operators side by side waste less than several threads inside one operator.
        Default: one per core that this process may use.
    precision
        "auto" takes bfloat16 where the processor has it and the card says that no probability
        moves by more than 0.01; "float32", "bfloat16" or "int8" force it. int8 is for processors.

    Raises
    ------
    ModelError
        Files are missing, damaged or do not fit the card.
    """

    def __init__(
        self,
        card: ModelCard,
        device: str = "auto",
        threads: int | None = None,
        precision: str = "auto",
    ) -> None:
        verify_files(card)
        self.card = card
        self._path = card.folder / WEIGHTS_FILE
        self.config = model_config(dict(card.architecture))
        state = read_weights(self._path, lambda name: not name.startswith(_SOUND_PARTS))
        table = state.pop(TEXT_TABLE, None)
        # Made without numbers, which the file has.
        with torch.device("meta"):
            model = SoundModel(replace(self.config, audio=False))
        _fill(model, state, self._path)
        _fold_batch_norms(model)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.precision = self._choose_precision(precision)
        self._text = self._text_side(table)
        if self.precision == "int8":
            from soundmap.nn.int8 import quantise

            quantise(model)
        model = model.to(self.device)
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.threads = threads or cores or 1
        # The setting holds for the thread that makes it, so a caller's own torch is untouched.
        self._pool = ThreadPoolExecutor(
            self.threads, "encode", initializer=lambda: torch.set_num_threads(1)
        )
        self._lock = threading.Lock()

    def _text_side(self, table: Tensor | None) -> TextTokens:
        if table is not None:
            return StaticText.load(self.card.folder / TOKENIZER_FILE, table.numpy())
        try:
            name = str(self.card.data["text"]["encoder"])
        except (KeyError, TypeError) as error:
            raise ModelError(
                f"{self._path} holds no token vectors ({TEXT_TABLE}), and the card of "
                f"{self.card.name} names no text encoder: install the model again"
            ) from error
        return FlanText(name, self.config.text_dim)

    def _choose_precision(self, precision: str) -> str:
        if precision == "auto":
            change = self.card.data.get("precision", {}).get("bfloat16_max_probability_change", 1.0)
            fits = change <= _MAX_CHANGE and (self.device.type == "cuda" or cpu_has_bfloat16())
            return "bfloat16" if fits else "float32"
        if precision not in PRECISIONS:
            raise UsageError(f"precision {precision!r} is none of auto, {', '.join(PRECISIONS)}")
        if precision == "int8" and self.device.type != "cpu":
            raise UsageError("precision int8 is for processors: on a GPU use bfloat16")
        return precision

    @property
    def id(self) -> str:
        """Digest of everything that decides the embeddings."""
        return self.card.hash

    @property
    def spec(self) -> InputSpec:
        """What the encoder reads."""
        return self.card.spec

    @property
    def dim(self) -> int:
        """Length of an embedding, D."""
        return self.config.dim

    @property
    def share_scale(self) -> float:
        """The model's own learned scale of similarities."""
        return float(self.model.logit_scale.exp())

    def encode_images(
        self,
        pixels: NDArray[np.uint8],
        lonlat: NDArray[np.float64] | None = None,
        month: int | None = None,
        hour: int | None = None,
        scale: int = 1,
        *,
        gsd_m: float | None = None,
        details: tuple[str, ...] = ("image", "patch"),
    ) -> Encoding:
        """Encode windows; see `soundmap.encoder.Encoder.encode_images`.

        Raises
        ------
        UsageError
            The windows have the wrong shape or type, or an input is given that the model lacks.
        """
        self._check_windows(pixels, details)
        name = f"the model {self.card.name}"
        check_conditions(self.spec, name, len(pixels), lonlat, month, hour, scale)
        metadata = self._metadata(len(pixels), lonlat, month, hour)
        told = self.spec.gsd_m[-1][1] * scale if gsd_m is None else gsd_m
        height, width = pixels.shape[2:]
        count = max(1, _PASS_PX // (height * width))
        starts = range(0, len(pixels), count)

        def run(start: int) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
            stop = min(start + count, len(pixels))
            return self._pass(pixels[start:stop], told, details, metadata.part(start, stop))

        if self.device.type == "cpu":
            # Even a single pass: elsewhere the network would take as many threads as torch likes,
            # more than were asked for, and its sums might depend on their number.
            results = list(self._pool.map(run, starts))
        else:
            results = [run(start) for start in starts]
        rows, cols = height // self.spec.patch_px, width // self.spec.patch_px

        def join(index: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
            found = [r[index] for r in results if r[index] is not None]
            empty = np.zeros((0, *shape), np.float32)
            return np.concatenate([empty, *(np.asarray(f) for f in found)])

        return Encoding(
            image=join(0, (self.dim,)) if "image" in details else None,
            patches=join(1, (rows, cols, self.dim)) if "patch" in details else None,
        )

    def _check_windows(self, pixels: NDArray[np.uint8], details: tuple[str, ...]) -> None:
        side, patch = self.spec.window_px, self.spec.patch_px
        right = pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.dtype == np.uint8
        if right and self.spec.context_px is not None and details == ("patch",):
            # Patches that know little of their window may be read in windows of any size.
            right = pixels.shape[2] % patch == 0 and pixels.shape[3] % patch == 0
        elif right:
            right = pixels.shape[2:] == (side, side)
        if not right:
            given_as = f"{pixels.dtype}{list(pixels.shape)}"
            raise UsageError(f"windows must be uint8[B, 3, {side}, {side}], not {given_as}")

    def _metadata(
        self,
        windows: int,
        lonlat: NDArray[np.float64] | None,
        month: int | None,
        hour: int | None,
    ) -> Metadata:
        """Encode what is given; all else stays masked: the sources always, which nobody knows."""
        values: dict[str, Tensor] = {}
        if lonlat is not None:
            values["latlong"] = encode_latlong(torch.from_numpy(np.asarray(lonlat, np.float64)))
        if month is not None:
            values["month"] = encode_month(torch.tensor([month] * windows))
        if hour is not None:
            values["time"] = encode_hour(torch.tensor([hour] * windows))
        return Metadata({name: value.to(self.device) for name, value in values.items()}, {})

    @torch.inference_mode()
    def _pass(
        self,
        pixels: NDArray[np.uint8],
        gsd_m: float,
        details: tuple[str, ...],
        metadata: Metadata,
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
        x = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device)
        x = x.contiguous(memory_format=torch.channels_last)
        gsd = torch.tensor([gsd_m], device=self.device)
        model = self.model
        codebook = model.image_codebook or model.codebook
        local = model.config.local_patches
        image = patches = None
        lower = self.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=lower):
            grid = model.embed(x)
            queries = None
            if "image" in details or not local:
                queries = model.queries(grid, gsd, metadata=metadata)
            single = model.queries(grid, gsd, True) if local and "patch" in details else queries
        if "image" in details:
            assert queries is not None
            image = codebook.pool(queries.float()).cpu().numpy()
        if "patch" in details:
            assert single is not None
            rows, cols = grid.shape[-2:]
            # Behind the patches stand the fields of metadata.
            each = codebook.each(single[:, : rows * cols].float())
            patches = each.view(len(x), rows, cols, -1).cpu().numpy()
        return image, patches

    @torch.inference_mode()
    def encode_text(self, texts: list[str]) -> NDArray[np.float32]:
        """Encode texts: float32[N, D], unit vectors.

        Raises
        ------
        UsageError
            A text has no word that the model knows.
        ModelError
            The text encoder is not on this machine and cannot be fetched.
        MissingExtra
            The library that runs the text encoder is not installed.
        """
        tokens = self._text.tokens(texts)
        result = np.empty((len(texts), self.dim), np.float32)
        # Texts of one length at a time: padding would enter the maximum over the tokens, and a
        # text's numbers would depend on its neighbours.
        for length in sorted({len(t) for t in tokens}):
            same = [i for i, t in enumerate(tokens) if len(t) == length]
            batch = torch.from_numpy(np.stack([tokens[i] for i in same])).to(self.device)
            result[same] = self.model.encode_text(batch).float().cpu().numpy()
        return result

    @torch.inference_mode()
    def encode_audio(self, clips: Sequence[str | Path]) -> NDArray[np.float32]:
        """Encode sound files: float32[N, D], unit vectors.

        A clip longer than ten seconds is cut into pieces of ten seconds, whose unit vectors are
        averaged; a shorter one is followed by silence.

        Raises
        ------
        UsageError
            The model has no tower for sound.
        InputError
            A file cannot be read, or holds no sound.
        MissingExtra
            A library that this needs is not installed.
        """
        self._check_hears()
        from soundmap.encoder.audio import read_segments
        from soundmap.nn.mel import log_mel

        self._load_audio()
        result = np.empty((len(clips), self.dim), np.float32)
        for row, clip in zip(result, clips, strict=True):
            total = torch.zeros(self.dim)
            for piece in read_segments(clip):
                # On the processor: a GPU's faster convolutions round the decibels.
                mel = log_mel(torch.from_numpy(piece)[None])
                total += self.model.encode_audio(mel.to(self.device))[0].float().cpu()
            row[:] = nn.functional.normalize(total, dim=0).numpy()
        return result

    @torch.inference_mode()
    def encode_mel(self, mel: NDArray[np.float32]) -> NDArray[np.float32]:
        """Encode log-mel spectrograms of ten seconds: float32[B, D], unit vectors.

        Parameters
        ----------
        mel
            float32[B, 1, 1001, 64], decibels, as `soundmap.nn.mel.log_mel` makes them; B may be 0.

        Raises
        ------
        UsageError
            The model has no tower for sound, or the shape is another.
        MissingExtra
            A library that this needs is not installed.
        """
        self._check_hears()
        from soundmap.nn.mel import MEL_SHAPE

        if mel.ndim != 4 or mel.shape[1:] != MEL_SHAPE:
            raise UsageError(f"spectrograms must be [B, 1, 1001, 64], not {list(mel.shape)}")
        self._load_audio()
        result = np.empty((len(mel), self.dim), np.float32)
        for start in range(0, len(mel), _PASS_CLIPS):
            part = torch.from_numpy(np.ascontiguousarray(mel[start : start + _PASS_CLIPS]))
            found = self.model.encode_audio(part.float().to(self.device))
            result[start : start + _PASS_CLIPS] = found.float().cpu().numpy()
        return result

    def _check_hears(self) -> None:
        if not self.config.audio:
            raise UsageError(
                f"the model {self.card.name} knows images and text, not sound: describe the sound "
                "with --text, or use a model with an audio tower"
            )

    def _load_audio(self) -> None:
        with self._lock:
            if self.model.audio is not None:
                return
            try:
                self.model.add_audio()
            except ImportError as error:
                raise MissingExtra(
                    "transformers", "sat2sound", "this model's tower for sound"
                ) from error
            state = read_weights(self._path, lambda name: name.startswith(_SOUND_PARTS))
            assert self.model.audio is not None
            parts = {"audio.": self.model.audio, "scales.": self.model.scales}
            for prefix, module in parts.items():
                own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
                _fill(module, own, self._path)
                module.to(self.device)

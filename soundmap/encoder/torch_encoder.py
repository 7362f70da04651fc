"""A model folder run by PyTorch. Torch stops here: NumPy in, NumPy out."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from soundmap.encoder.base import Encoding
from soundmap.encoder.card import InputSpec, ModelCard, verify_files
from soundmap.encoder.text import StaticText
from soundmap.errors import ModelError, UsageError
from soundmap.nn.model import ModelConfig, SoundModel
from soundmap.nn.vit import ViTConfig

log = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
TEXT_TABLE = "text.table"
# Few enough that activations stay near one core, many enough that operators are worth starting.
_PASS_PX = 32 * 64 * 64
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
        moves by more than 0.01; "float32" or "bfloat16" force it.

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
        config = model_config(dict(card.architecture))
        state = load_file(str(card.folder / WEIGHTS_FILE))
        table = state.pop(TEXT_TABLE, None)
        if table is None:
            raise ModelError(f"{card.folder / WEIGHTS_FILE} holds no token vectors ({TEXT_TABLE})")
        model = SoundModel(config)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            detail = " ".join(str(error).split())
            raise ModelError(
                f"{card.folder / WEIGHTS_FILE} does not fit its card: {detail}"
            ) from error
        model.eval().requires_grad_(False)
        _fold_batch_norms(model)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        model = model.to(self.device)
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype = self._choose_precision(precision)
        self._text = StaticText.load(card.folder / TOKENIZER_FILE, table.numpy())
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.threads = threads or cores or 1
        # The setting holds for the thread that makes it, so a caller's own torch is untouched.
        self._pool = ThreadPoolExecutor(
            self.threads, "encode", initializer=lambda: torch.set_num_threads(1)
        )

    def _choose_precision(self, precision: str) -> torch.dtype:
        if precision == "auto":
            change = self.card.data.get("precision", {}).get("bfloat16_max_probability_change", 1.0)
            fits = change <= _MAX_CHANGE and (self.device.type == "cuda" or cpu_has_bfloat16())
            return torch.bfloat16 if fits else torch.float32
        if precision not in ("float32", "bfloat16"):
            raise UsageError(f"precision {precision!r} is neither auto, float32 nor bfloat16")
        return torch.bfloat16 if precision == "bfloat16" else torch.float32

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
        return self.model.config.dim

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
        given = {"lonlat": lonlat is not None, "month": month is not None, "hour": hour is not None}
        for name, is_given in given.items():
            if is_given and name not in self.spec.metadata:
                raise UsageError(f"the model {self.card.name} was not trained with {name}")
        if scale not in self.spec.scales:
            raise UsageError(
                f"the model {self.card.name} knows scales {self.spec.scales}, not {scale}"
            )
        told = self.spec.gsd_m[-1][1] if gsd_m is None else gsd_m
        height, width = pixels.shape[2:]
        count = max(1, _PASS_PX // (height * width))
        parts = [pixels[i : i + count] for i in range(0, len(pixels), count)]
        if self.threads > 1 and len(parts) > 1 and self.device.type == "cpu":
            results = list(self._pool.map(lambda p: self._pass(p, told, details), parts))
        else:
            results = [self._pass(part, told, details) for part in parts]
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

    @torch.inference_mode()
    def _pass(
        self, pixels: NDArray[np.uint8], gsd_m: float, details: tuple[str, ...]
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
        x = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device)
        x = x.contiguous(memory_format=torch.channels_last)
        gsd = torch.tensor([gsd_m], device=self.device)
        model, codebook = self.model, self.model.codebook
        local = model.config.local_patches
        image = patches = None
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            grid = model.embed(x)
            queries = model.queries(grid, gsd) if "image" in details or not local else None
            if local and "patch" in details:
                single = model.queries(grid, gsd, local=True)
            else:
                single = queries
        if "image" in details:
            assert queries is not None
            image = codebook.pool(queries.float()).cpu().numpy()
        if "patch" in details:
            assert single is not None
            shape = (len(x), *grid.shape[-2:], -1)
            patches = codebook.each(single.float()).view(shape).cpu().numpy()
        return image, patches

    @torch.inference_mode()
    def encode_text(self, texts: list[str]) -> NDArray[np.float32]:
        """Encode texts: float32[N, D], unit vectors.

        Raises
        ------
        UsageError
            A text has no word that the model knows.
        """
        tokens = torch.from_numpy(self._text.vectors(texts)).to(self.device)
        result: NDArray[np.float32] = self.model.encode_text(tokens).float().cpu().numpy()
        return result

"""Names and shapes in a published Sat2Sound checkpoint, and what each is called here.

Nothing is matched by likeness: every key of a checkpoint is either one that the network needs, of
the shape that it needs, or a constant whose value is known, or on the list of weights that are
knowingly left out. Anything else is a fault.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

import torch
from torch import Tensor

from soundmap.encoder.checkpoint import Checkpoint, listed
from soundmap.errors import ModelError
from soundmap.nn.audio import TOKEN_DIM, tower_state
from soundmap.nn.audio import UNUSED as TOWER_UNUSED
from soundmap.nn.codebook import QueryMap
from soundmap.nn.mel import mel_bank, stft_kernels
from soundmap.nn.model import OTHER_SCALES, ModelConfig, SoundModel

FUSER = "sat_encoder.meta_fuser."
TOWER = "audio_encoder.model.audio_enc."

UNUSED: Mapping[str, str] = {
    "logit_scale_it_a": "scale of a pair that the published training does not use",
    **{TOWER + pattern: reason for pattern, reason in TOWER_UNUSED.items()},
}
"""Keys that the network has no place for: pattern (as the shell's) -> reason."""

# Of these a third is used.
_IN_PART = {
    f"{TOWER}layers.3.blocks.1.attn.qkv.*": "queries and keys of the last block, which takes "
    "values alone",
}
_TOLERANCE = 1e-5

# Pattern of a name here -> the published one. Tried in order; the audio tower's are not among
# them: `soundmap.nn.audio.tower_state` knows those.
_NAMES: tuple[tuple[str, str], ...] = tuple(
    (re.escape(ours).replace("N", r"(\d+)"), theirs.replace("N", r"\1"))
    for ours, theirs in (
        ("logit_scale", "logit_scale_it"),
        ("scales.", "logit_scale_"),
        ("vit.patch_embed.", "satmae_backbone.backbone.patch_embed.proj."),
        ("vit.blocks.", "satmae_backbone.backbone.blocks."),
        ("projector.0.", "satmae_backbone.projector.linear1."),
        ("projector.2.", "satmae_backbone.projector.linear2."),
        *(
            (f"fuser.layers.N.{ours}", f"{FUSER}transformer_encoder.layers.N.{theirs}")
            for ours, theirs in (
                ("attn.qkv.", "self_attn.in_proj_"),
                ("attn.proj.", "self_attn.out_proj."),
                ("mlp.fc1.", "linear1."),
                ("mlp.fc2.", "linear2."),
                ("norm", "norm"),
            )
        ),
        ("fuser.embed.asource.", f"{FUSER}meta_embed.audio_source_fc.source_embed."),
        ("fuser.embed.tsource.", f"{FUSER}meta_embed.caption_source_fc.source_embed."),
        *(
            (f"fuser.embed.{ours}.{place}.", f"{FUSER}meta_embed.{theirs}_fc.{part}.")
            for ours, theirs in (("latlong", "location"), ("month", "month"), ("time", "time"))
            for place, part in ((0, "fc1"), (2, "fc2"))
        ),
        ("image_query.", "fdt.img_query_model.q_map."),
        ("text_query.", "fdt.txt_query_model.q_map."),
        ("audio.query.", "fdt.audio_query_model.q_map."),
        ("codebook.codes", "fdt.space_dict"),
    )
)


@dataclass(frozen=True)
class Mapped:
    """The weights of a checkpoint under the names of this package's network."""

    weights: Mapping[str, Tensor]
    """Name here -> float32 tensor."""
    used: int
    """How many keys of the checkpoint they are."""
    checked: tuple[str, ...]
    """Keys of constants, found to have the values that are computed here."""
    unused: Mapping[str, tuple[str, ...]]
    """Reason -> keys that were left out for it, whole or in part."""


def map_state(checkpoint: Checkpoint, config: ModelConfig) -> Mapped:
    """Give every weight of a checkpoint its name in the network, or refuse the checkpoint.

    Parameters
    ----------
    checkpoint
        As `soundmap.encoder.checkpoint.read_checkpoint` gives it.
    config
        The architecture that its hyper-parameters state.

    Raises
    ------
    ModelError
        Keys are missing or unknown, a tensor has another shape or type, a constant another value,
        or a weight is not finite. The message names the first few of each.
    """
    state = checkpoint.state
    names = _network(config)[0]
    _check_keys(checkpoint, published_shapes(config))
    checked = []
    for key, value in constants().items():
        _check_constant(checkpoint, key, value)
        checked.append(key)
    unused: dict[str, tuple[str, ...]] = {}
    for key in state:
        reason = _reason(key)
        if reason and key not in checked:
            unused[reason] = (*unused.get(reason, ()), key)
    left_out = {key for keys in unused.values() for key in keys}
    used = [key for key in state if key not in left_out and key not in checked]
    for pattern, reason in _IN_PART.items():
        unused[reason] = tuple(key for key in used if fnmatchcase(key, pattern))
    _check_finite(checkpoint, used)

    weights = {ours: state[theirs] for ours, theirs in names.items()}
    published = {key.removeprefix(TOWER): state[key] for key in state if key.startswith(TOWER)}
    for name, tensor in tower_state(published).items():
        weights[f"audio.tower.{name}"] = tensor
    return Mapped(weights, len(used), tuple(checked), unused)


def published_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Every key of a checkpoint of some architecture -> its shape, used or not."""
    tower = {TOWER + name: shape for name, shape in _tower_shapes().items()}
    fixed = {key: value.shape for key, value in constants().items()}
    left_out = {key: torch.Size() for key in UNUSED if not key.startswith(TOWER)}
    return _network(config)[1] | tower | fixed | left_out


def published_name(ours: str) -> str:
    """Turn a name of the network into the published one; for all but the audio tower's."""
    for pattern, theirs in _NAMES:
        name, count = re.subn(f"^{pattern}", theirs, ours)
        if count:
            return name
    raise KeyError(ours)


def _network(config: ModelConfig) -> tuple[dict[str, str], dict[str, torch.Size]]:
    """Name here -> published name, and published name -> shape, but for the audio tower."""
    # On this device a network has names and shapes, and takes no room.
    with torch.device("meta"):
        own = SoundModel(config).state_dict()
        query = QueryMap(TOKEN_DIM, config.dim).state_dict()
    own |= {f"audio.query.{name}": tensor for name, tensor in query.items()}
    own |= {f"scales.{name}": own["logit_scale"] for name in OTHER_SCALES}
    names = {ours: published_name(ours) for ours in own}
    return names, {theirs: own[ours].shape for ours, theirs in names.items()}


def _reason(key: str) -> str | None:
    return next((why for pattern, why in UNUSED.items() if fnmatchcase(key, pattern)), None)


# --- the audio tower ----------------------------------------------------------------------------

_WIDTH, _DEPTHS, _HEADS, _WINDOW, _GRID, _CLASSES = 96, (2, 2, 6, 2), (4, 8, 16, 32), 8, 64, 527


def _tower_shapes() -> dict[str, torch.Size]:
    """Published name in the audio tower -> shape, of all but the constants (SPEC 7.2).

    Written out by formula, so that a fault is told by the names that the file has, and so that
    no other library is needed.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "bn0.num_batches_tracked": (),
        "patch_embed.proj.weight": (_WIDTH, 1, 4, 4),
        "patch_embed.proj.bias": (_WIDTH,),
        "tscam_conv.weight": (_CLASSES, TOKEN_DIM, 2, 3),
        "tscam_conv.bias": (_CLASSES,),
    }
    shapes |= {f"bn0.{part}": (64,) for part in ("weight", "bias", "running_mean", "running_var")}

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    norm("patch_embed.norm", _WIDTH)
    norm("norm", TOKEN_DIM)
    linear("head", _CLASSES, _CLASSES)
    for stage, (depth, heads) in enumerate(zip(_DEPTHS, _HEADS, strict=True)):
        width = _WIDTH * 2**stage
        for index in range(depth):
            block = f"layers.{stage}.blocks.{index}"
            norm(f"{block}.norm1", width)
            norm(f"{block}.norm2", width)
            linear(f"{block}.attn.qkv", 3 * width, width)
            linear(f"{block}.attn.proj", width, width)
            linear(f"{block}.mlp.fc1", 4 * width, width)
            linear(f"{block}.mlp.fc2", width, 4 * width)
            table = ((2 * _WINDOW - 1) ** 2, heads)
            shapes[f"{block}.attn.relative_position_bias_table"] = table
        if stage < len(_DEPTHS) - 1:
            norm(f"layers.{stage}.downsample.norm", 4 * width)
            shapes[f"layers.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
    return {name: torch.Size(shape) for name, shape in shapes.items()}


@cache
def constants() -> Mapping[str, Tensor]:
    """Published name -> value, of everything in a checkpoint that is not learned."""
    real, imag = stft_kernels()
    front = f"{TOWER}audio_feats_extractor."
    found = {
        f"{front}mel_trans.stft.conv_real.weight": real,
        f"{front}mel_trans.stft.conv_imag.weight": imag,
        f"{front}log_trans.melW": mel_bank(),
    }
    index = _relative_position_index()
    for stage, depth in enumerate(_DEPTHS):
        side = _GRID // 2**stage
        for number in range(depth):
            block = f"{TOWER}layers.{stage}.blocks.{number}"
            found[f"{block}.attn.relative_position_index"] = index
            # Every other block shifts its windows, unless one window is the whole picture.
            if number % 2 and side > _WINDOW:
                found[f"{block}.attn_mask"] = _shift_mask(side)
    return found


def _relative_position_index() -> Tensor:
    """Row of the bias table for each pair of places in a window, int64[64, 64]."""
    place = torch.arange(_WINDOW**2)
    rows, cols = place // _WINDOW, place % _WINDOW
    row = rows[:, None] - rows[None, :] + _WINDOW - 1
    col = cols[:, None] - cols[None, :] + _WINDOW - 1
    return row * (2 * _WINDOW - 1) + col


def _shift_mask(side: int) -> Tensor:
    """What is added to attention so that places that a shift brought together do not attend.

    float32[windows, 64, 64]: 0 or -100.
    """
    band = torch.zeros(side, dtype=torch.int64)
    band[side - _WINDOW :], band[side - _WINDOW // 2 :] = 1, 2
    region = 3 * band[:, None] + band[None, :]
    across = side // _WINDOW
    region = region.view(across, _WINDOW, across, _WINDOW).transpose(1, 2)
    region = region.reshape(across**2, _WINDOW**2)
    return (region[:, None, :] != region[:, :, None]).float() * -100.0


# --- checks -------------------------------------------------------------------------------------


def _check_keys(checkpoint: Checkpoint, expected: Mapping[str, torch.Size]) -> None:
    state = checkpoint.state
    missing = [key for key in expected if key not in state and not _may_be_absent(key)]
    unknown = [key for key in state if key not in expected]
    known = [(key, tensor) for key, tensor in state.items() if key in expected]
    shapes = [
        f"{key} is {_size(tensor.shape)} and should be {_size(expected[key])}"
        for key, tensor in known
        if tensor.shape != expected[key]
    ]
    types = [
        f"{key} is {_type(tensor.dtype)} and should be {_type(_dtype(key))}"
        for key, tensor in known
        if tensor.dtype != _dtype(key)
    ]
    faults = [
        f"{len(found)} {what} ({listed(found)})"
        for found, what in (
            (missing, "missing"),
            (unknown, "unknown"),
            (shapes, "of another shape"),
            (types, "of another type"),
        )
        if found
    ]
    if faults:
        raise ModelError(
            f"{checkpoint.path} is not the network that its hyper-parameters state: of its keys, "
            f"{'; '.join(faults)}"
        )


def _may_be_absent(key: str) -> bool:
    return bool(_reason(key)) and key not in constants()


def _dtype(key: str) -> torch.dtype:
    whole = key.endswith(("relative_position_index", "num_batches_tracked"))
    return torch.int64 if whole else torch.float32


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_constant(checkpoint: Checkpoint, key: str, value: Tensor) -> None:
    found = checkpoint.state[key]
    # A value that is not a number is no nearer than the tolerance to anything.
    if not bool(((found - value).abs() <= _TOLERANCE).all()):
        raise ModelError(
            f"{checkpoint.path}: {key} is a constant of the published model and has other values: "
            "this is another model, or the file is damaged"
        )


def _check_finite(checkpoint: Checkpoint, keys: list[str]) -> None:
    wrong = []
    for key in keys:
        low, high = torch.aminmax(checkpoint.state[key])
        if not (math.isfinite(low) and math.isfinite(high)):
            wrong.append(key)
    if wrong:
        raise ModelError(
            f"{checkpoint.path}: {len(wrong)} weights hold values that are not finite numbers "
            f"({listed(wrong)}): the file is damaged or its training failed"
        )


def _size(shape: torch.Size) -> str:
    return " x ".join(str(n) for n in shape) or "one number"

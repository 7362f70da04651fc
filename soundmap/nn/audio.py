"""Audio tower: the log-mel picture of a clip to tokens in time order.

HTSAT, a Swin transformer over the mel picture folded to a square (Chen et al. 2022, arXiv
2202.00874), in the variant of MGA-CLAP that Sat2Sound uses. The blocks are those of transformers'
CLAP; what differs is the last one, see `AudioTower`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from soundmap.errors import ModelError
from soundmap.nn.codebook import QueryMap
from soundmap.nn.mel import MEL_BANDS

TOKEN_DIM = 768
"""Width of an audio token."""

# The published size; written out so that it does not hang on the library's defaults.
_SIZE: dict[str, Any] = {
    "num_mel_bins": MEL_BANDS,
    "spec_size": 256,
    "patch_size": 4,
    "patch_stride": [4, 4],
    "patch_embeds_hidden_size": 96,
    "hidden_size": TOKEN_DIM,
    "depths": [2, 2, 6, 2],
    "num_attention_heads": [4, 8, 16, 32],
    "window_size": 8,
    "mlp_ratio": 4.0,
    "layer_norm_eps": 1e-5,
    "enable_fusion": False,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
}
_LAST = "layers.3.blocks.1"

UNUSED: dict[str, str] = {
    "audio_feats_extractor.*": "the fixed Fourier and mel filters are made anew, see nn/mel.py",
    "bn0.num_batches_tracked": "counts training batches",
    "layers.*.attn_mask": "follows from the window and its shift",
    "layers.*.relative_position_index": "follows from the window",
    f"{_LAST}.attn.relative_position_bias_table": "the last block does not attend",
    f"{_LAST}.mlp.*": "the last block has no MLP",
    "tscam_conv.*": "classifies sounds by AudioSet's ontology",
    "head.*": "classifies sounds by AudioSet's ontology",
}
"""Published weights that the tower has no place for: pattern of the name (as the shell's) to
reason. Of the last block's ``attn.qkv`` the query and key thirds are left out as well."""

# Published beginning of a name to its beginning here; of a block's parts without the block.
_PARTS = {
    "bn0.": "batch_norm.",
    "patch_embed.": "patch_embed.",
    "norm.": "norm.",
}
_STAGE_PARTS = {"downsample.": "downsample."}
_BLOCK_PARTS = {
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "attn.proj.": "attention.output.dense.",
    "attn.relative_position_bias_table": "attention.self.relative_position_bias_table",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
}
_PLACE = re.compile(r"(layers\.\d+\.(?:blocks\.\d+\.)?|)(.+)")
_QKV = "attn.qkv."


class _ValueOnly(nn.Module):
    """Attention in which each token gets its own value and nothing of the others'."""

    def __init__(self, value: nn.Module) -> None:
        super().__init__()
        self.value = value

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Values of tokens, with no attention weights beside them."""
        return self.value(hidden), None


class AudioTower(nn.Module):
    """Swin transformer over the mel picture, with the value branch as its last block.

    The published model takes as its tokens not what the last block puts out but a branch beside
    it (SPEC 7.2): with ``h`` the block's input,

        u = h + P(V(LN(h)))      V: values, P: output projection
        v = u + LN(u)            no MLP
        token = LN_final(v)      averaged over the two frequency bins of a time step

    so the library's block is built without its attention weights and its MLP.

    Raises
    ------
    ImportError
        transformers is not installed.
    """

    # Typed loosely: the library's releases differ in what they say of its parts.
    encoder: Any

    def __init__(self) -> None:
        super().__init__()
        from transformers import ClapAudioConfig
        from transformers.models.clap.modeling_clap import ClapAudioEncoder

        self.encoder = ClapAudioEncoder(ClapAudioConfig(**_SIZE))
        last = self.encoder.layers[-1].blocks[-1]
        last.attention.self = _ValueOnly(last.attention.self.value)
        last.intermediate = nn.Identity()
        last.output = nn.Identity()
        for module in self.encoder.modules():
            if hasattr(module, "relative_position_index"):
                index = module.relative_position_index
                module.register_buffer("relative_position_index", index, persistent=False)
        # Without a count of training batches, as the published weights come. In training mode the
        # statistics are those of the batch and are not kept.
        self.encoder.batch_norm.track_running_stats = False
        self.encoder.batch_norm.num_batches_tracked = None

    def forward(self, mel: Tensor) -> Tensor:
        """Encode clips.

        Parameters
        ----------
        mel
            float[B, 1, 1001, 64], decibels, from `soundmap.nn.mel.log_mel`.

        Returns
        -------
        Tensor
            float[B, 32, 768], in time order, 0.31 s each.
        """
        # [B, width, frequency bin, time]: the library applies the final norm and unfolds.
        grid: Tensor = self.encoder(mel).last_hidden_state
        return grid.mean(dim=2).transpose(1, 2)


class AudioSide(nn.Module):
    """Audio tower and query map: clips to queries against the codebook.

    Parameters
    ----------
    dim
        Length of a query, D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.tower = AudioTower()
        self.query = QueryMap(TOKEN_DIM, dim)

    def queries(self, mel: Tensor) -> Tensor:
        """Turn mel pictures float[B, 1, 1001, 64] into queries float[B, 32, D]."""
        out: Tensor = self.query(self.tower(mel))
        return out


def _rename(key: str, value: Tensor) -> dict[str, Tensor]:
    """Weights here that one published weight makes, by name; none where it has no place."""
    match = _PLACE.fullmatch(key)
    place, part = match.groups() if match else ("", key)
    inside_block = ".blocks." in place
    if inside_block and part.startswith(_QKV):
        if not value.ndim or len(value) % 3:
            raise ModelError(f"{key} of shape {tuple(value.shape)} is no queries, keys and values")
        thirds = dict(zip(("query", "key", "value"), value.chunk(3), strict=True))
        kept = ["value"] if place == f"{_LAST}." else list(thirds)
        kind = part.removeprefix(_QKV)
        return {f"{place}attention.self.{name}.{kind}": thirds[name].clone() for name in kept}
    parts = _BLOCK_PARTS if inside_block else _STAGE_PARTS if place else _PARTS
    for theirs, ours in parts.items():
        if part.startswith(theirs):
            return {place + ours + part.removeprefix(theirs): value}
    return {}


def tower_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename published weights of the audio tower for `AudioTower.load_state_dict`.

    Parameters
    ----------
    state
        Published names, without ``audio_encoder.model.audio_enc.``, and their values.

    Returns
    -------
    dict of str to Tensor
        All of the tower's weights, if ``state`` is complete. The values are the given ones, or
        copies of thirds of them: no two share their memory.

    Raises
    ------
    ModelError
        A name is neither known nor in `UNUSED`, or queries, keys and values cannot be split.
    """
    found: dict[str, Tensor] = {}
    unknown = []
    for key, value in state.items():
        if any(fnmatchcase(key, pattern) for pattern in UNUSED):
            continue
        renamed = _rename(key, value)
        found |= renamed
        if not renamed:
            unknown.append(key)
    if unknown:
        raise ModelError(
            f"the audio tower has no place for {', '.join(unknown)}: not a Sat2Sound checkpoint?"
        )
    return {f"encoder.{name}": value for name, value in found.items()}

"""Reading a published checkpoint, which is a pickle, without running what is in it.

A checkpoint as PyTorch Lightning saves it is a zip archive: one pickle that describes tables, and
the numbers of each tensor as an entry of their own. A pickle is a program: whoever opens one the
ordinary way runs it. Here it is read by PyTorch's restricted reader, which builds tables of plain
values and tensors, knows no other instruction, and runs nothing.
"""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from soundmap.encoder.card import CARD_FILE, file_sha256
from soundmap.errors import ModelError, UsageError

SUFFIXES = (".ckpt", ".pt", ".pth")
"""How names of checkpoints end."""

_ZIP = b"PK\x03\x04"
# Protocols 2 to 5 start with their number; older ones cannot be told from text.
_PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_SHOWN = 3


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, as far as it is of use."""

    path: Path
    state: Mapping[str, Tensor]
    """Name -> tensor. The numbers stay in the file until they are asked for."""
    hyper_parameters: Mapping[str, Any]
    """The arguments that the model was made with."""
    sha256: str
    """Digest of the file."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Its tensors are mapped, not copied: leave the file alone while they are in use.

    Parameters
    ----------
    path
        A file that PyTorch Lightning saved.

    Raises
    ------
    UsageError
        There is no such file, or it is a folder.
    ModelError
        The file is damaged, holds code, or is not a checkpoint with weights and
        hyper-parameters.
    """
    try:
        _check_is_file(path)
        _check_archive(path)
        digest = file_sha256(path)
        content = _load(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror or error})") from error
    state, hyper_parameters = _parts(path, content)
    return Checkpoint(path, state, hyper_parameters, digest)


def plain(text: object, longest: int = 100) -> str:
    """Make a text from a foreign file fit to be shown: one line, nothing that steers a terminal."""
    shown = "".join(c if c.isprintable() else "?" for c in str(text)[: longest + 1])
    return shown if len(shown) <= longest else shown[:longest] + "..."


def listed(names: list[str], shown: int = _SHOWN) -> str:
    """Name the first few: "a, b, c and 4 more"."""
    text = ", ".join(plain(name) for name in names[:shown])
    return f"{text} and {len(names) - shown} more" if len(names) > shown else text


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        if (path / CARD_FILE).is_file():
            raise UsageError(f"{path} is a model folder already: use it with --model {path}")
        raise UsageError(f"{path} is a folder: give the checkpoint file (.ckpt) itself")
    if not path.exists():
        raise UsageError(f"{path} does not exist: give a checkpoint file (.ckpt)")


def _check_archive(path: Path) -> None:
    """Check that a file is a whole archive of the kind that PyTorch writes."""
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        raise ModelError(f"{path} is empty: fetch it again")
    if start[:2] in _PICKLES:
        raise ModelError(
            f"{path} is a bare pickle, which can hold code: it was refused and none of it was run; "
            "the published checkpoints are zip archives, as torch.save writes them"
        )
    if start != _ZIP:
        raise ModelError(
            f"{path} is not a checkpoint: give a .ckpt file as PyTorch Lightning saves it"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or not any(
                entry.filename.endswith("data.pkl") for entry in entries
            ):
                raise ModelError(
                    f"{path} is a zip archive, but not a checkpoint: give a .ckpt file as PyTorch "
                    "Lightning saves it"
                )
            # PyTorch itself does not look at the checksums.
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"{path} is cut short or damaged: fetch it again ({plain(error)})"
        ) from error
    if damaged is not None:
        raise ModelError(
            f"{path} is damaged: the checksum of its part {plain(damaged)} is wrong; fetch it again"
        )


def _load(path: Path) -> Any:
    code = _code_named(path)
    if code:
        raise ModelError(
            f"{path} holds code ({listed(code)}): it was refused and none of it was run; take the "
            "file from its authors (a harmless class of a training library is refused, too: save "
            "such a checkpoint again with plain values alone)"
        )
    try:
        with warnings.catch_warnings():
            # Of pickle protocols that the reader does not know: it refuses what it cannot read.
            warnings.simplefilter("ignore")
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:
        # What a foreign file can make the reader stumble over has no common type.
        reason = _reason(error)
        if type(error).__name__ == "UnpicklingError":
            raise ModelError(
                f"{path} holds more than tensors and plain values, which may be code: it was "
                f"refused and none of it was run ({reason})"
            ) from error
        raise ModelError(f"{path} is damaged: fetch it again ({reason})") from error


def _code_named(path: Path) -> list[str]:
    """Name the functions and classes that the file would call, besides those of tensors."""
    try:
        return sorted(get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:
        # It only looks, and gives up on what it does not know. The reader decides.
        return []


def _reason(error: Exception) -> str:
    text = str(error)
    # PyTorch wraps its reason in advice on how to lift the restriction, which nobody should follow.
    marker = "WeightsUnpickler error:"
    if marker in text:
        text = text.partition(marker)[2]
    lines = text.strip().splitlines()
    return plain(lines[0]) if lines else type(error).__name__


def _parts(path: Path, content: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    advice = "it is not a Sat2Sound checkpoint as PyTorch Lightning saves it"
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds {_kind(content)}, not a table: {advice}")
    for part in ("state_dict", "hyper_parameters"):
        if part not in content:
            found = listed([str(key) for key in content]) or "nothing"
            raise ModelError(f"{path} has no {part} (it has {found}): {advice}")
        if not isinstance(content[part], dict):
            raise ModelError(f"{path}: its {part} is {_kind(content[part])}, not a table: {advice}")
    state, hyper_parameters = content["state_dict"], content["hyper_parameters"]
    if not state:
        raise ModelError(f"{path}: its state_dict is empty: {advice}")
    wrong = [str(name) for name, tensor in state.items() if not _is_plain_tensor(name, tensor)]
    if wrong:
        raise ModelError(
            f"{path}: {len(wrong)} of {len(state)} entries of its state_dict are not plain tensors "
            f"({listed(wrong)}): {advice}"
        )
    return dict(state), {str(name): value for name, value in hyper_parameters.items()}


def _is_plain_tensor(name: Any, tensor: Any) -> bool:
    return (
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        # "meta" tensors have a shape and no numbers.
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
    )


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"

"""What figures have in common when they are written to files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soundmap.errors import OutputError


def missing(value: Any) -> bool:
    """Tell whether there is no number: None, NaN or infinite."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def without_nan(value: Any) -> Any:
    """Put None for what there is no number for, at any depth: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return None if missing(value) else value


def save(text: str, path: str | Path) -> None:
    """Write a text to a file; OutputError where that fails."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{path}: cannot be written ({reason}): choose another file") from error

"""Maps of what a place sounds like, from satellite imagery.

>>> import soundmap
>>> sounds = soundmap.predict("city.tif", text=["church bells"])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from soundmap.api import open_map as open
    from soundmap.api import predict, resume
    from soundmap.encoder import load_encoder

__all__ = ["__version__", "load_encoder", "open", "predict", "resume"]

# Loaded when first used: `soundmap --help` must not wait for torch.
_LAZY = {
    "predict": ("soundmap.api", "predict"),
    "resume": ("soundmap.api", "resume"),
    "open": ("soundmap.api", "open_map"),
    "load_encoder": ("soundmap.encoder", "load_encoder"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'soundmap' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)

"""Errors, grouped by what the reader should do about them.

::

    SoundmapError
    ├── UsageError      change the arguments
    ├── InputError      fix or replace the input file or region
    ├── SourceError     imagery could not be read; another try may help
    ├── OutputError     choose another output, or make room
    ├── ModelError      the model's folder, card or weights are wrong
    ├── PlanMismatch    an unfinished run was started with other settings
    ├── MissingExtra    install an optional part of soundmap
    └── RunFailed       some of the work could not be done

Every message is one line that says what failed, on which input, and what to do.
Some also inherit the matching builtin, so that ``except ValueError`` works as usual.
"""

from __future__ import annotations


class SoundmapError(Exception):
    """Base of everything that soundmap raises on purpose."""


class UsageError(SoundmapError, ValueError):
    """An argument cannot be used: change it."""


class InputError(SoundmapError, ValueError):
    """An input file or region cannot be used: fix or replace it."""


class SourceError(SoundmapError, OSError):
    """Imagery could not be read; trying again may help."""


class OutputError(SoundmapError, OSError):
    """The output cannot be written there: choose another place, or make room."""


class ModelError(SoundmapError):
    """A model's folder, card or weights are missing or wrong."""


class PlanMismatch(SoundmapError):
    """An unfinished run exists that was started with other settings."""


class MissingExtra(SoundmapError, ImportError):
    """An optional part of soundmap is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}: install it with "
            f"pip install 'soundmap[{extra}]'"
        )
        self._parts = (package, extra, purpose)

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str, str]]:
        """Pickle by the arguments, so that the error comes back whole from a worker."""
        return type(self), self._parts


class RunFailed(SoundmapError):
    """A run ended with units that could not be computed."""

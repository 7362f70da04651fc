"""What every message for people has."""

from __future__ import annotations

import pytest

from soundmap.errors import SoundmapError


def one_line(caught: pytest.ExceptionInfo[SoundmapError], *about: str) -> str:
    """Check that a message is one printable line and says what it is about; return it."""
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert message.isprintable()
    for text in about:
        assert text in message
    return message

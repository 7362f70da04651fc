"""Keep libtiff's own lines off the terminal.

Below GDAL, libtiff prints a line for each block that it cannot write, past all error handling: on a
full disk a thousand lines that say what our one says.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

_NOISE = (b"_tiffWriteProc: ", b"_tiffSeekProc: ", b"_tiffReadProc: ")
_START = b"_tiff"
_END_SECONDS = 5.0


@contextlib.contextmanager
def without_libtiff_noise() -> Iterator[None]:
    """Let through all that is printed to standard error meanwhile, but for libtiff's lines."""
    try:
        terminal = os.dup(2)
    except OSError:
        # Nothing is printed where there is nothing to print to.
        yield
        return
    source, sink = os.pipe()
    os.dup2(sink, 2)
    os.close(sink)
    reader = threading.Thread(target=_forward, args=(source, terminal), daemon=True)
    reader.start()
    try:
        yield
    finally:
        # Ends the pipe, unless a program that was started meanwhile holds it as well.
        os.dup2(terminal, 2)
        reader.join(_END_SECONDS)
        if not reader.is_alive():
            os.close(source)
            os.close(terminal)


def _forward(source: int, terminal: int) -> None:
    held = b""
    while chunk := os.read(source, 1 << 16):
        *lines, held = (held + chunk).split(b"\n")
        out = b"".join(line + b"\n" for line in lines if not line.startswith(_NOISE))
        if not held.startswith(_START) and not _START.startswith(held):
            # A bar has no end of line, and must not wait for one.
            out, held = out + held, b""
        _write(terminal, out)
    _write(terminal, held)


def _write(terminal: int, data: bytes) -> None:
    # A reader that has gone away does not matter: the lines are for nobody.
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(terminal, data) :]

"""How captioning is shown while it goes."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.markup import escape

from soundmap.cli.bar import Bar
from soundmap.products.caption import CaptionListener
from soundmap.products.caption_table import Caption

_SHOWN_FAILURES = 10


class CaptionProgress(Bar, CaptionListener):
    """Shows a bar with images, images per second and time left, and the first failures."""

    def __init__(self, quiet: bool) -> None:
        super().__init__(quiet, "images")
        self._total = self._left = self._done = self._failed = 0
        self._started = 0.0

    def planned(self, total: int, left: int) -> None:
        """Say what is to be done."""
        self._total, self._left = total, left
        before = f", {total - left:,} of them captioned before" if left < total else ""
        self.say(f"{total:,} images{before}")

    def loading(self, model: str) -> None:
        """Say that the model is being read."""
        self.say(f"Reading the model {escape(model)}")

    def reported(self, rows: Sequence[Caption], empty: int) -> None:
        """Count a batch."""
        now = time.monotonic()
        if not self.begun:
            # Begun after the first batch: what the model needs to warm up is no pace.
            self.begin("captioning", self._total, self._total - self._left)
            self._started = now
            pace = ""
        else:
            self._done += len(rows) + empty
            pace = f"{self._done / max(1e-6, now - self._started):.3g} images/s"
        self.update(advance=len(rows) + empty, pace=pace)
        for row in rows:
            if row.error:
                self._failed += 1
                if self._failed <= _SHOWN_FAILURES:
                    name = " ".join((row.image, *row.place[:2]))
                    self.say(f"[red]Failed[/red] {escape(name)}: {escape(row.error)}")
                elif self._failed == _SHOWN_FAILURES + 1:
                    self.say("More failed; the table has all of them")

"""How captioning is shown while it goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from soundmap.products.caption import CaptionListener
from soundmap.products.caption_table import Caption

_SHOWN_FAILURES = 10


class CaptionProgress(CaptionListener):
    """Shows a bar with images, images per second and time left, and the first failures."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images"),
            TextColumn("{task.fields[pace]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._total = self._left = self._done = self._failed = 0
        self._started = 0.0

    def __enter__(self) -> CaptionProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # One that was never begun would print an empty line.
        if self._bar.live.is_started:
            self._bar.stop()

    def planned(self, total: int, left: int) -> None:
        """Say what is to be done."""
        self._total, self._left = total, left
        before = f", {total - left:,} of them captioned before" if left < total else ""
        self._say(f"{total:,} images{before}")

    def loading(self, model: str) -> None:
        """Say that the model is being read."""
        self._say(f"Reading the model {escape(model)}")

    def reported(self, rows: Sequence[Caption], empty: int) -> None:
        """Count a batch."""
        now = time.monotonic()
        if self._task is None:
            # Begun after the first batch: what the model needs to warm up is no pace.
            self._task = self._bar.add_task(
                "captioning", total=self._total, completed=self._total - self._left, pace=""
            )
            self._bar.start()
            self._started = now
            pace = ""
        else:
            self._done += len(rows) + empty
            pace = f"{self._done / max(1e-6, now - self._started):.3g} images/s"
        self._bar.update(self._task, advance=len(rows) + empty, pace=pace)
        for row in rows:
            if row.error:
                self._failed += 1
                if self._failed <= _SHOWN_FAILURES:
                    name = " ".join((row.image, *row.place[:2]))
                    self._say(f"[red]Failed[/red] {escape(name)}: {escape(row.error)}")
                elif self._failed == _SHOWN_FAILURES + 1:
                    self._say("More failed; the table has all of them")

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

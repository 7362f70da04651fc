"""A bar for long work: how much, how fast, how long still."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bar:
    """A console, and a bar on it that begins when the work does. Use it with ``with``.

    Parameters
    ----------
    quiet
        Whether to print nothing but errors.
    unit
        What is counted.
    more
        Names of texts that are shown beside the pace.
    tells_left
        Whether the bar reckons the time left, from its recent steps.
    """

    def __init__(self, quiet: bool, unit: str, *more: str, tells_left: bool = True) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            *(TextColumn("{task.fields[" + name + "]}") for name in ("pace", *more)),
            TimeElapsedColumn(),
            *((TextColumn("left"), TimeRemainingColumn()) if tells_left else ()),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self._texts = dict.fromkeys(("pace", *more), "")
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
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

    @property
    def begun(self) -> bool:
        """Whether the bar stands."""
        return self._task is not None

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Set the bar up, with so much of the work done before."""
        texts: dict[str, Any] = self._texts
        self._task = self._bar.add_task(what, total=total, completed=done, **texts)
        self._bar.start()

    def update(self, **values: Any) -> None:
        """Move the bar, see `rich.progress.Progress.update`; nothing before it has begun."""
        if self._task is not None:
            self._bar.update(self._task, **values)

    def say(self, text: str) -> None:
        """Print a line, which may hold Rich's markup, above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True)

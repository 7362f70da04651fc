"""Options that several verbs share, and how their values are read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])

model_option = click.option(
    "--model",
    default="soundmap-small",
    show_default=True,
    metavar="NAME|DIR",
    help="A model of `soundmap models list`, the folder of one, or a checkpoint.",
)

data_option = click.option(
    "--data",
    required=True,
    metavar="DIR",
    help="Folder that holds eurosat_rgb/, ucmerced_jpg/ and scenes/.",
)


class Numbers(click.ParamType):
    """Numbers with commas between."""

    def __init__(self, kind: type, name: str, count: int) -> None:
        self.kind = kind
        self.name = name
        self.count = count

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """Read "3,2,1"."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self.kind(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != self.count:
            self.fail(f"{value!r} must be {self.count} numbers with commas between", param, ctx)
        return numbers


def wide_console(piped_width: int) -> Console:
    """Give a console for tables, of a fixed width where the output is not a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else piped_width)

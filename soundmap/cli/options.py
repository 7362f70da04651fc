"""Options that several verbs share, and how their values are read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

    from soundmap.products.scores import Estimate

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S")

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


def _print_one(ctx: click.Context, _: click.Parameter, target: str | None) -> str | None:
    if target == "-" and "-" in (ctx.params.get("json_file"), ctx.params.get("csv_file")):
        raise click.UsageError("--json and --csv cannot both be printed: name a file for one")
    return target


def figure_options(command: F) -> F:
    """Add the options of verbs that print figures with intervals."""
    for option in reversed(
        (
            click.option(
                "--resamples",
                type=click.IntRange(min=0),
                default=1000,
                show_default=True,
                help="Resamples behind the intervals; 0 for none.",
            ),
            click.option(
                "--seed", type=int, default=0, show_default=True, help="Seed of the resampling."
            ),
            click.option(
                "--json",
                "json_file",
                metavar="FILE|-",
                callback=_print_one,
                help="Write all figures as JSON.",
            ),
            click.option(
                "--csv",
                "csv_file",
                metavar="FILE|-",
                callback=_print_one,
                help="Write them as CSV, a row each.",
            ),
        )
    ):
        command = option(command)
    return command


def write_figures(score: S, *written: tuple[Callable[[S], str], str | None]) -> bool:
    """Print or save figures where asked for; tell whether they were printed."""
    from soundmap.products.figures import save

    for text, target in written:
        if target == "-":
            click.echo(text(score).rstrip("\n"))
        elif target:
            save(text(score), target)
    return any(target == "-" for _, target in written)


def with_interval(held: Estimate | None, digits: int = 3) -> str:
    """Write an estimate with its interval, if it has one."""
    if held is None:
        return ""
    if held.low != held.low:
        return f"{held.value:.{digits}f}"
    return f"{held.value:.{digits}f} ({held.low:.{digits}f} to {held.high:.{digits}f})"


def wide_console(piped_width: int) -> Console:
    """Give a console for tables, of a fixed width where the output is not a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else piped_width)

"""The command line: each verb parses, calls one function, and prints.

Modules of verbs import the rest of soundmap inside their functions, so that help is instant.
"""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import click

from soundmap import __version__
from soundmap.errors import SoundmapError, UsageError

_VERBS = ("predict", "status", "info", "models", "concepts", "caption", "evaluate", "train")


class _Verbs(click.Group):
    """Finds a verb in the module of its name, when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        module = importlib.import_module(f"soundmap.cli.{cmd_name}")
        command: click.Command = module.command
        return command


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="First map:  soundmap predict --imagery sample --out sample.tif",
)
@click.version_option(__version__, prog_name="soundmap")
def group() -> None:
    """Map what a place sounds like, from satellite imagery.

    Every verb explains itself: soundmap predict --help
    """


class _Terminated(BaseException):
    """The program was told to end, by SIGTERM."""


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """Make of SIGTERM, with which batch systems end a job, what Ctrl-C is already: an exception."""

    def end(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Run the command line; a mistake ends in one line and a non-zero exit."""
    try:
        with _ending_in_order():
            group.main(standalone_mode=False)
    except SoundmapError as error:
        click.echo(f"Error: {_one_line(error)}", err=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except click.ClickException as error:
        click.echo(f"Error: {error.format_message()}", err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt, _Terminated) as stop:
        click.echo("Stopped. What is done is kept: the same command goes on from there.", err=True)
        sys.exit(143 if isinstance(stop, _Terminated) else 130)
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except BrokenPipeError:
        # The reader of a pipe, `head` say, has seen enough.
        sys.stderr.close()
        sys.exit(0)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

"""``soundmap models``: which models there are."""

from __future__ import annotations

import click

from soundmap.cli.options import wide_console


@click.group("models")
def command() -> None:
    """Show the models that are here."""


@command.command("list", epilog="Example:  soundmap models list")
def list_models() -> None:
    """List bundled models."""
    from rich.table import Table

    from soundmap.encoder import bundled_models

    table = Table("model", "reads", "window", "licence", "what it is")
    for card in bundled_models():
        spec = card.spec
        table.add_row(
            card.name,
            spec.describe_gsd(),
            f"{spec.window_px} px, patches of {spec.patch_px}",
            card.licence,
            card.summary,
        )
    wide_console(120).print(table)

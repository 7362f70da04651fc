"""``soundmap concepts``: which sounds a model has by name."""

from __future__ import annotations

import click

from soundmap.cli.options import model_option, wide_console


@click.group("concepts")
def command() -> None:
    """Show the sounds that have a name, prompts and calibration."""


@command.command("list", epilog="Example:  soundmap concepts list")
@model_option
def list_concepts(model: str) -> None:
    """List the sounds of a model's bank; any other phrase can be mapped with --text."""
    from rich.table import Table

    from soundmap.encoder import find_model
    from soundmap.encoder.bank_files import PROMPTS_FILE, read_concepts

    table = Table("sound", "group", "prompts")
    for concept in read_concepts(find_model(model).folder / PROMPTS_FILE):
        table.add_row(concept.name, concept.group, "; ".join(concept.prompts))
    wide_console(140).print(table)

"""``soundmap train``: make a model folder."""

from __future__ import annotations

from pathlib import Path

import click

from soundmap.cli.options import data_option


@click.command(
    epilog="Example:  soundmap train --data DATA --out models/soundmap-small --work runs/small"
)
@data_option
@click.option(
    "--out",
    required=True,
    metavar="DIR",
    help="Model folder; must hold concepts.json and audibility.json.",
)
@click.option("--work", required=True, metavar="DIR", help="Folder for checkpoints and the log.")
@click.option("--threads", type=int, default=1, show_default=True, help="Threads of torch.")
def command(data: str, out: str, work: str, threads: int) -> None:
    """Train, calibrate and judge a model of the bundled kind."""
    import logging
    from dataclasses import replace

    from soundmap.errors import InputError
    from soundmap.train.bundle import Recipe, make_model

    for needed in ("concepts.json", "audibility.json"):
        if not (Path(out) / needed).is_file():
            raise InputError(f"{Path(out) / needed} not found: copy it from a bundled model")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe = Recipe()
    settings = replace(recipe.train, threads=threads)
    make_model(Path(data), Path(out), Path(work), replace(recipe, train=settings))

"""``soundmap evaluate``: how well a model tells land from sound."""

from __future__ import annotations

from pathlib import Path

import click

from soundmap.cli.options import data_option, model_option, wide_console


@click.command(epilog="Example:  soundmap evaluate --data DATA")
@data_option
@model_option
@click.option(
    "--split",
    type=click.Choice(["test", "val"]),
    default="test",
    show_default=True,
    help="Which part of the labelled images; neither was trained on.",
)
@click.option("--all", "show_all", is_flag=True, help="Print every concept, not the means alone.")
def command(data: str, model: str, split: str, show_all: bool) -> None:
    """Judge a model on labelled images, labelled mosaics and the sample scene."""
    from rich.table import Table

    from soundmap.encoder import find_model, load_encoder
    from soundmap.products.evaluate import (
        evaluate_model,
        evaluate_mosaics,
        evaluate_sample,
    )

    card, folder = find_model(model), Path(data)
    sets = (
        *evaluate_model(load_encoder(model), card, folder, split),
        *evaluate_mosaics(model, folder),
    )
    console = wide_console(120)
    table = Table("set", "places", "concepts", "mean AUC", "lowest AUC", "top-1 by caption")
    for one in sets:
        worst = min(one.concepts, key=lambda c: c.auc)
        top1 = "" if one.top1 is None else f"{one.top1:.3f}"
        table.add_row(
            one.name,
            str(one.places),
            str(len(one.concepts)),
            f"{one.mean_auc:.3f}",
            f"{worst.auc:.3f} {worst.concept}",
            top1,
        )
    console.print(table)
    if show_all:
        for one in sets:
            detail = Table("concept", "AUC", "places where audible", title=one.name)
            for c in one.concepts:
                detail.add_row(c.concept, f"{c.auc:.3f}", str(c.audible))
            console.print(detail)
    areas = evaluate_sample(model)
    sample = Table("area of the sample", "cells", "strongest sound is audible there")
    for name, (cells, share) in areas.items():
        sample.add_row(name, f"{cells:,}", f"{share:.3f}")
    console.print(sample)

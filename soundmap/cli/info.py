"""``soundmap info``: what a map holds."""

from __future__ import annotations

import click

from soundmap.cli.options import wide_console


@click.command(epilog="Example:  soundmap info city.tif")
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with all settings of the run.")
def command(file: str, as_json: bool) -> None:
    """Tell what a map holds: sounds, value, model, imagery, attribution, statistics."""
    from rich.table import Table

    from soundmap.stores.info import describe, to_json

    info = describe(file)
    if as_json:
        click.echo(to_json(info))
        return
    rows, cols = info.shape
    width, height = info.cell_size
    facts = {
        "map": f"{info.path} ({info.kind}, {info.dtype})",
        "value": f"{info.value}: {info.formula}",
        "cells": f"{rows} x {cols} of {width:.6g} x {height:.6g}, {info.crs}",
        "model": f"{info.model} ({info.model_hash[:12]}), {info.detail} detail",
        "imagery": f"{info.imagery}, read at {info.gsd_m:.4g} m",
        "attribution": info.attribution or "not stated by the imagery",
        "licence": info.licence or "not stated by the imagery",
        "made": f"{info.created} by {info.software}",
    }
    if info.bounds_lonlat:
        facts["bounds"] = " ".join(f"{v:.5f}" for v in info.bounds_lonlat) + " (W S E N)"
    for key in ("scale", "month", "hour", "rescale", "warning"):
        if key in info.extra:
            facts[key] = info.extra[key]
    console = wide_console(120)
    for key, text in facts.items():
        console.print(f"[bold]{key:>11}[/bold]  {text}", highlight=False)
    table = Table("band", "sound", "group", "calibration", "min", "mean", "max", "valid cells")
    for band, concept in enumerate(info.concepts, 1):
        s = concept.statistics
        figures = (
            (f"{s.minimum:.3f}", f"{s.mean:.3f}", f"{s.maximum:.3f}", f"{s.valid:,}")
            if s
            else ("", "", "", "")
        )
        table.add_row(str(band), concept.name, concept.group, concept.calibration, *figures)
    console.print(table)

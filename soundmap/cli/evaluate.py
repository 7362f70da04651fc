"""``soundmap evaluate``: how well a model tells land from sound, and how well a map agrees.

The verb ``retrieval`` is in `soundmap.cli.evaluate_retrieval`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from soundmap.cli.evaluate_retrieval import evaluate_retrieval
from soundmap.cli.options import (
    data_option,
    figure_options,
    model_option,
    wide_console,
    with_interval,
    write_figures,
)

if TYPE_CHECKING:
    from soundmap.products.evaluate_map import MapScore


class _ModelUnlessNamed(click.Group):
    """`soundmap evaluate --data DATA` is `soundmap evaluate model --data DATA`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = args[0] if args else "-"
        if first.startswith("-") and first not in ctx.help_option_names:
            args = ["model", *args]
        return super().parse_args(ctx, args)


@click.group("evaluate", cls=_ModelUnlessNamed)
def command() -> None:
    """Judge models and maps.

    Options without a verb judge a model: soundmap evaluate --data DATA
    """


@command.command("model", epilog="Example:  soundmap evaluate model --data DATA")
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
@click.option(
    "--json",
    "json_file",
    metavar="FILE|-",
    help="Instead of tables, write all figures that a card states: those of the tables, "
    "calibration, phrases, clips, altered scenes.",
)
def evaluate_model(
    data: str, model: str, split: str, show_all: bool, json_file: str | None
) -> None:
    """Judge a model on labelled images, labelled mosaics and the sample scene."""
    if json_file:
        _write_figures(model, Path(data), split, json_file)
        return
    from rich.table import Table

    from soundmap.encoder import find_model, load_encoder
    from soundmap.products import evaluate

    card, folder = find_model(model), Path(data)
    sets = (
        *evaluate.evaluate_model(load_encoder(model), card, folder, split),
        *evaluate.evaluate_mosaics(model, folder),
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
    areas = evaluate.evaluate_sample(model)
    sample = Table("area of the sample", "cells", "strongest sound is audible there")
    for name, (cells, share) in areas.items():
        sample.add_row(name, f"{cells:,}", f"{share:.3f}")
    console.print(sample)


command.add_command(evaluate_retrieval)


def _write_figures(model: str, data: Path, split: str, target: str) -> None:
    import json

    from soundmap.products.figures import save
    from soundmap.products.shows import show_figures

    text = json.dumps(show_figures(model, data, split), indent=1, ensure_ascii=False)
    if target == "-":
        click.echo(text)
        return
    save(text + "\n", target)
    click.echo(f"Wrote {target}")


_MAP_EPILOG = """\b
Examples:
  soundmap evaluate map city.tif --reference landuse.gpkg:parcels --label kind
  soundmap evaluate map city.tif --reference heard.geojson
  soundmap evaluate map city.zarr --reference survey.csv --place site \\
      --value "traffic_1to5=road traffic" --audible-from 3 --json scores.json

A row of heard.geojson has columns named like concepts, with 1 and 0 or ratings. More in
docs/evaluation.md.
"""


@command.command("map", epilog=_MAP_EPILOG)
@click.argument("file", metavar="MAP")
@click.option(
    "--reference",
    required=True,
    metavar="FILE[:layer]",
    help="Polygons or points of any vector file, or a CSV with lon and lat, or x and y.",
)
@click.option("--label", metavar="COLUMN", help="The class of each place is in this column.")
@click.option(
    "--audibility",
    metavar="FILE[:set]|MODEL",
    help="What is audible in which class, JSON or CSV. Default: the table of the map's model.",
)
@click.option(
    "--value",
    "values",
    multiple=True,
    metavar="COLUMN[=CONCEPT]",
    help="A column of ratings, or of 1 and 0, for a concept; may be repeated. With neither --label "
    "nor this, columns named like concepts.",
)
@click.option(
    "--audible-from",
    type=float,
    metavar="RATING",
    help="Ratings from this one on count as audible. Without it they get a rank correlation alone.",
)
@click.option(
    "--place",
    metavar="COLUMN",
    help="Features with the same entry here are of one place. Default: points in one cell are.",
)
@click.option("--crs", metavar="CRS", help="CRS of the coordinates, if the file does not tell.")
@figure_options
def evaluate_map(
    file: str,
    reference: str,
    label: str | None,
    audibility: str | None,
    values: tuple[str, ...],
    audible_from: float | None,
    place: str | None,
    crs: str | None,
    resamples: int,
    seed: int,
    json_file: str | None,
    csv_file: str | None,
) -> None:
    """Judge a finished MAP by places whose sounds are known.

    A polygon has the mean of the cells whose centres lie inside, a point the cell that holds it.
    Places off the map or on nodata are counted, never judged. AUC is 0.5 by chance, average
    precision the share of places where the sound is audible; intervals are 95 %, by resampling
    places.
    """
    from soundmap.products.evaluate_map import evaluate_map as judge
    from soundmap.products.evaluate_map import to_csv, to_json
    from soundmap.products.reference import Question

    question = Question(label, audibility, values, audible_from)
    score = judge(file, reference, question, place=place, crs=crs, resamples=resamples, seed=seed)
    if not write_figures(score, (to_json, json_file), (to_csv, csv_file)):
        _show(score)
        for target in filter(None, (json_file, csv_file)):
            click.echo(f"Wrote {target}")


def _show(score: MapScore) -> None:
    from rich.table import Table

    console = wide_console(120)
    console.print(
        f"{score.map} ({score.value}, {score.model}) by {score.reference}: {score.truth}",
        highlight=False,
        markup=False,
    )
    titles = {"auc": "AUC", "average_precision": "average precision", "spearman": "Spearman rho"}
    shown = [key for key in titles if key in score.mean]
    yes_no = "auc" in score.mean
    table = Table(
        "concept", "places", *(["audible"] if yes_no else []), *(titles[key] for key in shown)
    )
    for one in score.concepts:
        heard = [str(one.audible) if one.audible is not None else ""] if yes_no else []
        count = str(one.places) if one.places == one.features else f"{one.places} ({one.features})"
        table.add_row(
            one.concept, count, *heard, *(with_interval(getattr(one, key)) for key in shown)
        )
    if len(score.concepts) > 1:
        table.add_section()
        means = [with_interval(score.mean[key]) for key in shown]
        table.add_row(f"mean of {len(score.concepts)}", "", *([""] if yes_no else []), *means)
    console.print(table)
    for line in _remarks(score):
        console.print(line, highlight=False, markup=False)


def _remarks(score: MapScore) -> list[str]:
    lines = [f"{score.judged:,} of {score.features:,} features are judged, {score.places:,} places"]
    if score.left_out:
        lines[0] += "; left out: "
        lines[0] += "; ".join(f"{number:,} {reason}" for reason, number in score.left_out.items())
    lines += score.notes
    reasons: dict[str, list[str]] = {}
    for concept, why in score.skipped.items():
        reasons.setdefault(why, []).append(concept)
    lines += [f"Skipped, {why}: {', '.join(names)}" for why, names in reasons.items()]
    return lines

"""``soundmap train``: train a model on images, recordings and captions."""

from __future__ import annotations

from pathlib import Path

import click

_EPILOG = """\b
Examples:
  soundmap train --data data.toml --model model.toml --out runs/mine
  torchrun --nproc-per-node 4 -m soundmap train --data data.toml --model model.toml --out runs/mine
  soundmap predict --model runs/mine/model --imagery city.tif --out city_sounds.tif

The files are described in docs/training.md.
"""


@click.command(epilog=_EPILOG)
@click.option(
    "--data",
    required=True,
    metavar="FILE",
    help="data.toml: tables [train] and [validation] that say where samples are.",
)
@click.option(
    "--model",
    required=True,
    metavar="FILE",
    help="model.toml: architecture or model to start from, and how to train.",
)
@click.option(
    "--out",
    required=True,
    metavar="DIR",
    help="Folder of the run; the finished model becomes DIR/model.",
)
@click.option(
    "--overwrite/--resume",
    default=False,
    show_default=True,
    help="Begin anew, or go on with an unfinished run in DIR.",
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def command(data: str, model: str, out: str, overwrite: bool, quiet: bool) -> None:
    """Train a model on images, recordings and captions.

    Started again, the same command goes on where it was stopped, as if it had not been.
    """
    from soundmap.products.samples.config import read_toml

    table = read_toml(Path(model))
    if "recipe" in table:
        _bundled(Path(data), table, Path(model), Path(out), quiet)
        return
    _train(Path(data), Path(model), Path(out), overwrite, quiet)


def _train(data: Path, model: Path, out: Path, overwrite: bool, quiet: bool) -> None:
    from soundmap.cli.train_progress import TrainProgress
    from soundmap.train.config import read_settings
    from soundmap.train.data import read_data
    from soundmap.train.processes import join_processes, leave
    from soundmap.train.start import build
    from soundmap.train.trainer import train

    settings = read_settings(model)
    processes = join_processes(settings.training.device)
    try:
        start = build(settings, str(model))
        read = read_data(data, start.model.config.audio)
        with TrainProgress(quiet or not processes.first) as listener:
            report = train(settings, start, read, out, processes, listener, overwrite)
    finally:
        leave(processes)
    if quiet or not processes.first:
        return
    if report.bad:
        click.echo(f"{report.bad.summary()}; see {out / 'bad_rows.csv'}")
    for name, times in report.left_out.items():
        click.echo(f"Term {name} was left out of {times:,} steps, for want of samples that have it")
    why = " (stopped early: no better for as long as patience allows)"
    steps = f"{report.steps:,} steps{why if report.stopped_early else ''}"
    done = "was finished before" if report.was_finished else "trained"
    click.echo(f"{report.folder}: {done}, {steps}; the model of step {report.best_step:,} is kept")
    told = [f"{key} {value:.4g}" for key, value in report.figures.items()]
    if told:
        click.echo(f"Validation: {', '.join(told)}")


def _bundled(data: Path, table: dict[str, object], model: Path, out: Path, quiet: bool) -> None:
    """Hand over to the recipe of the bundled model."""
    import logging

    from soundmap.errors import InputError
    from soundmap.products.samples.config import read_toml
    from soundmap.train.bundle import Recipe, make_model

    if table["recipe"] != "small":
        raise InputError(f"{model}, recipe: must be 'small', not {table['recipe']!r}")
    places = read_toml(data)
    if places.get("kind") != "places" or not isinstance(places.get("path"), str):
        raise InputError(
            f"{data}: the recipe needs kind = 'places' and path = the folder that holds "
            "eurosat_rgb/, ucmerced_jpg/ and audio/"
        )
    if not quiet:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe = Recipe.read({key: value for key, value in table.items() if key != "recipe"})
    folder = data.parent / str(places["path"])
    make_model(folder, out / "model", out / "work", recipe)

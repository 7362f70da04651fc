"""``soundmap evaluate retrieval``: does an image find its recording, and a recording its image?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from soundmap.cli.options import (
    figure_options,
    model_option,
    wide_console,
    with_interval,
    write_figures,
)

if TYPE_CHECKING:
    from rich.console import Console

    from soundmap.products.embed_samples import Embeddings
    from soundmap.products.evaluate_retrieval import RetrievalScore

_EPILOG = """\b
Examples:
  soundmap evaluate retrieval --model sat2sound-bingmap-withmeta --data geosound.toml \\
      --embeddings bing.npz
  soundmap evaluate retrieval --embeddings bing.npz --resamples 5000 --json scores.json

More in docs/evaluation.md; how to write a TOML file, in docs/datasets.md.
"""


@click.command("retrieval", epilog=_EPILOG)
@model_option
@click.option("--data", metavar="FILE.toml", help="The set of samples.")
@click.option("--split", default="test", show_default=True, help="Which part of it.")
@click.option(
    "--embeddings",
    metavar="FILE.npz",
    help="Keep the vectors here; without --data, judge by those that were kept.",
)
@click.option("--scale", type=int, default=1, show_default=True, help="Zoom: 1, 3 or 5 tiles wide.")
@click.option("--no-metadata", is_flag=True, help="Tell the model no place, time and source.")
@click.option(
    "--batch", type=click.IntRange(min=1), default=100, show_default=True, help="Samples at a time."
)
@click.option(
    "--mel-index",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Which of the stored spectrograms of a recording is heard.",
)
@click.option("--prompts", metavar="FILE.json", help="Class -> texts. Default: its own words.")
@click.option(
    "--audible",
    metavar="FILE[:set]",
    help="Which classes of recordings are audible in which class of images, JSON or CSV.",
)
@click.option("--bad-rows", metavar="FILE.csv", help="List the samples that cannot be read.")
@figure_options
def evaluate_retrieval(
    model: str,
    data: str | None,
    split: str,
    embeddings: str | None,
    scale: int,
    no_metadata: bool,
    batch: int,
    mel_index: int,
    prompts: str | None,
    audible: str | None,
    resamples: int,
    seed: int,
    bad_rows: str | None,
    json_file: str | None,
    csv_file: str | None,
) -> None:
    """Judge how a model finds the recording of an image, the image of a recording, and captions.

    Every direction is judged over the samples that have both sides, all of which are the gallery.
    Samples with classes get mean average precision by class, too. Intervals are 95 %, by resampling
    queries.
    """
    from soundmap.products.embed_samples import Reading, load_embeddings, save_embeddings
    from soundmap.products.evaluate_retrieval import evaluate_retrieval as judge
    from soundmap.products.retrieval_inputs import audible_table
    from soundmap.products.retrieval_report import to_csv, to_json

    written = [json_file, csv_file]
    if data is not None:
        reading = Reading(scale, not no_metadata, batch, mel_index)
        held = _embed(model, data, split, reading, prompts, bad_rows)
        if embeddings is not None:
            save_embeddings(held, embeddings)
            written += [embeddings]
        written += [bad_rows]
    elif embeddings is not None:
        held = load_embeddings(embeddings)
    else:
        raise click.UsageError("give --data, or --embeddings that an earlier run has kept")
    table = audible_table(audible, held) if audible is not None else None
    score = judge(held, audible=table, resamples=resamples, seed=seed)
    if not write_figures(score, (to_json, json_file), (to_csv, csv_file)):
        _show(score)
        for target in filter(None, written):
            click.echo(f"Wrote {target}")


def _embed(
    model: str, data: str, split: str, reading: object, prompts: str | None, bad_rows: str | None
) -> Embeddings:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from soundmap.encoder import load_encoder
    from soundmap.products.embed_samples import Reading, embed_samples
    from soundmap.products.retrieval_inputs import open_set, read_prompts
    from soundmap.products.samples import BadRows, Samples

    assert isinstance(reading, Reading)
    texts = read_prompts(prompts) if prompts is not None else None
    samples = open_set(data, split)
    encoder = load_encoder(model)
    bad = BadRows(samples.name)
    console = Console(stderr=True)
    columns = (TextColumn("embedding"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(samples) if isinstance(samples, Samples) else None)
        held = embed_samples(
            encoder,
            samples,
            reading,
            prompts=texts,
            bad=bad,
            progress=lambda done: bar.update(task, completed=done),
        )
    if bad_rows is not None:
        bad.write(bad_rows)
    return held


def _show(score: RetrievalScore) -> None:
    console = wide_console(140)
    facts = score.facts
    told = ", ".join(facts.get("metadata", ())) or "no metadata"
    console.print(
        f"{facts.get('model')} on {facts.get('data')}: {score.samples:,} samples, scale "
        f"{facts.get('scale')}, {told}",
        highlight=False,
        markup=False,
    )
    _show_directions(console, score)
    _show_classes(console, score)
    for line in _remarks(score):
        console.print(line, highlight=False, markup=False)


def _show_directions(console: Console, score: RetrievalScore) -> None:
    from rich.table import Table

    if not score.directions:
        return
    table = Table(
        "query -> gallery", "text", "samples", "R@10 %", "median rank", "R@1", "R@5", "R@10"
    )
    for one in score.directions:
        at = [f"{one.recall_at[k].value:.3f}" for k in sorted(one.recall_at)]
        table.add_row(
            one.name,
            one.add_text or "",
            f"{one.samples:,}",
            with_interval(one.recall_tenth),
            with_interval(one.median_rank, 1),
            *at,
        )
    console.print(table)


def _show_classes(console: Console, score: RetrievalScore) -> None:
    from rich.table import Table

    rows = [
        (one.name, f"{one.queries:,} -> {one.items:,}", "mAP by class", one.precision)
        for one in score.classes
    ]
    if score.audible is not None:
        heard = score.audible
        about = ("image -> audio audible there", f"{heard.queries:,} -> {heard.gallery:,}")
        rows += [
            (*about, "R@10 %", heard.recall),
            (*about, "R@10 %, each alone", heard.recall_alone),
            (*about, "mAP by class", heard.precision),
        ]
    if not rows:
        return
    table = Table("query -> gallery", "items", "figure", "mean", "chance", "best", "classes")
    for name, items, figure, held in rows:
        table.add_row(
            name,
            items,
            figure,
            with_interval(held.mean),
            f"{held.chance:.3f}",
            f"{held.ceiling:.3f}",
            str(len(held.by_class)),
        )
    console.print(table)


def _remarks(score: RetrievalScore) -> list[str]:
    names = {kind: kind.replace("_", " ") for kind in score.having}
    lines = ["Samples with " + ", ".join(f"{names[k]}: {n:,}" for k, n in score.having.items())]
    bad = score.facts.get("bad_rows", {})
    if bad:
        lines += ["Bad rows: " + "; ".join(f"{n:,} {reason}" for reason, n in bad.items())]
    small = score.facts.get("images_smaller_than_crop", 0)
    if small:
        lines += [f"{small:,} images are smaller than the crop: black is put around them"]
    unheard = score.facts.get("recordings_without_tower", 0)
    if unheard:
        lines += [f"{unheard:,} recordings were not heard: the model has no tower for sound"]
    return lines + [f"Skipped, {why}: {name}" for name, why in score.skipped.items()]

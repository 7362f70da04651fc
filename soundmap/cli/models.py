"""``soundmap models``: which models there are, fetching them, converting them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from soundmap.cli.options import wide_console

if TYPE_CHECKING:
    from soundmap.encoder import InputSpec, ModelCard
    from soundmap.encoder.published import Published

Facts = list[tuple[str, str]]


@click.group("models")
def command() -> None:
    """Show, fetch and convert models."""


@command.command("list", epilog="Example:  soundmap models list")
def list_models() -> None:
    """List models: bundled, installed, and published ones to be pulled."""
    from rich.table import Table

    from soundmap.encoder.hub import known_models

    table = Table("model", "is", "reads", "window", "licence", "what it is")
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for entry in known_models():
        if entry.card is not None:
            of, licence, about = entry.card.spec, entry.card.licence, entry.card.summary
        elif entry.published is not None and not entry.problem:
            from soundmap.encoder.published import LICENCE

            of, licence, about = entry.published.input_spec, LICENCE, entry.published.summary
        else:
            table.add_row(entry.name, entry.state, "", "", "", entry.problem)
            continue
        window = f"{of.window_px} px, patches of {of.patch_px}"
        table.add_row(entry.name, entry.state, of.describe_gsd(), window, licence, about)
    wide_console(150).print(table)


@command.command(epilog="Example:  soundmap models info sat2sound-sentinel-nometa")
@click.argument("name", metavar="NAME|DIR")
def info(name: str) -> None:
    """Tell what a model was trained on, what it reads and how good it is.

    NAME may be a published model that is not here yet.
    """
    from rich.table import Table
    from rich.text import Text

    from soundmap.encoder.hub import look_up

    entry = look_up(name)
    if entry.card is not None:
        facts = _of_card(entry.card, entry.state)
    else:
        assert entry.published is not None
        facts = _of_published(entry.published)
    table = Table.grid("", "", padding=(0, 2, 0, 0))
    table.columns[0].justify, table.columns[0].style = "right", "bold"
    for key, text in facts:
        table.add_row(key, Text(text))
    wide_console(120).print(table)


@command.command(epilog="Example:  soundmap models pull sat2sound-sentinel-nometa")
@click.argument("name")
def pull(name: str) -> None:
    """Fetch a published model and install it under its name.

    Files come from huggingface.co, 0.6 GB or more each, and stay in its cache, see HF_HOME. The
    model goes to the folder that `soundmap models path` names.
    """
    from soundmap.encoder.hub import pull as fetch

    card, fetched = fetch(name)
    click.echo(f"{'Installed' if fetched else 'Here already:'} {card.name} in {card.folder}")
    _echo_next(card, card.name)


@command.command(epilog="Example:  soundmap models convert bingmap_nometa.ckpt --out models/bing")
@click.argument("checkpoint", metavar="CKPT")
@click.option("--out", required=True, metavar="DIR", help="Folder to make.")
@click.option("--name", metavar="NAME", help="What the model is to be called.")
@click.option(
    "--text-encoder",
    default="google/flan-t5-large",
    show_default=True,
    metavar="NAME|DIR",
    help="The Flan-T5-large that reads texts: its name at huggingface.co, or its folder.",
)
@click.option("--overwrite", is_flag=True, help="Replace a model folder that is there.")
def convert(
    checkpoint: str, out: str, name: str | None, text_encoder: str, overwrite: bool
) -> None:
    """Make a model folder of a published Sat2Sound checkpoint (.ckpt).

    Nothing in the checkpoint is run. Every weight must be one that the network has, or one of
    those that are knowingly left out, which are told.
    """
    from soundmap.encoder.convert import convert_checkpoint

    report = convert_checkpoint(Path(checkpoint), Path(out), name, text_encoder, overwrite)
    click.echo(f"Wrote {report.card.folder}: {report.card.name}, {report.card.summary}")
    click.echo(
        f"Of {report.keys} keys {report.used} are used, and {report.checked} are constants that "
        "have the expected values. Not used:"
    )
    for reason, keys in report.unused.items():
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        click.echo(f"  {keys[0]}{more}: {reason}")
    _echo_next(report.card, str(report.card.folder))


@command.command(epilog="Example:  soundmap models path soundmap-small")
@click.argument("name", required=False)
def path(name: str | None) -> None:
    """Print the folder of a model, or the one that models are installed in."""
    from soundmap.encoder.card import find_model, installed_root

    click.echo(find_model(name).folder if name else installed_root())


def _echo_next(card: ModelCard, name: str) -> None:
    hour = " --month 5 --hour 7" if {"month", "hour"} <= set(card.spec.metadata) else ""
    click.echo(f"Next:  soundmap predict --model {name} --imagery FILE{hour} --out map.tif")


def _of_card(card: ModelCard, state: str) -> Facts:
    data = card.data
    facts: Facts = [
        ("model", f"{card.name}: {card.summary}"),
        ("is", state),
        ("folder", str(card.folder)),
        ("licence", card.licence),
        *_of_input(card.spec),
    ]
    for used in data.get("data", []):
        facts.append(("data", "; ".join(str(value) for value in used.values())))
    facts += _of_figures(data.get("figures_test") or data.get("figures") or {})
    for key in ("figures_note", "limits"):
        if key in data:
            facts.append((key.partition("_")[2] or key, str(data[key])))
    if "text" in data:
        facts.append(("text", str(data["text"].get("encoder", ""))))
    source = data.get("source", {})
    if source:
        origin = source.get("repository") or "brought by hand"
        facts.append(("source", f"{source.get('file')} ({origin}), sha256 {source.get('sha256')}"))
    facts += [("file", f"{name}, sha256 {digest}") for name, digest in card.files.items()]
    return facts


def _of_published(model: Published) -> Facts:
    from soundmap.encoder.published import CAVEAT, LICENCE, REPOSITORY, training_data

    facts: Facts = [
        ("model", f"{model.name}: {model.summary}"),
        ("is", f"not here: soundmap models pull {model.name}"),
        ("licence", LICENCE),
        *_of_input(model.input_spec),
    ]
    for used in training_data(model.imagery):
        facts.append(("data", "; ".join(used.values())))
    facts += _of_figures(model.figures)
    return [*facts, ("note", CAVEAT), ("source", f"{model.file} of {REPOSITORY}, huggingface.co")]


def _of_input(spec: InputSpec) -> Facts:
    sizes = [f"{spec.native_px * scale}" for scale in spec.scales]
    window = f"{spec.window_px} px, patches of {spec.patch_px} px"
    if spec.native_px != spec.window_px:
        window += f"; resized from {', '.join(sizes)} px"
    return [
        ("reads", spec.describe_gsd()),
        ("window", window),
        ("--scale", ", ".join(str(scale) for scale in spec.scales)),
        ("metadata", ", ".join(spec.metadata) or "none"),
    ]


def _of_figures(figures: dict[str, Any]) -> Facts:
    lines = ((name, _told(found)) for name, found in figures.items() if isinstance(found, dict))
    return [("figures", f"{name}: {told}") for name, told in lines if told]


def _told(figures: dict[str, Any]) -> str:
    """Figures on a line; of those by phrase or by scene only a mean with its chance."""
    parts = []
    for key, value in figures.items():
        name = key.replace("_", " ")
        if not isinstance(value, dict):
            parts.append(f"{name} {value}")
        elif "mean" in value:
            chance = f" (chance {value['chance']})" if "chance" in value else ""
            parts.append(f"{name} {value['mean']}{chance}")
        elif "change" in value:
            parts.append(f"{name} {value['change']} ({value['concept']}, {value['copy']})")
    return ", ".join(parts)

"""``soundmap status``: how far a run is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from soundmap.cli.amounts import duration

if TYPE_CHECKING:
    from soundmap.stores.run_state import RunState

_EPILOG = """\b
Examples:
  soundmap status city.tif
  soundmap status s3://bucket/country.zarr --json
"""
# More failures than these are told in the JSON alone.
_LISTED = 20


@click.command(epilog=_EPILOG)
@click.argument("file", metavar="MAP")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every failed unit.")
def command(file: str, as_json: bool) -> None:
    """Tell how far a map is: units done, empty, failed and why, left; pace and time left.

    MAP is the map's own name, the hidden store beside it, or an s3:// address.
    """
    from soundmap.stores.run_state import run_state, to_json

    state = run_state(file)
    if as_json:
        click.echo(to_json(state))
        return
    if state.finished:
        click.echo(f"{state.target}: finished")
        return
    for label, text in _facts(state):
        click.echo(f"{label:>9}  {text}")
    if state.failed:
        click.echo("failed units (row, column):")
    for unit in state.failed[:_LISTED]:
        click.echo(f"  {unit.index}  {unit.reason or 'the reason is not known'}")
    if len(state.failed) > _LISTED:
        click.echo(f"  and {len(state.failed) - _LISTED:,} more: --json lists all")
    if not state.running:
        click.echo(f"Go on with:  soundmap predict {state.target}")


def _facts(state: RunState) -> list[tuple[str, str]]:
    settled = state.done + state.empty
    share = 100 * settled / max(1, state.units)
    facts = [
        ("map", f"{state.target}, {'being made now' if state.running else 'not finished'}"),
        ("units", f"{state.units:,}, {share:.3g} % of them settled"),
        ("done", f"{state.done:,}"),
        ("empty", f"{state.empty:,}"),
        ("failed", f"{len(state.failed):,}"),
        ("left", f"{state.left:,}"),
    ]
    pace = state.pace
    if pace.seconds_per_unit and pace.wall_seconds:
        facts.append(
            (
                "pace",
                f"{60 / pace.seconds_per_unit:,.3g} units a minute, "
                f"{pace.cells / pace.wall_seconds:,.3g} cells a second, over {pace.starts} "
                f"{'start' if pace.starts == 1 else 'starts'}",
            )
        )
    if state.seconds_left is not None:
        facts.append(("time left", f"{duration(state.seconds_left)} at that pace"))
    return facts

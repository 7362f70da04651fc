"""``soundmap caption``: let a vision-language model say what one would hear."""

from __future__ import annotations

from pathlib import Path

import click

from soundmap.cli.options import Numbers

_EPILOG = """\b
Examples:
  soundmap caption --images photos/ --out captions.csv
  soundmap caption --images "bing/*.jpg" --crop 300 --out captions_zl1.csv
  soundmap caption --images city.tif --windows 300 --model llava/ --out city.parquet
"""


@click.command(epilog=_EPILOG)
@click.option(
    "--images",
    required=True,
    metavar="PATH",
    help="A picture, a folder or a quoted glob of pictures, or a table (CSV, Parquet) with a "
    "column 'image'. With --windows: a raster.",
)
@click.option("--out", required=True, metavar="FILE", help="captions.csv or captions.parquet.")
@click.option(
    "--model",
    default="llava-hf/llava-1.5-7b-hf",
    show_default=True,
    metavar="NAME|DIR",
    help="A vision-language model: its name at huggingface.co, or its folder.",
)
@click.option(
    "--prompt", metavar="TEXT", help="The question. Default: what one would hear at the place."
)
@click.option(
    "--tokens",
    type=int,
    default=77,
    show_default=True,
    metavar="N",
    help="Length of a caption, at most, in the model's tokens.",
)
@click.option("--crop", type=int, metavar="N", help="Show only the middle N x N px of a picture.")
@click.option(
    "--windows", type=int, metavar="N", help="Cut a raster into windows of N px; a row for each."
)
@click.option(
    "--bands",
    type=Numbers(int, "R,G,B", 3),
    metavar="R,G,B",
    help="With --windows: bands to use as red, green, blue, from 1.",
)
@click.option(
    "--rescale",
    type=Numbers(float, "LO,HI", 2),
    metavar="LO,HI",
    help="With --windows: values that become black and white where imagery is not 8-bit.",
)
@click.option(
    "--batch", type=int, default=8, show_default=True, metavar="N", help="Images at once."
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="auto: a GPU where there is one.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="What the model computes with. auto: float16 on a GPU, float32 elsewhere.",
)
@click.option("--overwrite", is_flag=True, help="Forget the captions that are in the table.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    images: str,
    out: str,
    model: str,
    prompt: str | None,
    tokens: int,
    crop: int | None,
    windows: int | None,
    bands: tuple[int, ...] | None,
    rescale: tuple[float, float] | None,
    batch: int,
    device: str,
    precision: str,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Caption images with what one would hear there, by a vision-language model.

    Started again, the same command goes on where it was, and tries failed images again.
    """
    from soundmap.cli.caption_progress import CaptionProgress
    from soundmap.errors import RunFailed
    from soundmap.products.caption import QUESTION, CaptionRequest, caption

    request = CaptionRequest(
        images=images,
        out=Path(out),
        model=model,
        prompt=QUESTION if prompt is None else prompt,
        tokens=tokens,
        crop=crop,
        windows=windows,
        bands=bands,
        rescale=rescale,
        batch=batch,
        device=device,
        precision=precision,
        overwrite=overwrite,
    )
    with CaptionProgress(quiet) as listener:
        done = caption(request, listener)
    if not quiet:
        parts = [f"{done.made:,} captions made"]
        parts += [f"{done.before:,} were there"] if done.before else []
        parts += [f"{done.empty:,} windows without imagery"] if done.empty else []
        parts += [f"{len(done.failed):,} failed"] if done.failed else []
        click.echo(f"Wrote {out}: {', '.join(parts)}")
    if done.failed:
        first, count = done.failed[0], len(done.failed)
        raise RunFailed(
            f"{f'{count:,} images have' if count > 1 else '1 image has'} no caption; the reasons "
            f"stand in {out}, the first is {first.image}: {first.error}. The same command tries "
            "them again"
        )

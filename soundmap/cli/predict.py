"""``soundmap predict``: map what a place sounds like."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
from click.core import ParameterSource

from soundmap.cli.options import Numbers, model_option

_EPILOG = """\b
Examples:
  soundmap predict --imagery sample --out sample.tif
  soundmap predict --imagery city.tif --out city.tif --picture city.png
  soundmap predict --imagery tiles/ --bbox -9.25 38.69 -9.09 38.80 --out lisbon.zarr
  soundmap predict --imagery s2.tif --bands 4,3,2 --region parks.gpkg:parks \\
      --concepts "birdsong,road traffic" --text "church bells" --out parks.tif
  soundmap predict --imagery world.vrt --region countries.gpkg --where "NAME = 'Portugal'" \\
      --mask land.gpkg --dry-run --out portugal.zarr
  soundmap predict lisbon.zarr --workers 4     (goes on with a map that is not finished)
"""
# What may be said anew where a recorded run goes on: nothing that decides the numbers.
_ANEW = frozenset({"store", "picture", "overwrite", "dry_run", "workers", "scheduler", "quiet"})


@click.command(epilog=_EPILOG)
@click.argument("store", required=False, metavar="[MAP]")
@click.option(
    "--imagery",
    metavar="PATH|sample",
    help="A raster, a VRT, a folder or a quoted glob of rasters; or the built-in sample scene.",
)
@click.option(
    "--bbox",
    nargs=4,
    type=float,
    metavar="W S E N",
    help="Where to map, degrees. W > E crosses the 180th meridian.",
)
@click.option(
    "--region",
    metavar="FILE[:layer]|globe",
    help="Where to map: polygons of any vector file, or globe. With neither, the whole imagery.",
)
@click.option(
    "--where",
    metavar="SQL",
    help="Which polygons of the region's file: \"NAME = 'Portugal'\".",
)
@click.option(
    "--mask",
    metavar="FILE[:layer]",
    help="Polygons, such as of land: what lies off them is not read and is nodata.",
)
@model_option
@click.option(
    "--concepts",
    metavar="A,B|FILE",
    help="Sounds to map: names (`soundmap concepts list`) or a concept file. Default: all.",
)
@click.option("--text", multiple=True, metavar="PHRASE", help="Any phrase; may be repeated.")
@click.option(
    "--audio",
    multiple=True,
    metavar="[NAME=]FILE",
    help="A recording to look for, if the model hears; one named like a --text is added to it.",
)
@click.option(
    "--value",
    type=click.Choice(["probability", "share", "similarity"]),
    help="Chance to hear it; share among the mapped sounds (sums to 1); or raw cosine. Default: "
    "probability, or similarity where a model has no calibration.",
)
@click.option(
    "--detail",
    type=click.Choice(["patch", "image"]),
    default="patch",
    show_default=True,
    help="A cell for every patch that the model sees, or for every window.",
)
@click.option(
    "--crs", default="auto", show_default=True, metavar="auto|EPSG", help="CRS of the map."
)
@click.option(
    "--resolution", type=float, metavar="M", help="Cell size in metres. Default: the model's."
)
@click.option("--gsd", type=float, metavar="M", help="Read imagery at so many metres per pixel.")
@click.option(
    "--scale",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="Windows of N native tiles, for models that know several: 1, 3 or 5 for Sat2Sound.",
)
@click.option("--month", type=int, metavar="M", help="1 to 12, for models trained with it.")
@click.option("--hour", type=int, metavar="H", help="0 to 23, local, for models trained with it.")
@click.option(
    "--bands",
    type=Numbers(int, "R,G,B", 3),
    metavar="R,G,B",
    help="Bands to use as red, green, blue, from 1. Default: as the file says, then 1,2,3.",
)
@click.option(
    "--rescale",
    type=Numbers(float, "LO,HI", 2),
    metavar="LO,HI",
    help="Values that become black and white where imagery is not 8-bit. Default: percentiles "
    "2 and 98 of the whole raster.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "uint8"]),
    default="float32",
    show_default=True,
    help="uint8 is packed with scale and offset: a quarter of the size.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16", "int8"]),
    default="auto",
    show_default=True,
    help="What the model computes with; lower is faster and a little less exact.",
)
@click.option(
    "--out", metavar="FILE", help="city.tif (GeoTIFF), city.zarr, or s3://bucket/city.zarr."
)
@click.option(
    "--shards", is_flag=True, help="Zarr v3 with a shard per unit: far fewer files in large maps."
)
@click.option("--picture", metavar="PNG", help="Also draw a picture of the map.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.option("--dry-run", is_flag=True, help="Say what the run would take, and end.")
@click.option("--workers", type=int, metavar="N", help="Compute in N processes (Dask).")
@click.option("--scheduler", metavar="ADDRESS", help="Compute on a running Dask cluster.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.pass_context
def command(
    ctx: click.Context,
    store: str | None,
    imagery: str | None,
    bbox: tuple[float, float, float, float] | None,
    region: str | None,
    where: str | None,
    mask: str | None,
    model: str,
    concepts: str | None,
    text: tuple[str, ...],
    audio: tuple[str, ...],
    value: str | None,
    detail: str,
    crs: str,
    resolution: float | None,
    gsd: float | None,
    scale: int,
    month: int | None,
    hour: int | None,
    bands: tuple[int, ...] | None,
    rescale: tuple[float, float] | None,
    dtype: str,
    precision: str,
    out: str | None,
    shards: bool,
    picture: str | None,
    overwrite: bool,
    dry_run: bool,
    workers: int | None,
    scheduler: str | None,
    quiet: bool,
) -> None:
    """Map what a place sounds like: a layer for each sound, in QGIS or xarray.

    With the name of a MAP that is not finished, go on with it as it was begun.
    """
    from soundmap.api import Request, recorded, run
    from soundmap.cli.progress import ConsoleListener
    from soundmap.errors import OutputError, UsageError
    from soundmap.products.draw import draw
    from soundmap.stores.place import located

    if picture and not Path(picture).absolute().parent.is_dir():
        raise OutputError(f"{picture}: its folder does not exist: make it or choose another")
    if store is not None:
        _refuse_other_options(ctx, store)
        request = recorded(store, workers=workers, scheduler=scheduler, overwrite=overwrite)
        request = replace(request, dry_run=dry_run)
    elif out is None:
        raise UsageError(
            "no output: name a file with --out, or the map of an unfinished run to go on with it"
        )
    else:
        request = Request(
            out=located(out),
            imagery=imagery,
            bbox=bbox,
            region=region,
            where=where,
            mask=mask,
            model=model,
            concepts=concepts,
            text=text,
            audio=audio,
            value=value,
            detail=detail,
            crs=crs,
            resolution=resolution,
            gsd=gsd,
            scale=scale,
            month=month,
            hour=hour,
            bands=bands,
            rescale=rescale,
            dtype=dtype,
            precision=precision,
            shards=shards,
            overwrite=overwrite,
            dry_run=dry_run,
            workers=workers,
            scheduler=scheduler,
        )
    with ConsoleListener(quiet) as listener:
        request = run(request, listener, going_on=store is not None)
    if dry_run:
        return
    if not quiet:
        click.echo(f"Wrote {request.out}")
    if picture:
        draw(request, Path(picture))
        if not quiet:
            click.echo(f"Wrote {picture}")


def _refuse_other_options(ctx: click.Context, store: str) -> None:
    """Refuse options that a recorded run would silently leave unheard."""
    from soundmap.errors import UsageError

    given = [
        parameter.opts[0]
        for parameter in ctx.command.params
        if parameter.name not in _ANEW
        and ctx.get_parameter_source(str(parameter.name)) == ParameterSource.COMMANDLINE
    ]
    if given:
        raise UsageError(
            f"{', '.join(given)}: {store} goes on as it was begun: leave these out, or begin "
            "another map with --out"
        )

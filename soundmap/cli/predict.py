"""``soundmap predict``: map what a place sounds like."""

from __future__ import annotations

from pathlib import Path

import click

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
"""


@click.command(epilog=_EPILOG)
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
@click.option("--out", required=True, metavar="FILE", help="city.tif (GeoTIFF) or city.zarr.")
@click.option("--picture", metavar="PNG", help="Also draw a picture of the map.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.option("--dry-run", is_flag=True, help="Say what the run would take, and end.")
@click.option("--workers", type=int, metavar="N", help="Compute in N processes (Dask).")
@click.option("--scheduler", metavar="ADDRESS", help="Compute on a running Dask cluster.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def command(
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
    out: str,
    picture: str | None,
    overwrite: bool,
    dry_run: bool,
    workers: int | None,
    scheduler: str | None,
    quiet: bool,
) -> None:
    """Map what a place sounds like: a layer for each sound, in QGIS or xarray."""
    from soundmap.api import Request, draw, run
    from soundmap.cli.progress import ConsoleListener
    from soundmap.errors import OutputError

    if picture and not Path(picture).absolute().parent.is_dir():
        raise OutputError(f"{picture}: its folder does not exist: make it or choose another")
    request = Request(
        out=Path(out),
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
        overwrite=overwrite,
        dry_run=dry_run,
        workers=workers,
        scheduler=scheduler,
    )
    with ConsoleListener(quiet) as listener:
        request = run(request, listener)
    if dry_run:
        return
    if not quiet:
        click.echo(f"Wrote {out}")
    if picture:
        draw(request, Path(picture))
        if not quiet:
            click.echo(f"Wrote {picture}")

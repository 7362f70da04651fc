"""The public verbs as functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import odc.geo.xr  # noqa: F401  (gives arrays their .odc)
from numpy.typing import NDArray

from soundmap.encoder import (
    DEFAULT_MODEL,
)
from soundmap.errors import InputError, RunFailed, SoundmapError, UsageError
from soundmap.estimate import Estimate
from soundmap.plan import Plan
from soundmap.prepare import Prepared, cost_of, prepare, work_of
from soundmap.request import (
    Listener,
    Request,
    list_failures,
    recorded,
)
from soundmap.runner import Cluster, UnitReport, connect, run_here, run_on_cluster
from soundmap.stores.opening import open_map
from soundmap.stores.place import absolute, located
from soundmap.stores.target import check_target
from soundmap.stores.work import (
    begin,
    check_room,
    complete,
    discard,
    scratch_folder,
    tidy,
)
from soundmap.stores.zarr_store import Status, ZarrStore

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["Listener", "Request", "open_map", "predict", "recorded", "resume", "run"]


def predict(
    imagery: str | Path | None = None,
    *,
    bbox: tuple[float, float, float, float] | None = None,
    region: str | Path | None = None,
    where: str | None = None,
    mask: str | Path | None = None,
    model: str = DEFAULT_MODEL,
    concepts: str | Sequence[str] | None = None,
    text: Sequence[str] = (),
    audio: Sequence[str] = (),
    value: str | None = None,
    detail: str = "patch",
    crs: str = "auto",
    resolution: float | None = None,
    gsd: float | None = None,
    scale: int = 1,
    month: int | None = None,
    hour: int | None = None,
    bands: tuple[int, ...] | None = None,
    rescale: tuple[float, float] | None = None,
    dtype: str = "float32",
    precision: str = "auto",
    out: str | Path | None = None,
    shards: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    scheduler: str | None = None,
) -> xr.DataArray:
    """Map what a place sounds like.

    Parameters
    ----------
    imagery
        A raster, a folder or glob of rasters, a VRT, or "sample".
    bbox
        West, south, east, north in degrees; west > east crosses the 180th meridian.
    region
        A polygon file, ``FILE[:layer]``, or "globe". With neither, all of the imagery.
    where
        Which features of that file, as in SQL: ``NAME = 'Portugal'``.
    mask
        A polygon file, ``FILE[:layer]``, such as of land: what lies off it is not even read.
    model
        A bundled or installed name, the folder of a model, or a published checkpoint.
    concepts
        Names from the model's bank, or a concept file; default: all of the bank, or none if
        ``text`` or ``audio`` is given.
    text
        Any phrases; each becomes a concept named by itself.
    audio
        Sound files, ``FILE`` or ``NAME=FILE``, for models with an audio tower; one named like a
        phrase of ``text`` is added to it.
    value
        "probability" (0 to 1), "share" (sums to 1 over the concepts) or "similarity" (-1 to 1).
        Default: probability, or similarity for a model without calibration.
    detail
        "patch": a cell per patch of the model; "image": a cell per window, as the paper maps.
    crs
        "auto": the imagery's own; or a code such as "EPSG:32633".
    resolution
        Cell size in ground metres; default: the model's own.
    gsd
        Metres per pixel at which imagery is read; default: chosen by the model's card.
    scale
        How many native tiles wide a window is, for models that know several.
    month, hour
        1 to 12 and 0 to 23 (local time), for models that were trained with them; what is not
        given is masked.
    bands
        Which bands are red, green and blue, counted from 1.
    rescale
        Low and high value that become 0 and 255, for imagery that is not uint8.
    dtype
        "float32", or "uint8" packed with scale and offset.
    precision
        What the model computes with: "auto", "float32", "bfloat16" or "int8".
    out
        ``.tif`` or ``.zarr``, or ``s3://bucket/name.zarr``; None keeps the map in memory.
    shards
        Write Zarr v3, a shard for each unit of work, for maps of very many units.
    overwrite
        Replace what is there.
    workers, scheduler
        Compute on a Dask cluster: processes on this machine, or the scheduler's address.

    Returns
    -------
    xarray.DataArray
        float32, dims (concept, y, x), NaN where there is no imagery.

    Raises
    ------
    UsageError, InputError, OutputError, ModelError, RunFailed
        See `soundmap.errors`; every message says what to do.

    Examples
    --------
    >>> sounds = predict("sample", concepts=["birdsong", "road traffic"])
    >>> sounds.dims
    ('concept', 'y', 'x')
    """
    target = located(out) if out is not None else None
    with scratch_folder() as folder:
        request = Request(
            out=target or folder / "map.zarr",
            imagery=None if imagery is None else str(imagery),
            bbox=bbox,
            region=None if region is None else str(region),
            where=where,
            mask=None if mask is None else str(mask),
            model=model,
            concepts=concepts,
            text=tuple(text),
            audio=tuple(audio),
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
            workers=workers,
            scheduler=scheduler,
        )
        done = run(request)
        assert done.value is not None
        result: xr.DataArray = open_map(done.out)[done.value]
        return result if target else result.load()


def resume(
    path: str | Path,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    overwrite: bool = False,
) -> xr.DataArray:
    """Go on with an unfinished map, as it was asked for when it was begun.

    Parameters
    ----------
    path
        The map's own name, the store of the run beside it, or an ``s3://`` address.
    workers, scheduler
        Compute on a Dask cluster from now on.
    overwrite
        Let the map take the place of another of its name when it is whole.

    Returns
    -------
    xarray.DataArray
        As `predict` gives it.

    Raises
    ------
    SoundmapError
        One of its kinds, as `predict` raises them; InputError where no run is unfinished.
    """
    request = recorded(path, workers=workers, scheduler=scheduler, overwrite=overwrite)
    done = run(request, going_on=True)
    assert done.value is not None
    result: xr.DataArray = open_map(done.out)[done.value]
    return result


def run(request: Request, listener: Listener | None = None, *, going_on: bool = False) -> Request:
    """Map what a request asks for; a stopped run of the same settings goes on where it was.

    With ``dry_run``, all is checked and the listener is told what the run would take; nothing is
    computed or written.

    Parameters
    ----------
    request
        What is asked for.
    listener
        Hears how it goes.
    going_on
        Never throw a stopped run away, even where the request may overwrite.

    Returns
    -------
    Request
        The same, with the value that was chosen if none was asked for.

    Raises
    ------
    SoundmapError
        One of its kinds; no output is left behind but that of units already computed.
    """
    listener = listener or Listener()
    tidy(request.out)
    kind = check_target(request.out, request.overwrite)
    if kind == "geotiff" and request.shards:
        raise UsageError("--shards is for a map in Zarr: name it .zarr, or leave --shards out")
    with connect(request.workers, request.scheduler) as cluster:
        parts = prepare(request)
        if request.value is None and parts.value != "probability":
            listener.noted(
                f"{parts.card.name} has no calibration for these sounds, so no probability: "
                f"mapping {parts.value} (--value chooses)"
            )
        request = replace(request, value=parts.value)
        cost = cost_of(parts, request, listener.wants_time)
        listener.estimated(cost, parts.layout)
        if request.dry_run:
            check_room(request.out, cost.bytes_out)
            return request
        work = work_of(request, parts)
        with begin(request.out, work, request.overwrite and not going_on) as store:
            try:
                left = len(_left(store, parts.plan)) / len(parts.plan.units)
                check_room(request.out, round(cost.bytes_out * left))
                _compute(request, parts, store, listener, cluster, cost)
            except SoundmapError:
                if _nothing_done(store):
                    discard(store.path)
                raise
            listener.exporting()
            complete(store, request.out, request.overwrite)
    return request


def _nothing_done(store: ZarrStore) -> bool:
    try:
        return not (store.status() == Status.DONE).any()
    except (OSError, ValueError):
        # Storage that failed a moment ago may not say: what is there stays.
        return False


def _compute(
    request: Request,
    parts: Prepared,
    store: ZarrStore,
    listener: Listener,
    cluster: Cluster | None,
    cost: Estimate,
) -> None:
    plan, layout, imagery = parts.plan, parts.layout, parts.source.info.name
    job = replace(parts.job, store=absolute(store.path))
    left = _left(store, plan)
    listener.planned(plan, cost, layout, len(left))
    failures: list[UnitReport] = []

    def on_report(report: UnitReport) -> None:
        # Only here, after the data: a status never claims what is not stored.
        store.mark(report.index, report.status, report.error, report.seconds, report.cells)
        if report.status == Status.FAILED:
            failures.append(report)
        listener.reported(report)

    if cluster:
        run_on_cluster(cluster, job, left.tolist(), on_report, listener.noted)
    else:
        run_here(job, plan.units.at(left), parts.encoder, on_report)
    missing = len(_left(store, plan))
    done = bool((store.status() == Status.DONE).any())
    if missing:
        reasons = list_failures(failures) or "they were never reported"
        kept = "; what is done is kept: the same command tries the rest again" if done else ""
        raise RunFailed(
            f"{missing} of {len(plan.units)} units could not be computed: {reasons}{kept}"
        )
    if not done:
        raise InputError(
            f"{imagery} has no valid pixel in the region under half a cell ({layout.cell_m:.3g} m) "
            "or more: it is nodata there, or too small to map"
        )


def _left(store: ZarrStore, plan: Plan) -> NDArray[np.int64]:
    """Positions of the units that are neither done nor empty: int64[N]."""
    rows, cols = plan.units.indices.T
    settled = np.isin(store.status()[rows, cols], (Status.DONE, Status.EMPTY))
    return np.flatnonzero(~settled)

"""The public verbs as functions."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import odc.geo.xr  # noqa: F401  (gives arrays their .odc)

from soundmap import __version__
from soundmap.concepts import choose_concepts
from soundmap.encoder import (
    DEFAULT_MODEL,
    Encoder,
    ModelCard,
    find_model,
    load_encoder,
)
from soundmap.encoder.base import check_conditions
from soundmap.errors import InputError, RunFailed, SoundmapError, UsageError
from soundmap.grid import crs_of
from soundmap.lattice import Span
from soundmap.layout import Layout, cell_px_of, choose_layout, lattice_of
from soundmap.pipeline import Job
from soundmap.plan import Estimate, Plan, estimate, make_plan
from soundmap.region import Region, region_from_bbox, region_from_file
from soundmap.request import DETAILS, DTYPES, Listener, Request, list_failures
from soundmap.runner import Cluster, UnitReport, connect, run_here, run_on_cluster
from soundmap.scoring import FORMULAS, ConceptBank, choose_value
from soundmap.sources import open_source
from soundmap.sources.base import Source
from soundmap.stores.info import describe
from soundmap.stores.opening import open_map
from soundmap.stores.picture import render_png
from soundmap.stores.schema import MapSchema
from soundmap.stores.target import check_target
from soundmap.stores.work import (
    SETTINGS,
    begin,
    check_room,
    complete,
    discard,
    scratch_folder,
)
from soundmap.stores.zarr_store import Status, ZarrStore

if TYPE_CHECKING:
    import xarray as xr

# In so few units the windows are counted one by one.
_COUNTED_UNITS = 64
# Most cells along a side of a picture's panel: more would not be seen.
_PICTURE_CELLS = 660

__all__ = ["Listener", "Request", "draw", "open_map", "predict", "run"]


@dataclass(frozen=True)
class _Parts:
    """A request, checked and opened."""

    value: str
    source: Source
    card: ModelCard
    encoder: Encoder
    bank: ConceptBank
    layout: Layout
    plan: Plan = field(repr=False)


def predict(
    imagery: str | Path | None = None,
    *,
    bbox: tuple[float, float, float, float] | None = None,
    region: str | Path | None = None,
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
        A polygon file, ``FILE[:layer]``. With neither, all of the imagery.
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
        ``.tif`` or ``.zarr``; None keeps the map in memory.
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
    target = Path(out) if out is not None else None
    with scratch_folder() as folder:
        request = Request(
            out=target or folder / "map.zarr",
            imagery=None if imagery is None else str(imagery),
            bbox=bbox,
            region=None if region is None else str(region),
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
            overwrite=overwrite,
            workers=workers,
            scheduler=scheduler,
        )
        done = run(request)
        assert done.value is not None
        result: xr.DataArray = open_map(done.out)[done.value]
        return result if target else result.load()


def run(request: Request, listener: Listener | None = None) -> Request:
    """Map what a request asks for; a stopped run of the same settings goes on where it was.

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
    check_target(request.out, request.overwrite)
    with connect(request.workers, request.scheduler) as cluster:
        parts = _prepare(request)
        if request.value is None and parts.value != "probability":
            listener.noted(
                f"{parts.card.name} has no calibration for these sounds, so no probability: "
                f"mapping {parts.value} (--value chooses)"
            )
        request = replace(request, value=parts.value)
        cost = _cost(parts, request)
        check_room(request.out, cost.bytes_out)
        rows, cols = (-(-n // parts.plan.unit_cells) for n in parts.plan.grid.shape)
        schema = _schema(request, parts)
        store = begin(request.out, schema, (rows, cols), request.overwrite)
        try:
            _compute(request, parts, store, listener, cluster, cost)
        except SoundmapError:
            if not (store.status() == Status.DONE).any():
                discard(store.path)
            raise
    listener.exporting()
    complete(store, request.out, request.overwrite)
    return request


def _compute(
    request: Request,
    parts: _Parts,
    store: ZarrStore,
    listener: Listener,
    cluster: Cluster | None,
    cost: Estimate,
) -> None:
    plan, layout, imagery = parts.plan, parts.layout, parts.source.info.name
    job = Job(
        plan=plan,
        source=parts.source,
        model=_model_reference(request.model, parts.card),
        bank=parts.bank,
        value=parts.value,
        detail=request.detail,
        lattice=layout.lattice,
        gsd_m=layout.reading.gsd_m,
        told_gsd_m=layout.reading.told_m,
        store=str(store.path),
        conditions=request.conditions,
        precision=request.precision,
    )
    left = _left(store, plan)
    listener.planned(plan, cost, layout, len(left))
    failures: list[UnitReport] = []

    def on_report(report: UnitReport) -> None:
        # Only here, after the data: a status never claims what is not stored.
        store.mark(report.index, report.status)
        if report.status == Status.FAILED:
            failures.append(report)
        listener.reported(report)

    if cluster:
        run_on_cluster(cluster, job, left, on_report)
    else:
        run_here(job, [plan.units[i] for i in left], parts.encoder, on_report)
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


def _left(store: ZarrStore, plan: Plan) -> list[int]:
    """Positions of the units that are neither done nor empty."""
    status = store.status()
    settled = (Status.DONE, Status.EMPTY)
    return [i for i, (r, c) in enumerate(plan.units.indices) if status[r, c] not in settled]


def _prepare(request: Request) -> _Parts:
    if request.detail not in DETAILS:
        raise UsageError(f"--detail {request.detail!r} is neither patch nor image")
    if request.dtype not in DTYPES:
        raise UsageError(f"--dtype {request.dtype!r} is neither float32 nor uint8")
    if request.imagery is None:
        raise UsageError("no imagery: name a raster with --imagery FILE, or try --imagery sample")
    region = _region(request)
    card = find_model(request.model)
    source = open_source(request.imagery, request.bands, request.rescale)
    layout = choose_layout(
        source.info,
        card.spec,
        region,
        detail=request.detail,
        crs=request.crs,
        resolution_m=request.resolution,
        gsd_m=request.gsd,
        scale=request.scale,
    )
    given, name = request.conditions, f"the model {card.name}"
    check_conditions(card.spec, name, 0, None, given.month, given.hour, given.scale)
    encoder = load_encoder(request.model, precision=request.precision)
    bank = choose_concepts(
        encoder, card, request.detail, request.concepts, request.text, request.audio
    )
    value = choose_value(bank, request.value)
    reading = layout.reading
    own = {} if request.precision == "auto" else {"precision": request.precision}
    facts = {
        "model": f"{card.name} {card.hash[:16]}",
        "concepts": bank.digest(),
        "value": value,
        "detail": request.detail,
        "dtype": request.dtype,
        "gsd": f"{reading.gsd_m!r} told {reading.told_m!r}",
        "windows": repr(layout.lattice and (layout.lattice.cell, layout.lattice.anchor)),
    } | {f"imagery {key}": text for key, text in source.info.facts.items()}
    facts |= given.facts() | own
    plan = make_plan(layout.region, layout.grid, layout.unit_cells, facts)
    if not len(plan.units):
        raise InputError(f"the region ({layout.region.label}) lies off the imagery")
    return _Parts(value, source, card, encoder, bank, layout, plan)


def _model_reference(model: str, card: ModelCard) -> str:
    """Name a model so that a worker in another folder, or on another machine, finds it."""
    return model if model == card.name else str(card.folder.resolve())


def _region(request: Request) -> Region | None:
    if request.bbox is not None and request.region is not None:
        raise UsageError("--bbox and --region both say where to map: give one of them")
    if request.bbox is not None:
        return region_from_bbox(*request.bbox)
    return None if request.region is None else region_from_file(request.region)


def _cost(parts: _Parts, request: Request) -> Estimate:
    layout, spec = parts.layout, parts.encoder.spec
    own_cell_m = cell_px_of(spec, request.detail) * layout.reading.gsd_m
    lattice = lattice_of(spec, request.detail, crs_of(layout.grid), (1.0, 1.0), (0.0, 0.0))
    side = max(1, round(layout.unit_cells * layout.cell_m / own_cell_m))
    cost = estimate(
        parts.plan,
        concepts=len(parts.bank),
        dtype_bytes=4 if request.dtype == "float32" else 1,
        windows_per_unit=len(lattice.tiling(Span(0, side, 0, side)).corners),
    )
    if len(parts.plan.units) > _COUNTED_UNITS or not layout.lattice:
        return cost
    spans = [layout.lattice.span_of(unit.cells) for unit in parts.plan.units]
    if not all(spans):
        return cost
    # Few units are cut off by the map's edge, where windows stand over: counted, not guessed.
    windows = sum(len(layout.lattice.tiling(span).corners) for span in spans if span)
    return replace(cost, windows=windows)


def _schema(request: Request, parts: _Parts) -> MapSchema:
    info, bank, layout = parts.source.info, parts.bank, parts.layout
    extra = {SETTINGS: json.dumps(dict(parts.plan.facts), sort_keys=True)}
    extra |= request.conditions.facts()
    if "rescale" in info.facts:
        extra["rescale"] = info.facts["rescale"]
    if layout.reading.warning:
        extra["warning"] = layout.reading.warning
    formula = FORMULAS[parts.value]
    if parts.value == "share":
        formula += f"; scale {bank.share_scale:.4g}"
    return MapSchema(
        concepts=bank.names,
        groups=bank.groups,
        colours=bank.colours,
        calibrations=bank.calibration,
        value=parts.value,  # type: ignore[arg-type]
        formula=formula,
        detail=request.detail,  # type: ignore[arg-type]
        dtype=request.dtype,  # type: ignore[arg-type]
        grid=layout.grid,
        chunk_cells=layout.unit_cells,
        model=parts.card.name,
        model_hash=parts.card.hash,
        imagery=info.name,
        attribution=info.attribution,
        licence=info.licence,
        gsd_m=layout.reading.gsd_m,
        software=f"soundmap {__version__}",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        extra=extra,
        fingerprint=parts.plan.fingerprint,
    )


def draw(request: Request, picture: Path, panels: tuple[str, ...] | None = None) -> None:
    """Draw the map that a request made, beside its imagery, as a PNG.

    Parameters
    ----------
    request
        A request that has run.
    picture
        The PNG to write.
    panels
        Concepts to show; by default those that are strongest over the largest areas.

    Raises
    ------
    UsageError
        A panel names no concept of the map.
    OutputError
        The picture cannot be written.
    """
    info = describe(request.out)
    rows, cols = info.shape
    step = max(1, -(-max(rows, cols) // _PICTURE_CELLS))
    data = open_map(request.out)[info.value]
    values = data[:, step // 2 :: step, step // 2 :: step].to_numpy()
    assert request.imagery is not None
    source = open_source(request.imagery, request.bands, request.rescale)
    grid = data.odc.geobox
    zoom = _PICTURE_CELLS / max(rows, cols)
    image = source.read(grid.zoom_to((max(1, round(rows * zoom)), max(1, round(cols * zoom)))))
    render_png(
        values,
        [c.name for c in info.concepts],
        [c.colour for c in info.concepts],
        picture,
        imagery=np.where(image.valid, image.pixels, 255).astype(np.uint8),
        title=f"{info.imagery}: {info.value} ({info.model})",
        panels=panels,
        value=info.value,
    )

"""A request, checked and opened: all that a run needs before it writes anything."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field

from soundmap import __version__
from soundmap.concepts import choose_concepts
from soundmap.encoder import Encoder, ModelCard, find_model, load_encoder
from soundmap.encoder.base import check_conditions
from soundmap.errors import InputError, UsageError
from soundmap.estimate import Estimate, estimate, with_time
from soundmap.layout import Layout, choose_layout
from soundmap.pipeline import Job
from soundmap.plan import Plan, make_plan
from soundmap.region import Region, region_from_bbox, region_from_file, region_of_globe
from soundmap.request import DETAILS, DTYPES, Request, record
from soundmap.scoring import FORMULAS, ConceptBank, choose_value
from soundmap.sources import open_source
from soundmap.sources.base import Source
from soundmap.stores.schema import MapSchema
from soundmap.stores.work import SETTINGS, Work

# The region that is no file; a file of that name is ./globe.
_GLOBE = "globe"


@dataclass(frozen=True)
class Prepared:
    """A request, checked and opened."""

    value: str
    source: Source
    card: ModelCard
    encoder: Encoder
    bank: ConceptBank
    layout: Layout
    job: Job = field(repr=False)
    """What to compute; its store is not made yet."""

    @property
    def plan(self) -> Plan:
        """The job's plan."""
        return self.job.plan


def prepare(request: Request) -> Prepared:
    """Check a request and open what it names.

    Raises
    ------
    SoundmapError
        Something that it names is not there or does not fit; nothing has been written.
    """
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
    if request.shards:
        own["shards"] = "yes"
    facts |= given.facts() | own
    mask = None if request.mask is None else region_from_file(request.mask)
    plan = make_plan(layout.region, layout.grid, layout.unit_cells, facts, mask)
    if not len(plan.units):
        off = f"the mask {mask.label}" if mask else "the imagery"
        raise InputError(f"the region ({layout.region.label}) lies off {off}")
    job = Job(
        plan=plan,
        source=source,
        model=_model_reference(request.model, card),
        bank=bank,
        value=value,
        detail=request.detail,
        lattice=layout.lattice,
        gsd_m=reading.gsd_m,
        told_gsd_m=reading.told_m,
        store="",
        conditions=given,
        precision=request.precision,
    )
    return Prepared(value, source, card, encoder, bank, layout, job)


def _model_reference(model: str, card: ModelCard) -> str:
    """Name a model so that a worker in another folder, or on another machine, finds it."""
    return model if model == card.name else str(card.folder.resolve())


def _region(request: Request) -> Region | None:
    if request.bbox is not None and request.region is not None:
        raise UsageError("--bbox and --region both say where to map: give one of them")
    if request.where is not None and request.region in (None, _GLOBE):
        raise UsageError("--where chooses features of a --region FILE: name the file as well")
    if request.bbox is not None:
        return region_from_bbox(*request.bbox)
    if request.region == _GLOBE:
        return region_of_globe()
    return None if request.region is None else region_from_file(request.region, request.where)


def cost_of(parts: Prepared, request: Request, with_seconds: bool) -> Estimate:
    """Say what a request will take; with time if asked, unless other machines are to compute it."""
    cost = estimate(parts.job, parts.encoder, request.dtype)
    # How fast other machines are shows once they have done something.
    if not with_seconds or request.scheduler:
        return cost
    return with_time(cost, parts.job, parts.encoder)


def _schema(request: Request, parts: Prepared) -> MapSchema:
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


def work_of(request: Request, parts: Prepared) -> Work:
    """Describe the store of a request's run."""
    plan = parts.plan
    rows, cols = (-(-n // plan.unit_cells) for n in plan.grid.shape)
    asked = record(request, _model_reference(request.model, parts.card))
    return Work(
        schema=_schema(request, parts),
        units_shape=(rows, cols),
        shards=request.shards,
        job={"units": len(plan.units), "request": asked},
    )

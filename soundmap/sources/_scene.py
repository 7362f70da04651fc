"""The sample scene: an invented coast, drawn by code as Sentinel-2 sees one in true colour.

Everything is arithmetic on pixel coordinates (x to the right, y down, in 10 m pixels) and a
fixed seed. Colours, contrasts and sizes follow what is measured in real 10 m true-colour
imagery of western Europe: its blue haze, its dark forests and pale bare soils. No pixel is
copied from anywhere.

The plan of the drawing: shapes first (coast, river, motorway, and which land is what), then
the land from the widest cover to the narrowest line, then what the instrument adds (blur of
the optics, noise).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
from numpy.typing import NDArray

from soundmap.sources._scene_buildings import ESTATE_ANGLE, draw_industry, draw_town
from soundmap.sources._scene_canvas import (
    Cells,
    Colour,
    Float,
    Mask,
    Point,
    along,
    band,
    blend,
    blur,
    cells,
    choose,
    curve,
    cut,
    grow,
    hashed,
    noise,
    ramp,
    tinted,
    turned,
    unit,
)

SIZE = 1024
"""Pixels along each side of the scene."""

VERSION = "1"
"""Changes whenever the drawn pixels change on purpose: part of a run's fingerprint."""

NAMES = {
    0: "other",
    1: "sea",
    2: "river",
    3: "forest",
    4: "fields",
    5: "town",
    6: "industry",
    7: "motorway",
}
"""Area names by class number; ``other`` is beach, banks, quays and villages."""

_SEED = 20260

# Corners of the lines that shape the place, as (x, y); they are smoothed before use.
_COAST: tuple[Point, ...] = (
    (150, -80),
    (172, 60),
    (196, 150),
    (176, 250),
    (206, 340),
    (268, 420),
    (318, 500),
)
_COAST += ((322, 560), (286, 640), (224, 716), (232, 790), (286, 870), (312, 960), (352, 1104))
_RIVER: tuple[Point, ...] = (
    (1090, 268),
    (1010, 322),
    (950, 398),
    (868, 424),
    (812, 368),
    (748, 322),
    (672, 352),
)
_RIVER += ((640, 430), (586, 492), (516, 470), (452, 452), (392, 498), (330, 530), (240, 540))
_MOTORWAY: tuple[Point, ...] = (
    (676, 1090),
    (716, 990),
    (772, 880),
    (802, 760),
    (782, 640),
    (728, 530),
)
_MOTORWAY += ((706, 430), (712, 330), (690, 230), (622, 130), (592, 30), (600, -70))
_ROADS = (
    ((500, 640), (592, 676), (690, 708), (800, 752), (866, 730), (950, 690), (1090, 640)),
    ((470, 560), (466, 470), (430, 380), (452, 250), (400, 130), (420, -40)),
    ((430, 700), (420, 800), (470, 900), (430, 1060)),
    ((452, 250), (560, 236), (676, 210), (730, 196)),
    ((470, 900), (600, 880), (690, 900), (756, 912), (800, 926)),
    ((836, 742), (846, 640), (900, 540), (1070, 500)),
)
_STREETS = (
    ((318, 590), (400, 560), (470, 556), (560, 560), (620, 590)),
    ((470, 540), (468, 600), (440, 680), (420, 790)),
    ((300, 650), (390, 662), (440, 646), (500, 640)),
)
_CROSSING = (_ROADS[0], _ROADS[3], _ROADS[4])
_JUNCTION = (801, 752)
_MOUTH = (312, 532)
_WEST = 416
_TOWN = ((450, 685, 150, 146), (530, 600, 92, 74), (400, 800, 84, 70))
_WOODS = (
    (915, 120, 225, 172),
    (945, 862, 140, 130),
    (310, 70, 78, 62),
    (620, 815, 64, 52),
    (560, 395, 42, 40),
)
_JETTIES = (
    ((326, 506), (300, 498), (278, 508), (266, 522)),
    ((316, 566), (290, 566), (268, 556)),
)
_VILLAGES = ((300, 190, 21), (882, 560, 20), (560, 930, 22))

# Colours as red, green, blue counts of a true-colour image.
_CROPS = (
    ((52, 78, 82), 0.09),
    ((48, 86, 78), 0.11),
    ((66, 106, 90), 0.09),
    ((80, 101, 97), 0.06),
    ((110, 116, 110), 0.09),
    ((139, 111, 109), 0.10),
    ((145, 134, 130), 0.10),
    ((168, 126, 120), 0.11),
    ((184, 145, 136), 0.12),
    ((200, 162, 151), 0.07),
    ((224, 182, 168), 0.04),
    ((102, 92, 100), 0.02),
)
_ORCHARDS = (
    ((62, 82, 84), 0.10),
    ((78, 92, 92), 0.15),
    ((94, 99, 97), 0.18),
    ((112, 107, 104), 0.19),
    ((134, 118, 112), 0.18),
    ((162, 137, 125), 0.15),
    ((60, 92, 84), 0.05),
)


def scene_pixels() -> NDArray[np.uint8]:
    """Draw the scene, once per process: uint8[3, SIZE, SIZE], red, green, blue; read-only."""
    with _LOCK:
        return _draw()[0]


def scene_layout() -> tuple[NDArray[np.uint8], dict[int, str]]:
    """Tell what the scene shows where.

    Returns
    -------
    uint8[SIZE, SIZE]
        The number of each pixel's area; read-only.
    dict of int to str
        What the numbers mean: `NAMES`.
    """
    with _LOCK:
        return _draw()[1], dict(NAMES)


# Threads that read at once must not each draw the scene.
_LOCK = threading.Lock()


@dataclass(frozen=True)
class _Place:
    """The lines that shape the place, and noise to draw with."""

    x: Float
    y: Float
    shore: Float
    """Distance to the coast, positive on land."""
    river: Float
    river_half: Float
    motorway: Float
    motorway_way: Float
    ramps: Float
    """Distance of the junction's ramps from the motorway's centre line; 0 away from junctions."""
    wide: Float
    """Noise of hundreds of pixels. All noise is periodic: rolled, it is as good as new noise."""
    mid: Float
    """Noise of tens of pixels."""
    fine: Float
    """Noise of a few pixels."""


@cache
def _draw() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    rng = np.random.Generator(np.random.PCG64(_SEED))
    place = _place(rng)
    noises = (place.wide, place.mid, place.fine)
    img, parcels = _farmland(place)
    layout = np.full((SIZE, SIZE), 4, np.uint8)
    other = np.zeros((SIZE, SIZE), bool)

    forest = _forest_cover(place, parcels)
    _forest(img, place, forest, rng)
    layout[forest > 0.5] = 3
    water, banks = _river(img, place)
    layout[water] = 2
    for x, y, radius in _VILLAGES:
        village = _disc(place, x, y, radius, radius) + 0.9 * (parcels - 0.5) > 0
        draw_town(img, village, noises, (x, y), radius / 2)
        other |= grow(village, 3)
    _roads(img, _ROADS, 0.4, (146, 135, 134))

    town = _largest(place, _TOWN) + 0.3 * (parcels - 0.5) + 0.1 * place.wide > 0
    industry = _estate(place) + 16 * (parcels - 0.5) > 0
    town &= ~grow(industry, 5)
    draw_town(img, town, noises, (420, 640), 52)
    layout[town] = 5
    draw_industry(img, industry, noises)
    layout[industry] = 6
    _roads(img, _STREETS, 0.8, (130, 128, 136))

    corridor = _motorway(img, place)
    layout[banks] = 0
    layout[corridor] = np.where(water, 0, 7)[corridor]
    _roads(img, _CROSSING, 0.7, (140, 136, 142))

    # The sea reaches only the western columns: there is no need to compute it elsewhere.
    west = _Place(**{f.name: getattr(place, f.name)[:, :_WEST] for f in fields(place)})
    sea, strand = _sea(img[:, :, :_WEST], west, rng)
    layout[:, :_WEST][sea] = 1
    layout[:, :_WEST][strand] = 0
    for jetty in _JETTIES:
        d, _ = along(jetty, SIZE, 12)
        blend(img, band(d, 0.9), (164, 158, 156))
        blend(img, 0.5 * band(np.roll(d, (-1, -1), (0, 1)), 1.0) * (np.abs(d) > 1.2), (36, 56, 74))
        other |= np.abs(d) < 4
    layout[other] = 0
    layout.flags.writeable = False
    return _sensed(img, rng), layout


def _place(rng: np.random.Generator) -> _Place:
    wide = noise(rng, SIZE, 300, 2.2, 24)
    mid = noise(rng, SIZE, 60, 1.6)
    y, x = (np.float32(0.5) + g.astype(np.float32) for g in np.mgrid[:SIZE, :SIZE])

    line = curve(_COAST)
    rows = np.arange(SIZE) + 0.5
    coast = np.interp(rows, line[:, 1], line[:, 0])
    slant = np.hypot(1, np.gradient(coast))
    shore = (x - coast[:, None].astype(np.float32)) / slant[:, None].astype(np.float32)
    shore = shore + 9 * np.roll(wide, 300, 0) + 3.5 * blur(np.roll(mid, 300, 0), 2.5)

    river, way = along(_RIVER, SIZE, 64)
    half = 11.5 + 1.4 * wide + 14 * np.clip((way - 880) / 160, 0, 1) ** 2
    motorway, m_way = along(_MOTORWAY, SIZE, 34)
    jx, jy = _JUNCTION
    near = 1 - np.abs(m_way - m_way[jy, jx]) / 110
    ramps = np.where(near > 0, 3 + 24 * np.clip(near, 0, 1) ** 1.6, 0)
    return _Place(
        x=x,
        y=y,
        shore=shore.astype(np.float32),
        river=river + (1.4 * np.roll(mid, 100, 1)).astype(np.float32),
        river_half=half.astype(np.float32),
        motorway=motorway,
        motorway_way=m_way,
        ramps=ramps.astype(np.float32),
        wide=wide,
        mid=mid,
        fine=noise(rng, SIZE, 5, 0.4),
    )


def _disc(place: _Place, x: float, y: float, rx: float, ry: float) -> Float:
    """1 in the middle of an ellipse, 0 at its rim, negative outside."""
    return 1 - np.hypot((place.x - x) / np.float32(rx), (place.y - y) / np.float32(ry))


def _largest(place: _Place, discs: tuple[tuple[int, int, int, int], ...]) -> Float:
    return np.asarray(np.maximum.reduce([_disc(place, *disc) for disc in discs]), np.float32)


# --- the land -----------------------------------------------------------------------------


def _farmland(place: _Place) -> tuple[Float, Float]:
    """Draw parcels of crops everywhere; also return a random number in [0, 1) for each parcel."""
    x = place.x + 4 * place.wide
    y = place.y + 4 * np.roll(place.wide, (311, 173), (0, 1))
    block = cells(x, y, 118, 11)
    small = (_disc_at(block, 330, 880, 190, 150) > 0) | (_disc_at(block, 540, 330, 110, 120) > 0)
    u, v = turned(x - block.x, y - block.y, np.pi * unit(block.key, 1))
    width = np.where(small, 9 + 6 * unit(block.key, 2), 15 + 22 * unit(block.key, 2))
    length = np.where(small, 16 + 14 * unit(block.key, 3), 46 + 60 * unit(block.key, 3))
    across = cut((u / width).astype(np.float32), block.key)
    strip = hashed(block.key, across.index)
    down = cut((v / length).astype(np.float32) + unit(strip, 4), strip)
    parcel = hashed(strip, down.index)

    colour = choose(unit(parcel, 5), _CROPS)
    colour = np.where(small, choose(unit(parcel, 5), _ORCHARDS), colour)
    img = colour * (0.9 + 0.2 * unit(parcel, 6)) + tinted(unit(parcel, 7) - 0.5, 10, -4, -6)

    # Drilled rows and tillage run along a parcel; soil and moisture do not care for it.
    t = u / (1.5 + 2.0 * unit(parcel, 8)) + 0.25 * place.wide
    row = np.floor(t).astype(np.int32)
    rows = unit(parcel, row) + (t - row) * (unit(parcel, row + 1) - unit(parcel, row)) - 0.5
    rows *= (5 + 22 * unit(parcel, 9) ** 2) * (0.75 + 0.25 * place.mid)
    soil = place.mid * (2 + 6 * unit(parcel, 10)) + (0.5 + 2.3 * unit(parcel, 15)) * place.fine
    soil += 14 * (unit(parcel, 11) - 0.5) * v / length

    edge = np.minimum(
        np.minimum(across.low, across.high) * width, np.minimum(down.low, down.high) * length
    )
    kind = unit(parcel, 12)
    track = band(edge, 0.45) * (kind < np.where(small, 0.75, 0.25)) * (0.5 + 0.5 * kind / 0.75)
    blend(img, 0.8 * track, (160, 143, 138))
    blend(img, 0.7 * band(edge, 0.6) * (kind > 0.86), (58, 76, 80))
    # The drill's turns and the hedge's shade soften what a plan would show as a sharp line.
    img = blur(img.astype(np.float32), 0.55) + tinted(
        (rows + soil).astype(np.float32), 1, 0.85, 0.78
    )
    side = unit(block.pair, 13)
    blend(img, 0.8 * band(block.edge, 0.7) * (side < 0.45), (150, 138, 136))
    hedge = band(block.edge, 1.5) * (side > 0.6) * ramp(0.6 + np.roll(place.mid, 77, 1))
    blend(img, 0.9 * hedge, (44, 64, 70))
    return img.astype(np.float32), unit(parcel, 14)


def _disc_at(block: Cells, x: float, y: float, rx: float, ry: float) -> Float:
    return 1 - np.hypot((block.x - x) / np.float32(rx), (block.y - y) / np.float32(ry))


def _forest_cover(place: _Place, parcels: Float) -> Float:
    edge = _largest(place, _WOODS) * 60 + 7 * place.wide + 3 * np.roll(place.mid, 400, 0)
    return blur(ramp((edge + 15 * (parcels - 0.5)).astype(np.float32)), 0.7)


def _forest(img: Float, place: _Place, cover: Float, rng: np.random.Generator) -> None:
    ground = noise(rng, SIZE, 120, 1.9)
    crowns = noise(rng, SIZE, 8, 0.2)
    # Lit from the south-east, as at the satellite's morning pass.
    light = np.roll(ground, (1, 1), (0, 1)) - np.roll(ground, (-1, -1), (0, 1))
    light = light / light.std()
    leafy = ramp(2.5 * np.roll(place.wide, (200, 500), (0, 1)) + np.roll(place.mid, 250, 1) - 0.4)
    trees = tinted(np.ones_like(leafy), 36, 58, 71) + tinted(leafy, 3, 8, 4)
    trees += tinted(1.8 * light + (2.4 + 0.9 * place.mid) * crowns + 0.5 * ground, 1.0, 1.05, 0.75)
    glade = ramp(6 * (np.roll(place.mid, (640, 320), (0, 1)) - 2.35))
    blend(trees, 0.4 * glade, (88, 92, 92))
    path = np.abs(np.roll(place.wide, 650, 1) + 0.12 * place.mid)
    blend(trees, 0.4 * band(path * 40, 0.4), (92, 96, 98))
    blend(img, cover, trees)
    # The sun leaves the north-western rim of a wood in shade.
    rim = cover * (1 - np.roll(cover, (2, 2), (0, 1)))
    blend(img, 0.5 * rim, (28, 48, 62))


def _estate(place: _Place) -> Float:
    """Distance to the rim of the industrial estate, positive inside."""
    u, v = turned(place.x - 690, place.y - 662, ESTATE_ANGLE)
    return np.minimum(78 - np.abs(u), 104 - np.abs(v)) + 3 * place.wide


# --- lines --------------------------------------------------------------------------------


def _roads(img: Float, lines: tuple[tuple[Point, ...], ...], half: float, colour: Colour) -> None:
    d = np.minimum.reduce([np.abs(along(line, SIZE, 4)[0]) for line in lines])
    blend(img, np.float32(0.85) * band(d, half), colour)


def _motorway(img: Float, place: _Place) -> Mask:
    """Two carriageways on a green bank, with a junction and a bridge; return the corridor."""
    d, way = np.abs(place.motorway), place.motorway_way
    bridge = ramp(place.river_half + 2 - np.abs(place.river))
    blend(img, 0.6 * bridge * band(np.roll(d, (-2, -2), (0, 1)), 4.6), (30, 50, 62))
    reach = np.maximum(11.6 + 0.7 * place.mid, place.ramps + 4.5)
    verge = tinted(np.ones_like(d), 66, 90, 90) + tinted(4 * place.mid + 2 * place.fine, 1, 1, 0.8)
    trees = ramp(2 * np.roll(place.mid, 510, 0) - 0.6) * (d > 6.5)
    blend(verge, 0.85 * trees, (44, 66, 72))
    blend(img, 0.88 * (1 - bridge) * ramp((reach - d) / 2), verge)
    ramps = band(d - place.ramps, 0.9) * (place.ramps > 0)
    blend(img, 0.9 * ramps, (128, 126, 132))
    service = band(place.motorway - 9.2, 0.5) * (place.ramps == 0)
    blend(img, 0.6 * (1 - bridge) * service, (132, 128, 130))
    blend(img, band(d, 4.2), (104, 106, 114))
    blend(img, band(d - 2.3, 1.0), (132, 130, 137))
    blend(img, 0.8 * band(d, 0.35), (84, 96, 98))
    lane = hashed(np.floor(way / 1.6).astype(np.int32), (place.motorway > 0).astype(np.int32))
    vehicle = band(d - 2.3, 0.6) * (unit(lane, 1) < 0.1)
    blend(img, 0.5 * vehicle, tinted(60 + 190 * unit(lane, 2), 1, 1, 1.04))
    return np.asarray(d < reach)


def _river(img: Float, place: _Place) -> tuple[Mask, Mask]:
    """Water between tree-lined and muddy banks; return the water and the banks."""
    d = np.abs(place.river)
    half = place.river_half
    rim = d - half
    patch = np.roll(place.mid, (150, 700), (0, 1))
    meadow = tinted(np.ones_like(d), 64, 90, 86) + tinted(4 * place.mid + 2 * place.fine, 1, 1, 0.8)
    blend(img, 0.85 * ramp((16 + 8 * np.roll(place.wide, 222, 1) + 3 * patch - rim) / 3), meadow)
    blend(img, ramp(3.6 + 1.2 * patch - rim) * ramp(0.6 + 2 * patch), (40, 62, 70))
    blend(img, ramp(1.0 - rim) * 0.6, (126, 122, 118))
    deep = np.clip(1 - d / np.maximum(half, 1), 0, 1)
    water = tinted(np.ones_like(d), 58, 87, 94) - tinted(deep, 5, 5, 3)
    water += tinted(2.0 * place.wide + 0.8 * place.mid + 0.7 * place.fine, 1, 0.9, 0.7)
    blend(img, ramp(-rim), water)
    return np.asarray(rim < 0), np.asarray(rim < 12) & (rim >= 0)


def _sea(img: Float, place: _Place, rng: np.random.Generator) -> tuple[Mask, Mask]:
    """Sea with shallows, surf, a beach and the river's plume; return the sea and the strand."""
    shore = place.shore
    sand = 2.5 + 3 * np.clip(np.roll(place.wide, 333, 0) + 0.3, 0, 2)
    dune = tinted(np.ones_like(shore), 118, 124, 114) + tinted(
        9 * place.mid + 5 * place.fine, 1, 0.9, 0.8
    )
    mouth = (np.abs(place.river) < place.river_half + 2) & (shore < 14)
    land = ramp(sand + 6 + 2 * place.mid - shore) * ~mouth
    blend(img, 0.7 * land, dune)
    blend(img, ramp(sand - shore) * ~mouth, (206, 187, 170))

    swell = np.sin((0.9 * place.x + 0.35 * place.y + 9 * place.wide) * 0.62) * 0.35
    depth = np.maximum(-shore, 0)
    water = tinted(np.ones_like(shore), 29, 53, 78)
    water += tinted(np.roll(place.wide, 128, 0), 2.2, 3.2, 2.2)
    water += tinted(swell + 0.75 * noise(rng, SIZE, 30, 0.6)[:, :_WEST], 1, 1, 0.9)
    blend(water, 0.75 * np.exp(-depth / (9 + 2 * place.wide)), (72, 112, 116))
    out = _MOUTH[0] - place.x
    drift = (place.y - _MOUTH[1] - 0.25 * out) / 0.7
    plume = np.exp(
        -np.maximum(np.hypot(out, drift) - 30, 0) / (48 + 9 * np.roll(place.wide, 90, 0))
    )
    blend(water, 0.97 * np.clip(plume, 0, 1), (52, 82, 92))
    foam = np.roll(place.mid, 845, 0)
    blend(water, 0.8 * band(depth - 1.0, 0.9) * ramp(foam + 0.6) * ~mouth, (196, 202, 204))
    surf = band(depth - 5.5 - foam, 0.7) * ramp(2 * foam - 0.8) * ~mouth
    blend(water, 0.45 * surf, (150, 168, 174))
    blend(img, ramp(-shore), water)
    estuary = mouth & (shore > -30)
    sea = (shore < 0) & ~estuary
    return sea, ((shore < sand + 6) & ~mouth & ~sea) | estuary


def _sensed(img: Float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """What the instrument makes of it: the blur of its optics, a little noise, whole counts."""
    light = img.mean(0)
    # True-colour pictures keep colour at about half the detail of light.
    grain = rng.standard_normal((4, SIZE, SIZE), dtype=np.float32)
    seen = blur(img - light + 2.4 * grain[:3], 0.9) + blur(light, 0.5) + 0.5 * grain[3]
    pixels = np.clip(np.rint(seen), 0, 255).astype(np.uint8)
    pixels.flags.writeable = False
    return pixels

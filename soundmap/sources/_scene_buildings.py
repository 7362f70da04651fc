"""The built-up parts of the sample scene: a town's streets and roofs, an estate's halls and yards.

Houses are about as large as a pixel, so both are drawn in finer pixels and averaged.
"""

from __future__ import annotations

import numpy as np

from soundmap.sources._scene_canvas import (
    Float,
    Mask,
    Palette,
    Point,
    band,
    blend,
    cells,
    choose,
    cut,
    finer,
    hashed,
    shrunk,
    tinted,
    turned,
    unit,
    zoomed,
)

_FINER = 2

ESTATE_ANGLE = -0.31
"""Radians by which the estate's axes are turned, to follow the motorway beside it."""

_ROOFS: Palette = (
    ((144, 114, 113), 0.31),
    ((120, 107, 113), 0.21),
    ((99, 102, 113), 0.22),
    ((160, 141, 139), 0.16),
    ((190, 180, 179), 0.07),
    ((236, 231, 230), 0.03),
)
_HALLS: Palette = (
    ((255, 252, 250), 0.20),
    ((214, 206, 208), 0.19),
    ((176, 170, 176), 0.18),
    ((140, 140, 150), 0.12),
    ((122, 138, 158), 0.06),
    ((84, 88, 102), 0.10),
    ((156, 112, 110), 0.04),
    ((210, 186, 172), 0.04),
)


def draw_town(
    img: Float, mask: Mask, noises: tuple[Float, Float, Float], centre: Point, core_px: float
) -> None:
    """Draw blocks of houses around gardens or courts, with parks and a few large buildings.

    Parameters
    ----------
    img : float32[3, H, W]
        Painted in place where the mask is.
    mask : bool[H, W]
        Where the town is.
    noises : float32[H, W], three
        Noise of hundreds, tens and a few pixels.
    centre : (x, y)
        The old town, where houses stand close.
    core_px : float
        Radius of the old town.
    """
    box, x, y = finer(mask, _FINER)
    bend, stain, speck = (zoomed(a, box, _FINER) for a in noises)
    core = np.hypot(x - centre[0], 1.3 * (y - centre[1])) < core_px * (
        1 + 0.3 * bend + 0.12 * stain
    )
    part = cells(x + 5 * bend, y - 5 * bend, 74, 31)
    angle = np.float32(0.6) * np.rint(4 * unit(part.key, 1)) + 0.3 * unit(part.key, 9)
    u, v = turned(x - part.x + 5 * bend, y - part.y - 3 * bend, angle)
    deep = np.where(core, 5.6, 7.4 + 3.2 * unit(part.key, 2))
    wide = np.where(core, 11, 13 + 11 * unit(part.key, 3))
    column, row = (
        cut((u / deep).astype(np.float32), part.key),
        cut((v / wide).astype(np.float32), part.key + 1),
    )
    su = np.where(column.low < column.high, column.low, -column.high) * deep
    sv = np.where(row.low < row.high, row.low, -row.high) * wide

    out = tinted(7 * speck + 6 * stain, 1, 1.05, 0.85) + tinted(np.ones_like(u), 64, 80, 89)
    # Trees and sheds of the gardens, about a pixel each.
    bush = hashed(np.floor(u / 1.5).astype(np.int32), np.floor(v / 1.5).astype(np.int32))
    blend(out, (unit(bush, 1) < 0.27) * np.float32(0.7), (42, 62, 74))
    blend(
        out, (unit(bush, 1) > 0.80) * np.float32(0.75), tinted(88 + 60 * unit(bush, 2), 1, 1, 1.03)
    )
    blend(out, core * np.float32(0.7), (92, 93, 101))

    # Houses face the nearest street, on both sides of it.
    on_u = np.abs(su) < np.abs(sv)
    off, run = np.abs(np.where(on_u, su, sv)), np.where(on_u, v, u)
    side = np.where(on_u, su, sv) > 0
    street = hashed(part.key, on_u, np.where(on_u, column.index + ~side, row.index + ~side), side)
    plot = run / (1.7 + 1.1 * unit(street, 4)) + 7 * unit(street, 5)
    number = np.floor(plot).astype(np.int32)
    house = hashed(street, number)
    front = 0.7 + 0.7 * unit(house, 5)
    back = front + np.where(core, 1.7, 0.9) + 0.9 * unit(house, 6)
    slack = np.where(core, 0.48, 0.32 + 0.16 * unit(house, 13))
    built = (np.abs(plot - number - 0.5) < slack) & (off > front) & (off < back)
    built &= unit(house, 7) < np.where(core, 0.96, 0.80)
    blend(out, ((off >= back) & (off < back + 0.8) & ~side) * np.float32(0.5), (38, 54, 66))
    tone = choose((0.45 * unit(part.key, 6) + unit(house, 8)) % 1, _ROOFS)
    roof = tone * (0.70 + 0.2 * unit(part.key, 7) + 0.30 * unit(house, 9) + 0.06 * side)
    blend(out, built.astype(np.float32), roof.astype(np.float32))

    block = hashed(part.key, column.index, row.index)
    kind = unit(block, 10)
    inner = np.minimum(
        np.minimum(column.low, column.high) * deep, np.minimum(row.low, row.high) * wide
    )
    lawn = (kind < 0.05) & ~core & (inner > 0.9)
    blend(
        out, lawn * np.float32(0.85), tinted(speck, 5, 6, 4) + tinted(np.ones_like(u), 54, 84, 82)
    )
    large = (kind > 0.96) & (inner > 1.7) & (unit(block, 14) * 0.6 + 0.2 > np.abs(row.low - 0.5))
    blend(
        out, large.astype(np.float32), choose(unit(block, 12), _ROOFS) + tinted(6 * stain, 1, 1, 1)
    )
    paved = np.maximum(band(su * _FINER, 1.0), band(sv * _FINER, 0.8)) * np.float32(0.85)
    blend(out, paved, (110, 110, 119))
    blend(out, np.float32(0.8) * band(part.edge * _FINER, 1.6), (122, 120, 128))
    blend(img[:, box[0], box[1]], mask[box].astype(np.float32), shrunk(out, _FINER))


def draw_industry(img: Float, mask: Mask, noises: tuple[Float, Float, Float]) -> None:
    """Draw lots with flat roofs and their shadows, yards with goods and vehicles, and roads.

    The parameters are those of `draw_town`.
    """
    box, x, y = finer(mask, _FINER)
    _, stain, speck = (zoomed(a, box, _FINER) for a in noises)
    part = cells(x, y, 80, 51)
    angle = np.float32(ESTATE_ANGLE) + np.where(unit(part.key, 1) < 0.35, 0.55, 0.0)
    u, v = turned(x - part.x, y - part.y, angle.astype(np.float32))
    across = cut(u / 15, part.key)
    column = hashed(part.key, across.index)
    long = 10 + 9 * unit(column, 13)
    down = cut(v / long + unit(column, 1), column)
    lot = hashed(column, down.index)
    west, east, north, south = across.low * 15, across.high * 15, down.low * long, down.high * long
    rim = np.minimum(np.minimum(west, east), np.minimum(north, south))

    out = tinted(np.ones_like(u), 94, 97, 107) + tinted(7 * stain + 9 * speck, 1, 1, 1)
    out += tinted(unit(lot, 2) - 0.4, 64, 55, 50)
    green = (unit(lot, 3) < 0.13) | ((rim < 1.0) & (unit(lot, 4) < 0.45))
    grass = tinted(np.ones_like(u), 56, 80, 84) + tinted(speck, 8, 8, 6)
    blend(out, green.astype(np.float32), grass)
    # Goods and vehicles stand in rows in many of the yards.
    bay = hashed(np.floor(u / 1.1).astype(np.int32), np.floor(v / 1.5).astype(np.int32))
    parked = (unit(bay, 1) < 0.36) & (unit(lot, 5) < 0.65) & ~green
    blend(out, parked * np.float32(0.8), tinted(66 + 140 * unit(bay, 2), 1, 1, 1.02))

    use, margin = unit(lot, 7), 1.2 + 1.6 * unit(lot, 6)
    bay_v, bay_u = 4.2 + 2 * unit(lot, 14), 3.6 + 4 * unit(lot, 15)

    def roofs(du: float, dv: float) -> Mask:
        """Whether a point that much further on is under a roof."""
        inside = np.minimum(np.minimum(west + du, east - du), np.minimum(north + dv, south - dv))
        a, b = (v + dv) / bay_v, (u + du) / bay_u
        shed = np.abs(a - np.rint(a)) < 0.33
        hut = shed & (np.abs(b - np.rint(b)) < 0.36)
        return (inside > margin) & ((use < 0.40) | (shed & (use < 0.58)) | (hut & (use < 0.90)))

    blend(out, roofs(0.9, 0.7) * np.float32(0.75), (48, 60, 74))
    hut = hashed(lot, np.rint(v / bay_v).astype(np.int32), np.rint(u / bay_u).astype(np.int32))
    tone = choose(np.where(use < 0.58, unit(lot, 10), unit(hut, 1)), _HALLS)
    ridge = np.sin(u * (1.1 + 0.9 * unit(lot, 8))) * 11 * (unit(lot, 9) < 0.5) + 4 * stain
    plant = (unit(bay, 3) < 0.07) * np.float32(-50)
    blend(out, roofs(0, 0).astype(np.float32), tone + tinted(ridge + plant, 1, 1, 1))
    road = np.maximum(
        band(west * _FINER, 2.0) * (unit(column, 12) < 0.6), band(part.edge * _FINER, 2.4)
    )
    blend(out, road * np.float32(0.9), (116, 115, 123))
    # White roofs blind the detector, as bright as a pixel of them can be.
    out = np.clip(out, 30, 268)
    blend(img[:, box[0], box[1]], mask[box].astype(np.float32), shrunk(out, _FINER))

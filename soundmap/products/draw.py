"""Pictures of maps, beside their imagery."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from soundmap.request import Request
from soundmap.sources import open_source
from soundmap.stores.info import describe
from soundmap.stores.opening import open_map
from soundmap.stores.picture import render_png

# Most cells along a side of a picture's panel: more would not be seen.
_PICTURE_CELLS = 660


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

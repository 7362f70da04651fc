from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from soundmap.errors import OutputError, UsageError
from soundmap.stores.picture import render_png

NAMES = ("sea waves", "oiseaux d'été", "traffic")
COLOURS = ("#2b83ba", "#7fbf3f", "#d7301f")


def scene(height=20, width=30):
    values = np.zeros((3, height, width), np.float32)
    values[0, :, : width // 2] = 0.9
    values[2, :, width // 2 :] = 0.7
    values[:, : height // 4] = np.nan
    return values


def colours_in(path):
    counted = Image.open(path).convert("RGB").getcolors(1 << 20)
    return {"#{:02x}{:02x}{:02x}".format(*colour) for count, colour in counted if count > 500}


def test_the_strongest_sound_has_its_colour_and_no_data_is_grey(tmp_path):
    path = render_png(scene(), NAMES, COLOURS, tmp_path / "a.png", title="Kostel v Křivoklátě")
    found = colours_in(path)
    assert {"#2b83ba", "#d7301f", "#e2e4e7", "#ffffff"} <= found
    assert "#7fbf3f" not in found


def test_panels_and_imagery_widen_the_picture(tmp_path):
    imagery = np.full((3, 40, 60), 90, np.uint8)
    few = render_png(scene(), NAMES, COLOURS, tmp_path / "a.png", panels=("traffic",))
    more = render_png(
        scene(), NAMES, COLOURS, tmp_path / "b.png", imagery=imagery, panels=("traffic",)
    )
    assert Image.open(more).width > Image.open(few).width
    assert "#5a5a5a" in colours_in(more)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 3), (700, 900)])
@pytest.mark.parametrize("value", ["probability", "similarity"])
def test_any_shape_is_drawn(tmp_path, shape, value):
    path = render_png(scene(*shape), NAMES, COLOURS, tmp_path / "a.png", value=value)
    assert Image.open(path).width < 2500


def test_a_map_without_a_value_is_drawn(tmp_path):
    render_png(np.full((1, 5, 5), np.nan, np.float32), NAMES[:1], COLOURS[:1], tmp_path / "a.png")


def test_faults_are_named(tmp_path):
    with pytest.raises(UsageError, match="no concept 'thunder': it holds sea waves"):
        render_png(scene(), NAMES, COLOURS, tmp_path / "a.png", panels=("thunder",))
    with pytest.raises(UsageError, match="2 names"):
        render_png(scene(), NAMES[:2], COLOURS, tmp_path / "a.png")
    with pytest.raises(OutputError, match="could not be written"):
        render_png(scene(), NAMES, COLOURS, tmp_path / "missing" / "a.png")

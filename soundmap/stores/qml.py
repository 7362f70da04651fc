"""A QGIS style for a map, so that it opens with one fixed colour scale."""

from __future__ import annotations

import os
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from soundmap.errors import OutputError
from soundmap.stores.schema import MapSchema

RAMP = (
    "#000004",
    "#180f3e",
    "#451077",
    "#721f81",
    "#9f2f7f",
    "#cd4071",
    "#f1605d",
    "#fd9567",
    "#feca8d",
    "#fcfdbf",
)
"""Dark to light in perceptually even steps: matplotlib's "magma" (CC0), every ninth of it."""

DIVERGING_RAMP = ("#2166ac", "#67a9cf", "#d1e5f0", "#f7f7f7", "#fddbc7", "#ef8a62", "#b2182b")
"""Blue through white at zero to red: ColorBrewer's "RdBu" reversed (Apache-2.0)."""


def write_style(schema: MapSchema, path: str | Path) -> Path:
    """Write the style beside a map: first concept, fixed scale over the value's whole range.

    QGIS loads ``city.qml`` by itself when it opens ``city.tif``.

    Raises
    ------
    OutputError
        The file could not be written.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(style_xml(schema))
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"{path}: could not be written ({error.strerror or error})") from error
    return path


def style_xml(schema: MapSchema) -> str:
    """Return the style as QGIS's own XML."""
    # QGIS styles the scaled values of packed bytes, so that both dtypes share one scale.
    low, high = schema.value_range
    colours = DIVERGING_RAMP if schema.value == "similarity" else RAMP
    stops = [
        (low + (high - low) * index / (len(colours) - 1), colour)
        for index, colour in enumerate(colours)
    ]

    root = ET.Element(
        "qgis",
        version="3.22.0",
        styleCategories="Symbology|Rendering",
        hasScaleBasedVisibilityFlag="0",
        maxScale="0",
        minScale="1e+08",
    )
    pipe = ET.SubElement(root, "pipe")
    provider = ET.SubElement(pipe, "provider")
    ET.SubElement(
        provider,
        "resampling",
        enabled="false",
        zoomedInResamplingMethod="nearestNeighbour",
        zoomedOutResamplingMethod="nearestNeighbour",
        maxOversampling="2",
    )
    renderer = ET.SubElement(
        pipe,
        "rasterrenderer",
        type="singlebandpseudocolor",
        band="1",
        opacity="1",
        alphaBand="-1",
        nodataColor="",
        classificationMin=_number(low),
        classificationMax=_number(high),
    )
    ET.SubElement(renderer, "rasterTransparency")
    origin = ET.SubElement(renderer, "minMaxOrigin")
    for name, text in (
        ("limits", "None"),
        ("extent", "WholeRaster"),
        ("statAccuracy", "Estimated"),
        ("cumulativeCutLower", "0.02"),
        ("cumulativeCutUpper", "0.98"),
        ("stdDevFactor", "2"),
    ):
        ET.SubElement(origin, name).text = text
    shader = ET.SubElement(
        ET.SubElement(renderer, "rastershader"),
        "colorrampshader",
        colorRampType="INTERPOLATED",
        classificationMode="1",
        clip="0",
        labelPrecision="2",
        minimumValue=_number(low),
        maximumValue=_number(high),
    )
    _ramp(shader, colours)
    for at, colour in stops:
        ET.SubElement(
            shader, "item", value=_number(at), color=colour, alpha="255", label=f"{at:.2f}"
        )
    ET.SubElement(pipe, "brightnesscontrast", brightness="0", contrast="0", gamma="1")
    ET.SubElement(pipe, "huesaturation", saturation="0", grayscaleMode="0", colorizeOn="0")
    ET.SubElement(pipe, "rasterresampler", maxOversampling="2")
    ET.SubElement(pipe, "resamplingStage").text = "resamplingFilter"
    ET.SubElement(root, "blendMode").text = "0"
    ET.indent(root, " ")
    doctype = "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
    return doctype + ET.tostring(root, encoding="unicode") + "\n"


def _ramp(shader: ET.Element, colours: tuple[str, ...]) -> None:
    ramp = ET.SubElement(shader, "colorramp", name="[source]", type="gradient")
    between = ":".join(
        f"{index / (len(colours) - 1):.6g};{_rgba(colour)}"
        for index, colour in enumerate(colours[1:-1], start=1)
    )
    values = {
        "color1": _rgba(colours[0]),
        "color2": _rgba(colours[-1]),
        "discrete": "0",
        "rampType": "gradient",
        "stops": between,
    }
    options = ET.SubElement(ramp, "Option", type="Map")
    for name, value in values.items():
        ET.SubElement(options, "Option", type="QString", name=name, value=value)
    # QGIS before 3.26 reads <prop>, newer ones <Option>.
    for name, value in values.items():
        ET.SubElement(ramp, "prop", k=name, v=value)


def _rgba(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"{red},{green},{blue},255"


def _number(value: float) -> str:
    return f"{value:.10g}"

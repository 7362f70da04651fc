"""What the card of the bundled model says of its data and its limits."""

from __future__ import annotations

from soundmap.train.text_vectors import SENTENCE_MODEL

DATA = [
    {
        "name": "EuroSAT RGB, split `train` (by 1-degree cell)",
        "use": "training; `val` for choosing and calibration",
        "licence": "MIT; contains modified Copernicus Sentinel data",
        "cite": "Helber et al. 2019",
    },
    {
        "name": "UC Merced Land Use, split `train`, every eighth image held out as `val`",
        "use": "training; `val` for choosing and calibration",
        "licence": "public domain (USGS National Map Urban Area Imagery)",
        "cite": "Yang and Newsam 2010",
    },
    {
        "name": "ESC-10 and part of ESC-50, split `train` (by recording), CC0 and CC-BY clips",
        "use": "training",
        "licence": "CC0 and CC BY 3.0, by clip; authors in audio/esc_index.csv",
        "cite": "Piczak 2015",
    },
    {
        "name": "a day in a spruce forest, Jura, 48 recordings of 10 s",
        "use": "training: by day as a class of its own, all as a background of other clips",
        "licence": "BSD-3-Clause (scikit-maad)",
        "cite": "Ulloa et al. 2021",
    },
    {
        "name": f"token vectors distilled from {SENTENCE_MODEL} with model2vec",
        "use": "text side, frozen",
        "licence": "Apache-2.0",
        "cite": "Reimers and Gurevych 2019",
    },
    {
        "name": "captions, prompts and the table of what is audible where",
        "use": "training and calibration; written for this project, a judgement and not a "
        "measurement",
        "licence": "Apache-2.0",
    },
]
"""What the model was made from."""

LIMITS = (
    "No recording was made where its image was taken: which sounds belong to which place is a "
    "written table of what one would expect, and a handful of clips stands for each sound, many "
    "of them close and clean as no soundscape is. Seven kinds of sound have about 25 clips each, "
    "twenty-three have one to seven. Europe at 10 m and US cities at 0.3 m, by day, without snow "
    "or cloud. Other places, sensors and resolutions are extrapolation."
)
"""What it does not know."""

"""The checkpoints that the authors of Sat2Sound publish: what is known of each.

Figures are the paper's own, read off its poster; nothing here was measured by soundmap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from soundmap.encoder.card import InputSpec

REPOSITORY = "MVRL/sat2sound"
"""Where the files are: a repository at huggingface.co."""
TEXT_ENCODER = "google/flan-t5-large"
"""The frozen text model that all of them were trained with; at the hub, by this name."""
WINDOW_PX = 224
PATCH_PX = 16
CODE_LICENCE = "MIT"
LICENCE = "not stated by the authors for the weights (their code: MIT)"
PAPER = "Sat2Sound, arXiv 2505.13777"
CAVEAT = (
    "As published by the authors, not measured by soundmap. R@10%: the share of queries whose own "
    "pair is within the top tenth of the test set. Models with metadata were also told where sound "
    "and caption came from (archive, captioning program), which a map cannot know and soundmap "
    "masks: expect less on a map; the figures of the model without metadata are the honest guide."
)

# Metadata as the checkpoints name it, in the order of the tokens -> as InputSpec does. Sources are
# not among the inputs: nobody knows the source of a sound that was not recorded.
FIELDS = {"asource": None, "tsource": None, "latlong": "lonlat", "month": "month", "time": "hour"}


@dataclass(frozen=True)
class Dataset:
    """What a checkpoint was trained and tested on."""

    name: str
    licence: str
    rows: tuple[int, int, int]
    """For training, validation and test."""
    about: str


@dataclass(frozen=True)
class Imagery:
    """Imagery that a checkpoint was trained on."""

    sat_type: str
    """As the checkpoints' hyper-parameters call it."""
    title: str
    gsd_m: float
    """Metres per pixel that the model is told at scale 1."""
    native_px: int
    """Side of the crop that is resized to the window, at scale 1."""
    scales: tuple[int, ...]
    dataset: Dataset

    def input_spec(self, fields: tuple[str, ...]) -> InputSpec:
        """What a model of this imagery reads, with the given fields of metadata."""
        return InputSpec(
            window_px=WINDOW_PX,
            patch_px=PATCH_PX,
            native_px=self.native_px,
            gsd_m=((self.gsd_m, self.gsd_m),),
            scales=self.scales,
            metadata=tuple(name for key in fields if (name := FIELDS[key])),
        )


@dataclass(frozen=True)
class Retrieval:
    """How well pairs were found, in one direction."""

    recall_at_10_percent: float
    """Share of queries whose own pair ranks within the first tenth of the gallery, 0 to 1."""
    median_rank: int


@dataclass(frozen=True)
class Published:
    """One checkpoint."""

    name: str
    """As `soundmap models` calls it."""
    file: str
    """Its path in `REPOSITORY`."""
    imagery: Imagery
    fields: tuple[str, ...]
    """Metadata that it was trained with, as its hyper-parameters name it; empty: none."""
    image_to_audio: Retrieval
    audio_to_image: Retrieval

    @property
    def input_spec(self) -> InputSpec:
        """What it reads."""
        return self.imagery.input_spec(self.fields)

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        return summary(self.imagery, self.fields)

    @property
    def figures(self) -> dict[str, dict[str, float]]:
        """The paper's figures, by direction."""
        return {
            direction: {"R@10%": found.recall_at_10_percent, "median rank": found.median_rank}
            for direction, found in (
                ("image to audio", self.image_to_audio),
                ("audio to image", self.audio_to_image),
            )
        }


def summary(imagery: Imagery, fields: tuple[str, ...]) -> str:
    """Say what a Sat2Sound model is, in a line."""
    given = [name for key in fields if (name := FIELDS[key])]
    return f"Sat2Sound on {imagery.title}, " + (
        f"with metadata ({', '.join(given)})" if given else "without metadata"
    )


def training_data(imagery: Imagery) -> list[dict[str, str]]:
    """Describe the training data of a model, as its card does."""
    dataset = imagery.dataset
    train, validation, test = dataset.rows
    return [
        {
            "name": f"{dataset.name}, {imagery.title}",
            "use": f"training {train:,}, validation {validation:,}, test {test:,} places",
            "licence": dataset.licence,
            "cite": PAPER,
        }
    ]


GEOSOUND = Dataset(
    name="GeoSound",
    licence="mixed, research use only",
    rows=(293_718, 4_999, 9_931),
    about="recordings of iNaturalist, YFCC, aporee and freesound, with the place of each",
)
SOUNDING_EARTH = Dataset(
    name="SoundingEarth",
    licence="CC BY 4.0",
    rows=(40_241, 3_242, 5_801),
    about="recordings of aporee, with the place of each",
)

IMAGERY: Mapping[str, Imagery] = {
    imagery.sat_type: imagery
    for imagery in (
        Imagery("bingmap", "Bing aerial imagery", 0.6, 300, (1, 3, 5), GEOSOUND),
        Imagery("sentinel", "Sentinel-2 imagery", 10.0, 256, (1, 3, 5), GEOSOUND),
        Imagery("googleEarth", "Google Earth imagery", 0.2, 256, (1,), SOUNDING_EARTH),
    )
}

_ALL = tuple(FIELDS)
_BING, _SENTINEL, _GOOGLE = IMAGERY.values()

PUBLISHED: Mapping[str, Published] = {
    model.name: model
    for model in (
        Published(
            "sat2sound-bingmap-nometa",
            "sat2sound/bingmap_nometa.ckpt",
            _BING,
            (),
            Retrieval(0.534, 872),
            Retrieval(0.535, 850),
        ),
        Published(
            "sat2sound-bingmap-withmeta",
            "sat2sound/bingmap_withmeta.ckpt",
            _BING,
            _ALL,
            Retrieval(0.871, 168),
            Retrieval(0.875, 164),
        ),
        Published(
            "sat2sound-sentinel-nometa",
            "sat2sound/sentinel_nometa.ckpt",
            _SENTINEL,
            (),
            Retrieval(0.549, 802),
            Retrieval(0.556, 778),
        ),
        Published(
            "sat2sound-sentinel-withmeta",
            "sat2sound/sentinel_withmeta.ckpt",
            _SENTINEL,
            _ALL,
            Retrieval(0.868, 191),
            Retrieval(0.872, 183),
        ),
        Published(
            "sat2sound-soundingearth-nometa",
            "sat2sound/SoundingEarth_nometa.ckpt",
            _GOOGLE,
            (),
            Retrieval(0.570, 438),
            Retrieval(0.562, 463),
        ),
        Published(
            "sat2sound-soundingearth-withmeta",
            "sat2sound/SoundingEarth_withmeta.ckpt",
            _GOOGLE,
            # Every recording is of one archive, so its source is no field of this model.
            tuple(field for field in _ALL if field != "asource"),
            Retrieval(0.626, 358),
            Retrieval(0.621, 372),
        ),
    )
}


def published_as(file_name: str, sat_type: str, fields: tuple[str, ...]) -> Published | None:
    """Find the published checkpoint that a file is by its name and its hyper-parameters."""
    for model in PUBLISHED.values():
        own_name = model.file.rpartition("/")[2]
        if (own_name, model.imagery.sat_type, model.fields) == (file_name, sat_type, fields):
            return model
    return None


def card_input(imagery: Imagery, fields: tuple[str, ...]) -> dict[str, Any]:
    """Write the ``input`` of a model's card."""
    spec = imagery.input_spec(fields)
    return {
        "window_px": spec.window_px,
        "patch_px": spec.patch_px,
        "native_px": spec.native_px,
        "gsd_m": [list(pair) for pair in spec.gsd_m],
        "scales": list(spec.scales),
        "metadata": list(spec.metadata),
        "bands": "red, green, blue as uint8, as in a true-colour picture",
    }

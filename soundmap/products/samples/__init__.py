"""Samples of up to four modalities, to train and to judge on: image, audio and two captions.

`open_samples` reads the published data sets, a table of your own, or a plain folder. Of a row, only
what is asked for is decoded. A row that cannot be used raises `BadSample` (or, in a stream, is left
out and recorded): nothing is ever filled with zeros.
"""

from soundmap.products.samples.base import (
    FIELDS,
    BadSample,
    Sample,
    Samples,
    StreamedSamples,
)
from soundmap.products.samples.config import SamplesConfig
from soundmap.products.samples.opening import open_samples
from soundmap.products.samples.report import BadRows, check

__all__ = [
    "FIELDS",
    "BadRows",
    "BadSample",
    "Sample",
    "Samples",
    "SamplesConfig",
    "StreamedSamples",
    "check",
    "open_samples",
]

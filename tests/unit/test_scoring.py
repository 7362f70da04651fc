"""From embeddings to values: the three values, banks, calibration."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from soundmap.errors import UsageError
from soundmap.scoring import (
    FORMULAS,
    VALUES,
    ConceptBank,
    check_value,
    fit_platt,
    join_banks,
    score,
    sigmoid,
)


def unit(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    vectors = rng.normal(size=shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def bank(*names: str, calibration: str = "platt", seed: int = 0) -> ConceptBank:
    names = names or ("birdsong", "road traffic", "waves", "Église bells")
    rng = np.random.default_rng(seed)
    count = len(names)
    return ConceptBank(
        names=names,
        groups=("biophony",) * count,
        colours=tuple(f"#0000{i:02x}" for i in range(count)),
        vectors=unit(rng, count, 8),
        scale=rng.uniform(1, 30, count).astype(np.float32),
        bias=rng.uniform(-10, 5, count).astype(np.float32),
        calibration=(calibration,) * count,
        share_scale=12.5,
        encoder_id="abc",
    )


class TestScore:
    vectors = unit(np.random.default_rng(1), 3, 5, 8)

    def cosines(self) -> NDArray[np.float64]:
        return np.einsum("hwd,cd->hwc", self.vectors.astype(float), bank().vectors.astype(float))

    def test_similarity_is_the_cosine(self) -> None:
        found = score(self.vectors, bank(), "similarity")
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, self.cosines(), atol=1e-6)

    def test_probability_is_a_calibrated_sigmoid(self) -> None:
        found = score(self.vectors, bank(), "probability")
        assert found.dtype == np.float32
        expected = 1 / (1 + np.exp(-(self.cosines() * bank().scale + bank().bias)))
        np.testing.assert_allclose(found, expected, atol=1e-6)

    def test_share_is_a_softmax(self) -> None:
        found = score(self.vectors, bank(), "share")
        assert found.dtype == np.float32
        weights = np.exp(12.5 * self.cosines())
        expected = weights / weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)

    @pytest.mark.parametrize("value", VALUES)
    def test_vectors_are_kept(self, value: str) -> None:
        vectors = self.vectors.copy()
        score(vectors, bank(), value)
        np.testing.assert_array_equal(vectors, self.vectors)

    @pytest.mark.parametrize("value", VALUES)
    def test_nan_stays_nan_and_spreads_no_further(self, value: str) -> None:
        vectors = self.vectors.copy()
        vectors[1, 2] = np.nan
        found = score(vectors, bank(), value)
        expected = score(self.vectors, bank(), value)
        assert np.isnan(found[1, 2]).all()
        expected[1, 2] = np.nan
        np.testing.assert_array_equal(found, expected)

    @given(st.integers(0, 2**32 - 1), st.floats(0.01, 1e4), st.floats(-1e4, 1e4))
    def test_ranges(self, seed: int, scale: float, bias: float) -> None:
        rng = np.random.default_rng(seed)
        concepts = replace(
            bank(),
            scale=np.full(4, scale, np.float32),
            bias=np.full(4, bias, np.float32),
            share_scale=scale,
        )
        # Also cells that are the concept itself, where rounding could pass 1.
        vectors = np.concatenate([unit(rng, 6, 8), concepts.vectors, -concepts.vectors])
        for value, low in (("similarity", -1), ("probability", 0), ("share", 0)):
            found = score(vectors, concepts, value)
            assert np.isfinite(found).all()
            assert found.min() >= low
            assert found.max() <= 1

    def test_one_concept_alone(self) -> None:
        one = bank("waves")
        np.testing.assert_array_equal(score(self.vectors, one, "share"), np.ones((3, 5, 1)))

    def test_sigmoid_of_anything(self) -> None:
        x = np.array([-np.inf, -1e38, -200, -1, 0, 1, 200, np.inf, np.nan], np.float32)
        found = sigmoid(x)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found[:-1], [0, 0, 0, 0.26894142, 0.5, 0.7310586, 1, 1])
        assert np.isnan(found[-1])

    def test_every_value_has_a_formula(self) -> None:
        assert set(FORMULAS) == set(VALUES)


class TestBank:
    def test_select_keeps_the_order_given(self) -> None:
        whole = bank()
        part = whole.select(["waves", "BIRDSONG"])
        assert len(part) == 2
        assert part.names == ("waves", "birdsong")
        assert part.colours == (whole.colours[2], whole.colours[0])
        for name in ("vectors", "scale", "bias"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[[2, 0]])
        assert part.share_scale == whole.share_scale
        assert whole.select(whole.names).digest() == whole.digest()

    def test_index_in_any_case(self) -> None:
        assert bank().index("Road Traffic") == 1
        assert bank().index("ÉGLISE BELLS") == 3

    @pytest.mark.parametrize(
        ("name", "near"),
        [("birdsnog", "birdsong"), ("traffic", "road traffic"), ("wave", "waves")],
    )
    def test_near_names(self, name: str, near: str) -> None:
        with pytest.raises(UsageError) as caught:
            bank().index(name)
        message = str(caught.value)
        assert f"no concept named {name!r}: did you mean" in message
        assert repr(near) in message
        assert "--text" in message
        assert "\n" not in message

    def test_no_name_is_near(self) -> None:
        with pytest.raises(UsageError) as caught:
            bank().select(["waves", "xylophone"])
        message = str(caught.value)
        assert "'xylophone'" in message
        assert "did you mean" not in message
        assert "soundmap concepts list" in message

    def test_join(self) -> None:
        one, other = bank("a", "b"), bank("c", calibration="generic", seed=5)
        both = join_banks(one, other)
        assert both.names == ("a", "b", "c")
        assert both.calibration == ("platt", "platt", "generic")
        vectors = unit(np.random.default_rng(3), 4, 8)
        apart = [score(vectors, b, "probability") for b in (one, other)]
        found = score(vectors, both, "probability")
        np.testing.assert_allclose(found, np.concatenate(apart, axis=-1), atol=1e-6)

    def test_join_refuses_a_name_twice(self) -> None:
        with pytest.raises(UsageError, match="'waves' is asked for twice"):
            join_banks(bank("waves", "b"), bank("Waves"))

    def test_join_refuses_other_models(self) -> None:
        with pytest.raises(UsageError, match="different models"):
            join_banks(bank("a"), replace(bank("b"), encoder_id="def"))

    def test_digest_follows_all_that_decides_values(self) -> None:
        whole = bank()
        changes = {
            "names": ("birdsong", "road traffic", "waves", "bells"),
            "vectors": whole.vectors + np.float32(1e-6),
            "scale": whole.scale * np.float32(1.000001),
            "bias": whole.bias + np.float32(1e-5),
            "calibration": ("platt", "platt", "platt", "generic"),
            "share_scale": 12.500001,
            "encoder_id": "def",
        }
        digests = [replace(whole, **{key: value}).digest() for key, value in changes.items()]
        digests += [whole.digest(), whole.select(whole.names[::-1]).digest()]
        assert len(set(digests)) == len(digests)
        assert bank().digest() == whole.digest()
        assert pickle.loads(pickle.dumps(whole)).digest() == whole.digest()

    def test_digest_tells_nan_from_numbers(self) -> None:
        bare = replace(bank(), scale=np.full(4, np.nan, np.float32))
        assert bare.digest() == replace(bare).digest()
        assert bare.digest() != bank().digest()


class TestCheckValue:
    @pytest.mark.parametrize("value", VALUES)
    def test_calibrated(self, value: str) -> None:
        check_value(bank(), value)
        check_value(bank(calibration="generic"), value)

    def test_unknown(self) -> None:
        with pytest.raises(UsageError) as caught:
            check_value(bank(), "loudness")
        assert "'loudness'" in str(caught.value)
        assert all(value in str(caught.value) for value in VALUES)

    def test_no_calibration(self) -> None:
        mixed = join_banks(bank("a"), bank("church bells", calibration="none"))
        with pytest.raises(UsageError) as caught:
            check_value(mixed, "probability")
        message = str(caught.value)
        assert "'church bells' has no calibration" in message
        assert "similarity" in message
        assert "share" in message
        check_value(mixed, "similarity")
        check_value(mixed, "share")


def draws(
    a: float, b: float, count: int, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    x = rng.uniform(0.1, 0.6, count)
    audible = rng.random(count) < 1 / (1 + np.exp(-(a * x + b)))
    return x, audible, np.ones(count)


def chance(fit: tuple[float, float], x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-(fit[0] * x + fit[1])))


class TestPlatt:
    @pytest.mark.parametrize(("a", "b"), [(12.0, -4.0), (30.0, -12.0), (3.0, 0.5)])
    def test_finds_the_slope_that_made_the_data(self, a: float, b: float) -> None:
        x, audible, weight = draws(a, b, 60_000)
        found = fit_platt(x, audible, weight)
        assert found[0] == pytest.approx(a, rel=0.06)
        np.testing.assert_allclose(chance(found, x), chance((a, b), x), atol=0.01)

    def test_is_the_maximum_of_the_likelihood(self) -> None:
        x, audible, _ = draws(9, -3, 400)
        weight = np.random.default_rng(1).uniform(0.1, 3, 400)
        a, b = fit_platt(x, audible, weight)
        weight = weight * 400 / weight.sum()
        up, down = weight[audible].sum(), weight[~audible].sum()
        target = np.where(audible, (up + 1) / (up + 2), 1 / (down + 2))

        def loss(a: float, b: float) -> float:
            p = chance((a, b), x)
            return -float((weight * (target * np.log(p) + (1 - target) * np.log(1 - p))).sum())

        best = loss(a, b)
        for da, db in ((0.05, 0), (-0.05, 0), (0, 0.02), (0, -0.02), (0.05, -0.02)):
            assert loss(a + da, b + db) > best

    def test_shift_and_stretch_of_the_similarity(self) -> None:
        x, audible, weight = draws(9, -3, 500)
        p = chance(fit_platt(x, audible, weight), x)
        for other in (x * 1e-3, x * 40 + 1000):
            moved = chance(fit_platt(other, audible, weight), other)
            np.testing.assert_allclose(moved, p, atol=1e-6)

    @pytest.mark.parametrize("gap", [0.0, 1e-6, 0.1, 100.0])
    @pytest.mark.parametrize("counts", [(50, 50), (1, 500), (500, 1), (1, 1)])
    def test_kinds_that_do_not_overlap(self, gap: float, counts: tuple[int, int]) -> None:
        rng = np.random.default_rng(0)
        low, high = rng.uniform(0, 0.2, counts[0]), rng.uniform(0, 0.2, counts[1]) + 0.2 + gap
        x = np.concatenate([low, high])
        audible = np.arange(len(x)) >= counts[0]
        a, b = fit_platt(x, audible, np.ones(len(x)))
        assert np.isfinite([a, b]).all()
        assert a > 0
        p = chance((a, b), x)
        assert p[audible].min() > p[~audible].max()
        assert p.min() > 0
        assert p.max() < 1

    def test_weights_count(self) -> None:
        x, audible, weight = draws(9, -3, 3000)
        doubled = np.where(np.arange(3000) < 1000, 2.0, 1.0)
        again = np.concatenate([np.arange(3000), np.arange(1000)])
        one = fit_platt(x, audible, doubled)
        other = fit_platt(x[again], audible[again], np.ones(4000))
        np.testing.assert_allclose(chance(one, x), chance(other, x), atol=2e-3)
        # A tenth of the weight on one kind makes that kind rarer.
        lighter = fit_platt(x, audible, np.where(audible, 0.1, 1.0))
        assert chance(lighter, x).mean() < chance(fit_platt(x, audible, weight), x).mean() - 0.1

    def test_weight_zero_is_absence(self) -> None:
        x, audible, _ = draws(9, -3, 4000)
        keep = np.arange(4000) % 2 == 0
        one = fit_platt(x, audible, keep.astype(float))
        other = fit_platt(x[keep], audible[keep], np.ones(2000))
        np.testing.assert_allclose(chance(one, x), chance(other, x), atol=2e-3)

    def test_scale_of_the_weights_does_not_matter(self) -> None:
        x, audible, weight = draws(9, -3, 300)
        np.testing.assert_allclose(
            fit_platt(x, audible, weight * 1e-3), fit_platt(x, audible, weight), rtol=1e-6
        )

    def test_no_spread_at_all(self) -> None:
        audible = np.arange(400) < 100
        a, b = fit_platt(np.full(400, 0.3), audible, np.ones(400))
        assert np.isfinite([a, b]).all()
        assert chance((a, b), np.array([0.3]))[0] == pytest.approx(0.25, abs=0.01)

    @pytest.mark.parametrize("share", [0.5, 0.1, 0.02])
    def test_backward_data_give_the_base_rate(self, share: float) -> None:
        """More similar must not mean less audible; what is left to say is how common it is."""
        rng = np.random.default_rng(0)
        audible = rng.random(4000) < share
        x = rng.normal(0.4, 0.1, 4000) - 0.2 * audible
        a, b = fit_platt(x, audible, np.ones(4000))
        assert a > 0
        p = chance((a, b), x)
        np.testing.assert_allclose(p.mean(), audible.mean(), atol=0.01)

    @given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.floats(-3, 3), st.booleans())
    def test_always_finite(self, seed: int, count: int, power: float, ties: bool) -> None:
        rng = np.random.default_rng(seed)
        x = rng.normal(size=count) * 10**power
        x = np.round(x) if ties else x
        audible = rng.random(count) < rng.random()
        audible[:2] = True, False
        weight = 10 ** rng.uniform(-3, 3, count)
        a, b = fit_platt(x, audible, weight)
        assert np.isfinite([a, b]).all()
        assert a > 0
        p = 1 / (1 + np.exp(-np.clip(a * x + b, -700, 700)))
        common = float(np.average(audible, weights=weight))
        # A fit is never worse than saying the base rate everywhere, but for the prior.
        scaled = weight * count / weight.sum()

        def loss(p: NDArray[np.float64] | float) -> float:
            p = np.clip(p, 1e-12, 1 - 1e-12)
            return -float((scaled * np.where(audible, np.log(p), np.log(1 - p))).sum())

        assert loss(p) <= loss(common) + 4

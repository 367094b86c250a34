"""Budgets that come from measurements: of types, of a noisy copy, of a model's conditioning."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest

from apr_core.dtypes import FORMATS
from apr_core.parity.distribution import compare_logits
from apr_core.parity.tolerances import (
    _MEASURED,
    AMPLIFIED,
    conditioned_limit,
    decisive_margin,
    flip_budget,
    forward_limit,
    noisy,
    rounding_error,
)

WITNESSED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal variates, float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", WITNESSED)
def test_rounding_error_equals_the_foreign_codec(name: str) -> None:
    """The table agrees with what the gguf package's own encoder does to normal variates."""
    kind = gguf.GGMLQuantizationType[name]
    x = normal(32, 1024)
    y = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    assert rounding_error(FORMATS[name]) == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=0.04)


@pytest.mark.parametrize("name", [n for n in _MEASURED if n[0] == "Q"])
def test_estimate_for_unmeasured_types_is_near_every_measured_one(name: str) -> None:
    """The formula that stands in for a measurement is within a third of each measured quantised type."""
    estimate = 2 * 2 ** -FORMATS[name].bits_per_weight
    assert estimate == pytest.approx(rounding_error(FORMATS[name]), rel=0.33)


def test_unmeasured_type_gets_the_estimate() -> None:
    """Q2_K, which nothing here encodes, has an error between that of Q4_K and one."""
    assert rounding_error(FORMATS["Q4_K"]) < rounding_error(FORMATS["Q2_K"]) < 1


def test_one_scale_for_a_tensor_depends_on_its_largest_value() -> None:
    """AprQ8 has one scale: an outlier costs every other value."""
    calm, wild = normal(64, 64), normal(64, 64)
    wild[0, 0] = 100
    assert rounding_error(FORMATS["AprQ8"], wild) > 10 * rounding_error(FORMATS["AprQ8"], calm)


def test_noise_has_the_size_it_says_row_by_row() -> None:
    """A quiet row gets quiet noise; the same seed gives the same noise; no error means no noise."""
    x = normal(4, 4096) * np.array([[1], [100], [0.01], [0]], np.float32)
    y = noisy(x, 0.05, np.random.default_rng(1))
    assert np.linalg.norm(y - x, axis=1)[:3] / np.linalg.norm(x, axis=1)[:3] == pytest.approx(0.05, rel=0.1)
    assert not y[3].any()
    assert (y == noisy(x, 0.05, np.random.default_rng(1))).all()
    assert noisy(x, 0.0, np.random.default_rng(1)) is x


def test_flip_budget_allows_what_chance_allows() -> None:
    """A copy without flips leaves room for a few, one that flips often for more; both stay below one half more."""
    x = normal(256, 100)
    none = flip_budget(compare_logits(x, x, 0.05)).limit
    some = compare_logits(x, x + 0.5 * normal(256, 100, seed=1), 0.05)
    share = 1 - some.top1_agreement
    assert 0.005 < none < 0.03
    assert 0.2 < share < flip_budget(some).limit < share + 0.25
    assert flip_budget(compare_logits(x, x, 1e9)).limit <= 1


def test_no_candidate_within_the_limit_overturns_a_decisive_margin() -> None:
    """The bound is sharp: the worst difference of the allowed norm just reaches it."""
    x = normal(1, 50)
    limit = 1e-3
    tau = decisive_margin(x, limit)[0]
    norm = limit * np.linalg.norm(x.astype(np.float64))
    assert tau == pytest.approx(2 * norm / math.sqrt(2))


def test_conditioned_limit_never_falls_below_the_claims() -> None:
    """A well-conditioned model is held to the claim's own limit, an ill-conditioned one to a multiple of its own."""
    assert conditioned_limit(1e-9).limit == forward_limit() == 1e-5
    assert conditioned_limit(1e-4).limit == pytest.approx(AMPLIFIED * 1e-4)
    assert not conditioned_limit(math.nan).limit <= 1e-5 or conditioned_limit(math.nan).limit == 1e-5

"""Samples that are kept in order, and a clock whose tick is measured."""

from __future__ import annotations

import math

import numpy as np
import pytest

from apr_core.bench.timing import Samples, clock_tick_s
from tests.bench.conftest import Clock


def test_statistics_by_hand() -> None:
    """Median, quartiles and extremes of known numbers; order is kept."""
    samples = Samples.of([4.0, 1.0, 3.0, 2.0, 100.0])
    assert samples.seconds.tolist() == [4, 1, 3, 2, 100]
    assert (samples.median, samples.iqr, samples.minimum, samples.maximum, samples.n) == (3, 2, 1, 100, 5)


def test_bootstrap_is_seeded_and_holds_the_median() -> None:
    """The same samples and seed give the same interval around the median; more coverage is wider."""
    samples = Samples.of(np.random.default_rng(0).exponential(1, 101).tolist())
    low, high = samples.median_interval(seed=5)
    assert (low, high) == samples.median_interval(seed=5)
    assert low <= samples.median <= high
    wide = samples.median_interval(seed=5, coverage=0.999)
    assert wide[0] <= low
    assert high <= wide[1]


def test_no_samples_give_no_number() -> None:
    """Nothing measured is NaN, which passes no limit."""
    empty = Samples.of([])
    assert math.isnan(empty.median)
    assert math.isnan(empty.median_interval()[0])
    assert empty.n == 0


def test_tick_is_the_smallest_step_seen() -> None:
    """A clock of 40 ns per reading has a tick of 40 ns; one that stands still has none."""
    assert clock_tick_s(Clock(40)) == pytest.approx(4e-8)
    assert clock_tick_s(Clock(0)) == math.inf
    assert 0 < clock_tick_s() < 1e-4

"""A meter that keeps what it timed, in order, and never repairs it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from apr_core.bench.timing import Samples, clock_tick_s, measure_decode, measure_prefill
from apr_core.errors import UsageError
from tests.bench.conftest import Clock, Counting

PROMPT = SimpleNamespace(ids=np.array([3, 4, 5]))


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


def test_decode_keeps_every_sample_and_token(counting: Counting) -> None:
    """Two repeats of five tokens leave two first-token times and eight steps, of known length."""
    counting.cost = lambda tokens: 7_000_000 if tokens == 3 else 2_000_000
    run = measure_decode(counting, PROMPT, max_new_tokens=5, repeats=2, warmup=1, clock=counting.clock)
    assert run.tokens == ((6, 7, 8, 9, 10),) * 2
    assert run.ttft.seconds == pytest.approx([0.007] * 2)
    assert run.steps.seconds == pytest.approx([0.002] * 8)
    assert run.wall_s == pytest.approx(0.03)
    assert (run.tpot_s, run.decode_tok_s) == (pytest.approx(0.002), pytest.approx(500))
    assert counting.calls == [3, 1, 1, 1, 1] * 3


def test_warmup_leaves_no_sample(counting: Counting) -> None:
    """A slow first call stays out of the samples."""
    costs = iter([900_000_000, *[1_000_000] * 99])
    counting.cost = lambda tokens: next(costs)
    run = measure_decode(counting, PROMPT, max_new_tokens=3, repeats=2, warmup=1, clock=counting.clock)
    assert max(run.ttft.maximum, run.steps.maximum) < 0.01


def test_work_between_repeats_is_outside_the_samples(counting: Counting) -> None:
    """The ceiling is measured between repeats: in the wall, in no sample."""

    def between() -> None:
        counting.clock.now += 500_000_000

    run = measure_decode(counting, PROMPT, max_new_tokens=3, repeats=2, clock=counting.clock, between=between)
    assert run.steps.maximum == pytest.approx(0.001)
    assert run.wall_s == pytest.approx(1.006)


def test_delay_is_inside_the_sample() -> None:
    """A sleep in each step shows in each sample, on a real clock."""
    run = measure_decode(Counting(), PROMPT, max_new_tokens=3, repeats=1, warmup=0, delay_s=0.002)
    assert run.steps.minimum >= 0.002
    assert run.ttft.minimum < 0.002


def test_clock_that_runs_backwards_is_kept_visible(counting: Counting) -> None:
    """A negative sample stays what it is: the meter repairs nothing."""
    costs = iter([5_000_000, 1_000_000, -3_000_000, 1_000_000])
    counting.cost = lambda tokens: next(costs)
    run = measure_decode(counting, PROMPT, max_new_tokens=4, repeats=1, warmup=0, clock=counting.clock)
    assert run.steps.seconds == pytest.approx([0.001, -0.003, 0.001])


def test_stopped_clock_gives_no_rate() -> None:
    """Zero seconds are no rate of infinity."""
    run = measure_decode(Counting(), PROMPT, max_new_tokens=4, repeats=1, clock=Clock())
    assert math.isnan(run.decode_tok_s)
    assert math.isnan(measure_prefill(Counting(), PROMPT, repeats=1, clock=Clock()).prefill_tok_s)


def test_prefill_shows_what_it_timed(counting: Counting) -> None:
    """Each timed repeat hands its logits over, outside of its sample."""
    seen = []

    def look(logits: np.ndarray) -> None:
        seen.append(logits.argmax(axis=1).tolist())
        counting.clock.now += 10**9

    run = measure_prefill(counting, PROMPT, repeats=3, clock=counting.clock, seen=look)
    assert seen == [[4, 5, 6]] * 3
    assert run.seconds.seconds == pytest.approx([0.001] * 3)
    assert (run.tokens, run.wall_s, run.prefill_tok_s) == (3, pytest.approx(3.003), pytest.approx(3000))


@pytest.mark.parametrize(
    "asked",
    [
        {"max_new_tokens": 1, "repeats": 1},
        {"max_new_tokens": 4, "repeats": 0},
        {"max_new_tokens": 4, "repeats": 1, "warmup": -1},
    ],
)
def test_nothing_to_time_is_refused(asked: dict[str, int]) -> None:
    """A run without a step or a repeat is a mistake of the caller."""
    with pytest.raises(UsageError, match="at least"):
        measure_decode(Counting(), PROMPT, **asked)
    if not asked["repeats"]:
        with pytest.raises(UsageError, match="at least"):
            measure_prefill(Counting(), PROMPT, repeats=0)


def test_tick_is_the_smallest_step_seen() -> None:
    """A clock of 40 ns per reading has a tick of 40 ns; one that stands still has none."""
    assert clock_tick_s(Clock(40)) == pytest.approx(4e-8)
    assert clock_tick_s(Clock(0)) == math.inf
    assert 0 < clock_tick_s() < 1e-4

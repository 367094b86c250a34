"""Verdicts and the one comparison that decides."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apr_core.falsify.verdict import NEEDS, NotRun, Verdict, holds


@pytest.mark.parametrize("verdict", list(Verdict))
def test_verdict_has_no_truth_value(verdict: Verdict) -> None:
    """`if verdict:` raises for every verdict, so a skipped gate cannot read as success."""
    with pytest.raises(TypeError, match="no truth value"):
        bool(verdict)


@pytest.mark.parametrize(
    ("value", "direction", "threshold", "expected"),
    [
        (1.0, "at_most", 1.0, True),
        (1.0, "at_least", 1.0, True),
        (math.nextafter(1.0, 2.0), "at_most", 1.0, False),
        (math.nextafter(1.0, 0.0), "at_least", 1.0, False),
        (-math.inf, "at_most", 1.0, True),
        (math.inf, "at_most", 1.0, False),
        (0.0, "at_most", 0.0, True),
        (-0.0, "at_least", 0.0, True),
    ],
)
def test_holds_is_inclusive_on_both_sides(value: float, direction: str, threshold: float, expected: bool) -> None:
    """The limit itself holds, the next float beyond it does not."""
    assert expected is holds(value, direction, threshold)


@pytest.mark.parametrize("direction", ["at_most", "at_least"])
@pytest.mark.parametrize("value", [None, math.nan])
@given(threshold=st.floats(allow_nan=False))
def test_nothing_and_nan_never_hold(value: float | None, direction: str, threshold: float) -> None:
    """A value that could not be measured fails in both directions, whatever the limit."""
    assert holds(value, direction, threshold) is False


@given(value=st.floats(allow_nan=False))
def test_a_nan_threshold_lets_nothing_pass(value: float) -> None:
    """A limit that is not a number admits no value."""
    assert not holds(value, "at_most", math.nan)
    assert not holds(value, "at_least", math.nan)


def test_every_need_has_a_reason_and_no_reason_begins_another() -> None:
    """`conclude` finds the reason by its beginning: two that share one would be mistaken for each other."""
    assert set(NEEDS.values()) <= set(NotRun)
    for one in NotRun:
        assert [one] == [other for other in NotRun if one.startswith(other)]

"""Findings are judged in one place, and an act runs only where it can."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apr_core.falsify import finding as module
from apr_core.falsify.finding import Finding, act
from apr_core.falsify.verdict import NEEDS, NotRun, Verdict

HEALTHY = Finding(0.0, 10, 10, claim="F-GT-001")


def test_a_healthy_finding_is_corroborated_without_reason() -> None:
    """The plain case; without it every other test here could pass on a judge that never corroborates."""
    assert HEALTHY.judge() == (Verdict.CORROBORATED, "")


@pytest.mark.parametrize(
    ("change", "verdict", "reason"),
    [
        ({"value": math.nan}, Verdict.FALSIFIED, "1 of 10 values are not finite"),
        ({"value": math.inf}, Verdict.FALSIFIED, "1 of 10 values are not finite"),
        ({"value": -math.inf}, Verdict.FALSIFIED, "1 of 10 values are not finite"),
        ({"value": None}, Verdict.FALSIFIED, "1 of 10 values are not finite"),
        ({"nonfinite": 3}, Verdict.FALSIFIED, "3 of 10 values are not finite"),
        ({"value": 2.0}, Verdict.FALSIFIED, "mismatched_values is 2, the limit is <= 0"),
        ({"value": 2.0, "compared": 3}, Verdict.FALSIFIED, "mismatched_values is 2, the limit is <= 0"),
        ({"compared": 0}, Verdict.INCONCLUSIVE, "nothing was compared"),
        ({"compared": 0, "expected": 0}, Verdict.INCONCLUSIVE, "nothing was compared"),
        ({"compared": -1}, Verdict.INCONCLUSIVE, "nothing was compared"),
        ({"compared": 0, "value": math.nan}, Verdict.INCONCLUSIVE, "nothing was compared"),
        ({"compared": 9}, Verdict.INCONCLUSIVE, "compared 9 of 10; missing: unnamed"),
        ({"missing": ["a", "b", "c", "d"]}, Verdict.INCONCLUSIVE, "compared 10 of 10; missing: a, b, c"),
        ({"inconclusive": "same file"}, Verdict.INCONCLUSIVE, "same file"),
        ({"inconclusive": "same file", "value": 5.0}, Verdict.INCONCLUSIVE, "same file"),
        ({"not_run": NotRun.NO_CUDA}, Verdict.NOT_RUN, "no CUDA device"),
        ({"not_run": NotRun.REFUSED, "blame": "F-X t"}, Verdict.NOT_RUN, "refused by the contract: F-X t"),
    ],
)
def test_judgement(change: dict[str, Any], verdict: Verdict, reason: str) -> None:
    """What is not finite, over the limit, partial or empty never passes, and each says why."""
    assert replace(HEALTHY, **change).judge() == (verdict, reason)


def test_at_least_refutes_infinity_too() -> None:
    """An infinite share of agreement is a division by zero, not a very good one."""
    assert Finding(math.inf, 1, 1, claim="F-PAR-005").judge()[0] is Verdict.FALSIFIED
    assert Finding(0.5, 1, 1, claim="F-PAR-005").judge()[0] is Verdict.FALSIFIED
    assert Finding(1.0, 1, 1, claim="F-PAR-005").judge()[0] is Verdict.CORROBORATED


@given(
    value=st.none() | st.floats(),
    compared=st.integers(-2, 5),
    expected=st.integers(0, 5),
    nonfinite=st.integers(0, 2),
    missing=st.lists(st.text(min_size=1), max_size=2),
    bypassed=st.booleans(),
)
def test_corroborated_only_when_everything_was_compared_finite_and_unbypassed(
    value: float | None, compared: int, expected: int, nonfinite: int, missing: list[str], bypassed: bool
) -> None:
    """No combination of gaps adds up to a pass."""
    found = Finding(value, compared, expected, nonfinite=nonfinite, missing=missing, claim="F-GT-001")
    verdict, reason = found.judge(bypassed=bypassed)
    passes = value is not None and value <= 0 and math.isfinite(value) and compared >= max(1, expected)
    passes = passes and not nonfinite and not missing and not bypassed
    assert (verdict is Verdict.CORROBORATED) == passes
    assert (reason == "") == passes


def test_bypass_never_corroborates_but_still_refutes() -> None:
    """`--skip-contract` marks what would have held; what is refuted stays refuted."""
    verdict, reason = HEALTHY.judge(bypassed=True)
    assert verdict is Verdict.INCONCLUSIVE
    assert "--skip-contract" in reason
    assert replace(HEALTHY, value=1.0).judge(bypassed=True)[0] is Verdict.FALSIFIED


def test_a_finding_of_no_claim_cannot_be_judged() -> None:
    """Without a claim there is no threshold, hence no verdict."""
    with pytest.raises(KeyError):
        Finding(0.0, 1, 1).judge()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[Any], Finding]]:
    """An empty registry of acts."""
    acts: dict[str, Callable[[Any], Finding]] = {}
    monkeypatch.setattr(module, "ACTS", acts)
    return acts


def never(_: object) -> Finding:
    """Stand for a measurement that must not be taken."""
    raise AssertionError("measured a subject that it must not touch")


def test_act_measures_and_stamps_the_claim(registry: dict[str, Any], fake_subject: type) -> None:
    """The finding carries the claim that registered it, so it cannot be recorded under another."""
    measure = act("F-GT-001")(lambda _: Finding(0.0, 1, 1))
    assert measure(fake_subject()).claim == "F-GT-001"
    assert registry == {"F-GT-001": measure}


def test_act_does_not_measure_a_refused_subject(registry: dict[str, Any], fake_subject: type) -> None:
    """A refused subject gives NOT_RUN with gate and tensor, and the function is not called."""
    found = act("F-GT-001")(never)(fake_subject(refusal="F-DATA-QUALITY-002 in w"))
    assert found.judge() == (Verdict.NOT_RUN, "refused by the contract: F-DATA-QUALITY-002 in w")


def test_a_gate_speaks_about_a_refused_subject(registry: dict[str, Any], fake_subject: type) -> None:
    """Gates are what refuses: for them a refused subject is the finding."""
    found = act("F-DATA-QUALITY-002")(lambda _: Finding(1.0, 1, 1))(fake_subject(refusal="x"))
    assert found.judge()[0] is Verdict.FALSIFIED


@pytest.mark.parametrize("need", ["trained", "tokenizer", "template", "golden"])
def test_act_names_what_the_subject_lacks(need: str, registry: dict[str, Any], fake_subject: type) -> None:
    """Each missing need gives its own reason from the closed list."""
    found = act("F-GT-006")(never)(fake_subject(lacks={need: str(NEEDS[need])}))
    assert found.judge() == (Verdict.NOT_RUN, str(NEEDS[need]))


def test_act_ignores_what_the_claim_does_not_need(registry: dict[str, Any], fake_subject: type) -> None:
    """Lacking CUDA does not excuse a claim about files."""
    found = act("F-GT-001")(lambda _: Finding(0.0, 1, 1))(fake_subject(lacks={"cuda": str(NotRun.NO_CUDA)}))
    assert found.judge()[0] is Verdict.CORROBORATED


def test_refusal_is_named_before_what_is_lacking(registry: dict[str, Any], fake_subject: type) -> None:
    """The refusal is the news; a missing tokenizer would hide it."""
    found = act("F-GT-006")(never)(fake_subject(refusal="gate", lacks={"golden": str(NotRun.NO_GOLDEN)}))
    assert found.not_run is NotRun.REFUSED


def test_a_reason_outside_the_closed_list_is_an_error(registry: dict[str, Any], fake_subject: type) -> None:
    """Nobody invents a new way not to run."""
    with pytest.raises(ValueError, match="did not feel like it"):
        act("F-GT-006")(never)(fake_subject(lacks={"golden": "did not feel like it"}))


def test_one_act_per_claim(registry: dict[str, Any]) -> None:
    """A second measurement of one claim would never be judged."""
    act("F-GT-001")(never)
    with pytest.raises(ValueError, match="F-GT-001 is measured by never already"):
        act("F-GT-001")(never)


def test_unknown_claim_is_refused(registry: dict[str, Any]) -> None:
    """An act of a claim that is not in the table has nothing to refute."""
    with pytest.raises(KeyError):
        act("F-GT-999")

"""A missed number: bandwidth first, then where the time is; contradictions of a meter are the meter's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest

from apr_core.bench import acts
from apr_core.diagnose.rates import explain_rate, explain_rates
from apr_core.engines.subject import Subject, obtain


@pytest.fixture(scope="module")
def timed(pygmy: Path) -> Iterator[Subject]:
    """The bundled model, timed once."""
    with closing(obtain(str(pygmy), device="cpu")) as subject:
        acts.timed_run(subject)
        yield subject


@pytest.mark.parametrize(("share", "cause"), [(2.0, "meter"), (0.97, "backend-kernel"), (1e-6, None)])
def test_the_ceiling_tells_a_meter_from_an_engine(share: float, cause: str | None, timed: Subject) -> None:
    """Beyond the ceiling nobody measured it; within it the engine is slower; far below there is nothing to explain."""
    made = acts.timed_run(timed)
    number = ("decode_tok_s", share * made.run.ceiling_tok_s)
    rows = [acts.judged_claim(made.run, *number, right=True).row]
    if cause is None:
        acts.ask(timed, claims=f"decode_tok_s={number[1]}")
        found = explain_rates(timed)
        acts.ask(timed)
        assert (found.outcome, found.causes) == ("nothing to explain", ())
        return
    assert [c.klass for c in explain_rate("F-THR-012", rows, "so")] == [cause]


def test_the_control_is_explained_where_nothing_was_claimed(timed: Subject) -> None:
    """It says that nobody claimed it, and asks bandwidth, operations, threads, dispatch and types in this order."""
    found = explain_rates(timed)
    questions = [question for question, _ in found.causes[0].whys]
    assert found.steps[0][1].startswith("no number was claimed")
    assert "needs" in found.steps[1][1]
    assert questions[2].startswith("How much of a token is reading")
    assert questions[-2:] == ["Can any engine reach it here?", "What restores agreement?"]
    assert found.causes[0].klass == "meter"


def test_a_claim_that_falls_by_its_samples_has_the_rows_of_its_record(timed: Subject) -> None:
    """What evidence keeps is what the explanation reads: verdict, need and bandwidth."""
    made = acts.timed_run(timed)
    item = acts.judged_claim(made.run, "ttft_s", 1e-9, right=True)
    assert item.row == {**asdict(item), "verdict": "FALSIFIED"}
    assert explain_rate("F-THR-012", [item.row], "so")[0].klass == "backend-kernel"


@pytest.mark.parametrize(
    ("claim", "causes"),
    [("F-THR-007", ["meter"]), ("F-THR-012", ["meter"]), ("F-THR-011", ["backend-kernel"]), ("F-THR-003", [])],
)
def test_what_a_run_contradicts_is_its_meter(claim: str, causes: list[str]) -> None:
    """A misjudged control too; a slower engine is the engine's, and other tokens are shown by parity alone."""
    assert [c.klass for c in explain_rate(claim, [], "3 s too much")] == causes

"""qa --claims: claims without notebooks; the exit code follows from the verdicts, and nothing run is not a pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apr_core.cli import claims as qa
from apr_core.cli.app import main
from apr_core.errors import InferenceError
from apr_core.falsify.claims import claims_of
from apr_core.falsify.finding import Finding
from apr_core.falsify.verdict import NotRun

PARITY = [claim.id for claim in claims_of("20_parity")]
GOOD = Finding(value=0.0, compared=4, expected=4)
HIGH = Finding(value=1e9, compared=4, expected=4)


def _act(finding: Finding | Exception, claim: str) -> Callable[[Any], Finding]:
    def measure(_: Any) -> Finding:
        if isinstance(finding, Exception):
            raise finding
        return replace(finding, claim=claim)

    return measure


def _good(claim: str) -> Finding:
    """A finding that its claim's threshold accepts."""
    from apr_core.falsify.claims import load_claims

    limit = load_claims()[claim]
    return replace(GOOD, value=limit.threshold)


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, Finding | Exception]], None]:
    """Replace the measurements of one notebook; every claim that is not named holds."""

    def use(given: Mapping[str, Finding | Exception]) -> None:
        acts = {claim: _act(given.get(claim, _good(claim)), claim) for claim in PARITY}
        monkeypatch.setattr(qa, "NOTEBOOKS", ("20_parity",))
        monkeypatch.setattr(qa, "load_acts", lambda _: None)
        monkeypatch.setattr(qa, "ACTS", acts)

    return use


@pytest.mark.parametrize(
    ("given", "verdict", "code"),
    [
        ({}, "CORROBORATED", 0),
        ({PARITY[0]: Finding.nothing(NotRun.NO_CUDA)}, "CORROBORATED", 0),
        ({PARITY[0]: Finding(value=0.0, compared=0, expected=4)}, "INCONCLUSIVE", 11),
        ({PARITY[0]: Finding(value=0.0, compared=3, expected=4)}, "INCONCLUSIVE", 11),
        ({PARITY[0]: InferenceError("it broke")}, "INCONCLUSIVE", 11),
        ({PARITY[0]: HIGH}, "FALSIFIED", 5),
        ({PARITY[0]: HIGH, PARITY[1]: InferenceError("it broke")}, "FALSIFIED", 5),
        ({PARITY[0]: Finding(value=float("nan"), compared=4, expected=4)}, "FALSIFIED", 5),
        ({claim: Finding.nothing(NotRun.REFUSED) for claim in PARITY}, "INCONCLUSIVE", 11),
    ],
    ids=[
        "all hold",
        "one excused",
        "nothing compared",
        "part compared",
        "raised",
        "refuted",
        "both",
        "nan",
        "none run",
    ],
)
def test_the_exit_code_follows_from_the_verdicts(
    given: Mapping[str, Finding | Exception],
    verdict: str,
    code: int,
    rooms: Callable[[Mapping[str, Finding | Exception]], None],
    healthy: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One refuted claim is 5, one undecided 11; skipping everything is not passing."""
    rooms(given)
    assert main(["qa", str(healthy), "--claims", "--json"]) == code
    body = json.loads(capsys.readouterr().out)
    assert (body["verdict"], len(body["gates"])) == (verdict, len(PARITY))
    idle = sum(gate["verdict"] == "NOT_RUN" for gate in body["gates"])
    assert (body["gates_executed"], body["gates_not_run"]) == (len(PARITY) - idle, idle)
    for gate in body["gates"]:
        assert bool(gate["reason"]) == (gate["verdict"] != "CORROBORATED")


@pytest.mark.parametrize(("device", "code"), [("auto", 0), ("cpu", 0), ("cuda", 11)])
def test_what_was_asked_for_must_run(
    device: str, code: int, rooms: Callable[[Mapping[str, Finding | Exception]], None], healthy: Path
) -> None:
    """CUDA claims without CUDA are excused, unless the person asked for CUDA."""
    cuda = next(claim.id for claim in claims_of("20_parity") if "cuda" in claim.needs)
    rooms({cuda: Finding.nothing(NotRun.NO_CUDA)})
    assert main(["qa", str(healthy), "--claims", "--device", device]) == code


def test_the_table_names_every_claim_and_reason(
    rooms: Callable[[Mapping[str, Finding | Exception]], None], healthy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each claim has its row; a failed measurement says what it failed with; the counts close the page."""
    rooms({PARITY[2]: InferenceError("it broke", advice="mend it"), PARITY[3]: Finding.nothing(NotRun.NO_CUDA)})
    assert main(["qa", str(healthy), "--claims"]) == 11
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("F-")}
    assert list(rows) == PARITY
    assert "not measured: it broke; mend it" in rows[PARITY[2]]
    assert "no CUDA device" in rows[PARITY[3]]
    count = len(PARITY)
    assert f"{healthy}: INCONCLUSIVE; {count - 1} executed, 1 not run" in out
    assert err.count("F-PAR-") == count


def test_a_bypass_corroborates_nothing(
    rooms: Callable[[Mapping[str, Finding | Exception]], None], refused: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under --skip-contract every claim that holds is inconclusive, and the page says why."""
    rooms({})
    assert main(["qa", str(refused), "--claims", "--skip-contract"]) == 11
    out = capsys.readouterr().out
    assert "CORROBORATED" not in out.replace("0 CORROBORATED", "")
    assert "contract bypassed" in out


def test_a_refused_model_is_5(
    refused: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the real measurements the gate is falsified, and claims about the model's answers are not run."""
    chosen = ("F-DATA-QUALITY-002", PARITY[0])
    monkeypatch.setattr(qa, "NOTEBOOKS", ("10_contract_gates", "20_parity"))
    monkeypatch.setattr(qa, "claims_of", lambda notebook: [c for c in claims_of(notebook) if c.id in chosen])
    assert main(["qa", str(refused), "--claims", "--json"]) == 5
    body = json.loads(capsys.readouterr().out)
    verdicts = {gate["id"]: gate["verdict"] for gate in body["gates"]}
    assert verdicts == {"F-DATA-QUALITY-002": "FALSIFIED", PARITY[0]: "NOT_RUN"}
    assert "F-DATA-QUALITY-002" in body["refusal"]


def test_every_room_of_qa_measures_its_claims() -> None:
    """The rooms that qa imports register a measurement for each claim of their notebook."""
    for notebook in qa.NOTEBOOKS:
        qa.load_acts(notebook)
        missing = [claim.id for claim in claims_of(notebook) if claim.id not in qa.ACTS]
        assert missing == [], notebook

"""summary.json: strict, complete, in step with the conclusion."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from apr_core.errors import ReadWriteError
from apr_core.falsify.claims import load_claims
from apr_core.falsify.finding import Finding
from apr_core.report.summary import evidence_file, write_summary, write_whole


def refuse(name: str) -> None:
    """NaN and Infinity are not JSON."""
    raise ValueError(name)


def test_everything_declared(make_run: Callable[..., Any]) -> None:
    """Verdict, code, score, counts; per claim what was measured against what; per notebook its end."""
    run = make_run(changes={"F-GT-001": Finding(float("nan"), 3, 3)}, broken={"20_parity": "died"})
    body = json.loads(write_summary(run.folder, run.conclusion, run.notebooks).read_text(), parse_constant=refuse)
    assert (body["verdict"], body["exit_code"]) == ("FALSIFIED", 1)
    assert body["counts"] == dict(run.conclusion.counts)
    assert body["score"] == run.conclusion.score
    assert list(body["claims"]) == list(load_claims())
    assert body["notebooks"]["20_parity"] == {"seconds": 4.25, "complete": False, "reason": "died"}
    one = body["claims"]["F-PAR-003"]
    evidence = run.conclusion.by_claim["F-PAR-003"][2]
    assert one["measured"] == evidence.measured["value"]
    assert one["limit"] == {"direction": "at_most", "threshold": 1e-5, "text": "≤ 1e-05"}
    assert one["coverage"] == {"compared": 63, "expected": 63}
    assert (run.folder / one["evidence"]).is_file()
    assert one["evidence"] == evidence_file(evidence)
    assert body["claims"]["F-GT-001"]["measured"] is None


def test_hostile_strings(hostile: Any) -> None:
    """They come back as they were, in ASCII."""
    data = write_summary(hostile.folder, hostile.conclusion, hostile.notebooks).read_bytes()
    assert data.isascii()
    assert json.loads(data)["subject"]["name"] == "<script>window.PWN=1</script>"


def test_no_evidence_no_file(make_run: Callable[..., Any]) -> None:
    """A subject that was not opened has claims without evidence, and says why."""
    run = make_run(diagnosis={"error": "E", "message": "m", "exit_code": 4})
    body = json.loads(write_summary(run.folder, run.conclusion, {}).read_text())
    assert {c["evidence"] for c in body["claims"].values()} == {None}
    assert body["claims"]["F-GT-001"]["reason"] == "subject could not be opened: m"
    assert body["diagnosis"]["message"] == "m"


def test_a_write_that_fails_is_typed(make_run: Callable[..., Any]) -> None:
    """A vanished folder is an I/O error with advice."""
    with pytest.raises(ReadWriteError, match="choose another --out"):
        write_whole(make_run().folder / "no" / "x.json", "{}")

"""What an earlier run decided is taken over when everything is the same, and measured again when anything is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from apr_core.falsify.evidence import SubjectRecord, read_evidence
from apr_core.falsify.finding import ACTS, Finding
from apr_core.falsify.reuse import decided
from apr_core.falsify.rounds import Round
from apr_core.falsify.verdict import NotRun
from apr_core.rosetta import acts

CLAIM, AGAINST = "F-GT-001", "F-GT-010"
PROVENANCE = {
    "platform": "Linux",
    "cpu": "a",
    "cores": 2,
    "python": "3.11",
    "packages": {"numpy": "2"},
    "code": "c0de",
    "time": "1",
}
PARAMETERS = {"model": "/a/m", "reference": "", "seed": 0, "max_new_tokens": 64}
WHO = SubjectRecord("m", "/a/m", "gguf", "ab" * 32, device="cpu", template_sha256="t", companions="cd" * 32)
SOURCE = SubjectRecord("s", "/s", "safetensors", "ef" * 32, companions="01" * 32)


def open_round(folder: Path, **changes: Any) -> Round:
    """A round of the first notebook on the usual file, machine and parameters, but for ``changes``."""
    given: dict[str, Any] = {"parameters": PARAMETERS, "provenance": PROVENANCE, "reference": SOURCE, **changes}
    return Round("00_ground_truth", given.pop("subject", WHO), folder, **given)


@pytest.fixture
def runs(tmp_path: Path, attempt: Callable[..., Finding]) -> Path:
    """A folder with one earlier run: one claim of the file alone, one against its source, one left alone."""
    earlier = open_round(tmp_path / "one")
    rows = [{"n": i} for i in range(200)]
    earlier.record(CLAIM, attempt(CLAIM, rows=rows, arrays={"curve": np.arange(3.0)}, detail="3 formats"))
    earlier.record(AGAINST, attempt(AGAINST, value=3.0, whys=[("Why?", "row 7")]))
    earlier.record("F-GT-007", attempt("F-GT-007", value=None, compared=0, expected=0, not_run=NotRun.NO_GOLDEN))
    return tmp_path


def test_the_same_is_taken_over_whole(runs: Path, tmp_path: Path) -> None:
    """Value, coverage, rows, arrays, whys and verdict; marked with the attempt in the record and its line."""
    today = open_round(
        tmp_path / "two", provenance={**PROVENANCE, "time": "2"}, parameters={**PARAMETERS, "model": "/b"}
    )
    found = decided(runs, today)
    assert set(found) == {CLAIM, AGAINST}
    old = read_evidence(next((runs / "one" / "evidence").glob(f"{CLAIM}-*.json")))
    new = today.record(CLAIM, found[CLAIM])
    for key in ("measured", "coverage", "rows", "rows_omitted", "whys", "verdict", "reason"):
        assert getattr(new, key) == getattr(old, key)
    assert new.rows_omitted == 80
    assert new.arrays()["curve"].tolist() == [0, 1, 2]
    assert (new.provenance["reused"], new.provenance["time"]) == (old.attempt, "2")
    assert str(new) == f"{old} (reused from {old.attempt})"
    refuted = today.record(AGAINST, found[AGAINST])
    assert refuted.verdict == "FALSIFIED"
    assert refuted.whys == (("Why?", "row 7"),)
    assert str(refuted).endswith(f"(reused from {found[AGAINST].reused})")


@pytest.mark.parametrize(
    "changes",
    [
        *({"subject": replace(WHO, **{k: "x"})} for k in ("sha256", "companions", "device", "template_sha256")),
        {"subject": replace(WHO, bypassed=True)},
        {"subject": replace(WHO, sha256="")},
        *({"provenance": {**PROVENANCE, k: "x"}} for k in ("platform", "cpu", "cores", "python", "packages", "code")),
        {"provenance": {k: v for k, v in PROVENANCE.items() if k != "code"}},
        {"parameters": {**PARAMETERS, "seed": 1}},
        {"parameters": {**PARAMETERS, "other": 1}},
    ],
)
def test_anything_else_is_measured_again(changes: dict[str, Any], runs: Path, tmp_path: Path) -> None:
    """Other bytes, other companions, another machine, other code, another parameter: nothing is taken over."""
    assert decided(runs, open_round(tmp_path / "two", **changes)) == {}


@pytest.mark.parametrize("reference", [None, replace(SOURCE, sha256="x"), replace(SOURCE, companions="x")])
def test_another_source_spares_what_does_not_need_it(reference: Any, runs: Path, tmp_path: Path) -> None:
    """Only the claim that was held against it is measured again."""
    assert set(decided(runs, open_round(tmp_path / "two", reference=reference))) == {CLAIM}


def edit(path: Path, **changes: Any) -> None:
    """Change a record by hand."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_record_that_cannot_be_believed_is_no_source(runs: Path, tmp_path: Path) -> None:
    """Damaged, edited, of another version, or itself taken over: the claim is measured again."""
    (path,) = (runs / "one" / "evidence").glob(f"{CLAIM}-*.json")
    whole, today = path.read_text(), open_round(tmp_path / "two")
    body = json.loads(whole)
    for changes in (
        {"verdict": "FALSIFIED"},
        {"claim": {**body["claim"], "version": 99}},
        {"provenance": {**body["provenance"], "reused": "x"}},
        {"schema": 99},
    ):
        edit(path, **changes)
        assert CLAIM not in decided(runs, today)
        path.write_text(whole)
    next((runs / "one" / "evidence").glob(f"{CLAIM}-*.npz")).unlink()
    assert CLAIM not in decided(runs, today)


def test_an_act_does_not_measure_what_is_decided() -> None:
    """A refusal or a missing need still comes first."""
    known = Finding(0.0, 3, 3, claim=CLAIM, reused="a")

    held = SimpleNamespace(refusal=None, lacks={}, decided={CLAIM: known})
    assert acts.same_tensors is ACTS[CLAIM]
    assert ACTS[CLAIM](held) is known
    held.refusal = "F-X on t"
    assert ACTS[CLAIM](held).not_run is NotRun.REFUSED

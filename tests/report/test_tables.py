"""Frames of evidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from apr_core.falsify.evidence import SubjectRecord
from apr_core.falsify.finding import Finding
from apr_core.falsify.rounds import Round
from apr_core.report.tables import claims_frame, frame


def test_rows_of_one(finding: Callable[[str], Finding]) -> None:
    """A frame has the rows as they are."""
    made = frame(finding("F-PAR-002"))
    assert list(made.columns) == ["name", "rel_l2", "limit", "position"]
    assert len(made) == 38


def test_rows_of_several(finding: Callable[[str], Finding], make_run: Callable[..., Any]) -> None:
    """Findings and records mix; each row says whose it is."""
    record = make_run(notebooks=("20_parity",)).conclusion.by_claim["F-PAR-002"][2]
    made = frame([finding("F-DATA-QUALITY-001"), record])
    assert made["claim"].value_counts().to_dict() == {"F-DATA-QUALITY-001": 2, "F-PAR-002": 38}
    assert len(frame(record)) == 38
    assert len(frame(Finding(0.0, 1, 1))) == 0


def test_claims_of_a_round(finding: Callable[[str], Finding], tmp_path: Path) -> None:
    """All claims in their order, also those that are not recorded yet."""
    round_ = Round("20_parity", SubjectRecord("m", "/m"), tmp_path, parameters={}, provenance={})
    round_.record("F-PAR-002", replace(finding("F-PAR-002"), value=2.0))
    made = claims_frame(round_).set_index("id")
    assert list(made.index) == [c.id for c in round_.claims]
    assert made.loc["F-PAR-002"].to_dict() == {
        "title": "two independent forwards: every layer",
        "verdict": "FALSIFIED",
        "measured": 2.0,
        "limit": "≤ 1",
        "compared": 38,
    }
    assert made.loc["F-PAR-001", "verdict"] == "not recorded yet"

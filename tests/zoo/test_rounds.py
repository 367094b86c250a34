"""The page of rounds: current, complete, and still what a diagnosis says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apr_core.falsify.claims import load_claims
from apr_core.report.whys import whys_markdown
from apr_core.zoo.rounds import ROOT_CAUSES, diagnose_rounds, rounds_markdown

NAMED = ("PMAT-237", "PMAT-236", "PMAT-235", "P0-QA-001", "GH-205", "GH-208", "PMAT-216", "GH-5", "GH-201", "Ollama")


def test_the_page_is_made_from_its_records(root: Path) -> None:
    """Neither was edited by hand, and each root cause of the table has its record."""
    records = json.loads((root / "docs" / "rounds.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "rounds.md").read_text(encoding="utf-8")
    assert page == rounds_markdown(records, [whys_markdown(record["whys"]) for record in records])
    assert [r["id"] for r in records] == [r.id for r in ROOT_CAUSES]
    assert all(any(name in r["id"] for r in records) for name in NAMED)
    assert all(len(r["whys"]) >= 3 for r in records)


@pytest.mark.slow
def test_every_twin_is_still_diagnosed_so(root: Path) -> None:
    """Planted again, each twin has the cause and the place that the records say."""
    records = json.loads((root / "docs" / "rounds.json").read_text(encoding="utf-8"))
    kept = [(r["id"], r["cause"], r["place"], r["proved"]) for r in records]
    assert [(r["id"], r["cause"], r["place"], r["proved"]) for r in diagnose_rounds()] == kept


def test_guards_are_claims() -> None:
    """A claim that does not exist guards against nothing."""
    assert {guard for r in ROOT_CAUSES for guard in r.guards} <= set(load_claims())

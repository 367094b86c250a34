"""explain: every code that this package can print has an entry."""

from __future__ import annotations

import json

import pytest

from apr_core import errors
from apr_core.cli.app import main
from apr_core.cli.explain import catalogue
from apr_core.cli.lint import RULES
from apr_core.contract.gates import load_gates
from apr_core.diagnose.cause import CAUSES
from apr_core.falsify.claims import load_claims
from apr_core.zoo.registry import load_zoo

CODES = {
    "gate": {gate.id for gate in load_gates().gates},
    "claim": set(load_claims()),
    "lint rule": set(RULES),
    "exit code": {str(int(code)) for code in errors.Exit},
    "error": {"AprError", *(error.__name__ for error in errors.AprError.__subclasses__())},
    "cause": set(CAUSES),
    "defect": set(load_zoo().defects),
}


@pytest.mark.parametrize("kind", CODES)
def test_every_code_is_explained(kind: str) -> None:
    """A new gate, claim, error, exit code, cause or defect has its entry, of its own kind, in words."""
    table = catalogue()
    found = {code for code, entries in table.items() if any(e["kind"] == kind and e["says"] for e in entries)}
    assert found == CODES[kind]


def test_a_gate_has_all_its_rows_and_its_claim(capsys: pytest.CaptureFixture[str]) -> None:
    """One id may have several limits; each is shown, with what it is asked of, and the claim of the same id."""
    assert main(["explain", "f-data-quality-001", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)["entries"]
    rows = [gate for gate in load_gates().gates if gate.id == "F-DATA-QUALITY-001"]
    assert [entry["kind"] for entry in entries] == ["gate"] * len(rows) + ["claim"]
    assert [entry["limit"] for entry in entries[:2]] == ["at most 50 %", "at most 80 %"]


def test_an_error_tells_its_exit_code_and_the_next_step(capsys: pytest.CaptureFixture[str]) -> None:
    """A person who read the name of an error finds what to do."""
    assert main(["explain", "LoadError"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("LoadError: The weights are there, but something that a model needs is not")
    assert "exit code    6" in out
    assert "next         copy what the message names" in out


def test_without_a_code_everything_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each code."""
    assert main(["explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(catalogue())
    assert main(["explain", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["codes"]) == len(catalogue())


@pytest.mark.parametrize(
    ("code", "near"), [("F-DATA", "F-DATA-QUALITY-001"), ("LoadEror", "LoadError"), ("qqqq", "lists every code")]
)
def test_an_unknown_code_is_2_and_names_near_ones(code: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A typing error costs one look."""
    assert main(["explain", code]) == 2
    assert near in capsys.readouterr().err

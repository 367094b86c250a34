"""junit.xml and summary.json: the same verdicts for machines."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest

from apr_core.falsify.claims import load_claims
from apr_core.falsify.finding import Finding
from apr_core.report.junit import write_junit

TAGS = {"FALSIFIED": "failure", "INCONCLUSIVE": "error", "NOT_RUN": "skipped"}


def read(run: Any, **given: Any) -> tuple[ElementTree.Element, dict[str, ElementTree.Element]]:
    """Write and parse; cases by the first word of their name."""
    root = ElementTree.fromstring(write_junit(run.folder, run.conclusion, **given).read_bytes())
    return root, {case.get("name", "").split()[0]: case for case in root.iter("testcase")}


def outcome(case: ElementTree.Element) -> str | None:
    """Tag of the outcome, None for a pass."""
    return next((child.tag for child in case), None)


def test_one_case_per_claim(make_run: Callable[..., Any]) -> None:
    """Outcome by verdict, reason as message, in the order of the claims table."""
    changes = {"F-GT-001": Finding(2.0, 3, 3, whys=[("Why?", "so")]), "F-GT-003": Finding(0.0, 2, 3)}
    run = make_run(changes=changes)
    root, cases = read(run)
    assert [c.get("name", "").split()[0] for c in root.iter("testcase")] == [*load_claims(), "verdict"]
    for claim in load_claims().values():
        verdict, reason, _ = run.conclusion.by_claim[claim.id]
        assert outcome(cases[claim.id]) == TAGS.get(str(verdict))
        assert cases[claim.id].get("classname") == claim.notebook
        assert all(child.get("message") == reason for child in cases[claim.id])
    assert "why: Why? so" in (cases["F-GT-001"][0].text or "")
    assert (root.get("failures"), root.get("tests")) == ("2", str(len(load_claims()) + 1))
    assert int(root.get("skipped", 0)) == run.conclusion.counts["NOT_RUN"]


@pytest.mark.parametrize(
    ("given", "tag"),
    [
        ({}, None),
        ({"changes": {"F-GT-001": Finding(2.0, 3, 3)}}, "failure"),
        ({"changes": {"F-GT-001": None}}, "error"),
        ({"asked": frozenset({"cuda"})}, "error"),
        ({"diagnosis": {"error": "E", "message": "m", "exit_code": 4}}, "error"),
        ({"broken": {"20_parity": "died"}}, "error"),
    ],
)
def test_never_greener_than_the_exit_code(make_run: Callable[..., Any], given: dict[str, Any], tag: str | None) -> None:
    """Claims that were skipped make no failure; the case of the whole run does."""
    run = make_run(**given)
    root, cases = read(run)
    assert outcome(cases["verdict"]) == tag
    assert (root.get("failures"), root.get("errors")) == ("0", "0") or run.conclusion.exit_code != 0


def test_broken_notebooks_are_cases(make_run: Callable[..., Any]) -> None:
    """A notebook that did not complete is an error of its own, although all its claims have evidence."""
    run = make_run(broken={"20_parity": "died in cell 4"})
    root, cases = read(run, notebooks=run.notebooks)
    assert cases["notebook"][0].get("message") == "died in cell 4"
    assert cases["notebook"].get("classname") == "20_parity"
    assert next(s for s in root if s.get("name") == "20_parity").get("time") == "4.250"


def test_hostile_strings(hostile: Any) -> None:
    """XML stays well-formed; markup and controls arrive as text."""
    root, cases = read(hostile, notebooks=hostile.notebooks)
    message = cases["F-GT-001"][0].get("message", "")
    for said in ("<script>window.PWN=1</script>", "]]><!-- ]]&gt; --><![CDATA[", "a\\x00b\\x1b[31mred\\x07\\u202egnp"):
        assert said in message
    assert len(list(root.iter("testcase"))) == len(load_claims()) + 2
    assert json.dumps(message)


def test_names_are_cleaned_too(make_run: Callable[..., Any]) -> None:
    """A declaration that somebody edited cannot break the file either."""
    run = make_run(diagnosis={"error": "E", "message": "m", "exit_code": 4})
    path = run.folder / "declared.json"
    body = json.loads(path.read_text())
    body["claims"][0]["title"] = "bell \x07 \ufffe"
    path.write_text(json.dumps(body))
    root, _ = read(run)
    assert next(root.iter("testcase")).get("name") == "F-GT-001 bell \\x07 \\ufffe"

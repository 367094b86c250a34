"""junit.xml: one test case per claim, for continuous integration; never greener than the exit code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

from apr_core.errors import Exit
from apr_core.falsify.rounds import Conclusion, read_declared
from apr_core.falsify.verdict import Verdict
from apr_core.report.summary import NotebookStatus, evidence_file, examined, write_whole
from apr_core.report.text import clean, limit_of, quantity

_TAG = {Verdict.FALSIFIED: "failure", Verdict.INCONCLUSIVE: "error", Verdict.NOT_RUN: "skipped"}


def write_junit(folder: Path, conclusion: Conclusion, notebooks: Mapping[str, NotebookStatus] | None = None) -> Path:
    """
    Write ``junit.xml``.

    FALSIFIED is a failure, INCONCLUSIVE an error, NOT_RUN skipped with its reason; a notebook that did not complete is
    an error of its own. The last case, ``run.verdict``, repeats the verdict of the whole: without it a subject that
    could not be opened would be forty skipped tests and a green mark.

    Args:
        folder: The run folder.
        conclusion: Of the same folder.
        notebooks: Their ends, when known.

    Raises:
        FormatError: ``declared.json`` cannot be read.
        ReadWriteError: The folder cannot be written.
    """
    declared = examined(read_declared(folder), conclusion)
    statuses = notebooks or {}
    root = Xml.Element("testsuites", name="apr_core")
    for name in declared["notebooks"]:
        rows = [row for row in declared["claims"] if row["notebook"] == name]
        suite = _suite(root, name, statuses[name].seconds if name in statuses else None)
        for row in rows:
            _claim(suite, row, conclusion)
        if name in statuses and not statuses[name].complete:
            _case(suite, name, "notebook completes", "error", statuses[name].reason, "")
    _run(_suite(root, "run", None), conclusion)
    for suite in root:
        _count(suite)
    _count(root)
    Xml.indent(root)
    return write_whole(
        folder / "junit.xml", '<?xml version="1.0" encoding="utf-8"?>\n' + Xml.tostring(root, "unicode") + "\n"
    )


def _suite(root: Xml.Element, name: str, seconds: float | None) -> Xml.Element:
    suite = Xml.SubElement(root, "testsuite", name=clean(name))
    if seconds is not None:
        suite.set("time", f"{seconds:.3f}")
    return suite


def _claim(suite: Xml.Element, row: Mapping[str, Any], conclusion: Conclusion) -> None:
    verdict, reason, evidence = conclusion.by_claim[row["id"]]
    body = [f"statement: {row['statement']}", f"limit: {row['metric']} {limit_of(row)} ({row['source']})"]
    if evidence is not None:
        body.append(f"measured: {quantity(evidence.measured['value'], row['unit'])}")
        body.append(f"coverage: {evidence.coverage['compared']} of {evidence.coverage['expected']}")
        body.append(f"evidence: {evidence_file(evidence)}")
        body += [f"reused from: {evidence.provenance['reused']}"] if evidence.provenance.get("reused") else []
        body += [f"why: {question} {answer}" for question, answer in evidence.whys]
    _case(suite, row["notebook"], f"{row['id']} {row['title']}", _TAG.get(verdict, ""), reason, "\n".join(body))


def _run(suite: Xml.Element, conclusion: Conclusion) -> None:
    tag = {Exit.OK: "", Exit.REFUTED: "failure"}.get(conclusion.exit_code, "error")
    reason = f"{conclusion.verdict}, exit {int(conclusion.exit_code)}: {conclusion.reason}"
    _case(suite, "run", "verdict", tag, reason, "")


def _case(suite: Xml.Element, room: str, name: str, tag: str, reason: str, body: str) -> None:
    """Add one case; control characters become visible escapes, because XML 1.0 cannot hold them at all."""
    case = Xml.SubElement(suite, "testcase", classname=clean(room), name=clean(name, 300))
    if tag:
        outcome = Xml.SubElement(case, tag, message=clean(reason, 1000))
        outcome.text = clean(body)
    elif "reused from" in body:  # a green case that was not measured today says so
        Xml.SubElement(case, "system-out").text = clean(body)


def _count(element: Xml.Element) -> None:
    cases = list(element.iter("testcase"))
    element.set("tests", str(len(cases)))
    for tag, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        element.set(attribute, str(sum(case.find(tag) is not None for case in cases)))

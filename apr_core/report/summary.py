"""summary.json and summary.md: a whole run for a machine to read, and for a pull request to show."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from apr_core.errors import FormatError, ReadWriteError
from apr_core.falsify.evidence import Evidence, SubjectRecord, read_evidence, too_new
from apr_core.falsify.rounds import Conclusion, read_declared
from apr_core.falsify.verdict import Verdict
from apr_core.report.schema import parse
from apr_core.report.text import clean, limit_of, quantity, seconds
from apr_core.report.whys import whys_markdown

SCHEMA = 2
_SHOWN_IN_MARKDOWN = (Verdict.FALSIFIED, Verdict.INCONCLUSIVE, Verdict.NOT_RUN)


@dataclass(frozen=True)
class NotebookStatus:
    """
    How a notebook ended.

    Attributes:
        seconds: Wall clock of its run.
        complete: Whether every cell ran and the round was closed.
        reason: Why not, when not.
        html: Address of its page relative to the run folder, when there is one.
    """

    seconds: float
    complete: bool
    reason: str = ""
    html: str | None = None


@dataclass(frozen=True)
class Metric:
    """A measured number; two healthy runs agree within ``low`` to ``high``, null where that was not measured."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Limit:
    """The threshold of a claim, and as it is printed."""

    direction: Literal["at_most", "at_least"]
    threshold: float
    text: str


@dataclass(frozen=True)
class Coverage:
    """How many things were compared, and how many should have been."""

    compared: int
    expected: int


@dataclass(frozen=True)
class ClaimResult:
    """What became of one claim; ``metrics`` holds its measured value by the metric's name, and what else it timed."""

    version: int
    notebook: str
    title: str
    severity: int
    round: int
    verdict: Verdict
    reason: str
    metric: str
    unit: str
    measured: float | None
    limit: Limit
    coverage: Coverage
    metrics: Mapping[str, Metric]
    evidence: str | None
    reused: bool


@dataclass(frozen=True)
class Summary:
    """One run against one subject; damaged evidence files and declared claims without evidence make it incomplete."""

    schema: int
    verdict: Verdict
    reason: str
    exit_code: int
    score: float
    counts: Mapping[str, int]
    damaged: Mapping[str, str]
    missing: tuple[str, ...]
    subject: SubjectRecord
    reference: SubjectRecord | None
    diagnosis: Mapping[str, Any] | None
    provenance: Mapping[str, Any]
    claims: Mapping[str, ClaimResult]
    notebooks: Mapping[str, NotebookStatus]


def summarise(folder: Path, conclusion: Conclusion, notebooks: Mapping[str, NotebookStatus]) -> Summary:
    """
    Put a run into one record.

    Raises:
        FormatError: ``declared.json`` cannot be read.
    """
    declared = examined(read_declared(folder), conclusion)
    return Summary(
        schema=SCHEMA,
        verdict=conclusion.verdict,
        reason=conclusion.reason,
        exit_code=int(conclusion.exit_code),
        score=conclusion.score,
        counts=dict(conclusion.counts),
        damaged=dict(conclusion.damaged),
        missing=() if declared["diagnosis"] else tuple(conclusion.missing),
        subject=SubjectRecord(**declared["subject"]),
        reference=SubjectRecord(**declared["reference"]) if declared["reference"] else None,
        diagnosis=declared["diagnosis"],
        provenance=declared["provenance"],
        claims={row["id"]: _claim(row, conclusion) for row in declared["claims"]},
        notebooks=dict(notebooks),
    )


def examined(declared: dict[str, Any], conclusion: Conclusion) -> dict[str, Any]:
    """
    Add what only the evidence knows: hash, template, device and refusal, read by the notebooks from the whole file; and
    claims that nobody declared and that a record in the folder refutes.
    """
    more = [
        e.claim for k, (_, _, e) in conclusion.by_claim.items() if e and k not in {c["id"] for c in declared["claims"]}
    ]
    declared["claims"] = [*declared["claims"], *more]
    declared["notebooks"] = list(dict.fromkeys([*declared["notebooks"], *(c["notebook"] for c in more)]))
    evidence = [e for _, _, e in conclusion.by_claim.values() if e is not None]
    found = {
        "subject": [e.subject for e in evidence],
        "reference": [e.reference["subject"] for e in evidence if e.reference.get("subject")],
    }
    for side, records in found.items():
        if records and declared[side]:
            declared[side] = {**declared[side], **{k: v for k, v in records[0].items() if v}}
    return declared


def write_summary(folder: Path, summary: Summary) -> Path:
    """
    Write ``summary.json`` (strict, in ASCII, so that a lone surrogate cannot break the file) and ``summary.md``.

    Returns:
        The former.

    Raises:
        ReadWriteError: The folder cannot be written.
    """
    write_whole(folder / "summary.md", markdown(summary) + _chains(folder, summary))
    return write_whole(folder / "summary.json", json.dumps(asdict(summary), indent=1, allow_nan=False) + "\n")


def read_summary(folder: Path) -> Summary:
    """
    Read ``summary.json`` back.

    Raises:
        FormatError: It is missing, damaged, or of another schema.
    """
    path = folder / "summary.json"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["schema"] != SCHEMA:
            raise ValueError(too_new(body["schema"], SCHEMA))
        summary: Summary = parse(Summary, body)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(
            expected=f"the summary of a run, schema {SCHEMA}",
            found=f"{type(error).__name__}: {error}",
            file=path,
            advice=f"write it again with `apr report page {folder}`",
        ) from error
    return summary


def markdown(summary: Summary) -> str:
    """Write a run in GitHub's Markdown: the verdict, what is refuted, undecided or not run, and what held, folded."""
    held = [k for k, c in summary.claims.items() if c.verdict is Verdict.CORROBORATED]
    lines = [
        f"## {summary.verdict}: {_md(summary.subject.name)}",
        "",
        f"{_md(summary.reason[:1].upper() + summary.reason[1:])}. Exit code {summary.exit_code}, "
        f"score {summary.score:.2f}; "
        + ", ".join(f"{n} {verdict}" for verdict, n in summary.counts.items())
        + f"; {seconds(sum(s.seconds for s in summary.notebooks.values()))}.",
        "",
        *([f"{_md(_bytes_of(summary))}.", ""] if summary.subject.sha256 else []),
    ]
    if summary.damaged or summary.missing:
        lines += [
            f"**Incomplete:** {len(summary.damaged)} evidence files cannot be read, {len(summary.missing)} declared "
            "claims left no evidence.",
            "",
        ]
    open_ = [(k, c) for v in _SHOWN_IN_MARKDOWN for k, c in summary.claims.items() if c.verdict is v]
    if open_:
        lines += ["| claim | | verdict | measured | limit | reason |", "|---|---|---|---|---|---|"]
        for name, c in open_:
            cells = (name, c.title, str(c.verdict), quantity(c.measured, c.unit), c.limit.text, c.reason)
            lines.append("| " + " | ".join(map(_md, cells)) + " |")
        lines.append("")
    if held:
        lines += [f"<details><summary>{len(held)} held</summary>", "", ", ".join(map(_md, held)), "", "</details>", ""]
    return "\n".join(lines)


def _bytes_of(summary: Summary) -> str:
    """Which file was examined, and which one it was held against."""
    subject, reference = summary.subject, summary.reference
    types = ", ".join(f"{k} × {v}" for k, v in list(subject.quant.items())[:4])
    against = f"reference {reference.name}, sha256 {reference.sha256[:16]}" if reference else "no reference"
    return f"{subject.format}, {types}, sha256 {subject.sha256[:16]}; {against}"


def _chains(folder: Path, summary: Summary) -> str:
    """Five whys of each refuted claim, folded; every answer links to the record that holds its numbers."""
    said = []
    for name, claim in summary.claims.items():
        if claim.verdict is not Verdict.FALSIFIED or claim.evidence is None:
            continue
        try:
            whys = read_evidence(folder / claim.evidence).whys
            chain = whys_markdown(whys, {"numbers": quote(claim.evidence)}, _md)
        except FormatError as error:  # the verdict stands without it
            chain = f"Its record cannot be read: {_md(error.found)}"
        said += [f"<details><summary>Five whys of {_md(name)}</summary>", "", chain, "", "</details>", ""]
    return "\n".join(said)


def _md(text: str) -> str:
    """Text that GitHub shows as it is: no markup, no mention of a person, no reference to an issue, one line."""
    safe = clean(text, 400).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")
    for sign in "\\`*_{}[]|~$":
        safe = safe.replace(sign, f"\\{sign}")
    return safe.replace("@", "@\u200b").replace("#", "#\u200b").replace("://", ":\u200b//")


def evidence_file(evidence: Evidence) -> str:
    """Path of an evidence record relative to its run folder."""
    return f"{Path(evidence.folder).name}/{evidence.id}-{evidence.attempt}.json"


def write_whole(path: Path, text: str) -> Path:
    """
    Replace a page in one step: a reader, or a browser that reloads, never sees half of it.

    Raises:
        ReadWriteError: The folder cannot be written.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as stream:
            stream.write(text.encode("utf-8"))
        Path(stream.name).chmod(0o644)
        Path(stream.name).replace(path)
    except OSError as error:
        raise ReadWriteError(f"cannot write {path}: {error}", advice="choose another --out") from error
    return path


def _claim(row: Mapping[str, Any], conclusion: Conclusion) -> ClaimResult:
    verdict, reason, evidence = conclusion.by_claim[row["id"]]
    coverage = evidence.coverage if evidence else {}
    kept = {k: row[k] for k in ("version", "notebook", "title", "severity", "round", "metric", "unit")}
    return ClaimResult(
        **kept,
        verdict=verdict,
        reason=reason,
        measured=evidence.measured["value"] if evidence else None,
        limit=Limit(row["direction"], float(row["threshold"]), limit_of(row)),
        coverage=Coverage(coverage.get("compared", 0), coverage.get("expected", 0)),
        metrics=_metrics(evidence) if evidence else {},
        evidence=evidence_file(evidence) if evidence else None,
        reused=bool(evidence and evidence.provenance.get("reused")),
    )


def _metrics(e: Evidence) -> dict[str, Metric]:
    """
    The measured value and the quantities among the rows, each with what is recorded of its noise.

    A count is exact. A noise floor is what two healthy sides differ by. A quantity is as sure as its rows
    ``NAME 95 % low`` and ``NAME 95 % high`` say.
    """
    rows = [(str(r["quantity"]), r["value"]) for r in e.rows if _number(r.get("value")) and "quantity" in r]
    values = {name.removesuffix(" median"): float(value) for name, value in rows}
    found = {
        name: Metric(value, values.get(f"{name} 95 % low"), values.get(f"{name} 95 % high"))
        for name, value in values.items()
        if "95 %" not in name
    }
    value, floor = e.measured["value"], e.reference.get("noise_floor")
    half = 0.0 if e.measured["unit"] == "count" else floor / 2 if floor is not None else None
    if value is not None:
        low, high = (None, None) if half is None else (value - half, value + half)
        found = {str(e.measured["name"]): Metric(float(value), low, high), **found}
    return found


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

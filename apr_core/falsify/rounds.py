"""A round: the claims of one run held against one subject, and the verdict, score and exit code of the whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from apr_core.errors import Exit, FormatError, UsageError
from apr_core.falsify.claims import PINNED, Claim, claims_of, load_claims, threshold_digest
from apr_core.falsify.evidence import (
    DECIDES,
    SCHEMA,
    Evidence,
    SubjectRecord,
    contradiction,
    make_evidence,
    read_evidence,
    too_new,
    write_evidence,
)
from apr_core.falsify.finding import Finding
from apr_core.falsify.verdict import NEEDS, NotRun, Verdict

# Several attempts at one claim (merged runs): the worst that was really tried speaks.
WORST_FIRST = (Verdict.FALSIFIED, Verdict.INCONCLUSIVE, Verdict.CORROBORATED, Verdict.NOT_RUN)


class Round:
    """
    What a notebook holds open while it argues its claims.

    Args:
        notebook: One of the four notebooks.
        subject: Whose file it is.
        folder: Run folder; evidence goes to ``folder/evidence``.
        parameters: The notebook's parameters, kept in every record.
        provenance: Who ran what, see ``apr_core.provenance``.
        reference: The file that the subject claims to be made from, when one was given.

    ``explain``, where a higher room has set it, turns a refutation into its five whys before the record is written.
    """

    explain: Callable[[Evidence], Sequence[tuple[str, str]]] | None = None

    def __init__(
        self,
        notebook: str,
        subject: SubjectRecord,
        folder: Path,
        *,
        parameters: Mapping[str, Any],
        provenance: Mapping[str, Any],
        reference: SubjectRecord | None = None,
    ) -> None:
        self.notebook, self.subject, self.reference = notebook, subject, reference
        self.folder, self.parameters, self.provenance = folder, dict(parameters), dict(provenance)
        self.claims = claims_of(notebook)
        self.records: list[Evidence] = []
        self.closed = False

    def record(self, claim_id: str, finding: Finding) -> Evidence:
        """
        Judge a finding, write its evidence and return it; printing it gives the canonical line.

        Raises:
            UsageError: The finding belongs to another claim, or the round is closed: the line would be a lie.
        """
        if finding.claim != claim_id or self.closed or claim_id not in {c.id for c in self.claims}:
            raise UsageError(f"{claim_id} cannot be recorded from a finding of {finding.claim or 'no claim'} here")
        evidence = make_evidence(
            finding, self.subject, parameters=self.parameters, provenance=self.provenance, reference=self.reference
        )
        if evidence.verdict is Verdict.FALSIFIED and self.explain is not None and not finding.reused:
            evidence = replace(evidence, whys=tuple(self.explain(evidence)))
        path = write_evidence(evidence, self.folder / "evidence", finding.arrays)
        evidence = read_evidence(path)
        self.records.append(evidence)
        return evidence

    def falsified(self) -> list[Evidence]:
        """The records that refute their claim."""
        return [e for e in self.records if e.verdict is Verdict.FALSIFIED]

    def close(self) -> str:
        """
        End the round; the runner takes this line as the sign that the notebook got this far.

        Raises:
            UsageError: A claim of this notebook has no record: it would be missed in silence.
        """
        missing = [c.id for c in self.claims if c.id not in {e.id for e in self.records}]
        if missing:
            raise UsageError(f"{self.notebook} closes without evidence for {', '.join(missing)}")
        self.closed = True
        counts = ", ".join(f"{sum(e.verdict is v for e in self.records)} {v}" for v in Verdict)
        return f"{self.notebook} closed: {len(self.records)} claims, {counts}"


@dataclass(frozen=True)
class Conclusion:
    """
    The verdict of a whole run.

    Attributes:
        verdict: FALSIFIED, INCONCLUSIVE or CORROBORATED.
        reason: In a sentence.
        by_claim: Claim id -> (verdict, reason, evidence or None): every declared claim, and undeclared ones that
            evidence in the folder refutes.
        score: Severity-weighted share of the declared claims that are corroborated, 0 to 1.
        counts: Verdict -> how many of those claims.
        exit_code: As house and README have it.
        damaged: Evidence file -> why it cannot be believed; a run with one is incomplete, whatever the others say.
    """

    verdict: Verdict
    reason: str
    by_claim: Mapping[str, tuple[Verdict, str, Evidence | None]]
    score: float
    counts: Mapping[str, int]
    exit_code: Exit
    damaged: Mapping[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """Declared claims that left no record, not even a damaged one."""
        lost = {name.rsplit("-", 2)[0] for name in self.damaged}
        return [k for k, (_, _, evidence) in self.by_claim.items() if evidence is None and k not in lost]


def declare(
    folder: Path,
    notebooks: Sequence[str],
    *,
    asked: frozenset[str],
    subject: SubjectRecord,
    reference: SubjectRecord | None = None,
    diagnosis: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any],
    parameters: Mapping[str, Any],
) -> Path:
    """
    Write ``declared.json``: every claim of the selected notebooks, so that one that left no evidence is seen.

    Args:
        folder: Run folder.
        notebooks: The selected ones.
        asked: Needs that the person asked for; a claim that lacks one of them is required all the same.
        subject: The subject with its metadata (long values cut).
        reference: Likewise, when given.
        diagnosis: For a subject that could not be opened: ``{"error", "message", "exit_code"}``.
        provenance: Who ran what.
        parameters: As the notebooks get them.
    """
    body = {
        "schema": SCHEMA,
        "notebooks": list(notebooks),
        "asked": sorted(asked),
        "subject": asdict(subject),
        "reference": asdict(reference) if reference else None,
        "diagnosis": dict(diagnosis) if diagnosis else None,
        "parameters": dict(parameters),
        "provenance": dict(provenance),
        "claims": [c.as_json() for n in notebooks for c in claims_of(n)],
    }
    path = folder / "declared.json"
    path.write_text(json.dumps(body, indent=1, allow_nan=False, ensure_ascii=False), encoding="utf-8")
    return path


def read_declared(folder: Path) -> dict[str, Any]:
    """
    Read ``declared.json`` back.

    Raises:
        FormatError: It is missing or broken, or declares less, or other limits, than its notebooks argue.
    """
    path = folder / "declared.json"
    try:
        body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if body["schema"] != SCHEMA:
            raise ValueError(too_new(body["schema"]))
        rows = {c["id"]: c for c in body["claims"]}
        missing = [c.id for n in body["notebooks"] for c in claims_of(n) if c.id not in rows]
        fixed = (*DECIDES, "severity")
        moved = [k for k, c in rows.items() if any(c[f] != getattr(load_claims()[k], f) for f in fixed)]
        if missing or moved or len(rows) < len(body["claims"]):
            raise ValueError(f"claims left out: {missing}, other than in the table: {moved}, or declared twice")
        [body[key] for key in ("asked", "notebooks", "subject", "reference", "parameters", "provenance")]
        if body["diagnosis"] and not (body["diagnosis"]["message"] and Exit(body["diagnosis"]["exit_code"])):
            raise ValueError("a diagnosis without a message or with exit code 0")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(
            expected="declared.json of a run", found=f"{type(error).__name__}: {error}", file=path, advice="run again"
        ) from error
    return body


def conclude(folder: Path, broken: Mapping[str, str] | None = None) -> Conclusion:
    """
    Read a run folder and conclude: a function of the files alone.

    An evidence file that is unreadable, of a newer schema, or at odds with itself or its run is left out, named in
    ``damaged`` and ends in exit 4: the other claims can still be read, and nothing looks complete.

    Args:
        folder: Run folder with ``declared.json`` and ``evidence/``.
        broken: Notebook -> why it did not complete (raised, died, timed out, left cells unexecuted).

    Raises:
        FormatError: ``declared.json`` cannot be read, the records are about different files, or the thresholds were
            edited without a version.
    """
    if threshold_digest() != PINNED:
        raise FormatError(
            expected=f"thresholds of digest {PINNED:.12}",
            found=f"{threshold_digest():.12}",
            file=folder,
            advice="raise the version of the claim that was edited, write a decision note, pin the new digest",
        )
    declared = read_declared(folder)
    evidence, damaged = _read(folder / "evidence", bypassed=bool(declared["subject"]["bypassed"]))
    if why := _two_files(evidence, declared):
        raise FormatError(expected="evidence about one file", found=why, file=folder, advice="keep the runs apart")
    asked = frozenset(declared["asked"])
    by_claim: dict[str, tuple[Verdict, str, Evidence | None]] = {}
    holes: list[str] = []
    for row in declared["claims"]:
        claim = load_claims()[row["id"]]
        verdict, reason, chosen = _speaks(
            [e for e in evidence if e.id == claim.id], declared, broken or {}, claim, damaged
        )
        by_claim[claim.id] = (verdict, reason, chosen)
        if _is_hole(claim, verdict, reason, chosen, asked):
            holes.append(claim.id)
    for e in evidence:
        # The refusal that the runner writes for a gate when notebook 10 is not selected, or a merged run: without this
        # line a refutation that lies in the folder would be left out of the verdict because nobody had declared it.
        if e.verdict is Verdict.FALSIFIED:
            by_claim.setdefault(e.id, (e.verdict, e.reason, e))
    return _verdict(declared, by_claim, holes, broken or {}, damaged)


def _read(folder: Path, *, bypassed: bool) -> tuple[list[Evidence], dict[str, str]]:
    """Read every record, in the order of the names: those that can be believed, and the files that cannot, with why."""
    records, damaged = [], {}
    for path in sorted(folder.glob("*.json")):
        try:
            e = read_evidence(path)
            why = contradiction(e)
            if not why and bypassed and e.verdict is Verdict.CORROBORATED:
                why = "CORROBORATED in a run that bypassed the contract"
        except FormatError as error:
            why = error.found
        if why:
            damaged[path.name] = why
        else:
            records.append(e)
    return records, damaged


def _two_files(evidence: Sequence[Evidence], declared: Mapping[str, Any]) -> str:
    """Say that the file changed while it was examined, or that the record of another model was copied in."""
    for side in ([declared["subject"], *(e.subject for e in evidence)], [e.reference["subject"] for e in evidence]):
        hashes = sorted({str(s["sha256"]) for s in side if s and s["sha256"]})
        if len(hashes) > 1:
            return f"evidence about {len(hashes)} different files: {', '.join(h[:12] for h in hashes)}"
    return ""


def _speaks(
    attempts: list[Evidence],
    declared: Mapping[str, Any],
    broken: Mapping[str, str],
    claim: Claim,
    damaged: Mapping[str, str],
) -> tuple[Verdict, str, Evidence | None]:
    """The attempt that speaks for a claim; without one, the reason why there is none."""
    for verdict in WORST_FIRST:
        for e in attempts:
            if e.verdict is verdict:
                return verdict, e.reason, e
    if declared["diagnosis"]:
        return Verdict.NOT_RUN, f"{NotRun.NOT_OPENED}: {declared['diagnosis']['message']}", None
    if lost := [name for name in damaged if name.startswith(f"{claim.id}-")]:
        return Verdict.INCONCLUSIVE, f"its evidence cannot be read: {damaged[lost[0]]}", None
    if claim.notebook in broken:
        return Verdict.INCONCLUSIVE, f"the notebook did not complete: {broken[claim.notebook]}", None
    return Verdict.INCONCLUSIVE, "declared, but left no evidence", None


def _is_hole(claim: Claim, verdict: Verdict, reason: str, chosen: Evidence | None, asked: frozenset[str]) -> bool:
    if verdict is not Verdict.NOT_RUN:
        return False
    if chosen is None:
        return True
    # Only what the claim itself needs excuses it, in the very words of the list: an error text behind them, or a device
    # that it never asks for, does not. A refusal excuses nothing either: where it is real, a gate is FALSIFIED.
    why = next((NEEDS[need] for need in claim.needs if NEEDS[need] == reason), None)
    return why is None or claim.required(why, asked)


def _verdict(
    declared: Mapping[str, Any],
    by_claim: Mapping[str, tuple[Verdict, str, Evidence | None]],
    holes: Sequence[str],
    broken: Mapping[str, str],
    damaged: Mapping[str, str],
) -> Conclusion:
    verdicts = {k: v[0] for k, v in by_claim.items()}
    counts = {str(v): sum(x is v for x in verdicts.values()) for v in Verdict}
    weights = {row["id"]: int(row["severity"]) for row in declared["claims"]}
    good = sum(weights[k] for k, v in verdicts.items() if v is Verdict.CORROBORATED)
    score = good / max(1, sum(weights.values()))
    refuted = [k for k, v in verdicts.items() if v is Verdict.FALSIFIED]
    open_ = [k for k, v in verdicts.items() if v is Verdict.INCONCLUSIVE]
    executed = [k for k, v in verdicts.items() if v is not Verdict.NOT_RUN]
    if refuted:
        verdict, reason, code = Verdict.FALSIFIED, f"refuted: {', '.join(refuted)}", Exit.REFUTED
    elif open_ or holes or not executed:
        what = (
            f"undecided: {', '.join(open_)}" if open_ else f"not run: {', '.join(holes) if executed else 'every claim'}"
        )
        verdict, reason, code = Verdict.INCONCLUSIVE, what, Exit.INCONCLUSIVE
    else:
        left = counts[Verdict.NOT_RUN]
        verdict, reason, code = Verdict.CORROBORATED, f"{len(executed)} claims held, {left} not run", Exit.OK
    if declared["diagnosis"]:
        reason = f"not opened: {declared['diagnosis']['message']}"
        verdict = verdict if refuted else Verdict.INCONCLUSIVE
        code = Exit(declared["diagnosis"]["exit_code"])
    if damaged:
        verdict = verdict if refuted else Verdict.INCONCLUSIVE
        code = Exit.FORMAT
        reason = f"{reason}; incomplete: {len(damaged)} evidence file{'s' * (len(damaged) > 1)} cannot be read"
    if broken:
        # Verdict and exit code always agree: a notebook that broke after its last claim has not corroborated.
        verdict = verdict if refuted else Verdict.INCONCLUSIVE
        code = Exit.UNEXPECTED
        reason = f"{reason}; did not complete: " + "; ".join(f"{k} ({v})" for k, v in sorted(broken.items()))
    return Conclusion(verdict, reason, by_claim, score, counts, code, damaged)

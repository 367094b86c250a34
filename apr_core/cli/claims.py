"""``apr qa --claims``: the claims of the notebooks held against a model, without notebooks or evidence."""

from __future__ import annotations

import time
from typing import Any

from apr_core.cli.output import note, show, show_json, show_table
from apr_core.engines.subject import Subject, obtain
from apr_core.errors import AprError, Exit
from apr_core.falsify.claims import Claim, claims_of
from apr_core.falsify.finding import ACTS, Finding, load_acts
from apr_core.falsify.verdict import Verdict

# In the order of the gates: is it admitted, is it fed and answering as it should, does it compute what others compute.
# Throughput is a measurement of its own (`apr suite --only 30`).
NOTEBOOKS = ("10_contract_gates", "00_ground_truth", "20_parity")


def examine(model: str, *, reference: str = "", device: str = "auto", skip_contract: bool = False) -> dict[str, Any]:
    """
    Try to refute every claim of three notebooks.

    Args:
        model: Path, or ``pygmy``.
        reference: The file that it claims to be made from; empty for none.
        device: ``auto``, ``cpu`` or ``cuda``.
        skip_contract: Go on with a refused model; nothing can then be corroborated.

    Returns:
        model, refusal, bypassed, verdict, gates (id, title, verdict, reason, hole, metric, measured, unit, limit,
        compared, expected, detail, seconds), gates_executed, gates_not_run, summary. A hole is a claim that was not run
        although the person asked for what it lacks.

    Raises:
        AprError: The model or the reference cannot be opened.
    """
    subject = obtain(model, reference=reference, device=device, skip_contract=skip_contract)
    asked = frozenset({"cuda"} & {device} | ({"reference"} if reference else set()))
    try:
        gates = []
        for notebook in NOTEBOOKS:
            load_acts(notebook)
            for claim in claims_of(notebook):
                gates.append(_attempt(claim, subject, asked))
                note(f"{claim.id} {gates[-1]['verdict']}")
    finally:
        subject.close()
    counts = {verdict: sum(g["verdict"] == verdict for g in gates) for verdict in Verdict}
    return {
        "model": str(subject.path),
        "refusal": subject.refusal,
        "bypassed": subject.admission.bypassed,
        "verdict": str(_overall(gates)),
        "gates": gates,
        "gates_executed": len(gates) - counts[Verdict.NOT_RUN],
        "gates_not_run": counts[Verdict.NOT_RUN],
        "summary": ", ".join(f"{n} {verdict}" for verdict, n in counts.items()),
    }


def _attempt(claim: Claim, subject: Subject, asked: frozenset[str]) -> dict[str, Any]:
    """Measure and judge one claim; a measurement that fails decides nothing, and says why."""
    started = time.monotonic()
    try:
        finding = ACTS[claim.id](subject)
    except AprError as error:
        finding = Finding(value=None, compared=0, expected=1, inconclusive=f"not measured: {error}", claim=claim.id)
    verdict, reason = finding.judge(bypassed=subject.admission.bypassed)
    return {
        "id": claim.id,
        "title": claim.title,
        "verdict": str(verdict),
        "reason": reason,
        "hole": finding.not_run is not None and claim.required(finding.not_run, asked),
        "metric": claim.metric,
        "measured": finding.value,
        "unit": claim.unit,
        "limit": claim.limit,
        "compared": finding.compared,
        "expected": finding.expected,
        "detail": finding.detail,
        "seconds": round(time.monotonic() - started, 3),
    }


def _overall(gates: list[dict[str, Any]]) -> Verdict:
    """Refuted by one, undecided by one, and never corroborated by none: skipping everything is not passing."""
    found = {g["verdict"] for g in gates}
    if Verdict.FALSIFIED in found:
        return Verdict.FALSIFIED
    if Verdict.INCONCLUSIVE in found or found <= {Verdict.NOT_RUN} or any(g["hole"] for g in gates):
        return Verdict.INCONCLUSIVE
    return Verdict.CORROBORATED


_CODES = {
    Verdict.FALSIFIED: Exit.REFUTED,
    Verdict.INCONCLUSIVE: Exit.INCONCLUSIVE,
    Verdict.CORROBORATED: Exit.OK,
}


def show_examination(body: dict[str, Any], *, as_json: bool) -> Exit:
    """Print an examination; return 5 when a claim is refuted, 11 when one is undecided, 0 otherwise."""
    if as_json:
        show_json(body)
    else:
        rows = [(g["id"], g["verdict"], g["title"], g["reason"] or f"{g['compared']} compared") for g in body["gates"]]
        show_table(("claim", "verdict", "title", "reason"), rows)
        if body["bypassed"]:
            show("contract bypassed (--skip-contract): nothing here can be corroborated")
        ran, left = body["gates_executed"], body["gates_not_run"]
        show(f"{body['model']}: {body['verdict']}; {ran} executed, {left} not run ({body['summary']})")
    return _CODES[Verdict(body["verdict"])]

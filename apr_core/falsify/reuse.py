"""
Claims that were decided before, for whoever asks for them (``apr suite --reuse``).

A record is taken over only when everything that its verdict rests on is the same: the bytes of the file, its companions
and its reference, the claim's version, the parameters, the device, the code, the packages and the machine. What differs
in one of them, or does not say, is measured again; what was itself taken over is no source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apr_core.errors import FormatError
from apr_core.falsify.evidence import Evidence, contradiction, read_evidence
from apr_core.falsify.finding import Finding
from apr_core.falsify.rounds import Round
from apr_core.falsify.verdict import Verdict

DECIDED = (Verdict.CORROBORATED, Verdict.FALSIFIED)
_BYTES = ("sha256", "companions")
_MACHINE = ("platform", "cpu", "cores", "python", "packages", "code")
_PATHS = ("model", "reference")  # parameters that name what the hashes already fix


def decided(runs: Path, round_: Round) -> dict[str, Finding]:
    """
    Find what earlier runs decided of a round's claims.

    Args:
        runs: A folder of run folders; the newest attempt that fits is taken.
        round_: The round that is about to be argued.

    Returns:
        Claim id -> the finding as it was recorded, marked with its attempt.
    """
    found: dict[str, Finding] = {}
    for claim in (c for c in round_.claims if "peer" not in c.needs):  # no record says which build of a peer ran
        paths = runs.glob(f"*/evidence/{claim.id}-*.json")
        for path in sorted(paths, key=lambda p: p.name, reverse=True):  # the name holds the time of the attempt
            try:
                evidence = read_evidence(path)
                usable = evidence.verdict in DECIDED and not contradiction(evidence)
            except FormatError:
                continue
            if usable and _same(evidence, round_):
                found[claim.id] = _finding(evidence)
                break
    return found


def _same(e: Evidence, round_: Round) -> bool:
    subject = asdict(round_.subject)
    if e.provenance.get("reused") or not all(subject[k] and e.subject.get(k) == subject[k] for k in _BYTES):
        return False
    if any(e.subject.get(k) != subject[k] for k in ("device", "bypassed", "template_sha256")):
        return False
    other, mine = e.reference.get("subject"), round_.reference
    if other is not None and (mine is None or any(other.get(k) != getattr(mine, k) for k in _BYTES)):
        return False
    if any(not round_.provenance.get(k) or e.provenance.get(k) != round_.provenance[k] for k in _MACHINE):
        return False
    return _free(e.parameters) == _free(round_.parameters)


def _free(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in parameters.items() if k not in _PATHS}


def _finding(e: Evidence) -> Finding:
    return Finding(
        value=e.measured["value"],
        compared=e.coverage["compared"],
        expected=e.coverage["expected"],
        nonfinite=e.coverage["nonfinite"],
        missing=e.coverage["missing"],
        detail=e.coverage["detail"],
        rows=e.rows,
        rows_omitted=e.rows_omitted,
        arrays=e.arrays(),
        whys=e.whys,
        reference=e.reference["name"],
        noise_floor=e.reference["noise_floor"],
        claim=e.id,
        reused=e.attempt,
    )

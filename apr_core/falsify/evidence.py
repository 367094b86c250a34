"""
One immutable JSON file per attempt to refute a claim.

Strict JSON under 100 kB (no NaN, no Infinity: a non-finite value is null plus a counter), arrays in an npz beside it
named with sha256 and shapes. Written by temp file and link, never overwritten; the attempt id in the name is unique, so
runs merge by copying files.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from apr_core.errors import FormatError, ReadWriteError
from apr_core.falsify.claims import Claim, load_claims
from apr_core.falsify.finding import Finding
from apr_core.falsify.verdict import Verdict

SCHEMA = 1
MAX_ROWS = 120
MAX_BYTES = 100_000
# The fields of a claim that a verdict rests on; wording may be improved without a new version.
DECIDES = ("version", "metric", "unit", "direction", "threshold")


@dataclass(frozen=True)
class SubjectRecord:
    """What was examined: enough to find the same bytes again."""

    name: str
    path: str
    format: str = ""
    sha256: str = ""
    quant: Mapping[str, int] = field(default_factory=dict)
    parameters: int = 0
    file_bytes: int = 0
    device: str = ""
    template_sha256: str = ""
    companions: str = ""
    refusal: str = ""
    bypassed: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """
    One attempt to refute one claim.

    ``str(evidence)`` is the canonical line that nbval compares: id, verdict, a bucketed number, integers.
    """

    attempt: str
    claim: Mapping[str, Any]
    subject: Mapping[str, Any]
    reference: Mapping[str, Any]
    parameters: Mapping[str, Any]
    measured: Mapping[str, Any]
    coverage: Mapping[str, Any]
    verdict: Verdict
    reason: str
    provenance: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...] = ()
    rows_omitted: int = 0
    whys: tuple[tuple[str, str], ...] = ()
    attachments: tuple[Mapping[str, Any], ...] = ()
    schema: int = SCHEMA
    folder: str = ""

    @property
    def id(self) -> str:
        """Id of the claim."""
        return str(self.claim["id"])

    def __str__(self) -> str:
        reused = f" (reused from {self.provenance['reused']})" if self.provenance.get("reused") else ""
        if self.verdict is not Verdict.CORROBORATED:
            return f"{self.id} {self.verdict}: {self.reason}{reused}"
        claim = load_claims()[self.id]
        value = self.measured["value"]
        number = (
            f"= {int(value)}" if claim.unit == "count" else claim.limit
        )  # raw floats differ from machine to machine
        detail = f"; {self.coverage['detail']}" if self.coverage["detail"] else ""
        said = f"{claim.metric} {number} over {self.coverage['compared']} compared{detail}{reused}"
        return f"{self.id} {self.verdict}: {said}"

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """
        Load the attached arrays, checking each file against its recorded sha256.

        Raises:
            FormatError: The npz is not the one that was written with this record.
        """
        out: dict[str, np.ndarray[Any, Any]] = {}
        for item in self.attachments:
            path = Path(self.folder) / item["file"]
            data = path.read_bytes()
            found = hashlib.sha256(data).hexdigest()
            if found != item["sha256"]:
                raise FormatError(
                    expected=f"sha256 {item['sha256']}",
                    found=f"sha256 {found}: {path.name} was altered",
                    file=path,
                    advice="run the notebook again",
                )
            with np.load(path) as npz:
                out.update({k: npz[k] for k in npz.files})
        return out


def contradiction(evidence: Evidence) -> str:
    """
    Say where a record contradicts itself, its arrays or the claims table; empty when it does not.

    A verdict is a function of what was measured: one that was edited by hand, or judged by other limits, shows here.

    Raises:
        FormatError: An attached array file is not the one that was written.
    """
    try:
        claim, measured, coverage = load_claims()[evidence.id], evidence.measured, evidence.coverage
        for key in DECIDES:
            if evidence.claim[key] != getattr(claim, key):
                return f"{key} is {evidence.claim[key]!r}, in the claims table {getattr(claim, key)!r}"
        if measured["required_tolerance"] != _required_tolerance(claim, measured["value"]):
            return f"value {measured['value']}, but the tolerance that it requires is {measured['required_tolerance']}"
        evidence.arrays()
        found = Finding(
            value=measured["value"],
            compared=coverage["compared"],
            expected=coverage["expected"],
            nonfinite=coverage["nonfinite"],
            missing=coverage["missing"],
            claim=evidence.id,
        )
        tried = found.value is not None or found.compared > 0
        judged, _ = found.judge(bypassed=evidence.subject["bypassed"])
    except (OSError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    if evidence.verdict is Verdict.INCONCLUSIVE or (evidence.verdict is Verdict.NOT_RUN and not tried):
        return "" if evidence.reason else f"{evidence.verdict} without a reason"
    return "" if evidence.verdict is judged else f"{evidence.verdict}, but what was measured is {judged}"


def new_attempt_id() -> str:
    """A sortable, unique name for one attempt: UTC time and four random bytes."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"


def make_evidence(
    finding: Finding,
    subject: SubjectRecord,
    *,
    parameters: Mapping[str, Any],
    provenance: Mapping[str, Any],
    reference: SubjectRecord | None = None,
) -> Evidence:
    """Judge a finding and put everything that it rests on into one record (not yet written)."""
    claim = load_claims()[finding.claim]
    verdict, reason = finding.judge(bypassed=subject.bypassed)
    finite = finding.value is not None and math.isfinite(finding.value)
    return Evidence(
        attempt=new_attempt_id(),
        claim=claim.as_json(),
        subject=asdict(subject),
        reference={
            "name": finding.reference,
            "noise_floor": jsonable(finding.noise_floor),
            "subject": asdict(reference) if reference and "reference" in claim.needs else None,
        },
        parameters=jsonable(dict(parameters)),
        measured={
            "name": claim.metric,
            "value": float(finding.value) if finite and finding.value is not None else None,
            "unit": claim.unit,
            "direction": claim.direction,
            "required_tolerance": _required_tolerance(claim, finding.value) if finite else None,
        },
        coverage={
            "compared": int(finding.compared),
            "expected": int(finding.expected),
            "nonfinite": int(finding.nonfinite) + int(finding.value is not None and not finite),
            "missing": list(finding.missing)[:MAX_ROWS],
            "detail": finding.detail,
        },
        verdict=verdict,
        reason=reason,
        provenance={**provenance, "reused": finding.reused} if finding.reused else dict(provenance),
        rows=tuple(jsonable(dict(r)) for r in list(finding.rows)[:MAX_ROWS]),
        rows_omitted=max(0, len(finding.rows) - MAX_ROWS) + finding.rows_omitted,
        whys=tuple((str(q), str(a)) for q, a in finding.whys),
    )


def write_evidence(evidence: Evidence, folder: Path, arrays: Mapping[str, np.ndarray[Any, Any]] | None = None) -> Path:
    """
    Write the record (and its arrays) into ``folder`` so that it is there whole or not at all.

    Raises:
        FileExistsError: The attempt id is taken; evidence is never overwritten.
        ReadWriteError: The folder cannot be written.
        ValueError: The record exceeds 100 kB or holds a non-finite number.
    """
    body = {k: v for k, v in asdict(evidence).items() if k != "folder"}
    stem = f"{evidence.id}-{evidence.attempt}"
    packed = io.BytesIO()
    if arrays:
        np.savez_compressed(packed, allow_pickle=False, **{k: np.asarray(v) for k, v in arrays.items()})
        body["attachments"] = [
            {
                "file": f"{stem}.npz",
                "sha256": hashlib.sha256(packed.getvalue()).hexdigest(),
                "shapes": {k: list(np.shape(v)) for k, v in arrays.items()},
            }
        ]
    # A lone surrogate (a hostile tensor name, a file name that is not UTF-8) becomes a JSON escape: without that the
    # record of exactly the files that need one could not be written.
    data = json.dumps(body, indent=1, allow_nan=False, ensure_ascii=False).encode("utf-8", "backslashreplace")
    if len(data) > MAX_BYTES:
        raise ValueError(f"evidence of {evidence.id} is {len(data)} bytes, at most {MAX_BYTES}")
    path = folder / f"{stem}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if arrays:
            with _whole(folder / f"{stem}.npz") as stream:
                stream.write(packed.getvalue())
        with _whole(path) as stream:
            stream.write(data)
    except OSError as error:
        if isinstance(error, FileExistsError) and folder.is_dir():
            raise
        raise ReadWriteError(f"cannot write evidence to {folder}: {error}", advice="choose another --out") from error
    return path


def read_evidence(path: Path) -> Evidence:
    """
    Read one record back.

    Raises:
        FormatError: The file is not a readable evidence record: that is an error, never an omission.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        if body["schema"] != SCHEMA:
            raise ValueError(too_new(body["schema"]))
        return Evidence(
            **{
                **body,
                "verdict": Verdict(body["verdict"]),
                "rows": tuple(body["rows"]),
                "whys": tuple((q, a) for q, a in body["whys"]),
                "attachments": tuple(body["attachments"]),
                "folder": str(path.parent),
            }
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(
            expected=f"an evidence record of schema {SCHEMA}",
            found=f"{type(error).__name__}: {error}",
            file=path,
            advice="delete the run folder and run again",
        ) from error


def too_new(schema: object, known: int = SCHEMA) -> str:
    """Say what is wrong with another schema than ours."""
    newer = isinstance(schema, int) and schema > known
    return f"schema {schema}, written by {'a newer' if newer else 'another'} apr_core"


def _required_tolerance(claim: Claim, value: float | None) -> float | None:
    """The smallest threshold that this value would have met: what a person asks next."""
    return None if value is None else float(f"{value:.6g}")


def jsonable(value: Any) -> Any:
    """Plain JSON values: numpy scalars become Python's, non-finite numbers become null, the rest becomes text."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class _whole:  # noqa: N801  a context manager, used as a function
    """Write to a temp file in the same folder, then link it into place: fails when the name exists."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        self.stream = tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=".", delete=False)
        return self.stream

    def __exit__(self, kind: object, *_: object) -> None:
        temp = Path(self.stream.name)
        try:
            self.stream.flush()
            os.fsync(self.stream.fileno())
            self.stream.close()
            if kind is None:
                temp.chmod(0o644)
                os.link(temp, self.path)
        finally:
            self.stream.close()
            temp.unlink(missing_ok=True)

"""The objects of the lower rooms in Jupyter: checkpoint, admission, subject, trace, parity report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from apr_core.report.display import Shown, compose
from apr_core.report.text import nbytes

if TYPE_CHECKING:
    from apr_core.contract.types import Admission
    from apr_core.engines.subject import Subject
    from apr_core.formats.checkpoint import Checkpoint
    from apr_core.model.trace import Trace
    from apr_core.parity.compare import ParityReport

_MOST = 400  # rows of a table: a display is read, not searched


def show_checkpoint(checkpoint: Checkpoint) -> Shown:
    """An opened file: what it holds, and where each tensor lies."""
    tensors = list(checkpoint.tensors.values())
    size = nbytes(sum(t.nbytes for t in tensors))
    said = [
        f"{checkpoint.path.name}: {checkpoint.format}, {len(tensors)} tensors, {size}",
        f"{len(checkpoint.metadata)} metadata entries; "
        + ("with a configuration" if checkpoint.config else "no configuration")
        + "; unchecked until `admit` judges it",
    ]
    said += [f"{len(checkpoint.gaps)} stretches of bytes belong to no tensor"] if checkpoint.gaps else []
    rows = [
        {"tensor": t.name, "type": str(t.dtype), "shape": _shape(t.shape), "bytes": t.nbytes, "at byte": t.offset}
        for t in tensors
    ]
    return _cut(said, rows)


def show_admission(admission: Admission) -> Shown:
    """What the gate found: every violation, or that there is none."""
    state = "admitted" if admission.ok else f"refused, {len(admission.violations)} violations"
    said = [
        f"{admission.checkpoint.path.name}: {state}",
        f"{admission.measured} of {admission.expected} tensors measured, gate table version {admission.gate_version}"
        + (f"; {len(admission.extras)} tensors outside the contract" if admission.extras else ""),
    ]
    said += ["the contract is bypassed: nothing here can be corroborated"] if admission.bypassed else []
    said += [f"by receipt {admission.receipt}"] if admission.receipt else []
    return _cut(
        said,
        [
            {"gate": v.gate, "tensor": v.tensor or v.about, "measured": v.measured, "limit": v.limit, "says": v.message}
            for v in admission.violations
        ],
    )


def show_subject(subject: Subject) -> Shown:
    """What a notebook holds: the file and its admission, and what it was given to be held against."""
    shown = show_admission(subject.admission)
    other = f"reference: {subject.reference.path.name}" if subject.reference else "no reference"
    more = compose([f"{subject.checkpoint.format} on {subject.device}, seed {subject.seed}, {other}"])
    return Shown(shown.html + more.html, f"{shown.text}\n{more.text}")


def show_trace(trace: Trace) -> Shown:
    """Names, shapes and types in the order of computation; the numbers are ``trace[name]``."""
    rows = [{"name": name, "shape": _shape(array.shape), "type": str(array.dtype)} for name, array in trace.items()]
    return _cut([f"{len(rows)} activations in the order of computation"], rows)


def show_parity(report: ParityReport) -> Shown:
    """Each name with its largest difference, and what was not compared."""
    said = [
        f"{len(report.names)} names compared, {report.compared} of {report.expected} rows; "
        f"least tolerance that holds {report.required_tolerance:.3g} (rel_l2)"
    ]
    said += ["both sides are one object: nothing follows from their agreement"] if report.same_object else []
    said += [f"{report.nonfinite} values are not finite"] if report.nonfinite else []
    said += [f"not compared: {'; '.join(report.missing[:5])}"] if report.missing else []
    return _cut(said, report.table())


def _cut(said: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Shown:
    more = [f"the first {_MOST} of {len(rows)} rows"] if len(rows) > _MOST else []
    return compose([*said, *more], rows[:_MOST])


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"

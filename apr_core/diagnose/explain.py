"""
From a failure to its cause: what `apr diagnose` does.

Container, provenance, tensors, configuration, tokenizer, template, end tokens, records: each asked of the files and
answered by a measurement. Without a reference the gates speak (`alone`); `behind` explains what no file shows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from apr_core.contract.admit import Admission, admit
from apr_core.diagnose.alone import explain_alone, explain_config, explain_label, explain_opening
from apr_core.diagnose.behind import explain_behind
from apr_core.diagnose.cause import EXPLAINED, NOTHING, UNEXPLAINED, Cause, Chain, Diagnosis, Why
from apr_core.diagnose.tensors import explain_tensors
from apr_core.diagnose.words import explain_records, explain_words
from apr_core.engines.subject import resolve_model
from apr_core.errors import AprError, FormatError, LoadError, NotFound, ReadWriteError, UsageError
from apr_core.falsify.evidence import Evidence, read_evidence
from apr_core.falsify.verdict import Verdict
from apr_core.formats.checkpoint import Checkpoint, open_checkpoint
from apr_core.model.trace import TracedForward


def explain_failure(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    evidence: str | Path | Evidence | None = None,
    backend: TracedForward | None = None,
) -> Diagnosis:
    """
    Find out why a model fails.

    Args:
        model: A file or folder; it need not open.
        reference: What it claims to be made from; without one the file is examined alone.
        evidence: A FALSIFIED record of the failure, or its file; its claim is the symptom that the chain begins with.
        backend: The forward that failed on it, held against the independent one where the file itself is healthy;
            without one a record of notebook 20 has the float32 forward examined.

    Raises:
        NotFound: There is no such file.
        UsageError: The evidence is of another file, or refutes nothing; the reference is of another architecture.
        FormatError: Evidence or reference cannot be read.
    """
    path = resolve_model(str(model))
    chain = Chain()
    symptom = evidence if evidence is None or isinstance(evidence, Evidence) else read_evidence(Path(evidence))
    if symptom is not None:
        _require_falsified(symptom)
        chain.ask(*symptom_of(symptom))
    try:
        checkpoint = open_checkpoint(path)
    except NotFound:
        if not path.exists():
            raise
        return _explained([chain.close(explain_opening(path, NotFound(f"no model in {path}")))], "", chain)
    except (FormatError, UsageError, ReadWriteError, LoadError) as error:
        return _explained([chain.close(explain_opening(path, error))], "", chain)
    with checkpoint:
        if symptom is not None:
            _require_same_file(symptom, checkpoint)
        chain.ask("Does the file open?", f"yes: {checkpoint.format}, {len(checkpoint.tensors)} tensors")
        found = _with_reference(checkpoint, reference, chain) if reference else _alone(checkpoint, chain)
        if found.outcome == NOTHING and symptom is not None and reference:
            found = replace(_alone(checkpoint, chain), provenance=found.provenance)  # the reference may be as wrong
    if found.outcome != NOTHING or (symptom is None and backend is None):
        return found
    behind = _explained(explain_behind(path, symptom, backend, chain), found.provenance, chain)
    if symptom is not None and behind.outcome == NOTHING:
        needed = "what failed: another backend or machine, or its copies" if reference else "a reference"
        behind = replace(behind, outcome=UNEXPLAINED, needed=needed)
    return replace(behind, behind=True)


def symptom_of(record: Evidence) -> Why:
    """The question that a chain begins with."""
    return f"What was refuted? ({record.id})", f"{record.claim['statement']} {record.reason}"


def _require_falsified(symptom: Evidence) -> None:
    if symptom.verdict is not Verdict.FALSIFIED:
        raise UsageError(
            f"{symptom.id} is {symptom.verdict} in this record: there is no failure to explain",
            advice="give a FALSIFIED record",
        )


def _require_same_file(symptom: Evidence, checkpoint: Checkpoint) -> None:
    recorded = str(symptom.subject.get("sha256", ""))
    if recorded and recorded != checkpoint.content_hash:
        raise UsageError(
            f"the evidence is of a file of sha256 {recorded[:12]}, this one has {checkpoint.content_hash[:12]}",
            advice="give the file that the record speaks about",
        )


def _admitted(checkpoint: Checkpoint) -> Admission | AprError:
    try:
        return admit(checkpoint)
    except AprError as error:
        return error


def _alone(checkpoint: Checkpoint, chain: Chain) -> Diagnosis:
    causes = explain_alone(checkpoint, _admitted(checkpoint), chain)
    return _explained(causes, "", chain)


def _with_reference(checkpoint: Checkpoint, reference: str | Path, chain: Chain) -> Diagnosis:
    with open_checkpoint(resolve_model(str(reference))) as given:
        _require_comparable(checkpoint, given)
        causes: list[Cause] = []
        if checkpoint.gaps:
            causes += explain_config(checkpoint, None, chain, only="container")
        found, relation = explain_tensors(checkpoint, given, chain)
        causes += found
        if relation.startswith(("a different model", "another revision")):
            return Diagnosis(
                UNEXPLAINED, tuple(causes), relation, tuple(chain.steps), "the reference that it was made from"
            )
        words = explain_words(checkpoint, given, tensors=bool(found))
        if not words:
            words = explain_config(checkpoint, _admitted(checkpoint), chain, only="configuration") if not causes else []
        causes += [chain.close(cause) for cause in words]
        if not causes:
            causes += [chain.close(c) for c in explain_records(checkpoint, given) or explain_label(checkpoint)]
        return _explained(causes, relation, chain)


def _require_comparable(subject: Checkpoint, reference: Checkpoint) -> None:
    """Refuse to explain a file by one of another shape: every difference would be called a cause."""
    # matrices alone: a bias of 128 is one of 128 in many sizes of model
    shared = [n for n, t in reference.tensors.items() if n in subject.tensors and len(t.shape) == 2]
    alike = any(sorted(subject.tensors[n].shape) == sorted(reference.tensors[n].shape) for n in shared)
    if len(shared) > 3 and not alike:
        raise UsageError(
            f"{reference.path} is of another architecture: none of {len(shared)} matrices has the same shape",
            advice="give the model that this one was made from",
        )


def _explained(causes: list[Cause], relation: str, chain: Chain) -> Diagnosis:
    if causes:
        return Diagnosis(EXPLAINED, tuple(causes), relation, tuple(chain.steps))
    return Diagnosis(NOTHING, (), relation, tuple(chain.steps))

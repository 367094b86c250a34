"""
Five whys into the evidence of a run: whatever a round refutes is explained before its record is written.

The chain begins with the claim, goes over what the claim itself measured, and ends with the claim that guards against
its return.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apr_core.diagnose.cause import Diagnosis, Why
from apr_core.diagnose.explain import explain_failure, symptom_of
from apr_core.engines import subject as engines
from apr_core.engines.subject import Subject
from apr_core.falsify.evidence import Evidence
from apr_core.falsify.rounds import Round

_LONGEST = 900  # characters of an answer; a record holds at most 100 kB
_MOST = 6  # questions of the claim's own: 23 wrong answers are no chain


def open_round(notebook: str, subject: Subject, out_dir: str, parameters: Mapping[str, Any]) -> Round:
    """
    Begin the argument of one notebook about a subject; what it refutes is explained.

    Args:
        notebook: Its name, e.g. ``20_parity``.
        subject: As ``obtain`` gave it.
        out_dir: The run folder; empty for a temporary one (exploring, nbval).
        parameters: The notebook's parameters, kept in every record.
    """
    round_ = engines.open_round(notebook, subject, out_dir, parameters)
    round_.explain = Explainer(subject)
    return round_


class Explainer:
    """Explains the refutations of one subject; the file is examined once, whatever the number of claims."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._of_file: Diagnosis | None = None

    def __call__(self, evidence: Evidence) -> Sequence[Why]:
        """Return the chain of one FALSIFIED record, which is not written yet."""
        try:
            found = self._diagnosed(evidence)
            chain = found.whys[1:]
        except Exception as error:  # the refutation must be written, whatever a damaged file does to its explanation
            chain = (("Can it be explained?", f"no: {type(error).__name__}: {error}"),)
        whys = (symptom_of(evidence), *_own(evidence.whys), *chain, _guard(evidence))
        return [(question, answer[:_LONGEST]) for question, answer in whys]

    def _diagnosed(self, evidence: Evidence) -> Diagnosis:
        if self._of_file is None:
            subject, parity = self._subject, evidence.id.startswith("F-PAR")
            reference = subject.reference.path if subject.reference else None
            backend = subject.model if parity and subject.refusal is None else None
            found = explain_failure(subject.path, reference=reference, evidence=evidence, backend=backend)
            if not found.behind:
                self._of_file = found
            return found
        return self._of_file


def _own(whys: Sequence[Why]) -> Sequence[Why]:
    more = len(whys) - _MOST
    return (*whys[:_MOST], ("And the others?", f"{more} more of this kind, in its rows")) if more > 0 else whys


def _guard(evidence: Evidence) -> Why:
    c = evidence.claim
    sign = "<=" if c["direction"] == "at_most" else ">="
    limit = f"{c['metric']} {sign} {c['threshold']:g}"
    return "What guards against its return?", f"{c['id']}, version {c['version']}: exit 5 until {limit} holds"

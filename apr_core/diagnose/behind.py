"""
What a healthy file leaves as cause: its forward, our own copies of it, the clock, or the suite.

Which of them is asked follows from the claim that was refuted; each is asked by a measurement of its own.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from apr_core.diagnose.cause import Cause, Chain
from apr_core.diagnose.rates import explain_rate
from apr_core.diagnose.tensors import explain_tensors
from apr_core.diagnose.words import explain_words
from apr_core.engines.subject import Subject, obtain
from apr_core.errors import AprError, FormatError, LoadError
from apr_core.falsify.evidence import Evidence
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.model.trace import TracedForward
from apr_core.rosetta.copies import NoCopyError, copies_of
from apr_core.rosetta.diff import TensorDiff

OF_COPIES = ("F-GT-001", "F-GT-002", "F-GT-003", "F-GT-007", "F-GT-012", "F-PAR-011")
_SAID_OF_ANSWERS = "F-LAYOUT-CONTRACT-005"  # judges what a model generates: a healthy gate may refute it


def explain_behind(path: Path, symptom: Evidence | None, backend: TracedForward | None, chain: Chain) -> list[Cause]:
    """
    Explain a failure that is not the file's.

    Args:
        path: The healthy file.
        symptom: What was refuted.
        backend: The forward that failed on it; without one a record of notebook 20 has the float32 forward examined.
        chain: What was asked so far.
    """
    chain.ask("Is it the file?", "no: nothing in it needs an explanation")
    claim = symptom.id if symptom is not None else ""
    if claim in OF_COPIES:
        with closing(obtain(str(path), device="cpu")) as subject:
            return explain_copies(subject, chain)
    if backend is not None or claim.startswith("F-PAR"):
        return _backend(path, backend, chain)
    if symptom is not None and claim.startswith("F-THR"):
        return [chain.close(cause) for cause in explain_rate(claim, symptom.rows, symptom.reason)]
    if symptom is not None and symptom.claim["notebook"] == "10_contract_gates" and claim != _SAID_OF_ANSWERS:
        answer = f"no gate refuses anything of it, and {claim} is refuted: {symptom.reason}"
        repair = "mend the gate until it refuses its counter-examples, and nothing else"
        return [chain.close(Cause("suite", "Is it the gate itself?", answer, repair, op=claim))]
    return []


def _backend(path: Path, backend: TracedForward | None, chain: Chain) -> list[Cause]:
    """Hold the forward against the independent one."""
    from apr_core.diagnose.backend import POSITIONS, explain_backend

    with closing(obtain(str(path), device="cpu")) as subject:
        return explain_backend(backend or subject.model, subject.plain, subject.stimulus(POSITIONS).ids, chain)


def explain_copies(subject: Subject, chain: Chain) -> list[Cause]:
    """Diagnose our own copies of a healthy subject, as files with it as reference: the first damaged one speaks."""
    copies, own = copies_of(subject), subject.checkpoint
    asked: list[tuple[str, str | None]] = [(container, None) for container in copies.formats]
    for container, quantize in [*asked, ("gguf", "Q8_0"), ("gguf", "Q4_K_M")]:
        question = f"Is it our {quantize or container} copy?"
        try:
            with open_checkpoint(copies.path(container, quantize)) as copy:
                found, _ = explain_tensors(copy, own, Chain())
                found += explain_words(copy, own, tensors=bool(found))
            if not found and quantize is None:
                found = _other_types(copies.diffs[container])
        except NoCopyError as error:
            chain.ask(question, f"there is none: {error.message}")
            continue
        except (FormatError, LoadError) as error:
            found = [Cause("container", "Does it open?", error.message[:300])]
        except AprError as error:
            found = [Cause("container", "Can it be read?", error.message[:300])]
        if found:
            first = found[0]
            answer = f"yes: {first.klass} of {first.place or 'the file'}. {first.experiment} {first.found}"
            repair = "take the file itself: it is right, and so is each copy written without the fault"
            return [chain.close(Cause("converter", question, answer, repair, tensors=first.tensors, op=first.op))]
        chain.ask(question, f"no: {len(own.tensors)} tensors and the words say what the file says")
    return []


def _other_types(diff: TensorDiff) -> list[Cause]:
    """Tensors whose values are right, in another type than the converter had to write."""
    rows = [row for row in diff.rows if row.problem or row.mismatched]
    names = tuple(row.name for row in rows)
    return [Cause("codec", "Is its type the one asked for?", rows[0].sentence(), tensors=names)] if rows else []

"""
Round trips: convert and convert again, and see whether what comes out is what went in.

Judged by the fingerprint of the decoded values, by every value of every tensor, and by what travels beside them
(configuration, tokenizer, end tokens, chat template); the first that differs is named.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apr_core.errors import UsageError
from apr_core.falsify.verdict import Verdict
from apr_core.formats.checkpoint import Checkpoint, open_checkpoint
from apr_core.rosetta.convert import CONTAINERS, convert, lossless, named
from apr_core.rosetta.diff import TensorDiff, compare_tensors
from apr_core.rosetta.fingerprint import fingerprint
from apr_core.rosetta.identity import IdentityDiff, compare_identity

Progress = Callable[[str, int, int], None]  # what is done, bytes so far, bytes in all


@dataclass(frozen=True)
class Step:
    """One file of a trip: its container, fingerprint, and bytes on the disk."""

    format: str
    fingerprint: str
    nbytes: int


@dataclass(frozen=True)
class Comparison:
    """
    Does a file say what another says?

    Attributes:
        tensors: Value by value.
        identity: Configuration, tokenizer and so on.
        verdict: FALSIFIED when a value, a tensor or a field differs; INCONCLUSIVE when nothing was compared, or
            something could not be.
        reason: Why, with the first difference.
    """

    tensors: TensorDiff
    identity: IdentityDiff | None
    verdict: Verdict
    reason: str

    def as_json(self) -> dict[str, Any]:
        """The comparison as a report holds it."""
        return {
            "verdict": self.verdict.value,
            "reason": self.reason,
            "tensors": len(self.tensors.rows),
            "compared": self.tensors.compared,
            "expected": self.tensors.expected,
            "mismatched": self.tensors.mismatched,
            "missing": self.tensors.missing,
            "differing": [row.as_row() for row in self.tensors.rows if row.mismatched][:40],
            "fields": [field.as_row() for field in self.identity.fields] if self.identity else [],
            "not_compared": list(self.identity.missing) if self.identity else [],
        }


@dataclass(frozen=True)
class Trip:
    """
    What became of a model on its way.

    Attributes:
        steps: The source and every copy.
        comparison: The last copy against the source.
        verdict: As of the comparison; FALSIFIED too where a fingerprint changed without being asked to.
        reason: Why.
    """

    steps: Sequence[Step]
    comparison: Comparison
    verdict: Verdict
    reason: str

    def as_json(self) -> dict[str, Any]:
        """The trip as a report holds it."""
        return {
            "verdict": self.verdict.value,
            "reason": self.reason,
            "steps": [{"format": s.format, "fingerprint": s.fingerprint, "bytes": s.nbytes} for s in self.steps],
            "comparison": self.comparison.as_json(),
        }


def compare(
    subject: Checkpoint, reference: Checkpoint, *, exact: bool = False, identity: bool = True, pattern: str = ""
) -> Comparison:
    """
    Compare two files as wholes.

    Args:
        subject: The copy, or whatever claims to say the same.
        reference: What it should say.
        exact: Demand the same bits instead of the codecs' own bounds.
        identity: Compare configuration and tokenizer too.
        pattern: Compare the tensors alone whose name holds this text.
    """
    tensors = compare_tensors(subject, reference, exact=exact)
    if pattern:
        tensors = TensorDiff([row for row in tensors.rows if pattern in row.name], tensors.tied)
    fields = compare_identity(subject, reference) if identity else None
    return Comparison(tensors, fields, *_judge(tensors, fields))


def _judge(tensors: TensorDiff, identity: IdentityDiff | None) -> tuple[Verdict, str]:
    unlike = [row for row in tensors.rows if row.mismatched]
    if unlike:
        return Verdict.FALSIFIED, f"{len(unlike)} of {len(tensors.rows)} tensors differ: {unlike[0].sentence()}"
    if identity is not None and identity.differences:
        field = identity.differences[0]
        said = field.note or f"{field.subject!r:.60}, expected {field.reference!r:.60}"
        return Verdict.FALSIFIED, f"{len(identity.differences)} fields differ: {field.name}, {said}"
    left_out = [*tensors.missing, *(identity.missing if identity else ())]
    if left_out:
        return Verdict.INCONCLUSIVE, f"not compared: {'; '.join(left_out[:3])}"
    if not tensors.compared:
        return Verdict.INCONCLUSIVE, "no value was compared"
    return Verdict.CORROBORATED, ""


def chain(
    source: Checkpoint,
    formats: Sequence[str],
    *,
    quantize: str | None = None,
    folder: Path | None = None,
    bare: bool = False,
    progress: Progress | None = None,
) -> Trip:
    """
    Convert from format to format, and compare the last copy with the source.

    Args:
        source: Where it starts.
        formats: At least one of `CONTAINERS`; the same one twice in a row is a mistake.
        quantize: What the first copy is asked to be; every later one keeps its types.
        folder: Where the copies go and stay; a temporary one that vanishes by default.
        bare: As `convert`.
        progress: Called while writing.

    Raises:
        UsageError: An unknown format, or a type that one of them cannot hold.
        AprError: As `convert`.
    """
    unknown = [name for name in formats if name not in CONTAINERS]
    if unknown or not formats or any(a == b for a, b in itertools.pairwise(formats)):
        raise UsageError(
            f"expected formats of {', '.join(CONTAINERS)}, none twice in a row, found {' '.join(formats) or 'none'}"
        )
    work = Path(tempfile.mkdtemp(prefix="apr-chain-")) if folder is None else folder
    work.mkdir(parents=True, exist_ok=True)
    opened: list[Checkpoint] = []
    try:
        before, steps = source, [Step(source.format, fingerprint(source).digest, _nbytes(source))]
        for number, container in enumerate(formats, start=1):
            target = named(work / f"{number}-{container}", container)
            total = sum(info.nbytes for info in before.tensors.values())

            def step(done: int, label: str = container, total: int = total) -> None:
                if progress is not None:
                    progress(f"writing {label}", done, total)

            asked = quantize if number == 1 else None
            convert(before, target, quantize=asked, bare=bare, progress=step)
            before = open_checkpoint(target)
            opened.append(before)
            steps.append(Step(container, fingerprint(before).digest, _nbytes(before)))
        found = compare(before, source, exact=quantize is None)
        return Trip(tuple(steps), found, *_judge_trip(steps, found, quantize))
    finally:
        for copy in opened:
            copy.close()
        if folder is None:
            shutil.rmtree(work, ignore_errors=True)


def _judge_trip(steps: Sequence[Step], found: Comparison, quantize: str | None) -> tuple[Verdict, str]:
    """Add what only the way shows: a fingerprint that changed where nothing should change."""
    kept = steps if quantize is None else steps[1:]
    changed = [step.format for before, step in itertools.pairwise(kept) if before.fingerprint != step.fingerprint]
    if changed and found.verdict is not Verdict.FALSIFIED:
        return Verdict.FALSIFIED, f"the fingerprint changed on the way to {changed[0]}"
    return found.verdict, found.reason


def round_trip(
    source: Checkpoint, intermediate: str | None = None, *, bare: bool = False, progress: Progress | None = None
) -> Trip:
    """
    Convert to another format and back.

    Args:
        source: What is to survive.
        intermediate: The format between; by default the first one that can hold every type of the source.
        bare: As `convert`.
        progress: Called while writing.

    Raises:
        UsageError: No other format, or not the one that was asked for, can hold the types.
        AprError: As `convert`.
    """
    if intermediate is None:
        able = [c for c in CONTAINERS if c != source.format and lossless(source, c) is None]
        if not able:
            raise UsageError(f"no other format holds every type of {source.path}", advice="convert it to F16 first")
        intermediate = able[0]
    return chain(source, [intermediate, source.format], bare=bare, progress=progress)


def _nbytes(checkpoint: Checkpoint) -> int:
    return sum(path.stat().st_size for path in checkpoint.files)

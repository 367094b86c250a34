"""What one measurement found, and the registry that ties each measurement to the claim it tries to refute."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from apr_core.falsify.claims import load_claims
from apr_core.falsify.verdict import NotRun, Verdict, holds


@dataclass(frozen=True, eq=False)
class Finding:
    """
    The result of one measurement, not yet judged.

    Attributes:
        value: The measured value in the claim's unit; None when nothing could be measured.
        compared: How many things were compared (elements, positions, tokens, cases).
        expected: How many should have been.
        nonfinite: How many of them were NaN or infinite.
        missing: Names that were not compared.
        detail: A phrase for the canonical line: integers only, stable across machines.
        rows: A small table, one mapping per row.
        arrays: Named arrays for figures.
        whys: (question, answer with numbers), filled where the value breaks its limit.
        reference: What the candidate was compared with.
        noise_floor: The value that two healthy sides show, in the claim's unit.
        inconclusive: Why the measurement decides nothing, e.g. both sides are one object.
        not_run: Why nothing was measured.
        blame: For REFUSED: the gate and the tensor.
        claim: Id of the claim, set by ``act``.
        rows_omitted: Rows beyond those that are kept.
        reused: The attempt in which it was measured, when it was taken over from an earlier run.
    """

    value: float | None
    compared: int
    expected: int
    nonfinite: int = 0
    missing: Sequence[str] = ()
    detail: str = ""
    rows: Sequence[Mapping[str, object]] = ()
    arrays: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    whys: Sequence[tuple[str, str]] = ()
    reference: str = ""
    noise_floor: float | None = None
    inconclusive: str = ""
    not_run: NotRun | None = None
    blame: str = ""
    claim: str = ""
    rows_omitted: int = 0
    reused: str = ""

    @classmethod
    def nothing(cls, reason: NotRun, blame: str = "") -> Finding:
        """A measurement that did not take place."""
        return cls(value=None, compared=0, expected=0, not_run=reason, blame=blame)

    def judge(self, *, bypassed: bool = False) -> tuple[Verdict, str]:
        """
        Judge the value against the threshold of its claim.

        Returns:
            The verdict and its reason. Zero compared is never CORROBORATED; a non-finite value is FALSIFIED; part of
            the comparison missing is INCONCLUSIVE unless what was compared already refutes.
        """
        claim = load_claims()[self.claim]
        if self.not_run is not None:
            return Verdict.NOT_RUN, f"{self.not_run}: {self.blame}" if self.blame else str(self.not_run)
        if self.inconclusive:
            return Verdict.INCONCLUSIVE, self.inconclusive
        if self.compared <= 0:
            return Verdict.INCONCLUSIVE, "nothing was compared"
        if self.nonfinite or self.value is None or not math.isfinite(self.value):
            return Verdict.FALSIFIED, f"{self.nonfinite or 1} of {self.compared} values are not finite"
        if not holds(self.value, claim.direction, claim.threshold):
            number = f"{self.value:.0f}" if claim.unit == "count" else f"{self.value:.3g}"
            return Verdict.FALSIFIED, f"{claim.metric} is {number}{claim.suffix}, the limit is {claim.limit}"
        if self.compared < self.expected or self.missing:
            named = ", ".join(list(self.missing)[:3])
            return Verdict.INCONCLUSIVE, f"compared {self.compared} of {self.expected}; missing: {named or 'unnamed'}"
        if bypassed:
            return Verdict.INCONCLUSIVE, "the contract was bypassed (--skip-contract)"
        return Verdict.CORROBORATED, ""


class HasNeeds(Protocol):
    """What ``act`` must know of a subject: its refusal and what it lacks."""

    @property
    def refusal(self) -> str | None:
        """Gate and tensor of the refusal, or None."""
        ...

    @property
    def lacks(self) -> Mapping[str, str]:
        """Need -> reason, for the needs that are not met."""
        ...


S = TypeVar("S", bound=HasNeeds)
ACTS: dict[str, Callable[[Any], Finding]] = {}
# Notebook -> modules whose import registers the measurements of its claims.
_MEASURED_IN = {
    "00_ground_truth": ("rosetta.acts",),
    "10_contract_gates": ("zoo.acts",),
    "20_parity": ("parity.acts", "bench.release"),
    "30_throughput": ("bench.acts",),
}


def load_acts(notebook: str) -> None:
    """Have a measurement in `ACTS` for every claim of a notebook."""
    for module in _MEASURED_IN[notebook]:
        importlib.import_module(f"apr_core.{module}")


def act(claim_id: str) -> Callable[[Callable[[S], Finding]], Callable[[S], Finding]]:
    """
    Register the one measurement that can refute a claim.

    The wrapped function returns NOT_RUN without measuring when the subject was refused (unless the claim is a gate) or
    lacks what the claim needs, so the reason comes from probing the subject in one place.

    Raises:
        KeyError: The claim is not in the table.
        ValueError: The claim has a measurement already; the second would never be judged.
    """
    claim = load_claims()[claim_id]

    def register(measure: Callable[[S], Finding]) -> Callable[[S], Finding]:
        if claim_id in ACTS:
            raise ValueError(f"{claim_id} is measured by {ACTS[claim_id].__name__} already")

        @functools.wraps(measure)
        def attempt(subject: S) -> Finding:
            if subject.refusal is not None and not claim.on_refused:
                return replace(Finding.nothing(NotRun.REFUSED, subject.refusal), claim=claim_id)
            for need in claim.needs:
                if need in subject.lacks:
                    return replace(Finding.nothing(NotRun(subject.lacks[need])), claim=claim_id)
            # A subject whose round was opened with --reuse brings what an earlier run decided of the same bytes.
            known: Mapping[str, Finding] = getattr(subject, "decided", {})
            return known.get(claim_id) or replace(measure(subject), claim=claim_id)

        ACTS[claim_id] = attempt
        return attempt

    return register

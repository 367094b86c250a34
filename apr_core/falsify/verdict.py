"""The four verdicts, the closed list of reasons for not running, and the one place that judges a value."""

from __future__ import annotations

import math
from enum import StrEnum


class Verdict(StrEnum):
    """
    Outcome of one attempt to refute a claim.

    A verdict has no truth value: ``if verdict:`` would read NOT_RUN as success, which is how skipped gates passed.
    """

    CORROBORATED = "CORROBORATED"
    FALSIFIED = "FALSIFIED"
    INCONCLUSIVE = "INCONCLUSIVE"
    NOT_RUN = "NOT_RUN"

    def __bool__(self) -> bool:
        raise TypeError("a verdict has no truth value; compare it with Verdict.CORROBORATED and the others")


class NotRun(StrEnum):
    """Every reason for which a claim may be left alone; decided by probing, never by reading an error text."""

    NO_CUDA = "no CUDA device"
    NO_PEER = "peer absent"
    NO_REFERENCE = "no reference given"
    NO_GOLDEN = "no golden answers with this model"
    NO_TOKENIZER = "no tokenizer"
    UNTRAINED = "untrained model"
    NOT_APPLICABLE = "not applicable to this format"
    REFUSED = "refused by the contract"
    NOT_OPENED = "subject could not be opened"


# What a claim may need, and the reason given where it is missing.
NEEDS: dict[str, NotRun] = {
    "cuda": NotRun.NO_CUDA,
    "peer": NotRun.NO_PEER,
    "reference": NotRun.NO_REFERENCE,
    "golden": NotRun.NO_GOLDEN,
    "golden_logits": NotRun.NO_GOLDEN,
    "tokenizer": NotRun.NO_TOKENIZER,
    "template": NotRun.NOT_APPLICABLE,
    "trained": NotRun.UNTRAINED,
}


def holds(value: float | None, direction: str, threshold: float) -> bool:
    """
    Say whether a measured value keeps within its limit; written so that NaN and None do not.

    Args:
        value: Measured value in the unit of the claim.
        direction: ``at_most`` or ``at_least``.
        threshold: The limit, inclusive on both sides.
    """
    if value is None or math.isnan(value):
        return False
    return value <= threshold if direction == "at_most" else value >= threshold

"""Claims against actuals: what somebody says a model does per second, and the attempts to refute it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from apr_core.errors import UsageError
from apr_core.falsify.verdict import Verdict

METRICS = ("decode_tok_s", "prefill_tok_s", "ttft_s", "tpot_p99_s")
WRONG_TOKENS = "the timed tokens are not the right ones"
_SMALLER_IS_BETTER = ("ttft_s", "tpot_p99_s")


@dataclass(frozen=True)
class Claimed:
    """
    A number that was claimed, and what became of it.

    Attributes:
        metric: One of `METRICS`.
        claimed: The number.
        measured: What was measured here.
        verdict: FALSIFIED when the ceiling or the measurement refutes it; INCONCLUSIVE when the tokens were wrong.
        reason: In words.
        needs_gb_s: What reading the weights so often takes; None for a metric that says nothing of it.
        reads_gb_s: What this machine reads.
    """

    metric: str
    claimed: float
    measured: float
    verdict: Verdict
    reason: str
    needs_gb_s: float | None = None
    reads_gb_s: float | None = None

    @property
    def row(self) -> dict[str, object]:
        """The number and its fate, as evidence keeps them."""
        return {**asdict(self), "verdict": str(self.verdict)}


def parse_claim(text: str) -> tuple[str, float]:
    """
    Read ``decode_tok_s=285.5``.

    Raises:
        UsageError: No such metric, or no positive number.
    """
    metric, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if metric not in METRICS or not 0 < number < math.inf:
        raise UsageError(f"expected --claim METRIC=NUMBER with {', '.join(METRICS)}, found {text!r}")
    return metric, number


def judge_claim(
    metric: str, claimed: float, measured: float, interval: tuple[float, float], *, read_gb_s: float, read_bytes: int,
    tokens_right: bool,
) -> Claimed:  # fmt: skip
    """
    Try to refute a claimed number: first by the ceiling, then by the measurement and its interval.

    Args:
        metric: One of `METRICS`.
        claimed: The number.
        measured: Median of this run, in the same unit.
        interval: Its 95 % interval.
        read_gb_s: Best read bandwidth of this run.
        read_bytes: Bytes that one token reads.
        tokens_right: Whether the timed tokens were the right ones; a rate of wrong ones says nothing.
    """
    needed = claimed * read_bytes / 1e9
    held = Claimed(metric, claimed, measured, Verdict.CORROBORATED, "")
    if metric == "decode_tok_s":
        held = replace(held, needs_gb_s=needed, reads_gb_s=read_gb_s)
        if needed > read_gb_s:
            words = f"{claimed:g} tok/s needs {needed:.3g} GB/s; this machine reads {read_gb_s:.3g}"
            return replace(held, verdict=Verdict.FALSIFIED, reason=words)
    if not tokens_right:
        return replace(held, verdict=Verdict.INCONCLUSIVE, reason=WRONG_TOKENS)
    low, high = interval
    reached = low <= claimed if metric in _SMALLER_IS_BETTER else claimed <= high
    if not reached:
        words = f"measured {measured:.4g} ({low:.4g} to {high:.4g}), claimed {claimed:g}"
        return replace(held, verdict=Verdict.FALSIFIED, reason=words)
    return held

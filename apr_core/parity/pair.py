"""
One model file against another: the same weights in two containers, or a quantised file and its source.

Same weights are held to the noise floor of the forward. Other weights are held to a yardstick that knows this very
model: the finer file's weights, rounded to the coarser file's types with our own encoder. Absolute tables cannot do it:
one type costs a trained model a hundredth of a nat and a random one half a nat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apr_core.engines.load import load_model
from apr_core.engines.subject import Subject
from apr_core.falsify.verdict import Verdict
from apr_core.formats.checkpoint import Checkpoint
from apr_core.model.generate import follow
from apr_core.model.trace import Trace, mandatory_names
from apr_core.parity.compare import LOGITS, ParityReport, compare
from apr_core.parity.distribution import F64, DistributionParity, resampled
from apr_core.parity.floor import noise_floor, path
from apr_core.parity.noise import rounded_like, trace_copy
from apr_core.parity.tolerances import FACTOR, KL_CAP, KL_FLOOR, QUANTISED_TAU, YARDSTICK, Tolerance, decisive_margin

Ids = NDArray[np.int64]
# A cost over its limit, and the bounds of its 95 % interval.
Ratio = tuple[float, float, float]
# The square of what F-PAR-001 allows the same weights; and the corrupt band of peers.md E5.
NMSE_FLOOR, NMSE_CAP = 1e-10, 0.5


@dataclass(frozen=True, eq=False)
class Yardstick:
    """
    What honest rounding to a file's types costs the model that it was made from.

    Attributes:
        report: The rounded copy against the reference.
        unwritten: Types that our encoder does not write: their tensors carry noise instead, and the limit is wider.
    """

    report: ParityReport
    unwritten: tuple[str, ...]

    @property
    def factor(self) -> float:
        """How many times the yardstick's KL a file may cost."""
        return FACTOR if self.unwritten else YARDSTICK

    def limit(self) -> Tolerance:
        """Limit on the mean KL, nat."""
        if self.report.logits is None:
            return Tolerance(0.0, "the copy has no logits")
        limit = min(KL_CAP, max(KL_FLOOR, self.factor * self.report.logits.kl_mean))
        return Tolerance(limit, f"{self.factor:g} x the mean KL of {self.made}")

    @property
    def made(self) -> str:
        """What the copy is."""
        by = f"noise for {', '.join(self.unwritten)} (decision 0003)" if self.unwritten else "our encoder (0013)"
        return f"the reference rounded to the same types by {by}"

    def ratio(self, found: DistributionParity) -> Ratio:
        """
        Return mean KL over its limit, and the bounds of its 95 % interval, by resampling positions of both together.

        The lower bound decides: a file is refuted when even that is above 1.
        """
        assert self.report.logits is not None
        return self._ratio(found.kl, self.report.logits.kl, KL_FLOOR, KL_CAP)

    def nmse_ratio(self, found: ParityReport) -> Ratio:
        """Return the mean NMSE of the logits over its limit, as `ratio`: it sees an offset, which KL cannot."""
        mine, price = (side.names[LOGITS].rel_l2 ** 2 for side in (found, self.report))
        return self._ratio(mine, price, NMSE_FLOOR, NMSE_CAP)

    def _ratio(self, found: F64, price: F64, floor: float, cap: float) -> Ratio:
        both = np.stack([found, price])
        if not np.isfinite(both).all():
            return np.nan, np.nan, np.nan

        def over(means: F64) -> F64:
            limits: F64 = np.clip(self.factor * means[:, 1], floor, cap)
            return means[:, 0] / limits

        low, high = np.quantile(over(resampled(both)), [0.025, 0.975])
        return float(over(both.mean(axis=1)[None])[0]), float(low), float(high)


@dataclass(frozen=True, eq=False)
class Pair:
    """
    Two files on the same tokens, through the cache.

    Attributes:
        report: The candidate against the reference.
        control: Both are the same bytes.
        same_weights: Every tensor decodes to the same values.
        yardstick: For other weights.
        limits: For the same weights: on rel_l2, per name.
        ratio: Mean KL over its limit with its 95 % interval; for other weights.
        nmse_ratio: Likewise of the logits' NMSE.
        verdict: What follows.
        reason: Why not CORROBORATED, or empty.
        turned: The second file is the finer one, so it was taken as the reference.
    """

    verdict: Verdict
    reason: str
    report: ParityReport | None = None
    control: bool = False
    same_weights: bool = False
    yardstick: Yardstick | None = None
    limits: Mapping[str, float] | None = None
    ratio: Ratio | None = None
    nmse_ratio: Ratio | None = None
    turned: bool = False


def incomparable(reference: Subject, candidate: Subject) -> str:
    """Say why two models cannot be held against each other, or nothing."""
    for side, subject in (("reference", reference), ("candidate", candidate)):
        if subject.refusal is not None:
            return f"the {side} was refused: {subject.refusal}"
    sizes = reference.model.config.vocab_size, candidate.model.config.vocab_size
    if sizes[0] != sizes[1]:
        return f"a vocabulary of {sizes[1]} cannot be held against one of {sizes[0]}; see F-GT-011"
    layers = reference.model.config.num_hidden_layers, candidate.model.config.num_hidden_layers
    return f"{layers[1]} layers cannot be held against {layers[0]}" if layers[0] != layers[1] else ""


def hold(first: Subject, second: Subject, ids: Ids, prompt: int) -> Pair:
    """
    Hold two files against each other, teacher-forced through the cache.

    Args:
        first: The reference, unless the second has the finer types.
        second: The candidate.
        ids: What both are fed.
        prompt: Tokens of the prefill; each further one is a cached step.
    """
    why_not = incomparable(first, second)
    if why_not:
        return Pair(Verdict.INCONCLUSIVE, why_not)
    control = first.checkpoint.content_hash == second.checkpoint.content_hash
    turned = bits_per_weight(second.checkpoint) > bits_per_weight(first.checkpoint)
    reference, candidate = (second, first) if turned else (first, second)
    truth, found = (follow(side.model, ids, prompt, full=True) for side in (reference, candidate))
    if same_weights(reference, candidate):
        floor = noise_floor(reference.admission.require(), path(ids, prompt))
        tau: float | F64 = decisive_margin(truth["logits"], floor.limits["logits"])
        report = _compare(truth, found, reference, tau, ids)
        verdict, reason = report.judge(floor.limits)
        return Pair(verdict, reason, report, control, True, limits=floor.limits, turned=turned)
    report = _compare(truth, found, reference, QUANTISED_TAU, ids)
    if report.logits is None or report.nonfinite:
        return Pair(*report.judge(np.inf), report, turned=turned)
    measure = yardstick(reference, candidate.checkpoint, truth, ids, prompt)
    ratio, nmse_ratio = measure.ratio(report.logits), measure.nmse_ratio(report)
    verdict, reason = _within(ratio, nmse_ratio, measure)
    return Pair(verdict, reason, report, yardstick=measure, ratio=ratio, nmse_ratio=nmse_ratio, turned=turned)


def yardstick(reference: Subject, types: Checkpoint, truth: Trace, ids: Ids, prompt: int) -> Yardstick:
    """Round the reference to the types of another file with our own encoder, and hold the copy against it."""
    change, unwritten = rounded_like(types, reference.seed)
    copy = trace_copy(reference.admission.require(), change, load_model, path(ids, prompt))
    return Yardstick(_compare(truth, copy, reference, QUANTISED_TAU, ids), unwritten)


def same_weights(one: Subject, other: Subject) -> bool:
    """Tell whether every tensor of both decodes to the same values."""
    left, right = (side.admission.require().tensors for side in (one, other))
    return left.keys() == right.keys() and all(np.array_equal(left[n].values(), right[n].values()) for n in left)


def bits_per_weight(checkpoint: Checkpoint) -> float:
    """Stored bits per element over all tensors."""
    elements = sum(int(np.prod(t.shape, dtype=object)) for t in checkpoint.tensors.values())
    return 8 * sum(t.nbytes for t in checkpoint.tensors.values()) / max(1, elements)


def is_rung(finer: DistributionParity, coarser: DistributionParity) -> tuple[Verdict, str]:
    """
    Say whether of two copies of one model the one with more bits costs no more: a check that needs no limit.

    Args:
        finer: The copy with more bits per weight, out of their source, on the same positions as the other.
        coarser: The one with fewer.

    Returns:
        FALSIFIED where even the lower bound of the 95 % interval of the difference in KL is above zero.
    """
    means = resampled(np.stack([finer.kl, coarser.kl]))
    low = float(np.quantile(means[:, 0] - means[:, 1], 0.025))
    if low <= 0:
        return Verdict.CORROBORATED, ""
    return Verdict.FALSIFIED, (
        f"mean KL {finer.kl_mean:.3g} nat with more bits per weight, {coarser.kl_mean:.3g} with fewer "
        f"(the difference is at least {low:.2g})"
    )


def _compare(truth: Trace, found: Trace, reference: Subject, tau: float | F64, ids: Ids) -> ParityReport:
    names = mandatory_names(reference.model.config.num_hidden_layers)
    return compare(truth, found, expect=names, tau=tau, tokens=np.append(ids[1:], -1))


def _within(kl: Ratio, nmse: Ratio, measure: Yardstick) -> tuple[Verdict, str]:
    """Refute where the lower bound of either is beyond its limit; written so that NaN is."""
    for what, (value, low, high) in (("mean KL", kl), ("mean NMSE of the logits", nmse)):
        if not low <= 1:
            return Verdict.FALSIFIED, (
                f"the {what} is {value:.3g} times its limit (95 % interval {low:.3g} to {high:.3g}): "
                f"{measure.factor:g} x that of {measure.made}"
            )
    return Verdict.CORROBORATED, ""

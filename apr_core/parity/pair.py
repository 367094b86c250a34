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
from apr_core.formats import names
from apr_core.formats.checkpoint import Checkpoint
from apr_core.model.generate import follow
from apr_core.model.trace import Trace, TracedForward, mandatory_names
from apr_core.parity.compare import LOGITS, ParityReport, compare
from apr_core.parity.distribution import F64, DistributionParity, resampled
from apr_core.parity.floor import noise_floor, path
from apr_core.parity.noise import rounded_like, trace_copy
from apr_core.parity.tolerances import (
    FACTOR,
    KL_CAP,
    KL_FLOOR,
    NMSE_CAP,
    NMSE_FLOOR,
    QUANTISED_TAU,
    YARDSTICK,
    decisive_margin,
)

Ids = NDArray[np.int64]
ENCODED = "the plain numpy reference of our encoder (decision 0013)"


@dataclass(frozen=True, eq=False)
class Yardstick:
    """
    What honest rounding to a file's types costs the model that it was made from.

    Attributes:
        report: The rounded copy against the reference.
        writer: What the file names as its encoder, or nothing. Ours is held to the same plain numpy reference, never
            to the compiled code that wrote the file.
        unwritten: Types that our encoder does not write: their tensors carry noise instead, and the limit is wider.
    """

    report: ParityReport
    unwritten: tuple[str, ...]
    writer: str = ""

    @property
    def factor(self) -> float:
        """How many times the yardstick's KL a file may cost."""
        return FACTOR if self.unwritten else YARDSTICK

    @property
    def source(self) -> str:
        """Where the limits come from."""
        made = f"noise for {', '.join(self.unwritten)} (decision 0003)" if self.unwritten else ENCODED
        if not self.unwritten and self.writer == "apr_core":
            made = f"{ENCODED}, which the file names as its writer"
        return f"{self.factor:g} x the mean KL and NMSE of the reference rounded to the same types by {made}"

    def limits(self) -> dict[str, float]:
        """Return the limit on the mean over positions of each cost."""
        return {name: float(_bounded(name, self.factor * cost.mean())) for name, cost in costs(self.report).items()}

    def ratios(self, found: ParityReport) -> dict[str, tuple[float, float, float]]:
        """
        Return each mean cost over its limit, with the bounds of its 95 % interval, by resampling positions of both.

        The lower bound decides: a file is refuted when even that is above 1.
        """
        copy, limits = costs(self.report), self.limits()
        return {name: self._ratio(name, cost, copy[name], limits[name]) for name, cost in costs(found).items()}

    def _ratio(self, name: str, cost: F64, copy: F64, limit: float) -> tuple[float, float, float]:
        both = np.stack([cost, copy])
        if not np.isfinite(both).all():
            return np.nan, np.nan, np.nan
        means = resampled(both)
        low, high = np.quantile(means[:, 0] / _bounded(name, self.factor * means[:, 1]), [0.025, 0.975])
        return float(cost.mean()) / limit, float(low), float(high)

    def rows(self, found: ParityReport) -> list[dict[str, object]]:
        """One row per cost: the file's, the copy's, the limit."""
        mine, copy = ({n: float(c.mean()) for n, c in costs(side).items()} for side in (found, self.report))
        return [
            {"name": f"{n}_mean", "subject": mine[n], "copy": copy[n], "limit": limit, "source": self.source}
            for n, limit in self.limits().items()
        ]

    def said(self, found: ParityReport) -> str:
        """Say by how much each cost misses its limit."""
        mine, limits = costs(found), self.limits()
        parts = [
            f"mean {name.upper()} {mine[name].mean():.3g}, {value:.3g} times its limit of {limits[name]:.3g} "
            f"(95 % interval {low:.3g} to {high:.3g})"
            for name, (value, low, high) in self.ratios(found).items()
        ]
        return f"{'; '.join(parts)}; the limit is {self.source}"


def costs(report: ParityReport) -> dict[str, F64]:
    """Per position: KL in nat, which sees a scale, and NMSE of the logits, which sees an offset."""
    if report.logits is None:
        return {}
    return {"kl": report.logits.kl, "nmse": report.names[LOGITS].rel_l2 ** 2}


def _bounded(name: str, limit: F64 | float) -> F64:
    """Keep a limit above what float32 does to the same weights and below what another model does."""
    low, high = (KL_FLOOR, KL_CAP) if name == "kl" else (NMSE_FLOOR, NMSE_CAP)
    return np.clip(np.asarray(limit, np.float64), low, high)


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
        ratios: Mean KL and NMSE over their limits with 95 % intervals; for other weights.
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
    ratios: Mapping[str, tuple[float, float, float]] | None = None
    turned: bool = False


def incomparable(reference: Subject, candidate: Subject) -> str:
    """Say why two models cannot be held against each other, or nothing."""
    for side, subject in (("reference", reference), ("candidate", candidate)):
        if subject.refusal is not None:
            return f"the {side} was refused: {subject.refusal}"
    one, other = reference.admission.require().geometry, candidate.admission.require().geometry
    if one.vocab_size != other.vocab_size:
        return f"a vocabulary of {other.vocab_size} cannot be held against one of {one.vocab_size}; see F-GT-011"
    if one.num_hidden_layers != other.num_hidden_layers:
        return f"{other.num_hidden_layers} layers cannot be held against {one.num_hidden_layers}"
    return ""


def hold(first: Subject, second: Subject, ids: Ids, prompt: int, engine: TracedForward | None = None) -> Pair:
    """
    Hold two files against each other, teacher-forced through the cache.

    Args:
        first: The reference, unless the second has the finer types.
        second: The candidate.
        ids: What both are fed.
        prompt: Tokens of the prefill; each further one is a cached step.
        engine: What runs the second, in place of the torch reference.
    """
    why_not = incomparable(first, second)
    if why_not:
        return Pair(Verdict.INCONCLUSIVE, why_not)
    control = first.checkpoint.content_hash == second.checkpoint.content_hash
    turned = bits_per_weight(second.checkpoint) > bits_per_weight(first.checkpoint)
    reference, candidate = (second, first) if turned else (first, second)
    models = {first: first.model, second: engine or second.model}
    truth, found = (follow(models[side], ids, prompt, full=True) for side in (reference, candidate))
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
    ratios = measure.ratios(report)
    within = all(low <= 1 for _, low, _ in ratios.values())
    verdict, reason = (Verdict.CORROBORATED, "") if within else (Verdict.FALSIFIED, measure.said(report))
    return Pair(verdict, reason, report, yardstick=measure, ratios=ratios, turned=turned)


def yardstick(reference: Subject, types: Checkpoint, truth: Trace, ids: Ids, prompt: int) -> Yardstick:
    """Round the reference to the types of another file with our own encoder, and hold the copy against it."""
    change, unwritten = rounded_like(types, reference.seed)
    copy = trace_copy(reference.admission.require(), change, load_model, path(ids, prompt))
    writer = str(types.metadata.get(names.ENCODER, ""))
    return Yardstick(_compare(truth, copy, reference, QUANTISED_TAU, ids), unwritten, writer)


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

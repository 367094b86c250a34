"""
Next-token distributions of two forwards over the same positions, and what can be said about them.

KL sees what a cosine cannot (a scale), ``rel_l2`` what KL cannot (an offset). All arithmetic is float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
F64 = NDArray[np.float64]

TOP_K = 10
# Rows of logits handled at once: 32 rows of a 152k vocabulary are 39 MB in float64.
_ROWS = 32
_RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class DistributionParity:
    """
    The next-token distributions of both sides, one entry per position.

    Attributes:
        kl: Divergence of the candidate from the reference, in nat.
        total_variation: Half the summed absolute difference of the probabilities, 0 to 1.
        margin: The reference's top logit minus its second, in nat.
        tau: The margin up to which a flip is a near-tie.
        flipped: True where the top tokens differ.
        top_k_overlap: Share of the reference's ten likeliest tokens among the candidate's ten.
        delta_p: Change of the probability of one token: the one that the text goes on with, where it is known, and the
            reference's top token otherwise.
        norm_difference: Difference of the norms over the reference's norm, absolute: the specification's rule. For
            people, never for a verdict: it is zero for a permutation and for a change of sign.
        nll: Surprise at the token that the text goes on with, nat, [2, positions]: reference, candidate; NaN where it
            is not known.
    """

    kl: F64
    total_variation: F64
    margin: F64
    tau: F64
    flipped: NDArray[np.bool_]
    top_k_overlap: F64
    delta_p: F64
    norm_difference: F64
    nll: F64

    @property
    def kl_mean(self) -> float:
        """Mean over positions, nat."""
        return float(self.kl.mean())

    @property
    def kl_median(self) -> float:
        """Median over positions, nat."""
        return float(np.median(self.kl))

    @property
    def kl_p999(self) -> float:
        """The 99.9th percentile, nat."""
        return float(np.quantile(self.kl, 0.999))

    @property
    def kl_max(self) -> float:
        """Largest over positions, nat; NaN when one is."""
        return float(self.kl.max())

    @property
    def decisive(self) -> NDArray[np.bool_]:
        """Where the reference's margin exceeds tau."""
        return self.margin > self.tau

    @property
    def decisive_flips(self) -> tuple[int, ...]:
        """Positions where another top token refutes."""
        return tuple(int(i) for i in np.flatnonzero(self.flipped & self.decisive))

    @property
    def near_tie_flips(self) -> tuple[int, ...]:
        """Positions where another top token is rounding."""
        return tuple(int(i) for i in np.flatnonzero(self.flipped & ~self.decisive))

    @property
    def top1_agreement(self) -> float:
        """Share of the decisive positions with the same top token; NaN when none is decisive."""
        count = int(self.decisive.sum())
        return 1 - len(self.decisive_flips) / count if count else math.nan

    @property
    def delta_p_rms(self) -> float:
        """Root mean square change of the token's probability."""
        return float(np.sqrt(np.mean(self.delta_p**2)))

    @property
    def perplexity(self) -> tuple[float, float]:
        """Of reference and candidate, over the tokens that the text goes on with; NaN where none is known."""
        known = ~np.isnan(self.nll).all(axis=0)
        if not known.any():
            return math.nan, math.nan
        with np.errstate(over="ignore"):
            reference, candidate = np.exp(self.nll[:, known].mean(axis=1))
        return float(reference), float(candidate)

    def kl_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of the mean KL over positions, nat; seeded, so that it can be repeated."""
        return bootstrap(self.kl, level)


def bootstrap(values: F64, level: float = 0.95) -> tuple[float, float]:
    """
    Interval of the mean of ``values`` [positions] by resampling positions; seeded.

    Neighbouring positions of one text are not independent, so the interval is on the narrow side.
    """
    if not np.isfinite(values).all():
        return math.nan, math.nan
    low, high = np.quantile(resampled(values[None])[:, 0], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resampled(columns: F64) -> F64:
    """Return means [resamples, columns] of ``columns`` [columns, positions] over positions drawn anew, in step."""
    positions = columns.shape[1]
    chosen = np.random.default_rng(0).integers(0, positions, (_RESAMPLES, positions))
    return np.stack([column[chosen].mean(axis=1) for column in columns], axis=1)


def compare_logits(
    reference: Array, candidate: Array, tau: float | F64 = 0.0, tokens: NDArray[np.int64] | None = None
) -> DistributionParity:
    """
    Measure the next-token distributions of logits [positions, vocabulary], at least two tokens wide.

    Args:
        reference: Logits.
        candidate: Logits of the same positions.
        tau: The margin in nat up to which a flipped top token is a near-tie; one number, or one per position.
        tokens: The token that the text goes on with behind each position; -1 where it ends.
    """
    follows = np.full(len(reference), -1) if tokens is None else tokens
    parts = [_distributions(reference[rows], candidate[rows], follows[rows]) for rows in chunks(len(reference))]
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    kl, variation, margin, flipped, overlap, delta_p, norm_difference, *nll = columns
    taus = np.broadcast_to(np.asarray(tau, np.float64), kl.shape).copy()
    flips = flipped.astype(bool)
    return DistributionParity(kl, variation, margin, taus, flips, overlap, delta_p, norm_difference, np.stack(nll))


def _distributions(reference: Array, candidate: Array, follows: NDArray[np.int64]) -> tuple[F64, ...]:
    log_p, log_q = log_softmax(reference), log_softmax(candidate)
    p, q = np.exp(log_p), np.exp(log_q)
    with np.errstate(invalid="ignore"):
        # Each term p ln(p/q) - p + q is >= 0, so nothing cancels: measured 10 to 100 times closer than the plain sum,
        # whose rounding alone is a KL of 1e-15.
        kl = (p * (log_p - log_q) - p + q).sum(axis=1)
        variation = np.abs(p - q).sum(axis=1) / 2
    k = min(TOP_K, reference.shape[1])
    top_p, top_q = _top(log_p, k), _top(log_q, k)
    overlap = np.array([np.intersect1d(a, b).size / k for a, b in zip(top_p, top_q, strict=True)])
    rows, known = np.arange(len(reference)), follows >= 0
    said = np.where(known, follows, reference.argmax(axis=1))
    nll = (np.where(known, -side[rows, said], np.nan) for side in (log_p, log_q))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        norms = [np.linalg.norm(side.astype(np.float64), axis=1) for side in (reference, candidate)]
        norm_difference = np.abs(norms[1] - norms[0]) / norms[0]
    # argmax takes the first of equals on both sides, as greedy decoding does
    flipped = reference.argmax(axis=1) != candidate.argmax(axis=1)
    delta_p = q[rows, said] - p[rows, said]
    return kl, variation, top_margin(reference), flipped, overlap, delta_p, norm_difference, *nll


def top_margin(logits: Array) -> F64:
    """Top logit minus the second, per row; infinite in a vocabulary of one."""
    if logits.shape[1] < 2:
        return np.full(len(logits), np.inf)
    two = np.partition(logits.astype(np.float64), -2, axis=1)[:, -2:]
    with np.errstate(invalid="ignore"):
        margin: F64 = two[:, 1] - two[:, 0]
    return margin


def log_softmax(logits: Array) -> F64:
    """Logarithm of the probabilities per row, in float64."""
    x = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        x = x - x.max(axis=1, keepdims=True)
        shifted: F64 = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    return shifted


def _top(values: F64, k: int) -> NDArray[np.intp]:
    return np.argpartition(values, -k, axis=1)[:, -k:]


def chunks(rows: int) -> Iterator[slice]:
    """Cut rows into pieces that fit into memory in float64."""
    return (slice(start, start + _ROWS) for start in range(0, rows, _ROWS))

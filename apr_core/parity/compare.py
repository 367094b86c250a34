"""
Compare two traces of the same tokens.

What makes a parity claim false, in the order in which it is looked for:

1. A name or a position that one side lacks. Lengths and names are compared before any value: a comparison that pairs
   the two sides until the shorter one ends would find nothing wrong with a forward that stopped early.
2. A value that is not finite, on either side. Every limit is tested as ``value <= limit``, which NaN does not pass.
3. A row whose difference is large against the reference's row: ``rel_l2`` per position. The norm of the difference,
   never the difference of norms, which a permutation and a change of sign leave at zero.
4. Another distribution. KL sees what a cosine cannot (a scale), and ``rel_l2`` what KL cannot (an offset), so both are
   measured; neither excuses the other.
5. Another top token where the reference's margin is decisive. A flip inside the margin is a near-tie: it is listed
   apart and counts for nothing, because rounding alone can turn it.

And what would make the claim worthless: nothing compared, a reference of zeros, or two sides that are one object. Those
are counted here, and whoever judges must call them inconclusive. All arithmetic is float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apr_core.errors import UsageError
from apr_core.falsify.verdict import Verdict
from apr_core.model.trace import MANDATORY
from apr_core.parity.distribution import F64, Array, DistributionParity, chunks, compare_logits

LOGITS = "logits"
_LAYER = re.compile(r"^layers\.(\d+)\.(.+)$")


@dataclass(frozen=True, eq=False)
class NameParity:
    """
    One named activation on both sides.

    Attributes:
        name: As in the trace, e.g. ``layers.3.k``.
        rel_l2: Per position: norm of the difference over the norm of the reference's row; NaN stays NaN.
        max_abs: Per position: largest absolute difference.
        cosine: Per position: 1 for equal directions; for people, never for a verdict (a wrong scale has cosine 1).
        nmse: Squared difference over squared reference, summed over all positions.
        nonfinite: Values that are NaN or infinite on either side.
        values: Values compared.
    """

    name: str
    rel_l2: F64
    max_abs: F64
    cosine: F64
    nmse: float
    nonfinite: int
    values: int

    @property
    def layer(self) -> int | None:
        """Number of the layer, None for what comes after the last."""
        return split_name(self.name)[0]

    @property
    def op(self) -> str:
        """The operation, e.g. ``k``."""
        return split_name(self.name)[1]

    @property
    def worst(self) -> int:
        """The position with the largest ``rel_l2``; one that is not a number is worse than any number."""
        return int(np.argmax(_nan_is_worst(self.rel_l2)))

    @property
    def required_tolerance(self) -> float:
        """The smallest limit on ``rel_l2`` that every position meets; infinite when a value is not finite."""
        return float(_nan_is_worst(self.rel_l2)[self.worst])


@dataclass(frozen=True)
class Divergence:
    """The first row beyond a limit, in order of computation."""

    name: str
    layer: int | None
    op: str
    position: int
    rel_l2: float
    largest_before: float

    def __str__(self) -> str:
        least = self.largest_before
        before = f"the largest before is {least:.1e}" if least >= 0 else "nothing is before it"
        return f"{self.name} at position {self.position}, rel_l2 {self.rel_l2:.2g}; {before}"


@dataclass(frozen=True, eq=False)
class ParityReport:
    """
    A candidate held against a reference.

    Attributes:
        names: What was compared, in order of computation.
        logits: The distributions, when both sides have comparable logits.
        missing: Names that were not compared, each with the reason.
        wanted: Every name that either side or the caller knows.
        positions: Of the longer side.
        same_object: The sides share memory: nothing can follow from their agreement.
    """

    names: Mapping[str, NameParity]
    logits: DistributionParity | None
    missing: tuple[str, ...]
    wanted: tuple[str, ...]
    positions: int
    same_object: bool

    @property
    def expected(self) -> int:
        """Rows (one position of one name) that should have been compared."""
        return self.positions * len(self.wanted)

    @property
    def compared(self) -> int:
        """Rows compared."""
        return sum(n.rel_l2.size for n in self.names.values())

    @property
    def values(self) -> int:
        """Values compared."""
        return sum(n.values for n in self.names.values())

    @property
    def nonfinite(self) -> int:
        """Values that are not finite on either side."""
        return sum(n.nonfinite for n in self.names.values())

    @property
    def required_tolerance(self) -> float:
        """The smallest limit on ``rel_l2`` that every row meets; NaN when nothing was compared."""
        return max((n.required_tolerance for n in self.names.values()), default=math.nan)

    def over(self, limits: Mapping[str, float]) -> float:
        """Return the largest ``rel_l2`` over the limit of its name; NaN when nothing was compared."""
        return max((n.required_tolerance / limits[n.name] for n in self.names.values()), default=math.nan)

    def only(self, *names: str) -> ParityReport:
        """Return the part of the report that speaks about these names; coverage is cut to them too."""
        return ParityReport(
            names={k: v for k, v in self.names.items() if k in names},
            logits=self.logits if LOGITS in names else None,
            missing=tuple(m for m in self.missing if m.split(":")[0] in names),
            wanted=tuple(name for name in self.wanted if name in names),
            positions=self.positions,
            same_object=self.same_object,
        )

    def first_divergence(self, limit: float | Mapping[str, float]) -> Divergence | None:
        """
        Find the first name, and in it the first position, that is not within ``limit``.

        Args:
            limit: On rel_l2; one for all, or one per name (a name without one is held to 0).
        """
        largest = -1.0
        for parity in self.names.values():
            beyond = ~(parity.rel_l2 <= (limit if isinstance(limit, float) else limit.get(parity.name, 0.0)))
            if beyond.any():
                at = int(beyond.argmax())
                return Divergence(parity.name, parity.layer, parity.op, at, float(parity.rel_l2[at]), largest)
            largest = max(largest, float(parity.rel_l2.max()))
        return None

    def judge(self, limit: float | Mapping[str, float], *, fewest: int = 1) -> tuple[Verdict, str]:
        """
        Say what follows from the report.

        Args:
            limit: On rel_l2, as in `first_divergence`.
            fewest: Positions that it takes to conclude anything.

        Returns:
            The verdict and its reason, empty for CORROBORATED. Nothing compared is INCONCLUSIVE; what was compared and
            refutes does so whatever is missing.
        """
        if self.same_object:
            return Verdict.INCONCLUSIVE, "both sides are one object"
        if not self.compared:
            return Verdict.INCONCLUSIVE, f"nothing was compared: {'; '.join(self.missing[:3]) or 'both are empty'}"
        if self.nonfinite:
            return Verdict.FALSIFIED, f"{self.nonfinite} of {self.values} values are not finite"
        first = self.first_divergence(limit)
        if first is not None:
            return Verdict.FALSIFIED, f"first divergence: {first}"
        if self.logits is not None and self.logits.decisive_flips:
            flips = self.logits.decisive_flips
            return Verdict.FALSIFIED, f"another top token at {len(flips)} decisive positions, the first at {flips[0]}"
        if self.missing:
            return Verdict.INCONCLUSIVE, "; ".join(self.missing[:3])
        if self.positions < fewest:
            return Verdict.INCONCLUSIVE, f"{self.positions} positions, at least {fewest} are needed"
        return Verdict.CORROBORATED, ""

    def table(self) -> list[dict[str, object]]:
        """One row per name, at its worst position."""
        return [
            {
                "name": n.name,
                "layer": n.layer,
                "op": n.op,
                "rel_l2": float(n.rel_l2[n.worst]),
                "max_abs": float(n.max_abs[n.worst]),
                "cosine": float(n.cosine[n.worst]),
                "nmse": n.nmse,
                "position": n.worst,
                "required_tolerance": n.required_tolerance,
            }
            for n in self.names.values()
        ]


def compare(
    reference: Mapping[str, Array],
    candidate: Mapping[str, Array],
    *,
    expect: Sequence[str] = (),
    tau: float | F64 = 0.0,
    tokens: NDArray[np.int64] | None = None,
) -> ParityReport:
    """
    Hold a candidate's trace against a reference's, name by name and position by position.

    Args:
        reference: Named arrays [tokens, dim].
        candidate: Likewise, of the same tokens.
        expect: Names that must be there. Without it two traces that lack the same layer would agree completely.
        tau: The margin in nat up to which a flipped top token is a near-tie; one number, or one per position.
        tokens: The token that the text goes on with behind each position, for perplexity; -1 where it ends.

    Raises:
        UsageError: An array is not [tokens, dim].
    """
    known = dict.fromkeys((*expect, *reference, *candidate))
    # Names beyond the mandatory ones are optional: compared where both sides have them, demanded of none.
    order = [n for n in known if n in expect or split_name(n)[1] in MANDATORY or (n in reference and n in candidate)]
    positions = max((_rows(name, side[name]) for side in (reference, candidate) for name in side), default=0)
    parities: dict[str, NameParity] = {}
    missing: list[str] = []
    for name in order:
        reason = _incomparable(reference.get(name), candidate.get(name))
        if reason:
            missing.append(f"{name}: {reason}")
        else:
            parities[name] = compare_rows(name, reference[name], candidate[name])
    return ParityReport(
        names=parities,
        logits=compare_logits(reference[LOGITS], candidate[LOGITS], tau, tokens) if LOGITS in parities else None,
        missing=tuple(missing),
        wanted=tuple(order),
        positions=positions,
        same_object=_share_memory(reference, candidate),
    )


def compare_rows(name: str, reference: Array, candidate: Array) -> NameParity:
    """Measure one activation, [tokens, dim] on both sides, row by row."""
    parts = [_row_statistics(reference[rows], candidate[rows]) for rows in chunks(len(reference))]
    difference, norm, max_abs, cosine, nonfinite = (np.concatenate(column) for column in zip(*parts, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        # A zero row equals a zero row; against anything else it is infinitely far off.
        rel_l2 = np.where((norm == 0) & (difference == 0), 0.0, difference / norm)
        nmse = float((difference**2).sum() / (norm**2).sum())
    return NameParity(name, rel_l2, max_abs, cosine, nmse, int(nonfinite.sum()), reference.size)


def split_name(name: str) -> tuple[int | None, str]:
    """Split ``layers.3.k`` into 3 and ``k``; other names have no layer."""
    found = _LAYER.match(name)
    return (int(found[1]), found[2]) if found else (None, name)


def _incomparable(reference: Array | None, candidate: Array | None) -> str:
    """Say why a name cannot be compared, or nothing."""
    if reference is None or candidate is None:
        sides = [side for side, array in (("reference", reference), ("candidate", candidate)) if array is None]
        return f"absent in the {' and the '.join(sides)}"
    if reference.shape != candidate.shape:
        return f"{list(reference.shape)} in the reference, {list(candidate.shape)} in the candidate"
    for side, array in (("reference", reference), ("candidate", candidate)):
        # float16 or integers would be compared after a conversion that nobody asked for
        if array.dtype not in (np.float32, np.float64):
            return f"{array.dtype} in the {side}, expected float32 or float64"
    if not reference.any():
        return "the reference is all zeros" if reference.size else "no values"
    return ""


def _row_statistics(reference: Array, candidate: Array) -> tuple[F64, ...]:
    r, c = reference.astype(np.float64), candidate.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        d = c - r
        norms = np.linalg.norm(r, axis=1) * np.linalg.norm(c, axis=1)
        cosine = np.where(norms == 0, 0.0, (r * c).sum(axis=1) / norms)
        bad = (~np.isfinite(r) | ~np.isfinite(c)).sum(axis=1)
        return np.linalg.norm(d, axis=1), np.linalg.norm(r, axis=1), np.abs(d).max(axis=1), cosine, bad


def _rows(name: str, array: Array) -> int:
    if array.ndim != 2:
        raise UsageError(f"expected [tokens, dim] for {name}, found shape {array.shape}", advice="trace one forward")
    return int(array.shape[0])


def _nan_is_worst(values: F64) -> F64:
    return np.where(np.isnan(values), np.inf, values)


def _share_memory(reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> bool:
    """True for one object, and for two mappings around the same arrays."""
    both = (name for name in reference if name in candidate)
    return reference is candidate or any(np.may_share_memory(reference[name], candidate[name]) for name in both)

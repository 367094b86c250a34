"""Tables, arrays and computed answers out of parity reports: what a person asks once a value is beyond its limit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apr_core.parity.compare import NameParity, ParityReport
from apr_core.parity.distribution import DistributionParity
from apr_core.parity.floor import Floor

Row = dict[str, object]
Whys = list[tuple[str, str]]

# Evidence holds 120 rows; a deep model has more names than that.
_MAX_ROWS = 100
# Two noise draws of one size differ by less than this in rel_l2.
_FURTHER = 4.0


def table(report: ParityReport, floor: Floor) -> list[Row]:
    """One row per name with its floor and limit; in a deep model one row per layer, for its worst name."""
    rows = [
        row | {"floor": floor.of(str(row["name"])), "limit": floor.limits[str(row["name"])]} for row in report.table()
    ]
    if len(rows) <= _MAX_ROWS:
        return rows
    worst: dict[object, NameParity] = {}
    for parity in report.names.values():
        key = parity.layer if parity.layer is not None else parity.name
        if key not in worst or parity.required_tolerance > worst[key].required_tolerance:
            worst[key] = parity
    chosen = {parity.name for parity in worst.values()}
    return [row for row in rows if row["name"] in chosen]


def rel_l2_arrays(report: ParityReport, limits: Mapping[str, float]) -> dict[str, NDArray[Any]]:
    """``rel_l2`` [names, positions] with its two axes, and the limit of each name."""
    if not report.names:
        return {}
    return {
        "position": np.arange(report.positions),
        "name": np.array(list(report.names)),
        "rel_l2": np.stack([n.rel_l2 for n in report.names.values()]),
        "limit": np.array([limits[name] for name in report.names]),
    }


def distribution_rows(logits: DistributionParity) -> list[Row]:
    """Summarise the distributions over positions."""
    return [
        {"statistic": "kl_mean", "value": logits.kl_mean},
        {"statistic": "kl_median", "value": logits.kl_median},
        {"statistic": "kl_p99.9", "value": logits.kl_p999},
        {"statistic": "kl_max", "value": logits.kl_max},
        {"statistic": "total_variation_max", "value": float(logits.total_variation.max())},
        {"statistic": "top_10_overlap_mean", "value": float(logits.top_k_overlap.mean())},
    ]


def distribution_arrays(logits: DistributionParity) -> dict[str, NDArray[Any]]:
    """KL and total variation by position."""
    return {"position": np.arange(logits.kl.size), "kl": logits.kl, "total_variation": logits.total_variation}


def flip_rows(logits: DistributionParity) -> list[Row]:
    """Every position where the top tokens differ, near-ties marked."""
    wrong = set(logits.decisive_flips)
    return [
        {"position": at, "margin": float(logits.margin[at]), "tau": float(logits.tau[at]), "decisive": at in wrong}
        for at in sorted((*wrong, *logits.near_tie_flips))
    ]


def flip_arrays(logits: DistributionParity) -> dict[str, NDArray[Any]]:
    """Margins, the near-tie band and the flips by position."""
    return {"margin": logits.margin, "tau": logits.tau, "flipped": logits.flipped}


def floor_line(floor: Floor, report: ParityReport) -> str:
    """Say what honest rounding does to the name that is furthest beyond its limit."""
    worst = max(report.names.values(), key=lambda n: n.required_tolerance / floor.limits[n.name])
    return f"rel_l2 {floor.of(worst.name):.2g} for {worst.name}, so its limit is {floor.limits[worst.name]:.2g}"


def why_rel_l2(report: ParityReport, limits: Mapping[str, float]) -> Whys:
    """Answer where two forwards part, over how much, in which way, and what limit would have held."""
    first = report.first_divergence(limits)
    if first is None:
        return []
    parity = report.names[first.name]
    beyond = ~(parity.rel_l2 <= limits[first.name])
    broken = sum(not n.required_tolerance <= limits[n.name] for n in report.names.values())
    worst = max(report.names.values(), key=lambda n: n.required_tolerance)
    zero = "beyond it" if beyond[0] else "within it, where RoPE is the identity and attention sees one key"
    direction = _direction(float(parity.cosine[first.position]), first.rel_l2)
    return [
        ("Where does it first differ?", str(first)),
        ("At every position?", f"{beyond.sum()} of {beyond.size} positions of {first.name}; position 0 is {zero}"),
        ("A wrong size or a wrong direction?", direction),
        ("Does it spread?", f"{broken} of {len(report.names)} names are beyond their limits"),
        ("Which limit would hold?", f"{report.required_tolerance:.2g}, for {worst.name} at position {worst.worst}"),
    ]


def why_distribution(logits: DistributionParity) -> Whys:
    """Answer which position has the other distribution."""
    at = int(np.argmax(np.where(np.isnan(logits.kl), np.inf, logits.kl)))
    return [("Which position?", f"position {at}, KL {logits.kl[at]:.3g} nat; the median is {logits.kl_median:.3g}")]


def why_flips(logits: DistributionParity) -> Whys:
    """Answer how many decisive positions flip, and how decisive the first one is."""
    flips = logits.decisive_flips
    if not flips:
        return []
    share = f"{len(flips)} of {int(logits.decisive.sum())}"
    margin = f"{logits.margin[flips[0]]:.3g} nat"
    return [("How many decisive positions flip?", f"{share}, the first at {flips[0]}, where the margin is {margin}")]


def why_over_budget(found: ParityReport, copy: ParityReport) -> Whys:
    """Answer where a subject is first further from its reference than the rounding noise of its types explains."""
    ratio = {
        name: parity.required_tolerance / max(copy.names[name].required_tolerance, 1e-5)
        for name, parity in found.names.items()
        if name in copy.names
    }
    beyond = [name for name, times in ratio.items() if not times <= _FURTHER]
    if not beyond:
        answer = f"at no single activation: each is within {_FURTHER:g} times the copy's distance"
    else:
        answer = f"{beyond[0]}: {ratio[beyond[0]]:.3g} times as far from the reference as a copy with honest noise"
    return [("Where is it first further off than its types explain?", answer)]


def budget_rows(found: ParityReport, copy: ParityReport) -> list[Row]:
    """Distance to the reference after each layer: the subject's, and that of the copy with honest noise."""
    return [
        {"name": name, "rel_l2": n.required_tolerance, "rel_l2_copy": copy.names[name].required_tolerance}
        for name, n in found.names.items()
        if name in copy.names and n.op in ("resid_ffn", "final_hidden", "logits")
    ]


def _direction(cosine: float, rel_l2: float) -> str:
    """Tell a scale from anything else: a difference across the reference costs the cosine half its square."""
    if not (math.isfinite(cosine) and math.isfinite(rel_l2)):
        return "not a number"
    along = 1 - cosine < 0.05 * rel_l2**2 / 2
    return f"cosine {cosine:.9f} there: {'the same direction, so a scale' if along else 'another direction'}"

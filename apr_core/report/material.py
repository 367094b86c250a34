"""What a figure may use: rows and arrays of a finding or a record, read the same way from both."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apr_core.falsify.claims import Claim, load_claims
from apr_core.falsify.evidence import Evidence
from apr_core.falsify.finding import Finding

Source = Finding | Evidence
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Material:
    """Claim, rows and arrays behind a figure."""

    claim: Claim | None
    rows: Sequence[Mapping[str, Any]]
    arrays: Mapping[str, NDArray[Any]]

    def numbers(self, name: str) -> Floats | None:
        """An array of numbers (booleans count) with at least one element, as float64; else None."""
        values = self.arrays.get(name)
        if values is None or not values.size or values.dtype.kind not in "biuf":
            return None
        return np.asarray(values, dtype=np.float64)

    def text(self, name: str) -> list[str]:
        """An array of names; empty where there is none."""
        values = self.arrays.get(name)
        return [str(v) for v in values.ravel()] if values is not None and values.dtype.kind == "U" else []


def material(source: Source) -> Material:
    """
    Read rows and arrays of a finding or a record.

    Raises:
        FormatError: An attached npz is not the one that was recorded.
    """
    if isinstance(source, Finding):
        return Material(load_claims().get(source.claim), source.rows, source.arrays)
    return Material(load_claims().get(source.id), source.rows, source.arrays())


def is_number(value: object) -> bool:
    """Whether a cell of a row can be drawn; booleans cannot."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def limits_of(m: Material) -> list[float]:
    """Limits stored with the values, else the claim's own; neither a count nor a ratio limits what a figure draws."""
    stored = m.numbers("limit")
    if stored is not None:
        return sorted({float(v) for v in stored.ravel() if np.isfinite(v)})
    own = m.claim is not None and m.claim.unit != "count" and "_over_" not in m.claim.metric
    return [m.claim.threshold] if m.claim and own else []


def violations(m: Material) -> list[tuple[str, float]]:
    """Name and value of whatever a gate refused on the subject, as the rows say; judged there, not here."""
    found = [r for r in m.rows if r.get("on") == "subject" and is_number(r.get("measured"))]
    return [(str(r.get("what", "")), float(r["measured"])) for r in found]


def by_position(m: Material) -> dict[str, Floats]:
    """
    Values per position of the stimulus under the name of the claim's metric.

    ``kl_max`` is the largest ``kl``; ``rel_l2_gguf`` and ``kl_copy`` are further series of the same value. An array
    [names, positions] gives its worst name at each position; one NaN makes a position NaN, so it cannot hide.
    """
    metric = m.claim.metric if m.claim else ""
    for base in dict.fromkeys([metric, re.sub(r"_(max|min|mean|over_limit)$", "", metric), "rel_l2", "kl"]):
        named = [k for k in m.arrays if base and (k == base or k.startswith(f"{base}_"))]
        series = {k: v for k in named if (v := m.numbers(k)) is not None}
        if series:
            return {k: v.reshape(-1, v.shape[-1]).max(axis=0) if v.ndim > 1 else v.ravel() for k, v in series.items()}
    return {}


def traced(m: Material) -> tuple[list[str], Floats, Floats | None]:
    """Names, worst differences and limits (where they are known) of a trace: from whole arrays, else from the rows."""
    names, values, limits = m.text("name"), m.numbers("rel_l2"), m.numbers("limit")
    if names and values is not None and len(values) == len(names):
        return names, values.reshape(len(names), -1).max(axis=1), limits
    rows = [r for r in m.rows if "name" in r and is_number(r.get("rel_l2"))]
    stored = [float(r["limit"]) for r in rows if is_number(r.get("limit"))]
    found = np.array([float(r["rel_l2"]) for r in rows], dtype=np.float64)
    return [str(r["name"]) for r in rows], found, np.array(stored) if len(stored) == len(rows) else None


def places(names: Sequence[str]) -> tuple[list[float], list[str], int]:
    """Layer and operation of each name; what has no layer (final_hidden, logits) comes after the last."""
    parsed = [re.fullmatch(r"(?:model\.)?layers\.(\d{1,4})\.(.+)", n) for n in names]
    last = max((int(p[1]) for p in parsed if p), default=-1)
    return (
        [float(p[1]) if p else last + 1.0 for p in parsed],
        [p[2] if p else n for p, n in zip(parsed, names, strict=True)],
        last,
    )


def timings(m: Material) -> dict[str, Floats]:
    """Arrays of durations in seconds (``decode_s_per_token``, ``prefill_s``); only what is a duration at all."""
    rates = ("gb_s", "tok_s")  # per second, not seconds
    found = {k: m.numbers(k) for k in m.arrays if k.endswith(("_s_per_token", "_s")) and not k.endswith(rates)}
    kept = {k: v.ravel()[np.isfinite(v.ravel()) & (v.ravel() > 0)] for k, v in found.items() if v is not None}
    return {k: v for k, v in kept.items() if len(v)}


def least_time(m: Material) -> tuple[str, float] | None:
    """What no sample per token can undercut, in seconds: the machine's ceiling, or a delay that was planted."""
    for row in m.rows:
        if row.get("quantity") == "ceiling_tok_s" and is_number(row.get("value")) and row["value"] > 0:
            return "ceiling of the machine", 1 / float(row["value"])
        if is_number(row.get("delay_s")):
            return "planted delay", float(row["delay_s"])
    return None

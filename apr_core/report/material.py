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

ABSCISSAE = ("position", "positions", "step", "limit", "limits", "budget")  # arrays that no figure draws as a series
_UNITS = {"kl": "nat", "rel_l2": "ratio", "max_abs": "logit", "margin": "logit"}


@dataclass(frozen=True, eq=False)
class Material:
    """What a figure may use."""

    claim: Claim | None
    rows: Sequence[Mapping[str, Any]]
    arrays: Mapping[str, NDArray[Any]]
    omitted: int = 0

    def series(self, *names: str) -> tuple[str, Floats] | None:
        """The first of the named arrays that holds numbers, flattened to one axis."""
        for name in names:
            if name in self.arrays and np.issubdtype(self.arrays[name].dtype, np.number) and self.arrays[name].size:
                return name, np.asarray(self.arrays[name], dtype=np.float64).ravel()
        return None

    def column(self, name: str) -> Floats:
        """A column of the rows as numbers; NaN where a row has none."""
        values = [row.get(name) for row in self.rows]
        return np.array([v if is_number(v) else np.nan for v in values], dtype=np.float64)


def material(source: Source) -> Material:
    """
    Read rows and arrays of a finding or a record.

    Raises:
        FormatError: An attached npz is not the one that was recorded.
    """
    if isinstance(source, Finding):
        return Material(load_claims().get(source.claim), source.rows, source.arrays)
    return Material(load_claims().get(source.id), source.rows, source.arrays(), source.rows_omitted)


def is_number(value: object) -> bool:
    """Whether a cell of a row can be drawn; booleans cannot."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def tightest(limits: Floats) -> float | None:
    """The limit as one number, for scales and words: the tightest where it differs from tensor to tensor."""
    return float(np.nanmin(limits)) if len(limits) and np.isfinite(limits).any() else None


def stored_limits(m: Material) -> Floats:
    """Limits that lie with the values: one for each, or one for all; empty where there are none."""
    found = m.series("limit", "limits", "budget")
    if found:
        return found[1]
    column = m.column("limit")
    return column if np.isfinite(column).any() else np.array([])


def limits_of(m: Material, count: int) -> Floats:
    """Limits stored with the values, else the claim's own unless it counts refutations (then it limits the count)."""
    stored = stored_limits(m)
    if len(stored):
        return stored if len(stored) == count else stored[:1]
    return np.array([m.claim.threshold]) if m.claim and m.claim.unit != "count" else np.array([])


def beyond_limits(m: Material, values: Floats, limits: Floats) -> NDArray[np.bool_]:
    """Which points to mark: those on the wrong side of their limit. A mark, not a verdict: that is in the record."""
    if not len(limits):
        return np.zeros(len(values), dtype=bool)
    default = m.claim.direction if m.claim else "at_most"
    direction = next((r["direction"] for r in m.rows if "direction" in r), default)
    wide = limits if len(limits) == len(values) else np.full(len(values), limits[0])
    with np.errstate(invalid="ignore"):
        return (values < wide if direction == "at_least" else values > wide) & np.isfinite(values)


def names_of(m: Material, count: int) -> list[str]:
    """Names of the tensors: a stored array of text, else the rows' own when there are as many."""
    for key in ("tensor", "name", "names"):
        if key in m.arrays and m.arrays[key].dtype.kind in "US" and m.arrays[key].size == count:
            return [str(n) for n in m.arrays[key].ravel()]
    if len(m.rows) == count:
        return [str(r.get("tensor", r.get("name", i))) for i, r in enumerate(m.rows)]
    return [f"tensor {i}" for i in range(count)]


def traced(m: Material) -> tuple[list[str], Floats]:
    """Names and differences of a trace: from arrays where they are whole, else from the rows."""
    names = next((m.arrays[k] for k in ("name", "names") if k in m.arrays and m.arrays[k].dtype.kind in "US"), None)
    found = m.series("rel_l2", "max_abs")
    if names is not None and found and names.size == len(found[1]):
        return [str(n) for n in names.ravel()], found[1]
    rows = [r for r in m.rows if is_number(r.get("rel_l2"))]
    return [_row_name(r) for r in rows], np.array([float(r["rel_l2"]) for r in rows], dtype=np.float64)


def _row_name(row: Mapping[str, Any]) -> str:
    if "name" in row:
        return str(row["name"])
    operation = row.get("op", row.get("operation", "value"))
    return f"layers.{row['layer']}.{operation}" if is_number(row.get("layer")) else str(operation)


def places(names: Sequence[str]) -> tuple[list[float], list[str], int]:
    """Layer and operation of each name; what has no layer (final_hidden, logits) comes after the last."""
    parsed = [re.fullmatch(r"(?:model\.)?layers\.(\d{1,4})\.(.+)", n) for n in names]
    last = max((int(p[1]) for p in parsed if p), default=-1)
    return (
        [float(p[1]) if p else last + 1.0 for p in parsed],
        [p[2] if p else n for p, n in zip(parsed, names, strict=True)],
        last,
    )


def metric_keys(m: Material) -> tuple[str, ...]:
    """Names under which a claim's own metric may be stored per position: ``kl_max`` is the largest ``kl``."""
    return (m.claim.metric, re.sub(r"_(max|min|mean)$", "", m.claim.metric)) if m.claim else ()


def unit_label(m: Material, key: str) -> str:
    """Label of an axis: name of the value and its unit."""
    unit = _UNITS.get(key, m.claim.unit if m.claim else "1")
    return f"{key} ({'ratio' if unit == '1' else unit})"


def y_label(m: Material, default: str) -> str:
    """Label of the claim's metric; ``default`` where the metric is a count and the figure shows what is counted."""
    if m.claim is None or m.claim.unit == "count":
        return default
    return unit_label(m, m.claim.metric)


def is_timing(key: str, values: NDArray[Any]) -> bool:
    """Whether an array holds durations in seconds (``decode_s_per_token``, ``prefill_s``, ...)."""
    named = ("_s_per_token" in key or key.endswith("_s")) and "ceiling" not in key
    return bool(named and np.issubdtype(values.dtype, np.number))


def ceiling_of(m: Material) -> float | None:
    """The shortest time per token that the memory allows, in seconds, where the record holds it."""
    for key, values in m.arrays.items():
        if "ceiling" in key and key.endswith("s_per_token") and np.size(values) == 1:
            return float(np.ravel(values)[0])
    for row in m.rows:
        for key, value in row.items():
            if "ceiling" in str(key) and str(key).endswith("s_per_token") and is_number(value):
                return float(value)
    return None

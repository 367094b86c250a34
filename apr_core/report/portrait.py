"""Figures of notebook 10 that show no claim: a model's numbers by role, the gates at their limits, what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from apr_core.report.figures import label
from apr_core.report.style import BLUE, GREEN, INK, MUTED, VERMILLION, finish, log_ticks, new_figure, style
from apr_core.report.text import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


def plot_roles(rows: Rows, limits: Sequence[float] = ()) -> Figure | None:
    """
    Share of zeros, root mean square and range of every tensor, one line per role; None without rows.

    Args:
        rows: ``role``, ``zeros (%)``, ``rms``, ``minimum`` and ``maximum`` of each tensor.
        limits: Shares of zeros that a gate allows, in percent.
    """
    if not rows:
        return None
    from matplotlib.figure import Figure

    roles = list(dict.fromkeys(str(row["role"]) for row in rows))
    at = np.array([roles.index(str(row["role"])) for row in rows])
    zeros, rms, low, high = (_column(rows, key) for key in ("zeros (%)", "rms", "minimum", "maximum"))
    with style():
        figure = Figure(figsize=(6.6, 1.35 + 0.2 * len(roles)))
        density, size, span = figure.subplots(1, 3, sharey=True)
        density.plot(zeros, at, "o", ms=3.5, color=BLUE)
        for limit in limits:
            density.axvline(limit, color=INK, ls="--", lw=1)
        density.set_xlim(-4, 104)
        size.plot(rms, at, "s", ms=3.5, color=GREEN)
        if (rms[np.isfinite(rms)] > 0).any():
            size.set_xscale("log")
            log_ticks(size.xaxis)
        span.hlines(at, low, high, color=INK, lw=1)
        span.plot(low, at, "|", ms=6, color=BLUE)
        span.plot(high, at, "|", ms=6, color=VERMILLION)
        _wide_scale(span, max(abs(_least(low)), abs(_most(high))))
        density.set_yticks(range(len(roles)), [label(role, 24) for role in roles])
        density.set_ylim(len(roles) - 0.5, -0.5)
        for ax, text in ((density, "zeros (%)"), (size, "rms (weight units)"), (span, "range (weight units)")):
            ax.set_xlabel(text)
        return finish(
            figure,
            alt=f"Three panels over {len(roles)} roles and {len(rows)} tensors: zeros from {number(_least(zeros))} to "
            f"{number(_most(zeros))} %, root mean square from {number(_least(rms))} to {number(_most(rms))}, values "
            f"from {number(_least(low))} to {number(_most(high))}.",
            caption="One mark per tensor, one line per role; dashed are the shares of zeros that the gates allow. In a "
            "broken model a mark stands alone: at 100 % zeros, at a norm of nothing, or with a range of another order "
            "than its neighbours in the role.",
            left=1.65,
        )


def plot_limits(rows: Rows) -> Figure | None:
    """
    What each gate says one step inside, at, and one step beyond its limit; None without rows.

    Args:
        rows: ``gate``, ``rule``, ``of``, ``limit``, ``unit``, ``where`` and ``outcome``.
    """
    if not rows:
        return None
    places = list(dict.fromkeys(sorted((str(row["where"]) for row in rows), key=_place)))
    names = list(dict.fromkeys(_gate_name(row) for row in rows))
    with style():
        figure, ax = new_figure(1.3 + 0.24 * len(names))
        for outcome, mark, colour in (("passes", "o", BLUE), ("refused", "X", VERMILLION)):
            mine = [row for row in rows if row["outcome"] == outcome]
            x, y = [places.index(str(row["where"])) for row in mine], [names.index(_gate_name(row)) for row in mine]
            ax.plot(x, y, mark, ms=6, color=colour, label=outcome)
        ax.set_xticks(range(len(places)), places)
        ax.set_xlim(-0.4, len(places) - 0.6)
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05))
        refused = sum(row["outcome"] == "refused" for row in rows)
        return finish(
            figure,
            alt=f"{len(names)} gates at their limits: {refused} of {len(rows)} tensors are refused, those beyond.",
            caption="A value equal to its limit passes. Were a gate off by one, or its comparison the wrong way round, "
            "a cross would stand at or inside the limit, or a dot beyond it.",
            left=2.85,
            right=0.95,
        )


def plot_cost(rows: Rows) -> Figure | None:
    """
    Seconds of each step of the gate; None without rows.

    Args:
        rows: ``step`` and ``seconds``.
    """
    rows = [row for row in rows if row["seconds"] > 0]
    if not rows:
        return None
    taken = _column(rows, "seconds")
    with style():
        figure, ax = new_figure(1.25 + 0.26 * len(rows))
        ax.barh(range(len(rows)), taken * 1e3, color=[BLUE if row.get("bytes") else MUTED for row in rows], height=0.6)
        for i, value in enumerate(taken):
            ax.annotate(
                f"{value * 1e3:.3g} ms", (value * 1e3, i), xytext=(4, -3), textcoords="offset points", fontsize=8
            )
        ax.set_yticks(range(len(rows)), [label(row["step"], 40) for row in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_xlabel("time (ms)")
        ax.set_xlim(0, float(taken.max()) * 1e3 * 1.15)
        return finish(
            figure,
            alt="Bars: " + ", ".join(f"{label(row['step'], 40)} {row['seconds'] * 1e3:.3g} ms" for row in rows) + ".",
            caption="Blue bars read every weight, grey ones the header alone; medians on this machine. Were the gate a "
            "reason to skip it, the last bar would be long against loading the model, which reads the same bytes.",
            left=2.5,
        )


def _column(rows: Rows, key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([float(row[key]) for row in rows])


def _least(values: np.ndarray[Any, Any]) -> float:
    return float(np.nanmin(values)) if np.isfinite(values).any() else float("nan")


def _most(values: np.ndarray[Any, Any]) -> float:
    return float(np.nanmax(values)) if np.isfinite(values).any() else float("nan")


def _place(where: str) -> int:
    return next((i for i, word in enumerate(("inside", "at", "beyond")) if word in where.split()), 3)


def _gate_name(row: Mapping[str, Any]) -> str:
    limit = f"{row['limit']:g} {row['unit']}".strip()
    return label(f"{str(row['gate'])[-3:]} {row['rule']}, {row['of']}: {limit}", 60)


def _wide_scale(ax: Axes, largest: float) -> None:
    """Values around zero and large ones on one axis; ticks in plain digits, as the style draws no powers."""
    ax.set_xscale("symlog", linthresh=0.1)
    powers = [0.1 * 10**n for n in range(9) if n == 0 or 0.1 * 10**n <= largest][-2:]
    ticks = [*(-value for value in reversed(powers)), 0, *powers]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()

"""Figures as functions of evidence: they read ``rows`` and ``arrays`` of a record or a finding, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from apr_core.falsify.finding import Finding
from apr_core.report.material import (
    ABSCISSAE,
    Floats,
    Source,
    beyond_limits,
    ceiling_of,
    is_timing,
    limits_of,
    material,
    metric_keys,
    names_of,
    places,
    stored_limits,
    tightest,
    traced,
    unit_label,
    y_label,
)
from apr_core.report.style import (
    BLUE,
    COLOURS,
    INK,
    MARKERS,
    MUTED,
    PAPER,
    VERMILLION,
    adaptive,
    finish,
    new_figure,
    style,
    svg,
)
from apr_core.report.text import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Plot = Callable[[Source], "Figure | None"]

MOST_POINTS = 500  # an SVG of more is slow to open; beyond it the extremes of each stretch are drawn


def plot_tensor_statistics(source: Source) -> Figure | None:
    """One point per tensor against the gate's limit; tensors beyond it are named."""
    m = material(source)
    found = m.series("value", "measured")
    values = found[1] if found else m.column("measured")
    limits = limits_of(m, len(values))
    if not np.isfinite(values).any():
        return None
    names = names_of(m, len(values))
    beyond = beyond_limits(m, values, limits)
    with style():
        figure, ax = new_figure()
        kept = decimate(values, beyond)
        ax.plot(kept, values[kept], "o", ms=3.5, color=BLUE, label="tensor", zorder=3)
        _draw_limit(ax, limits, "gate's limit")
        scale_y(ax, values, tightest(limits))
        where = np.flatnonzero(beyond)
        if len(where):
            ax.plot(where, values[where], "X", ms=8, color=VERMILLION, label="beyond the limit", zorder=4)
            for i in where[:4]:
                ax.annotate(label(names[i], 40), (i, values[i]), xytext=(4, 6), textcoords="offset points", fontsize=8)
        _axes(ax, "tensor, in file order", y_label(m, "measured value"))
        _whole_numbers(ax)
        ax.legend(loc="best")
        return finish(
            figure,
            alt=f"Dot plot: {len(values)} tensors, {_low(values)} to {_high(values)}, {len(where)} beyond the limit.",
            caption="Were the claim false, at least one tensor would stand beyond the dashed limit, marked by a cross "
            "and its name." + _not_finite(values) + _drawn(len(values), len(kept)),
        )


def plot_layer_trace(source: Source) -> Figure | None:
    """Difference per named activation, in the order of the forward pass, one line per operation."""
    m = material(source)
    names, values = traced(m)
    if not np.isfinite(values).any():
        return None
    limit = m.claim.threshold if m.claim else None
    layers, operations, last = places(names)
    with style():
        figure, ax = new_figure(3.5)
        for i, operation in enumerate(dict.fromkeys(operations)):
            at = [k for k, o in enumerate(operations) if o == operation and np.isfinite(values[k])]
            ax.plot(
                [layers[k] for k in at],
                [values[k] for k in at],
                marker=MARKERS[i % len(MARKERS)],
                ms=4,
                lw=1.1,
                color=COLOURS[i % len(COLOURS)],
                label=label(operation, 24),
            )
        _draw_limit(ax, np.array([] if limit is None else [limit]), "limit")
        zeros = scale_y(ax, values, limit)
        _axes(ax, "layer", y_label(m, "rel_l2 (ratio)"))
        _layer_ticks(ax, last)
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        worst = int(np.nanargmax(values))
        return finish(
            figure,
            alt=f"Line chart of {len(names)} activations over the layers; the largest difference is "
            f"{values[worst]:.3g} at {label(names[worst], 60)}{'' if limit is None else f', the limit is {limit:g}'}.",
            caption="Were the claim false, one operation would leave the floor in the layer of the fault, and what "
            "follows it would stay above the dashed limit."
            + zeros
            + (f" {m.omitted} rows not stored." if m.omitted else ""),
        )


def plot_positions(source: Source) -> Figure | None:
    """A difference per position of the stimulus (``rel_l2``, ``kl``, ...) against the claim's limit."""
    m = material(source)
    found = m.series(*metric_keys(m), "rel_l2", "kl", "max_abs", "margin")
    if found is None:
        return plot_series(source)
    key, values = found
    if not np.isfinite(values).any():
        return None
    where = m.series("position", "positions", "step")
    at = where[1] if where and len(where[1]) == len(values) else np.arange(len(values), dtype=np.float64)
    limits = limits_of(m, len(values)) if key in metric_keys(m) else stored_limits(m)
    with style():
        figure, ax = new_figure()
        kept = decimate(values, beyond_limits(m, values, limits))
        ax.plot(at[kept], values[kept], "o", ms=3.5, color=BLUE, zorder=3)
        _draw_limit(ax, limits, "limit", at=at)
        zeros = scale_y(ax, values, tightest(limits))
        _axes(ax, "position (token)", unit_label(m, key))
        _whole_numbers(ax)
        if len(limits):
            ax.legend(loc="best")
        return finish(
            figure,
            alt=f"{key} at {len(values)} positions, from {_low(values)} to {_high(values)}"
            f"{f', limit {tightest(limits):.3g}' if len(limits) else ''}.",
            caption="Were the claim false, points would lie beyond the dashed limit, from the first wrong position on."
            + zeros
            + _not_finite(values)
            + _drawn(len(values), len(kept)),
        )


def plot_throughput(source: Source) -> Figure | None:
    """Every timed sample as a point, the median as a bar, the ceiling of the machine as a line."""
    m = material(source)
    groups = {k: np.asarray(v, dtype=np.float64).ravel() for k, v in m.arrays.items() if is_timing(k, v)}
    groups = {k: v[np.isfinite(v) & (v > 0)] for k, v in groups.items()}
    groups = {k: v for k, v in groups.items() if len(v)}
    if not groups:
        return None
    unit, factor = _time_unit(np.concatenate(list(groups.values())))
    ceiling = ceiling_of(m)
    with style():
        figure, ax = new_figure(1.7 + 0.55 * len(groups))
        for i, samples in enumerate(groups.values()):
            kept = decimate(samples, None)
            lift = ((kept * 7) % 11 - 5) / 40  # a fixed scatter: points beside each other, the same in every run
            ax.plot(samples[kept] * factor, i + lift, MARKERS[i % 6], ms=4, color=COLOURS[i % 6], alpha=0.75)
            middle = float(np.median(samples)) * factor
            ax.plot([middle, middle], [i - 0.28, i + 0.28], color=INK, lw=2, label="median" if i == 0 else None)
        if ceiling is not None:
            ax.axvline(ceiling * factor, color=INK, ls="--", lw=1.2, label="ceiling of the machine")
        said = [label(k.removesuffix("_s_per_token").removesuffix("_s"), 30) for k in groups]
        ax.set_yticks(range(len(groups)), said)
        ax.set_ylim(len(groups) - 0.45, -0.55)
        ax.grid(visible=False, axis="y")
        _axes(ax, f"time per {'token' if any('token' in k for k in groups) else 'sample'} ({unit})", "")
        _time_scale(ax, list(groups.values()), factor, ceiling)
        ax.legend(loc="best")
        medians = (f"{k}: {len(v)} samples, median {np.median(v) * factor:.3g} {unit}" for k, v in groups.items())
        return finish(figure, alt=f"Strip plot. {'; '.join(medians)}.", caption=_timing_caption(ceiling))


def plot_series(source: Source) -> Figure | None:
    """Draw whatever arrays of numbers there are, each against its index; None where there are none."""
    m = material(source)
    lines = {
        k: np.asarray(v, dtype=np.float64).ravel()
        for k, v in m.arrays.items()
        if np.issubdtype(v.dtype, np.number) and v.size > 1 and k not in ABSCISSAE
    }
    lines = {k: v for k, v in lines.items() if np.isfinite(v).any()}
    if not lines:
        return None
    with style():
        figure, ax = new_figure()
        for i, (name, values) in enumerate(list(lines.items())[: len(COLOURS)]):
            kept = decimate(values, None)
            ax.plot(kept, values[kept], marker=MARKERS[i], ms=3, lw=0.9, color=COLOURS[i], label=label(name, 30))
        scale_y(ax, np.concatenate(list(lines.values())), None)
        _axes(ax, "index", "value")
        _whole_numbers(ax)
        ax.legend(loc="best")
        return finish(
            figure,
            alt=f"Lines of {', '.join(label(k, 30) for k in list(lines)[:6])} against their index.",
            caption=f"Were the claim false: {m.claim.falsifier[0].lower()}{m.claim.falsifier[1:]}" if m.claim else "",
        )


def decimate(values: Floats, keep: NDArray[np.bool_] | None, most: int = MOST_POINTS) -> NDArray[np.intp]:
    """
    Choose which points to draw: all, or the least and the greatest of each stretch, and whatever must be kept.

    A plain stride would drop the one bad value that the figure exists for.
    """
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite) <= most:
        return finite
    stretches = np.array_split(finite, most // 2)
    chosen = [s[[int(np.argmin(values[s])), int(np.argmax(values[s]))]] for s in stretches]
    if keep is not None:
        chosen.append(np.flatnonzero(keep & np.isfinite(values))[:most])
    return np.unique(np.concatenate(chosen))


def scale_y(ax: Axes, values: Floats, limit: float | None) -> str:
    """
    Choose the scale: logarithmic where values or limit span decades; exact zeros become hollow points on the floor.

    Returns:
        A sentence for the caption when zeros were drawn so, else nothing.
    """
    known = np.append(values[np.isfinite(values)], [] if limit is None else [limit])
    positive = known[known > 0]
    if (known < 0).any() or not len(positive) or (positive.max() < 30 * positive.min() and len(positive) == len(known)):
        return ""
    floor = 10.0 ** (np.floor(np.log10(positive.min())) - 1)
    if limit is not None and limit > 0:
        floor = min(floor, limit / 1e3)
    ax.set_yscale("log")
    ax.set_ylim(bottom=floor / 2, top=positive.max() * 4)
    _log_ticks(ax.yaxis)
    zero = 0
    for line in list(ax.lines):
        y = np.asarray(line.get_ydata(), dtype=np.float64)
        if line.get_marker() in ("None", "", None) or not (y == 0).any():
            continue
        x = np.asarray(line.get_xdata(), dtype=np.float64)[y == 0]
        ax.plot(x, np.full(len(x), floor), "o", ms=4, mfc=PAPER, mec=line.get_color(), mew=1, zorder=3)
        zero += len(x)
    return " Hollow points on the floor are exactly equal." if zero else ""


FIGURES: dict[str, Plot] = {
    "F-GT-002": plot_positions,
    "F-GT-008": plot_positions,
    "F-GT-010": plot_tensor_statistics,
    "F-DATA-QUALITY-001": plot_tensor_statistics,
    "F-DATA-QUALITY-002": plot_tensor_statistics,
    "F-DATA-QUALITY-003": plot_tensor_statistics,
    "F-DATA-QUALITY-004": plot_tensor_statistics,
    "F-PAR-001": plot_positions,
    "F-PAR-002": plot_layer_trace,
    "F-PAR-003": plot_positions,
    "F-PAR-004": plot_positions,
    "F-PAR-005": plot_positions,
    "F-PAR-008": plot_positions,
    "F-PAR-009": plot_positions,
    "F-PAR-010": plot_layer_trace,
    "F-THR-002": plot_throughput,
    "F-THR-006": plot_throughput,
    "F-THR-007": plot_throughput,
    "F-THR-008": plot_throughput,
}


def plot(source: Source) -> Figure | None:
    """Draw the figure that belongs to the claim of a finding or record; None where it has none or nothing to draw."""
    drawer = FIGURES.get(source.claim if isinstance(source, Finding) else source.id)
    return drawer(source) if drawer else None


def figure_svg(evidence: Source) -> str | None:
    """The claim's figure as SVG text that follows light and dark; None where there is nothing to draw."""
    figure = plot(evidence)
    return None if figure is None else adaptive(svg(figure))


def label(text: object, limit: int) -> str:
    """A name that any font can draw: cleaned, cut, and ASCII (a glyph that the font lacks would be a warning)."""
    return clean(text, limit).encode("ascii", "backslashreplace").decode("ascii")


def _timing_caption(ceiling: float | None) -> str:
    if ceiling is None:
        return "Were the claim false, samples would be missing, or too short for the clock to see."
    return "Were the claim false, samples would lie left of the dashed line: faster than memory can be read."


def _time_unit(samples: Floats) -> tuple[str, float]:
    middle = float(np.median(samples))
    return ("s", 1.0) if middle >= 0.5 else ("ms", 1e3) if middle >= 5e-4 else ("µs", 1e6)


def _time_scale(ax: Axes, groups: Sequence[Floats], factor: float, ceiling: float | None) -> None:
    values = np.concatenate([*groups, np.array([] if ceiling is None else [ceiling])]) * factor
    if values.max() > 30 * values.min():
        ax.set_xscale("log")
        _log_ticks(ax.xaxis)
        ax.set_xlim(values.min() / 2, values.max() * 2)
    else:
        ax.set_xlim(0, values.max() * 1.15)


def _draw_limit(ax: Axes, limits: Floats, name: str, at: Floats | None = None) -> None:
    if len(limits) == 1 or (len(limits) and np.nanmin(limits) == np.nanmax(limits)):
        ax.axhline(float(limits[0]), color=INK, ls="--", lw=1.2, label=f"{name} {limits[0]:.3g}", marker="")
    elif len(limits):
        x = at if at is not None and len(at) == len(limits) else np.arange(len(limits))
        ax.plot(x, limits, color=INK, ls="--", lw=1.2, drawstyle="steps-mid", label=name, marker="")


def _axes(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.tick_params(length=3, color=MUTED)


def _whole_numbers(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))


def _log_ticks(axis: Any) -> None:
    """Write powers as ``1e-07``: matplotlib's own are mathematics, which the style turns off."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0e}" if not 0.01 <= v <= 1000 else f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def _layer_ticks(ax: Axes, last: int) -> None:
    step = max(1, -(-(last + 1) // 10))
    at = list(range(0, last + 1, step))
    ax.set_xticks([*at, last + 1], [*(str(i) for i in at), "end"])


def _low(values: Floats) -> str:
    return f"{np.nanmin(values[np.isfinite(values)]):.3g}"


def _high(values: Floats) -> str:
    return f"{np.nanmax(values[np.isfinite(values)]):.3g}"


def _not_finite(values: Floats) -> str:
    count = int((~np.isfinite(values)).sum())
    return f" {count} of {len(values)} values are not finite and not drawn." if count else ""


def _drawn(count: int, kept: int) -> str:
    return f" {kept} of {count} points drawn: the extremes of each stretch." if count > MOST_POINTS else ""

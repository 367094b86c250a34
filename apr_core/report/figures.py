"""Figures as functions of evidence: they read ``rows`` and ``arrays`` of a record or a finding, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from apr_core.falsify.finding import Finding
from apr_core.report.material import (
    Floats,
    Source,
    by_position,
    is_number,
    least_time,
    limits_of,
    material,
    places,
    timings,
    traced,
    violations,
)
from apr_core.report.speed import plot_compiled
from apr_core.report.style import (
    BLUE,
    COLOURS,
    INK,
    MARKERS,
    MUTED,
    ORANGE,
    PAPER,
    VERMILLION,
    finish,
    log_ticks,
    new_figure,
    style,
)
from apr_core.report.text import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Plot = Callable[[Source], "Figure | None"]

MOST_POINTS = 500  # an SVG of more is slow to open; beyond it the extremes of each stretch are drawn

# What the density, finiteness, variation and spot-row gates measure, and of what.
_GATES = {
    "F-DATA-QUALITY-001": ("zeros (%)", "tensor"),
    "F-DATA-QUALITY-002": ("non-finite values (count)", "tensor"),
    "F-DATA-QUALITY-003": ("L2 norm (weight units)", "tensor"),
    "F-DATA-QUALITY-004": ("L2 norm (weight units)", "spot row"),
    "F-DATA-QUALITY-005": ("dead rows (%)", "tensor"),
}
_UNITS = {"kl": "nat", "rel_l2": "ratio"}


def plot_tensor_statistics(source: Source) -> Figure | None:
    """One point per tensor against the gate's limits; what the gate refused is crossed and named."""
    m = material(source)
    values = m.numbers("measured")
    if values is None or not np.isfinite(values).any():
        return None
    values, limits, refused = values.ravel(), limits_of(m), violations(m)
    what, thing = _GATES.get(m.claim.id if m.claim else "", ("measured value", "tensor"))
    with style():
        figure, ax = new_figure(3.3)
        kept = decimate(values)
        ax.plot(kept, values[kept], "o", ms=3.5, color=BLUE, label=thing if refused else None, zorder=3)
        for value in limits:
            _draw_limit(ax, value, "gate's limit")
        _cross(ax, values, refused)
        zeros = scale_y(ax, values, limits, "are zero")
        _axes(ax, f"{thing}, in file order", what)
        _whole_numbers(ax)
        _legend(ax)
        return finish(
            figure,
            alt=f"Dot plot: {what} of {len(values)} {thing}s, {_span(values)}{_said(limits)}; {len(refused)} refused.",
            caption=f"Were the claim false, at least one {thing} would stand beyond a dashed limit, crossed and named."
            f"{zeros}" + _not_drawn(values, len(kept)),
        )


def _cross(ax: Axes, values: Floats, refused: Sequence[tuple[str, float]]) -> None:
    """Cross the points that were refused and name the first four: more would cover each other."""
    at = [(name, int(i)) for name, value in refused for i in np.flatnonzero(np.isclose(values, value, rtol=1e-6))[:1]]
    if at:
        where = np.array([i for _, i in at])
        ax.plot(where, values[where], "X", ms=8, color=VERMILLION, label="refused", zorder=4)
    for name, i in at[:4]:
        ax.annotate(label(name, 40), (i, values[i]), xytext=(5, 6), textcoords="offset points", fontsize=8)


def plot_layer_trace(source: Source) -> Figure | None:
    """Worst difference per named activation, over the limit of its name, along the layers: one line per operation."""
    names, values, bounds = traced(material(source))
    if not np.isfinite(values).any():
        return None
    values, limits = (values, []) if bounds is None else (values / bounds, [1.0])
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
                mfc=None if i < len(COLOURS) else PAPER,
                label=label(operation, 14) if i < 14 else None,
            )
        for value in limits:
            _draw_limit(ax, value, "limit")
        zeros = scale_y(ax, values, limits)
        _axes(ax, "layer", "rel_l2 over its limit (ratio)" if limits else "rel_l2 (ratio)")
        _layer_ticks(ax, last)
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.03))
        worst = int(np.nanargmax(np.where(np.isfinite(values), values, -np.inf)))
        return finish(
            figure,
            alt=f"Line chart of {len(names)} activations over the layers; the largest difference is "
            f"{values[worst]:.3g} at {label(names[worst], 60)}{_said(limits)}.",
            caption="Were the claim false, one operation would leave the floor in the layer of the fault, and what "
            f"follows it would stay above the dashed limit.{zeros}" + _not_drawn(values, len(values)),
            right=1.25,
        )


def plot_positions(source: Source) -> Figure | None:
    """The claim's metric per position of the stimulus against its limit; one colour per series."""
    m = material(source)
    series = {k: v for k, v in list(by_position(m).items())[: len(COLOURS)] if np.isfinite(v).any()}
    if not series:
        return None
    key = next(iter(series)).removesuffix("_copy")
    base = next((b for b in _UNITS if key.startswith(b)), key)
    limits = limits_of(m)
    every = np.concatenate(list(series.values()))
    with style():
        figure, ax = new_figure(3.3)
        drawn = 0
        for i, (name, values) in enumerate(series.items()):
            where = m.numbers("position")
            at = (
                where if where is not None and where.shape == values.shape else np.arange(len(values), dtype=np.float64)
            )
            kept = decimate(values)
            drawn += len(kept)
            said = label(name, 24) if len(series) > 1 else None
            ax.plot(at[kept], values[kept], MARKERS[i], ms=3.5, color=COLOURS[i], label=said, zorder=3)
        for value in limits:
            _draw_limit(ax, value, "limit")
        zeros = scale_y(ax, every, limits)
        _axes(ax, "position (token)", f"{base} ({_UNITS.get(base, 'ratio')})")
        _whole_numbers(ax)
        _legend(ax)
        wrong = "points would lie beyond the dashed limit, from the first wrong position on"
        lone = "the points would lie far above what the type explains, at many positions"
        told = f"Were the claim false, {wrong if limits else lone}."
        if m.claim is None:
            told = "Coarser types lie higher on the whole; were one damaged, its points would lie above a coarser one."
        return finish(
            figure,
            alt=f"Dot plot: {', '.join(label(k, 24) for k in series)} at {len(values)} positions, "
            f"{_span(every)}{_said(limits)}.",
            caption=f"{told}{zeros}" + _not_drawn(every, drawn),
        )


def plot_margins(source: Source) -> Figure | None:
    """Margin of the top token per position over the near-tie band; flips are crossed, near-ties ringed."""
    m = material(source)
    margin, tau, flipped = m.numbers("margin"), m.numbers("tau"), m.numbers("flipped")
    if margin is None or not np.isfinite(margin).any():
        return None
    margin = margin.ravel()
    with style():
        figure, ax = new_figure(3.3)
        kept = decimate(margin)
        ax.plot(kept, margin[kept], "o", ms=3.5, color=BLUE, label="margin of the top token", zorder=3)
        if tau is not None and tau.size == margin.size:
            band = decimate(tau.ravel())
            ax.plot(band, tau.ravel()[band], color=INK, ls="--", lw=1.2, label="near-tie below", marker="")
        known = flipped is not None and flipped.size == margin.size
        other = np.flatnonzero(flipped.ravel() > 0) if flipped is not None and known else np.array([], dtype=np.intp)
        decided = margin[other] > (tau.ravel()[other] if tau is not None and tau.size == margin.size else 0.0)
        ties, other = other[~decided], other[decided]
        if len(ties):
            ax.plot(ties, margin[ties], "o", ms=8, mfc="none", mec=ORANGE, mew=1.5, label="near-tie flip", zorder=4)
        if len(other):
            ax.plot(other, margin[other], "X", ms=8, color=VERMILLION, label="decisive flip", zorder=4)
        zeros = scale_y(ax, np.append(margin, [] if tau is None else tau.ravel()), [], "are exact ties")
        _axes(ax, "position (token)", "margin (logit)")
        _whole_numbers(ax)
        _legend(ax)
        return finish(
            figure,
            alt=f"Dot plot: margin of the top token at {len(margin)} positions, {_span(margin)}; {len(other)} "
            f"decisive flips, {len(ties)} near-tie flips.",
            caption=(
                "Were the claim false, a cross would stand above the dashed line: another top token although the "
                "margin decides."
                if m.claim
                else "A cross is a token that was decided and became another one, a ring a coin toss. Rounded weights "
                "cost a few of both; a second forward of the same weights must show no cross."
            )
            + zeros
            + _not_drawn(margin, len(kept)),
        )


def plot_throughput(source: Source) -> Figure | None:
    """Every timed sample as a point, the median as a bar, and the time that no token can undercut as a line."""
    m = material(source)
    groups = timings(m)
    if not groups:
        return None
    unit, factor = _time_unit(np.concatenate(list(groups.values())))
    least = least_time(m)
    with style():
        figure, ax = new_figure(1.6 + 0.5 * len(groups))
        for i, samples in enumerate(groups.values()):
            kept = decimate(samples)
            lift = ((kept * 7) % 11 - 5) / 40  # a fixed scatter: points beside each other, the same in every run
            ax.plot(samples[kept] * factor, i + lift, MARKERS[i % 6], ms=4, color=COLOURS[i % 6], alpha=0.75)
            middle = float(np.median(samples)) * factor
            ax.plot([middle, middle], [i - 0.28, i + 0.28], color=INK, lw=2, label="" if i else "median")
        bounded = [i for i, name in enumerate(groups) if name.endswith("_per_token")]
        if least is not None and bounded:
            ends = [bounded[0] - 0.42, bounded[-1] + 0.42]
            ax.plot([least[1] * factor] * 2, ends, color=INK, ls="--", lw=1.2, label=least[0])
        ax.set_yticks(range(len(groups)), [_timed(name) for name in groups])
        ax.set_ylim(len(groups) - 0.45, -0.55)
        ax.grid(visible=False, axis="y")
        _axes(ax, f"time ({unit})", "")
        _time_scale(ax, [*groups.values(), np.array([least[1]] if least else [])], factor)
        _legend(ax)
        said = [f"{_timed(k)}: {len(v)} samples, median {np.median(v) * factor:.3g} {unit}" for k, v in groups.items()]
        if least is not None:
            said.append(f"{least[0]} {least[1] * factor:.3g} {unit}")
        return finish(
            figure,
            alt=f"Strip plot of times. {'; '.join(said)}.",
            caption="Were the claim false, samples per token would lie left of the dashed line: shorter than possible."
            if least
            else "Were the claim false, samples would be missing, or too short for the clock to see.",
            left=1.3,
        )


def plot_power(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """
    Detection power: the share of random draws that each claim sees against their severity, one panel per kind.

    Args:
        rows: ``claim``, ``kind``, ``severity`` (above zero), ``seen`` and ``draws``.
    """
    panels = _panels(rows)
    if not panels:
        return None
    from matplotlib.figure import Figure

    said, blind, high = [], 0, sum(_panel_height(lines) for lines in panels.values())
    with style():
        figure = Figure(figsize=(6.6, high + 0.5))
        axes = figure.subplots(
            len(panels), squeeze=False, gridspec_kw={"height_ratios": [_panel_height(p) for p in panels.values()]}
        )[:, 0]
        for ax, (kind, lines) in zip(axes, panels.items(), strict=True):
            sighted = sorted((limit, claim) for claim, (_, y, limit) in lines.items() if y.any())
            blind += len(lines) - len(sighted)
            for i, (limit, claim) in enumerate(sighted):
                x, y, _ = lines[claim]
                mark, colour, fill = MARKERS[i % 6], COLOURS[i % 6], None if i < 6 else PAPER
                name = f"{label(claim, 22)}, from {limit:.1g}" if np.isfinite(limit) else label(claim, 22)
                ax.plot(x, y, mark, ls="-", ms=3.5, lw=1, color=colour, mfc=fill, label=name)
                if np.isfinite(limit):
                    ax.axvline(limit, color=colour, ls=":", lw=1, marker="")
            if sighted and np.isfinite(sighted[0][0]):
                said.append(f"{label(kind, 40)}: {label(sighted[0][1], 22)} from {sighted[0][0]:.3g} on")
            ax.set_xscale("log")
            log_ticks(ax.xaxis)
            ax.set_ylim(-0.06, 1.06)
            ax.set_title(label(kind, 60), loc="left")
            _axes(ax, "", "share seen")
            if sighted:
                ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.1))
        axes[-1].set_xlabel("severity (share, or relative size)")
        finished = finish(
            figure,
            alt=f"Detection power in {len(panels)} panels; the sharpest sight is {'; '.join(said) or 'nowhere'}.",
            caption="Each line is a claim that sees damage of this kind; the dotted line, and the number behind its "
            "name, is its limit of sight: the severity from which on every draw is seen. Were a claim "
            "blind, its line would stay on the floor" + (f"; {blind} that do are left out." if blind else "."),
            right=2.45,
        )
        finished.subplots_adjust(hspace=0.55)
        return finished


def _panel_height(lines: Mapping[str, Any]) -> float:
    """In inches: room for the names beside it."""
    return max(1.5, 0.35 + 0.17 * len(lines))


def _panels(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[Floats, Floats, float]]]:
    """Kind -> claim -> severities, shares seen, limit of sight (infinite when blind); equal severities are pooled."""
    pooled: dict[str, dict[str, dict[float, Floats]]] = {}
    for row in rows:
        counted = [row.get(k) for k in ("severity", "seen", "draws")]
        severity, seen, draws = (float(v) if is_number(v) else 0.0 for v in counted)  # type: ignore[arg-type]
        if severity > 0 and draws > 0:
            points = pooled.setdefault(str(row.get("kind", "")), {}).setdefault(str(row.get("claim", "")), {})
            points[severity] = points.get(severity, np.zeros(2)) + np.array([seen, draws])
    found: dict[str, dict[str, tuple[Floats, Floats, float]]] = {}
    for kind, claims in pooled.items():
        for claim, points in claims.items():
            x = np.array(sorted(points))
            y = np.array([points[v][0] / points[v][1] for v in sorted(points)])
            missed = np.flatnonzero(~(y >= 1))
            first = 0 if not len(missed) else int(missed[-1]) + 1
            found.setdefault(kind, {})[claim] = (x, y, float(x[first]) if first < len(x) else float("inf"))
    return found


FIGURES: dict[str, Plot] = {
    "F-GT-002": plot_positions,
    "F-GT-008": plot_positions,
    "F-DATA-QUALITY-001": plot_tensor_statistics,
    "F-DATA-QUALITY-002": plot_tensor_statistics,
    "F-DATA-QUALITY-003": plot_tensor_statistics,
    "F-DATA-QUALITY-004": plot_tensor_statistics,
    "F-DATA-QUALITY-005": plot_tensor_statistics,
    "F-PAR-001": plot_positions,
    "F-PAR-002": plot_layer_trace,
    "F-PAR-003": plot_positions,
    "F-PAR-004": plot_positions,
    "F-PAR-005": plot_margins,
    "F-PAR-006": plot_margins,
    "F-PAR-008": plot_positions,
    "F-PAR-009": plot_margins,
    "F-PAR-010": plot_layer_trace,
    "F-THR-002": plot_throughput,
    "F-THR-006": plot_compiled,
    "F-THR-008": plot_throughput,
}


def plot(source: Source) -> Figure | None:
    """Draw the figure that belongs to the claim of a finding or record; None where it has none or nothing to draw."""
    drawer = FIGURES.get(source.claim if isinstance(source, Finding) else source.id)
    return drawer(source) if drawer else None


def decimate(values: Floats, most: int = MOST_POINTS) -> NDArray[np.intp]:
    """
    Choose which points to draw: all that are finite, or the least and the greatest of each stretch.

    A plain stride would drop the one bad value that the figure exists for.
    """
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite) <= most:
        return finite
    chosen = [s[[int(np.argmin(values[s])), int(np.argmax(values[s]))]] for s in np.array_split(finite, most // 2)]
    return np.unique(np.concatenate(chosen))


def scale_y(ax: Axes, values: Floats, limits: Sequence[float], zero: str = "are exactly equal") -> str:
    """
    Choose the scale: logarithmic where values or limits span decades; exact zeros become hollow points on the floor.

    Returns:
        A sentence for the caption when zeros were drawn so, else nothing.
    """
    known = np.append(values[np.isfinite(values)], limits)
    positive = known[known > 0]
    near = len(positive) > 0 and positive.max() < 30 * positive.min()
    if (known < 0).any():
        return ""
    if not len(positive) or (near and (len(positive) == len(known) or positive.min() > 0.01)):
        top = 1.15 * positive.max() if len(positive) else 1.0
        ax.set_ylim(bottom=-0.05 * top, top=top)
        return ""
    # zeros need a decade of their own; where everything is zero, three below the limit say so
    below = 0 if (known > 0).all() else 1 if len(positive) > 1 else 3
    floor = 10.0 ** (np.floor(np.log10(positive.min())) - below)
    ax.set_ylim(bottom=floor / 2, top=positive.max() * 4)  # first: a scale of equal values warns when it sets itself
    ax.set_yscale("log")
    log_ticks(ax.yaxis)
    hollow, rings = 0, 0
    for line in list(ax.lines):
        y = np.asarray(line.get_ydata(), dtype=np.float64)
        if line.get_marker() in ("None", "", None) or not (y == 0).any():
            continue
        x = np.asarray(line.get_xdata(), dtype=np.float64)[y == 0]
        size = 4 + 2.5 * rings  # rings around each other: the zeros of two series lie in one place
        ax.plot(x, np.full(len(x), floor), "o", ms=size, mfc="none", mec=line.get_color(), mew=1, zorder=3)
        hollow, rings = hollow + len(x), rings + 1
    return f" Hollow points on the floor {zero}." if hollow else ""


def label(text: object, limit: int) -> str:
    """A name that any font can draw: cleaned, cut, and ASCII (a glyph that the font lacks would be a warning)."""
    return clean(text, limit).encode("ascii", "backslashreplace").decode("ascii")


def _timed(name: str) -> str:
    return f"{label(name.removesuffix('_s_per_token').removesuffix('_s'), 12)}{', a token' if 'token' in name else ''}"


def _time_unit(samples: Floats) -> tuple[str, float]:
    middle = float(np.median(samples))
    return ("s", 1.0) if middle >= 0.5 else ("ms", 1e3) if middle >= 5e-4 else ("µs", 1e6)


def _time_scale(ax: Axes, groups: Sequence[Floats], factor: float) -> None:
    values = np.concatenate(groups) * factor
    if values.max() > 30 * values.min():
        ax.set_xscale("log")
        log_ticks(ax.xaxis)
        ax.set_xlim(values.min() / 2, values.max() * 2)
    else:
        ax.set_xlim(0, values.max() * 1.15)


def _draw_limit(ax: Axes, value: float, name: str) -> None:
    """A dashed line with its name and value on it: of two limits a legend would not say which is which."""
    ax.axhline(value, color=INK, ls="--", lw=1.2, marker="")
    ax.annotate(
        f"{name} {value:.3g}", (0.995, value), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", ha="right", fontsize=8, color=INK,
    )  # fmt: skip


def _axes(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.tick_params(length=3, color=MUTED)


def _legend(ax: Axes) -> None:
    """Set the legend above the axes: never on the data, and no search for a free place, which warns when it is slow."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, borderaxespad=0.2, columnspacing=1.6)


def _whole_numbers(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
    low, high = ax.get_xlim()
    if high - low < 1:  # a single point: fractions of a tensor are no places
        ax.set_xlim(-0.5, 0.5)
    if ax.get_ylabel().endswith("(count)"):
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))


def _layer_ticks(ax: Axes, last: int) -> None:
    at = list(range(0, last + 1, max(1, -(-(last + 1) // 10))))
    ax.set_xticks([*at, last + 1], [*(str(i) for i in at), "end"])


def _span(values: Floats) -> str:
    finite = values[np.isfinite(values)]
    return f"from {finite.min():.3g} to {finite.max():.3g}"


def _said(limits: Sequence[float]) -> str:
    return f", limit {' and '.join(f'{v:.3g}' for v in limits)}" if limits else ""


def _not_drawn(values: Floats, drawn: int) -> str:
    """Say what the eye cannot see: values that are not finite, and points left out of a long series."""
    lost = int((~np.isfinite(values)).sum())
    said = f" {lost} of {len(values)} values are not finite and not drawn." if lost else ""
    return said + (f" {drawn} of {len(values)} points drawn: the extremes." if drawn < len(values) - lost else "")

"""Figure of the compiled engine: where it stands under the roofline, where a token's time goes, what context costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from apr_core.report.material import Source, is_number, material
from apr_core.report.style import COLOURS, INK, MARKERS, PAPER, finish, log_ticks, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PHASE = "ms: "


def plot_compiled(source: Source) -> Figure | None:
    """
    Draw three panels from the rows of F-THR-006: roofline, time of a token by operation, rate against context.

    Returns:
        None where nothing was timed.
    """
    m = material(source)
    known = {str(row["quantity"]): row["value"] for row in m.rows if "quantity" in row and is_number(row.get("value"))}
    values = {name: float(value) for name, value in known.items()}
    needed = ("decode_tok_s", "prefill_tok_s", "read_gb_s, best", "bytes per token", "operations per token")
    if not all(values.get(name, 0) > 0 for name in needed):
        return None
    phases = {name.removeprefix(_PHASE): v for name, v in values.items() if name.startswith(_PHASE) and v > 0}
    at, spent = m.arrays.get("context_tokens", np.empty(0)), m.arrays.get("context_s", np.empty(0))
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(6.6, 6.4))
        roof, split, context = figure.subplots(
            3, 1, gridspec_kw={"height_ratios": [2.2, 0.16 * len(phases) + 0.6, 1.6]}
        )
        _roofline(roof, values)
        _split(split, phases)
        _context(context, at, spent)
        share = values["decode_tok_s"] * values["bytes per token"] / 1e9 / values["read_gb_s, best"]
        most = max(phases, key=lambda name: phases[name]) if phases else "unknown"
        finished = finish(
            figure,
            alt=f"Roofline: decoding reaches {share:.0%} of the measured bandwidth. Most of a token's time: {most}. "
            f"Rate at {len(at)} lengths of context.",
            caption="Were the claim false, the point of decode would lie above the slanted line: more bytes per "
            "second than the machine reads. A point far below it is explained by the bars. Peers are the hollow "
            "points: their rates over the same bytes, in turns with ours.",
            left=1.45,
        )
        finished.subplots_adjust(hspace=0.75)
        return finished


def _roofline(ax: Axes, values: Mapping[str, float]) -> None:
    """Operations per second against operations per byte: bandwidth is a slanted line that no sound decode crosses."""
    operations, nbytes = values["operations per token"], values["bytes per token"]
    points: dict[str, tuple[float, float]] = {
        "decode": (operations / nbytes, values["decode_tok_s"] * operations / 1e9),
        "prefill": (values["prompt"] * operations / nbytes, values["prefill_tok_s"] * operations / 1e9),
    }
    x = np.geomspace(min(p[0] for p in points.values()) / 3, max(p[0] for p in points.values()) * 3, 50)
    ax.plot(x, x * values["read_gb_s, best"], color=INK, ls="--", lw=1.2, label="read bandwidth, measured")
    for i, (name, (intensity, rate)) in enumerate(points.items()):
        ax.plot(intensity, rate, MARKERS[i], ms=7, ls="", color=COLOURS[i], label=name)
        for j, (peer, speed) in enumerate(_peers(values, f"{name}_tok_s of ").items()):
            ax.plot(
                intensity, speed * operations / 1e9, MARKERS[i], ms=7, ls="", mfc=PAPER, mec=COLOURS[2 + j % 4],
                label=f"{name}, {peer}",
            )  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    log_ticks(ax.xaxis)
    log_ticks(ax.yaxis)
    ax.set_xlabel("intensity (operations per byte of weights)")
    ax.set_ylabel("rate (10⁹ operations/s)")
    ax.legend(loc="best")


def _peers(values: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _split(ax: Axes, phases: Mapping[str, float]) -> None:
    names = sorted(phases, key=lambda name: phases[name])
    ax.barh(range(len(names)), [phases[name] for name in names], color=COLOURS[0], height=0.7)
    ax.set_yticks(range(len(names)), names)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("time of one token (ms)")


def _context(ax: Axes, at: np.ndarray[Any, Any], spent: np.ndarray[Any, Any]) -> None:
    sound = spent > 0
    ax.plot(at[sound], 1 / spent[sound], MARKERS[0], ls="-", ms=5, color=COLOURS[0])
    ax.set_ylim(0, 1.15 / spent[sound].min() if sound.any() else None)
    ax.set_xlabel("context (tokens)")
    ax.set_ylabel("tokens / s")

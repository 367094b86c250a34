"""Figures of conversions: one fingerprint along a round trip, and the quant passport."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from apr_core.report.figures import label
from apr_core.report.material import Source, material
from apr_core.report.style import BLUE, COLOURS, INK, MARKERS, VERMILLION, finish, new_figure, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_round_trip(source: Source) -> Figure | None:
    """Size of the file at every step of a round trip, and whether its fingerprint is that of the start."""
    rows = [row for row in material(source).rows if "fingerprint" in row]
    if not rows:
        return None
    sizes = np.array([float(str(row["bytes"])) for row in rows]) / 1e6
    same = [bool(row["same"]) for row in rows]
    with style():
        figure, ax = new_figure(1.2 + 0.42 * len(rows))
        for i, (size, equal) in enumerate(zip(sizes, same, strict=True)):
            ax.barh(i, size, height=0.55, color=BLUE if equal else VERMILLION, hatch="" if equal else "//", zorder=2)
            said = f"{str(rows[i]['fingerprint'])[:8]}{'' if equal else ', another'}"
            ax.annotate(said, (size, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
        ax.set_yticks(range(len(rows)), [label(row["step"], 30) for row in rows])
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.set_xlim(0, 1.25 * sizes.max())
        ax.grid(visible=False, axis="y")
        ax.set_xlabel("size of the weights file (MB)")
        alike = f"{sum(same)} of {len(rows)} steps have the fingerprint of the start"
        return finish(
            figure,
            alt=f"Bars of file sizes along the conversions; {alike}.",
            caption="Beside each bar the first digits of the fingerprint of what the tensors say. Had a conversion "
            "changed a value, its bar and every later one of that way would be hatched and carry other digits.",
            left=1.75,
        )


def plot_passport(source: Source) -> Figure | None:
    """Distance of each tensor from its reference by type, with the share of the parameters that each type holds."""
    rows = [row for row in material(source).rows if "parameters" in row]
    if not rows:
        return None
    total = sum(int(str(row["parameters"])) for row in rows)
    types = sorted({str(row["type"]) for row in rows}, key=lambda t: -_share(rows, t, total))
    with style():
        figure, ax = new_figure(1.5 + 0.5 * len(types))
        said = []
        for i, name in enumerate(types):
            found = [float(str(r["sqnr_db"])) for r in rows if r["type"] == name and r.get("sqnr_db") is not None]
            lift = ((np.arange(len(found)) * 7) % 11 - 5) / 30  # a fixed scatter, the same in every run
            ax.plot(found, i + lift, MARKERS[i % 6], ms=4, color=COLOURS[i % 6], alpha=0.8)
            middle = f"SQNR {np.median(found):.1f} dB in the middle" if found else "exact, or not measured"
            said.append(f"{name}: {100 * _share(rows, name, total):.1f} % of the parameters, {middle}")
            if not found:
                ax.annotate("exact: no noise to draw", (0.02, i), xycoords=("axes fraction", "data"), va="center")
        ticks = [f"{label(name, 12)} ({100 * _share(rows, name, total):.1f} %)" for name in types]
        ax.set_yticks(range(len(types)), ticks)
        ax.set_ylim(len(types) - 0.4, -0.6)
        ax.grid(visible=False, axis="y")
        ax.set_xlabel("signal to quantisation noise (dB), one point per tensor")
        return finish(
            figure,
            alt=f"Strip plot of the distance of each tensor by type. {'; '.join(said)}.",
            caption="In brackets the share of the parameters. Were the label a lie, another type would hold them; were "
            "a tensor damaged or quantised twice, its point would lie left of those of its type.",
            left=1.45,
        )


def _share(rows: Sequence[Mapping[str, object]], name: str, total: int) -> float:
    """Share of the parameters that a type holds."""
    return sum(int(str(row["parameters"])) for row in rows if row["type"] == name) / total

"""The scatter of logits: each sampled logit of a candidate over the reference's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from apr_core.report.figures import label
from apr_core.report.material import Source, material
from apr_core.report.style import COLOURS, INK, MARKERS, finish, new_figure, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCE = "logits_reference"


def plot_scatter(source: Source) -> Figure | None:
    """Draw ``logits_*`` arrays over ``logits_reference``, one mark per candidate; None where there is no such pair."""
    m = material(source)
    x = m.numbers(REFERENCE)
    found = {k: m.numbers(k) for k in m.arrays if k.startswith("logits_") and k != REFERENCE}
    series = {k: v for k, v in found.items() if v is not None and x is not None and v.shape == x.shape}
    if x is None or not series:
        return None
    low, high = float(np.nanmin(x)), float(np.nanmax(x))
    said = []
    with style():
        figure, ax = new_figure(4.2)
        ax.plot([low, high], [low, high], color=INK, ls="--", lw=1, label="equal", zorder=2)
        for i, (name, y) in enumerate(series.items()):
            off = np.abs(y - x)
            shown = label(name.removeprefix("logits_"), 24)
            said.append(f"{shown} is at most {np.nanmax(off):.3g} off, {np.nanmedian(off):.3g} in the middle")
            ax.plot(x, y, MARKERS[i % 6], ms=3, color=COLOURS[i % 6], alpha=0.6, label=shown, zorder=4 - i)
        ax.set_xlabel("logit of the reference (nat)")
        ax.set_ylabel("logit of the candidate (nat)")
        ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, borderaxespad=0.2)
        return finish(
            figure,
            alt=f"Scatter of {x.size} logits over the reference's: {'; '.join(said)}.",
            caption="Rounding thickens the dashed line evenly. A permutation, which leaves norm and top token alone, "
            "would be a cloud beside it; a wrong scale another slope; an offset a parallel.",
        )

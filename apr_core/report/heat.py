"""The heat map of a comparison of traces: every activation against every metric."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from apr_core.report.material import Source, is_number, material
from apr_core.report.style import finish, new_figure, style
from apr_core.report.text import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = {"over limit": "rel_l2", "max_abs": "max_abs", "1 - cosine": "cosine", "nmse": "nmse"}
MOST_ROWS = 60
ON_DARK, ON_BRIGHT = "#ffffff", "#101010"  # of the cells, which do not follow a page into its dark scheme


def plot_heat(source: Source) -> Figure | None:
    """
    Draw activations in order of computation against metrics; a shade is a decade, within its column.

    None where the rows hold no comparison of traces.
    """
    wanted = (*METRICS.values(), "limit")
    rows = [row for row in material(source).rows if all(is_number(row.get(key)) for key in wanted)][:MOST_ROWS]
    if not rows:
        return None
    columns = {name: np.array([float(row[key]) for row in rows]) for name, key in METRICS.items()}
    columns["over limit"] = columns["over limit"] / np.array([float(row["limit"]) for row in rows])
    columns["1 - cosine"] = np.abs(1 - columns["1 - cosine"])
    values = np.stack(list(columns.values()), axis=1)
    decades = np.log10(np.maximum(values, 1e-17))
    shades = (decades - decades.min(axis=0)) / np.maximum(np.ptp(decades, axis=0), 1.0)
    worst = int(columns["over limit"].argmax())
    names = [clean(row.get("name", ""), 30).encode("ascii", "backslashreplace").decode("ascii") for row in rows]
    with style():
        figure, ax = new_figure(0.8 + 0.2 * len(rows))
        ax.imshow(shades, cmap="cividis", aspect="auto", vmin=0, vmax=1)
        ax.set_xticks(range(len(columns)), list(columns))
        ax.set_yticks(range(len(rows)), names)
        ax.grid(visible=False)
        for (y, x), value in np.ndenumerate(values):
            ax.text(
                x,
                y,
                f"{value:.1e}",
                ha="center",
                va="center",
                color=ON_BRIGHT if shades[y, x] > 0.6 else ON_DARK,
                size=7,
            )
        return finish(
            figure,
            alt=f"Heat map of {len(rows)} activations and {len(columns)} metrics; the furthest is {names[worst]}, "
            f"{values[worst, 0]:.2g} of its limit.",
            caption="Were a forward wrong, every column would turn bright from the activation of the fault on.",
            left=1.5,
        )

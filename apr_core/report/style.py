"""One look for all figures: colours that hold for colour-blind readers, one way to make an SVG of them."""

from __future__ import annotations

import base64
import io
import re
import textwrap
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#24292e", "#57606b", "#d9dee3", "#fffffe"
# Okabe and Ito's palette without its yellow (too faint on white); markers differ too, so print in grey stays readable.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")

_DARK = {
    INK: "#e8eaed",
    MUTED: "#a9b1ba",
    GRID: "#3a4048",
    PAPER: "none",
    BLUE: "#4fadec",
    VERMILLION: "#ff8f52",
    GREEN: "#35c99d",
    PURPLE: "#e6a5c8",
    ORANGE: "#f2b73c",
    SKY: "#93d1f5",
}
_MARK = "<!-- apr figure -->"
_STACK = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
CAPTION = "caption"

RC: dict[str, Any] = {
    "axes.axisbelow": True,  # a grid that crosses bars looks like a part of them
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.facecolor": PAPER,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same metrics on every machine
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "apr",  # without it the ids in an SVG differ from run to run
    "text.color": INK,
    "text.parse_math": False,  # a tensor name with dollar signs is not mathematics
    "xtick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.color": MUTED,
    "ytick.labelsize": 8,
}


def style() -> AbstractContextManager[None]:
    """Apply the look within a ``with`` block; nothing leaks into other figures of a notebook."""
    from matplotlib import rc_context

    context: AbstractContextManager[None] = rc_context(RC)
    return context


def new_figure(height: float) -> tuple[Figure, Axes]:
    """Make a figure without pyplot (which keeps every figure alive) with one axes; ``height`` in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6, height))
    return figure, figure.add_subplot()


def finish(figure: Figure, *, alt: str, caption: str, left: float = 0.8, right: float = 0.15) -> Figure:
    """
    Attach the alternative text, set the margins, and write the caption (what would have looked different) below.

    Margins are fixed, in inches: matplotlib's automatic layout draws everything twice, for the same picture.
    """
    figure.set_label(alt)
    lines = textwrap.wrap(caption, 104)
    _margins(figure, left, right, 0.52 + 0.16 * len(lines))
    text = figure.text(0.012, 0.02, "\n".join(lines), fontsize=8, color=MUTED, va="bottom", ha="left", linespacing=1.35)
    text.set_gid(CAPTION)
    return figure


def _margins(figure: Figure, left: float, right: float, bottom: float) -> None:
    wide, high = figure.get_size_inches()
    figure.subplots_adjust(left=left / wide, right=1 - right / wide, bottom=bottom / high, top=1 - 0.32 / high)


def alt_text(figure: Figure) -> str:
    """What the figure shows, in a sentence with its numbers."""
    return str(figure.get_label() or "figure")


def caption_of(figure: Figure) -> str:
    """The caption as one line; empty for a figure of another maker."""
    return " ".join(t.get_text().replace("\n", " ") for t in figure.texts if t.get_gid() == CAPTION)


def without_caption(figure: Figure) -> Figure:
    """Take the caption out (a page sets it as text, which a reader can enlarge)."""
    for text in [t for t in figure.texts if t.get_gid() == CAPTION]:
        text.remove()
        wide, high = figure.get_size_inches()
        lost = 0.16 * len(text.get_text().splitlines())
        old = figure.subplotpars
        figure.set_size_inches(wide, high - lost)
        _margins(figure, old.left * wide, (1 - old.right) * wide, old.bottom * high - lost)
    return figure


def svg(figure: Figure) -> str:
    """Render to SVG, byte-identical for equal figures: no date, no version, fixed ids."""
    stream = io.StringIO()
    with style():
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r"^.*?(?=<svg)", "", stream.getvalue(), count=1, flags=re.DOTALL)
    return text.replace("</svg>", f"{_MARK}\n</svg>")


def adaptive(text: str) -> str:
    """
    Let one of our SVGs follow the reader's light or dark scheme; any other SVG comes back as it is.

    For pages of our own only: JupyterLab's theme is not the system's, so there a figure keeps its white ground.
    """
    if _MARK not in text:
        return text
    light, dark = [], []
    for i, (colour, other) in enumerate(_DARK.items()):
        text = text.replace(colour, f"var(--c{i})")
        light.append(f"--c{i}:{'none' if colour == PAPER else colour}")
        dark.append(f"--c{i}:{other}")
    rules = f":root{{{';'.join(light)}}}@media (prefers-color-scheme:dark){{:root{{{';'.join(dark)}}}}}"
    text = text.replace("'DejaVu Sans'", _STACK)
    return re.sub(r"(<style[^>]*>)", lambda m: m[1] + rules, text, count=1)


def data_uri(text: str) -> str:
    """An SVG as the address of an image: as an image it cannot run scripts or load anything."""
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode("utf-8")).decode("ascii")


def log_ticks(axis: Any) -> None:
    """Write powers as ``1e-07``: matplotlib's own are mathematics, which the style turns off."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0e}" if not 0.01 <= v <= 1000 else f"{v:g}"))
    axis.set_minor_locator(NullLocator())

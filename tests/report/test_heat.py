"""The heat map of a comparison of traces."""

from __future__ import annotations

import numpy as np

from apr_core.falsify.finding import Finding
from apr_core.report.heat import plot_heat
from apr_core.report.style import adaptive, alt_text, svg

ROW = {"rel_l2": 2e-7, "max_abs": 1e-6, "cosine": 1 - 1e-14, "nmse": 4e-14, "limit": 1e-6}


def test_every_activation_against_every_metric() -> None:
    """Rows in order of computation, each value written; the furthest from its limit is named."""
    rows = [{"name": "layers.0.q", **ROW}, {"name": "logits", **ROW, "rel_l2": 4e-7}]
    figure = plot_heat(Finding(0.4, 2, 2, rows=rows, claim="F-PAR-002"))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layers.0.q", "logits"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["over limit", "max_abs", "1 - cosine", "nmse"]
    assert [text.get_text() for text in axes.texts][::4] == ["2.0e-01", "4.0e-01"]
    assert axes.texts[0].get_color() in adaptive(
        svg(figure)
    )  # a page must not turn it with its own scheme: the cells stay
    assert "the furthest is logits, 0.4 of its limit" in alt_text(figure)


def test_nothing_to_draw() -> None:
    """No rows, and rows that are no comparison."""
    assert plot_heat(Finding(0.0, 0, 0, claim="F-PAR-002")) is None
    assert plot_heat(Finding(0.0, 1, 1, rows=[{"name": "a", "rel_l2": np.nan}], claim="F-PAR-002")) is None

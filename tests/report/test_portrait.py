"""The figures of notebook 10 that show no claim."""

from __future__ import annotations

import numpy as np

from apr_core.report.portrait import plot_cost, plot_limits, plot_roles
from apr_core.report.style import alt_text, caption_of, svg

ROLES = [
    {"role": "embedding", "zeros (%)": 0.0, "rms": 0.02, "minimum": -0.5, "maximum": 0.5},
    {"role": "down_proj", "zeros (%)": 100.0, "rms": 0.0, "minimum": 0.0, "maximum": 0.0},
    {"role": "down_proj", "zeros (%)": 1.0, "rms": 0.03, "minimum": -30.0, "maximum": np.nan},
]
LIMITS = [
    {"gate": "F-X-001", "rule": "zeros", "of": "weight", "limit": 80.0, "unit": "%", "where": where, "outcome": outcome}
    for where, outcome in (("one step beyond", "refused"), ("at the limit", "passes"), ("one step inside", "passes"))
]
COST = [
    {"step": "open <b>", "seconds": 0.0004, "bytes": 0},
    {"step": "the whole gate", "seconds": 0.05, "bytes": 10},
    {"step": "not measured", "seconds": 0.0, "bytes": 0},
]


def test_roles() -> None:
    """One line per role, a dead tensor at 100 % and at no norm, NaN and all."""
    figure = plot_roles(ROLES, (50.0, 80.0))
    density, size, span = figure.axes
    assert [t.get_text() for t in density.get_yticklabels()] == ["embedding", "down_proj"]
    assert list(density.lines[0].get_xdata()) == [0, 100, 1]
    assert [line.get_xdata()[0] for line in density.lines[1:]] == [50, 80]
    assert [ax.get_xlabel() for ax in (density, size, span)] == [
        "zeros (%)",
        "rms (weight units)",
        "range (weight units)",
    ]
    assert [t.get_text() for t in span.get_xticklabels()] == ["-10", "-1", "0", "1", "10"]
    assert "2 roles and 3 tensors: zeros from 0 to 100 %" in alt_text(figure)
    assert "broken" in caption_of(figure)


def test_limits() -> None:
    """From inside to beyond, whatever the order of the rows; crosses for what is refused."""
    figure = plot_limits(LIMITS)
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["one step inside", "at the limit", "one step beyond"]
    passes, refused = axes.lines
    assert (sorted(passes.get_xdata()), list(refused.get_xdata())) == ([0, 1], [2])
    assert [t.get_text() for t in axes.get_yticklabels()] == ["001 zeros, weight: 80 %"]
    assert "1 of 3 tensors are refused" in alt_text(figure)


def test_cost() -> None:
    """A bar per measured step, in milliseconds; what comes from elsewhere is escaped."""
    figure = plot_cost(COST)
    assert [round(bar.get_width(), 3) for bar in figure.axes[0].patches] == [0.4, 50.0]
    assert "the whole gate 50 ms" in alt_text(figure)
    assert "<b>" not in svg(figure)


def test_nothing_to_draw() -> None:
    """No rows, no figure."""
    assert (plot_roles([]), plot_limits([]), plot_cost([])) == (None, None, None)

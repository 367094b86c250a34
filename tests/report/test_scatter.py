"""The scatter of logits."""

from __future__ import annotations

import numpy as np

from apr_core.falsify.finding import Finding
from apr_core.report.scatter import plot_scatter
from apr_core.report.style import alt_text

LOGITS = np.array([1.0, -2.0, 3.0])


def test_each_candidate_is_drawn_over_the_reference() -> None:
    """The points are the values themselves; what is not as long as the reference is no candidate."""
    arrays = {"logits_reference": LOGITS, "logits_Q4_K_M": LOGITS + 0.5, "logits_short": LOGITS[:2], "kl": LOGITS}
    axes = plot_scatter(Finding(None, 3, 3, arrays=arrays)).axes[0]
    assert [line.get_label() for line in axes.lines] == ["equal", "Q4_K_M"]
    assert (list(axes.lines[1].get_xdata()), list(axes.lines[1].get_ydata())) == (list(LOGITS), list(LOGITS + 0.5))
    assert list(axes.lines[0].get_xdata()) == list(axes.lines[0].get_ydata()) == [-2.0, 3.0]


def test_the_distance_is_said_in_words() -> None:
    """What a reader who cannot see the figure gets; a hostile name stays text."""
    arrays = {"logits_reference": LOGITS, "logits_$<b>": np.array([1.0, -2.0, 4.0])}
    assert "3 logits over the reference's: $<b> is at most 1 off, 0 in the middle" in alt_text(
        plot_scatter(Finding(None, 3, 3, arrays=arrays))
    )


def test_nothing_to_draw() -> None:
    """No reference, or nothing beside it."""
    assert plot_scatter(Finding(None, 0, 0)) is None
    assert plot_scatter(Finding(None, 0, 0, arrays={"logits_a": LOGITS})) is None
    assert plot_scatter(Finding(None, 0, 0, arrays={"logits_reference": LOGITS})) is None

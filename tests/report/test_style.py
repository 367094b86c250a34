"""One look, one way to an SVG."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from xml.etree import ElementTree

import matplotlib
import pytest

from apr_core.falsify.finding import Finding
from apr_core.report.figures import plot
from apr_core.report.style import (
    COLOURS,
    INK,
    MARKERS,
    adaptive,
    alt_text,
    caption_of,
    data_uri,
    finish,
    new_figure,
    style,
    svg,
    without_caption,
)


def test_equal_figures_equal_bytes(finding: Callable[[str], Finding]) -> None:
    """No date, no version, no random id."""
    first, second = (svg(plot(finding("F-PAR-001"))) for _ in range(2))
    assert first == second
    assert first.startswith("<svg")
    assert not re.search(r"dc:date|Matplotlib v", first)
    ElementTree.fromstring(first)


def test_text_stays_text(finding: Callable[[str], Finding]) -> None:
    """Words in an SVG can be searched and read aloud."""
    assert "position (token)" in svg(plot(finding("F-PAR-001")))


def test_the_look_does_not_leak() -> None:
    """Other figures of a notebook keep their own settings."""
    before = matplotlib.rcParams["axes.grid"]
    with style():
        assert matplotlib.rcParams["axes.grid"] is True
    assert matplotlib.rcParams["axes.grid"] == before


def test_a_page_figure_follows_the_reader(finding: Callable[[str], Finding]) -> None:
    """Colours become variables with a dark set; another maker's SVG is left alone."""
    plain = svg(plot(finding("F-PAR-001")))
    shown = adaptive(plain)
    assert INK in plain
    assert shown.count(INK) == 1
    assert "prefers-color-scheme:dark" in shown
    assert "system-ui" in shown
    ElementTree.fromstring(shown)
    assert adaptive("<svg><style></style></svg>") == "<svg><style></style></svg>"


def test_markers_differ_where_colours_do() -> None:
    """A print in grey stays readable."""
    assert len(set(MARKERS)) == len(set(COLOURS)) == len(COLOURS)


def test_captions_come_and_go() -> None:
    """A page sets the caption as text: the figure gets lower by just that, and the axes keep their size."""
    with style():
        figure, axes = new_figure(3.0)
        finish(figure, alt="a line", caption="Were it false, " + "more " * 60)
    assert alt_text(figure) == "a line"
    assert caption_of(figure).startswith("Were it false, more")
    high = axes.get_position().height * figure.get_figheight()
    without_caption(figure)
    assert caption_of(figure) == ""
    assert figure.get_figheight() == pytest.approx(3.0 - 0.16 * 3)
    assert axes.get_position().height * figure.get_figheight() == pytest.approx(high)


def test_foreign_figures_have_words_too() -> None:
    """A figure that was not made here has a name at least."""
    figure, _ = new_figure(2.0)
    assert alt_text(figure) == "figure"
    assert caption_of(without_caption(figure)) == ""


def test_data_uri() -> None:
    """Base64 of UTF-8."""
    assert base64.b64decode(data_uri("<svg>é</svg>").split(",")[1]).decode() == "<svg>é</svg>"

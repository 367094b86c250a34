"""Values become text: nothing unsafe passes, nothing is lost in silence."""

from __future__ import annotations

import html
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from apr_core.report.text import LONG, clean, columns, esc, limit_of, nbytes, number, quantity, seconds, table


@given(st.text(alphabet=st.characters(), max_size=200))
def test_any_text_can_be_written(text: str) -> None:
    """Every string, lone surrogates included, becomes valid UTF-8 and valid XML."""
    shown = clean(text)
    assert shown.encode("utf-8").decode("utf-8") == shown
    node = ElementTree.Element("a", b=shown)
    node.text = shown
    assert ElementTree.fromstring(ElementTree.tostring(node)).text == (shown or None)


@given(st.text(alphabet="<>&'\"/:htps&#;\\ ", max_size=80))
def test_escaping_keeps_the_looks(text: str) -> None:
    """What a reader sees is the text; no markup and no address survives in the bytes."""
    shown = esc(text)
    assert html.unescape(str(shown)) == text
    assert not set("<>\"'") & set(shown)
    assert "://" not in shown


def test_unsafe_characters_become_visible() -> None:
    """Controls, bidirectional overrides and surrogates are shown by their code."""
    assert clean("a\x00\x1b\x85\u202e\ud800\r\ufffe") == "a\\x00\\x1b\\x85\\u202e\\ud800\\x0d\\ufffe"
    assert clean("a\tb\nc") == "a\tb\nc"


def test_long_text_says_what_is_cut() -> None:
    """Head and tail stay, the length is told."""
    shown = clean("a" * 9000 + "z", 100)
    assert shown == "a" * 75 + " … [9,001 characters] … " + "a" * 24 + "z"
    assert clean("x" * LONG) == "x" * LONG


def test_an_object_without_text_is_named() -> None:
    """A failing __str__ does not fail the page."""

    class Bad:
        def __str__(self) -> str:
            raise RuntimeError

    assert clean(Bad()) == "(Bad without text)"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (False, "no"),
        (0, "0"),
        (123456789, "123456789"),
        (0.0, "0"),
        (3.0, "3"),
        (3.21e-7, "3.21e-07"),
        (2e7, "2e+07"),
        (float("nan"), "not finite"),
        (float("-inf"), "not finite"),
        (np.float64(0.25), "0.25"),
        (np.int64(7), "7"),
        (np.str_("x"), "x"),
        (np.array([1, 2]), "[1 2]"),
        ("a<b", "a<b"),
    ],
)
def test_numbers(value: object, text: str) -> None:
    """Integers in full, floats with three digits, what is not finite by name."""
    assert number(value) == text


def test_units() -> None:
    """A count and a ratio have no unit to print; a limit carries its sign."""
    assert quantity(0.0, "count") == "0"
    assert quantity(1e-8, "nat") == "1e-08 nat"
    assert quantity(None, "nat") == "–"
    assert limit_of({"direction": "at_least", "threshold": 100.0, "unit": "tick"}) == "≥ 100 tick"
    assert limit_of({"direction": "at_most", "threshold": 1e-5, "unit": "1"}) == "≤ 1e-05"


@pytest.mark.parametrize(
    ("value", "text"), [(0.421, "0.42 s"), (12.34, "12.3 s"), (187.0, "3 min 07 s"), (float("nan"), "unknown")]
)
def test_durations(value: float, text: str) -> None:
    """Seconds below a minute, minutes above."""
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(999, "999 bytes"), (1500, "1.5 kB"), (6_431_232, "6.4 MB"), (3.1e12, "3100.0 GB")]
)
def test_sizes(value: int, text: str) -> None:
    """Decimal units."""
    assert nbytes(value) == text


def test_tables_escape_heads_cells_and_captions() -> None:
    """All three come from a model in the end."""
    shown = table([{"<b>": "<i>", "n": 1.5}, {"n": None}], "<u>")
    assert isinstance(shown, Markup)
    assert "<caption>&lt;u&gt;</caption>" in shown
    assert '<th scope="col">&lt;b&gt;</th><th scope="col">n</th>' in shown
    assert '<td class="apr-n">&lt;i&gt;</td><td class="apr-n">1.5</td>' in shown
    assert table([]) == ""
    assert columns([{"a": 1}, {"b": 2, "a": 3}]) == ["a", "b"]

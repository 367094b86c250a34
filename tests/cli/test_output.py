"""Output: strict JSON, tables that align, foreign text that cannot command a terminal."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from apr_core.cli.output import note, show, show_json, show_table


def test_json_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    """Non-finite numbers are null, numpy and tuples plain, text ASCII, everything else its text."""
    body = {
        "nan": math.nan,
        "inf": np.float32("inf"),
        "one": np.int64(1),
        "half": np.float16(0.5),
        "yes": np.bool_(True),
        "pair": (1, [2.5, None]),
        3: "größer\x1b\ud800",
        "other": {"type": complex(1, 2)},
    }
    show_json(body)
    text = capsys.readouterr().out

    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert text.isascii()
    assert json.loads(text, parse_constant=refuse) == {
        "nan": None,
        "inf": None,
        "one": 1,
        "half": 0.5,
        "yes": True,
        "pair": [1, [2.5, None]],
        "3": "größer\x1b\ud800",
        "other": {"type": "(1+2j)"},
    }


def test_tables_align_and_escape(capsys: pytest.CaptureFixture[str]) -> None:
    """Columns are as wide as their widest cell; a newline in a cell cannot break the row, an escape stays text."""
    show_table(("name", "n"), [("a\nb", 1), ("\x1b[2J", 20)])
    assert capsys.readouterr().out == "name     n\na b      1\n\\x1b[2J  20\n"


def test_show_and_note_take_their_streams(capsys: pytest.CaptureFixture[str]) -> None:
    """Output on stdout, notes on stderr, both harmless."""
    show("a\x07")
    note("b\x07")
    assert capsys.readouterr() == ("a\\x07\n", "b\\x07\n")

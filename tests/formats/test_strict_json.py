"""Strict JSON: what two readers could understand differently is refused; the rest equals the json module."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apr_core.errors import FormatError
from apr_core.formats.strict_json import parse_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4), VALUES, max_size=4), st.booleans())
def test_legal_objects_pass(value: dict[str, object], ascii_only: bool) -> None:
    """Whatever the json module writes from plain values is read back equal."""
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert parse_object(data, file=Path("f"), what="test", at=0) == value


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b'{"a": 1, "a": 2}', "the key 'a' twice"),
        (b'{"b": {"a": 1, "a": 2}}', "the key 'a' twice"),
        (b'{"a": Infinity}', "Infinity, which is not JSON"),
        (b'{"a": -1e999}', "the number -1e999, which is out of range"),
        (b"[1]", "a JSON list"),
        (b"null", "a JSON NoneType"),
        (b"", "a JSON error"),
        (b"{} {}", "a JSON error"),
        (b"\xff\xfe{}", "bytes that are not UTF-8"),
        (b'{"a": "\\uDfff"}', "bytes that are not UTF-8"),
        (b'{"a": ' + b"1" * 5000 + b"}", "an integer that is too long"),
        (b'{"a": ' + b"[" * 200_000, "nesting too deep"),
    ],
)
def test_refused(data: bytes, found: str) -> None:
    """Each refusal names what was found, the file and the place."""
    with pytest.raises(FormatError, match=f"expected a JSON object as test, found {found}.* in f at byte 9"):
        parse_object(data, file=Path("f"), what="test", at=9)


def test_integers_only() -> None:
    """Where the format knows integers alone, a float is refused and an integer is not."""
    assert parse_object(b'{"a": 1}', file=Path("f"), what="test", at=0, floats=False) == {"a": 1}
    with pytest.raises(FormatError, match=r"the number 1\.0 where only integers belong"):
        parse_object(b'{"a": 1.0}', file=Path("f"), what="test", at=0, floats=False)

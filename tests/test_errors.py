"""The error tree: one exit code each, and wording that a person can act on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from apr_core.errors import (
    AprError,
    ContractViolation,
    Exit,
    FormatError,
    InferenceError,
    LoadError,
    NotFound,
    ReadWriteError,
    Unavailable,
    UsageError,
)

CODES = {
    UsageError: 2,
    NotFound: 3,
    FormatError: 4,
    ContractViolation: 5,
    LoadError: 6,
    ReadWriteError: 7,
    InferenceError: 8,
    Unavailable: 9,
}


def test_every_error_has_the_exit_code_of_the_house() -> None:
    """The numbers are an interface: scripts branch on them."""
    assert {e: int(e.exit_code) for e in AprError.__subclasses__()} == CODES
    assert AprError.exit_code == 1


def test_exit_codes() -> None:
    """All twelve, each its own number."""
    assert [int(e) for e in Exit] == list(range(12))
    assert (Exit.OK, Exit.NETWORK, Exit.INCONCLUSIVE) == (0, 10, 11)


@pytest.mark.parametrize(("advice", "text"), [("", "no such file"), ("check the path", "no such file; check the path")])
def test_advice_follows_the_message(advice: str, text: str) -> None:
    """The next step stands in the same line as what went wrong."""
    error = NotFound("no such file", advice=advice)
    assert (str(error), error.message, error.advice) == (text, "no such file", advice)


@pytest.mark.parametrize(
    ("tensor", "at", "place"),
    [
        (None, None, "in m.gguf"),
        ("w", None, "in m.gguf, tensor w"),
        (None, 0, "in m.gguf at byte 0"),
        ("w", 12, "in m.gguf, tensor w at byte 12"),
    ],
)
def test_format_error_says_expected_found_where_and_what_to_do(tensor: str | None, at: int | None, place: str) -> None:
    """Byte 0 is a place too."""
    error = FormatError(expected="X", found="Y", file=Path("m.gguf"), tensor=tensor, at=at, advice="do Z")
    assert str(error) == f"expected X, found Y, {place}; do Z"
    assert (error.expected, error.found, error.file, error.tensor, error.at) == ("X", "Y", "m.gguf", tensor, at)


@dataclass
class Failed:
    """A violation as the contract prints it."""

    tensor: str

    def __str__(self) -> str:
        return f"gate {self.tensor}"


def test_contract_violation_carries_all_and_counts_tensors() -> None:
    """Every violation is shown at once; two in one tensor count once among tensors."""
    error = ContractViolation("m.apr", [Failed("a"), Failed("a"), Failed("b")])
    assert error.message.startswith(
        "m.apr is refused by the contract, 3 violations in 2 tensors:\n  gate a\n  gate a\n  gate b"
    )
    assert [str(v) for v in error.violations] == ["gate a", "gate a", "gate b"]
    assert "apr validate" in str(error)


def test_control_characters_never_reach_a_terminal() -> None:
    """A tensor name that holds an escape sequence is printed as text."""
    from apr_core.errors import FormatError

    error = FormatError(expected="a name", found="x", file="f", tensor="a\x1b[2Jb\u202ec", advice="look")

    assert r"a\x1b[2Jb\u202ec" in str(error)
    assert "\x1b" not in str(error)

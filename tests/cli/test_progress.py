"""Progress: silent when quick, a line per tenth in a log, a bar on a terminal; never on stdout."""

from __future__ import annotations

import sys

import pytest

from apr_core.cli import progress as module
from apr_core.cli.progress import progress


def test_a_log_gets_a_line_per_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    """A thousand steps give ten lines, on stderr."""
    with progress("writing", 1000, quiet_s=0.0) as step:
        for done in range(1001):
            step(done)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(" % ")[0] for line in err.splitlines()] == [f"writing: {n}0" for n in range(1, 11)]
    assert "of 1.0 kB" in err


def _said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.split(" % ")[0] for line in capsys.readouterr().err.splitlines()]


def test_steps_may_jump_and_stand_still(capsys: pytest.CaptureFixture[str]) -> None:
    """A leap over several tenths is one line, standing still none."""
    with progress("writing", 100, quiet_s=0.0) as step:
        for done in (5, 5, 55, 56, 100, 100):
            step(done)
    assert _said(capsys) == ["writing: 50", "writing: 100"]


def test_a_total_may_come_later(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a total there is nothing to say; the one that a step brings is kept."""
    with progress("measuring", quiet_s=0.0) as step:
        step(10)
        step(20, 40)
        step(40)
    assert [line.split(" % ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "measuring: 50",
        "measuring: 100",
    ]


def test_quick_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """What ends within two seconds leaves no line."""
    with progress("writing", 10) as step:
        step(10)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal the bar goes to stderr, takes totals early or late, and leaves stdout alone."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(module, "_lines", None)
    with progress("writing", 100) as step:
        step(50)
        step(100, 200)
    assert capsys.readouterr().out == ""

"""tools: coverage is what was run, and a tool that is not there or does not do what it should is not covered."""

from __future__ import annotations

import json

import pytest

from apr_core.cli import dispatch, tools
from apr_core.cli.app import main
from apr_core.cli.tools import TOOLS, Tool


def test_there_are_seventeen() -> None:
    """Names are unique, and every one that is built has both fixtures."""
    assert len({tool.name for tool in TOOLS}) == len(TOOLS) == 17
    for tool in TOOLS:
        assert bool(tool.passes) == bool(tool.fails) == (tool.name not in ("serve", "tune", "pull"))


def test_every_tool_of_the_registry_is_covered(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command: what is missing is what the registry lacks, nothing is broken."""
    assert main(["tools", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["missing"] == [tool.name for tool in TOOLS if tool.command not in dispatch.COMMANDS]
    assert (body["broken"], body["covered"] + len(body["missing"]), body["of"]) == ([], 17, 17)


CHOSEN = ("inspect", "validate", "serve")


def test_coverage_is_found_by_running(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Covered tools ran three times; a missing one ran never; the table counts them."""
    monkeypatch.setattr(tools, "TOOLS", ())
    body = tools.coverage([tool for tool in TOOLS if tool.name in CHOSEN])
    assert (body["covered"], body["of"], body["missing"], body["broken"]) == (2, 3, ["serve"], [])
    for row in body["tools"]:
        if row["status"] == "covered":
            assert row["help"]
            assert row["passing"]["exit_code"] == 0
            assert row["failing"]["exit_code"] == row["failing"]["expected"] != 0
    monkeypatch.setattr(tools, "coverage", lambda: body)
    assert main(["tools"]) == 0
    assert "2 of 3 tools" in capsys.readouterr().out


@pytest.mark.parametrize(
    "tool",
    [
        Tool("refused", "validate", ("BROKEN",), ("BROKEN",)),
        Tool("lenient", "validate", ("HEALTHY",), ("HEALTHY",)),
        Tool("other code", "validate", ("HEALTHY",), ("TORN",)),
    ],
    ids=lambda tool: tool.name,
)
def test_a_tool_that_ends_otherwise_is_broken(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A passing fixture that fails, a failing one that passes, and one that fails for another reason."""
    body = tools.coverage([tool])
    assert (body["broken"], body["covered"]) == ([tool.name], 0)
    assert body["tools"][0]["reason"]
    monkeypatch.setattr(tools, "coverage", lambda: body)
    assert main(["tools"]) == 5

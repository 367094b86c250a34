"""The gate before every action: each command has a class, and the class decides who is admitted first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from apr_core.cli import dispatch
from apr_core.cli.app import app, main


def _leaves() -> dict[str, Any]:
    return dict(dispatch.leaves(typer.main.get_command(app)))


def test_every_command_has_a_class_and_every_class_a_command() -> None:
    """A new command without a row would not start; a row without a command would promise what is not there."""
    assert sorted(_leaves()) == sorted(dispatch.COMMANDS)


@pytest.mark.parametrize("path", [p for p, c in dispatch.COMMANDS.items() if c.kind is dispatch.Kind.ACTION])
def test_the_models_of_an_action_are_parameters_of_it(path: str) -> None:
    """A misspelt parameter would leave its model ungated."""
    names = {p.name for p in _leaves()[path].params}
    assert set(dispatch.COMMANDS[path].models) <= names
    assert dispatch.COMMANDS[path].models


def test_a_command_without_a_class_does_not_start(
    monkeypatch: pytest.MonkeyPatch, pygmy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever forgets the row finds out at the first call."""
    monkeypatch.setattr(dispatch, "COMMANDS", {k: v for k, v in dispatch.COMMANDS.items() if k != "inspect"})
    assert main(["inspect", str(pygmy)]) == 2
    assert "the command inspect has no class" in capsys.readouterr().err

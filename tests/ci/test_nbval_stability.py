"""Repeats of nbval: counted once each, gone on with, and never green where one differed or is missing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from apr_core.falsify.claims import claims_of

NAME = "00_ground_truth"
WHOLE = len(claims_of(NAME))


@pytest.fixture
def script(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script with its counts in a folder of the test, and runs that only say what they were told to."""
    spec = importlib.util.spec_from_file_location("nbval_stability", root / "ci" / "nbval_stability.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.said, module.asked = (WHOLE, ""), []
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "KEPT", tmp_path / "counts.json")
    monkeypatch.setattr(module, "digest", lambda: "one")
    monkeypatch.setattr(
        module, "compared", lambda name, settings: (module.asked.append((name, settings)), module.said)[1]
    )
    return module


def call(script: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run it as from a shell."""
    monkeypatch.setattr(sys, "argv", ["nbval_stability.py", *words])
    code: int = script.main()
    return code


def test_it_goes_on_where_it_stopped(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One repeat of each setting, then only the one that is missing; other code begins again."""
    assert call(script, monkeypatch, "1", NAME) == 0
    assert [settings for _, settings in script.asked] == list(script.SETTINGS.values())
    assert call(script, monkeypatch, "2", NAME) == 0
    assert len(script.asked) == 2 * len(script.SETTINGS)
    monkeypatch.setattr(script, "digest", lambda: "two")
    assert call(script, monkeypatch, "1", NAME) == 0
    assert json.loads(script.KEPT.read_text())["counts"]["1 thread"][NAME] == {"runs": 1, "equal": 1}


@pytest.mark.parametrize("said", [(WHOLE - 1, ""), (WHOLE, "FAILED cell 7")])
def test_a_difference_is_kept_and_named(
    said: tuple[int, str], script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line less, or a failed cell: exit 1, today and after a good repeat."""
    script.said = said
    assert call(script, monkeypatch, "1", NAME) == 1
    script.said = (WHOLE, "")
    assert call(script, monkeypatch, "2", NAME) == 1
    assert f"differed: 1 thread, {NAME}: {said[0]} lines; {said[1]}" in capsys.readouterr().out


def test_missing_repeats_decide_nothing(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by hand: exit 11."""

    def stop(name: str, settings: dict[str, str]) -> tuple[int, str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "compared", stop)
    assert call(script, monkeypatch, "1", NAME) == 11

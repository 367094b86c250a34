"""Provenance: what ran, gathered without importing what it names."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from apr_core import provenance


@pytest.fixture(autouse=True)
def fresh() -> Any:
    """Forget what other tests gathered, before and after."""
    provenance._fixed.cache_clear()
    yield
    provenance._fixed.cache_clear()


def test_collect_is_plain_json_and_names_every_package() -> None:
    """It goes into every evidence record, so it must be strict JSON."""
    found = provenance.collect()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found["packages"]) == set(provenance.PACKAGES)
    assert datetime.fromisoformat(found["time"]).tzinfo is not None
    assert found["cores"] >= 1
    assert {"python", "platform", "cpu", "commit", "dirty", "command"} <= set(found)


def test_each_record_gets_its_own_copy() -> None:
    """One record that is edited must not edit the next."""
    provenance.collect()["packages"]["numpy"] = "changed"
    assert provenance.collect()["packages"]["numpy"] != "changed"


@pytest.mark.parametrize(
    ("argv", "command"), [([], ""), (["/x/apr", "run", "m"], "apr run m"), (["a" * 400], "a" * 300)]
)
def test_command_is_short_and_without_folders(argv: list[str], command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that ran, cut to 300 characters."""
    monkeypatch.setattr(sys, "argv", argv)
    assert provenance.collect()["command"] == command


def test_absent_package_is_said() -> None:
    """A package that is not installed is named absent, not left out."""
    assert provenance.version_of("no-such-package-here") == "absent"


def test_gathering_imports_no_torch() -> None:
    """Versions come from metadata: asking for them must not cost a second of import."""
    code = "import sys; from apr_core import provenance as p; p.collect(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0


def test_commit_and_dirty_flag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The commit is what git says, and an edited tree is marked."""
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "apr_core" / "provenance.py"))
    answers = {"rev-parse": "abc", "status": " M x"}
    monkeypatch.setattr(provenance, "_git", lambda _, verb, *__: answers[verb])
    assert provenance.git_state() == {"commit": "abc", "dirty": True}
    answers["status"] = ""
    assert provenance.git_state() == {"commit": "abc", "dirty": False}


def test_no_repository_and_no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An installed package has no commit; a machine without git, or a broken repository, says the same."""
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "apr_core" / "provenance.py"))
    unknown = {"commit": "", "dirty": False}
    assert provenance.git_state() == unknown
    (tmp_path / ".git").mkdir()
    assert provenance.git_state() == unknown
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state() == unknown


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [("cores : 2\nmodel name : Some: CPU\nmodel name : x\n", "Some: CPU"), ("cores : 2\n", "named"), (None, "named")],
)
def test_cpu_model(cpuinfo: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's first name for it; elsewhere what platform knows."""

    def read(_: Path, encoding: str) -> str:
        if cpuinfo is None:
            raise FileNotFoundError
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(provenance.platform, "processor", lambda: "named")
    assert provenance.cpu_model() == expected

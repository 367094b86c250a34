"""`apr lab`: a copy with the model set, the originals untouched, a server that asks for nothing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from apr_core.cli import lab
from apr_core.cli.app import main
from apr_core.falsify.claims import NOTEBOOKS


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """What would have been started, with its environment."""
    calls: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], *, env: dict[str, str], check: bool) -> Any:
        settings = next(Path(env["JUPYTERLAB_SETTINGS_DIR"]).rglob("*.jupyterlab-settings"))
        assert json.loads(settings.read_text()) == {"fetchNews": "false", "checkForUpdates": False}
        calls.append((command, env))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(lab.subprocess, "run", run)
    return calls


def test_copies_with_the_model_set(
    started: list[tuple[list[str], dict[str, str]]], tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever signs its path holds; without outputs of another model; everything else as it was."""
    model = tmp_path / 'a "quoted\\1" model.gguf'
    model.write_bytes(b"GGUF")
    before = {n: (root / "notebooks" / f"{n}.ipynb").read_bytes() for n in NOTEBOOKS}
    assert main(["lab", str(model), "--reference", "pygmy", "--out", str(tmp_path / "new"), "--no-browser"]) == 0
    for name in NOTEBOOKS:
        copied = json.loads((tmp_path / "new" / f"{name}.ipynb").read_text())
        original = json.loads(before[name])
        assert (root / "notebooks" / f"{name}.ipynb").read_bytes() == before[name]
        code = [c for c in copied["cells"] if c["cell_type"] == "code"]
        assert all(c["outputs"] == [] and c["execution_count"] is None for c in code)
        cell = next(c for c in code if "parameters" in c["metadata"]["tags"])
        values: dict[str, Any] = {}
        exec(cell["source"], values)
        assert (values["model"], values["reference"]) == (str(model), "pygmy")
        same = [(a["source"] == b["source"]) for a, b in zip(copied["cells"], original["cells"], strict=True)]
        assert same.count(False) == 1
    ((command, _),) = started
    assert f"--ServerApp.root_dir={tmp_path / 'new'}" in command
    assert "--KernelManager.transport=ipc" in command
    assert "what you change there stays there" in capsys.readouterr().err


def test_what_cannot_start(
    started: list[tuple[list[str], dict[str, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that exists, a model that does not, no JupyterLab: before anything runs."""
    assert main(["lab", "--out", str(tmp_path)]) == 2
    assert main(["lab", str(tmp_path / "absent"), "--out", str(tmp_path / "x")]) == 3
    monkeypatch.setattr(lab.importlib.util, "find_spec", lambda name: None)
    assert main(["lab", "--out", str(tmp_path / "x")]) == 9
    assert started == []
    assert not (tmp_path / "x").exists()

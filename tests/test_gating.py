"""What other repositories copy from here: the pre-commit hook and the workflow do what they say."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from apr_core.cli.app import app, main
from apr_core.cli.dispatch import leaves
from apr_core.zoo.acts import twin
from apr_core.zoo.draft import put_together
from apr_core.zoo.plants import DOWN


@pytest.fixture
def hook(root: Path) -> dict[str, str]:
    """The one hook that others can name."""
    (found,) = yaml.safe_load((root / ".pre-commit-hooks.yaml").read_text())
    return found


def test_the_hook_stops_a_bad_model(hook: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its command with a good file is silent enough to pass; a bad one beside it stops the commit, named."""
    put_together(twin(), tmp_path / "good")
    draft = twin().copy()
    draft.weights[DOWN][...] = 0
    put_together(draft, tmp_path / "bad")
    files = [str(p) for p in sorted(tmp_path.glob("*/*.safetensors"))]
    command = shlex.split(hook["entry"])
    assert command[0] == "apr"
    assert main([*command[1:], files[1]]) == 0
    assert main([*command[1:], *files]) == 5
    assert DOWN in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("a/model.safetensors", True),
        ("model.safetensors.index.json", True),
        ("model-00001-of-00002.safetensors", False),
        ("q4_k_m.gguf", True),
        ("big-00001-of-00003.gguf", True),
        ("big-00002-of-00003.gguf", False),
        ("m.apr", True),
        ("config.json", False),
        ("readme.gguf.md", False),
    ],
)
def test_which_files_the_hook_takes(hook: dict[str, str], name: str, taken: bool) -> None:
    """Each model once: whole files, an index, a first part."""
    assert (re.search(hook["files"], name) is not None and re.search(hook["exclude"], name) is None) is taken


def test_the_hook_by_pre_commit_itself(root: Path) -> None:
    """Its own validator takes the file."""
    command = [sys.executable, "-m", "pre_commit", "validate-manifest", str(root / ".pre-commit-hooks.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_workflow_calls_commands_that_exist(root: Path) -> None:
    """Every apr command and option in it is one of ours; a pull request of a model file starts it."""
    body = yaml.safe_load((root / "docs" / "examples" / "gate-models.yml").read_text())
    assert "**.gguf" in body[True]["pull_request"]["paths"]  # YAML reads `on` as a boolean
    lines = [line for step in body["jobs"]["falsify"]["steps"] for line in step.get("run", "").splitlines()]
    calls = [shlex.split(line[line.index("apr ") :]) for line in lines if re.search(r"(^|\s)apr ", line)]
    commands = dict(leaves(get_command(app)))
    assert [call[1] for call in calls] == ["validate", "suite"]
    for call in calls:
        known = {name for parameter in commands[call[1]].params for name in parameter.opts}
        assert {word for word in call if word.startswith("--")} <= known
    assert any("GITHUB_STEP_SUMMARY" in line for line in lines)

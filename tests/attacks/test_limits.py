"""Each hostile file meets its typed error within a second and 100 MB, counted by the operating system."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apr_core.errors import FormatError
from apr_core.formats.checkpoint import open_checkpoint
from tests.attacks.folders import REFUSALS
from tests.attacks.hostile import ATTACKS
from tests.attacks.limits import MEGABYTES, SECONDS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limit of address space is Linux's")


def run(root: Path, module: str, *arguments: str) -> dict[str, Any]:
    """Run a module of this folder in a process of its own; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.attacks.{module}", *arguments],
        cwd=root,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def measured(root: Path) -> dict[str, tuple[str, float]]:
    """What every hostile file met in the limited process."""
    return run(root, "limits")


def test_every_file_meets_its_error_in_time(measured: dict[str, tuple[str, float]]) -> None:
    """All of them, none left out: the exit code of its error, within the second and the megabytes."""
    expected = {f"{kind}-{attack.id}": FormatError for kind, attacks in ATTACKS.items() for attack in attacks}
    expected |= {build.__name__: error for build, (error, _) in REFUSALS.items()}
    wrong = {i: measured[i] for i, error in expected.items() if measured[i][0] != f"AprError {error.exit_code}"}
    assert wrong == {}
    assert {i: measured[i] for i in expected if not measured[i][1] < SECONDS} == {}


@pytest.mark.parametrize("build", REFUSALS, ids=lambda build: build.__name__)
def test_folders_are_refused_by_name(build: Callable[[Path], Path], tmp_path: Path) -> None:
    """Each hostile folder meets its own error, with words that say what is wrong, and advice."""
    error, says = REFUSALS[build]
    with pytest.raises(error, match=says) as caught:
        open_checkpoint(build(tmp_path))
    assert caught.value.advice


def test_the_limits_bite(measured: dict[str, tuple[str, float]]) -> None:
    """An allocation just above the limit fails there, a tenth of a second too much is seen, and a hang is ended."""
    assert measured["healthy-companion"][0] == "opened"
    assert measured["control-memory"][0] == "MemoryError", MEGABYTES
    assert measured["control-time"][1] > SECONDS
    assert measured["control-hang"] == ["TimeoutError", pytest.approx(0, abs=0.2)]


def test_mutants(root: Path) -> None:
    """2,000 damaged files of every kind: opened or refused, nothing else, under the same limits."""
    found = run(root, "mutants", "2000")
    assert found["findings"] == []
    assert found["mutants"] == 2000
    assert found["slowest_s"] < SECONDS
    # The damage is neither always noticed nor never: both paths are walked.
    assert 200 < found["opened"] < 1800


def test_a_finding_is_reported(root: Path, tmp_path: Path) -> None:
    """With a reader that raises something else, hangs or takes memory, the run says so and by which mutant."""
    code = (
        "import sys, time, apr_core.formats.gguf as g; real = g.read_gguf\n"
        "def broken(file, n=iter(range(9999))):\n"
        "    i = next(n)\n"
        "    if i == 30: raise IndexError('planted')\n"
        "    if i == 60: bytearray(200 << 20)\n"
        "    if i == 90:\n"
        "        end = time.process_time() + 1.1\n"
        "        while time.process_time() < end: pass\n"
        "    return real(file)\n"
        "g.read_gguf = broken\n"
        "from tests.attacks import mutants; sys.argv = ['x', '400']; raise SystemExit(mutants.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, check=False, capture_output=True, text=True, timeout=300
    )
    findings = json.loads(done.stdout)["findings"]
    assert done.returncode == 1
    assert len(findings) == 3
    assert all(f"mutant {finding.split()[1]} (gguf" in finding for finding in findings)
    assert [word in finding for word, finding in zip(("IndexError", "MemoryError", "1.1"), findings, strict=True)]

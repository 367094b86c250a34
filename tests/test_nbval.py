"""nbval fails when one committed output is another (minutes: it runs the notebooks)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apr_core.falsify.claims import NOTEBOOKS

NBVAL = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout", "240", "-p", "no:cacheprovider", "-q"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_one_mutated_output_fails(name: str, root: Path, tmp_path: Path) -> None:
    """Another verdict in the last claim line of a notebook: exactly one cell fails, and it is that one."""
    shutil.copy(root / "notebooks" / "conftest.py", tmp_path)
    book = json.loads((root / "notebooks" / f"{name}.ipynb").read_text())
    cell = [c for c in book["cells"] if "claim" in c["metadata"].get("tags", [])][-1]
    (output,) = cell["outputs"]
    said = "".join(output["text"])
    output["text"] = [said.replace("CORROBORATED", "FALSIFIED").replace("NOT_RUN", "CORROBORATED")]
    assert output["text"] != [said]
    (tmp_path / f"{name}.ipynb").write_text(json.dumps(book))
    command = [sys.executable, "-m", "pytest", *NBVAL, "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout[-2000:]
    assert "1 failed" in done.stdout
    assert said.split(" ")[0] in done.stdout

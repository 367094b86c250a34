"""The smallest reproduction: few rows, the same cause, and a command that shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from apr_core.cli.app import main
from apr_core.diagnose.explain import explain_failure
from apr_core.diagnose.smallest import MOST_BYTES, reproduce
from apr_core.errors import UsageError
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.zoo.draft import Draft

Plant = Callable[[str | Callable[[Draft], object]], Path]


@pytest.mark.parametrize(("defect", "most"), [("row-zero", 4), ("down-transposed-bytes", 256), ("scale-x100", 4)])
def test_the_damage_is_cut_to_few_rows(
    defect: str, most: int, plant: Plant, pygmy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both files together stay under a megabyte, and the command of the record exits 5 on them."""
    path = plant(defect)
    cause = explain_failure(path, reference=pygmy).causes[0]
    with open_checkpoint(path) as subject, open_checkpoint(pygmy) as reference:
        written = reproduce(cause, subject, reference, tmp_path / "small")
    body = json.loads(written.read_text())
    assert body["tensor"] == cause.tensor
    assert body["rows"][1] - body["rows"][0] <= most
    assert (
        sum(file.stat().st_size for file in written.parent.iterdir() if file != written) == body["bytes"] < MOST_BYTES
    )
    monkeypatch.chdir(written.parent)
    assert main(body["command"].split()[1:]) == 5


def test_a_cause_outside_of_the_tensors_has_none(plant: Plant, pygmy: Path, tmp_path: Path) -> None:
    """A configuration is no tensor: the files themselves are small enough."""
    path = plant("theta-half")
    cause = explain_failure(path, reference=pygmy).causes[0]
    with (
        open_checkpoint(path) as subject,
        open_checkpoint(pygmy) as reference,
        pytest.raises(UsageError, match="in no"),
    ):
        reproduce(cause, subject, reference, tmp_path / "small")

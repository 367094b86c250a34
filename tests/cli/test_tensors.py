"""tensors: names, types, places and numbers, of corrupt files too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr_core.cli import tensors
from apr_core.cli.app import main
from apr_core.errors import FormatError

DOWN = "model.layers.1.mlp.down_proj.weight"


def _json(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    body: dict[str, Any] = json.loads(capsys.readouterr().out)
    return body


def test_every_tensor_is_listed_with_its_place(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The span is where the bytes lie: read there, they have the values that the safetensors package reads."""
    from safetensors import safe_open

    body = _json(["tensors", str(healthy)], capsys)
    assert (body["tensors"], body["matching"], len(body["rows"])) == (26, 26, 26)
    data = (healthy / "model.safetensors").read_bytes()
    with safe_open(healthy / "model.safetensors", "pt") as file:
        for row in body["rows"]:
            assert row["end"] - row["begin"] == row["bytes"]
            assert data[row["begin"] : row["end"]] == file.get_tensor(row["name"]).view(_int16()).numpy().tobytes()
            assert row["role"] is not None


def _int16() -> Any:
    import torch

    return torch.int16


@pytest.mark.parametrize(
    ("matching", "count"), [("layers.1.", 12), ("*norm.weight", 5), ("down_proj", 2), (DOWN, 1), ("model.n*", 1)]
)
def test_a_filter_is_text_or_a_pattern(
    matching: str, count: int, healthy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text anywhere in the name, or a pattern for all of it."""
    body = _json(["tensors", str(healthy), "--filter", matching], capsys)
    assert (body["matching"], len(body["rows"])) == (count, count)
    assert main(["tensors", str(healthy), "--filter", matching]) == 0
    assert f", {count} of 26 tensors\n" in capsys.readouterr().out


def test_a_filter_that_matches_nothing_is_told(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty list would look like an answer."""
    assert main(["tensors", str(healthy), "--filter", "nosuch"]) == 2
    assert "none of 26 tensors matches 'nosuch'" in capsys.readouterr().err


def test_a_limit_says_how_many_there_are(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is cut is counted."""
    assert main(["tensors", str(healthy), "--limit", "3"]) == 0
    assert "26 tensors, 3 shown" in capsys.readouterr().out


def test_stats_are_measured_on_a_refused_model_too(refused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN is counted, null in JSON where there is no number, and the rest is that of numpy."""
    rows = {row["name"]: row for row in _json(["tensors", str(refused), "--stats"], capsys)["rows"]}
    assert (rows[DOWN]["nans"], rows["model.norm.weight"]["zero_percent"]) == (3, 100)
    name = "model.layers.0.mlp.up_proj.weight"
    raw = np.fromfile(refused / "model.safetensors", np.uint8)[rows[name]["begin"] : rows[name]["end"]]
    values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    assert rows[name]["mean"] == pytest.approx(values.mean(), abs=1e-9)
    assert rows[name]["std"] == pytest.approx(values.std(ddof=1), rel=1e-6)
    assert rows[name]["l2"] == pytest.approx(np.linalg.norm(values), rel=1e-6)
    assert main(["tensors", str(refused), "--stats"]) == 0
    (line,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith(DOWN)]
    assert line.split()[7:10] == ["0.0", "%", "3"]


def test_what_cannot_be_decoded_does_not_end_the_list(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reason stands in the row."""

    def measure(_: object) -> None:
        raise FormatError(expected="a", found="b", file="f", advice="c")

    monkeypatch.setattr("apr_core.contract.stats.measure", measure)
    assert tensors.listing(str(healthy), stats=True, limit=1)["rows"][0]["unreadable"] == "expected a, found b, in f"
    assert main(["tensors", str(healthy), "--stats", "--limit", "1"]) == 0
    assert "expected a, found b" in capsys.readouterr().out

"""check: eleven stages on two forwards; each stage fails for the fault that it is for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr_core.cli import check
from apr_core.cli.app import main
from apr_core.contract.admit import admit
from apr_core.engines.load import build, load_plain
from apr_core.engines.wrap import wrap

NAMES = [
    "Contract",
    "Tokenizer",
    "Embedding",
    "Positional Encoding",
    "Q/K/V Projection",
    "Attention Scores",
    "Feed-Forward (MLP)",
    "Layer Norm",
    "LM Head",
    "Logits -> Probs",
    "Sampler/Decode",
]


@pytest.fixture(scope="module")
def sides(root: Path) -> Iterator[tuple[Any, Any, Any]]:
    """The bundled model, admitted, and its two forwards."""
    admission = admit(root / "models" / "pygmy")
    yield admission, build(admission), load_plain(admission)
    admission.checkpoint.close()


def test_the_bundled_model_passes_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON and table agree, and the measured values lie below their limits."""
    assert main(["check", "pygmy", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in body["stages"]] == NAMES
    assert {stage["status"] for stage in body["stages"]} == {"PASS"}
    assert (body["passed"], body["total"], body["all_passed"]) == (11, 11, True)
    assert all(stage["measured"] <= stage["limit"] for stage in body["stages"])
    assert main(["check", "pygmy"]) == 0
    assert "11 of 11 stages passed" in capsys.readouterr().out


def test_a_model_without_tokenizer_skips_that_stage(mute: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A skipped stage is not a passed one."""
    assert main(["check", str(mute)]) == 0
    assert "10 of 11 stages passed, 1 skipped" in capsys.readouterr().out


def test_a_bypass_corroborates_nothing(healthy: Path) -> None:
    """Passed under the bypass is undecided."""
    assert main(["check", str(healthy), "--skip-contract"]) == 11


FAULTS = {
    "Embedding": ("layers.0.resid_attn", lambda values: values * 1.01),
    "Positional Encoding": ("layers.0.q", lambda values: np.roll(values, 1, axis=0)),
    "Q/K/V Projection": ("layers.1.k", lambda values: values + 0.01),
    "Attention Scores": ("layers.1.attn_output", lambda values: values[::-1].copy()),
    "Feed-Forward (MLP)": ("layers.0.resid_ffn", lambda values: values * 1.001),
    "Layer Norm": ("final_hidden", lambda values: values * np.float32(np.nan)),
    "LM Head": ("logits", lambda values: np.roll(values, 1, axis=1)),
    "Logits -> Probs": ("logits", lambda values: values * 1.01),
    "Sampler/Decode": ("logits", lambda values: values + np.arange(values.shape[1]) if len(values) == 1 else values),
}


@pytest.mark.parametrize("stage", FAULTS)
def test_each_stage_fails_for_its_fault(stage: str, sides: tuple[Any, Any, Any]) -> None:
    """A fault that is planted in one activation is found by the stage of that activation."""
    admission, model, plain = sides
    at, change = FAULTS[stage]

    def hook(name: str, values: Any, _: Any) -> Any:
        return change(values).astype(np.float32) if name == at else None

    body = check.examine(admission, wrap(model, hook), plain)
    status = {s["name"]: s["status"] for s in body["stages"]}
    assert status[stage] == "FAIL"
    assert not body["all_passed"]
    assert status["Contract"] == "PASS"


def test_an_unsteady_sampler_fails(sides: tuple[Any, Any, Any]) -> None:
    """Two greedy runs that differ are a failure whatever the distance is."""
    _, model, _ = sides
    calls = iter(range(10**6))

    def hook(name: str, values: Any, _: Any) -> Any:
        return np.roll(values, next(calls), axis=1) if name == "logits" else None

    value, details = check._decode(wrap(model, hook), np.arange(12))
    assert value != value or value > check.LIMIT
    assert "different tokens" in details


def test_a_stage_that_raises_fails(sides: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be measured has not passed, and the others are still tested."""
    from apr_core.errors import InferenceError

    def broken(*_: Any) -> Any:
        raise InferenceError("it broke")

    monkeypatch.setattr(check, "_embedding", broken)
    body = check.examine(*sides)
    assert [s["status"] for s in body["stages"]].count("FAIL") == 1
    assert body["stages"][2]["details"] == "it broke"


def test_a_lossy_tokenizer_fails(sides: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that does not come back is a failure."""
    _, model, _ = sides
    monkeypatch.setattr(model.tokenizer, "decode", lambda ids: "something else")
    assert check._tokenizer(model)["status"] == "FAIL"


def test_a_failing_stage_is_5(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code follows the stages, with --json too."""
    monkeypatch.setattr(check, "LIMIT", 0.0)
    assert main(["check", "pygmy", "--json"]) == 5
    assert not json.loads(capsys.readouterr().out)["all_passed"]

"""validate: all violations, grouped by gate, and an exit code that agrees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apr_core.cli.app import main


def test_a_healthy_model_exits_0(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No violation, every tensor measured."""
    assert main(["validate", str(healthy)]) == 0
    assert capsys.readouterr().out == (f"{healthy}: admitted, no violation; 26 tensors measured of 26 expected\n")


def test_a_refused_model_exits_5_and_lists_everything(refused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each gate with its violations below it, tensor and numbers in the line, the sum at the end."""
    assert main(["validate", str(refused)]) == 5
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("F-DATA-QUALITY-002: 1 violation")
    assert lines[at + 1].startswith("  model.layers.1.mlp.down_proj.weight: 3 NaN")
    assert any(line.startswith("  model.norm.weight: ") for line in lines)
    assert lines[-1].startswith(f"{refused}: refused, ")
    assert lines[-1].endswith("violations in 2 tensors; 26 tensors measured of 26 expected")


def test_the_bypass_does_not_silence_diagnosis(refused: Path) -> None:
    """--skip-contract is for actions: validate still refuses."""
    assert main(["--skip-contract", "validate", str(refused)]) == 5


@pytest.mark.parametrize("fixture", ["healthy", "refused"])
def test_json_says_the_same(fixture: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    """The JSON document is strict, and its verdict agrees with the exit code."""
    code = main(["validate", str(request.getfixturevalue(fixture)), "--json"])
    body = json.loads(capsys.readouterr().out)
    assert body["admitted"] == (code == 0) == (not body["violations"])
    assert (body["tensors"]["measured"], body["tensors"]["expected"]) == (26, 26)
    assert sum(body["gates"].values()) == len(body["violations"])
    if fixture == "refused":
        first = next(v for v in body["violations"] if v["gate"] == "F-DATA-QUALITY-002")
        assert (first["tensor"], first["measured"], first["limit"]) == ("model.layers.1.mlp.down_proj.weight", 3, 0)


def test_without_config_nothing_can_be_judged(lost_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing config.json is a load error, exit 6."""
    assert main(["validate", str(lost_config)]) == 6
    assert "config.json" in capsys.readouterr().err


def test_an_unfinished_config_is_a_violation(oracle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file whose config lacks sizes is refused, and the expected number is said to be unknown."""
    assert main(["validate", str(oracle / "apr" / "minimal_v2.apr")]) == 5
    out = capsys.readouterr().out
    assert "  config: " in out
    assert "of an unknown number expected" in out


def test_what_is_outside_the_contract_is_told(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tensor that nothing uses is information, not a violation."""
    from apr_core.dtypes import FORMATS
    from apr_core.formats.checkpoint import TensorSource, open_checkpoint
    from apr_core.formats.safetensors import write_safetensors

    with open_checkpoint(healthy) as checkpoint:
        sources = [
            TensorSource(t.name, t.dtype, t.shape, lambda name=name: [checkpoint.raw(name).data])
            for name, t in checkpoint.tensors.items()
        ]
        sources.append(TensorSource("odd.extra", FORMATS["F32"], (1,), lambda: [bytes(4)]))
        write_safetensors(tmp_path / "model.safetensors", sources)
    (tmp_path / "config.json").write_bytes((healthy / "config.json").read_bytes())
    assert main(["validate", str(tmp_path)]) == 0
    assert "used by nothing: odd.extra" in capsys.readouterr().out


def test_quality_shows_each_rule(refused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Limit, how many were judged, how many failed; a rule that nothing here asks says so and counts for nothing."""
    assert main(["validate", str(refused), "--quality"]) == 5
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines]
    assert ["F-DATA-QUALITY-002", "nonfinite_values"] in [row[:2] for row in rows]
    (nonfinite,) = [row for row in rows if row[1:2] == ["nonfinite_values"]]
    assert nonfinite[-2:] == ["26", "1"]
    (head,) = [line for line in lines if "head_differs" in line]
    assert "none here" in head
    assert " checks passed, " in lines[-2]


def test_the_score_is_the_share_of_executed_checks(refused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checked, failed and score agree with each other and with the violations; nothing that was not run counts."""
    main(["validate", str(refused), "--json"])
    body = json.loads(capsys.readouterr().out)
    executed, failed = (sum(row[key] for row in body["rules"]) for key in ("checked", "failed"))
    assert (body["checks"]["executed"], failed) == (executed, len(body["violations"]))
    assert body["checks"]["score"] == pytest.approx(100 * (executed - failed) / executed)
    assert body["tensors"]["passed"] == 24


@pytest.mark.parametrize(("least", "code"), [("0", 0), ("100", 0), ("99.9", 0)])
def test_a_clean_model_has_the_whole_score(least: str, code: int, healthy: Path) -> None:
    """100 % of 100 %."""
    assert main(["validate", str(healthy), "--min-score", least]) == code


def test_the_least_score_is_held(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score below the demand is refused even if no gate is, and one that is not a number as well."""
    from apr_core.cli import validate

    real = validate.breakdown
    monkeypatch.setattr(validate, "breakdown", lambda a: [{**row, "failed": row["checked"]} for row in real(a)])
    assert main(["validate", str(healthy), "--min-score", "1"]) == 5
    assert main(["validate", str(healthy)]) == 0


@pytest.mark.parametrize("least", ["-1", "101", "many"])
def test_a_score_is_a_share(least: str, healthy: Path) -> None:
    """Anything else is a usage error."""
    assert main(["validate", str(healthy), "--min-score", least]) == 2


def test_several_models_end_with_the_worst(
    healthy: Path, refused: Path, truncated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A CI job gives a list: each is judged, whatever the others are, and the exit code is that of the worst."""
    assert main(["validate", str(healthy), str(healthy)]) == 0
    assert main(["validate", str(refused), str(healthy)]) == 5
    capsys.readouterr()
    assert main(["validate", str(refused), str(truncated), str(healthy), "--json"]) == 4
    out, err = capsys.readouterr()
    bodies = json.loads(out)["models"]
    assert [body["admitted"] for body in bodies] == [False, False, True]
    assert [body["exit_code"] for body in bodies] == [5, 4, 0]
    assert "bytes are missing" in bodies[1]["error"]
    assert "error: " in err
    assert main(["validate", str(truncated), "no/such/file"]) == 4
    assert "not judged, exit 4" in capsys.readouterr().out


def test_strict_refuses_what_is_outside_the_contract(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tensor that nothing uses is told, and with --strict refused; a clean model passes both."""
    from apr_core.dtypes import FORMATS
    from apr_core.formats.checkpoint import TensorSource, open_checkpoint
    from apr_core.formats.safetensors import write_safetensors

    with open_checkpoint(healthy) as checkpoint:
        sources = [
            TensorSource(t.name, t.dtype, t.shape, lambda name=name: [checkpoint.raw(name).data])
            for name, t in checkpoint.tensors.items()
        ]
        sources.append(TensorSource("odd.extra", FORMATS["F32"], (1,), lambda: [bytes(4)]))
        write_safetensors(tmp_path / "model.safetensors", sources)
    (tmp_path / "config.json").write_bytes((healthy / "config.json").read_bytes())
    assert main(["validate", str(tmp_path)]) == 0
    assert main(["validate", str(tmp_path), "--strict"]) == 5
    assert "refused: 1 tensors outside the contract (--strict)" in capsys.readouterr().out
    assert main(["validate", str(healthy), "--strict"]) == 0

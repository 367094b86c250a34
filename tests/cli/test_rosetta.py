"""convert, import, export, diff and rosetta on the command line: what they write, say and exit with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from apr_core.cli.app import main
from apr_core.formats.checkpoint import open_checkpoint

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def permuted(healthy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with two rows of one matrix exchanged: every statistic is the same."""
    folder = tmp_path_factory.mktemp("permuted") / "m"
    shutil.copytree(healthy, folder)
    held = load_file(folder / "model.safetensors")
    held[UP] = held[UP][[1, 0, *range(2, held[UP].shape[0])]].contiguous()
    save_file(held, folder / "model.safetensors")
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    """Run a command with --json and parse what it prints."""
    code = main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_safetensors_to_gguf_is_q4_k_m_and_says_so(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default is announced; keep and every other type are taken as asked; a second time nothing is overwritten."""
    assert main(["convert", str(healthy), str(tmp_path / "a.gguf")]) == 0
    out, err = capsys.readouterr()
    assert "quantising to Q4_K_M, the default from SafeTensors to GGUF" in err
    assert "a.gguf: gguf" in out
    with open_checkpoint(tmp_path / "a.gguf") as made:
        assert made.metadata["general.file_type"] == 15
    assert main(["convert", str(healthy), str(tmp_path / "a.gguf")]) == 2
    assert "exists; name another, or give --force" in capsys.readouterr().err
    code, body = said(capsys, "rosetta", "convert", str(healthy), str(tmp_path / "k.gguf"), "--quantize", "keep")
    assert (code, body["quantize"], body["default"]) == (0, "keep", False)
    assert set(body["types"]) <= {"BF16", "BF16 -> F32", "F32"}
    code, body = said(capsys, "convert", str(healthy), str(tmp_path / "a.gguf"), "--quantize", "q8_0", "--force")
    assert (code, body["quantize"], body["bypassed"]) == (0, "Q8_0", False)
    assert main(["convert", str(tmp_path / "a.gguf"), str(tmp_path / "b.gguf"), "--quantize", "Q6_K"]) == 0
    assert "quantised already: the errors of both add up" in capsys.readouterr().err


def test_import_and_export_write_their_own_formats(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Import makes APR, export the others; a name of another format is refused, not overruled."""
    assert main(["import", str(healthy), "-o", str(tmp_path / "m.apr")]) == 0
    assert main(["export", str(tmp_path / "m.apr"), "-o", str(tmp_path / "back")]) == 0
    assert (tmp_path / "back" / "config.json").is_file()
    assert main(["export", str(tmp_path / "m.apr"), "-o", str(tmp_path / "m.gguf")]) == 0
    with open_checkpoint(tmp_path / "m.gguf") as made:
        assert made.format == "gguf"
    capsys.readouterr()
    assert main(["import", str(healthy), "-o", str(tmp_path / "x.gguf")]) == 2
    assert main(["export", str(healthy), "-o", str(tmp_path / "x.apr")]) == 2
    assert main(["convert", str(healthy), str(tmp_path / "x.onnx")]) == 2
    assert main(["convert", str(healthy), str(tmp_path / "x.gguf"), "--quantize", "int3"]) == 2
    err = capsys.readouterr().err
    assert "import writes APR" in err
    assert "export writes GGUF and SafeTensors" in err
    assert "found .onnx" in err
    assert "found 'int3'" in err


def test_a_bypassed_conversion_is_marked(refused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A refused model is converted only with the bypass, and the output says so."""
    assert main(["convert", str(refused), str(tmp_path / "x.apr"), "--no-tokenizer"]) == 5
    capsys.readouterr()
    code, body = said(capsys, "convert", str(refused), str(tmp_path / "x.apr"), "--no-tokenizer", "--skip-contract")
    assert (code, body["bypassed"]) == (0, True)


def test_the_chain_of_the_issue(capsys: pytest.CaptureFixture[str]) -> None:
    """Pygmy through GGUF and APR and back: corroborated, one fingerprint at every step."""
    code, body = said(capsys, "rosetta", "chain", "pygmy", "gguf", "apr", "safetensors")
    assert (code, body["verdict"]) == (0, "CORROBORATED")
    assert len({step["fingerprint"] for step in body["steps"]}) == 1
    assert main(["rosetta", "chain", "pygmy", "gguf", "--quantize", "F16"]) == 0
    assert "CORROBORATED: 26 tensors" in capsys.readouterr().out
    assert main(["rosetta", "chain", "pygmy", "gguf", "gguf"]) == 2


def test_permuted_rows_are_found_and_named(
    healthy: Path, permuted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 5 and the tensor's name, by value and by fingerprint; statistics alone see nothing."""
    assert main(["rosetta", "diff-tensors", str(healthy), str(permuted)]) == 5
    out = capsys.readouterr().out
    assert f"FALSIFIED: 1 of 26 tensors differ: {UP}" in out
    code, body = said(capsys, "rosetta", "fingerprint", str(healthy), str(permuted))
    assert (code, body["same"], body["differing"]) == (5, False, [UP])
    assert main(["rosetta", "fingerprint", str(healthy), str(permuted)]) == 5
    assert main(["rosetta", "validate-stats", str(permuted), "--reference", str(healthy)]) == 0
    assert "plausible is not identical" in capsys.readouterr().out
    assert main(["diff", str(healthy), str(permuted)]) == 5
    assert main(["rosetta", "diff-tensors", str(healthy), str(permuted), "--filter", "down_proj"]) == 0
    assert main(["rosetta", "verify", str(permuted), "--against", str(healthy)]) == 5
    capsys.readouterr()
    code, body = said(capsys, "rosetta", "diff-tensors", str(healthy), str(permuted))
    assert (code, body["differing"][0]["tensor"], body["differing"][0]["first"]) == (5, UP, [0, 0])


def test_missing_tensors_are_failures_in_both_directions(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """27 of 27 missing once passed; here each side's absence is exit 5, and many are counted."""
    folder = tmp_path / "less"
    shutil.copytree(healthy, folder)
    held = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in held.items() if "bias" not in name}, folder / "model.safetensors")
    for pair in ((healthy, folder), (folder, healthy)):
        assert main(["rosetta", "diff-tensors", str(pair[0]), str(pair[1]), "--limit", "2"]) == 5
        out = capsys.readouterr().out
        assert "missing in the " in out
        assert "and 4 more" in out


def test_a_quantised_copy_is_held_against_the_finer_one(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In either order the finer file is the reference, and the honest copy is corroborated with its distance."""
    path = str(tmp_path / "q.gguf")
    assert main(["convert", str(healthy), path, "--quantize", "Q8_0"]) == 0
    for pair in ((str(healthy), path), (path, str(healthy))):
        assert main(["rosetta", "diff-tensors", *pair]) == 0
    out, err = capsys.readouterr()
    assert "SQNR dB" in out
    assert "is the coarser of the two" in err
    assert main(["diff", str(healthy), path]) == 0
    assert main(["rosetta", "verify", path, "--against", str(healthy)]) == 0


def test_diff_names_what_is_no_tensor(healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another rope_theta is no tensor, and is found."""
    folder = tmp_path / "other"
    shutil.copytree(healthy, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0}))
    assert main(["diff", str(healthy), str(folder)]) == 5
    assert "rope_theta: 10000, expected 1e+06" in capsys.readouterr().out
    assert main(["rosetta", "diff-tensors", str(healthy), str(folder)]) == 0


def test_verify_goes_and_comes_back(capsys: pytest.CaptureFixture[str]) -> None:
    """Through the first format that holds it, or the one asked for; two questions at once are refused."""
    assert main(["rosetta", "verify", "pygmy"]) == 0
    assert main(["rosetta", "verify", "pygmy", "--intermediate", "apr"]) == 0
    assert main(["rosetta", "verify", "pygmy", "--intermediate", "apr", "--against", "pygmy"]) == 2
    assert "two different questions" in capsys.readouterr().err


def test_the_passport(healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Types, bits and label; with a reference the distance of every tensor."""
    path = str(tmp_path / "q.gguf")
    assert main(["convert", str(healthy), path, "--quantize", "Q8_0"]) == 0
    assert main(["rosetta", "inspect", path, "--reference", str(healthy)]) == 0
    out = capsys.readouterr().out
    assert "labelled Q8_0 by general.file_type" in out
    assert "SQNR dB" in out
    code, body = said(capsys, "rosetta", "inspect", path)
    assert (code, body["label_agrees"], body["types"]["Q8_0"]["decoder"]) == (0, True, "apr_core")


def test_fingerprints_are_kept_and_compared(
    healthy: Path, refused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A document of a healthy model finds the non-finite values of a corrupt one; a damaged document is refused."""
    kept = tmp_path / "prints.json"
    assert main(["rosetta", "fingerprint", str(healthy), "-o", str(kept)]) == 0
    assert main(["rosetta", "fingerprint", str(healthy), str(healthy)]) == 0
    code, body = said(capsys_clear(capsys), "rosetta", "fingerprint", str(healthy))
    assert (code, body) == (0, json.loads(kept.read_text()))
    code, body = said(capsys, "rosetta", "validate-stats", str(refused), "--fingerprints", str(kept))
    assert code == 5
    assert any("non-finite" in row["what"] for row in body["anomalies"])
    assert main(["rosetta", "validate-stats", str(refused), "--fingerprints", str(kept)]) == 5
    assert main(["rosetta", "validate-stats", str(healthy), "--fingerprints", str(kept)]) == 0
    assert "the fingerprints are equal" in capsys.readouterr().out
    assert main(["rosetta", "validate-stats", str(healthy)]) == 2
    assert main(["rosetta", "validate-stats", str(healthy), "--fingerprints", str(tmp_path / "no")]) == 3
    kept.write_text("{")
    assert main(["rosetta", "validate-stats", str(healthy), "--fingerprints", str(kept)]) == 4


def capsys_clear(capsys: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    """Forget what was printed so far."""
    capsys.readouterr()
    return capsys


def test_progress_is_one_bar_per_file(
    healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each copy of a chain says how far it is, in plain lines where there is no terminal."""
    monkeypatch.setattr("apr_core.cli.progress._lines.__defaults__", None, raising=False)
    monkeypatch.setattr("apr_core.cli.progress.QUIET_S", 0.0)
    monkeypatch.setattr("apr_core.cli.progress.progress.__wrapped__.__kwdefaults__", {"quiet_s": 0.0})
    assert main(["rosetta", "chain", str(healthy), "gguf", "apr", "--no-tokenizer"]) == 0
    err = capsys.readouterr().err
    assert "writing gguf: " in err
    assert "writing apr: " in err

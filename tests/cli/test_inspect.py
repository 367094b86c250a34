"""inspect: what is in the file, for healthy, refused and odd ones."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from apr_core.cli.app import main
from apr_core.cli.inspect import describe
from apr_core.dtypes import FORMATS
from apr_core.errors import FormatError
from apr_core.formats.checkpoint import TensorSource
from apr_core.formats.gguf import write_gguf
from apr_core.model.synth import synthesise
from tests.attacks.build import VALID_APR, apr_packed


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["inspect", *arguments, "--json"]) == 0
    body: dict[str, Any] = json.loads(capsys.readouterr().out)
    return body


def test_a_healthy_model_is_described(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counts, bytes, types and tokenizer are those of the shape."""
    body = _json(capsys, str(healthy))
    assert body["format"] == "safetensors"
    assert (body["tensors"], body["parameters"], body["weight_bytes"]) == (26, 1_837_312, 2 * 1_837_312)
    assert body["bits_per_weight"] == 16.0
    assert body["types"] == {
        "BF16": {"tensors": 26, "parameters": 1_837_312, "bytes": 2 * 1_837_312, "decoder": "apr_core"}
    }
    assert body["tokenizer"]["usable"] is True
    assert (body["tokenizer"]["vocab_size"], body["tokenizer"]["chat_template"]) == (1019, True)
    assert body["metadata"]["apr.untrained"] == "true"
    assert body["config"]["num_key_value_heads"] == 2
    assert (body["gaps"], "sha256" in body) == ([], False)


def test_executable_content_beside_the_weights_is_listed(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pickle beside the weights is legal, and said; without one there is no such entry."""
    (tmp_path / "model.safetensors").write_bytes((healthy / "model.safetensors").read_bytes())
    assert "executables" not in _json(capsys, str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}, 2))
    kind = "a Python pickle (protocol 2)"
    assert _json(capsys, str(tmp_path))["executables"] == [{"name": "pytorch_model.bin", "what": kind}]
    assert main(["inspect", str(tmp_path)]) == 0
    assert f"executable       pytorch_model.bin: {kind}" in capsys.readouterr().out


def test_what_the_container_says_about_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Version, flags, compression and parts of an APR file."""
    (tmp_path / "f").write_bytes(apr_packed(VALID_APR, 0x0402))
    flags = ["zstd_compressed", "layout_row_major"]
    expected = {"version": "2.0", "flags": flags, "compressed": True, "parts": 1}
    assert _json(capsys, str(tmp_path / "f"))["container"] == expected
    assert main(["inspect", str(tmp_path / "f")]) == 0
    assert "compressed True, parts 1" in capsys.readouterr().out


def test_the_hash_is_that_of_the_file(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--hash gives what sha256sum gives."""
    expected = hashlib.sha256((healthy / "model.safetensors").read_bytes()).hexdigest()
    assert _json(capsys, str(healthy), "--hash")["sha256"] == expected


@pytest.mark.parametrize("fixture", ["refused", "base", "mute", "lost_config"])
def test_what_cannot_run_is_described_all_the_same(
    fixture: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Diagnosis judges nothing: a refused model, and one without config, template or tokenizer, exit 0."""
    body = _json(capsys, str(request.getfixturevalue(fixture)))
    assert body["tensors"] == 26
    assert (body["config"] is None) == (fixture == "lost_config")
    assert body["tokenizer"]["usable"] == (fixture != "mute")
    assert body["tokenizer"].get("chat_template", False) == (fixture in ("refused", "lost_config"))


@pytest.mark.parametrize("dtype", ["q8_0", "q4_k_m"])
def test_the_printed_page_shows_types_and_cuts_arrays(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GGUF's tokens are counted, not printed; every type has its row with its decoder."""
    path = synthesise("pygmy", format="gguf", dtype=dtype, out=tmp_path / "m.gguf")
    assert main(["inspect", str(path), "--hash"]) == 0
    out = capsys.readouterr().out
    assert '[1024 values] !, ", #, ...' in out
    assert "sha256" in out
    assert max(len(line) for line in out.splitlines()) < 400
    rows = {line.split()[0]: line.split()[-1] for line in out.splitlines() if line.endswith("apr_core")}
    assert set(rows) == ({"F32", "Q8_0"} if dtype == "q8_0" else {"F32", "Q4_K", "Q6_K"})


@pytest.mark.parametrize("fixture", ["mute", "lost_config"])
def test_the_printed_page_says_what_is_missing(
    fixture: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing tokenizer is said with its reason, a missing config as none."""
    assert main(["inspect", str(request.getfixturevalue(fixture))]) == 0
    out = capsys.readouterr().out
    assert ("tokenizer        none: no tokenizer" in out) == (fixture == "mute")
    assert ("config\nnone" in out) == (fixture == "lost_config")


def test_a_foreign_type_names_its_decoder_and_a_gap_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Q2_K goes through the gguf package, which the page says; bytes behind the last tensor are told."""
    block = bytes(84)
    path = tmp_path / "m.gguf"
    write_gguf(path, [TensorSource("odd", FORMATS["Q2_K"], (1, 256), lambda: [block])], {"general.architecture": "x"})
    with path.open("ab") as stream:
        stream.write(bytes(64))
    body = _json(capsys, str(path))
    assert body["types"]["Q2_K"]["decoder"] == "gguf"
    assert sum(gap["bytes"] for gap in body["gaps"]) == 64
    assert main(["inspect", str(path)]) == 0
    assert "unexplained      64 bytes" in capsys.readouterr().out


def test_long_values_are_cut(tmp_path: Path) -> None:
    """Long text, long lists and long mappings are shortened, and say how long they were."""
    from apr_core.cli.inspect import _cut

    assert _cut("x" * 300) == "x" * 200 + "... (300 characters)"
    assert _cut(list(range(9))) == "[9 values] 0, 1, 2, ..."
    assert str(_cut({"key": "y" * 300})).startswith("{1 keys} key")
    assert [_cut(value) for value in (1, "short", [1, 2], None)] == [1, "short", [1, 2], None]


def test_broken_metadata_hides_nothing_else() -> None:
    """One value that does not parse is told in its place."""
    from apr_core.cli.inspect import _value

    class Broken(dict[str, object]):
        def __getitem__(self, key: str) -> object:
            raise FormatError(expected="text", found="bytes", file="f", advice="a")

    assert _value(Broken(k=1), "k") == "(unreadable: expected text, found bytes, in f)"


def test_an_apr_of_version_1_is_described(oracle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The classic format is named with its model type and the reason why it cannot run; exit 0."""
    path = str(oracle / "apr" / "mnist_784x2.apr")
    body = _json(capsys, path)
    assert (body["format"], body["model_type"], body["checksum_holds"]) == ("apr-v1", "LogisticRegression", True)
    assert "cannot be run" in body["cannot_run"]
    assert main(["inspect", path]) == 0
    assert "LogisticRegression" in capsys.readouterr().out


def test_the_readers_diagnosis_stands(tmp_path: Path) -> None:
    """A file that is neither a model nor a version 1 file keeps the first diagnosis."""
    path = tmp_path / "page.apr"
    path.write_bytes(b"<!DOCTYPE html><html></html>")
    with pytest.raises(FormatError, match="HTML"):
        describe(str(path))

"""The commands trace, parity and eval: what they print, and that verdict and exit code agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from apr_core.cli import parity
from apr_core.cli.app import main
from apr_core.engines import load
from apr_core.errors import LoadError
from apr_core.model.trace import TracedForward
from apr_core.rosetta.convert import convert


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    """Run a command with --json."""
    code = main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_parity_of_the_bundled_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every backend that runs here, at least the independent one, with its floor, coverage and what is missing."""
    code, body = run(capsys, "parity", "pygmy")
    assert (code, body["verdict"], body["reason"]) == (0, "CORROBORATED", "")
    assert body["candidates"][0]["backend"] == "plain"
    parts = {p["name"] for p in body["candidates"][0]["parts"]}
    assert parts >= {"prefill", "decode", "far 4000", "isolation", "tracing"}
    assert body["positions"] == 128
    assert len(body["noise_floor"]) == len(body["candidates"][0]["names"]) == 14
    assert {m["backend"] for m in body["not_available"]} >= {"reference on cuda"}
    priced = {c["precision"] for c in body["candidates"] if "activations in bfloat16" in c["limits"]}
    assert priced == {c["precision"] for c in body["candidates"]} & {"speed"}  # its weights are BF16
    assert not any("activations of 8 bits" in c["limits"] for c in body["candidates"])
    assert all(p["times_limit"] is None or p["times_limit"] < 1 for c in body["candidates"] for p in c["parts"])
    # what is printed is a function of what was measured: no second run of the suite for it
    monkeypatch.setattr(parity, "examine_all", lambda *_: body)
    assert main(["parity", "pygmy"]) == 0
    out = capsys.readouterr().out
    assert "not available: reference on cuda" in out
    assert "no backend was refuted" in out


def test_a_backend_that_is_wrong_is_exit_5(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose values are shifted by one slot: refuted, with its first divergence."""
    from apr_core.engines.wrap import wrap
    from apr_core.model.qwen2 import Qwen2

    def shifted(validated: Any, device: str, tokenizer: Any) -> TracedForward:
        hook = lambda name, x, at: np.roll(x, 1, axis=0) if name == "layers.1.v" and len(x) > 1 else None  # noqa: E731
        return wrap(Qwen2(validated), hook)

    monkeypatch.setitem(load.ENGINES, ("exact", "cpu"), shifted)
    code, body = run(capsys, "parity", "pygmy", "--device", "cpu")
    assert (code, body["verdict"]) == (5, "FALSIFIED")
    assert "torch with a hook on cpu: prefill: first divergence: layers.1.v at position 0" in body["reason"]
    monkeypatch.setattr(parity, "examine_all", lambda *_: body)
    assert main(["parity", "pygmy", "--device", "cpu"]) == 5


@pytest.mark.parametrize(("device", "code"), [("auto", 0), ("cuda", 11)])
def test_an_engine_that_does_not_take_the_file_leaves_the_others_to_run(
    device: str, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named with its reason; where its device was asked for, the verdict stays open: silence would corroborate it."""
    import torch

    from apr_core.engines.cuda import CudaQwen2

    def refusing(validated: Any, device: str, tokenizer: Any) -> TracedForward:
        raise LoadError("expected a type of Q8_0, found Q2_K", advice="use --precision reference")

    def here(validated: Any, device: str, tokenizer: Any) -> TracedForward:
        return CudaQwen2(validated, "cpu", tokenizer)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("apr_core.engines.gpu.require_device", lambda _: None)
    monkeypatch.setitem(load.ENGINES, ("reference", "cuda"), here)
    for key in (("speed", "cpu"), ("exact", "cpu"), ("speed", "cuda"), ("exact", "cuda")):
        monkeypatch.setitem(load.ENGINES, key, refusing)
    found, body = run(capsys, "parity", "pygmy", "--device", device)
    missing = {row["backend"]: row["reason"] for row in body["not_available"]}
    assert sorted(missing) == ["exact on cpu", "exact on cuda", "speed on cpu", "speed on cuda"]
    assert all(reason.startswith("expected a type of Q8_0, found Q2_K") for reason in missing.values())
    assert [c["backend"] for c in body["candidates"]] == ["plain", "torch, its own attention"]
    assert (found, body["verdict"]) == (code, "INCONCLUSIVE" if code else "CORROBORATED")
    assert ("speed on cuda did not run: expected a type" in body["reason"]) == bool(code)


def test_an_asked_for_device_that_is_not_there_is_exit_9(capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing runs on the CPU in its place."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert main(["parity", "pygmy", "--device", "cuda"]) == 9
    assert "no CUDA device" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pair(pygmy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model as F16, and with one key bias negated."""
    made = {}
    for name in ("f16", "negated"):
        folder = made[name] = tmp_path_factory.mktemp("pair") / name
        folder.mkdir()
        for path in pygmy.iterdir():
            if path.suffix == ".json":
                shutil.copy(path, folder)
        from apr_core.formats.checkpoint import open_checkpoint
        from apr_core.formats.codecs import decode

        with open_checkpoint(pygmy) as checkpoint:
            tensors = {n: decode(checkpoint.raw(n)).astype(np.float16) for n in checkpoint.tensors}
        if name == "negated":
            tensors["model.layers.0.self_attn.k_proj.bias"] *= -1
        save_file(tensors, str(folder / "model.safetensors"))
    assert load_file(made["f16"] / "model.safetensors")
    return made


def test_parity_against_a_reference(capsys: pytest.CaptureFixture[str], pair: dict[str, Path]) -> None:
    """F16 of BF16 costs next to nothing; a negated bias is far beyond that, and exit 5."""
    code, body = run(capsys, "parity", pair["f16"], "--reference", "pygmy", "--device", "cpu")
    assert (code, body["against_reference"]["verdict"]) == (0, "CORROBORATED")
    code, body = run(capsys, "parity", pair["negated"], "--reference", "pygmy", "--device", "cpu")
    assert (code, body["verdict"]) == (5, "FALSIFIED")
    assert "times its limit" in body["against_reference"]["reason"]
    assert all(c["verdict"] == "CORROBORATED" for c in body["candidates"])


def test_nothing_about_a_bypassed_model_is_corroborated(capsys: pytest.CaptureFixture[str], healthy: Path) -> None:
    """Exit 11 with the reason."""
    code, body = run(capsys, "parity", healthy, "--device", "cpu", "--skip-contract")
    assert (code, body["verdict"], body["bypassed"]) == (11, "INCONCLUSIVE", True)
    assert "--skip-contract" in body["reason"]


def test_eval_of_the_bundled_text(capsys: pytest.CaptureFixture[str], pair: dict[str, Path], tmp_path: Path) -> None:
    """Every token but the first is scored once; against itself everything is zero; F16 is close."""
    code, body = run(capsys, "eval", "pygmy", "--base", "pygmy")
    assert (code, body["control"]) == (0, True)
    assert body["tokens"] >= 2000
    assert body["scored"] == body["tokens"] - 1
    low, high = body["perplexity_interval"]
    assert low < body["perplexity"] < high
    assert body["against_base"]["kl_mean"] == body["against_base"]["kl_max"] == 0
    assert body["against_base"]["perplexity_reference"] == pytest.approx(body["perplexity"])
    text = tmp_path / "short.txt"
    text.write_text("def fib(n):\n    return n\n" * 9, encoding="utf-8")
    code, short = run(capsys, "eval", pair["negated"], "--text", text, "--base", "pygmy")
    assert (code, short["control"]) == (0, False)
    assert short["against_base"]["kl_mean"] > 1e-4
    assert main(["eval", "pygmy", "--text", str(text)]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_eval_of_a_finer_copy(
    capsys: pytest.CaptureFixture[str], pair: dict[str, Path], pygmy: Path, tmp_path: Path
) -> None:
    """More bits per weight must not cost more: 0 for F16 against Q8_0, 5 where the F16 is damaged, 2 the wrong way."""
    coarse, text = tmp_path / "q8.gguf", tmp_path / "short.txt"
    convert(pygmy, coarse, quantize="Q8_0")
    text.write_text("def fib(n):\n    return n\n" * 9, encoding="utf-8")
    given = ["eval", str(coarse), "--text", text, "--base", "pygmy", "--finer"]
    code, body = run(capsys, *given, pair["f16"])
    assert (code, body["verdict"]) == (0, "CORROBORATED")
    assert 0 < body["kl_mean_finer"] < body["against_base"]["kl_mean"]
    code, body = run(capsys, *given, pair["negated"])
    assert (code, body["verdict"]) == (5, "FALSIFIED")
    assert "with more bits per weight" in body["reason"]
    code, body = run(capsys, *given, pair["f16"], "--skip-contract")
    assert (code, body["verdict"]) == (11, "INCONCLUSIVE")
    wrong = ["eval", str(pair["f16"]), "--text", str(text), "--base", "pygmy", "--finer", str(coarse)]
    assert main(wrong) == 2
    assert main(["eval", str(coarse), "--text", str(text), "--finer", str(pair["f16"])]) == 2
    said = capsys.readouterr().err
    assert "bits per weight of MODEL" in said
    assert "add --base MODEL" in said


def test_eval_of_what_cannot_be_read(capsys: pytest.CaptureFixture[str], mute: Path, tmp_path: Path) -> None:
    """No tokenizer is 6, no text 3, a text that is none 2, another vocabulary 2."""
    assert main(["eval", str(mute)]) == 6
    assert main(["eval", "pygmy", "--text", str(tmp_path / "none")]) == 3
    (tmp_path / "bad").write_bytes(b"\xff\xfe\xfd")
    assert main(["eval", "pygmy", "--text", str(tmp_path / "bad")]) == 2
    (tmp_path / "empty").write_bytes(b"")
    assert main(["eval", "pygmy", "--text", str(tmp_path / "empty")]) == 2
    assert "expected a text of at least 2 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(("level", "rows"), [("none", 0), ("basic", 2), ("layer", 4), ("payload", 14 * 64)])
def test_trace_levels(capsys: pytest.CaptureFixture[str], level: str, rows: int) -> None:
    """More with each level; payload shows every name at every position."""
    code, body = run(capsys, "trace", "pygmy", "--level", level)
    assert (code, len(body["rows"])) == (0, rows)
    for row in body["rows"][:3]:
        assert set(row) == {"name", "position", "rms", "mean", "max_abs", "nonfinite", "digest"}


def test_trace_against_a_reference(capsys: pytest.CaptureFixture[str], pair: dict[str, Path]) -> None:
    """The first name that differs is named; without --diff both sides are shown; a trace judges nothing."""
    code, body = run(capsys, "trace", pair["negated"], "--reference", "pygmy", "--diff", "-p", "def fib(n):")
    assert code == 0
    assert body["first_divergence"].startswith("layers.0.k at position 0")
    assert main(["trace", str(pair["negated"]), "--reference", "pygmy", "--diff"]) == 0
    assert "first beyond rel_l2 1e-5: layers.0.k" in capsys.readouterr().out
    assert main(["trace", "pygmy", "--diff"]) == 2
    assert main(["trace", "pygmy", "--level", "loud"]) == 2


def compare(capsys: pytest.CaptureFixture[str], *pair: object) -> tuple[int, dict[str, Any]]:
    """Run rosetta compare-inference."""
    return run(capsys, "rosetta", "compare-inference", *pair)


def test_compare_inference_of_two_containers(capsys: pytest.CaptureFixture[str], pair: dict[str, Path]) -> None:
    """Within what the types cost, far beyond it, and the same file twice, which is a control and exit 0."""
    code, body = compare(capsys, "pygmy", pair["f16"])
    assert (code, body["verdict"], body["control"], body["positions"]) == (0, "CORROBORATED", False, 128)
    code, body = compare(capsys, "pygmy", pair["negated"])
    assert (code, body["verdict"]) == (5, "FALSIFIED")
    assert body["kl_over_limit"][1] > 1
    assert body["statistics"]["kl_mean"] > body["yardstick"]["kl_mean"]
    code, body = compare(capsys, "pygmy", "pygmy")
    assert (code, body["verdict"], body["control"]) == (0, "CORROBORATED", True)
    assert body["statistics"]["kl_max"] == 0
    assert main(["rosetta", "compare-inference", "pygmy", "pygmy", "-p", "def f(n):"]) == 0
    assert "a control: both are the same file" in capsys.readouterr().out


def test_compare_inference_of_other_vocabularies_and_layers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Undecided with the reason, exit 11; the overlap is not compared."""
    from tests.model.conftest import write_tiny

    code, body = compare(capsys, "pygmy", write_tiny(tmp_path / "other"))
    assert (code, body["verdict"], body["compared"]) == (11, "INCONCLUSIVE", 0)
    assert "a vocabulary of 331 cannot be held against one of 1024" in body["reason"]
    deep = write_tiny(tmp_path / "deep", num_hidden_layers=3)
    assert "3 layers cannot be held against 2" in compare(capsys, tmp_path / "other", deep)[1]["reason"]


def test_a_refused_file_is_not_compared(capsys: pytest.CaptureFixture[str], refused: Path) -> None:
    """The gate stands before the command, for both sides."""
    for sides in (("pygmy", refused), (refused, "pygmy")):
        assert main(["rosetta", "compare-inference", *map(str, sides)]) == 5
    assert "is refused by the contract" in capsys.readouterr().err


def test_an_opinion_is_asked_for_by_name(oracle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown peer is usage, before anything is measured; a peer that cannot read the file is a load error."""
    assert main(["parity", "pygmy", "--opinion", "ollama"]) == 2
    assert "transformers, llama.cpp" in capsys.readouterr().err
    assert main(["parity", str(oracle / "mini" / "gguf" / "F16.gguf"), "--opinion", "transformers"]) == 6
    assert "reads SafeTensors" in capsys.readouterr().err

"""The commands bench and profile: what they print, and that verdict and exit code agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr_core.bench import acts
from apr_core.bench.claimed import WRONG_TOKENS
from apr_core.cli.app import main
from apr_core.cli.bench import CLAIMS
from apr_core.engines import cpu_weights, load
from apr_core.falsify.evidence import read_evidence
from apr_core.model.qwen2 import Qwen2
from apr_core.model.trace import TracedForward

SHORT = ("--prefill", "8", "--decode", "4", "--repeats", "2", "--threads", "1")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    """Run a command with --json."""
    code = main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_bench_measures_and_compares_its_tokens(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """No threshold unless one is asked for; everything is kept where asked."""
    out = tmp_path / "kept" / "run"
    code, body = run(capsys, "bench", "pygmy", *SHORT, "--context", "16", "--out", out)
    assert (code, body["verdict"]) == (0, "CORROBORATED")
    assert body["tokens"] == {"compared": 4, "wrong": 0}
    (timed,) = body["runs"]
    assert timed["candidate"]["backend"].startswith("cpu speed")
    assert list(timed["candidate"]["tok_s_at_context"]) == ["16"]
    assert json.loads((out / "bench.json").read_text()) == body
    kept = {e.id: e.verdict for e in map(read_evidence, (out / "evidence").glob("*.json"))}
    assert sorted(kept) == sorted(CLAIMS)
    assert {str(verdict) for claim, verdict in kept.items() if claim != "F-THR-011"} == {"CORROBORATED"}
    assert str(kept["F-THR-011"]) == "NOT_RUN"
    assert main(["bench", "pygmy", *SHORT, "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_bench_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """With the share of the ceiling, and the reason of a refuted claim: the ceiling first."""
    assert main(["bench", "pygmy", *SHORT, "--precision", "exact", "--claim", "decode_tok_s=1e12"]) == 5
    said = capsys.readouterr().out
    assert "of ceiling" in said
    assert "1e+12 tok/s needs" in said
    assert "this machine reads" in said
    assert "Which operation takes most?" in said


@pytest.mark.parametrize(
    ("option", "value", "code"),
    [
        ("--assert-throughput", "0.001", 0),
        ("--assert-throughput", "1e12", 5),
        ("--assert-p99", "1e9", 0),
        ("--assert-p99", "1e-6", 5),
    ],
)
def test_assertions_are_literal(option: str, value: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 5 exactly when the number is missed."""
    found, body = run(capsys, "bench", "pygmy", *SHORT, option, value)
    assert (found, body["asserted"][0]["holds"]) == (code, code == 0)


def test_a_constant_token_voids_the_rate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens are refuted and the rate is undecided, not fast: an assertion of speed does not hold."""

    class Constant(Qwen2):
        backend = "constant"

        def forward(self, ids: Any, cache: Any = None, trace: Any = None) -> np.ndarray:
            logits = np.zeros((len(ids), self.config.vocab_size), np.float32)
            logits[:, 7] = 1
            if cache is not None:
                cache.advance(len(ids))
            return logits

    def make(validated: Any, device: str, tokenizer: Any) -> TracedForward:
        return Constant(validated)

    monkeypatch.setitem(load.ENGINES, ("exact", "cpu"), make)
    arguments = ("bench", "pygmy", *SHORT, "--precision", "exact", "--assert-throughput", "0.001")
    code, body = run(capsys, *arguments, "--claim", "decode_tok_s=0.001")
    assert (code, body["verdict"]) == (5, "FALSIFIED")
    assert body["tokens"]["wrong"] >= 3
    assert "F-THR-003" in {line.partition(",")[0] for line in body["refuted"]}
    assert [line.partition(":")[2] for line in body["undecided"]] == [f" {WRONG_TOKENS}"] * 2


def test_an_absent_peer_is_a_row_and_leaves_the_question_open(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rates are printed all the same; what was asked and could not be answered is exit 11."""
    monkeypatch.setenv("APR_LLAMA_BENCH", "/nowhere/llama-bench")
    assert main(["bench", "pygmy", *SHORT, "--peer", "llama.cpp"]) == 11
    said = capsys.readouterr().out
    assert "llama.cpp: NOT_RUN, peer absent: no native llama-bench" in said
    assert "cpu speed" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--threads", "4096"), "cores of this process"),
        (("--threads", "two"), "whole numbers"),
        (("--prefill", "0"), "an empty one"),
        (("--prefill", "5000"), "at most 4096 positions"),
        (("--context", "9000"), "at most 4096 positions"),
        (("--claim", "speed=1"), "expected --claim"),
        (("--precision", "fast"), "expected a precision"),
        (("--peer", "vllm"), "expected a peer"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    arguments: tuple[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2, with what would be legal."""
    assert main(["bench", "pygmy", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("free", [1, 100_000_000])
def test_a_model_beyond_the_memory_is_refused(
    free: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 6 before any work: the engine's panels, or the reference that has to judge its tokens, would not fit."""
    monkeypatch.setattr(cpu_weights, "available_memory", lambda: free)
    monkeypatch.setattr(cpu_weights, "_RESERVE", 0)
    monkeypatch.setattr(acts, "time_engine", lambda *a, **k: pytest.fail("work began"))
    monkeypatch.setattr(acts, "count_elements", lambda subject: 10**9)
    assert main(["bench", "pygmy", *SHORT]) == 6
    said = capsys.readouterr().err
    assert "of free memory for" in said
    assert ("judge" in said) is (free > 1)


def test_profile_shows_where_the_time_goes(capsys: pytest.CaptureFixture[str]) -> None:
    """By operation and by type."""
    code, body = run(capsys, "profile", "pygmy", "--prefill", "8", "--decode", "2")
    assert code == 0
    assert {"attention", "head", "waiting"} <= {row["phase"] for row in body["phases"]}
    assert main(["profile", "pygmy", "--prefill", "8", "--decode", "2", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "BF16" in said
    assert "widened to F32: nothing" in said

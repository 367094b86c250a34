"""The adapter of llama.cpp: its distributions, its greedy tokens and its refusals, against the oracle's file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apr_core.errors import InferenceError, LoadError, Unavailable
from apr_core.peers import llama_cpp
from apr_core.peers.llama_cpp import LlamaCpp

pytest.importorskip("xllamacpp", reason="NOT_RUN: no xllamacpp")
POSITIONS = 24


@pytest.mark.oracle
def test_distributions_are_those_of_the_oracle(oracle: Path) -> None:
    """The same file, ids and implementation: Q8_0 logits of the oracle, as log-softmax, to float32 rounding."""
    ids = np.load(oracle / "mini" / "transformers_f64.npz")["ids"][:POSITIONS]
    logits = np.load(oracle / "mini" / "llama_cpp.npz")["Q8_0_logits"][:POSITIONS].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    with LlamaCpp(oracle / "mini" / "gguf" / "Q8_0.gguf") as peer:
        found = peer.log_probabilities(ids)
        assert peer.vocab_size == 1024
        assert "xllamacpp" in peer.build
    assert np.abs(found - expected).max() < 1e-4
    assert np.allclose(np.exp(found.astype(np.float64)).sum(axis=1), 1.0)


@pytest.mark.oracle
def test_greedy_tokens_are_those_of_the_oracle_and_stop_at_an_end(oracle: Path) -> None:
    """Greedy by distribution repeats the oracle's tokens; an end token is kept and ends it."""
    prompt = np.load(oracle / "mini" / "transformers_f64.npz")["prompt"].tolist()
    expected = tuple(np.load(oracle / "mini" / "llama_cpp.npz")["Q8_0_greedy"][:12].tolist())
    with LlamaCpp(oracle / "mini" / "gguf" / "Q8_0.gguf") as peer:
        assert peer.greedy(prompt, 12) == expected
        assert peer.greedy(prompt, 12, ends=[expected[3]]) == expected[: expected.index(expected[3]) + 1]


@pytest.mark.oracle
def test_a_completion_counts_its_tokens_and_time(oracle: Path) -> None:
    """llama.cpp's own loop gives as many tokens as asked when ends are ignored, with its own clock."""
    prompt = np.load(oracle / "mini" / "transformers_f64.npz")["prompt"].tolist()
    with LlamaCpp(oracle / "mini" / "gguf" / "F16.gguf") as peer:
        said = peer.complete(prompt, 9, past_end=True)
        assert (said.tokens, said.ended, said.prompt_tokens) == (9, False, len(prompt))
        assert said.decode_s > 0
        assert said.prompt_s > 0


@pytest.mark.oracle
def test_too_long_a_prompt_and_a_closed_peer_are_errors(oracle: Path) -> None:
    """An error of llama.cpp is raised with its words, never read as an empty distribution."""
    peer = LlamaCpp(oracle / "mini" / "gguf" / "F16.gguf", context=256)
    with pytest.raises(InferenceError, match="context"):
        peer.complete([5] * 600, 1)
    peer.close()
    with pytest.raises(InferenceError, match="closed"):
        peer.greedy([1], 1)


def test_what_llama_cpp_refuses_is_a_load_error(pygmy: Path, tmp_path: Path) -> None:
    """Not a GGUF, and a GGUF without what llama.cpp needs."""
    with pytest.raises(LoadError, match="needs a GGUF"):
        LlamaCpp(pygmy)
    from apr_core.dtypes import FORMATS
    from apr_core.formats.checkpoint import TensorSource
    from apr_core.formats.gguf import write_gguf

    path = tmp_path / "bare.gguf"
    source = TensorSource("model.embed_tokens.weight", FORMATS["F32"], (4, 32), lambda: [bytes(4 * 32 * 4)])
    write_gguf(path, [source], {"general.architecture": "qwen2"})
    with pytest.raises(LoadError, match="refuses"):
        LlamaCpp(path)


def test_an_absent_package_is_said(monkeypatch: pytest.MonkeyPatch, pygmy: Path) -> None:
    """Without the bindings there is a typed error with what to install."""
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    with pytest.raises(Unavailable, match="not installed"):
        LlamaCpp(pygmy)

"""Peers as a measure of speed: who is there, who is fair, and what their numbers mean."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from apr_core.errors import InferenceError, Unavailable, UsageError
from apr_core.peers import llama_cpp, rates
from apr_core.peers.rates import BindingsLlama, EagerTransformers, NativeLlama, Ollama, fairness, open_peer

_BUILD = {"build_commit": "abc", "build_number": 7, "n_threads": 2}
ROWS = [
    {"n_prompt": 4, "n_gen": 0, "n_depth": 0, "avg_ts": 400.0, **_BUILD},
    {"n_prompt": 0, "n_gen": 3, "n_depth": 0, "avg_ts": 33.0, **_BUILD},
    {"n_prompt": 0, "n_gen": 3, "n_depth": 4, "avg_ts": 30.0, **_BUILD},
]


def _binary(folder: Path, said: str) -> Path:
    """A llama-bench that says what it is told to."""
    (folder / "said.json").write_text(said)
    path = folder / "llama-bench"
    path.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\ncat {folder}/said.json\n')
    path.chmod(0o755)
    return path


def test_a_native_llama_bench_is_asked_for_one_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own JSON, by the test's size; tokens behind a prompt like the candidate's, which an empty cache outruns."""
    monkeypatch.setenv(rates.BENCH_VARIABLE, str(_binary(tmp_path, json.dumps(ROWS))))
    peer = open_peer("llama.cpp", tmp_path / "m.gguf", 1)
    done = peer.round(2, [1, 2, 3, 4], 3)
    assert (done.prefill_tok_s, done.decode_tok_s, done.prompt) == (400.0, 30.0, "random")
    assert peer.build == "llama.cpp abc (7), 2 threads"
    assert (tmp_path / "asked").read_text().splitlines() == [
        f"-m {tmp_path}/m.gguf -t 2 {sizes} -r 1 -o json" for sizes in ("-p 4 -n 0 -d 0", "-p 0 -n 3 -d 4")
    ]
    with pytest.raises(InferenceError, match="no result"):
        peer.round(2, [1, 2], 3)


@pytest.mark.parametrize("said", ["", "[]", "{}", "[{}]"])
def test_a_llama_bench_that_fails_is_an_error(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a rate of zero."""
    monkeypatch.setenv(rates.BENCH_VARIABLE, str(_binary(tmp_path, said)))
    with pytest.raises(InferenceError, match="no result"):
        NativeLlama(tmp_path).round(1, [1, 2, 3, 4], 3)


def test_absent_peers_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Probed, each with what would bring it."""
    monkeypatch.setenv(rates.BENCH_VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(Unavailable, match="peer absent: no native llama-bench"):
        open_peer("llama.cpp", tmp_path, 1)
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    with pytest.raises(Unavailable, match="xllamacpp is not installed"):
        open_peer("xllamacpp", tmp_path, 1)
    with pytest.raises(Unavailable, match="peer absent: no Ollama"):
        Ollama("x", 1, "http://127.0.0.1:9")
    for name in ("vllm", "ollama", ""):
        with pytest.raises(UsageError, match=r"expected a peer of llama\.cpp, xllamacpp, transformers or ollama:NAME"):
            open_peer(name, tmp_path, 1)


def test_fair_is_who_uses_the_vectors_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX2 alone is fair where there is no more."""
    monkeypatch.setattr(rates, "instructions", lambda: frozenset({"avx512f", "avx512vnni"}))
    assert fairness("CPU : AVX2 = 1 | AVX512 = 1 | AVX512_VNNI = 1")
    assert not fairness("CPU : AVX2 = 1 | F16C = 1")
    assert not fairness("")
    monkeypatch.setattr(rates, "instructions", lambda: frozenset({"avx2"}))
    assert fairness("CPU : AVX2 = 1")


def test_the_bindings_wheel_on_its_own_clock(oracle: Path) -> None:
    """A real prompt; its features are read from its own log."""
    if not llama_cpp.is_installed():
        pytest.skip("NOT_RUN: xllamacpp is not installed")
    peer = BindingsLlama(oracle / "mini" / "gguf" / "Q6_K.gguf")
    done = peer.round(1, list(range(1, 9)), 4)
    assert done.prefill_tok_s > 0
    assert done.decode_tok_s > 0
    assert "AVX2" in peer.features
    assert peer.fair is fairness(peer.features)


@pytest.mark.parametrize("name", [".", "model.safetensors"])
def test_transformers_eager(name: str, pygmy: Path, tmp_path: Path) -> None:
    """From a folder or the file in it, as a subject names it; a GGUF is not its format, whatever lies beside it."""
    pytest.importorskip("transformers")
    peer = EagerTransformers(pygmy / name)
    done = peer.round(1, [5, 6, 7], 3)
    assert done.prefill_tok_s > 0
    assert done.decode_tok_s > 0
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Unavailable, match="needs a folder"):
        EagerTransformers(tmp_path / "m.gguf")


ANSWERS = {
    "/api/version": {"version": "0.9"},
    "/api/show": {"model_info": {"general.parameter_count": 500_000_000}},
    "/api/generate": {
        "prompt_eval_count": 6,
        "prompt_eval_duration": 20_000_000,
        "eval_count": 3,
        "eval_duration": 100_000_000,
    },
}


@pytest.fixture
def ollama() -> Iterator[str]:
    """A server on this machine that answers as Ollama does."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(ANSWERS[self.path])

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if asked["model"] != "right":
                self.send_error(404)
                return
            self._say(ANSWERS[self.path])

        def _say(self, body: object) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_ollama_by_its_own_durations(ollama: str) -> None:
    """``eval_duration`` covers the generated tokens, ``prompt_eval_duration`` the prompt, in nanoseconds."""
    peer = Ollama("right", 494_000_000, ollama)
    done = peer.round(1, [1] * 6, 3)
    assert (done.prefill_tok_s, done.decode_tok_s) == (pytest.approx(300.0), pytest.approx(30.0))
    assert peer.build == "Ollama 0.9, right"


def test_another_size_of_the_model_is_refused(ollama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round 48 compared a 0.5B with a 1.5B."""
    with pytest.raises(UsageError, match=r"expected a model of 1\.54 billion parameters, found 0\.50"):
        Ollama("right", 1_540_000_000, ollama)
    with pytest.raises(UsageError, match="does not serve 'wrong'"):
        Ollama("wrong", 494_000_000, ollama)
    monkeypatch.setitem(ANSWERS, "/api/generate", {"eval_count": 0})
    with pytest.raises(InferenceError, match="no durations"):
        Ollama("right", 494_000_000, ollama).round(1, [1], 2)

"""
Foreign runtimes as a measure of speed: each adapter times one round, so that rounds can be interleaved with ours.

A peer is fair when it was built for this processor: a llama.cpp without AVX-512 on a machine that has it is shown, and
never judged.

Source: llama.cpp ``tools/llama-bench`` (``-o json``) and ``llama_print_system_info``; Ollama's HTTP API, whose
``eval_duration`` covers the generated tokens and ``prompt_eval_duration`` the prompt, in nanoseconds.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from apr_core.errors import InferenceError, Unavailable, UsageError
from apr_core.kernels.cpu.features import instructions
from apr_core.peers import llama_cpp

BENCH_VARIABLE = "APR_LLAMA_BENCH"
"""Environment variable that names a native llama-bench; else it is looked for on the search path."""
PEERS = ("llama.cpp", "xllamacpp", "transformers", "ollama")
OLLAMA = "http://127.0.0.1:11434"
_WIDE = ("avx512f", "avx512vnni")
_SAME_SIZE = 0.1


@dataclass(frozen=True)
class Rates:
    """
    One timed round of a peer.

    Attributes:
        prefill_tok_s: Prompt tokens per second.
        decode_tok_s: Tokens per second behind the prompt.
        prompt: ``random`` tokens, or the ``real`` prompt of the candidate.
    """

    prefill_tok_s: float
    decode_tok_s: float
    prompt: str


class RatedPeer(Protocol):
    """A runtime that can be timed."""

    name: str
    build: str
    features: str
    fair: bool

    def round(self, threads: int, prompt: list[int], tokens: int) -> Rates:
        """Time one prompt and so many tokens behind it."""
        ...


def fairness(features: str) -> bool:
    """Say whether a build uses the vectors that this processor has, by llama.cpp's own list of features."""
    wide = all(name in instructions() for name in _WIDE)
    return not wide or "AVX512 = 1" in features or "AVX512_VNNI = 1" in features


class NativeLlama:
    """
    A llama-bench that was built on this machine; random prompts, as it draws them.

    Raises:
        Unavailable: There is none.
    """

    name = "llama.cpp"

    def __init__(self, model: Path) -> None:
        found = os.environ.get(BENCH_VARIABLE) or shutil.which("llama-bench")
        if not found or not Path(found).is_file():
            raise Unavailable("peer absent: no native llama-bench", advice=f"build one and set {BENCH_VARIABLE}")
        self._binary, self._model = Path(found), model
        self.features = _system_info(self._binary.parent)
        self.fair = fairness(self.features)
        self.build = "llama.cpp, native"

    def round(self, threads: int, prompt: list[int], tokens: int) -> Rates:
        """
        Run llama-bench twice: the prompt, and the tokens behind a prompt of that length, as the candidate makes them.

        Raises:
            InferenceError: It fails, or reports another test than was asked for.
        """
        read = self._run(threads, n_prompt=len(prompt), n_gen=0, n_depth=0)
        made = self._run(threads, n_prompt=0, n_gen=tokens, n_depth=len(prompt))
        self.build = f"llama.cpp {read['build_commit']} ({read['build_number']}), {read['n_threads']} threads"
        return Rates(float(read["avg_ts"]), float(made["avg_ts"]), "random")

    def _run(self, threads: int, **sizes: int) -> dict[str, Any]:
        asked = zip(("-p", "-n", "-d"), sizes.values(), strict=True)
        command = [self._binary, "-m", self._model, "-t", threads, *(word for pair in asked for word in pair)]
        done = subprocess.run(
            [*map(str, command), "-r", "1", "-o", "json"], capture_output=True, text=True, timeout=600, check=False
        )
        try:
            return next(row for row in json.loads(done.stdout) if all(row[k] == n for k, n in sizes.items()))
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise InferenceError(f"llama-bench gave no result: {done.stderr.strip()[-200:]}") from error


class BindingsLlama:
    """The llama.cpp inside the xllamacpp wheel, on the candidate's own prompt."""

    name = "xllamacpp"

    def __init__(self, model: Path) -> None:
        if not llama_cpp.is_installed():
            raise Unavailable("peer absent: xllamacpp is not installed", advice="pip install 'apr_core[peers]'")
        self._model = model
        self.build = self.features = ""
        self.fair = False

    def round(self, threads: int, prompt: list[int], tokens: int) -> Rates:
        """Open the file, complete once, and take the library's own clock."""
        with llama_cpp.LlamaCpp(self._model, context=len(prompt) + tokens + 8, threads=threads) as peer:
            self.build, _, self.features = peer.build.partition("; ")
            self.fair = fairness(self.features)
            done = peer.complete(prompt, tokens, past_end=True)
        return Rates(done.prompt_tokens / done.prompt_s, (done.tokens - 1) / done.decode_s, "real")


class EagerTransformers:
    """Hugging Face transformers on the CPU in float32, eager attention; SafeTensors in their folder alone."""

    name = "transformers"
    fair = True
    features = "torch eager, float32"

    def __init__(self, model: Path) -> None:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise Unavailable("peer absent: transformers is not installed") from error
        folder = model if model.is_dir() else model.parent
        stored = model.is_dir() or ".safetensors" in model.suffixes  # also the index of shards
        if not (stored and (folder / "config.json").is_file()):
            raise Unavailable("peer absent: transformers needs a folder of SafeTensors", advice="convert the model")
        self.build = f"transformers {transformers.__version__}, torch {torch.__version__}"
        kind: Any = transformers.AutoModelForCausalLM
        self._model = kind.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        ).eval()

    def round(self, threads: int, prompt: list[int], tokens: int) -> Rates:
        """One prompt and a greedy decode through its cache."""
        import time

        import torch

        torch.set_num_threads(threads)
        with torch.inference_mode():
            start = time.perf_counter()
            out = self._model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            read = time.perf_counter()
            for _ in range(tokens - 1):
                out = self._model(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            end = time.perf_counter()
        return Rates(len(prompt) / (read - start), (tokens - 1) / (end - read), "real")


class Ollama:
    """
    A model that an Ollama on this machine serves.

    Args:
        served: Its name there.
        elements: Parameters of the candidate: another size of the model is refused.
        address: Of the server.

    Raises:
        Unavailable: None answers.
        UsageError: It serves no such model, or another size.
    """

    name = "ollama"
    fair = True
    features = "as Ollama chose"

    def __init__(self, served: str, elements: int, address: str = OLLAMA) -> None:
        self._served, self._address = served, address
        try:
            version = self._ask("/api/version")
        except (OSError, ValueError) as error:
            raise Unavailable(f"peer absent: no Ollama answers at {address}") from error
        self.build = f"Ollama {version.get('version')}, {served}"
        try:
            told = self._ask("/api/show", {"model": served})
        except urllib.error.HTTPError as error:
            raise UsageError(f"Ollama does not serve {served!r}", advice="ollama pull it, or name another") from error
        count = int((told.get("model_info") or {}).get("general.parameter_count") or 0)
        if abs(count - elements) > _SAME_SIZE * elements:
            raise UsageError(
                f"expected a model of {elements / 1e9:.2f} billion parameters, found {count / 1e9:.2f} in {served!r}",
                advice="name the same size of the model, as ollama:NAME",
            )

    def round(self, threads: int, prompt: list[int], tokens: int) -> Rates:
        """
        Generate once from a prompt of about as many tokens; the rates are of those that Ollama says it computed.

        Raises:
            InferenceError: It counts nothing.
        """
        words = " ".join(str(i % 10) for i in range(len(prompt)))
        options = {"temperature": 0, "num_predict": tokens, "num_thread": threads, "seed": threads}
        body = {"model": self._served, "prompt": words, "raw": True, "stream": False, "options": options}
        told = self._ask("/api/generate", body)
        read, made = told.get("prompt_eval_duration"), told.get("eval_duration")
        if not read or not made:
            raise InferenceError("Ollama reports no durations")
        return Rates(1e9 * told["prompt_eval_count"] / read, 1e9 * told["eval_count"] / made, "real")

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600 if body else 2) as answer:
            told: dict[str, Any] = json.load(answer)
        return told


def peer_kind(name: str) -> tuple[str, str]:
    """
    Split the name of a peer into its kind and the model that it serves, e.g. ``ollama:qwen2.5``.

    Raises:
        UsageError: There is no such peer.
    """
    kind, _, served = name.partition(":")
    if kind not in PEERS or bool(served) is not (kind == "ollama"):
        raise UsageError(f"expected a peer of {', '.join(PEERS[:3])} or ollama:NAME, found {name!r}")
    return kind, served


def open_peer(name: str, model: Path, elements: int) -> RatedPeer:
    """
    Open a peer by its name; ``ollama:NAME`` says which model.

    Raises:
        UsageError: There is no such peer.
        Unavailable: It is not here.
    """
    kind, served = peer_kind(name)
    if kind == "ollama":
        return Ollama(served, elements)
    if kind == "llama.cpp":
        return NativeLlama(model)
    return BindingsLlama(model) if kind == "xllamacpp" else EagerTransformers(model)


def _system_info(folder: Path) -> str:
    """Ask the llama.cpp library beside a binary for its features, in a process of its own; empty when it is silent."""
    for library in (folder / "libllama.so", folder.parent / "lib" / "libllama.so"):
        if library.is_file():
            script = (
                "import ctypes, sys; lib = ctypes.CDLL(sys.argv[1]); f = lib.llama_print_system_info; "
                "f.restype = ctypes.c_char_p; print(f().decode())"
            )
            command = [sys.executable, "-c", script, str(library)]
            return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.strip()
    return ""


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over rounds of candidate over peer: both sides of a round met the same machine."""
    return float(np.median(np.array(ours) / np.array(theirs)))

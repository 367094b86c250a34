"""
llama.cpp, through the bindings of the xllamacpp package: another implementation's whole distribution over a GGUF file.

It quantises activations to 8 bits on the fly, so it is a second opinion on the same weights, not the truth: how far it
is from float64 on a type is measured (``shared/oracle/mini``), never assumed.

Source: xllamacpp ``Server.handle_completions`` (the completion request of llama.cpp's server, without its HTTP);
llama.cpp ``tools/server/README.md`` for the fields of a request.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from apr_core.errors import InferenceError, LoadError, Unavailable
from apr_core.formats.checkpoint import Checkpoint, open_checkpoint

# The server leaves the probabilities out when the token it sampled has no text of its own (an end token, half a
# character), so every request for them forces a digit; they are those of the logits before the bias.
_FORCED = [["0", 1e4]]


def is_installed() -> bool:
    """Probe for the bindings without loading their 100 MB."""
    return importlib.util.find_spec("xllamacpp") is not None


@dataclass(frozen=True)
class Completion:
    """
    One request of several tokens, run inside llama.cpp.

    Attributes:
        text: What it generated, an end token excluded.
        ended: Whether an end token stopped it.
        prompt_tokens: Tokens of the prompt that were computed now; the rest came from the cache.
        prompt_s: Seconds for them, as llama.cpp measured.
        tokens: Tokens generated.
        decode_s: Seconds for those behind the first, as llama.cpp measured.
    """

    text: str
    ended: bool
    prompt_tokens: int
    prompt_s: float
    tokens: int
    decode_s: float


class LlamaCpp:
    """
    A GGUF file opened by llama.cpp on the CPU. A context manager.

    Attributes:
        path: The file.
        build: Version of the bindings and what the processor part was compiled for.
        vocab_size: Rows of the head.

    Raises:
        Unavailable: xllamacpp is not installed.
        LoadError: llama.cpp refuses the file.
    """

    def __init__(self, path: str | Path, *, context: int = 512, threads: int = 1) -> None:
        if not is_installed():
            raise Unavailable("llama.cpp is not installed", advice="pip install 'apr_core[peers]'")
        import xllamacpp

        from apr_core.provenance import version_of

        with open_checkpoint(path) as file:
            self.path, self.vocab_size = file.path, _rows(file)
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(self.path)
        parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = context, 1, 0
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        parameters.warmup, parameters.verbosity, parameters.fit_params = False, -1, False
        parameters.cache_ram_mib = 0
        # Its fused attention rounds to float16; without it, the logits equal those of the oracle to 4e-7.
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server: Any = xllamacpp.Server(parameters)
        except (RuntimeError, ValueError) as error:
            raise LoadError(
                f"llama.cpp refuses {self.path}: {error}", advice="look at it with `apr inspect`"
            ) from error
        self.build = f"xllamacpp {version_of('xllamacpp')}; {xllamacpp.get_system_info().strip(' |')}"

    def log_probabilities(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """
        Feed tokens one by one and read the whole distribution after each.

        Args:
            ids: [n] token ids.

        Returns:
            float32 [n, vocabulary]: log-softmax of the logits; row ``i`` is what follows ``ids[:i + 1]``.

        Raises:
            InferenceError: llama.cpp answers with an error, or leaves tokens out.

        Cost: one request a token, each with the vocabulary as JSON: 10 ms for 1,024 tokens, a second for 151,936.
        """
        given = [int(i) for i in ids]
        out = np.full((len(given), self.vocab_size), np.nan, dtype=np.float32)
        for row in range(len(given)):
            for entry in self._next(given[: row + 1], self.vocab_size):
                out[row, entry["id"]] = entry["logprob"]
        if np.isnan(out).any():
            raise InferenceError(f"llama.cpp named {int(np.isnan(out).sum())} tokens no probability for {self.path}")
        return out

    def greedy(self, ids: Sequence[int], max_new_tokens: int, ends: Sequence[int] = ()) -> tuple[int, ...]:
        """
        Continue with the likeliest token each time, decided from its distribution.

        Args:
            ids: The prompt.
            max_new_tokens: Tokens to generate at most.
            ends: Tokens that end it; the one that does is the last of the result.
        """
        known = [int(i) for i in ids]
        made: list[int] = []
        while len(made) < max_new_tokens and not (made and made[-1] in ends):
            made.append(int(self._next(known + made, 1)[0]["id"]))
        return tuple(made)

    def complete(self, ids: Sequence[int], max_new_tokens: int, *, past_end: bool = False) -> Completion:
        """
        Let llama.cpp generate greedily by itself: its own loop, its own end tokens, its own detokenizer, its own clock.

        Args:
            ids: The prompt.
            max_new_tokens: Tokens to generate at most.
            past_end: Go on behind end tokens, as a measurement of speed does.
        """
        request = {"prompt": [int(i) for i in ids], "max_tokens": max_new_tokens, "ignore_eos": past_end}
        answer = self._ask({**request, "temperature": 0.0, "cache_prompt": False})
        choice, timings = answer["choices"][0], answer["timings"]
        return Completion(
            choice["text"],
            choice["finish_reason"] == "stop",
            timings["prompt_n"],
            timings["prompt_ms"] / 1e3,
            timings["predicted_n"],
            timings["predicted_ms"] / 1e3,
        )

    def close(self) -> None:
        """Stop its thread and let go of the file."""
        self._server = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _next(self, ids: list[int], count: int) -> list[Mapping[str, Any]]:
        """Ask for the ``count`` likeliest next tokens, likeliest first."""
        request = {"prompt": ids, "max_tokens": 1, "logprobs": count, "temperature": 0.0, "cache_prompt": True}
        choice = self._ask({**request, "logit_bias": _FORCED})["choices"][0]
        if not choice["logprobs"]:
            raise InferenceError(f"llama.cpp gives no probabilities for {self.path}: its vocabulary has no token '0'")
        entries: list[Mapping[str, Any]] = choice["logprobs"]["content"][0]["top_logprobs"]
        return entries

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self._server is None:
            raise InferenceError(f"{self.path} is closed", advice="open it again")
        answer: dict[str, Any] = self._server.handle_completions(dict(request))
        if "choices" not in answer:
            said = answer.get("message") or answer.get("error") or answer
            raise InferenceError(f"llama.cpp answers for {self.path}: {said!s:.300}", advice="give it a larger context")
        return answer


def _rows(file: Checkpoint) -> int:
    """Rows of the head, which is the embedding when it is tied."""
    info = file.tensors.get("lm_head.weight") or file.tensors.get("model.embed_tokens.weight")
    if file.format != "gguf" or info is None:
        raise LoadError(f"llama.cpp needs a GGUF with an embedding, {file.path} is none", advice="convert it first")
    return info.shape[0]

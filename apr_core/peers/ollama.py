"""The rate of a model in Ollama, over its HTTP interface on this machine; nothing is started or downloaded."""

from __future__ import annotations

import json
import os
import urllib.request
from typing import Any

from apr_core.errors import Unavailable

_PROBE_S, _ANSWER_S = 1.0, 600.0


def address() -> str:
    """Return where Ollama listens: ``$OLLAMA_HOST``, or its own default."""
    host = os.environ.get("OLLAMA_HOST", "") or "localhost:11434"
    return host.rstrip("/") if "://" in host else f"http://{host}"


def models() -> list[str]:
    """
    List the models that Ollama has.

    Raises:
        Unavailable: It does not answer, or answers with something else.
    """
    try:
        return [str(model["name"]) for model in _ask("/api/tags", None, _PROBE_S)["models"]]
    except (KeyError, TypeError) as error:
        raise Unavailable(f"what answers at {address()} is not Ollama") from error


def decode_tok_s(tag: str, prompt: str, tokens: int, repeats: int) -> float:
    """
    Return the tokens per second that Ollama reports for greedy answers, prompt left out.

    Raises:
        Unavailable: It does not answer, has no such model, or generated nothing.
    """
    options = {"num_predict": tokens, "temperature": 0}
    body = {"model": tag, "prompt": prompt, "stream": False, "options": options}
    count = seconds = 0.0
    for _ in range(repeats):
        said = _ask("/api/generate", body, _ANSWER_S)
        count += float(said.get("eval_count") or 0)
        seconds += float(said.get("eval_duration") or 0) / 1e9
    if not (count > 0 and seconds > 0):
        raise Unavailable(f"Ollama generated nothing with {tag}")
    return count / seconds


def _ask(path: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address() + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        raise Unavailable(f"Ollama does not answer at {address()} ({why})", advice="start it") from error

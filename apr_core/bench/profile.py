"""Where the time of a prompt and of a token goes, and what explains a rate below the ceiling."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from apr_core.bench.roofline import StreamBandwidth
from apr_core.bench.throughput import Plan, use_threads
from apr_core.contract.admit import Admission
from apr_core.kernels.cpu.panels import LAYOUTS
from apr_core.model.trace import TracedForward, last_logits

_PASSES = 3


def profile_model(
    model: TracedForward, admission: Admission, plan: Plan, *, threads: int, seed: int = 0
) -> dict[str, Any]:
    """
    Split the time of one thread by operation, for a prompt and for each token behind it.

    Args:
        model: The candidate; one that keeps no clocks has its whole time under one name.
        admission: Its file.
        plan: Tokens of the prompt and behind it.
        threads: How many share the work.
        seed: Of the prompt.
    """
    told = use_threads(model, threads)
    prompt = np.random.default_rng(seed).integers(0, model.config.vocab_size, plan.prefill)
    last_logits(model, prompt)  # warm
    by_phase = getattr(model, "seconds_by_phase", dict)
    by_phase()
    cache = model.new_cache()
    last_logits(model, prompt, cache)
    read: dict[str, float] = by_phase()
    for i in range(plan.decode):
        model.forward(prompt[i % plan.prefill : i % plan.prefill + 1], cache)
    made: dict[str, float] = by_phase()
    weights = getattr(model, "weights", None)
    kinds: dict[str, str] = weights.types if weights is not None else {}
    types = Counter(kinds.values())
    tensors = admission.checkpoint.tensors
    nbytes = {
        kind: sum(_panel_bytes(kind, tensors[name].shape) for name, other in kinds.items() if other == kind)
        for kind in types
    }
    elements = sum(int(np.prod(t.shape, dtype=np.int64)) for t in tensors.values())
    read_bytes = int(getattr(model, "bytes_per_token", 4 * elements))
    ceiling = StreamBandwidth(read_bytes, threads)
    for _ in range(_PASSES):
        ceiling.sample()
    per_token = sum(made.values()) / plan.decode
    return {
        "model": str(admission.checkpoint.path),
        "backend": model.backend,
        "threads": told,
        "prompt": plan.prefill,
        "tokens": plan.decode,
        "phases": [
            {"phase": name, "prefill_ms": 1e3 * read[name], "decode_ms_per_token": 1e3 * made[name] / plan.decode}
            for name in made
        ],
        "types": [{"type": kind, "matrices": types[kind], "bytes_per_token": nbytes[kind]} for kind in types],
        "fallbacks": list(weights.fallbacks) if weights is not None else [],
        "gb_s": read_bytes / per_token / 1e9 if per_token else float("nan"),
        "ceiling_gb_s": max(ceiling.samples),
    }


def _panel_bytes(kind: str, shape: tuple[int, ...]) -> int:
    return LAYOUTS[kind].nbytes(shape[0], shape[1])

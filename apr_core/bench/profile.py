"""Where the time of a prompt and of a token goes, and what explains a rate below the ceiling."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from apr_core.bench.roofline import ceiling_of
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
    start = time.perf_counter_ns()
    for i in range(plan.decode):
        model.forward(prompt[i % plan.prefill : i % plan.prefill + 1], cache)
    token_s = (time.perf_counter_ns() - start) * 1e-9 / plan.decode
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
    ceiling = ceiling_of(read_bytes, threads)
    for _ in range(_PASSES):
        ceiling.sample()
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
        "token_ms": 1e3 * token_s,
        "read_bytes": read_bytes,
        "gb_s": read_bytes / token_s / 1e9,
        "ceiling_gb_s": max(ceiling.samples),
    }


def shortfall(profile: Mapping[str, Any]) -> list[tuple[str, str]]:
    """
    Explain a rate that is missed: question and answer about bandwidth, operations, threads, dispatch and types.

    Args:
        profile: As `profile_model` gives it.
    """
    token, nbytes = profile["token_ms"], profile["read_bytes"]
    phases = {row["phase"]: row["decode_ms_per_token"] for row in profile["phases"]}
    least = nbytes / profile["ceiling_gb_s"] / 1e6
    answers = [
        (
            "How much of a token is reading its weights?",
            f"{least:.3g} of {token:.3g} ms, {nbytes / 1e6:.4g} MB at {profile['ceiling_gb_s']:.3g} GB/s",
        )
    ]
    if phases:
        busy = {name: ms for name, ms in phases.items() if name != "waiting"}
        most = max(busy, key=lambda name: busy[name])
        answers += [
            ("Which operation takes most?", f"{most}: {busy[most]:.3g} of {token:.3g} ms"),
            (
                "Do the threads wait for each other?",
                f"{phases.get('waiting', 0.0):.3g} of {token:.3g} ms, with {profile['threads']} threads",
            ),
            (
                "What lies outside of the kernels (dispatch, embedding)?",
                f"{max(0.0, token - sum(phases.values())):.3g} of {token:.3g} ms",
            ),
        ]
    read = ", ".join(f"{row['type']} {row['bytes_per_token'] / 1e6:.4g} MB" for row in profile["types"]) or "float32"
    widened = len(profile["fallbacks"])
    answers.append(("Which types are read?", f"{read}; {widened} matrices widened to F32"))
    return answers


def _panel_bytes(kind: str, shape: tuple[int, ...]) -> int:
    return LAYOUTS[kind].nbytes(shape[0], shape[1])

"""
The parts of `gpu` that time the fused kernels: ceilings, each kernel, whole models, peers, streaming.

A rate counts only beside its correctness: the engine that is timed is held against the CPU reference first, in the same
record. The figures are those of the issue, for an H200 at batch 1 and context 256; on another device they are shown and
judge nothing. Without a device the parts run in Triton's interpreter, on tiny shapes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from gpu import Record, Setup

from apr_core.contract.admit import admit
from apr_core.contract.types import ValidatedModel
from apr_core.engines import gpu_weights
from apr_core.engines.gpu import GpuQwen2, captured, require_device
from apr_core.engines.streaming import USABLE
from apr_core.falsify.verdict import Verdict
from apr_core.kernels.gpu.planes import PLANES
from apr_core.model.qwen2 import Qwen2
from apr_core.model.synth import SHAPES, synthesise

# Tokens per second of decoding, precision speed.
FIGURES = {
    ("qwen2.5-coder-0.5b", "q4_k_m"): 2100, ("qwen2.5-coder-0.5b", "q8_0"): 2000, ("qwen2.5-coder-0.5b", "bf16"): 1580,
    ("qwen2.5-coder-1.5b", "q4_k_m"): 1450, ("qwen2.5-coder-1.5b", "q8_0"): 1200, ("qwen2.5-coder-1.5b", "bf16"): 800,
}  # fmt: skip
TYPES = ("q4_k_m", "q8_0", "bf16")
CONTRACT = 1e-4
SEED = 20
_GIB = 1 << 30


def seconds(setup: Setup, work: Callable[[], object], repeats: int = 10) -> float:
    """Return the median seconds of ``work`` after one run that is not counted, its device waited for."""
    taken = []
    for _ in range(repeats + 1):
        if setup.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if setup.device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return median(taken[1:])


def graphed(setup: Setup, work: Callable[[], None]) -> Callable[[], None]:
    """Return a graph of ``work``, where there is a device."""
    return captured(work) if setup.device == "cuda" else work


def read_gb_s(setup: Setup) -> float:
    """Measure how fast the device reads what its caches cannot hold."""
    size = 2 * _GIB if setup.device == "cuda" else 1 << 20
    values = torch.ones(size // 4, device=setup.device)
    return size / seconds(setup, values.sum) / 1e9


def ceilings(setup: Setup) -> Iterator[Record]:
    """Measure what no kernel can beat: reading, copying from the host, and a launch with and without dependence."""
    require_device(setup.device)
    from apr_core.kernels.gpu import launch

    cuda = setup.device == "cuda"
    size, count = (256 << 20, 100) if cuda else (1 << 16, 2)
    host = torch.ones(size, dtype=torch.uint8)
    host = host.pin_memory() if cuda else host
    there = torch.empty(size, dtype=torch.uint8, device=setup.device)
    measured = {
        "read_gb_s": read_gb_s(setup),
        "host_to_device_gb_s": size / seconds(setup, lambda: there.copy_(host, non_blocking=True)) / 1e9,
    }
    tops = torch.zeros(8, device=setup.device)
    places, state, made = (torch.zeros(n, dtype=torch.int32, device=setup.device) for n in (8, 3, 4096))
    for dependent in (False, True) if cuda and torch.cuda.get_device_capability() >= (9, 0) else (False,):
        mode = launch.Mode(1, dependent)

        def chain(mode: Any = mode) -> None:
            state.zero_()
            for _ in range(count):
                launch.pick(mode, 256, tops, places, state, made)

        key = "dependent_launch_us" if dependent else "launch_us"
        measured[key] = seconds(setup, graphed(setup, chain)) / count * 1e6
    yield Record("machine", Verdict.CORROBORATED, "", measured)


def kernels(setup: Setup) -> Iterator[Record]:
    """Hold each kernel against its reference, outputs poisoned; then time the product of each type."""
    require_device(setup.device)
    from apr_core.kernels.gpu import launch, register
    from apr_core.kernels.registry import KERNELS

    assert register.runs_here()
    rows, wrong = [], []
    for key, kernel in KERNELS.items():
        if key[2] != "cuda" or (setup.formats and key[1] not in setup.formats):
            continue
        for arguments in kernel.examples():
            found, expected = (np.asarray(f(*arguments), np.float64) for f in (kernel.run, kernel.reference))
            distance = float(np.linalg.norm(found - expected) / (np.linalg.norm(expected) or 1.0))
            rows.append({"kernel": "-".join(key), "rel_l2": distance, "limit": kernel.rel_l2})
            wrong += [] if distance <= kernel.rel_l2 else ["-".join(key)]
    verdict = Verdict.FALSIFIED if wrong else Verdict.CORROBORATED if rows else Verdict.INCONCLUSIVE
    reason = f"too far from their references: {', '.join(wrong)}" if wrong else "" if rows else "none compared"
    yield Record("correct", verdict, reason, {"compared": len(rows)}, rows)

    ceiling, device = read_gb_s(setup), torch.device(setup.device)
    shape, copies = ((1536, 8960), 12) if setup.device == "cuda" else ((32, 256), 1)  # beyond the caches together
    rows = []
    for name in setup.formats or PLANES:
        nbytes = PLANES[name].nbytes(*shape)
        weights = [
            launch.Matrix(name, *shape, torch.zeros(nbytes, dtype=torch.uint8, device=device)) for _ in range(copies)
        ]
        for digits in (1, 3):
            taken = seconds(setup, graphed(setup, products(setup, weights, digits))) / copies
            share = nbytes / taken / 1e9 / ceiling
            rows.append({"type": name, "digits": digits, "us": taken * 1e6, "share_of_read_bandwidth": share})
    yield Record("sweep", Verdict.CORROBORATED, "", {"rows": shape[0], "columns": shape[1]}, rows)


def products(setup: Setup, weights: list[Any], digits: int) -> Callable[[], None]:
    """Return what multiplies each matrix with one activation, as output and down do."""
    from apr_core.kernels.gpu import launch

    rows, columns, device = weights[0].rows, weights[0].columns, torch.device(setup.device)
    mode = launch.Mode(digits, setup.device == "cuda" and torch.cuda.get_device_capability() >= (9, 0))
    x, out = launch.activation(columns, digits, device), launch.activation(rows, digits, device)
    y, h, gain, partial = (torch.zeros(n * rows, device=device) for n in (1, 1, 1, launch.MOST_SHARES))
    norm = launch.Norm(torch.zeros(rows // 32, device=device), 1e-6)
    counters = torch.zeros(rows // 32, dtype=torch.int32, device=device)

    def sweep() -> None:
        for w in weights:
            launch.residual(mode, w, x, y, h, norm, gain, out, partial, counters)

    return sweep


def models(setup: Setup) -> Iterator[Record]:
    """Hold and time random models of published shapes, in both precisions; then the peers on the same file."""
    require_device(setup.device)
    ceiling = read_gb_s(setup)
    for shape in setup.shapes:
        for dtype in TYPES if setup.device == "cuda" else TYPES[1:2]:
            out = setup.scratch / f"{shape}-{dtype}.gguf"
            synthesise(shape, format="gguf", dtype=dtype, tokenizer=None, seed=SEED, out=out)
            admission = admit(out)
            validated = admission.require()
            ids = np.random.default_rng(SEED).integers(0, validated.geometry.vocab_size, 512)
            expected = Qwen2(validated).forward(ids[:9])
            for precision in ("speed", "exact"):
                yield held_and_timed(setup, validated, (shape, dtype, precision), ids, expected, ceiling)
            yield llama_bench(shape, dtype, out)
            if dtype == TYPES[0] and setup.device == "cuda":
                yield streaming(setup, validated, shape, ids)
            admission.checkpoint.close()
            out.unlink()
        yield transformers(setup, shape)


def held_and_timed(
    setup: Setup, validated: ValidatedModel, case: tuple[str, str, str], ids: Any, expected: Any, ceiling: float
) -> Record:
    """Compare a prompt and steps with the reference, run them twice, and time decoding and a prompt."""
    cuda, (shape, dtype, precision) = setup.device == "cuda", case
    engine = GpuQwen2(validated, precision, device=setup.device)
    runs = []
    for _ in range(2):
        cache = engine.new_cache()
        first, stop = (5, len(expected)) if cuda else (2, 3)
        parts = [engine.forward(ids[:first], cache)]
        parts += [engine.forward(ids[i : i + 1], cache) for i in range(first, stop)]
        runs.append(np.concatenate(parts))
    expected = expected[: len(runs[0])]
    distance = float(np.linalg.norm(runs[0] - expected) / np.linalg.norm(expected))
    prompt, steps = (192, 64) if cuda else (2, 1)
    engine.forward_last(ids[:prompt], cache := engine.new_cache())

    def decode() -> None:
        cache.length = prompt
        engine.greedy(cache, int(ids[0]), steps)

    rate = steps / seconds(setup, decode, 10 if cuda else 1)
    slot = cache.slot
    measured: dict[str, Any] = {
        "rel_l2": distance,
        "top1_agreement": float((runs[0].argmax(1) == expected.argmax(1)).mean()),
        "torch_equal": bool((runs[0] == runs[1]).all()),
        "decode_tok_s": rate,
        "share_of_read_bandwidth": rate * engine.bytes_per_token / 1e9 / ceiling,
        "bytes_per_token": engine.bytes_per_token,
        "plan": engine.plan.reason,
    }
    if cuda:
        measured["prefill_tok_s"] = ids.size / seconds(setup, lambda: engine.forward_last(ids))
        with torch.inference_mode():
            measured["eager_decode_tok_s"] = 1 / seconds(setup, lambda: (reset(engine, prompt), engine._decode(slot)))
            measured["us_by_kernel"] = by_kernel(lambda: (reset(engine, prompt), slot.replay()))
    figure, here = FIGURES.get((shape, dtype)), cuda and "H200" in torch.cuda.get_device_name(0)
    measured["figure_tok_s"] = figure
    faults = [] if measured["torch_equal"] else ["two runs differ"]
    if precision == "exact" and not distance <= CONTRACT:
        faults.append(f"rel_l2 {distance:.2g} against the reference, at most {CONTRACT:g}")
    if precision == "speed" and here and figure is not None and not rate >= figure:
        faults.append(f"{rate:.0f} tok/s, at least {figure}")
    verdict = Verdict.FALSIFIED if faults else Verdict.CORROBORATED
    return Record(f"{shape}-{dtype}-{precision}", verdict, "; ".join(faults), measured)


def reset(engine: GpuQwen2, held: int) -> None:
    """Put the device's state where a step at a full context begins."""
    engine._set_state(1, held, held)


def by_kernel(work: Callable[[], object]) -> dict[str, float]:
    """Return microseconds on the device by kernel, of one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    total: Counter[str] = Counter()
    for event in seen.events() or ():
        total[event.name] += event.device_time
    return dict(total.most_common(12))


def streaming(setup: Setup, validated: ValidatedModel, shape: str, ids: Any) -> Record:
    """Decode with half of the layers away, and hold the bits against the model that is all there."""
    found = gpu_weights.estimate(validated, 2)
    budget = int((found.streaming() + found.layers // 2 * found.layer) / USABLE) + 2
    whole, half = (GpuQwen2(validated, "speed", device=setup.device, budget_bytes=b) for b in (None, budget))
    same = bool((whole.forward(ids[:5]) == half.forward(ids[:5])).all())
    cache, steps = half.new_cache(), 4
    taken = seconds(setup, lambda: half.greedy(cache, 1, steps), 4) / steps
    away = found.layers - half.weights.resident
    moved = sum(blob.numel() for blob in half.weights._blobs[half.weights.resident :])
    measured = {"streamed_tok_s": 1 / taken, "layers_away": away, "moved_gb_s": moved / taken / 1e9}
    reason = "" if same else "streamed logits differ from those of the model that is all there"
    return Record(f"{shape}-streamed", Verdict.CORROBORATED if same else Verdict.FALSIFIED, reason, measured)


def llama_bench(shape: str, dtype: str, file: Path) -> Record:
    """Ask llama.cpp's own benchmark, when it is on the PATH, for the same file: all layers on the device."""
    name, tool = f"{shape}-{dtype}-llama.cpp", shutil.which("llama-bench")
    if tool is None:
        return Record(name, Verdict.NOT_RUN, "no llama-bench on the PATH")
    command = [tool, "-m", str(file), "-p", "512", "-n", "64", "-d", "192", "-ngl", "99", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        return Record(name, Verdict.INCONCLUSIVE, done.stderr[-300:])
    rows = [{k: row[k] for k in ("n_prompt", "n_gen", "avg_ts", "stddev_ts")} for row in json.loads(done.stdout)]
    return Record(name, Verdict.CORROBORATED, "", {}, rows)


def transformers(setup: Setup, shape: str) -> Record:
    """Time transformers in eager bfloat16 on the same shape, where it is installed."""
    name = f"{shape}-bf16-transformers"
    try:
        from transformers import Qwen2Config, Qwen2ForCausalLM
    except ImportError:
        return Record(name, Verdict.NOT_RUN, "transformers is not installed")
    g = SHAPES[shape].geometry
    config = Qwen2Config(
        vocab_size=g.vocab_size, hidden_size=g.hidden_size, intermediate_size=g.intermediate_size,
        num_hidden_layers=g.num_hidden_layers, num_attention_heads=g.num_attention_heads,
        num_key_value_heads=g.num_key_value_heads, tie_word_embeddings=g.tied,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(setup.device, torch.bfloat16).eval()
    prompt, steps = (192, 64) if setup.device == "cuda" else (2, 2)
    ids = torch.ones(1, prompt, dtype=torch.long, device=setup.device)

    def run(count: int) -> None:
        model.generate(
            ids, attention_mask=ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )

    with torch.inference_mode():
        taken = seconds(setup, lambda: run(1 + steps), 3) - seconds(setup, lambda: run(1), 3)
    return Record(name, Verdict.CORROBORATED, "", {"decode_tok_s": steps / taken})

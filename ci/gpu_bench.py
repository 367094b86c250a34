"""
The parts of `gpu` that time the fused kernels: ceilings, each kernel, whole models, peers, streaming.

A rate counts only beside its correctness: the engine that is timed is held against the CPU reference first, in the same
record. The figures are those of the issue, for an H200 at batch 1 and context 256; on another device they are shown and
judge nothing. Without a device the parts run in Triton's interpreter, on tiny shapes.

Time goes where a device is not needed, so that goes on beside it: files and the reference's logits are made by other
processes, and kernels are compiled by all of them before the one that launches them asks.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from gpu import Part, Record, Setup
from gpu_check import build_ahead, recording
from gpu_parity import comparisons

from apr_core.contract.admit import admit
from apr_core.contract.types import ValidatedModel
from apr_core.engines import gpu_weights
from apr_core.engines.gpu import DEPENDENT, GpuQwen2, captured, require_device
from apr_core.engines.streaming import USABLE
from apr_core.engines.subject import resolve_model
from apr_core.falsify.verdict import Verdict
from apr_core.kernels.gpu.planes import PLANES
from apr_core.model.qwen2 import Qwen2
from apr_core.model.synth import SHAPES, synthesise
from apr_core.model.trace import Trace
from apr_core.parity.suite import POSITIONS, examine, prepare
from apr_core.rosetta.convert import convert

SMALL, LARGE = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"
# Tokens per second of decoding, precision speed.
FIGURES = {
    (SMALL, "q4_k_m"): 2100, (SMALL, "q8_0"): 2000, (SMALL, "bf16"): 1580,
    (LARGE, "q4_k_m"): 1450, (LARGE, "q8_0"): 1200, (LARGE, "bf16"): 800,
}  # fmt: skip
OVER_PEERS = {"llama.cpp": 1.5, "transformers": 10}
EXACT_OVER_SPEED, SHARE = 1.3, 0.65  # of time; of the bandwidth of reading, by the large model in BF16
TYPES = ("q4_k_m", "bf16", "q8_0")
CONTRACT = 1e-4
SEED = 20
PROMPT, STEPS = 192, 64
_GIB = 1 << 30
# A driver that cannot say what it is asked, a profiler that may not look: no reason to lose what was measured.
_FAILURES = (RuntimeError, AttributeError, OSError)


def parts(setup: Setup) -> list[Part]:
    """List what runs, what the figures rest on first."""
    streamed = setup.shapes if setup.device == "cuda" else ()
    return [
        Part("ceilings", 20, ceilings),
        Part("correct", 90, correct),
        Part("suite", 45, suite),
        *(Part("models", 35, partial(model, *case)) for case in cases(setup)),
        *(Part("peers", 30, partial(transformers, shape)) for shape in setup.shapes),
        *(Part("peers", 20, partial(llama_bench, *case)) for case in cases(setup)),
        *(Part("streaming", 25, partial(streaming, shape)) for shape in streamed),
        Part("figures", 1, figures),
        Part("sweep", 40, sweep),
    ]


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


def dependent(setup: Setup) -> bool:
    """Say whether kernels are launched dependently."""
    return setup.device == "cuda" and torch.cuda.get_device_capability() >= DEPENDENT


def ahead(setup: Setup, work: Callable[[], object]) -> None:
    """Compile beside each other what ``work`` would compile one after the other; what fails there fails again here."""
    if setup.pool is None or setup.device != "cuda":
        return
    with recording() as seen, suppress(AssertionError):  # nothing is computed, and an example may notice
        work()
    major, minor = torch.cuda.get_device_capability()
    jobs = [
        setup.pool.apply_async(build_ahead, (launch, 10 * major + minor))
        for launch in {repr(launch): launch for launch in seen}.values()
    ]
    for job in jobs:
        with suppress(Exception):
            job.get(60)


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
    for early in (False, True) if dependent(setup) else (False,):
        mode = launch.Mode(1, early)

        def chain(mode: Any = mode) -> None:
            state.zero_()
            for _ in range(count):
                launch.pick(mode, 256, tops, places, state, made)

        key = "dependent_launch_us" if early else "launch_us"
        measured[key] = seconds(setup, graphed(setup, chain)) / count * 1e6
    setup.rates["read_gb_s"] = measured["read_gb_s"]
    yield Record("machine", Verdict.CORROBORATED, "", measured)
    begin(setup)  # only now: it would have shared the host's memory with the copies above


def cases(setup: Setup) -> list[tuple[str, str]]:
    """Shape and type of the random models."""
    return [(shape, dtype) for dtype in (TYPES if setup.device == "cuda" else TYPES[2:]) for shape in setup.shapes]


def file_of(setup: Setup, shape: str, dtype: str) -> Path:
    """Return where a random model lies."""
    return setup.scratch / f"{shape}-{dtype}.gguf"


def begin(setup: Setup) -> None:
    """Have the random models made."""
    for case in cases(setup):
        setup.begin("-".join(case), made_ahead, case[0], case[1], file_of(setup, *case))


def made_ahead(shape: str, dtype: str, out: Path) -> Any:
    """Write a random model, and return the reference's logits of its first nine ids."""
    synthesise(shape, format="gguf", dtype=dtype, tokenizer=None, seed=SEED, out=out)
    admission = admit(out)
    expected = Qwen2(admission.require()).forward(prompt_of(shape)[:9])
    admission.checkpoint.close()
    return expected


def prompt_of(shape: str) -> Any:
    """Return the ids that every engine of a shape reads."""
    return np.random.default_rng(SEED).integers(0, SHAPES[shape].geometry.vocab_size, 512)


def correct(setup: Setup) -> Iterator[Record]:
    """Hold each kernel against its reference on random inputs, outputs poisoned."""
    require_device(setup.device)
    from apr_core.kernels.gpu import register
    from apr_core.kernels.registry import KERNELS

    assert register.runs_here()
    rows, wrong = [], []
    chosen = {
        key: kernel
        for key, kernel in KERNELS.items()
        if key[2] == "cuda" and (not setup.formats or key[1] in setup.formats)
    }
    examples = [(key, kernel, arguments) for key, kernel in chosen.items() for arguments in kernel.examples()]

    def launch() -> None:
        for _, kernel, arguments in examples:
            tried(kernel.run, *arguments)

    ahead(setup, launch)
    for key, kernel, arguments in examples:
        found, expected = (np.asarray(f(*arguments), np.float64) for f in (kernel.run, kernel.reference))
        distance = float(np.linalg.norm(found - expected) / (np.linalg.norm(expected) or 1.0))
        rows.append({"kernel": "-".join(key), "rel_l2": distance, "limit": kernel.rel_l2})
        wrong += [] if distance <= kernel.rel_l2 else ["-".join(key)]
    verdict = Verdict.FALSIFIED if wrong else Verdict.CORROBORATED if rows else Verdict.INCONCLUSIVE
    reason = f"too far from their references: {', '.join(wrong)}" if wrong else "" if rows else "none compared"
    yield Record("kernels", verdict, reason, {"compared": len(rows)}, rows)


def tried(work: Callable[..., object], *given: Any) -> None:
    """Do something of which only the launches matter."""
    with suppress(AssertionError):
        work(*given)


def suite(setup: Setup) -> Iterator[Record]:
    """Hold the fused engine against the reference by everything that parity has, on the bundled model."""
    require_device(setup.device)
    if setup.device != "cuda":
        yield Record("pygmy", Verdict.NOT_RUN, "hundreds of steps: too many for the interpreter")
        return
    for dtype in ("Q4_K_M", "BF16"):
        admission = admit(convert(resolve_model("pygmy"), setup.scratch / f"pygmy-{dtype}.gguf", quantize=dtype))
        yield from examined(setup, f"pygmy-{dtype}", admission.require())
        admission.checkpoint.close()


def examined(setup: Setup, name: str, validated: ValidatedModel) -> Iterator[Record]:
    """Hold both precisions of a model."""
    ids = np.random.default_rng(SEED).integers(0, validated.geometry.vocab_size, POSITIONS)
    bench = prepare(validated, Qwen2(validated), ids)
    for precision in ("exact", "speed"):
        engine = GpuQwen2(validated, precision, device=setup.device)
        warm(setup, engine, ids)
        report = examine(bench, engine, precision)
        worst = max(part.report.required_tolerance for part in report.parts if part.report)
        measured = {"required_tolerance": worst, "first_divergence": str(report.first) if report.first else None}
        yield Record(f"{name}-{precision}", report.verdict, report.reason, measured, comparisons(report))


def warm(setup: Setup, engine: GpuQwen2, ids: Any) -> None:
    """Compile ahead what a prompt and a step need; a trace, for nothing is captured of it."""
    ahead(setup, lambda: (engine.forward(ids[:1], trace=Trace()), engine.forward_last(ids[: max(2, ids.size)])))


def model(shape: str, dtype: str, setup: Setup) -> Iterator[Record]:
    """Hold and time a random model of a published shape, in both precisions."""
    require_device(setup.device)
    if not setup.made:  # this process goes on for another
        begin(setup)
    expected, ids = setup.made[f"{shape}-{dtype}"](), prompt_of(shape)
    admission = admit(file_of(setup, shape, dtype))
    validated = admission.require()
    for precision in ("speed", "exact"):
        yield held_and_timed(setup, validated, (shape, dtype, precision), ids, expected)
    admission.checkpoint.close()


def held_and_timed(
    setup: Setup, validated: ValidatedModel, case: tuple[str, str, str], ids: Any, expected: Any
) -> Record:
    """Compare a prompt and steps with the reference, run them twice, and time decoding and a prompt."""
    cuda, (shape, dtype, precision) = setup.device == "cuda", case
    engine = GpuQwen2(validated, precision, device=setup.device)
    warm(setup, engine, ids if cuda else ids[:2])
    runs = []
    for _ in range(2):
        cache = engine.new_cache()
        first, stop = (5, len(expected)) if cuda else (2, 3)
        pieces = [engine.forward(ids[:first], cache)]
        pieces += [engine.forward(ids[i : i + 1], cache) for i in range(first, stop)]
        runs.append(np.concatenate(pieces))
    expected = expected[: len(runs[0])]
    distance = float(np.linalg.norm(runs[0] - expected) / np.linalg.norm(expected))
    prompt, steps = (PROMPT, STEPS) if cuda else (2, 1)
    engine.forward_last(ids[:prompt], cache := engine.new_cache())

    def decode() -> None:
        cache.length = prompt
        engine.greedy(cache, int(ids[0]), steps)

    rate = steps / seconds(setup, decode, 20 if cuda else 1)
    setup.rates[f"{shape}-{dtype}-{precision}"] = rate
    moved = setup.rates[f"{shape}-{dtype}-{precision}-read_gb_s"] = rate * engine.bytes_per_token / 1e9
    measured: dict[str, Any] = {
        "rel_l2": distance,
        "top1_agreement": float((runs[0].argmax(1) == expected.argmax(1)).mean()),
        "torch_equal": bool((runs[0] == runs[1]).all()),
        "decode_tok_s": rate,
        "read_gb_s": moved,
        "bytes_per_token": engine.bytes_per_token,
        "plan": engine.plan.reason,
        "figure_tok_s": FIGURES.get((shape, dtype)),
    }
    if "read_gb_s" in setup.rates:
        measured["share_of_read_bandwidth"] = moved / setup.rates["read_gb_s"]
    if cuda:
        measured |= beside(setup, engine, cache.slot, ids)
    faults = [] if measured["torch_equal"] else ["two runs differ"]
    if precision == "exact" and not distance <= CONTRACT:
        faults.append(f"rel_l2 {distance:.2g} against the reference, at most {CONTRACT:g}")
    verdict = Verdict.FALSIFIED if faults else Verdict.CORROBORATED
    return Record(f"{shape}-{dtype}-{precision}", verdict, "; ".join(faults), measured)


def beside(setup: Setup, engine: GpuQwen2, slot: Any, ids: Any) -> dict[str, Any]:
    """Measure what explains a rate: a prompt, the same step without its graph, and the time of each kernel."""

    def prompt() -> float:
        return float(ids.size / seconds(setup, lambda: engine.forward_last(ids)))

    def step(decode: Callable[[], object]) -> None:
        reset(engine, PROMPT)
        decode()

    def eager() -> float:
        return 1 / seconds(setup, lambda: step(lambda: engine._decode(slot)))

    def kernels() -> dict[str, float]:
        return by_kernel(lambda: step(slot.replay))

    measured: dict[str, Any] = {}
    with torch.inference_mode():
        for key, work in (("prefill_tok_s", prompt), ("eager_decode_tok_s", eager), ("us_by_kernel", kernels)):
            try:
                measured[key] = work()
            except _FAILURES as error:
                measured[f"{key}_not_run"] = f"{type(error).__name__}: {error}"[:300]
    return measured


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


def streaming(shape: str, setup: Setup) -> Iterator[Record]:
    """Decode with half of the layers away, and hold the bits against the model that is all there."""
    file = file_of(setup, shape, TYPES[0])
    if not file.exists():
        yield Record(f"{shape}-streamed", Verdict.NOT_RUN, "its file was not made in time")
        return
    admission = admit(file)
    validated, ids = admission.require(), prompt_of(shape)
    yield streamed(setup, validated, shape, ids)
    admission.checkpoint.close()


def streamed(setup: Setup, validated: ValidatedModel, shape: str, ids: Any) -> Record:
    """Hold and time one model whose second half of layers comes and goes."""
    found = gpu_weights.estimate(validated, 2)
    budget = int((found.streaming() + found.layers // 2 * found.layer) / USABLE) + 2
    whole, half = (GpuQwen2(validated, "speed", device=setup.device, budget_bytes=b) for b in (None, budget))
    caches, same = (whole.new_cache(), half.new_cache()), True
    for part in (ids[:5], ids[5:6], ids[6:7]):
        found_whole, found_half = (e.forward(part, c) for e, c in zip((whole, half), caches, strict=True))
        same = same and bool((found_whole == found_half).all())
    cache, steps = half.new_cache(), 4 if setup.device == "cuda" else 1
    taken = seconds(setup, lambda: half.greedy(cache, 1, steps), steps) / steps
    away = found.layers - half.weights.resident
    moved = sum(blob.numel() for blob in half.weights._blobs[half.weights.resident :])
    measured = {"streamed_tok_s": 1 / taken, "layers_away": away, "moved_gb_s": moved / taken / 1e9}
    reason = "" if same else "streamed logits differ from those of the model that is all there"
    return Record(f"{shape}-streamed", Verdict.CORROBORATED if same else Verdict.FALSIFIED, reason, measured)


def llama_bench(shape: str, dtype: str, setup: Setup) -> Iterator[Record]:
    """Ask llama.cpp's own benchmark, when it is on the PATH, for the same file: all layers on the device."""
    name, tool, file = f"{shape}-{dtype}-llama.cpp", shutil.which("llama-bench"), file_of(setup, shape, dtype)
    if tool is None:
        yield Record(name, Verdict.NOT_RUN, "no llama-bench on the PATH")
        return
    command = [tool, "-m", str(file), "-p", "512", "-n", str(STEPS), "-d", str(PROMPT), "-ngl", "99", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        yield Record(name, Verdict.INCONCLUSIVE, done.stderr[-300:])
        return
    rows = [{k: row[k] for k in ("n_prompt", "n_gen", "avg_ts", "stddev_ts")} for row in json.loads(done.stdout)]
    setup.rates[name] = max((row["avg_ts"] for row in rows if row["n_gen"] and not row["n_prompt"]), default=0.0)
    yield Record(name, Verdict.CORROBORATED, "", {}, rows)


def transformers(shape: str, setup: Setup) -> Iterator[Record]:
    """Time transformers in eager bfloat16 on the same shape, where it is installed."""
    name = f"{shape}-bf16-transformers"
    try:
        from transformers import Qwen2Config, Qwen2ForCausalLM
    except ImportError:
        yield Record(name, Verdict.NOT_RUN, "transformers is not installed")
        return
    g = SHAPES[shape].geometry
    config = Qwen2Config(
        vocab_size=g.vocab_size, hidden_size=g.hidden_size, intermediate_size=g.intermediate_size,
        num_hidden_layers=g.num_hidden_layers, num_attention_heads=g.num_attention_heads,
        num_key_value_heads=g.num_key_value_heads, tie_word_embeddings=g.tied,
    )  # fmt: skip
    with torch.device(setup.device):  # drawn there: the host takes its time over billions
        model = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
    prompt, steps = (PROMPT, STEPS) if setup.device == "cuda" else (2, 2)
    ids = torch.ones(1, prompt, dtype=torch.long, device=setup.device)

    def run(count: int) -> None:
        model.generate(
            ids, attention_mask=ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )

    with torch.inference_mode():
        taken = seconds(setup, lambda: run(1 + steps), 3) - seconds(setup, lambda: run(1), 3)
    setup.rates[name] = steps / taken
    yield Record(name, Verdict.CORROBORATED, "", {"decode_tok_s": setup.rates[name]})


def figures(setup: Setup) -> Iterator[Record]:
    """Put what was predicted beside what was measured; the figures are an H200's, and judge no other device."""
    rates = setup.rates
    expected = [(f"{shape}-{dtype}-speed", "", float(figure)) for (shape, dtype), figure in FIGURES.items()]
    for shape, dtype in FIGURES:
        name = f"{shape}-{dtype}"
        expected.append((f"{name}-exact", f"{name}-speed", 1 / EXACT_OVER_SPEED))
        expected += [(f"{name}-speed", f"{name}-{peer}", ratio) for peer, ratio in OVER_PEERS.items()]
    expected.append((f"{LARGE}-bf16-speed-read_gb_s", "read_gb_s", SHARE))
    rows: list[dict[str, Any]] = [
        {"what": what, "over": over, "measured": rates[what] / (rates[over] if over else 1), "at_least": least}
        for what, over, least in expected
        if what in rates and (not over or over in rates)
    ]
    short = [f"{row['what']} {row['over']}".strip() for row in rows if not row["measured"] >= row["at_least"]]
    here = setup.device == "cuda" and "H200" in torch.cuda.get_device_name(0)
    verdict, reason = Verdict.CORROBORATED, ""
    if short:
        verdict, reason = Verdict.FALSIFIED, f"short of: {', '.join(short)}"
    if not rows or not here:
        verdict, reason = Verdict.INCONCLUSIVE, "the figures are those of an H200" if rows else "no rate was measured"
    yield Record("h200", verdict, reason, {}, rows)


def sweep(setup: Setup) -> Iterator[Record]:
    """Time the product of each type, over matrices that together are beyond the caches."""
    require_device(setup.device)
    from apr_core.kernels.gpu import launch

    ceiling, device = setup.rates.get("read_gb_s") or read_gb_s(setup), torch.device(setup.device)
    shape, copies = ((1536, 8960), 12) if setup.device == "cuda" else ((32, 256), 1)
    rows = []

    def made(name: str) -> list[Any]:
        nbytes = PLANES[name].nbytes(*shape)
        return [
            launch.Matrix(name, *shape, torch.zeros(nbytes, dtype=torch.uint8, device=device)) for _ in range(copies)
        ]

    kinds = [(name, digits) for name in setup.formats or PLANES for digits in (1, 3)]
    ahead(setup, lambda: [products(setup, made(name)[:1], digits)() for name, digits in kinds])
    for name, digits in kinds:
        weights = made(name)
        taken = seconds(setup, graphed(setup, products(setup, weights, digits))) / copies
        share = weights[0].data.numel() / taken / 1e9 / ceiling
        rows.append({"type": name, "digits": digits, "us": taken * 1e6, "share_of_read_bandwidth": share})
    yield Record("products", Verdict.CORROBORATED, "", {"rows": shape[0], "columns": shape[1]}, rows)


def products(setup: Setup, weights: list[Any], digits: int) -> Callable[[], None]:
    """Return what multiplies each matrix with one activation, as output and down do."""
    from apr_core.kernels.gpu import launch

    rows, columns, device = weights[0].rows, weights[0].columns, torch.device(setup.device)
    mode = launch.Mode(digits, dependent(setup))
    x, out = launch.activation(columns, digits, device), launch.activation(rows, digits, device)
    y, h, gain, partials = (torch.zeros(n * rows, device=device) for n in (1, 1, 1, launch.MOST_SHARES))
    norm = launch.Norm(torch.zeros(rows // 32, device=device), 1e-6)
    counters = torch.zeros(rows // 32, dtype=torch.int32, device=device)

    def run() -> None:
        for w in weights:
            launch.residual(mode, w, x, y, h, norm, gain, out, partials, counters)

    return run

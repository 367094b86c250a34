"""
The parts of `gpu` that hold the CUDA forward against the CPU's.

Each model file becomes one record of three findings. Parity: everything of `parity.suite` against the float32
reference, judged by the contract. Repeatability: the same run twice, `torch.equal`. Streaming: the same names, equal
bit for bit, with fewer bytes of the device. It is attested: an engine that ran on the host would agree with itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu import Part, Record, Setup
from numpy.typing import NDArray

from apr_core.contract.admit import admit
from apr_core.contract.types import ValidatedModel
from apr_core.engines.cuda import CudaQwen2, attest, exact_products, weight_bytes
from apr_core.engines.streaming import StreamedCudaQwen2, estimate
from apr_core.engines.subject import resolve_model
from apr_core.falsify.verdict import Verdict
from apr_core.model.generate import follow
from apr_core.model.qwen2 import Qwen2
from apr_core.model.synth import synthesise
from apr_core.model.trace import Trace
from apr_core.parity.suite import POSITIONS, PREFILL, SuiteReport, bits, examine, prepare
from apr_core.rosetta.convert import CHOICES, CONTAINERS, convert, named

# On rel_l2 of every name: what the issue asks of a device, and what it aims at.
CONTRACT, AIM = 1e-4, 1e-5
STREAMED = PREFILL + 8
SEED = 20
FINDINGS = ("parity", "repeatability", "streaming")


def products(setup: Setup) -> Iterator[Record]:
    """Multiply on the device as parity does and as TF32 would, against float64: the switches must be seen to work."""
    random = torch.Generator().manual_seed(SEED)
    a, b = (torch.randn(512, 1536, generator=random) for _ in "ab")
    truth = a.double() @ b.double().T

    def distance() -> float:
        found = (a.to(setup.device) @ b.to(setup.device).T).cpu().double()
        return float((found - truth).norm() / truth.norm())

    with exact_products():
        exact = distance()
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = True
        rounded = distance()
    finally:
        matmul.allow_tf32 = before
    limit = 1e-6  # float32 sums of 1536 terms: 2e-7 measured on a CPU; TF32 rounds its operands to 5e-4
    holds = exact <= limit
    reason = "" if holds else f"a float32 product is {exact:.2g} from float64, at most {limit:g}: TF32 is not off"
    measured = {"rel_l2_exact": exact, "rel_l2_tf32_allowed": rounded, "limit": limit}
    yield Record("tf32", Verdict.CORROBORATED if holds else Verdict.FALSIFIED, reason, measured)


def bundled(setup: Setup) -> Iterator[Record]:
    """Hold the bundled model in every type that we write."""
    yield from every_format(setup, "pygmy", resolve_model("pygmy"))


def random_weights(setup: Setup) -> Iterator[Record]:
    """Hold a small random model in every type that we write: its activations are unlike a trained one's."""
    source = synthesise("pygmy", format="safetensors", dtype="f32", seed=SEED, out=setup.scratch / "random")
    yield from every_format(setup, "random", source)


def every_format(setup: Setup, name: str, source: Path) -> Iterator[Record]:
    """Convert a model to every container and type that our codecs write, and hold each."""
    chosen = setup.formats or [f"{container}:{dtype}" for container in CONTAINERS for dtype in CHOICES[container]]
    for choice in chosen:
        container, dtype = choice.split(":")
        target = named(setup.scratch / f"{name}-{dtype}", container)
        yield hold(setup, f"{name}-{container}-{dtype}", convert(source, target, quantize=dtype))


def large(shape: str, setup: Setup) -> Iterator[Record]:
    """Hold a random model of a published shape, drawn as blocks: Q4_K_M has Q4_K, Q5_0, Q6_K and Q8_0 in it."""
    out = setup.scratch / f"{shape}.gguf"
    synthesise(shape, format="gguf", dtype="q4_k_m", tokenizer=None, seed=SEED, out=out)
    yield hold(setup, shape, out)
    out.unlink()


def parts(setup: Setup) -> list[Part]:
    """List what runs, in this order."""
    return [
        Part("products", 10, products),
        Part("bundled", 160, bundled),
        *(Part("large", 120, partial(large, shape)) for shape in setup.shapes),
        Part("random_weights", 120, random_weights),
    ]


def hold(setup: Setup, name: str, path: Path) -> Record:
    """Hold one model file; the whole model is gone before the streamed one is built, so that each is measured alone."""
    admission = admit(path)
    validated = admission.require()
    ids = np.random.default_rng(SEED).integers(0, validated.geometry.vocab_size, POSITIONS)
    model, whole, whole_bytes = run(lambda: CudaQwen2(validated, setup.device), ids[:STREAMED])
    held, doubt, rows = parity(validated, model, ids)
    repeated = repeats(model, ids)
    del model
    _, again, streamed_bytes = run(lambda: StreamedCudaQwen2(validated, setup.device), ids[:STREAMED])
    streamed = streams(whole, again, whole_bytes, streamed_bytes)
    found = estimate(validated, STREAMED, PREFILL)
    measured: dict[str, Any] = {
        "file": path.name,
        "sha256": admission.checkpoint.content_hash,
        "types": sorted({str(t.raw.info.dtype) for t in validated.tensors.values()}),
        "parameters": sum(prod(t.shape) for t in validated.tensors.values()),
        "parity": held,
        "repeatability": repeated,
        "streaming": streamed | {"estimated_bytes_whole": found.full, "estimated_bytes_streamed": found.streaming()},
    }
    admission.checkpoint.close()
    refuted = [f"{key}: {measured[key]['reason']}" for key in FINDINGS if measured[key]["reason"]]
    if refuted:
        return Record(name, Verdict.FALSIFIED, "; ".join(refuted), measured, rows)
    return Record(name, Verdict.INCONCLUSIVE if doubt else Verdict.CORROBORATED, doubt, measured, rows)


def run(build: Callable[[], CudaQwen2], ids: NDArray[np.int64]) -> tuple[CudaQwen2, Trace, int]:
    """Build a model and follow the ids with it; return it, every name, and the bytes of the device that it took."""
    there = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if there else 0
    if there:
        torch.cuda.reset_peak_memory_stats()
    model = build()
    trace = follow(model, ids, PREFILL, full=True)
    return model, trace, torch.cuda.max_memory_allocated() - before if there else 0


def parity(
    validated: ValidatedModel, model: CudaQwen2, ids: NDArray[np.int64]
) -> tuple[dict[str, Any], str, list[dict[str, Any]]]:
    """Run the whole suite under the contract; return the finding, what is doubtful about it, and its rows."""
    bench = prepare(validated, Qwen2(validated), ids, contract=CONTRACT)
    report = examine(bench, model)
    witness = attest(model, ids[:1], weight_bytes(validated))
    doubt = witness.doubt
    if report.verdict is Verdict.INCONCLUSIVE:
        doubt = report.reason
    worst = max(part.report.required_tolerance for part in report.parts if part.report)
    found = {
        "reason": report.reason if report.verdict is Verdict.FALSIFIED else "",
        "required_tolerance": worst,
        "contract": CONTRACT,
        "within_aim": worst <= AIM,
        "first_divergence": str(report.first) if report.first else None,
        "allocated_bytes": witness.allocated_bytes,
        "kernels": witness.kernels,
        "notes": list(report.notes),
    }
    return found, doubt, comparisons(report)


def comparisons(report: SuiteReport) -> list[dict[str, Any]]:
    """One row per comparison of the suite; the blind norm difference stands beside what decides."""
    out = []
    for part in report.parts:
        row: dict[str, Any] = {"comparison": part.name, "verdict": str(part.verdict), "compared": part.compared}
        if part.report is not None and part.report.logits is not None:
            logits, names = part.report.logits, part.report.names
            row |= {
                "rel_l2": part.report.required_tolerance,
                "rel_l2_logits": names["logits"].required_tolerance,
                "cosine_logits": float(names["logits"].cosine.min()),
                "norm_difference_max": float(logits.norm_difference.max()),
                "kl_max": logits.kl_max,
                "top1_agreement_decisive": logits.top1_agreement,
                "decisive": int(logits.decisive.sum()),
            }
        out.append(row)
    return out


def repeats(model: CudaQwen2, ids: NDArray[np.int64]) -> dict[str, Any]:
    """Follow the same ids twice and count the logits that differ."""
    first, second = (torch.tensor(follow(model, ids, PREFILL, full=True)["logits"]) for _ in range(2))
    same = torch.equal(first, second)
    reason = "" if same else f"{int((first != second).sum())} of {first.numel()} logits differ between two runs"
    return {"reason": reason, "compared": first.numel(), "torch_equal": same}


def streams(whole: Trace, again: Trace, whole_bytes: int, streamed_bytes: int) -> dict[str, Any]:
    """Hold every name of the streamed forward against the whole model's, bit for bit, and compare what each took."""
    names = list(whole) == list(again)
    differing = sum(int((bits(whole[n]) != bits(again[n])).sum()) for n in whole) if names else 0
    reason = "" if names else "other names than the whole model's"
    if differing:
        reason = f"{differing} values differ from the whole model's"
    elif whole_bytes and streamed_bytes >= whole_bytes:
        reason = f"streaming took {streamed_bytes} bytes of the device, the whole model {whole_bytes}"
    return {
        "reason": reason,
        "compared": sum(values.size for values in whole.values()),
        "differing": differing,
        "peak_bytes_whole": whole_bytes,
        "peak_bytes_streamed": streamed_bytes,
    }

"""
What the gate costs: one pass over a model against the machine's read bandwidth, and the four starts of issue 4.

Prints each figure with its limit; `--json` writes them too. Every ratio is of two things that ran next to each other in
this process, again and again; the median of the ratios is what counts, on a machine that others use as well. Without
`--half` and `--quantised` two models of the shape of Qwen2.5-Coder-0.5B are made in a temporary folder and deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numba import njit

from apr_core.contract.admit import admit
from apr_core.contract.gates import judge_layout, needs_spot_rows
from apr_core.contract.layout import read_geometry, role_of
from apr_core.contract.receipt import admit_by_receipt
from apr_core.contract.stats import TensorStats, measure_all
from apr_core.engines.subject import resolve_model
from apr_core.formats.checkpoint import Checkpoint, open_checkpoint
from apr_core.kernels import stats as kernel
from apr_core.kernels.cpu.features import available_cores
from apr_core.model.synth import synthesise

SHAPE = "qwen2.5-coder-0.5b"


@njit(nogil=True, cache=True)
def _add_words(words: np.ndarray) -> int:
    """Read every word once, and nothing more."""
    total = np.uint64(0)
    for i in range(words.size):
        total += words[i]
    return total


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    return both(work)[0]


def both(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of one call, and those of all cores in it: others who want a core lengthen the first alone."""
    start, cores = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cores


def read(words: np.ndarray, threads: int) -> None:
    """Read memory on so many threads."""
    parts = np.array_split(words, threads)
    workers = [threading.Thread(target=_add_words, args=(part,)) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def scan(checkpoint: Checkpoint, threads: int) -> list[TensorStats]:
    """Measure every tensor of the contract, as `admit` does."""
    roles = ((name, role_of(name)) for name in checkpoint.tensors)
    tensors = [(checkpoint.raw(name), needs_spot_rows(role)) for name, role in roles if role is not None]
    return [found for found in measure_all(tensors, threads=threads) if isinstance(found, TensorStats)]


def header_gate(path: Path) -> int:
    """Open a model and judge all that needs no weights; return the number of violations."""
    checkpoint = open_checkpoint(path)
    geometry, problems = read_geometry(checkpoint.config or {})
    return len(problems) if geometry is None else len(judge_layout(checkpoint, geometry))


def plain_rate(checkpoint: Checkpoint) -> float:
    """Measure two layers in several passes of torch, as one would write it unawares; 1e9 bytes per second."""
    import torch

    raws = [checkpoint.raw(name) for name in checkpoint.tensors if ".layers.1." in name or ".layers.2." in name]
    start = time.perf_counter()
    for raw in raws:
        values = torch.frombuffer(bytearray(raw.data), dtype=torch.bfloat16)
        (values.abs() < 1e-10).sum(), torch.isnan(values).sum(), torch.isinf(values).sum()
        torch.aminmax(values)
        values.sum(dtype=torch.float32), torch.linalg.vector_norm(values, dtype=torch.float32)
    return sum(raw.data.size for raw in raws) / (time.perf_counter() - start) / 1e9


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(path: Path) -> None:
    """Bring a file into the page cache by reading it, as `cat` does: how it was written no longer shows."""
    forget(path)
    with path.open("rb", buffering=0) as stream:
        buffer = bytearray(1 << 20)
        while stream.readinto(buffer):
            pass


def scan_figures(path: Path, threads: int, repeats: int) -> dict[str, float]:
    """Scan a BF16 model, warm and cold, next to reading as many bytes of memory and next to torch."""
    weights = open_checkpoint(path).files[0]
    warm(weights)
    size = weights.stat().st_size
    memory = np.ones(size // 8, np.uint64)
    read(memory[:8], 1)
    scan(open_checkpoint(path), threads)
    reads, mapped, scans, whole, torch_rates = [], [], [], [], []
    for _ in range(repeats):
        reads.append(both(lambda: read(memory, threads)))
        file = np.memmap(weights, np.uint8, "r")
        mapped.append(both(lambda file=file: read(file[: size // 8 * 8].view(np.uint64), threads)))
        checkpoint = open_checkpoint(path)  # a new mapping: its pages are not there yet, as in a new process
        scans.append(both(lambda checkpoint=checkpoint: scan(checkpoint, threads)))
        whole.append(timed(lambda: admit(path)))
    for _ in range(3):
        torch_rates.append(plain_rate(open_checkpoint(path)))
    forget(weights)
    cold = timed(lambda: scan(open_checkpoint(path), threads))
    rate = size / statistics.median(wall for wall, _ in scans) / 1e9
    return {
        "threads": threads,
        "read_gb_s": size / statistics.median(wall for wall, _ in reads) / 1e9,
        "read_of_the_mapped_file_gb_s": size / statistics.median(wall for wall, _ in mapped) / 1e9,
        "scan_gb_s": rate,
        "scan_s": statistics.median(wall for wall, _ in scans),
        "scan_over_read": _ratio(reads, scans, 0),
        "scan_over_read_by_core_seconds": _ratio(reads, scans, 1),
        "scan_over_read_of_the_mapped_file": _ratio(mapped, scans, 0),
        "scan_over_read_mapped_by_core_s": _ratio(mapped, scans, 1),
        "admit_s": statistics.median(whole),
        "cold_scan_s": cold,
        "cold_scan_gb_s": size / cold / 1e9,
        "several_passes_of_torch_gb_s": statistics.median(torch_rates),
        "scan_over_torch": rate / statistics.median(torch_rates),
    }


def _ratio(numerators: list[tuple[float, float]], denominators: list[tuple[float, float]], which: int) -> float:
    """Return the median of the ratios of neighbours."""
    return statistics.median(n[which] / d[which] for n, d in zip(numerators, denominators, strict=True))


def portable_figures(path: Path, threads: int) -> dict[str, float]:
    """Scan by the path that needs no numba."""
    kept, kernel.scanner = kernel.scanner, lambda nbytes: kernel.scan_many
    try:
        return {"portable_scan_s": timed(lambda: scan(open_checkpoint(path), threads))}
    finally:
        kernel.scanner = kept


def start_figures(half: Path, quantised: Path, repeats: int) -> dict[str, float]:
    """Time the header-only gate, the second start by a receipt, and the full gate of a quantised model."""
    files = {"pygmy": Path(resolve_model("pygmy")), "half": half, "quantised": quantised}
    found = {
        f"header_gate_{name}_s": statistics.median(timed(lambda path=path: header_gate(path)) for _ in range(repeats))
        for name, path in files.items()
    }
    gates, cores = [], []
    for _ in range(repeats):
        begin = time.process_time()
        gates.append(timed(lambda: admit(quantised)))
        cores.append(time.process_time() - begin)
    found |= {"full_gate_quantised_s": statistics.median(gates), "full_gate_quantised_core_s": statistics.median(cores)}
    for name, path in list(files.items())[1:]:
        admit_by_receipt(path, recheck=True)
        starts = []
        for _ in range(repeats):
            begin = time.perf_counter()
            held = admit_by_receipt(path).receipt
            starts.append(time.perf_counter() - begin)
            assert held is not None, f"no receipt holds for {path}"
        found[f"receipt_{name}_s"] = statistics.median(starts)
    return found


LIMITS: dict[str, tuple[str, float]] = {
    "scan_over_read": (">=", 0.6),
    "header_gate_pygmy_s": ("<", 0.2),
    "header_gate_half_s": ("<", 0.2),
    "header_gate_quantised_s": ("<", 0.2),
    "receipt_half_s": ("<", 0.05),
    "receipt_quantised_s": ("<", 0.05),
    "full_gate_quantised_s": ("<", 2.0),
}


def show(found: dict[str, float]) -> bool:
    """Print the figures; return whether every limit was kept."""
    kept = True
    for name, value in found.items():
        sign, limit = LIMITS.get(name, ("", 0.0))
        holds = {"": True, ">=": value >= limit, "<": value < limit}[sign]
        kept &= holds
        print(f"{name:36} {value:10.4g}  {f'{sign} {limit:g}' if sign else '':8} {'' if holds else 'NOT KEPT'}")
    return kept


def main() -> int:
    """Measure what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", type=Path, help="a BF16 model in SafeTensors")
    parser.add_argument("--quantised", type=Path, help="a Q4_K_M model in GGUF")
    parser.add_argument("--threads", type=int, default=min(2, available_cores()))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["APR_CACHE"] = str(Path(folder) / "cache")  # receipts of the measurement stay out of the person's
        half, quantised = args.half or Path(folder) / "half", args.quantised or Path(folder) / "half.gguf"
        if args.half is None:
            synthesise(SHAPE, format="safetensors", dtype="bf16", tokenizer="generated", seed=0, out=half)
        if args.quantised is None:
            synthesise(SHAPE, format="gguf", dtype="q4_k_m", tokenizer="generated", seed=0, out=quantised)
        found = scan_figures(half, args.threads, args.repeats)
        found |= portable_figures(half, args.threads)
        found |= start_figures(half, quantised, args.repeats)
    kept = show(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())

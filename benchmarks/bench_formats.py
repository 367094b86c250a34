"""
Compare codecs and the opening of files with the field's own, in one run: ratios of medians, and their spread.

Opening against ``gguf.GGUFReader`` with every string in hand; bytes and square error against llama.cpp's library and,
where the oracle is, its files; encoding and decoding against ``ggml_quantize_chunk`` and ``gguf.quants``; what must
pass through a conversion byte for byte. Samples of the two sides are taken in turns in one process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from apr_core.bench.timing import Samples
from apr_core.dtypes import FORMATS
from apr_core.errors import Unavailable
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.kernels.codecs import decode_bytes, encode
from apr_core.model.synth import synthesise
from apr_core.peers.ggml import quantise
from apr_core.rosetta.convert import convert

ORACLE = Path(__file__).parents[1].parent / "shared" / "oracle" / "mini"
LEGACY, K_QUANTS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"), ("Q4_K", "Q5_K", "Q6_K")
THREADS = 2


def in_turns(repeats: int, ours: Callable[[], object], theirs: Callable[[], object]) -> dict[str, float]:
    """Time two calls in turns after one warm-up each."""
    ours(), theirs()
    sides: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for side, call in zip(sides, (ours, theirs), strict=True):
            start = time.perf_counter()
            call()
            side.append(time.perf_counter() - start)
    one, other = Samples.of(sides[0]), Samples.of(sides[1])
    ratios = Samples.of([b / a for a, b in zip(*sides, strict=True)])
    return {
        "ours_s": one.median,
        "ours_iqr_s": one.iqr,
        "peer_s": other.median,
        "peer_iqr_s": other.iqr,
        "ratio": ratios.median,
        "ratio_low": ratios.minimum,
        "ratio_high": ratios.maximum,
    }


def fresh(code: str, path: Path) -> float:
    """Seconds of a statement in a process of its own, its imports counted, the interpreter's start not."""
    script = f"import time, sys; t = time.perf_counter()\n{code}\nprint(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=True, capture_output=True, text=True)
    return float(done.stdout)


OURS = "from apr_core.formats.checkpoint import open_checkpoint\nc = open_checkpoint(sys.argv[1])"
THEIRS = "import gguf\nd = {f.name: f.contents() for f in gguf.GGUFReader(sys.argv[1]).fields.values()}"


def opening(path: Path, repeats: int) -> dict[str, Any]:
    """Open a file: with every string in hand, and with arrays left lazy; without and with the imports."""

    def strings() -> object:
        with open_checkpoint(path) as opened:
            return dict(opened.metadata)

    def lazy() -> object:
        with open_checkpoint(path) as opened:
            return len(opened.tensors)

    def reader() -> object:
        return {field.name: field.contents() for field in gguf.GGUFReader(path).fields.values()}

    return {
        "every_string": in_turns(repeats, strings, reader),
        "lazy": in_turns(repeats, lazy, reader),
        "imports_counted_s": {
            "ours_every_string": fresh(OURS + "\nd = dict(c.metadata)", path),
            "ours_lazy": fresh(OURS, path),
            "peer": fresh(THEIRS, path),
        },
    }


def weights(rows: int, columns: int) -> np.ndarray:
    """Normal noise of a trained matrix's spread, with a few outliers."""
    random = np.random.default_rng(rows)
    values = random.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
    values[:: rows // 16 or 1, ::97] *= np.float32(20)
    return values


def compare(name: str, values: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Count identical blocks and compare the error of both encodings of the same values."""
    dtype = FORMATS[name]
    ours = encode(values, dtype)
    width = dtype.block_bytes
    same = (ours.reshape(-1, width) == theirs.reshape(-1, width)).all(axis=1)
    squares = [float(((decode_bytes(dtype, d, values.shape) - values) ** 2).sum(dtype=float)) for d in (ours, theirs)]
    return {"blocks": int(same.size), "identical": int(same.sum()), "rmse_ratio": (squares[0] / squares[1]) ** 0.5}


def identity() -> dict[str, Any]:
    """Compare bytes and error with the gguf package, llama.cpp's library on 0.5B shapes, and its files."""
    found: dict[str, Any] = {}
    values = weights(896, 4864)
    for name in LEGACY:
        found[f"{name} gguf package"] = compare(
            name, values, gguf.quants.quantize(values, gguf.GGMLQuantizationType[name]).reshape(-1)
        )
    for name in (*LEGACY, *K_QUANTS):
        found[f"{name} llama.cpp library"] = compare(name, values, quantise(values, FORMATS[name], THREADS))
    for recipe in ("Q4_K_M", "Q6_K", "Q8_0") if ORACLE.is_dir() else ():
        with open_checkpoint(ORACLE) as source, open_checkpoint(ORACLE / "gguf" / f"{recipe}.gguf") as file:
            for name in {info.dtype.name for info in file.tensors.values() if not info.dtype.plain}:
                pairs = [n for n, info in file.tensors.items() if info.dtype.name == name]
                decoded = [source.raw(n) for n in pairs]
                values = np.concatenate([decode_bytes(r.info.dtype, r.data, r.info.shape).reshape(-1) for r in decoded])
                stored = np.concatenate([file.raw(n).data for n in pairs])
                found[f"{name} in {recipe}.gguf of llama.cpp"] = compare(name, values.reshape(1, -1), stored)
    return found


def speeds(repeats: int) -> dict[str, Any]:
    """Encode ffn_gate of the 1.5B shape against llama.cpp's library, both on two threads; decode against gguf."""
    values, found = weights(8960, 1536), {}
    for name in (*LEGACY, *K_QUANTS):
        dtype, kind = FORMATS[name], gguf.GGMLQuantizationType[name]
        stored = encode(values, dtype)
        rows = stored.reshape(values.shape[0], -1)

        def library(dtype: Any = dtype) -> object:
            return quantise(values, dtype, THREADS)

        found[name] = {
            "encode": in_turns(repeats, lambda d=dtype: encode(values, d), library),
            "decode": in_turns(
                repeats,
                lambda d=dtype, s=stored: decode_bytes(d, s, values.shape),
                lambda r=rows, k=kind: gguf.quants.dequantize(r, k),
            ),
        }
        for side in found[name].values():
            side["ours_mweights_s"] = values.size / side["ours_s"] / 1e6
    return found


def data_hashes(path: Path) -> dict[str, str]:
    """The sha256 of each tensor's stored bytes."""
    with open_checkpoint(path) as opened:
        return {n: hashlib.sha256(opened.raw(n).data.tobytes()).hexdigest() for n in sorted(opened.tensors)}


def passes(folder: Path) -> dict[str, Any]:
    """Convert there and back through APR and compare the data of every tensor."""
    found = {}
    for recipe, name, file in (("F16", "SafeTensors F16", "m.safetensors"), ("Q4_K_M", "GGUF Q4_K_M", "m.gguf")):
        there, back = folder / recipe, folder / f"{recipe}-back"
        there.mkdir()
        back.mkdir()
        start = convert(ORACLE, there / file, quantize=recipe)
        end = convert(convert(start, folder / f"{recipe}.apr"), back / file)
        one, other = data_hashes(start), data_hashes(end)
        found[name] = {"tensors": len(one), "identical": sum(one[n] == other.get(n) for n in one)}
    return found


def main() -> None:
    """Measure what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--model", type=Path, help="a GGUF of the 0.5B shape; written to a temporary folder if not given"
    )
    parser.add_argument("--only", choices=("opening", "identity", "speeds", "passes"), help="one part alone")
    parser.add_argument("--json", action="store_true", help="one line of strict JSON")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.only in (None, "opening"):
            model = args.model or synthesise(
                "qwen2.5-coder-0.5b", format="gguf", dtype="q4_k_m", out=folder / "model.gguf"
            )
            found["opening"] = opening(model, args.repeats)
        if args.only in (None, "identity"):
            found["identity"] = identity()
        if args.only in (None, "speeds"):
            found["speeds"] = speeds(args.repeats)
        if args.only in (None, "passes") and ORACLE.is_dir():
            found["passes"] = passes(folder)
    print(json.dumps(found, allow_nan=False, indent=None if args.json else 1))


if __name__ == "__main__":
    try:
        main()
    except Unavailable as missing:
        sys.exit(f"{missing}")

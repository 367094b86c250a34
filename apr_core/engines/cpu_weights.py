"""The weights of an admitted model in panels, the tables that the compiled step reads, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apr_core.contract.layout import EMBEDDING, HEAD
from apr_core.contract.types import RepackedHead, Validated, ValidatedHead, ValidatedModel
from apr_core.dtypes import FORMATS, QuantFormat
from apr_core.errors import LoadError
from apr_core.formats.codecs import decode_bytes
from apr_core.kernels.cpu.panels import BLOCK, LAYOUTS
from apr_core.kernels.cpu.repack import repack

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""In the order of the rows in `apr_core.kernels.cpu.step`."""
_VECTORS = (
    ("input_layernorm.weight", BLOCK),
    ("post_attention_layernorm.weight", BLOCK),
    ("self_attn.q_proj.bias", BLOCK),
    ("self_attn.k_proj.bias", BLOCK),
    ("self_attn.v_proj.bias", BLOCK),
)
# Beside the panels: buffers of a prefill, a first piece of cache, the interpreter.
_RESERVE = 1 << 28


def padded(values: int, unit: int = BLOCK) -> int:
    """Round up to a whole number of units."""
    return -(-values // unit) * unit


def kernel_type(dtype: QuantFormat) -> QuantFormat:
    """Return the type that a tensor is computed in: its own where a kernel exists, else F32."""
    return dtype if dtype.name in LAYOUTS else FORMATS["F32"]


class CpuWeights:
    """
    All weights of one model, laid out for the CPU kernels.

    Attributes:
        matrices: int64 [layers, 7, 4]: code, address, blocks of 32 columns, panels.
        vectors: int64 [layers, 5]: addresses of the gains and biases.
        head: int64 [5], as a row of ``matrices``, and the address of the last norm's gain.
        types: Type that each matrix is computed in, by tensor name.
        fallbacks: Matrices whose stored type has no kernel and that were widened to F32, by tensor name.
        nbytes: Bytes of all panels.

    Raises:
        LoadError: The memory that is free does not hold them.
    """

    def __init__(self, validated: ValidatedModel, threads: int) -> None:
        self._kept: list[NDArray[np.generic]] = []
        tensors = validated.tensors
        layers = range(validated.geometry.num_hidden_layers)
        names = [f"model.layers.{layer}.{name}.weight" for layer in layers for name in MATRICES]
        head_name = EMBEDDING if validated.tied else HEAD
        stored = {name: tensors[name].raw.info for name in (*names, head_name)}
        self.types = {name: kernel_type(info.dtype).name for name, info in stored.items()}
        self.fallbacks = tuple(name for name, info in stored.items() if info.dtype.name not in LAYOUTS)
        sizes = {name: LAYOUTS[self.types[name]].nbytes(*info.shape) for name, info in stored.items()}
        self.nbytes = sum(sizes.values())
        require_memory(self.nbytes + _RESERVE, str(validated.checkpoint.path))

        places = _arena(sizes)

        def pack(tensor: Validated | ValidatedHead) -> Bytes:
            packed = panels(tensor, places[tensor.name])
            validated.checkpoint.release(tensor.name)
            return packed

        with ThreadPoolExecutor(threads) as pool:
            head = pool.submit(RepackedHead, validated.head, pack)  # the largest first
            packed = list(pool.map(lambda name: pack(tensors[name]), names))
            self._head = head.result()
        self._kept += packed
        rows = [
            self._row(self.types[name], array, stored[name].shape) for name, array in zip(names, packed, strict=True)
        ]
        self.matrices = np.array(rows, np.int64).reshape(len(layers), len(MATRICES), 4)
        head_row = self._row(self.types[head_name], self._head.data, stored[head_name].shape)
        self.head = np.append(head_row, self._vector(tensors, "model.norm.weight"))
        self.vectors = np.array(
            [[self._vector(tensors, f"model.layers.{n}.{name}") for name, _ in _VECTORS] for n in layers], np.int64
        ).reshape(len(layers), len(_VECTORS))
        self._table = tensors[EMBEDDING].raw

    def embed(self, ids: NDArray[np.int64]) -> Floats:
        """Decode the rows of these tokens from the file's own bytes: float32 [tokens, hidden]."""
        info = self._table.info
        columns = info.shape[1]
        if info.dtype.layout != "row":  # a row is no run of bytes: decode all, once
            return decode_bytes(info.dtype, self._table.data, info.shape)[ids]
        rows = self._table.data.reshape(info.shape[0], -1)[ids]
        return decode_bytes(info.dtype, rows.reshape(-1), (ids.size, columns))

    def _row(self, name: str, data: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.int64]:
        layout = LAYOUTS[name]
        return np.array(
            [layout.code, data.ctypes.data, padded(shape[1]) // BLOCK, padded(shape[0], 16) // 16], np.int64
        )

    def _vector(self, tensors: object, name: str) -> int:
        values = tensors[name].values()  # type: ignore[index]
        row = np.zeros(padded(values.size), np.float32)
        row[: values.size] = values
        self._kept.append(row)
        return int(row.ctypes.data)


def _arena(sizes: Mapping[str, int]) -> dict[str, Bytes]:
    """
    Allocate all panels together, zeroed, each from a cache line on.

    From 4 MiB on numpy asks for pages of 2 MiB; most matrices are smaller, and in pages of 4 KiB the walk through page
    tables took up to half of the rate of a decode step.
    """
    edges = np.cumsum([0, *(padded(size, 64) for size in sizes.values())]).tolist()
    arena = np.zeros(edges[-1] + 64, np.uint8)
    start = -arena.ctypes.data % 64
    return {name: arena[start + at :][:size] for (name, size), at in zip(sizes.items(), edges, strict=False)}


def panels(tensor: Validated | ValidatedHead, out: Bytes | None = None) -> Bytes:
    """
    Lay one admitted matrix out in panels, in its own type where there is a kernel for it, else in F32.

    Args:
        tensor: The matrix.
        out: Where to, zeroed; a fresh array when left out.
    """
    info, data = tensor.raw.info, tensor.raw.data
    rows, columns = prod(info.shape[:-1]), info.shape[-1]
    dtype = kernel_type(info.dtype)
    if dtype is not info.dtype:
        data = tensor.values().reshape(-1).view(np.uint8)
    return repack(dtype, np.ascontiguousarray(data), rows, columns, out)


def available_memory() -> int | None:
    """Return the bytes that this machine can still give, or None where it does not say."""
    try:
        lines: Iterable[str] = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def require_memory(needed: int, path: str) -> None:
    """
    Refuse a model before any work when it cannot fit.

    Raises:
        LoadError: Less is free than needed.
    """
    free = available_memory()
    if free is not None and needed > free:
        raise LoadError(
            f"expected {needed / 1e9:.1f} GB of free memory for {path}, found {free / 1e9:.1f} GB",
            advice="use a smaller type of the model, or --precision reference with layer streaming",
        )

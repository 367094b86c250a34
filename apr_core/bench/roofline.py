"""
The ceiling of decoding: every weight is read once per token, so memory bandwidth bounds the rate.

Two counts of bytes are kept apart. *Stored* bytes are those of the file, which an engine that computes on the stored
types reads per token. *Read* bytes are those that the engine at hand really moves: the torch reference holds float32,
four bytes per parameter, whatever the file holds. A rate is held against the read bytes only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from apr_core.contract.layout import EMBEDDING, HEAD, Geometry
from apr_core.dtypes import QuantFormat
from apr_core.formats.checkpoint import TensorInfo
from apr_core.kernels.cpu.features import has_numba

# Far beyond any cache: a larger buffer reads no faster, and a large model must not need its size twice.
LARGEST_BUFFER = 1 << 29
# A sample of less than this is mostly the cost of starting threads.
_SHORTEST_S = 0.002


@dataclass(frozen=True)
class TokenBytes:
    """
    What one token reads.

    Attributes:
        stored: Bytes in the types of the file.
        elements: Parameters read.
    """

    stored: int
    elements: int

    def read(self, bytes_per_element: int = 4) -> int:
        """Bytes that an engine reads which holds every parameter in so many bytes (4: float32)."""
        return bytes_per_element * self.elements


def bytes_per_token(tensors: Mapping[str, TensorInfo], geometry: Geometry) -> TokenBytes:
    """
    Add up what one token reads, from the tensor table: each tensor once.

    Of an embedding that is not the head too, one row is read; a tied one is read whole, as the head. A tied model that
    stores its head a second time still reads one of the two.
    """
    stored = elements = 0
    for name, info in tensors.items():
        if name == HEAD and geometry.tied:
            continue
        rows = info.shape[0] if name == EMBEDDING and not geometry.tied else 1
        stored += info.nbytes // rows
        elements += math.prod(info.shape) // rows
    return TokenBytes(stored, elements)


def architecture_bytes(types: Mapping[str, QuantFormat], geometry: Geometry) -> int:
    """
    Add up the bytes of all tensors from the architecture's formulas, independently of the table's shapes and sizes.

    Args:
        types: Element type by canonical name: all that is taken from the file.
        geometry: The sizes; every shape is written out here a second time, on purpose.
    """
    g = geometry
    queries, keys = g.num_attention_heads * g.head_dim, g.num_key_value_heads * g.head_dim
    shapes = {
        "self_attn.q_proj.weight": (queries, g.hidden_size),
        "self_attn.k_proj.weight": (keys, g.hidden_size),
        "self_attn.v_proj.weight": (keys, g.hidden_size),
        "self_attn.q_proj.bias": (1, queries),
        "self_attn.k_proj.bias": (1, keys),
        "self_attn.v_proj.bias": (1, keys),
        "self_attn.o_proj.weight": (g.hidden_size, queries),
        "mlp.gate_proj.weight": (g.intermediate_size, g.hidden_size),
        "mlp.up_proj.weight": (g.intermediate_size, g.hidden_size),
        "mlp.down_proj.weight": (g.hidden_size, g.intermediate_size),
        "input_layernorm.weight": (1, g.hidden_size),
        "post_attention_layernorm.weight": (1, g.hidden_size),
    }
    matrices = {f"model.layers.{n}.{name}": shape for n in range(g.num_hidden_layers) for name, shape in shapes.items()}
    matrices |= {EMBEDDING: (g.vocab_size, g.hidden_size), "model.norm.weight": (1, g.hidden_size)}
    if not g.tied:
        matrices[HEAD] = (g.vocab_size, g.hidden_size)
    return sum(_stored(types[name], *shape) for name, shape in matrices.items() if name in types)


def _stored(dtype: QuantFormat, rows: int, columns: int) -> int:
    """Bytes of a matrix, from the block geometry alone."""
    if dtype.layout == "tensor":
        return dtype.block_bytes + rows * columns
    if dtype.layout == "flat":
        return math.ceil(rows * columns / dtype.block_elements) * dtype.block_bytes
    return rows * math.ceil(columns / dtype.block_elements) * dtype.block_bytes


@dataclass
class Bandwidth:
    """
    A buffer of a model's size, read by torch with the threads that torch uses: the ceiling where numba is missing.
    """

    nbytes: int
    samples: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        import torch

        size = max(4096, min(self.nbytes, LARGEST_BUFFER)) // 4
        rows = max(1, math.isqrt(size))
        # ones, not empty or zeros: untouched pages are all one page, which reads at the speed of the cache
        self._matrix = torch.ones(rows, size // rows)
        self._vector = torch.ones(size // rows)

    def sample(self) -> None:
        """Read the buffer by a matrix-vector product and by a sum, and keep the rate of each."""
        self._time(lambda: self._matrix @ self._vector)
        self._time(self._matrix.sum)

    def _time(self, read: Callable[[], object]) -> None:
        read()
        passes, elapsed, start = 0, 0.0, time.perf_counter_ns()
        while elapsed < _SHORTEST_S:
            read()
            passes += 1
            elapsed = (time.perf_counter_ns() - start) * 1e-9
        self.samples.append(passes * self._matrix.nbytes / elapsed / 1e9)


@dataclass
class StreamBandwidth:
    """
    A buffer as large as what one token reads, read in one stream per thread by the widest loads there are.

    The size matters: weights that fit a cache are read faster than memory, and a ceiling measured in memory would then
    be broken by honest tokens.
    """

    nbytes: int
    threads: int
    samples: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        from apr_core.engines.team import Team

        size = max(1 << 14, min(self.nbytes, LARGEST_BUFFER))
        self._part = max(256, size // self.threads // 256 * 256)
        self._buffer = np.ones(self._part * self.threads, np.uint8)
        self._team = Team(self.threads)

    def sample(self) -> None:
        """Read the buffer until it took long enough to time, and keep the rate; 1e9 bytes per second."""
        from apr_core.kernels.cpu.stream import read_all

        base, part = self._buffer.ctypes.data, self._part

        def read(thread: int) -> None:
            read_all(base + thread * part, part)

        self._team.run(read)
        for _ in range(3):
            passes, elapsed, start = 0, 0.0, time.perf_counter_ns()
            while elapsed < _SHORTEST_S:
                self._team.run(read)
                passes += 1
                elapsed = (time.perf_counter_ns() - start) * 1e-9
            self.samples.append(passes * self._buffer.nbytes / elapsed / 1e9)


def ceiling_of(nbytes: int, threads: int) -> Bandwidth | StreamBandwidth:
    """Return the buffer whose reading is the ceiling of a token that reads so many bytes."""
    return StreamBandwidth(nbytes, threads) if has_numba() else Bandwidth(nbytes)

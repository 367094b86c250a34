"""The CPU kernels in the registry, each beside its numpy reference, on every path that this processor has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apr_core.dtypes import FORMATS, QuantFormat
from apr_core.formats.blocks import encode_bf16
from apr_core.formats.codecs import decode_bytes
from apr_core.kernels.cpu import elementwise
from apr_core.kernels.cpu.activations import TILE, quantise_reference, quantise_token, tile_block_bytes
from apr_core.kernels.cpu.features import available_paths
from apr_core.kernels.cpu.matmul import SCRATCH, matmul
from apr_core.kernels.cpu.matvec import matvec
from apr_core.kernels.cpu.panels import BLOCK, LAYOUTS, ROWS, example_bytes, pack_reference
from apr_core.kernels.cpu.repack import repack
from apr_core.kernels.cpu.stream import read_all
from apr_core.kernels.cpu.vec import Mode, multiplies_pairs
from apr_core.kernels.registry import Kernel, register

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

DIGITS = {"speed": 1, "exact": 3}
"""Digits of an activation by precision."""
# Measured on the examples: float32 sums of up to 24 blocks leave below 3e-7.
_FLOAT_ORDER = 1e-6


def _shapes(dtype: QuantFormat, seed: int) -> Iterator[tuple[QuantFormat, Bytes, int, int]]:
    """A whole panel, rows that fill none, several panels with a rest; float types also with odd columns."""
    columns = (7, 63) if dtype.plain else (dtype.block_elements, 3 * dtype.block_elements)
    for rows, count in ((16, columns[0]), (5, columns[1]), (35, 768)):
        yield dtype, example_bytes(dtype, rows, count, seed + rows), rows, count


def _vectors(dtype: QuantFormat) -> Iterator[tuple[QuantFormat, Bytes, int, int, Floats]]:
    """With normal values, with an outlier per block, and zero."""
    random = np.random.default_rng(7)
    for seed, scale in ((1, 1.0), (2, 1e4), (3, 0.0)):
        for example in _shapes(dtype, seed):
            x = random.standard_normal(example[3]).astype(np.float32)
            x[:: BLOCK // 2] *= np.float32(scale)
            yield *example, x if scale else np.zeros_like(x)


def multiply(mode: Mode, dtype: QuantFormat, data: Bytes, rows: int, columns: int, x: Floats) -> Floats:
    """Repack a stored matrix, quantise ``x`` float32 [columns], and return the product, float32 [rows]."""
    panels, blocks = repack(dtype, data, rows, columns), -(-columns // BLOCK)
    values = np.zeros(BLOCK * blocks, np.float32)
    values[:columns] = x
    tile = np.zeros(blocks * tile_block_bytes(1, mode.digits), np.uint8)
    quantise_token(mode, values.ctypes.data, blocks, tile.ctypes.data, 1, 0)
    count = -(-rows // ROWS)
    out = np.full(ROWS * count, np.nan, np.float32)  # what the kernel leaves out stays NaN
    code = LAYOUTS[dtype.name].code
    matvec(mode, code, panels.ctypes.data, blocks, 0, count, tile.ctypes.data, values.ctypes.data, out.ctypes.data)
    return out[:rows]


def multiply_many(mode: Mode, dtype: QuantFormat, data: Bytes, rows: int, columns: int, x: Floats) -> Floats:
    """As `multiply` for ``x`` float32 [tokens, columns], in tiles: float32 [tokens, rows]."""
    panels, blocks = repack(dtype, data, rows, columns), -(-columns // BLOCK)
    count, tokens = -(-rows // ROWS), -(-len(x) // TILE) * TILE
    values = np.zeros((tokens, BLOCK * blocks), np.float32)
    values[: len(x), :columns] = x
    met: NDArray[np.generic] = values
    if _rounds_to_bf16(mode.digits, dtype):
        met = encode_bf16(values.reshape(-1))
        met = met if multiplies_pairs(mode) else decode_bytes(dtype, met, values.shape)
    size = blocks * tile_block_bytes(TILE, mode.digits)
    tiles = np.zeros(tokens // TILE * size, np.uint8)
    for t in range(len(x)):
        at = tiles.ctypes.data + t // TILE * size
        quantise_token(mode, values[t].ctypes.data, blocks, at, TILE, t % TILE)
    out = np.full((tokens, ROWS * count), np.nan, np.float32)
    scratch = np.full(blocks * SCRATCH // 4, np.nan, np.float32)
    code = LAYOUTS[dtype.name].code
    matmul(
        mode, code, panels.ctypes.data, blocks, 0, count, tiles.ctypes.data, met.ctypes.data, tokens // TILE,
        scratch.ctypes.data, out.ctypes.data, out.strides[0],
    )  # fmt: skip
    return out[: len(x), :rows]


def _rounds_to_bf16(digits: int, dtype: QuantFormat) -> bool:
    """`matmul.meets_bf16`, of a prompt."""
    return digits == 1 and dtype.name == "BF16"


def _prompts(dtype: QuantFormat) -> Iterator[tuple[QuantFormat, Bytes, int, int, Floats]]:
    """One token, a tile and a rest."""
    random = np.random.default_rng(8)
    for tokens, example in zip((1, 8, 13), _shapes(dtype, 4), strict=True):
        yield *example, random.standard_normal((tokens, example[3])).astype(np.float32)


def multiply_reference(digits: int, dtype: QuantFormat, data: Bytes, rows: int, columns: int, x: Floats) -> Floats:
    """
    The same in numpy and float64, for ``x`` [columns] or [tokens, columns].

    ``speed`` is held against the product with the vector as it is rounded, ``exact`` against that with the vector
    itself.
    """
    weights = decode_bytes(dtype, data, (rows, columns)).astype(np.float64)
    values = x.astype(np.float64)
    if digits == 1 and not dtype.plain:
        values = quantise_reference(x, 1)
    elif x.ndim == 2 and _rounds_to_bf16(digits, dtype):
        values = decode_bytes(dtype, encode_bf16(x.reshape(-1)), x.shape).astype(np.float64)
    return (values @ weights.T).astype(np.float32)


def _register(path: str, precision: str, dtype: QuantFormat) -> None:
    mode = Mode(path, DIGITS[precision])
    reference = partial(multiply_reference, mode.digits)
    products: tuple[tuple[str, Callable[..., Floats], Callable[..., Iterator[tuple[Any, ...]]]], ...] = (
        ("matvec", multiply, _vectors),
        ("matmul", multiply_many, _prompts),
    )
    for op, run, examples in products:
        register(
            Kernel(
                op,
                dtype.name,
                "cpu",
                path,
                precision,
                partial(run, mode),
                reference,
                partial(examples, dtype),
                _FLOAT_ORDER,
            )
        )


def _row(values: Floats) -> Floats:
    """Pad to whole blocks with zeros, in memory of its own."""
    row = np.zeros(-(-values.size // BLOCK) * BLOCK, np.float32)
    row[: values.size] = values
    return row


def _rms_norm(x: Floats, gain: Floats, eps: float) -> Floats:
    source, scale = _row(x), _row(gain)
    out = np.full(source.size, np.nan, np.float32)
    elementwise.rms_norm(source.ctypes.data, scale.ctypes.data, out.ctypes.data, x.size, source.size, np.float32(eps))
    return out[: x.size]


def _rms_norm_reference(x: Floats, gain: Floats, eps: float) -> Floats:
    wide = x.astype(np.float64)
    return (wide / np.sqrt((wide**2).mean() + eps) * gain).astype(np.float32)


def _norms() -> Iterator[tuple[Floats, Floats, float]]:
    random = np.random.default_rng(9)
    for size in (7, 32, 63, 896):
        yield *random.standard_normal((2, size)).astype(np.float32), 1e-6


def _swiglu(gate: Floats, up: Floats) -> Floats:
    first, second = _row(gate), _row(up)
    out = np.full(first.size, np.nan, np.float32)
    elementwise.swiglu(first.ctypes.data, second.ctypes.data, out.ctypes.data, 0, first.size // 16)
    return out[: gate.size]


def _swiglu_reference(gate: Floats, up: Floats) -> Floats:
    wide = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        return (wide / (1 + np.exp(-wide)) * up).astype(np.float32)


def _gates() -> Iterator[tuple[Floats, Floats]]:
    random = np.random.default_rng(10)
    for size in (5, 64, 63):
        yield 9 * random.standard_normal(size).astype(np.float32), random.standard_normal(size).astype(np.float32)
    yield np.array([-200, -88, -0.0, 0, 88, 200], np.float32), np.ones(6, np.float32)


def _attend(queries: Floats, lengths: tuple[int, ...], keys: Floats, values: Floats) -> Floats:
    """Four queries [4, head_dim] over keys and values [length, head_dim], put into a cache position by position."""
    length, dim = keys.shape
    width = -(-dim // 16) * 16
    panels = np.full((-(-length // 16), dim, 16), np.nan, np.float32)
    rows = np.full((length, width), np.nan, np.float32)
    rows[:, dim:] = 0
    for t in range(length):
        elementwise.cache_position(
            np.ascontiguousarray(keys[t]).ctypes.data,
            np.ascontiguousarray(values[t]).ctypes.data,
            panels.ctypes.data,
            rows.ctypes.data,
            t,
            dim,
            4 * width,
        )
    scores, out = np.full(panels.shape[0] * 64 + 16, np.nan, np.float32), np.full((4, dim + 16), np.nan, np.float32)
    elementwise.attend(
        tuple(query.ctypes.data for query in queries), lengths, panels.ctypes.data, rows.ctypes.data, dim, 4 * width,
        scores.ctypes.data, tuple(row.ctypes.data for row in out),
    )  # fmt: skip
    assert np.isnan(out[:, dim:]).all(), "the next head was written to"
    return out[:, :dim]


def _attend_reference(queries: Floats, lengths: tuple[int, ...], keys: Floats, values: Floats) -> Floats:
    scores = queries.astype(np.float64) @ keys.T / np.sqrt(queries.shape[1])
    scores[np.arange(len(keys)) >= np.array(lengths)[:, None]] = -np.inf
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    return (shares @ values / shares.sum(axis=1, keepdims=True)).astype(np.float32)


def _contexts() -> Iterator[tuple[Floats, tuple[int, ...], Floats, Floats]]:
    """Queries of one token and of four; panels and columns in pairs and alone, whole and with a rest."""
    random = np.random.default_rng(11)
    for lengths, dim in (
        ((1, 1, 1, 1), 2), ((12, 13, 14, 15), 6), ((16, 16, 16, 16), 64), ((16, 17, 17, 17), 32),
        ((61, 62, 63, 63), 24), ((197, 198, 199, 200), 128),
    ):  # fmt: skip
        queries = np.float32(3) * random.standard_normal((4, dim)).astype(np.float32)
        yield queries, lengths, *random.standard_normal((2, lengths[-1], dim)).astype(np.float32)


def _rotate(x: Floats, angles: Floats) -> Floats:
    out, table = x.copy(), np.concatenate([np.cos(angles), np.sin(angles)])
    elementwise.rotate(out.ctypes.data, table.ctypes.data, x.size)
    return out


def _rotate_reference(x: Floats, angles: Floats) -> Floats:
    half = x.size // 2
    pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * angles.astype(np.float64))
    return np.concatenate([pairs.real, pairs.imag]).astype(np.float32)


def _heads() -> Iterator[tuple[Floats, Floats]]:
    random = np.random.default_rng(12)
    for dim in (2, 6, 64):
        yield random.standard_normal(dim).astype(np.float32), random.uniform(0, 6, dim // 2).astype(np.float32)


def _read(values: NDArray[np.int32]) -> int:
    return int(read_all(values.ctypes.data, values.nbytes))


def _read_reference(values: NDArray[np.int32]) -> int:
    return int(values.sum(dtype=np.int32))


def _buffers() -> Iterator[tuple[NDArray[np.int32]]]:
    for words in (64, 6400):
        yield (np.random.default_rng(13).integers(-(2**31), 2**31, words).astype(np.int32),)


register(Kernel("read", "any", "cpu", "numba", "exact", _read, _read_reference, _buffers))
for _op, _run, _reference, _examples in (
    ("rms_norm", _rms_norm, _rms_norm_reference, _norms),
    ("swiglu", _swiglu, _swiglu_reference, _gates),
    ("attention", _attend, _attend_reference, _contexts),
    ("rope", _rotate, _rotate_reference, _heads),
):
    register(Kernel(_op, "any", "cpu", "numba", "exact", _run, _reference, _examples, _FLOAT_ORDER))

for _name in LAYOUTS:
    _dtype = FORMATS[_name]
    register(Kernel("repack", _name, "cpu", "numba", "exact", repack, pack_reference, partial(_shapes, _dtype, 0)))
    for _path in available_paths():
        for _precision in DIGITS:
            _register(_path, _precision, _dtype)

"""The CPU kernels in the registry, each beside its numpy reference, on every path that this processor has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apr_core.dtypes import FORMATS, QuantFormat
from apr_core.formats.codecs import decode_bytes
from apr_core.kernels.cpu.activations import quantise_reference, quantise_token, tile_block_bytes
from apr_core.kernels.cpu.features import available_paths
from apr_core.kernels.cpu.matvec import matvec
from apr_core.kernels.cpu.panels import BLOCK, LAYOUTS, ROWS, example_bytes, pack_reference
from apr_core.kernels.cpu.repack import repack
from apr_core.kernels.cpu.vec import Mode
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


def multiply_reference(digits: int, dtype: QuantFormat, data: Bytes, rows: int, columns: int, x: Floats) -> Floats:
    """
    The same in numpy and float64.

    ``speed`` is held against the product with the quantised vector, ``exact`` against that with the vector itself.
    """
    weights = decode_bytes(dtype, data, (rows, columns)).astype(np.float64)
    quantised = digits == 1 and not dtype.plain
    product: Floats = (weights @ (quantise_reference(x, 1) if quantised else x.astype(np.float64))).astype(np.float32)
    return product


def _register(path: str, precision: str, dtype: QuantFormat) -> None:
    mode = Mode(path, DIGITS[precision])
    examples: Callable[[], Iterator[tuple[Any, ...]]] = partial(_vectors, dtype)
    reference = partial(multiply_reference, mode.digits)
    register(
        Kernel("matvec", dtype.name, "cpu", path, precision, partial(multiply, mode), reference, examples, _FLOAT_ORDER)
    )


for _name in LAYOUTS:
    _dtype = FORMATS[_name]
    register(Kernel("repack", _name, "cpu", "numba", "exact", repack, pack_reference, partial(_shapes, _dtype, 0)))
    for _path in available_paths():
        for _precision in DIGITS:
            _register(_path, _precision, _dtype)

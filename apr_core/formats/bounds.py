"""
How far a value may move when it is stored in a type: the type's own error bound, element by element.

Derived from the codecs' arithmetic, not from a run; the tests hold the bounds against files that llama.cpp wrote.
"""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from apr_core.dtypes import QuantFormat
from apr_core.errors import Unavailable

_Doubles = NDArray[np.float64]

# Stored mantissa bits, exponent of the smallest normal number, and the largest finite value.
_PLAIN = {
    "F16": (10, -14, 65504.0),
    "BF16": (7, -126, float(np.array(0x7F7F0000, np.uint32).view(np.float32))),
    "F8_E4M3": (3, -6, 448.0),
    "F8_E5M2": (2, -14, 57344.0),
}
_EXACT = ("F32", "F64")
# One scale per block, from the largest magnitude: divisor of that magnitude, and the largest code.
_SYMMETRIC = {"Q4_0": (8, 8), "Q5_0": (16, 16), "Q8_0": (127, 127), "AprQ4": (7, 8)}
# One scale and one minimum per block: codes 0 to this number.
_AFFINE = {"Q4_1": 15, "Q5_1": 31}
# Super-blocks of 256: values per sub-block, largest code, largest integer scale, with a minimum or without.
_SUPER = {
    "Q4_K": (32, 15, 63, True),
    "Q5_K": (32, 31, 63, True),
    "Q6_K": (16, 32, 127, False),
}


def step_bound(reference: NDArray[np.float32], dtype: QuantFormat) -> NDArray[np.float32]:
    """
    Bound ``|decode(encode(x)) - x|`` for each element.

    F32, F64: 0. F16, BF16, F8: half a unit in the last place, subnormals included; infinite where the type overflows.
    Q8_0, Q4_1, Q5_1: half a step, plus what rounding the scale to float16 moves the largest code.
    AprQ8: half a step of the whole tensor.
    Q4_0, Q5_0, AprQ4: one step, since the end opposite to the largest magnitude is clipped.
    Q4_K, Q5_K, Q6_K: one step of the sub-block (half for rounding, half for the encoder's search, which may clip the
    ends to fit the middle better), plus the rounding of its scale and minimum to the super-block's integer grid.
    Measured on oracle/mini as written by llama.cpp: the worst element reaches 0.78 of this bound in Q4_K and 0.62 in
    Q6_K, the median one 0.16 and 0.17. Q5_K has no file to measure; our encoder reaches 0.50 on normal noise.

    Args:
        reference: The values before encoding, float32, of the tensor's shape.
        dtype: The type that they were stored in.

    Returns:
        float32, the shape of ``reference``; NaN or infinity where the reference is not finite.

    Raises:
        Unavailable: No bound is known for the type.
    """
    if dtype.name in _EXACT:
        return np.zeros(reference.shape, dtype=np.float32)
    with np.errstate(all="ignore"):
        if dtype.name in _PLAIN:
            bound = _half_ulp(np.abs(reference.astype(np.float64)), *_PLAIN[dtype.name])
        elif dtype.name == "AprQ8":
            largest = np.abs(reference).max(initial=0) / 127
            bound = np.full(reference.shape, largest * (0.5 + 2.0**-16), dtype=np.float64)
        elif dtype.name in _SYMMETRIC or dtype.name in _AFFINE or dtype.name in _SUPER:
            bound = _by_block(reference.astype(np.float64), dtype)
        else:
            raise Unavailable(f"no error bound is known for {dtype}", advice="compare types that have one")
        return np.nextafter(bound.astype(np.float32), np.float32(np.inf))


def _half_ulp(magnitude: _Doubles, mantissa_bits: int, smallest_exponent: int, largest: float) -> _Doubles:
    _, exponent = np.frexp(magnitude)
    bound: _Doubles = np.ldexp(1.0, np.maximum(exponent - 1, smallest_exponent) - mantissa_bits - 1)
    overflows = magnitude >= largest + largest * 2.0 ** -(mantissa_bits + 2)
    return np.where(overflows, np.inf, bound)


def _by_block(reference: _Doubles, dtype: QuantFormat) -> _Doubles:
    """Cut the rows (or the flat stream) into blocks, padded with zeros as a file pads them, and bound each."""
    size = dtype.block_elements
    flat = dtype.layout == "flat" or not reference.shape
    columns = reference.size if flat else reference.shape[-1]
    rows = prod(reference.shape[:-1]) if not flat else 1
    padded = np.pad(reference.reshape(rows, columns), ((0, 0), (0, -columns % size)))
    blocks = padded.reshape(-1, size)
    if dtype.name in _SUPER:
        bound = _super_bound(blocks, *_SUPER[dtype.name])
    elif dtype.name in _AFFINE:
        bound = _affine_bound(blocks, _AFFINE[dtype.name])
    else:
        bound = _symmetric_bound(blocks, dtype.name)
    return bound.reshape(rows, -1)[:, :columns].reshape(reference.shape)


def _half_rounding(scale: _Doubles) -> _Doubles:
    """Bound the rounding of a scale to float16."""
    return _half_ulp(np.abs(scale), *_PLAIN["F16"])


def _symmetric_bound(blocks: _Doubles, name: str) -> _Doubles:
    divisor, largest_code = _SYMMETRIC[name]
    scale = np.abs(blocks).max(axis=1, keepdims=True) / divisor
    steps = 0.5 * (1 + 2.0**-10) if name == "Q8_0" else 1.0
    # A code is |x| / scale rounded, so it is at most half a step larger than that.
    codes = np.minimum(np.abs(blocks) / np.where(scale > 0, scale, 1) + 0.5, largest_code)
    bound: _Doubles = scale * steps + codes * _half_rounding(scale)
    if name == "AprQ4":  # a scale below the smallest normal half reads as zero
        bound = np.where(scale < 2.0**-14, np.abs(blocks), bound)
    return bound


def _affine_bound(blocks: _Doubles, largest_code: int) -> _Doubles:
    low = blocks.min(axis=1, keepdims=True)
    scale = (blocks.max(axis=1, keepdims=True) - low) / largest_code
    shared = scale * 0.5 * (1 + 2.0**-10) + largest_code * _half_rounding(scale) + _half_rounding(low)
    return np.broadcast_to(shared, blocks.shape)


def _super_bound(blocks: _Doubles, width: int, largest_code: int, largest_scale: int, minimum: bool) -> _Doubles:
    parts = blocks.reshape(blocks.shape[0], -1, width)
    low = np.maximum(-parts.min(axis=2), 0) if minimum else np.zeros(parts.shape[:2])
    span = np.maximum(parts.max(axis=2), 0) + low if minimum else np.abs(parts).max(axis=2)
    step = span / largest_code
    # Scales and minima are multiples of the super-block's largest one over ``largest_scale``: half a grid step each,
    # and a little for that largest one being rounded to float16: 2^-11 of it, or 2^-25 where it is subnormal, which
    # the integer scale and the code multiply.
    grid = (0.5 + 2.0**-5) / largest_scale
    top, deepest = step.max(axis=1), low.max(axis=1)
    coarse = largest_scale * 2.0**-25
    shared = largest_code * top * grid + deepest * grid
    shared += np.where(top < largest_scale * 2.0**-14, largest_code * coarse, 0)
    shared += np.where(deepest < largest_scale * 2.0**-14, coarse, 0)
    bound: _Doubles = np.repeat(step + shared[:, None], width, axis=1)
    return bound

"""
Encoders of the block types, many sub-blocks at a time: what `formats.encoders` defines in numpy, bit for bit.

The search of a K-quant takes 16 sub-blocks side by side, one per lane, so that each lane adds its elements in order, as
the scalar search does: no sum is split, no product is fused with a sum. A thread takes a range of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from apr_core.dtypes import FORMATS
from apr_core.formats import encoders
from apr_core.kernels.cpu import vec
from apr_core.kernels.cpu.jit import INLINE, JIT
from apr_core.kernels.cpu.split import HALVES, in_threads
from apr_core.kernels.registry import Kernel, register

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Vector = vec.VectorType

_ONE = np.float32(1)
_ZERO = np.float32(0)
_FOUR = np.int32(4)
_ROW = 64  # bytes of 16 lanes

# Scratch of one thread, in rows of 16 floats: values and weights with a sub-block per lane, then what the search found.
_VALUES, _WEIGHTS, _SCALE, _MINIMUM, _INVERSE, _FLOOR, _ROWS = 0, 32, 64, 65, 66, 67, 68


@njit(**INLINE)
def _half_bits(value: Any) -> Any:
    """Round a float32 to the bits of a float16, ties to even, without an instruction for it."""
    at = np.empty(1, np.float32)
    at[0] = value
    bits = np.int64(at.view(np.uint32)[0])
    sign, magnitude = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    if magnitude >= 0x47800000:
        half = np.int64(0x7C00)
    elif magnitude < 0x38800000:
        half = np.int64(np.rint(abs(value) * np.float32(16777216.0)))
    else:
        half = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - 0x38000000) >> 13
    return sign | half


@njit(**INLINE)
def _put_half(out: Bytes, n: int, at: int, bits: Any) -> None:
    out[n, at] = bits & 255
    out[n, at + 1] = bits >> 8


@njit(**INLINE)
def _row(scratch: int, row: int) -> int:
    return scratch + _ROW * row


@njit(**INLINE)
def _code_vector(v: Vector, low: Vector, high: Vector) -> Vector:
    """Round, clip, keep NaN."""
    return vec.min_f32(vec.max_f32(vec.round_f32(v), low), high)


@njit(**INLINE)
def _sure_codes(v: Vector, low: Vector, high: Vector) -> Vector:
    """Round, clip, and take ``low`` for NaN."""
    return vec.min_f32(vec.max_f32(low, vec.round_f32(v)), high)


@njit(**INLINE)
def _code(value: Any, low: Any, high: Any) -> Any:
    """Round, clip, and take 0 for NaN."""
    rounded = np.rint(value)
    if np.isnan(rounded):
        return _ZERO
    return min(max(rounded, low), high)


# ---- Q4_K and Q5_K


@njit(**INLINE)
def _error(s: int, inverse: Vector, low: Vector, scale: Vector, offset: Vector, largest: Vector) -> Vector:
    """Weighted square error of the codes that ``inverse`` and ``low`` give, decoded with ``scale`` and ``offset``."""
    zero, total = vec.zero_f32(), vec.zero_f32()
    for i in range(32):
        x = vec.load_f32(_row(s, i))
        code = _code_vector(vec.mul_f32(inverse, vec.sub_f32(x, low)), zero, largest)
        off = vec.sub_f32(vec.add_f32(vec.mul_f32(scale, code), offset), x)
        total = vec.add_f32(total, vec.mul_f32(vec.load_f32(_row(s, _WEIGHTS + i)), vec.mul_f32(off, off)))
    return total


@njit(**INLINE)
def _weigh(s: int) -> tuple[Any, Any, Any, Any]:
    """Set the weights; return smallest and largest value, sum of weights, weighted sum of values."""
    first = vec.load_f32(s)
    low, high, squares = first, first, vec.mul_f32(first, first)
    for i in range(1, 32):
        x = vec.load_f32(_row(s, i))
        low, high = vec.min_f32(low, x), vec.max_f32(high, x)
        squares = vec.add_f32(squares, vec.mul_f32(x, x))
    average = vec.sqrt_f32(vec.mul_f32(squares, vec.splat_f32(np.float32(1 / 32))))
    total, weighted = vec.zero_f32(), vec.zero_f32()
    for i in range(32):
        x = vec.load_f32(_row(s, i))
        weight = vec.add_f32(average, vec.abs_f32(x))
        vec.store_f32(_row(s, _WEIGHTS + i), weight)
        total, weighted = vec.add_f32(total, weight), vec.add_f32(weighted, vec.mul_f32(weight, x))
    return vec.min_f32(low, vec.zero_f32()), high, total, weighted


@njit(**INLINE)
def _sums(s: int, inverse: Vector, low: Vector, largest: Vector) -> tuple[Any, Any, Any]:
    """Weighted sums of the codes, of their squares, of code times value."""
    zero = vec.zero_f32()
    codes, squares, products = zero, zero, zero
    for i in range(32):
        x, w = vec.load_f32(_row(s, i)), vec.load_f32(_row(s, _WEIGHTS + i))
        code = _code_vector(vec.mul_f32(inverse, vec.sub_f32(x, low)), zero, largest)
        weighted = vec.mul_f32(w, code)
        codes = vec.add_f32(codes, weighted)
        squares = vec.add_f32(squares, vec.mul_f32(weighted, code))
        products = vec.add_f32(products, vec.mul_f32(weighted, x))
    return codes, squares, products


@njit(**JIT)
def _search_floor(s: int, tries: Floats, count: Any) -> None:
    """
    Search 16 sub-blocks of 32 in the scratch at address ``s``.

    Leaves scale, minimum (to subtract), and the inverse and floor that gave the codes of the best candidate.
    """
    zero, one, largest = vec.zero_f32(), vec.splat_f32(_ONE), vec.splat_f32(count)
    low, high, total, weighted = _weigh(s)
    flat = vec.sub_f32(high, low)
    inverse = vec.div_f32(largest, flat)
    scale = vec.div_f32(one, inverse)
    best, best_inverse, best_floor = _error(s, inverse, low, scale, low, largest), inverse, low
    for k in range(tries.size):
        inverse = vec.div_f32(vec.splat_f32(tries[k]), vec.sub_f32(high, low))
        codes, squares, products = _sums(s, inverse, low, largest)
        determinant = vec.sub_f32(vec.mul_f32(total, squares), vec.mul_f32(codes, codes))
        tried = vec.sub_f32(vec.mul_f32(total, products), vec.mul_f32(weighted, codes))
        tried = vec.div_f32(tried, determinant)
        floor = vec.sub_f32(vec.mul_f32(squares, weighted), vec.mul_f32(codes, products))
        floor = vec.div_f32(floor, determinant)
        tried = vec.select_less(zero, floor, vec.div_f32(products, squares), tried)
        floor = vec.select_less(zero, floor, zero, floor)
        error = _error(s, inverse, low, tried, floor, largest)
        error = vec.select_less(zero, determinant, error, vec.splat_f32(np.float32(np.inf)))
        scale = vec.select_less(error, best, tried, scale)
        best_inverse = vec.select_less(error, best, inverse, best_inverse)
        best_floor = vec.select_less(error, best, low, best_floor)
        low = vec.select_less(error, best, floor, low)
        best = vec.select_less(error, best, error, best)
    vec.store_f32(_row(s, _SCALE), vec.select_less(zero, flat, scale, zero))
    vec.store_f32(_row(s, _MINIMUM), vec.abs_f32(low))
    vec.store_f32(_row(s, _INVERSE), vec.select_less(zero, flat, best_inverse, zero))
    vec.store_f32(_row(s, _FLOOR), best_floor)


@njit(**INLINE)
def _sixth(top: Any) -> Any:
    return np.float32(63) / top if top > 0 else _ZERO


@njit(**INLINE)
def _head(found: Floats, lane: int, out: Bytes, n: int, steps: Floats, table: Floats) -> None:
    """Put eight scales and minima on the grid and pack them; leave the step and offset of each sub-block in steps."""
    top, deepest = _ZERO, _ZERO
    for j in range(8):
        top, deepest = max(top, found[_SCALE, lane + j]), max(deepest, found[_MINIMUM, lane + j])
    d, dmin = _half_bits(top / np.float32(63)), _half_bits(deepest / np.float32(63))
    _put_half(out, n, 0, d)
    _put_half(out, n, 2, dmin)
    a, b = _sixth(top), _sixth(deepest)
    for j in range(8):
        grid = _code(a * found[_SCALE, lane + j], _ZERO, np.float32(63))
        floor = _code(b * found[_MINIMUM, lane + j], _ZERO, np.float32(63))
        steps[j], steps[8 + j] = table[d] * grid, table[dmin] * floor
        g, f = np.int64(grid), np.int64(floor)
        if j < 4:
            out[n, 4 + j], out[n, 8 + j] = g, f
        else:
            out[n, 8 + j] = (g & 15) | ((f & 15) << 4)
            out[n, j] |= (g >> 4) << 6
            out[n, 4 + j] |= (f >> 4) << 6


@njit(**INLINE)
def _final_codes(x: int, step: Any, offset: Any, inverse: Any, floor: Any, count: Any) -> Vector:
    """Code 16 values with the stored step, or with the search's own where the step is zero."""
    zero, largest = vec.zero_f32(), vec.splat_f32(count)
    v = vec.load_f32(x)
    if step == 0:
        v = vec.mul_f32(vec.splat_f32(inverse), vec.sub_f32(v, vec.splat_f32(floor)))
    else:
        v = vec.div_f32(vec.add_f32(v, vec.splat_f32(offset)), vec.splat_f32(step))
    return vec.to_i32(_sure_codes(v, zero, largest))


@njit(**INLINE)
def _put_codes(x: int, p: int, steps: Floats, found: Floats, lane: int, count: Any, fifths: int) -> None:
    """Code the 256 values at ``x`` and pack them at ``p``; fifth bits at ``fifths`` unless that is 0."""
    fifteen = vec.splat_i32(np.int32(15))
    for half in range(2):
        upper = vec.zero_i32()
        for pair in range(4):
            j = 2 * pair
            at = x + 256 * pair + 64 * half
            low = _final_codes(at, steps[j], steps[8 + j], found[_INVERSE, lane + j], found[_FLOOR, lane + j], count)
            j += 1
            high = _final_codes(
                at + 128, steps[j], steps[8 + j], found[_INVERSE, lane + j], found[_FLOOR, lane + j], count
            )
            packed = vec.bit_or(vec.bit_and(low, fifteen), vec.shift_left(vec.bit_and(high, fifteen), _FOUR))
            vec.store_i8(p + 32 * pair + 16 * half, packed)
            upper = vec.bit_or(upper, vec.shift_left(vec.shift_right(low, _FOUR), np.int32(2 * pair)))
            upper = vec.bit_or(upper, vec.shift_left(vec.shift_right(high, _FOUR), np.int32(2 * pair + 1)))
        if fifths != 0:
            vec.store_i8(fifths + 16 * half, upper)


@njit(**JIT)
def _with_floor(
    values: Floats, out: Bytes, start: int, stop: int, table: Floats, tries: Floats, count: Any, five: bool
) -> None:
    """Q4_K and Q5_K: two super-blocks at a time, 16 sub-blocks of 32."""
    found = np.zeros((_ROWS, 16), np.float32)
    steps = np.zeros(16, np.float32)
    s = found.ctypes.data
    for n in range(start, stop, 2):
        for block in range(2):
            for j in range(8):
                for i in range(32):
                    found[i, 8 * block + j] = values[n + block, 32 * j + i] if n + block < stop else _ZERO
        _search_floor(s, tries, count)
        for block in range(min(2, stop - n)):
            _head(found, 8 * block, out, n + block, steps, table)
            x = values.ctypes.data + 1024 * (n + block)
            p = out.ctypes.data + out.shape[1] * (n + block) + 16
            if five:
                _put_codes(x, p + 32, steps, found, 8 * block, count, p)
            else:
                _put_codes(x, p, steps, found, 8 * block, count, 0)


# ---- Q6_K


@njit(**JIT)
def _search_scale(s: int, tries: Floats) -> None:
    """
    Search 16 sub-blocks of 16 in the scratch at address ``s``.

    Leaves the scale, and the inverse that gave the codes of the best candidate.
    """
    zero, low, high = vec.zero_f32(), vec.splat_f32(np.float32(-32)), vec.splat_f32(np.float32(31))
    eps, one = vec.splat_f32(np.float32(1e-15)), vec.splat_f32(_ONE)
    top = vec.load_f32(s)
    for i in range(1, 16):
        x = vec.load_f32(_row(s, i))
        top = vec.select_less(vec.abs_f32(top), vec.abs_f32(x), x, top)
    for i in range(16):
        x = vec.load_f32(_row(s, i))
        vec.store_f32(_row(s, _WEIGHTS + i), vec.mul_f32(vec.mul_f32(x, x), x))
    full = vec.abs_f32(top)
    divisor = vec.select_less(full, eps, one, top)
    scale, best, best_inverse = zero, zero, zero
    for k in range(tries.size):
        inverse = vec.div_f32(vec.splat_f32(tries[k]), divisor)
        products, squares = zero, zero
        for i in range(16):
            x = vec.load_f32(_row(s, i))
            code = _code_vector(vec.mul_f32(inverse, x), low, high)
            products = vec.add_f32(products, vec.mul_f32(vec.load_f32(_row(s, _WEIGHTS + i)), code))
            squares = vec.add_f32(squares, vec.mul_f32(vec.mul_f32(vec.mul_f32(x, x), code), code))
        fitted = vec.select_less(zero, squares, vec.div_f32(products, squares), zero)
        if k == 0:
            scale, best, best_inverse = fitted, vec.mul_f32(fitted, products), inverse
        else:
            now, then = vec.mul_f32(products, products), vec.mul_f32(best, squares)
            now = vec.select_less(zero, squares, now, vec.splat_f32(np.float32(-1)))
            scale = vec.select_less(then, now, fitted, scale)
            best_inverse = vec.select_less(then, now, inverse, best_inverse)
            best = vec.select_less(then, now, vec.mul_f32(fitted, products), best)
    vec.store_f32(_row(s, _SCALE), vec.select_less(full, eps, zero, scale))
    vec.store_f32(_row(s, _INVERSE), vec.select_less(full, eps, vec.splat_f32(np.float32(np.nan)), best_inverse))


@njit(**INLINE)
def _signed_codes(x: int, step: Any, inverse: Any) -> Vector:
    """Code 16 values from 0 to 63 with the stored step; with the search's own where that is zero, 0 if it has none."""
    low, high = vec.splat_f32(np.float32(-32)), vec.splat_f32(np.float32(31))
    v = vec.load_f32(x)
    v = vec.mul_f32(v, vec.splat_f32(inverse)) if step == 0 else vec.div_f32(v, vec.splat_f32(step))
    return vec.add_i32(vec.to_i32(_sure_codes(v, low, high)), vec.splat_i32(np.int32(32)))


@njit(**INLINE)
def _put_six(x: int, p: int, steps: Floats, inverses: Floats) -> None:
    """Code the 256 values at ``x`` and pack them at ``p``."""
    fifteen = vec.splat_i32(np.int32(15))
    for half in range(2):
        for piece in range(2):
            first = 8 * half + piece
            at = x + 512 * half + 64 * piece
            a = _signed_codes(at, steps[first], inverses[first])
            b = _signed_codes(at + 128, steps[first + 2], inverses[first + 2])
            c = _signed_codes(at + 256, steps[first + 4], inverses[first + 4])
            d = _signed_codes(at + 384, steps[first + 6], inverses[first + 6])
            low = vec.bit_or(vec.bit_and(a, fifteen), vec.shift_left(vec.bit_and(c, fifteen), _FOUR))
            vec.store_i8(p + 64 * half + 16 * piece, low)
            low = vec.bit_or(vec.bit_and(b, fifteen), vec.shift_left(vec.bit_and(d, fifteen), _FOUR))
            vec.store_i8(p + 64 * half + 32 + 16 * piece, low)
            upper = vec.bit_or(vec.shift_right(a, _FOUR), vec.shift_left(vec.shift_right(b, _FOUR), np.int32(2)))
            other = vec.bit_or(vec.shift_right(c, _FOUR), vec.shift_left(vec.shift_right(d, _FOUR), np.int32(2)))
            vec.store_i8(p + 128 + 32 * half + 16 * piece, vec.bit_or(upper, vec.shift_left(other, _FOUR)))


@njit(**JIT)
def _q6_k(values: Floats, out: Bytes, start: int, stop: int, table: Floats, tries: Floats) -> None:
    """Q6_K: one super-block at a time, 16 sub-blocks of 16."""
    found = np.zeros((_ROWS, 16), np.float32)
    steps = np.zeros(16, np.float32)
    for n in range(start, stop):
        for j in range(16):
            for i in range(16):
                found[i, j] = values[n, 16 * j + i]
        _search_scale(found.ctypes.data, tries)
        top = found[_SCALE, 0]
        for j in range(1, 16):
            if abs(found[_SCALE, j]) > abs(top):
                top = found[_SCALE, j]
        if abs(top) < np.float32(1e-15):
            out[n] = 0
            continue
        inverse = np.float32(-128) / top
        d = _half_bits(_ONE / inverse)
        _put_half(out, n, 208, d)
        for j in range(16):
            grid = _code(inverse * found[_SCALE, j], np.float32(-128), np.float32(127))
            out[n, 192 + j] = np.int64(grid) & 255
            steps[j] = table[d] * grid
        _put_six(values.ctypes.data + 1024 * n, out.ctypes.data + 210 * n, steps, found[_INVERSE])


# ---- the block types of 32


@njit(**INLINE)
def _inverse_of(scale: Any) -> Any:
    return _ZERO if scale == 0 else _ONE / scale


@njit(**INLINE)
def _half_away(value: Any) -> Any:
    """Round half away from zero; what a denormal scale made infinite or NaN becomes 0, as in the reference."""
    magnitude = abs(value)
    whole = np.floor(magnitude)
    whole += np.floor(np.float32(2) * (magnitude - whole))
    if not whole < np.float32(1e9):
        return np.int32(0)
    return np.int32(whole) if value > 0 else -np.int32(whole)


@njit(**INLINE)
def _cut(value: Any, largest: int) -> Any:
    """Cut off the fraction of a value that is not negative; 0 for what is not finite, as in the reference."""
    if not value < np.float32(1e9):
        return np.int64(0)
    return min(np.int64(value), largest)


@njit(**INLINE)
def _pack(codes: Any, out: Bytes, n: int, at: int, five: bool) -> None:
    """Pack 32 codes from byte ``at`` on: fifth bits where there are five, then nibbles."""
    if five:
        for byte in range(4):
            bits = 0
            for bit in range(8):
                bits |= (codes[8 * byte + bit] >> 4) << bit
            out[n, at + byte] = bits
        at += 4
    for i in range(16):
        out[n, at + i] = (codes[i] & 15) | ((codes[16 + i] & 15) << 4)


@njit(**JIT)
def _q8_0(values: Floats, out: Bytes, start: int, stop: int) -> None:
    for n in range(start, stop):
        largest = _ZERO
        for i in range(32):
            largest = max(largest, abs(values[n, i]))
        scale = largest / np.float32(127)
        inverse = _inverse_of(scale)
        _put_half(out, n, 0, _half_bits(scale))
        for i in range(32):
            out[n, 2 + i] = _half_away(values[n, i] * inverse) & 255


@njit(**JIT)
def _symmetric(values: Floats, out: Bytes, start: int, stop: int, divisor: int) -> None:
    """Q4_0 (divisor 8) and Q5_0 (16)."""
    codes = np.zeros(32, np.int64)
    for n in range(start, stop):
        top = values[n, 0]
        for i in range(1, 32):
            if abs(values[n, i]) > abs(top):
                top = values[n, i]
        scale = top / np.float32(-divisor)
        inverse, middle = _inverse_of(scale), np.float32(divisor + 0.5)
        _put_half(out, n, 0, _half_bits(scale))
        for i in range(32):
            codes[i] = _cut(values[n, i] * inverse + middle, 2 * divisor - 1)
        _pack(codes, out, n, 2, divisor == 16)


@njit(**JIT)
def _affine(values: Floats, out: Bytes, start: int, stop: int, largest: int) -> None:
    """Q4_1 (largest code 15) and Q5_1 (31)."""
    codes = np.zeros(32, np.int64)
    for n in range(start, stop):
        low, high = values[n, 0], values[n, 0]
        for i in range(1, 32):
            low, high = min(low, values[n, i]), max(high, values[n, i])
        scale = (high - low) / np.float32(largest)
        inverse = _inverse_of(scale)
        _put_half(out, n, 0, _half_bits(scale))
        _put_half(out, n, 2, _half_bits(low))
        for i in range(32):
            codes[i] = _cut((values[n, i] - low) * inverse + np.float32(0.5), largest)
        _pack(codes, out, n, 4, largest == 31)


@njit(**JIT)
def _apr_q4(values: Floats, out: Bytes, start: int, stop: int, table: Floats) -> None:
    for n in range(start, stop):
        largest = _ZERO
        for i in range(32):
            largest = max(largest, abs(values[n, i]))
        scale = largest / np.float32(7)
        bits = _half_bits(_ONE if scale == 0 else scale)
        stored = table[bits]
        stored = _ONE if stored == 0 else stored
        _put_half(out, n, 0, bits)
        for i in range(16):
            low = min(max(_half_away(values[n, 2 * i] / stored), -8), 7) + 8
            high = min(max(_half_away(values[n, 2 * i + 1] / stored), -8), 7) + 8
            out[n, 2 + i] = low | (high << 4)


# ---- the Python side


def _floor_tries(first: float, steps: int, largest: int) -> Floats:
    """Numerators of the candidates of `encoders._search_scale_and_minimum`, rounded as it rounds them."""
    steps_of = [np.float32(first) + np.float32(0.1) * np.float32(k) + np.float32(largest) for k in range(steps + 1)]
    return np.array(steps_of, np.float32)


_TRIES_4, _TRIES_5 = _floor_tries(-1.0, 20, 15), _floor_tries(-0.5, 15, 31)
_TRIES_6 = -np.array([np.float32(32) + np.float32(0.1) * np.float32(k) for k in (0, *range(-9, 0), *range(1, 10))])

Run = Callable[[Floats, Bytes, int, int], None]
_KERNELS: dict[str, Run] = {
    "Q4_0": lambda values, out, start, stop: _symmetric(values, out, start, stop, 8),
    "Q5_0": lambda values, out, start, stop: _symmetric(values, out, start, stop, 16),
    "Q4_1": lambda values, out, start, stop: _affine(values, out, start, stop, 15),
    "Q5_1": lambda values, out, start, stop: _affine(values, out, start, stop, 31),
    "Q8_0": _q8_0,
    "Q4_K": lambda values, out, start, stop: _with_floor(
        values, out, start, stop, HALVES, _TRIES_4, np.float32(15), False
    ),
    "Q5_K": lambda values, out, start, stop: _with_floor(
        values, out, start, stop, HALVES, _TRIES_5, np.float32(31), True
    ),
    "Q6_K": lambda values, out, start, stop: _q6_k(values, out, start, stop, HALVES, _TRIES_6),
    "AprQ4": lambda values, out, start, stop: _apr_q4(values, out, start, stop, HALVES),
}


def encode_blocks(name: str, values: Floats, threads: int | None = None) -> Bytes:
    """
    Encode blocks of a type of `ENCODERS`: [n, block_elements] float32 to [n, block_bytes] uint8.

    Args:
        name: The type.
        values: Finite values of whole blocks, of magnitudes below 65504 (`formats.codecs.encode` sees to that).
        threads: How many share the work; by default all cores of this process.
    """
    values = np.ascontiguousarray(values)
    out = np.zeros((values.shape[0], FORMATS[name].block_bytes), dtype=np.uint8)
    kernel = _KERNELS[name]
    in_threads(lambda start, stop: kernel(values, out, start, stop), values.shape[0], values.nbytes, threads)
    return out


ENCODERS: dict[str, Callable[[Floats], Bytes]] = {name: partial(encode_blocks, name) for name in _KERNELS}


def _examples(name: str) -> Iterator[tuple[Floats]]:
    """
    Yield no block, one, an odd number of them.

    Normal noise over many magnitudes, ties, constants, zeros, one sign only, a lone outlier, ramps, float16 subnormal
    scales, denormal values, and the largest that may come.
    """
    width = FORMATS[name].block_elements
    random = np.random.default_rng(width)
    yield (np.zeros((0, width), np.float32),)
    yield (random.standard_normal((1, width)).astype(np.float32),)
    rows = [random.standard_normal((201, width)) * 10.0 ** random.uniform(-9, 4, (201, 1))]
    rows.append(random.integers(-8, 9, (101, width)) / 4)
    rows.append(np.full((3, width), [[0.37], [-0.37], [0.0]]))
    rows.append(np.abs(random.standard_normal((20, width))) * [[(-1.0) ** k] for k in range(20)])
    rows.append(np.where(random.random((50, width)) < 1 / 64, random.standard_normal((50, width)), 0))
    rows.append(np.linspace(-65503, 65503, width)[None, :])
    rows.append(random.standard_normal((40, width)) * 10.0 ** random.uniform(-45, -36, (40, 1)))
    rows.append(random.standard_normal((40, width)) * 10.0 ** random.uniform(-20, -12, (40, 1)))
    yield (np.concatenate(rows).astype(np.float32),)


def _quietly(encoder: Callable[[Floats], Bytes]) -> Callable[[Floats], Bytes]:
    def run(values: Floats) -> Bytes:
        with np.errstate(all="ignore"):
            return encoder(values)

    return run


for _name in _KERNELS:
    register(
        Kernel(
            "encode",
            _name,
            "cpu",
            "numba",
            "exact",
            ENCODERS[_name],
            _quietly(encoders.ENCODERS[_name]),
            partial(_examples, _name),
        )
    )

"""
Panels times one vector: the product that a decode step consists of.

Every weight is read once, in one stream; all arithmetic on it hides behind that read. Integer sums are exact within a
block of 32 columns (16 for Q6_K); between blocks float32 is summed in the order of the columns, so a result has the
same bits however many threads share the panels.

    value = sum over blocks of  d * x_scale * sum(code * digits)  -  the part of zero points or minima
"""

from __future__ import annotations

import numpy as np
from numba import njit

from apr_core.kernels.cpu import codes, vec
from apr_core.kernels.cpu.activations import block_bytes, scale_at, sums_at, total_at
from apr_core.kernels.cpu.features import bytes_ahead
from apr_core.kernels.cpu.jit import INLINE, JIT

_BASE = np.float32(256)
_AHEAD = bytes_ahead()


@njit(**INLINE)
def _ask_ahead(w: int, nbytes: int) -> None:
    """Ask for what stands where this block's successor by `_AHEAD` bytes will be read; ``nbytes`` is a constant."""
    if _AHEAD > 0:
        for at in range(0, nbytes, 64):
            vec.prefetch(w + _AHEAD + at)


@njit(**INLINE)
def whole_product(mode: vec.Mode, w: codes.Chunks, zero: int, block: int, width: int, token: int) -> codes.Vector:
    """
    Codes minus ``zero`` times the digits of one token over a block of 32 columns: float32 of the combined digits.

    The two halves run as two chains, which hides the latency of the dot product.
    """
    digits = vec.digits_of(mode)
    result = vec.zero_f32()
    for s in range(digits):
        start = vec.zero_i32()
        if zero != 0:
            sums = sums_at(block, width, digits, token, s)
            start = vec.splat_i32(np.int32(-zero) * (vec.read_i32(sums) + vec.read_i32(sums + 4)))
        at = block + 32 * (token * digits + s)
        first = codes.half_product(mode, w, 0, at, start)
        second = codes.half_product(mode, w, 1, at, vec.zero_i32())
        product = vec.to_f32(vec.add_i32(first, second))
        result = product if s == 0 else vec.fma(result, vec.splat_f32(_BASE), product)
    return result


@njit(**INLINE)
def part_product(
    mode: vec.Mode, w: codes.Chunks, zero: int, half: int, block: int, width: int, token: int
) -> codes.Vector:
    """As `whole_product` over 16 of the columns."""
    digits = vec.digits_of(mode)
    result = vec.zero_f32()
    for s in range(digits):
        total = vec.read_i32(sums_at(block, width, digits, token, s) + 4 * half)
        start = vec.splat_i32(np.int32(-zero) * total)
        at = block + 32 * (token * digits + s)
        product = vec.to_f32(codes.half_product(mode, w, half, at, start))
        result = product if s == 0 else vec.fma(result, vec.splat_f32(_BASE), product)
    return result


@njit(**JIT)
def _q8_0(mode: vec.Mode, w: int, blocks: int, x: int) -> codes.Vector:
    digits = vec.digits_of(mode)
    result = vec.zero_f32()
    for _ in range(blocks):
        product = whole_product(mode, codes.bytes_at(w + 32), 128, x, 1, 0)
        scale = vec.mul_f32(vec.load_f16(mode, w), vec.broadcast_f32(scale_at(x, 1, digits, 0)))
        result = vec.fma(product, scale, result)
        w += 544
        x += block_bytes(1, digits)
    return result


@njit(**JIT)
def _q5_0(mode: vec.Mode, w: int, blocks: int, x: int) -> codes.Vector:
    digits = vec.digits_of(mode)
    result = vec.zero_f32()
    for _ in range(blocks):
        _ask_ahead(w, 352)
        product = whole_product(mode, codes.five_bits_at(w + 32), 16, x, 1, 0)
        scale = vec.mul_f32(vec.load_f16(mode, w), vec.broadcast_f32(scale_at(x, 1, digits, 0)))
        result = vec.fma(product, scale, result)
        w += 352
        x += block_bytes(1, digits)
    return result


@njit(**JIT)
def _q4_0(mode: vec.Mode, w: int, blocks: int, x: int) -> codes.Vector:
    digits = vec.digits_of(mode)
    result = vec.zero_f32()
    for _ in range(blocks):
        _ask_ahead(w, 288)
        product = whole_product(mode, codes.nibbles_at(w + 32), 8, x, 1, 0)
        scale = vec.mul_f32(vec.load_f16(mode, w), vec.broadcast_f32(scale_at(x, 1, digits, 0)))
        result = vec.fma(product, scale, result)
        w += 288
        x += block_bytes(1, digits)
    return result


@njit(**INLINE)
def _super_blocks(mode: vec.Mode, w: int, blocks: int, x: int, fifth: bool) -> codes.Vector:
    """Q4_K, and with ``fifth`` bits Q5_K: eight blocks share d and dmin, each has a scale and a minimum."""
    digits = vec.digits_of(mode)
    result = vec.zero_f32()
    for _ in range(blocks // 8):
        product, minimum = vec.zero_f32(), vec.zero_f32()
        d, dmin = vec.load_f16(mode, w), vec.load_f16(mode, w + 32)
        w += 64
        for _j in range(8):
            _ask_ahead(w, 352 if fifth else 288)
            chunks = codes.five_bits_at(w + 32) if fifth else codes.nibbles_at(w + 32)
            scale = vec.mul_f32(vec.to_f32(vec.load_u8(w)), vec.broadcast_f32(scale_at(x, 1, digits, 0)))
            product = vec.fma(whole_product(mode, chunks, 0, x, 1, 0), scale, product)
            total = vec.broadcast_f32(total_at(x, 1, digits, 0))
            minimum = vec.fma(vec.to_f32(vec.load_u8(w + 16)), total, minimum)
            w += 352 if fifth else 288
            x += block_bytes(1, digits)
        result = vec.fma(d, product, result)
        result = vec.sub_f32(result, vec.mul_f32(dmin, minimum))
    return result


@njit(**JIT)
def _q4_k(mode: vec.Mode, w: int, blocks: int, x: int) -> codes.Vector:
    return _super_blocks(mode, w, blocks, x, False)


@njit(**JIT)
def _q5_k(mode: vec.Mode, w: int, blocks: int, x: int) -> codes.Vector:
    return _super_blocks(mode, w, blocks, x, True)


@njit(**JIT)
def _q6_k(mode: vec.Mode, w: int, blocks: int, x: int) -> codes.Vector:
    digits = vec.digits_of(mode)
    result = vec.zero_f32()
    for _ in range(blocks // 8):
        product = vec.zero_f32()
        d = vec.load_f16(mode, w)
        w += 32
        for _j in range(8):
            _ask_ahead(w, 416)
            chunks = codes.six_bits_at(w + 32)
            scale = vec.broadcast_f32(scale_at(x, 1, digits, 0))
            first = vec.mul_f32(part_product(mode, chunks, 32, 0, x, 1, 0), vec.to_f32(vec.load_i8(w)))
            both = vec.fma(part_product(mode, chunks, 32, 1, x, 1, 0), vec.to_f32(vec.load_i8(w + 16)), first)
            product = vec.fma(both, scale, product)
            w += 416
            x += block_bytes(1, digits)
        result = vec.fma(d, product, result)
    return result


@njit(**INLINE)
def load_column(mode: vec.Mode, w: int, kind: int) -> codes.Vector:
    """One column of a panel of floats; ``kind`` 6 is F16, 8 F32, a constant."""
    return vec.load_f16(mode, w) if kind == 6 else vec.load_f32(w)


@njit(**INLINE)
def _floats(mode: vec.Mode, w: int, blocks: int, x: int, kind: int) -> codes.Vector:
    """Float weights times float32 values: four chains of columns, added at the end."""
    step = 64 if kind == 8 else 32
    a, b, c, d = vec.zero_f32(), vec.zero_f32(), vec.zero_f32(), vec.zero_f32()
    for _ in range(8 * blocks):
        a = vec.fma(load_column(mode, w, kind), vec.broadcast_f32(x), a)
        b = vec.fma(load_column(mode, w + step, kind), vec.broadcast_f32(x + 4), b)
        c = vec.fma(load_column(mode, w + 2 * step, kind), vec.broadcast_f32(x + 8), c)
        d = vec.fma(load_column(mode, w + 3 * step, kind), vec.broadcast_f32(x + 12), d)
        w += 4 * step
        x += 16
    return vec.add_f32(vec.add_f32(a, b), vec.add_f32(c, d))


@njit(**JIT)
def _f16(mode: vec.Mode, w: int, blocks: int, x: int) -> codes.Vector:
    return _floats(mode, w, blocks, x, 6)


@njit(**JIT)
def _bf16(w: int, blocks: int, x: int) -> codes.Vector:
    """As `_floats`, of pairs of columns."""
    a, b, c, d = vec.zero_f32(), vec.zero_f32(), vec.zero_f32(), vec.zero_f32()
    for _ in range(8 * blocks):
        first, second = vec.load_i32(w), vec.load_i32(w + 64)
        a = vec.fma(vec.lower_bf16(first), vec.broadcast_f32(x), a)
        b = vec.fma(vec.upper_bf16(first), vec.broadcast_f32(x + 4), b)
        c = vec.fma(vec.lower_bf16(second), vec.broadcast_f32(x + 8), c)
        d = vec.fma(vec.upper_bf16(second), vec.broadcast_f32(x + 12), d)
        w += 128
        x += 16
    return vec.add_f32(vec.add_f32(a, b), vec.add_f32(c, d))


@njit(**JIT)
def _f32(mode: vec.Mode, w: int, blocks: int, x: int) -> codes.Vector:
    return _floats(mode, w, blocks, x, 8)


@njit(**JIT)
def matvec(
    mode: vec.Mode, code: int, w: int, blocks: int, first: int, stop: int, tile: int, values: int, out: int
) -> None:
    """
    Multiply panels ``first`` to ``stop`` with one vector.

    Args:
        mode: Path and digits.
        code: `Layout.code` of the type.
        w: Address of panel 0.
        blocks: Blocks of 32 columns.
        first: First panel.
        stop: Panel behind the last.
        tile: Address of the quantised vector, width 1 (read by types with codes).
        values: Address of the vector, float32 [32 * blocks] (read by float types).
        out: Address of float32 [16 * panels]; rows of these panels are written.
    """
    for panel in range(first, stop):
        if code == 0:
            result = _q8_0(mode, w + panel * blocks * 544, blocks, tile)
        elif code == 1:
            result = _q5_0(mode, w + panel * blocks * 352, blocks, tile)
        elif code == 2:
            result = _q4_0(mode, w + panel * blocks * 288, blocks, tile)
        elif code == 3:
            result = _q4_k(mode, w + panel * (blocks // 8) * 2368, blocks, tile)
        elif code == 4:
            result = _q5_k(mode, w + panel * (blocks // 8) * 2880, blocks, tile)
        elif code == 5:
            result = _q6_k(mode, w + panel * (blocks // 8) * 3360, blocks, tile)
        elif code == 6:
            result = _f16(mode, w + panel * blocks * 1024, blocks, values)
        elif code == 7:
            result = _bf16(w + panel * blocks * 1024, blocks, values)
        else:
            result = _f32(mode, w + panel * blocks * 2048, blocks, values)
        vec.store_f32(out + 64 * panel, result)

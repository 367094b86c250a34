"""
What stands between the products: RMSNorm, RoPE, SwiGLU, softmax and attention over the cache.

Rows are float32, padded with zeros to a multiple of 32 values, and handled 16 lanes at a time. The cache of one
key-value head holds keys in panels of 16 positions, [position / 16][head_dim][16] float32, so that scores of 16
positions come from one sequential stream without a sum across lanes; values are rows of head_dim, padded to 16.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from apr_core.kernels.cpu import vec
from apr_core.kernels.cpu.jit import INLINE, JIT

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)  # nine bits: its product with an exponent is exact
_LN2_LOW = np.float32(-2.12194440e-4)
_LARGEST, _SMALLEST = np.float32(88.0), np.float32(-87.0)
_C2, _C3, _C4 = np.float32(5.0000001201e-1), np.float32(1.6666665459e-1), np.float32(4.1665795894e-2)
_C5, _C6, _C7 = np.float32(8.3334519073e-3), np.float32(1.3981999507e-3), np.float32(1.9875691500e-4)
_ONE = np.float32(1)


@njit(**INLINE)
def exp(x: vec.VectorType) -> vec.VectorType:
    """
    Exponential of 16 float32, within 2 units in the last place between -87 and 88 and held at those ends; NaN stays.

    Source: the polynomial of Cephes ``expf``.
    """
    x = vec.max_f32(vec.min_f32(x, vec.splat_f32(_LARGEST)), vec.splat_f32(_SMALLEST))
    n = vec.round_f32(vec.mul_f32(x, vec.splat_f32(_LOG2E)))
    minus = vec.sub_f32(vec.zero_f32(), n)
    r = vec.fma(minus, vec.splat_f32(_LN2_HIGH), x)
    r = vec.fma(minus, vec.splat_f32(_LN2_LOW), r)
    p = vec.fma(vec.splat_f32(_C7), r, vec.splat_f32(_C6))
    p = vec.fma(p, r, vec.splat_f32(_C5))
    p = vec.fma(p, r, vec.splat_f32(_C4))
    p = vec.fma(p, r, vec.splat_f32(_C3))
    p = vec.fma(p, r, vec.splat_f32(_C2))
    p = vec.add_f32(vec.fma(vec.mul_f32(p, r), r, r), vec.splat_f32(_ONE))
    power = vec.shift_left(vec.add_i32(vec.to_i32(n), vec.splat_i32(np.int32(127))), np.int32(23))
    return vec.mul_f32(p, vec.as_f32(power))


@njit(**JIT)
def rms_norm(x: int, gain: int, out: int, n: int, padded: int, eps: np.float32) -> None:
    """``x / sqrt(mean(x ** 2) + eps) * gain`` of one row of ``n`` values, padded with zeros."""
    total = vec.zero_f32()
    for i in range(0, 4 * padded, 64):
        v = vec.load_f32(x + i)
        total = vec.fma(v, v, total)
    scale = vec.splat_f32(_ONE / np.sqrt(vec.sum_f32(total) / np.float32(n) + eps))
    for i in range(0, 4 * padded, 64):
        vec.store_f32(out + i, vec.mul_f32(vec.mul_f32(vec.load_f32(x + i), scale), vec.load_f32(gain + i)))


@njit(**INLINE)
def add_rows(x: int, y: int, out: int, first: int, stop: int) -> None:
    """``out = x + y`` for panels of 16 values ``first`` to ``stop``."""
    for i in range(64 * first, 64 * stop, 64):
        vec.store_f32(out + i, vec.add_f32(vec.load_f32(x + i), vec.load_f32(y + i)))


@njit(**JIT)
def swiglu(gate: int, up: int, out: int, first: int, stop: int) -> None:
    """``out = gate / (1 + exp(-gate)) * up`` for panels of 16 values ``first`` to ``stop``."""
    one = vec.splat_f32(_ONE)
    for i in range(64 * first, 64 * stop, 64):
        g = vec.load_f32(gate + i)
        share = vec.add_f32(one, exp(vec.sub_f32(vec.zero_f32(), g)))
        vec.store_f32(out + i, vec.mul_f32(vec.div_f32(g, share), vec.load_f32(up + i)))


@njit(**JIT)
def rotate(x: int, table: int, head_dim: int) -> None:
    """
    RoPE of one head in place: value i is paired with i + head_dim / 2.

    Args:
        x: Address of float32 [head_dim].
        table: Address of the position's cosines, then sines, float32 [2, head_dim / 2].
        head_dim: An even number.
    """
    half = head_dim // 2
    for i in range(half):
        cosine, sine = vec.read_f32(table + 4 * i), vec.read_f32(table + 4 * (half + i))
        a, b = vec.read_f32(x + 4 * i), vec.read_f32(x + 4 * (half + i))
        vec.write_f32(x + 4 * i, a * cosine - b * sine)
        vec.write_f32(x + 4 * (half + i), b * cosine + a * sine)


@njit(**JIT)
def cache_position(key: int, value: int, keys: int, values: int, position: int, head_dim: int, row: int) -> None:
    """Write one head's rotated key and its value at a position of the cache; ``row`` is bytes per value row."""
    panel = keys + position // 16 * 64 * head_dim + 4 * (position % 16)
    for i in range(head_dim):
        vec.write_f32(panel + 64 * i, vec.read_f32(key + 4 * i))
        vec.write_f32(values + position * row + 4 * i, vec.read_f32(value + 4 * i))


@njit(**INLINE)
def _dot_panel(query: int, panel: int, head_dim: int) -> vec.VectorType:
    """Products of one query with the keys of 16 positions."""
    a, b, c, d = vec.zero_f32(), vec.zero_f32(), vec.zero_f32(), vec.zero_f32()
    whole = head_dim // 4 * 4
    for i in range(0, whole, 4):
        at, x = panel + 64 * i, query + 4 * i
        a = vec.fma(vec.load_f32(at), vec.broadcast_f32(x), a)
        b = vec.fma(vec.load_f32(at + 64), vec.broadcast_f32(x + 4), b)
        c = vec.fma(vec.load_f32(at + 128), vec.broadcast_f32(x + 8), c)
        d = vec.fma(vec.load_f32(at + 192), vec.broadcast_f32(x + 12), d)
    for i in range(whole, head_dim):
        a = vec.fma(vec.load_f32(panel + 64 * i), vec.broadcast_f32(query + 4 * i), a)
    return vec.add_f32(vec.add_f32(a, b), vec.add_f32(c, d))


@njit(**JIT)
def attend(query: int, keys: int, values: int, length: int, head_dim: int, row: int, scores: int, out: int) -> None:
    """
    Softmax of one query's scores over ``length`` positions, times their values.

    Args:
        query: Address of float32 [head_dim], rotated.
        keys: Address of the head's key panels.
        values: Address of the head's value rows.
        length: Positions to attend to; what lies behind them in the last panel has no influence.
        head_dim: Values per head.
        row: Bytes of a value row.
        scores: Address of float32 [16 * ceil(length / 16)] for this thread alone.
        out: Address of float32 [head_dim].
    """
    scale = vec.splat_f32(_ONE / np.float32(np.sqrt(np.float32(head_dim))))
    panels = (length + 15) // 16
    highest = vec.splat_f32(np.float32(-np.inf))
    for p in range(panels):
        vec.store_f32(scores + 64 * p, vec.mul_f32(_dot_panel(query, keys + p * 64 * head_dim, head_dim), scale))
        if 16 * p + 16 > length:
            for t in range(length, 16 * panels):
                vec.write_f32(scores + 4 * t, np.float32(-np.inf))
        highest = vec.max_f32(highest, vec.load_f32(scores + 64 * p))
    highest = vec.splat_f32(vec.max_of_f32(highest))
    total = vec.zero_f32()
    for p in range(panels):
        vec.store_f32(scores + 64 * p, exp(vec.sub_f32(vec.load_f32(scores + 64 * p), highest)))
        if 16 * p + 16 > length:  # `exp` is held above zero
            for t in range(length, 16 * panels):
                vec.write_f32(scores + 4 * t, np.float32(0))
        total = vec.add_f32(total, vec.load_f32(scores + 64 * p))
    inverse = vec.splat_f32(_ONE / vec.sum_f32(total))
    for i in range(0, row, 64):
        column = values + i
        a, b, c, d = vec.zero_f32(), vec.zero_f32(), vec.zero_f32(), vec.zero_f32()
        whole = length // 4 * 4
        for t in range(0, whole, 4):
            a = vec.fma(vec.load_f32(column + t * row), vec.broadcast_f32(scores + 4 * t), a)
            b = vec.fma(vec.load_f32(column + (t + 1) * row), vec.broadcast_f32(scores + 4 * t + 4), b)
            c = vec.fma(vec.load_f32(column + (t + 2) * row), vec.broadcast_f32(scores + 4 * t + 8), c)
            d = vec.fma(vec.load_f32(column + (t + 3) * row), vec.broadcast_f32(scores + 4 * t + 12), d)
        for t in range(whole, length):
            a = vec.fma(vec.load_f32(column + t * row), vec.broadcast_f32(scores + 4 * t), a)
        mixed = vec.mul_f32(vec.add_f32(vec.add_f32(a, b), vec.add_f32(c, d)), inverse)
        if i + 64 <= 4 * head_dim:
            vec.store_f32(out + i, mixed)
        else:  # the last lanes are padding: behind them lies another head
            vec.store_f32(scores, mixed)
            for k in range(head_dim % 16):
                vec.write_f32(out + i + 4 * k, vec.read_f32(scores + 4 * k))

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

Four = tuple[int, int, int, int]
Floats = tuple[float, float, float, float]
Vectors = tuple[vec.VectorType, vec.VectorType, vec.VectorType, vec.VectorType]


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
def add_four(vector: vec.VectorType, at: Four, offset: int, sums: Vectors) -> Vectors:
    """Add one vector times a float32 of each of four rows."""
    return (
        vec.fma(vector, vec.broadcast_f32(at[0] + offset), sums[0]),
        vec.fma(vector, vec.broadcast_f32(at[1] + offset), sums[1]),
        vec.fma(vector, vec.broadcast_f32(at[2] + offset), sums[2]),
        vec.fma(vector, vec.broadcast_f32(at[3] + offset), sums[3]),
    )


@njit(**INLINE)
def four_zeros() -> Vectors:
    """Where sums of `add_four` begin."""
    z = vec.zero_f32()
    return z, z, z, z


@njit(**INLINE)
def _keep_scores(even: Vectors, odd: Vectors, scale: vec.VectorType, scores: Four, offset: int) -> None:
    vec.store_f32(scores[0] + offset, vec.mul_f32(vec.add_f32(even[0], odd[0]), scale))
    vec.store_f32(scores[1] + offset, vec.mul_f32(vec.add_f32(even[1], odd[1]), scale))
    vec.store_f32(scores[2] + offset, vec.mul_f32(vec.add_f32(even[2], odd[2]), scale))
    vec.store_f32(scores[3] + offset, vec.mul_f32(vec.add_f32(even[3], odd[3]), scale))


@njit(**JIT)
def _dot_panels(queries: Four, keys: int, panels: int, head_dim: int, scores: Four) -> None:
    """Scores of four queries with the keys of all panels, two panels at a time; an odd last one is met twice."""
    scale = vec.splat_f32(_ONE / np.float32(np.sqrt(np.float32(head_dim))))
    for p in range(0, panels, 2):
        second = min(p + 1, panels - 1)
        at, other = keys + p * 64 * head_dim, keys + second * 64 * head_dim
        a, b, c, d = four_zeros(), four_zeros(), four_zeros(), four_zeros()
        for i in range(0, 4 * head_dim, 8):
            a = add_four(vec.load_f32(at), queries, i, a)
            b = add_four(vec.load_f32(at + 64), queries, i + 4, b)
            c = add_four(vec.load_f32(other), queries, i, c)
            d = add_four(vec.load_f32(other + 64), queries, i + 4, d)
            at, other = at + 128, other + 128
        _keep_scores(a, b, scale, scores, 64 * p)
        _keep_scores(c, d, scale, scores, 64 * second)


@njit(**JIT)
def _softmax(scores: int, length: int, panels: int) -> float:
    """Replace scores by their exponentials, zero from ``length`` on, and return one over their sum."""
    for t in range(length, 16 * panels):
        vec.write_f32(scores + 4 * t, np.float32(-np.inf))
    highest = vec.splat_f32(np.float32(-np.inf))
    for p in range(panels):
        highest = vec.max_f32(highest, vec.load_f32(scores + 64 * p))
    highest = vec.splat_f32(vec.max_of_f32(highest))
    total = vec.zero_f32()
    for p in range(panels):
        shares = exp(vec.sub_f32(vec.load_f32(scores + 64 * p), highest))
        vec.store_f32(scores + 64 * p, shares)
        if 16 * p + 16 > length:  # `exp` is held above zero
            for t in range(max(length, 16 * p), 16 * p + 16):
                vec.write_f32(scores + 4 * t, np.float32(0))
        total = vec.add_f32(total, vec.load_f32(scores + 64 * p))
    return _ONE / vec.sum_f32(total)


@njit(**JIT)
def _keep_mixed(
    even: vec.VectorType, odd: vec.VectorType, inverse: float, column: int, row: int, first: int, length: int,
    scores: int, out: int, lanes: int, spare: int,
) -> None:  # fmt: skip
    """Add the positions from ``first``, an even one, that this query alone sees, and store so many lanes."""
    for t in range(first, length):
        share = vec.broadcast_f32(scores + 4 * t)
        if t % 2 == 0:
            even = vec.fma(vec.load_f32(column + t * row), share, even)
        else:
            odd = vec.fma(vec.load_f32(column + t * row), share, odd)
    mixed = vec.mul_f32(vec.add_f32(even, odd), vec.splat_f32(np.float32(inverse)))
    if lanes >= 16:
        vec.store_f32(out, mixed)
    else:  # behind them lies another head
        vec.store_f32(spare, mixed)
        for k in range(lanes):
            vec.write_f32(out + 4 * k, vec.read_f32(spare + 4 * k))


@njit(**INLINE)
def _keep_four(
    even: Vectors, odd: Vectors, inverse: Floats, column: int, row: int, first: int, lengths: Four, scores: Four,
    outs: Four, offset: int, head_dim: int, spare: int,
) -> None:  # fmt: skip
    """`_keep_mixed` of four queries, at the same offset of their results."""
    lanes = head_dim - offset // 4
    _keep_mixed(
        even[0], odd[0], inverse[0], column, row, first, lengths[0], scores[0], outs[0] + offset, lanes, spare
    )  # fmt: skip
    _keep_mixed(
        even[1], odd[1], inverse[1], column, row, first, lengths[1], scores[1], outs[1] + offset, lanes, spare
    )  # fmt: skip
    _keep_mixed(
        even[2], odd[2], inverse[2], column, row, first, lengths[2], scores[2], outs[2] + offset, lanes, spare
    )  # fmt: skip
    _keep_mixed(
        even[3], odd[3], inverse[3], column, row, first, lengths[3], scores[3], outs[3] + offset, lanes, spare
    )  # fmt: skip


@njit(**JIT)
def attend(
    queries: Four, lengths: Four, keys: int, values: int, head_dim: int, row: int, scores: int, outs: Four
) -> None:
    """
    For each of four queries, softmax of its scores over its positions, times their values.

    The four share a key-value head: keys and values are read once for all of them. What one query gets does not depend
    on the others, bit for bit, so a query may be given several times to make four.

    Args:
        queries: Addresses of float32 [head_dim], rotated; head_dim is even.
        lengths: Positions that each attends to, none shorter than the one before it; what lies behind them in the last
            panel has no influence.
        keys: Address of the head's key panels.
        values: Address of the head's value rows.
        head_dim: Values per head.
        row: Bytes of a value row.
        scores: Address of float32 [4, 16 * ceil(longest / 16)] and 16 more, for this thread alone.
        outs: Addresses of float32 [head_dim].
    """
    panels = (lengths[3] + 15) // 16
    span = 64 * panels
    at = (scores, scores + span, scores + 2 * span, scores + 3 * span)
    _dot_panels(queries, keys, panels, head_dim, at)
    inverse = (
        _softmax(at[0], lengths[0], panels), _softmax(at[1], lengths[1], panels),
        _softmax(at[2], lengths[2], panels), _softmax(at[3], lengths[3], panels),
    )  # fmt: skip
    common = lengths[0] // 2 * 2
    for i in range(0, row, 128):
        second = min(i + 64, row - 64)
        a, b, c, d = four_zeros(), four_zeros(), four_zeros(), four_zeros()
        column, other = values + i, values + second
        for t in range(0, common, 2):
            here, there = column + t * row, other + t * row
            a = add_four(vec.load_f32(here), at, 4 * t, a)
            b = add_four(vec.load_f32(here + row), at, 4 * t + 4, b)
            c = add_four(vec.load_f32(there), at, 4 * t, c)
            d = add_four(vec.load_f32(there + row), at, 4 * t + 4, d)
        spare = scores + 4 * span
        _keep_four(a, b, inverse, column, row, common, lengths, at, outs, i, head_dim, spare)
        if second > i:
            _keep_four(c, d, inverse, other, row, common, lengths, at, outs, second, head_dim, spare)

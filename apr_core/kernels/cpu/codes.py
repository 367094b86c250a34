"""
One block of a panel, 16 rows by 32 columns, as eight vectors of unsigned byte codes, ready for the dot product.

Chunk c of the result holds columns 4c to 4c + 3, a row per lane. `panels` says how each type lies in memory.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from apr_core.kernels.cpu import vec
from apr_core.kernels.cpu.jit import INLINE

Vector = vec.VectorType
Chunks = tuple[Vector, Vector, Vector, Vector, Vector, Vector, Vector, Vector]

_NIBBLE = np.int32(0x0F0F0F0F)
_FIFTH = np.int32(0x10101010)
_UPPER = np.int32(0x30303030)
_FOUR = np.int32(4)


@njit(**INLINE)
def bytes_at(p: int) -> Chunks:
    """Whole bytes: 512 of them."""
    return (
        vec.load_i32(p),
        vec.load_i32(p + 64),
        vec.load_i32(p + 128),
        vec.load_i32(p + 192),
        vec.load_i32(p + 256),
        vec.load_i32(p + 320),
        vec.load_i32(p + 384),
        vec.load_i32(p + 448),
    )


@njit(**INLINE)
def low_nibble(w: Vector) -> Vector:
    """The lower four bits of each byte."""
    return vec.bit_and(w, vec.splat_i32(_NIBBLE))


@njit(**INLINE)
def high_nibble(w: Vector) -> Vector:
    """The upper four bits of each byte."""
    return vec.bit_and(vec.shift_right(w, _FOUR), vec.splat_i32(_NIBBLE))


@njit(**INLINE)
def nibbles_at(p: int) -> Chunks:
    """Four chunks of nibbles: 256 bytes."""
    a, b, c, d = vec.load_i32(p), vec.load_i32(p + 64), vec.load_i32(p + 128), vec.load_i32(p + 192)
    return (
        low_nibble(a),
        low_nibble(b),
        low_nibble(c),
        low_nibble(d),
        high_nibble(a),
        high_nibble(b),
        high_nibble(c),
        high_nibble(d),
    )


@njit(**INLINE)
def _with(w: Vector, bits: Vector, mask: np.int32) -> Vector:
    return vec.bit_or(w, vec.bit_and(bits, vec.splat_i32(mask)))


@njit(**INLINE)
def five_bits_at(p: int) -> Chunks:
    """Nibbles, then one chunk of fifth bits (bit c for chunk c): 320 bytes."""
    a, b, c, d, e, f, g, h = nibbles_at(p)
    x = vec.load_i32(p + 256)
    return (
        _with(a, vec.shift_left(x, np.int32(4)), _FIFTH),
        _with(b, vec.shift_left(x, np.int32(3)), _FIFTH),
        _with(c, vec.shift_left(x, np.int32(2)), _FIFTH),
        _with(d, vec.shift_left(x, np.int32(1)), _FIFTH),
        _with(e, x, _FIFTH),
        _with(f, vec.shift_right(x, np.int32(1)), _FIFTH),
        _with(g, vec.shift_right(x, np.int32(2)), _FIFTH),
        _with(h, vec.shift_right(x, np.int32(3)), _FIFTH),
    )


@njit(**INLINE)
def six_bits_at(p: int) -> Chunks:
    """Nibbles, then two chunks of upper pairs (pair c of the first for chunk c, of the second for c + 4): 384 bytes."""
    a, b, c, d, e, f, g, h = nibbles_at(p)
    x, y = vec.load_i32(p + 256), vec.load_i32(p + 320)
    return (
        _with(a, vec.shift_left(x, np.int32(4)), _UPPER),
        _with(b, vec.shift_left(x, np.int32(2)), _UPPER),
        _with(c, x, _UPPER),
        _with(d, vec.shift_right(x, np.int32(2)), _UPPER),
        _with(e, vec.shift_left(y, np.int32(4)), _UPPER),
        _with(f, vec.shift_left(y, np.int32(2)), _UPPER),
        _with(g, y, _UPPER),
        _with(h, vec.shift_right(y, np.int32(2)), _UPPER),
    )


@njit(**INLINE)
def half_product(mode: vec.Mode, w: Chunks, half: int, digits: int, start: Vector) -> Vector:
    """
    ``start`` plus codes times digits over 16 columns: chunks 0-3 (half 0) or 4-7 (half 1).

    Args:
        mode: Says with which instructions.
        w: The codes.
        half: 0 or 1, a constant.
        digits: Address of the 32 digits.
        start: int32, e.g. minus the zero point times the sum of the digits.
    """
    if half == 0:
        start = vec.dot_bytes(mode, start, w[0], vec.broadcast_i32(digits))
        start = vec.dot_bytes(mode, start, w[1], vec.broadcast_i32(digits + 4))
        start = vec.dot_bytes(mode, start, w[2], vec.broadcast_i32(digits + 8))
        return vec.dot_bytes(mode, start, w[3], vec.broadcast_i32(digits + 12))
    start = vec.dot_bytes(mode, start, w[4], vec.broadcast_i32(digits + 16))
    start = vec.dot_bytes(mode, start, w[5], vec.broadcast_i32(digits + 20))
    start = vec.dot_bytes(mode, start, w[6], vec.broadcast_i32(digits + 24))
    return vec.dot_bytes(mode, start, w[7], vec.broadcast_i32(digits + 28))

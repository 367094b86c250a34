"""
Stored rows into panels, compiled: what `panels.pack_reference` says, at memory speed, once per load.

Exactness: a permutation of bits, equal to the reference byte for byte.
Cost: about a gigabyte per second and thread.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from apr_core.dtypes import QuantFormat
from apr_core.kernels.cpu import vec
from apr_core.kernels.cpu.jit import INLINE, JIT
from apr_core.kernels.cpu.panels import LAYOUTS

_FLIP = np.int32(-0x7F7F7F80)  # 0x80808080
_LOW = np.int32(0x0F0F0F0F)
_ONES = np.int32(0x01010101)
_PAIRS = np.int32(0x03030303)


@njit(**INLINE)
def _spread_bits(bits: np.int32, chunk: int) -> np.int32:
    """Put bits 4c to 4c + 3 of a word into the lowest bits of four bytes."""
    four = (bits >> np.int32(4 * chunk)) & np.int32(15)
    return (four | four << np.int32(7) | four << np.int32(14) | four << np.int32(21)) & _ONES


@njit(**JIT)
def _q8_0(row: int, lane: int, units: int, out: int) -> None:
    for _ in range(units):
        vec.write_u16(out + 2 * lane, vec.read_u16(row))
        for c in range(8):
            vec.write_i32(out + 32 + 64 * c + 4 * lane, vec.read_i32(row + 2 + 4 * c) ^ _FLIP)
        row += 34
        out += 544


@njit(**JIT)
def _q4_0(row: int, lane: int, units: int, out: int) -> None:
    """The stored nibbles are those of a panel already: byte i holds columns i and i + 16."""
    for _ in range(units):
        vec.write_u16(out + 2 * lane, vec.read_u16(row))
        for c in range(4):
            vec.write_i32(out + 32 + 64 * c + 4 * lane, vec.read_i32(row + 2 + 4 * c))
        row += 18
        out += 288


@njit(**JIT)
def _q5_0(row: int, lane: int, units: int, out: int) -> None:
    for _ in range(units):
        vec.write_u16(out + 2 * lane, vec.read_u16(row))
        bits, fifth = vec.read_i32(row + 2), np.int32(0)
        for c in range(4):
            vec.write_i32(out + 32 + 64 * c + 4 * lane, vec.read_i32(row + 6 + 4 * c))
        for c in range(8):
            fifth |= _spread_bits(bits, c) << np.int32(c)
        vec.write_i32(out + 288 + 4 * lane, fifth)
        row += 22
        out += 352


@njit(**INLINE)
def _k_scales(row: int, lane: int, j: int, out: int) -> None:
    """Widen the 6-bit scale and minimum of block ``j`` of a super-block to a byte each."""
    if j < 4:
        scale, minimum = vec.read_u8(row + 4 + j) & 63, vec.read_u8(row + 8 + j) & 63
    else:
        high = vec.read_u8(row + 8 + j)
        scale = (high & 15) | ((vec.read_u8(row + j) >> 2) & 48)
        minimum = (high >> 4) | ((vec.read_u8(row + 4 + j) >> 2) & 48)
    vec.write_u8(out + lane, scale)
    vec.write_u8(out + 16 + lane, minimum)


@njit(**INLINE)
def _k_nibbles(run: int, lane: int, upper: bool, out: int) -> None:
    """From a run of 32 bytes, the low or the upper nibbles: columns 0-15 low, 16-31 high."""
    for c in range(4):
        first, second = vec.read_i32(run + 4 * c), vec.read_i32(run + 16 + 4 * c)
        if upper:  # the later half of the columns goes high in either case
            first, second = first >> np.int32(4), second >> np.int32(4)
        word = (first & _LOW) | ((second & _LOW) << np.int32(4))
        vec.write_i32(out + 64 * c + 4 * lane, word)


@njit(**JIT)
def _q4_k(row: int, lane: int, units: int, out: int) -> None:
    for _ in range(units):
        vec.write_u16(out + 2 * lane, vec.read_u16(row))
        vec.write_u16(out + 32 + 2 * lane, vec.read_u16(row + 2))
        out += 64
        for j in range(8):
            _k_scales(row, lane, j, out)
            _k_nibbles(row + 16 + 32 * (j // 2), lane, j % 2 == 1, out + 32)
            out += 288
        row += 144


@njit(**JIT)
def _q5_k(row: int, lane: int, units: int, out: int) -> None:
    for _ in range(units):
        vec.write_u16(out + 2 * lane, vec.read_u16(row))
        vec.write_u16(out + 32 + 2 * lane, vec.read_u16(row + 2))
        out += 64
        for j in range(8):
            _k_scales(row, lane, j, out)
            _k_nibbles(row + 48 + 32 * (j // 2), lane, j % 2 == 1, out + 32)
            fifth = np.int32(0)
            for c in range(8):
                fifth |= ((vec.read_i32(row + 16 + 4 * c) >> np.int32(j)) & _ONES) << np.int32(c)
            vec.write_i32(out + 288 + 4 * lane, fifth)
            out += 352
        row += 176


@njit(**JIT)
def _q6_k(row: int, lane: int, units: int, out: int) -> None:
    for _ in range(units):
        vec.write_u16(out + 2 * lane, vec.read_u16(row + 208))
        out += 32
        for j in range(8):
            half, quarter = j // 4, j % 4
            vec.write_u8(out + lane, vec.read_u8(row + 192 + 2 * j))
            vec.write_u8(out + 16 + lane, vec.read_u8(row + 193 + 2 * j))
            _k_nibbles(row + 64 * half + 32 * (quarter % 2), lane, quarter >= 2, out + 32)
            for plane in range(2):
                pairs = np.int32(0)
                for c in range(4):
                    word = vec.read_i32(row + 128 + 32 * half + 16 * plane + 4 * c)
                    pairs |= ((word >> np.int32(2 * quarter)) & _PAIRS) << np.int32(2 * c)
                vec.write_i32(out + 288 + 64 * plane + 4 * lane, pairs)
            out += 416
        row += 210


@njit(**JIT)
def _two_bytes(row: int, lane: int, columns: int, out: int) -> None:
    for k in range(columns):
        vec.write_u16(out + 32 * k + 2 * lane, vec.read_u16(row + 2 * k))


@njit(**JIT)
def _pairs(row: int, lane: int, columns: int, out: int) -> None:
    for k in range(columns // 2):
        vec.write_i32(out + 64 * k + 4 * lane, vec.read_i32(row + 4 * k))
    if columns % 2 == 1:
        vec.write_u16(out + 32 * (columns - 1) + 4 * lane, vec.read_u16(row + 2 * columns - 2))


@njit(**JIT)
def _four_bytes(row: int, lane: int, columns: int, out: int) -> None:
    for k in range(columns):
        vec.write_i32(out + 64 * k + 4 * lane, vec.read_i32(row + 4 * k))


@njit(**JIT)
def _pack_rows(
    code: int, source: int, row_bytes: int, rows: int, nothing: int, steps: int, out: int, panel: int
) -> None:
    """``nothing`` is a row of zeros; ``steps`` are units of a row, or columns of a float type; ``panel`` its bytes."""
    for row in range((rows + 15) // 16 * 16):
        at, lane, to = source + row * row_bytes, row % 16, out + row // 16 * panel
        if row >= rows:
            at = nothing
        if code == 0:
            _q8_0(at, lane, steps, to)
        elif code == 1:
            _q5_0(at, lane, steps, to)
        elif code == 2:
            _q4_0(at, lane, steps, to)
        elif code == 3:
            _q4_k(at, lane, steps, to)
        elif code == 4:
            _q5_k(at, lane, steps, to)
        elif code == 5:
            _q6_k(at, lane, steps, to)
        elif code == 6:
            _two_bytes(at, lane, steps, to)
        elif code == 7:
            _pairs(at, lane, steps, to)
        else:
            _four_bytes(at, lane, steps, to)


def repack(
    dtype: QuantFormat, data: NDArray[np.uint8], rows: int, columns: int, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """
    Lay a stored matrix out in panels.

    Args:
        dtype: A type of `LAYOUTS`.
        data: uint8 [dtype.nbytes((rows, columns))], contiguous.
        rows: Rows of the matrix.
        columns: Columns of the matrix.
        out: uint8 [nbytes], zeroed, to write to; a fresh array when left out.

    Returns:
        uint8 [LAYOUTS[dtype.name].nbytes(rows, columns)].

    Exactness: equal to `panels.pack_reference` byte for byte.
    """
    layout = LAYOUTS[dtype.name]
    if data.nbytes != dtype.nbytes((rows, columns)) or not data.flags.c_contiguous:
        raise ValueError(f"expected {dtype.nbytes((rows, columns))} contiguous bytes, found {data.nbytes}")
    units = -(-columns // layout.columns)
    panels = np.zeros(layout.nbytes(rows, columns), np.uint8) if out is None else out
    nothing = np.zeros(data.nbytes // rows, np.uint8)
    steps = columns if layout.zero is None else units
    _pack_rows(
        layout.code,
        data.ctypes.data,
        data.nbytes // rows,
        rows,
        nothing.ctypes.data,
        steps,
        panels.ctypes.data,
        units * layout.unit_bytes,
    )
    return panels

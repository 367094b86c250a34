"""
Decoders of the block types at the speed of memory: what `formats.blocks` defines in numpy, bit for bit.

Each operation is rounded as the reference rounds it (a product, then a sum: never fused), and a float16 scale is looked
up in a table, so that no conversion instruction is needed and a NaN keeps its payload. A thread takes a range of
blocks; nothing is shared between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from apr_core.dtypes import FORMATS
from apr_core.formats import blocks
from apr_core.kernels.cpu import vec
from apr_core.kernels.cpu.jit import INLINE, JIT
from apr_core.kernels.cpu.split import HALVES, in_threads
from apr_core.kernels.registry import Kernel, register

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Vector = vec.VectorType

_NIBBLE = np.int32(15)
_PAIR = np.int32(3)
_FOUR = np.int32(4)
_BITS = (np.uint32(1) << np.arange(32, dtype=np.uint32)).view(np.int32)
_SMALLEST_NORMAL_HALF = np.float32(2.0**-14)


@njit(**INLINE)
def _low(w: Vector) -> Vector:
    return vec.bit_and(w, vec.splat_i32(_NIBBLE))


@njit(**INLINE)
def _high(w: Vector) -> Vector:
    return vec.bit_and(vec.shift_right(w, _FOUR), vec.splat_i32(_NIBBLE))


@njit(**INLINE)
def _fifth(bits: Vector, masks: int) -> Vector:
    """16 in each lane whose bit (of the 16 masks at that address) is set."""
    mask = vec.load_i32(masks)
    return vec.shift_left(vec.equal_i32(vec.bit_and(bits, mask), mask), _FOUR)


@njit(**INLINE)
def _put_scaled(out: int, codes: Vector, zero: np.int32, scale: Vector) -> None:
    """Store ``scale * (codes - zero)``."""
    vec.store_f32(out, vec.mul_f32(vec.to_f32(vec.sub_i32(codes, vec.splat_i32(zero))), scale))


@njit(**INLINE)
def _put_affine(out: int, codes: Vector, scale: Vector, offset: Vector) -> None:
    """Store ``scale * codes + offset``, rounded twice."""
    vec.store_f32(out, vec.add_f32(vec.mul_f32(vec.to_f32(codes), scale), offset))


@njit(**INLINE)
def _half_at(table: Floats, address: int) -> Any:
    return table[vec.read_u16(address)]


@njit(**JIT)
def _q8_0(data: Bytes, out: Floats, start: int, stop: int, table: Floats, masks: Any) -> None:
    for n in range(start, stop):
        p, o = data.ctypes.data + 34 * n, out.ctypes.data + 128 * n
        scale = vec.splat_f32(_half_at(table, p))
        vec.store_f32(o, vec.mul_f32(vec.to_f32(vec.load_i8(p + 2)), scale))
        vec.store_f32(o + 64, vec.mul_f32(vec.to_f32(vec.load_i8(p + 18)), scale))


@njit(**JIT)
def _q4_0(data: Bytes, out: Floats, start: int, stop: int, table: Floats, masks: Any) -> None:
    for n in range(start, stop):
        p, o = data.ctypes.data + 18 * n, out.ctypes.data + 128 * n
        scale, codes = vec.splat_f32(_half_at(table, p)), vec.load_u8(p + 2)
        _put_scaled(o, _low(codes), np.int32(8), scale)
        _put_scaled(o + 64, _high(codes), np.int32(8), scale)


@njit(**JIT)
def _q4_1(data: Bytes, out: Floats, start: int, stop: int, table: Floats, masks: Any) -> None:
    for n in range(start, stop):
        p, o = data.ctypes.data + 20 * n, out.ctypes.data + 128 * n
        scale, offset = vec.splat_f32(_half_at(table, p)), vec.splat_f32(_half_at(table, p + 2))
        codes = vec.load_u8(p + 4)
        _put_affine(o, _low(codes), scale, offset)
        _put_affine(o + 64, _high(codes), scale, offset)


@njit(**JIT)
def _q5_0(data: Bytes, out: Floats, start: int, stop: int, table: Floats, masks: Any) -> None:
    m = masks.ctypes.data
    for n in range(start, stop):
        p, o = data.ctypes.data + 22 * n, out.ctypes.data + 128 * n
        scale, codes = vec.splat_f32(_half_at(table, p)), vec.load_u8(p + 6)
        bits = vec.splat_i32(vec.read_i32(p + 2))
        _put_scaled(o, vec.bit_or(_low(codes), _fifth(bits, m)), np.int32(16), scale)
        _put_scaled(o + 64, vec.bit_or(_high(codes), _fifth(bits, m + 64)), np.int32(16), scale)


@njit(**JIT)
def _q5_1(data: Bytes, out: Floats, start: int, stop: int, table: Floats, masks: Any) -> None:
    m = masks.ctypes.data
    for n in range(start, stop):
        p, o = data.ctypes.data + 24 * n, out.ctypes.data + 128 * n
        scale, offset = vec.splat_f32(_half_at(table, p)), vec.splat_f32(_half_at(table, p + 2))
        codes, bits = vec.load_u8(p + 8), vec.splat_i32(vec.read_i32(p + 4))
        _put_affine(o, vec.bit_or(_low(codes), _fifth(bits, m)), scale, offset)
        _put_affine(o + 64, vec.bit_or(_high(codes), _fifth(bits, m + 64)), scale, offset)


@njit(**INLINE)
def _six_bits(data: Bytes, n: int, part: int) -> tuple[Any, Any]:
    """Scale and minimum of sub-block ``part`` (0 to 7) of super-block ``n``, from its bytes 4 to 15."""
    near, far = np.int64(data[n, 4 + part % 4]), np.int64(data[n, 8 + part % 4])
    last = np.int64(data[n, 12 + part % 4])
    if part < 4:
        scale, minimum = near & 63, far & 63
    else:
        scale, minimum = (last & 15) | ((near >> 6) << 4), (last >> 4) | ((far >> 6) << 4)
    return np.float32(scale), np.float32(minimum)


@njit(**INLINE)
def _minus_floor(out: int, codes: Vector, step: Any, floor: Any) -> None:
    scaled = vec.mul_f32(vec.to_f32(codes), vec.splat_f32(step))
    vec.store_f32(out, vec.sub_f32(scaled, vec.splat_f32(floor)))


@njit(**INLINE)
def _bit_of(w: Vector, bit: np.int32) -> Vector:
    """16 in each lane whose bit of that number is set."""
    return vec.shift_left(vec.bit_and(vec.shift_right(w, bit), vec.splat_i32(np.int32(1))), _FOUR)


@njit(**JIT)
def _q4_k(data: Bytes, out: Floats, start: int, stop: int, table: Floats, masks: Any) -> None:
    for n in range(start, stop):
        p, o = data.ctypes.data + 144 * n, out.ctypes.data + 1024 * n
        d, dmin = _half_at(table, p), _half_at(table, p + 2)
        for pair in range(4):
            scale, minimum = _six_bits(data, n, 2 * pair)
            step, floor = d * scale, dmin * minimum
            scale, minimum = _six_bits(data, n, 2 * pair + 1)
            other, below = d * scale, dmin * minimum
            for half in range(2):
                codes = vec.load_u8(p + 16 + 32 * pair + 16 * half)
                at = o + 256 * pair + 64 * half
                _minus_floor(at, _low(codes), step, floor)
                _minus_floor(at + 128, _high(codes), other, below)


@njit(**JIT)
def _q5_k(data: Bytes, out: Floats, start: int, stop: int, table: Floats, masks: Any) -> None:
    for n in range(start, stop):
        p, o = data.ctypes.data + 176 * n, out.ctypes.data + 1024 * n
        d, dmin = _half_at(table, p), _half_at(table, p + 2)
        for pair in range(4):
            scale, minimum = _six_bits(data, n, 2 * pair)
            step, floor = d * scale, dmin * minimum
            scale, minimum = _six_bits(data, n, 2 * pair + 1)
            other, below = d * scale, dmin * minimum
            for half in range(2):
                codes, fifth = vec.load_u8(p + 48 + 32 * pair + 16 * half), vec.load_u8(p + 16 + 16 * half)
                at = o + 256 * pair + 64 * half
                _minus_floor(at, vec.bit_or(_low(codes), _bit_of(fifth, np.int32(2 * pair))), step, floor)
                _minus_floor(at + 128, vec.bit_or(_high(codes), _bit_of(fifth, np.int32(2 * pair + 1))), other, below)


@njit(**INLINE)
def _pair_of(w: Vector, bit: np.int32) -> Vector:
    """Two bits from that number on, times 16."""
    return vec.shift_left(vec.bit_and(vec.shift_right(w, bit), vec.splat_i32(_PAIR)), _FOUR)


@njit(**JIT)
def _q6_k(data: Bytes, out: Floats, start: int, stop: int, table: Floats, masks: Any) -> None:
    for n in range(start, stop):
        p, o = data.ctypes.data + 210 * n, out.ctypes.data + 1024 * n
        d = _half_at(table, p + 208)
        for half in range(2):
            for piece in range(2):
                low = vec.load_u8(p + 64 * half + 16 * piece)
                next_low = vec.load_u8(p + 64 * half + 32 + 16 * piece)
                upper = vec.load_u8(p + 128 + 32 * half + 16 * piece)
                for run in range(4):
                    codes = low if run % 2 == 0 else next_low
                    codes = _low(codes) if run < 2 else _high(codes)
                    codes = vec.bit_or(codes, _pair_of(upper, np.int32(2 * run)))
                    grid = np.int8(vec.read_u8(p + 192 + 8 * half + 2 * run + piece))
                    scale = vec.splat_f32(d * np.float32(grid))
                    _put_scaled(o + 512 * half + 128 * run + 64 * piece, codes, np.int32(32), scale)


@njit(**JIT)
def _apr_q4(data: Bytes, out: Floats, start: int, stop: int, table: Floats, masks: Any) -> None:
    for n in range(start, stop):
        scale = _half_at(table, data.ctypes.data + 18 * n)
        if not (np.isfinite(scale) and abs(scale) >= _SMALLEST_NORMAL_HALF):
            scale = np.float32(0)
        for i in range(16):
            pair = np.int32(data[n, 2 + i])
            out[n, 2 * i] = np.float32((pair & _NIBBLE) - np.int32(8)) * scale
            out[n, 2 * i + 1] = np.float32((pair >> _FOUR) - np.int32(8)) * scale


_KERNELS: dict[str, Callable[..., None]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "AprQ4": _apr_q4,
}


def decode_blocks(name: str, data: Bytes, threads: int | None = None) -> Floats:
    """
    Decode blocks of a type of `DECODERS`: [n, block_bytes] uint8 to [n, block_elements] float32.

    Args:
        name: The type.
        data: Whole blocks, contiguous.
        threads: How many share the work; by default all cores of this process.
    """
    data = np.ascontiguousarray(data)
    out = np.empty((data.shape[0], FORMATS[name].block_elements), dtype=np.float32)
    kernel = _KERNELS[name]
    in_threads(lambda start, stop: kernel(data, out, start, stop, HALVES, _BITS), data.shape[0], out.nbytes, threads)
    return out


DECODERS: dict[str, Callable[[Bytes], Floats]] = {name: partial(decode_blocks, name) for name in _KERNELS}


def _examples(name: str) -> Iterator[tuple[Bytes]]:
    """Yield no block, one, an odd number; scales that are NaN, infinite, subnormal and zero are among random bytes."""
    width = FORMATS[name].block_bytes
    random = np.random.default_rng(width)
    for count in (0, 1, 7, 513):
        yield (random.integers(0, 256, (count, width), dtype=np.uint8),)


def _quietly(decoder: Callable[[Bytes], Floats]) -> Callable[[Bytes], Floats]:
    def run(data: Bytes) -> Floats:
        with np.errstate(all="ignore"):
            return decoder(data)

    return run


for _name in _KERNELS:
    register(
        Kernel(
            "decode",
            _name,
            "cpu",
            "numba",
            "exact",
            DECODERS[_name],
            _quietly(blocks.DECODERS[_name]),
            partial(_examples, _name),
        )
    )

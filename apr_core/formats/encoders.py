"""
Block encoders in plain numpy: [n, block_elements] float32 to [n, block_bytes] uint8.

Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 give the bytes of ``gguf.quants.quantize``. Q4_K, Q5_K and Q6_K search scale and
minimum as llama.cpp does without an importance matrix: the same candidates, the same weights, float32 sums in the order
of the elements. The files of llama.cpp in the project's oracle come out byte for byte; a build that fuses products and
sums may end at a neighbouring, equally good scale here and there.

A block that holds NaN or infinity has no meaning in these types: `codecs.encode` refuses it before it comes here.

Source: ggml ``ggml-quants.c`` (``quantize_row_*_ref``, ``make_qkx2_quants``, ``make_qx_quants``); for AprQ4 and AprQ8
the reference writers of APR v2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# Below this magnitude a group of Q6_K counts as zero.
_GROUP_EPS = np.float32(1e-15)


def encode_q8_0(values: Floats) -> Bytes:
    """
    Q8_0: scale ``max|x| / 127``, codes rounded half away from zero.

    Multiplies by the float32 reciprocal of the unrounded scale, as the ggml reference does.
    """
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    codes = _half_away(values * _reciprocal(scale))
    return np.concatenate([_half(scale), codes.astype(np.int8).view(np.uint8)], axis=1)


def encode_q4_0(values: Floats) -> Bytes:
    """Q4_0: the value of largest magnitude becomes code 0, the opposite end is clipped at 15."""
    scale, codes = _towards_largest(values, 8)
    return np.concatenate([_half(scale), _nibbles(codes)], axis=1)


def encode_q5_0(values: Floats) -> Bytes:
    """Q5_0: as Q4_0 with 32 codes, the fifth bits apart."""
    scale, codes = _towards_largest(values, 16)
    return np.concatenate([_half(scale), _fifth_bits(codes), _nibbles(codes & np.uint8(15))], axis=1)


def encode_q4_1(values: Floats) -> Bytes:
    """Q4_1: 16 codes from the smallest value to the largest."""
    scale, low, codes = _affine(values, 15)
    return np.concatenate([_half(scale), _half(low), _nibbles(codes)], axis=1)


def encode_q5_1(values: Floats) -> Bytes:
    """Q5_1: 32 codes from the smallest value to the largest."""
    scale, low, codes = _affine(values, 31)
    return np.concatenate([_half(scale), _half(low), _fifth_bits(codes), _nibbles(codes & np.uint8(15))], axis=1)


def encode_apr_q4(values: Floats) -> Bytes:
    """
    AprQ4: scale ``max|x| / 7`` (1 for zeros), codes -8..7 stored from 0 to 15, even elements in the low nibbles.

    A reader takes a scale below the smallest normal float16 for zero: values under 4.3e-4 throughout a block are lost.
    """
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(7)
    scale = np.where(scale == 0, np.float32(1), scale)
    stored = scale.astype(np.float16).astype(np.float32)
    codes = _half_away(values / np.where(stored == 0, np.float32(1), stored)).clip(-8, 7) + 8
    pairs = codes.astype(np.uint8).reshape(values.shape[0], 16, 2)
    return np.concatenate([_half(scale), pairs[:, :, 0] | (pairs[:, :, 1] << np.uint8(4))], axis=1)


def encode_apr_q8(values: Floats) -> Bytes:
    """AprQ8, one tensor [elements]: float32 scale ``max|x| / 127``, then one signed byte per element."""
    scale = np.abs(values).max(initial=np.float32(0)) / np.float32(127)
    codes = _half_away(values.reshape(-1) / (scale if scale else np.float32(1)))
    head = np.array([scale], dtype="<f4").view(np.uint8)
    return np.concatenate([head, codes.clip(-127, 127).astype(np.int8).view(np.uint8)])


def encode_q4_k(values: Floats) -> Bytes:
    """Q4_K: eight sub-blocks of 32, 16 codes each, scales and minima on a 6-bit grid."""
    head, codes = _super_block(values, largest=15, first=-1.0, steps=20)
    runs = codes.reshape(-1, 4, 2, 32)
    return np.concatenate([head, (runs[:, :, 0] | (runs[:, :, 1] << np.uint8(4))).reshape(-1, 128)], axis=1)


def encode_q5_k(values: Floats) -> Bytes:
    """Q5_K: as Q4_K with 32 codes; byte j of the fifth bits holds element j of all eight sub-blocks."""
    head, codes = _super_block(values, largest=31, first=-0.5, steps=15)
    fifth = np.packbits(codes.reshape(-1, 8, 32) >> np.uint8(4), axis=1, bitorder="little")
    runs = (codes & np.uint8(15)).reshape(-1, 4, 2, 32)
    low = (runs[:, :, 0] | (runs[:, :, 1] << np.uint8(4))).reshape(-1, 128)
    return np.concatenate([head, fifth.reshape(-1, 32), low], axis=1)


def encode_q6_k(values: Floats) -> Bytes:
    """Q6_K: sixteen sub-blocks of 16, 64 codes each, signed 8-bit scales."""
    count = values.shape[0]
    parts = np.ascontiguousarray(values.reshape(-1, 16).T)
    scale, codes = _search_scale(parts, 32)
    scale = scale.reshape(count, 16)
    at = np.abs(scale).argmax(axis=1)
    top = scale[np.arange(count), at]
    dead = np.abs(top) < _GROUP_EPS
    inverse = np.where(dead, np.float32(0), np.float32(-128) / np.where(dead, np.float32(1), top)).astype(np.float32)
    stored = np.where(dead, np.float32(0), np.float32(1) / np.where(dead, np.float32(1), inverse)).astype(np.float16)
    grid = _codes(inverse[:, None] * scale, -128, 127).astype(np.int8)
    step = (stored.astype(np.float32)[:, None] * grid.astype(np.float32)).reshape(1, -1)
    again = _codes(parts / np.where(step == 0, np.float32(1), step), -32, 31) + 32
    codes = np.where(step == 0, codes, again)
    codes = np.where(np.repeat(dead, 16)[None, :], 0, codes)
    rows = codes.T.astype(np.uint8).reshape(count, 2, 4, 32)
    low = np.concatenate([rows[:, :, :2] & 15 | ((rows[:, :, 2:] & 15) << np.uint8(4))], axis=2).reshape(count, 128)
    pairs = rows >> np.uint8(4)
    high = (pairs[:, :, 0] | (pairs[:, :, 1] << 2) | (pairs[:, :, 2] << 4) | (pairs[:, :, 3] << 6)).reshape(count, 64)
    return np.concatenate([low, high, grid.view(np.uint8), stored[:, None].view(np.uint8)], axis=1).astype(np.uint8)


def _super_block(values: Floats, *, largest: int, first: float, steps: int) -> tuple[Bytes, NDArray[np.uint8]]:
    """Search the eight sub-blocks and put their scales on the 6-bit grid: 16 head bytes, and codes [n, 256]."""
    count = values.shape[0]
    parts = np.ascontiguousarray(values.reshape(-1, 32).T)
    weights = np.sqrt((parts * parts).sum(axis=0) / np.float32(32)) + np.abs(parts)
    scale, minimum, codes = _search_scale_and_minimum(parts, weights, largest, first, steps)
    scale, minimum = scale.reshape(count, 8), minimum.reshape(count, 8)
    top, deepest = scale.max(axis=1, initial=0), minimum.max(axis=1, initial=0)
    grid = _codes(_per(63, top)[:, None] * scale, 0, 63).astype(np.uint8)
    floor = _codes(_per(63, deepest)[:, None] * minimum, 0, 63).astype(np.uint8)
    d, dmin = (top / np.float32(63)).astype(np.float16), (deepest / np.float32(63)).astype(np.float16)
    step = (d.astype(np.float32)[:, None] * grid.astype(np.float32)).reshape(1, -1)
    offset = (dmin.astype(np.float32)[:, None] * floor.astype(np.float32)).reshape(1, -1)
    again = _codes((parts + offset) / np.where(step == 0, np.float32(1), step), 0, largest)
    codes = np.where(step == 0, codes, again)
    head = np.concatenate([d[:, None].view(np.uint8), dmin[:, None].view(np.uint8), pack_six_bits(grid, floor)], axis=1)
    return head, codes.T.astype(np.uint8).reshape(count, 256)


def pack_six_bits(scale: Bytes, minimum: Bytes) -> Bytes:
    """
    Pack eight scales and eight minima of 6 bits into 12 bytes, as Q4_K and Q5_K hold them.

    Bytes 0..3: scales 0..3, above them the upper two bits of scales 4..7. Bytes 4..7: the same of the minima. Bytes
    8..11: the lower four bits of scales 4..7, above them those of minima 4..7.
    """
    low = scale[:, :4] | ((scale[:, 4:] >> np.uint8(4)) << np.uint8(6))
    mid = minimum[:, :4] | ((minimum[:, 4:] >> np.uint8(4)) << np.uint8(6))
    high = (scale[:, 4:] & np.uint8(15)) | ((minimum[:, 4:] & np.uint8(15)) << np.uint8(4))
    return np.concatenate([low, mid, high], axis=1).astype(np.uint8)


def _search_scale_and_minimum(
    x: Floats, weights: Floats, largest: int, first: float, steps: int
) -> tuple[Floats, Floats, Floats]:
    """
    Find scale and minimum of each column that leave the least weighted square error.

    Args:
        x: Values, [32, n].
        weights: Their weights, [32, n].
        largest: Largest code.
        first: Offset of the first candidate from ``largest`` steps over the range; each further one adds 0.1.
        steps: Number of candidates less one.

    Returns:
        Scale [n], minimum as a non-negative number to subtract [n], codes [32, n].
    """
    low, high = np.minimum(x.min(axis=0), np.float32(0)), x.max(axis=0)
    flat = high == low
    total, weighted = weights.sum(axis=0), (weights * x).sum(axis=0)
    with np.errstate(all="ignore"):
        inverse = np.float32(largest) / (high - low)
        scale = np.float32(1) / inverse
        codes = _nearest(inverse * (x - low)).clip(0, largest)
        best = (weights * (scale * codes + low - x) ** 2).sum(axis=0)
        for k in range(steps + 1):
            inverse = (np.float32(first) + np.float32(0.1) * np.float32(k) + np.float32(largest)) / (high - low)
            tried = _nearest(inverse * (x - low)).clip(0, largest)
            wl = weights * tried
            sum_l, sum_l2, sum_xl = wl.sum(axis=0), (wl * tried).sum(axis=0), (wl * x).sum(axis=0)
            determinant = total * sum_l2 - sum_l * sum_l
            new_scale = (total * sum_xl - weighted * sum_l) / determinant
            new_low = (sum_l2 * weighted - sum_l * sum_xl) / determinant
            above = new_low > 0
            new_scale, new_low = np.where(above, sum_xl / sum_l2, new_scale), np.where(above, np.float32(0), new_low)
            error = (weights * (new_scale * tried + new_low - x) ** 2).sum(axis=0)
            better = (determinant > 0) & (error < best)
            best, scale = np.where(better, error, best), np.where(better, new_scale, scale)
            low, codes = np.where(better, new_low, low), np.where(better, tried, codes)
    return np.where(flat, np.float32(0), scale), np.abs(low), _codes(np.where(flat, 0, codes), 0, largest)


def _search_scale(x: Floats, half_range: int) -> tuple[Floats, NDArray[np.int32]]:
    """
    Find the signed scale of each column that leaves the least error, weighted by the squares of the values.

    Args:
        x: Values, [16, n].
        half_range: Codes go from ``-half_range`` to ``half_range - 1``.

    Returns:
        Scale [n], codes from 0 [16, n].
    """
    top = np.take_along_axis(x, np.abs(x).argmax(axis=0)[None, :], axis=0)[0]
    empty = np.abs(top) < _GROUP_EPS
    top = np.where(empty, np.float32(1), top)
    squares = x * x
    scale, best = np.zeros_like(top), np.zeros_like(top)
    codes = np.zeros(x.shape, np.int32)
    with np.errstate(all="ignore"):
        for k in (0, *range(-9, 0), *range(1, 10)):
            inverse = -(np.float32(half_range) + np.float32(0.1) * np.float32(k)) / top
            tried = _nearest(inverse * x).clip(-half_range, half_range - 1)
            sum_lx, sum_l2 = (squares * x * tried).sum(axis=0), (squares * tried * tried).sum(axis=0)
            fitted = np.where(sum_l2 > 0, sum_lx / sum_l2, np.float32(0)).astype(np.float32)
            better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2) if k else np.ones(top.shape, bool)
            scale = np.where(better, fitted, scale)
            best = np.where(better, fitted * sum_lx, best)
            codes = np.where(better, tried + half_range, codes).astype(np.int32)
    return np.where(empty, np.float32(0), scale), np.where(empty, 0, codes).astype(np.int32)


def _towards_largest(values: Floats, divisor: int) -> tuple[Floats, NDArray[np.uint8]]:
    at = np.abs(values).argmax(axis=1, keepdims=True)
    scale = np.take_along_axis(values, at, axis=1) / np.float32(-divisor)
    codes = np.trunc(values * _reciprocal(scale) + np.float32(divisor + 0.5))
    return scale, codes.astype(np.uint8).clip(0, 2 * divisor - 1)


def _affine(values: Floats, largest: int) -> tuple[Floats, Floats, NDArray[np.uint8]]:
    low = values.min(axis=1, keepdims=True)
    scale = (values.max(axis=1, keepdims=True) - low) / np.float32(largest)
    codes = np.trunc((values - low) * _reciprocal(scale) + np.float32(0.5))
    return scale, low, codes.astype(np.uint8).clip(0, largest)


def _reciprocal(scale: Floats) -> Floats:
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(scale == 0, np.float32(0), np.float32(1) / scale).astype(np.float32)


def _per(number: int, largest: Floats) -> Floats:
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(largest > 0, np.float32(number) / largest, np.float32(0)).astype(np.float32)


def _nearest(values: NDArray[Any]) -> Floats:
    """Round half to even, as adding and subtracting 1.5 * 2^23 does in the reference."""
    rounded: Floats = np.rint(values)
    return rounded


def _codes(values: NDArray[Any], low: int, high: int) -> Floats:
    """Round to codes from ``low`` to ``high``; 0 where a denormal range made NaN, which casts differ about."""
    rounded = np.clip(_nearest(values), low, high)
    return np.where(np.isnan(rounded), np.float32(0), rounded)


def _half_away(values: NDArray[Any]) -> Floats:
    magnitude = np.abs(values)
    whole = np.floor(magnitude)
    rounded: Floats = np.sign(values) * (whole + np.floor(2 * (magnitude - whole)))
    return rounded


def _half(scale: Floats) -> Bytes:
    with np.errstate(over="ignore"):
        return scale.astype(np.float16).view(np.uint8)


def _nibbles(codes: NDArray[np.uint8]) -> Bytes:
    """Pack [n, 32] codes of 4 bits into [n, 16]: the first half low, the second half high."""
    packed: Bytes = codes[:, :16] | (codes[:, 16:] << np.uint8(4))
    return packed


def _fifth_bits(codes: NDArray[np.uint8]) -> Bytes:
    return np.packbits(codes >> np.uint8(4), axis=1, bitorder="little")


ENCODERS: dict[str, Callable[[Floats], Bytes]] = {
    "Q4_0": encode_q4_0,
    "Q4_1": encode_q4_1,
    "Q5_0": encode_q5_0,
    "Q5_1": encode_q5_1,
    "Q8_0": encode_q8_0,
    "Q4_K": encode_q4_k,
    "Q5_K": encode_q5_k,
    "Q6_K": encode_q6_k,
    "AprQ4": encode_apr_q4,
}

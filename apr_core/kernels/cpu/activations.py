"""
Activations as signed 8-bit digits: what the byte dot product of the quantised types multiplies with.

A block of 32 values is ``x = scale * sum over digits of q[s] * 256 ** (digits - 1 - s)`` with q in -128..127. One digit
(``speed``) is what llama.cpp does: relative error about 0.5 % of a product. Three digits (``exact``) hold 24 bits, as
many as a float32. Tokens are quantised in tiles of ``width`` (1 in a decode step, 8 in a matrix product), a tile being
one stream of blocks:

    [width][digits][32] int8     the digits, the most significant first
    [width] float32              scale
    [width][digits][2] int32     sums of columns 0-15 and 16-31, for the zero points
    [width] float32              sum of the block's values, for the minima

Rounding is to nearest, ties to even. A block with NaN or infinity gets the scale NaN, so that it shows in every result.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from apr_core.kernels.cpu import vec
from apr_core.kernels.cpu.jit import INLINE, JIT
from apr_core.kernels.cpu.panels import BLOCK

TILE = 8
"""Tokens that a matrix product treats together."""


def largest_integer(digits: int) -> int:
    """
    Return the integer that the largest value of a block becomes: the first digit 127, the others 0.

    Not every digit 127: rounding up by half a unit would then carry into the sign of the first digit.
    """
    return int(127 * 256 ** (digits - 1))


def tile_block_bytes(width: int, digits: int) -> int:
    """Return the bytes of one block of a tile."""
    return width * (40 * digits + 8)


# A block of smaller values counts as zero: their reciprocal would be infinite.
_SMALLEST = np.float32(1e-30)
_LARGEST_1, _LARGEST_3 = np.float32(largest_integer(1)), np.float32(largest_integer(3))


@njit(**INLINE)
def block_bytes(width: int, digits: int) -> int:
    """As `tile_block_bytes`, for kernels."""
    return width * (40 * digits + 8)


@njit(**INLINE)
def scale_at(block: int, width: int, digits: int, token: int) -> int:
    """Address of a token's scale in a block."""
    return block + width * 32 * digits + 4 * token


@njit(**INLINE)
def sums_at(block: int, width: int, digits: int, token: int, digit: int) -> int:
    """Address of the two half sums of one digit."""
    return block + width * (32 * digits + 4) + 8 * (token * digits + digit)


@njit(**INLINE)
def total_at(block: int, width: int, digits: int, token: int) -> int:
    """Address of the sum of a token's values in a block."""
    return block + width * (40 * digits + 4) + 4 * token


@njit(**JIT)
def quantise_token(mode: vec.Mode, values: int, blocks: int, tile: int, width: int, token: int) -> None:
    """
    Quantise one token into its place in a tile.

    Args:
        mode: Says how many digits.
        values: Address of float32 [32 * blocks].
        blocks: Blocks of 32.
        tile: Address of the tile.
        width: Tokens in the tile.
        token: Which of them.
    """
    digits = vec.digits_of(mode)
    largest = _LARGEST_3 if digits == 3 else _LARGEST_1
    for b in range(blocks):
        block = tile + b * block_bytes(width, digits)
        low, high = vec.load_f32(values + 128 * b), vec.load_f32(values + 128 * b + 64)
        top = vec.max_of_f32(vec.max_f32(vec.abs_f32(low), vec.abs_f32(high)))
        # 0 * x is NaN for NaN and infinity: neither may vanish in an integer
        none = vec.zero_f32()
        poison = vec.sum_f32(vec.fma(low, none, vec.mul_f32(high, none)))
        scale = np.float32(top / largest + poison)
        inverse = vec.splat_f32(largest / top if top > _SMALLEST else np.float32(0))
        rest_low = vec.to_i32(vec.round_f32(vec.mul_f32(low, inverse)))
        rest_high = vec.to_i32(vec.round_f32(vec.mul_f32(high, inverse)))
        total = np.float32(0)
        weight = np.float32(1)
        for back in range(digits):
            s = digits - 1 - back
            digit_low, digit_high = _lowest_digit(rest_low), _lowest_digit(rest_high)
            at = block + 32 * (token * digits + s)
            vec.store_i8(at, digit_low)
            vec.store_i8(at + 16, digit_high)
            sum_low, sum_high = vec.sum_i32(digit_low), vec.sum_i32(digit_high)
            sums = sums_at(block, width, digits, token, s)
            vec.write_i32(sums, sum_low)
            vec.write_i32(sums + 4, sum_high)
            total += weight * np.float32(sum_low + sum_high)
            weight *= np.float32(256)
            rest_low, rest_high = _without_digit(rest_low, digit_low), _without_digit(rest_high, digit_high)
        vec.write_f32(scale_at(block, width, digits, token), scale)
        vec.write_f32(total_at(block, width, digits, token), scale * total)


@njit(**INLINE)
def _lowest_digit(x: vec.VectorType) -> vec.VectorType:
    """The digit d in -128..127 with x - d divisible by 256."""
    half = vec.splat_i32(np.int32(128))
    return vec.sub_i32(vec.bit_and(vec.add_i32(x, half), vec.splat_i32(np.int32(255))), half)


@njit(**INLINE)
def _without_digit(x: vec.VectorType, digit: vec.VectorType) -> vec.VectorType:
    """(x - digit) / 256, exactly: the product with 2 ** -8 in float32 has at most 24 bits."""
    return vec.to_i32(vec.mul_f32(vec.to_f32(vec.sub_i32(x, digit)), vec.splat_f32(np.float32(1 / 256))))


def quantise_reference(x: NDArray[np.float32], digits: int) -> NDArray[np.float64]:
    """
    Return the values that quantised activations stand for, float64 [..., columns], in plain numpy.

    Args:
        x: float32 [..., columns], columns a multiple of 32.
        digits: 1 or 3.
    """
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    largest = np.float32(largest_integer(digits))
    top = np.abs(blocks).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(top > _SMALLEST, largest / top, np.float32(0)).astype(np.float32)
    integers = np.rint(blocks * inverse).astype(np.float64)
    return (integers * (top / largest).astype(np.float64)).reshape(x.shape)

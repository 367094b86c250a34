"""
Random weights in stored form: each function draws the bytes of an element type whose values are normal.

Quantised blocks are drawn as blocks (codes, scales, minima), not encoded from floats: a model of any size is made at
the speed of the random generator, and no encoder has to exist for its types.
Source: ggml ``ggml-quants.c`` block layouts, as in `apr_core.formats.blocks`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from apr_core.dtypes import QuantFormat
from apr_core.errors import UsageError
from apr_core.formats.codecs import encode

Bytes = NDArray[np.uint8]
Random = np.random.Generator


@cache
def _codes(low: int, high: int, centre: float, spread: float) -> NDArray[np.int16]:
    """Return 256 equally likely codes, normal around ``centre``, clipped to ``low..high``: a random byte picks one."""
    normal = NormalDist(centre, spread)
    quantiles = np.array([normal.inv_cdf((i + 0.5) / 256) for i in range(256)])
    codes: NDArray[np.int16] = np.clip(np.rint(quantiles), low, high).astype(np.int16)
    return codes


@cache
def _nibble_pairs(centre: float, spread: float) -> Bytes:
    """Two independent 4-bit codes for each of 65536 equally likely values."""
    one = _codes(0, 15, centre, spread).astype(np.uint8)
    return (one[:, None] << np.uint8(4) | one[None, :]).reshape(-1)


def _pick(random: Random, table: NDArray[np.generic], *shape: int) -> NDArray[np.uint8]:
    """Draw from a table of equally likely bytes."""
    wide = np.uint16 if len(table) > 256 else np.uint8
    index = random.integers(0, len(table), shape, dtype=wide)
    picked: Bytes = table.astype(np.uint8)[index]
    return picked


def _half_scales(random: Random, blocks: int, scale: float, *, signed: bool = False) -> NDArray[np.float16]:
    """Block scales [blocks, 1]: ``scale`` times 0.7 to 1.3, of either sign where ggml stores either."""
    drawn = random.uniform(0.7, 1.3, (blocks, 1)) * scale
    if signed:
        drawn *= random.choice([-1.0, 1.0], (blocks, 1))
    scales: NDArray[np.float16] = drawn.astype(np.float16)
    return scales


def _rms(values: NDArray[np.generic]) -> float:
    return float(np.sqrt(np.mean(np.square(values.astype(np.float64)))))


def draw_q8_0(random: Random, blocks: int, std: float) -> Bytes:
    """Q8_0 blocks [blocks, 34]: d float16, 32 signed codes."""
    table = _codes(-127, 127, 0.0, 44.0)
    codes = _pick(random, table, blocks, 32)  # the cast to bytes wraps as two's complement does
    return np.concatenate([_half_scales(random, blocks, std / _rms(table)).view(np.uint8), codes], axis=1)


def draw_q5_0(random: Random, blocks: int, std: float) -> Bytes:
    """Q5_0 blocks [blocks, 22]: d float16, 32 fifth bits, 16 bytes of nibbles (low nibbles first)."""
    table = _codes(0, 31, 16.0, 7.5)
    codes = _pick(random, table, blocks, 32)
    fifth = np.packbits(codes >> 4, axis=1, bitorder="little")
    nibbles = (codes[:, :16] & 15) | (codes[:, 16:] << 4)
    scales = _half_scales(random, blocks, std / _rms(table - np.int16(16)), signed=True)
    return np.concatenate([scales.view(np.uint8), fifth, nibbles], axis=1)


def draw_q4_k(random: Random, blocks: int, std: float) -> Bytes:
    """Q4_K blocks [blocks, 144]: d, dmin float16, eight 6-bit scales and minima in 12 bytes, 256 nibbles."""
    scale = random.integers(38, 64, (blocks, 8), dtype=np.uint8)
    # a minimum of centre * scale makes a run's mean zero; a jitter of two steps keeps the means from being all alike
    minimum = np.minimum(scale + random.integers(0, 5, (blocks, 8), dtype=np.uint8) - np.uint8(2), np.uint8(63))
    unit = std / (_rms(_codes(0, 15, 7.5, 3.6) - 7.5) * _rms(np.arange(38, 64)))
    d = _half_scales(random, blocks, unit)
    halves = np.concatenate([d, (d.astype(np.float32) * np.float32(7.5)).astype(np.float16)], axis=1)
    packed = np.concatenate(
        [
            scale[:, :4] | (scale[:, 4:] >> 4 << 6),
            minimum[:, :4] | (minimum[:, 4:] >> 4 << 6),
            (scale[:, 4:] & 15) | (minimum[:, 4:] << 4),
        ],
        axis=1,
    )
    return np.concatenate([halves.view(np.uint8), packed, _pick(random, _nibble_pairs(7.5, 3.6), blocks, 128)], axis=1)


def draw_q6_k(random: Random, blocks: int, std: float) -> Bytes:
    """Q6_K blocks [blocks, 210]: 128 low nibbles, 64 bytes of upper pairs, 16 signed scales, d float16."""
    table = _codes(0, 63, 32.0, 16.0)
    codes = _pick(random, table, blocks, 256).reshape(blocks, 2, 4, 32)
    low = (codes[:, :, :2] & 15) | (codes[:, :, 2:] << 4)
    high = codes[:, :, 0] >> 4 | codes[:, :, 1] >> 4 << 2 | codes[:, :, 2] >> 4 << 4 | codes[:, :, 3] >> 4 << 6
    sign = random.choice(np.array([-1, 1], dtype=np.int8), (blocks, 16))
    scale = random.integers(64, 128, (blocks, 16), dtype=np.int8) * sign
    d = _half_scales(random, blocks, std / (_rms(table - np.int16(32)) * _rms(np.arange(64, 128))))
    return np.concatenate(
        [low.reshape(blocks, 128), high.reshape(blocks, 64), scale.view(np.uint8), d.view(np.uint8)], axis=1
    )


DRAWS: dict[str, Callable[[Random, int, float], Bytes]] = {
    "Q8_0": draw_q8_0,
    "Q5_0": draw_q5_0,
    "Q4_K": draw_q4_k,
    "Q6_K": draw_q6_k,
}


def draw(random: Random, dtype: QuantFormat, elements: int, *, mean: float, std: float) -> Bytes:
    """
    Draw normal weights as stored bytes.

    Args:
        random: Its state decides all values; plain types of one state hold the same numbers, rounded.
        dtype: F32, F16, BF16, Q8_0, Q5_0, Q4_K or Q6_K.
        elements: How many; a multiple of the block.
        mean: Of plain types; blocks are drawn around zero.
        std: Standard deviation of the decoded values, within 5 % for blocks.

    Returns:
        uint8 [dtype.nbytes of elements].

    Raises:
        UsageError: Nothing draws this type.
    """
    if dtype.plain and dtype.name != "F64":
        values = random.standard_normal(elements, dtype=np.float32)
        values *= np.float32(std)
        values += np.float32(mean)
        return encode(values, dtype)
    if dtype.name not in DRAWS:
        raise UsageError(f"no random blocks for {dtype}", advice=f"take one of F32, F16, BF16, {', '.join(DRAWS)}")
    return DRAWS[dtype.name](random, elements // dtype.block_elements, std).reshape(-1)

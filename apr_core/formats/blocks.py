"""
Block decoders in plain numpy: bytes of one block to float32 values; `encoders` goes the other way.

Every function takes ``blocks`` [n, block_bytes] uint8 and returns [n, block_elements] float32. Exactness: each performs
the float32 operations of the ggml reference in the same order, so the results are equal bit for bit.
Nothing here imports the gguf package: it is the witness in the tests.

Source: ggml ``ggml-quants.c`` block layouts; APR dtype table for AprQ4 and AprQ8.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_LOW_HIGH = np.array([0, 4], dtype=np.uint8).reshape(1, 1, 2, 1)
_PAIRS = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
_SMALLEST_NORMAL_HALF = np.float32(2.0**-14)


def half(blocks: Bytes, at: int) -> Floats:
    """Read the float16 at byte ``at`` of each block: [n, 1] float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def decode_q4_0(blocks: Bytes) -> Floats:
    """Q4_0, 18 bytes: d float16, 16 bytes of nibbles (low nibbles first); value ``d * (q - 8)``."""
    nibbles = np.concatenate([blocks[:, 2:] & 0x0F, blocks[:, 2:] >> 4], axis=1)
    values: Floats = half(blocks, 0) * (nibbles.astype(np.int8) - np.int8(8)).astype(np.float32)
    return values


def decode_q5_0(blocks: Bytes) -> Floats:
    """Q5_0, 22 bytes: d float16, 32 fifth bits, 16 bytes of nibbles (low nibbles first); value ``d * (q - 16)``."""
    fifth = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
    nibbles = np.concatenate([blocks[:, 6:] & 0x0F, blocks[:, 6:] >> 4], axis=1)
    codes = (nibbles | (fifth << np.uint8(4))).astype(np.int8) - np.int8(16)
    values: Floats = half(blocks, 0) * codes.astype(np.float32)
    return values


def decode_q4_1(blocks: Bytes) -> Floats:
    """Q4_1, 20 bytes: d, m float16, 16 bytes of nibbles (low nibbles first); value ``d * q + m``."""
    codes = np.concatenate([blocks[:, 4:] & 0x0F, blocks[:, 4:] >> 4], axis=1)
    values: Floats = half(blocks, 0) * codes.astype(np.float32) + half(blocks, 2)
    return values


def decode_q5_1(blocks: Bytes) -> Floats:
    """Q5_1, 24 bytes: d, m float16, 32 fifth bits, 16 bytes of nibbles (low nibbles first); value ``d * q + m``."""
    fifth = np.unpackbits(blocks[:, 4:8], axis=1, bitorder="little")
    codes = np.concatenate([blocks[:, 8:] & 0x0F, blocks[:, 8:] >> 4], axis=1) | (fifth << np.uint8(4))
    values: Floats = half(blocks, 0) * codes.astype(np.float32) + half(blocks, 2)
    return values


def decode_q8_0(blocks: Bytes) -> Floats:
    """Q8_0, 34 bytes: d float16, 32 signed bytes; value ``q * d``."""
    values: Floats = blocks[:, 2:].view(np.int8).astype(np.float32)
    values *= half(blocks, 0)
    return values


def q4_k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """
    Unpack the eight 6-bit scales and minima of Q4_K blocks, each times its float16 factor.

    Returns:
        scale [n, 8, 1] and minimum [n, 8, 1], float32.
    """
    low, mid, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = np.concatenate([low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)], axis=1)
    minimum = np.concatenate([mid & 0x3F, (high >> 4) | ((mid >> 2) & 0x30)], axis=1)
    d = half(blocks, 0) * scale.astype(np.float32)
    m = half(blocks, 2) * minimum.astype(np.float32)
    return d[:, :, None], m[:, :, None]


def decode_q4_k(blocks: Bytes) -> Floats:
    """Q4_K, 144 bytes: d, dmin float16, 12 bytes of scales, 128 bytes of nibbles in four runs of 64 values."""
    scale, minimum = q4_k_scales(blocks)
    nibbles = (blocks[:, 16:].reshape(-1, 4, 1, 32) >> _LOW_HIGH) & np.uint8(0x0F)
    values = nibbles.reshape(-1, 8, 32).astype(np.float32)
    values *= scale
    values -= minimum
    return values.reshape(-1, 256)


def decode_q5_k(blocks: Bytes) -> Floats:
    """Q5_K, 176 bytes: as Q4_K with 32 bytes of fifth bits before the nibbles; bit s of byte j belongs to run s."""
    scale, minimum = q4_k_scales(blocks)
    nibbles = ((blocks[:, 48:].reshape(-1, 4, 1, 32) >> _LOW_HIGH) & np.uint8(0x0F)).reshape(-1, 8, 32)
    fifth = np.unpackbits(blocks[:, 16:48].reshape(-1, 1, 32), axis=1, bitorder="little")
    values = (nibbles | (fifth << np.uint8(4))).astype(np.float32)
    values *= scale
    values -= minimum
    return values.reshape(-1, 256)


def decode_q6_k(blocks: Bytes) -> Floats:
    """Q6_K, 210 bytes: 128 low nibbles, 64 bytes of upper pairs, 16 signed scales, d float16."""
    low = ((blocks[:, :128].reshape(-1, 2, 1, 64) >> _LOW_HIGH) & np.uint8(0x0F)).reshape(-1, 8, 32)
    high = ((blocks[:, 128:192].reshape(-1, 2, 1, 32) >> _PAIRS) & np.uint8(0x03)).reshape(-1, 8, 32)
    codes = (low | (high << np.uint8(4))).astype(np.int8) - np.int8(32)
    values = codes.reshape(-1, 16, 16).astype(np.float32)
    values *= (half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32))[:, :, None]
    return values.reshape(-1, 256)


def decode_apr_q4(blocks: Bytes) -> Floats:
    """AprQ4, 18 bytes: scale float16, 16 bytes with even elements low; a subnormal or non-finite scale reads as 0."""
    scale = half(blocks, 0)
    usable = np.isfinite(scale) & (np.abs(scale) >= _SMALLEST_NORMAL_HALF)
    scale = np.where(usable, scale, np.float32(0))
    nibbles = np.stack([blocks[:, 2:] & 0x0F, blocks[:, 2:] >> 4], axis=2).reshape(-1, 32)
    values: Floats = (nibbles.astype(np.int8) - np.int8(8)).astype(np.float32) * scale
    return values


def encode_bf16(values: Floats) -> Bytes:
    """Round float32 to bfloat16, ties to even; a NaN stays a NaN (made quiet) instead of rounding up to infinity."""
    bits = values.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, quiet, rounded).astype(np.uint16).view(np.uint8)


def encode_f16(values: Floats) -> Bytes:
    """Round float32 to float16, ties to even; what is too large becomes infinite, for the caller to count."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return values.astype(np.float16).view(np.uint8)


DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    "Q4_0": decode_q4_0,
    "Q4_1": decode_q4_1,
    "Q5_0": decode_q5_0,
    "Q5_1": decode_q5_1,
    "Q8_0": decode_q8_0,
    "Q4_K": decode_q4_k,
    "Q5_K": decode_q5_k,
    "Q6_K": decode_q6_k,
    "AprQ4": decode_apr_q4,
}


# Exponent bits, mantissa bits and bias; the FNUZ types have no infinity, no negative zero, and NaN in its place.
_FLOAT8 = {"F8_E4M3": (4, 3, 7), "F8_E5M2": (5, 2, 15), "F8_E4M3FNUZ": (4, 3, 8), "F8_E5M2FNUZ": (5, 2, 16)}


def float8_table(name: str) -> Floats:
    """
    Build the 256 values of an eight-bit float; ``F8_E8M0`` is a bare power of two, as block scales are stored.

    Returns:
        float32 [256], indexed by the stored byte.

    Source: "FP8 formats for deep learning", arXiv 2209.05433, section 3 (E4M3, E5M2); arXiv 2206.02915 (FNUZ); the OCP
    microscaling specification 1.0, section 5.4.1 (E8M0); the SafeTensors dtypes of those names.
    """
    codes = np.arange(256, dtype=np.uint16)
    if name == "F8_E8M0":
        powers: Floats = np.exp2(codes.astype(np.float64) - 127).astype(np.float32)
        powers[255] = np.nan
        return powers
    exponents, fraction, bias = _FLOAT8[name]
    exponent, mantissa = (codes >> fraction) & ((1 << exponents) - 1), (codes & ((1 << fraction) - 1)) / 2**fraction
    normal = (1 + mantissa) * np.exp2(exponent.astype(np.float64) - bias)
    magnitude = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), normal)
    if name.endswith("FNUZ"):
        magnitude[0x80] = np.nan
    elif name == "F8_E4M3":
        magnitude[(codes & 0x7F) == 0x7F] = np.nan
    else:
        magnitude[exponent == 31] = np.where(mantissa[exponent == 31] == 0, np.inf, np.nan)
    values: Floats = np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)
    return values

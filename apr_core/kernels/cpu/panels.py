"""
How weights lie in memory for the CPU kernels: panels of 16 rows, one 32-bit lane per row.

A matrix [rows, columns] becomes ceil(rows / 16) panels; rows that are not there are zero. A panel is one sequential
stream of blocks of 32 columns with their scales inline, because a second stream halves what memory delivers. Within a
block, chunk ``c`` (0 to 7) holds columns 4c to 4c + 3 of all 16 rows: byte 4r + k is row r, column 4c + k, so that one
vector of 16 lanes meets four broadcast activations in one dot product. Codes are unsigned; `Layout.zero` is what a code
of value 0 would be, and is subtracted as ``zero * sum of activations``.

    Q8_0         16 float16 scales; 8 chunks of bytes (stored byte with its sign bit flipped)
    Q4_0, Q5_0   16 float16 scales; 4 chunks of nibbles (chunk c low, chunk c + 4 high);
                 Q5_0 then one chunk of fifth bits (bit c is that of chunk c)
    Q4_K, Q5_K   per 256 columns: 16 float16 d, 16 float16 dmin; then 8 blocks, each of 16 scale bytes, 16 minimum
                 bytes, 4 chunks of nibbles, and for Q5_K one chunk of fifth bits
    Q6_K         per 256 columns: 16 float16 d; then 8 blocks, each of 16 + 16 signed scales (columns 0-15, 16-31),
                 4 chunks of nibbles, 2 chunks of upper bit pairs (pairs 2c of chunks c and c + 4)
    F16, F32     per column 16 values of 2 or 4 bytes, columns filled up to a multiple of 32 with zeros
    BF16         per two columns 16 pairs: the values of row r in the lower and upper half of lane r; filled up likewise

The functions here are the plain numpy definition that `repack` is tested against, byte for byte.

Cost: Q4_K and Q5_K grow by 2.8 and 2.3 % (their 6-bit scales become bytes); the others keep their size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apr_core.dtypes import FORMATS, QuantFormat
from apr_core.formats.blocks import encode_f16

Bytes = NDArray[np.uint8]
ROWS = 16
BLOCK = 32


@dataclass(frozen=True)
class Layout:
    """
    The panel layout of one element type.

    Attributes:
        code: Its number in the compiled step.
        columns: Columns per unit of the stream (32 or 256).
        unit_bytes: Bytes of one unit of a panel.
        zero: The code of value 0; None for float types, which have no codes.
        pack: Plain numpy: stored rows uint8 [16 n, row bytes] -> panels uint8 [bytes].
    """

    code: int
    columns: int
    unit_bytes: int
    zero: int | None
    pack: Callable[[Bytes], Bytes]

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of all panels of a matrix."""
        return -(-rows // ROWS) * -(-columns // self.columns) * self.unit_bytes


def pack_reference(dtype: QuantFormat, data: Bytes, rows: int, columns: int) -> Bytes:
    """
    Lay stored bytes [rows of a row-laid type] out in panels.

    Args:
        dtype: A type of `LAYOUTS`.
        data: uint8 [dtype.nbytes((rows, columns))].
        rows: Any number; filled up with zeros to a multiple of 16.
        columns: A multiple of the type's block; of float types any number.

    Returns:
        uint8 [LAYOUTS[dtype.name].nbytes(rows, columns)].
    """
    stored = data.reshape(rows, -1)
    filled = np.zeros((-(-rows // ROWS) * ROWS, stored.shape[1]), np.uint8)
    filled[:rows] = stored
    return LAYOUTS[dtype.name].pack(filled)


def _rows_last(values: NDArray[np.generic]) -> Bytes:
    """[16 n, units, ...] -> [n, units, ..., 16] as bytes, the 16 rows of a panel innermost."""
    panels = np.moveaxis(values.reshape(-1, ROWS, *values.shape[1:]), 1, -1)
    return np.ascontiguousarray(panels).view(np.uint8)


def _chunks(codes: Bytes) -> Bytes:
    """Codes [16 n, columns] -> [n, columns / 32, 8 chunks, 64]."""
    rows, columns = codes.shape
    split = codes.reshape(rows // ROWS, ROWS, columns // BLOCK, 8, 4)
    return split.transpose(0, 2, 3, 1, 4).reshape(rows // ROWS, columns // BLOCK, 8, 64)


def _nibbles(chunks: Bytes) -> Bytes:
    return ((chunks[:, :, :4] & np.uint8(15)) | (chunks[:, :, 4:] << np.uint8(4))).reshape(*chunks.shape[:2], 256)


def _fifth_bits(chunks: Bytes) -> Bytes:
    return np.bitwise_or.reduce((chunks >> np.uint8(4) & np.uint8(1)) << np.arange(8, dtype=np.uint8)[:, None], axis=2)


def _pair_bits(chunks: Bytes) -> Bytes:
    """Bits 4 and 5 of eight chunks -> two chunks: chunk c at bits 2c of the first, chunk c + 4 of the second."""
    pairs = (chunks >> 4 & 3).reshape(*chunks.shape[:2], 2, 4, 64)
    at = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return np.bitwise_or.reduce(pairs << at, axis=3).reshape(*chunks.shape[:2], 128)


def _joined(*parts: Bytes) -> Bytes:
    return np.concatenate(parts, axis=-1).reshape(-1)


def _pack_small(
    dtype: QuantFormat, codes: Callable[[Bytes], Bytes], rows: Bytes, *parts: Callable[..., Bytes]
) -> Bytes:
    """Blocks of 32: their float16 scale, and the parts of their codes."""
    blocks = rows.reshape(rows.shape[0], -1, dtype.block_bytes)
    scales = _rows_last(np.ascontiguousarray(blocks[:, :, :2]).view(np.uint16)[:, :, 0])
    chunks = _chunks(codes(blocks).reshape(rows.shape[0], -1))
    return _joined(scales, *(part(chunks) for part in parts))


def _pack_q8_0(rows: Bytes) -> Bytes:
    def flat(chunks: Bytes) -> Bytes:
        return chunks.reshape(*chunks.shape[:2], 512)

    return _pack_small(FORMATS["Q8_0"], lambda blocks: blocks[:, :, 2:] ^ np.uint8(0x80), rows, flat)


def _pack_q4_0(rows: Bytes) -> Bytes:
    def codes(blocks: Bytes) -> Bytes:
        return np.concatenate([blocks[:, :, 2:] & 15, blocks[:, :, 2:] >> 4], axis=2)

    return _pack_small(FORMATS["Q4_0"], codes, rows, _nibbles)


def _pack_q5_0(rows: Bytes) -> Bytes:
    def codes(blocks: Bytes) -> Bytes:
        fifth = np.unpackbits(blocks[:, :, 2:6], axis=2, bitorder="little")
        return np.concatenate([blocks[:, :, 6:] & 15, blocks[:, :, 6:] >> 4], axis=2) | fifth << 4

    return _pack_small(FORMATS["Q5_0"], codes, rows, _nibbles, _fifth_bits)


def _pack_k(dtype: QuantFormat, rows: Bytes) -> Bytes:
    """Q4_K and Q5_K: they differ by 32 bytes of fifth bits before the nibbles."""
    blocks = rows.reshape(rows.shape[0], -1, dtype.block_bytes)
    head = np.ascontiguousarray(blocks[:, :, :4]).view(np.uint16)  # d, dmin
    low, mid, high = blocks[:, :, 4:8], blocks[:, :, 8:12], blocks[:, :, 12:16]
    scale = np.concatenate([low & 63, high & 15 | low >> 2 & 48], axis=2)
    minimum = np.concatenate([mid & 63, high >> 4 | mid >> 2 & 48], axis=2)
    runs = blocks[:, :, dtype.block_bytes - 128 :].reshape(*blocks.shape[:2], 4, 32)
    codes = np.stack([runs & 15, runs >> 4], axis=3).reshape(*blocks.shape[:2], 8, 32)
    parts: tuple[Callable[[Bytes], Bytes], ...] = (_nibbles,)
    if dtype.name == "Q5_K":
        bits = blocks[:, :, 16:48][:, :, None] >> np.arange(8, dtype=np.uint8)[:, None]
        codes = codes | (bits & np.uint8(1)) << np.uint8(4)
        parts = (_nibbles, _fifth_bits)
    chunks = _chunks(codes.reshape(rows.shape[0], -1))
    units = (*_rows_last(scale).shape[:3], -1)
    scales = [_rows_last(part) for part in (scale, minimum)]
    body = np.concatenate([*scales, *(part(chunks).reshape(units) for part in parts)], axis=3)
    return _joined(_rows_last(head).reshape(*body.shape[:2], -1), body.reshape(*body.shape[:2], -1))


def _pack_q6_k(rows: Bytes) -> Bytes:
    blocks = rows.reshape(rows.shape[0], -1, 210)
    low = blocks[:, :, :128].reshape(*blocks.shape[:2], 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None] & np.uint8(15)
    high = blocks[:, :, 128:192].reshape(*blocks.shape[:2], 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[
        :, None
    ] & np.uint8(3)
    flat = (*blocks.shape[:2], 256)
    codes: Bytes = low.reshape(flat) | high.reshape(flat) << np.uint8(4)
    chunks = _chunks(codes.reshape(rows.shape[0], -1))
    scales = _rows_last(blocks[:, :, 192:208].reshape(*blocks.shape[:2], 8, 2))  # [n, units, 8, 2, 16]
    units = (*scales.shape[:3], -1)
    body = np.concatenate([part.reshape(units) for part in (scales, _nibbles(chunks), _pair_bits(chunks))], axis=3)
    d = _rows_last(np.ascontiguousarray(blocks[:, :, 208:]).view(np.uint16)[:, :, 0])
    return _joined(d, body.reshape(*body.shape[:2], -1))


def _pack_plain(width: int, rows: Bytes, together: int = 1) -> Bytes:
    """Columns of ``width`` bytes, so many of them ``together`` in a lane."""
    values = rows.reshape(rows.shape[0], -1, width)
    filled = np.zeros((rows.shape[0], -(-values.shape[1] // BLOCK) * BLOCK, width), np.uint8)
    filled[:, : values.shape[1]] = values
    lanes = filled.reshape(-1, ROWS, filled.shape[1] // together, width * together)
    return np.ascontiguousarray(lanes.transpose(0, 2, 1, 3)).reshape(-1)


LAYOUTS: dict[str, Layout] = {
    "Q8_0": Layout(0, 32, 544, 128, _pack_q8_0),
    "Q5_0": Layout(1, 32, 352, 16, _pack_q5_0),
    "Q4_0": Layout(2, 32, 288, 8, _pack_q4_0),
    "Q4_K": Layout(3, 256, 2368, 0, lambda rows: _pack_k(FORMATS["Q4_K"], rows)),
    "Q5_K": Layout(4, 256, 2880, 0, lambda rows: _pack_k(FORMATS["Q5_K"], rows)),
    "Q6_K": Layout(5, 256, 3360, 32, _pack_q6_k),
    "F16": Layout(6, 32, 1024, None, lambda rows: _pack_plain(2, rows)),
    "BF16": Layout(7, 32, 1024, None, lambda rows: _pack_plain(2, rows, together=2)),
    "F32": Layout(8, 32, 2048, None, lambda rows: _pack_plain(4, rows)),
}


def example_bytes(dtype: QuantFormat, rows: int, columns: int, seed: int) -> Bytes:
    """
    Draw stored bytes of a matrix for the tests of kernels: every code, and finite scales of either sign.

    Returns:
        uint8 [dtype.nbytes((rows, columns))].
    """
    random = np.random.default_rng(seed)
    if dtype.plain:
        values = random.standard_normal(rows * columns).astype(np.float32)
        if dtype.name == "F16":
            return encode_f16(values)
        return (
            values.view(np.uint8)
            if dtype.name == "F32"
            else (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
        )
    data = random.integers(0, 256, dtype.nbytes((rows, columns)), dtype=np.uint8).reshape(-1, dtype.block_bytes)
    halves = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(dtype.name, (0,))
    for at in halves:
        data[:, at : at + 2] = encode_f16(random.standard_normal(len(data)).astype(np.float32)).reshape(-1, 2)
    return data.reshape(-1)

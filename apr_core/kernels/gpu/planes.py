"""
How a weight matrix lies on the device: a plane per part of a block, so that 16 bytes of codes are one load.

Stored blocks have odd sizes (18, 22, 34, 210 bytes), which no device loads whole. Every quantised type becomes planes
over blocks of 32 columns, row after row, rows padded with zeros to a multiple of 32 and planes to 16 bytes:

    codes    byte i: column i in the low nibble, column i + 16 in the high one; Q8_0: a byte each, all first halves of
             a row, then all second halves
    bits     Q5_0, Q5_K: bit c of byte b belongs to column 4c + b; Q6_K: pair c (of 4) of byte b to column 4c + b, one
             word per half
    scales   Q8_0, Q5_0, Q4_0: float16 per block; Q4_K, Q5_K: scale and minimum, a byte each; Q6_K: two signed bytes
    supers   Q4_K, Q5_K: d and dmin, float16, per 8 blocks; Q6_K: d

Float types keep their rows. A value is ``scale * (code - zero)``; for Q4_K and Q5_K it is
``d * scale * code - dmin * minimum``.

Exactness: a permutation of bits (six-bit scales are widened to bytes): the stored blocks can be had back from it.
Cost: on the device, a few passes over the bytes; 148 bytes for the 144 of Q4_K, 180 for 176 of Q5_K, else the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from apr_core.dtypes import FORMATS

BLOCK = 32
"""Columns per block of every type, and rows per program of most kernels."""


@dataclass(frozen=True)
class Planes:
    """
    Bytes of one type, per block of 32 columns.

    Attributes:
        code: Number of the type in the kernels.
        codes: Of the codes.
        bits: Of upper bits.
        scales: Of scales.
        supers: Per 8 blocks.
    """

    code: int
    codes: int
    bits: int = 0
    scales: int = 0
    supers: int = 0

    def sections(self, rows: int, columns: int) -> tuple[int, int, int, int]:
        """Return where bits, scales and supers begin, and where the matrix ends."""
        count, blocks = padded(rows), columns // BLOCK
        at, begins = 0, []
        for size in (self.codes * blocks, self.bits * blocks, self.scales * blocks, self.supers * blocks // 8):
            at += padded(count * size, 16)
            begins.append(at)
        return begins[0], begins[1], begins[2], begins[3]

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix."""
        return self.sections(rows, columns)[3]


PLANES = {
    "Q8_0": Planes(0, 32, 0, 2),
    "Q4_0": Planes(1, 16, 0, 2),
    "Q5_0": Planes(2, 16, 4, 2),
    "Q4_K": Planes(3, 16, 0, 2, 4),
    "Q5_K": Planes(4, 16, 4, 2, 4),
    "Q6_K": Planes(5, 16, 8, 2, 2),
    "BF16": Planes(6, 64),
    "F16": Planes(7, 64),
    "F32": Planes(8, 128),
}


def padded(value: int, unit: int = BLOCK) -> int:
    """Round up to a whole number of units."""
    return -(-value // unit) * unit


def pack(name: str, stored: Tensor, rows: int, columns: int) -> Tensor:
    """
    Lay a stored matrix out in planes, on the device that it is on.

    Args:
        name: A type of `PLANES`.
        stored: uint8, the matrix as the file holds it.
        rows: Of the matrix.
        columns: Of the matrix, a multiple of 32.

    Returns:
        uint8 [PLANES[name].nbytes(rows, columns)].
    """
    layout, dtype = PLANES[name], FORMATS[name]
    out = torch.zeros(layout.nbytes(rows, columns), dtype=torch.uint8, device=stored.device)
    if dtype.plain:
        parts = [stored]
    else:
        blocks = stored.reshape(rows, columns // dtype.block_elements, dtype.block_bytes)
        codes, scales, supers = _TAKEN[name](blocks)
        codes = codes.reshape(rows, columns // BLOCK, BLOCK)
        parts = [_plane_of_codes(name, codes), _plane_of_bits(layout.bits, codes), scales, supers]
    for at, part in zip((0, *layout.sections(rows, columns)), parts, strict=False):
        out[at : at + part.numel()] = part.reshape(-1)
    return out


def _plane_of_codes(name: str, codes: Tensor) -> Tensor:
    first, second = codes[..., :16], codes[..., 16:]
    return torch.stack((first, second), dim=1) if name == "Q8_0" else (first & 15) | (second << 4)


def _plane_of_bits(size: int, codes: Tensor) -> Tensor:
    """Gather the bits above a nibble: eight chunks of four columns into the bytes of one word, or of two."""
    words, width = max(1, size // 4), 2 if size == 8 else 1
    upper = (codes >> 4).reshape(*codes.shape[:-1], words, 8 // words, 4)
    total = torch.zeros_like(upper[..., 0, :])
    for chunk in range(8 // words):
        total |= upper[..., chunk, :] << (width * chunk)
    return total if size else total[:0]


Taken = tuple[Tensor, Tensor, Tensor]


def _nibbles(packed: Tensor) -> Tensor:
    """Low nibbles of [..., n] bytes, then high ones: [..., 2 n]."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _single_bits(packed: Tensor) -> Tensor:
    """Bits of [..., n] bytes, the lowest first: [..., 8 n]."""
    return ((packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1).flatten(-2)


def _take_q8_0(b: Tensor) -> Taken:
    return b[..., 2:], b[..., :2], b[:0]


def _take_q4_0(b: Tensor) -> Taken:
    return _nibbles(b[..., 2:]), b[..., :2], b[:0]


def _take_q5_0(b: Tensor) -> Taken:
    return _nibbles(b[..., 6:]) | (_single_bits(b[..., 2:6]) << 4), b[..., :2], b[:0]


def _six_bits(b: Tensor) -> Tensor:
    """The eight scales and minima of a super-block, a byte each: [..., 8, 2]."""
    low, mid, high = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scale = torch.cat((low & 63, (high & 15) | ((low >> 2) & 48)), dim=-1)
    minimum = torch.cat((mid & 63, (high >> 4) | ((mid >> 2) & 48)), dim=-1)
    return torch.stack((scale, minimum), dim=-1)


def _runs(packed: Tensor) -> Tensor:
    """Four runs of 32 bytes: 32 low nibbles, then 32 high ones, of each."""
    return _nibbles(packed.reshape(*packed.shape[:-1], 4, 32))


def _take_q4_k(b: Tensor) -> Taken:
    return _runs(b[..., 16:]), _six_bits(b), b[..., :4]


def _take_q5_k(b: Tensor) -> Taken:
    # bit s of byte j belongs to column j of run s
    fifth = _single_bits(b[..., 16:48, None]).transpose(-1, -2)
    codes = _runs(b[..., 48:]).reshape(*b.shape[:-1], 8, 32)
    return codes | (fifth << 4), _six_bits(b), b[..., :4]


def _take_q6_k(b: Tensor) -> Taken:
    low = _nibbles(b[..., :128].reshape(*b.shape[:-1], 2, 64)).reshape(*b.shape[:-1], 2, 4, 32)
    pairs = b[..., 128:192].reshape(*b.shape[:-1], 2, 1, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=b.device).reshape(4, 1)
    return low | (((pairs >> shifts) & 3) << 4), b[..., 192:208], b[..., 208:]


_TAKEN: dict[str, Callable[[Tensor], Taken]] = {
    "Q8_0": _take_q8_0,
    "Q4_0": _take_q4_0,
    "Q5_0": _take_q5_0,
    "Q4_K": _take_q4_k,
    "Q5_K": _take_q5_k,
    "Q6_K": _take_q6_k,
}
"""Blocks [rows, blocks, bytes] -> codes, scales, supers."""

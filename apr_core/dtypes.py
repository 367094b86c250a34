"""
Every element type in one table: its block geometry and its number in each of the three formats.

Source: the GGML type enumeration (block sizes as in the ``gguf`` package, which a test compares), the SafeTensors
dtype names, and the APR v2 dtype ids as written by its reference writers. Nothing here ever defaults to F32: an id that
is not in the table is an error of the reader that met it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class QuantFormat:
    """
    One element type.

    Attributes:
        name: Upper-case field name, e.g. ``Q4_K``.
        block_elements: Elements per block; 1 for plain types.
        block_bytes: Bytes per block.
        gguf: GGML type id, or None where GGUF cannot hold the type.
        safetensors: SafeTensors dtype name, or None.
        apr: APR v2 dtype id that a writer uses, or None.
        layout: How blocks meet the shape: ``row`` (each row is padded to whole blocks), ``flat`` (one stream of blocks
            over the whole tensor), ``tensor`` (one header of ``block_bytes`` bytes for the whole tensor, then one byte
            per element).
        plain: True for float types that need no codec beyond a cast.
    """

    name: str
    block_elements: int
    block_bytes: int
    gguf: int | None = None
    safetensors: str | None = None
    apr: int | None = None
    layout: str = "row"
    plain: bool = False

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor: ``rows * ceil(columns / block) * block_bytes``; Python integers cannot overflow."""
        count = prod(shape)
        if self.layout == "tensor":
            return self.block_bytes + count
        if self.layout == "flat" or not shape:
            return -(-count // self.block_elements) * self.block_bytes
        return prod(shape[:-1]) * -(-shape[-1] // self.block_elements) * self.block_bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element, scales included."""
        return 8.0 if self.layout == "tensor" else 8 * self.block_bytes / self.block_elements

    def __str__(self) -> str:
        return self.name


_TABLE = (
    # name, elements, bytes, gguf, safetensors, apr
    QuantFormat("F32", 1, 4, 0, "F32", 0, plain=True),
    QuantFormat("F16", 1, 2, 1, "F16", 1, plain=True),
    QuantFormat("BF16", 1, 2, 30, "BF16", 30, plain=True),
    QuantFormat("F64", 1, 8, 28, "F64", 3, plain=True),
    QuantFormat("I8", 1, 1, 24, "I8", 6),
    QuantFormat("I16", 1, 2, 25, "I16"),
    QuantFormat("I32", 1, 4, 26, "I32", 4),
    QuantFormat("I64", 1, 8, 27, "I64", 5),
    QuantFormat("U8", 1, 1, None, "U8", 7),
    QuantFormat("U16", 1, 2, None, "U16"),
    QuantFormat("U32", 1, 4, None, "U32"),
    QuantFormat("U64", 1, 8, None, "U64"),
    QuantFormat("BOOL", 1, 1, None, "BOOL"),
    QuantFormat("F8_E4M3", 1, 1, None, "F8_E4M3"),
    QuantFormat("F8_E5M2", 1, 1, None, "F8_E5M2"),
    QuantFormat("F8_E8M0", 1, 1, None, "F8_E8M0"),
    QuantFormat("F8_E4M3FNUZ", 1, 1, None, "F8_E4M3FNUZ"),
    QuantFormat("F8_E5M2FNUZ", 1, 1, None, "F8_E5M2FNUZ"),
    QuantFormat("Q4_0", 32, 18, 2),
    QuantFormat("Q4_1", 32, 20, 3),
    QuantFormat("Q5_0", 32, 22, 6),
    QuantFormat("Q5_1", 32, 24, 7),
    QuantFormat("Q8_0", 32, 34, 8),
    QuantFormat("Q8_1", 32, 40, 9),
    QuantFormat("Q2_K", 256, 84, 10),
    QuantFormat("Q3_K", 256, 110, 11),
    QuantFormat("Q4_K", 256, 144, 12, None, 12),
    QuantFormat("Q5_K", 256, 176, 13),
    QuantFormat("Q6_K", 256, 210, 14, None, 14),
    QuantFormat("Q8_K", 256, 292, 15),
    QuantFormat("IQ2_XXS", 256, 66, 16),
    QuantFormat("IQ2_XS", 256, 74, 17),
    QuantFormat("IQ3_XXS", 256, 98, 18),
    QuantFormat("IQ1_S", 256, 50, 19),
    QuantFormat("IQ4_NL", 32, 18, 20),
    QuantFormat("IQ3_S", 256, 110, 21),
    QuantFormat("IQ2_S", 256, 82, 22),
    QuantFormat("IQ4_XS", 256, 136, 23),
    QuantFormat("IQ1_M", 256, 56, 29),
    QuantFormat("TQ1_0", 256, 54, 34),
    QuantFormat("TQ2_0", 256, 66, 35),
    QuantFormat("MXFP4", 32, 17, 39),
    QuantFormat("NVFP4", 64, 36, 40),
    QuantFormat("Q1_0", 128, 18, 41),
    QuantFormat("AprQ4", 32, 18, None, None, 128, layout="flat"),
    QuantFormat("AprQ8", 1, 4, None, None, 129, layout="tensor"),
)

FORMATS: dict[str, QuantFormat] = {q.name: q for q in _TABLE}
BY_GGUF: dict[int, QuantFormat] = {q.gguf: q for q in _TABLE if q.gguf is not None}
BY_SAFETENSORS: dict[str, QuantFormat] = {q.safetensors: q for q in _TABLE if q.safetensors is not None}
BY_APR: dict[int, QuantFormat] = {q.apr: q for q in _TABLE if q.apr is not None}

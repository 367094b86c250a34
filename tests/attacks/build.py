"""Files built byte by byte from the public formats, without our writers: the valid ones, and every way to bend them."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import lz4.block
import zstandard


class Attack(NamedTuple):
    """A hostile file, and words that its refusal must contain."""

    id: str
    data: bytes
    says: str


def safetensors(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Pack a SafeTensors file; ``header`` may be raw bytes, ``length`` may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    """Build one header entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def text(value: str | bytes, length: int | None = None) -> bytes:
    """Pack a GGUF string; ``length`` may lie."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    """Pack a GGUF key-value pair."""
    return text(key) + struct.pack("<I", kind) + payload


def row(
    name: str | bytes = "a", ne: Sequence[int] = (2,), kind: int = 0, offset: int = 0, dims: int | None = None
) -> bytes:
    """Pack a row of the GGUF tensor table; negative numbers become their two's complement."""
    extents = b"".join(struct.pack("<Q", extent % 2**64) for extent in ne)
    count = struct.pack("<I", len(ne) if dims is None else dims)
    return text(name) + count + extents + struct.pack("<IQ", kind % 2**32, offset)


def gguf(
    rows: Sequence[bytes] = (),
    pairs: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    n_rows: int | None = None,
    n_pairs: int | None = None,
) -> bytes:
    """Pack a GGUF file; the counts may lie."""
    counts = struct.pack(
        "<IQQ", version, len(rows) if n_rows is None else n_rows, len(pairs) if n_pairs is None else n_pairs
    )
    head = b"GGUF" + counts + b"".join(pairs) + b"".join(rows)
    return head + bytes(-len(head) % 32) + data


def apr_entry(name: str | bytes, kind: int, shape: Sequence[int], offset: int, size: int) -> bytes:
    """Pack an APR index entry."""
    data = name.encode() if isinstance(name, str) else name
    return struct.pack(f"<H{len(data)}sBB{len(shape)}QQQ", len(data), data, kind, len(shape), *shape, offset, size)


def apr(
    entries: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    metadata: bytes = b"{}",
    magic: bytes = b"APR\0",
    major: int = 2,
    flags: int = 0x0400,
    count: int | None = None,
    places: Sequence[int | None] = (None, None, None, None),
    break_header: bool = False,
    break_footer: bool = False,
) -> bytes:
    """Pack an APR v2 file with correct checksums; ``places`` overrides the four places in the header."""
    index = b"".join(entries)
    index_at = 64 + -(-len(metadata) // 64) * 64
    data_at = index_at + -(-len(index) // 64) * 64
    given = [64, len(metadata), index_at, data_at]
    meta_at, meta_size, index_place, data_place = [
        mine if theirs is None else theirs for mine, theirs in zip(given, places, strict=True)
    ]
    number = len(entries) if count is None else count
    head = struct.pack("<4sBBHIQIQQ", magic, major, 0, flags, number, meta_at, meta_size, index_place, data_place)
    checksum = zlib.crc32(head + bytes(20)) ^ break_header
    body = head + struct.pack("<I", checksum) + bytes(20)
    body += metadata.ljust(index_at - 64, b"\0") + index.ljust(data_at - index_at, b"\0") + data
    return body + struct.pack("<I", zlib.crc32(body) ^ break_footer)


def apr_packed(image: bytes, flags: int, blob: bytes | None = None, *, footer: bytes | None = None) -> bytes:
    """
    Compress an APR file with LZ4 (flags 0x0401) or Zstandard (0x0402), checksums made right again.

    Args:
        image: The file as it would be without compression, with its footer unless one is given.
        flags: Flags to set.
        blob: What stands in place of the compressed bytes.
        footer: Footer to put behind ``image`` in place of the right one.
    """
    head = bytearray(image[:64].ljust(64, b"\0") if image else apr([apr_entry("a", 7, (1,), 0, 1)], bytes(64))[:64])
    head[6:8] = flags.to_bytes(2, "little")
    head[40:44] = zlib.crc32(head[:40] + head[44:]).to_bytes(4, "little")
    if blob is None:
        body = bytes(head) + image[64 : len(image) if footer else -4]
        body += struct.pack("<I", zlib.crc32(body)) if footer is None else footer
        blob = lz4.block.compress(body[64:]) if flags & 1 else zstandard.compress(body[64:])
    return bytes(head) + blob


VALID_SAFETENSORS = safetensors({"a": entry(), "b": entry("F16", [2, 1], [8, 12])}, struct.pack("<2f2e", 1, -2, 3, -4))
VALID_GGUF = gguf(
    [row("token_embd.weight", (2, 1), 0, 0), row("extra", (32,), 8, 32)],
    [
        pair("general.architecture", 8, text("qwen2")),
        pair("qwen2.block_count", 4, struct.pack("<I", 1)),
        pair("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2) + text("a") + text("bc")),
        pair("flags", 9, struct.pack("<IQ", 7, 3) + b"\1\0\1"),
    ],
    struct.pack("<2f", 1, -2) + bytes(24) + struct.pack("<e", 0.5) + bytes(range(32)),
)
VALID_APR = apr(
    [apr_entry("lm_head.weight", 0, (2,), 0, 8), apr_entry("norm.weight", 30, (2,), 64, 4)],
    struct.pack("<2f", 1, -2) + bytes(56) + b"\x80\x3f\x80\x3f" + bytes(60),
    metadata=b'{"hidden_dim": 2, "num_heads": null}',
)
VALID = {"safetensors": VALID_SAFETENSORS, "gguf": VALID_GGUF, "apr": VALID_APR}

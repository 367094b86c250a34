"""
APR version 2: a 64-byte header, JSON metadata, a sorted binary index, 64-byte aligned tensors and a CRC-32 footer.

Every checksum is verified and every unknown id refused: the format's own readers do neither, and what they let through
(a dtype read as F32, an index that stops early) shows only as nonsense text later.
Source: the layout as paiml/aprender writes it (``format/v2``), restated in ``shared/spec/apr.md`` sections 1.1 to 1.9.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from apr_core.dtypes import BY_APR, FORMATS, QuantFormat
from apr_core.errors import FormatError, NotFound, UsageError
from apr_core.formats import names
from apr_core.formats.apr_packed import LZ4, ZSTD, unpack
from apr_core.formats.apr_unrunnable import refuse_v1
from apr_core.formats.checkpoint import Contents, Gap, MappedFile, TensorInfo, TensorSource, map_file
from apr_core.formats.shards import MAX_PARTS, require_once, safe_shard, sibling_paths
from apr_core.formats.sink import refuse_type, replacing, require_unique
from apr_core.formats.spans import align_up, find_gaps, is_addressable, require_extent
from apr_core.formats.strict_json import parse_object

ALIGNMENT = 64
HEADER_BYTES = 64
FOOTER_BYTES = 4
MAX_METADATA_BYTES = 16 << 20
MAX_NAME_BYTES = 256
MAX_DIMS = 8
SHARDED, ROW_MAJOR, COLUMN_MAJOR = 0x0010, 0x0400, 0x0800
_MAGICS = (b"APR\0", b"APR2")
_HEADER = struct.Struct("<4sBBHIQIQQ")  # 40 bytes, up to the checksum
_FLAGS = {
    LZ4: "lz4_compressed",
    ZSTD: "zstd_compressed",
    0x0004: "encrypted",
    0x0008: "signed",
    SHARDED: "sharded",
    0x0020: "quantized",
    0x0040: "has_filterbank",
    0x0080: "has_model_card",
    0x0100: "streaming",
    0x0200: "has_vocab",
    ROW_MAJOR: "layout_row_major",
    COLUMN_MAJOR: "layout_column_major",
}
_REFUSED = {
    COLUMN_MAJOR: (
        "row-major tensors",
        "the column-major flag (LAYOUT-002)",
        "export it again with a current writer",
    ),
    0x0004: ("plain tensor bytes", "an encrypted file (AES-256-GCM)", "decrypt it with the tool that encrypted it"),
    0x0008: (
        "a file without a signature",
        "the signed flag (Ed25519): the signature cannot be checked here",
        "check it with the tool that signed it, and export it without",
    ),
}
_SMALLEST_ENTRY = 20
_FRESH = "get a fresh copy of the file"
# Old ids, read by size: the reader that wrote 8 for its own Q4 and the one that means GGML's Q8_0 share it.
_LEGACY: Mapping[int, tuple[str, ...]] = {
    2: ("BF16", "Q4_0"),
    8: ("AprQ4", "AprQ8", "Q8_0"),
    9: ("AprQ8", "AprQ4", "Q8_0"),
}
_GGML_ONLY = {6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K"}


class _Header:
    """The fields of a header whose checksum holds."""

    def __init__(self, file: MappedFile) -> None:
        head = bytes(file.view[:HEADER_BYTES])
        if len(head) < HEADER_BYTES:
            raise FormatError(
                expected=f"a header of {HEADER_BYTES} bytes",
                found=f"{len(head)}: the file is truncated, {HEADER_BYTES - len(head)} bytes are missing",
                file=file.path,
                at=0,
                advice="download it again",
            )
        stored = int.from_bytes(head[40:44], "little")
        computed = zlib.crc32(head[44:], zlib.crc32(head[:40]))
        fields = _HEADER.unpack(head[:40])
        self.magic, self.major, self.minor, self.flags = fields[:4]
        self.tensor_count, self.metadata_at, self.metadata_bytes, self.index_at, self.data_at = fields[4:]
        if self.major != 2:
            raise _wrong(file, "version 2", f"version {self.major}.{self.minor}", 4)
        if stored != computed:
            raise _wrong(file, f"header checksum {computed:#010x}", f"{stored:#010x}: the header was altered", 40)


def read_apr(file: MappedFile, *, verify_footer: bool = True) -> Contents:
    """
    Read an APR v2 file, plain or compressed; of a sharded one, all shards, whichever is given.

    Args:
        file: The mapped file.
        verify_footer: Check the CRC-32 of the whole file (one pass over all bytes, about 1 GB/s).

    Raises:
        FormatError: Any deviation, by name; version 1, column-major, encrypted and signed files; shards that are
            missing or do not belong together.
        Unavailable: The file is compressed, and the package that unpacks it is not installed.
    """
    part = _read_part(file, verify_footer=verify_footer)
    sharding = _read_sharding(part)
    if sharding is None:
        return _contents([part], part.tensors)
    paths = sibling_paths(file.path, sharding.index + 1, sharding.count, "put the shards side by side, as they came")
    parts = [
        part if n == sharding.index else _read_part(map_file(path), verify_footer=verify_footer)
        for n, path in enumerate(paths)
    ]
    return _join(parts, sharding.count)


def read_manifest(file: MappedFile, manifest: Mapping[str, object], *, verify_footer: bool = True) -> Contents:
    """
    Read the shards that a manifest names; manifest and shards must list exactly the same tensors.

    Args:
        file: The manifest, for messages and to find the shards beside it.
        manifest: Its content.
        verify_footer: As `read_apr`.

    Raises:
        FormatError: A shard is missing or lies outside the folder, or manifest and shards disagree.
    """
    rows = manifest.get("shards")
    listed = rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else []
    if not listed or manifest.get("shard_count") != len(listed):
        stated = manifest.get("shard_count")
        raise _wrong(file, "shard_count and as many shards", f"shard_count {stated!r:.20}, {len(listed)} shards", 0)
    by_index = {number: row for row in listed if type(number := row.get("index")) is int}
    if set(by_index) != set(range(len(listed))):
        raise _wrong(file, f"shards of index 0 to {len(listed) - 1}", f"{sorted(by_index)!r:.60}", 0)
    parts = []
    for number, row in sorted(by_index.items()):
        name = safe_shard(row.get("filename"), f"shard {number}", file.path)
        try:
            part = _read_part(map_file(file.path.parent / name), verify_footer=verify_footer)
        except NotFound as error:
            raise _wrong(file, f"shard {number + 1} of {len(listed)}, {name:.120}", "no such file", 0) from error
        parts.append(part)
    placed = {info.stored_name: number for number, part in enumerate(parts) for info in part.tensors}
    contents = _join(parts, len(parts))
    found = manifest.get("weight_map")
    if found != placed or manifest.get("tensor_count", len(placed)) != len(placed):
        listing = found if isinstance(found, dict) else {}
        other = sorted(name for name in {*placed, *listing} if placed.get(name) != listing.get(name))
        raise _wrong(
            file,
            f"a weight_map that places each of {len(placed)} tensors where it is",
            f"another, of {len(listing)} ({', '.join(other[:3])})",
            0,
        )
    return contents


@dataclass(frozen=True, eq=False)
class _Part:
    """One APR file, read; ``file`` is unpacked when it was compressed."""

    file: MappedFile
    header: _Header
    metadata: dict[str, object]
    tensors: list[TensorInfo]
    gaps: tuple[Gap, ...]


@dataclass(frozen=True)
class _Sharding:
    """Which shard of how many a file says it is; ``index`` counts from 0."""

    index: int
    count: int


def _contents(parts: Sequence[_Part], tensors: Sequence[TensorInfo]) -> Contents:
    header, metadata = parts[0].header, parts[0].metadata
    config = names.config_from_apr(metadata, [info.name for info in tensors])
    facts = {
        "version": f"{header.major}.{header.minor}",
        "flags": [name for bit, name in _FLAGS.items() if header.flags & bit],
        "compressed": parts[0].file.stored is not None,
        "parts": len(parts),
    }
    gaps = tuple(gap for part in parts for gap in part.gaps)
    return Contents(tuple(part.file for part in parts), tensors, metadata, config, gaps, facts)


def _read_part(file: MappedFile, *, verify_footer: bool) -> _Part:
    """Read one file, sharded or not."""
    magic = bytes(file.view[:4])
    if magic in (b"APRN", b"APR1"):
        raise refuse_v1(file)
    if magic not in _MAGICS:
        raise _wrong(file, "the magic 'APR' and a zero byte", f"{magic!r}", 0)
    header = _Header(file)
    _require_readable(file, header)
    file = unpack(file, header.flags, HEADER_BYTES, header.metadata_bytes)
    _require_sections(file, header)
    metadata = _read_metadata(file, header)
    tensors = sorted(_read_index(file, header), key=lambda info: (info.offset, info.nbytes, info.stored_name))
    require_extent(tensors, file=file.path, stop=file.size)
    stop = file.size - FOOTER_BYTES
    _require_footer(file, header, tensors, verify=verify_footer)
    gaps = find_gaps(tensors, file=file.path, start=header.data_at, stop=stop, alignment=ALIGNMENT)
    return _Part(file, header, metadata, tensors, gaps)


def _read_sharding(part: _Part) -> _Sharding | None:
    """Read which shard a file is; None for a whole model."""
    said = part.metadata.get("sharding")
    flagged = bool(part.header.flags & SHARDED)
    if said is None and not flagged:
        return None
    found = [said.get(key) if isinstance(said, dict) else None for key in ("shard_index", "shard_count")]
    index, count = (value if type(value) is int else -1 for value in found)
    if not flagged or not 0 <= index < count <= MAX_PARTS:
        raise _wrong(
            part.file,
            "the sharded flag, and sharding with shard_index below shard_count in the metadata",
            f"flag {'set' if flagged else 'not set'}, sharding {said!r:.80}",
            6,
        )
    return None if count == 1 else _Sharding(index, count)


def _join(parts: Sequence[_Part], count: int) -> Contents:
    """Put shards together that agree about what they are."""
    first = names.config_from_apr(parts[0].metadata, ())
    for number, part in enumerate(parts):
        sharding = _read_sharding(part) or _Sharding(0, 1)
        if sharding != _Sharding(number, count):
            raise _wrong(
                part.file, f"shard {number + 1} of {count}", f"shard {sharding.index + 1} of {sharding.count}", 6
            )
        config = names.config_from_apr(part.metadata, ())
        if config is not None and config != first:
            keys = sorted(key for key in {*config, *(first or {})} if config.get(key) != (first or {}).get(key))
            raise _wrong(
                part.file,
                f"the configuration of {parts[0].file.path.name}",
                f"another {', '.join(keys[:3])}: a shard of another model",
                HEADER_BYTES,
            )
    return _contents(parts, require_once([part.tensors for part in parts], "get all shards from one source"))


def _wrong(file: MappedFile, expected: str, found: str, at: int, tensor: str | None = None) -> FormatError:
    return FormatError(expected=expected, found=found, file=file.path, tensor=tensor, at=at, advice=_FRESH)


def _require_readable(file: MappedFile, header: _Header) -> None:
    """Refuse what the flags announce and we cannot read."""
    for bit, (expected, found, advice) in _REFUSED.items():
        if header.flags & bit:
            raise FormatError(expected=expected, found=found, file=file.path, at=6, advice=advice)
    unknown = header.flags & ~sum(_FLAGS)
    if unknown:
        raise _wrong(file, "known flags", f"bits {unknown:#06x}, which nobody has defined", 6)


def _require_sections(file: MappedFile, header: _Header) -> None:
    """Demand sections in order and within the file before any of their sizes is used."""
    if header.metadata_bytes > MAX_METADATA_BYTES:
        raise _wrong(file, f"at most {MAX_METADATA_BYTES} bytes of metadata", f"{header.metadata_bytes}", 20)
    ends = (
        ("metadata behind the header", HEADER_BYTES, header.metadata_at, 12),
        ("the index behind the metadata", header.metadata_at + header.metadata_bytes, header.index_at, 24),
        ("data behind the index", header.index_at + header.tensor_count * _SMALLEST_ENTRY, header.data_at, 32),
    )
    for what, earliest, offset, at in ends:
        if offset < earliest:
            raise _wrong(file, f"{what}, at byte {earliest} or later", f"byte {offset}", at)
    missing = header.data_at + FOOTER_BYTES - file.size
    if missing > 0:
        raise FormatError(
            expected=f"data from byte {header.data_at} and a footer",
            found=f"{file.size} bytes: the file is truncated, at least {missing} bytes are missing",
            file=file.path,
            at=32,
            advice="download it again",
        )


def _read_metadata(file: MappedFile, header: _Header) -> dict[str, object]:
    text = bytes(file.view[header.metadata_at : header.metadata_at + header.metadata_bytes])
    return parse_object(text, file=file.path, what="APR metadata", at=header.metadata_at)


def _read_index(file: MappedFile, header: _Header) -> list[TensorInfo]:
    """Parse the index; entries must be sorted by name and lie before the data section."""
    block = bytes(file.view[header.index_at : header.data_at])
    if block[:1] == b"[":
        raise FormatError(
            expected="a binary tensor index",
            found="a JSON index (JSON-APR: all weights as one JSON text, of an old conversion path): it cannot be run",
            file=file.path,
            at=header.index_at,
            advice="convert the original model again; `apr inspect` describes this one",
        )
    tensors: list[TensorInfo] = []
    at, previous = 0, b""
    for number in range(header.tensor_count):
        try:
            info, stored, after = _read_entry(file, header, block, at)
        except struct.error as error:
            raise _wrong(
                file,
                f"{header.tensor_count} index entries",
                f"the data section within entry {number}",
                header.index_at + at,
            ) from error
        if tensors and stored <= previous:
            found = "the same name twice" if stored == previous else f"a smaller one behind {previous!r:.80}"
            raise _wrong(file, "index names in ascending order", found, header.index_at + at, info.stored_name)
        tensors.append(info)
        at, previous = after, stored
    if block[at:].strip(b"\0"):
        raise _wrong(
            file,
            f"zeros behind the last of {header.tensor_count} index entries",
            "other bytes: the header's tensor count is too small",
            header.index_at + at,
        )
    return tensors


def _read_entry(file: MappedFile, header: _Header, block: bytes, at: int) -> tuple[TensorInfo, bytes, int]:
    """Parse one entry; raises struct.error where it runs out of the index."""
    place = header.index_at + at
    (length,) = struct.unpack_from("<H", block, at)
    stored = block[at + 2 : at + 2 + length]
    if not 1 <= length <= MAX_NAME_BYTES:
        raise _wrong(file, f"a tensor name of 1 to {MAX_NAME_BYTES} bytes", f"{length}", place)
    try:
        name = stored.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _wrong(file, "a tensor name in UTF-8", f"{stored!r:.80}", place) from error
    at += 2 + length
    kind, n_dims = struct.unpack_from("<BB", block, at)
    if n_dims > MAX_DIMS:
        raise _wrong(file, f"at most {MAX_DIMS} dimensions", f"{n_dims}", place, name)
    shape = struct.unpack_from(f"<{n_dims}Q", block, at + 2)
    if not is_addressable(shape):
        raise _wrong(file, "a shape that an array can have", f"{list(shape)!r:.80}", place, name)
    offset, size = struct.unpack_from("<QQ", block, at + 2 + 8 * n_dims)
    dtype = _dtype(file, kind, shape, size, name, place)
    info = TensorInfo(names.apr_canonical(name), dtype, shape, file.path, header.data_at + offset, size, name)
    return info, stored, at + 18 + 8 * n_dims


def _dtype(file: MappedFile, kind: int, shape: tuple[int, ...], size: int, name: str, place: int) -> QuantFormat:
    """Resolve an id, old ones by the stored size; a size that fits no reading is refused, never guessed at."""
    readings = [FORMATS[candidate] for candidate in _LEGACY.get(kind, ())]
    if kind in BY_APR:
        readings.append(BY_APR[kind])
    for dtype in readings:
        if dtype.nbytes(shape) == size:
            return dtype
    if kind in _GGML_ONLY and (not readings or size == FORMATS[_GGML_ONLY[kind]].nbytes(shape)):
        raise FormatError(
            expected="an APR dtype",
            found=f"id {kind}, GGML's {_GGML_ONLY[kind]}, which APR cannot hold",
            file=file.path,
            tensor=name,
            at=place,
            advice="convert the original with Q4_K or Q6_K",
        )
    if not readings:
        raise _wrong(file, "a known dtype id", f"{kind}", place, name)
    sizes = " or ".join(f"{dtype.nbytes(shape)} bytes ({dtype})" for dtype in readings)
    flat = -(-prod(shape) // readings[0].block_elements) * readings[0].block_bytes
    hint = ", the size without row padding (GH-202)" if size == flat and readings[0].layout == "row" else ""
    raise _wrong(file, f"{sizes} for shape {list(shape)}", f"{size}{hint}", place, name)


def _require_footer(file: MappedFile, header: _Header, tensors: Sequence[TensorInfo], *, verify: bool) -> None:
    """Check that the data leaves room for the footer, and its CRC-32."""
    stop = file.size - FOOTER_BYTES
    end = max((info.offset + info.nbytes for info in tensors), default=header.data_at)
    if end > stop:
        raise _wrong(
            file,
            f"a footer of {FOOTER_BYTES} bytes behind byte {end}",
            f"{file.size - end}: the file is truncated",
            end,
        )
    if not verify:
        return
    stored = int.from_bytes(file.view[stop:], "little")
    computed = zlib.crc32(file.view[:stop])
    if stored != computed:
        raise _wrong(
            file, f"footer checksum {computed:#010x}", f"{stored:#010x}: the file was altered or cut short", stop
        )


def write_apr(
    path: Path,
    sources: Sequence[TensorSource],
    metadata: Mapping[str, object],
    *,
    progress: Callable[[int], None] | None = None,
) -> None:
    """
    Write an APR v2 file: index sorted by name, data in the order of ``sources``.

    Args:
        path: Target; replaced only when everything is on the disk.
        sources: Tensors under their canonical names; their bytes are streamed.
        metadata: The JSON metadata, see `names.apr_metadata`; numpy numbers and arrays are written as JSON ones.
        progress: Called with the bytes written so far.

    Raises:
        UsageError: A type that APR cannot hold, a name twice or too long, metadata that is no strict JSON or too large.
        ReadWriteError: The operating system refuses.
    """
    path = Path(path)
    require_unique([(source.name, source) for source in sources], path)
    text = _encode_metadata(metadata, path)
    index = _encode_index(sources, path)
    index_at = HEADER_BYTES + align_up(len(text), ALIGNMENT)
    data_at = index_at + align_up(len(index), ALIGNMENT)
    head = _HEADER.pack(b"APR\0", 2, 0, ROW_MAJOR, len(sources), HEADER_BYTES, len(text), index_at, data_at)
    reserved = bytes(20)
    checksum = zlib.crc32(reserved, zlib.crc32(head))
    with replacing(path, progress, checksum=True) as sink:
        sink.write(head + checksum.to_bytes(4, "little") + reserved)
        for section in (text, index):
            sink.write(section)
            sink.pad_to(ALIGNMENT)
        for source in sources:
            sink.write_tensor(source)
            sink.pad_to(ALIGNMENT)
        sink.write(sink.crc.to_bytes(4, "little"))


def _encode_metadata(metadata: Mapping[str, object], path: Path) -> bytes:
    try:
        text = json.dumps(
            dict(metadata), allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=_plain
        ).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"metadata is not strict JSON (for {path}): {error}", advice="convert the value first"
        ) from error
    if len(text) > MAX_METADATA_BYTES:
        raise UsageError(
            f"expected at most {MAX_METADATA_BYTES} bytes of APR metadata, found {len(text)} (for {path})",
            advice="leave out what is not needed",
        )
    return text


def _plain(value: object) -> object:
    """Turn numpy numbers and arrays, and mappings that are no dict, into what JSON knows."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _encode_index(sources: Sequence[TensorSource], path: Path) -> bytes:
    """Lay the tensors out in order and return the index, sorted by the bytes of the name."""
    entries: list[tuple[bytes, bytes]] = []
    position = 0
    for source in sources:
        kind, stored, shape = source.dtype.apr, source.name.encode("utf-8"), source.shape
        if kind is None:
            raise refuse_type(source, "APR", path, "decode it to F16 or F32, or use Q4_K or Q6_K")
        if not 1 <= len(stored) <= MAX_NAME_BYTES or len(shape) > MAX_DIMS:
            raise UsageError(
                f"APR cannot hold tensor {source.name:.80} {list(shape)} (for {path})",
                advice=f"use names of 1 to {MAX_NAME_BYTES} bytes and at most {MAX_DIMS} dimensions",
            )
        size = source.dtype.nbytes(shape)
        tail = struct.pack(f"<BB{len(shape)}QQQ", kind, len(shape), *shape, position, size)
        entries.append((stored, len(stored).to_bytes(2, "little") + stored + tail))
        position = align_up(position + size, ALIGNMENT)
    return b"".join(entry for _, entry in sorted(entries))

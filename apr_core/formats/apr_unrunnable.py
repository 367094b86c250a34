"""
APR files that are described for inspect and refused for inference.

Version 1 (``APRN``) is a serialised classic model, ``APR1`` a Whisper model of another layout, and JSON-APR a version 2
whose single tensor is the JSON text of a whole transformer.

Source: paiml/aprender ``format/types.rs`` and ``format/core_io.rs``, restated in ``shared/spec/apr.md`` section 1.9;
MessagePack: https://github.com/msgpack/msgpack/blob/master/spec.md.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from apr_core.errors import FormatError
from apr_core.formats.checkpoint import MappedFile, map_file
from apr_core.formats.strict_json import parse_object

_HEADER = struct.Struct("<4sBBHIIIBBB")
_HEADER_BYTES = 32
_MODEL_TYPES = {
    1: "LinearRegression",
    2: "LogisticRegression",
    3: "DecisionTree",
    4: "RandomForest",
    5: "GradientBoosting",
    6: "KMeans",
    7: "PCA",
    8: "NaiveBayes",
    9: "KNN",
    0xA: "SVM",
    0x10: "NgramLm",
    0x11: "Tfidf",
    0x12: "CountVectorizer",
    0x20: "NeuralSequential",
    0x21: "NeuralCustom",
    0x30: "ContentRecommender",
    0x40: "MixtureOfExperts",
    0xFF: "Custom",
}
_COMPRESSIONS = {0: "none", 1: "zstd-3", 2: "zstd-19", 3: "lz4"}
_FLAGS = ("encrypted", "signed", "streaming", "licensed", "trueno_native", "quantized", "has_model_card")
_MAX_DEPTH = 16
_MAX_INDEX = 16 << 20
_SIZED_TEXT = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_SIZED_ARRAY = {0xDC: 2, 0xDD: 4}
_SIZED_MAP = {0xDE: 2, 0xDF: 4}
_UNSIGNED = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}
_SIGNED = {0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_NUMBERS = {0xCA: ">f", 0xCB: ">d"} | _UNSIGNED | _SIGNED
_CONSTANTS: dict[int, object] = {0xC0: None, 0xC2: False, 0xC3: True}


def describe_unrunnable(path: str | Path) -> dict[str, object]:
    """
    Describe an APR file that cannot be run.

    Returns:
        ``format`` (apr-v1, apr-v1-whisper or json-apr), and what the header says; see the functions below.

    Raises:
        NotFound, ReadWriteError: As `open_checkpoint`.
        FormatError: It is none of the three, or shorter than its header says.
    """
    file = map_file(Path(path))
    if bytes(file.view[:4]) == b"APR1":
        return {"format": "apr-v1-whisper", "bytes": file.size, "first_bytes": bytes(file.view[:32]).hex(" ")}
    if bytes(file.view[:4]) in (b"APR\0", b"APR2"):
        return _describe_json(file)
    return _describe_v1(file)


def _describe_json(file: MappedFile) -> dict[str, object]:
    """Return version, metadata, and entries: name, dtype, shape, offset and size of what the JSON index lists."""
    head = bytes(file.view[:64]).ljust(64, b"\0")
    metadata_at, metadata_bytes, index_at, data_at = struct.unpack_from("<QIQQ", head, 12)
    index = bytes(file.view[index_at : min(data_at, index_at + _MAX_INDEX)]).rstrip(b"\0")
    if not index.startswith(b"["):
        raise FormatError(
            expected="a JSON index", found=f"{index[:8]!r}", file=file.path, at=index_at, advice="give a JSON-APR file"
        )
    # The parser takes objects alone: what two readers could understand differently is refused inside too.
    listed = parse_object(b'{"entries":' + index + b"}", file=file.path, what="JSON-APR index", at=index_at)["entries"]
    metadata = bytes(file.view[metadata_at : metadata_at + metadata_bytes])
    return {
        "format": "json-apr",
        "version": f"{head[4]}.{head[5]}",
        "entries": listed,
        "metadata": parse_object(metadata, file=file.path, what="APR metadata", at=metadata_at),
    }


def _describe_v1(file: MappedFile) -> dict[str, object]:
    """
    Describe an ``APRN`` file without unpacking its payload.

    Returns:
        format, version, model_type, sizes in bytes, compression, flags, quality_score (0 means never validated),
        metadata, and the stored and computed CRC-32 with ``checksum_holds``.
    """
    fields = _read_header(file)
    _, major, minor, kind, metadata_bytes, payload_bytes, unpacked, compression, flags, quality = fields
    end = _HEADER_BYTES + metadata_bytes
    stored = int.from_bytes(file.view[file.size - 4 :], "little")
    computed = zlib.crc32(file.view[: file.size - 4])
    return {
        "format": "apr-v1",
        "version": f"{major}.{minor}",
        "model_type": _MODEL_TYPES.get(kind, f"unknown ({kind})"),
        "metadata_bytes": metadata_bytes,
        "payload_bytes": payload_bytes,
        "uncompressed_bytes": unpacked,
        "compression": _COMPRESSIONS.get(compression, f"unknown ({compression})"),
        "flags": [name for bit, name in enumerate(_FLAGS) if flags >> bit & 1],
        "quality_score": quality,
        "metadata": _Unpacker(file, _HEADER_BYTES, end).unpack(0),
        "checksum_stored": stored,
        "checksum_computed": computed,
        "checksum_holds": stored == computed,
    }


def refuse_v1(file: MappedFile) -> FormatError:
    """Build the error that names what an ``APRN`` or ``APR1`` file is."""
    if bytes(file.view[:4]) == b"APR1":
        found = "an APR v1 Whisper file (APR1)"
    else:
        kind = _read_header(file)[3]
        found = f"an APR v1 file (APRN) that holds a {_MODEL_TYPES.get(kind, f'model of unknown type {kind}')}"
    return FormatError(
        expected="an APR v2 transformer",
        found=f"{found}: it cannot be run",
        file=file.path,
        at=0,
        advice="look at it with `apr inspect`",
    )


def _read_header(file: MappedFile) -> tuple[bytes, int, int, int, int, int, int, int, int, int]:
    """Read the header and check that metadata, payload and footer fit the file."""
    if file.size < _HEADER_BYTES + 4 or bytes(file.view[:4]) != b"APRN":
        raise FormatError(
            expected=f"an APR v1 file (APRN) of at least {_HEADER_BYTES + 4} bytes",
            found=f"{bytes(file.view[:4])!r} and {file.size} bytes",
            file=file.path,
            at=0,
            advice="give an APR v1 file",
        )
    fields = _HEADER.unpack(file.view[: _HEADER.size])
    end = _HEADER_BYTES + fields[4] + fields[5] + 4
    if end > file.size:
        raise FormatError(
            expected=f"{end} bytes",
            found=f"{file.size}: the file is truncated, {end - file.size} bytes are missing",
            file=file.path,
            at=8,
            advice="download it again",
        )
    return fields


class _Unpacker:
    """A MessagePack reader for what metadata holds: maps, arrays, text, numbers, booleans, nil."""

    def __init__(self, file: MappedFile, start: int, stop: int) -> None:
        self._file, self._at, self._stop = file, start, stop

    def _take(self, nbytes: int) -> bytes:
        if self._at + nbytes > self._stop:
            raise self._wrong("the end of the metadata")
        self._at += nbytes
        return bytes(self._file.view[self._at - nbytes : self._at])

    def _wrong(self, found: str) -> FormatError:
        return FormatError(
            expected="MessagePack metadata",
            found=found,
            file=self._file.path,
            at=self._at,
            advice="get a fresh copy of the file",
        )

    def unpack(self, depth: int) -> object:
        """Read one value."""
        if depth > _MAX_DEPTH:
            raise self._wrong("nesting too deep")
        mark = self._take(1)[0]
        if mark < 0x80 or mark >= 0xE0:
            return mark if mark < 0x80 else mark - 0x100
        if mark in _CONSTANTS:
            return _CONSTANTS[mark]
        if mark in _NUMBERS:
            form = _NUMBERS[mark]
            return struct.unpack(form, self._take(struct.calcsize(form)))[0]
        if mark & 0xE0 == 0xA0 or mark in _SIZED_TEXT:
            return self._text(mark & 0x1F if mark & 0xE0 == 0xA0 else self._length(_SIZED_TEXT[mark]))
        if mark & 0xF0 == 0x90 or mark in _SIZED_ARRAY:
            count = mark & 0x0F if mark & 0xF0 == 0x90 else self._length(_SIZED_ARRAY[mark])
            return [self.unpack(depth + 1) for _ in range(count)]
        if mark & 0xF0 == 0x80 or mark in _SIZED_MAP:
            count = mark & 0x0F if mark & 0xF0 == 0x80 else self._length(_SIZED_MAP[mark])
            return {str(self.unpack(depth + 1)): self.unpack(depth + 1) for _ in range(count)}
        raise self._wrong(f"the type byte {mark:#04x}")

    def _length(self, width: int) -> int:
        return int.from_bytes(self._take(width), "big")

    def _text(self, nbytes: int) -> str:
        try:
            return self._take(nbytes).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._wrong("text that is not UTF-8") from error

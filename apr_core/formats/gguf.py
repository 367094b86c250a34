"""
GGUF versions 2 and 3, little-endian: header, key-value pairs, tensor table, split files; and a version 3 writer.

The arrays of a tokenizer (300,000 strings) are stepped over at opening and parsed when somebody reads them.
Source: ggml-org/ggml ``docs/gguf.md``; llama.cpp ``tools/gguf-split`` and ``llama-model-loader`` for split files.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from apr_core.dtypes import BY_GGUF
from apr_core.errors import FormatError, UsageError
from apr_core.formats import names
from apr_core.formats.checkpoint import Contents, Gap, MappedFile, TensorInfo, TensorSource, map_file
from apr_core.formats.shards import MAX_PARTS, require_once, sibling_paths
from apr_core.formats.sink import refuse_type, replacing, require_unique
from apr_core.formats.spans import align_up, find_gaps, require_extent
from apr_core.formats.strings import BrokenStringError, walk_strings

DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16
MAX_NAME_BYTES = 64
MAX_DIMS = 4
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(4, 13)
# Value type id to its little-endian numpy dtype.
SCALARS: Mapping[int, str] = MappingProxyType(
    {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
)
_NUMPY_KINDS = {np.dtype(form): kind for kind, form in SCALARS.items()}
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_REMOVED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8"}
_SMALLEST_PAIR = 8 + 1 + 4 + 1
_SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8
_U64 = struct.Struct("<Q")
_FRESH = "get a fresh copy of the file"
_MERGE = "put the parts side by side under the names that they came with"


@dataclass(frozen=True)
class _Array:
    """An array that was stepped over: where its elements begin and how many there are."""

    at: int
    kind: int
    count: int
    nbytes: int


class GgufMetadata(Mapping[str, object]):
    """
    Key-value pairs of a GGUF; an array becomes a list whenever it is asked for, and is not kept: those of a tokenizer
    take 60 MB.

    For benchmarks, the two ways to have a header: ``open_checkpoint(path)`` leaves arrays where they are, their bounds
    checked; ``dict(open_checkpoint(path).metadata)`` holds every string, its UTF-8 checked.
    """

    def __init__(self, file: MappedFile, pairs: dict[str, object]) -> None:
        self._file, self._pairs = file, pairs

    def __getitem__(self, key: str) -> object:
        value = self._pairs[key]
        return _parse_array(self._file, key, value) if isinstance(value, _Array) else value

    def __contains__(self, key: object) -> bool:
        return key in self._pairs  # without the list

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def scalars(self) -> dict[str, object]:
        """Return the pairs whose values are single."""
        return {key: value for key, value in self._pairs.items() if not isinstance(value, _Array)}

    def array_length(self, key: str) -> int | None:
        """Return how many elements the array under ``key`` has, without parsing it; None when there is no array."""
        value = self._pairs.get(key)
        return value.count if isinstance(value, _Array) else None


class _Cursor:
    """Reads fields one after another; whatever reaches behind the end of the file is a `FormatError`."""

    def __init__(self, file: MappedFile, at: int) -> None:
        self.file, self.at = file, at

    def wrong(self, expected: str, found: str, *, at: int | None = None, tensor: str | None = None) -> FormatError:
        place = self.at if at is None else at
        return FormatError(expected=expected, found=found, file=self.file.path, tensor=tensor, at=place, advice=_FRESH)

    def take(self, nbytes: int, what: str) -> memoryview:
        """Return the next ``nbytes`` bytes."""
        left = self.file.size - self.at
        if nbytes > left:
            raise self.wrong(
                f"{nbytes} bytes of {what}", f"the end of the file: it is truncated, {nbytes - left} bytes are missing"
            )
        piece = self.file.view[self.at : self.at + nbytes]
        self.at += nbytes
        return piece

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def count(self, what: str, smallest: int) -> int:
        """Read a 64-bit count and check that so many items of at least ``smallest`` bytes can follow."""
        at = self.at
        count = self.u64(what)
        if count * smallest > self.file.size - self.at:
            raise self.wrong(f"a {what} that fits the remaining {self.file.size - self.at} bytes", f"{count}", at=at)
        return count

    def text(self, what: str) -> str:
        at = self.at
        length = self.count(f"length of {what}", 1)
        try:
            return bytes(self.take(length, what)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(f"{what} in UTF-8", "other bytes", at=at) from error


def read_gguf(file: MappedFile) -> Contents:
    """
    Read the header of a GGUF file; of a split one, the headers of all its parts, whichever is given.

    The metadata is that of the first part: further parts say nothing but which part they are.

    Raises:
        FormatError: Any deviation from the format, by name; a big-endian file; parts that are missing, named wrongly,
            joined by ``cat`` or of different models.

    Cost: about 8 ms for a vocabulary of 151,936 tokens and as many merges; no tensor byte is touched.
    """
    part = _read_part(file)
    split = _read_split(part)
    if split is None:
        return _contents([part], part.tensors)
    _refuse_joined(part, split)
    paths = sibling_paths(file.path, split.number + 1, split.count, _MERGE)
    parts = [part if n == split.number else _read_part(_map_part(path)) for n, path in enumerate(paths)]
    for number, other in enumerate(parts):
        _require_sibling(parts[0], other, replace(split, number=number))
    tensors = require_once([other.tensors for other in parts], "get all parts from one source")
    if len(tensors) != split.tensors:
        raise _foreign_part(file, f"{split.tensors} tensors in all parts (split.tensors.count)", f"{len(tensors)}")
    return _contents(parts, tensors)


@dataclass(frozen=True, eq=False)
class _Part:
    """One GGUF file, read."""

    file: MappedFile
    metadata: GgufMetadata
    tensors: list[TensorInfo]
    gaps: tuple[Gap, ...]
    version: int
    alignment: int


@dataclass(frozen=True)
class _Split:
    """What the split keys of a part say; ``number`` counts from 0."""

    number: int
    count: int
    tensors: int


def _contents(parts: Sequence[_Part], tensors: Sequence[TensorInfo]) -> Contents:
    metadata = parts[0].metadata
    config = names.config_from_gguf(metadata, tensors)
    gaps = tuple(gap for part in parts for gap in part.gaps)
    facts = {"version": parts[0].version, "alignment": parts[0].alignment, "parts": len(parts)}
    return Contents(tuple(part.file for part in parts), tensors, metadata, config, gaps, facts)


def _read_part(file: MappedFile) -> _Part:
    """Read one file, split or not."""
    cursor = _Cursor(file, 4)
    version = _read_version(cursor)
    n_tensors = cursor.count("tensor count", _SMALLEST_TENSOR)
    n_pairs = cursor.count("key-value count", _SMALLEST_PAIR)
    pairs = _read_pairs(cursor, n_pairs)
    alignment = _read_alignment(cursor, pairs)
    table = [_read_tensor(cursor, alignment) for _ in range(n_tensors)]
    start = _read_padding(cursor, alignment) if table else min(align_up(cursor.at, alignment), file.size)
    tensors = [replace(info, offset=start + info.offset) for info in table]
    _require_order(cursor, tensors)
    require_extent(tensors, file=file.path, stop=file.size)
    gaps = find_gaps(tensors, file=file.path, start=start, stop=file.size, alignment=alignment)
    return _Part(file, GgufMetadata(file, pairs), tensors, gaps, version, alignment)


def _read_split(part: _Part) -> _Split | None:
    """Read the split keys; None for a whole model (a merged one keeps the keys, with a count of 0)."""
    metadata, found = part.metadata, []
    for key, most in (("split.no", MAX_PARTS - 1), ("split.count", MAX_PARTS), ("split.tensors.count", 1 << 31)):
        value = metadata.get(key)
        if value is not None and (type(value) is not int or not 0 <= value <= most):
            raise _foreign_part(part.file, f"{key} as a number from 0 to {most}", f"{value!r:.40}")
        found.append(value)
    number, count, tensors = found
    if not count or count == 1:
        stated = len(part.tensors) if tensors is None else tensors
        if number or stated != len(part.tensors):
            raise _foreign_part(
                part.file,
                f"{stated} tensors in a whole model",
                f"part {(number or 0) + 1}, {len(part.tensors)} tensors",
            )
        return None
    if number is None or tensors is None or number >= count:
        which = "" if number is None else f"part {number + 1} of {count} with "
        raise _foreign_part(
            part.file,
            f"split.no below split.count {count}, and split.tensors.count",
            f"{which}split.no {number}, split.tensors.count {tensors}",
        )
    return _Split(number, count, tensors)


def _foreign_part(file: MappedFile, expected: str, found: str) -> FormatError:
    return FormatError(
        expected=expected, found=found, file=file.path, advice="get all parts again from one source, and split.* keys"
    )


def _refuse_joined(part: _Part, split: _Split) -> None:
    """Name what ``cat`` makes of split parts: behind the first part's data stands the second one's header."""
    for gap in part.gaps:
        if bytes(part.file.view[gap.offset : gap.offset + 4]) == b"GGUF":
            raise FormatError(
                expected=f"part {split.number + 1} of {split.count} alone",
                found="another GGUF header behind its tensors: parts joined by cat, which makes no model of them",
                file=part.file.path,
                at=gap.offset,
                advice="cut them apart there, or download the parts again; `llama-gguf-split --merge` joins them",
            )


def _map_part(path: Path) -> MappedFile:
    """Map a sibling, and say what it is when it is no GGUF."""
    from apr_core.formats.sniff import sniff

    file = map_file(path)
    kind = sniff(file)
    if kind != "gguf":
        raise FormatError(expected="a part of a split GGUF", found=f"{kind} data", file=path, at=0, advice=_FRESH)
    return file


def _require_sibling(first: _Part, part: _Part, expected: _Split) -> None:
    """Demand that a part says it is the one that its name says, of the same model."""
    split = _read_split(part)
    if split != expected:
        said = (
            "no split keys" if split is None else f"part {split.number + 1} of {split.count}, {split.tensors} tensors"
        )
        raise _foreign_part(
            part.file,
            f"part {expected.number + 1} of {expected.count}, {expected.tensors} tensors in all, as its name and "
            f"{first.file.path.name} say",
            said,
        )
    for key, value in part.metadata.scalars().items():
        other = first.metadata.scalars().get(key, value)
        if not key.startswith("split.") and other != value:
            raise _foreign_part(
                part.file, f"{key} {other!r:.60}, as in {first.file.path.name}", f"{value!r:.60}: of another model"
            )


def _read_version(cursor: _Cursor) -> int:
    at = cursor.at
    version = cursor.u32("version")
    if version in (2, 3):
        return version
    found = f"version {version}"
    if version & 0xFFFF == 0 and version:
        found = "a big-endian file"
    elif version == 1:
        found = "version 1, which only the first weeks of GGUF wrote"
    raise cursor.wrong("GGUF version 2 or 3, little-endian", found, at=at)


def _read_pairs(cursor: _Cursor, count: int) -> dict[str, object]:
    """Read all key-value pairs; arrays stay where they are."""
    pairs: dict[str, object] = {}
    for _ in range(count):
        at = cursor.at
        key = cursor.text("key")
        if not key or len(key) > 0xFFFF:
            raise cursor.wrong("a key of 1 to 65535 bytes", f"{len(key)}", at=at)
        if key in pairs:
            raise cursor.wrong("each key once", f"{key!r:.80} twice", at=at)
        pairs[key] = _read_value(cursor, key)
    return pairs


def _read_value(cursor: _Cursor, key: str) -> object:
    at = cursor.at
    kind = cursor.u32("value type")
    if kind == STRING:
        return cursor.text(f"value of {key!r:.80}")
    if kind == ARRAY:
        return _skip_array(cursor, key)
    if kind not in SCALARS:
        raise cursor.wrong(f"a value type 0 to 12 for {key!r:.80}", f"{kind}", at=at)
    dtype = np.dtype(SCALARS[kind])
    piece = cursor.take(dtype.itemsize, f"value of {key!r:.80}")
    if kind == BOOL and piece[0] > 1:
        raise cursor.wrong(f"a bool of 0 or 1 for {key!r:.80}", f"{piece[0]}", at=at + 4)
    return np.frombuffer(piece, dtype)[0].item()


def _skip_array(cursor: _Cursor, key: str) -> _Array:
    """Step over an array, checking that it lies within the file."""
    at = cursor.at
    kind = cursor.u32("array element type")
    if kind == ARRAY:
        raise cursor.wrong(f"an array of plain values for {key!r:.80}", "an array of arrays", at=at)
    if kind != STRING and kind not in SCALARS:
        raise cursor.wrong(f"an array element type 0 to 12 for {key!r:.80}", f"{kind}", at=at)
    width = 8 if kind == STRING else np.dtype(SCALARS[kind]).itemsize
    count = cursor.count(f"length of array {key!r:.80}", width)
    start = cursor.at
    if kind == STRING:
        cursor.at = _skip_strings(cursor, count, key)
    else:
        data = cursor.take(count * width, f"array {key!r:.80}")
        if kind == BOOL and count and int(np.frombuffer(data, np.uint8).max()) > 1:
            raise cursor.wrong(f"bools of 0 or 1 in {key!r:.80}", "other bytes", at=start)
    return _Array(start, kind, count, cursor.at - start)


def _skip_strings(cursor: _Cursor, count: int, key: str) -> int:
    """Step over length-prefixed strings and return where they end."""
    end = cursor.at
    try:
        for _, after in walk_strings(cursor.file.view, cursor.at, count):
            end = after
    except BrokenStringError as broken:
        raise cursor.wrong(
            f"{count} strings in {key!r:.80}",
            f"a length that reaches behind the end of the file in number {broken.number}",
            at=broken.at,
        ) from broken
    return end


def _parse_array(file: MappedFile, key: str, array: _Array) -> list[object]:
    """Materialise an array that was stepped over."""
    if array.kind != STRING:
        numbers = file.view[array.at : array.at + array.nbytes]
        values: list[object] = np.frombuffer(numbers, SCALARS[array.kind]).tolist()
        return values
    texts: list[object] = []
    for places, end in walk_strings(file.view, array.at, array.count):
        first = int(places[0])
        data = bytes(file.view[first:end])
        starts = (places - (first - 8)).tolist()
        pieces = [data[start:stop] for start, stop in zip(starts, [*(places[1:] - first).tolist(), None], strict=True)]
        try:
            texts += [piece.decode() for piece in pieces]
        except UnicodeDecodeError as error:
            number = pieces.index(error.object)
            raise FormatError(
                expected=f"strings in UTF-8 in {key!r:.80}",
                found=f"other bytes in element {len(texts) + number}",
                file=file.path,
                at=first + starts[number],
                advice=_FRESH,
            ) from error
    return texts


def _read_alignment(cursor: _Cursor, pairs: dict[str, object]) -> int:
    value = pairs.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is int and 8 <= value <= MAX_ALIGNMENT and value & (value - 1) == 0:
        return value
    raise cursor.wrong(f"general.alignment as a power of two, 8 to {MAX_ALIGNMENT}", f"{value!r:.40}")


def _read_tensor(cursor: _Cursor, alignment: int) -> TensorInfo:
    """Read one row of the tensor table; the offset is still relative to the data section."""
    at = cursor.at
    stored = cursor.text("tensor name")
    if not 1 <= len(stored.encode("utf-8")) <= MAX_NAME_BYTES:
        raise cursor.wrong(f"a tensor name of 1 to {MAX_NAME_BYTES} bytes", f"{stored!r:.80}", at=at)
    n_dims = cursor.u32("dimension count")
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.wrong(f"1 to {MAX_DIMS} dimensions", f"{n_dims}", tensor=stored, at=at)
    extents = [cursor.u64("dimension") for _ in range(n_dims)]
    if not all(1 <= extent < 1 << 63 for extent in extents):
        raise cursor.wrong("dimensions from 1 to 2^63 - 1", f"{extents}", tensor=stored, at=at)
    kind = cursor.u32("tensor type")
    if kind not in BY_GGUF:
        removed = f" ({_REMOVED[kind]}, removed from GGUF)" if kind in _REMOVED else ""
        raise cursor.wrong("a known tensor type", f"id {kind}{removed}", tensor=stored, at=at)
    dtype = BY_GGUF[kind]
    if extents[0] % dtype.block_elements:
        raise cursor.wrong(
            f"rows of a multiple of {dtype.block_elements} for {dtype}", f"{extents[0]}", tensor=stored, at=at
        )
    offset = cursor.u64("tensor offset")
    if offset % alignment:
        raise cursor.wrong(f"an offset that is a multiple of {alignment}", f"{offset}", tensor=stored, at=at)
    shape = tuple(reversed(extents))  # GGUF counts the innermost axis first; the bytes are row-major already
    return TensorInfo(names.hf_name(stored), dtype, shape, cursor.file.path, offset, dtype.nbytes(shape), stored)


def _read_padding(cursor: _Cursor, alignment: int) -> int:
    """Step over the zeros before the data section and return where it starts."""
    start = align_up(cursor.at, alignment)
    # Bytes here mean that the table is longer than the header's tensor count says: the data would be read shifted.
    if bytes(cursor.file.view[cursor.at : start]).strip(b"\0"):
        raise cursor.wrong(f"zeros up to byte {start}", "other bytes: the header's tensor count is too small")
    return start


def _require_order(cursor: _Cursor, tensors: list[TensorInfo]) -> None:
    """Demand ascending offsets and unique names, as llama.cpp does."""
    seen: set[str] = set()
    previous = -1
    for info in tensors:
        if info.stored_name in seen:
            raise cursor.wrong("each tensor name once", "the name twice", tensor=info.stored_name, at=info.offset)
        if info.offset < previous:
            raise cursor.wrong("offsets in ascending order", "a smaller one", tensor=info.stored_name, at=info.offset)
        seen.add(info.stored_name)
        previous = info.offset


def write_gguf(
    path: Path,
    sources: Sequence[TensorSource],
    metadata: Mapping[str, object],
    *,
    progress: Callable[[int], None] | None = None,
) -> None:
    """
    Write a GGUF version 3 file; names and shapes are translated, tensor bytes are streamed in the order given.

    Args:
        path: Target; replaced only when everything is on the disk.
        sources: Tensors under their canonical names.
        metadata: Key-value pairs. A bool stays one; an int becomes uint32, or int32 when negative, or 64 bits when it
            does not fit; a float becomes float32; lists hold text, bools, ints (int32) or floats; numpy keeps its type.
        progress: Called with the bytes written so far.

    Raises:
        UsageError: A type, shape or name that GGUF cannot hold, a name twice, or a value without a GGUF type.
        ReadWriteError: The operating system refuses.
    """
    path = Path(path)
    named = [(names.gguf_name(source.name), source) for source in sources]
    require_unique(named, path)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise UsageError(f"general.alignment must be a power of two, found {alignment!r}", advice="leave it out")
    parts = [b"GGUF" + struct.pack("<IQQ", 3, len(named), len(metadata))]
    # llama.cpp's tools show the first pair; the architecture is what a person looks for.
    for key in sorted(metadata, key=lambda key: key != "general.architecture"):
        parts += [_pack_text(key), pack_value(key, metadata[key])]
    position = 0
    for stored, source in named:
        parts.append(_pack_tensor(stored, source, position, path))
        position = align_up(position + source.dtype.nbytes(source.shape), alignment)
    with replacing(path, progress) as sink:
        sink.write(b"".join(parts))
        sink.pad_to(alignment)
        for _, source in named:
            sink.write_tensor(source)
            sink.pad_to(alignment)


def _pack_text(text: str) -> bytes:
    data = text.encode("utf-8")
    return _U64.pack(len(data)) + data


def _pack_tensor(stored: str, source: TensorSource, position: int, path: Path) -> bytes:
    """Build one row of the tensor table."""
    dtype, shape, name = source.dtype, source.shape, stored.encode("utf-8")
    if dtype.gguf is None:
        raise refuse_type(source, "GGUF", path, "decode it to F32 or F16 first")
    whole = bool(shape) and shape[-1] % dtype.block_elements == 0
    if not whole or not 1 <= len(shape) <= MAX_DIMS or 0 in shape or not 1 <= len(name) < MAX_NAME_BYTES:
        raise UsageError(
            f"GGUF cannot hold tensor {stored:.80} {dtype} {list(shape)} (for {path})",
            advice=f"use 1 to {MAX_DIMS} non-empty dimensions, rows of whole blocks, short names",
        )
    extents = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return _pack_text(stored) + extents + struct.pack("<IQ", dtype.gguf, position)


def pack_value(key: str, value: object) -> bytes:
    """
    Encode a value behind its type id.

    Raises:
        UsageError: There is no GGUF type for it: None, a mapping, a mixed or empty list, an integer beyond 64 bits.
    """
    if isinstance(value, list | tuple | np.ndarray):
        kind = _array_kind(value)
        if kind == STRING:
            return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(_pack_text(str(item)) for item in value)
        if kind is not None:
            return struct.pack("<IIQ", ARRAY, kind, len(value)) + np.asarray(value, dtype=SCALARS[kind]).tobytes()
    else:
        kind = _scalar_kind(value)
        if kind == STRING:
            return struct.pack("<I", kind) + _pack_text(str(value))
        if kind is not None:
            return struct.pack("<I", kind) + np.asarray(value, dtype=SCALARS[kind]).tobytes()
    raise UsageError(
        f"no GGUF type for {key!r}: {value!r:.80}", advice="leave the key out, or give a numpy value of the type wanted"
    )


def _scalar_kind(value: object) -> int | None:
    """Choose the type id of one value: numpy keeps its own, Python numbers take what llama.cpp expects."""
    if isinstance(value, str):
        return STRING
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, np.generic):
        return _NUMPY_KINDS.get(value.dtype)
    if isinstance(value, float):
        return FLOAT64 if abs(value) > _MAX_FLOAT32 else FLOAT32
    return _integer_kind(value, value, (UINT32, INT32, UINT64, INT64)) if isinstance(value, int) else None


def _integer_kind(smallest: int, largest: int, candidates: tuple[int, ...]) -> int | None:
    """Return the first of the candidates that holds a range."""
    for kind in candidates:
        limits = np.iinfo(SCALARS[kind])
        if limits.min <= smallest and largest <= limits.max:
            return kind
    return None


def _array_kind(values: Sequence[object] | NDArray[np.generic]) -> int | None:
    """Choose the element type of an array; integers are int32 when they fit, which llama.cpp's token types must be."""
    if isinstance(values, np.ndarray):
        return _NUMPY_KINDS.get(values.dtype) if values.ndim == 1 else None
    integers = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    if values and len(integers) == len(values):
        return _integer_kind(min(integers), max(integers), (INT32, INT64, UINT64))
    kinds = {_scalar_kind(value) for value in values}
    return kinds.pop() if len(kinds) == 1 else None

"""
SafeTensors: one file, or shards with an index; read strictly, written as the reference implementation writes it.

Source: https://github.com/huggingface/safetensors (README, "Format"; ``safetensors/src/tensor.rs`` for the order in
which tensors are laid out).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from apr_core.dtypes import BY_SAFETENSORS
from apr_core.errors import FormatError, NotFound, UsageError
from apr_core.formats.checkpoint import Contents, MappedFile, TensorInfo, TensorSource, map_file, read_companion
from apr_core.formats.shards import safe_shard
from apr_core.formats.sink import refuse_type, replacing, require_unique
from apr_core.formats.sniff import MAX_SAFETENSORS_HEADER, sniff
from apr_core.formats.spans import find_gaps, is_addressable, require_extent
from apr_core.formats.strict_json import parse_object

_FRESH = "get a fresh copy of the file"
MAX_CONFIG_BYTES = 2 << 20  # parsed JSON takes up to thirty times its length
# The reference lays tensors out by descending alignment so that each starts at a multiple of its element size.
_WRITE_ORDER = (
    "U64",
    "I64",
    "F64",
    "F32",
    "U32",
    "I32",
    "BF16",
    "F16",
    "U16",
    "I16",
    "F8_E5M2FNUZ",
    "F8_E4M3FNUZ",
    "F8_E8M0",
    "F8_E4M3",
    "F8_E5M2",
    "I8",
    "U8",
    "BOOL",
)
# Types of the format that hold no weights that we could decode: values below a byte, and complex numbers.
_UNDECODED = ("F4", "F6_E2M3", "F6_E3M2", "C64")


def read_safetensors(file: MappedFile) -> Contents:
    """
    Read one SafeTensors file; ``config.json`` beside it becomes the configuration.

    Raises:
        FormatError: Any deviation from the format, by name.
    """
    tensors, metadata = _read_header(file)
    return Contents((file,), tensors, metadata, _read_config(file.path.parent))


def read_index(file: MappedFile, index: Mapping[str, object]) -> Contents:
    """
    Read all shards that an index names; index and headers must list exactly the same tensors in the same shards.

    Args:
        file: The index, for messages and to find the shards beside it.
        index: Its content.

    Raises:
        FormatError: A shard is missing or lies outside the folder, or index and headers disagree.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(
            expected="weight_map with at least one tensor", found=f"{weight_map!r:.60}", file=file.path, advice=_FRESH
        )
    planned: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        planned.setdefault(safe_shard(shard, name, file.path), set()).add(name)
    files, tensors, metadata = [], [], {}
    for number, shard in enumerate(sorted(planned), start=1):
        part = _map_shard(file.path, shard, f"shard {number} of {len(planned)}")
        found, notes = _read_header(part)
        _require_same_names(planned[shard], found, file.path, shard)
        files.append(part)
        tensors.extend(found)
        metadata.update(notes)
    notes_of_index = index.get("metadata")
    if isinstance(notes_of_index, dict):
        metadata.update(notes_of_index)
    return Contents(tuple(files), tensors, metadata, _read_config(file.path.parent), facts={"parts": len(files)})


def _map_shard(index: Path, shard: str, which: str) -> MappedFile:
    """Map a shard, naming it when it is missing, or what it is instead (an LFS pointer among good shards)."""
    try:
        file = map_file(index.parent / shard)
    except NotFound as error:
        raise FormatError(
            expected=f"{which}, {shard}", found="no such file", file=index, advice="download the missing shard"
        ) from error
    container = sniff(file)
    if container != "safetensors":
        raise FormatError(
            expected="a SafeTensors shard", found=f"{container} data", file=file.path, at=0, advice=_FRESH
        )
    return file


def _require_same_names(planned: set[str], found: Sequence[TensorInfo], index: Path, shard: str) -> None:
    """Demand a bijection between the index and a shard's header; a stale index would leave random weights."""
    present = {info.stored_name for info in found}
    if planned == present:
        return
    absent, extra = sorted(planned - present), sorted(present - planned)
    said = [f"{len(absent)} missing ({', '.join(absent[:3])})"] if absent else []
    said += [f"{len(extra)} that the index does not place there ({', '.join(extra[:3])})"] if extra else []
    raise FormatError(
        expected=f"in {shard} exactly the {len(planned)} tensors that the index places there",
        found=" and ".join(said),
        file=index,
        tensor=(absent or extra)[0],
        advice="download index and shards of one revision",
    )


def _read_header(file: MappedFile) -> tuple[list[TensorInfo], dict[str, object]]:
    """Parse and check a header: tensors in file order, and ``__metadata__``."""
    if file.size < 8:
        raise FormatError(
            expected="a header length of 8 bytes", found=f"{file.size} bytes", file=file.path, at=0, advice=_FRESH
        )
    length = int.from_bytes(file.view[:8], "little")
    if not 2 <= length <= MAX_SAFETENSORS_HEADER:
        raise FormatError(
            expected=f"a header of 2 to {MAX_SAFETENSORS_HEADER} bytes",
            found=f"{length}",
            file=file.path,
            at=0,
            advice=_FRESH,
        )
    if length > file.size - 8:
        raise FormatError(
            expected=f"a header of {length} bytes",
            found=f"{file.size - 8}: the file is truncated, at least {length + 8 - file.size} bytes are missing",
            file=file.path,
            at=8,
            advice="download it again",
        )
    text = bytes(file.view[8 : 8 + length])
    if text[:1] != b"{":
        raise FormatError(
            expected="a header that begins with {", found=f"{text[:8]!r}", file=file.path, at=8, advice=_FRESH
        )
    header = parse_object(text, file=file.path, what="SafeTensors header", at=8, floats=False)
    metadata = _read_metadata(header.pop("__metadata__", {}), file)
    start = 8 + length
    tensors = [_read_entry(name, entry, file, start) for name, entry in header.items()]
    _require_cover(tensors, file, start)
    return sorted(tensors, key=lambda info: (info.offset, info.nbytes, info.name)), metadata


def _read_metadata(value: object, file: MappedFile) -> dict[str, object]:
    if isinstance(value, dict) and all(isinstance(entry, str) for entry in value.values()):
        return value
    raise FormatError(
        expected="__metadata__ as an object of strings", found=f"{value!r:.60}", file=file.path, at=8, advice=_FRESH
    )


def _read_entry(name: str, entry: object, file: MappedFile, start: int) -> TensorInfo:
    """Check one header entry; offsets become absolute."""

    def wrong(expected: str, found: object) -> FormatError:
        return FormatError(
            expected=expected, found=f"{found!r:.80}", file=file.path, tensor=name, at=8, advice="do not use this file"
        )

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong("an object of dtype, shape and data_offsets", entry)
    dtype = BY_SAFETENSORS.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        known = " (a type of SafeTensors that is not decoded here)" if entry["dtype"] in _UNDECODED else ""
        raise wrong(f"a dtype among {', '.join(BY_SAFETENSORS)}{known}", entry["dtype"])
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_counts(shape):
        raise wrong("a shape of non-negative integers", shape)
    if not is_addressable(shape):
        raise wrong("a shape that an array can have", shape)
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong("data_offsets as two integers, begin <= end", offsets)
    begin, end = offsets
    if dtype.nbytes(tuple(shape)) != end - begin:
        raise wrong(f"{dtype.nbytes(tuple(shape))} bytes for {dtype} {shape}", end - begin)
    return TensorInfo(name, dtype, tuple(shape), file.path, start + begin, end - begin, name)


def _are_counts(value: object) -> bool:
    """Tell a list of integers >= 0; True is an integer to Python, so the type is compared exactly."""
    return isinstance(value, list) and all(type(entry) is int and entry >= 0 for entry in value)


def _require_cover(tensors: list[TensorInfo], file: MappedFile, start: int) -> None:
    """Demand that the tensors fill the data section without hole, overlap or tail, as the reference reader does."""
    require_extent(tensors, file=file.path, stop=file.size)
    gaps = find_gaps(tensors, file=file.path, start=start, stop=file.size, alignment=1)
    if gaps:
        raise FormatError(
            expected="tensors that fill the data section exactly",
            found=f"{gaps[0].nbytes} bytes that no tensor explains",
            file=file.path,
            at=gaps[0].offset,
            advice="do not trust this file; data may be hidden there",
        )


def _read_config(folder: Path) -> Mapping[str, object] | None:
    """Read ``config.json`` beside the weights; None when there is none."""
    path = folder / "config.json"
    try:
        data = read_companion(path, MAX_CONFIG_BYTES)
    except NotFound:
        return None
    return parse_object(data, file=path, what="model configuration", at=0)


def write_safetensors(
    path: Path,
    sources: Sequence[TensorSource],
    metadata: Mapping[str, str] | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> None:
    """
    Write one SafeTensors file, in the reference implementation's order (element size, then name).

    Args:
        path: Target; replaced only when everything is on the disk.
        sources: Tensors; their bytes are streamed.
        metadata: ``__metadata__``, strings only.
        progress: Called with the bytes written so far.

    Raises:
        UsageError: A type that SafeTensors cannot hold, a name twice, or metadata that is not text.
        ReadWriteError: The operating system refuses.
    """
    path = Path(path)
    notes = dict(metadata or {})
    if not all(isinstance(item, str) for pair in notes.items() for item in pair):
        raise UsageError(f"SafeTensors metadata must be strings (for {path})", advice="serialise the values first")
    require_unique([(source.name, source) for source in sources], path)
    header: dict[str, object] = {"__metadata__": notes} if notes else {}
    position = 0
    ordered = sorted(sources, key=lambda source: (_rank(source, path), source.name))
    for source in ordered:
        end = position + source.dtype.nbytes(source.shape)
        header[source.name] = {
            "dtype": source.dtype.safetensors,
            "shape": list(source.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with replacing(path, progress) as sink:
        sink.write(len(text).to_bytes(8, "little") + text)
        for source in ordered:
            sink.write_tensor(source)


def _rank(source: TensorSource, path: Path) -> int:
    """Return a dtype's place in the reference's order; refuse what the container cannot hold."""
    if source.dtype.safetensors is None or source.name == "__metadata__":
        raise refuse_type(source, "SafeTensors", path, "decode it to F32, F16 or BF16 first")
    return _WRITE_ORDER.index(source.dtype.safetensors)

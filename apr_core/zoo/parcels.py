"""
Damage to how a model is packed: split files and shards, compression, lying headers, executable content.

Every file here must be refused before anything of it is used; the healthy ways to pack are among the benign twins. A
pickle in the place of weights is refused; one beside them is legal (the twin ``pickle-beside``), and inspect and lint
name it.
"""

from __future__ import annotations

import json
import pickle
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from apr_core.contract.layout import EMBEDDING
from apr_core.formats.apr import write_apr
from apr_core.formats.checkpoint import TensorSource, open_checkpoint
from apr_core.formats.gguf import write_gguf
from apr_core.zoo.containers import PREFLIGHT, Header, Row, edit_header, family, parted, shards, written
from apr_core.zoo.draft import Draft
from apr_core.zoo.registry import Defect, NotApplicable, Recipe

LZ4, ZSTD, SHARDED = 0x0001, 0x0002, 0x0010
Folder = Callable[[list[Path]], object]


def _as_they_are(*_: object) -> None:
    """Change nothing: what was written is what is wrong, or nothing is."""


def split_gguf(count: int, change: Folder = _as_they_are, *, empty_first: bool = False) -> Recipe:
    """
    Write a GGUF and split it as llama-gguf-split does: all keys in the first part, the split keys in each.

    Args:
        count: Parts.
        change: Edits the written parts.
        empty_first: The first part holds no tensor.
    """

    def edit(path: Path) -> None:
        with open_checkpoint(path) as whole:
            sources = [
                TensorSource(n, t.dtype, t.shape, partial(list, [whole.raw(n).data.copy()]))
                for n, t in whole.tensors.items()
            ]
            metadata = {key: whole.metadata[key] for key in whole.metadata}
        holding = count - empty_first
        if len(sources) < holding:
            raise NotApplicable("too few tensors for as many parts")
        share = -(-len(sources) // holding)
        groups = [sources[at : at + share] for at in range(0, len(sources), share)]
        parts = []
        for number, group in enumerate([[], *groups] if empty_first else groups):
            keys = {
                "split.no": np.uint16(number),
                "split.count": np.uint16(count),
                "split.tensors.count": np.int32(len(sources)),
            }
            parts.append(path.with_name(f"model-{number + 1:05}-of-{count:05}.gguf"))
            write_gguf(parts[-1], group, {**(metadata if number == 0 else {}), **keys})
        path.unlink()
        change(parts)

    return _stored("gguf", edit)


def shard_apr(change: Folder = _as_they_are) -> Recipe:
    """Write an APR as two shards, each a whole file with the metadata and its place; then edit them."""

    def edit(path: Path) -> None:
        with open_checkpoint(path) as whole:
            sources = [
                TensorSource(n, t.dtype, t.shape, partial(list, [whole.raw(n).data.copy()]))
                for n, t in whole.tensors.items()
            ]
            metadata = dict(whole.metadata)
        if len(sources) < 2:
            raise NotApplicable("too few tensors for two shards")
        parts = []
        for number in (0, 1):
            parts.append(path.with_name(f"model-{number + 1:05}-of-00002.apr"))
            words = {**metadata, "sharding": {"shard_index": number, "shard_count": 2}}
            write_apr(parts[-1], sources[number::2], words)
            parts[-1].write_bytes(sealed(parts[-1].read_bytes(), SHARDED))
        path.unlink()
        change(parts)

    return _stored("apr", edit)


def _stored(container: str, edit: Callable[[Path], None]) -> Recipe:
    def recipe(draft: Draft) -> None:
        draft.container = container
        draft.after.append(edit)

    return recipe


def sealed(data: bytes, flags: int = 0, **fields: int) -> bytes:
    """Set flags and fields of an APR header (``count`` so far), and make both checksums right again."""
    head = bytearray(data[:64])
    head[6:8] = (int.from_bytes(head[6:8], "little") | flags).to_bytes(2, "little")
    if "count" in fields:
        head[8:12] = fields["count"].to_bytes(4, "little")
    head[40:44] = zlib.crc32(head[:40] + head[44:]).to_bytes(4, "little")
    body = bytes(head) + data[64:-4]
    return body + zlib.crc32(body).to_bytes(4, "little")


def packed(flag: int, change: Callable[[bytes], bytes] | None = None) -> Recipe:
    """Compress what stands behind the header of an APR; then change the compressed bytes."""

    def pack(data: bytes) -> bytes:
        import zstandard
        from lz4 import block

        data = sealed(data, flag)
        blob = block.compress(data[64:]) if flag == LZ4 else zstandard.compress(data[64:])
        return data[:64] + (blob if change is None else change(blob))

    return written(pack, "apr")


def _flipped(data: bytes) -> bytes:
    """Invert one byte in the middle."""
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :]


def _join_parts(parts: list[Path]) -> None:
    data = b"".join(part.read_bytes() for part in parts)
    for part in parts:
        part.unlink()
    (parts[0].parent / "model.gguf").write_bytes(data)


def _renumber(parts: list[Path]) -> None:
    """Let the second part say that it is the first."""
    data = parts[1].read_bytes()
    at = data.index(b"split.no") + len(b"split.no") + 4
    parts[1].write_bytes(data[:at] + b"\0\0" + data[at + 2 :])


def _again_in_second(parts: list[Path]) -> None:
    """Give the first tensor of the second part the name of one in the first part, of the same length."""
    with open_checkpoint(parts[0]) as whole:
        names: dict[str, list[str]] = {}
        for info in whole.tensors.values():
            names.setdefault(info.file.name, []).append(info.stored_name)
    mine, others = names[parts[1].name], names[parts[0].name]
    pair = next(((a, b) for a in mine for b in others if len(a) == len(b)), None)
    if pair is None:
        raise NotApplicable("no two names of one length")
    data = parts[1].read_bytes()
    parts[1].write_bytes(data.replace(pair[0].encode(), pair[1].encode(), 1))


def _lose_last(parts: list[Path]) -> None:
    """Write the last part without its last tensor, as a split of a split does."""
    with open_checkpoint(parts[0]) as whole:
        chosen = [t for t in whole.tensors.values() if t.file == parts[-1]][:-1]
        sources = [TensorSource(t.name, t.dtype, t.shape, partial(list, [whole.raw(t.name).data])) for t in chosen]
        total = len(whole.tensors)
        count = len(parts)
        keys = {
            "split.no": np.uint16(count - 1),
            "split.count": np.uint16(count),
            "split.tensors.count": np.int32(total),
        }
        write_gguf(parts[-1], sources, keys)


def _copy_over(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[0].read_bytes())


def _other_shard(parts: list[Path]) -> None:
    """Let the second shard be of a model of another width."""
    with open_checkpoint(parts[0]) as whole:
        second = [t for t in whole.tensors.values() if t.file == parts[1]]
        sources = [TensorSource(t.name, t.dtype, t.shape, partial(list, [whole.raw(t.name).data])) for t in second]
        words = {**whole.metadata, "sharding": {"shard_index": 1, "shard_count": 2}, "num_layers": 77}
        write_apr(parts[1], sources, words)
    parts[1].write_bytes(sealed(parts[1].read_bytes(), SHARDED))


def _stray(placed: dict[str, str], folder: Path) -> None:
    """Leave an old single file beside the shards."""
    (folder / "model.safetensors").write_bytes((folder / placed[EMBEDDING]).read_bytes())


def _twice(placed: dict[str, str], folder: Path) -> None:
    """Append a tensor of the first shard to the second one too."""
    first, second = sorted(set(placed.values()))
    name = next(n for n, shard in placed.items() if shard == first)
    header, data = parted((folder / second).read_bytes())
    entry = parted((folder / first).read_bytes())[0][name]
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    header[name] = {**entry, "data_offsets": [len(data), len(data) + size]}
    text = json.dumps(header).encode()
    (folder / second).write_bytes(len(text).to_bytes(8, "little") + text + data + bytes(size))


def _escape(placed: dict[str, str], folder: Path) -> None:
    """Place a tensor in a file outside of the folder that exists and fits."""
    shard = placed[EMBEDDING]
    (folder.parent / shard).write_bytes((folder / shard).read_bytes())
    for name, where in placed.items():
        placed[name] = f"../{shard}" if where == shard else where


def _gguf_key(key: bytes, kind: int, payload: bytes) -> Callable[[bytes], bytes]:
    """Put a pair before the others; what follows is moved by a multiple of the alignment."""

    def change(data: bytes) -> bytes:
        pairs = struct.unpack_from("<Q", data, 16)[0]
        pair = struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + payload
        filler = struct.pack("<Q", 8) + b"zoo.fill" + struct.pack("<IQ", 8, -(len(pair) + 28) % 32)
        filler += b"x" * (-(len(pair) + 28) % 32)
        return data[:16] + struct.pack("<Q", pairs + 2) + pair + filler + data[24:]

    return change


def _gguf_row(field: str) -> Callable[[bytes], bytes]:
    """Change a number in the row of one tensor: its first extent, or its offset."""

    def change(data: bytes) -> bytes:
        name = b"blk.0.attn_norm.weight"
        if name not in data:
            raise KeyError("blk.0.attn_norm.weight")
        at = data.index(name) + len(name) + 4
        if field == "extent":
            return data[:at] + (2**40).to_bytes(8, "little") + data[at + 8 :]
        at += 8 + 4
        offset = int.from_bytes(data[at : at + 8], "little") + 4
        return data[:at] + offset.to_bytes(8, "little") + data[at + 8 :]

    return change


def _length(value: int) -> Callable[[bytes], bytes]:
    return lambda data: value.to_bytes(8, "little") + data[8:]


def _entry(key: str, value: object) -> Callable[[Header], None]:
    """Change a value in the embedding's entry."""

    def change(header: Header) -> None:
        if EMBEDDING not in header:
            raise KeyError(EMBEDDING)
        header[EMBEDDING][key] = value

    return change


def _apr_index(change: Callable[[bytearray, int, int], None]) -> Callable[[bytes], bytes]:
    """Change the index of an APR, between the places given to ``change``, under checksums that hold."""

    def edit(data: bytes) -> bytes:
        start, stop = struct.unpack_from("<QQ", data, 24)
        bent = bytearray(data)
        change(bent, start, stop)
        return sealed(bytes(bent))

    return edit


def _unsorted(bent: bytearray, start: int, stop: int) -> None:
    """Exchange the first two entries."""
    ends = [start]
    for _ in range(2):
        at = ends[-1]
        length = int.from_bytes(bent[at : at + 2], "little")
        ends.append(at + 20 + length + 8 * bent[at + 3 + length])
    if ends[-1] > stop:
        raise NotApplicable("one tensor has no order")
    bent[start : ends[2]] = bent[ends[1] : ends[2]] + bent[start : ends[1]]


def _unknown_type(bent: bytearray, start: int, _: int) -> None:
    bent[start + 2 + int.from_bytes(bent[start : start + 2], "little")] = 99


class _Trap:
    """What a hostile pickle holds: here it does nothing but be a call."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (str, ("executable",))


def _pickled(_: bytes) -> bytes:
    return pickle.dumps({"weights": _Trap()}, 2)


def _torch_zip(_: bytes) -> bytes:
    """Pack what torch.save packs: a zip archive around a pickle."""
    import io
    import zipfile

    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weights": _Trap()}, 2))
        archive.writestr("archive/data/0", bytes(4096))
    return target.getvalue()


def _as_bin(path: Path) -> None:
    """Leave a pickle as the only weights."""
    path.unlink()
    (path.parent / "pytorch_model.bin").write_bytes(_torch_zip(b""))


def pickle_beside(path: Path) -> None:
    """Leave a pickle beside the weights, as many hubs do."""
    (path.parent / "pytorch_model.bin").write_bytes(_torch_zip(b""))


def _pickle_shard(placed: dict[str, str], folder: Path) -> None:
    """Let one of the shards be a pickle."""
    (folder / max(placed.values())).write_bytes(_pickled(b""))


# fmt: off
DEFECTS: tuple[Defect, ...] = (
    *family("gguf-split", "container", "llama.cpp 9613", PREFLIGHT,
        Row("split-part-missing", "the second of three parts is not there", split_gguf(3, lambda p: p[1].unlink())),
        Row("split-joined", "three parts were joined by cat", split_gguf(3, _join_parts), source="llama.cpp 6187"),
        Row("split-number-lies", "the second part says that it is the first", split_gguf(2, _renumber)),
        Row("split-tensor-lost", "the last part has lost a tensor", split_gguf(3, _lose_last), source="mesh-llm 177")),
    *family("gguf-split-mixed", "container", "vllm-metal 720", PREFLIGHT,
        Row("split-part-copied", "the second part is the first once more", split_gguf(3, _copy_over)),
        Row("split-tensor-twice", "two parts hold a tensor of one name", split_gguf(2, _again_in_second))),
    *family("apr-shards", "container", "apr.md 1.8", PREFLIGHT,
        Row("apr-shard-missing", "one of two APR shards is not there", shard_apr(lambda parts: parts[0].unlink())),
        Row("apr-shard-of-another", "the second APR shard is of another model", shard_apr(_other_shard))),
    *family("apr-compressed", "container", "apr.md 1.8", PREFLIGHT,
        Row("zstd-cut", "a Zstandard frame breaks off", packed(ZSTD, lambda blob: blob[:-100])),
        Row("zstd-flip", "one byte of a Zstandard frame", packed(ZSTD, _flipped)),
        Row("lz4-flip", "one byte of an LZ4 block", packed(LZ4, _flipped)),
        Row("zstd-flag-alone", "the Zstandard flag over plain bytes", written(lambda data: sealed(data, ZSTD), "apr"))),
    *family("apr-refused-flag", "container", "apr.md 1.2", PREFLIGHT,
        Row("apr-column-major", "the column-major flag", written(lambda data: sealed(data, 0x0800), "apr")),
        Row("apr-encrypted", "the encrypted flag", written(lambda data: sealed(data, 0x0004), "apr"))),
    *family("apr-index", "container", "apr.md 1.4", PREFLIGHT,
        Row("apr-unsorted", "two entries of an APR index are exchanged", written(_apr_index(_unsorted), "apr")),
        Row("apr-type-unknown", "an APR type number that nobody defined", written(_apr_index(_unknown_type), "apr")),
        Row("apr-count-less", "an APR counts one tensor", written(lambda data: sealed(data, count=1), "apr")),
        Row("apr-count-more", "an APR counts a million tensors",
            written(lambda data: sealed(data, count=10**6), "apr"))),
    *family("pickle-for-weights", "container", "peers S13", PREFLIGHT,
        Row("pickle-as-safetensors", "model.safetensors is a pickle", written(_pickled)),
        Row("torch-as-gguf", "a GGUF is what torch.save writes", written(_torch_zip, "gguf")),
        Row("pickle-alone", "the only weights are pytorch_model.bin", lambda draft: draft.after.append(_as_bin)),
        Row("pickle-shard", "one of the shards is a pickle", shards(_pickle_shard))),
    *family("shard-folder", "container", "mlx-vlm 1464", PREFLIGHT,
        Row("shard-stray-file", "an old single file lies beside the shards", shards(_stray)),
        Row("shard-tensor-twice", "two shards hold one tensor", shards(_twice), source="club-3090 1042"),
        Row("shard-without-index", "the index of two shards is not there", shards(_as_they_are, indexed=False)),
        Row("shard-outside", "the index points out of its folder", shards(_escape), source="peers S10")),
    *family("gguf-header", "container", "ggml 709", PREFLIGHT,
        Row("gguf-alignment-3", "a GGUF is aligned to 3 bytes",
            written(_gguf_key(b"general.alignment", 4, b"\3\0\0\0"), "gguf"), source="llama.cpp 19856"),
        Row("gguf-string-endless", "a string of 2^62 bytes",
            written(_gguf_key(b"zoo.text", 8, (2**62).to_bytes(8, "little")), "gguf")),
        Row("gguf-dims-beyond-data", "a tensor of more elements than the file has bytes",
            written(_gguf_row("extent"), "gguf"), source="CVE-2026-7482"),
        Row("gguf-offset-unaligned", "a tensor begins at an odd place", written(_gguf_row("offset"), "gguf"))),
    *family("safetensors-header", "container", "peers S9", PREFLIGHT,
        Row("header-endless", "a header of 2^63 bytes", written(_length(2**63))),
        Row("header-offset-negative", "a tensor begins before the data", edit_header(_entry("data_offsets", [-8, 0]))),
        Row("header-type-unknown", "a type that does not exist", edit_header(_entry("dtype", "F31"))),
        Row("header-shape-float", "a shape of fractions", edit_header(_entry("shape", [0.5, 2])))),
)
# fmt: on

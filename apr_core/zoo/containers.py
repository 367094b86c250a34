"""
Damage to the bytes of written model files: truncation, lying headers and indexes, stray bits, wrong block decoders.

Each recipe leaves an edit that runs on the finished file, so what is damaged is what a writer or a download damages.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apr_core.contract.layout import EMBEDDING, role_of
from apr_core.dtypes import BY_SAFETENSORS
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.formats.names import gguf_name
from apr_core.zoo.draft import Draft
from apr_core.zoo.registry import Defect, NotApplicable, Recipe

Bytes = NDArray[np.uint8]
Header = dict[str, Any]
LAYERS = "model.layers.*."
PREFLIGHT = ("preflight",)
TRANSFORMERS = "transformers_f64.npz"
INTEGER_LABEL = "F-LAYOUT-CONTRACT-004"
COVER = "F-CONTAINER-COVER-001"
USUAL = "the headers agree with each other, and the values are ones that a trained model can have"


@dataclass(frozen=True)
class Row:
    """One line of a table of defects; what its class says counts where it says nothing."""

    id: str
    what: str
    recipe: Recipe
    kills: tuple[str, ...] = ()
    alone: str | None = None
    source: str = ""
    cause: str = ""


def family(
    klass: str, cause: str, source: str, kills: tuple[str, ...], *rows: Row, alone: str = ""
) -> tuple[Defect, ...]:
    """
    Make the defects of one class.

    Args:
        klass: Its name.
        cause: Root cause, of ``registry.CAUSES``.
        source: Where it was seen, for the rows that name no other place.
        kills: Claims that must kill each row without its own.
        rows: The defects.
        alone: Why none can be seen in the file itself; a row may give its own reason, or an empty one.
    """
    made = []
    for row in rows:
        pattern = str(getattr(row.recipe, "pattern", ""))
        role = role_of(pattern.replace("*", "0"))
        made.append(
            Defect(
                row.id,
                klass,
                row.what,
                row.source or source,
                row.cause or cause,
                row.kills or kills,
                role=role.name if role else "",
                tensor="" if "*" in pattern else pattern,
                recipe=row.recipe,
                invisible_alone=alone if row.alone is None else row.alone,
            )
        )
    return tuple(made)


def written(change: Callable[[bytes], bytes], container: str = "safetensors") -> Recipe:
    """Change the bytes of the whole file."""

    def recipe(draft: Draft) -> None:
        draft.container = container
        draft.after.append(lambda path: _rewrite(path, change))

    return recipe


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    before = path.read_bytes()
    try:
        after = change(before)
    except KeyError as error:
        raise NotApplicable(f"no tensor {error}") from error
    if after == before:
        raise NotApplicable("the file has nothing that this would change")
    path.write_bytes(after)


def labelled(dtype: str, *, key: int | None = None, name: str = "model") -> Recipe:
    """Write a GGUF of one type whose ``general.file_type`` or whose name says another."""

    def change(data: bytes) -> bytes:
        at = data.index(b"general.file_type") + len(b"general.file_type") + 4
        return data[:at] + (key or 0).to_bytes(4, "little") + data[at + 4 :]

    def recipe(draft: Draft) -> None:
        stored_as(draft, "gguf", dtype)
        draft.stem = f"{name}.{{container}}"
        if key is not None:
            draft.after.append(lambda path: _rewrite(path, change))

    return recipe


def parted(data: bytes) -> tuple[Header, bytes]:
    """Cut a SafeTensors file into its header and its data section."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def _joined(header: Header | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _labelled(pattern: str, old: str, new: str) -> Recipe:
    """Write another type name of the same width into the header."""

    def change(data: bytes) -> bytes:
        header, body = parted(data)
        entries = [e for n, e in header.items() if fnmatchcase(n, pattern) and e["dtype"] == old]
        if not entries:
            raise NotApplicable(f"no {old} tensor fits {pattern}")
        for entry in entries:
            entry["dtype"] = new
        return _joined(header, body)

    return written(change)


def _ones(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Take 1.0 for every value, as an F8_E4M3 code."""
    return np.full(values.shape, 0x38, np.uint8)


def _packed(pattern: str, dtype: str, pack: Callable[[NDArray[np.float32]], NDArray[Any]]) -> Recipe:
    """Store tensors as integers and lay the file out anew, as a quantiser does that loses its scales."""

    def recipe(draft: Draft) -> None:
        chosen = {n: pack(v) for n, v in draft.weights.items() if fnmatchcase(n, pattern)}
        if not chosen:
            raise NotApplicable(f"no tensor fits {pattern}")

        def change(data: bytes) -> bytes:
            header, body = parted(data)
            out = b""
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                part = body[begin:end]
                if name in chosen:
                    entry["dtype"], entry["shape"], part = dtype, list(chosen[name].shape), chosen[name].tobytes()
                assert len(part) == BY_SAFETENSORS[entry["dtype"]].nbytes(tuple(entry["shape"]))
                entry["data_offsets"] = [len(out), len(out) + len(part)]
                out += part
            return _joined(header, out)

        draft.after.append(lambda path: _rewrite(path, change))

    return recipe


def _codes(values: NDArray[np.float32]) -> NDArray[np.int8]:
    return np.round(values * (127 / max(float(np.abs(values).max()), 1e-30))).astype(np.int8)


def _swapped(first: str, second: str) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        ranges = header[first]["data_offsets"], header[second]["data_offsets"]
        header[second]["data_offsets"], header[first]["data_offsets"] = ranges

    return change


def edit_header(change: Callable[[Header], None], tail: bytes = b"") -> Recipe:
    """Edit the parsed header; ``tail`` follows the data."""

    def edit(data: bytes) -> bytes:
        header, body = parted(data)
        change(header)
        return _joined(header, body + tail)

    return written(edit)


def _shifted(nbytes: int) -> Callable[[Header], None]:
    """Leave a hole before the tensor that lies last."""

    def change(header: Header) -> None:
        last = max((e for n, e in header.items() if n != "__metadata__"), key=lambda e: int(e["data_offsets"][0]))
        last["data_offsets"] = [at + nbytes for at in last["data_offsets"]]

    return change


def _named_twice(data: bytes) -> bytes:
    """Name one tensor twice in the header's text, with the bytes of another: first or last wins, as a reader likes."""
    header, body = parted(data)
    name, other = f"{LAYERS}self_attn.k_proj.bias".replace("*", "0"), f"{LAYERS}self_attn.v_proj.bias".replace("*", "0")
    text = json.dumps(header).encode()
    return _joined(text[:-1] + b", " + json.dumps({name: header[other]}).encode()[1:], body)


def shards(change: Callable[[dict[str, str], Path], None], *, indexed: bool = True) -> Recipe:
    """
    Write the file as two shards with an index, then let ``change`` edit the map or the folder.

    Args:
        change: Gets the index's tensor -> shard map and the folder.
        indexed: Whether the index is written in the end.
    """

    def edit(path: Path) -> None:
        header, body = parted(path.read_bytes())
        names = sorted(n for n in header if n != "__metadata__")
        if len(names) < 2 or _Q not in header:
            raise NotApplicable("too few tensors for two shards")
        placed: dict[str, str] = {}
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            entries: Header = {}
            data = b""
            for name in part:
                begin, end = header[name]["data_offsets"]
                entries[name] = {**header[name], "data_offsets": [len(data), len(data) + end - begin]}
                data += body[begin:end]
                placed[name] = f"model-0000{number}-of-00002.safetensors"
            (path.parent / placed[part[0]]).write_bytes(_joined(entries, data))
        path.unlink()
        change(placed, path.parent)
        if not indexed:
            return
        (path.parent / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}), encoding="utf-8")

    return lambda draft: draft.after.append(edit)


def _misplace(placed: dict[str, str], folder: Path) -> None:
    placed[EMBEDDING] = next(s for s in placed.values() if s != placed[EMBEDDING])


def _copy_across(placed: dict[str, str], folder: Path) -> None:
    """Put the first shard's content into the second's place, as an interrupted download with a reused name does."""
    first, second = sorted(set(placed.values()))
    (folder / second).write_bytes((folder / first).read_bytes())


@dataclass(frozen=True)
class Stored:
    """
    Edit the stored bytes of tensors in place, in a container that is not sealed by a checksum.

    Attributes:
        pattern: Canonical names.
        edit: Gets the bytes as [blocks, bytes of a block] and changes them.
        container: Written container.
        dtype: Written type, ``keep`` or a recipe of ``rosetta.convert``.
    """

    pattern: str
    edit: Callable[[Bytes], None]
    container: str = "gguf"
    dtype: str = "Q8_0"

    def __call__(self, draft: Draft) -> None:
        """Plan the edit; the golden logits are those of the unquantised weights, so they stay behind."""
        if not any(fnmatchcase(n, self.pattern) for n in draft.weights):
            raise NotApplicable(f"no tensor fits {self.pattern}")
        stored_as(draft, self.container, self.dtype)
        draft.after.append(self._apply)

    def _apply(self, path: Path) -> None:
        with open_checkpoint(path) as checkpoint:
            spans = [t for n, t in checkpoint.tensors.items() if fnmatchcase(n, self.pattern)]
        data = np.frombuffer(path.read_bytes(), np.uint8).copy()
        for span in spans:
            self.edit(data[span.offset : span.offset + span.nbytes].reshape(-1, span.dtype.block_bytes))
        path.write_bytes(data.tobytes())


def stored_as(draft: Draft, container: str, dtype: str) -> None:
    """Choose what is written in the end."""
    draft.container, draft.dtype = container, dtype
    if dtype in ("Q8_0", "Q4_K_M"):
        draft.carried.pop(TRANSFORMERS, None)


def _scale(value: float, every: int = 0) -> Callable[[Bytes], None]:
    """Set the float16 scale of one block, or of each ``every``-th."""

    def edit(blocks: Bytes) -> None:
        chosen = slice(0, None, every) if every else slice(3, 4)
        blocks[chosen, :2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)

    return edit


def _scaled(factor: float) -> Callable[[Bytes], None]:
    """Multiply the scale of one block."""

    def edit(blocks: Bytes) -> None:
        scale = blocks[3, :2].copy().view(np.float16) * np.float16(factor)
        blocks[3, :2] = scale.view(np.uint8)

    return edit


def _next_scale(blocks: Bytes) -> None:
    blocks[:, :2] = np.roll(blocks[:, :2], 1, axis=0)


def _type_id(name: str, number: int) -> Recipe:
    """Write another type number into a GGUF tensor table."""

    def change(data: bytes) -> bytes:
        stored = gguf_name(name).encode()
        if stored not in data:
            raise KeyError(name)
        at = data.index(len(stored).to_bytes(8, "little") + stored) + 8 + len(stored)
        at += 4 + 8 * int.from_bytes(data[at : at + 4], "little")
        return data[:at] + number.to_bytes(4, "little") + data[at + 4 :]

    def recipe(draft: Draft) -> None:
        written(change, "gguf")(draft)
        stored_as(draft, "gguf", "Q8_0")

    return recipe


def _same_name(data: bytes) -> bytes:
    """Give two tensors of a GGUF one name."""
    old, new = (gguf_name(f"model.layers.{n}.self_attn.k_proj.bias").encode() for n in (1, 0))
    return data.replace(old, new, 1)


def _from_data(keep: Callable[[Bytes], Bytes]) -> Callable[[bytes], bytes]:
    """Change the data section alone, behind an intact header."""

    def change(data: bytes) -> bytes:
        header, body = parted(data)
        return _joined(header, keep(np.frombuffer(body, np.uint8).copy()).tobytes())

    return change


def _gguf_hole(path: Path) -> None:
    """Move the last tensor of a GGUF on by a page, as an aborted edit in place leaves it."""
    with open_checkpoint(path) as checkpoint:
        last = max(checkpoint.tensors.values(), key=lambda info: info.offset)
    data, stored = path.read_bytes(), last.stored_name.encode()
    at = data.index(len(stored).to_bytes(8, "little") + stored) + 8 + len(stored) + 4 + 8 * len(last.shape) + 4
    moved = (int.from_bytes(data[at : at + 8], "little") + 4096).to_bytes(8, "little")
    path.write_bytes(data[:at] + moved + data[at + 8 : last.offset] + bytes(4096) + data[last.offset :])


def _edited(edit: Callable[[Path], None], container: str) -> Recipe:
    """Edit the finished file of a container by its path."""

    def recipe(draft: Draft) -> None:
        draft.container = container
        draft.after.append(edit)

    return recipe


def _apr_tail(data: bytes) -> bytes:
    """Leave the end of a longer file behind the last tensor of an APR, under a checksum that holds."""
    body = data[:-4] + data[-4 - 6400 : -4]
    return body + zlib.crc32(body).to_bytes(4, "little")


def _stale_pages(data: Bytes) -> Bytes:
    """Repeat the first half of the data where the second should be, page by page."""
    half = data.size // 8192 * 4096
    data[half : 2 * half] = data[:half]
    return data


def _pages_lost(data: Bytes) -> Bytes:
    """Keep each sixth page of 4096 bytes, as a mapping of a file that is being rewritten reads."""
    pages = data[: data.size // 4096 * 4096].reshape(-1, 4096)
    pages[np.arange(len(pages)) % 6 > 0] = 0
    return data


def _tail_lost(data: Bytes) -> Bytes:
    data[-(data.size // 3) :] = 0
    return data


def _byteswapped(data: Bytes) -> Bytes:
    return data.view("<u2").byteswap().view(np.uint8)


def _pairs_swapped(blocks: Bytes) -> None:
    blocks[:] = blocks.reshape(-1, 2)[:, ::-1].reshape(blocks.shape)


def _big_endian(data: bytes) -> bytes:
    return data[:4] + data[7:3:-1] + data[8:]


def _byte(at: int) -> Callable[[bytes], bytes]:
    """Invert one byte."""

    def change(data: bytes) -> bytes:
        edited = bytearray(data)
        edited[at] ^= 0xFF
        return bytes(edited)

    return change


def _cut(share: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(len(data) * share)]


_Q = f"{LAYERS}self_attn.q_proj.weight".replace("*", "0")
_DOWN = f"{LAYERS}mlp.down_proj.weight".replace("*", "1")
_UP = f"{LAYERS}mlp.up_proj.weight".replace("*", "1")
_GATE = f"{LAYERS}mlp.gate_proj.weight".replace("*", "1")
_V_BIAS = f"{LAYERS}self_attn.v_proj.bias".replace("*", "1")
_VS = f"{LAYERS}self_attn.v_proj.weight"
_BOTH = ("F-GT-010", "F-PAR-008")
_HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n"
_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 494032768\n"


def _part(draft: Draft, which: int) -> None:
    """Keep every other tensor."""
    draft.container = "gguf"
    for name in list(draft.weights)[1 - which :: 2]:
        draft.drop(name)


# fmt: off
DEFECTS: tuple[Defect, ...] = (
    *family("truncated", "container", "vmlx-swift 217", PREFLIGHT,
        Row("cut-1-percent", "the last 1 % is missing", written(_cut(0.99))),
        Row("cut-in-header", "the header breaks off", written(lambda d: d[: int.from_bytes(d[:8], "little") // 2])),
        Row("gguf-cut-in-tensor", "a GGUF ends inside a tensor", written(_cut(0.5), "gguf")),
        Row("apr-cut-tail", "an APR lacks its last kilobyte", written(lambda d: d[:-1024], "apr"))),
    *family("shard-index", "container", "sglang 32279", PREFLIGHT,
        Row("shard-missing", "a shard is not there", shards(lambda m, f: (f / max(m.values())).unlink())),
        Row("index-stale", "the index places a tensor in another shard", shards(_misplace)),
        Row("index-ghost", "the index names a tensor that no shard has", shards(lambda m, f: m.update(ghost=m[_Q]))),
        Row("shard-copied", "the second shard is the first once more", shards(_copy_across), source="CoSER 3")),
    *family("not-a-model", "container", "OmniParser 34", PREFLIGHT,
        Row("lfs-pointer", "a Git-LFS pointer instead of the weights", written(lambda d: _POINTER)),
        Row("html-page", "an error page instead of the weights", written(lambda d: _HTML), source="Qwen 462"),
        Row("gzip", "the file is still compressed", written(lambda d: gzip.compress(d, 1)), source="MFTCoder 20"),
        Row("all-zero-bytes", "a file of zero bytes in the right length", written(lambda d: bytes(len(d))))),
    *family("duplicate-name", "container", "llama.cpp 21403", PREFLIGHT,
        Row("json-key-twice", "the header names a bias twice", written(_named_twice)),
        Row("gguf-name-twice", "two tensors of a GGUF have one name", written(_same_name, "gguf"))),
    *family("uncovered-bytes", "container", "safetensors attacks 4", PREFLIGHT,
        Row("overlap", "two tensors share their bytes", edit_header(lambda h: h[_UP].update(h[_GATE]))),
        Row("hole", "a hole of 1 MB before the last tensor", edit_header(_shifted(1 << 20), bytes(1 << 20))),
        Row("trailing-bytes", "a megabyte behind the last tensor", edit_header(lambda h: None, bytes(1 << 20)))),
    *family("unexplained-bytes", "container", "round 47", (COVER,),
        Row("gguf-hole", "a page that no tensor explains before the last one", _edited(_gguf_hole, "gguf")),
        Row("gguf-tail", "a GGUF over a longer file, whose end is still there",
            written(lambda d: d + d[-70_000:], "gguf")),
        Row("gguf-zero-tail", "64 bytes of zeros behind the last tensor", written(lambda d: d + bytes(64), "gguf")),
        Row("apr-tail", "the end of a longer file before the checksum of an APR", written(_apr_tail, "apr"))),
    *family("offset-swapped", "container", "peers N5", ("F-GT-008", "F-GT-010"),
        Row("offset-gate-up", "gate and up point at each other's bytes", edit_header(_swapped(_GATE, _UP))),
        Row("offset-up-down", "up and down point at each other's bytes", edit_header(_swapped(_UP, _DOWN))),
        alone=USUAL),
    *family("sealed-bytes-altered", "container", "round 47", PREFLIGHT,
        Row("apr-bit-flip", "one byte in the data of an APR", written(_byte(-999), "apr")),
        Row("apr-header-altered", "an APR counts other tensors", written(_byte(8), "apr"))),
    *family("type-id-relabelled", "container", "aprender GH-191", PREFLIGHT,
        Row("q8-as-f16", "a Q8_0 tensor is labelled F16", _type_id(_Q, 1)),
        Row("q8-as-f32", "a Q8_0 tensor is labelled F32", _type_id(_DOWN, 0)),
        Row("type-unknown", "a type number that does not exist", _type_id(_Q, 77)),
        Row("type-removed", "a type number that was withdrawn", _type_id(_Q, 4))),
    *family("float-type-relabelled", "container", "aprender GH-186", ("F-GT-010", "F-PAR-008"),
        Row("bf16-as-f16", "BF16 weights are labelled F16", _labelled("*", "BF16", "F16")),
        Row("bf16-as-f16-one", "one BF16 tensor is labelled F16", _labelled(_DOWN, "BF16", "F16")),
        Row("bias-bf16-as-f16", "the biases are labelled F16", _labelled(f"{LAYERS}*.bias", "BF16", "F16")),
        alone="finite values between 0.5 and 2; no gate bounds the size of a weight"),
    *family("integer-label", "container", "aprender GH-191", (INTEGER_LABEL,),
        Row("bf16-as-i16", "a weight is labelled I16", _labelled(_DOWN, "BF16", "I16")),
        Row("bf16-as-u16", "the embedding is labelled U16", _labelled(EMBEDDING, "BF16", "U16"))),
    *family("scales-lost", "codec", "aprender GH-177", (INTEGER_LABEL,),
        Row("int8-without-scale", "down_proj is stored as bare int8 codes", _packed(_DOWN, "I8", _codes)),
        Row("all-int8", "every matrix is stored as bare int8 codes", _packed("*proj.weight", "I8", _codes)),
        Row("bias-integers", "a v bias is stored as int8 codes", _packed(_V_BIAS, "I8", _codes))),
    *family("vectors-in-eight-bits", "codec", "tiny-model 234", (INTEGER_LABEL,),
        Row("norm-in-f8", "the final norm is stored in eight bits", _packed("model.norm.weight", "F8_E4M3", _ones)),
        Row("biases-in-f8", "the biases are stored in eight bits", _packed(f"{LAYERS}*.bias", "F8_E4M3", _ones))),
    *family("pages-lost", "missing-data", "SimpleTuner 2714", ("F-DATA-QUALITY-001",),
        Row("stale-pages", "the second half of the file repeats the first", written(_from_data(_stale_pages)),
            ("F-GT-008", "F-GT-010"), "each value is one of the model's own"),
        Row("tail-zero", "the last third of the file is zeros", written(_from_data(_tail_lost))),
        Row("pages-zero", "five of six pages of 4 KiB are zeros", written(_from_data(_pages_lost)))),
    *family("endianness", "container", "gguf_convert_endian", ("F-DATA-QUALITY-002",),
        Row("bytes-swapped", "every value is byte-swapped", written(_from_data(_byteswapped))),
        Row("gguf-big-endian", "a GGUF of the other byte order", written(_big_endian, "gguf"), PREFLIGHT),
        Row("one-tensor-swapped", "one weight is byte-swapped", Stored(_DOWN, _pairs_swapped, "safetensors", "keep"))),
    *family("split-part", "container", "llama.cpp 9613", ("F-ARCH-COMPLETE-001",),
        Row("split-first-part", "only the first part of a split GGUF", lambda d: _part(d, 0)),
        Row("split-second-part", "only the second part of a split GGUF", lambda d: _part(d, 1))),
    *family("damaged-scale", "codec", "llama.cpp 7311", ("F-DATA-QUALITY-002",),
        Row("scale-nan", "one block scale is NaN", Stored(_DOWN, _scale(float("nan")))),
        Row("scale-inf", "one block scale is infinite", Stored(EMBEDDING, _scale(float("inf"))))),
    *family("wrong-scale", "codec", "peers Q2", ("F-GT-010",),
        Row("scale-zero", "one block scale is zero", Stored(_DOWN, _scale(0.0))),
        Row("scale-x100", "one block scale is 100 times too large", Stored(_DOWN, _scaled(100)), _BOTH),
        Row("scale-half-zero", "each second block scale of v_proj is zero", Stored(_VS, _scale(0.0, 2)), _BOTH),
        Row("scale-negative", "one block scale is negative", Stored(_Q, _scaled(-1))),
        alone="one block of tens of thousands; pruned and outlier blocks are legal"),
    *family("block-stride", "codec", "llama.cpp 27007", _BOTH,
        Row("scale-of-next-block", "each block has the scale of its neighbour", Stored(_DOWN, _next_scale)),
        Row("all-scales-shifted", "the same in every matrix", Stored("*proj.weight", _next_scale)),
        alone="the scales are the tensor's own, each at another block"),
)
# fmt: on

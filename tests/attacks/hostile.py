"""The hostile files of the defect catalogue, classes S1 to S9 and F4, F8, F10: none larger than 2 kB."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile

import lz4.block
import zstandard

from tests.attacks.build import (
    VALID_APR,
    VALID_GGUF,
    VALID_SAFETENSORS,
    Attack,
    apr,
    apr_entry,
    apr_packed,
    entry,
    gguf,
    pair,
    row,
    safetensors,
    text,
)

DATA = bytes(8)


def _zip(members: dict[str, bytes]) -> bytes:
    """Pack an uncompressed zip archive, as torch.save does."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return packed.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 988097824\n"


TORCH_ZIP = _zip({"archive/data.pkl": b"\x80\x02}q\x00.", "archive/data/0": bytes(16)})


def u32(value: int) -> bytes:
    """Pack a GGUF uint32."""
    return struct.pack("<I", value)


IMPOSTORS = [
    Attack("empty", b"", "0 bytes"),
    Attack("one-byte", b"\x01", "a stump of 1 bytes"),
    Attack("eight-bytes", b"\x01" * 8, "a stump of 8 bytes"),
    Attack("zero-filled", bytes(5000), "the first 4096 bytes of 5000"),
    Attack("zero-length", bytes(8) + b"xyz", "a SafeTensors header of 0 bytes"),
    Attack("lfs-pointer", LFS, "Git-LFS pointer to 988097824 bytes"),
    Attack("lfs-advice", LFS, "git lfs pull"),
    Attack("html", b"<!DOCTYPE html><html>404</html>", "HTML"),
    Attack("html-indented", b"\n  <HTML><body>Entry not found", "HTML"),
    Attack("gzip", b"\x1f\x8b\x08" + bytes(20), "gzip"),
    Attack("zip", b"PK\x03\x04" + bytes(20), "a zip archive,"),
    Attack("S13-torch", TORCH_ZIP, "PyTorch checkpoint .a zip archive with a pickle., which can run code"),
    Attack("S13-torch-old", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "pickle .protocol 2., which can run code"),
    Attack("S13-pickle-4", pickle.dumps({"a": [1, 2]}, 4), "pickle .protocol 4."),
    Attack("S13-pickle-0", pickle.dumps({"a": [1, 2]}, 0), "pickle .protocol 0 or 1."),
    Attack("S13-pickle-code", b"cposix\nsystem\n(S'true'\ntR.", "executable content"),
    Attack("old-ggml", b"tjgg" + bytes(20), "GGJT"),
    Attack("byte-swapped", b"FUGG" + bytes(20), "byte-swapped"),
    Attack("text", b"Entry not found", "text that begins 'Entry not found'"),
    Attack("other-json", b'{"error": "not found"}', "no shard index"),
    Attack("noise", b"\xde\xad\xbe\xef" * 4, "de ad be ef"),
]

SAFETENSORS = [
    Attack("S9-length-0", safetensors({}, length=0), "found 0"),
    Attack("S9-length-2^63", safetensors({}, length=2**63), "header of 9223372036854775808 bytes"),
    Attack("S9-length-99MB", safetensors({}, length=99_000_000), "98999998 bytes are missing"),
    Attack("S9-length-101MB", safetensors({}, length=101_000_000), "2 to 100000000"),
    Attack("S9-not-brace", safetensors(b"[1, 2]  "), "unknown format"),
    Attack("S9-not-utf8", safetensors(b'{"\xff": 1}'), "not UTF-8"),
    Attack("S9-not-json", safetensors(b'{"a": }'), "JSON error"),
    Attack("S9-deep", safetensors(b'{"a":' + b"[" * 1500), "JSON error|too deep"),
    Attack("S9-nan", safetensors(b'{"a": NaN}'), "NaN"),
    Attack("S9-1e309", safetensors(b'{"a": 1e309}'), "1e309"),
    Attack("S9-float-offset", safetensors({"a": entry(offsets=[0, 8.0])}, DATA), "only integers"),
    Attack("S9-string-offset", safetensors({"a": entry(offsets=["0", 8])}, DATA), "two integers"),
    Attack("S9-negative-offset", safetensors({"a": entry(offsets=[-8, 0])}, DATA), "two integers"),
    Attack("S9-true-offset", safetensors({"a": entry("U8", [1], [False, True])}, b"x"), "two integers"),
    Attack("S9-three-offsets", safetensors({"a": entry(offsets=[0, 8, 8])}, DATA), "two integers"),
    Attack("S9-begin-behind-end", safetensors({"a": entry(offsets=[8, 0])}, DATA), "begin <= end"),
    Attack("S9-dtype-unknown", safetensors({"a": entry("F31")}, DATA), "dtype among"),
    *[
        Attack(f"S9-dtype-{name}", safetensors({"a": entry(name)}, DATA), f"not decoded here.*'{name}'")
        for name in ("F4", "F6_E2M3", "F6_E3M2", "C64")
    ],
    Attack("S9-dtype-number", safetensors({"a": entry(0)}, DATA), "dtype among"),
    Attack("S9-shape-negative", safetensors({"a": entry(shape=[-1, -2])}, DATA), "non-negative"),
    Attack("S9-shape-bool", safetensors({"a": entry("U8", [True], [0, 1])}, b"x"), "non-negative"),
    Attack("S9-shape-text", safetensors({"a": entry(shape="2")}, DATA), "non-negative"),
    Attack("S4-shape-overflow", safetensors({"a": entry(shape=[2**62, 4])}, DATA), "a shape that an array can have"),
    Attack("S4-bytes-overflow", safetensors({"a": entry(shape=[2**58])}, DATA), "1152921504606846976 bytes"),
    Attack("S4-empty-and-endless", safetensors({"a": entry(shape=[0, 2**62], offsets=[0, 0])}), "an array can have"),
    Attack("S4-axes-65", safetensors({"a": entry("U8", [1] * 65, [0, 1])}, b"x"), "an array can have"),
    Attack("S7-shape-too-large", safetensors({"a": entry(shape=[3])}, DATA), "12 bytes for F32"),
    Attack("S9-entry-not-object", safetensors({"a": [1]}, DATA), "an object of dtype"),
    Attack("S9-entry-extra-key", safetensors({"a": entry() | {"x": 1}}, DATA), "an object of dtype"),
    Attack("S9-metadata-number", safetensors({"__metadata__": {"a": 1}}), "object of strings"),
    Attack("S9-metadata-list", safetensors({"__metadata__": []}), "object of strings"),
    Attack("S9-long-integer", safetensors(b'{"a": ' + b"9" * 1900 + b"e}"), "JSON error|too long"),
    Attack("S9-half-surrogate", safetensors(b'{"__metadata__": {"a": "\\ud800"}}'), "not UTF-8"),
    Attack("F8-duplicate", safetensors(b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{}}', b"x"), "twice"),
    Attack("F10-overlap", safetensors({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "overlap of 4 bytes"),
    Attack("F10-same-range", safetensors({"a": entry(), "b": entry()}, DATA), "overlap of 8 bytes"),
    Attack("F10-hole", safetensors({"a": entry(offsets=[4, 12])}, bytes(12)), "4 bytes that no tensor explains"),
    Attack("F10-tail", safetensors({"a": entry()}, bytes(9)), "1 bytes that no tensor explains"),
    Attack("F2-truncated", VALID_SAFETENSORS[:-3], "3 bytes are missing"),
    Attack("F2-truncated-header", VALID_SAFETENSORS[:40], "bytes are missing"),
]

_ONE = [row("a", (2,))]
GGUF = [
    Attack("S1-only-magic", b"GGUF", "4 bytes are missing"),
    Attack("S1-version-0", gguf(_ONE, data=DATA, version=0), "version 0"),
    Attack("S1-version-1", gguf(_ONE, data=DATA, version=1), "version 1"),
    Attack("S1-version-max", gguf(_ONE, data=DATA, version=0xFFFFFFFF), "version 4294967295"),
    Attack("F9-big-endian", gguf(_ONE, data=DATA, version=0x03000000), "big-endian"),
    *[
        Attack(f"S2-tensors-{count}", gguf(_ONE, data=DATA, n_rows=count), "tensor count that fits")
        for count in (2**63, 2**64 - 1, 2**64 // 33, 2**32)
    ],
    *[
        Attack(f"S2-pairs-{count}", gguf(_ONE, data=DATA, n_pairs=count), "key-value count that fits")
        for count in (2**63, 2**64 - 1, 2**64 // 14)
    ],
    Attack("S2-one-pair-more", gguf(_ONE, [pair("k", 0, b"\1")], DATA, n_pairs=2), "expected"),
    Attack("S2-one-pair-less", gguf(_ONE, [pair("k", 0, b"\1")], DATA, n_pairs=0), "expected"),
    Attack("S2-one-tensor-more", gguf(_ONE, data=DATA, n_rows=2), "expected"),
    Attack("S2-one-tensor-less", gguf([*_ONE, row("b", offset=32)], data=bytes(64), n_rows=1), "count is too small"),
    Attack("S3-key-2^62", gguf(_ONE, [text("k", 2**62) + bytes(5)], DATA), "length of key that fits"),
    Attack("S3-key-empty", gguf(_ONE, [pair("", 0, b"\1")], DATA), "1 to 65535"),
    Attack("S3-key-not-utf8", gguf(_ONE, [pair(b"\xff\xfe", 0, b"\1")], DATA), "key in UTF-8"),
    Attack("S3-text-2^62", gguf(_ONE, [pair("k", 8, text("x", 2**62))], DATA), "length of value"),
    Attack("S3-text-not-utf8", gguf(_ONE, [pair("k", 8, text(b"\xff"))], DATA), "in UTF-8"),
    Attack("S3-array-2^61", gguf(_ONE, [pair("k", 9, struct.pack("<IQ", 4, 2**61))], DATA), "length of array"),
    Attack("S3-texts-2^60", gguf(_ONE, [pair("k", 9, struct.pack("<IQ", 8, 2**60))], DATA), "length of array"),
    Attack(
        "S3-text-in-array-2^63",
        gguf(_ONE, [pair("k", 9, struct.pack("<IQ", 8, 2) + text("x", 2**63) + text("y"))], DATA),
        "behind the end of the file",
    ),
    Attack(
        "S3-last-text-in-array",
        gguf(_ONE, [pair("k", 9, struct.pack("<IQ", 8, 1) + text("x", 999))], DATA),
        "behind the end of the file",
    ),
    Attack("S3-nested-array", gguf(_ONE, [pair("k", 9, struct.pack("<IQ", 9, 1))], DATA), "array of arrays"),
    Attack("S3-array-of-13", gguf(_ONE, [pair("k", 9, struct.pack("<IQ", 13, 1))], DATA), "element type 0 to 12"),
    Attack("S3-type-13", gguf(_ONE, [pair("k", 13, bytes(8))], DATA), "value type 0 to 12"),
    Attack("S3-type-negative", gguf(_ONE, [pair("k", 0xFFFFFFFF, bytes(8))], DATA), "value type 0 to 12"),
    Attack("S3-bool-2", gguf(_ONE, [pair("k", 7, b"\2")], DATA), "bool of 0 or 1"),
    Attack("S3-bools-2", gguf(_ONE, [pair("k", 9, struct.pack("<IQ", 7, 2) + b"\1\2")], DATA), "bools of 0 or 1"),
    Attack("F8-key-twice", gguf(_ONE, [pair("k", 0, b"\1"), pair("k", 0, b"\2")], DATA), "twice"),
    Attack("F8-name-twice", gguf([row("a"), row("a", offset=32)], data=bytes(64)), "name twice"),
    Attack("S4-dims-0", gguf([row("a", ())], data=DATA), "1 to 4 dimensions"),
    Attack("S4-dims-5", gguf([row("a", (1,) * 5)], data=DATA), "1 to 4 dimensions"),
    Attack("S4-dims-2^31", gguf([row("a", (2,), dims=2**31)], data=DATA), "1 to 4 dimensions"),
    Attack("S4-ne-0", gguf([row("a", (0, 4))], data=DATA), "from 1 to"),
    Attack("S4-ne--1", gguf([row("a", (-1,))], data=DATA), "from 1 to"),
    Attack("S4-ne-2^42", gguf([row("a", (2**42 + 1,))], data=DATA), "bytes are missing"),
    Attack("S4-ne-int64-max", gguf([row("a", (2**63 - 1, 2**63 - 1))], data=DATA), "bytes are missing"),
    Attack("S4-wraps-to-2", gguf([row("a", (2**32, 2**32, 2))], data=DATA), "bytes are missing"),
    Attack("S4-bytes-wrap", gguf([row("a", (2**62 + 2,))], data=DATA), "bytes are missing"),
    *[
        Attack(f"S5-type-{kind}", gguf([row("a", (256,), kind)], data=bytes(2000 - 64)), "known tensor type")
        for kind in (4, 5, 31, 32, 33, 36, 1_000_000, -1)
    ],
    Attack("S5-removed", gguf([row("a", (256,), 4)], data=DATA), "Q4_2, removed"),
    Attack("S6-unaligned", gguf([row("a", offset=4)], data=bytes(64)), "a multiple of 32"),
    Attack("S6-beyond-end", gguf([row("a", offset=2**40)], data=DATA), "bytes are missing"),
    Attack("S6-offset-wraps", gguf([row("a", offset=2**64 - 32)], data=DATA), "bytes are missing"),
    Attack("S6-overlap", gguf([row("a", (16,)), row("b", (16,), 0, 32)], data=bytes(96)), "overlap of 32"),
    Attack("S6-descending", gguf([row("a", offset=32), row("b")], data=bytes(64)), "ascending"),
    *[
        Attack(f"S6-alignment-{value}", gguf(_ONE, [pair("general.alignment", 4, u32(value))], DATA), "power of two")
        for value in (0, 3, 4, 48, 2**31)
    ],
    Attack("S6-alignment-text", gguf(_ONE, [pair("general.alignment", 8, text("32"))], DATA), "power of two"),
    Attack("S6-alignment-bool", gguf(_ONE, [pair("general.alignment", 7, b"\1")], DATA), "power of two"),
    Attack("S7-bleeding", gguf([row("a", (2**20,))], data=DATA), "bytes are missing"),
    Attack("S8-columns", gguf([row("a", (255, 2), 12)], data=bytes(600)), "multiple of 256"),
    Attack("S3-name-empty", gguf([row("")], data=DATA), "1 to 64"),
    Attack("S3-name-65", gguf([row("a" * 65)], data=DATA), "1 to 64"),
    Attack("S3-name-not-utf8", gguf([row(b"\xff")], data=DATA), "tensor name in UTF-8"),
    Attack(
        "F7-split", gguf(_ONE, [pair("split.count", 2, b"\3\0"), pair("split.no", 2, b"\1\0")], DATA), "part 2 of 3"
    ),
    Attack(
        "F8-two-names-one-tensor",
        gguf([row("token_embd.weight"), row("model.embed_tokens.weight", offset=32)], data=bytes(64)),
        "stored as token_embd.weight and model.embed_tokens.weight",
    ),
    Attack("F2-truncated", VALID_GGUF[:-1], "1 bytes are missing"),
    Attack("F2-truncated-table", VALID_GGUF[:190], "missing|fits"),
]

_A = [apr_entry("a", 0, (2,), 0, 8)]
SHARD = b'{"sharding": {"shard_index": %d, "shard_count": %d}}'
# 600 runs of 128 KiB of one byte: 79 MB out of 2,4 kB, a legal frame.
ZSTD_BOMB = struct.pack("<IBB", 0xFD2FB528, 0, 0x38) + b"".join(
    ((1 << 17) << 3 | 1 << 1 | (n == 599)).to_bytes(3, "little") + b"\0" for n in range(600)
)
ZSTD_WINDOW = struct.pack("<IBB", 0xFD2FB528, 0, 0x88) + b"\1\0\0"  # asks for 128 MiB, which the library would grant
ZSTD_SIZE = struct.pack("<IBBQ", 0xFD2FB528, 0xC0, 0x38, 2**62) + b"\1\0\0"
LZ4_BOMB = struct.pack("<I", 2**31) + b"\x1f\0\1\0" + b"\xff" * 300 + b"\0\x50abcde"
PACKED = {"lz4": apr_packed(VALID_APR, 0x0401), "zstd": apr_packed(VALID_APR, 0x0402)}
_DATA = DATA.ljust(64, b"\0")


def one(kind: int, shape: tuple[int, ...], size: int, **changes: object) -> bytes:
    """Build an APR file of one tensor named ``a``."""
    data = bytes(-(-size // 64) * 64)
    return apr([apr_entry("a", kind, shape, 0, size)], data, **changes)  # type: ignore[arg-type]


APR = [
    Attack("S1-only-magic", b"APR\0", "60 bytes are missing"),
    Attack("S1-magic-3", apr(_A, _DATA, magic=b"APR3"), "the magic"),
    Attack("S1-whisper", apr(_A, _DATA, magic=b"APR1"), "Whisper"),
    Attack("S1-v1-stump", b"APRN" + bytes(8), "APRN"),
    Attack("S1-version-1", apr(_A, _DATA, major=1), "version 1.0"),
    Attack("header-crc", apr(_A, _DATA, break_header=True), "header was altered"),
    Attack("footer-crc", apr(_A, _DATA, break_footer=True), "footer checksum"),
    Attack("column-major", apr(_A, _DATA, flags=0x0C00), "LAYOUT-002"),
    Attack("encrypted", apr(_A, _DATA, flags=0x0404), "encrypted"),
    Attack("signed", apr(_A, _DATA, flags=0x0408), "signed flag"),
    Attack("flag-unknown", apr(_A, _DATA, flags=0x8400), "bits 0x8000"),
    Attack("json-apr", apr([b'[{"name":"weights"}]'], _DATA, count=1), "JSON-APR"),
    Attack("both-compressions", apr(_A, _DATA, flags=0x0403), "the flags of LZ4 and of Zstandard"),
    Attack("zstd-plain", apr(_A, _DATA, flags=0x0402), "a Zstandard frame, found damaged data"),
    Attack("zstd-bomb", apr_packed(b"", 0x0402, ZSTD_BOMB), "expands beyond all measure"),
    Attack("zstd-window", apr_packed(b"", 0x0402, ZSTD_WINDOW), "too much memory"),
    Attack("zstd-size-lies", apr_packed(b"", 0x0402, ZSTD_SIZE), "damaged data|truncated|missing"),
    Attack("zstd-cut", PACKED["zstd"][:-9], "the end of the file: it is truncated"),
    Attack("zstd-tail", PACKED["zstd"] + b"tail", "4 bytes behind it"),
    Attack("zstd-two-frames", PACKED["zstd"] + zstandard.compress(b"x"), "bytes behind it"),
    Attack("zstd-not", apr_packed(VALID_APR, 0x0402, b"no frame at all"), "damaged data"),
    Attack("lz4-bomb", apr_packed(b"", 0x0401, LZ4_BOMB), "expands at most 255-fold"),
    Attack("lz4-size-huge", apr_packed(b"", 0x0401, b"\xff" * 4 + bytes(40)), "4294967295 bytes of 40"),
    Attack("lz4-size-less", apr_packed(b"", 0x0401, b"\1\0\0\0" + lz4.block.compress(VALID_APR)[4:]), "an LZ4 block"),
    Attack("lz4-size-more", PACKED["lz4"][:64] + b"\xf0\3\0\0" + PACKED["lz4"][68:], "an LZ4 block of 1008 bytes"),
    Attack("lz4-half-plain", apr(_A, _DATA, flags=0x0401, metadata=b'{"a": }'), "expands at most 255-fold"),
    Attack("lz4-damaged", PACKED["lz4"][:72] + b"\xff" * 12 + PACKED["lz4"][84:], "an LZ4 block|not UTF-8"),
    Attack("lz4-stump", apr_packed(b"", 0x0401, b"\1\0"), "an LZ4 block"),
    Attack("packed-truncated", apr_packed(VALID_APR[:-80], 0x0402), "bytes are missing"),
    Attack("packed-footer", apr_packed(VALID_APR[:-4], 0x0402, footer=b"\1\2\3\4"), "footer checksum"),
    Attack("sharded-without-words", apr(_A, _DATA, flags=0x0410), "flag set, sharding None"),
    Attack("sharded-without-flag", apr(_A, _DATA, metadata=SHARD % (0, 2)), "flag not set"),
    Attack("shard-of-none", apr(_A, _DATA, flags=0x0410, metadata=SHARD % (0, 0)), "shard_index below shard_count"),
    Attack("shard-behind", apr(_A, _DATA, flags=0x0410, metadata=SHARD % (2, 2)), "shard_index below shard_count"),
    Attack("shard-2^63", apr(_A, _DATA, flags=0x0410, metadata=SHARD % (0, 2**63)), "shard_index below shard_count"),
    Attack("shard-alone", apr(_A, _DATA, flags=0x0410, metadata=SHARD % (0, 99999)), "-00001-of-99999"),
    Attack("sharding-list", apr(_A, _DATA, flags=0x0410, metadata=b'{"sharding": [1, 2]}'), "sharding .1, 2."),
    Attack("metadata-not-json", apr(_A, _DATA, metadata=b"{"), "JSON error"),
    Attack("metadata-list", apr(_A, _DATA, metadata=b"[]"), "JSON list"),
    Attack("metadata-nan", apr(_A, _DATA, metadata=b'{"a": NaN}'), "NaN"),
    Attack("metadata-1e309", apr(_A, _DATA, metadata=b'{"a": 1e309}'), "out of range"),
    Attack("metadata-twice", apr(_A, _DATA, metadata=b'{"a": 1, "a": 2}'), "twice"),
    Attack("metadata-deep", apr(_A, _DATA, metadata=b'{"a":' + b"[" * 1500), "JSON error|too deep"),
    Attack("metadata-16MB", apr(_A, _DATA, places=(None, 2**25, None, None)), "bytes of metadata"),
    Attack("metadata-in-header", apr(_A, _DATA, places=(0, None, None, None)), "behind the header"),
    Attack("metadata-2^63", apr(_A, _DATA, places=(2**63, None, None, None)), "behind the metadata"),
    Attack("index-in-metadata", apr(_A, _DATA, places=(None, None, 64, None)), "behind the metadata"),
    Attack("data-in-index", apr(_A, _DATA, places=(None, None, None, 128)), "behind the index"),
    Attack("data-2^63", apr(_A, _DATA, places=(None, None, None, 2**63)), "bytes are missing"),
    Attack("S2-count-max", apr(_A, _DATA, count=2**32 - 1), "behind the index"),
    Attack("S2-count-more", apr(_A, _DATA, count=2), "expected"),
    Attack("S2-count-less", apr([*_A, apr_entry("b", 0, (2,), 64, 8)], bytes(128), count=1), "count is too small"),
    Attack("name-empty", apr([apr_entry("", 0, (2,), 0, 8)], _DATA), "1 to 256"),
    Attack("name-257", apr([apr_entry("a" * 257, 0, (2,), 0, 8)], _DATA), "1 to 256"),
    Attack("name-not-utf8", apr([apr_entry(b"\xff", 0, (2,), 0, 8)], _DATA), "in UTF-8"),
    Attack("name-too-long", apr([struct.pack("<H", 250) + b"a" * 50], _DATA), "index entries|dimensions"),
    Attack("dims-9", apr([apr_entry("a", 0, (1,) * 9, 0, 4)], _DATA), "at most 8"),
    Attack("unsorted", apr([apr_entry("b", 0, (2,), 0, 8), apr_entry("a", 0, (2,), 64, 8)], bytes(128)), "ascending"),
    Attack("F8-name-twice", apr(_A * 2, _DATA), "the same name twice"),
    Attack(
        "F8-two-names-one-tensor",
        apr([apr_entry("model.norm.weight", 0, (2,), 0, 8), apr_entry("norm.weight", 0, (2,), 64, 8)], bytes(128)),
        "stored as model.norm.weight and norm.weight",
    ),
    *[Attack(f"S5-dtype-{kind}", one(kind, (256,), 256), "known dtype id") for kind in (10 + 6, 31, 40, 127, 255)],
    *[Attack(f"S5-ggml-{kind}", one(kind, (256,), 84), "GGML's") for kind in (10, 11, 13, 15)],
    Attack("S5-ggml-6", one(6, (32,), 22), "Q5_0"),
    Attack("S7-size", one(0, (3,), 8), "12 bytes"),
    Attack("S4-wraps", one(0, (2**62 + 2,), 8), "a shape that an array can have"),
    Attack("S4-empty-and-endless", one(0, (0, 2**63), 0), "a shape that an array can have"),
    Attack("GH-202-flat", one(12, (4, 128), 288), "GH-202"),
    Attack("legacy-2-size", one(2, (64,), 40), "128 bytes .BF16. or 36 bytes .Q4_0."),
    Attack("F10-overlap", apr([*_A, apr_entry("b", 0, (2,), 4, 8)], _DATA), "overlap of 4"),
    Attack("S6-beyond-end", apr([apr_entry("a", 0, (2,), 2**40, 8)], _DATA), "bytes are missing"),
    Attack("S6-in-footer", apr([apr_entry("a", 0, (2,), 60, 8)], _DATA), "a footer of 4 bytes"),
    Attack("F2-truncated", VALID_APR[:-70], "bytes are missing"),
    Attack("F2-cut-in-padding", VALID_APR[:-10], "altered or cut short"),
]

ATTACKS = {"impostor": IMPOSTORS, "safetensors": SAFETENSORS, "gguf": GGUF, "apr": APR}

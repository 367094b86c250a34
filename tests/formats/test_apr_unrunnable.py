"""APR v1: described from a real file, refused for inference."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest

from apr_core.errors import FormatError
from apr_core.formats.apr_unrunnable import describe_unrunnable
from apr_core.formats.checkpoint import open_checkpoint
from tests.attacks.build import VALID_APR, apr


def build(metadata: bytes, payload: bytes = b"p", kind: int = 0x20, flags: int = 0, crc: int = 0) -> bytes:
    """Pack an APRN file."""
    head = struct.pack("<4sBBHIIIBBB", b"APRN", 1, 0, kind, len(metadata), len(payload), 9, 3, flags, 77).ljust(
        32, b"\0"
    )
    body = head + metadata + payload
    return body + struct.pack("<I", zlib.crc32(body) ^ crc)


def test_real_file_is_described(oracle: Path) -> None:
    """The file of aprender: type, sizes, metadata, checksum."""
    found = describe_unrunnable(oracle / "apr" / "mnist_784x2.apr")
    assert found == {
        "format": "apr-v1",
        "version": "1.0",
        "model_type": "LogisticRegression",
        "metadata_bytes": 47,
        "payload_bytes": 3165,
        "uncompressed_bytes": 3165,
        "compression": "none",
        "flags": [],
        "quality_score": 0,
        "metadata": {"created_at": "1764278947", "aprender_version": "0.11.0"},
        "checksum_stored": 0xF38814FE,
        "checksum_computed": 0xF38814FE,
        "checksum_holds": True,
    }


def test_real_file_is_refused(oracle: Path) -> None:
    """Inference is refused with what the file is and what to do."""
    with pytest.raises(FormatError, match=r"APRN.*LogisticRegression: it cannot be run.*apr inspect"):
        open_checkpoint(oracle / "apr" / "mnist_784x2.apr")


VALUES = [
    (b"\x07", 7),
    (b"\xff", -1),
    (b"\xc0", None),
    (b"\xc2", False),
    (b"\xc3", True),
    (b"\xcc\xff", 255),
    (b"\xcd\x01\x00", 256),
    (b"\xce\0\1\0\0", 65536),
    (b"\xcf\0\0\0\1\0\0\0\0", 2**32),
    (b"\xd0\x80", -128),
    (b"\xd1\x80\0", -32768),
    (b"\xd2\xff\xff\xff\xff", -1),
    (b"\xd3" + b"\xff" * 8, -1),
    (b"\xca\x3f\0\0\0", 0.5),
    (b"\xcb\x3f\xe0\0\0\0\0\0\0", 0.5),
    (b"\xa2hi", "hi"),
    (b"\xd9\x02hi", "hi"),
    (b"\xda\0\2hi", "hi"),
    (b"\xdb\0\0\0\2hi", "hi"),
    (b"\x92\1\2", [1, 2]),
    (b"\xdc\0\2\1\2", [1, 2]),
    (b"\xdd\0\0\0\1\5", [5]),
    (b"\x81\xa1a\1", {"a": 1}),
    (b"\xde\0\1\xa1a\1", {"a": 1}),
    (b"\xdf\0\0\0\1\xa1a\1", {"a": 1}),
]


@pytest.mark.parametrize(("packed", "expected"), VALUES)
def test_messagepack(packed: bytes, expected: object, tmp_path: Path) -> None:
    """Each MessagePack form that metadata may hold, from the public specification."""
    (tmp_path / "f").write_bytes(build(b"\x81\xa1k" + packed, flags=0b100001))
    found = describe_unrunnable(tmp_path / "f")
    assert found["metadata"] == {"k": expected}
    assert (found["model_type"], found["compression"], found["quality_score"]) == ("NeuralSequential", "lz4", 77)
    assert found["flags"] == ["encrypted", "quantized"]


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (b"", "end of the metadata"),
        (b"\xa5ab", "end of the metadata"),
        (b"\xdd\xff\xff\xff\xff", "end of the metadata"),
        (b"\x91" * 40 + b"\1", "nesting too deep"),
        (b"\xc1", "0xc1"),
        (b"\xa1\xff", "not UTF-8"),
    ],
)
def test_hostile_metadata(metadata: bytes, says: str, tmp_path: Path) -> None:
    """Lying lengths, deep nesting and reserved bytes are refused by name."""
    (tmp_path / "f").write_bytes(build(metadata))
    with pytest.raises(FormatError, match=says):
        describe_unrunnable(tmp_path / "f")


def test_checksum_and_truncation(tmp_path: Path) -> None:
    """A wrong checksum is reported, a short file refused with the missing bytes, another file refused."""
    whole = build(b"\x80", crc=1)
    (tmp_path / "f").write_bytes(whole)
    assert describe_unrunnable(tmp_path / "f")["checksum_holds"] is False
    (tmp_path / "f").write_bytes(build(b"\x80", kind=99))
    assert describe_unrunnable(tmp_path / "f")["model_type"] == "unknown (99)"
    (tmp_path / "f").write_bytes(build(b"\x80", b"p" * 50)[:-9])
    with pytest.raises(FormatError, match="9 bytes are missing"):
        describe_unrunnable(tmp_path / "f")
    (tmp_path / "f").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(FormatError, match="APRN"):
        describe_unrunnable(tmp_path / "f")


def test_whisper_is_described(tmp_path: Path) -> None:
    """An APR1 file has another layout: its size and first bytes are all that is said of it."""
    (tmp_path / "f").write_bytes(b"APR1" + bytes(range(40)))
    found = describe_unrunnable(tmp_path / "f")
    assert found == {"format": "apr-v1-whisper", "bytes": 44, "first_bytes": (b"APR1" + bytes(range(28))).hex(" ")}
    with pytest.raises(FormatError, match="Whisper"):
        open_checkpoint(tmp_path / "f")


def test_json_variant_is_described_and_refused(tmp_path: Path) -> None:
    """JSON-APR: one entry that holds the whole model as text; inspect shows it, opening refuses it by name."""
    entry = {"name": "weights", "dtype": "json", "shape": [2], "offset": 0, "size": 2}
    (tmp_path / "f").write_bytes(apr([json.dumps([entry]).encode()], b"{}".ljust(64, b"\0"), metadata=b'{"eps": 1e-6}'))
    assert describe_unrunnable(tmp_path / "f") == {
        "format": "json-apr",
        "version": "2.0",
        "entries": [entry],
        "metadata": {"eps": 1e-6},
    }
    with pytest.raises(FormatError, match=r"JSON-APR.*it cannot be run.*apr inspect"):
        open_checkpoint(tmp_path / "f")
    (tmp_path / "f").write_bytes(VALID_APR)
    with pytest.raises(FormatError, match="expected a JSON index"):
        describe_unrunnable(tmp_path / "f")
    (tmp_path / "f").write_bytes(apr([b"[1,]"], b"{}".ljust(64, b"\0")))
    with pytest.raises(FormatError, match="JSON error"):
        describe_unrunnable(tmp_path / "f")

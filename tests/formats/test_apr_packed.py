"""Compressed and sharded APR files, built by hand; lz4 and zstandard are the witnesses of the compression."""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from apr_core.errors import AprError, Exit, FormatError, Unavailable
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.formats.codecs import decode
from tests.attacks.build import VALID_APR, apr, apr_entry, apr_packed

FLAGS = {"lz4": 0x0401, "zstd": 0x0402}


@pytest.mark.parametrize("kind", FLAGS)
def test_opens_like_the_plain_file(kind: str, tmp_path: Path) -> None:
    """Tensors, metadata and gaps are those of the plain file; the hash is that of the bytes on the disk."""
    data = apr_packed(VALID_APR, FLAGS[kind])
    (tmp_path / "packed").write_bytes(data)
    (tmp_path / "plain").write_bytes(VALID_APR)
    with open_checkpoint(tmp_path / "packed") as packed, open_checkpoint(tmp_path / "plain") as plain:
        assert packed.metadata == plain.metadata
        assert packed.gaps == plain.gaps == ()
        assert list(packed.tensors) == list(plain.tensors)
        for name in plain.tensors:
            assert packed.raw(name).data.tobytes() == plain.raw(name).data.tobytes()
            assert not packed.raw(name).data.flags.writeable
        assert packed.content_hash == hashlib.sha256(data).hexdigest()
        assert packed.facts["flags"] == [f"{kind}_compressed", "layout_row_major"]
        assert (packed.facts["compressed"], plain.facts["compressed"]) == (True, False)


def test_oracle_compressed(oracle: Path, tmp_path: Path) -> None:
    """The hand-built file of the oracle, compressed by the zstandard package at its highest level, opens."""
    image = (oracle / "apr" / "minimal_v2.apr").read_bytes()
    head = bytearray(image[:64])
    head[6:8] = b"\2\4"
    head[40:44] = zlib.crc32(head[:40] + head[44:]).to_bytes(4, "little")
    body = bytes(head) + image[64:-4]
    body += zlib.crc32(body).to_bytes(4, "little")
    (tmp_path / "f").write_bytes(bytes(head) + zstandard.ZstdCompressor(level=22).compress(body[64:]))
    with open_checkpoint(tmp_path / "f") as checkpoint:
        assert decode(checkpoint.raw("lm_head.weight")).tolist() == [[0.5, -0.5], [0.25, -0.25], [1, 2]]


def test_many_pieces(tmp_path: Path) -> None:
    """A megabyte of noise comes out as it went in: pieces are put together in order."""
    noise = np.random.default_rng(1).integers(0, 256, 1 << 20).astype(np.uint8).tobytes()
    image = apr([apr_entry("a", 7, (1 << 20,), 0, 1 << 20)], noise)
    for flags in FLAGS.values():
        (tmp_path / "f").write_bytes(apr_packed(image, flags))
        with open_checkpoint(tmp_path / "f") as checkpoint:
            assert checkpoint.raw("a").data.tobytes() == noise


def test_zeros_are_no_bomb(tmp_path: Path) -> None:
    """A model of zeros compresses a thousandfold and still opens: that it is empty is for the contract to say."""
    image = apr([apr_entry("a", 7, (6 << 20,), 0, 6 << 20)], bytes(6 << 20))
    (tmp_path / "f").write_bytes(apr_packed(image, FLAGS["zstd"]))
    assert (tmp_path / "f").stat().st_size < 4096
    with open_checkpoint(tmp_path / "f") as checkpoint:
        assert checkpoint.tensors["a"].nbytes == 6 << 20


def test_lz4_flag_over_plain_bytes(tmp_path: Path) -> None:
    """A writer sets the flag and compresses nothing: what is plain to see is read as it is."""
    (tmp_path / "f").write_bytes(apr([apr_entry("a", 7, (1,), 0, 1)], b"\7".ljust(64, b"\0"), flags=0x0401))
    with open_checkpoint(tmp_path / "f") as checkpoint:
        assert decode(checkpoint.raw("a")).tolist() == [7]
        assert checkpoint.facts["compressed"] is False


@pytest.mark.parametrize(("kind", "package"), [("lz4", "lz4"), ("zstd", "zstandard")])
def test_without_the_package(kind: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the feature is unavailable (exit 9), and the message is the line to type."""
    (tmp_path / "f").write_bytes(apr_packed(VALID_APR, FLAGS[kind]))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Unavailable, match=f"pip install {package}") as caught:
        open_checkpoint(tmp_path / "f")
    assert caught.value.exit_code == Exit.UNAVAILABLE


def test_footer_can_be_skipped(tmp_path: Path) -> None:
    """The speed flag of open_checkpoint reaches the reader."""
    (tmp_path / "f").write_bytes(VALID_APR[:-4] + b"\1\2\3\4")
    with open_checkpoint(tmp_path / "f", verify_footer=False) as checkpoint:
        assert len(checkpoint.tensors) == 2
    with pytest.raises(FormatError, match="footer checksum"):
        open_checkpoint(tmp_path / "f")


def shard(index: int, tensors: str, count: int = 2, flags: int = 0x0410, **more: object) -> bytes:
    """Build one shard that holds bytes under one-letter names."""
    words = {"hidden_size": 2, "sharding": {"shard_index": index, "shard_count": count, "total_size": 9}, **more}
    entries = [apr_entry(name, 7, (1,), 64 * at, 1) for at, name in enumerate(tensors)]
    data = b"".join(name.encode().ljust(64, b"\0") for name in tensors)
    return apr(entries, data, flags=flags, metadata=json.dumps(words).encode())


def write_shards(folder: Path, *shards: bytes) -> list[Path]:
    """Write shards under their numbered names."""
    paths = [folder / f"model-{n + 1:05}-of-{len(shards):05}.apr" for n in range(len(shards))]
    for path, data in zip(paths, shards, strict=True):
        path.write_bytes(data)
    return paths


def manifest(**changes: Any) -> dict[str, Any]:
    """Build the manifest of two shards that hold a, c and b."""
    rows = [
        {"filename": f"model-0000{n + 1}-of-00002.apr", "index": n, "size": 1, "tensors": names}
        for n, names in enumerate((["a", "c"], ["b"]))
    ]
    return {
        "version": "1",
        "shard_count": 2,
        "total_size": 3,
        "tensor_count": 3,
        "shards": rows,
        "weight_map": {"a": 0, "c": 0, "b": 1},
        **changes,
    }


@pytest.mark.parametrize("way", ["first", "last", "folder", "manifest"])
def test_shards_open_as_one(way: str, tmp_path: Path) -> None:
    """Any shard, the folder or the manifest opens all tensors; compressed and plain shards may stand side by side."""
    paths = write_shards(tmp_path, shard(0, "ac"), apr_packed(shard(1, "b"), 0x0412))
    (tmp_path / "model.json").write_text(json.dumps(manifest()))
    given = {"first": paths[0], "last": paths[1], "folder": tmp_path, "manifest": tmp_path / "model.json"}[way]
    with open_checkpoint(given) as checkpoint:
        assert checkpoint.format == "apr"
        assert checkpoint.files == tuple(paths)
        assert checkpoint.facts["parts"] == 2
        assert checkpoint.config["hidden_size"] == 2
        assert {name: bytes(checkpoint.raw(name).data) for name in checkpoint.tensors} == {
            name: name.encode() for name in "acb"
        }


def test_one_shard_of_one(tmp_path: Path) -> None:
    """A sharded file that is the only shard needs no name with numbers."""
    (tmp_path / "f").write_bytes(shard(0, "a", 1))
    with open_checkpoint(tmp_path / "f") as checkpoint:
        assert list(checkpoint.tensors) == ["a"]


@pytest.mark.parametrize(
    ("shards", "says"),
    [
        ([shard(0, "a"), shard(0, "b")], "expected shard 2 of 2, found shard 1 of 2|name that ends in -00001"),
        ([shard(0, "a"), shard(1, "a")], r"each tensor in one part, found it in model-00001-of-00002\.apr too"),
        ([shard(0, "a"), shard(1, "b", hidden_size=3)], "another hidden_size: a shard of another model"),
        (
            [shard(0, "a"), shard(1, "b", 3)],
            "expected shard 2 of 2, found shard 2 of 3|name that ends in -00002-of-00003",
        ),
        ([shard(0, "a"), VALID_APR], "expected shard 2 of 2, found shard 1 of 1|models"),
    ],
)
def test_shards_that_do_not_fit(shards: list[bytes], says: str, tmp_path: Path) -> None:
    """Shards that are of another number, another model, or hold a tensor twice are refused from the first one."""
    paths = write_shards(tmp_path, *shards)
    with pytest.raises(FormatError, match=says):
        open_checkpoint(paths[0])
    with pytest.raises(AprError):
        open_checkpoint(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    """The missing shard is named."""
    paths = write_shards(tmp_path, shard(0, "a"), shard(1, "b"))
    paths[1].unlink()
    with pytest.raises(FormatError, match=r"1 missing: model-00002-of-00002\.apr"):
        open_checkpoint(paths[0])
    (tmp_path / "model.json").write_text(json.dumps(manifest()))
    with pytest.raises(FormatError, match=r"shard 2 of 2, model-00002-of-00002\.apr, found no such file"):
        open_checkpoint(tmp_path / "model.json")


def _escape(rows: list[dict[str, Any]]) -> None:
    rows[1]["filename"] = "../b.apr"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(shard_count=3), "shard_count and as many shards"),
        (lambda m: m.update(shards=[]), "shard_count and as many shards"),
        (lambda m: m.update(shards=[1, 2]), "shard_count and as many shards"),
        (lambda m: m.update(tensor_count=4), "weight_map that places each of 3"),
        (lambda m: m["weight_map"].update(b=0), r"another, of 3 \(b\)"),
        (lambda m: m["weight_map"].update(ghost=1), r"another, of 4 \(ghost\)"),
        (lambda m: m["weight_map"].pop("a"), r"another, of 2 \(a\)"),
        (lambda m: m.update(weight_map=[]), "another, of 0"),
        (lambda m: m["shards"][1].update(index=0), "shards of index 0 to 1"),
        (lambda m: m["shards"][1].update(index="1"), "shards of index 0 to 1"),
        (lambda m: _escape(m["shards"]), "a shard inside the folder of the index"),
    ],
)
def test_manifest_that_lies(change: Callable[[dict[str, Any]], object], says: str, tmp_path: Path) -> None:
    """A manifest that disagrees with its shards, or points out of its folder, is refused."""
    write_shards(tmp_path, shard(0, "ac"), shard(1, "b"))
    document = manifest()
    change(document)
    (tmp_path / "model.json").write_text(json.dumps(document))
    with pytest.raises(FormatError, match=says):
        open_checkpoint(tmp_path / "model.json")

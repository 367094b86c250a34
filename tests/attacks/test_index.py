"""Shard indexes that lie: S10 (paths) and F3 (shards that are missing, stale or doubled)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apr_core.errors import FormatError
from apr_core.formats.checkpoint import open_checkpoint
from tests.attacks.build import VALID_GGUF, entry, safetensors

INDEX = "model.safetensors.index.json"


def write(folder: Path, weight_map: object, shards: dict[str, list[str]], **extra: object) -> Path:
    """Write an index and shards that hold one float32 pair per name."""
    for shard, names in shards.items():
        header = {name: entry(offsets=[8 * i, 8 * i + 8]) for i, name in enumerate(names)}
        (folder / shard).write_bytes(safetensors(header, bytes(8 * len(names))))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map, **extra}))
    return folder / INDEX


@pytest.mark.parametrize(
    "shard",
    [
        "/etc/passwd",
        "../b.safetensors",
        "x/../../b.safetensors",
        "..",
        "",
        "..\\b",
        "C:\\b",
        "C:b",
        "a\0b",
        7,
        None,
        [],
    ],
)
def test_path_outside_the_folder(shard: object, tmp_path: Path) -> None:
    """A weight_map that points out of the folder is refused before anything is opened."""
    path = write(tmp_path, {"a": "1.safetensors", "b": shard}, {"1.safetensors": ["a"]})
    with pytest.raises(FormatError, match="a shard inside the folder of the index") as caught:
        open_checkpoint(path)
    assert caught.value.tensor == "b"


def test_missing_shard_is_named(tmp_path: Path) -> None:
    """The message says which of how many shards is missing."""
    path = write(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}, {"1.safetensors": ["a"]})
    with pytest.raises(FormatError, match=r"shard 2 of 2, 2\.safetensors, found no such file"):
        open_checkpoint(path)


def test_shard_lacks_a_tensor(tmp_path: Path) -> None:
    """The index places a tensor in a shard that does not have it."""
    path = write(tmp_path, {"a": "1.safetensors", "b": "1.safetensors"}, {"1.safetensors": ["a"]})
    with pytest.raises(FormatError, match=r"1 missing \(b\)"):
        open_checkpoint(path)


def test_shard_has_a_tensor_more(tmp_path: Path) -> None:
    """A shard holds a tensor that the index does not know."""
    path = write(tmp_path, {"a": "1.safetensors"}, {"1.safetensors": ["a", "z"]})
    with pytest.raises(FormatError, match=r"1 that the index does not place there \(z\)"):
        open_checkpoint(path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    """The same tensor in two shards is refused: either could be meant."""
    shards = {"1.safetensors": ["a"], "2.safetensors": ["a", "b"]}
    path = write(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}, shards)
    with pytest.raises(FormatError, match=r"does not place there \(a\)"):
        open_checkpoint(path)


@pytest.mark.parametrize("weight_map", [None, {}, [], "a", 3])
def test_no_weight_map(weight_map: object, tmp_path: Path) -> None:
    """An index without tensors is refused."""
    with pytest.raises(FormatError, match="weight_map with at least one tensor"):
        open_checkpoint(write(tmp_path, weight_map, {}))


def test_index_with_a_key_twice(tmp_path: Path) -> None:
    """Duplicate names inside weight_map are refused: last-wins in one reader, first-wins in the next."""
    write(tmp_path, {}, {"1.safetensors": ["a"]})
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}')
    with pytest.raises(FormatError, match="'a' twice"):
        open_checkpoint(tmp_path / INDEX)


def test_honest_index_opens(tmp_path: Path) -> None:
    """The unbent index opens, shards in order, total_size kept."""
    shards = {"2.safetensors": ["b"], "1.safetensors": ["a", "c"]}
    weight_map = {"b": "2.safetensors", "a": "1.safetensors", "c": "1.safetensors"}
    path = write(tmp_path, weight_map, shards, metadata={"total_size": 24})
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "c", "b"]
        assert [file.name for file in checkpoint.files] == ["1.safetensors", "2.safetensors"]
        assert checkpoint.metadata["total_size"] == 24
        assert checkpoint.format == "safetensors"


def test_shard_that_is_something_else(tmp_path: Path) -> None:
    """An LFS pointer or a GGUF among the shards is named, not reported as a strange header."""
    path = write(tmp_path, {"a": "1.safetensors"}, {"1.safetensors": ["a"]})
    (tmp_path / "1.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(FormatError, match=r"Git-LFS pointer to 7 bytes.*1\.safetensors"):
        open_checkpoint(path)
    (tmp_path / "1.safetensors").write_bytes(VALID_GGUF)
    with pytest.raises(FormatError, match=r"a SafeTensors shard, found gguf data"):
        open_checkpoint(path)

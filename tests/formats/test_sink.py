"""Atomic writing: all of a file or nothing of it, whatever interrupts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from apr_core.dtypes import FORMATS
from apr_core.errors import ReadWriteError, UsageError
from apr_core.formats import sink
from apr_core.formats.apr import write_apr
from apr_core.formats.checkpoint import TensorSource, open_checkpoint
from apr_core.formats.gguf import write_gguf
from apr_core.formats.safetensors import write_safetensors

WRITERS = [write_safetensors, write_gguf, write_apr]


def source(chunks: object) -> TensorSource:
    """Offer chunks as a float32 pair."""
    return TensorSource("w", FORMATS["F32"], (2,), chunks)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
def test_interruption_leaves_nothing(write: object, failure: type[BaseException], tmp_path: Path) -> None:
    """Ctrl-C or a failing source in the middle keeps the old file and leaves no stump."""

    def chunks() -> Iterator[bytes]:
        yield bytes(4)
        raise failure

    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(failure):
        write(tmp_path / "f", [source(chunks)], {})
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("f", b"old")]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("size", [0, 4, 12])
def test_wrong_amount_of_bytes(write: object, size: int, tmp_path: Path) -> None:
    """A source that gives too little or too much is refused: all offsets behind it would be wrong."""
    with pytest.raises(UsageError, match=f"tensor w gave {size} bytes, expected 8 for F32"):
        write(tmp_path / "f", [source(lambda: [bytes(size)])], {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", WRITERS)
def test_what_a_chunk_may_be(write: object, tmp_path: Path) -> None:
    """bytes, a memoryview, an array of any type and order, and an empty chunk all arrive."""
    column = np.array([[1, 9], [2, 9]], "<f4")[:, :1]
    for name, chunks in {
        "array": [column],
        "half": [memoryview(np.float32([1])), np.float32([2]).tobytes()],
        "empty": [b"", np.float32([1, 2]), np.zeros(0, np.float32)],
    }.items():
        write(tmp_path / name, [source(lambda chunks=chunks: chunks)], {})
        with open_checkpoint(tmp_path / name) as checkpoint:
            assert checkpoint.raw("w").data.view("<f4").tolist() == [1, 2]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("path", ["absent/f", "file/f", "folder"])
def test_impossible_target(write: object, path: str, tmp_path: Path) -> None:
    """A missing folder, a file in its place, a folder as the target: exit 7, nothing left behind."""
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_bytes(b"x")
    with pytest.raises(ReadWriteError, match="cannot write"):
        write(tmp_path / path, [source(lambda: [bytes(8)])], {})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error at the very end, in fsync, leaves nothing either."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sink.os, "fsync", full)
    with pytest.raises(ReadWriteError, match="No space left on device"):
        write_gguf(tmp_path / "f", [source(lambda: [bytes(8)])], {})
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that refuses to sync a folder does not make a good file fail."""
    calls: list[int] = []

    def picky(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(sink.os, "fsync", picky)
    write_gguf(tmp_path / "f", [], {})
    assert len(calls) == 2
    assert (tmp_path / "f").exists()


def test_rewriting_a_mapped_file(tmp_path: Path) -> None:
    """Writing over an opened checkpoint does not change what its holder sees (F5)."""
    path = tmp_path / "f"
    write_gguf(path, [source(lambda: [np.float32([1, 2])])], {})
    with open_checkpoint(path) as checkpoint:
        raw = checkpoint.raw("w")
        write_gguf(path, [source(lambda: [raw.data[::-1]])], {})
        assert raw.data.view("<f4").tolist() == [1, 2]
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.raw("w").data.tobytes() == np.float32([1, 2]).tobytes()[::-1]

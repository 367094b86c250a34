"""open_checkpoint: what a path may be, and what an opened checkpoint promises."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from apr_core.errors import FormatError, NotFound, ReadWriteError, UsageError
from apr_core.formats.checkpoint import map_file, open_checkpoint
from tests.attacks.build import VALID, VALID_APR, VALID_GGUF, VALID_SAFETENSORS, entry, safetensors


@pytest.mark.parametrize("name", ["model.gguf", "model.apr", "model.txt", "weights"])
@pytest.mark.parametrize("kind", VALID)
def test_recognised_by_magic(kind: str, name: str, tmp_path: Path) -> None:
    """The extension decides nothing."""
    (tmp_path / name).write_bytes(VALID[kind])
    with open_checkpoint(tmp_path / name) as checkpoint:
        assert checkpoint.format == kind
        assert checkpoint.files == (tmp_path / name,)
        assert checkpoint.folder == tmp_path


@pytest.mark.parametrize("path", ["absent", "absent/model.gguf", "file/model.gguf"])
def test_missing(path: str, tmp_path: Path) -> None:
    """A path that leads nowhere is exit 3."""
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(NotFound, match="check the path"):
        open_checkpoint(tmp_path / path)
    with pytest.raises(NotFound):
        map_file(tmp_path / path)


@pytest.mark.parametrize("path", ["nul\0byte", "n" * 5000])
def test_impossible_path(path: str, tmp_path: Path) -> None:
    """A path that the operating system cannot hold is exit 7, not a traceback."""
    with pytest.raises(ReadWriteError):
        open_checkpoint(tmp_path / path)


def test_pipe_does_not_hang(tmp_path: Path) -> None:
    """A named pipe is refused instead of waited for."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="a regular file"):
        open_checkpoint(tmp_path / "pipe")


def test_pipe_that_takes_a_files_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking and opening a file may be exchanged for a pipe: opening does not wait for a writer either."""
    (tmp_path / "file").write_bytes(VALID_GGUF)
    os.mkfifo(tmp_path / "pipe")
    regular = (tmp_path / "file").stat()
    monkeypatch.setattr(Path, "stat", lambda self, **_: regular)
    with pytest.raises(FormatError, match="a regular file"):
        map_file(tmp_path / "pipe")


@pytest.mark.parametrize("place", ["model.safetensors", "config.json"])
def test_pipe_in_the_folder(place: str, tmp_path: Path) -> None:
    """A pipe among the files of a model is refused by name, not read."""
    (tmp_path / "model.safetensors").write_bytes(VALID_SAFETENSORS)
    (tmp_path / place).unlink(missing_ok=True)
    os.mkfifo(tmp_path / place)
    with pytest.raises(FormatError, match=f"a regular file.*{place}"):
        open_checkpoint(tmp_path)


def test_device() -> None:
    """An endless device is not read."""
    with pytest.raises(FormatError, match="a directory, pipe, socket or device, in /dev/zero"):
        open_checkpoint("/dev/zero")


@pytest.mark.parametrize("inside", [False, True])
def test_symbolic_links_in_a_circle(inside: bool, tmp_path: Path) -> None:
    """Links that lead to each other are named as such: given by name, or found in a folder."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to("other")
    (folder / "other").symlink_to("model.safetensors")
    with pytest.raises(ReadWriteError, match=r"model\.safetensors: its symbolic links lead in a circle"):
        open_checkpoint(folder if inside else folder / "model.safetensors")


def test_dangling_link(tmp_path: Path) -> None:
    """A link to nothing (a cache whose blob was deleted) is no such file."""
    (tmp_path / "model.safetensors").symlink_to("blob")
    with pytest.raises(NotFound, match=r"no such file: .*model\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="permissions of another system")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_unreadable(what: str) -> None:
    """A file or folder without the right to read it is exit 7; as root, the right is given up for the call."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "model.gguf"
        path.write_bytes(VALID_GGUF)
        path.chmod(0 if what == "file" else 0o644)
        folder.chmod(0o755 if what == "file" else 0o711)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            elif what == "folder":
                folder.chmod(0o100)
            with pytest.raises(ReadWriteError, match="Permission denied; ask its owner"):
                open_checkpoint(folder if what == "folder" else path)
        finally:
            os.seteuid(user)
            folder.chmod(0o755)


def test_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another refusal of the operating system is passed on in its words."""
    (tmp_path / "m").write_bytes(VALID_GGUF)

    def fail(*_: object, **__: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(ReadWriteError, match="Input/output error; check the path and the disk"):
        open_checkpoint(tmp_path / "m")


@pytest.mark.skipif(not hasattr(os, "SEEK_DATA"), reason="no holes in files here")
@pytest.mark.parametrize("head", [b"", VALID_GGUF, VALID_APR, VALID_SAFETENSORS])
def test_huge_hole(head: bytes, tmp_path: Path) -> None:
    """A terabyte that was never written is named as a hole, in no time; valid first bytes do not help."""
    with (tmp_path / "m").open("wb") as stream:
        stream.write(head)
        stream.truncate(1 << 40)
    with pytest.raises(FormatError, match=r"expected 1099511627776 bytes of data, found \d+ that were ever written"):
        open_checkpoint(tmp_path / "m")


def test_small_hole_is_legal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is a hole for the smaller part opens: copying tools make holes of runs of zeros."""
    monkeypatch.setattr("apr_core.formats.checkpoint.SPARSE_FROM", 1)
    data = safetensors({"a": entry("U8", [3 << 16], [0, 3 << 16])}, bytes(0))
    with (tmp_path / "m").open("wb") as stream:
        stream.write(data + b"x" * (2 << 16))
        stream.truncate(len(data) + (3 << 16))
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert list(checkpoint.tensors) == ["a"]


@pytest.mark.skipif(not hasattr(os, "SEEK_DATA"), reason="no holes in files here")
def test_many_holes_are_legal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in more pieces than are counted opens, and any file where holes are unknown."""
    monkeypatch.setattr("apr_core.formats.checkpoint.SPARSE_FROM", 1)
    head = safetensors({"a": entry("U8", [1 << 20], [0, 1 << 20])})
    with (tmp_path / "m").open("wb") as stream:
        stream.write(head)
        stream.truncate(len(head) + (1 << 20))
    with pytest.raises(FormatError, match="is a hole"):
        open_checkpoint(tmp_path / "m")
    with monkeypatch.context() as patch:
        patch.setattr("apr_core.formats.checkpoint._MAX_EXTENTS", 1)
        with open_checkpoint(tmp_path / "m") as checkpoint:
            assert list(checkpoint.tensors) == ["a"]

    def unknown(*_: int) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "lseek", unknown)
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert list(checkpoint.tensors) == ["a"]


def test_map_without_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain mapping of other systems is private too."""
    monkeypatch.setattr("sys.platform", "other")
    (tmp_path / "m").write_bytes(VALID_SAFETENSORS)
    file = map_file(tmp_path / "m")
    file.view[0] = 0
    assert (tmp_path / "m").read_bytes() == VALID_SAFETENSORS


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        ({"model.safetensors": VALID_SAFETENSORS, "config.json": b"{}"}, "model.safetensors"),
        ({"a.gguf": VALID_GGUF, "readme.md": b"x", ".hidden.gguf": b"x"}, "a.gguf"),
        ({"a.apr": VALID_APR}, "a.apr"),
        ({"other.safetensors": VALID_SAFETENSORS}, "other.safetensors"),
    ],
)
def test_folder_with_one_model(files: dict[str, bytes], chosen: str, tmp_path: Path) -> None:
    """A folder stands for the one model in it."""
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with open_checkpoint(str(tmp_path)) as checkpoint:
        assert checkpoint.path == tmp_path / chosen


def test_folder_with_several_models(tmp_path: Path) -> None:
    """Several candidates are listed, none is picked; a stray file beside shards (F3) is such a case."""
    for name in ("model.safetensors", "model.safetensors.index.json", "b.gguf"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UsageError, match=r"3 models: b\.gguf, model\.safetensors, model\.safetensors\.index\.json"):
        open_checkpoint(tmp_path)


def test_folder_without_model(tmp_path: Path) -> None:
    """A folder without a model is exit 3; a file that only has a pickle's name does not change that."""
    with pytest.raises(NotFound, match=r"no model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(NotFound, match=r"no model\.safetensors"):
        open_checkpoint(tmp_path)


def test_shards_without_an_index(tmp_path: Path) -> None:
    """Shards alone do not say what is missing: the index is asked for."""
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(VALID_SAFETENSORS)
    with pytest.raises(FormatError, match=r"model\.safetensors\.index\.json beside 2 shards, found no index"):
        open_checkpoint(tmp_path)


def test_companion_that_is_too_large(tmp_path: Path) -> None:
    """A configuration of a terabyte is not read."""
    (tmp_path / "model.safetensors").write_bytes(VALID_SAFETENSORS)
    with (tmp_path / "config.json").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(FormatError, match=r"expected at most \d+ bytes, found 1099511627776, in .*config\.json"):
        open_checkpoint(tmp_path)


def test_hub_cache_layout(tmp_path: Path) -> None:
    """Companions are looked for beside the link of a hub cache, not beside the blob."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_bytes(VALID_SAFETENSORS)
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    (snapshot / "config.json").write_text('{"hidden_size": 7}')
    for path in (snapshot, snapshot / "model.safetensors"):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.config == {"hidden_size": 7}
            assert checkpoint.folder == snapshot


def test_config_is_optional_but_strict(tmp_path: Path) -> None:
    """No config.json means None; a broken one is named, and so is a folder of that name."""
    (tmp_path / "model.safetensors").write_bytes(VALID_SAFETENSORS)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config is None
    (tmp_path / "config.json").write_text('{"hidden_size": 1, "hidden_size": 2}')
    with pytest.raises(FormatError, match=r"'hidden_size' twice, in .*config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(FormatError, match=r"a regular file.*config\.json"):
        open_checkpoint(tmp_path)


def test_raw_is_a_read_only_view(tmp_path: Path) -> None:
    """Bytes come uncopied and cannot be written by accident."""
    (tmp_path / "m").write_bytes(VALID_SAFETENSORS)
    checkpoint = open_checkpoint(tmp_path / "m")
    raw = checkpoint.raw("a")
    assert raw.data.tobytes() == np.array([1, -2], "<f4").tobytes()
    assert (raw.data.dtype, raw.data.ndim, raw.data.flags.owndata) == (np.uint8, 1, False)
    with pytest.raises(ValueError, match="read-only"):
        raw.data[0] = 1
    checkpoint.close()
    assert raw.data[3] == 0x3F  # what was handed out outlives the checkpoint
    with pytest.raises(UsageError, match="closed"):
        checkpoint.raw("a")
    with pytest.raises(UsageError, match="closed"):
        _ = checkpoint.content_hash


def test_writing_through_the_mapping_stays_private(tmp_path: Path) -> None:
    """Even a forced write reaches neither the file nor a second mapping of it."""
    path = tmp_path / "m"
    path.write_bytes(VALID_SAFETENSORS)
    with open_checkpoint(path) as first, open_checkpoint(path) as second:
        data = first.raw("a").data
        data.flags.writeable = True
        data[:] = 0
        assert second.raw("a").data.tobytes() == np.array([1, -2], "<f4").tobytes()
    assert path.read_bytes() == VALID_SAFETENSORS


@pytest.mark.parametrize("kind", VALID)
def test_released_bytes_come_back(kind: str, tmp_path: Path) -> None:
    """Whoever holds a view reads the file again; what was unpacked stays, and a closed file has nothing to let go."""
    (tmp_path / "m").write_bytes(VALID[kind])
    with open_checkpoint(tmp_path / "m") as checkpoint:
        for name in checkpoint.tensors:
            view = checkpoint.raw(name).data
            before = view.tobytes()
            checkpoint.release(name)
            assert view.tobytes() == before == checkpoint.raw(name).data.tobytes()
    for name in checkpoint.tensors:
        checkpoint.release(name)


def test_unknown_tensor(tmp_path: Path) -> None:
    """Asking for a tensor that is not there says so."""
    (tmp_path / "m").write_bytes(VALID_SAFETENSORS)
    with open_checkpoint(tmp_path / "m") as checkpoint, pytest.raises(UsageError, match="no tensor 'z'"):
        checkpoint.raw("z")


def test_content_hash(tmp_path: Path) -> None:
    """The hash of one file is its sha256, of shards that of their concatenation in order."""
    (tmp_path / "m").write_bytes(VALID_GGUF)
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.content_hash == hashlib.sha256(VALID_GGUF).hexdigest()
        assert "gguf, 2 tensors" in repr(checkpoint)
    parts = {f"{i}.st": safetensors({name: entry()}, bytes([i]) * 8) for i, name in enumerate("ab")}
    for name, data in parts.items():
        (tmp_path / name).write_bytes(data)
    index = tmp_path / "i.json"
    index.write_text(json.dumps({"weight_map": {"a": "0.st", "b": "1.st"}}))
    with open_checkpoint(index) as checkpoint:
        assert checkpoint.content_hash == hashlib.sha256(parts["0.st"] + parts["1.st"]).hexdigest()


def test_tensors_cannot_be_assigned(tmp_path: Path) -> None:
    """The table of tensors is a read-only mapping."""
    (tmp_path / "m").write_bytes(VALID_SAFETENSORS)
    with open_checkpoint(tmp_path / "m") as checkpoint, pytest.raises(TypeError):
        checkpoint.tensors["a"] = None  # type: ignore[index]

"""Split GGUF files, written by the gguf package: opened from any part, refused when the parts do not make one model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from apr_core.errors import FormatError, ReadWriteError, UsageError
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.formats.codecs import decode
from tests.attacks.build import gguf as build
from tests.attacks.build import pair, row, text

NAMES = ["token_embd.weight", *(f"blk.{n}.ffn_up.weight" for n in range(4)), "output_norm.weight"]


def values(name: str) -> np.ndarray:
    """Make the values of a tensor."""
    return np.random.default_rng(len(name) * 31 + ord(name[4])).standard_normal((2, 32)).astype(np.float32)


def write_split(folder: Path, stem: str = "m", *, per_part: int = 2, first_empty: bool = False, **more: str) -> Path:
    """Let the gguf package write a split model; returns the path of its first part."""
    writer = gguf.GGUFWriter(
        folder / f"{stem}.gguf", "qwen2", split_max_tensors=per_part, small_first_shard=first_empty
    )
    writer.add_uint32("qwen2.block_count", 4)
    writer.add_token_list(["a", "b"])
    for key, value in more.items():
        writer.add_string(f"general.{key}", value)
    for name in NAMES:
        writer.add_tensor(name, values(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(folder.glob(f"{stem}-*.gguf"))


@pytest.mark.parametrize("first_empty", [False, True])
@pytest.mark.parametrize("way", ["first", "last", "folder"])
def test_opened_from_anywhere(way: str, first_empty: bool, tmp_path: Path) -> None:
    """Any part, or the folder, opens the whole: all tensors, the first part's metadata, its path, no gaps."""
    first = write_split(tmp_path, first_empty=first_empty)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) == (4 if first_empty else 3)
    with open_checkpoint({"first": first, "last": parts[-1], "folder": tmp_path}[way]) as checkpoint:
        assert (checkpoint.path, checkpoint.files, checkpoint.gaps) == (first, tuple(parts), ())
        assert checkpoint.config["num_hidden_layers"] == 4
        assert checkpoint.metadata["tokenizer.ggml.tokens"] == ["a", "b"]
        assert [info.stored_name for info in checkpoint.tensors.values()] == NAMES
        for info in checkpoint.tensors.values():
            assert decode(checkpoint.raw(info.name)).tobytes() == values(info.stored_name).tobytes()


def test_other_models_beside_it(tmp_path: Path) -> None:
    """Two split models in a folder are two models; each opens by name."""
    first, other = write_split(tmp_path, "a"), write_split(tmp_path, "b")
    with pytest.raises(UsageError, match="6 models"):
        open_checkpoint(tmp_path)
    for path in (first, other):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.path == path


def test_merged_file_keeps_its_keys(tmp_path: Path) -> None:
    """What llama-gguf-split --merge leaves (split.count 0, the total) opens; a wrong total does not."""
    keys = [pair("split.no", 2, b"\0\0"), pair("split.count", 2, b"\0\0")]
    total = pair("split.tensors.count", 5, b"\1\0\0\0")
    (tmp_path / "m").write_bytes(build([row("a")], [*keys, total], bytes(8)))
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert list(checkpoint.tensors) == ["a"]
    (tmp_path / "m").write_bytes(build([row("a")], [*keys, total.replace(b"\1\0\0\0", b"\7\0\0\0")], bytes(8)))
    with pytest.raises(FormatError, match="expected 7 tensors in a whole model, found part 1, 1 tensors"):
        open_checkpoint(tmp_path / "m")


def part(folder: Path, number: int) -> Path:
    """Path of a part, from 1."""
    return folder / f"m-0000{number}-of-00003.gguf"


def _missing(folder: Path) -> None:
    part(folder, 2).unlink()


def _renamed(folder: Path) -> None:
    for number in (1, 2, 3):
        part(folder, number).rename(folder / f"part{number}.gguf")


def _exchanged(folder: Path) -> None:
    part(folder, 2).rename(folder / "x")
    part(folder, 3).rename(part(folder, 2))
    (folder / "x").rename(part(folder, 3))


def _joined(folder: Path) -> None:
    (folder / "whole.gguf").write_bytes(b"".join(part(folder, number).read_bytes() for number in (1, 2, 3)))
    for number in (1, 2, 3):
        part(folder, number).unlink()


def _of_another_split(folder: Path) -> None:
    other = folder.parent / "other"
    other.mkdir()
    write_split(other, per_part=3)
    shutil.copy(other / "m-00002-of-00002.gguf", part(folder, 2))


def _twice(folder: Path) -> None:
    data = part(folder, 1).read_bytes()
    names = [name.encode() for name in NAMES]
    second = part(folder, 2).read_bytes()
    assert second.count(names[2]) == 1
    part(folder, 2).write_bytes(second.replace(names[2], names[1]))
    assert data.count(names[1]) == 1


def _of_another_model(folder: Path) -> None:
    """Let parts say what they are: part 2 calls itself something else."""
    pieces = {1: "qwen2", 2: "llama"}
    for number, architecture in pieces.items():
        keys = [
            pair("general.architecture", 8, text(architecture)),
            pair("split.no", 2, (number - 1).to_bytes(2, "little")),
            pair("split.count", 2, b"\2\0"),
            pair("split.tensors.count", 5, b"\2\0\0\0"),
        ]
        (folder / f"m-0000{number}-of-00002.gguf").write_bytes(build([row(f"t{number}")], keys, bytes(8)))
        part(folder, number).unlink()
    part(folder, 3).unlink()


def _something_else(folder: Path) -> None:
    part(folder, 2).write_bytes(b"\x20" + bytes(7) + b"{}" + b" " * 30)


def _without_keys(folder: Path) -> None:
    part(folder, 2).write_bytes(build([row("a")], data=bytes(8)))


def _fewer_tensors(folder: Path) -> None:
    for number in (1, 2, 3):
        data = part(folder, number).read_bytes()
        at = data.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
        part(folder, number).write_bytes(data[:at] + b"\5\0\0\0" + data[at + 4 :])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_missing, r"3 parts side by side, found 1 missing: m-00002-of-00003\.gguf"),
        (_renamed, r"models"),
        (_exchanged, r"part 2 of 3.*found part 3 of 3"),
        (_joined, r"another GGUF header behind its tensors: parts joined by cat.*whole\.gguf at byte \d+"),
        (_of_another_split, r"expected part 2 of 3.*found part 2 of 2"),
        (_twice, r"each tensor in one part, found it in m-00001-of-00003\.gguf too"),
        (_of_another_model, r"general\.architecture 'qwen2', as in .*found 'llama': of another model"),
        (_something_else, r"a part of a split GGUF, found safetensors data"),
        (_without_keys, r"expected part 2 of 3.*found no split keys"),
        (_fewer_tensors, r"expected 5 tensors in all parts.*found 6"),
    ],
)
def test_refuses_what_is_no_whole(damage: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    """Each way to get the parts wrong is refused by name, whichever part is opened."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_split(folder)
    damage(folder)
    with pytest.raises((FormatError, UsageError), match=says):
        open_checkpoint(folder)
    if damage is not _renamed:
        with pytest.raises(FormatError):
            open_checkpoint(max(folder.iterdir()))


def test_renamed_part_alone(tmp_path: Path) -> None:
    """A part under a name without numbers says what it must be called."""
    write_split(tmp_path)
    part(tmp_path, 2).rename(tmp_path / "second.gguf")
    with pytest.raises(FormatError, match=r"-00002-of-00003, as the content says, found a name without a part number"):
        open_checkpoint(tmp_path / "second.gguf")
    (tmp_path / "second.gguf").rename(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(FormatError, match="found a name of part 1 of 2"):
        open_checkpoint(tmp_path / "m-00001-of-00002.gguf")


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the right to list the folder, the other parts cannot be looked for."""
    first = write_split(tmp_path)

    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ReadWriteError, match=r"other parts of .*m-00001-of-00003\.gguf: Permission denied"):
        open_checkpoint(first)

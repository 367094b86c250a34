"""APR v2, against the hand-built oracle file and a second writer that lives in the tests."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from apr_core.dtypes import BY_APR, FORMATS
from apr_core.errors import FormatError, UsageError
from apr_core.formats.apr import read_apr, write_apr
from apr_core.formats.checkpoint import TensorSource, map_file, open_checkpoint
from apr_core.formats.codecs import decode
from tests.attacks.build import apr as build
from tests.attacks.build import apr_entry


def test_minimal_oracle_opens(oracle: Path) -> None:
    """The file built by hand from the rules is accepted, values and all."""
    with open_checkpoint(oracle / "apr" / "minimal_v2.apr") as checkpoint:
        assert checkpoint.format == "apr"
        assert checkpoint.gaps == ()
        assert decode(checkpoint.raw("lm_head.weight")).tolist() == [[0.5, -0.5], [0.25, -0.25], [1, 2]]
        assert decode(checkpoint.raw("model.norm.weight")).tolist() == [1, 1]
        assert checkpoint.config["vocab_size"] == 3


def test_writer_reproduces_the_minimal_oracle(oracle: Path, tmp_path: Path) -> None:
    """Our writer gives the hand-built file back, byte for byte, both checksums included."""
    metadata = {"model_type": "qwen2", "architecture": "qwen2", "hidden_size": 2, "vocab_size": 3}
    head = np.array([0.5, -0.5, 0.25, -0.25, 1, 2], "<f4")
    sources = [
        TensorSource("lm_head.weight", FORMATS["F32"], (3, 2), lambda: [head]),
        TensorSource("model.norm.weight", FORMATS["F16"], (2,), lambda: [np.ones(2, "<f2")]),
    ]
    seen: list[int] = []
    write_apr(tmp_path / "f", sources, metadata, progress=seen.append)
    assert (tmp_path / "f").read_bytes() == (oracle / "apr" / "minimal_v2.apr").read_bytes()
    assert seen[-1] == 452


@pytest.mark.parametrize("dtype", BY_APR.values(), ids=str)
def test_every_dtype_equals_the_second_writer(dtype: object, tmp_path: Path) -> None:
    """Rows of 300 (no multiple of a block) of every APR type: our file is the one that the tests' builder packs."""
    shape = (3, 300)
    data = np.arange(dtype.nbytes(shape)).astype(np.uint8).tobytes()
    write_apr(tmp_path / "f", [TensorSource("w", dtype, shape, lambda: [data])], {})
    packed = build([apr_entry("w", dtype.apr, shape, 0, len(data))], data + bytes(-len(data) % 64))
    assert (tmp_path / "f").read_bytes() == packed
    with open_checkpoint(tmp_path / "f") as checkpoint:
        assert checkpoint.raw("w").data.tobytes() == data
        assert checkpoint.tensors["w"].dtype == dtype
        assert decode(checkpoint.raw("w")).shape == shape


@pytest.mark.parametrize(
    ("kind", "shape", "size", "expected"),
    [
        (0, (), 4, "F32"),
        (2, (3, 32), 192, "BF16"),
        (2, (3, 32), 54, "Q4_0"),
        (2, (9,), 18, "BF16"),
        (8, (64,), 36, "AprQ4"),
        (8, (64,), 68, "AprQ8"),
        (8, (3, 32), 102, "Q8_0"),
        (9, (64,), 68, "AprQ8"),
        (9, (64,), 36, "AprQ4"),
        (9, (3, 32), 102, "Q8_0"),
        (8, (14,), 18, "AprQ4"),
        (9, (14,), 18, "AprQ8"),
        (12, (2, 896), 2 * 4 * 144, "Q4_K"),
        (14, (2, 896), 2 * 4 * 210, "Q6_K"),
        (3, (2,), 16, "F64"),
        (6, (32,), 32, "I8"),
        (7, (32,), 32, "U8"),
        (30, (2,), 4, "BF16"),
    ],
)
def test_dtype_ids_are_told_apart_by_size(
    kind: int, shape: tuple[int, ...], size: int, expected: str, tmp_path: Path
) -> None:
    """Ids that mean different things to different writers are read as what the size proves them to be."""
    (tmp_path / "f").write_bytes(build([apr_entry("w", kind, shape, 0, size)], bytes(size + -size % 64)))
    with open_checkpoint(tmp_path / "f") as checkpoint:
        assert str(checkpoint.tensors["w"].dtype) == expected
        assert decode(checkpoint.raw("w")).shape == shape


def test_row_padding_is_cut_per_row(tmp_path: Path) -> None:
    """Rows of 40 in Q4_K: each row starts at its own block; one flat stream would shift row 2 (GH-202)."""
    block = lambda d: struct.pack("<ee", d, 0) + bytes([1] * 4 + [0] * 8) + bytes([0x11] * 128)  # noqa: E731
    (tmp_path / "f").write_bytes(build([apr_entry("w", 12, (2, 40), 0, 288)], (block(1) + block(3)).ljust(320, b"\0")))
    with open_checkpoint(tmp_path / "f") as checkpoint:
        values = decode(checkpoint.raw("w"))
    assert values.tolist() == [[1.0] * 40, [3.0] * 40]


@pytest.mark.parametrize("magic", [b"APR\0", b"APR2"])
def test_both_fourth_bytes(magic: bytes, tmp_path: Path) -> None:
    """The lax reader's alternative magic has the same layout and is read the same."""
    (tmp_path / "f").write_bytes(build([apr_entry("a", 7, (1,), 0, 1)], b"\7".ljust(64, b"\0"), magic=magic))
    with open_checkpoint(tmp_path / "f") as checkpoint:
        assert decode(checkpoint.raw("a")).tolist() == [7]


def test_offsets_need_not_follow_the_index(tmp_path: Path) -> None:
    """The streaming writer sorts the index, not the data: tensors are listed in file order."""
    entries = [apr_entry("a", 7, (1,), 64, 1), apr_entry("b", 7, (1,), 0, 1)]
    (tmp_path / "f").write_bytes(build(entries, b"\2".ljust(64, b"\0") + b"\1".ljust(64, b"\0")))
    with open_checkpoint(tmp_path / "f") as checkpoint:
        assert list(checkpoint.tensors) == ["b", "a"]
        assert decode(checkpoint.raw("a")).tolist() == [1]
    write_apr(
        tmp_path / "ours",
        [TensorSource(name, FORMATS["U8"], (1,), lambda v=value: [v]) for name, value in (("b", b"\2"), ("a", b"\1"))],
        {},
    )
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "f").read_bytes()


def test_gaps_are_findings(tmp_path: Path) -> None:
    """A hole and a tail are reported; unaligned data is not an error."""
    entries = [apr_entry("a", 7, (1,), 0, 1), apr_entry("b", 7, (3,), 129, 3)]
    (tmp_path / "f").write_bytes(build(entries, bytes(129 + 3 + 500)))
    with open_checkpoint(tmp_path / "f") as checkpoint:
        start = checkpoint.tensors["a"].offset
        assert [(gap.offset - start, gap.nbytes) for gap in checkpoint.gaps] == [(64, 65), (192, 440)]


def test_footer_check_can_be_left_out(tmp_path: Path) -> None:
    """Without it the altered file opens; with it, it is refused: the check is what refuses."""
    (tmp_path / "f").write_bytes(build([apr_entry("a", 7, (1,), 0, 1)], bytes(64), break_footer=True))
    assert [info.name for info in read_apr(map_file(tmp_path / "f"), verify_footer=False).tensors] == ["a"]
    with pytest.raises(FormatError, match="footer checksum"):
        read_apr(map_file(tmp_path / "f"))


@pytest.mark.parametrize(
    "stored", ["model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight"]
)
def test_three_naming_styles(stored: str, tmp_path: Path) -> None:
    """All three styles of APR writers end in the same canonical name; the stored one is kept."""
    (tmp_path / "f").write_bytes(build([apr_entry(stored, 7, (1,), 0, 1)], bytes(64)))
    with open_checkpoint(tmp_path / "f") as checkpoint:
        info = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"]
        assert info.stored_name == stored


def test_metadata_travels(tmp_path: Path) -> None:
    """Text, lists, nulls and numpy values come back as plain JSON values."""
    metadata = {"tokenizer.merges": ["a b", "日 本"], "none": None, "n": np.int64(3), "f": np.float32(0.5)}
    write_apr(tmp_path / "f", [], metadata | {"array": np.arange(3), "map": {"x": 1}})
    with open_checkpoint(tmp_path / "f") as checkpoint:
        assert checkpoint.metadata == metadata | {"n": 3, "f": 0.5, "array": [0, 1, 2], "map": {"x": 1}}
        assert checkpoint.config is None


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"x": float("nan")}, "no.* strict JSON|not strict JSON"),
        ({"x": object()}, "object has no JSON form"),
        ({"x": "\ud800"}, "not strict JSON"),
        ({"x": "y" * (16 << 20)}, "bytes of APR metadata"),
    ],
)
def test_refuses_metadata(metadata: dict[str, object], says: str, tmp_path: Path) -> None:
    """Metadata that a strict reader would refuse is not written."""
    with pytest.raises(UsageError, match=says):
        write_apr(tmp_path / "f", [], metadata)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "says"),
    [
        ("w", "Q5_K", (1, 256), "APR cannot hold Q5_K"),
        ("w", "Q8_0", (1, 32), "APR cannot hold Q8_0"),
        ("w" * 257, "F32", (1,), "names of 1 to 256"),
        ("", "F32", (1,), "names of 1 to 256"),
        ("w", "F32", (1,) * 9, "at most 8 dimensions"),
    ],
)
def test_refuses_tensors(name: str, dtype: str, shape: tuple[int, ...], says: str, tmp_path: Path) -> None:
    """What APR cannot hold is refused by name before a byte is written."""
    with pytest.raises(UsageError, match=says):
        write_apr(tmp_path / "f", [TensorSource(name, FORMATS[dtype], shape, list)], {})
    assert list(tmp_path.iterdir()) == []

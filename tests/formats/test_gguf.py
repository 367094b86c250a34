"""GGUF, with the gguf package and llama.cpp's own files as witnesses."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from apr_core.dtypes import BY_GGUF, FORMATS
from apr_core.errors import FormatError, UsageError
from apr_core.formats.checkpoint import TensorSource, open_checkpoint
from apr_core.formats.codecs import decode, decoder_name
from apr_core.formats.gguf import pack_value, write_gguf
from tests.attacks.build import gguf as build
from tests.attacks.build import pair, row, text

FILES = ("F16", "Q4_K_M", "Q6_K", "Q8_0")


@pytest.mark.parametrize("name", FILES)
def test_llama_cpp_files_decode_like_the_gguf_package(name: str, oracle: Path) -> None:
    """Every tensor of llama.cpp's files: name, shape, and values bit-equal to gguf.quants.dequantize."""
    path = oracle / "mini" / "gguf" / f"{name}.gguf"
    reader = gguf.GGUFReader(path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.gaps == ()
        infos = list(checkpoint.tensors.values())
        assert [info.stored_name for info in infos] == [tensor.name for tensor in reader.tensors]
        for info, tensor in zip(infos, reader.tensors, strict=True):
            assert (info.dtype.gguf, info.offset) == (tensor.tensor_type, tensor.data_offset)
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            values = decode(checkpoint.raw(info.name))
            assert values.shape == tuple(reversed(tensor.shape.tolist())) == info.shape
            assert values.tobytes() == expected.tobytes()


def test_llama_cpp_metadata(oracle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key of a llama.cpp file comes out as the gguf package reads it; arrays are parsed on demand."""
    path = oracle / "mini" / "gguf" / "Q8_0.gguf"
    fields = {key: field for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF.")}
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.metadata) == list(fields)
        assert checkpoint.metadata.array_length("tokenizer.ggml.tokens") == 1024
        assert {key: checkpoint.metadata[key] for key in fields} == {k: f.contents() for k, f in fields.items()}
        assert checkpoint.metadata.array_length("tokenizer.ggml.tokens") == 1024
        assert checkpoint.metadata.array_length("general.name") is None
        assert len(checkpoint.metadata) == len(fields)
        with monkeypatch.context() as patch:
            patch.setattr("apr_core.formats.gguf._parse_array", lambda *_: pytest.fail("strings were made"))
            assert "tokenizer.ggml.tokens" in checkpoint.metadata
        assert checkpoint.metadata["tokenizer.ggml.tokens"] is not checkpoint.metadata["tokenizer.ggml.tokens"]


def test_config_equals_config_json(oracle: Path) -> None:
    """A GGUF's translated configuration equals the config.json of the same model, wherever both say something."""
    with open_checkpoint(oracle / "mini") as source, open_checkpoint(oracle / "mini" / "gguf" / "F16.gguf") as stored:
        common = set(source.config) & set(stored.config)
        assert {key: stored.config[key] for key in common} == {key: source.config[key] for key in common}
        assert len(common) >= 14


METADATA = {
    "a.bool": True,
    "a.uint32": 7,
    "a.int32": -7,
    "a.uint64": 2**32,
    "a.int64": -(2**40),
    "a.float32": 0.1,
    "a.float64": 1e300,
    "a.text": "naïve",
    "a.u8": np.uint8(3),
    "a.i16": np.int16(-3),
    "a.f64": np.float64(0.1),
    "a.texts": ["x", "", "日本"],
    "a.ints": [1, -2],
    "a.longs": [1, 2**40],
    "a.ulongs": [2**63],
    "a.floats": [0.5, 1.5],
    "a.bools": [True, False],
    "a.array": np.array([1, 2, 3], np.uint16),
    "general.architecture": "qwen2",
}
KINDS = {
    "a.bool": "BOOL",
    "a.uint32": "UINT32",
    "a.int32": "INT32",
    "a.uint64": "UINT64",
    "a.int64": "INT64",
    "a.float32": "FLOAT32",
    "a.float64": "FLOAT64",
    "a.u8": "UINT8",
    "a.i16": "INT16",
    "a.f64": "FLOAT64",
    "a.ints": "INT32",
    "a.longs": "INT64",
    "a.ulongs": "UINT64",
    "a.floats": "FLOAT32",
    "a.bools": "BOOL",
    "a.array": "UINT16",
}


def test_written_metadata_is_read_by_the_gguf_package(tmp_path: Path) -> None:
    """Each kind of value reaches the gguf package with the type that the docstring promises; architecture first."""
    write_gguf(tmp_path / "f", [], METADATA)
    reader = gguf.GGUFReader(tmp_path / "f")
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert next(iter(fields)) == "general.architecture"
    assert {key: fields[key].types[-1].name for key in KINDS} == KINDS
    for key, value in METADATA.items():
        expected = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
        found = fields[key].contents()
        assert found == (pytest.approx(expected, rel=1e-7) if key == "a.float32" else expected)
    with open_checkpoint(tmp_path / "f") as checkpoint:
        assert {key: checkpoint.metadata[key] for key in fields} == {k: f.contents() for k, f in fields.items()}


def test_written_tensors_equal_the_gguf_package_byte_for_byte(tmp_path: Path) -> None:
    """Given the same pairs and tensors, our file is that of gguf.GGUFWriter."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((3, 64)).astype(np.float32)
    bias = rng.standard_normal(5).astype(np.float16)
    packed = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "theirs", "qwen2")
    writer.add_uint32("qwen2.block_count", 1)
    writer.add_tensor("blk.0.ffn_up.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_q.bias", bias)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    sources = [
        TensorSource("model.layers.0.mlp.up_proj.weight", FORMATS["Q8_0"], (3, 64), lambda: list(packed)),
        TensorSource("model.layers.0.self_attn.q_proj.bias", FORMATS["F16"], (5,), lambda: [bias]),
    ]
    seen: list[int] = []
    metadata = {"qwen2.block_count": 1, "general.architecture": "qwen2"}
    write_gguf(tmp_path / "ours", sources, metadata, progress=seen.append)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert seen == sorted(seen)
    assert seen[-1] == (tmp_path / "ours").stat().st_size
    with open_checkpoint(tmp_path / "theirs") as checkpoint:
        assert [(i.name, i.shape) for i in checkpoint.tensors.values()] == [(s.name, s.shape) for s in sources]


@pytest.mark.parametrize("dtype", BY_GGUF.values(), ids=str)
def test_every_type_is_laid_out_as_the_gguf_package_says(dtype: object, tmp_path: Path) -> None:
    """Two rows of every GGML type: the gguf package finds the same bytes at the same place."""
    shape = (2, 2 * dtype.block_elements)
    data = np.arange(dtype.nbytes(shape)).astype(np.uint8)
    write_gguf(tmp_path / "f", [TensorSource("w", dtype, shape, lambda: [data[:7], data[7:]])], {"k": 1})
    (tensor,) = gguf.GGUFReader(tmp_path / "f").tensors
    with open_checkpoint(tmp_path / "f") as checkpoint:
        raw = checkpoint.raw("w")
        assert raw.data.tobytes() == tensor.data.tobytes() == data.tobytes()
        assert (raw.info.offset, raw.info.dtype, raw.info.shape) == (tensor.data_offset, dtype, shape)


@pytest.mark.parametrize("alignment", [8, 64, 1024])
def test_alignment_is_honoured(alignment: int, tmp_path: Path) -> None:
    """Another general.alignment moves the tensors, for us as for the gguf package."""
    sources = [TensorSource(name, FORMATS["F32"], (3,), lambda: [bytes(range(12))]) for name in ("a", "b")]
    write_gguf(tmp_path / "f", sources, {"general.alignment": alignment})
    expected = [tensor.data_offset for tensor in gguf.GGUFReader(tmp_path / "f").tensors]
    with open_checkpoint(tmp_path / "f") as checkpoint:
        assert [info.offset for info in checkpoint.tensors.values()] == expected
        assert {info.offset % alignment for info in checkpoint.tensors.values()} == {0}
        assert checkpoint.gaps == ()


def test_version_2_opens(tmp_path: Path) -> None:
    """Version 2 differs from 3 in nothing that is read here."""
    (tmp_path / "f").write_bytes(build([row()], data=bytes(8), version=2))
    with open_checkpoint(tmp_path / "f") as checkpoint:
        assert checkpoint.tensors["a"].shape == (2,)
        assert checkpoint.config is None


def test_gaps_are_findings(tmp_path: Path) -> None:
    """A hole and a tail beyond alignment padding are reported with place and size, not refused."""
    (tmp_path / "f").write_bytes(build([row("a"), row("b", offset=96)], data=bytes(96 + 8 + 1000)))
    with open_checkpoint(tmp_path / "f") as checkpoint:
        start = checkpoint.tensors["a"].offset
        assert [(gap.offset - start, gap.nbytes) for gap in checkpoint.gaps] == [(32, 64), (128, 976)]


def test_vocabulary_only(tmp_path: Path) -> None:
    """A GGUF without tensors opens: refusing it is the contract's business."""
    (tmp_path / "f").write_bytes(build([], [pair("k", 8, text("v"))]))
    with open_checkpoint(tmp_path / "f") as checkpoint:
        assert dict(checkpoint.tensors) == {}
        assert dict(checkpoint.metadata) == {"k": "v"}


def test_extras_keep_their_name(tmp_path: Path) -> None:
    """A tensor that the table does not know keeps its stored name."""
    (tmp_path / "f").write_bytes(build([row("rope_freqs.weight")], data=bytes(8)))
    with open_checkpoint(tmp_path / "f") as checkpoint:
        assert list(checkpoint.tensors) == ["rope_freqs.weight"]


def test_lazy_array_with_bad_text_is_refused_when_read(tmp_path: Path) -> None:
    """Text that is not UTF-8 inside a big array is found when the array is asked for, with its element."""
    array = struct.pack("<IQ", 8, 2) + text("a") + text(b"\xff")
    (tmp_path / "f").write_bytes(build([row()], [pair("tokens", 9, array)], bytes(8)))
    with open_checkpoint(tmp_path / "f") as checkpoint, pytest.raises(FormatError, match="bytes in element 1"):
        checkpoint.metadata["tokens"]


@pytest.mark.parametrize(
    "value", [None, {}, [], [1, "a"], [True, 1], [1, 0.5], 2**64, -(2**63) - 1, [2**64], object(), np.zeros((2, 2)), 1j]
)
def test_values_without_a_type(value: object) -> None:
    """What GGUF has no type for is refused by key, never coerced."""
    with pytest.raises(UsageError, match="no GGUF type for 'k'"):
        pack_value("k", value)


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [("w", "Q8_0", (2, 33)), ("w", "F32", ()), ("w", "F32", (1,) * 5), ("w", "F32", (0, 2)), ("w" * 64, "F32", (2,))],
)
def test_refuses_what_gguf_cannot_hold(name: str, dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Broken rows, scalars, five dimensions, empty tensors and long names are refused before a byte is written."""
    with pytest.raises(UsageError, match="GGUF cannot hold tensor"):
        write_gguf(tmp_path / "f", [TensorSource(name, FORMATS[dtype], shape, list)], {})
    assert list(tmp_path.iterdir()) == []


def test_refuses_foreign_types_and_bad_alignment(tmp_path: Path) -> None:
    """APR's own types, an alignment that is no power of two, and one tensor under two names are refused."""
    with pytest.raises(UsageError, match="GGUF cannot hold AprQ4"):
        write_gguf(tmp_path / "f", [TensorSource("w", FORMATS["AprQ4"], (2,), list)], {})
    for alignment in (0, 3, 24, 2**20, "32"):
        with pytest.raises(UsageError, match="power of two"):
            write_gguf(tmp_path / "f", [], {"general.alignment": alignment})
    twice = [TensorSource(n, FORMATS["F32"], (2,), list) for n in ("lm_head.weight", "output.weight")]
    with pytest.raises(UsageError, match=r"two tensors would be stored as output\.weight"):
        write_gguf(tmp_path / "f", twice, {})


@pytest.mark.parametrize("kind", sorted(gguf.quants._type_traits), ids=lambda kind: kind.name)
def test_every_type_that_the_gguf_package_decodes(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    """Random blocks of each type, written by the gguf package: opened, and decoded to its values bit for bit."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(int(kind)).integers(0, 256, (3, 2 * nbytes)).astype(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "f", "qwen2")
    writer.add_tensor("w", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        expected = np.asarray(gguf.quants.dequantize(data, kind), np.float32)
    with open_checkpoint(tmp_path / "f") as checkpoint:
        raw = checkpoint.raw("w")
        assert (raw.info.dtype.name, raw.info.shape) == (kind.name, (3, 2 * elements))
        assert np.array_equal(decode(raw), expected, equal_nan=True)
        assert decoder_name(raw.info.dtype) in ("apr_core", "gguf")


def test_facts_of_the_container(oracle: Path, tmp_path: Path) -> None:
    """Version, alignment and parts are there for a report."""
    with open_checkpoint(oracle / "mini" / "gguf" / "Q8_0.gguf") as checkpoint:
        assert checkpoint.facts == {"version": 3, "alignment": 32, "parts": 1}
    (tmp_path / "f").write_bytes(build(pairs=[pair("general.alignment", 4, b"\x40\0\0\0")], version=2))
    with open_checkpoint(tmp_path / "f") as checkpoint:
        assert checkpoint.facts == {"version": 2, "alignment": 64, "parts": 1}


def test_a_broken_string_is_named_when_it_is_read(tmp_path: Path) -> None:
    """Opening steps over strings; bytes that are no UTF-8 are reported with element and byte when they are read."""
    texts = b"".join(text(piece) for piece in (b"a", b"b", b"\xff\xfe", b"c"))
    (tmp_path / "f").write_bytes(build(pairs=[pair("k", 9, struct.pack("<IQ", 8, 4) + texts)]))
    with open_checkpoint(tmp_path / "f") as checkpoint:
        at = (tmp_path / "f").read_bytes().index(b"\xff\xfe")
        with pytest.raises(
            FormatError, match=rf"strings in UTF-8 in 'k', found other bytes in element 2.* at byte {at}"
        ):
            checkpoint.metadata["k"]

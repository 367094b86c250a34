"""Conversion: nothing is lost, nothing is half-written, and foreign packages read what we write."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as ForeignTokenizer

from apr_core.dtypes import FORMATS
from apr_core.errors import FormatError, LoadError, NotFound, UsageError
from apr_core.formats.apr import write_apr
from apr_core.formats.checkpoint import TensorSource, open_checkpoint
from apr_core.formats.codecs import decode, encode
from apr_core.formats.gguf import write_gguf
from apr_core.formats.names import gguf_name
from apr_core.model.tokens import load_tokenizer
from apr_core.rosetta import convert as convert_room
from apr_core.rosetta.convert import CONTAINERS, container_of, convert, decoded_chunks, named
from apr_core.rosetta.diff import compare_tensors

Edit = Callable[..., Path]
CORPUS = ("it's 12 bazo  \n\tfoo", "写 é e\u0301 👩‍💻", "<|im_start|>user\nhi<|im_end|>", "")


def foreign_tensors(path: Path, format: str) -> dict[str, np.ndarray]:
    """Read a file without any code of ours: canonical names are not translated back."""
    if format == "safetensors":
        return {k: v.float().numpy() for k, v in load_file(path / "model.safetensors").items()}
    if format == "gguf":
        return {
            t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape([int(n) for n in reversed(t.shape)])
            for t in gguf.GGUFReader(path).tensors
        }
    return apr_tensors(path.read_bytes())


def apr_tensors(data: bytes) -> dict[str, np.ndarray]:
    """Read an APR v2 file by hand, from the table in spec/apr.md 1.1 and 1.4."""
    count, _, _, index_at, data_at = struct.unpack_from("<IQIQQ", data, 8)
    out = {}
    for _ in range(count):
        (length,) = struct.unpack_from("<H", data, index_at)
        name = data[index_at + 2 : index_at + 2 + length].decode()
        kind, dims = struct.unpack_from("<BB", data, index_at + 2 + length)
        *shape, offset, size = struct.unpack_from(f"<{dims + 2}Q", data, index_at + 4 + length)
        dtype = {0: "<u4", 1: "<f2", 30: "<u2"}[kind]
        raw = np.frombuffer(data[data_at + offset : data_at + offset + size], dtype=dtype)
        values = (raw.astype(np.uint32) << 16).view(np.float32) if kind == 30 else raw
        out[name] = (raw.view(np.float32) if kind == 0 else values.astype(np.float32)).reshape(shape)
        index_at += 20 + length + 8 * dims
    return out


@pytest.fixture(scope="session")
def all_three(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model in every container: itself and two copies."""
    folder = tmp_path_factory.mktemp("three")
    made = {c: convert(tiny, folder / f"tiny.{c}") for c in ("gguf", "apr")}
    return {"safetensors": tiny, **made}


@pytest.mark.parametrize("source", CONTAINERS)
@pytest.mark.parametrize("target", CONTAINERS)
def test_every_pair_of_containers_keeps_every_bit(
    source: str, target: str, all_three: dict[str, Path], tmp_path: Path
) -> None:
    """From each container to each, a foreign reader finds the float32 bits that torch read from the original."""
    path = convert(all_three[source], named(tmp_path / "copy", target))
    found = foreign_tensors(path, target)
    original = foreign_tensors(all_three["safetensors"], "safetensors")
    naming = gguf_name if target == "gguf" else str
    assert set(found) == {naming(name) for name in original}
    for name, values in original.items():
        np.testing.assert_array_equal(
            values.view(np.uint32), np.ascontiguousarray(found[naming(name)], np.float32).view(np.uint32), err_msg=name
        )


@pytest.mark.parametrize("source", CONTAINERS)
@pytest.mark.parametrize("target", CONTAINERS)
def test_every_pair_of_containers_keeps_the_identity(
    source: str, target: str, all_three: dict[str, Path], tmp_path: Path
) -> None:
    """Configuration, tokenizer, end tokens, template and notes survive every conversion."""
    path = convert(all_three[source], named(tmp_path / "copy", target))
    with open_checkpoint(path) as copy, open_checkpoint(all_three["safetensors"]) as first:
        assert copy.config is not None
        assert first.config is not None
        for key in ("hidden_size", "num_hidden_layers", "vocab_size", "rope_theta", "rms_norm_eps", "hidden_act"):
            assert copy.config[key] == first.config[key], key
        assert copy.config["tie_word_embeddings"] is True
        mine, other = load_tokenizer(copy), load_tokenizer(first)
        assert dict(mine.special_ids) == dict(other.special_ids)
        assert mine.eos_ids == other.eos_ids == {317, 315}
        assert mine.chat_template == other.chat_template
        assert (mine.add_bos, mine.bos_id) == (other.add_bos, other.bos_id)
        for text in CORPUS:
            assert mine.encode(text) == other.encode(text)
            assert mine.encode(text, parse_special=True) == other.encode(text, parse_special=True)
        assert copy.metadata["apr.untrained"] == "true"


def test_a_chain_of_copies_comes_back_as_it_was(tiny: Path, tmp_path: Path) -> None:
    """SafeTensors to GGUF to APR to SafeTensors: a foreign tokenizer encodes alike, and the licence is still there."""
    path = tiny
    for step, container in enumerate(("gguf", "apr", "safetensors")):
        path = convert(path, named(tmp_path / f"{step}", container))
    before, after = (ForeignTokenizer.from_file(str(p / "tokenizer.json")) for p in (tiny, path))
    for text in CORPUS:
        assert before.encode(text).ids == after.encode(text).ids
    with open_checkpoint(path) as copy:
        assert copy.metadata["license"] == "MIT"
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == [317, 315]
    assert json.loads((path / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


def test_gguf_says_what_llama_cpp_asks_for(tiny: Path, tmp_path: Path) -> None:
    """The gguf package finds the keys of a Qwen2, with the types that llama.cpp insists on."""
    reader = gguf.GGUFReader(convert(tiny, tmp_path / "t.gguf"))
    found = {name: reader.fields[name].contents() for name in reader.fields if "tokens" not in name}
    expected = {
        "general.architecture": "qwen2",
        "general.name": "tiny",
        "general.quantization_version": 2,
        "qwen2.block_count": 2,
        "qwen2.embedding_length": 64,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.rope.freq_base": 1000000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": 317,
        "tokenizer.ggml.bos_token_id": 315,
        "tokenizer.ggml.padding_token_id": 315,
        "tokenizer.ggml.add_bos_token": False,
        "apr.untrained": "true",
        "source.license": "MIT",
    }
    assert expected == {key: found[key] for key in expected}
    kinds = found["tokenizer.ggml.token_type"]
    assert (kinds[0], kinds[315:318], kinds[318:]) == (1, [3, 3, 3], [5] * 5)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 323
    assert tokens[317:320] == ["<|im_end|>", "[PAD318]", "[PAD319]"]
    assert {t.tensor_type.name for t in reader.tensors if len(t.shape) == 1} == {"F32"}
    assert {t.tensor_type.name for t in reader.tensors if len(t.shape) == 2} == {"BF16"}


@pytest.mark.parametrize(("dtype", "torch_type"), [("F32", torch.float32), ("F16", torch.float16)])
@pytest.mark.parametrize("target", CONTAINERS)
def test_rounding_is_torch_rounding(
    dtype: str, torch_type: torch.dtype, target: str, tiny: Path, tmp_path: Path
) -> None:
    """Every value is the one that torch rounds to; vectors stay exact in GGUF."""
    found = foreign_tensors(convert(tiny, named(tmp_path / "t", target), quantize=dtype), target)
    naming = gguf_name if target == "gguf" else str
    for name, values in load_file(tiny / "model.safetensors").items():
        exact = target == "gguf" and values.ndim == 1
        expected = values.float() if exact else values.to(torch_type).float()
        np.testing.assert_array_equal(expected.numpy(), found[naming(name)], err_msg=name)


def test_bf16_of_f32_rounds_to_even(edited: Edit, tmp_path: Path) -> None:
    """From F32, the only type with something to round off, BF16 equals torch's."""
    folder = edited(lambda held: held.update({k: v.float() * 1.01 for k, v in held.items()}))
    found = foreign_tensors(convert(folder, tmp_path / "t.apr", quantize="BF16"), "apr")
    for name, values in load_file(folder / "model.safetensors").items():
        np.testing.assert_array_equal(values.bfloat16().float().numpy(), found[name], err_msg=name)


def test_q8_0_is_the_gguf_packages_q8_0(tiny: Path, tmp_path: Path) -> None:
    """Matrices hold the very bytes that the gguf package would have written; vectors are exact."""
    original = foreign_tensors(tiny, "safetensors")
    reader = gguf.GGUFReader(convert(tiny, tmp_path / "t.gguf", quantize="Q8_0"))
    held = {t.name: t for t in reader.tensors}
    for name, values in original.items():
        tensor = held[gguf_name(name)]
        if values.ndim == 1:
            np.testing.assert_array_equal(values, tensor.data)
        else:
            expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            np.testing.assert_array_equal(expected, tensor.data, err_msg=name)
    assert reader.fields["general.file_type"].contents() == 7


def test_rows_that_are_no_whole_blocks_fall_back_to_f16(tmp_path: Path) -> None:
    """A matrix of 63 columns has no Q8_0; it becomes F16 as in llama.cpp, never a padded row."""
    folder = tmp_path / "odd"
    folder.mkdir()
    held = {"model.embed_tokens.weight": torch.ones(3, 63), "other": torch.ones(3, 64)}
    save_file(held, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    with open_checkpoint(convert(folder, tmp_path / "t.gguf", quantize="Q8_0", bare=True)) as copy:
        assert {name: str(info.dtype) for name, info in copy.tensors.items()} == {
            "model.embed_tokens.weight": "F16",
            "other": "Q8_0",
        }


@pytest.mark.oracle
@pytest.mark.parametrize("recipe", ["Q8_0", "Q4_K_M", "Q6_K"])
def test_quantised_types_pass_through_gguf_and_decode_elsewhere(recipe: str, oracle: Path, tmp_path: Path) -> None:
    """In GGUF the stored bytes stay; SafeTensors refuses them, and in F32 holds the gguf package's values."""
    source = oracle / "mini" / "gguf" / f"{recipe}.gguf"
    kept = {t.name: t for t in gguf.GGUFReader(convert(source, tmp_path / "t.gguf")).tensors}
    with pytest.raises(UsageError, match=r"safetensors cannot hold Q\d_.*tensor .*ask for one of F32, F16, BF16"):
        convert(source, tmp_path / "t")
    decoded = foreign_tensors(convert(source, tmp_path / "t", quantize="F32"), "safetensors")
    for tensor in gguf.GGUFReader(source).tensors:
        assert kept[tensor.name].tensor_type == tensor.tensor_type
        np.testing.assert_array_equal(tensor.data, kept[tensor.name].data)
    values = foreign_tensors(source, "gguf")
    assert len(decoded) == len(values) == 38
    for name, found in decoded.items():
        np.testing.assert_array_equal(values[gguf_name(name)], found, err_msg=name)


@pytest.mark.parametrize("kind", ["AprQ4", "AprQ8"])
def test_types_without_rows_decode_whole(kind: str, tmp_path: Path) -> None:
    """AprQ4 is one flat stream and AprQ8 has one scale: their copies hold what the codec says, in F32."""
    dtype, shape = FORMATS[kind], (5, 7)
    data = np.random.default_rng(3).integers(0, 255, dtype.nbytes(shape), dtype=np.uint8)
    if kind == "AprQ8":
        data[:4] = np.frombuffer(struct.pack("<f", 0.01), np.uint8)
    else:
        data.reshape(-1, 18)[:, :2] = np.frombuffer(struct.pack("<e", 0.25), np.uint8)
    source = tmp_path / "s.apr"
    write_apr(source, [TensorSource("w", dtype, shape, lambda: [data])], {"hidden_size": 7})
    found = foreign_tensors(convert(source, tmp_path / "t", quantize="F32", bare=True), "safetensors")["w"]
    scale, start = (0.01, 4) if kind == "AprQ8" else (0.25, 2)
    first = data[start : start + 2].view(np.int8) * np.float32(scale)
    if kind == "AprQ4":
        first = (np.array([data[2] & 15, data[2] >> 4]).astype(np.float32) - 8) * np.float32(0.25)
    assert found.shape == shape
    np.testing.assert_allclose(found[0, :2], first, rtol=1e-6)
    with open_checkpoint(source) as opened:
        assert sum(chunk.size for chunk in decoded_chunks(opened, "w", 7)) == 35


def test_chunks_are_bounded_and_whole_rows(tiny: Path) -> None:
    """The embedding is never decoded at once: each chunk holds the rows that fit, in order."""
    with open_checkpoint(tiny) as opened:
        chunks = list(decoded_chunks(opened, "model.embed_tokens.weight", 64 * 10))
        whole = decode(opened.raw("model.embed_tokens.weight"))
        np.testing.assert_array_equal(whole, np.concatenate(chunks))
        assert [len(chunk) for chunk in chunks] == [10] * 32 + [3]
        assert [c.shape for c in decoded_chunks(opened, "model.norm.weight", 8)] == [(1, 64)]


def test_a_sharded_folder_becomes_one_file(tiny: Path, tmp_path: Path) -> None:
    """Shards are read through their index and written as one file."""
    folder = tmp_path / "shards"
    folder.mkdir()
    held = load_file(tiny / "model.safetensors")
    names = sorted(held)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in parts.items():
        save_file({n: held[n] for n in members}, folder / shard)
    index = {"weight_map": {n: shard for shard, members in parts.items() for n in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_bytes((tiny / "config.json").read_bytes())
    copy = convert(folder, tmp_path / "whole", bare=True)
    assert sorted(p.name for p in copy.iterdir()) == ["config.json", "model.safetensors"]
    with open_checkpoint(copy) as one, open_checkpoint(tiny) as other:
        assert compare_tensors(one, other, exact=True).mismatched == 0


@pytest.mark.parametrize("target", CONTAINERS)
def test_a_source_without_tokenizer_is_refused_unless_asked(target: str, edited: Edit, tmp_path: Path) -> None:
    """Nothing could talk to the copy; a bare one on request still names the end token."""
    folder = edited(drop=("tokenizer.json", "tokenizer_config.json", "generation_config.json"))
    with pytest.raises(LoadError, match="not be self-contained"):
        convert(folder, named(tmp_path / "t", target))
    with open_checkpoint(convert(folder, named(tmp_path / "t", target), bare=True)) as copy:
        assert copy.config is not None
        assert copy.config["eos_token_id"] == 317
        with pytest.raises(LoadError, match="no tokenizer"):
            load_tokenizer(copy)


def test_added_tokens_elsewhere_keep_their_ids(tiny: Path, edited: Edit, tmp_path: Path) -> None:
    """Control tokens with a hole before them: the foreign package would renumber them, so the model names them too."""
    document = json.loads((tiny / "tokenizer.json").read_text())
    moved = [{**token, "id": token["id"] + 2} for token in document["added_tokens"]]
    ends = {"eos_token_id": 319, "bos_token_id": 317}
    folder = edited(**{"tokenizer.json": {"added_tokens": moved}, "config.json": ends})
    first = convert(folder, tmp_path / "t.gguf")
    second = convert(first, tmp_path / "t")
    foreign = ForeignTokenizer.from_file(str(second / "tokenizer.json"))
    assert foreign.token_to_id("<|im_end|>") == 319
    assert foreign.encode("<|im_start|>a<|im_end|>").ids[0] == 318


def test_rope_parameters_of_transformers_5_reach_the_other_containers(edited: Edit, tmp_path: Path) -> None:
    """A rope_theta that stands one level deeper is not lost: without it a GGUF would run at another base."""
    rope = {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    folder = edited(**{"config.json": rope})
    for target in ("gguf", "apr"):
        with open_checkpoint(convert(folder, named(tmp_path / "t", target))) as copy:
            assert copy.config is not None
            assert copy.config["rope_theta"] == 5e5


def test_notes_never_become_configuration(tiny: Path, tmp_path: Path) -> None:
    """Free text of a hostile file keeps its place: it changes no alignment, no geometry and no tokenizer."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for path in tiny.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    hostile = {
        "general.alignment": "7",
        "general.architecture": "llama",
        "qwen2.block_count": "9",
        "n_embd": "7",
        "rope_scaling": '{"type": "yarn"}',
        "tokenizer.vocabulary": "x",
        "source_metadata": "y",
    }
    save_file(load_file(tiny / "model.safetensors"), folder / "model.safetensors", hostile)
    for target in ("gguf", "apr"):
        path = convert(folder, named(tmp_path / "t", target))
        with open_checkpoint(path) as copy, open_checkpoint(tiny) as first:
            assert compare_tensors(copy, first, exact=True).mismatched == 0
            assert copy.config is not None
            assert (copy.config["hidden_size"], copy.config["num_hidden_layers"]) == (64, 2)
            assert (copy.config["model_type"], "rope_scaling" in copy.config) == ("qwen2", False)
            assert load_tokenizer(copy).vocab_size == 318
        with open_checkpoint(convert(path, tmp_path / f"back-{target}")) as back:
            for key in ("n_embd", "rope_scaling", "source_metadata"):
                assert back.metadata[key] == hostile[key]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"normalizer": None}, "a normalizer"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "a pre-tokenizer"),
        ({"model": {"ignore_merges": True}}, "a model"),
        ({"added_tokens": {"lstrip": True}}, "an added token"),
    ],
)
def test_a_tokenizer_that_gguf_cannot_say_is_refused(
    change: dict[str, Any], what: str, tiny: Path, edited: Edit, tmp_path: Path
) -> None:
    """GGUF and APR would give other ids for the same text, in silence; SafeTensors takes it as it is."""
    document = json.loads((tiny / "tokenizer.json").read_text())
    for key, value in change.items():
        if key == "added_tokens":
            document[key][0] |= value
        else:
            document[key] = {**document[key], **value} if key == "model" else value
    folder = edited(drop=("tokenizer.json",))
    (folder / "tokenizer.json").write_text(json.dumps(document))
    for target in ("gguf", "apr"):
        with pytest.raises(LoadError, match=f"has {what} that is not Qwen2's"):
            convert(folder, named(tmp_path / "t", target))
    copy = convert(folder, tmp_path / "t")
    assert (copy / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_more_end_tokens_than_gguf_can_name_are_refused(edited: Edit, tmp_path: Path) -> None:
    """A copy that forgets an end token talks on where the original stops."""
    ends = {"eos_token_id": [317, 1, 2]}
    folder = edited(**{"config.json": ends, "generation_config.json": ends})
    with open_checkpoint(convert(folder, tmp_path / "three.gguf")) as copy:
        assert {1, 2, 317} <= load_tokenizer(copy).eos_ids
    ends = {"eos_token_id": [317, 1, 2, 3]}
    folder = edited(**{"config.json": ends, "generation_config.json": ends})
    with pytest.raises(LoadError, match="can name 3 end tokens"):
        convert(folder, tmp_path / "four.gguf")
    with open_checkpoint(convert(folder, tmp_path / "four.apr")) as copy:
        assert {1, 2, 3, 317} <= load_tokenizer(copy).eos_ids


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("t.onnx", None, "expected a target in .gguf, .apr, .safetensors or a folder, found .onnx"),
        ("t.gguf", "Q4_K", "for gguf, found 'Q4_K'"),
        ("t.gguf", "f16", "for gguf, found 'f16'"),
        ("t", "Q8_0", "expected a type of F32, F16, BF16 for safetensors, found 'Q8_0'"),
        ("t.apr", "Q8_0", "for apr, found 'Q8_0'"),
    ],
)
def test_unknown_format_or_type_is_a_usage_error(
    name: str, asked: str | None, message: str, tiny: Path, tmp_path: Path
) -> None:
    """What we do not write is refused by name, never silently something else."""
    with pytest.raises(UsageError, match=re.escape(message)):
        convert(tiny, tmp_path / name, quantize=asked)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", CONTAINERS)
def test_nothing_is_overwritten(target: str, tiny: Path, tmp_path: Path) -> None:
    """A target that exists, if only as a dangling link, is left alone."""
    place = named(tmp_path / "t", target)
    place.write_text("precious")
    with pytest.raises(UsageError, match="exists"):
        convert(tiny, place)
    assert place.read_text() == "precious"
    link = named(tmp_path / "link", target)
    link.symlink_to(tmp_path / "absent")
    with pytest.raises(UsageError, match="exists"):
        convert(tiny, link)


def test_missing_source_folder_and_configuration(tiny: Path, edited: Edit, tmp_path: Path) -> None:
    """Each missing thing has its own error: exit 3, 3 and 6."""
    with pytest.raises(NotFound):
        convert(tmp_path / "absent", tmp_path / "t.gguf")
    with pytest.raises(NotFound, match="no folder"):
        convert(tiny, tmp_path / "no" / "t.gguf")
    with pytest.raises(LoadError, match="no configuration"):
        convert(edited(drop=("config.json",)), tmp_path / "t.gguf")


def test_a_malformed_tokenizer_stops_the_conversion(edited: Edit, tmp_path: Path) -> None:
    """A tokenizer that is there and broken is an error: copying without it would look like success."""
    folder = edited()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(FormatError):
        convert(folder, tmp_path / "t.gguf")


@pytest.mark.parametrize("target", CONTAINERS)
def test_a_value_that_does_not_fit_is_refused_and_leaves_nothing(target: str, edited: Edit, tmp_path: Path) -> None:
    """70000 has no F16: an infinity in the copy would be refused by the contract, far from its cause."""

    def spoil(held: dict[str, torch.Tensor]) -> None:
        held["model.layers.1.mlp.down_proj.weight"][3, 5] = 70000.0

    folder = edited(spoil)
    with pytest.raises(UsageError, match=r"F16 cannot hold 70144 of tensor model\.layers\.1\.mlp\.down_proj\.weight"):
        convert(folder, named(tmp_path / "t", target), quantize="F16")
    assert [p.name for p in tmp_path.iterdir() if p != folder] == []


@pytest.mark.parametrize(("value", "fits"), [(65519.0, True), (65520.0, False), (-65520.0, False)])
def test_the_edge_of_f16(value: float, fits: bool, edited: Edit, tmp_path: Path) -> None:
    """65519 rounds to the largest F16; from 65520 on it would be infinite."""
    assert np.isfinite(encode(np.array([value], np.float32), FORMATS["F16"]).view(np.float16)[0]) == fits

    def spoil(held: dict[str, torch.Tensor]) -> None:
        held.clear()
        held["w"] = torch.full((1, 2), value)

    folder = edited(spoil)
    if fits:
        assert convert(folder, tmp_path / "t.apr", quantize="F16").is_file()
    else:
        with pytest.raises(UsageError, match="cannot hold"):
            convert(folder, tmp_path / "t.apr", quantize="F16")


@pytest.mark.parametrize("target", CONTAINERS)
def test_an_interrupted_conversion_leaves_nothing(target: str, tiny: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle: neither a half file nor a temporary one stays."""
    seen: list[int] = []

    def interrupt(written: int) -> None:
        seen.append(written)
        if written > 20000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tiny, named(tmp_path / "t", target), progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert seen == sorted(seen)


def test_copies_of_a_closed_source_are_not_made(tiny: Path, tmp_path: Path) -> None:
    """An opened checkpoint is used as it is and stays open; a closed one is refused."""
    with open_checkpoint(tiny) as opened:
        convert(opened, tmp_path / "a.gguf")
        assert opened.raw("model.norm.weight").data.size == 128
    with pytest.raises(UsageError, match="closed"):
        convert(opened, tmp_path / "b.gguf")
    assert not (tmp_path / "b.gguf").exists()


@pytest.mark.parametrize(
    ("name", "container"),
    [("a.gguf", "gguf"), ("A.GGUF", "gguf"), ("a.apr", "apr"), ("a.safetensors", "safetensors"), ("a", "safetensors"),
     ("qwen2.5-0.5b/", "safetensors")],
)  # fmt: skip
def test_the_name_says_the_container(name: str, container: str) -> None:
    """A suffix, or a folder; a dot in a folder's name needs the slash."""
    assert container_of(name) == container


def test_a_safetensors_file_gets_its_companions_beside_it(tiny: Path, tmp_path: Path) -> None:
    """A file target: weights and companions in one folder; companions of another model are in the way."""
    made = convert(tiny, tmp_path / "model.safetensors")
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in tiny.iterdir()}
    with open_checkpoint(made) as copy, open_checkpoint(tiny) as first:
        assert compare_tensors(copy, first, exact=True).mismatched == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"config\.json exists and says something else"):
        convert(tiny, other / "model.safetensors")
    assert [p.name for p in other.iterdir()] == ["config.json"]


@pytest.mark.parametrize("target", CONTAINERS)
def test_force_replaces_a_model_and_nothing_else(target: str, tiny: Path, tmp_path: Path) -> None:
    """An older copy gives way as a whole; a folder with a person's files, the source and a wrong kind do not."""
    place = convert(tiny, named(tmp_path / "t", target))
    convert(tiny, place, quantize="F32", force=True)
    with open_checkpoint(place) as copy:
        assert {str(info.dtype) for info in copy.tensors.values()} == {"F32"}
    assert [p.name for p in tmp_path.iterdir()] == [place.name]
    with pytest.raises(UsageError, match="is what is being read"):
        convert(place, place, force=True)
    if target == "safetensors":
        (place / "diary.txt").write_text("dear")
        with pytest.raises(UsageError, match=r"more than a model \(diary\.txt\)"):
            convert(tiny, place, force=True)
        assert (place / "diary.txt").read_text() == "dear"
    else:
        (tmp_path / f"d.{target}").mkdir()
        with pytest.raises(UsageError, match="not of the kind"):
            convert(tiny, tmp_path / f"d.{target}", force=True)


def test_vectors_come_back_as_they_were(tiny: Path, tmp_path: Path) -> None:
    """GGUF has BF16 vectors in F32; a chain through it ends with the very bytes of the source."""
    path = tiny
    for step, container in enumerate(("gguf", "apr", "safetensors")):
        path = convert(path, named(tmp_path / str(step), container))
    before, after = load_file(tiny / "model.safetensors"), load_file(path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert values.dtype == after[name].dtype == torch.bfloat16
        assert torch.equal(values.view(torch.int16), after[name].view(torch.int16)), name


def test_vectors_that_changed_in_gguf_stay_f32(tiny: Path, tmp_path: Path) -> None:
    """A note of what vectors once were is no reason to round them."""
    first = convert(tiny, tmp_path / "a.gguf")
    with open_checkpoint(first) as opened:
        metadata = {key: opened.metadata[key] for key in opened.metadata}
        sources = []
        for name, info in opened.tensors.items():
            data = opened.raw(name).data.copy()
            if name == "model.norm.weight":
                data.view(np.float32)[3] += np.float32(1e-6)
            sources.append(TensorSource(name, info.dtype, info.shape, lambda data=data: [data]))
        write_gguf(tmp_path / "b.gguf", sources, metadata)
    with open_checkpoint(convert(tmp_path / "b.gguf", tmp_path / "back")) as back:
        types = {name: str(info.dtype) for name, info in back.tensors.items()}
    assert types.pop("model.norm.weight") == "F32"
    assert set(types.values()) == {"BF16"}


def test_what_was_written_is_held_against_what_was_asked(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that stores another type than asked leaves no file behind: 205 widened to F32 in silence."""
    real = convert_room.write_gguf

    def widening(path: Path, sources: list[TensorSource], metadata: dict[str, object], **rest: object) -> None:
        wide = [
            TensorSource(s.name, FORMATS["F32"], s.shape, lambda s=s: [np.zeros(s.shape, np.float32)]) for s in sources
        ]
        real(path, wide, metadata, **rest)

    monkeypatch.setattr(convert_room, "write_gguf", widening)
    with pytest.raises(LoadError, match="not what was asked"):
        convert(tiny, tmp_path / "t.gguf", quantize="F16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("target", ["t.gguf", "t.apr", "t"])
def test_a_signal_in_the_middle_leaves_nothing(signal_name: str, target: str, tiny: Path, tmp_path: Path) -> None:
    """The command line's own process, struck by a signal half way: no target, no stump, the shell's exit code."""
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background inherits it ignored
        "from apr_core.rosetta import convert as room\n"
        "from apr_core.formats import sink\n"
        "write = sink.Sink.write_tensor\n"
        "def struck(self, source):\n"
        "    write(self, source)\n"
        f"    if self.position > 20000: os.kill(os.getpid(), signal.{signal_name})\n"
        "sink.Sink.write_tensor = struck\n"
        f"sys.argv = ['apr', 'convert', {str(tiny)!r}, {str(tmp_path / target)!r}, '--quantize', 'F16']\n"
        "from apr_core.cli.app import main\n"
        "sys.exit(main())\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=120)
    assert ran.returncode == {"SIGINT": 130, "SIGTERM": 143}[signal_name], ran.stderr
    assert list(tmp_path.iterdir()) == []

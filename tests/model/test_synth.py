"""Untrained models: exact shapes and types, repeatable bytes, files that others can read and the contract admits."""

from __future__ import annotations

import errno
import json
from itertools import islice
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer as ForeignTokenizer

from apr_core.contract.admit import admit
from apr_core.dtypes import FORMATS
from apr_core.errors import LoadError, NotFound, ReadWriteError, UsageError
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.formats.codecs import decode, decode_bytes, encode
from apr_core.formats.names import gguf_name
from apr_core.model import synth
from apr_core.model.synth import CHUNK, CONTAINERS, SHAPES, Planned, plan, synthesise
from apr_core.model.synth_blocks import DRAWS, draw
from apr_core.model.synth_tokenizer import CONTROL_TOKENS, byte_tokens, generate_tokenizer
from apr_core.model.tokens import load_tokenizer, prepare_tokens

HALF, ONE_AND_HALF, SEVEN = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "qwen2.5-coder-7b"
KINDS = [(container, dtype) for container, dtypes in CONTAINERS.items() for dtype in dtypes]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A pygmy-shaped model in every container and type, seed 7."""
    folder = tmp_path_factory.mktemp("tiny")
    return {
        (container, dtype): synthesise(
            "pygmy", format=container, dtype=dtype, seed=7, out=folder / f"{container}-{dtype}.model"
        )
        for container, dtype in KINDS
    }


@pytest.mark.parametrize(
    ("shape", "container", "dtype", "count", "nbytes"),
    [
        # 2 bytes for each of the 494,032,768 parameters that the model card states
        (HALF, "safetensors", "bf16", 290, 2 * 494_032_768),
        # bytes per token of shared/spec/gpu.md 2.2 (measured on llama.cpp's files), less the one row it reads twice
        (HALF, "gguf", "q4_k_m", 290, 391_860_664 - 952),
        (HALF, "gguf", "q8_0", 290, 525_120_952 - 952),
        (HALF, "gguf", "bf16", 290, 988_210_432 - 2 * 896),
        (ONE_AND_HALF, "gguf", "q4_k_m", 338, 980_098_796 - 1260),
        (ONE_AND_HALF, "gguf", "q8_0", 338, 1_640_623_712 - 1632),
        (ONE_AND_HALF, "gguf", "bf16", 338, 3_087_721_472 - 2 * 1536),
        # untied: the embedding is not read whole, and the head is a tensor of its own
        (SEVEN, "gguf", "q4_k_m", 339, 4_370_560_992 - 2016 + 152064 * 2016),
        (SEVEN, "gguf", "q8_0", 339, 7_513_515_744 - 3808 + 152064 * 3808),
        (SEVEN, "safetensors", "bf16", 339, 2 * 7_615_616_512),
        ("pygmy", "safetensors", "f32", 26, 4 * 1_837_312),
    ],
)
def test_plan_has_the_bytes_of_the_published_files(
    shape: str, container: str, dtype: str, count: int, nbytes: int
) -> None:
    """Tensor counts and weight bytes equal those of the published models, without writing gigabytes."""
    planned = plan(shape, format=container, dtype=dtype)
    assert (count, nbytes) == (len(planned), sum(tensor.nbytes for tensor in planned))


_MORE_24 = {0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23}
_MORE_28 = {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27}


@pytest.mark.parametrize(
    ("shape", "more", "table"),
    [
        (HALF, _MORE_24, {"base": "Q5_0", "v": ("Q5_0", "Q8_0"), "down": ("Q4_K", "Q6_K"), "embed": "Q8_0"}),
        (ONE_AND_HALF, _MORE_28, {"base": "Q4_K", "v": ("Q4_K", "Q6_K"), "down": ("Q4_K", "Q6_K"), "embed": "Q6_K"}),
        (SEVEN, _MORE_28, {"base": "Q4_K", "v": ("Q4_K", "Q6_K"), "down": ("Q4_K", "Q6_K"), "embed": "Q4_K"}),
    ],
)
def test_q4_k_m_types_are_llama_cpps(shape: str, more: set[int], table: dict[str, object]) -> None:
    """Every tensor's type equals the table of shared/spec/gpu.md 2.1, layer by layer."""
    expected: dict[str, object] = {"model.embed_tokens.weight": table["embed"], "model.norm.weight": "F32"}
    if not SHAPES[shape].geometry.tied:
        expected["lm_head.weight"] = "Q6_K"
    for n in range(SHAPES[shape].geometry.num_hidden_layers):
        at = f"model.layers.{n}."
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"):
            expected[f"{at}{name}.weight"] = table["base"]
        expected[f"{at}self_attn.v_proj.weight"] = table["v"][n in more]
        expected[f"{at}mlp.down_proj.weight"] = table["down"][n in more]
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            expected[at + name] = "F32"
        for letter in "qkv":
            expected[f"{at}self_attn.{letter}_proj.bias"] = "F32"
    assert expected == {t.name: str(t.dtype) for t in plan(shape, format="gguf", dtype="q4_k_m")}


@pytest.mark.parametrize(
    ("shape", "container", "dtype", "found"),
    [
        ("pygmi", "gguf", "f32", "pygmi"),
        ("pygmy", "apr", "f32", "apr"),
        ("pygmy", "gguf", "q4_0", "q4_0"),
        ("pygmy", "safetensors", "q8_0", "safetensors cannot hold q8_0"),
    ],
)
def test_what_cannot_be_planned_is_named(shape: str, container: str, dtype: str, found: str) -> None:
    """An unknown word, or a type that the container cannot hold, is a usage error that quotes it."""
    with pytest.raises(UsageError, match=found):
        plan(shape, format=container, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_files_are_admitted_whole(tiny: dict[tuple[str, str], Path], kind: tuple[str, str]) -> None:
    """The contract admits every kind, with all tensors measured and the types that were planned."""
    admission = admit(tiny[kind])
    planned = plan("pygmy", format=kind[0], dtype=kind[1])
    assert (admission.refusal, admission.expected, admission.measured) == (None, 26, 26)
    stored = {t.name: (t.dtype, t.shape) for t in admission.checkpoint.tensors.values()}
    assert {t.name: (t.dtype, t.shape) for t in planned} == stored
    assert admission.checkpoint.gaps == ()


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_files_say_that_they_are_untrained(tiny: dict[tuple[str, str], Path], kind: tuple[str, str]) -> None:
    """The mark and the seed are in the file itself, where a copy keeps them."""
    metadata = open_checkpoint(tiny[kind]).metadata
    assert (str(metadata["apr.untrained"]).lower(), str(metadata["apr.seed"])) == ("true", "7")


def test_safetensors_package_reads_the_same_values(tiny: dict[tuple[str, str], Path]) -> None:
    """The reference implementation finds every tensor, with the shapes planned and values as ours decodes them."""
    path = tiny["safetensors", "f32"]
    checkpoint = open_checkpoint(path)
    with safe_open(path / "model.safetensors", framework="numpy") as theirs:
        assert sorted(checkpoint.tensors) == sorted(theirs.keys())
        assert theirs.metadata()["format"] == "pt"
        for name in checkpoint.tensors:
            np.testing.assert_array_equal(theirs.get_tensor(name), decode(checkpoint.raw(name)))


@pytest.mark.parametrize("dtype", ["q8_0", "q4_k_m"])
def test_gguf_package_reads_the_same_values(tiny: dict[tuple[str, str], Path], dtype: str) -> None:
    """The gguf package finds every tensor in the type planned, and decodes the same bits."""
    checkpoint = open_checkpoint(tiny["gguf", dtype])
    theirs = {t.name: t for t in gguf.GGUFReader(tiny["gguf", dtype]).tensors}
    assert {gguf_name(name) for name in checkpoint.tensors} == set(theirs)
    for name, info in checkpoint.tensors.items():
        tensor = theirs[gguf_name(name)]
        assert str(info.dtype) == tensor.tensor_type.name
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(info.shape)
        np.testing.assert_array_equal(values, decode(checkpoint.raw(name)))


@pytest.mark.parametrize("name", [*DRAWS, "F32", "F16", "BF16"])
def test_draws_are_normal_around_zero(name: str) -> None:
    """Decoded by the gguf package, every type has the standard deviation asked for and no value far from normal."""
    elements, std = 1 << 16, 0.02
    stored = draw(np.random.default_rng(3), FORMATS[name], elements, mean=0.0, std=std)
    assert FORMATS[name].nbytes((elements,)) == stored.nbytes
    values = gguf.dequantize(stored, gguf.GGMLQuantizationType[name]).reshape(-1).astype(np.float64)
    assert values.std() == pytest.approx(std, rel=0.05)
    assert values.mean() == pytest.approx(0.0, abs=std / 40)
    within = np.mean(np.abs(values) < std)
    assert within == pytest.approx(0.68, abs=0.04)  # the share of a normal distribution within one deviation


@pytest.mark.parametrize("name", DRAWS)
def test_drawn_blocks_use_what_their_type_has(name: str) -> None:
    """Codes reach most of their range, scales differ from block to block: a decoder's every branch is exercised."""
    stored = draw(np.random.default_rng(3), FORMATS[name], 1 << 16, mean=0.0, std=0.02)
    blocks = stored.reshape(-1, FORMATS[name].block_bytes)
    used = [len(np.unique(blocks[:, k])) for k in range(blocks.shape[1])]
    assert min(used) >= 2  # the upper byte of a float16 scale takes few values
    assert np.median(used) > 60
    values = decode_bytes(FORMATS[name], stored, (1 << 16,))
    assert len(np.unique(values)) > 1000


def test_what_nothing_draws_is_refused() -> None:
    """A type without a draw is an error, not a tensor of zeros."""
    with pytest.raises(UsageError, match="Q2_K"):
        draw(np.random.default_rng(0), FORMATS["Q2_K"], 256, mean=0.0, std=1.0)


@pytest.mark.parametrize(("container", "dtype"), [("safetensors", "bf16"), ("gguf", "q4_k_m")])
def test_a_seed_is_a_file(tiny: dict[tuple[str, str], Path], tmp_path: Path, container: str, dtype: str) -> None:
    """The same seed gives the same bytes, another seed others in every tensor."""
    same = synthesise("pygmy", format=container, dtype=dtype, seed=7, out=tmp_path / "same")
    other = synthesise("pygmy", format=container, dtype=dtype, seed=8, out=tmp_path / "other")
    first, again, changed = (open_checkpoint(path) for path in (tiny[container, dtype], same, other))
    assert first.content_hash == again.content_hash
    for name in first.tensors:
        assert not np.array_equal(first.raw(name).data, changed.raw(name).data), name


def test_plain_types_hold_the_same_numbers(tiny: dict[tuple[str, str], Path]) -> None:
    """F16 and BF16 files are roundings of the F32 file of their seed, in either container."""
    exact = open_checkpoint(tiny["safetensors", "f32"])
    for container, dtype in (("safetensors", "bf16"), ("safetensors", "f16"), ("gguf", "f16")):
        rounded = open_checkpoint(tiny[container, dtype])
        for name, info in rounded.tensors.items():
            np.testing.assert_array_equal(encode(decode(exact.raw(name)), info.dtype), rounded.raw(name).data)


def test_tensors_do_not_depend_on_the_order_of_writing(tiny: dict[tuple[str, str], Path]) -> None:
    """A tensor drawn alone equals the one in the file; so do two passes over one source."""
    checkpoint = open_checkpoint(tiny["gguf", "q8_0"])
    last = plan("pygmy", format="gguf", dtype="q8_0")[-2]
    source = synth._source(last, 7)
    for _ in range(2):
        np.testing.assert_array_equal(np.concatenate(list(source.chunks())), checkpoint.raw(last.name).data)


def test_no_two_tensors_are_alike(tiny: dict[tuple[str, str], Path]) -> None:
    """Each tensor has its own stream: layers that repeat each other would hide a swapped pair."""
    checkpoint = open_checkpoint(tiny["safetensors", "bf16"])
    starts = {checkpoint.raw(name).data[:64].tobytes() for name in checkpoint.tensors}
    assert len(starts) == 26


def test_big_tensors_come_in_small_pieces() -> None:
    """The 7B embedding (544 million weights) is drawn in chunks of a few megabytes: nobody needs its memory."""
    embedding = plan(SEVEN, format="safetensors", dtype="f32")[0]
    pieces = [piece.nbytes for piece in islice(synth._source(embedding, 0).chunks(), 2)]
    assert pieces == [4 * CHUNK, 4 * CHUNK]


def test_a_tensor_that_is_no_whole_number_of_chunks_is_complete() -> None:
    """The last chunk is as long as what is left."""
    tensor = Planned("odd", (CHUNK + 32, 2), FORMATS["Q8_0"], 0.0, 1.0)
    sizes = [piece.nbytes for piece in synth._source(tensor, 0).chunks()]
    assert sizes == [34 * CHUNK // 32, 34 * CHUNK // 32, 34 * 2]


def test_distributions_are_plausible(tiny: dict[tuple[str, str], Path]) -> None:
    """Norms near 1, biases of deviation 0.3 around 0, each matrix between 0.02 and 0.05."""
    checkpoint = open_checkpoint(tiny["safetensors", "f32"])
    pools: dict[str, list[np.ndarray]] = {"norm.weight": [], "bias": []}
    for name in checkpoint.tensors:
        values = decode(checkpoint.raw(name)).astype(np.float64)
        kind = next((kind for kind in pools if name.endswith(kind)), "")
        if kind:
            pools[kind].append(values)
        else:
            assert 0.02 <= 1.01 * values.std() <= 0.0515, name
    norms, biases = (np.concatenate(pools[kind]) for kind in pools)
    assert (norms.mean(), norms.std()) == pytest.approx((1.0, 0.1), rel=0.1)
    assert (biases.mean(), biases.std()) == pytest.approx((0.0, 0.3), abs=0.03)


@pytest.mark.parametrize("container", CONTAINERS)
def test_generated_tokenizers_load(tiny: dict[tuple[str, str], Path], container: str) -> None:
    """Both containers carry the same tokenizer: 1016 tokens and 3 control tokens, ChatML, and both end tokens."""
    tokenizer = load_tokenizer(open_checkpoint(tiny[container, "f16"]))
    assert (1019, frozenset({1016, 1018})) == (tokenizer.vocab_size, tokenizer.eos_ids)
    prepared = prepare_tokens(tokenizer, messages=[{"role": "user", "content": "babe é 7"}])
    assert prepared.text is not None
    assert prepared.text.endswith("<|im_start|>user\nbabe é 7<|im_end|>\n<|im_start|>assistant\n")
    assert [i for i in prepared.ids.tolist() if i == 1017] == [1017, 1017, 1017]
    assert prepared.text == tokenizer.decode(prepared.ids, skip_special=False)


def test_generated_tokens_are_what_their_text_encodes_to() -> None:
    """At full size, every sampled token is reached by its own text: no merge is dead."""
    document, _ = generate_tokenizer(151643, 22, context=32768)
    foreign = ForeignTokenizer.from_str(json.dumps(document))
    assert foreign.get_vocab_size() == 151643 + 22
    tokens = {i: token for token, i in document["model"]["vocab"].items()}
    assert list(range(151643)) == sorted(tokens)
    for i in [*range(256, 151643, 97), 151642]:
        assert [i] == foreign.encode(tokens[i].replace("Ġ", " ")).ids


def test_layout_is_that_of_the_vendor(oracle: Path) -> None:
    """Byte tokens, control tokens, their ids and flags, and the pipeline around them equal Qwen2.5-Coder's."""
    vendor = json.loads((oracle / "qwen2.5-coder" / "tokenizer.json").read_text(encoding="utf-8"))
    document, settings = generate_tokenizer(151643, len(CONTROL_TOKENS), context=32768)
    assert vendor["added_tokens"] == document["added_tokens"]
    assert list(vendor["model"]["vocab"])[:256] == byte_tokens()
    assert [vendor[k] for k in ("normalizer", "pre_tokenizer", "decoder")] == [
        document[k] for k in ("normalizer", "pre_tokenizer", "decoder")
    ]
    assert len(vendor["model"]["merges"]) == len(document["model"]["merges"])
    theirs = json.loads((oracle / "qwen2.5-coder" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert theirs["added_tokens_decoder"] == settings["added_tokens_decoder"]


@pytest.mark.parametrize(("base", "control"), [(255, 3), (2_000_000, 3), (1016, 2), (1016, 23)])
def test_impossible_vocabularies_are_refused(base: int, control: int) -> None:
    """Fewer tokens than bytes, more than there are words, too few or too many control tokens."""
    with pytest.raises(UsageError, match=f"{base} tokens and {control} control"):
        generate_tokenizer(base, control, context=10)


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_given_tokenizer_is_taken_over(oracle: Path, tmp_path: Path, container: str) -> None:
    """With a folder given, ids are those of that tokenizer and the config names its end tokens."""
    out = synthesise("pygmy", format=container, dtype="f16", tokenizer=oracle / "mini", out=tmp_path / "taken")
    with open_checkpoint(out) as checkpoint, open_checkpoint(oracle / "mini") as source:
        ours, theirs = load_tokenizer(checkpoint), load_tokenizer(source)
        assert checkpoint.config is not None
        assert (checkpoint.config["bos_token_id"], checkpoint.config["eos_token_id"]) == (1016, 1018)
    text = "def main():\n    return 42  # größer"
    assert theirs.encode(text) == ours.encode(text)
    assert (theirs.chat_template, theirs.vocab_size) == (ours.chat_template, ours.vocab_size)


@pytest.mark.parametrize("container", CONTAINERS)
def test_without_a_tokenizer_there_is_none(tmp_path: Path, container: str) -> None:
    """None means none: text is refused, the config still names the ids of the layout."""
    checkpoint = open_checkpoint(
        synthesise("pygmy", format=container, dtype="bf16", tokenizer=None, out=tmp_path / "bare")
    )
    with pytest.raises(LoadError, match="no tokenizer"):
        load_tokenizer(checkpoint)
    assert checkpoint.config is not None
    assert (checkpoint.config["vocab_size"], checkpoint.config["eos_token_id"]) == (1024, 1018)


def _tokenizer_folder(folder: Path, document: str, settings: str = "{}") -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(document, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("document", "error", "found"),
    [
        ("{", LoadError, "tokenizer.json"),
        ("[]", LoadError, "byte-level BPE"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}}, "added_tokens": []}', LoadError, "endoftext"),
        (
            '{"model": {"type": "Unigram", "vocab": {}}, "added_tokens": '
            '[{"content": "<|endoftext|>", "id": 1}, {"content": "<|im_end|>", "id": 2}]}',
            LoadError,
            "Unigram",
        ),
        (
            '{"model": {"type": "BPE", "vocab": {"a": 1024}}, "added_tokens": '
            '[{"content": "<|endoftext|>", "id": 1}, {"content": "<|im_end|>", "id": 2}]}',
            UsageError,
            "ids up to 1024, the embedding 1024 rows",
        ),
    ],
)
def test_unusable_tokenizers_are_refused(tmp_path: Path, document: str, error: type[Exception], found: str) -> None:
    """A given tokenizer that cannot be used is an error before anything is written."""
    folder = _tokenizer_folder(tmp_path / "given", document)
    with pytest.raises(error, match=found):
        synthesise("pygmy", format="gguf", dtype="f16", tokenizer=folder, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_a_base_models_tokenizer_stays_without_a_template(tmp_path: Path) -> None:
    """No template is invented, and merges written as text are taken as well as pairs."""
    document = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
        "added_tokens": [
            {"content": "<|endoftext|>", "id": 3, "special": True},
            {"content": "<|im_end|>", "id": 4, "special": True},
        ],
    }
    folder = _tokenizer_folder(tmp_path / "given", json.dumps(document))
    out = synthesise("pygmy", format="gguf", dtype="q8_0", tokenizer=folder, out=tmp_path / "out")
    tokenizer = load_tokenizer(open_checkpoint(out))
    assert (tokenizer.chat_template, tokenizer.encode("abba")) == (None, [2, 1, 0])


def test_a_folder_without_a_tokenizer_is_not_found(tmp_path: Path) -> None:
    """The missing file is named."""
    with pytest.raises(NotFound, match=r"tokenizer\.json"):
        synthesise("pygmy", format="gguf", dtype="f16", tokenizer=tmp_path, out=tmp_path / "out")


@pytest.mark.parametrize("container", CONTAINERS)
def test_nothing_is_overwritten(tmp_path: Path, container: str) -> None:
    """An existing target, or a dangling link of that name, is refused and left alone."""
    (tmp_path / "there").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("there", "link"):
        with pytest.raises(UsageError, match="exists"):
            synthesise("pygmy", format=container, dtype="bf16", out=tmp_path / name)
    assert (tmp_path / "there").read_text() == "mine"


def test_bad_seeds_and_folders_are_refused(tmp_path: Path) -> None:
    """A negative seed is a usage error, a folder that is not there is not found; neither is made."""
    with pytest.raises(UsageError, match="seed"):
        synthesise("pygmy", format="gguf", dtype="bf16", seed=-1, out=tmp_path / "x")
    with pytest.raises(NotFound, match="no folder"):
        synthesise("pygmy", format="gguf", dtype="bf16", out=tmp_path / "no" / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("container", CONTAINERS)
def test_an_interrupt_leaves_nothing(tmp_path: Path, container: str) -> None:
    """Ctrl-C in the middle of writing leaves neither the target nor a temporary file."""

    def stop(done: int) -> None:
        if done > 1_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesise("pygmy", format=container, dtype="bf16", out=tmp_path / "x", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_and_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the operating system becomes ours, and the half-written folder goes."""

    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ReadWriteError, match="No space left"):
        synthesise("pygmy", format="safetensors", dtype="bf16", out=tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("container", CONTAINERS)
def test_progress_reaches_the_end(tmp_path: Path, container: str) -> None:
    """The numbers grow to the size of the weights and the header before them."""
    seen: list[int] = []
    synthesise("pygmy", format=container, dtype="f16", out=tmp_path / "x", progress=seen.append)
    weights = sum(t.nbytes for t in plan("pygmy", format=container, dtype="f16"))
    assert sorted(seen) == seen
    assert weights < seen[-1] < weights + 100_000

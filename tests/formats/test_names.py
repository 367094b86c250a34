"""Names and configuration keys at the border; the gguf package's own tables are the witness."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apr_core.dtypes import FORMATS
from apr_core.formats import names
from apr_core.formats.architectures import load_roles
from apr_core.formats.checkpoint import TensorInfo

CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 263,
    "max_position_embeddings": 512,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 5,
    "bos_token_id": 4,
    "use_sliding_window": False,
    "sliding_window": 4096,
}


def info(name: str, shape: tuple[int, ...] = (263, 64)) -> TensorInfo:
    """Make a tensor to be named."""
    return TensorInfo(name, FORMATS["F32"], shape, Path("f"), 0, 0, name)


def test_table_equals_the_gguf_package() -> None:
    """Every Hugging Face tensor of Qwen2 and Qwen3 gets the name that the gguf package's map gives it, and back."""
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 3)
    bare = ["model.embed_tokens", "model.norm", "lm_head"]
    layer = [role.hf.replace("{n}", "2").rsplit(".", 1)[0] for role in load_roles().values() if role.per_layer]
    for name in bare + sorted(set(layer)):
        for suffix in ("weight", "bias"):
            full = f"{name}.{suffix}"
            if names.gguf_name(full) != full:
                assert names.gguf_name(full) == f"{mapping.get_name(name)}.{suffix}"
                assert names.hf_name(names.gguf_name(full)) == full
    assert len(layer) == 15


@given(st.text(max_size=30))
def test_unknown_names_stay(name: str) -> None:
    """A name outside the table passes through both ways; a translated one comes back."""
    for there, back in ((names.hf_name, names.gguf_name), (names.gguf_name, names.hf_name)):
        assert there(name) in (name, there(name))
        if there(name) != name:
            assert back(there(name)) == name


@pytest.mark.parametrize(
    "name",
    [
        "rope_freqs.weight",
        "blk.01.attn_q.weight",
        "blk.٣.attn_q.weight",
        "blk.0.attn_q.weight ",
        "blk.-1.ffn_up.weight",
        "model.layers.00.mlp.up_proj.weight",
        "blk.0.attn_qkv.weight",
        "xblk.0.attn_q.weight",
        "output.bias",
    ],
)
def test_near_misses_are_other_names(name: str) -> None:
    """Leading zeros, other digits and trailing spaces are not other spellings of a known name."""
    assert names.hf_name(name) == names.gguf_name(name) == name


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("norm.weight", "model.norm.weight"),
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("layers.3.self_attn.q_proj.bias", "model.layers.3.self_attn.q_proj.bias"),
        ("blk.3.attn_q.bias", "model.layers.3.self_attn.q_proj.bias"),
        ("output.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("something.else", "something.else"),
    ],
)
def test_apr_styles(stored: str, expected: str) -> None:
    """All three styles of APR files have one canonical name."""
    assert names.apr_canonical(stored) == expected


def test_config_survives_gguf() -> None:
    """A configuration written to GGUF keys and read back is the same, but for what is not in use."""
    metadata = names.gguf_metadata(CONFIG)
    assert names.config_from_gguf(metadata, [info("model.embed_tokens.weight")]) == {
        key: value for key, value in CONFIG.items() if key != "sliding_window"
    }


def test_gguf_types_are_llama_cpps() -> None:
    """An integral rope_theta becomes a float and counts stay integers: llama.cpp refuses the file otherwise."""
    metadata = names.gguf_metadata(CONFIG | {"eos_token_id": [7, 8]})
    assert type(metadata["qwen2.rope.freq_base"]) is float
    assert type(metadata["qwen2.block_count"]) is int
    assert metadata["tokenizer.ggml.eos_token_id"] == 7
    groups = [vars(group) for group in vars(gguf.Keys).values() if isinstance(group, type)]
    known = {value for group in groups for value in group.values() if isinstance(value, str)}
    assert {key.replace("qwen2.", "{arch}.") for key in metadata} - known == set()


def test_sliding_window_in_use() -> None:
    """A window that is in use travels and comes back marked as in use, so that a loader can refuse it."""
    metadata = names.gguf_metadata(CONFIG | {"use_sliding_window": True})
    assert metadata["qwen2.attention.sliding_window"] == 4096
    config = names.config_from_gguf(metadata, [])
    assert (config["use_sliding_window"], config["sliding_window"]) == (True, 4096)


@pytest.mark.parametrize("spelling", ["rope_type", "type"])
def test_rope_scaling(spelling: str) -> None:
    """rope_scaling travels through GGUF in both spellings of its type; ``none`` is no scaling."""
    scaling = {spelling: "yarn", "factor": 4, "original_max_position_embeddings": 32768}
    metadata = names.gguf_metadata(CONFIG | {"rope_scaling": scaling})
    assert names.config_from_gguf(metadata, [])["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    }
    metadata["qwen2.rope.scaling.type"] = "none"
    assert "rope_scaling" not in names.config_from_gguf(metadata, [])


def test_vocab_size_sources() -> None:
    """The architecture's key, else the rows of the embedding (it may be padded), else the tokens, else nothing."""
    base = {"general.architecture": "qwen2"}
    tokens = base | {"tokenizer.ggml.tokens": ["a", "b"]}
    embedding = [info("model.embed_tokens.weight", (9, 4))]
    assert names.config_from_gguf(tokens | {"qwen2.vocab_size": 5}, embedding)["vocab_size"] == 5
    assert names.config_from_gguf(tokens, embedding)["vocab_size"] == 9
    assert names.config_from_gguf(base, embedding)["vocab_size"] == 9
    assert names.config_from_gguf(tokens, [])["vocab_size"] == 2
    assert "vocab_size" not in names.config_from_gguf(base, [])


def test_head_is_tied_when_absent() -> None:
    """GGUF and APR say it by leaving the tensor out."""
    base = {"general.architecture": "qwen2"}
    assert names.config_from_gguf(base, [])["tie_word_embeddings"] is True
    assert names.config_from_gguf(base, [info("lm_head.weight")])["tie_word_embeddings"] is False
    assert names.config_from_apr({"n_embd": 4}, ["lm_head.weight"])["tie_word_embeddings"] is False


@pytest.mark.parametrize("metadata", [{}, {"general.architecture": 3}, {"general.architecture": ""}])
def test_gguf_without_architecture(metadata: dict[str, object]) -> None:
    """Without an architecture there is no configuration, and nothing is guessed."""
    assert names.config_from_gguf(metadata, []) is None


def test_missing_keys_stay_missing() -> None:
    """A missing rope_theta is not filled in (Bug 210: a silent 10000)."""
    config = names.config_from_gguf({"general.architecture": "qwen2", "qwen2.attention.head_count": 4}, [])
    assert "rope_theta" not in config
    assert config["num_key_value_heads"] == 4


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(float(np.float32(1e-6)), 1e-6), (1e6, 1e6), (0.1, 0.1), (1e300, 1e300), (float(np.float32(0.1)), 0.1)],
)
def test_float32_is_read_as_its_shortest_decimal(stored: float, expected: float) -> None:
    """A float32 comes back as the number that a person wrote; a true float64 is left alone."""
    metadata = {"general.architecture": "q", "q.attention.layer_norm_rms_epsilon": stored}
    assert names.config_from_gguf(metadata, [])["rms_norm_eps"] == expected


@pytest.mark.parametrize(("key", "spellings"), names._APR_KEYS.items())
def test_apr_aliases(key: str, spellings: tuple[str, ...]) -> None:
    """Every alias is accepted, a null counts as missing."""
    for spelling in spellings:
        nulls = dict.fromkeys(spellings)
        assert names.config_from_apr(nulls | {spelling: 7}, [])[key] == 7
    assert names.config_from_apr(dict.fromkeys(spellings), []) is None


def test_config_survives_apr() -> None:
    """A configuration written as APR metadata and read back is the same; APR's own keys are used."""
    metadata = names.apr_metadata(CONFIG)
    assert (metadata["num_layers"], metadata["num_kv_heads"], metadata["architecture"]) == (2, 2, "qwen2")
    assert (metadata["rope_type"], metadata["tied_embeddings"]) == (2, True)
    assert names.config_from_apr(metadata, ["model.embed_tokens.weight"]) == CONFIG
    untied = names.apr_metadata({"hidden_size": 4, "tie_word_embeddings": False})
    assert "tied_embeddings" not in untied


def test_apr_defaults() -> None:
    """Key-value heads default to the heads; the model type comes from either key."""
    config = names.config_from_apr({"n_heads": 4, "model_type": "qwen2", "architecture": None}, [])
    assert (config["num_key_value_heads"], config["model_type"]) == (4, "qwen2")
    assert "model_type" not in names.config_from_apr({"n_heads": 4}, [])

"""Qwen2Config: what it reads, what it refuses by name, and the gate in front of every forward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from apr_core.errors import InferenceError, LoadError
from apr_core.model.config import Qwen2Config, token_ids
from tests.model.conftest import tiny_config


def test_reads_the_names_of_config_json() -> None:
    """Every field arrives; head_dim is derived; unknown keys are listed, known harmless ones are not."""
    config = Qwen2Config.from_mapping(tiny_config(eos_token_id=[317, 315], novel_key=1, torch_dtype="bfloat16"))
    assert (config.hidden_size, config.head_dim, config.num_key_value_heads) == (64, 16, 2)
    assert (config.rope_theta, config.rms_norm_eps, config.tie_word_embeddings) == (50000.0, 1e-6, True)
    assert (config.eos_token_ids, config.bos_token_id) == ((317, 315), 315)
    assert config.unknown_keys == ("novel_key",)


def test_defaults_that_the_vendor_has_too() -> None:
    """An untied head is the default, end tokens may be absent, a stated head_dim wins."""
    config = Qwen2Config.from_mapping(
        tiny_config(tie_word_embeddings=None, eos_token_id=None, bos_token_id=None, head_dim=32, hidden_act=None)
    )
    assert (config.tie_word_embeddings, config.eos_token_ids, config.bos_token_id) == (False, (), None)
    assert config.head_dim == 32


def test_reads_rope_theta_where_transformers_5_puts_it() -> None:
    """The base stands in rope_parameters in newer files."""
    rope = {"rope_type": "default", "rope_theta": 5e5}
    assert Qwen2Config.from_mapping(tiny_config(rope_theta=None, rope_parameters=rope)).rope_theta == 5e5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("model_type", None),
        ("hidden_act", "gelu"),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"factor": 4.0}),
        ("rope_scaling", {"rope_type": "linear", "factor": 2}),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("use_mrope", True),
        ("quantization_config", {"quant_method": "awq"}),
    ],
)
def test_refuses_other_arithmetic_by_name(key: str, value: object) -> None:
    """A key that would change the numbers is never ignored."""
    with pytest.raises(LoadError, match=rf"unsupported.*{key}"):
        Qwen2Config.from_mapping(tiny_config(**{key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", None),
        ("rope_scaling", {"rope_type": "default"}),
        ("layer_types", ["full_attention"] * 2),
        ("use_sliding_window", False),
        ("sliding_window", 4096),
        ("use_mrope", False),
        ("quantization_config", None),
    ],
)
def test_accepts_keys_that_change_nothing(key: str, value: object) -> None:
    """The published checkpoints carry these."""
    assert Qwen2Config.from_mapping({**tiny_config(), key: value}).hidden_size == 64


@pytest.mark.parametrize("key", ["hidden_size", "num_key_value_heads", "vocab_size", "rope_theta", "rms_norm_eps"])
def test_names_a_missing_key(key: str) -> None:
    """No default replaces a size or a constant of the arithmetic (a lost rope_theta reads fluent and wrong)."""
    with pytest.raises(LoadError, match=rf"for {key}, found nothing"):
        Qwen2Config.from_mapping(tiny_config(**{key: None}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", -64),
        ("hidden_size", True),
        ("hidden_size", "64"),
        ("hidden_size", 64.0),
        ("num_attention_heads", 5),
        ("num_key_value_heads", 3),
        ("head_dim", 15),
        ("rope_theta", 0),
        ("rope_theta", float("nan")),
        ("rope_theta", float("inf")),
        ("rms_norm_eps", -1e-6),
        ("tie_word_embeddings", "yes"),
        ("eos_token_id", "317"),
        ("eos_token_id", [317, -1]),
        ("rope_scaling", 3),
    ],
)
def test_names_an_illegal_value(key: str, value: object) -> None:
    """The message names the key, so that a person can mend the file."""
    with pytest.raises(LoadError, match=key):
        Qwen2Config.from_mapping(tiny_config(**{key: value}))


def test_a_missing_configuration_says_what_to_do() -> None:
    """No configuration at all is exit 6 with the file to look for."""
    with pytest.raises(LoadError, match=r"config\.json"):
        Qwen2Config.from_mapping(None)


def test_the_admitted_tensors_decide_about_the_vocabulary() -> None:
    """A GGUF may list fewer tokens than its embedding has rows, and what is tied is what is stored."""
    validated: Any = SimpleNamespace(config=tiny_config(), geometry=SimpleNamespace(vocab_size=400), tied=False)
    config = Qwen2Config.of(validated)
    assert (config.vocab_size, config.tie_word_embeddings, config.hidden_size) == (400, False, 64)


def test_token_ids_in_each_spelling() -> None:
    """One id, several, none."""
    assert [token_ids(v, "k") for v in (None, 5, [5, 6], [])] == [(), (5,), (5, 6), ()]


@pytest.mark.parametrize(
    ("ids", "start", "words"),
    [
        ([], 0, "non-empty"),
        ([[1]], 0, "vector"),
        ([1.0], 0, "vector"),
        ([-1], 0, "below 331, found -1 at position 0"),
        ([0, 331], 5, "found 331 at position 6"),
        ([1, 2], 127, "at most 128 positions"),
    ],
)
def test_the_gate_before_a_forward(ids: list[object], start: int, words: str) -> None:
    """Negative ids and positions beyond the context are refused, not wrapped around."""
    with pytest.raises(InferenceError, match=words):
        Qwen2Config.from_mapping(tiny_config()).check_input(np.array(ids), start)


def test_the_gate_lets_the_last_position_pass() -> None:
    """The context may be filled to its end."""
    ids = Qwen2Config.from_mapping(tiny_config()).check_input(np.array([1, 330], np.int32), 126)
    assert (ids.dtype, ids.tolist()) == (np.int64, [1, 330])

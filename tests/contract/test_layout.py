"""Names, shapes and counts against a table written by hand from the contract."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apr_core.contract.layout import KINDS, Geometry, expected_tensors, layer_of
from apr_core.errors import LoadError
from apr_core.formats.architectures import load_architectures

from .conftest import CONFIG, LAYER


def test_names_and_shapes_of_the_tiny_model() -> None:
    """Every name and shape is the one of the table in the tests' own hand."""
    expected = {name: shape for name, (_, shape) in expected_tensors(Geometry.from_config(CONFIG)).items()}
    by_hand = {"model.embed_tokens.weight": (131, 64), "model.norm.weight": (64,)}
    by_hand |= {f"model.layers.{n}.{name}": shape for n in (0, 1) for name, shape in LAYER.items()}
    assert by_hand == expected


@pytest.mark.parametrize(
    ("layers", "tied", "count"), [(24, True, 290), (28, True, 338), (28, False, 339), (36, True, 434), (1, False, 15)]
)
def test_counts(layers: int, tied: bool, count: int) -> None:
    """12 L + 2 tied, 12 L + 3 untied: 290 for the 0.5B, 338 for the 1.5B, 339 for the 7B."""
    geometry = Geometry.from_config({**CONFIG, "num_hidden_layers": layers, "tie_word_embeddings": tied})
    assert count == geometry.tensor_count == len(expected_tensors(geometry))


def test_geometry_of_the_real_model(oracle: Path) -> None:
    """The config of Qwen2.5-Coder-0.5B gives head_dim 64, K 128, and an embedding of 151936 rows."""
    geometry = Geometry.from_config(json.loads((oracle / "qwen2.5-coder" / "config.json").read_text()))
    shapes = {name: shape for name, (_, shape) in expected_tensors(geometry).items()}
    assert (geometry.head_dim, len(shapes)) == (64, 290)
    assert shapes["model.embed_tokens.weight"] == (151936, 896)
    assert shapes["model.layers.23.self_attn.v_proj.bias"] == (128,)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (896, 4864)


def test_head_dim_overrides() -> None:
    """A stated head_dim widens the attention, and o_proj maps back to the hidden size."""
    shapes = expected_tensors(Geometry.from_config({**CONFIG, "head_dim": 32}))
    assert shapes["model.layers.0.self_attn.q_proj.weight"][1] == (128, 64)
    assert shapes["model.layers.0.self_attn.o_proj.weight"][1] == (64, 128)
    assert shapes["model.layers.0.self_attn.k_proj.bias"][1] == (64,)


def test_defaults_are_those_of_transformers() -> None:
    """Without the keys: as many key-value heads as heads, and an untied head."""
    config = {k: v for k, v in CONFIG.items() if k not in ("num_key_value_heads", "tie_word_embeddings")}
    geometry = Geometry.from_config(config)
    assert (geometry.num_key_value_heads, geometry.tied) == (4, False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", True),
        ("vocab_size", "131"),
        ("num_attention_heads", 0),
        ("num_key_value_heads", -2),
        ("intermediate_size", 96.0),
        ("num_hidden_layers", 10**9),
        ("vocab_size", 2**40),
        ("tie_word_embeddings", "yes"),
    ],
)
def test_unusable_sizes_are_named(key: str, value: object) -> None:
    """A missing, wrong-typed, zero, negative or absurd size is an error that names its key."""
    with pytest.raises(LoadError, match=key):
        Geometry.from_config({**CONFIG, key: value})


def test_all_missing_keys_at_once() -> None:
    """One message names every key that is missing."""
    with pytest.raises(LoadError) as caught:
        Geometry.from_config({})
    named = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    assert all(f"lacks {key}" in str(caught.value) for key in named)


@pytest.mark.parametrize(
    ("name", "role", "layer"),
    [
        ("model.layers.0.mlp.up_proj.weight", "up_proj", 0),
        ("model.layers.27.self_attn.k_proj.bias", "k_bias", 27),
        ("lm_head.weight", "lm_head", None),
        ("model.layers.007.mlp.up_proj.weight", None, None),
        ("model.layers.-1.mlp.up_proj.weight", None, None),
        ("model.layers.{n}.mlp.up_proj.weight", None, None),
        ("model.layers.0.self_attn.o_proj.bias", None, 0),
        ("model.layers.0.self_attn.q_norm.weight", None, 0),
        ("xmodel.layers.0.mlp.up_proj.weight", None, None),
    ],
)
def test_roles_by_name(name: str, role: str | None, layer: int | None) -> None:
    """A layer number is digits without leading zeros; a bias that Qwen2 does not have has no role."""
    found = Geometry.from_config(CONFIG).role_of(name)
    assert (found.name if found else None, layer_of(name)) == (role, layer)


def test_roles_are_unambiguous() -> None:
    """15 roles, each with its own name and pattern and a known kind."""
    roles = load_architectures()["qwen2"].roles
    assert len({r.name for r in roles}) == len({r.hf for r in roles}) == len(roles) == 15
    assert {r.kind for r in roles} == set(KINDS)

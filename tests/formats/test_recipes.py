"""Recipes against the tensor types of files that llama.cpp wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from apr_core.errors import UsageError
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.formats.recipes import RECIPES, tensor_type

DOWN, VALUE = "model.layers.{}.mlp.down_proj.weight", "model.layers.{}.self_attn.v_proj.weight"


@pytest.mark.parametrize("recipe", ["F16", "Q4_K_M", "Q6_K", "Q8_0"])
def test_equals_llama_cpp(recipe: str, oracle: Path) -> None:
    """Each tensor of the oracle's files has the type that the recipe names."""
    with open_checkpoint(oracle / "mini" / "gguf" / f"{recipe}.gguf") as checkpoint:
        found = {name: str(info.dtype) for name, info in checkpoint.tensors.items()}
        expected = {
            name: str(tensor_type(recipe, name, info.shape, num_hidden_layers=3, tied=True))
            for name, info in checkpoint.tensors.items()
        }
    assert expected == found


@pytest.mark.parametrize(
    ("layers", "six_bits"),
    [
        (24, [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]),
        (28, [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]),
        (3, [2]),
        (1, [0]),
    ],
)
@pytest.mark.parametrize("name", [DOWN, VALUE])
def test_layers_with_more_bits(layers: int, six_bits: list[int], name: str) -> None:
    """The layers that Q4_K_M gives six bits, as counted in llama.cpp's files of 0.5B and 1.5B."""
    chosen = [
        layer
        for layer in range(layers)
        if str(tensor_type("Q4_K_M", name.format(layer), (256, 512), num_hidden_layers=layers, tied=True)) == "Q6_K"
    ]
    assert chosen == six_bits


@pytest.mark.parametrize(
    ("name", "columns", "tied", "expected"),
    [
        ("model.embed_tokens.weight", 896, True, "Q8_0"),
        ("model.embed_tokens.weight", 896, False, "Q5_0"),
        ("model.embed_tokens.weight", 3584, False, "Q4_K"),
        ("lm_head.weight", 3584, False, "Q6_K"),
        ("lm_head.weight", 896, False, "Q8_0"),
        (VALUE.format(0), 896, True, "Q8_0"),
        (VALUE.format(3), 896, True, "Q5_0"),
        (DOWN.format(0), 4864, True, "Q6_K"),
        (DOWN.format(3), 4864, True, "Q4_K"),
        ("model.layers.0.self_attn.q_proj.weight", 896, True, "Q5_0"),
        ("model.layers.0.self_attn.q_proj.weight", 72, True, "F16"),
    ],
)
def test_fallbacks_of_q4_k_m(name: str, columns: int, tied: bool, expected: str) -> None:
    """Rows that are no multiple of 256 fall back as llama.cpp lets them (0.5B has rows of 896)."""
    assert str(tensor_type("Q4_K_M", name, (64, columns), num_hidden_layers=24, tied=tied)) == expected


@pytest.mark.parametrize("recipe", RECIPES)
def test_vectors_and_odd_rows(recipe: str) -> None:
    """Vectors are F32 in every recipe, and every type divides the rows that it is given."""
    assert str(tensor_type(recipe, "model.norm.weight", (896,), num_hidden_layers=1, tied=True)) == "F32"
    for columns in (1, 33, 48, 96, 896, 1024):
        chosen = tensor_type(recipe, "w", (2, columns), num_hidden_layers=1, tied=True)
        assert columns % chosen.block_elements == 0


def test_unknown_recipe() -> None:
    """An unknown recipe lists the known ones."""
    with pytest.raises(UsageError, match=r"no recipe 'Q9'.*Q4_K_M"):
        tensor_type("Q9", "w", (1, 1), num_hidden_layers=1, tied=True)

"""
Which element type each tensor gets in a named quantisation, by llama.cpp's rules.

Source: llama.cpp ``src/llama-quant.cpp`` (``llama_tensor_get_type``, ``use_more_bits``), compared in the tests with
files that llama.cpp wrote.
"""

from __future__ import annotations

import re

from apr_core.dtypes import FORMATS, QuantFormat
from apr_core.errors import UsageError

_DEFAULTS = {
    **{name: name for name in ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1")},
    "Q5_K_M": "Q5_K",
    "Q4_K_M": "Q4_K",
}
RECIPES = tuple(_DEFAULTS)
_FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_MORE_BITS = ("self_attn.v_proj.weight", "mlp.down_proj.weight")


def tensor_type(recipe: str, name: str, shape: tuple[int, ...], *, num_hidden_layers: int, tied: bool) -> QuantFormat:
    """
    Return the element type of a tensor under a recipe.

    Args:
        recipe: One of `RECIPES`.
        name: Canonical name.
        shape: Row-major; vectors stay F32, and a row that is no whole number of blocks falls back (Q4_K to Q5_0, Q5_K
            to Q5_1, Q6_K to Q8_0, each to F16 when 32 does not divide it either).
        num_hidden_layers: Decides which layers get more bits.
        tied: The embedding is also the head, and gets the head's type.

    Raises:
        UsageError: There is no such recipe.
    """
    if recipe not in _DEFAULTS:
        raise UsageError(f"no recipe {recipe!r}", advice=f"use one of {', '.join(RECIPES)}")
    if len(shape) < 2:
        return FORMATS["F32"]
    chosen = _DEFAULTS[recipe]
    if _deserves_six_bits(recipe, name, num_hidden_layers, tied=tied):
        chosen = "Q6_K"
    if shape[-1] % FORMATS[chosen].block_elements:
        chosen = _FALLBACKS.get(chosen, "F16")
    if shape[-1] % FORMATS[chosen].block_elements:
        chosen = "F16"
    return FORMATS[chosen]


def _deserves_six_bits(recipe: str, name: str, layers: int, *, tied: bool) -> bool:
    """Tell where Q6_K is spent: on the head, and by the mixtures on v_proj and down_proj of about half the layers."""
    if recipe in ("F32", "F16", "BF16", "Q8_0"):
        return False
    if name == ("model.embed_tokens.weight" if tied else "lm_head.weight"):
        return True
    match = _LAYER.fullmatch(name)
    if not recipe.endswith("_M") or match is None or match.group(2) not in _MORE_BITS:
        return False
    layer, eighth = int(match.group(1)), layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2

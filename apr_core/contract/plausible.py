"""What the gates of a configuration measure: numbers out of it, and how it fits the vocabulary; no opinion here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import nan

from apr_core.contract.layout import Geometry
from apr_core.formats.gguf import GgufMetadata


def _stated(config: Mapping[str, object], key: str) -> float | None:
    """Read a number; None when absent, NaN (which fails every gate) when it is something else."""
    value = config.get(key)
    if value is None:
        # transformers 5 nests the RoPE base; to read only the flat key would call a healthy model broken
        nested = config.get("rope_parameters")
        value = nested.get(key) if isinstance(nested, Mapping) else None
    if value is None:
        return None
    try:
        return float(value) if isinstance(value, int | float) else nan
    except OverflowError:
        return nan


def _remainder_of_heads(config: Mapping[str, object], geometry: Geometry) -> float:
    return geometry.num_attention_heads % geometry.num_key_value_heads


def _remainder_of_hidden(config: Mapping[str, object], geometry: Geometry) -> float | None:
    # with head_dim stated the heads need not add up to the hidden size (Qwen3)
    return None if config.get("head_dim") is not None else geometry.hidden_size % geometry.num_attention_heads


def _end_tokens_outside(config: Mapping[str, object], geometry: Geometry) -> float | None:
    stated = config.get("eos_token_id")
    if stated is None:  # legal: a base model may leave it to the tokenizer's files
        return None
    ends = stated if isinstance(stated, list | tuple) else [stated]
    inside = [e for e in ends if isinstance(e, int) and not isinstance(e, bool) and 0 <= e < geometry.vocab_size]
    return len(ends) - len(inside)


CONFIG_RULES: Mapping[str, Callable[[Mapping[str, object], Geometry], float | None]] = {
    "rope_theta_low": lambda config, _: _stated(config, "rope_theta"),
    "rope_theta_high": lambda config, _: _stated(config, "rope_theta"),
    "rms_norm_eps_low": lambda config, _: _stated(config, "rms_norm_eps"),
    "rms_norm_eps_high": lambda config, _: _stated(config, "rms_norm_eps"),
    "context_low": lambda config, _: _stated(config, "max_position_embeddings"),
    "context_high": lambda config, _: _stated(config, "max_position_embeddings"),
    "heads_per_kv_head": _remainder_of_heads,
    "hidden_per_head": _remainder_of_hidden,
    "end_tokens_outside": _end_tokens_outside,
}


def embedded_tokens(metadata: Mapping[str, object]) -> int | None:
    """Return how many tokens the container's own tokenizer has (GGUF and APR carry one), without parsing them."""
    if isinstance(metadata, GgufMetadata):
        return metadata.array_length("tokenizer.ggml.tokens")
    tokens = metadata.get("tokenizer.vocabulary")
    return len(tokens) if isinstance(tokens, list) else None

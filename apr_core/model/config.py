"""
The architecture of one Qwen2, with the field names that ``config.json`` uses.

A key that would change the arithmetic and that this project does not implement is refused by name. A key that is
merely unknown is listed in ``unknown_keys``, so that a reader can show it instead of guessing.

Source: the Hugging Face ``Qwen2Config``; the values of the published Qwen2.5 checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from apr_core.contract.types import ValidatedModel
from apr_core.errors import InferenceError, LoadError

# Keys that do not touch inference in float32, or that `_refuse_unsupported` has judged already.
_IGNORED = frozenset(
    (
        "architectures", "attention_dropout", "auto_map", "_name_or_path", "bos_token_id", "chunk_size_feed_forward",
        "dtype", "eos_token_id", "hidden_act", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder",
        "label2id", "layer_types", "max_window_layers", "model_type", "output_attentions", "output_hidden_states",
        "pad_token_id", "quantization_config", "return_dict", "rope_parameters", "rope_scaling", "sliding_window",
        "torch_dtype", "transformers_version", "use_cache", "use_mrope", "use_sliding_window",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Qwen2Config:
    """
    One Qwen2 architecture. ``head_dim`` is ``hidden_size // num_attention_heads`` unless the file states its own.

    Attributes:
        eos_token_ids: The end tokens that the configuration names, in its order; may be empty.
        unknown_keys: Configuration keys that nothing here knows; they had no influence.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    unknown_keys: tuple[str, ...] = ()

    @classmethod
    def from_mapping(cls, config: Mapping[str, object] | None) -> Qwen2Config:
        """
        Read a mapping of Hugging Face keys, as ``Checkpoint.config`` holds it.

        Raises:
            LoadError: There is no configuration, a key is missing or has no legal value, or a key asks for arithmetic
                that is not implemented; the message names the key.
        """
        if config is None:
            raise LoadError("expected a configuration, found none", advice="put the model's config.json beside it")
        _refuse_unsupported(config)
        hidden_size = _count(config, "hidden_size")
        heads = _count(config, "num_attention_heads")
        kv_heads = _count(config, "num_key_value_heads")
        if heads % kv_heads:
            raise _bad("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
        if config.get("head_dim") is None and hidden_size % heads:
            raise _bad("num_attention_heads", heads, f"a divisor of hidden_size ({hidden_size})")
        head_dim = hidden_size // heads if config.get("head_dim") is None else _count(config, "head_dim")
        if head_dim % 2:
            raise _bad("head_dim", head_dim, "an even number (RoPE rotates pairs)")
        tied = config.get("tie_word_embeddings")
        if not isinstance(tied, bool | None):
            raise _bad("tie_word_embeddings", tied, "true or false")
        bos = token_ids(config.get("bos_token_id"), "bos_token_id")
        return cls(
            vocab_size=_count(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_count(config, "intermediate_size"),
            num_hidden_layers=_count(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=_count(config, "max_position_embeddings"),
            rope_theta=_positive(_rope_parameters(config), "rope_theta"),
            rms_norm_eps=_positive(config, "rms_norm_eps"),
            tie_word_embeddings=bool(tied),
            eos_token_ids=token_ids(config.get("eos_token_id"), "eos_token_id"),
            bos_token_id=bos[0] if bos else None,
            unknown_keys=tuple(k for k in config if k not in _IGNORED and k not in cls.__dataclass_fields__),
        )

    @classmethod
    def of(cls, validated: ValidatedModel) -> Qwen2Config:
        """
        Read the configuration of an admitted model.

        The vocabulary is as long as the embedding that was admitted: a GGUF may list fewer tokens than it has rows.
        """
        config = cls.from_mapping(validated.config)
        return replace(config, vocab_size=validated.geometry.vocab_size, tie_word_embeddings=validated.tied)

    def check_input(self, ids: NDArray[np.int64], start: int) -> NDArray[np.int64]:
        """
        Return ``ids`` as a contiguous int64 vector when a forward may take them at positions ``start ...``.

        Every engine calls this first: without it a negative id would read the table from its end, and a position
        past the trained context would give fluent nonsense.

        Raises:
            InferenceError: Not a vector of integers, empty, an id outside the vocabulary, or the context is too long.
        """
        array = np.asarray(ids)
        if array.ndim != 1 or array.dtype.kind not in "iu" or array.size == 0:
            raise InferenceError(
                f"expected a non-empty vector of token ids, found {array.dtype} of shape {array.shape}",
                advice="build the ids with prepare_tokens",
            )
        outside = (array < 0) | (array >= self.vocab_size)
        if outside.any():
            at = int(outside.argmax())
            raise InferenceError(
                f"expected token ids below {self.vocab_size}, found {array[at]} at position {start + at}",
                advice="use the tokenizer that belongs to this model",
            )
        if start + array.size > self.max_position_embeddings:
            raise InferenceError(
                f"expected at most {self.max_position_embeddings} positions (max_position_embeddings), "
                f"found {start + array.size}",
                advice="shorten the prompt",
            )
        return np.ascontiguousarray(array, dtype=np.int64)


def token_ids(value: object, key: str) -> tuple[int, ...]:
    """
    Read a token id, a list of them, or null, as ``eos_token_id`` may be written.

    Raises:
        LoadError: Anything else; the message names ``key``.
    """
    if value is None:
        return ()
    items = list(value) if isinstance(value, list | tuple) else [value]
    ids = [item for item in items if isinstance(item, int) and not isinstance(item, bool) and item >= 0]
    if len(ids) != len(items):
        raise _bad(key, value, "a token id, a list of token ids, or null")
    return tuple(ids)


def _refuse_unsupported(config: Mapping[str, object]) -> None:
    """Raise LoadError for every key that asks for arithmetic which is not implemented."""
    scaling = config.get("rope_scaling")
    rope = {**_mapping(config, "rope_parameters"), **_mapping(config, "rope_scaling")}
    rope_type = rope.get("rope_type") or rope.get("type") or ("default" if not scaling else "unnamed")
    layer_types = config.get("layer_types")
    asked = {
        "model_type": (config.get("model_type"), config.get("model_type") == "qwen2"),
        "hidden_act": (config.get("hidden_act"), config.get("hidden_act") in (None, "silu")),
        "rope_scaling": (rope_type, rope_type == "default"),
        "use_sliding_window": (config.get("use_sliding_window"), not config.get("use_sliding_window")),
        "layer_types": (layer_types, not isinstance(layer_types, list) or set(layer_types) <= {"full_attention"}),
        "use_mrope": (config.get("use_mrope"), not config.get("use_mrope")),
        "quantization_config": (config.get("quantization_config"), not config.get("quantization_config")),
    }
    supported = {"model_type": '"qwen2"', "hidden_act": '"silu"', "rope_scaling": "none or default"}
    for key, (value, holds) in asked.items():
        if not holds:
            raise LoadError(
                f"unsupported: the configuration has {key} = {value!r}, supported is {supported.get(key, 'none')}",
                advice="use a plain Qwen2 checkpoint",
            )


def _rope_parameters(config: Mapping[str, object]) -> Mapping[str, object]:
    """Return where ``rope_theta`` stands: at the top, or in ``rope_parameters`` as transformers 5 writes it."""
    return config if config.get("rope_theta") is not None else _mapping(config, "rope_parameters")


def _mapping(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = config.get(key)
    if not isinstance(value, Mapping | None):
        raise _bad(key, value, "an object or null")
    return value or {}


def _count(config: Mapping[str, object], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _bad(key, value, "a positive integer")
    return value


def _positive(config: Mapping[str, object], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _bad(key, value, "a positive finite number")
    return float(value)


def _bad(key: str, value: object, expected: str) -> LoadError:
    found = "nothing" if value is None else repr(value)
    return LoadError(
        f"expected {expected} for {key}, found {found}, in the model's configuration",
        advice="take config.json from where the weights came from",
    )

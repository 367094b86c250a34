"""
Names at the border: tensor names and configuration keys of GGUF and APR, translated to Hugging Face's and back.

Inside the package there are Hugging Face names alone. Tensor names come from architectures.toml; what is not there, or
not in the tables of keys below, keeps its stored name.
Source: llama.cpp ``gguf-py/gguf/constants.py`` (LLM_KV); the APR v2 metadata keys and the aliases that its readers
accept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping
from functools import cache

import numpy as np

from apr_core.formats.architectures import LAYER, find_role, load_architectures, load_roles
from apr_core.formats.checkpoint import TensorInfo

# Who encoded the block types of a GGUF or APR file, where its writer says so.
ENCODER = "apr.encoder"

_GGUF_LAYER = re.compile(r"(?<=^blk\.)(0|[1-9][0-9]{0,8})(?=\.)")

# GGUF key (behind the architecture) to Hugging Face key, and the type that llama.cpp insists on.
_GGUF_KEYS: tuple[tuple[str, str, Callable[[float], int | float]], ...] = (
    ("embedding_length", "hidden_size", int),
    ("feed_forward_length", "intermediate_size", int),
    ("block_count", "num_hidden_layers", int),
    ("attention.head_count", "num_attention_heads", int),
    ("attention.head_count_kv", "num_key_value_heads", int),
    ("attention.key_length", "head_dim", int),
    ("attention.sliding_window", "sliding_window", int),
    ("context_length", "max_position_embeddings", int),
    ("rope.freq_base", "rope_theta", float),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps", float),
)
_GGUF_TOKENS = {
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
_GGUF_ROPE_SCALING: tuple[tuple[str, str], ...] = (
    ("rope.scaling.type", "rope_type"),
    ("rope.scaling.factor", "factor"),
    ("rope.scaling.original_context_length", "original_max_position_embeddings"),
)

# Hugging Face key to the APR keys that mean it; the first is what a writer uses.
_APR_KEYS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "hidden_dim", "d_model", "n_embd"),
    "num_hidden_layers": ("num_layers", "n_layers", "num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_heads", "n_heads", "num_attention_heads", "n_head"),
    "num_key_value_heads": ("num_kv_heads", "n_kv_heads", "num_key_value_heads"),
    "vocab_size": ("vocab_size", "n_vocab"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "intermediate_dim", "n_inner"),
    "max_position_embeddings": ("max_position_embeddings", "max_seq_len", "context_length", "n_ctx"),
    "rope_theta": ("rope_theta",),
    "rms_norm_eps": ("rms_norm_eps", "layer_norm_eps", "norm_eps", "eps"),
    "head_dim": ("head_dim",),
    "eos_token_id": ("tokenizer.eos_token_id", "eos_token_id"),
    "bos_token_id": ("tokenizer.bos_token_id", "bos_token_id"),
    "pad_token_id": ("tokenizer.padding_token_id", "pad_token_id"),
    "hidden_act": ("hidden_act",),
    "rope_scaling": ("rope_scaling",),
    "sliding_window": ("sliding_window",),
    "use_sliding_window": ("use_sliding_window",),
}
_ROPE_SPLIT_HALVES = 2  # APR's number for the rotation that pairs element i with element i + head_dim / 2


def hf_name(stored: str) -> str:
    """Translate a GGUF tensor name; an unknown one (``rope_freqs.weight``) stays as it is."""
    return _translated(stored, _GGUF_LAYER, _from_gguf())


def gguf_name(name: str) -> str:
    """Translate a canonical name to GGUF; an unknown one stays as it is."""
    role = find_role(name)
    return name if role is None else role.gguf.replace("{n}", "".join(LAYER.findall(name)))


def apr_canonical(stored: str) -> str:
    """Translate the three styles found in APR files: Hugging Face, the same without ``model.``, and GGUF."""
    for candidate in (stored, f"model.{stored}"):
        canonical = _translated(candidate, LAYER, _from_apr())
        if find_role(canonical) is not None:
            return canonical
    return hf_name(stored)


def _translated(stored: str, layer: re.Pattern[str], table: Mapping[str, str]) -> str:
    """Look a stored name up with its layer number taken out, and put the number back."""
    found = table.get(layer.sub("{n}", stored)) if "{" not in stored else None
    return stored if found is None else found.replace("{n}", "".join(layer.findall(stored)))


@cache
def _from_gguf() -> Mapping[str, str]:
    return {role.gguf: role.hf for role in load_roles().values()}


@cache
def _from_apr() -> Mapping[str, str]:
    return {role.apr: role.hf for role in load_roles().values()}


def config_from_gguf(metadata: Mapping[str, object], tensors: Iterable[TensorInfo]) -> dict[str, object] | None:
    """
    Translate GGUF keys to a Hugging Face configuration.

    ``vocab_size`` is the architecture's key, else the rows of the embedding, else the number of tokens.
    A float32 value is read as the shortest decimal that names it: 1e-06, not 9.999999974752427e-07.
    Keys that are missing stay missing: a guessed rope_theta is a broken model.

    Returns:
        None when the file does not name its architecture.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        return None
    by_name = {info.name: info for info in tensors}
    config: dict[str, object] = {"model_type": architecture, "hidden_act": "silu"}
    for stored, key, _ in _GGUF_KEYS:
        value = metadata.get(f"{architecture}.{stored}")
        if value is not None:
            config[key] = _shortest(value)
    if "num_attention_heads" in config:
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config["use_sliding_window"] = "sliding_window" in config
    for stored, key in _GGUF_TOKENS.items():
        if stored in metadata:
            config[key] = metadata[stored]
    vocabulary = _vocab_size(metadata, architecture, by_name)
    if vocabulary is not None:
        config["vocab_size"] = vocabulary
    scaling = {
        key: _shortest(metadata[f"{architecture}.{stored}"])
        for stored, key in _GGUF_ROPE_SCALING
        if f"{architecture}.{stored}" in metadata
    }
    if scaling and scaling.get("rope_type") != "none":
        config["rope_scaling"] = scaling
    config["tie_word_embeddings"] = "lm_head.weight" not in by_name
    return config | _switches(architecture, by_name)


def _switches(architecture: object, present: Container[str]) -> dict[str, object]:
    """Tell the keys that neither GGUF nor APR has, and that are true when the tensors that they stand for are there."""
    family = load_architectures().get(architecture) if isinstance(architecture, str) else None
    if family is None:
        return {}
    return {
        key: any(role.hf.replace("{n}", "0") in present for role in family.roles if family.when.get(role.name) == key)
        for key in set(family.when.values())
    }


def _vocab_size(metadata: Mapping[str, object], architecture: str, tensors: Mapping[str, TensorInfo]) -> object:
    """Find the vocabulary's size without parsing the tokens."""
    stated = metadata.get(f"{architecture}.vocab_size")
    if stated is not None:
        return stated
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is not None and embedding.shape:
        return embedding.shape[0]  # before the tokens: a padded embedding has more rows than there are tokens
    measure = getattr(metadata, "array_length", None)
    tokens = measure("tokenizer.ggml.tokens") if measure else metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) else tokens


def _shortest(value: object) -> object:
    """Turn a float that came from float32 into the shortest decimal that rounds to it; a true float64 stays."""
    if not isinstance(value, float):
        return value
    with np.errstate(over="ignore"):
        narrow = np.float32(value)
    return float(str(narrow)) if float(narrow) == value else value


def gguf_metadata(config: Mapping[str, object]) -> dict[str, object]:
    """
    Translate a Hugging Face configuration to GGUF keys, integers and floats as llama.cpp insists on them.

    ``sliding_window`` is written only when it is in use: a Qwen2 configuration carries a number that it does not apply.
    A tied head needs no key: it is the absence of ``output.weight``.
    """
    architecture = str(config.get("model_type", "qwen2"))
    pairs: dict[str, object] = {"general.architecture": architecture}
    for stored, key, kind in _GGUF_KEYS:
        value = config.get(key)
        skipped = key == "sliding_window" and not config.get("use_sliding_window")
        if isinstance(value, int | float) and not skipped:
            pairs[f"{architecture}.{stored}"] = kind(value)
    if isinstance(config.get("vocab_size"), int):
        pairs[f"{architecture}.vocab_size"] = config["vocab_size"]
    for stored, key in _GGUF_TOKENS.items():
        value = config.get(key)
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int):
            pairs[stored] = first
    scaling = config.get("rope_scaling")
    if isinstance(scaling, Mapping):
        for stored, key in _GGUF_ROPE_SCALING:
            value = scaling.get(key, scaling.get("type") if key == "rope_type" else None)
            if value is not None:
                pairs[f"{architecture}.{stored}"] = float(value) if key == "factor" else value
    return pairs


def config_from_apr(metadata: Mapping[str, object], tensor_names: Iterable[str]) -> dict[str, object] | None:
    """
    Translate APR metadata, in any of the spellings that its readers accept, to a Hugging Face configuration.

    Explicit nulls count as missing: APR's writer turns every unset field into one.

    Returns:
        None when no geometry at all is given.
    """
    config: dict[str, object] = {}
    for key, spellings in _APR_KEYS.items():
        value = next((metadata[name] for name in spellings if metadata.get(name) is not None), None)
        if value is not None:
            config[key] = value
    if not config:
        return None
    family = metadata.get("architecture") or metadata.get("model_type")
    if family:
        config["model_type"] = family
    config.setdefault("hidden_act", "silu")
    if "num_attention_heads" in config:
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
    present = set(tensor_names)
    config["tie_word_embeddings"] = "lm_head.weight" not in present
    return config | _switches(family, present)


def apr_metadata(config: Mapping[str, object]) -> dict[str, object]:
    """Translate a Hugging Face configuration to APR's own keys; what it has no value for is left out."""
    family = config.get("model_type", "qwen2")
    pairs: dict[str, object] = {"model_type": family, "architecture": family}
    for key, spellings in _APR_KEYS.items():
        if config.get(key) is not None:
            pairs[spellings[0]] = config[key]
    pairs["rope_type"] = _ROPE_SPLIT_HALVES
    if config.get("tie_word_embeddings"):
        pairs["tied_embeddings"] = True
    return pairs

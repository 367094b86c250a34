"""A tiny Qwen2 as SafeTensors, written by the ``safetensors`` package, and a small tokenizer beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 331,
    "max_position_embeddings": 128,
    "rope_theta": 50000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 317,
    "bos_token_id": 315,
}
TEMPLATE = (
    "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}"
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WORDS = ("he", "ll", "hell", "Ġw", "or", "Ġwor", "ĠĠ", "ĊĊ", "us", "er", "user", "Ġ<", "<|", "|>", "12", "Ġa", "Ġb")


def tiny_config(**changes: object) -> dict[str, object]:
    """Return the configuration with changes; a change to None removes the key."""
    return {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}


def write_tiny(folder: Path, *, seed: int = 7, tokenizer: bool = True, **changes: object) -> Path:
    """Write a random model of odd sizes to ``folder`` and return it."""
    config = tiny_config(**changes)
    h, i, v = (int(str(config[k])) for k in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = h * int(str(config["num_key_value_heads"])) // int(str(config["num_attention_heads"]))
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * 0.2).astype(np.float32)

    tensors = {"model.embed_tokens.weight": draw(v, h), "model.norm.weight": 1 + draw(h)}
    for n in range(int(str(config["num_hidden_layers"]))):
        layer = f"model.layers.{n}"
        for name, rows in (("q", h), ("k", kv), ("v", kv)):
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = draw(rows, h)
            tensors[f"{layer}.self_attn.{name}_proj.bias"] = draw(rows)
        tensors[f"{layer}.self_attn.o_proj.weight"] = draw(h, h)
        for name, shape in (("gate", (i, h)), ("up", (i, h)), ("down", (h, i))):
            tensors[f"{layer}.mlp.{name}_proj.weight"] = draw(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{name}.weight"] = 1 + draw(h)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = draw(v, h)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if tokenizer:
        write_tokenizer(folder)
    return folder


def tokenizer_document() -> dict[str, object]:
    """Return a ``tokenizer.json`` of 256 bytes, a few merges and added tokens of each kind, in Qwen2's layout."""
    from tokenizers.pre_tokenizers import ByteLevel

    from apr_core.model.vocabulary import QWEN2_PRE_TOKENIZER

    vocab = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()))}
    merges = []
    for word in WORDS:
        left = max((t for t in vocab if word.startswith(t) and word[len(t) :] in vocab), key=len)
        merges.append([left, word[len(left) :]])
        vocab[word] = len(vocab)
    # The package numbers added tokens behind the vocabulary, whatever ids the file states.
    vocab |= {f"unused{n}": n for n in range(len(vocab), 315)}
    added = [("<|endoftext|>", True), ("<|im_start|>", True), ("<|im_end|>", True), ("<tool_call>", False)]
    added += [("<|fim_prefix|>", False), ("<|im_end|>|>", False)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN2_PRE_TOKENIZER}, "behavior": "Isolated", "invert": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": [{"id": 315 + n, "content": c, "special": s, **flags} for n, (c, s) in enumerate(added)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def write_tokenizer(folder: Path, *, template: str | None = TEMPLATE) -> Path:
    """Write the four files that a tokenizer is spread over."""
    document = tokenizer_document()
    settings = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None, "chat_template": template}
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [317, 315]}), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied tiny model with a tokenizer."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied tiny model without a tokenizer."""
    return write_tiny(tmp_path_factory.mktemp("untied"), tokenizer=False, tie_word_embeddings=False)

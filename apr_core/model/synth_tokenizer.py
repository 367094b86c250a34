"""
A byte-level BPE of an exact vocabulary size, made by rule instead of training.

It has Qwen2's layout (256 bytes, merged tokens, control tokens behind them), its pre-tokenizer and NFC, and a ChatML
template, so that everything that needs a tokenizer runs on an untrained model. The merged tokens are invented words of
consonant-vowel syllables: no syllable starts where another ends, so every token is what its own text encodes to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from apr_core.errors import UsageError
from apr_core.model.vocabulary import BPE_DEFAULTS, QWEN2_PRE_TOKENIZER, token_table

# Order and names as in the tokenizer of Qwen2.5-Coder; a smaller vocabulary takes the first ones.
CONTROL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
NOT_SPECIAL = frozenset(CONTROL_TOKENS[14:])  # kept by a decoder that drops special tokens, as the vendor has it
TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
_SPACE = "Ġ"  # how GPT-2 writes the byte 0x20
_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"
_MOST = 256 + 2 * 105 + 2 * 105**2 + 105**3  # bytes, and words of the 105 syllables as `_merges` builds them


def byte_tokens() -> list[str]:
    """Return GPT-2's printable stand-ins of the 256 bytes in the order of their ids: printable bytes first."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in kept] + [chr(0x100 + i) for i in range(256 - len(kept))]


def _merges() -> Iterator[tuple[str, str]]:
    """
    Yield merges by rank, each of two tokens that exist by then into one that does not.

    One, two, then three syllables. A word of three merges its lower-ranked pair first, so that pair decides the split;
    the other split would be a token that its own text never becomes.
    """
    syllables = [c + v for c in _CONSONANTS for v in _VOWELS]
    yield from ((s[0], s[1]) for s in syllables)
    yield from ((_SPACE, s) for s in syllables)
    yield from ((a, b) for a in syllables for b in syllables)
    yield from ((_SPACE + a, b) for a in syllables for b in syllables)
    for a in syllables:
        for b in syllables:
            for c in syllables:
                yield (a + b, c) if (a, b) <= (b, c) else (a, b + c)


def generate_tokenizer(base: int, control: int, *, context: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Make ``tokenizer.json`` and ``tokenizer_config.json``.

    Args:
        base: Ordinary tokens, the 256 bytes included.
        control: Control tokens behind them, at least 3 (end of text, start and end of a message).
        context: Longest input that the model promises.

    Returns:
        Both documents, the same for the same arguments. Cost: about a second for 151643 tokens.

    Raises:
        UsageError: More tokens than there are words (about 1.1 million), or fewer than 256.
    """
    if not 256 <= base <= _MOST or not 3 <= control <= len(CONTROL_TOKENS):
        raise UsageError(f"cannot make a vocabulary of {base} tokens and {control} control tokens")
    vocabulary = {token: i for i, token in enumerate(byte_tokens())}
    merges: list[list[str]] = []
    for left, right in islice(_merges(), base - len(vocabulary)):
        vocabulary[left + right] = len(vocabulary)
        merges.append([left, right])
    added = [_added(base + i, token) for i, token in enumerate(CONTROL_TOKENS[:control])]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": QWEN2_PRE_TOKENIZER}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", **BPE_DEFAULTS, "vocab": vocabulary, "merges": merges},
    }
    return tokenizer, _tokenizer_config(added, context)


def _added(token_id: int, token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": token, **flags, "special": token not in NOT_SPECIAL}


def _tokenizer_config(added: Sequence[Mapping[str, Any]], context: int) -> dict[str, Any]:
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": context,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def gguf_tokenizer(tokenizer: Mapping[str, Any], settings: Mapping[str, Any], rows: int) -> dict[str, object]:
    """
    Translate a byte-level BPE to the ``tokenizer.ggml.*`` keys of GGUF.

    Source: llama.cpp ``gguf-py/gguf/constants.py`` (TokenType) and ``convert_hf_to_gguf.py``.
    """
    ids = tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    tokens, kinds = token_table(ids, {t["id"]: t["special"] for t in tokenizer["added_tokens"]}, rows)
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    pairs: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": bool(settings.get("add_bos_token", False)),
    }
    if isinstance(settings.get("chat_template"), str):
        pairs["tokenizer.chat_template"] = settings["chat_template"]
    return pairs

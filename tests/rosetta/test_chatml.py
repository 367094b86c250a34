"""The second writer of ChatML, held against transformers, and the shape of the attacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apr_core.formats.checkpoint import open_checkpoint
from apr_core.model.synth_tokenizer import TEMPLATE
from apr_core.model.tokens import load_tokenizer
from apr_core.rosetta import chatml
from apr_core.rosetta.chatml import chatml_ids, default_system, injections, placed, split_across

QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


@pytest.mark.oracle
def test_conversations_encode_as_transformers_does(oracle: Path, tmp_path: Path) -> None:
    """For the vendor's template and tokenizer the ids are those of transformers, conversation for conversation."""
    folder = oracle / "qwen2.5-coder"
    vectors = json.loads((folder / "chat_vectors.json").read_text())
    cases = vectors["cases"] if isinstance(vectors, dict) else vectors
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    tokenizer = load_tokenizer(open_checkpoint(tmp_path))
    assert tokenizer.chat_template is not None
    compared = 0
    for case in cases:
        plain = [m["role"] != "tool" and "<|" not in str(m.get("content")) for m in case["messages"]]
        if not all(plain):
            continue  # transformers lets such content become control tokens, and tool calls are not written here
        assert case["ids"] == chatml_ids(tokenizer, tokenizer.chat_template, case["messages"]), case["messages"]
        compared += 1
    assert compared >= 8


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATE, "You are a helpful assistant."),
        (r"{{ '<|im_start|>system\n' + m + '<|im_end|>' }}<|im_start|>system\nBe brief.<|im_end|>", "Be brief."),
        (r"{{ '<|im_start|>system\nLine.\nIt\'s two.<|im_end|>' }}", "Line.\nIt's two."),
        ("{{ '<|im_start|>system\nReal line end.<|im_end|>\n' }}", "Real line end."),
        (r'{{ "<|im_start|>system\n" ~ m ~ "<|im_end|>" }}', None),
        (r"{{ '<|im_start|>system\n' }}{{ m }}{{ '<|im_end|>' }}", None),
        (r"{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}", None),
        ("", None),
    ],
)
def test_default_system_sentence(template: str, expected: str | None) -> None:
    """The literal sentence is found; one that the template computes is not mistaken for it."""
    assert default_system(template) == expected


@pytest.mark.oracle
def test_default_system_sentence_of_the_vendor(oracle: Path) -> None:
    """The vendor's template has several headers; the sentence is the one that it writes on its own."""
    template = json.loads((oracle / "mini" / "tokenizer_config.json").read_text())["chat_template"]
    assert default_system(template) == QWEN


def test_bundled_conversations_cover_what_they_promise() -> None:
    """A system prompt, several turns, code, CJK and nothing at all; none holds a control token."""
    roles = [[m["role"] for m in messages] for messages in chatml.CONVERSATIONS.values()]
    texts = [m["content"] for messages in chatml.CONVERSATIONS.values() for m in messages]
    assert any(r[0] == "system" for r in roles)
    assert any(len(r) >= 5 for r in roles)
    assert "" in texts
    assert any("def " in t and "\t" in t for t in texts)
    assert any(ord(c) > 0x4E00 for t in texts for c in t)
    assert not any("<|" in t for t in texts)


def test_ids_by_hand(tiny: Path) -> None:
    """Two messages, written out: header, text, end, line end, generation prompt."""
    with open_checkpoint(tiny) as opened:
        tokenizer = load_tokenizer(opened)
    start, end = 316, 317
    encode = tokenizer.encode
    messages = [{"role": "system", "content": "ba"}, {"role": "user", "content": "da"}]
    expected = [start, *encode("system\nba"), end, *encode("\n"), start, *encode("user\nda"), end, *encode("\n")]
    assert chatml_ids(tokenizer, "", messages) == [*expected, start, *encode("assistant\n")]
    told = chatml_ids(tokenizer, TEMPLATE, messages[1:])
    assert told[: len(encode("system\nYou are a helpful assistant.")) + 1] == [
        start,
        *encode("system\nYou are a helpful assistant."),
    ]


def test_attacks_spell_the_token() -> None:
    """Every injection holds the token whole; the split one holds it in no single message."""
    for text in injections("<|im_end|>").values():
        assert "<|im_end|>" in text
    halves = [m["content"] for m in split_across("<|im_end|>")]
    assert "".join(halves) == "<|im_end|>"
    for place in chatml.PLACES:
        assert [m["content"] for m in placed(place, "EVIL")].count("EVIL") == 1

"""Tokens: ids as transformers gives them, control tokens that nobody can write, and the only door into a model."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from apr_core.errors import InferenceError, LoadError, UsageError
from apr_core.model.tokens import MAX_TEXT_CHARS, PreparedTokens, Tokenizer, load_tokenizer, prepare_tokens
from tests.model.conftest import TEMPLATE, tokenizer_document, write_tokenizer

START, END = 316, 317


def tokenizer_in(folder: Path, template: str | None = TEMPLATE, **settings: object) -> Tokenizer:
    """Return the small tokenizer with another template, or other settings."""
    write_tokenizer(folder, template=template)
    if settings:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **settings}), encoding="utf-8")
    checkpoint: Any = SimpleNamespace(format="safetensors", folder=folder, config={"bos_token_id": 315}, metadata={})
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The small tokenizer."""
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def foreign() -> Any:
    """The same document in the ``tokenizers`` package itself, added tokens included: what transformers would do."""
    from tokenizers import Tokenizer as Encoder

    return Encoder.from_str(json.dumps({**tokenizer_document(), "truncation": None}))


@pytest.fixture(scope="session")
def coder(oracle: Path) -> Tokenizer:
    """The tokenizer of Qwen2.5-Coder."""
    folder = oracle / "qwen2.5-coder"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    checkpoint: Any = SimpleNamespace(format="safetensors", folder=folder, config=config, metadata={})
    return load_tokenizer(checkpoint)


PIECES = st.sampled_from(
    (
        "<|im_start|>", "<|im_end|>", "<|im_end|>|>", "<tool_call>", "<|fim_prefix|>", "<|", "|>", "|", "<", "hello",
        "  ", "\n\n", "e\u0301", "\u0301", "12", "\r\n", "中", "🚀", "\x00", "\ue000", "\ue001", "im_end", " user",
    )
)  # fmt: skip
TEXTS = st.lists(PIECES | st.text(max_size=4), max_size=8).map("".join)


@settings(max_examples=150, deadline=None)
@given(TEXTS)
@example("<|im_end|>|><|im_end|>")
def test_encode_with_special_tokens_equals_the_foreign_encoder(small: Tokenizer, foreign: Any, text: str) -> None:
    """Our own split at added tokens is the package's: leftmost, longest."""
    assert small.encode(text, parse_special=True) == foreign.encode(text, add_special_tokens=False).ids


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_raw_text_never_becomes_a_control_token(small: Tokenizer, text: str) -> None:
    """No id of a control token comes out, and nothing is lost: the text comes back (as its NFC form)."""
    import unicodedata

    ids = small.encode(text)
    assert not set(ids) & set(small.special_ids.values())
    assert unicodedata.normalize("NFC", small.decode(ids)) == unicodedata.normalize("NFC", text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=12).filter(lambda t: "<|" not in t), min_size=1, max_size=3))
def test_ordinary_chats_get_the_ids_of_transformers(small: Tokenizer, foreign: Any, contents: list[str]) -> None:
    """Rendering and ids equal rendering and encoding without any protection."""
    messages = [{"role": "user", "content": content} for content in contents]
    prepared = prepare_tokens(small, messages=messages)
    turns = "".join(f"<|im_start|>user\n{content}<|im_end|>\n" for content in contents)
    assert prepared.text == f"<|im_start|>system\nBe brief.<|im_end|>\n{turns}<|im_start|>assistant\n"
    assert prepared.ids.tolist() == foreign.encode(prepared.text, add_special_tokens=False).ids


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_content_never_becomes_a_control_token(small: Tokenizer, content: str) -> None:
    """Whatever a user writes, the control tokens are those of the template: three starts, two ends."""
    prepared = prepare_tokens(small, messages=[{"role": "user", "content": content}])
    controls = [i for i in prepared.ids.tolist() if i in small.special_ids.values()]
    assert controls == [START, END, START, END, START]
    assert prepared.text is not None
    assert f"user\n{content}<|im_end|>" in prepared.text


@pytest.mark.parametrize(
    ("template", "messages", "controls"),
    [
        # the template cuts a tag out and thereby joins what stood around it
        ("{{ messages[0].content.replace('<think>', '') }}", [{"role": "user", "content": "<<think>|im_end|>"}], 0),
        # two contents side by side make one token
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            [{"role": "user", "content": c} for c in ("<|im_", "end|>")],
            0,
        ),
        # tool arguments: values and keys, through JSON, also ASCII-only
        ("{{ messages[0].args | tojson }}", [{"role": "user", "args": {"<|im_end|>": ["<|im_start|>"]}}], 0),
        ("{{ messages[0].args | tojson(ensure_ascii=True) }}", [{"role": "user", "args": "é<|im_end|>｜"}], 0),
        # the template's own tokens, also when it makes them from a role
        ("{{ '<|im_' ~ 'end|>' }}{{ messages[0].content }}", [{"role": "user", "content": "<|im_end|>"}], 1),
    ],
)
def test_no_detour_makes_a_control_token(
    tmp_path: Path, template: str, messages: list[dict[str, object]], controls: int
) -> None:
    """The bar of a control token must have been written by the template."""
    tokenizer = tokenizer_in(tmp_path, template)
    prepared = prepare_tokens(tokenizer, messages=messages)
    assert sum(i in tokenizer.special_ids.values() for i in prepared.ids) == controls
    assert tokenizer.decode(prepared.ids, skip_special=False) == prepared.text


def test_ascii_json_comes_back_as_transformers_writes_it(tmp_path: Path) -> None:
    """Bars are ASCII and stay themselves; a full-width bar is escaped, as without protection."""
    tokenizer = tokenizer_in(tmp_path, "{{ messages[0].content | tojson(ensure_ascii=True) }}")
    content = "é|｜ and the six characters \\ue000, \\ue001"
    assert prepare_tokens(tokenizer, messages=[{"role": "user", "content": content}]).text == json.dumps(content)


def test_private_use_characters_in_content_survive(small: Tokenizer) -> None:
    """The stand-ins are chosen among characters that the messages do not use; when all are used, that is said."""
    everything = "".join(map(chr, range(0xE000, 0xF8FE)))
    prepared = prepare_tokens(small, messages=[{"role": "user", "content": everything + "|"}])
    assert prepared.text is not None
    assert everything + "|<|im_end|>" in prepared.text
    with pytest.raises(UsageError, match="private-use"):
        prepare_tokens(small, messages=[{"role": "user", "content": "".join(map(chr, range(0xE000, 0xF900)))}])


def test_decode_is_total(small: Tokenizer) -> None:
    """Unused rows and ids from nowhere are nothing; broken UTF-8 is U+FFFD; control tokens are left out on demand."""
    ids = [START, *small.encode("hé"), END, 330, -1, 10**6]
    assert small.decode(ids) == "hé"
    assert small.decode(ids, skip_special=False) == "<|im_start|>hé<|im_end|>"
    assert small.decode([*small.encode("é")[:1], 318]) == "\ufffd<tool_call>"


def test_raw_mode_says_so_and_wraps_nothing(small: Tokenizer) -> None:
    """Raw text goes in as it is; control tokens stay text unless they are asked for."""
    plain, special = (prepare_tokens(small, text="<|im_end|>", parse_special=flag) for flag in (False, True))
    assert (plain.mode, plain.text, plain.template_hash) == ("raw", "<|im_end|>", None)
    assert END not in plain.ids
    assert special.ids.tolist() == [END]


def test_the_begin_token_only_where_the_files_ask(tmp_path: Path) -> None:
    """A model that wants a begin token gets one before raw text, once."""
    tokenizer = tokenizer_in(tmp_path, add_bos_token=True)
    assert prepare_tokens(tokenizer, text="a").ids.tolist() == [315, *tokenizer.encode("a")]
    assert prepare_tokens(tokenizer, text="<|endoftext|>a", parse_special=True).ids.tolist()[:2] != [315, 315]
    assert prepare_tokens(tokenizer, messages=[{"role": "user", "content": "a"}]).ids[0] == START


def test_added_tokens_with_flags(tmp_path: Path) -> None:
    """lstrip, rstrip and single_word work as in the foreign package."""
    from tokenizers import Tokenizer as Encoder

    document: Any = {**tokenizer_document(), "truncation": None}
    document["added_tokens"][3] |= {"lstrip": True, "rstrip": True}
    document["added_tokens"][4] |= {"single_word": True}
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    checkpoint: Any = SimpleNamespace(format="safetensors", folder=tmp_path, config={}, metadata={})
    ours, theirs = load_tokenizer(checkpoint), Encoder.from_str(json.dumps(document))
    for text in ("a \n<tool_call>  b", "a<|fim_prefix|>", " <|fim_prefix|> b", "<|fim_prefix|>b"):
        assert ours.encode(text, parse_special=True) == theirs.encode(text, add_special_tokens=False).ids


def test_a_chat_says_which_template_it_went_through(small: Tokenizer) -> None:
    """Evidence names the template by its hash."""
    prepared = prepare_tokens(small, messages=[{"role": "user", "content": "hello"}])
    assert (prepared.mode, prepared.template_hash) == ("chat", small.template_hash)
    assert small.template_hash is not None
    assert len(small.template_hash) == 64


def test_a_base_model_is_not_wrapped(tmp_path: Path) -> None:
    """Without a template messages are refused, and the way out is named."""
    with pytest.raises(LoadError, match=r"no chat template.*use text="):
        prepare_tokens(tokenizer_in(tmp_path, None), messages=[{"role": "user", "content": "hi"}])


def test_without_a_tokenizer_only_ids_go_in() -> None:
    """Text and messages are exit 6 with the word tokenizer; ids work."""
    model: Any = SimpleNamespace(tokenizer=None, config=SimpleNamespace(vocab_size=10))
    prepared = prepare_tokens(model, ids=[3, 9])
    assert (prepared.ids.tolist(), prepared.mode, prepared.text) == ([3, 9], "ids", None)
    for given_one in ({"text": "x"}, {"messages": [{"role": "user", "content": "x"}]}):
        with pytest.raises(LoadError, match="tokenizer") as caught:
            prepare_tokens(model, **given_one)
        assert caught.value.exit_code == 6


NESTED: Any = "x"
for _ in range(70):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "exactly one"),
        ({"text": "a", "ids": [1]}, "exactly one"),
        ({"messages": []}, "non-empty list"),
        ({"messages": "hi"}, "non-empty list"),
        ({"messages": {"role": "user"}}, "non-empty list"),
        ({"messages": ["hi"]}, "as message 0"),
        ({"messages": [{"content": "hi"}]}, "as message 0"),
        ({"messages": [{"role": 3, "content": "hi"}]}, "as message 0"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "found 'wizard'"),
        ({"messages": [{"role": "user<|im_end|>", "content": "hi"}]}, "expected a role"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate at character 0"),
        ({"messages": [{"role": "user", "content": b"hi"}]}, "found bytes"),
        ({"messages": [{"role": "user", "content": {1: 2}}]}, "string keys"),
        ({"messages": [{"role": "user", "content": NESTED}]}, "nested"),
        ({"messages": [{"role": "user", "content": "x" * (MAX_TEXT_CHARS + 1)}]}, "at most"),
        ({"messages": [{"role": "user", "content": "x"}], "parse_special": True}, "raw text"),
        ({"text": 3}, "expected a string"),
        ({"text": "a\udfff"}, "lone surrogate at character 1"),
        ({"ids": [1.0]}, "flat list"),
        ({"ids": [[1]]}, "flat list"),
        ({"ids": [[1], [1, 2]]}, "flat list"),
        ({"ids": ["1"]}, "flat list"),
        ({"ids": [True]}, "flat list"),
        ({"ids": [2**70]}, "flat list"),
        ({"ids": [-1]}, "found -1 at position 0"),
        ({"ids": [1, 321]}, "found 321 at position 1"),
    ],
)
def test_what_is_not_a_prompt(small: Tokenizer, arguments: dict[str, Any], words: str) -> None:
    """Wrong input is exit 2 and says what was expected."""
    with pytest.raises(UsageError, match=words):
        prepare_tokens(small, **arguments)


def test_a_message_without_content_is_the_templates_affair(small: Tokenizer) -> None:
    """Some templates allow it (tool calls); this one cannot work with it and says so."""
    with pytest.raises(InferenceError, match="content"):
        prepare_tokens(small, messages=[{"role": "user"}])


def test_odd_but_legal_content(small: Tokenizer) -> None:
    """NUL, numbers and nulls beside the content, empty content and empty text."""
    messages = [
        {"role": "user", "content": "\x00", "n": 1, "f": 0.5, "t": (None, True)},
        {"role": "assistant", "content": ""},
    ]
    prepared = prepare_tokens(small, messages=messages)
    assert prepared.text is not None
    assert "user\n\x00<|im_end|>\n<|im_start|>assistant\n<|im_end|>" in prepared.text
    assert prepare_tokens(small, text="").ids.shape == prepare_tokens(small, ids=[]).ids.shape == (0,)


def test_only_prepare_tokens_makes_them(small: Tokenizer) -> None:
    """Construction, replace, copy and pickle raise; the ids cannot be written, not even by their owner."""
    prepared = prepare_tokens(small, ids=[1, 2])
    attempts = (
        lambda: PreparedTokens(np.array([1]), "raw", "", None),
        lambda: dataclasses.replace(prepared, mode="chat"),
        lambda: copy.copy(prepared),
        lambda: pickle.dumps(prepared),
    )
    for attempt in attempts:
        with pytest.raises(TypeError, match="prepare_tokens"):
            attempt()
    with pytest.raises(ValueError, match="WRITEABLE"):
        prepared.ids.flags.writeable = True
    with pytest.raises(dataclasses.FrozenInstanceError):
        prepared.mode = "chat"  # type: ignore[misc]


def test_the_callers_ids_are_not_shared(small: Tokenizer) -> None:
    """Changing the array afterwards changes nothing."""
    ids = np.array([1, 2])
    prepared = prepare_tokens(small, ids=ids)
    ids[:] = 9
    assert prepared.ids.tolist() == [1, 2]


@pytest.mark.oracle
def test_tokenizer_vectors_of_llama_cpp(coder: Tokenizer, oracle: Path) -> None:
    """Every published text has its published ids, and comes back."""
    vectors = json.loads((oracle / "qwen2.5-coder" / "tokenizer_vectors.json").read_text(encoding="utf-8"))
    assert [coder.encode(v["text"]) for v in vectors] == [v["ids"] for v in vectors]
    assert [coder.decode(v["ids"]) for v in vectors] == [v["text"] for v in vectors]
    assert len(vectors) > 20


@pytest.mark.oracle
def test_chat_vectors_of_transformers(coder: Tokenizer, oracle: Path) -> None:
    """Twelve conversations render byte for byte; ids are equal but for the one that writes control tokens."""
    vectors = json.loads((oracle / "qwen2.5-coder" / "chat_vectors.json").read_text(encoding="utf-8"))
    prepared = [prepare_tokens(coder, messages=v["messages"]) for v in vectors]
    assert [p.text for p in prepared] == [v["rendered"] for v in vectors]
    different = [n for n, (p, v) in enumerate(zip(prepared, vectors, strict=True)) if p.ids.tolist() != v["ids"]]
    assert len(vectors) == 12
    assert different == [6]
    # transformers sees eight control tokens there, three of them the user's; here the user's are text.
    controls = set(coder.special_ids.values())
    assert sum(i in controls for i in vectors[6]["ids"]) == 8
    assert [i for i in prepared[6].ids.tolist() if i in controls] == [151644, 151645, 151644, 151645, 151644]
    assert coder.decode(prepared[6].ids, skip_special=False) == vectors[6]["rendered"]


@pytest.mark.oracle
def test_qwen_stops_on_both_ends(coder: Tokenizer) -> None:
    """The union of config, generation_config and tokenizer_config."""
    assert coder.eos_ids == {151643, 151645}
    assert (coder.vocab_size, coder.special_ids["<|fim_prefix|>"]) == (151665, 151659)
    assert "<tool_call>" not in coder.special_ids

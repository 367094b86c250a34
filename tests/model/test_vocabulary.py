"""Where a tokenizer is read from: the folder of a SafeTensors, the inside of a GGUF or APR, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apr_core.errors import FormatError, LoadError
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.model.tokens import load_tokenizer
from apr_core.model.vocabulary import read_vocabulary
from tests.model.conftest import TEMPLATE, tokenizer_document, write_tokenizer


def folder_of(path: Path, **config: object) -> Any:
    """Stand in for an opened SafeTensors in ``path``."""
    return SimpleNamespace(
        format="safetensors", folder=path, path=path / "model.safetensors", config=config, metadata={}
    )


def lists() -> tuple[list[str], list[int], list[str]]:
    """Return tokens, token types and merges of the small tokenizer as GGUF and APR write them."""
    document: Any = tokenizer_document()
    tokens = {i: t for t, i in document["model"]["vocab"].items()} | {
        t["id"]: t["content"] for t in document["added_tokens"]
    }
    size = 1 + max(tokens)
    words = [tokens.get(i, f"[PAD{i}]") for i in range(size)]
    special = {t["id"]: 3 if t["special"] else 4 for t in document["added_tokens"]}
    types = [special.get(i, 1 if i in tokens else 5) for i in range(size)]
    return words, types, [" ".join(pair) for pair in document["model"]["merges"]]


def gguf_of(**changes: object) -> Any:
    """Stand in for an opened GGUF with the small tokenizer inside; None removes a key."""
    words, types, merges = lists()
    metadata: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 315,
        "tokenizer.ggml.eos_token_id": 317,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    metadata |= {f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return SimpleNamespace(format="gguf", path=Path("m.gguf"), folder=Path(), config={}, metadata=metadata)


def apr_of(**changes: object) -> Any:
    """Stand in for an opened APR with the small tokenizer inside."""
    words, _, merges = lists()
    metadata = {"tokenizer.vocabulary": words, "tokenizer.merges": merges, "chat_template": TEMPLATE} | changes
    config = {"eos_token_id": 317, "bos_token_id": 315}
    return SimpleNamespace(format="apr", path=Path("m.apr"), folder=Path(), config=config, metadata=metadata)


def test_the_folder_of_a_safetensors(tmp_path: Path) -> None:
    """End tokens are the union of what three files name, the template is the configuration's."""
    found = read_vocabulary(folder_of(write_tokenizer(tmp_path), eos_token_id=319, bos_token_id=[315]))
    assert (found.eos_ids, found.eos_texts) == ({319, 317, 315}, {"<|im_end|>"})
    assert (found.chat_template, found.bos_id, found.add_bos) == (TEMPLATE, 315, False)
    assert found.variables == {"eos_token": "<|im_end|>"}
    assert load_tokenizer(folder_of(tmp_path, eos_token_id=319)).eos_ids == {319, 317, 315}


def test_a_gguf_and_an_apr_give_the_tokenizer_of_the_folder(tmp_path: Path) -> None:
    """Three containers, the same ids for text with control tokens, digits, blanks and decomposed letters."""
    one = load_tokenizer(folder_of(write_tokenizer(tmp_path), eos_token_id=317))
    text = "<|im_start|>user\nhell  12 <tool_call>e\u0301\r\n\n<|im_end|>|> wor 中\n"
    for other in (load_tokenizer(gguf_of()), load_tokenizer(apr_of())):
        assert other.encode(text) == one.encode(text)
        assert other.encode(text, parse_special=True) == one.encode(text, parse_special=True)
        assert (other.eos_ids, other.vocab_size, other.template_hash) == (
            one.eos_ids,
            one.vocab_size,
            one.template_hash,
        )
        assert dict(other.template_variables)["eos_token"] == "<|im_end|>"


def test_a_gguf_ends_on_both_chatml_tokens() -> None:
    """A GGUF names one end token; llama.cpp ends on the other by its text, so this does too."""
    assert load_tokenizer(gguf_of(ggml__eos_token_id=315, ggml__eot_token_id=320)).eos_ids == {315, 317, 320}


def test_a_gguf_without_types_recovers_them_by_text() -> None:
    """Old files lack token_type; control tokens must not fall apart into text."""
    assert load_tokenizer(gguf_of(ggml__token_type=None)).special_ids["<|im_start|>"] == 316


def test_the_template_file_wins(tmp_path: Path) -> None:
    """Newer transformers keep the template in a file of its own."""
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"own\r\nfile")
    assert read_vocabulary(folder_of(tmp_path)).chat_template == "own\r\nfile"


def test_the_default_of_several_templates(tmp_path: Path) -> None:
    """Some vendors ship a list; without a default there is none, and no other is guessed."""
    write_tokenizer(tmp_path)
    for names, chosen in ((["rag", "default"], "default!"), (["rag"], None)):
        settings = {"chat_template": [{"name": n, "template": f"{n}!"} for n in names]}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        assert read_vocabulary(folder_of(tmp_path)).chat_template == chosen


def test_a_lone_tokenizer_json_is_enough(tmp_path: Path) -> None:
    """A base model may come with nothing else; then there is no template."""
    write_tokenizer(tmp_path)
    for name in ("tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).unlink()
    found = read_vocabulary(folder_of(tmp_path))
    assert (found.chat_template, found.eos_ids, found.bos_id, found.variables) == (None, frozenset(), None, {})


@pytest.mark.parametrize(
    "checkpoint",
    [
        folder_of(Path("/nonexistent")),
        gguf_of(ggml__tokens=None),
        gguf_of(ggml__pre="llama-bpe"),
        gguf_of(ggml__pre=None),
        gguf_of(ggml__model="llama"),
        apr_of(**{"tokenizer.vocabulary": None}),
        apr_of(**{"tokenizer.merges": None}),
    ],
)
def test_no_tokenizer_is_a_load_error(checkpoint: Any) -> None:
    """Missing, or one that would give other ids for the same text: never a guess, never a neighbour's file."""
    with pytest.raises(LoadError, match="tokenizer"):
        load_tokenizer(checkpoint)


def test_a_neighbours_tokenizer_is_not_taken(tmp_path: Path) -> None:
    """A tokenizer.json beside a GGUF belongs to some other model."""
    write_tokenizer(tmp_path)
    checkpoint = gguf_of(ggml__tokens=None)
    checkpoint.folder = tmp_path
    with pytest.raises(LoadError, match="no tokenizer"):
        load_tokenizer(checkpoint)


@pytest.mark.parametrize(
    "checkpoint",
    [
        gguf_of(ggml__tokens="abc"),
        gguf_of(ggml__tokens=[1, 2]),
        gguf_of(ggml__merges=None),
        gguf_of(ggml__merges=["nosuch pair"]),
        gguf_of(ggml__merges=["x"]),
        gguf_of(ggml__token_type=[1]),
        gguf_of(ggml__token_type=3),
        gguf_of(ggml__tokens=["a"] * 321),
    ],
)
def test_a_malformed_list_is_a_format_error(checkpoint: Any) -> None:
    """It says which list."""
    with pytest.raises(FormatError, match=r"m\.gguf"):
        load_tokenizer(checkpoint)


@pytest.mark.parametrize(
    "body",
    [
        "{",
        "[]",
        '{"added_tokens": 3}',
        '{"added_tokens": [{"id": 1}]}',
        '{"added_tokens": [{"id": -1, "content": "x"}]}',
        '{"added_tokens": []}',
        '{"model": {"type": "Nonsense"}}',
    ],
)
def test_a_malformed_tokenizer_json_is_a_format_error(tmp_path: Path, body: str) -> None:
    """Not a missing tokenizer: silence would skip whatever needs one."""
    (tmp_path / "tokenizer.json").write_text(body, encoding="utf-8")
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        load_tokenizer(folder_of(tmp_path))


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["F16", "Q4_K_M", "Q6_K", "Q8_0"])
def test_the_ggufs_of_llama_cpp_carry_the_tokenizer_of_their_source(oracle: Path, name: str) -> None:
    """Files written by llama.cpp, read by us: same ids, ends and template as the SafeTensors folder."""
    with open_checkpoint(oracle / "mini") as source, open_checkpoint(oracle / "mini" / "gguf" / f"{name}.gguf") as file:
        one, other = load_tokenizer(source), load_tokenizer(file)
    text = "def fib(n):\n    return 12345 é 写一个 <|im_start|>x\r\n\n"
    assert other.encode(text) == one.encode(text)
    assert (other.special_ids, other.eos_ids, other.template_hash) == (one.special_ids, one.eos_ids, one.template_hash)

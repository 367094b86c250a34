"""
Where a model's vocabulary, end tokens and chat template are read from: beside the weights, or inside the file.

SafeTensors has them in ``tokenizer.json``, ``tokenizer_config.json``, ``generation_config.json``, ``config.json`` and
``chat_template.jinja``. GGUF and APR carry them inside, and then nothing else is looked at: a ``tokenizer.json`` that
happens to lie in the same folder belongs to some other model.

Source: the ``tokenizers`` package's JSON; llama.cpp's ``llama-vocab.cpp`` for GGUF keys, token types and the texts that
end a generation; `spec/apr.md` 1.3 for APR.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apr_core.errors import FormatError, LoadError
from apr_core.formats.checkpoint import Checkpoint, read_companion
from apr_core.formats.strict_json import parse_object
from apr_core.model.config import token_ids

QWEN2_PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BPE_DEFAULTS: Mapping[str, Any] = {
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
"""What ``tokenizer.json`` of a Qwen2 says of its model besides words and merges."""
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Token types of GGUF."""
# Tokens that llama.cpp ends on by their text, whatever else a GGUF names: a Qwen2.5 that may only stop on one of the
# two talks on after the other.
_CHATML_ENDS = frozenset({"<|im_end|>", "<|endoftext|>"})
_APR_CONTROL = re.compile(r"<\|.+\|>", re.DOTALL)
_APR_TAG = re.compile(r"</?[a-z_]+>")
_APR_TAG_CHARS = 20


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in text as a whole, before byte pairs are merged."""

    id: int
    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def control(self) -> bool:
        """True when only a template, or a person who asks for it, may write this token."""
        return self.special or self.content.startswith("<|")

    @property
    def pattern(self) -> str:
        """The regular expression that finds it, surroundings included as its flags say."""
        word = rf"(?<!\w){re.escape(self.content)}(?!\w)" if self.single_word else re.escape(self.content)
        return (r"\s*" if self.lstrip else "") + word + (r"\s*" if self.rstrip else "")


@dataclass(frozen=True)
class Vocabulary:
    """
    What the files say, untouched.

    Attributes:
        source: The file that the tokens were read from.
        bpe: The document that the ``tokenizers`` package reads, without added tokens.
        added: Added tokens, control tokens among them.
        eos_ids: End tokens that are named by id.
        eos_texts: End tokens that are named by text.
        bos_id: The begin token.
        add_bos: Whether raw text begins with it.
        chat_template: Jinja source.
        variables: Texts of the named special tokens.
    """

    source: Path
    bpe: Mapping[str, Any]
    added: tuple[AddedToken, ...]
    eos_ids: frozenset[int]
    eos_texts: frozenset[str]
    bos_id: int | None
    add_bos: bool
    chat_template: str | None
    variables: Mapping[str, str] = field(default_factory=dict)


def token_table(ids: Mapping[str, int], control: Mapping[int, bool], rows: int) -> tuple[list[str], list[int]]:
    """
    Lay a vocabulary out as a list whose index is the id, with GGUF's token types.

    Ids without a token, up to the rows of the embedding, become ``[PADn]`` of type unused, as llama.cpp's converter
    writes them: the list must be as long as the embedding.

    Args:
        ids: Text -> id, added tokens among them.
        control: Id of an added token -> whether it is a control token.
        rows: Rows of the embedding.
    """
    count = max(rows, 1 + max(ids.values(), default=-1))
    tokens, kinds = [f"[PAD{i}]" for i in range(count)], [UNUSED] * count
    for text, i in ids.items():
        tokens[i], kinds[i] = text, NORMAL
    for i, is_control in control.items():
        kinds[i] = CONTROL if is_control else USER_DEFINED
    return tokens, kinds


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """
    Read what belongs to ``checkpoint``.

    Raises:
        LoadError: There is no tokenizer.
        FormatError: A file is malformed.
    """
    if checkpoint.format == "gguf":
        return _from_gguf(checkpoint)
    return _from_apr(checkpoint) if checkpoint.format == "apr" else _from_folder(checkpoint)


def _from_folder(checkpoint: Checkpoint) -> Vocabulary:
    path = checkpoint.folder / "tokenizer.json"
    document = _read_json(path)
    if document is None:
        raise LoadError(f"no tokenizer: expected {path}", advice="put tokenizer.json beside the weights")
    settings = _read_json(checkpoint.folder / "tokenizer_config.json") or {}
    generation = _read_json(checkpoint.folder / "generation_config.json") or {}
    config = checkpoint.config or {}
    added = document.get("added_tokens") or []
    if not isinstance(added, list):
        raise _malformed(path, "a list of added_tokens", type(added).__name__)
    variables = {
        key: text
        for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (text := _token_text(settings.get(key))) is not None
    }
    bos = token_ids(config.get("bos_token_id"), "bos_token_id")
    return Vocabulary(
        source=path,
        bpe=document,
        added=tuple(_added_token(token, path) for token in added),
        eos_ids=frozenset(
            token_ids(config.get("eos_token_id"), "eos_token_id")
            + token_ids(generation.get("eos_token_id"), "eos_token_id of generation_config.json")
        ),
        eos_texts=frozenset({variables["eos_token"]} if "eos_token" in variables else ()),
        bos_id=bos[0] if bos else None,
        add_bos=settings.get("add_bos_token") is True,
        chat_template=_template_of(checkpoint.folder, settings),
        variables=variables,
    )


def _from_gguf(checkpoint: Checkpoint) -> Vocabulary:
    meta, path = checkpoint.metadata, checkpoint.path
    if "tokenizer.ggml.tokens" not in meta:
        raise LoadError(f"no tokenizer in {path}", advice="convert the model again with its tokenizer")
    kind = (meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "qwen2"):
        raise LoadError(
            f"unsupported tokenizer in {path}: expected gpt2 with pre-tokenizer qwen2, found {kind[0]} with {kind[1]}",
            advice="a wrong pre-tokenizer gives other ids for the same text; convert the model again",
        )
    tokens = _strings(meta.get("tokenizer.ggml.tokens"), "tokenizer.ggml.tokens", path)
    types = meta.get("tokenizer.ggml.token_type")
    ends = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    named = {key: meta.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}
    bos = token_ids(named["bos_token"], "tokenizer.ggml.bos_token_id")
    return Vocabulary(
        source=path,
        **_from_list(tokens, types, _strings(meta.get("tokenizer.ggml.merges"), "tokenizer.ggml.merges", path), path),
        eos_ids=frozenset(i for key in ends for i in token_ids(meta.get(key), key)),
        eos_texts=_CHATML_ENDS,
        bos_id=bos[0] if bos else None,
        add_bos=meta.get("tokenizer.ggml.add_bos_token") is True,
        chat_template=_text(meta.get("tokenizer.chat_template")),
        variables={k: tokens[i] for k, i in named.items() if isinstance(i, int) and 0 <= i < len(tokens)},
    )


def _from_apr(checkpoint: Checkpoint) -> Vocabulary:
    meta, path = checkpoint.metadata, checkpoint.path
    if meta.get("tokenizer.vocabulary") is None or meta.get("tokenizer.merges") is None:
        raise LoadError(
            f"no tokenizer in {path}: an APR file needs tokenizer.vocabulary and tokenizer.merges",
            advice="convert the model again with its tokenizer",
        )
    tokens = _strings(meta["tokenizer.vocabulary"], "tokenizer.vocabulary", path)
    types = meta.get("tokenizer.token_type") or [_type_by_text(token) for token in tokens]
    config = checkpoint.config or {}
    bos = token_ids(config.get("bos_token_id"), "tokenizer.bos_token_id")
    ends = token_ids(config.get("eos_token_id"), "tokenizer.eos_token_id")
    variables = {"bos_token": bos[:1], "eos_token": ends[:1]}
    return Vocabulary(
        source=path,
        **_from_list(tokens, types, _strings(meta["tokenizer.merges"], "tokenizer.merges", path), path),
        eos_ids=frozenset(ends),
        eos_texts=_CHATML_ENDS,
        bos_id=bos[0] if bos else None,
        add_bos=meta.get("tokenizer.add_bos_token") is True,
        chat_template=_text(meta.get("tokenizer.chat_template")) or _text(meta.get("chat_template")),
        variables={k: tokens[i[0]] for k, i in variables.items() if i and i[0] < len(tokens)},
    )


def _from_list(tokens: Sequence[str], types: object, merges: Sequence[str], path: Path) -> dict[str, Any]:
    """Build the document and the added tokens from lists, as GGUF and APR hold them: index = id."""
    if types is None:
        types = [_type_by_text(token) for token in tokens]
    if not isinstance(types, list) or len(types) != len(tokens):
        found = len(types) if isinstance(types, list) else type(types).__name__
        raise _malformed(path, f"{len(tokens)} token types", str(found))
    vocab: dict[str, int] = {}
    added: list[AddedToken] = []
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (CONTROL, USER_DEFINED):
            added.append(AddedToken(i, token, special=kind == CONTROL))
        elif kind != UNUSED and vocab.setdefault(token, i) != i:
            raise _malformed(path, "each token once", f"{token!r:.80} as {vocab[token]} and {i}")
    pairs = [merge.split(" ", 1) for merge in merges]
    split = {"type": "Split", "pattern": {"Regex": QWEN2_PRE_TOKENIZER}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bpe = {
        "version": "1.0",
        # Neither format can say so, but the vendor's tokenizer normalises; without it a decomposed é gets other ids.
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": pairs},
    }
    return {"bpe": bpe, "added": tuple(added)}


def _type_by_text(token: str) -> int:
    """Recover a token's type from how it is written, for files that do not store it."""
    if _APR_CONTROL.fullmatch(token):
        return CONTROL
    return USER_DEFINED if len(token) <= _APR_TAG_CHARS and _APR_TAG.fullmatch(token) else 1


def _template_of(folder: Path, settings: Mapping[str, object]) -> str | None:
    """Find the template: its own file wins, as in transformers; of several named ones the default is taken."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_companion(path).decode("utf-8", "replace")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        template = named.get("default")
    return _text(template)


def _added_token(token: object, path: Path) -> AddedToken:
    if isinstance(token, Mapping):
        i, content = token.get("id"), token.get("content")
        if isinstance(i, int) and not isinstance(i, bool) and i >= 0 and isinstance(content, str) and content:
            flags = {name: token.get(name) is True for name in ("special", "lstrip", "rstrip", "single_word")}
            return AddedToken(i, content, **flags)
    raise _malformed(path, "an added token with id and content", f"{token!r:.80}")


def _token_text(value: object) -> str | None:
    return _text(value.get("content") if isinstance(value, Mapping) else value)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _strings(value: object, what: str, path: Path) -> list[str]:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise _malformed(path, f"a list of strings as {what}", type(value).__name__)


def _read_json(path: Path) -> dict[str, object] | None:
    if not path.is_file():
        return None
    return parse_object(read_companion(path), file=path, what=path.name, at=0)


def _malformed(path: Path, expected: str, found: str) -> FormatError:
    return FormatError(expected=expected, found=found, file=path, advice="get a fresh copy of the file")

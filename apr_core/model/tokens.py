"""
Text to token ids and back, and the only way into a model.

`PreparedTokens` is all that inference takes, and `prepare_tokens` is all that makes it: a chat through the model's own
template, raw text that says so, or ids that say so. Nothing wraps a base model that has no template, and nothing falls
back: a missing tokenizer or template is an error, never a guess.

**What people write can never become a control token.** A control token is an added token that is marked special or
whose text begins with ``<|``. Three steps see to it:

1. While the template runs, every ``|`` of a message is a private-use character. A control token needs a bar, so it can
   only come from bars that the template itself wrote; no cutting and joining inside the template changes that.
2. The rendering is split at the added tokens here, before the bars are put back.
3. What lies between is encoded by an encoder that knows no added token at all.

For messages without a control token's text the ids are those of transformers. For messages with one they differ on
purpose: transformers lets the text become the token. Raw text is treated the same way unless ``parse_special=True``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from apr_core.errors import FormatError, LoadError, UsageError
from apr_core.formats.checkpoint import Checkpoint
from apr_core.model.vocabulary import AddedToken, Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from apr_core.model.trace import TracedForward

ROLES = ("system", "user", "assistant", "tool")
MAX_TEXT_CHARS = 1 << 23
_PRIVATE_USE = range(0xE000, 0xF900)
_ESCAPE = re.compile(r"\\u([0-9a-f]{4})")
_BARS = "|｜"  # the second one is full width: some Qwen2 derivatives write their control tokens with it
_KEY = object()
_LISTED = {"type", "vocab", "merges"}  # what `vocabulary` makes of the lists in a GGUF or APR


class Tokenizer:
    """
    A byte-level BPE tokenizer with its control tokens kept apart. Build it with `load_tokenizer`.

    Attributes:
        special_ids: Text of each control token -> its id.
        eos_ids: The union of the end tokens that the model's files name.
        chat_template: Jinja source, or None: then this is a base model and messages are refused.
        template_hash: sha256 of ``chat_template`` in hex, or None.
        template_variables: Texts of the named special tokens (``bos_token`` ...) that a template may use.
        vocab_size: One more than the largest id.
        add_bos: Whether the files ask for the begin token before raw text.
        bos_id: The begin token, or None.
        source: The file that all of this was read from.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        added = vocabulary.added
        self._bpe, base = _plain_encoder(vocabulary)
        self._added = {token.id: token for token in added}
        self._finders = {
            parse_special: _Finder([token for token in added if parse_special or not token.control])
            for parse_special in (False, True)
        }
        texts = base | {token.content: token.id for token in added}
        bos_text = vocabulary.variables.get("bos_token", "")
        self.vocab_size = 1 + max([*base.values(), *self._added], default=-1)
        self.special_ids: Mapping[str, int] = MappingProxyType({t.content: t.id for t in added if t.control})
        self.eos_ids = vocabulary.eos_ids | {texts[text] for text in vocabulary.eos_texts if text in texts}
        self.bos_id = vocabulary.bos_id if vocabulary.bos_id is not None else texts.get(bos_text)
        self.add_bos = vocabulary.add_bos
        self.template_variables: Mapping[str, str] = MappingProxyType(dict(vocabulary.variables))
        self.chat_template = template = vocabulary.chat_template
        self.template_hash = None if template is None else hashlib.sha256(template.encode()).hexdigest()
        self.source = vocabulary.source

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """
        Return the ids of ``text``; control tokens in it stay text unless ``parse_special``.

        Raises:
            UsageError: ``text`` is not a string of valid Unicode, or is longer than ``MAX_TEXT_CHARS``.
        """
        return self._encode(_require_text(text, "the text"), parse_special, {})

    def encode_rendering(self, rendering: str, bars: Mapping[str, str]) -> list[int]:
        """Return the ids of a rendering in which private-use characters (``bars``: each -> its bar) still hide bars."""
        return self._encode(rendering, True, bars)

    def decode(self, ids: Sequence[int] | NDArray[np.int64], skip_special: bool = True) -> str:
        """
        Return the text of ``ids``, bytes that are not UTF-8 as U+FFFD.

        Total: ids without a token (the unused rows of an embedding) are nothing. ``skip_special`` leaves control
        tokens out.
        """
        pieces: list[str] = []
        run: list[int] = []
        for i in map(int, ids):
            token = self._added.get(i)
            if token is None:
                if 0 <= i < self.vocab_size:
                    run.append(i)
            elif not (token.control and skip_special):
                pieces += (self._bpe.decode(run), token.content)
                run = []
        return "".join([*pieces, self._bpe.decode(run)])

    def _encode(self, text: str, parse_special: bool, bars: Mapping[str, str]) -> list[int]:
        table = _table(bars)
        ids: list[int] = []
        for piece, token_id in self._finders[parse_special].split(text):
            ids += self._bpe.encode(piece.translate(table), add_special_tokens=False).ids
            if token_id is not None:
                ids.append(token_id)
        return ids


class _Finder:
    """Splits text at added tokens: leftmost first, the longest of those that begin there."""

    def __init__(self, tokens: Sequence[AddedToken]) -> None:
        ordered = sorted(tokens, key=lambda token: -len(token.content))
        self._ids = [token.id for token in ordered]
        self._pattern = re.compile("|".join(f"({token.pattern})" for token in ordered)) if ordered else None

    def split(self, text: str) -> list[tuple[str, int | None]]:
        """Return (text before, token id) pairs; the last has no token."""
        parts: list[tuple[str, int | None]] = []
        at = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            assert match.lastindex is not None
            parts.append((text[at : match.start()], self._ids[match.lastindex - 1]))
            at = match.end()
        return [*parts, (text[at:], None)]


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """
    Load the tokenizer that belongs to ``checkpoint``, and no other.

    Raises:
        LoadError: There is none, or it is of a kind that is not supported.
        FormatError: It is malformed.
    """
    return Tokenizer(read_vocabulary(checkpoint))


@dataclass(frozen=True, eq=False)
class PreparedTokens:
    """
    Token ids on their way into a model; only `prepare_tokens` makes one.

    The guarantee is against accident, not malice: direct construction, ``dataclasses.replace``, copying and pickling
    raise TypeError.

    Attributes:
        ids: int64 [tokens], read-only.
        mode: ``chat`` (through the model's template), ``raw`` (text as it is) or ``ids`` (given as ids).
        text: What was encoded; None for ids.
        template_hash: sha256 of the template, for ``chat`` alone.
    """

    ids: NDArray[np.int64]
    mode: Literal["chat", "raw", "ids"]
    text: str | None
    template_hash: str | None
    _key: object = None

    def __post_init__(self) -> None:
        if self._key is not _KEY:
            raise TypeError("PreparedTokens is made by prepare_tokens alone; call prepare_tokens(model, ...)")
        object.__setattr__(self, "_key", None)  # otherwise replace() would carry the key along
        # Bytes-backed, because the owner of an ordinary array can switch its write flag back on.
        ids = np.frombuffer(np.asarray(self.ids, dtype=np.int64).tobytes(), dtype=np.int64)
        object.__setattr__(self, "ids", ids)

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("PreparedTokens cannot be copied or pickled; call prepare_tokens again")


def prepare_tokens(
    model: TracedForward | Tokenizer,
    *,
    messages: Sequence[Mapping[str, object]] | None = None,
    text: str | None = None,
    ids: Sequence[int] | NDArray[np.int64] | None = None,
    parse_special: bool = False,
) -> PreparedTokens:
    """
    Make what inference takes, from exactly one of ``messages``, ``text`` and ``ids``.

    Args:
        model: The model, or its tokenizer alone.
        messages: A conversation of ``{"role", "content", ...}``; rendered by the model's own template with the
            generation prompt added.
        text: Raw text, not wrapped in anything; the begin token is put before it only where the files ask for it.
        ids: Token ids as they are; the one way that works without a tokenizer.
        parse_special: For raw text: let control tokens in it be tokens.

    Raises:
        UsageError: Not exactly one of the three, or what was given is not of the kind described; ids out of range.
        LoadError: Messages or text without a tokenizer, messages without a template, an unusable template.
        InferenceError: The template refuses the messages.
    """
    if sum(given is not None for given in (messages, text, ids)) != 1:
        raise UsageError("expected exactly one of messages, text and ids", advice="give one of them")
    tokenizer = model if isinstance(model, Tokenizer) else model.tokenizer
    if ids is not None:
        vocabulary = model.vocab_size if isinstance(model, Tokenizer) else model.config.vocab_size
        return PreparedTokens(_require_ids(ids, vocabulary), "ids", None, None, _KEY)
    if tokenizer is None:
        raise LoadError(
            "this model came without a tokenizer (or with one that is not supported), so it takes no text",
            advice="give token ids (ids=...), or put tokenizer.json beside the weights",
        )
    if text is not None:
        encoded = tokenizer.encode(text, parse_special=parse_special)
        if tokenizer.add_bos and tokenizer.bos_id is not None and encoded[:1] != [tokenizer.bos_id]:
            encoded.insert(0, tokenizer.bos_id)
        return PreparedTokens(np.array(encoded, dtype=np.int64), "raw", text, None, _KEY)
    if parse_special:
        raise UsageError("parse_special is for raw text", advice="leave it out: content never holds control tokens")
    rendering, encoded = _through_template(tokenizer, messages)
    return PreparedTokens(np.array(encoded, dtype=np.int64), "chat", rendering, tokenizer.template_hash, _KEY)


def _through_template(tokenizer: Tokenizer, messages: object) -> tuple[str, list[int]]:
    """Render messages with their bars hidden; return the rendering with the bars back, and its ids."""
    if tokenizer.chat_template is None:
        raise LoadError(f"no chat template in {tokenizer.source}: a base model is not wrapped", advice="use text=...")
    from apr_core.model.template import render

    conversation = _Conversation.check(messages)
    hidden = conversation.hide(tokenizer.chat_template)
    variables = {**tokenizer.template_variables, "messages": hidden.messages, "add_generation_prompt": True}
    rendering = render(tokenizer.chat_template, {**variables, "tools": None, "documents": None})
    # A template may ask for ASCII-only JSON; then a stand-in arrives as an escape. It must not become a bar before the
    # rendering is split, or content would write control tokens after all.
    for stand_in, bar in hidden.bars.items():
        rendering = rendering.replace(_escape(stand_in), stand_in if bar.isascii() else _escape(bar))
    ids = tokenizer.encode_rendering(rendering, hidden.bars)
    return rendering.translate(_table(hidden.bars)), ids


@dataclass(frozen=True)
class _Conversation:
    """Checked messages: plain values, owned; all their text; and what stands for their bars while a template runs."""

    messages: list[Any]
    text: str
    bars: Mapping[str, str]

    @classmethod
    def check(cls, messages: object) -> Self:
        """Copy and judge messages; roles must be known, because a template drops unknown ones in silence."""
        if not isinstance(messages, list | tuple) or not messages:
            raise UsageError(
                f"expected a non-empty list of messages, found {type(messages).__name__}",
                advice='give [{"role": "user", "content": "..."}]',
            )
        for at, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise UsageError(f'expected {{"role": ..., "content": ...}} as message {at}, found {message!r:.80}')
            if message["role"] not in ROLES:
                raise UsageError(
                    f"expected a role of {', '.join(ROLES)} in message {at}, found {message['role']!r:.80}",
                    advice="a template would drop this message in silence",
                )
        leaves: list[str] = []
        return cls(_plain(messages, leaves), "".join(leaves), {})

    def hide(self, template: str) -> Self:
        """Replace every bar by a private-use character that neither the messages nor ``template`` use, or escape."""
        taken = {*self.text, *template, *(chr(int(digits, 16)) for digits in _ESCAPE.findall(self.text + template))}
        free = (c for c in map(chr, _PRIVATE_USE) if c not in taken)
        stand_ins = dict(zip(_BARS, free, strict=False))
        if len(stand_ins) < len(_BARS):
            raise UsageError("the messages use every private-use character", advice="remove some")
        table = _table(stand_ins)
        hidden = _translated(self.messages, table)
        return type(self)(hidden, self.text, {c: bar for bar, c in stand_ins.items()})


def _plain(value: object, leaves: list[str], depth: int = 0) -> Any:
    """Copy nested plain values, collecting every text that occurs."""
    if depth > 64:
        raise UsageError("the messages are nested more than 64 deep", advice="flatten them")
    if isinstance(value, str):
        text = _require_text(value, "a message")
        leaves.append(text)
        return text
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise UsageError("expected string keys in a message", advice="messages are JSON")
        return {_plain(k, leaves, depth + 1): _plain(v, leaves, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, leaves, depth + 1) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    raise UsageError(f"expected text, numbers, lists and objects in a message, found {type(value).__name__}")


def _escape(character: str) -> str:
    return f"\\u{ord(character):04x}"


def _table(replacements: Mapping[str, str]) -> dict[int, str]:
    return {ord(character): text for character, text in replacements.items()}


def _translated(value: Any, table: dict[int, str]) -> Any:
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, dict):
        return {k.translate(table): _translated(v, table) for k, v in value.items()}
    return [_translated(item, table) for item in value] if isinstance(value, list) else value


def _require_text(text: object, what: str) -> str:
    """Return ``text`` when it is Unicode that UTF-8 can write: a lone surrogate would raise deep inside the encoder."""
    if not isinstance(text, str):
        raise UsageError(f"expected a string for {what}, found {type(text).__name__}")
    if len(text) > MAX_TEXT_CHARS:
        raise UsageError(f"expected at most {MAX_TEXT_CHARS} characters for {what}, found {len(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"expected valid Unicode for {what}, found a lone surrogate at character {error.start}",
            advice="read the file as UTF-8",
        ) from None
    return str(text)


def _require_ids(ids: object, vocabulary: int) -> NDArray[np.int64]:
    try:
        array = np.asarray(ids)
    except ValueError:  # rows of different lengths
        raise UsageError("expected a flat list of token ids, found lists within the list") from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UsageError(f"expected a flat list of token ids, found {array.dtype} of shape {array.shape}")
    outside = (array < 0) | (array >= vocabulary)
    if outside.any():
        at = int(outside.argmax())
        raise UsageError(f"expected token ids in 0..{vocabulary - 1}, found {array[at]} at position {at}")
    return array.astype(np.int64)


def _plain_encoder(vocabulary: Vocabulary) -> tuple[Any, dict[str, int]]:
    """
    Build the byte-pair encoder without added tokens, without truncation and without anything put around the text.

    Returns:
        The encoder, and its words with their ids.
    """
    from tokenizers import Tokenizer as Encoder
    from tokenizers.models import BPE

    bare = {**vocabulary.bpe, "added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
    try:
        model = bare.get("model")
        if not isinstance(model, Mapping) or set(model) != _LISTED:
            encoder = Encoder.from_str(json.dumps(bare))
            return encoder, encoder.get_vocab(with_added_tokens=False)
        # words and merges alone, from a list: handed over as they are, in a third of the time that JSON takes
        encoder = Encoder.from_str(json.dumps({**bare, "model": {"type": "BPE", "vocab": {}, "merges": []}}))
        encoder.model = BPE(model["vocab"], [(first, second) for first, second in model["merges"]])
        return encoder, model["vocab"]
    except Exception as error:  # the package raises bare Exception for whatever it cannot read
        raise FormatError(
            expected="a tokenizer", found=str(error), file=vocabulary.source, advice="get a fresh copy of the file"
        ) from error

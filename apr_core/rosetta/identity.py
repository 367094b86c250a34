"""Does one file say what the other says, besides its tensors: configuration, tokenizer, end tokens, chat template?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from apr_core.errors import LoadError
from apr_core.formats.checkpoint import Checkpoint
from apr_core.model.config import Qwen2Config
from apr_core.model.tokens import Tokenizer
from apr_core.model.vocabulary import Vocabulary
from apr_core.rosetta.carry import Identity, merges, read_identity, token_ids
from apr_core.rosetta.fingerprint import EMBEDDING, HEAD

_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_theta",
    "rms_norm_eps",
)
# Texts on which tokenizers that are almost the same part ways.
CORPUS = (
    "it's we'll I'M they'VE 'tis",
    "0123456789 3.14159 1,000,000 ½ ٣٤",
    "def f(x):\n\treturn x ** 2  # square\r\n\r\n\n    pass\n",
    "   leading, trailing   \t\n  ",
    "写一个快速排序。ありがとう 한국어",
    "é e\u0301 ﬁ Å \u212b",
    "👩‍💻🏳️‍🌈 🇩🇪",
    "שלום مرحبا \u202eabc",
    "<|im_start|>user\nhi<|im_end|> <|endoftext|> <tool_call></tool_call> <|im_ start|>",
    "\x00\x01\x7f\u00a0\u2028\ufeff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 4,
    "{{ x }} {% y %} \\n \\u0041",
    "",
)


@dataclass(frozen=True)
class Field:
    """
    One compared field.

    Attributes:
        name: What it is.
        subject: What the subject says, shortened.
        reference: What the reference says, shortened.
        same: Whether they say the same.
        note: Counts, for fields too long to show.
    """

    name: str
    subject: str
    reference: str
    same: bool
    note: str = ""

    def as_row(self) -> dict[str, object]:
        """The row as an evidence record holds it."""
        return {
            "field": self.name,
            "subject": self.subject,
            "reference": self.reference,
            "same": self.same,
            "note": self.note,
        }


@dataclass(frozen=True)
class IdentityDiff:
    """
    Every field that was compared, and what could not be.

    Attributes:
        fields: Compared ones.
        missing: What one side does not carry at all, with the side: not a difference, and not a match either.
    """

    fields: Sequence[Field]
    missing: Sequence[str]

    @property
    def differences(self) -> list[Field]:
        """The fields that differ."""
        return [field for field in self.fields if not field.same]


def compare_identity(subject: Checkpoint, reference: Checkpoint) -> IdentityDiff:
    """
    Compare configuration, tokenizer, end tokens and chat template.

    A template that the subject lacks while it has a tokenizer is a difference: chats would not be wrapped. Windows line
    ends in a template, and ends that GGUF and APR readers add by their text, are not.

    Raises:
        LoadError, FormatError: A tokenizer that is there cannot be read.
    """
    sides = (read_identity(subject), read_identity(reference))
    fields = _configurations(subject, reference, sides)
    said = [identity.vocabulary for identity in sides]
    missing: list[str] = []
    if said[0] is not None and said[1] is not None:
        fields += _tokenizers(said[0], said[1])
        fields.append(_ends(*sides))
        _templates(said[0], said[1], fields, missing)
    elif said[0] is not None or said[1] is not None:
        missing.append(f"tokenizer, end tokens and template ({'subject' if said[0] is None else 'reference'} has none)")
    return IdentityDiff(tuple(fields), tuple(missing))


def _configurations(subject: Checkpoint, reference: Checkpoint, sides: tuple[Identity, Identity]) -> list[Field]:
    """Compare the fields that decide the arithmetic; numbers as float32, which is what GGUF keeps."""
    configs: list[Qwen2Config] = []
    for identity in sides:
        try:
            configs.append(Qwen2Config.from_mapping(identity.config))
        except LoadError as error:
            return [Field("configuration", "", "", False, f"{error.message:.200}")]
    fields = []
    for name in _FIELDS:
        left, right = (getattr(config, name) for config in configs)
        fields.append(Field(name, f"{left:g}", f"{right:g}", bool(np.float32(left) == np.float32(right))))
    rows = [_rows(c, config) for c, config in zip((subject, reference), configs, strict=True)]
    fields.append(Field("vocab_size", str(rows[0]), str(rows[1]), rows[0] == rows[1]))
    tied = [_is_tied(c, config) for c, config in zip((subject, reference), configs, strict=True)]
    fields.append(Field("tie_word_embeddings", str(tied[0]), str(tied[1]), tied[0] == tied[1]))
    return fields


def _rows(checkpoint: Checkpoint, config: Qwen2Config) -> int:
    """Rows of the embedding: a GGUF may state only how many tokens have a text, which a padded embedding exceeds."""
    info = checkpoint.tensors.get(EMBEDDING)
    return info.shape[0] if info is not None and info.shape else config.vocab_size


def _is_tied(checkpoint: Checkpoint, config: Qwen2Config) -> bool:
    """Tell whether the head is the embedding: said so, or stored twice with the same bytes."""
    if config.tie_word_embeddings:
        return True
    head, embedding = checkpoint.tensors.get(HEAD), checkpoint.tensors.get(EMBEDDING)
    if head is None or embedding is None or (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return False
    return bool(np.array_equal(checkpoint.raw(HEAD).data, checkpoint.raw(EMBEDDING).data))


def _tokenizers(left: Vocabulary, right: Vocabulary) -> list[Field]:
    """Compare tokens, merges and control tokens, then what both make of texts that part almost-equal tokenizers."""
    fields: list[Field] = []
    ids = [token_ids(left), token_ids(right)]
    other = sorted(set(ids[0].items()) ^ set(ids[1].items()), key=lambda item: item[1])
    note = f"first at id {other[0][1]}: {other[0][0]!r:.40}" if other else ""
    fields.append(Field("vocabulary", f"{len(ids[0])} tokens", f"{len(ids[1])} tokens", not other, note))
    ranked = [merges(left), merges(right)]
    unlike = [i for i, (a, b) in enumerate(zip(*ranked, strict=False)) if a != b]
    same = ranked[0] == ranked[1]
    at = unlike[0] if unlike else min(map(len, ranked))
    note = "" if same else f"{len(unlike)} differ, first at rank {at}"
    fields.append(Field("merges", f"{len(ranked[0])} merges", f"{len(ranked[1])} merges", same, note))
    made = [Tokenizer(left), Tokenizer(right)]
    control = [dict(tokenizer.special_ids) for tokenizer in made]
    fields.append(Field("control tokens", str(len(control[0])), str(len(control[1])), control[0] == control[1]))
    fields.append(Field("add_bos_token", str(left.add_bos), str(right.add_bos), left.add_bos == right.add_bos))
    wrong, count = [], [0, 0]
    for text in CORPUS:
        for special in (False, True):
            encoded = [tokenizer.encode(text, parse_special=special) for tokenizer in made]
            count = [n + len(e) for n, e in zip(count, encoded, strict=True)]
            if encoded[0] != encoded[1]:
                wrong.append(text)
    note = f"{len(wrong)} texts differ, first {wrong[0]!r:.60}" if wrong else f"{2 * len(CORPUS)} encodings"
    fields.append(Field("ids of the corpus", str(count[0]), str(count[1]), not wrong, note))
    return fields


def _ends(left: Identity, right: Identity) -> Field:
    """Compare end tokens; one that a GGUF or APR reader adds by its text alone is not what the file says."""
    excused: set[int] = set()
    for identity in (left, right):
        vocabulary = identity.vocabulary
        assert vocabulary is not None
        if vocabulary.source.suffix != ".json":
            ids = token_ids(vocabulary)
            excused |= {ids[text] for text in vocabulary.eos_texts if text in ids}
    other = (set(left.ends) ^ set(right.ends)) - excused
    return Field("end tokens", str(sorted(left.ends)), str(sorted(right.ends)), not other)


def _templates(left: Vocabulary, right: Vocabulary, fields: list[Field], missing: list[str]) -> None:
    """Compare chat templates as text, line ends apart."""
    texts = [v.chat_template.replace("\r\n", "\n") if v.chat_template is not None else None for v in (left, right)]
    if texts[1] is None and texts[0] is not None:
        missing.append("chat template (reference has none)")
        return
    shown = ["none" if text is None else f"{len(text)} characters" for text in texts]
    note = ""
    if texts[0] is not None and texts[1] is not None and texts[0] != texts[1]:
        pairs = enumerate(zip(*texts, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(texts[0]), len(texts[1])))
        note = f"first at character {at}: {texts[0][at : at + 20]!r} for {texts[1][at : at + 20]!r}"
    fields.append(Field("chat template", shown[0], shown[1], texts[0] == texts[1], note))

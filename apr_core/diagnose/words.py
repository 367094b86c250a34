"""Against a reference: configuration, tokenizer, chat template, end tokens, and records beside the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from apr_core.contract.layout import read_geometry
from apr_core.contract.plausible import CONFIG_RULES
from apr_core.diagnose.cause import Cause
from apr_core.errors import AprError, FormatError, LoadError
from apr_core.formats.checkpoint import Checkpoint
from apr_core.model.tokens import Tokenizer
from apr_core.model.vocabulary import Vocabulary, read_vocabulary
from apr_core.rosetta.carry import has_tokenizer
from apr_core.rosetta.identity import CORPUS, Field, compare_identity

_WORDS = {"vocabulary", "merges", "control tokens", "add_bos_token", "ids of the corpus"}
_OF_TENSORS = ("vocab_size", "tie_word_embeddings")  # what a tensor of another shape, or a stored head, changes as well
_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "rope_theta", "rms_norm_eps", "model_type"),
    *("eos_token_id", "use_sliding_window", "rope_scaling"),
)


def explain_words(subject: Checkpoint, reference: Checkpoint, *, tensors: bool) -> list[Cause]:
    """
    Compare everything besides the tensors, and put parts of the reference in the subject's place.

    Args:
        subject: The file that failed.
        reference: What it should say.
        tensors: Whether a cause was found in the tensors, which explains fields that follow from them.
    """
    try:
        found = compare_identity(subject, reference)
    except (LoadError, FormatError) as error:
        return [_unreadable(subject, reference, error)]
    causes: list[Cause] = []
    differing = {f.name: f for f in found.differences}
    config = [f for f in found.differences if _about_config(f) and not (tensors and f.name in _OF_TENSORS)]
    if config:
        causes.append(_configuration(config, subject, reference))
    causes += _tokenizer(subject, reference, [f for f in found.differences if f.name in _WORDS])
    if f := differing.get("chat template"):
        answer = f"the subject has {f.subject}, the reference {f.reference}; {f.note}"
        causes.append(Cause("template", "Is it the chat template?", answer, "take the reference's", True, op=f.name))
    if (f := differing.get("end tokens")) and not causes:
        if impossible := _impossible_ends(subject):
            return [
                Cause("configuration", "Is it the configuration?", impossible, f"name {f.reference}", True, op=f.name)
            ]
        answer = f"answers end at {f.subject}, in the reference at {f.reference}"
        causes.append(Cause("stop", "Where do answers end?", answer, f"name {f.reference}", True, op=f.name))
    return causes


def _about_config(field: Field) -> bool:
    return field.name not in _WORDS | {"chat template", "end tokens"}


def _configuration(fields: list[Field], subject: Checkpoint, reference: Checkpoint) -> Cause:
    """Take the first field that differs as the cause; sizes that follow from it differ as well."""
    said = "; ".join(f"{f.name} is {f.subject}, in the reference {f.reference} {f.note}".strip() for f in fields)
    first = fields[0]
    name = first.name if first.name != "configuration" else _raw_difference(subject, reference)
    repair = f"put {name} back to {first.reference}" if first.reference else f"take {name} of the reference"
    return Cause("configuration", "Is it the configuration?", said, repair, True, op=name)


def _impossible_ends(subject: Checkpoint) -> str:
    """Say which end tokens no vocabulary of this size has."""
    geometry, problems = read_geometry(subject.config or {})
    outside = None if problems else CONFIG_RULES["end_tokens_outside"](subject.config or {}, geometry)
    if not outside:
        return ""
    return f"end tokens {(subject.config or {}).get('eos_token_id')} of a vocabulary of {geometry.vocab_size} rows"


def _raw_difference(subject: Checkpoint, reference: Checkpoint) -> str:
    """Name the first key that the two configurations state differently."""
    left, right = subject.config or {}, reference.config or {}
    return next((key for key in _KEYS if left.get(key) != right.get(key)), "")


def _unreadable(subject: Checkpoint, reference: Checkpoint, error: AprError) -> Cause:
    """Decide whose fault it is that companions cannot be read: the configuration's or the tokenizer's."""
    key = _raw_difference(subject, reference)
    if key:
        return Cause("configuration", "Can the companions be read?", error.message, f"put {key} back", True, op=key)
    return Cause("tokenizer", "Can the companions be read?", error.message, "take the reference's tokenizer", op="file")


# --- tokenizer


def _tokenizer(subject: Checkpoint, reference: Checkpoint, fields: list[Field]) -> list[Cause]:
    """Compare what both tokenizers do; put one part of the reference's in after the other, and keep what restores."""
    if has_tokenizer(reference) and not has_tokenizer(subject):
        return [Cause("tokenizer", "Is there a tokenizer?", "none; the reference has one", "carry it along", op="file")]
    if not (has_tokenizer(subject) and has_tokenizer(reference)):
        return []
    mine, other = read_vocabulary(subject), read_vocabulary(reference)
    before = differences(mine, other)
    if not before and not fields:
        return []
    answer = (
        f"{len(before)} of {len(list(_probes(other)))} probes are read or written otherwise, the first {before[:1]!r}"
    )
    if not before:  # nothing that was tried is read otherwise, and the files say different things all the same
        answer = "; ".join(f"{f.name}: {f.subject}, in the reference {f.reference} {f.note}" for f in fields)
        repair = f"take the reference's {fields[0].name}"
        return [Cause("tokenizer", "Is it the tokenizer?", answer, repair, op=fields[0].name)]
    for part in ("normalizer", "pre_tokenizer", "decoder", "added tokens", "merges", "vocabulary", "bos"):
        repaired = differences(_with_part(mine, other, part), other)
        if repaired is not None and len(repaired) < len(before):
            text = f"with the reference's {part}: {len(repaired)} of {len(before)} are left"
            proved = not repaired
            return [Cause("tokenizer", "Is it the tokenizer?", answer, text, proved, op=part)]
    return [Cause("tokenizer", "Is it the tokenizer?", answer, "take the reference's tokenizer", op="vocabulary")]


def _with_part(mine: Vocabulary, other: Vocabulary, part: str) -> Vocabulary:
    """Put one part of the reference's tokenizer into the subject's."""
    bpe: dict[str, Any] = dict(mine.bpe)
    model = dict(bpe["model"])
    if part in ("normalizer", "pre_tokenizer", "decoder"):
        bpe[part] = other.bpe.get(part)
    elif part == "added tokens":
        added = {t.content for t in other.added}
        vocab = {k: v for k, v in model["vocab"].items() if k not in added or k in other.bpe["model"]["vocab"]}
        bpe["model"] = {**model, "vocab": vocab}
        return replace(mine, bpe=bpe, added=other.added)
    elif part == "merges":
        bpe["model"] = {**model, "merges": other.bpe["model"]["merges"]}
    elif part == "vocabulary":
        bpe["model"] = other.bpe["model"]
    else:
        return replace(mine, add_bos=other.add_bos, bos_id=other.bos_id)
    return replace(mine, bpe=bpe)


def _probes(vocabulary: Vocabulary) -> Iterator[tuple[str, bool]]:
    """Yield texts, and whether control tokens in them count: a corpus, and each control token in rough company."""
    for text in CORPUS:
        yield text, False
        yield text, True
    for token in vocabulary.added:
        if token.control:
            for text in (token.content, f"a {token.content} b", f"x{token.content}\ny", f"{token.content}user"):
                yield text, False
                yield text, True


def differences(mine: Vocabulary, other: Vocabulary) -> list[str]:
    """List the probes that two tokenizers encode otherwise, or whose ids they write otherwise."""
    try:
        left, right = Tokenizer(mine), Tokenizer(other)
    except Exception as error:
        return [f"it cannot be built: {error!s:.80}"] * 1000
    out = []
    for text, special in _probes(other):
        ids = right.encode(text, parse_special=special)
        same = left.encode(text, parse_special=special) == ids
        if not same or left.decode(ids, skip_special=False) != right.decode(ids, skip_special=False):
            out.append(text[:40])
    if mine.add_bos != other.add_bos:
        out.append("(begin of text)")
    return out


# --- what was recorded beside the weights


def explain_records(subject: Checkpoint, reference: Checkpoint) -> list[Cause]:
    """Compare golden answers and recorded logits with the reference's: where all else agrees, the record is wrong."""
    question, causes = "Is it what was recorded beside the weights?", []
    for name, read in (("golden.json", _golden), ("transformers_f64.npz", _arrays)):
        left, right = (c.folder / name for c in (subject, reference))
        if not (left.is_file() and right.is_file()):
            continue
        said = _record_difference(read(left), read(right))
        if said:
            answer = f"tensors and words agree with the reference's, {name} does not: {said}"
            causes.append(Cause("suite", question, answer, f"take the reference's {name}", True, op=name))
    return causes


def _golden(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        return {str(case["id"]): json.dumps(case, sort_keys=True) for case in body["cases"]}
    except (ValueError, KeyError, TypeError, OSError):
        return {"": path.read_bytes()}


def _arrays(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (ValueError, OSError):
        return {"": path.read_bytes()}


def _record_difference(mine: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    for key in dict.fromkeys([*mine, *other]):
        if key not in mine or key not in other or not np.array_equal(np.asarray(mine[key]), np.asarray(other[key])):
            return f"{key or 'the file'} is another"
    return ""

"""
What a model is besides its tensors, translated between the three containers.

An `Identity` is read once from any of them: configuration, vocabulary, end tokens, chat template. Notes are whatever
else a file says about itself (name, licence, the mark of an untrained model). A note that has no place in the target
goes under ``source.`` (GGUF) or ``source_metadata`` (APR), so that a copy of a copy finds it again and so that a note
can never be read as configuration.

Source: llama.cpp ``gguf-py/gguf/constants.py`` and ``convert_hf_to_gguf.py`` (vocabulary padding, token types);
the Hugging Face file names; the metadata keys of APR v2.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from apr_core.dtypes import QuantFormat
from apr_core.errors import LoadError, ReadWriteError
from apr_core.formats import names
from apr_core.formats.checkpoint import Checkpoint, read_companion
from apr_core.model.vocabulary import BPE_DEFAULTS, QWEN2_PRE_TOKENIZER, Vocabulary, read_vocabulary, token_table

# general.file_type by recipe, and by the type of most weights where nothing was asked
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q4_K_M": 15,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "BF16": 32,
}
VECTOR_TYPE = "apr.vector_type"  # what vectors were before GGUF had them in F32
# Ends by text for every reader of GGUF and APR, so a file need not name them.
_ENDS_BY_TEXT = ("<|im_end|>", "<|endoftext|>")
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
# Keys that a writer sets itself, or that would move tensors.
_OWN_KEYS = (
    "general.architecture",
    "general.alignment",
    "general.file_type",
    "general.quantization_version",
    VECTOR_TYPE,
)
_TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Identity:
    """
    What makes a model this model, besides its tensors.

    Attributes:
        config: Hugging Face keys, ``rope_theta`` at the top level.
        vocabulary: The tokenizer as its file has it, or None where there is none.
        ends: End tokens, the one that the configuration names first.
    """

    config: Mapping[str, object]
    vocabulary: Vocabulary | None
    ends: tuple[int, ...]


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Probe for a tokenizer of the checkpoint's own, usable or not."""
    if checkpoint.format == "gguf":
        return "tokenizer.ggml.tokens" in checkpoint.metadata
    if checkpoint.format == "apr":
        return checkpoint.metadata.get("tokenizer.vocabulary") is not None
    return (checkpoint.folder / "tokenizer.json").is_file()


def read_identity(checkpoint: Checkpoint) -> Identity:
    """
    Read what must travel with the tensors.

    Raises:
        LoadError, FormatError: There is a tokenizer, and it cannot be read.
    """
    config = dict(checkpoint.config or {})
    rope = config.get("rope_parameters")
    if config.get("rope_theta") is None and isinstance(rope, Mapping) and rope.get("rope_theta") is not None:
        config["rope_theta"] = rope["rope_theta"]  # as transformers 5 writes it; GGUF and APR have one place for it
    vocabulary = read_vocabulary(checkpoint) if has_tokenizer(checkpoint) else None
    named = config.get("eos_token_id")
    first = [i for i in (named if isinstance(named, list) else [named]) if isinstance(i, int)]
    others: set[int] = set()
    if vocabulary is not None:
        ids = token_ids(vocabulary)
        others = set(vocabulary.eos_ids) | {ids[text] for text in vocabulary.eos_texts if text in ids}
    return Identity(config, vocabulary, tuple(dict.fromkeys([*first, *sorted(others)])))


def token_ids(vocabulary: Vocabulary) -> dict[str, int]:
    """Return every token's text -> id; an added token wins over an ordinary one of the same text."""
    return {**vocabulary.bpe["model"]["vocab"], **{token.content: token.id for token in vocabulary.added}}


def merges(vocabulary: Vocabulary) -> list[str]:
    """Return the merges by rank, as ``left right``."""
    return [m if isinstance(m, str) else " ".join(m) for m in vocabulary.bpe["model"]["merges"]]


def notes(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the file says about itself beyond configuration and tokenizer: plain JSON values."""
    metadata = checkpoint.metadata
    if checkpoint.format == "safetensors":
        return {key: value for key, value in metadata.items() if key != "format"}
    if checkpoint.format == "apr":
        nested = metadata.get("source_metadata")
        own = {k: v for k, v in metadata.items() if k.startswith(("general.", "apr.")) and k not in _OWN_KEYS[2:]}
        return {**(nested if isinstance(nested, dict) else {}), **own}
    # Without naming what is kept, reading a note would parse the token lists, a second of work for nothing.
    kept = [k for k in metadata if k.startswith(("general.", "apr.", "source.")) and k not in _OWN_KEYS]
    return {key.removeprefix("source."): metadata[key] for key in kept}


def gguf_pairs(
    checkpoint: Checkpoint, identity: Identity, types: Mapping[str, QuantFormat], quantize: str | None
) -> dict[str, object]:
    """
    Build the key-value pairs of a GGUF copy.

    Args:
        checkpoint: The source.
        identity: What travels.
        types: Type of each tensor of the copy.
        quantize: The recipe that was asked for, or None.

    Raises:
        LoadError: A tokenizer that ``gpt2`` with ``qwen2`` does not describe, or more end tokens than there are keys.
    """
    said = notes(checkpoint)
    pairs: dict[str, object] = {"general.name": str(said.get("general.name", _title(checkpoint.path)))}
    if checkpoint.format == "gguf":
        family = f"{checkpoint.metadata.get('general.architecture')}."
        pairs |= {key: checkpoint.metadata[key] for key in checkpoint.metadata if key.startswith(family)}
    for key, value in said.items():
        place = key if key.startswith(("general.", "apr.")) and key not in _OWN_KEYS else f"source.{key}"
        pairs[place] = value if isinstance(value, str | bool | int | float) else json.dumps(value)
    pairs |= names.gguf_metadata(identity.config)
    pairs |= _label(checkpoint, types, quantize) | _vector_type(checkpoint)
    pairs["general.quantization_version"] = 2
    if identity.vocabulary is None:
        return pairs
    tokens, kinds = token_list(identity, _rows(checkpoint))
    pairs |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_bos_token": identity.vocabulary.add_bos,
    }
    if ranked := merges(identity.vocabulary):  # GGUF cannot say what an empty list is a list of
        pairs["tokenizer.ggml.merges"] = ranked
    pairs |= _gguf_ends(identity, checkpoint.path)
    if identity.vocabulary.chat_template is not None:
        pairs["tokenizer.chat_template"] = identity.vocabulary.chat_template
    return pairs


def writer(checkpoint: Checkpoint, types: Mapping[str, QuantFormat]) -> dict[str, object]:
    """Name our encoder as the writer of the block types that it writes: parity looks it up."""
    tensors = checkpoint.tensors
    written = any(kind.block_elements > 1 and tensors[name].dtype != kind for name, kind in types.items())
    return {names.ENCODER: "apr_core"} if written else {}


def _label(checkpoint: Checkpoint, types: Mapping[str, QuantFormat], quantize: str | None) -> dict[str, object]:
    """Say what kind of file it is: the recipe, else what the source said, else the type of all matrices."""
    said = checkpoint.metadata.get("general.file_type")
    if quantize is None and isinstance(said, int) and not isinstance(said, bool):
        return {"general.file_type": said}
    matrices = {dtype.name for name, dtype in types.items() if len(checkpoint.tensors[name].shape) > 1}
    label = FILE_TYPES.get(quantize or (matrices.pop() if len(matrices) == 1 else ""))
    return {} if label is None else {"general.file_type": label}


def _main_type(checkpoint: Checkpoint, types: Mapping[str, QuantFormat]) -> str:
    """Return the type of most weights, or nothing where there are none."""
    weights: Counter[str] = Counter()
    for name, dtype in types.items():
        weights[dtype.name] += prod(checkpoint.tensors[name].shape)
    return weights.most_common(1)[0][0] if weights else ""


def _vector_type(checkpoint: Checkpoint) -> dict[str, object]:
    """Note what vectors were before GGUF has them in F32, so that a way back can give them their bytes again."""
    found = {info.dtype.name for info in checkpoint.tensors.values() if len(info.shape) == 1}
    if len(found) == 1 and found <= {"F16", "BF16"}:
        return {VECTOR_TYPE: found.pop()}
    before = checkpoint.metadata.get(VECTOR_TYPE)
    return {} if before is None else {VECTOR_TYPE: str(before)}


def _gguf_ends(identity: Identity, path: Path) -> dict[str, object]:
    """Name the end tokens that readers do not find by text; GGUF has three keys for them."""
    assert identity.vocabulary is not None
    ids = token_ids(identity.vocabulary)
    by_text = {ids[text] for text in _ENDS_BY_TEXT if text in ids}
    ends = [i for at, i in enumerate(identity.ends) if at == 0 or i not in by_text]
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    if len(ends) > len(keys):
        raise LoadError(f"GGUF can name {len(keys)} end tokens, {path} has {ends}", advice="copy it to SafeTensors")
    pairs: dict[str, object] = dict(zip(keys, ends, strict=False))
    padding = ids.get(identity.vocabulary.variables.get("pad_token", ""))
    if padding is not None:
        pairs["tokenizer.ggml.padding_token_id"] = padding
    return pairs


def apr_pairs(checkpoint: Checkpoint, identity: Identity, quantize: str | None) -> dict[str, object]:
    """
    Build the metadata of an APR copy.

    Raises:
        LoadError: A tokenizer that lists of tokens and merges do not describe.
    """
    said = notes(checkpoint)
    plain = {key: value for key, value in said.items() if key.startswith(("general.", "apr."))}
    pairs: dict[str, object] = {
        **plain,
        "source_metadata": {key: value for key, value in said.items() if key not in plain},
        "name": str(said.get("general.name", _title(checkpoint.path))),
        "original_format": checkpoint.format,
        "param_count": sum(prod(info.shape) for info in checkpoint.tensors.values()),
        **names.apr_metadata(identity.config),
    }
    label = checkpoint.metadata.get("general.file_type")
    if quantize is None and isinstance(label, int):
        pairs["general.file_type"] = label
    if identity.ends:
        pairs["tokenizer.eos_token_id"] = identity.ends[0] if len(identity.ends) == 1 else list(identity.ends)
    if identity.vocabulary is None:
        return pairs
    tokens, kinds = token_list(identity, _rows(checkpoint))
    pairs |= {
        "tokenizer.model_type": "BPE",
        "tokenizer.vocabulary": tokens,
        "tokenizer.vocab_size": len(tokens),
        "tokenizer.token_type": kinds,
        "tokenizer.merges": merges(identity.vocabulary),
        "tokenizer.add_bos_token": identity.vocabulary.add_bos,
    }
    template = identity.vocabulary.chat_template
    if template is not None:
        pairs |= {"chat_template": template, "tokenizer.chat_template": template}
        pairs["chat_format"] = "chatml" if "<|im_start|>" in template else "custom"
    return pairs


def folder_files(checkpoint: Checkpoint, identity: Identity, quantize: str | None) -> dict[str, bytes]:
    """Build the files beside a SafeTensors copy; those of a SafeTensors source are taken over as they are."""
    files: dict[str, bytes] = {}
    if checkpoint.format == "safetensors":
        for name in COMPANIONS:
            path = checkpoint.folder / name
            try:
                files |= {name: read_companion(path)} if path.is_file() else {}
            except OSError as error:
                raise ReadWriteError(f"cannot read {path}: {error.strerror}", advice="check permissions") from error
        if quantize in _TORCH:
            files["config.json"] = _json({**(checkpoint.config or {}), "torch_dtype": _TORCH[quantize]})
        return files
    config = {"architectures": ["Qwen2ForCausalLM"], **identity.config}
    kept = {name: info.dtype for name, info in checkpoint.tensors.items()}
    config["torch_dtype"] = _TORCH.get(quantize or _main_type(checkpoint, kept), "float32")
    generation = {k: config[k] for k in ("bos_token_id", "pad_token_id") if config.get(k) is not None}
    files["config.json"] = _json(config)
    files["generation_config.json"] = _json({**generation, "eos_token_id": list(identity.ends)})
    if identity.vocabulary is not None:
        files["tokenizer.json"] = _json(tokenizer_document(identity.vocabulary))
        files["tokenizer_config.json"] = _json(_tokenizer_settings(identity))
    return files


def token_list(identity: Identity, rows: int) -> tuple[list[str], list[int]]:
    """
    Lay a vocabulary out as a list whose index is the id, with GGUF's token types.

    Raises:
        LoadError: The tokenizer does something that a list of tokens and merges cannot say.
    """
    vocabulary = identity.vocabulary
    assert vocabulary is not None
    _require_qwen2(vocabulary)
    # "<|" makes a token a control token here, whatever its flag: a copy that forgets that can be injected into.
    return token_table(token_ids(vocabulary), {t.id: t.control for t in vocabulary.added}, rows)


def _require_qwen2(vocabulary: Vocabulary) -> None:
    """Refuse a tokenizer that splits text otherwise: its copy would give other ids for the same text, in silence."""
    bpe = vocabulary.bpe
    parts = (bpe.get("pre_tokenizer") or {}).get("pretokenizers") or []
    found = [part.get("pattern", {}).get("Regex") for part in parts if part.get("type") == "Split"]
    model, normalizer = bpe["model"], bpe.get("normalizer") or {}
    fits = {
        "a pre-tokenizer": found == [QWEN2_PRE_TOKENIZER],
        "a normalizer": normalizer.get("type") == "NFC",
        "a model": model.get("type") == "BPE" and not model.get("ignore_merges") and not model.get("byte_fallback"),
        "an added token": not any(t.lstrip or t.rstrip or t.single_word for t in vocabulary.added),
    }
    for what, holds in fits.items():
        if not holds:
            raise LoadError(
                f"the tokenizer in {vocabulary.source} has {what} that is not Qwen2's, which GGUF and APR cannot say",
                advice="copy it to SafeTensors",
            )


def tokenizer_document(vocabulary: Vocabulary) -> dict[str, Any]:
    """Build ``tokenizer.json`` from a vocabulary that came out of a GGUF or an APR file."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": t.id, "content": t.content, **flags, "special": t.special} for t in vocabulary.added]
    vocab = dict(vocabulary.bpe["model"]["vocab"])
    # The tokenizers package numbers added tokens on from the last ordinary one; one that stands elsewhere keeps its id
    # only when the model knows it too.
    expected = range(len(vocab), len(vocab) + len(added))
    if [token["id"] for token in added] != list(expected):
        vocab |= {token.content: token.id for token in vocabulary.added}
    model = {**BPE_DEFAULTS, **vocabulary.bpe["model"], "vocab": vocab}
    rest = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
    return {**rest, **vocabulary.bpe, "added_tokens": added, "model": model}


def _tokenizer_settings(identity: Identity) -> dict[str, Any]:
    """Build ``tokenizer_config.json``."""
    vocabulary = identity.vocabulary
    assert vocabulary is not None
    texts = {i: text for text, i in token_ids(vocabulary).items()}
    settings: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": vocabulary.add_bos,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        **{key: vocabulary.variables.get(key) for key in ("bos_token", "pad_token", "unk_token")},
        "eos_token": texts.get(identity.ends[0]) if identity.ends else None,
    }
    if vocabulary.chat_template is not None:
        settings["chat_template"] = vocabulary.chat_template
    return settings


def _rows(checkpoint: Checkpoint) -> int:
    """Rows of the embedding; 0 when there is none, which is the contract's to refuse."""
    info = checkpoint.tensors.get("model.embed_tokens.weight")
    return info.shape[0] if info is not None and info.shape else 0


def _title(path: Path) -> str:
    """A name for people: that of the folder for ``model.safetensors``, else the file's."""
    plain = path.stem.removesuffix(".safetensors.index")
    return path.parent.name or plain if plain in ("model", "model.safetensors") else plain


def _json(document: Mapping[str, Any] | Sequence[Any]) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode("utf-8")

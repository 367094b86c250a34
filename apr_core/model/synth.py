"""
Models of exact shape with plausible random weights, written at the speed of the random generator.

They stand in for the published ones where no network is: same tensors, same bytes, same vocabulary size. They are
marked untrained, and claims that need language are not run on them.
Exactness: a tensor depends on the seed, its name and its type alone, never on the order of writing; F32, F16 and BF16
files of one seed hold the same numbers, rounded. Repeatable for one numpy version (its NEP 19).
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from apr_core.contract.layout import Geometry, Role, expected_tensors
from apr_core.dtypes import FORMATS, QuantFormat
from apr_core.errors import LoadError, NotFound, ReadWriteError, UsageError
from apr_core.formats.checkpoint import TensorSource
from apr_core.formats.gguf import write_gguf
from apr_core.formats.names import gguf_metadata
from apr_core.formats.recipes import tensor_type
from apr_core.formats.safetensors import write_safetensors
from apr_core.model.synth_blocks import draw
from apr_core.model.synth_tokenizer import CONTROL_TOKENS, generate_tokenizer, gguf_tokenizer

CHUNK = 1 << 20  # elements drawn at a time; part of what a seed means for block types
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "q4_k_m": 15, "bf16": 32}  # llama.cpp's general.file_type
DTYPES = tuple(_FILE_TYPES)
CONTAINERS = {"safetensors": ("f32", "f16", "bf16"), "gguf": DTYPES}
DESCRIPTION = "Random weights of apr synth, untrained: for tests of loaders, engines and speed, not for language"


@dataclass(frozen=True)
class Shape:
    """A geometry with what surrounds it: ``base_tokens`` ordinary tokens, then ``control_tokens``, then unused rows."""

    geometry: Geometry
    max_position_embeddings: int
    base_tokens: int
    control_tokens: int


_HALF = Shape(Geometry(896, 4864, 24, 14, 2, 64, 151936, tied=True), 32768, 151643, len(CONTROL_TOKENS))
SHAPES: dict[str, Shape] = {
    "qwen2.5-coder-0.5b": _HALF,
    "qwen2.5-coder-1.5b": replace(_HALF, geometry=Geometry(1536, 8960, 28, 12, 2, 128, 151936, tied=True)),
    "qwen2.5-coder-7b": replace(_HALF, geometry=Geometry(3584, 18944, 28, 28, 4, 128, 152064, tied=False)),
    "pygmy": Shape(Geometry(256, 768, 2, 4, 2, 64, 1024, tied=True), 4096, 1016, 3),
}


@dataclass(frozen=True)
class Planned:
    """One tensor that will be written, and the distribution of its values."""

    name: str
    shape: tuple[int, ...]
    dtype: QuantFormat
    mean: float
    std: float

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.dtype.nbytes(self.shape)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as its two documents, and the ids that a config names."""

    tokenizer: Mapping[str, Any]
    settings: Mapping[str, Any]
    end_of_text: int
    end_of_turn: int


def plan(shape: str, *, format: str, dtype: str) -> list[Planned]:
    """
    List the tensors of a model without drawing one.

    Args:
        shape: A key of `SHAPES`.
        format: ``safetensors`` or ``gguf``.
        dtype: One of `DTYPES`; in GGUF a recipe, by llama.cpp's rules, in SafeTensors the type of every tensor.

    Raises:
        UsageError: An unknown shape, format or dtype, or one that the format cannot hold.
    """
    for value, known, what in ((shape, SHAPES, "shape"), (format, CONTAINERS, "format"), (dtype, DTYPES, "dtype")):
        if value not in known:
            raise UsageError(f"expected a {what} of {', '.join(known)}, found {value!r}")
    if dtype not in CONTAINERS[format]:
        raise UsageError(f"{format} cannot hold {dtype}", advice="take --format gguf, or --dtype f32, f16 or bf16")
    geometry = SHAPES[shape].geometry
    layers, tied = geometry.num_hidden_layers, geometry.tied
    planned = []
    for name, (role, dims) in expected_tensors(geometry).items():
        chosen = (
            tensor_type(dtype.upper(), name, dims, num_hidden_layers=layers, tied=tied)
            if format == "gguf"
            else FORMATS[dtype.upper()]
        )
        planned.append(Planned(name, dims, chosen, *_distribution(role, dims)))
    return planned


def _distribution(role: Role, dims: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation that a trained model of this kind shows, roughly."""
    if role.kind == "norm":
        return 1.0, 0.1
    if role.kind == "bias":
        return 0.0, 0.3
    return 0.0, float(np.clip(dims[-1] ** -0.5, 0.02, 0.05))


def synthesise(
    shape: str,
    *,
    format: str,
    dtype: str,
    tokenizer: Path | Literal["generated"] | None = "generated",
    seed: int = 0,
    out: Path,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """
    Write an untrained model.

    Args:
        shape: A key of `SHAPES`.
        format: ``safetensors`` writes a folder (weights, config.json, tokenizer files), ``gguf`` one file.
        dtype: One of `DTYPES`.
        tokenizer: A folder with tokenizer.json and tokenizer_config.json to take, ``generated``, or None for none.
        seed: Not negative; the same seed gives the same bytes.
        out: Must not exist; appears when everything is written, and not before.
        progress: Called with the weight bytes written so far.

    Returns:
        ``out``.

    Raises:
        UsageError: As `plan`; ``out`` exists; the seed is negative; the tokenizer has more tokens than there are rows.
        NotFound: No such folder to write into, or no tokenizer in the folder given.
        LoadError: The tokenizer given is no byte-level BPE with Qwen2's control tokens.
        ReadWriteError: The operating system refuses.

    Cost: memory under 100 MB; time near that of drawing the weights (4 s for 0.5B in Q4_K_M, 20 s in BF16).
    """
    planned = plan(shape, format=format, dtype=dtype)
    if seed < 0:
        raise UsageError(f"expected a seed of 0 or more, found {seed}")
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out} exists", advice="remove it or name another: nothing is overwritten")
    if not out.parent.is_dir():
        raise NotFound(f"no folder {out.parent} to write into", advice="make it first")
    vocabulary = _vocabulary(SHAPES[shape], tokenizer)
    sources = [_source(tensor, seed) for tensor in planned]
    config = _config(SHAPES[shape], dtype, vocabulary)
    if format == "gguf":
        metadata = _gguf_metadata(shape, dtype, seed, config, vocabulary)
        write_gguf(out, sources, metadata, progress=progress)
    else:
        notes = {"format": "pt", "apr.untrained": "true", "apr.seed": str(seed), "description": DESCRIPTION}
        _write_folder(out, sources, notes, config, vocabulary, progress)
    return out


def _source(tensor: Planned, seed: int) -> TensorSource:
    def chunks() -> Iterator[NDArray[np.uint8]]:
        # One generator per tensor, from its name: what a tensor holds does not depend on what was drawn before it.
        name = np.frombuffer(hashlib.sha256(tensor.name.encode()).digest(), dtype=np.uint32)
        random = np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, *name.tolist()])))
        left = prod(tensor.shape)
        while left:
            count = min(left, CHUNK)
            yield draw(random, tensor.dtype, count, mean=tensor.mean, std=tensor.std)
            left -= count

    return TensorSource(tensor.name, tensor.dtype, tensor.shape, chunks)


def _config(shape: Shape, dtype: str, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """Build config.json with the keys of the published models."""
    geometry = shape.geometry
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": vocabulary.end_of_text if vocabulary else shape.base_tokens,
        "eos_token_id": vocabulary.end_of_turn if vocabulary else shape.base_tokens + 2,
        "hidden_act": "silu",
        "hidden_size": geometry.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": geometry.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "max_window_layers": geometry.num_hidden_layers,
        "model_type": "qwen2",
        "num_attention_heads": geometry.num_attention_heads,
        "num_hidden_layers": geometry.num_hidden_layers,
        "num_key_value_heads": geometry.num_key_value_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": shape.max_position_embeddings,
        "tie_word_embeddings": geometry.tied,
        "torch_dtype": {"f16": "float16", "bf16": "bfloat16"}.get(dtype, "float32"),
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": geometry.vocab_size,
    }


def _gguf_metadata(
    shape: str, dtype: str, seed: int, config: Mapping[str, Any], vocabulary: Vocabulary | None
) -> dict[str, object]:
    metadata = {
        **gguf_metadata(config),
        "general.name": f"{shape} untrained",
        "general.description": DESCRIPTION,
        "general.file_type": _FILE_TYPES[dtype],
        "general.quantization_version": 2,
        "apr.untrained": True,
        "apr.seed": seed,
    }
    if vocabulary is not None:
        metadata |= gguf_tokenizer(vocabulary.tokenizer, vocabulary.settings, config["vocab_size"])
        metadata["tokenizer.ggml.padding_token_id"] = vocabulary.end_of_text
    return metadata


def _vocabulary(shape: Shape, tokenizer: Path | Literal["generated"] | None) -> Vocabulary | None:
    if tokenizer is None:
        return None
    if tokenizer == "generated":
        base, control = shape.base_tokens, shape.control_tokens
        made, settings = generate_tokenizer(base, control, context=shape.max_position_embeddings)
        return Vocabulary(made, settings, base, base + 2)
    return _borrow(tokenizer, shape.geometry.vocab_size)


def _borrow(folder: Path, rows: int) -> Vocabulary:
    """Read another model's tokenizer; it must fit the rows of the embedding."""
    documents = []
    for name in ("tokenizer.json", "tokenizer_config.json"):
        try:
            documents.append(json.loads((folder / name).read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise NotFound(f"no {name} in {folder}", advice="give --tokenizer a folder with both") from error
        except (OSError, ValueError) as error:
            raise LoadError(f"cannot read {folder / name}: {error}", advice="get a fresh copy") from error
    tokenizer, settings = documents
    try:
        ids = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]}}
        vocabulary = Vocabulary(tokenizer, settings, ids["<|endoftext|>"], ids["<|im_end|>"])
        kind, largest = tokenizer["model"]["type"], max(ids.values())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        kind, largest, vocabulary = f"one without {error}", 0, None
    if kind != "BPE" or vocabulary is None:
        raise LoadError(
            f"expected a byte-level BPE with <|endoftext|> and <|im_end|>, found {kind}, in {folder}",
            advice="take the tokenizer of a Qwen2 model, or let one be generated",
        )
    if largest >= rows:
        raise UsageError(
            f"the tokenizer in {folder} has ids up to {largest}, the embedding {rows} rows",
            advice="take a larger shape, or let a tokenizer be generated",
        )
    return vocabulary


def _write_folder(
    out: Path,
    sources: Sequence[TensorSource],
    notes: Mapping[str, str],
    config: Mapping[str, Any],
    vocabulary: Vocabulary | None,
    progress: Callable[[int], None] | None,
) -> None:
    """Write beside ``out`` and rename at the end: a folder that is there is whole."""
    end = config["bos_token_id"]
    documents = {
        "config.json": config,
        "generation_config.json": {
            "bos_token_id": end,
            "pad_token_id": end,
            "do_sample": False,
            "eos_token_id": [config["eos_token_id"], end],
        },
    }
    if vocabulary is not None:
        documents |= {"tokenizer.json": vocabulary.tokenizer, "tokenizer_config.json": vocabulary.settings}
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.mkdir()
        for name, document in documents.items():
            (temporary / name).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        write_safetensors(temporary / "model.safetensors", sources, notes, progress=progress)
        temporary.rename(out)
    except BaseException as error:  # KeyboardInterrupt too: gigabytes must not stay behind
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise ReadWriteError(
                f"cannot write {out}: {error.strerror or error}", advice="check the folder, permissions and free space"
            ) from error
        raise

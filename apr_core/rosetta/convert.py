"""
Write a model in another format, tensor by tensor; a few megabytes of weights are decoded at a time.

What a copy must not lose is carried along: configuration, tokenizer, chat template, end tokens and the file's own notes
(see `carry`). A copy is whole or absent: files are written beside the target and renamed at the end.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from apr_core.dtypes import FORMATS, QuantFormat
from apr_core.errors import LoadError, NotFound, ReadWriteError, Unavailable, UsageError
from apr_core.formats.apr import write_apr
from apr_core.formats.architectures import load_architectures
from apr_core.formats.checkpoint import Checkpoint, TensorInfo, TensorSource, open_checkpoint
from apr_core.formats.codecs import decode, decode_rows, encode
from apr_core.formats.gguf import write_gguf
from apr_core.formats.recipes import tensor_type
from apr_core.formats.safetensors import write_safetensors
from apr_core.rosetta import carry

Container = Literal["safetensors", "gguf", "apr"]
CONTAINERS: tuple[Container, ...] = get_args(Container)
DTYPES = ("keep", "F32", "F16", "BF16", "Q8_0")
_KEPT = ("F32", "F16", "BF16", "F64")  # types that every container holds
_CHUNK_BYTES = 1 << 24
_CHUNK_VALUES = 1 << 20


def convert(
    source: Checkpoint | str | Path,
    target: str | Path,
    *,
    format: str,
    dtype: str = "keep",
    progress: Callable[[int], None] | None = None,
) -> Path:
    """
    Copy a model into a container.

    Args:
        source: An opened checkpoint, or what `open_checkpoint` takes.
        target: A file for ``gguf`` and ``apr``, a folder for ``safetensors``; must not exist.
        format: One of `CONTAINERS`.
        dtype: ``keep`` changes no value: float types stay as they are (vectors become F32 in GGUF, as llama.cpp wants
            them), quantised types stay in GGUF and are decoded to F32 elsewhere. ``F32``, ``F16``, ``BF16`` round to
            nearest even. ``Q8_0`` is for GGUF: matrices of whole blocks; F16 where they are not whole, vectors F32.
        progress: Called with the bytes written so far.

    Returns:
        ``target``.

    Exactness: with ``keep`` every decoded value has the same float32 bits on both sides.
    Cost: reads and writes every weight once; decoded at most 4 MiB at a time (a whole tensor for AprQ4 and AprQ8).

    Raises:
        UsageError: Unknown format or dtype, the target exists, or a value does not fit F16.
        LoadError: The source has no configuration, or a tokenizer that the container cannot describe.
        NotFound, FormatError, ReadWriteError: As reading and writing raise them.
        Unavailable: Rows of this architecture lie otherwise in GGUF (Llama).
    """
    target = Path(target)
    if format not in CONTAINERS or dtype not in DTYPES or (dtype == "Q8_0" and format != "gguf"):
        legal = f"one of {', '.join(CONTAINERS)} and of {', '.join(DTYPES)} (Q8_0 for gguf)"
        raise UsageError(f"expected {legal}, found {format} and {dtype}")
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target} exists", advice="remove it or name another: nothing is overwritten")
    if not target.parent.is_dir():
        raise NotFound(f"no folder {target.parent} to write into", advice="make it first")
    if not isinstance(source, Checkpoint):
        with open_checkpoint(source) as opened:
            return convert(opened, target, format=format, dtype=dtype, progress=progress)
    if source.config is None:
        raise LoadError(f"no configuration for {source.path}: a copy could not say what it is", advice="add one")
    _refuse_permuted(source, format)
    sources = [_source(source, info, target_type(source, info, format, dtype)) for info in source.tensors.values()]
    identity = carry.read_identity(source)
    if format == "gguf":
        write_gguf(target, sources, carry.gguf_pairs(source, identity, dtype), progress=progress)
    elif format == "apr":
        write_apr(target, sources, carry.apr_pairs(source, identity), progress=progress)
    else:
        _write_folder(source, target, sources, carry.folder_files(source, identity, dtype), progress)
    return target


def _refuse_permuted(source: Checkpoint, format: str) -> None:
    """Refuse to carry rows between GGUF and another container where GGUF has them in another order."""
    family = load_architectures().get(str((source.config or {}).get("model_type")))
    if family is not None and family.gguf_permutes and (source.format == "gguf") != (format == "gguf"):
        raise Unavailable(
            f"GGUF stores the rows of {', '.join(family.gguf_permutes)} of a {family.name} in another order than "
            f"{format if format != 'gguf' else source.format}, and the permutation is not written",
            advice="convert it with llama.cpp",
        )


def target_type(checkpoint: Checkpoint, info: TensorInfo, format: str, dtype: str) -> QuantFormat:
    """Choose the element type of a tensor's copy, as `convert` describes it."""
    if dtype == "keep":
        if format == "gguf" and len(info.shape) == 1 and info.dtype.name in ("F16", "BF16"):
            return FORMATS["F32"]
        held = info.dtype.name in _KEPT or (format == "gguf" and info.dtype.gguf is not None)
        return info.dtype if held else FORMATS["F32"]
    if format != "gguf":
        return FORMATS[dtype]
    tied = "lm_head.weight" not in checkpoint.tensors
    return tensor_type(dtype, info.name, info.shape, num_hidden_layers=0, tied=tied)


def decoded_chunks(checkpoint: Checkpoint, name: str, values: int = _CHUNK_VALUES) -> Iterator[NDArray[np.float32]]:
    """
    Decode a tensor in runs of whole rows: float32 [rows, columns], about ``values`` of them at a time.

    Types that are not laid out by rows (AprQ4, AprQ8) come in one piece.
    """
    raw = checkpoint.raw(name)
    shape = raw.info.shape
    columns = shape[-1] if shape else 1
    if raw.info.dtype.layout != "row" or not prod(shape):
        yield decode(raw).reshape(-1, max(1, columns))
        return
    rows, step = prod(shape[:-1]), max(1, values // columns)
    for start in range(0, rows, step):
        yield decode_rows(raw, start, min(rows, start + step))


def _source(checkpoint: Checkpoint, info: TensorInfo, dtype: QuantFormat) -> TensorSource:
    def passed() -> Iterator[NDArray[np.uint8]]:
        data = checkpoint.raw(info.name).data
        for start in range(0, data.size, _CHUNK_BYTES):
            yield data[start : start + _CHUNK_BYTES]

    def recoded() -> Iterator[NDArray[np.uint8]]:
        for values in decoded_chunks(checkpoint, info.name):
            _require_range(values, info, dtype)
            yield encode(values, dtype)

    return TensorSource(info.name, dtype, info.shape, passed if dtype is info.dtype else recoded)


def _require_range(values: NDArray[np.float32], info: TensorInfo, dtype: QuantFormat) -> None:
    """Refuse a number that would become infinite: the copy would be refused by the contract, far from its cause."""
    if dtype.name not in ("F16", "BF16", "Q8_0"):
        return
    largest = float(np.abs(values).max(initial=0.0))
    # Q8_0 stores the largest magnitude over 127 as a float16.
    limit = {"F16": 65520.0, "BF16": float(np.ldexp(1 - 2.0**-9, 128)), "Q8_0": 65520.0 * 127}[dtype.name]
    if np.isfinite(largest) and largest >= limit:
        raise UsageError(
            f"{dtype} cannot hold {largest:.6g} of tensor {info.name} in {info.file}", advice="use F32 or BF16"
        )


def _write_folder(
    source: Checkpoint,
    target: Path,
    sources: Sequence[TensorSource],
    files: dict[str, bytes],
    progress: Callable[[int], None] | None,
) -> None:
    """Write a SafeTensors folder beside the target and rename it: a folder that is there is whole."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    notes = {"format": "pt", **{k: v if isinstance(v, str) else json.dumps(v) for k, v in carry.notes(source).items()}}
    try:
        temporary.mkdir()
        for name, data in files.items():
            (temporary / name).write_bytes(data)
        write_safetensors(temporary / "model.safetensors", sources, notes, progress=progress)
        temporary.rename(target)
    except BaseException as error:  # KeyboardInterrupt too: gigabytes must not stay behind
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise ReadWriteError(
                f"cannot write {target}: {error.strerror or error}", advice="check the folder and free space"
            ) from error
        raise

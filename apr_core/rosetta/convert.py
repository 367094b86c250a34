"""
Write a model in another format, tensor by tensor; a few megabytes of weights are decoded at a time.

What a copy must not lose is carried along: configuration, tokenizer, chat template, end tokens and the file's own notes
(see `carry`). What the target can hold passes byte for byte; what it cannot hold is refused with the choices. The
target appears when it is whole and has been read back (see `place`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from apr_core.dtypes import FORMATS, QuantFormat
from apr_core.errors import LoadError, Unavailable, UsageError
from apr_core.formats.apr import write_apr
from apr_core.formats.architectures import load_architectures
from apr_core.formats.checkpoint import Checkpoint, TensorInfo, TensorSource, open_checkpoint
from apr_core.formats.codecs import round_to
from apr_core.formats.gguf import write_gguf
from apr_core.formats.recipes import RECIPES, tensor_type
from apr_core.formats.safetensors import write_safetensors
from apr_core.kernels.codecs import decode, decode_rows, encode
from apr_core.rosetta import carry
from apr_core.rosetta.place import placing

Container = Literal["safetensors", "gguf", "apr"]
CONTAINERS: tuple[Container, ...] = get_args(Container)
FLOATS = ("F32", "F16", "BF16")
APR_OWN = ("AprQ8", "AprQ4")
# What may be asked of each container; a row that is no whole number of blocks may still fall back to a type that APR
# has not, which is refused by the tensor's name.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "safetensors": FLOATS,
    "gguf": RECIPES,
    "apr": (*FLOATS, "Q6_K", "Q4_K_M", *APR_OWN),
}
GGUF_DEFAULT = "Q4_K_M"
_SUFFIXES = {".gguf": "gguf", ".apr": "apr", ".safetensors": "safetensors"}
_CHUNK_BYTES = 1 << 24
_CHUNK_VALUES = 1 << 20


@dataclass(frozen=True)
class Plan:
    """
    What a conversion will write.

    Attributes:
        source: Where from.
        format: The target's container.
        quantize: The recipe, or None where every tensor keeps its type.
        types: Canonical name -> element type, in the order of the source.
    """

    source: Checkpoint
    format: str
    quantize: str | None
    types: Mapping[str, QuantFormat]

    @property
    def nbytes(self) -> int:
        """Bytes of weights that will be written."""
        return sum(dtype.nbytes(self.source.tensors[name].shape) for name, dtype in self.types.items())

    @property
    def histogram(self) -> dict[str, int]:
        """How many tensors go from which type to which: ``BF16 -> Q4_K``; ``BF16`` where the bytes pass through."""
        pairs = ((self.source.tensors[name].dtype, dtype) for name, dtype in self.types.items())
        return dict(Counter(str(new) if old is new else f"{old} -> {new}" for old, new in pairs))

    @property
    def passed(self) -> int:
        """Tensors whose stored bytes pass through."""
        return sum(self.source.tensors[name].dtype is dtype for name, dtype in self.types.items())


def convert(
    source: Checkpoint | str | Path,
    target: str | Path,
    *,
    quantize: str | None = None,
    force: bool = False,
    bare: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """
    Copy a model into the container that the target's name says.

    Args:
        source: An opened checkpoint, or what `open_checkpoint` takes.
        target: A ``.gguf``, ``.apr`` or ``.safetensors`` file, or a folder (SafeTensors with its companions).
        quantize: None changes no value: each tensor keeps its type and bytes, and a type that the target cannot hold is
            refused (vectors in F16 and BF16 become F32 in GGUF, as its readers want them, and come back as they were).
            Otherwise one of `CHOICES` for the container.
        force: Replace a target that exists; a folder only when it holds a model and nothing else.
        bare: Copy a model without a tokenizer too; otherwise that is refused, since nothing could talk to the copy.
        progress: Called with the bytes written so far.

    Returns:
        ``target``.

    Exactness: with ``quantize=None`` every decoded value has the same float32 bits on both sides.
    Cost: reads and writes every weight once; decoded at most 4 MiB at a time (a whole tensor for AprQ4 and AprQ8).

    Raises:
        UsageError: An unknown format or recipe, a type that the target cannot hold, a value that does not fit, or the
            target exists.
        LoadError: The source has no configuration or no tokenizer, or one that the container cannot describe; or what
            was written is not what was asked.
        NotFound, FormatError, ReadWriteError: As reading and writing raise them.
        Unavailable: Rows of this architecture lie otherwise in GGUF (Llama).
    """
    if not isinstance(source, Checkpoint):
        with open_checkpoint(source) as opened:
            return convert(opened, target, quantize=quantize, force=force, bare=bare, progress=progress)
    intent = plan(source, target, quantize=quantize)
    if source.config is None:
        raise LoadError(f"no configuration for {source.path}: a copy could not say what it is", advice="add one")
    _refuse_permuted(source, intent.format)
    identity = carry.read_identity(source)
    if identity.vocabulary is None and not bare:
        raise LoadError(
            f"no tokenizer for {source.path}: the copy would not be self-contained",
            advice="put tokenizer.json beside it, or ask for a bare copy (--no-tokenizer)",
        )
    sources = [_source(source, source.tensors[name], dtype) for name, dtype in intent.types.items()]
    writer = carry.writer(source, intent.types)
    with placing(Path(target), intent.format, force=force, keep=source.files) as file:
        if intent.format == "gguf":
            write_gguf(
                file, sources, carry.gguf_pairs(source, identity, intent.types, quantize) | writer, progress=progress
            )
        elif intent.format == "apr":
            write_apr(file, sources, carry.apr_pairs(source, identity, quantize) | writer, progress=progress)
        else:
            for name, data in carry.folder_files(source, identity, quantize).items():
                (file.parent / name).write_bytes(data)
            said = {k: v if isinstance(v, str) else json.dumps(v) for k, v in carry.notes(source).items()}
            write_safetensors(file, sources, {"format": "pt", **said}, progress=progress)
        _require_as_planned(file, intent)
    return Path(target)


def _refuse_permuted(source: Checkpoint, format: str) -> None:
    """Refuse to carry rows between GGUF and another container where GGUF has them in another order."""
    family = load_architectures().get(str((source.config or {}).get("model_type")))
    if family is not None and family.gguf_permutes and (source.format == "gguf") != (format == "gguf"):
        raise Unavailable(
            f"GGUF stores the rows of {', '.join(family.gguf_permutes)} of a {family.name} in another order than "
            f"{format if format != 'gguf' else source.format}, and the permutation is not written",
            advice="convert it with llama.cpp",
        )


def container_of(target: str | Path) -> str:
    """
    Read the container off a target's name: a suffix, or a folder for SafeTensors.

    Raises:
        UsageError: The name says no container that we write.
    """
    path = Path(target)
    found = _SUFFIXES.get(path.suffix.lower())
    if str(target).endswith("/") or not path.suffix or (found is None and path.is_dir()):
        return "safetensors"
    if found is None:
        raise UsageError(
            f"expected a target in {', '.join(_SUFFIXES)} or a folder, found {path.suffix} in {path.name}",
            advice="the name says the format; end a folder with /",
        )
    return found


def named(stem: Path, container: str) -> Path:
    """Return the name under which `convert` writes a container: a suffix for files, none for a SafeTensors folder."""
    return stem if container == "safetensors" else stem.with_name(f"{stem.name}.{container}")


def plan(source: Checkpoint, target: str | Path, *, quantize: str | None = None) -> Plan:
    """
    Choose the type of every tensor, or refuse before the first byte is written.

    Raises:
        UsageError: As `convert`.
    """
    container = container_of(target)
    if quantize is not None and quantize not in CHOICES[container]:
        raise UsageError(
            f"expected a type of {', '.join(CHOICES[container])} for {container}, found {quantize!r:.40}",
            advice="or leave it out to keep every tensor's type",
        )
    types = {name: target_type(source, info, container, quantize) for name, info in source.tensors.items()}
    for name, dtype in types.items():
        if not holds(container, dtype):
            asked = (
                f" (what {quantize} gives for its shape)" if quantize and source.tensors[name].dtype != dtype else ""
            )
            raise UsageError(
                f"{container} cannot hold {dtype}{asked}, tensor {name} {list(source.tensors[name].shape)}",
                advice=f"ask for one of {', '.join(CHOICES[container])}",
            )
    return Plan(source, container, quantize, types)


def holds(container: str, dtype: QuantFormat) -> bool:
    """Tell whether a container has an id for a type."""
    return getattr(dtype, container) is not None


def lossless(source: Checkpoint, container: str) -> str | None:
    """Return what to ask of `convert` for a copy that changes no value: nothing, or F32 where a type does not fit."""
    return None if all(holds(container, info.dtype) for info in source.tensors.values()) else "F32"


def target_type(checkpoint: Checkpoint, info: TensorInfo, container: str, quantize: str | None) -> QuantFormat:
    """Choose the element type of a tensor's copy, as `convert` describes it."""
    if quantize is None:
        return _kept_type(checkpoint, info, container)
    if quantize in FLOATS and container != "gguf":
        return FORMATS[quantize]
    tied = "lm_head.weight" not in checkpoint.tensors
    if quantize in APR_OWN:
        inner = len(info.shape) > 1 and info.name not in ("lm_head.weight", "model.embed_tokens.weight")
        return FORMATS[quantize] if inner else FORMATS["F32" if len(info.shape) < 2 else "F16"]
    layers = (checkpoint.config or {}).get("num_hidden_layers")
    count = layers if isinstance(layers, int) else 0
    return tensor_type(quantize, info.name, info.shape, num_hidden_layers=count, tied=tied)


def _kept_type(checkpoint: Checkpoint, info: TensorInfo, container: str) -> QuantFormat:
    """Keep a type; vectors are widened for GGUF and narrowed again behind it, where no bit is lost by that."""
    if len(info.shape) != 1:
        return info.dtype
    if container == "gguf":
        return FORMATS["F32"] if info.dtype.name in ("F16", "BF16") else info.dtype
    once = checkpoint.metadata.get(carry.VECTOR_TYPE)
    if info.dtype.name != "F32" or once not in ("F16", "BF16"):
        return info.dtype
    values = decode(checkpoint.raw(info.name))
    narrow = round_to(values, FORMATS[once])
    return FORMATS[once] if np.array_equal(narrow.view(np.uint32), values.view(np.uint32)) else info.dtype


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
        checkpoint.release(info.name)

    def recoded() -> Iterator[NDArray[np.uint8]]:
        # a type that is not laid out by rows has one scale, or one stream of blocks, for the whole tensor
        size = _CHUNK_VALUES if dtype.layout == "row" else max(1, prod(info.shape))
        for values in decoded_chunks(checkpoint, info.name, size):
            _require_range(values, info, dtype)
            try:
                yield encode(values, dtype)
            except UsageError as error:
                raise UsageError(f"{error.message}, tensor {info.name} in {info.file}", advice=error.advice) from error
        checkpoint.release(info.name)

    return TensorSource(info.name, dtype, info.shape, passed if dtype is info.dtype else recoded)


def _require_range(values: NDArray[np.float32], info: TensorInfo, dtype: QuantFormat) -> None:
    """Refuse a number that would become infinite: the copy would be refused by the contract, far from its cause."""
    if dtype.name not in ("F16", "BF16"):
        return  # F32 holds everything; a codec of blocks knows its own limit
    largest = float(np.abs(values).max(initial=0.0))
    limit = {"F16": 65520.0, "BF16": float(np.ldexp(1 - 2.0**-9, 128))}[dtype.name]
    if np.isfinite(largest) and largest >= limit:
        raise UsageError(
            f"{dtype} cannot hold {largest:.6g} of tensor {info.name} in {info.file}", advice="use F32 or BF16"
        )


def _require_as_planned(file: Path, intent: Plan) -> None:
    """Read the header of what was written and demand what was asked: every tensor, its shape and its type."""
    with open_checkpoint(file, verify_footer=False) as copy:
        found = {name: (info.dtype, info.shape) for name, info in copy.tensors.items()}
        expected = {name: (dtype, intent.source.tensors[name].shape) for name, dtype in intent.types.items()}
        wrong = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        if copy.format != intent.format or wrong:
            name = wrong[0] if wrong else ""
            raise LoadError(
                f"the copy is not what was asked: {copy.format} for {intent.format}, {len(wrong)} tensors differ, "
                f"first {name}: expected {expected.get(name)}, found {found.get(name)}",
                advice="nothing was written; report this",
            )
        if carry.has_tokenizer(intent.source) and not carry.has_tokenizer(copy):
            raise LoadError(f"the copy of {intent.source.path} lost its tokenizer", advice="nothing was written")

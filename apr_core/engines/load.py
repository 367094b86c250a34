"""
From a path to a running model: open, admit, build. The only way that an action takes.

Engines are registered by precision and device. Asking for one that is not there is an error that names those that are;
nothing falls back to another precision or device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import get_type_hints

from apr_core.contract.admit import Admission, admit
from apr_core.contract.types import ValidatedModel
from apr_core.engines.plain import PlainQwen2
from apr_core.errors import LoadError, Unavailable, UsageError
from apr_core.kernels.cpu import features
from apr_core.kernels.gpu import has_triton
from apr_core.model.tokens import Tokenizer, load_tokenizer
from apr_core.model.trace import TracedForward, lacking, require_traced

PRECISIONS = ("reference", "exact", "speed")
DEVICES = ("cpu", "cuda")
Build = Callable[[ValidatedModel, str, Tokenizer | None], TracedForward]


def load_model(
    path: str | Path, *, device: str = "cpu", precision: str = "reference", skip_contract: bool = False
) -> TracedForward:
    """
    Open a model file, put it through every gate, and build an engine for it.

    Args:
        path: What `open_checkpoint` takes.
        device: ``cpu`` or ``cuda``.
        precision: ``reference`` (float32 torch), ``exact`` or ``speed``.
        skip_contract: The explicit bypass: gates are judged and not enforced, and the model is marked ``bypassed``.

    Raises:
        UsageError: An unknown device or precision.
        NotFound, FormatError: There is no such file, or it is no model.
        ContractViolation: A gate refuses it; every violation is listed.
        LoadError: No configuration, one that is not supported, a tokenizer of another model, or too little memory.
        Unavailable: No such engine, or no such device here.
    """
    engine_for(precision, device)  # before minutes of judging: what cannot run is said at once
    return build(admit(path, skip=skip_contract), device=device, precision=precision)


def build(admission: Admission, *, device: str = "cpu", precision: str = "reference") -> TracedForward:
    """
    Build an engine for an admitted file.

    Raises:
        UsageError, ContractViolation, LoadError, Unavailable: As `load_model`.
    """
    make = engine_for(precision, device)
    validated = admission.require()
    with fitting(admission.checkpoint.path):
        return require_traced(make(validated, device, tokenizer_of(validated)))


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """
    Say that a model is too large for where it was to live, in the words of this project.

    Raises:
        LoadError: The machine or the device is out of memory.
    """
    import torch

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise LoadError(
            f"{path} does not fit into memory: {first}",
            advice="use a quantised GGUF, stream its layers (--budget-mb), or compute on the CPU (--device cpu)",
        ) from error


def load_plain(source: str | Path | Admission | ValidatedModel) -> PlainQwen2:
    """
    Build the independent float64 forward of a path, an admission or a validated model.

    Raises:
        NotFound, FormatError, ContractViolation, LoadError: As `load_model`.
    """
    if isinstance(source, str | Path):
        source = admit(source)
    validated = source.require() if isinstance(source, Admission) else source
    return PlainQwen2(validated, tokenizer_of(validated))


def tokenizer_of(validated: ValidatedModel) -> Tokenizer | None:
    """
    Return the tokenizer that came with the weights, or None when none did.

    Raises:
        LoadError: It has more tokens than the embedding has rows, so it is another model's.
        FormatError: It is there and malformed.
    """
    try:
        tokenizer = load_tokenizer(validated.checkpoint)
    except LoadError:
        return None
    rows = validated.geometry.vocab_size
    if tokenizer.vocab_size > rows:
        raise LoadError(
            f"the tokenizer in {tokenizer.source} has {tokenizer.vocab_size} tokens, the embedding has {rows} rows",
            advice="use the tokenizer that belongs to this model",
        )
    return tokenizer


def engine_for(precision: str, device: str) -> Build:
    """
    Return the builder that is registered for a precision on a device.

    Raises:
        UsageError: An unknown precision or device.
        Unavailable: None is registered, or its compiler or the device is not there.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"expected a precision of {', '.join(PRECISIONS)}, found {precision!r}")
    if device not in DEVICES:
        raise UsageError(f"expected a device of {', '.join(DEVICES)}, found {device!r}")
    if (precision, device) not in ENGINES:
        there = ", ".join(f"{p} on {d}" for p, d in ENGINES)
        raise Unavailable(f"no engine for precision {precision} on {device}; there is {there}", advice="choose one")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise Unavailable("no CUDA device here", advice="use device cpu")
        if precision != "reference":
            from apr_core.engines.gpu import require_device

            require_device(device)
    elif precision != "reference" and not has_compiler(device):
        raise Unavailable(
            f"precision {precision} on a processor is compiled by numba, which cannot be imported here",
            advice="pip install numba, or use precision reference",
        )
    return ENGINES[precision, device]


def fastest_precision(device: str) -> str:
    """Return what ``auto`` means on a device: ``speed`` where such an engine and its compiler are here."""
    return "speed" if ("speed", device) in ENGINES and has_compiler(device) else "reference"


def has_compiler(device: str) -> bool:
    """Say whether what compiles the engines of a device is installed: triton for ``cuda``, else numba."""
    return has_triton() if device == "cuda" else features.has_numba()


class Engines(dict[tuple[str, str], Build]):
    """
    The registry of engines. A builder that does not promise a `TracedForward` cannot be put into it.

    The promise is the builder's return annotation, which mypy holds against its body; what it builds is looked at once
    more when it is built.
    """

    def __init__(self, builders: Mapping[tuple[str, str], Build]) -> None:
        super().__init__()
        for key, make in builders.items():
            self[key] = make

    def __setitem__(self, key: tuple[str, str], make: Build) -> None:
        """
        Register a builder.

        Raises:
            TypeError: It is not annotated to return a `TracedForward`, or a class that lacks a part of it.
        """
        promised = get_type_hints(make).get("return")
        if promised is not TracedForward:
            missing = ", ".join(lacking(promised)) if isinstance(promised, type) else "an annotation"
            if missing:
                raise TypeError(f"the engine for {key} promises {promised}, no TracedForward: it lacks {missing}")
        super().__setitem__(key, make)


def _reference(validated: ValidatedModel, device: str, tokenizer: Tokenizer | None) -> TracedForward:
    from apr_core.model.qwen2 import Qwen2

    return Qwen2(validated, device, tokenizer)


def _cuda(validated: ValidatedModel, device: str, tokenizer: Tokenizer | None) -> TracedForward:
    from apr_core.engines.cuda import CudaQwen2

    return CudaQwen2(validated, device, tokenizer)


def _exact(validated: ValidatedModel, device: str, tokenizer: Tokenizer | None) -> TracedForward:
    from apr_core.engines.cpu import CpuQwen2

    return CpuQwen2(validated, "exact", tokenizer)


def _speed(validated: ValidatedModel, device: str, tokenizer: Tokenizer | None) -> TracedForward:
    from apr_core.engines.cpu import CpuQwen2

    return CpuQwen2(validated, "speed", tokenizer)


def _gpu_exact(validated: ValidatedModel, device: str, tokenizer: Tokenizer | None) -> TracedForward:
    from apr_core.engines.gpu import GpuQwen2

    return GpuQwen2(validated, "exact", tokenizer, device=device)


def _gpu_speed(validated: ValidatedModel, device: str, tokenizer: Tokenizer | None) -> TracedForward:
    from apr_core.engines.gpu import GpuQwen2

    return GpuQwen2(validated, "speed", tokenizer, device=device)


ENGINES = Engines(
    {
        ("reference", "cpu"): _reference,
        ("reference", "cuda"): _cuda,
        ("exact", "cpu"): _exact,
        ("speed", "cpu"): _speed,
        ("exact", "cuda"): _gpu_exact,
        ("speed", "cuda"): _gpu_speed,
    }
)

"""
A model copied with rounded weights, and run: what honest rounding does to this very model.

A copy that our own encoder rounds to the types of a file is the yardstick of that file; where we do not write a type,
noise of its size stands in.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from apr_core.contract.types import Validated, ValidatedModel
from apr_core.dtypes import FORMATS, QuantFormat
from apr_core.errors import UsageError
from apr_core.formats.checkpoint import Checkpoint, TensorSource
from apr_core.formats.codecs import round_to
from apr_core.formats.safetensors import write_safetensors
from apr_core.model.trace import Trace, TracedForward
from apr_core.parity.tolerances import F32, noisy, rounding_error

# Relative root mean square error by name and values of a tensor.
ErrorOf = Callable[[str, F32], float]
# (number, name, values) of a tensor -> the copy's values
Change = Callable[[int, str, F32], F32]


def rounding_of(subject: Checkpoint) -> ErrorOf:
    """
    Return the error that each tensor's type in ``subject`` makes; what the subject lacks stays exact.

    Only the types are looked at, never the values: a damaged value must not raise the budget that it is judged by.
    """

    def error_of(name: str, values: F32) -> float:
        info = subject.tensors.get(name)
        return 0.0 if info is None else rounding_error(info.dtype, values)

    return error_of


def with_noise(error_of: ErrorOf, seed: int) -> Change:
    """Add normal noise of the size that ``error_of`` says, another to each tensor."""

    def change(at: int, name: str, values: F32) -> F32:
        return noisy(values, error_of(name, values), np.random.default_rng(seed + at))

    return change


def rounded_like(subject: Checkpoint, seed: int) -> tuple[Change, tuple[str, ...]]:
    """
    Round each tensor to its type in ``subject`` with our own encoder.

    Returns:
        The change, and the types that we do not write: their tensors get noise of that type's size instead.
    """
    types = {name: info.dtype for name, info in subject.tensors.items()}
    unwritten = tuple(sorted({str(t) for t in types.values() if not is_writable(t)}))
    estimate = with_noise(rounding_of(subject), seed)

    def change(at: int, name: str, values: F32) -> F32:
        dtype = types.get(name)
        if dtype is None:
            return values
        return round_to(values, dtype) if str(dtype) not in unwritten else estimate(at, name, values)

    return change, unwritten


def is_writable(dtype: QuantFormat) -> bool:
    """Ask our encoder whether it writes a type, by having it write one block."""
    try:
        round_to(np.zeros((1, max(dtype.block_elements, 1)), np.float32), dtype)
    except UsageError:
        return False
    return True


def trace_copy(
    model: ValidatedModel,
    change: Change,
    load: Callable[[Path], TracedForward],
    run: Callable[[TracedForward], Trace],
) -> Trace:
    """
    Trace a copy of the model with other values in its weights.

    The copy is written as a file and comes back through the gate like any other, so no second way to weights exists.

    Args:
        model: Whose weights are copied.
        change: What becomes of each tensor: its number, name and values give the copy's values.
        load: How the copy is loaded.
        run: How it is traced.

    Raises:
        ReadWriteError: The copy cannot be written.
        ContractViolation: The noise made the model illegal, which says that it nearly was.

    Cost: four bytes of temporary disk per parameter, and one forward.
    """
    with tempfile.TemporaryDirectory(prefix="apr-noise-") as place:
        sources = [_source(tensor, change, at) for at, tensor in enumerate(model.tensors.values())]
        config = {**model.config, "vocab_size": model.geometry.vocab_size}
        (Path(place) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        write_safetensors(Path(place) / "model.safetensors", sources)
        return run(load(Path(place) / "model.safetensors"))


def _source(tensor: Validated, change: Change, at: int) -> TensorSource:
    def chunks() -> Iterable[F32]:
        return [change(at, tensor.name, tensor.values())]

    return TensorSource(tensor.name, FORMATS["F32"], tensor.shape, chunks)

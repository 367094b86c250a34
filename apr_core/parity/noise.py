"""
A model copied with noise in its weights, and run: what honest rounding does to this very model.

Two sizes of noise serve. That of a storage type gives the price of the type. That of one float32 rounding, run in
float64, gives the conditioning: how far the exact answer moves when each weight moves by less than float32 can say. No
float32 forward can be expected to come closer than a small multiple of it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apr_core.contract.types import Validated, ValidatedModel
from apr_core.dtypes import FORMATS
from apr_core.formats.checkpoint import Checkpoint, TensorSource
from apr_core.formats.safetensors import write_safetensors
from apr_core.model.trace import Trace, TracedForward
from apr_core.parity.tolerances import F32, noisy, rounding_error

ONE_ROUNDING = 2.0**-24

# Relative root mean square error by name and values of a tensor.
ErrorOf = Callable[[str, F32], float]


def rounding_of(subject: Checkpoint) -> ErrorOf:
    """
    Return the error that each tensor's type in ``subject`` makes; what the subject lacks stays exact.

    Only the types are looked at, never the values: a damaged value must not raise the budget that it is judged by.
    """

    def error_of(name: str, values: F32) -> float:
        info = subject.tensors.get(name)
        return 0.0 if info is None else rounding_error(info.dtype, values)

    return error_of


def one_rounding(name: str, values: F32) -> float:
    """Return the error of one float32 rounding, for every tensor."""
    return ONE_ROUNDING


def trace_copy(
    model: ValidatedModel,
    error_of: ErrorOf,
    load: Callable[[Path], TracedForward],
    ids: NDArray[np.int64],
    *,
    seed: int,
) -> Trace:
    """
    Trace a copy of the model with noise in its weights.

    The copy is written as a file and comes back through the gate like any other, so no second way to weights exists.

    Args:
        model: Whose weights are copied.
        error_of: Size of the noise.
        load: How the copy is run.
        ids: Tokens of the forward, int64 [tokens].
        seed: Of the noise.

    Raises:
        ReadWriteError: The copy cannot be written.
        ContractViolation: The noise made the model illegal, which says that it nearly was.

    Cost: four bytes of temporary disk per parameter, and one forward.
    """
    with tempfile.TemporaryDirectory(prefix="apr-noise-") as place:
        sources = [_source(tensor, error_of, seed + at) for at, tensor in enumerate(model.tensors.values())]
        config = {**model.config, "vocab_size": model.geometry.vocab_size}
        (Path(place) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        write_safetensors(Path(place) / "model.safetensors", sources)
        trace = Trace()
        load(Path(place) / "model.safetensors").forward(ids, trace=trace)
    return trace


def _source(tensor: Validated, error_of: ErrorOf, seed: int) -> TensorSource:
    def chunks() -> Iterable[F32]:
        values = tensor.values()
        return [noisy(values, error_of(tensor.name, values), np.random.default_rng(seed))]

    return TensorSource(tensor.name, FORMATS["F32"], tensor.shape, chunks)

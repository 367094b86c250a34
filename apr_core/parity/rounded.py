"""The price of a type: a reference copied with the rounding noise of another file's types, and run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apr_core.contract.types import Validated, ValidatedModel
from apr_core.dtypes import FORMATS
from apr_core.engines.load import load_model
from apr_core.formats.checkpoint import Checkpoint, TensorSource
from apr_core.formats.safetensors import write_safetensors
from apr_core.model.trace import Trace
from apr_core.parity.tolerances import noisy


def trace_rounded(
    reference: ValidatedModel, subject: Checkpoint, ids: NDArray[np.int64], *, seed: int, folder: Path | None = None
) -> Trace:
    """
    Trace the reference as honest rounding to the subject's types would leave it.

    The copy is written as a file and comes back through the gate like any other model, so no second way to weights
    exists for it. Only the types of the subject are looked at, never its values: a damaged value must not raise the
    budget that it is judged by.

    Args:
        reference: Whose values are copied.
        subject: Whose types are taken, tensor by tensor; what it lacks is copied without noise.
        ids: Tokens of the forward, int64 [tokens].
        seed: Of the noise.
        folder: Where the copy lives while it is needed; the system's temporary folder by default.

    Raises:
        ReadWriteError: The copy cannot be written.
        ContractViolation: The noise made the reference illegal, which says that it nearly was.

    Cost: four bytes of disk per parameter and one forward.
    """
    with tempfile.TemporaryDirectory(prefix="apr-rounded-", dir=folder) as place:
        sources = [_source(tensor, subject, seed + index) for index, tensor in enumerate(reference.tensors.values())]
        config = {**reference.config, "vocab_size": reference.geometry.vocab_size}
        (Path(place) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        write_safetensors(Path(place) / "model.safetensors", sources)
        trace = Trace()
        load_model(Path(place) / "model.safetensors").forward(ids, trace=trace)
    return trace


def _source(tensor: Validated, subject: Checkpoint, seed: int) -> TensorSource:
    info = subject.tensors.get(tensor.name)

    def chunks() -> Iterable[NDArray[np.float32]]:
        values = tensor.values()
        return [values if info is None else noisy(values, info.dtype, np.random.default_rng(seed))]

    return TensorSource(tensor.name, FORMATS["F32"], tensor.shape, chunks)

"""A model taken apart in memory, so that a recipe can damage it, and put together again as a SafeTensors folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apr_core.dtypes import FORMATS, QuantFormat
from apr_core.formats.checkpoint import Checkpoint, TensorSource
from apr_core.formats.codecs import decode, encode
from apr_core.formats.safetensors import write_safetensors


@dataclass(eq=False)
class Draft:
    """
    Weights as float32, element types and configuration: freely editable, never fed to a forward.

    Attributes:
        weights: Canonical name -> float32 array in its shape.
        dtypes: Name -> type to write; plain types only.
        config: Hugging Face configuration.
        metadata: SafeTensors metadata.
    """

    weights: dict[str, NDArray[np.float32]]
    dtypes: dict[str, QuantFormat]
    config: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)

    def copy(self) -> Draft:
        """A draft that shares no array with this one."""
        return Draft(
            {k: v.copy() for k, v in self.weights.items()}, dict(self.dtypes), dict(self.config), dict(self.metadata)
        )

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors other names, keeping the order."""
        self.weights = {names.get(k, k): v for k, v in self.weights.items()}
        self.dtypes = {names.get(k, k): v for k, v in self.dtypes.items()}

    def drop(self, name: str) -> None:
        """Remove a tensor."""
        del self.weights[name], self.dtypes[name]

    def add(self, name: str, values: NDArray[np.float32], dtype: str = "BF16") -> None:
        """Add a tensor."""
        self.weights[name], self.dtypes[name] = values, FORMATS[dtype]


def take_apart(checkpoint: Checkpoint) -> Draft:
    """
    Decode a whole model into a draft; types that are not plain become F32.

    Cost: four bytes per parameter; meant for models of a few million.
    """
    dtypes = {n: t.dtype if t.dtype.plain else FORMATS["F32"] for n, t in checkpoint.tensors.items()}
    weights = {n: decode(checkpoint.raw(n)) for n in checkpoint.tensors}
    return Draft(weights, dtypes, dict(checkpoint.config or {}))


def put_together(draft: Draft, folder: Path) -> Path:
    """Write a draft as ``model.safetensors`` and ``config.json`` in a new folder, and return the folder."""
    folder.mkdir(parents=True)

    def source(name: str, values: NDArray[np.float32]) -> TensorSource:
        def chunks() -> Iterable[NDArray[np.uint8]]:
            with np.errstate(over="ignore"):  # a planted Inf stays one
                yield encode(values, draft.dtypes[name])

        return TensorSource(name, draft.dtypes[name], values.shape, chunks)

    sources = [source(n, v) for n, v in draft.weights.items()]
    write_safetensors(folder / "model.safetensors", sources, draft.metadata)
    (folder / "config.json").write_text(json.dumps(draft.config), encoding="utf-8")
    return folder

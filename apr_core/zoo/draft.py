"""A model taken apart in memory, so that a recipe can damage it, and put together again in any of the three formats."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apr_core.dtypes import FORMATS, QuantFormat
from apr_core.formats.checkpoint import Checkpoint, TensorSource
from apr_core.formats.codecs import decode, encode
from apr_core.formats.safetensors import write_safetensors
from apr_core.rosetta.convert import convert

# Companions that recipes edit as JSON; golden.json and the committed logits travel as they are.
EDITABLE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
CARRIED = ("golden.json", "transformers_f64.npz")


@dataclass(eq=False)
class Draft:
    """
    A whole model folder, freely editable; a forward never sees it.

    Attributes:
        weights: Canonical name -> float32 array in its shape.
        dtypes: Name -> type to write; plain types only.
        config: Hugging Face configuration.
        metadata: SafeTensors metadata.
        companions: File name -> parsed JSON, of the files in EDITABLE that the model has.
        carried: File name -> path of a companion that is copied as it is.
        container: ``safetensors``, ``gguf`` or ``apr``: what is written in the end.
        stem: What the file of a GGUF or APR model is called, its extension apart.
        dtype: For gguf: ``keep`` or ``Q8_0``, ``F16`` and so on, a recipe of ``rosetta.convert``.
        after: Edits of the written files: each gets the weights file.
    """

    weights: dict[str, NDArray[np.float32]]
    dtypes: dict[str, QuantFormat]
    config: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    companions: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, Path] = field(default_factory=dict)
    container: str = "safetensors"
    dtype: str = "keep"
    stem: str = "model.{container}"
    after: list[Callable[[Path], None]] = field(default_factory=list)

    def copy(self) -> Draft:
        """A draft that shares nothing with this one that a recipe could edit."""
        return Draft(
            {k: v.copy() for k, v in self.weights.items()},
            dict(self.dtypes),
            copy.deepcopy(self.config),
            dict(self.metadata),
            copy.deepcopy(self.companions),
            dict(self.carried),
            self.container,
            self.dtype,
            self.stem,
            list(self.after),
        )

    def differing(self, other: Draft) -> list[str]:
        """Tensors that are not the same in both: changed, added, dropped, of another shape or type."""
        names = [*self.weights, *(n for n in other.weights if n not in self.weights)]
        return [
            n
            for n in names
            if n not in self.weights
            or n not in other.weights
            or self.dtypes[n] != other.dtypes[n]
            or not np.array_equal(self.weights[n], other.weights[n], equal_nan=True)
        ]

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors other names, keeping the order."""
        self.weights = {names.get(k, k): v for k, v in self.weights.items()}
        self.dtypes = {names.get(k, k): v for k, v in self.dtypes.items()}

    def drop(self, name: str) -> None:
        """Remove a tensor."""
        del self.weights[name], self.dtypes[name]

    def add(self, name: str, values: NDArray[np.float32], dtype: str = "BF16") -> None:
        """Add or replace a tensor."""
        self.weights[name], self.dtypes[name] = values, FORMATS[dtype]


def take_apart(checkpoint: Checkpoint) -> Draft:
    """
    Decode a whole model into a draft, companions included; types that are not plain become F32.

    Cost: four bytes per parameter; meant for models of a few million.
    """
    dtypes = {n: t.dtype if t.dtype.plain else FORMATS["F32"] for n, t in checkpoint.tensors.items()}
    weights = {n: decode(checkpoint.raw(n)) for n in checkpoint.tensors}
    folder = checkpoint.folder
    return Draft(
        weights,
        dtypes,
        dict(checkpoint.config or {}),
        companions={n: json.loads((folder / n).read_text("utf-8")) for n in EDITABLE if (folder / n).is_file()},
        carried={n: folder / n for n in CARRIED if (folder / n).is_file()},
    )


def put_together(draft: Draft, folder: Path) -> Path:
    """
    Write a draft into a new folder.

    Returns:
        The folder for SafeTensors and split files, the file for GGUF and APR (golden answers lie beside it).
    """
    source = folder if draft.container == "safetensors" else folder / "source"
    _write_folder(draft, source)
    path, weights = source, source / "model.safetensors"
    if draft.container != "safetensors":
        asked = None if draft.dtype == "keep" else draft.dtype
        written = convert(source, folder / f"written.{draft.container}", quantize=asked, bare=True)
        path = weights = written.rename(folder / draft.stem.format(container=draft.container))
        shutil.rmtree(source)
    for name, origin in draft.carried.items():
        shutil.copy(origin, folder / name)
    for edit in draft.after:
        edit(weights)
    return path if path.exists() else folder  # an edit may have split the file into parts


def _write_folder(draft: Draft, folder: Path) -> None:
    folder.mkdir(parents=True)

    def source(name: str, values: NDArray[np.float32]) -> TensorSource:
        def chunks() -> Iterable[NDArray[np.uint8]]:
            with np.errstate(over="ignore"):  # a planted Inf stays one
                yield encode(values, draft.dtypes[name])

        return TensorSource(name, draft.dtypes[name], values.shape, chunks)

    sources = [source(n, v) for n, v in draft.weights.items()]
    write_safetensors(folder / "model.safetensors", sources, draft.metadata)
    (folder / "config.json").write_text(json.dumps(draft.config), encoding="utf-8")
    for name, body in draft.companions.items():
        (folder / name).write_text(json.dumps(body, ensure_ascii=False), encoding="utf-8")

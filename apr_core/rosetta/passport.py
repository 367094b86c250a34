"""
The quant passport: what a file's tensors are stored in, against what its label says.

A name is no content: a 0.5B "Q4_K_M" has 78.8 % of its parameters in other types, because rows of 896 are no whole
number of K-quant blocks and llama.cpp falls back. The passport says so before anyone compares two files by their names.

Source: llama.cpp ``llama_ftype`` (``include/llama.h``) for the labels, ``src/llama-quant.cpp`` for rules and fallbacks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from apr_core.formats.checkpoint import Checkpoint
from apr_core.formats.codecs import decoder_name
from apr_core.formats.recipes import RECIPES, tensor_type
from apr_core.rosetta.carry import FILE_TYPES
from apr_core.rosetta.fingerprint import Distance, distances

# What a label means for a matrix whose row is a whole number of blocks: the types that belong to it.
_MEANT: Mapping[str, tuple[str, ...]] = {
    "Q4_K_M": ("Q4_K", "Q6_K"),
    "Q4_K_S": ("Q4_K", "Q5_K", "Q6_K"),
    "Q5_K_M": ("Q5_K", "Q6_K"),
    "Q5_K_S": ("Q5_K", "Q6_K"),
    "Q6_K": ("Q6_K",),
    "Q8_0": ("Q8_0",),
    "Q4_0": ("Q4_0", "Q6_K"),
    "Q4_1": ("Q4_1", "Q6_K"),
    "Q5_0": ("Q5_0", "Q6_K"),
    "Q5_1": ("Q5_1", "Q6_K"),
    "F16": ("F16",),
    "BF16": ("BF16",),
    "F32": ("F32",),
}
_LABELS = {number: name for name, number in FILE_TYPES.items()} | {14: "Q4_K_S", 16: "Q5_K_S"}
_IN_NAME = re.compile(rf"(?<![A-Z0-9])({'|'.join(sorted(_MEANT, key=len, reverse=True))})(?![A-Z0-9_])")


@dataclass(frozen=True)
class Passport:
    """
    What a file is stored in.

    Attributes:
        types: Element type -> tensors, parameters, bytes, share of parameters, decoder.
        parameters: Of all tensors.
        bits_per_weight: Stored bits over parameters.
        label: What ``general.file_type`` says, or the file's name where it says nothing; of two labels the one that
            fits worse; empty where there is none.
        label_from: ``general.file_type``, ``name`` or empty.
        fallback: Share of the parameters in matrices whose type is not one of the label's; None without a label.
        agrees: Whether every matrix has the type that llama.cpp's rules give it under the label (fallbacks included);
            None without a label, or where we do not know the label's rules.
        strange: Matrices with another type than the rules give, ``name: found, expected``.
        strange_share: Their share of the parameters of all matrices.
        distances: Per tensor against a reference, where one was given.
    """

    types: Mapping[str, Mapping[str, Any]]
    parameters: int
    bits_per_weight: float
    label: str
    label_from: str
    fallback: float | None
    agrees: bool | None
    strange: tuple[str, ...]
    strange_share: float
    distances: Mapping[str, Distance]

    def as_json(self) -> dict[str, Any]:
        """The passport as a report holds it."""
        return {
            "types": {name: dict(row) for name, row in self.types.items()},
            "parameters": self.parameters,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "label": self.label,
            "label_from": self.label_from,
            "fallback_share": None if self.fallback is None else round(self.fallback, 6),
            "label_agrees": self.agrees,
            "strange": list(self.strange[:20]),
            "sqnr_db": {name: distance.sqnr_db for name, distance in self.distances.items()},
        }

    def sentences(self) -> list[str]:
        """Say it to a person."""
        said = [f"{self.bits_per_weight:.3f} bits per weight"]
        if not self.label:
            return [*said, "no label (neither general.file_type nor the name says what it is)"]
        said.append(f"labelled {self.label} by {self.label_from}")
        if self.fallback is not None:
            said.append(f"{100 * self.fallback:.1f} % of the parameters are in another type than the label names")
        if self.agrees is False:
            said.append(f"{len(self.strange)} matrices are not what the label's rules give: {self.strange[0]}")
        elif self.agrees:
            said.append("every matrix has the type that the label's rules give it")
        return said


def passport(
    checkpoint: Checkpoint, reference: Checkpoint | None = None, *, progress: Callable[[int], None] | None = None
) -> Passport:
    """
    Describe what a file is stored in.

    Args:
        checkpoint: The file; only its header is read when there is no reference.
        reference: The model that it was quantised from; each tensor's distance to it is measured.
        progress: Called with the stored bytes compared so far.

    Cost: none but the header; with a reference one pass over both files.
    """
    tensors = list(checkpoint.tensors.values())
    parameters = sum(prod(info.shape) for info in tensors)
    judged = [(*said, _strange(checkpoint, said[0])) for said in _labels(checkpoint)]
    # of two labels the one that fits worse; the key where they fit alike
    label, label_from, strange = max(judged, key=lambda j: sum((j[2] or {}).values()), default=("", "", None))
    matrices = {info.name: info for info in tensors if len(info.shape) > 1}
    meant = _MEANT.get(label)
    other = sum(prod(info.shape) for info in matrices.values() if meant and info.dtype.name not in meant)
    inside = sum(prod(info.shape) for info in matrices.values())
    return Passport(
        _histogram(checkpoint, parameters),
        parameters,
        8 * sum(info.nbytes for info in tensors) / parameters if parameters else 0.0,
        label,
        label_from,
        other / parameters if meant and parameters else None,
        None if strange is None else not strange,
        tuple(strange or ()),
        sum((strange or {}).values()) / inside if inside else 0.0,
        distances(checkpoint, reference, progress=progress) if reference is not None else {},
    )


def _histogram(checkpoint: Checkpoint, parameters: int) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for info in checkpoint.tensors.values():
        new = {"tensors": 0, "parameters": 0, "bytes": 0, "share": 0.0, "decoder": decoder_name(info.dtype)}
        row = rows.setdefault(str(info.dtype), new)
        row["tensors"] += 1
        row["parameters"] += prod(info.shape)
        row["bytes"] += info.nbytes
        row["share"] = row["parameters"] / parameters if parameters else 0.0
    return dict(sorted(rows.items(), key=lambda item: -item[1]["parameters"]))


def _labels(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Read what the file is called, the key first, then its name."""
    found = []
    said = checkpoint.metadata.get("general.file_type")
    if isinstance(said, int) and not isinstance(said, bool):
        found.append((_LABELS.get(said, f"file type {said}"), "general.file_type"))
    named = _IN_NAME.findall(checkpoint.path.stem.upper())
    return [*found, (named[-1], "name")] if named else found


def _strange(checkpoint: Checkpoint, label: str) -> dict[str, int] | None:
    """
    Find the matrices that the label's rules would have stored otherwise: ``name: found, expected`` -> parameters.

    None where the rules are not ours.
    """
    layers = (checkpoint.config or {}).get("num_hidden_layers")
    if label not in RECIPES or not isinstance(layers, int):
        return None
    tied = "lm_head.weight" not in checkpoint.tensors
    found = {}
    for name, info in checkpoint.tensors.items():
        if len(info.shape) > 1:
            expected = tensor_type(label, name, info.shape, num_hidden_layers=layers, tied=tied)
            if info.dtype is not expected:
                found[f"{name}: {info.dtype}, expected {expected}"] = prod(info.shape)
    return found

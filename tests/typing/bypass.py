"""
Lines that must not type-check: mypy's `warn_unused_ignores` fails the build on the day that one of them is accepted.

This file is never run. It is the compile error of the specification: a function that wants a validated tensor cannot be
given raw bytes, and no validated tensor can be edited into another one.
"""

from __future__ import annotations

import numpy as np
import torch

from apr_core.contract.admit import Admission, admit
from apr_core.contract.gates import Violation
from apr_core.contract.layout import Geometry
from apr_core.contract.stats import TensorStats
from apr_core.contract.types import (
    RepackedHead,
    ValidatedEmbedding,
    ValidatedHead,
    ValidatedModel,
    ValidatedVector,
    ValidatedWeight,
)
from apr_core.formats.checkpoint import Checkpoint, RawTensor, open_checkpoint
from apr_core.model.linear import Embedding, Head, Linear, RMSNorm


def multiply(weight: ValidatedWeight) -> None:
    """Stand for any action on a weight."""


def run(model: ValidatedModel) -> None:
    """Stand for any action on a model."""


def natural(head: ValidatedHead) -> None:
    """Stand for an engine whose head reads rows."""


def repacked(head: RepackedHead) -> None:
    """Stand for an engine whose head reads its own layout."""


def bypass(raw: RawTensor, geometry: Geometry, stats: TensorStats, checkpoint: Checkpoint) -> None:
    """Try every road around the gate that a type can close."""
    # an action takes neither bytes, nor values, nor another kind of tensor
    multiply(raw)  # type: ignore[arg-type]
    multiply(np.zeros((2, 2), np.float32))  # type: ignore[arg-type]
    multiply(ValidatedVector(raw, geometry))  # type: ignore[arg-type]
    multiply(ValidatedEmbedding(raw, geometry))  # type: ignore[arg-type]
    multiply(None)  # type: ignore[arg-type]

    # a tensor takes bytes and a geometry, not values, and no verdict of the caller's own
    ValidatedWeight(np.zeros((2, 2), np.float32), geometry)  # type: ignore[arg-type]
    ValidatedWeight(raw)  # type: ignore[call-arg]
    ValidatedWeight(raw, geometry, stats)  # type: ignore[arg-type]
    ValidatedWeight(raw, geometry, stats=stats)  # type: ignore[call-arg]
    ValidatedWeight(raw, geometry, bypassed=False)  # type: ignore[call-arg]

    # what was judged cannot be exchanged afterwards
    weight = ValidatedWeight(raw, geometry)
    weight.raw = raw  # type: ignore[misc]
    weight.stats = stats  # type: ignore[misc]
    weight.bypassed = False  # type: ignore[misc]

    # a model comes from an admission: not from a path, a checkpoint, or a list of tensors
    run(open_checkpoint("model.safetensors"))  # type: ignore[arg-type]
    run(admit("model.safetensors"))  # type: ignore[arg-type]
    ValidatedModel("model.safetensors")  # type: ignore[arg-type]
    ValidatedModel(checkpoint)  # type: ignore[arg-type]
    ValidatedModel({"lm_head.weight": weight})  # type: ignore[arg-type]
    model = admit(checkpoint).require()
    model.admission = admit(checkpoint)  # type: ignore[misc]
    model.tensors["lm_head.weight"] = weight  # type: ignore[index]

    # an admission cannot be told what it found
    admission: Admission = admit(checkpoint)
    admission.violations = ()  # type: ignore[misc]
    admission.bypassed = False  # type: ignore[misc]
    admission.ok = True  # type: ignore[misc]
    admission.stats["lm_head.weight"] = stats  # type: ignore[index]


def parts(model: ValidatedModel, raw: RawTensor, values: torch.Tensor) -> None:
    """Try to build the parts of a model from anything but the type that each is for."""
    weight = model.take("model.layers.0.mlp.up_proj.weight", ValidatedWeight)
    vector = model.take("model.norm.weight", ValidatedVector)
    table = model.take("model.embed_tokens.weight", ValidatedEmbedding)
    Linear(values)  # type: ignore[arg-type]
    Linear(raw)  # type: ignore[arg-type]
    Linear(vector)  # type: ignore[arg-type]
    Linear(table)  # type: ignore[arg-type]
    Linear(model.head)  # type: ignore[arg-type]
    Linear(weight, weight)  # type: ignore[arg-type]
    Embedding(values)  # type: ignore[arg-type]
    Embedding(weight)  # type: ignore[arg-type]
    Embedding(model.head)  # type: ignore[arg-type]
    RMSNorm(values, 1e-6)  # type: ignore[arg-type]
    RMSNorm(weight, 1e-6)  # type: ignore[arg-type]
    Head(values)  # type: ignore[arg-type]
    Head(weight)  # type: ignore[arg-type]
    Head(table)  # type: ignore[arg-type]
    model.tensors["lm_head.weight"].raw.data = raw.data  # type: ignore[misc]

    # a head in one layout is not a head in the other
    natural(model.head)
    packed = RepackedHead(model.head)
    repacked(packed)
    natural(packed)  # type: ignore[arg-type]
    repacked(model.head)  # type: ignore[arg-type]
    Head(packed)  # type: ignore[arg-type]
    RepackedHead(packed)  # type: ignore[arg-type]
    RepackedHead(table)  # type: ignore[arg-type]
    RepackedHead(model.head.values())  # type: ignore[arg-type]
    RepackedHead(model.head, data=packed.data)  # type: ignore[call-arg]
    packed.data = packed.data  # type: ignore[misc]
    packed.head = model.head  # type: ignore[misc]


def edit(violation: Violation, geometry: Geometry) -> None:
    """Try to edit what a verdict rests on."""
    violation.measured = 0.0  # type: ignore[misc]
    geometry.tied = True  # type: ignore[misc]


class Trusting(ValidatedWeight):  # type: ignore[misc]
    """A subclass could leave the gate out, so there are none."""

    def __post_init__(self, admission: Admission | None) -> None:
        """Judge nothing."""


class Packed(RepackedHead):  # type: ignore[misc]
    """Nor of the head in another layout."""


class Whole(ValidatedModel):  # type: ignore[misc]
    """Nor of the model."""


class Trusted(Admission):  # type: ignore[misc]
    """Nor of the verdict."""

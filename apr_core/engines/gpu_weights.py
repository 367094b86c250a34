"""The weights of an admitted model on a device, packed: all of them, or the first layers and the rest by turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apr_core.contract.layout import EMBEDDING, HEAD
from apr_core.contract.types import RepackedHead, Validated, ValidatedHead, ValidatedModel
from apr_core.engines.streaming import FLOAT, POSITIONS, USABLE, Estimate, Plan, choose
from apr_core.errors import LoadError
from apr_core.kernels.gpu.planes import BLOCK, PLANES, pack
from apr_core.model.config import Qwen2Config

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PLACES = {name: f"self_attn.{name}" if name[0] in "qkvo" else f"mlp.{name}" for name in MATRICES}
_VECTORS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_ELSEWHERE = "use --precision reference, on cuda or on the CPU"
CHUNK = 512
"""Tokens of a prompt that are computed at a time."""
SCRATCH = 1 << 26
"""Weights that a prefill decodes at a time."""


@dataclass(frozen=True)
class Packed:
    """Where a matrix lies in the bytes of its layer, and what it is."""

    type: str
    rows: int
    columns: int
    at: int

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return PLANES[self.type].nbytes(self.rows, self.columns)


def planned(validated: ValidatedModel) -> list[dict[str, Packed]]:
    """
    Say how each layer will lie in one run of bytes; nothing is read.

    Raises:
        LoadError: A type or a shape that no kernel takes.
    """
    config = Qwen2Config.of(validated)
    dim = config.head_dim
    if dim % BLOCK or dim & (dim - 1) or config.hidden_size % BLOCK or config.intermediate_size % BLOCK:
        raise LoadError(
            f"expected hidden_size and intermediate_size to be multiples of {BLOCK} and head_dim a power of two from "
            f"{BLOCK} on, found {config.hidden_size}, {config.intermediate_size} and {dim}, in "
            f"{validated.checkpoint.path}",
            advice=_ELSEWHERE,
        )
    layers = []
    for number in range(config.num_hidden_layers):
        at, layer = 0, {}
        for name in MATRICES:
            tensor = validated.tensors[f"model.layers.{number}.{_PLACES[name]}.weight"]
            layer[name] = replace(described(tensor), at=at)
            at += layer[name].nbytes
        layers.append(layer)
    for name in {EMBEDDING, EMBEDDING if validated.tied else HEAD}:
        described(validated.tensors[name])
    return layers


def described(tensor: Validated) -> Packed:
    """
    Describe a matrix as the device will hold it.

    Raises:
        LoadError: There is no kernel for its type.
    """
    info = tensor.raw.info
    if info.dtype.name not in PLANES:
        raise LoadError(
            f"expected a type of {', '.join(PLANES)}, found {info.dtype}, tensor {tensor.name}", advice=_ELSEWHERE
        )
    return Packed(info.dtype.name, prod(info.shape[:-1]), info.shape[-1], 0)


def estimate(validated: ValidatedModel, cache_bytes: int) -> Estimate:
    """
    Estimate what a model takes on the device, packed.

    Args:
        validated: The model.
        cache_bytes: Of one cached number.
    """
    config, layers = Qwen2Config.of(validated), planned(validated)
    sizes = [sum(packed.nbytes for packed in layer.values()) for layer in layers]
    positions = min(POSITIONS, config.max_position_embeddings)
    table = described(validated.tensors[EMBEDDING]).nbytes
    scores = 2 * config.num_attention_heads * CHUNK * positions
    wide = 4 * config.hidden_size + 3 * config.intermediate_size + config.vocab_size
    return Estimate(
        layer=max(sizes),
        layers=len(layers),
        head=table if validated.tied else described(validated.tensors[HEAD]).nbytes,
        embedding=0 if validated.tied else table,
        norm=FLOAT * (config.hidden_size * (1 + 2 * len(layers)) + config.max_position_embeddings * config.head_dim),
        cache=cache_bytes * 2 * len(layers) * positions * config.num_key_value_heads * config.head_dim,
        activations=FLOAT * (min(SCRATCH, wide * config.hidden_size) + CHUNK * wide + scores),
        stored=sum(sizes),
    )


def resident_layers(plan: Plan) -> int:
    """Return how many layers stay on the device: all, or what is left beside two that come and go."""
    found = plan.estimate
    if plan.mode == "full":
        return found.layers
    return max(0, (int(plan.budget_bytes * USABLE) - found.streaming()) // found.layer)


class GpuWeights:
    """
    All weights of one model, packed.

    Attributes:
        plan: Why the layers are all here, or come and go.
        resident: How many stay.
        head: The output matrix.
        embedding: The table; of a tied model the head.
        gain: Of the last norm.
        vectors: Gains and biases by layer, by their names within it.
        nbytes: Of what one decode step reads.

    Raises:
        LoadError: A type or a shape that no kernel takes, or too little memory; before anything is allocated.
    """

    def __init__(self, validated: ValidatedModel, device: torch.device, budget_bytes: int, cache_bytes: int) -> None:
        from apr_core.kernels.gpu.launch import Matrix

        self._matrix = Matrix
        self.plan = choose(estimate(validated, cache_bytes), budget_bytes)
        self.resident = resident_layers(self.plan)
        self._layers, self._device = planned(validated), device
        tensors = validated.tensors
        self.head = self._head(validated.head)
        self.embedding = self.head if validated.tied else self._table(tensors[EMBEDDING])
        self.gain = self._vector(tensors["model.norm.weight"])
        self.vectors = [self._vectors_of(validated, number) for number in range(len(self._layers))]
        self._blobs = [self._blob(validated, number) for number in range(len(self._layers))]
        self.nbytes = self.head.data.numel() + sum(blob.numel() for blob in self._blobs)
        self._courier = Courier(device, self.plan.estimate.layer) if self.streamed else None

    @property
    def streamed(self) -> bool:
        """Whether any layer comes and goes."""
        return self.resident < len(self._layers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the matrices of each layer in order; those that are not here arrive while earlier ones compute."""
        courier = self._courier
        if courier is not None:
            courier.send(self._blobs[self.resident], self.resident)
        for number, blob in enumerate(self._blobs):
            if courier is None or number < self.resident:
                yield self._views(number, blob)
                continue
            here = courier.receive(number)
            if number + 1 < len(self._blobs):
                courier.send(self._blobs[number + 1], number + 1)
            yield self._views(number, here)
            courier.release(number)

    def _views(self, number: int, blob: Tensor) -> dict[str, Any]:
        return {
            name: self._matrix(p.type, p.rows, p.columns, blob[p.at : p.at + p.nbytes])
            for name, p in self._layers[number].items()
        }

    def _blob(self, validated: ValidatedModel, number: int) -> Tensor:
        parts = [
            self._packed(validated.tensors[f"model.layers.{number}.{_PLACES[name]}.weight"])
            for name in self._layers[number]
        ]
        blob = torch.cat(parts)
        if number < self.resident:
            return blob
        return blob.cpu().pin_memory() if self._device.type == "cuda" else blob

    def _packed(self, tensor: Validated | ValidatedHead) -> Tensor:
        shape, rows = tensor.raw.info.shape, prod(tensor.raw.info.shape[:-1])
        # a copy: torch must not see the memory that was judged
        stored = torch.from_numpy(np.array(tensor.raw.data).view(np.uint8).reshape(-1)).to(self._device)
        return pack(tensor.raw.info.dtype.name, stored, rows, shape[-1])

    def _table(self, tensor: Validated) -> Any:
        found = described(tensor)
        return self._matrix(found.type, found.rows, found.columns, self._packed(tensor))

    def _head(self, tensor: ValidatedHead) -> Any:
        repacked = RepackedHead(tensor, lambda judged: self._packed(judged).cpu().numpy())
        found = described(tensor)
        return self._matrix(
            found.type, found.rows, found.columns, torch.from_numpy(np.array(repacked.data)).to(self._device)
        )

    def _vectors_of(self, validated: ValidatedModel, number: int) -> dict[str, Tensor]:
        prefix = f"model.layers.{number}."
        found = {name: self._vector(validated.tensors[prefix + name]) for name in _VECTORS}
        for name in MATRICES[:3]:
            bias = f"{prefix}self_attn.{name}.bias"
            rows = self._layers[number][name].rows
            there = bias in validated.tensors
            found[name] = self._vector(validated.tensors[bias]) if there else torch.zeros(rows, device=self._device)
        return found

    def _vector(self, tensor: Validated) -> Tensor:
        return torch.from_numpy(np.array(tensor.values(), dtype=np.float32)).to(self._device)


class Courier:
    """
    Brings the layers that are not here, each into one of two buffers, while the one before computes in the other.

    Without a CUDA device there is no second stream: a layer is copied when it is sent.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._cuda: Any = torch.cuda if device.type == "cuda" else None
        self._stream: Any = self._cuda.Stream(device) if self._cuda else None
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._arrived: list[Any] = [None, None]
        self._read: list[Any] = [None, None]

    def send(self, blob: Tensor, number: int) -> None:
        """Start copying a layer into its buffer, once the layer that was there has been computed."""
        slot = number % 2
        with self._cuda.stream(self._stream) if self._cuda else nullcontext():
            if self._read[slot] is not None:
                self._stream.wait_event(self._read[slot])
            self._buffers[slot][: blob.numel()].copy_(blob, non_blocking=True)
            self._arrived[slot] = self._event(self._stream)

    def receive(self, number: int) -> Tensor:
        """Return the buffer of a layer; what computes on it waits for its arrival."""
        if self._cuda:
            self._cuda.current_stream().wait_event(self._arrived[number % 2])
        return self._buffers[number % 2]

    def release(self, number: int) -> None:
        """Say that all work on a layer is under way, so that its buffer may be filled behind it."""
        self._read[number % 2] = self._event(self._cuda.current_stream() if self._cuda else None)

    def _event(self, stream: Any) -> Any:
        if not self._cuda:
            return None
        event = self._cuda.Event()
        event.record(stream)
        return event

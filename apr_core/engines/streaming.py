"""
A model whose layers come and go: for memory that holds the head, the cache and a layer or two, but not all of them.

The estimators are those of the specification (``spec/apr.md`` section 7, realizar ``src/cuda/streaming.rs``) with what
it leaves out: biases, activations, a tied head that is not held twice, and the stored bytes of quantised layers, which
are what is mapped or kept pinned. The choice between the two modes says its reason and can be forced by a budget.

On CUDA every layer lies decoded in pinned memory, and the next one is copied on its own stream while this one computes:
two layers on the device. On the CPU a layer is decoded from the mapping when its turn comes, and dropped behind it, its
pages of the mapping too: one layer in memory.
Exactness: the same operations on the same values in the same order as the full model: equal bit for bit.
Cost: on CUDA one copy of all layers per forward; on the CPU one decoding of all layers per forward.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from apr_core.contract.layout import Geometry, expected_tensors
from apr_core.contract.types import Validated, ValidatedModel
from apr_core.engines.cuda import CudaQwen2
from apr_core.engines.load import fitting
from apr_core.errors import LoadError
from apr_core.formats.checkpoint import Checkpoint
from apr_core.model.config import Qwen2Config
from apr_core.model.linear import Place, Weights
from apr_core.model.qwen2 import Attend, DecoderLayer, Qwen2
from apr_core.model.tokens import Tokenizer

FLOAT = 4
USABLE = 0.90
POSITIONS = 2048
PREFILL = 512
MB = 1024**2


@dataclass(frozen=True)
class Estimate:
    """
    Bytes that a model takes on its device, by part.

    Attributes:
        layer: The largest layer, float32.
        layers: How many there are.
        head: The output matrix; of a tied model it is the embedding too.
        embedding: The embedding, where it is not the head.
        norm: The last norm.
        cache: Keys and values of all positions.
        activations: What one forward holds beside them at most.
        stored: Bytes of all layers as the file holds them: what is mapped while they are streamed on the CPU.
    """

    layer: int
    layers: int
    head: int
    embedding: int
    norm: int
    cache: int
    activations: int
    stored: int = 0

    @property
    def resident(self) -> int:
        """What both modes hold."""
        return self.head + self.embedding + self.norm + self.cache + self.activations

    @property
    def full(self) -> int:
        """All layers at once."""
        return self.resident + self.layers * self.layer

    def streaming(self, ahead: int = 1) -> int:
        """One layer, and ``ahead`` more on their way."""
        return self.resident + (1 + ahead) * self.layer


@dataclass(frozen=True)
class Plan:
    """Which mode was chosen, why, and what it rests on."""

    mode: Literal["full", "streaming"]
    reason: str
    estimate: Estimate
    budget_bytes: int


def estimate(validated: ValidatedModel, positions: int = POSITIONS, prefill: int = PREFILL) -> Estimate:
    """
    Estimate what this very file takes.

    Args:
        validated: The model.
        positions: Length of the cache.
        prefill: Tokens per forward at most.
    """
    found = estimate_of(validated.geometry, positions, prefill)
    layers = (t.raw.info.nbytes for name, t in validated.tensors.items() if name.startswith("model.layers."))
    return replace(found, stored=sum(layers))


def estimate_of(geometry: Geometry, positions: int = POSITIONS, prefill: int = PREFILL) -> Estimate:
    """Estimate what a model of these sizes takes, tensor by tensor; as `estimate`, without the bytes of a file."""
    one = [prod(shape) for name, (_, shape) in expected_tensors(geometry).items() if name.startswith("model.layers.0.")]
    tokens, heads, hidden = min(prefill, positions), geometry.num_attention_heads, geometry.hidden_size
    table = FLOAT * hidden * geometry.vocab_size
    widest = max(3 * geometry.intermediate_size, 4 * heads * geometry.head_dim) + 4 * hidden
    # scores and their softmax stand beside each other; the logits of a prefill are its last and largest result
    scores = 2 * heads * tokens * positions
    slot = 2 * geometry.num_key_value_heads * geometry.head_dim
    return Estimate(
        layer=FLOAT * sum(one),
        layers=geometry.num_hidden_layers,
        head=table,
        embedding=0 if geometry.tied else table,
        norm=FLOAT * hidden,
        cache=FLOAT * geometry.num_hidden_layers * positions * slot,
        activations=FLOAT * max(tokens * widest + scores, tokens * (geometry.vocab_size + hidden)),
    )


def choose(found: Estimate, budget_bytes: int, *, ahead: int = 1) -> Plan:
    """
    Choose a mode for so much memory, of which a tenth stays free.

    Args:
        found: Of the model.
        budget_bytes: Memory of the device, or a lower cap that a person set.
        ahead: Layers on their way while one computes.

    Raises:
        LoadError: Not even one layer at a time fits.
    """
    usable, slim = int(budget_bytes * USABLE), found.streaming(ahead)
    full_mb, slim_mb, usable_mb = found.full // MB, slim // MB, usable // MB
    if found.full <= usable:
        return Plan("full", f"all layers at once: {full_mb} MB of {usable_mb} MB usable", found, budget_bytes)
    if slim <= usable:
        reason = (
            f"layer by layer: {full_mb} MB for all layers, {usable_mb} MB usable, {slim_mb} MB needed so "
            f"({found.stored // MB} MB of layers stay in the file)"
        )
        return Plan("streaming", reason, found, budget_bytes)
    raise LoadError(
        f"expected {slim_mb} MB for one layer at a time ({full_mb} MB for all), found {usable_mb} MB usable of "
        f"{budget_bytes // MB} MB",
        advice="use a quantised GGUF, compute on the CPU (--device cpu), or free memory",
    )


def available_bytes(device: str) -> int:
    """Return the memory of a device that a new model may take."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info()[0])
    try:  # what the page cache holds can be had, and is not free
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Arena(Place):
    """
    A place to which tensors are brought again and again: decoded once into pinned memory, copied on a stream.

    Without a CUDA device there is nothing to pin and no stream: a tensor is decoded each time, and nothing is kept. In
    either case the pages that it was decoded from are let go.
    """

    def __init__(self, device: str, checkpoint: Checkpoint) -> None:
        super().__init__(device)
        self._checkpoint = checkpoint
        self.on_cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if self.on_cuda else None
        self._pinned: dict[str, Tensor] = {}
        self.moved: list[Tensor] = []

    def take(self, tensor: Validated) -> Tensor:
        """Bring a tensor here; on CUDA behind what this stream still copies."""
        if not self.on_cuda:
            taken = super().take(tensor)
            self._checkpoint.release(tensor.name)
            return taken
        if tensor.name not in self._pinned:
            self._pinned[tensor.name] = torch.from_numpy(tensor.values()).pin_memory()
            self._checkpoint.release(tensor.name)
        arriving = self._pinned[tensor.name].to(self.device, non_blocking=True)
        self.moved.append(arriving)
        return arriving


class Layers:
    """The layers in order, each built when its turn comes (on CUDA: one turn earlier) and dropped behind it."""

    def __init__(self, config: Qwen2Config, weights: Weights, attend: Attend) -> None:
        self._config, self._weights, self._attend = config, weights, attend

    def __iter__(self) -> Iterator[DecoderLayer]:
        count, arena = self._config.num_hidden_layers, self._weights.place
        if not isinstance(arena, Arena) or not arena.on_cuda:
            for at in range(count):
                yield self._build(at)
            return
        coming = self._fetch(arena, 0)
        for at in range(count):
            layer, arrived, tensors = coming
            now: Any = torch.cuda.current_stream()
            if at + 1 < count:
                coming = self._fetch(arena, at + 1)
            now.wait_event(arrived)  # without it a layer computes on what its copy has not yet written
            for tensor in tensors:
                tensor.record_stream(now)  # so that its memory is not given away before it was read
            yield layer

    def _build(self, at: int) -> DecoderLayer:
        return DecoderLayer(self._config, self._weights, at, self._attend)

    def _fetch(self, arena: Arena, at: int) -> tuple[DecoderLayer, Any, list[Tensor]]:
        """Start copying a layer; return it, the event of its arrival and its tensors."""
        arena.moved = []
        with torch.cuda.stream(arena.stream) if arena.stream is not None else nullcontext():
            layer = self._build(at)
            arrived: Any = torch.cuda.Event()
            arrived.record(arena.stream)
        return layer, arrived, arena.moved


class StreamedQwen2(Qwen2):
    """
    The reference with its layers streamed. Implements `TracedForward`.

    Args:
        validated: The admitted weights and their configuration.
        device: A torch device.
        tokenizer: The model's own, when it has one.
    """

    backend = "torch, streamed"

    def __init__(self, validated: ValidatedModel, device: str = "cpu", tokenizer: Tokenizer | None = None) -> None:
        super().__init__(validated, device, tokenizer, weights=Weights(validated, Arena(device, validated.checkpoint)))

    def make_layers(self, weights: Weights, attend: Attend) -> Iterable[DecoderLayer]:
        """Return layers that come and go."""
        return Layers(self.config, weights, attend)


class StreamedCudaQwen2(CudaQwen2):
    """`CudaQwen2` with its layers streamed."""

    backend = "torch, its own attention, streamed"

    def __init__(self, validated: ValidatedModel, device: str = "cuda", tokenizer: Tokenizer | None = None) -> None:
        super().__init__(validated, device, tokenizer, weights=Weights(validated, Arena(device, validated.checkpoint)))

    def make_layers(self, weights: Weights, attend: Attend) -> Iterable[DecoderLayer]:
        """Return layers that come and go."""
        return Layers(self.config, weights, attend)


def fit(
    validated: ValidatedModel, device: str, tokenizer: Tokenizer | None, budget_bytes: int | None = None
) -> tuple[Qwen2, Plan]:
    """
    Build the reference in the mode that its device has memory for.

    Args:
        validated: The model.
        device: ``cpu`` or ``cuda``.
        tokenizer: The model's own, when it has one.
        budget_bytes: Memory to plan with; None for what is free.

    Raises:
        LoadError: Neither mode fits, or the memory is gone all the same.
    """
    cuda = device.startswith("cuda")
    budget = available_bytes(device) if budget_bytes is None else budget_bytes
    plan = choose(estimate(validated, _cache_length(validated)), budget, ahead=1 if cuda else 0)
    whole, streamed = (CudaQwen2, StreamedCudaQwen2) if cuda else (Qwen2, StreamedQwen2)
    with fitting(validated.checkpoint.path):
        return (whole if plan.mode == "full" else streamed)(validated, device, tokenizer), plan


def _cache_length(validated: ValidatedModel) -> int:
    return min(POSITIONS, Qwen2Config.of(validated).max_position_embeddings)

"""
Qwen2 on a CUDA device: weights multiplied as they are stored, and a decode step replayed as one graph.

A single token goes through the fused kernels (`kernels.gpu.phases`), several tokens through torch's products on weights
that are decoded a piece at a time. Precisions:

    exact   activations of 24 bits against quantised weights, else float32; keys and values float32; prefill in float32
            with TF32 off: within the parity contract
    speed   activations of 8 bits, keys and values float16 (what llama.cpp computes with); prefill in bfloat16

Between steps a graph needs nothing of the host: token, position and place in the cache stay on the device. A graph is
bound to the memory of a cache, so caches come from a pool, one size per power of two, and bring their graph along.

Exactness: the same bits in every run (no float atomics; fixed orders). Against the reference: parity's own limits.
Cost: the packed weights (about the file); per cached position 2 * num_key_value_heads * head_dim numbers per layer.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from apr_core.contract.types import ValidatedModel
from apr_core.engines.cuda import exact_products, fused_attend
from apr_core.engines.gpu_weights import CHUNK, SCRATCH, GpuWeights, planned
from apr_core.engines.streaming import available_bytes
from apr_core.errors import InferenceError, Unavailable
from apr_core.kernels.gpu import has_triton, interpreted
from apr_core.model.config import Qwen2Config
from apr_core.model.qwen2 import Rotary, note
from apr_core.model.tokens import Tokenizer
from apr_core.model.trace import Trace

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Work = Callable[[], None]

DIGITS = {"speed": 1, "exact": 3}
OLDEST = (8, 0)
"""Compute capability that the kernels need: bfloat16. From `DEPENDENT` on, kernels are launched dependently."""
DEPENDENT = (9, 0)
_SMALLEST = 256
_BESIDE = "use --precision reference, or --device cpu"


def require_device(device: str) -> None:
    """
    Refuse a machine that cannot run the kernels, before anything is read or allocated.

    Raises:
        Unavailable: No Triton, no device, or one that is too old.
    """
    if not has_triton():
        raise Unavailable(
            "the fused kernels need triton, which is not installed",
            advice='pip install "apr_core[gpu]", or use --precision reference',
        )
    if device == "cpu":
        if not interpreted():
            raise Unavailable("on the CPU these kernels run in Triton's interpreter only", advice="use engines.cpu")
        return
    if not torch.cuda.is_available():
        raise Unavailable("no CUDA device here", advice="use --device cpu")
    found = torch.cuda.get_device_capability()
    if found < OLDEST:
        raise Unavailable(
            f"expected compute capability {OLDEST[0]}.{OLDEST[1]} or newer, found {found[0]}.{found[1]}", advice=_BESIDE
        )


def captured(work: Work) -> Work:
    """
    Run ``work`` once beside the current stream (kernels compile), record it, and return what replays it.

    Once: a step moves the state on, and from the last place of a cache a second one would write behind it.
    """
    now: Any = torch.cuda.current_stream()
    beside: Any = torch.cuda.Stream()
    beside.wait_stream(now)
    with torch.cuda.stream(beside):
        work()
    now.wait_stream(beside)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay: Work = graph.replay
    return replay


class Slot:
    """
    Memory of one cache: keys (rotated) and values [layers, kv heads, capacity, head_dim], and the graph bound to it.

    Attributes:
        made: Tokens that the device chose, by place.
        replay: Computes the next step; None until the first one.
    """

    def __init__(self, config: Qwen2Config, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_hidden_layers, config.num_key_value_heads, capacity, config.head_dim)
        self.capacity = capacity
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.made = torch.zeros(capacity, dtype=torch.int32, device=device)
        self.replay: Work | None = None


class Pool:
    """Slots that no cache holds, by capacity: the next cache of that size inherits memory and graph."""

    def __init__(self, make: Callable[[int], Slot]) -> None:
        self._make = make
        self._free: dict[int, list[Slot]] = defaultdict(list)

    def take(self, positions: int) -> Slot:
        """Return a slot with room for so many positions."""
        capacity = max(_SMALLEST, 1 << (positions - 1).bit_length())
        return self._free[capacity].pop() if self._free[capacity] else self._make(capacity)

    def give(self, slots: list[Slot]) -> None:
        """Take slots back."""
        for slot in slots:
            self._free[slot.capacity].append(slot)
        slots.clear()


class GpuCache:
    """
    A place in a pool's memory.

    Attributes:
        start: Position of the first token that it holds.
        length: Positions counted, ``start`` included.
    """

    def __init__(self, pool: Pool, start: int) -> None:
        self.start = self.length = start
        self._pool = pool
        self._slots = [pool.take(1)]
        weakref.finalize(self, pool.give, self._slots)

    @property
    def held(self) -> int:
        """Positions held."""
        return self.length - self.start

    @property
    def slot(self) -> Slot:
        """The memory."""
        return self._slots[0]

    def reserve(self, positions: int) -> Slot:
        """Make room for so many positions in all, and return where they are."""
        old = self.slot
        if positions > old.capacity:
            new = self._pool.take(positions)
            new.keys[:, :, : self.held] = old.keys[:, :, : self.held]
            new.values[:, :, : self.held] = old.values[:, :, : self.held]
            self._slots[0] = new
            self._pool.give([old])
        return self.slot


class GpuQwen2:
    """
    A whole model that has passed the contract, on a device. Implements `TracedForward`.

    Args:
        validated: The admitted weights and their configuration.
        precision: ``speed`` or ``exact``.
        tokenizer: The model's own, when it has one.
        device: ``cuda``; ``cpu`` computes in Triton's interpreter, for tests.
        budget_bytes: Memory to plan with; None for what is free. What does not fit is streamed.
        capture: Turns a step into what replays it; None for a CUDA graph, where there is a device.

    Raises:
        Unavailable: No Triton, no device, or one that is too old.
        LoadError: A type or shape without a kernel, too little memory, or arithmetic that is not written here.
    """

    def __init__(
        self,
        validated: ValidatedModel,
        precision: str,
        tokenizer: Tokenizer | None = None,
        *,
        device: str = "cuda",
        budget_bytes: int | None = None,
        capture: Callable[[Work], Work] | None = None,
    ) -> None:
        require_device(device)
        from apr_core.kernels.gpu import launch

        self.config = config = Qwen2Config.of(validated)
        planned(validated)
        self.tokenizer, self.bypassed, self.precision = tokenizer, validated.bypassed, precision
        self._launch, self._lock = launch, threading.Lock()
        self.torch_device = torch.device(device)
        cuda = self.torch_device.type == "cuda"
        exact = precision == "exact"
        self._cached, self._dense = (torch.float32,) * 2 if exact else (torch.float16, torch.bfloat16)
        budget = available_bytes(device) if budget_bytes is None else budget_bytes
        self.weights = GpuWeights(validated, self.torch_device, budget, self._cached.itemsize)
        self.plan = self.weights.plan
        # not where layers come and go: a kernel that begins early would read a buffer that is still being filled
        early = cuda and not self.weights.streamed and torch.cuda.get_device_capability() >= DEPENDENT
        self._mode = launch.Mode(DIGITS[precision], early)
        self._capture = capture or (captured if cuda else lambda work: work)
        self._pool = Pool(lambda capacity: Slot(config, capacity, self._cached, self.torch_device))
        self._buffers = self._make_buffers()
        self._pieces: dict[int, Any] = {}
        turn = Rotary(config, 0, config.max_position_embeddings, self.torch_device)
        self._rope = turn.cos.contiguous(), turn.sin.contiguous()

    @property
    def device(self) -> str:
        """Where the arithmetic runs, e.g. ``cuda``."""
        return str(self.torch_device)

    @property
    def backend(self) -> str:
        """Name, precision, and how many layers are streamed, e.g. ``gpu exact``."""
        away = self.config.num_hidden_layers - self.weights.resident
        return f"gpu {self.precision}" + (f", {away} layers streamed" if away else "")

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one decode step reads."""
        return self.weights.nbytes

    def new_cache(self, start: int = 0) -> GpuCache:
        """Return an empty cache whose first token stands at position ``start``."""
        return GpuCache(self._pool, start)

    def forward(self, ids: Ints, cache: GpuCache | None = None, trace: Trace | None = None) -> Floats:
        """
        Return the logits, float32 [tokens, vocab_size], of ``ids`` int64 [tokens]; as `TracedForward.forward`.

        Raises:
            InferenceError: An id outside the vocabulary, nothing to compute, or more positions than the model has.
        """
        return self._forward(ids, cache, trace, last=False)

    def forward_last(self, ids: Ints, cache: GpuCache | None = None) -> Floats:
        """
        Return the logits of the last token alone, float32 [vocab_size].

        Raises:
            InferenceError: As `forward`.
        """
        logits: Floats = self._forward(ids, cache, None, last=True)[-1]
        return logits

    def greedy(self, cache: GpuCache, token: int, count: int) -> list[int]:
        """
        Append ``token`` and the ``count - 1`` most likely tokens behind it; return the ``count`` tokens chosen.

        The steps follow each other on the device, which the host asks once, at the end.

        Raises:
            InferenceError: As `forward`, or no logit of a step is a number.
        """
        ids = self.config.check_input(np.full(count, token), cache.length)
        with self._lock, torch.inference_mode():
            slot = cache.reserve(cache.held + count)
            replay = self._step(slot)
            self._set_state(int(ids[0]), cache.length, cache.held)
            for _ in range(count):
                replay()
            made: list[int] = slot.made[cache.held : cache.held + count].tolist()
            if min(made) < 0:
                raise InferenceError(f"no logit is a number at step {made.index(-1)}", advice="trace the prompt")
            cache.length += count
        return made

    def _forward(self, ids: Ints, cache: GpuCache | None, trace: Trace | None, *, last: bool) -> Floats:
        cache = self.new_cache() if cache is None else cache
        ids = self.config.check_input(ids, cache.length)
        with self._lock, torch.inference_mode():
            slot = cache.reserve(cache.held + ids.size)
            if ids.size == 1:
                # Before the state is set: a capture runs steps, at the last place of the cache, which is not read yet.
                replay = self._step(slot) if trace is None else lambda: self._decode(slot, trace, cache.held)
                self._set_state(int(ids[0]), cache.length, cache.held)
                replay()
                # a copy on the CPU too: the next step writes there
                logits = self._buffers["logits"][None, : self.config.vocab_size].cpu().numpy().copy()
            else:
                logits = self._prompt(ids, cache, slot, trace, last=last)
            cache.length += ids.size
        return logits

    # --- one token ---

    def _step(self, slot: Slot) -> Work:
        """Return what computes the next step on a slot: a graph, unless layers come and go."""
        if slot.replay is None:
            work: Work = lambda: self._decode(slot)  # noqa: E731
            self._set_state(0, 0, slot.capacity - 1)
            slot.replay = work if self.weights.streamed else self._capture(work)
        return slot.replay

    def _set_state(self, token: int, position: int, held: int) -> None:
        self._buffers["state"].copy_(torch.tensor([token, position, held], dtype=torch.int32))

    def _decode(self, slot: Slot, trace: Trace | None = None, held: int = 0) -> None:
        """Run the phases of one step; the place in the cache is the device's own, ``held`` serves the trace."""
        launch, mode, b, w = self._launch, self._mode, self._buffers, self.weights
        norm = launch.Norm(b["squares"], self.config.rms_norm_eps)
        if slot.capacity not in self._pieces:
            self._pieces[slot.capacity] = launch.Pieces.of(*self._heads, slot.capacity, self._dim, self.torch_device)
        pieces, state, x = self._pieces[slot.capacity], b["state"], b["x"]
        first = w.vectors[0]["input_layernorm.weight"]
        launch.embed(mode, w.embedding, state, b["h"], norm, first, x)
        gains = [v["input_layernorm.weight"] for v in w.vectors[1:]] + [w.gain]
        for number, (layer, vectors, gain) in enumerate(zip(w, w.vectors, gains, strict=True)):
            keys, values = slot.keys[number], slot.values[number]
            three = ("q_proj", "k_proj", "v_proj")
            matrices, biases = tuple(layer[n] for n in three), tuple(vectors[n] for n in three)
            launch.qkv(mode, matrices, biases, x, norm, self._rope, state, b["q"], keys, values)
            launch.attention(mode, b["q"], keys, values, b["mixed"], pieces, b["counters"], state)
            middle = vectors["post_attention_layernorm.weight"]
            rest = (b["partial"], b["counters"])
            launch.residual(mode, layer["o_proj"], b["mixed"], b["y"], b["h"], norm, middle, x, *rest)
            self._note(trace, f"layers.{number}.q", b["q"])
            self._note(trace, f"layers.{number}.k", keys[:, held])
            self._note(trace, f"layers.{number}.v", values[:, held])
            self._note(trace, f"layers.{number}.attn_output", b["y"])
            self._note(trace, f"layers.{number}.resid_attn", b["h"])
            launch.gate_up(mode, layer["gate_proj"], layer["up_proj"], x, norm, b["inner"])
            launch.residual(mode, layer["down_proj"], b["inner"], b["y"], b["h"], norm, gain, x, *rest)
            self._note(trace, f"layers.{number}.resid_ffn", b["h"])
        launch.head(mode, w.head, x, norm, b["logits"], b["tops"], b["places"])
        if trace is not None:
            inverse = torch.rsqrt(b["squares"].sum() / self.config.hidden_size + norm.eps)
            self._note(trace, "final_hidden", x[: self.config.hidden_size] * inverse)
            self._note(trace, "logits", b["logits"][: self.config.vocab_size])
        launch.pick(mode, w.head.rows, b["tops"], b["places"], state, slot.made)

    @staticmethod
    def _note(trace: Trace | None, name: str, values: Tensor) -> None:
        if trace is not None:
            trace.record(name, values.float().reshape(1, -1).cpu().numpy())

    @property
    def _heads(self) -> tuple[int, int]:
        return self.config.num_attention_heads, self.config.num_key_value_heads

    @property
    def _dim(self) -> int:
        return self.config.head_dim

    def _make_buffers(self) -> Mapping[str, Tensor]:
        config, launch, device = self.config, self._launch, self.torch_device
        h, blocks = config.hidden_size, launch.padded(config.vocab_size) // launch.BLOCK

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        def ints(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        def activation(columns: int) -> Tensor:
            return launch.activation(columns, self._mode.digits, device)

        return {
            "state": ints(3), "h": floats(h), "squares": floats(h // launch.BLOCK), "y": floats(h),
            "q": floats(self._heads[0], self._dim), "partial": floats(launch.MOST_SHARES, h),
            "counters": ints(max(h // launch.BLOCK, self._heads[1])), "x": activation(h),
            "mixed": activation(self._heads[0] * self._dim), "inner": activation(config.intermediate_size),
            "logits": floats(blocks * launch.BLOCK), "tops": floats(blocks), "places": ints(blocks),
        }  # fmt: skip

    # --- several tokens ---

    def _prompt(self, ids: Ints, cache: GpuCache, slot: Slot, trace: Trace | None, *, last: bool) -> Floats:
        """Compute a prompt in pieces; a trace needs it whole."""
        chunk = ids.size if trace is not None else CHUNK
        logits: list[Floats] = []
        with exact_products() if self.precision == "exact" else nullcontext():
            for first in range(0, ids.size, chunk):
                part = ids[first : first + chunk]
                x = self._layers(part, cache.start, cache.held + first, slot, trace)
                if last and first + part.size < ids.size:
                    continue
                x = self._rms(x[-1:] if last else x, self.weights.gain)
                found = self._linear(note(trace, "final_hidden", x), self.weights.head)
                logits.append(note(trace, "logits", found).cpu().numpy())
        return np.concatenate(logits)

    def _layers(self, ids: Ints, start: int, held: int, slot: Slot, trace: Trace | None) -> Tensor:
        x = self._launch.decode(self.weights.embedding, torch.float32, ids=torch.tensor(ids, device=self.torch_device))
        at = slice(start + held, start + held + ids.size)
        cos, sin = (table[at] for table in self._rope)
        for number, (layer, vectors) in enumerate(zip(self.weights, self.weights.vectors, strict=True)):
            normed = self._rms(x, vectors["input_layernorm.weight"])
            q, k, v = (
                (self._linear(normed, layer[n]) + vectors[n]).reshape(ids.size, -1, self._dim).transpose(0, 1)
                for n in ("q_proj", "k_proj", "v_proj")
            )
            q, k = self._turn(q, cos, sin), self._turn(k, cos, sin)
            for name, heads in (("q", q), ("k", k), ("v", v)):
                note(trace, f"layers.{number}.{name}", heads.transpose(0, 1))
            keys, values = slot.keys[number], slot.values[number]
            keys[:, held : held + ids.size], values[:, held : held + ids.size] = k, v
            mixed = self._attend(q, keys[:, : held + ids.size], values[:, : held + ids.size])
            y = note(
                trace, f"layers.{number}.attn_output", self._linear(mixed.transpose(0, 1).flatten(1), layer["o_proj"])
            )
            x = note(trace, f"layers.{number}.resid_attn", x + y)
            normed = self._rms(x, vectors["post_attention_layernorm.weight"])
            inner = functional.silu(self._linear(normed, layer["gate_proj"])) * self._linear(normed, layer["up_proj"])
            x = note(trace, f"layers.{number}.resid_ffn", x + self._linear(inner, layer["down_proj"]))
        return x

    def _rms(self, x: Tensor, gain: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps) * gain

    @staticmethod
    def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def _linear(self, x: Tensor, w: Any) -> Tensor:
        """Return ``x @ w.T`` in float32, of weights decoded to the dense type, some rows at a time."""
        step = max(1, SCRATCH // w.columns)
        x = x.to(self._dense)
        parts = [
            functional.linear(x, self._launch.decode(w, self._dense, first, min(step, w.rows - first)))
            for first in range(0, w.rows, step)
        ]
        return torch.cat(parts, dim=-1).float()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix the values; without a past, in ``speed``, through the kernel that needs no mask."""
        q, k, v = (x.to(self._dense) for x in (q, k, v))
        if self.precision == "speed" and q.shape[1] == k.shape[1]:
            group = q.shape[0] // k.shape[0]
            k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
            mixed = functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
            return (mixed + q * 0).float()  # a fused kernel may lose the NaN of a query
        return fused_attend(q, k, v).float()

"""
Qwen2 on the CPU, compiled: the stored types multiplied as they are, and one call per thread for a whole forward.

Two precisions, two objects of one class: ``speed`` rounds activations to 8 bits before each product, as llama.cpp does;
``exact`` keeps 24 bits, as many as float32 has. Everything else (residual, norms, RoPE, softmax, the cache) is float32
in both. F16 and F32 weights meet float32 activations in either; in ``speed`` BF16 meets them rounded to bfloat16 where
several tokens are multiplied at once.

Exactness: ``exact`` follows the reference to about 1e-6 in rel_l2; ``speed`` to about 1e-2 (parity holds both to their
    own limits). Results do not depend on the number of threads, nor on how a prompt of several tokens is cut.
Cost: the panels (about the file), 8 * num_key_value_heads * head_dim bytes per layer and position of the cache.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from apr_core.contract.types import ValidatedModel
from apr_core.engines.cpu_weights import CpuWeights, padded
from apr_core.engines.team import Team
from apr_core.kernels.cpu import step
from apr_core.kernels.cpu.activations import TILE, tile_block_bytes
from apr_core.kernels.cpu.features import announce, choose_path
from apr_core.kernels.cpu.jit import cache_folder
from apr_core.kernels.cpu.linkage import link
from apr_core.kernels.cpu.matmul import SCRATCH
from apr_core.kernels.cpu.vec import Mode
from apr_core.model.config import Qwen2Config
from apr_core.model.tokens import Tokenizer
from apr_core.model.trace import Trace

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

DIGITS = {"speed": 1, "exact": 3}
CHUNK = 512
"""Tokens whose activations are held at a time."""
_FIRST_CAPACITY = 256
# Name in a trace, buffer, and what its width in values is.
_RECORDED = (
    ("q", step.QUERY, "queries"),
    ("k", step.KEY, "keys"),
    ("v", step.VALUE, "keys"),
    ("attn_output", step.ATTENTION, "hidden"),
    ("resid_attn", step.MIDDLE, "hidden"),
    ("resid_ffn", step.RESIDUAL, "hidden"),
)


class CpuCache:
    """
    Rotated keys in panels of 16 positions, and values in rows; float32, grown by doubling.

    Attributes:
        start: Position of the first token that it holds.
        length: Positions counted, ``start`` included; the next token gets this one.
        addresses: Of keys and values.
    """

    def __init__(self, config: Qwen2Config, start: int = 0) -> None:
        self.start = self.length = start
        self._shape = (config.num_hidden_layers, config.num_key_value_heads)
        self._head_dim, self._row = config.head_dim, padded(config.head_dim, 16)
        self.capacity = 0
        self.addresses = (0, 0)
        self.keys = np.empty((*self._shape, 0, self._head_dim, 16), np.float32)
        self.values = np.empty((*self._shape, 0, self._row), np.float32)
        self._reserve(_FIRST_CAPACITY)

    @property
    def held(self) -> int:
        """Positions held."""
        return self.length - self.start

    def reserve(self, positions: int) -> None:
        """Make room for so many positions in all."""
        if positions > self.capacity:
            self._reserve(max(padded(positions, 16), 2 * self.capacity))

    def _reserve(self, capacity: int) -> None:
        keys = np.empty((*self._shape, capacity // 16, self._head_dim, 16), np.float32)
        values = np.empty((*self._shape, capacity, self._row), np.float32)
        keys[:, :, : self.capacity // 16] = self.keys
        values[:, :, : self.capacity] = self.values
        # the lanes behind head_dim are multiplied and thrown away: they must not be slow (subnormal) or alarming
        values[..., self._head_dim :] = 0
        self.keys, self.values, self.capacity = keys, values, capacity
        self.addresses = (keys.ctypes.data, values.ctypes.data)


class CpuQwen2:
    """
    A whole model that has passed the contract, on the CPU. Implements `TracedForward`.

    Args:
        validated: The admitted weights and their configuration.
        precision: ``speed`` or ``exact``.
        tokenizer: The model's own, when it has one.
        path: ``avx512vnni`` or ``portable``; None for the fastest that runs here.
        threads: None for all cores of this process.

    Raises:
        LoadError: The configuration asks for arithmetic that is not written here, or memory does not hold the model.
        UsageError: More threads than cores, or no such path.
        Unavailable: The path does not run here, or numba is missing.
    """

    device = "cpu"

    def __init__(
        self,
        validated: ValidatedModel,
        precision: str,
        tokenizer: Tokenizer | None = None,
        *,
        path: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.config = Qwen2Config.of(validated)
        self.tokenizer = tokenizer
        self.bypassed = validated.bypassed
        self.precision, self.path = precision, choose_path(path)
        self._team = Team(threads)
        self._mode = Mode(self.path, DIGITS[precision])
        if not cache_folder().is_dir():
            announce("compiling the CPU kernels: once per machine and version, about a minute")
        self.weights = CpuWeights(validated, self._team.size)
        self._lock = threading.Lock()
        self._rows = 0
        self._widths = self._measure()
        self._sizes = self._size_table()
        self._vocabulary = 16 * int(self.weights.head[step.PANELS])
        self._barrier = np.zeros(step.BARRIER_WORDS, np.int64)
        self._words = self._barrier.ctypes.data
        self.spins = step.SPINS
        self._rope = _rotation(self.config, _FIRST_CAPACITY)
        self._rope_at = self._rope.ctypes.data
        self._make_room(1)
        link(self._mode)
        self._entry = step.compiled(self._mode)

    @property
    def backend(self) -> str:
        """Name, precision and instruction path, e.g. ``cpu speed (avx512vnni)``."""
        return f"cpu {self.precision} ({self.path})"

    @property
    def threads(self) -> int:
        """Threads that share each forward."""
        return self._team.size

    def use_threads(self, threads: int) -> None:
        """
        Share each further forward among so many threads.

        Raises:
            UsageError: Fewer than one, or more than this process has cores.
        """
        team = Team(threads)
        with self._lock:
            self._team, self._rows = team, 0
            self._make_room(1)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one decode step reads."""
        return self.weights.nbytes

    def seconds_by_phase(self) -> dict[str, float]:
        """Return the seconds that thread 0 has spent in each phase since the last call."""
        with self._lock:
            spent = dict(zip(step.PHASES, (self._clocks[0, 1:] * 1e-9).tolist(), strict=True))
            self._clocks[:] = 0
        return spent

    def new_cache(self, start: int = 0) -> CpuCache:
        """Return an empty cache whose first token stands at position ``start``."""
        return CpuCache(self.config, start)

    def forward(self, ids: Ints, cache: CpuCache | None = None, trace: Trace | None = None) -> Floats:
        """
        Return the logits, float32 [tokens, vocab_size], of ``ids`` int64 [tokens]; as `TracedForward.forward`.

        Raises:
            InferenceError: An id outside the vocabulary, nothing to compute, or more positions than the model has.
        """
        return self._forward(ids, cache, trace, wanted=None)

    def forward_last(self, ids: Ints, cache: CpuCache | None = None) -> Floats:
        """
        Return the logits of the last token alone, float32 [vocab_size]: what a prompt is read for.

        Raises:
            InferenceError: As `forward`.
        """
        last: Floats = self._forward(ids, cache, None, wanted=1)[0]
        return last

    def _forward(self, ids: Ints, cache: CpuCache | None, trace: Trace | None, *, wanted: int | None) -> Floats:
        cache = self.new_cache() if cache is None else cache
        ids = self.config.check_input(ids, cache.length)
        with self._lock:
            cache.reserve(cache.held + ids.size)
            single = ids.size == 1
            chunk = ids.size if trace is not None else CHUNK
            self._make_room(min(chunk, ids.size))
            logits: list[Floats] = []
            for first in range(0, ids.size, chunk):
                part = ids[first : first + chunk]
                last = first + part.size == ids.size
                rows = part.size if wanted is None else wanted if last else 0
                found = self._chunk(part, cache, cache.held + first, single, rows, single or wanted == 1, trace)
                if rows:
                    logits.append(found)
            cache.length += ids.size
        return logits[0] if len(logits) == 1 else np.concatenate(logits)

    def _chunk(
        self, ids: Ints, cache: CpuCache, held: int, single: bool, wanted: int, alone: bool, trace: Trace | None
    ) -> Floats:
        """Embed these tokens, run all layers on them and the head on the last ``wanted``, and return their logits."""
        tokens, count, shared = ids.size, self.config.num_hidden_layers, self._shared
        self._buffers[step.RESIDUAL][:tokens, : self.config.hidden_size] = self.weights.embed(ids)
        shared[step.ROPE] = self._rotation_at(cache.start + held, tokens)
        shared[step.KEYS], shared[step.VALUES] = cache.addresses
        self._sizes[step.CAPACITY] = cache.capacity
        out = np.empty((wanted if alone else padded(wanted, TILE), self._vocabulary), np.float32)
        rest = (tokens, single, held, wanted, alone)
        if trace is None:
            self._run_layers(0, count, out, *rest)
            return np.ascontiguousarray(out[:wanted, : self.config.vocab_size])
        for layer in range(count):
            self._run_layers(layer, layer + 1, out, tokens, single, held, 0, alone)
            for name, buffer, width in _RECORDED:
                trace.record(f"layers.{layer}.{name}", self._buffers[buffer][:tokens, : self._widths[width]])
        self._run_layers(count, count, out, *rest)
        logits = np.ascontiguousarray(out[:wanted, : self.config.vocab_size])
        trace.record("final_hidden", self._buffers[step.NORMED][:tokens, : self.config.hidden_size])
        trace.record("logits", logits)
        return logits

    def _run_layers(
        self, first: int, stop: int, out: Floats, tokens: int, single: bool, held: int, wanted: int, alone: bool
    ) -> None:
        """Run `step.run` in every thread: these layers, and the head unless ``wanted`` is 0."""
        entry, mode, sizes, shared, own = self._entry, self._mode, self._sizes, self._shared, self._own
        weights, eps, threads = self.weights, self.config.rms_norm_eps, self._team.size

        def work(thread: int) -> None:
            entry(
                mode, weights.matrices, weights.vectors, weights.head, sizes, shared, own[thread], out, eps,
                first, stop, tokens, single, held, wanted, alone, self._words, self.spins, thread, threads,
            )  # fmt: skip

        self._team.run(work)

    def _rotation_at(self, position: int, tokens: int) -> int:
        """Return the address of the rotations from a position on; they are kept, and grow by doubling."""
        if position + tokens > len(self._rope):
            self._rope = _rotation(self.config, max(2 * len(self._rope), position + tokens))
            self._rope_at = self._rope.ctypes.data
        return self._rope_at + 4 * self.config.head_dim * position

    def _measure(self) -> dict[str, int]:
        config = self.config
        return {
            "hidden": config.hidden_size,
            "queries": config.num_attention_heads * config.head_dim,
            "keys": config.num_key_value_heads * config.head_dim,
            "inner": config.intermediate_size,
        }

    def _size_table(self) -> Ints:
        config, width = self.config, {name: padded(value) for name, value in self._widths.items()}
        return np.array(
            [
                config.hidden_size, width["hidden"], width["queries"], width["keys"], width["inner"],
                config.num_attention_heads, config.num_key_value_heads, config.head_dim,
                4 * padded(config.head_dim, 16), 0,
            ],
            np.int64,
        )  # fmt: skip

    def _make_room(self, tokens: int) -> None:
        """Make buffers for so many tokens, and scratch for each thread; both are kept and only ever grow."""
        if tokens <= self._rows:
            return
        self._rows = rows = padded(tokens, TILE)
        width = {name: padded(value) for name, value in self._widths.items()}
        names = {
            step.RESIDUAL: "hidden", step.NORMED: "hidden", step.QUERY: "queries", step.KEY: "keys",
            step.VALUE: "keys", step.MIXED: "queries", step.ATTENTION: "hidden", step.MIDDLE: "hidden",
            step.GATED: "inner", step.UPPER: "inner", step.INNER: "inner", step.SHRUNK: "hidden",
        }  # fmt: skip
        self._buffers = {at: np.zeros((rows, width[name]), np.float32) for at, name in names.items()}
        widest = max(width.values()) // 32
        digits = self._mode.digits
        tiles = np.zeros(rows // TILE * widest * tile_block_bytes(TILE, digits), np.uint8)
        rounded = np.zeros((rows, max(width.values())) if digits == 1 else 0, np.float32)
        self._shared = np.zeros(1 + step.ROPE, np.int64)
        for at, buffer in self._buffers.items():
            self._shared[at] = buffer.ctypes.data
        self._shared[step.TILES], self._shared[step.ROUNDED] = tiles.ctypes.data, rounded.ctypes.data
        positions = padded(self.config.max_position_embeddings, 16)
        self._clocks = np.zeros((self._team.size, 1 + len(step.PHASES)), np.int64)
        own: list[list[NDArray[np.generic]]] = [
            [
                # thread 0 leaves the last norm where a trace looks for it
                self._buffers[step.NORMED] if thread == 0 else np.zeros(width["hidden"], np.float32),
                np.zeros(widest * tile_block_bytes(1, digits), np.uint8),
                np.empty(widest * SCRATCH, np.uint8),
                np.empty(4 * positions + 16, np.float32),
                clock,
            ]
            for thread, clock in enumerate(self._clocks)
        ]
        self._own = [np.array([array.ctypes.data for array in row], np.int64) for row in own]
        self._alive: Sequence[object] = (tiles, rounded, own)


def _rotation(config: Qwen2Config, positions: int) -> Floats:
    """Cosines and sines of the first positions, float32 [positions, 2, head_dim / 2], from float64 angles."""
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    angles = np.arange(positions)[:, None] * config.rope_theta**-exponents
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

"""
Qwen2 on the CPU, compiled: the stored types multiplied as they are, and one call per thread for a whole forward.

Two precisions, two objects of one class: ``speed`` rounds activations to 8 bits before each product, as llama.cpp does;
``exact`` keeps 24 bits, as many as float32 has. Everything else (residual, norms, RoPE, softmax, the cache) is float32
in both. Float weights meet float32 activations in either.

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
    """

    def __init__(self, config: Qwen2Config, start: int = 0) -> None:
        self.start = self.length = start
        self._shape = (config.num_hidden_layers, config.num_key_value_heads)
        self._head_dim, self._row = config.head_dim, padded(config.head_dim, 16)
        self.capacity = 0
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
        self._barrier = np.zeros(step.BARRIER_WORDS, np.int64)
        self.spins = step.SPINS
        self._make_room(1)
        self._compile()

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
                self._layers(part, cache, cache.held + first, single, trace)
                last = first + part.size == ids.size
                if wanted is None:
                    logits.append(self._logits(0, part.size, single, trace))
                elif last:
                    logits.append(self._logits(part.size - wanted, wanted, wanted == 1, None))
            cache.length += ids.size
        return logits[0] if len(logits) == 1 else np.concatenate(logits)

    def _layers(self, ids: Ints, cache: CpuCache, held: int, single: bool, trace: Trace | None) -> None:
        """Embed these tokens and run all layers on them; with a trace layer by layer, by the same call."""
        x = self._buffers[step.RESIDUAL]
        x[: ids.size, : self.config.hidden_size] = self.weights.embed(ids)
        rope = _rotation(self.config, cache.start + held, ids.size)
        shared = self._shared
        shared[step.ROPE], shared[step.KEYS], shared[step.VALUES] = (
            array.ctypes.data for array in (rope, cache.keys, cache.values)
        )
        self._sizes[step.CAPACITY] = cache.capacity
        count = self.config.num_hidden_layers
        edges = [(0, count)] if trace is None else [(layer, layer + 1) for layer in range(count)]
        for first, stop in edges:
            self._run_layers(first, stop, ids.size, single, held)
            if trace is not None:
                for name, buffer, width in _RECORDED:
                    values = self._buffers[buffer][: ids.size, : self._widths[width]]
                    trace.record(f"layers.{first}.{name}", values)

    def _run_layers(self, first: int, stop: int, tokens: int, single: bool, held: int) -> None:
        weights, words = self.weights, self._barrier.ctypes.data

        def work(thread: int) -> None:
            step.run_layers(
                self._mode, weights.matrices, weights.vectors, self._sizes, self._shared, self._own[thread],
                self.config.rms_norm_eps, first, stop, tokens, single, held,
                words, self.spins, thread, self._team.size,
            )  # fmt: skip

        self._team.run(work)

    def _logits(self, skip: int, tokens: int, single: bool, trace: Trace | None) -> Floats:
        head = self.weights.head
        out = np.empty((1 if single else padded(tokens, TILE), 16 * int(head[step.PANELS])), np.float32)
        self._run_head(head, skip, tokens, single, out)
        logits = out[:tokens, : self.config.vocab_size]
        if trace is not None:
            trace.record("final_hidden", self._buffers[step.NORMED][:tokens, : self.config.hidden_size])
            trace.record("logits", logits)
        return np.ascontiguousarray(logits)

    def _run_head(self, head: Ints, skip: int, tokens: int, single: bool, out: Floats) -> None:
        words = self._barrier.ctypes.data

        def work(thread: int) -> None:
            step.run_head(
                self._mode, head, self.weights.gain, self._sizes, self._shared, self._own[thread],
                self.config.rms_norm_eps, skip, tokens, single, out.ctypes.data,
                words, self.spins, thread, self._team.size,
            )  # fmt: skip

        self._team.run(work)

    def _compile(self) -> None:
        """Compile, or load from the disk, by calls that have nothing to do."""
        link(self._mode)
        nothing = np.zeros(4, np.int64)
        self._run_layers(0, 0, 0, False, 0)
        self._run_head(nothing, 0, 0, False, np.empty((0, 0), np.float32))

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
        self._shared = np.zeros(16, np.int64)
        for at, buffer in self._buffers.items():
            self._shared[at] = buffer.ctypes.data
        self._shared[step.TILES] = tiles.ctypes.data
        positions = padded(self.config.max_position_embeddings, 16)
        self._clocks = np.zeros((self._team.size, 1 + len(step.PHASES)), np.int64)
        own: list[list[NDArray[np.generic]]] = [
            [
                # thread 0 leaves the last norm where a trace looks for it
                self._buffers[step.NORMED] if thread == 0 else np.zeros(width["hidden"], np.float32),
                np.zeros(widest * tile_block_bytes(1, digits), np.uint8),
                np.empty(widest * SCRATCH, np.uint8),
                np.empty(positions, np.float32),
                clock,
            ]
            for thread, clock in enumerate(self._clocks)
        ]
        self._own = np.array([[array.ctypes.data for array in row] for row in own], np.int64)
        self._alive: Sequence[object] = (tiles, own)


def _rotation(config: Qwen2Config, start: int, tokens: int) -> Floats:
    """Cosines and sines of positions ``start`` on, float32 [tokens, 2, head_dim / 2], from float64 angles."""
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    angles = np.arange(start, start + tokens)[:, None] * config.rope_theta**-exponents
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

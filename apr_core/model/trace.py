"""
What a forward pass leaves behind, and the protocol that every backend implements.

A trace is the same forward with a recorder attached, never a second implementation: a second one would be what gets
compared. Names are fixed here, so that two backends cannot disagree about what is meant by ``k``.

    layers.{i}.q             after bias and RoPE        [tokens, num_attention_heads * head_dim]
    layers.{i}.k             after bias and RoPE        [tokens, num_key_value_heads * head_dim]
    layers.{i}.v             after bias, as cached      [tokens, num_key_value_heads * head_dim]
    layers.{i}.attn_output   after o_proj               [tokens, hidden_size]
    layers.{i}.resid_attn    residual after attention   [tokens, hidden_size]
    layers.{i}.resid_ffn     residual after the MLP     [tokens, hidden_size]
    final_hidden             after the last RMSNorm     [tokens, hidden_size]
    logits                                              [tokens, vocab_size]

Those are mandatory. A backend may record more under other names; they are compared where both sides have them.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from apr_core.model.config import Qwen2Config

if TYPE_CHECKING:
    from apr_core.model.tokens import Tokenizer

MANDATORY = ("q", "k", "v", "attn_output", "resid_attn", "resid_ffn", "final_hidden", "logits")
"""Every backend records all of these: the first six once per layer, the last two once."""


def mandatory_names(num_hidden_layers: int) -> tuple[str, ...]:
    """Return the full names that a trace of so many layers must hold, in forward order."""
    layers = [f"layers.{layer}.{name}" for layer in range(num_hidden_layers) for name in MANDATORY[:6]]
    return (*layers, *MANDATORY[6:])


class Trace(Mapping[str, NDArray[np.float32]]):
    """
    Named activations of one forward in the order in which they arose; float32 [tokens, dim], read-only, owned.

    Args:
        positions: Keep the rows of these positions only; None keeps all.
        start: The position of the forward's first token, to which ``positions`` relate.
    """

    def __init__(self, positions: Sequence[int] | None = None, start: int = 0) -> None:
        self._arrays: dict[str, NDArray[np.float32]] = {}
        self._positions, self._start = positions, start

    def record(self, name: str, values: NDArray[np.floating[Any]]) -> NDArray[np.float32] | None:
        """
        Copy ``values`` into the trace.

        Returns:
            None: the forward goes on with its own values. Only the tap of ``engines.wrap``, through which faults are
            planted, returns others in their place.

        Raises:
            ValueError: The name is taken (a trace holds one forward; a second one would overwrite the evidence of the
                first), or the array does not have the shape [tokens, dim].
        """
        if name in self._arrays:
            raise ValueError(f"the trace holds {name} already; use one Trace per forward")
        if values.ndim != 2:
            raise ValueError(f"expected [tokens, dim] for {name}, found shape {values.shape}")
        if self._positions is not None:
            rows = [at - self._start for at in self._positions if 0 <= at - self._start < len(values)]
            values = values[rows]
        self._keep(name, np.array(values, dtype=np.float32, order="C"))
        return None

    def _keep(self, name: str, array: NDArray[np.float32]) -> None:
        array.flags.writeable = False
        self._arrays[name] = array

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Put traces of consecutive forwards (a prefill and cached steps) behind each other; names of all parts."""
        whole = cls()
        for name in dict.fromkeys(name for part in parts for name in part):
            whole._keep(name, np.concatenate([part[name] for part in parts if name in part]))
        return whole

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


SKETCH = 32
"""Numbers that a fingerprint keeps of a row: enough to tell a distance from a limit, whatever the row's width."""


@dataclass(frozen=True)
class Fingerprint:
    """
    What is kept of one row of an activation.

    Attributes:
        rms: Root mean square of the finite values.
        mean: Of the finite values.
        max_abs: Largest absolute finite value.
        nonfinite: Values that are NaN or infinite.
        digest: First 16 hex digits of the sha256 of the row's float32 bytes: equal digests are equal bits.
    """

    rms: float
    mean: float
    max_abs: float
    nonfinite: int
    digest: str


class Fingerprints(Trace):
    """
    A trace that keeps a compact fingerprint of each row instead of the row; what tracing does unless asked for more.

    As a mapping it gives a sketch, float32 [tokens, ``SKETCH``]: random signs, the same for every trace of that width.
    Sketches are linear and keep lengths on average, so `rel_l2` between two sketches estimates that between the rows
    (within a quarter, measured), is zero where the rows are equal and NaN where a value is.
    """

    def __init__(self, positions: Sequence[int] | None = None, start: int = 0) -> None:
        super().__init__(positions, start)
        self.rows: dict[str, tuple[Fingerprint, ...]] = {}

    def _keep(self, name: str, array: NDArray[np.float32]) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            sketch = (array.astype(np.float64) @ _signs(array.shape[1])).astype(np.float32)
        super()._keep(name, sketch)
        self.rows[name] = tuple(_fingerprint(row) for row in array)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Put traces of consecutive forwards behind each other."""
        whole = cls()
        for name in dict.fromkeys(name for part in parts for name in part):
            holders = [part for part in parts if name in part]
            Trace._keep(whole, name, np.concatenate([part[name] for part in holders]))
            whole.rows[name] = tuple(row for part in holders for row in part.rows[name])
        return whole


def _fingerprint(row: NDArray[np.float32]) -> Fingerprint:
    finite = row[np.isfinite(row)].astype(np.float64)
    digest = hashlib.sha256(row.tobytes()).hexdigest()[:16]
    if not finite.size:
        return Fingerprint(0.0, 0.0, 0.0, row.size, digest)
    rms, largest = float(np.sqrt(np.mean(finite**2))), float(np.abs(finite).max())
    return Fingerprint(rms, float(finite.mean()), largest, row.size - finite.size, digest)


@lru_cache(maxsize=16)
def _signs(width: int) -> NDArray[np.float64]:
    """Draw the projection [width, SKETCH] of a row so wide, from hash bytes: every machine draws the same."""
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(b"apr sketch").digest(width * SKETCH // 8), np.uint8))
    signs: NDArray[np.float64] = (1.0 - 2.0 * bits).reshape(width, SKETCH) / np.sqrt(SKETCH)
    return signs


class Cache(Protocol):
    """What a backend keeps of the positions it has seen; made by ``new_cache`` and opaque to everyone else."""

    @property
    def length(self) -> int:
        """Positions held; the next token gets this position."""
        ...


class TracedForward(Protocol):
    """A Qwen2 that runs. Whoever calls it does not know which backend it holds."""

    @property
    def config(self) -> Qwen2Config:
        """The architecture."""
        ...

    @property
    def backend(self) -> str:
        """Name of the implementation, e.g. ``torch`` or ``plain``."""
        ...

    @property
    def device(self) -> str:
        """Where the arithmetic really runs, e.g. ``cpu``."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's own tokenizer, or None when it came without one."""
        ...

    def new_cache(self, start: int = 0) -> Cache:
        """
        Return an empty cache for this model, whose first token stands at position ``start``.

        Nothing stands before it: an offset reaches far positions (4000, 30000) without computing what lies between.
        """
        ...

    def forward(self, ids: NDArray[np.int64], cache: Any = None, trace: Trace | None = None) -> NDArray[np.float32]:
        """
        Return the logits, float32 [tokens, vocab_size], of ``ids`` int64 [tokens].

        Positions continue from ``cache`` (made by this model's ``new_cache``), which then holds these tokens too;
        without one they start at 0. With a trace every mandatory name is recorded and the logits keep their bits.

        Raises:
            InferenceError: An id outside the vocabulary, nothing to compute, or more positions than the model has.
        """
        ...


def last_logits(model: TracedForward, ids: NDArray[np.int64], cache: Any = None) -> NDArray[np.float32]:
    """
    Return the logits of the last of ``ids`` alone, float32 [vocab_size]: what a prompt is read for.

    A backend that has a ``forward_last`` spares the head of all other tokens, a quarter of a small model's prompt.

    Raises:
        InferenceError: As `TracedForward.forward`.
    """
    short = getattr(model, "forward_last", None)
    last: NDArray[np.float32] = short(ids, cache) if short is not None else model.forward(ids, cache)[-1]
    return last


_MEMBERS = ("config", "backend", "device", "tokenizer", "new_cache", "forward")
_ARGUMENTS = {"new_cache": ("start",), "forward": ("ids", "cache", "trace")}


def lacking(kind: type) -> tuple[str, ...]:
    """Name what a class lacks to be a `TracedForward`; what ``__init__`` sets is looked for in instances."""
    missing = [name for name in ("new_cache", "forward") if not callable(getattr(kind, name, None))]
    for name, wanted in _ARGUMENTS.items():
        if name not in missing:
            there = inspect.signature(getattr(kind, name)).parameters
            missing += [f"{name}({argument})" for argument in wanted if argument not in there]
    return tuple(missing)


def require_traced(model: object) -> TracedForward:
    """
    Return ``model`` as what it must be: a backend that cannot be traced cannot be judged.

    Raises:
        TypeError: It lacks a part of the protocol; each is named.
    """
    missing = [*lacking(type(model)), *(name for name in _MEMBERS[:4] if not hasattr(model, name))]
    if missing:
        raise TypeError(f"{type(model).__name__} is no TracedForward: it lacks {', '.join(missing)}")
    traced: TracedForward = model  # type: ignore[assignment]
    return traced

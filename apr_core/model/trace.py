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
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

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
    """Named activations of one forward in the order in which they arose; float32 [tokens, dim], read-only, owned."""

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[np.float32]] = {}

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
        array = np.array(values, dtype=np.float32, order="C")
        array.flags.writeable = False
        self._arrays[name] = array
        return None

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


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

    def new_cache(self) -> Cache:
        """Return an empty cache for this model."""
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

"""The one seam through which faults of a backend are planted: a model whose activations pass through a hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from apr_core.model.config import Qwen2Config
from apr_core.model.tokens import Tokenizer
from apr_core.model.trace import Cache, Trace, TracedForward


class At(NamedTuple):
    """Where a hook is called: position of the first token, whether a cache is used, whether a trace was asked for."""

    start: int
    cached: bool
    traced: bool


# (name, values float32 [tokens, dim], at) -> what goes on instead, or None for the values themselves. Names are those
# of a trace, in order of computation; "ids" comes first, as float32 [tokens, 1].
Hook = Callable[[str, NDArray[np.float32], At], NDArray[np.float32] | None]


class _Tap(Trace):
    """A trace that hands each activation to a hook, records what comes back, and gives it to the forward."""

    def __init__(self, trace: Trace | None, hook: Hook, at: At) -> None:
        super().__init__()
        self._asked, self._hook, self._at = trace, hook, at

    def record(self, name: str, values: NDArray[np.floating[Any]]) -> NDArray[np.float32] | None:
        """Pass ``values`` through the hook."""
        planted = self._hook(name, np.array(values, dtype=np.float32), self._at)
        if self._asked is not None:
            again = self._asked.record(name, values if planted is None else planted)
            planted = planted if again is None else again  # a hook around this one has the last word
        return None if planted is None else np.asarray(planted, dtype=np.float32)


class Wrapped:
    """A `TracedForward` with a hook in it; everything but its activations is the wrapped model's."""

    def __init__(self, model: TracedForward, hook: Hook) -> None:
        self._model, self._hook = model, hook

    @property
    def config(self) -> Qwen2Config:
        """The architecture."""
        return self._model.config

    @property
    def backend(self) -> str:
        """Name of the wrapped implementation, marked."""
        return f"{self._model.backend} with a hook"

    @property
    def device(self) -> str:
        """Where the arithmetic runs."""
        return self._model.device

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's own tokenizer."""
        return self._model.tokenizer

    def new_cache(self, start: int = 0) -> Cache:
        """Return an empty cache of the wrapped model."""
        return self._model.new_cache(start)

    def forward(self, ids: NDArray[np.int64], cache: Any = None, trace: Trace | None = None) -> NDArray[np.float32]:
        """Return the logits of a forward whose activations went through the hook; as `TracedForward.forward`."""
        at = At(0 if cache is None else cache.length, cache is not None, trace is not None)
        planted = self._hook("ids", np.asarray(ids, dtype=np.float32)[:, None], at)
        if planted is not None:
            ids = planted[:, 0].astype(np.int64)
        return self._model.forward(ids, cache, _Tap(trace, self._hook, at))


def wrap(model: TracedForward, hook: Hook) -> TracedForward:
    """
    Return a model whose activations pass through ``hook`` and which computes with what comes back.

    Only a backend that goes on with what ``Trace.record`` returns can be wrapped: the torch reference does.
    """
    return Wrapped(model, hook)

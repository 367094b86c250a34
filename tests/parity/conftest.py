"""A tiny model, and a forward that tampers with what another one computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apr_core.model.trace import Trace, TracedForward
from tests.model.conftest import tiny

__all__ = ["Tampered", "tiny"]

Edit = Callable[[str, NDArray[np.float32], int], NDArray[np.float32]]


class Tampered:
    """Pass everything through ``edit``, which gets name, values and the position of their first row."""

    backend = "tampered"

    def __init__(self, model: TracedForward, edit: Edit, *, stale: bool = False, lost: str = "") -> None:
        self.model, self.edit, self.stale, self.lost = model, edit, stale, lost
        self.config, self.device, self.tokenizer = model.config, model.device, model.tokenizer

    def new_cache(self, start: int = 0) -> Any:
        return self.model.new_cache(start)

    def forward(self, ids: NDArray[np.int64], cache: Any = None, trace: Trace | None = None) -> NDArray[np.float32]:
        start = cache.length if cache is not None else 0
        inner = Trace()
        use = self.model.new_cache() if self.stale and cache is not None and start else cache
        logits = self.edit("logits", self.model.forward(ids, use, inner), start)
        if use is not cache:
            self.model.forward(ids, cache)
        if trace is not None:
            for name, values in inner.items():
                if name != self.lost:
                    trace.record(name, self.edit(name, values, start))
        return logits

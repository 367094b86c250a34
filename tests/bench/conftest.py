"""A model that counts instead of computing, and a clock that is told what to show."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.model.conftest import tiny

__all__ = ["Clock", "Counting", "counting", "tiny"]


class Clock:
    """Shows what it was advanced to; each reading costs ``per_reading`` nanoseconds."""

    def __init__(self, per_reading: int = 0) -> None:
        self.now, self.per_reading = 1_000, per_reading

    def __call__(self) -> int:
        self.now += self.per_reading
        return self.now


class Counting:
    """The next token is the last plus one, modulo the vocabulary; each forward takes ``cost`` on a given clock."""

    backend, device, tokenizer = "counting", "cpu", None

    def __init__(self, clock: Clock | None = None, cost: Callable[[int], int] = lambda tokens: 1_000_000) -> None:
        self.clock, self.cost, self.calls = clock, cost, list[int]()
        self.config = SimpleNamespace(vocab_size=11, max_position_embeddings=4096)

    def new_cache(self) -> Any:
        return SimpleNamespace(length=0)

    def forward(self, ids: NDArray[np.int64], cache: Any = None, trace: Any = None) -> NDArray[np.float32]:
        self.calls.append(ids.size)
        if cache is not None:
            cache.length += ids.size
        if self.clock is not None:
            self.clock.now += self.cost(ids.size)
        return np.eye(11, dtype=np.float32)[(ids + 1) % 11] * 10


@pytest.fixture
def counting() -> Counting:
    """A counting model on its own clock."""
    return Counting(Clock())

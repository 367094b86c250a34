"""Raw timings in the order in which they were taken, and the clock behind them: kept as they are, never repaired."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Clock = Callable[[], int]
_NANO = 1e-9
_RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class Samples:
    """Raw timings in seconds, in the order in which they were taken; statistics are views of them."""

    seconds: NDArray[np.float64]

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Samples:
        """Keep these timings."""
        return cls(np.asarray(seconds, np.float64))

    @property
    def n(self) -> int:
        """How many."""
        return int(self.seconds.size)

    @property
    def median(self) -> float:
        """Median, s; NaN without samples."""
        return self._quantile(0.5)

    @property
    def iqr(self) -> float:
        """Distance of the quartiles, s."""
        return self._quantile(0.75) - self._quantile(0.25)

    @property
    def minimum(self) -> float:
        """Shortest, s."""
        return self._quantile(0.0)

    @property
    def maximum(self) -> float:
        """Longest, s."""
        return self._quantile(1.0)

    def median_interval(self, *, coverage: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Bootstrap interval of the median, s; the same samples and seed give the same interval."""
        if not self.n:
            return float("nan"), float("nan")
        drawn = np.random.default_rng(seed).choice(self.seconds, (_RESAMPLES, self.n))
        low, high = np.quantile(np.median(drawn, axis=1), [(1 - coverage) / 2, (1 + coverage) / 2])
        return float(low), float(high)

    def _quantile(self, share: float) -> float:
        return float(np.quantile(self.seconds, share)) if self.n else float("nan")


def clock_tick_s(clock: Clock = time.perf_counter_ns) -> float:
    """
    Return the smallest step that a clock shows between two readings, in seconds.

    Measured, because the resolution that a system reports is one nanosecond whether or not it can be read that fast.
    A clock that never moves has no tick: infinity.
    """
    readings = np.array([clock() for _ in range(2000)], np.int64)
    steps = np.diff(readings)
    return float(steps[steps > 0].min()) * _NANO if (steps > 0).any() else float("inf")

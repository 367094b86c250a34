"""
Time a forward, and keep every raw sample in the order in which it was taken.

The meter judges nothing. It returns what it timed together with what the timed code produced, so that whoever judges
can see tokens that are wrong, samples that are missing and a clock that ran backwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apr_core.errors import UsageError
from apr_core.model.tokens import PreparedTokens
from apr_core.model.trace import TracedForward

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


@dataclass(frozen=True, eq=False)
class DecodeRun:
    """
    A timed greedy decode.

    Attributes:
        steps: Seconds of each decode step, repeat after repeat.
        ttft: Seconds from the prompt to the first token, one per repeat.
        tokens: What each repeat produced; the first comes from the prefill, each other from one step.
        wall_s: Seconds on the same clock around all repeats, everything included.
        asked_repeats: How many repeats were asked for.
        asked_tokens: How many tokens in each.
    """

    steps: Samples
    ttft: Samples
    tokens: tuple[tuple[int, ...], ...]
    wall_s: float
    asked_repeats: int
    asked_tokens: int

    @property
    def tpot_s(self) -> float:
        """Median seconds per output token after the first."""
        return self.steps.median

    @property
    def decode_tok_s(self) -> float:
        """Tokens per second of the median step."""
        return 1 / self.steps.median if self.steps.median > 0 else float("nan")


@dataclass(frozen=True, eq=False)
class PrefillRun:
    """A timed prefill of ``tokens`` tokens; one sample per repeat, ``wall_s`` around all of them."""

    seconds: Samples
    tokens: int
    wall_s: float

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens per second of the median repeat."""
        return self.tokens / self.seconds.median if self.seconds.median > 0 else float("nan")


def measure_decode(
    model: TracedForward,
    prepared: PreparedTokens,
    *,
    max_new_tokens: int,
    repeats: int,
    warmup: int = 1,
    delay_s: float = 0.0,
    clock: Clock = time.perf_counter_ns,
    between: Callable[[], object] = lambda: None,
) -> DecodeRun:
    """
    Time greedy decoding through the cache; end tokens do not end it, so that every repeat does the same work.

    Args:
        model: Any backend; its forward must have finished when it returns.
        prepared: The prompt.
        max_new_tokens: Tokens per repeat; one less are decode steps.
        repeats: Timed repeats, each from an empty cache.
        warmup: Repeats before them that leave no sample.
        delay_s: Slept inside every timed step: shows that the meter times what it runs.
        clock: Nanoseconds that do not run backwards.
        between: Called before each repeat, outside of every sample (a ceiling measured in the same minutes).

    Raises:
        UsageError: Fewer than two tokens, or no repeat.
        InferenceError: Of the model.
    """
    if max_new_tokens < 2 or repeats < 1 or warmup < 0:
        raise UsageError(
            f"expected at least 2 tokens and 1 repeat, found {max_new_tokens} and {repeats}", advice="ask for more"
        )
    for _ in range(warmup):
        _decode_once(model, prepared, max_new_tokens, 0.0, clock)
    ttft: list[float] = []
    steps: list[float] = []
    tokens: list[tuple[int, ...]] = []
    begin = clock()
    for _ in range(repeats):
        between()
        first, rest, made = _decode_once(model, prepared, max_new_tokens, delay_s, clock)
        ttft.append(first)
        steps.extend(rest)
        tokens.append(made)
    wall_s = (clock() - begin) * _NANO
    return DecodeRun(Samples.of(steps), Samples.of(ttft), tuple(tokens), wall_s, repeats, max_new_tokens)


def measure_prefill(
    model: TracedForward,
    prepared: PreparedTokens,
    *,
    repeats: int,
    warmup: int = 1,
    clock: Clock = time.perf_counter_ns,
    seen: Callable[[NDArray[np.float32]], object] = lambda logits: None,
) -> PrefillRun:
    """
    Time one forward over the whole prompt.

    Args:
        model: Any backend.
        prepared: The prompt.
        repeats: Timed repeats.
        warmup: Repeats before them that leave no sample.
        clock: Nanoseconds that do not run backwards.
        seen: Gets the logits of each timed repeat, outside of its sample: a rate counts only for the right result.

    Raises:
        UsageError: No repeat.
        InferenceError: Of the model.
    """
    if repeats < 1 or warmup < 0:
        raise UsageError(f"expected at least 1 repeat, found {repeats}", advice="ask for more")
    for _ in range(warmup):
        model.forward(prepared.ids)
    samples: list[float] = []
    begin = clock()
    for _ in range(repeats):
        start = clock()
        logits = model.forward(prepared.ids)
        samples.append((clock() - start) * _NANO)
        seen(logits)
    return PrefillRun(Samples.of(samples), int(prepared.ids.size), (clock() - begin) * _NANO)


def clock_tick_s(clock: Clock = time.perf_counter_ns) -> float:
    """
    Return the smallest step that a clock shows between two readings, in seconds.

    Measured, because the resolution that a system reports is one nanosecond whether or not it can be read that fast.
    A clock that never moves has no tick: infinity.
    """
    readings = np.array([clock() for _ in range(2000)], np.int64)
    steps = np.diff(readings)
    return float(steps[steps > 0].min()) * _NANO if (steps > 0).any() else float("inf")


def _decode_once(
    model: TracedForward, prepared: PreparedTokens, max_new_tokens: int, delay_s: float, clock: Clock
) -> tuple[float, list[float], tuple[int, ...]]:
    """Return the seconds to the first token, those of each step, and the tokens; a sample ends with its token known."""
    cache = model.new_cache()
    start = clock()
    token = int(model.forward(prepared.ids, cache)[-1].argmax())
    first = (clock() - start) * _NANO
    tokens, steps = [token], []
    for _ in range(max_new_tokens - 1):
        start = clock()
        token = int(model.forward(np.array([token], np.int64), cache)[-1].argmax())
        if delay_s > 0:
            time.sleep(delay_s)
        steps.append((clock() - start) * _NANO)
        tokens.append(token)
    return first, steps, tuple(tokens)

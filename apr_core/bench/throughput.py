"""
How fast a model runs: prompt, first token and each further token apart, at several lengths of context.

Warm-up is detected, not counted: runs are thrown away until two in a row agree. Every raw sample is kept. The ceiling
is read between the samples, at the size of what one token reads, because weights that fit a cache are read faster than
memory. A rate is a number about tokens: `couple` compares them with what the reference would have chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from apr_core.bench.timing import Clock, Samples
from apr_core.errors import UsageError
from apr_core.model.trace import TracedForward, last_logits
from apr_core.parity.tolerances import AIM, decisive_margin

AGREEMENT = 0.1
"""Two warm-up runs agree when they differ by at most this share."""
_MOST_WARM_UPS = 6
_NANO = 1e-9
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """
    What is timed.

    Attributes:
        prefill: Tokens of the prompt.
        decode: Tokens generated behind it; the first one belongs to the prompt.
        repeats: Timed repeats of each.
        contexts: Lengths of context at which a further token is timed.
        steps: Steps timed at each of those lengths.
    """

    prefill: int = 512
    decode: int = 128
    repeats: int = 5
    contexts: tuple[int, ...] = ()
    steps: int = 8

    def require(self, longest: int) -> None:
        """
        Refuse what the model cannot hold, before any work.

        Raises:
            UsageError: An empty prompt, fewer than two tokens, no repeat, or more positions than the model has.
        """
        if self.prefill < 1:
            raise UsageError("expected a prompt of at least 1 token, found an empty one", advice="raise --prefill")
        if self.decode < 2 or self.repeats < 1 or self.steps < 1 or any(length < 1 for length in self.contexts):
            raise UsageError(
                f"expected at least 2 tokens and 1 repeat, found {self.decode} and {self.repeats}",
                advice="ask for more",
            )
        needed = max(self.prefill + self.decode, *(length + self.steps for length in self.contexts), 0)
        if needed > longest:
            raise UsageError(
                f"expected at most {longest} positions (max_position_embeddings), found {needed}",
                advice="shorten the prompt, the answer or the context",
            )


@dataclass(frozen=True, eq=False)
class Throughput:
    """
    What was timed of one backend with one number of threads.

    Attributes:
        backend: Name of the implementation.
        threads: Threads that it was told to use; None where it cannot be told.
        plan: What was asked for.
        prefill: Seconds from an empty cache to the logits of the last prompt token.
        ttft: Seconds to the first token, its choice included.
        steps: Seconds of each further token, repeat after repeat.
        tokens: What each repeat produced.
        logits: Those of the last prompt token, one row per repeat: a rate counts for the right result alone.
        at_context: Seconds of single steps by length of context.
        warm_ups: Seconds of the runs that were thrown away.
        private_bytes: Most memory of its own that the process had at any look; None where the system does not say.
        wall_s: Seconds on the same clock around each answer, added up.
    """

    backend: str
    threads: int | None
    plan: Plan
    prefill: Samples
    ttft: Samples
    steps: Samples
    tokens: tuple[tuple[int, ...], ...]
    logits: tuple[NDArray[np.float32], ...]
    at_context: Mapping[int, Samples]
    warm_ups: tuple[float, ...]
    private_bytes: int | None
    wall_s: float

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens per second of the median repeat."""
        return _per_second(self.plan.prefill, self.prefill.median)

    @property
    def decode_tok_s(self) -> float:
        """Tokens per second of the median step."""
        return _per_second(1, self.steps.median)

    @property
    def p99_s(self) -> float:
        """Seconds that 99 of 100 steps stay below."""
        return float(np.quantile(self.steps.seconds, 0.99))

    def figures(self) -> dict[str, Any]:
        """Return the numbers with their bootstrap intervals, ready for JSON."""
        fast, slow = self.steps.median_interval()
        first, last = self.prefill.median_interval()
        return {
            "backend": self.backend,
            "threads": self.threads,
            "prefill_tok_s": self.prefill_tok_s,
            "prefill_tok_s_interval": [_per_second(self.plan.prefill, end) for end in (last, first)],
            "decode_tok_s": self.decode_tok_s,
            "decode_tok_s_interval": [_per_second(1, end) for end in (slow, fast)],
            "ttft_s": self.ttft.median,
            "tpot_p99_s": self.p99_s,
            "tok_s_at_context": {str(n): _per_second(1, samples.median) for n, samples in self.at_context.items()},
            "private_bytes": self.private_bytes,
            "warm_ups_s": list(self.warm_ups),
            "samples": {
                "prefill_s": self.prefill.seconds.tolist(),
                "ttft_s": self.ttft.seconds.tolist(),
                "step_s": self.steps.seconds.tolist(),
                "at_context_s": {str(n): samples.seconds.tolist() for n, samples in self.at_context.items()},
            },
        }


class Stream(NamedTuple):
    """One timed answer: seconds to the prompt's logits, to the first token, of each further one; and what they were."""

    logits: NDArray[np.float32]
    prefill_s: float
    ttft_s: float
    steps_s: list[float]
    tokens: tuple[int, ...]


def measure(
    model: TracedForward,
    prompt: Ints,
    plan: Plan,
    *,
    threads: int | None = None,
    warm_ups: int | None = None,
    delay_s: float = 0.0,
    clock: Clock = time.perf_counter_ns,
    between: Callable[[], object] = lambda: None,
) -> Throughput:
    """
    Time a model by a plan; end tokens do not end an answer, so that every repeat does the same work.

    Args:
        model: Any backend; its forward must have finished when it returns.
        prompt: int64 [plan.prefill].
        plan: What to time.
        threads: Set before anything is timed, where the backend can be told.
        warm_ups: Prompts that leave no sample; None to go on until two in a row agree.
        delay_s: Slept inside every further token: shows that the meter times what it runs.
        clock: Nanoseconds that do not run backwards.
        between: Called before each repeat, outside of every sample: the ceiling, or a peer.

    Raises:
        UsageError: The plan does not fit the model, or threads do not fit the machine.
        InferenceError: Of the model.
    """
    plan.require(model.config.max_position_embeddings)
    told = use_threads(model, threads)
    warm = warm_up(lambda: last_logits(model, prompt), clock, warm_ups)
    memory = [private_bytes()]
    streams: list[Stream] = []
    wall = 0
    for _ in range(plan.repeats):
        between()
        begin = clock()
        streams.append(_answer(model, prompt, plan.decode, delay_s, clock))
        wall += clock() - begin
        memory.append(private_bytes())
    at_context = {}
    for length in plan.contexts:
        at_context[length] = _steps_at(model, prompt, length, plan.steps, clock)
        memory.append(private_bytes())
    return Throughput(
        backend=model.backend,
        threads=told,
        plan=plan,
        prefill=Samples.of([stream.prefill_s for stream in streams]),
        ttft=Samples.of([stream.ttft_s for stream in streams]),
        steps=Samples.of([second for stream in streams for second in stream.steps_s]),
        tokens=tuple(stream.tokens for stream in streams),
        logits=tuple(stream.logits for stream in streams),
        at_context=at_context,
        warm_ups=warm,
        private_bytes=max((seen for seen in memory if seen is not None), default=None),
        wall_s=wall * _NANO,
    )


def warm_up(
    run: Callable[[], object], clock: Clock = time.perf_counter_ns, count: int | None = None
) -> tuple[float, ...]:
    """Run ``count`` times, or until two durations in a row agree (`AGREEMENT`) or six were seen; return the seconds."""
    spent: list[float] = []
    while len(spent) < (_MOST_WARM_UPS if count is None else count):
        start = clock()
        run()
        spent.append((clock() - start) * _NANO)
        if count is None and len(spent) > 1 and abs(spent[-1] - spent[-2]) <= AGREEMENT * spent[-2]:
            break
    return tuple(spent)


def use_threads(model: TracedForward, threads: int | None) -> int | None:
    """
    Tell a backend how many threads to use.

    Returns:
        The number that it uses now; None when it takes no such wish.

    Raises:
        UsageError: More than this process has cores.
    """
    tell = getattr(model, "use_threads", None)
    if tell is not None:
        if threads is not None:
            tell(threads)
        return int(model.threads)  # type: ignore[attr-defined]
    if model.backend != "torch":
        return None
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def private_bytes() -> int | None:
    """Return the memory that belongs to this process alone (mapped files that it did not change are not)."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty"))


def couple(
    reference: TracedForward, prompt: Ints, tokens: Sequence[int], moved: float, limit: float | None = None
) -> tuple[list[int], int]:
    """
    Ask the reference, teacher-forced, at each timed token whether it would have chosen that one.

    Args:
        reference: The untimed model, without a cache.
        prompt: What was read before the first token.
        tokens: What was produced.
        moved: How far, in nat, a sound candidate's logits may be from the reference's beyond float32 (0 for float32).
            A token is right when the reference puts it within three times that of its own choice: two logits may each
            move so far, and other prompts somewhat further.
        limit: What float32 may cost this model in rel_l2; None for the aim, 1e-5.

    Returns:
        The steps whose token is wrong, and how many were compared. Nothing produced compares nothing.
    """
    if not len(tokens):
        return [], 0
    made = np.asarray(tokens, np.int64)
    logits = reference.forward(np.concatenate([prompt, made[:-1]]))[prompt.size - 1 :]
    regret = logits.max(axis=1) - logits[np.arange(made.size), made]
    slack = np.maximum(decisive_margin(logits, AIM if limit is None else limit), 3 * moved)
    return [int(step) for step in np.flatnonzero(~(regret <= slack))], int(made.size)


def _per_second(count: float, seconds: float) -> float:
    """A rate; NaN where no time passed, which is no rate at all."""
    return count / seconds if seconds > 0 else float("nan")


def _answer(model: TracedForward, prompt: Ints, tokens: int, delay_s: float, clock: Clock) -> Stream:
    """Time one answer from an empty cache; a sample ends with its token known."""
    cache = model.new_cache()
    start = clock()
    logits = last_logits(model, prompt, cache)
    read = clock()
    token = int(logits.argmax())
    first = clock()
    made, steps = [token], []
    for _ in range(tokens - 1):
        start_step = clock()
        token = int(model.forward(np.array([token], np.int64), cache)[-1].argmax())
        if delay_s > 0:
            time.sleep(delay_s)
        steps.append((clock() - start_step) * _NANO)
        made.append(token)
    return Stream(logits, (read - start) * _NANO, (first - start) * _NANO, steps, tuple(made))


def _steps_at(model: TracedForward, prompt: Ints, length: int, steps: int, clock: Clock) -> Samples:
    """Fill a cache to a length with the prompt again and again, and time single steps behind it."""
    cache = model.new_cache()
    filled = np.resize(prompt, length)
    for first in range(0, length, 512):
        last_logits(model, filled[first : first + 512], cache)
    seconds = []
    for _ in range(steps):
        start = clock()
        model.forward(prompt[:1], cache)
        seconds.append((clock() - start) * _NANO)
    return Samples.of(seconds)

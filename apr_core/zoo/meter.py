"""
Faults of the meter: they damage the suite and not the subject, by other names in ``apr_core.bench`` for a while.

A clock that lies, samples that are lost, doubled or invented, tokens that nobody computed, bytes that nobody stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from apr_core.bench import acts as bench
from apr_core.bench import throughput, timing, versus
from apr_core.bench.claimed import Claimed
from apr_core.bench.roofline import architecture_bytes, ceiling_of
from apr_core.bench.throughput import Plan, Stream
from apr_core.engines.subject import Subject
from apr_core.falsify.verdict import Verdict
from apr_core.peers.rates import Rates

Planted = Callable[[], AbstractContextManager[None]]


@contextmanager
def swapped(module: ModuleType | type, **planted: object) -> Iterator[None]:
    """Put others in the place of a module's names for a while."""
    kept = {name: getattr(module, name) for name in planted}
    try:
        for name, value in planted.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(module, name, value)


def _clock(read: Callable[[int, int], int]) -> Planted:
    """Time with a clock that is a function of the right one and of how often it was read."""

    def plant() -> AbstractContextManager[None]:
        readings = iter(range(10**9))

        def clock() -> int:
            return read(time.perf_counter_ns(), next(readings))

        @contextmanager
        def both() -> Iterator[None]:
            measure = partial(throughput.measure, clock=clock)
            tick = partial(timing.clock_tick_s, clock=clock)
            with swapped(versus, measure=measure), swapped(bench, measure=measure, clock_tick_s=tick):
                yield

        return both()

    return plant


def _stream(edit: Callable[[Stream, float], Stream]) -> Planted:
    """Report another answer, or other times of it, than was timed; the edit is told of the delay."""
    right = throughput._answer

    def answer(model: Any, prompt: Any, tokens: int, delay_s: float, clock: timing.Clock) -> Stream:
        return edit(right(model, prompt, tokens, delay_s, clock), delay_s)

    return lambda: swapped(throughput, _answer=answer)


def _fewer_repeats() -> AbstractContextManager[None]:
    """Time one repeat less than was asked for, and say nothing."""
    right = throughput.measure

    def measure(model: Any, prompt: Any, plan: Plan, **asked: Any) -> Any:
        return replace(right(model, prompt, replace(plan, repeats=plan.repeats - 1), **asked), plan=plan)

    return swapped(versus, measure=measure)


def _half_prompt() -> AbstractContextManager[None]:
    right = throughput._answer

    def answer(model: Any, prompt: Any, *rest: Any) -> Stream:
        return right(model, prompt[: prompt.size // 2], *rest)

    return swapped(throughput, _answer=answer)


def _bytes(change: Callable[[int], int]) -> Planted:
    right = architecture_bytes
    return lambda: swapped(bench, architecture_bytes=lambda types, geometry: change(right(types, geometry)))


def _sluggish() -> AbstractContextManager[None]:
    """Measure a ceiling thousands of times too low."""
    right = ceiling_of

    def slow(nbytes: int, threads: int) -> Any:
        ceiling = right(nbytes, threads)
        ceiling.sample()
        return SimpleNamespace(sample=lambda: None, samples=[rate * 1e-5 for rate in ceiling.samples])

    return swapped(versus, ceiling_of=slow)


def _replay() -> AbstractContextManager[None]:
    """Report the samples of the first stream for every later one."""
    first: list[Stream] = []

    def again(stream: Stream, delay_s: float) -> Stream:
        first.append(stream)
        return stream._replace(steps_s=first[0].steps_s[: len(stream.steps_s)])

    return _stream(again)()


def _steps(change: Callable[[list[float]], list[float]]) -> Planted:
    return _stream(lambda stream, delay_s: stream._replace(steps_s=change(stream.steps_s)))


def _tokens(change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Planted:
    return _stream(lambda stream, delay_s: stream._replace(tokens=change(stream.tokens)))


def _engine(**planted: object) -> Planted:
    """Give the compiled engine other parts."""

    def plant() -> AbstractContextManager[None]:
        from apr_core.engines.cpu import CpuQwen2

        return swapped(CpuQwen2, **planted)

    return plant


def _panels(damage: Callable[[Any], None]) -> Planted:
    """Damage the panels of every matrix, as a wrong kernel or packer does; bfloat16 words of the bundled model."""

    def plant() -> AbstractContextManager[None]:
        from apr_core.engines import cpu_weights

        right = cpu_weights.panels

        def packed(tensor: Any, out: Any) -> Any:
            made = right(tensor, out)
            damage(made.view(np.uint16).reshape(-(-tensor.shape[0] // 16), -1, 16))
            return made

        return swapped(cpu_weights, panels=packed)

    return plant


def _skips_last_block(words: Any) -> None:
    words[:, -32:] = 0


def _saturates(words: Any) -> None:
    """Hold every weight at plus or minus 1/64, as an instruction that is too narrow holds a sum."""
    words[:] = np.where(words & 0x7FFF > 0x3C80, words & 0x8000 | 0x3C80, words)


def _constant(self: Any, ids: Any, cache: Any = None, trace: Any = None) -> Any:
    logits = np.zeros((len(ids), self.config.vocab_size), np.float32)
    logits[:, 7] = 1
    return logits


def _constant_last(self: Any, ids: Any, cache: Any = None) -> Any:
    return _constant(self, ids)[-1]


def _fewer_layers() -> AbstractContextManager[None]:
    from apr_core.engines.cpu import CpuQwen2

    right = CpuQwen2._run_layers

    def short(self: Any, first: int, stop: int, *rest: Any) -> None:
        right(self, first, max(first, stop - 1), *rest)

    return swapped(CpuQwen2, _run_layers=short)


def _nothing_generated(stream: Stream, delay_s: float) -> Stream:
    return stream._replace(tokens=(), prefill_s=1e-9, steps_s=[1e-9] * len(stream.steps_s))


def _faster_peer() -> AbstractContextManager[None]:
    """Measure against a fair peer that reads and writes a billion tokens a second."""
    rates = Rates(1e9, 1e9, "random")
    peer = SimpleNamespace(name="other", build="", features="", fair=True, round=lambda *asked: rates)

    @contextmanager
    def both() -> Iterator[None]:
        with swapped(bench, open_peers=lambda names, model, elements: ([peer], {})), swapped(Subject, peers=("other",)):
            yield

    return both()


def _claiming(number: float) -> Planted:
    return lambda: swapped(bench, claimed_of=lambda subject: (("decode_tok_s", number),))


def _believes(metric: str, claimed: float, measured: float, *rest: Any, **more: Any) -> Claimed:
    return Claimed(metric, claimed, measured, Verdict.CORROBORATED, "")


def _judging(judge: Callable[..., Claimed]) -> Planted:
    return lambda: swapped(bench, judge_claim=judge)


class MeterFault(NamedTuple):
    """One fault of the meter, the claim that must refute it, and what plants it for a while."""

    id: str
    what: str
    claim: str
    plant: Planted


METER_FAULTS = (
    MeterFault("meter-bytes-short", "one byte is not counted", "F-THR-001", _bytes(lambda n: n - 1)),
    MeterFault("meter-bytes-twice", "every tensor counts twice", "F-THR-001", _bytes(lambda n: 2 * n)),
    MeterFault(
        "meter-bytes-page", "bytes are counted in pages", "F-THR-001", _bytes(lambda n: -(-n // 4096) * 4096 + 4096)
    ),
    MeterFault(
        "meter-clock-seconds", "a clock of whole seconds", "F-THR-002", _clock(lambda ns, n: ns // 10**9 * 10**9)
    ),
    MeterFault(
        "meter-clock-coarse", "a clock with steps of 10 ms", "F-THR-002", _clock(lambda ns, n: ns // 10**7 * 10**7)
    ),
    MeterFault("meter-clock-stands", "a clock that stands", "F-THR-002", _clock(lambda ns, n: 0)),
    MeterFault("meter-token-zero", "token 0 is produced", "F-THR-003", _tokens(lambda made: (0,) * len(made))),
    MeterFault("meter-tokens-lost", "the last token is lost", "F-THR-003", _tokens(lambda made: made[:-1])),
    MeterFault("meter-half-prompt", "half of the prompt is timed", "F-THR-004", _half_prompt),
    MeterFault(
        "meter-other-logits",
        "other logits are handed on",
        "F-THR-004",
        _stream(lambda stream, delay_s: stream._replace(logits=2 * stream.logits)),
    ),
    MeterFault("meter-samples-lost", "the last step is lost", "F-THR-005", _steps(lambda steps: steps[:-1])),
    MeterFault("meter-no-time", "every step takes no time", "F-THR-005", _steps(lambda steps: [0.0 for _ in steps])),
    MeterFault("meter-repeats-lost", "one repeat less", "F-THR-005", _fewer_repeats),
    MeterFault(
        "meter-prefills-lost",
        "prompts take no time",
        "F-THR-005",
        _stream(lambda stream, delay_s: stream._replace(prefill_s=0.0)),
    ),
    MeterFault(
        "meter-asynchronous", "steps end before the work", "F-THR-006", _steps(lambda steps: [s / 1000 for s in steps])
    ),
    MeterFault("meter-fast", "steps take a microsecond", "F-THR-006", _steps(lambda steps: [1e-6 for _ in steps])),
    MeterFault("meter-ceiling-low", "a ceiling of 1 MB/s", "F-THR-006", _sluggish),
    MeterFault(
        "meter-overlap", "steps begin with the stream", "F-THR-007", _steps(lambda steps: np.cumsum(steps).tolist())
    ),
    MeterFault("meter-clock-jumps", "a clock that jumps back", "F-THR-007", _clock(lambda ns, n: ns - n // 7 * 10**10)),
    MeterFault("meter-twice", "each step is kept double", "F-THR-007", _steps(lambda steps: [2 * s for s in steps])),
    MeterFault("meter-tenth", "a tenth of each step is reported", "F-THR-008", _steps(lambda s: [1e-4 for _ in s])),
    MeterFault("meter-replays", "samples of an earlier run are reported", "F-THR-008", _replay),
    MeterFault(
        "meter-constant", "a millisecond for every step", "F-THR-008", _steps(lambda steps: [1e-3 for _ in steps])
    ),
    MeterFault("vnni-last-block", "a kernel skips the last block of each row", "F-THR-003", _panels(_skips_last_block)),
    MeterFault("vnni-saturates", "a kernel saturates", "F-THR-003", _panels(_saturates)),
    MeterFault("engine-silent", "nothing is generated", "F-THR-003", _stream(_nothing_generated)),
    MeterFault("engine-elsewhere", "another device ran", "F-THR-003", _engine(device="cuda:0")),
    MeterFault(
        "engine-constant", "one token, always", "F-THR-003", _engine(forward=_constant, forward_last=_constant_last)
    ),
    MeterFault("engine-fewer-layers", "the last layer is left out", "F-THR-003", _fewer_layers),
    MeterFault("peer-faster", "a fair peer is faster", "F-THR-011", _faster_peer),
    MeterFault("claimed-throughput", "a rate that was claimed and not measured", "F-THR-012", _claiming(1e9)),
    MeterFault("claimed-believed", "all claims are believed", "F-THR-012", _judging(_believes)),
    MeterFault(
        "claimed-denied",
        "every claim is refuted",
        "F-THR-012",
        _judging(lambda *a, **k: replace(_believes(*a), verdict=Verdict.FALSIFIED)),
    ),
)

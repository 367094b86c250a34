"""
The parity suite: one candidate against the reference on everything that a forward can get wrong.

    prefill, decode      64 positions at once, then 64 teacher-forced steps through the cache
    far                  the same at positions 4000 and 30000, by an offset, where the context reaches so far
    cached against full  the candidate's cached steps against its own prefill: needs no second backend
    singly               the candidate's prompt token by token against the same prompt at once
    steps alone          that prompt against the reference by float32's limits, of a candidate that rounds prompts only
    isolation            A, B, A, and two streams in turn: A's answers are A's, bit for bit
    tracing              logits and greedy tokens with tracing on and off, bit for bit

Limits are multiples of the reference's own noise floor (`parity.floor`), never of anything the candidate does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from apr_core.contract.types import ValidatedModel
from apr_core.falsify.verdict import Verdict
from apr_core.model.generate import follow
from apr_core.model.trace import Fingerprints, Trace, TracedForward, mandatory_names
from apr_core.parity.compare import LOGITS, Divergence, ParityReport, compare
from apr_core.parity.floor import Floor, Rounding, Run, noise_floor, path, rounding
from apr_core.parity.tolerances import decisive_margin

PREFILL = 64
STEPS = 64
POSITIONS = PREFILL + STEPS
FAR = (4000, 30000)
FAR_PREFILL, FAR_STEPS = 16, 8

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Part:
    """
    One comparison of the suite.

    Attributes:
        name: As in the module's list.
        verdict: What follows.
        reason: Why not CORROBORATED, or empty.
        compared: Rows, or values where bits are compared.
        report: The comparison, where it is one of traces.
        first: The first divergence beyond the limits.
        over: The largest rel_l2 over the limit of its name, where one was compared.
    """

    name: str
    verdict: Verdict
    reason: str
    compared: int
    report: ParityReport | None = None
    first: Divergence | None = None
    over: float | None = None


@dataclass(frozen=True, eq=False)
class SuiteReport:
    """Everything that the suite found about one candidate; ``rounding``: it was held to what that costs."""

    backend: str
    device: str
    reference: str
    parts: Sequence[Part]
    floor: Floor
    rounding: Rounding | None = None
    control: bool = False
    notes: Sequence[str] = field(default=())

    @property
    def verdict(self) -> Verdict:
        """FALSIFIED by one part, undecided by one, corroborated by all."""
        found = [part.verdict for part in self.parts]
        if Verdict.FALSIFIED in found:
            return Verdict.FALSIFIED
        return Verdict.INCONCLUSIVE if Verdict.INCONCLUSIVE in found or not found else Verdict.CORROBORATED

    @property
    def reason(self) -> str:
        """The first part that stands in the way, and why."""
        return next((f"{p.name}: {p.reason}" for p in self.parts if p.verdict is self.verdict and p.reason), "")

    @property
    def first(self) -> Divergence | None:
        """The first divergence of the first part that has one."""
        return next((part.first for part in self.parts if part.first is not None), None)

    def part(self, name: str) -> Part:
        """Return a part by its name."""
        return next(part for part in self.parts if part.name == name)


@dataclass(frozen=True, eq=False)
class Bench:
    """
    What every candidate of one model is held against: the reference's traces, and its noise floor once it is asked for.

    Attributes:
        validated: The model.
        reference: The float32 torch forward.
        ids: The stimulus.
        runs: Part -> how it is fed.
        traces: Part -> the reference's trace.
        contract: One limit on rel_l2 for every name, in place of the floors.
    """

    validated: ValidatedModel
    reference: TracedForward
    ids: Ids
    runs: Mapping[str, Run]
    traces: Mapping[str, Trace]
    contract: float | None = None
    _floors: dict[tuple[str, str], Floor] = field(default_factory=dict)

    def floor(self, part: str = "near", place: Rounding | None = None) -> Floor:
        """Measure how far the reference is from itself, with activations rounded as ``place`` does too; once."""
        key = part, "" if place is None else place.name
        if key not in self._floors:
            self._floors[key] = noise_floor(self.validated, self.runs[part], place)
        return self._floors[key]

    def limits(self, part: str, place: Rounding | None = None) -> dict[str, float]:
        """Limits on rel_l2 per name."""
        if self.contract is not None:
            return dict.fromkeys(self.traces[part], self.contract)
        return self.floor(part, place).limits


def prepare(validated: ValidatedModel, reference: TracedForward, ids: Ids, *, contract: float | None = None) -> Bench:
    """
    Trace the reference.

    Args:
        validated: The model.
        reference: The float32 torch forward of it.
        ids: At least ``POSITIONS`` ids where the context allows.
        contract: A limit that was agreed for all names; no floor is measured then, which saves five forwards.
    """
    room = reference.config.max_position_embeddings
    ids = ids[: min(POSITIONS, room)]
    runs = {"near": path(ids, PREFILL)}
    length = min(ids.size, FAR_PREFILL + FAR_STEPS)
    runs |= {f"far {at}": path(ids[:length], FAR_PREFILL, at) for at in FAR if at + length <= room}
    return Bench(validated, reference, ids, runs, {name: run(reference) for name, run in runs.items()}, contract)


def examine(bench: Bench, candidate: TracedForward, precision: str = "exact") -> SuiteReport:
    """
    Hold one candidate against the reference.

    Args:
        bench: The reference's side.
        candidate: Any backend of the same model.
        precision: ``speed`` for one that may round on purpose (`floor.rounding` says when) and owes what that costs.
    """
    place = rounding(bench.validated, precision, candidate.device)
    parts = list(examinations(bench, candidate, place))
    control = type(candidate) is type(bench.reference) and candidate.device == bench.reference.device
    floor = Floor({}) if bench.contract is not None else bench.floor(place=place)
    notes = [f"far {at}: beyond the context of this model" for at in FAR if f"far {at}" not in bench.traces]
    backend, device = candidate.backend, candidate.device
    return SuiteReport(backend, device, bench.reference.backend, parts, floor, place, control, notes)


def examinations(bench: Bench, candidate: TracedForward, place: Rounding | None = None) -> Iterator[Part]:
    """Yield the parts of `examine` one by one, in the order of the module's list."""
    near, mine = bench.traces["near"], follow(candidate, bench.ids, PREFILL, full=True)
    limits = bench.limits("near", place)
    yield against("prefill", rows(near, 0, PREFILL), rows(mine, 0, PREFILL), limits)
    yield against("decode", rows(near, PREFILL, None), rows(mine, PREFILL, None), limits)
    for name in (name for name in bench.traces if name != "near"):
        few, start = bench.ids[: FAR_PREFILL + FAR_STEPS], int(name.split()[1])
        far = follow(candidate, few, FAR_PREFILL, start=start, full=True)
        yield against(name, bench.traces[name], far, bench.limits(name, place), fewest=1)
    full = follow(candidate, bench.ids, bench.ids.size, full=True)
    yield against("cached against full", rows(full, PREFILL, None), rows(mine, PREFILL, None), limits)
    single = follow(candidate, bench.ids[:PREFILL], 1, full=True)
    yield against("singly", rows(full, 0, PREFILL), single, limits)
    if place is not None and place.prompts_only:
        yield against("steps alone", rows(near, 0, PREFILL), single, bench.limits("near"))
    yield isolated(candidate, bench.ids)
    yield tracing(candidate, bench.ids)


def against(
    name: str, reference: Trace, candidate: Trace, limits: Mapping[str, float], *, fewest: int = PREFILL
) -> Part:
    """Compare two traces under limits per name; near-ties are what the limit on the logits lets rounding overturn."""
    layers = 1 + max((int(n.split(".")[1]) for n in reference if n.startswith("layers.")), default=-1)
    logits = reference.get(LOGITS)  # the candidate's own prefill may be the reference, and may have said nothing
    tau = 0.0 if logits is None else decisive_margin(logits, limits[LOGITS])
    report = compare(reference, candidate, expect=mandatory_names(layers), tau=tau)
    verdict, reason = report.judge(limits, fewest=fewest if logits is None else min(fewest, len(logits)))
    over = report.only(*limits).over(limits) if report.names else None
    return Part(name, verdict, reason, report.compared, report, report.first_divergence(limits), over)


def rows(trace: Trace, first: int, last: int | None) -> Trace:
    """Return the positions ``first`` to ``last`` of a trace."""
    part = Trace()
    for name, values in trace.items():
        part.record(name, values[first:last])
    return part


def isolated(candidate: TracedForward, ids: Ids) -> Part:
    """
    Run A, B, A, then A and B in turn through their own caches; count the logits of A whose bits change.

    A backend that keeps anything between forwards outside the cache gives A another answer the second time.
    """
    a, b = ids[:PREFILL], ids[:PREFILL][::-1].copy()
    alone = [candidate.forward(a), candidate.forward(b), candidate.forward(a)]
    half = a.size // 2
    alone_steps, turns = _steps(candidate, [a], half)[0], _steps(candidate, [a, b], half)[0]
    compared = alone[0].size + turns.size
    for first, again in ((alone[0], alone[2]), (alone_steps, turns)):
        if first.shape != again.shape:
            return Part("isolation", Verdict.FALSIFIED, f"{again.shape} after B, {first.shape} before", 0)
    differing = int((bits(alone[0]) != bits(alone[2])).sum()) + int((bits(alone_steps) != bits(turns)).sum())
    reason = f"{differing} of {compared} logits of A change after B" if differing else ""
    if not compared:
        reason = f"no logits of {a.size} tokens"
    return Part("isolation", _verdict(differing, compared), reason, compared)


def tracing(candidate: TracedForward, ids: Ids) -> Part:
    """Count logits whose bits depend on tracing, full or as fingerprints, in a prefill and in greedy cached steps."""
    prompt, differing, compared = ids[:PREFILL], 0, 0
    runs = []
    for kind in (None, Trace, Fingerprints):
        cache, feed, seen = candidate.new_cache(), prompt, []
        for _ in range(9):
            logits = candidate.forward(feed, cache, None if kind is None else kind())
            if not len(logits):
                return Part("tracing", Verdict.INCONCLUSIVE, f"no logits of {feed.size} tokens", 0)
            seen.append(logits)
            feed = np.array([logits[-1].argmax()], np.int64)
        runs.append(np.concatenate(seen))
    for traced in runs[1:]:
        if traced.shape != runs[0].shape:
            return Part("tracing", Verdict.FALSIFIED, f"{traced.shape} with tracing, {runs[0].shape} without", 0)
        differing += int((bits(traced) != bits(runs[0])).sum())
        compared += traced.size
    reason = f"{differing} of {compared} logits depend on tracing" if differing else ""
    return Part("tracing", _verdict(differing, compared), reason, compared)


def bits(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """View float32 as bits, so that NaN equals itself and 0 does not equal -0."""
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def _verdict(differing: int, compared: int) -> Verdict:
    if not compared:
        return Verdict.INCONCLUSIVE
    return Verdict.FALSIFIED if differing else Verdict.CORROBORATED


def _steps(model: TracedForward, streams: list[Ids], prompt: int) -> list[NDArray[np.float32]]:
    """Feed several streams in turn, each through its own cache: a prompt, then single tokens."""
    caches = [model.new_cache() for _ in streams]
    out: list[list[NDArray[np.float32]]] = [[] for _ in streams]
    edges = [0, *range(prompt, streams[0].size + 1)]
    for first, last in pairwise(edges):
        for at, ids in enumerate(streams):
            out[at].append(model.forward(ids[first:last], caches[at]))
    return [np.concatenate(parts) for parts in out]

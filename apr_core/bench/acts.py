"""
The measurements of notebook 30: one timed run, and nine attempts to show that its rate means nothing.

How many repeats and tokens are timed follows from the size of the model, never from the clock: the counts in the
compared lines must be the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from apr_core.bench.profile import profile_model
from apr_core.bench.roofline import Bandwidth, Roofline, TokenBytes, architecture_bytes, bytes_per_token
from apr_core.bench.throughput import Plan, couple
from apr_core.bench.timing import DecodeRun, PrefillRun, clock_tick_s, measure_decode, measure_prefill
from apr_core.bench.versus import Comparison, cost_of_rounding, interleave, rounds_activations
from apr_core.contract.layout import HEAD, Geometry
from apr_core.engines.load import build, load_model
from apr_core.engines.subject import Subject
from apr_core.falsify.claims import load_claims
from apr_core.falsify.finding import Finding, act
from apr_core.falsify.verdict import holds
from apr_core.model.tokens import PreparedTokens
from apr_core.model.trace import TracedForward
from apr_core.parity.acts import decision_limit
from apr_core.parity.distribution import top_margin
from apr_core.parity.tolerances import decisive_margin, forward_limit

PROMPT = 32
PREFILL = 64
DELAYED_TOKENS = 8
SHORTEST_DELAY_S = 0.002
CONTEXTS = (128, 1024, 4000)
STEPS = 4


@dataclass(frozen=True)
class Effort:
    """How much is timed: repeats, and tokens in each."""

    repeats: int
    tokens: int


@dataclass(frozen=True, eq=False)
class TimedRun:
    """
    Everything that was timed of one subject, and what the timed code produced.

    Attributes:
        effort: What was asked for.
        prompt: The prompt of the decode.
        decode: The timed decode; the ceiling was measured between its repeats.
        prefill: The timed prefill.
        mismatched: Values of each timed prefill that differ from an untimed one.
        values: Values in one prefill's logits.
        token_bytes: What one token reads.
        roofline: The measured ceiling.
        tick_s: The smallest step that the clock shows.
    """

    effort: Effort
    prompt: PreparedTokens
    decode: DecodeRun
    prefill: PrefillRun
    mismatched: tuple[int, ...]
    values: int
    token_bytes: TokenBytes
    roofline: Roofline
    tick_s: float
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


_runs: WeakKeyDictionary[Subject, TimedRun] = WeakKeyDictionary()


def timed_run(subject: Subject) -> TimedRun:
    """Time the subject once; nine claims and the figures speak about the same run."""
    if subject not in _runs:
        _runs[subject] = _time(subject)
    return _runs[subject]


def effort(parameters: int) -> Effort:
    """Choose repeats and tokens by size, so that a half-billion model on two cores stays within a minute."""
    if parameters < 50_000_000:
        return Effort(repeats=5, tokens=32)
    return Effort(repeats=3, tokens=16) if parameters < 1_000_000_000 else Effort(repeats=2, tokens=8)


@act("F-THR-001")
def bytes_accounted_for(subject: Subject) -> Finding:
    """Hold the bytes of the tensor table against the sum that the architecture's formulas give."""
    geometry, tensors = _geometry(subject), subject.checkpoint.tensors
    table = sum(t.nbytes for n, t in tensors.items() if not (geometry.tied and n == HEAD))
    formula = architecture_bytes({name: info.dtype for name, info in tensors.items()}, geometry)
    once = bytes_per_token(tensors, geometry)
    return Finding(
        value=float(abs(table - formula)),
        compared=len(tensors),
        expected=len(tensors),
        detail=f"{table} bytes stored, {once.stored} of them per token",
        rows=[
            {"count": "tensor table", "bytes": table},
            {"count": "architecture", "bytes": formula},
            {"count": "per token, stored types", "bytes": once.stored},
            {"count": "per token, as float32", "bytes": once.read()},
        ],
        whys=[("How many bytes are unexplained?", f"{table - formula} of {table}")] if table != formula else (),
        reference="formulas of the architecture",
    )


@act("F-THR-002")
def clock_sees_a_token(subject: Subject) -> Finding:
    """Divide the shortest timed sample by the smallest step that the clock shows."""
    run = timed_run(subject)
    samples = [run.decode.steps, run.decode.ttft, run.prefill.seconds]
    shortest = min((s.minimum for s in samples if s.n), default=float("nan"))
    return Finding(
        value=shortest / run.tick_s,
        compared=sum(s.n for s in samples),
        expected=run.effort.repeats * (run.effort.tokens + 1),
        rows=[{"shortest_sample_s": shortest, "tick_s": run.tick_s}],
        whys=_why("F-THR-002", shortest / run.tick_s, f"{shortest:.3g} s at a tick of {run.tick_s:.3g} s"),
        reference="the clock itself",
    )


@act("F-THR-003")
def timed_tokens_are_right(subject: Subject) -> Finding:
    """Ask an untimed prefill, which knows no cache, at each timed token which one is right."""
    run = timed_run(subject)
    return _right_tokens(subject, run.prompt, run.decode, "the same model without cache or clock")


@act("F-THR-004")
def timed_prefill_is_right(subject: Subject) -> Finding:
    """Compare the bits of each timed prefill's logits with those of an untimed one."""
    run = timed_run(subject)
    wrong = sum(run.mismatched)
    return Finding(
        value=float(wrong),
        compared=run.values * len(run.mismatched),
        expected=run.values * run.effort.repeats,
        detail=f"{len(run.mismatched)} prefills of {run.prefill.tokens} tokens",
        whys=[("In which repeats?", f"values that differ, by repeat: {list(run.mismatched)}")] if wrong else (),
        reference="the same prefill, untimed",
    )


@act("F-THR-005")
def no_sample_is_missing(subject: Subject) -> Finding:
    """Count the samples and tokens that were asked for and are not there, or took no time."""
    run = timed_run(subject)
    repeats, tokens = run.effort.repeats, run.effort.tokens
    counts = {
        "decode steps": (repeats * (tokens - 1), _lasting(run.decode.steps.seconds)),
        "first tokens": (repeats, _lasting(run.decode.ttft.seconds)),
        "tokens": (repeats * tokens, sum(len(made) for made in run.decode.tokens)),
        "prefills": (repeats, _lasting(run.prefill.seconds.seconds)),
    }
    rows = [{"what": what, "asked": asked, "there": there} for what, (asked, there) in counts.items()]
    missing = sum(abs(asked - there) for asked, there in counts.values())
    asked = sum(asked for asked, _ in counts.values())
    return Finding(
        value=float(missing),
        compared=asked,
        expected=asked,
        detail=f"{repeats} repeats of {tokens} tokens",
        rows=rows,
        whys=_why("F-THR-005", missing, "; ".join(f"{r['what']}: {r['there']} of {r['asked']}" for r in rows)),
        reference="what was asked for",
    )


@act("F-THR-006")
def no_faster_than_the_machine(subject: Subject) -> Finding:
    """Hold the bandwidth that the median decode step implies against the best that a read of this size reached."""
    run = timed_run(subject)
    rate, roofline = run.decode.decode_tok_s, run.roofline
    low, high = run.decode.steps.median_interval(seed=subject.seed)
    mbu, implied = roofline.mbu(rate), rate * roofline.read_bytes / 1e9
    return Finding(
        value=mbu,
        compared=run.decode.steps.n,
        expected=run.effort.repeats * (run.effort.tokens - 1),
        rows=[
            {"quantity": "decode_tok_s", "value": rate},
            {"quantity": "tpot_s median", "value": run.decode.tpot_s},
            {"quantity": "tpot_s 95 % low", "value": low},
            {"quantity": "tpot_s 95 % high", "value": high},
            {"quantity": "ttft_s median", "value": run.decode.ttft.median},
            {"quantity": "prefill_tok_s", "value": run.prefill.prefill_tok_s},
            {"quantity": "bytes read per token (float32)", "value": roofline.read_bytes},
            {"quantity": "bytes stored per token", "value": run.token_bytes.stored},
            {"quantity": "read_gb_s, best", "value": roofline.read_gb_s},
            {"quantity": "ceiling_tok_s", "value": roofline.ceiling_tok_s},
        ],
        arrays=run.arrays,
        whys=_why("F-THR-006", mbu, f"{implied:.3g} GB/s of {roofline.read_gb_s:.3g}"),
        reference="read bandwidth of a buffer of the same size, measured between the repeats",
    )


@act("F-THR-007")
def parts_fit_the_whole(subject: Subject) -> Finding:
    """Add up the timed samples, and subtract the wall clock around them."""
    run = timed_run(subject)
    decode, prefill = run.decode, run.prefill
    parts = {
        "decode": (float(decode.steps.seconds.sum() + decode.ttft.seconds.sum()), decode.wall_s),
        "prefill": (float(prefill.seconds.seconds.sum()), prefill.wall_s),
    }
    # Up to one nanosecond per sample is the rounding of this sum, not time.
    rounding = 1e-9 * decode.steps.n
    excess = max(inside - outside for inside, outside in parts.values())
    value = 0.0 if excess <= rounding else excess
    return Finding(
        value=value,
        compared=decode.steps.n + decode.ttft.n + prefill.seconds.n,
        expected=run.effort.repeats * (run.effort.tokens + 1),
        rows=[{"part": part, "samples_s": inside, "wall_s": outside} for part, (inside, outside) in parts.items()],
        whys=_why("F-THR-007", value, f"the samples exceed the whole by {excess:.3g} s"),
        reference="one clock around all samples",
    )


@act("F-THR-008")
def planted_delay_is_seen(subject: Subject) -> Finding:
    """Sleep inside each step for three times its median, and look for the sleep in the shortest sample."""
    run = timed_run(subject)
    delay_s = max(SHORTEST_DELAY_S, 3 * run.decode.tpot_s)
    slowed = measure_decode(
        subject.model, run.prompt, max_new_tokens=DELAYED_TOKENS, repeats=1, warmup=0, delay_s=delay_s
    )
    share = slowed.steps.minimum / delay_s
    return Finding(
        value=share,
        compared=slowed.steps.n,
        expected=DELAYED_TOKENS - 1,
        rows=[{"delay_s": delay_s, "shortest_s": slowed.steps.minimum, "undelayed_s": run.decode.tpot_s}],
        arrays={"slowed_s_per_token": slowed.steps.seconds},
        whys=_why("F-THR-008", share, f"{share:.3g} of the delay shows in the shortest sample"),
        reference="a sleep of known length",
    )


@act("F-THR-009")
def cuda_tokens_are_right(subject: Subject) -> Finding:
    """Ask an untimed prefill on the CPU at each token of a timed CUDA decode which one is right."""
    cuda = load_model(subject.path, device="cuda")
    size = effort(_elements(subject))
    prompt = subject.stimulus(_prompt_length(subject, size.tokens))
    run = measure_decode(cuda, prompt, max_new_tokens=size.tokens, repeats=size.repeats)
    finding = _right_tokens(subject, prompt, run, "the same model on the CPU")
    return (
        finding
        if cuda.device.startswith("cuda")
        else Finding(None, 0, finding.expected, inconclusive=f"the CUDA side ran on {cuda.device}")
    )


@act("F-THR-010")
def compiled_tokens_are_right(subject: Subject) -> Finding:
    """Time the compiled engine, and ask the reference at each of its tokens which one is right."""
    engine = build(subject.admission, precision="speed")
    size = effort(_elements(subject))
    prompt = subject.stimulus(_prompt_length(subject, size.tokens)).ids
    longest = engine.config.max_position_embeddings
    far = CONTEXTS if _elements(subject) < 50_000_000 else CONTEXTS[:1]
    contexts = tuple(length for length in far if length + STEPS <= longest)
    plan = Plan(int(prompt.size), size.tokens, size.repeats, contexts, STEPS)
    run = interleave(engine, prompt, plan, threads=1, peers=[], elements=_elements(subject))
    split = profile_model(engine, subject.admission, Plan(int(prompt.size), size.tokens, 1), threads=1)
    moved = cost_of_rounding(subject.admission, subject.model) if rounds_activations(engine) else 0.0
    found = {made: couple(subject.model, prompt, made, moved) for made in set(run.timed.tokens)}
    wrong = [(repeat, step) for repeat, made in enumerate(run.timed.tokens) for step in found[made][0]]
    lost = sum(abs(size.tokens - len(made)) for made in run.timed.tokens)
    elsewhere = "" if engine.device == "cpu" else f"it ran on {engine.device}"
    return Finding(
        value=float(len(wrong) + lost),
        compared=sum(found[made][1] for made in run.timed.tokens),
        expected=size.repeats * size.tokens,
        detail=f"{size.repeats} repeats of {size.tokens} tokens",
        inconclusive=elsewhere,
        rows=_speed_rows(run, split, _elements(subject)),
        arrays={
            "compiled_s_per_token": run.timed.steps.seconds,
            "bandwidth_gb_s": run.bandwidth,
            "context_tokens": np.array(list(run.timed.at_context)),
            "context_s": np.array([samples.median for samples in run.timed.at_context.values()]),
        },
        whys=[("Which token is wrong first?", f"{wrong[:1] or 'none; tokens are missing'}")] if wrong or lost else (),
        reference="the float32 reference, without cache or clock, teacher-forced",
    )


def _speed_rows(run: Comparison, split: dict[str, Any], elements: int) -> list[dict[str, object]]:
    """What the figures and the table of the compiled engine need; no row of it is compared."""
    timed = run.timed
    rows: list[dict[str, object]] = [
        {"quantity": "backend", "value": timed.backend},
        {"quantity": "decode_tok_s", "value": timed.decode_tok_s},
        {"quantity": "prefill_tok_s", "value": timed.prefill_tok_s},
        {"quantity": "read_gb_s, best", "value": run.read_gb_s},
        {"quantity": "ceiling_tok_s", "value": run.read_gb_s * 1e9 / run.read_bytes},
        {"quantity": "share of the ceiling", "value": run.share_of_ceiling},
        {"quantity": "bytes per token", "value": run.read_bytes},
        {"quantity": "operations per token", "value": 2 * elements},
        {"quantity": "prompt", "value": timed.plan.prefill},
    ]
    rows += [{"quantity": f"MB per token in {t['type']}", "value": t["bytes_per_token"] / 1e6} for t in split["types"]]
    rows += [{"quantity": f"ms: {p['phase']}", "value": p["decode_ms_per_token"]} for p in split["phases"]]
    return rows


def _time(subject: Subject) -> TimedRun:
    model, geometry = subject.model, _geometry(subject)
    size = effort(_elements(subject))
    prompt = subject.stimulus(_prompt_length(subject, size.tokens))
    token_bytes = bytes_per_token(subject.checkpoint.tensors, geometry)
    ceiling = Bandwidth(token_bytes.read())
    decode = measure_decode(model, prompt, max_new_tokens=size.tokens, repeats=size.repeats, between=ceiling.sample)
    ceiling.sample()
    text = subject.stimulus(min(PREFILL, model.config.max_position_embeddings))
    untimed = model.forward(text.ids)
    mismatched: list[int] = []
    prefill = measure_prefill(
        model, text, repeats=size.repeats, seen=lambda logits: mismatched.append(_mismatches(untimed, logits))
    )
    roofline = ceiling.roofline()
    return TimedRun(
        effort=size,
        prompt=prompt,
        decode=decode,
        prefill=prefill,
        mismatched=tuple(mismatched),
        values=untimed.size,
        token_bytes=token_bytes,
        roofline=roofline,
        tick_s=clock_tick_s(),
        arrays={
            "decode_s_per_token": decode.steps.seconds,
            "prefill_s": prefill.seconds.seconds,
            "bandwidth_gb_s": roofline.samples_gb_s,
        },
    )


def _right_tokens(subject: Subject, prompt: PreparedTokens, run: DecodeRun, reference: str) -> Finding:
    """
    Count tokens that a forward without a cache would not have chosen, near-ties excused.

    Each repeat is read as it was produced, so by induction it is the greedy path; repeats that agree are read once.
    """
    known = {made: _wrong_steps(subject.model, prompt, made, forward_limit()) for made in set(run.tokens)}
    if any(known.values()):  # what rounding alone explains in this model is measured only now: it costs a forward
        known = {made: _wrong_steps(subject.model, prompt, made, decision_limit(subject)) for made in known}
    wrong = [(repeat, step) for repeat, made in enumerate(run.tokens) for step in known[made]]
    lost = run.asked_repeats * run.asked_tokens - sum(len(made) for made in run.tokens)
    first = f"token {wrong[0][1]} of repeat {wrong[0][0]}" if wrong else "none; tokens are missing"
    return Finding(
        value=float(len(wrong) + abs(lost)),
        compared=sum(len(made) for made in run.tokens),
        expected=run.asked_repeats * run.asked_tokens,
        detail=f"{run.asked_repeats} repeats of {run.asked_tokens} tokens",
        rows=[{"repeat": repeat, "step": step} for repeat, step in wrong],
        whys=[("Which token is wrong first?", first)] if wrong or lost else (),
        reference=reference,
    )


def _wrong_steps(model: TracedForward, prompt: PreparedTokens, made: Sequence[int], limit: float) -> list[int]:
    if not made:
        return []
    logits = model.forward(np.concatenate([prompt.ids, np.asarray(made[:-1], np.int64)]))[prompt.ids.size - 1 :]
    decisive = ~(top_margin(logits) <= decisive_margin(logits, limit))
    return [int(step) for step in np.flatnonzero((logits.argmax(axis=1) != np.asarray(made)) & decisive)]


def _mismatches(untimed: NDArray[np.float32], timed: NDArray[np.float32]) -> int:
    """Count values whose bits differ; another shape differs everywhere."""
    if untimed.shape != timed.shape:
        return max(untimed.size, timed.size)
    return int((np.ascontiguousarray(untimed).view(np.uint32) != np.ascontiguousarray(timed).view(np.uint32)).sum())


def _lasting(seconds: NDArray[np.float64]) -> int:
    """Samples that took time; one of zero or negative seconds timed nothing."""
    return int((seconds > 0).sum())


def _why(claim_id: str, value: float, answer: str) -> list[tuple[str, str]]:
    """Give the answer where the value breaks the limit of its claim."""
    claim = load_claims()[claim_id]
    question = f"Why is {claim.metric} beyond its limit?"
    return [] if holds(value, claim.direction, claim.threshold) else [(question, answer)]


def _geometry(subject: Subject) -> Geometry:
    geometry = subject.admission.geometry
    assert geometry is not None  # a file without one is refused, and `act` leaves it alone
    return geometry


def _elements(subject: Subject) -> int:
    return sum(int(np.prod(t.shape, dtype=np.int64)) for t in subject.checkpoint.tensors.values())


def _prompt_length(subject: Subject, tokens: int) -> int:
    return max(1, min(PROMPT, subject.model.config.max_position_embeddings - tokens))

"""
The measurements of notebook 30: one timed run of the engine that `apr run` takes, and attempts to show that its rate
means nothing. `apr bench` asks the same claims of its own runs.

How many repeats and tokens are timed follows from the size of the model, never from the clock: the counts in the
compared lines must be the same on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from apr_core.bench.claimed import WRONG_TOKENS, Claimed, judge_claim, parse_claim
from apr_core.bench.profile import profile_model, shortfall
from apr_core.bench.roofline import architecture_bytes, bytes_per_token
from apr_core.bench.throughput import Plan, couple, measure
from apr_core.bench.timing import clock_tick_s
from apr_core.bench.versus import Comparison, cost_of_rounding, interleave, open_peers
from apr_core.contract.layout import HEAD, Geometry
from apr_core.engines.load import load_model
from apr_core.engines.subject import Subject
from apr_core.falsify.claims import load_claims
from apr_core.falsify.finding import Finding, act
from apr_core.falsify.verdict import NotRun, Verdict, holds
from apr_core.kernels.cpu.features import available_cores
from apr_core.model.trace import TracedForward, last_logits
from apr_core.parity.acts import decision_limit
from apr_core.parity.floor import Rounding, rounding
from apr_core.peers.rates import RatedPeer, peer_kind

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

DELAYED_TOKENS = 8
SHORTEST_DELAY_S = 0.002
CONTEXTS = (128, 1024, 4000)
STEPS = 4
SMALL, LARGE = 50_000_000, 1_000_000_000


@dataclass(frozen=True, eq=False)
class TimedRun:
    """
    Everything that was timed of one engine, and what the timed code produced.

    Attributes:
        run: Samples, ceiling and peers, in turns.
        device: Where the engine ran, by its own word.
        rounds: How it rounds activations on purpose; None where it does not.
        prompt: int64 [tokens].
        untimed: Logits of the last prompt token, of a forward that nobody timed.
        profile: The time of a token by operation.
        tick_s: The smallest step that the clock shows.
        claims: What a person claimed.
        judged: Wrong steps by answer; filled by the first claim that asks.
    """

    run: Comparison
    device: str
    rounds: Rounding | None
    prompt: Ints
    untimed: Floats
    profile: Mapping[str, Any]
    tick_s: float
    claims: Sequence[tuple[str, float]] = ()
    judged: dict[tuple[int, ...], tuple[list[int], int]] = field(default_factory=dict)


_claimed: WeakKeyDictionary[Subject, tuple[tuple[str, float], ...]] = WeakKeyDictionary()
_runs: WeakKeyDictionary[Subject, TimedRun] = WeakKeyDictionary()


def ask(subject: Subject, *, peers: str = "", claims: str = "") -> None:
    """
    Note what the rates of a subject shall be held against, before anything is timed.

    Args:
        subject: Of notebook 30.
        peers: Names as `open_peers` takes them, separated by commas; empty for none.
        claims: ``decode_tok_s=285.5`` and the like, separated by commas; empty for none.

    Raises:
        UsageError: A claim of no known metric, or no such peer.
    """
    for name in _listed(peers):
        peer_kind(name)
    _claimed[subject] = tuple(parse_claim(text) for text in _listed(claims))
    subject.peers = _listed(peers)


def timed_run(subject: Subject) -> TimedRun:
    """Time the subject once; all claims and the figures speak about the same run."""
    if subject not in _runs:
        elements = count_elements(subject)
        plan = plan_for(elements, subject.engine.config.max_position_embeddings)
        opened, absent = open_peers(subject.peers, subject.path, elements)
        prompt = subject.stimulus(plan.prefill).ids
        keep(
            subject,
            time_engine(
                subject, subject.engine, prompt, plan, threads=available_cores(), peers=opened, absent=absent,
                claims=claimed_of(subject),
            ),
        )  # fmt: skip
    return _runs[subject]


def claimed_of(subject: Subject) -> tuple[tuple[str, float], ...]:
    """Return what was claimed about a subject, as `ask` noted it."""
    return _claimed.get(subject, ())


def keep(subject: Subject, run: TimedRun) -> None:
    """Let the claims about a subject speak about this run."""
    _runs[subject] = run


def time_engine(
    subject: Subject,
    engine: TracedForward,
    prompt: Ints,
    plan: Plan,
    *,
    threads: int,
    peers: Sequence[RatedPeer] = (),
    absent: Mapping[str, str] | None = None,
    claims: Sequence[tuple[str, float]] = (),
) -> TimedRun:
    """
    Time an engine of a subject by a plan, beside its ceiling and its peers, and split its time.

    Raises:
        UsageError: The plan does not fit the model, or threads do not fit the machine.
        InferenceError: Of the engine or a peer.
    """
    plan.require(engine.config.max_position_embeddings)
    untimed = last_logits(engine, prompt)
    run = interleave(
        engine, prompt, plan, threads=threads, peers=peers, elements=count_elements(subject), absent=absent
    )
    short = Plan(min(plan.prefill, 64), min(plan.decode, 16), 1)
    return TimedRun(
        run=run,
        device=engine.device,
        rounds=rounding(subject.admission.require(), getattr(engine, "precision", "exact"), engine.device),
        prompt=prompt,
        untimed=untimed,
        profile=profile_model(engine, subject.admission, short, threads=threads),
        tick_s=clock_tick_s(),
        claims=claims,
    )


def plan_for(elements: int, longest: int) -> Plan:
    """Choose repeats, tokens and contexts by the size of a model, so that a half-billion one stays near a minute."""
    prefill, decode, repeats = (64, 32, 5) if elements < SMALL else (512, 32, 3)
    if elements >= LARGE:
        decode = 16
    decode = min(decode, max(2, longest - 1))
    prefill = max(1, min(prefill, longest - decode))
    far = CONTEXTS if elements < LARGE else CONTEXTS[:2]
    return Plan(prefill, decode, repeats, tuple(n for n in far if n + STEPS <= longest), STEPS)


@act("F-THR-001")
def bytes_accounted_for(subject: Subject) -> Finding:
    """Hold the bytes of the tensor table against the sum that the architecture's formulas give."""
    geometry, tensors = _geometry(subject), subject.checkpoint.tensors
    kept = {name: info for name, info in tensors.items() if not (geometry.tied and name == HEAD)}
    table = sum(info.nbytes for info in kept.values())
    formula = architecture_bytes({name: info.dtype for name, info in tensors.items()}, geometry)
    once = bytes_per_token(tensors, geometry)
    kinds = sorted({str(info.dtype) for info in kept.values()})
    by_type = {kind: sum(t.nbytes for t in kept.values() if str(t.dtype) == kind) for kind in kinds}
    return Finding(
        value=float(abs(table - formula)),
        compared=len(tensors),
        expected=len(tensors),
        detail=f"{table} bytes stored, {once.stored} of them per token",
        rows=[
            {"count": "tensor table", "bytes": table},
            {"count": "architecture", "bytes": formula},
            *({"count": f"in {kind}", "bytes": nbytes} for kind, nbytes in by_type.items()),
            {"count": "per token, stored types", "bytes": once.stored},
            {"count": "per token, as float32", "bytes": once.read()},
        ],
        whys=[("How many bytes are unexplained?", f"{table - formula} of {table}")] if table != formula else (),
        reference="formulas of the architecture",
    )


@act("F-THR-002")
def clock_sees_a_token(subject: Subject) -> Finding:
    """Divide the shortest timed sample by the smallest step that the clock shows."""
    made = timed_run(subject)
    timed, tick_s = made.run.timed, made.tick_s
    samples = [timed.steps, timed.ttft, timed.prefill]
    shortest = min((s.minimum for s in samples if s.n), default=float("nan"))
    ticks = shortest / tick_s if tick_s > 0 else float("nan")
    return Finding(
        value=ticks,
        compared=sum(s.n for s in samples),
        expected=timed.plan.repeats * (timed.plan.decode + 1),
        rows=[
            {"quantity": "shortest sample, s", "value": shortest},
            {"quantity": "tick of the clock, s", "value": tick_s},
            {"quantity": "ceiling_tok_s", "value": made.run.ceiling_tok_s},
        ],
        arrays={"decode_s_per_token": timed.steps.seconds, "prefill_s": timed.prefill.seconds},
        whys=_why("F-THR-002", ticks, f"{shortest:.3g} s at a tick of {tick_s:.3g} s"),
        reference="the clock itself",
    )


@act("F-THR-003")
def timed_tokens_are_right(subject: Subject) -> Finding:
    """Ask the reference, which knows no cache and no clock, at each timed token which one is right."""
    made = timed_run(subject)
    plan, tokens = made.run.timed.plan, made.run.timed.tokens
    found = _judged(subject, made)
    elsewhere = "" if made.device == "cpu" else f"it ran on {made.device}"
    return _right_tokens(plan, tokens, found, "the float32 reference, teacher-forced, untimed", elsewhere)


@act("F-THR-004")
def timed_prefill_is_right(subject: Subject) -> Finding:
    """Compare the bits of each timed prompt's logits with those of an untimed one."""
    made = timed_run(subject)
    wrong = [_mismatches(made.untimed, logits) for logits in made.run.timed.logits]
    return Finding(
        value=float(sum(wrong)),
        compared=made.untimed.size * len(wrong),
        expected=made.untimed.size * made.run.timed.plan.repeats,
        detail=f"{len(wrong)} prefills of {made.run.timed.plan.prefill} tokens",
        whys=[("In which repeats?", f"values that differ, by repeat: {wrong}")] if any(wrong) else (),
        reference="the same prefill, untimed",
    )


@act("F-THR-005")
def no_sample_is_missing(subject: Subject) -> Finding:
    """Count the samples and tokens that were asked for and are not there, or took no time."""
    timed = timed_run(subject).run.timed
    plan = timed.plan
    counts = {
        "decode steps": (plan.repeats * (plan.decode - 1), _lasting(timed.steps.seconds)),
        "first tokens": (plan.repeats, _lasting(timed.ttft.seconds)),
        "tokens": (plan.repeats * plan.decode, sum(len(made) for made in timed.tokens)),
        "prefills": (plan.repeats, _lasting(timed.prefill.seconds)),
        "steps at a context": (
            len(plan.contexts) * plan.steps,
            sum(_lasting(samples.seconds) for samples in timed.at_context.values()),
        ),
    }
    rows = [{"what": what, "asked": asked, "there": there} for what, (asked, there) in counts.items()]
    missing = sum(abs(asked - there) for asked, there in counts.values())
    asked = sum(asked for asked, _ in counts.values())
    return Finding(
        value=float(missing),
        compared=asked,
        expected=asked,
        detail=f"{plan.repeats} repeats of {plan.decode} tokens",
        rows=rows,
        whys=_why("F-THR-005", missing, "; ".join(f"{r['what']}: {r['there']} of {r['asked']}" for r in rows)),
        reference="what was asked for",
    )


@act("F-THR-006")
def no_faster_than_the_machine(subject: Subject) -> Finding:
    """Hold the bandwidth that the median step implies against the best that a read of this size reached."""
    made = timed_run(subject)
    run, plan = made.run, made.run.timed.plan
    beyond = run.share_of_ceiling - run.spread
    at = run.timed.at_context
    implied = run.timed.decode_tok_s * run.read_bytes / 1e9
    return Finding(
        value=beyond,
        compared=run.timed.steps.n,
        expected=plan.repeats * (plan.decode - 1),
        rows=_speed_rows(made, count_elements(subject)),
        arrays={
            "bandwidth_gb_s": run.bandwidth,
            "context_tokens": np.array(list(at)),
            "context_s": np.array([samples.median for samples in at.values()]),
        },
        whys=_why("F-THR-006", beyond, f"{implied:.3g} GB/s of {run.read_gb_s:.3g}, spread {run.spread:.2f}"),
        reference="read bandwidth of a buffer of the same size, measured between the repeats",
    )


@act("F-THR-007")
def parts_fit_the_whole(subject: Subject) -> Finding:
    """Add up the timed samples, and subtract the wall clock around them."""
    timed = timed_run(subject).run.timed
    inside = float(timed.steps.seconds.sum() + timed.ttft.seconds.sum())
    # Up to one nanosecond per sample is the rounding of this sum, not time.
    excess = inside - timed.wall_s
    value = 0.0 if excess <= 1e-9 * timed.steps.n else excess
    return Finding(
        value=value,
        compared=timed.steps.n + timed.ttft.n,
        expected=timed.plan.repeats * timed.plan.decode,
        rows=[{"samples_s": inside, "wall_s": timed.wall_s}],
        whys=_why("F-THR-007", value, f"the samples exceed the whole by {excess:.3g} s"),
        reference="one clock around all samples",
    )


@act("F-THR-008")
def planted_delay_is_seen(subject: Subject) -> Finding:
    """Sleep inside each step for three times its median, and look for the sleep in the shortest sample."""
    made = timed_run(subject)
    median = made.run.timed.steps.median
    delay_s = max(SHORTEST_DELAY_S, 3 * median)
    prompt = made.prompt[:DELAYED_TOKENS]
    plan = Plan(prompt.size, DELAYED_TOKENS, 1)
    slowed = measure(subject.engine, prompt, plan, warm_ups=0, delay_s=delay_s).steps
    share = slowed.minimum / delay_s
    return Finding(
        value=share,
        compared=slowed.n,
        expected=DELAYED_TOKENS - 1,
        rows=[{"delay_s": delay_s, "shortest_s": slowed.minimum, "undelayed_s": median}],
        arrays={"slowed_s_per_token": slowed.seconds},
        whys=_why("F-THR-008", share, f"{share:.3g} of the delay shows in the shortest sample"),
        reference="a sleep of known length",
    )


@act("F-THR-009")
def cuda_tokens_are_right(subject: Subject) -> Finding:
    """Ask an untimed prefill on the CPU at each token of a timed CUDA decode which one is right."""
    cuda = load_model(subject.path, device="cuda")
    plan = plan_for(count_elements(subject), cuda.config.max_position_embeddings)
    plan = Plan(plan.prefill, plan.decode, plan.repeats)
    prompt = subject.stimulus(plan.prefill).ids
    tokens = measure(cuda, prompt, plan).tokens
    found = {answer: _couple(subject, prompt, answer) for answer in set(tokens)}
    elsewhere = "" if cuda.device.startswith("cuda") else f"the CUDA side ran on {cuda.device}"
    return _right_tokens(plan, tokens, found, "the same model on the CPU", elsewhere)


@act("F-THR-011")
def no_slower_than_its_peers(subject: Subject) -> Finding:
    """Divide the rates by those of each fair peer, whose rounds took turns with ours."""
    made = timed_run(subject)
    run, ratios = made.run, made.run.ratios()
    rows: list[dict[str, object]] = [
        {
            "peer": row["name"],
            "build": row["build"],
            "features": row["features"],
            "threads": run.threads,
            "prompt": row["prompt"],
            "decode_tok_s": row["decode_tok_s"],
            "prefill_tok_s": row["prefill_tok_s"],
            "decode ratio": row["decode_ratio"] if row["fair"] else "not a fair peer",
            "prefill ratio": row["prefill_ratio"] if row["fair"] else "not a fair peer",
        }
        for row in run.peer_rows()
    ]
    rows += [{"peer": name, "build": reason} for name, reason in run.absent.items()]
    if not ratios:
        return Finding(None, 0, 0, not_run=NotRun.NO_PEER, rows=rows)
    least = min(min(pair) for pair in ratios.values())
    slower = [f"{name}: decode {d:.3g}, prefill {p:.3g}" for name, (d, p) in ratios.items() if not min(d, p) >= 1]
    return Finding(
        value=least,
        compared=2 * len(ratios),
        expected=2 * len(ratios),
        missing=[*run.absent, *(peer.name for peer, _ in run.peers if not peer.fair)],
        inconclusive=_void(subject, made),
        rows=rows,
        whys=[("Than which peer?", "; ".join(slower)), *shortfall(made.profile)] if slower else (),
        reference="each peer's own clock, in turns with ours",
    )


@act("F-THR-012")
def claimed_numbers_hold(subject: Subject) -> Finding:
    """Try to refute each claimed number, by the ceiling first; and two of our own, of which one must fall."""
    made = timed_run(subject)
    decode = made.run.timed.decode_tok_s
    controls = [("decode_tok_s", 2 * made.run.ceiling_tok_s, True), ("decode_tok_s", decode / 2, False)]
    misjudged = [
        claimed
        for metric, claimed, falls in controls
        if (judged_claim(made.run, metric, claimed, right=True).verdict is Verdict.FALSIFIED) is not falls
    ]
    right = not made.claims or not _void(subject, made)
    judged = [judged_claim(made.run, metric, claimed, right=right) for metric, claimed in made.claims]
    refuted = [item for item in judged if item.verdict is Verdict.FALSIFIED]
    undecided = [item for item in judged if item.verdict is Verdict.INCONCLUSIVE]
    whys = [(f"Why is {item.metric} not {item.claimed:g}?", item.reason) for item in refuted]
    return Finding(
        value=float(len(misjudged) + len(refuted)),
        compared=len(controls) + len(judged),
        expected=len(controls) + len(judged),
        detail=f"{len(judged)} claimed, {len(refuted)} refuted; {len(controls)} controls",
        inconclusive=undecided[0].reason if undecided and not refuted else "",
        rows=[item.row for item in judged],
        whys=[*whys[:1], *shortfall(made.profile)] if whys else (),
        reference="the ceiling and the samples of this run",
    )


def judged_claim(run: Comparison, metric: str, claimed: float, *, right: bool) -> Claimed:
    """Judge one claimed number by a run; ``right`` says whether its tokens are the right ones."""
    figures = run.timed.figures()
    interval = figures.get(f"{metric}_interval")
    if interval is None:
        interval = run.timed.ttft.median_interval() if metric == "ttft_s" else (figures[metric], figures[metric])
    low, high = interval
    return judge_claim(
        metric, claimed, figures[metric], (low, high),
        read_gb_s=run.read_gb_s, read_bytes=run.read_bytes, tokens_right=right,
    )  # fmt: skip


def wrong_tokens(subject: Subject, made: TimedRun) -> tuple[int, int]:
    """Return how many tokens of a run's different answers are wrong, and how many were compared."""
    found = _judged(subject, made).values()
    return sum(len(wrong) for wrong, _ in found), sum(compared for _, compared in found)


def count_elements(subject: Subject) -> int:
    """Parameters of the subject's file."""
    return sum(int(np.prod(t.shape, dtype=np.int64)) for t in subject.checkpoint.tensors.values())


def _void(subject: Subject, made: TimedRun) -> str:
    """Say why a rate of this run is no rate: wrong tokens, or none."""
    wrong, compared = wrong_tokens(subject, made)
    return WRONG_TOKENS if wrong or not compared else ""


def _judged(subject: Subject, made: TimedRun) -> Mapping[tuple[int, ...], tuple[list[int], int]]:
    """Judge each different answer once."""
    answers = set(made.run.timed.tokens)
    for answer in answers - set(made.judged):
        made.judged[answer] = _couple(subject, made.prompt, answer, made.rounds)
    return {answer: made.judged[answer] for answer in answers}


def _couple(
    subject: Subject, prompt: Ints, answer: tuple[int, ...], place: Rounding | None = None
) -> tuple[list[int], int]:
    """
    Judge an answer by the limit of float32; what rounding explains in this model is measured only where that fails.

    The answer is read as it was produced, so by induction it is the greedy path.
    """
    found = couple(subject.model, prompt, answer, 0.0)
    if not found[0]:
        return found
    moved = 0.0 if place is None else cost_of_rounding(subject.admission, subject.model, place)
    return couple(subject.model, prompt, answer, moved, decision_limit(subject))


def _right_tokens(
    plan: Plan,
    tokens: Sequence[tuple[int, ...]],
    found: Mapping[tuple[int, ...], tuple[list[int], int]],
    reference: str,
    elsewhere: str,
) -> Finding:
    """Count the tokens of all repeats that the reference would not have chosen, and those that are missing."""
    wrong = [(repeat, step) for repeat, answer in enumerate(tokens) for step in found[answer][0]]
    lost = sum(abs(plan.decode - len(answer)) for answer in tokens) + plan.decode * (plan.repeats - len(tokens))
    first = f"token {wrong[0][1]} of repeat {wrong[0][0]}" if wrong else "none; tokens are missing"
    return Finding(
        value=float(len(wrong) + lost),
        compared=sum(found[answer][1] for answer in tokens),
        expected=plan.repeats * plan.decode,
        detail=f"{plan.repeats} repeats of {plan.decode} tokens",
        inconclusive=elsewhere,
        rows=[{"repeat": repeat, "step": step} for repeat, step in wrong],
        whys=[("Which token is wrong first?", first)] if wrong or lost else (),
        reference=reference,
    )


def _speed_rows(made: TimedRun, elements: int) -> list[dict[str, object]]:
    """What the figures and the table of rates need; no row of it is compared."""
    run, timed, split = made.run, made.run.timed, made.profile
    low, high = timed.figures()["decode_tok_s_interval"]
    rows: list[dict[str, object]] = [
        {"quantity": "backend", "value": timed.backend},
        {"quantity": "threads", "value": run.threads},
        {"quantity": "decode_tok_s", "value": timed.decode_tok_s},
        {"quantity": "decode_tok_s 95 % low", "value": low},
        {"quantity": "decode_tok_s 95 % high", "value": high},
        {"quantity": "prefill_tok_s", "value": timed.prefill_tok_s},
        {"quantity": "ttft_s", "value": timed.ttft.median},
        {"quantity": "tpot_p99_s", "value": timed.p99_s},
        {"quantity": "read_gb_s, best", "value": run.read_gb_s},
        {"quantity": "ceiling_tok_s", "value": run.ceiling_tok_s},
        {"quantity": "share of the ceiling", "value": run.share_of_ceiling},
        {"quantity": "spread of the ceiling", "value": run.spread},
        {"quantity": "peak private MB", "value": None if timed.private_bytes is None else timed.private_bytes / 1e6},
        {"quantity": "bytes per token", "value": run.read_bytes},
        {"quantity": "operations per token", "value": 2 * elements},
        {"quantity": "prompt", "value": timed.plan.prefill},
    ]
    rows += [{"quantity": f"MB per token in {t['type']}", "value": t["bytes_per_token"] / 1e6} for t in split["types"]]
    rows += [{"quantity": f"ms: {p['phase']}", "value": p["decode_ms_per_token"]} for p in split["phases"]]
    for row in run.peer_rows():
        name = row["name"] if row["fair"] else f"{row['name']} (not a fair peer)"
        rows += [{"quantity": f"{rate} of {name}", "value": row[rate]} for rate in ("decode_tok_s", "prefill_tok_s")]
    return rows


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


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())

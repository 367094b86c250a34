"""The measurements of notebook 20: one per claim, each an attempt to refute it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from apr_core.engines.cuda import attest, weight_bytes
from apr_core.engines.load import ENGINES, build, load_model
from apr_core.engines.subject import Subject
from apr_core.errors import LoadError, Unavailable
from apr_core.falsify.claims import load_claims
from apr_core.falsify.finding import Finding, act
from apr_core.falsify.verdict import holds
from apr_core.model.trace import Trace, TracedForward, mandatory_names
from apr_core.parity import explain
from apr_core.parity.compare import LOGITS, ParityReport, compare
from apr_core.parity.distribution import DistributionParity, top_margin
from apr_core.parity.floor import FACTOR, Floor, honest_floor, noise_floor, path, rounding
from apr_core.parity.pair import Yardstick, incomparable, yardstick
from apr_core.parity.tolerances import CONTRACT, QUANTISED_TAU, allowed, decisive_margin, flip_budget

# One token at position 0 sees no RoPE, no mask, no second key and no cache; 64 positions see all of them.
POSITIONS = 96
FEWEST = 64
PROMPT = POSITIONS - FEWEST
# A share of flips needs more positions than a norm does.
BUDGET_POSITIONS = 256
# Tokens that the slow reference reads at once: it decodes every weight anew for each forward.
CHUNK = 64

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class AgainstReference:
    """
    The subject and a rounded copy of its reference, each held against the reference on the same tokens.

    ``found`` and ``price`` are the distributions out of ``subject`` and of the copy.
    """

    subject: ParityReport
    measure: Yardstick
    found: DistributionParity
    price: DistributionParity

    @property
    def copy(self) -> ParityReport:
        """The rounded copy against the reference."""
        return self.measure.report


_measured: WeakKeyDictionary[Subject, dict[str, Any]] = WeakKeyDictionary()


def _once(subject: Subject, key: str, measure: Callable[[Subject], T]) -> T:
    """Measure once per subject: four claims speak about the same pair of traces."""
    memory = _measured.setdefault(subject, {})
    if key not in memory:
        memory[key] = measure(subject)
    result: T = memory[key]
    return result


@act("F-PAR-001")
def same_logits(subject: Subject) -> Finding:
    """Hold the torch forward's logits against those of an independent numpy forward in float64."""
    report = _once(subject, "forwards", _two_forwards).only(LOGITS)
    return _rel_l2_finding(subject, report, "numpy in float64", _same_sides(subject))


@act("F-PAR-002")
def same_layers(subject: Subject) -> Finding:
    """Hold every traced activation of the torch forward against the independent one."""
    report = _once(subject, "forwards", _two_forwards)
    report = report.only(*(name for name in report.wanted if name != LOGITS))
    return _rel_l2_finding(subject, report, "numpy in float64", _same_sides(subject))


@act("F-PAR-003")
def cached_equals_prefill(subject: Subject) -> Finding:
    """Decode the stimulus token by token through the cache, teacher-forced, against one prefill of all of it."""
    report = _once(subject, "decode", _decode_against_prefill)
    return _rel_l2_finding(subject, report, f"{subject.model.backend}, one prefill")


@act("F-PAR-004")
def same_distribution(subject: Subject) -> Finding:
    """Take the largest KL over positions between the two independent forwards."""
    report = _once(subject, "forwards", _two_forwards).only(LOGITS)
    if report.logits is None:
        return _nothing(report)
    value = report.logits.kl_max
    broken = not holds(value, "at_most", load_claims()["F-PAR-004"].threshold)
    rounding = broken and report.required_tolerance <= decision_limit(subject)
    return Finding(
        value=value,
        compared=report.compared,
        expected=report.expected,
        nonfinite=report.nonfinite,
        rows=explain.distribution_rows(report.logits),
        arrays=explain.distribution_arrays(report.logits),
        whys=explain.why_distribution(report.logits) if broken else (),
        reference="numpy in float64",
        inconclusive=_same_sides(subject) or _worthless(report) or ("float32 cannot decide it" if rounding else ""),
    )


@act("F-PAR-005")
def same_top_token(subject: Subject) -> Finding:
    """Compare top tokens where no candidate within the limit of F-PAR-001 could overturn the reference's margin."""
    report = _once(subject, "forwards", _two_forwards).only(LOGITS)
    logits = report.logits
    if logits is None:
        return _nothing(report)
    decisive = int(logits.decisive.sum())
    return Finding(
        value=logits.top1_agreement,
        compared=decisive,
        expected=decisive,
        nonfinite=report.nonfinite,
        detail=f"{logits.kl.size - decisive} of {logits.kl.size} positions are near-ties",
        rows=explain.flip_rows(logits),
        arrays=explain.flip_arrays(logits),
        whys=explain.why_flips(logits),
        reference="numpy in float64",
        inconclusive=_same_sides(subject) or _worthless(report),
    )


@act("F-PAR-006")
def same_greedy_path(subject: Subject) -> Finding:
    """
    Let the candidate decode greedily, and ask the reference at each token which one it would have taken.

    The reference reads the candidate's path through its own cache, a chunk at a time: while they agree that is what it
    would have generated, at a fraction of the cost. At a near-tie the candidate's token stands, so that one coin toss
    does not end the comparison; another token at a decisive position is a mismatch.
    """
    prompt = _stimulus(subject, PROMPT)
    steps = max(0, min(subject.max_new_tokens, subject.model.config.max_position_embeddings - prompt.size))
    path, nonfinite = _greedy(subject.model, prompt, steps)
    wanted = _replay(subject.plain, prompt, path)
    differs, margins, taus = wanted.argmax(axis=1) != path, top_margin(wanted), _near_tie(subject, wanted)
    rows: list[dict[str, object]] = [
        {
            "step": int(step),
            "reference": int(wanted[step].argmax()),
            "candidate": int(path[step]),
            "margin": float(margins[step]),
            "near_tie": bool(margins[step] <= taus[step]),
        }
        for step in np.flatnonzero(differs)
    ]
    wrong = [row for row in rows if not row["near_tie"]]
    return Finding(
        value=float(len(wrong)),
        compared=steps,
        expected=subject.max_new_tokens,
        nonfinite=nonfinite,
        detail=f"after a prompt of {PROMPT}",
        rows=rows,
        arrays={"margin": margins, "tau": taus},
        whys=[("Which token differs first?", _flip_line(wrong[0]))] if wrong else (),
        reference="numpy in float64",
        inconclusive=_same_sides(subject),
    )


@act("F-PAR-007")
def tracing_changes_nothing(subject: Subject) -> Finding:
    """Compare the bits of the logits with tracing on, off, and as the trace itself holds them."""
    ids, trace = _stimulus(subject, POSITIONS), Trace()
    off, on = subject.model.forward(ids), subject.model.forward(ids, trace=trace)
    held = trace.get(LOGITS)
    if held is None or not off.shape == on.shape == held.shape:
        shapes = [list(x.shape) if x is not None else None for x in (off, on, held)]
        return Finding(None, 0, off.size, missing=[f"{LOGITS}: {shapes} off, on and traced"], reference="tracing off")
    differs = (_bits(off) != _bits(on)) | (_bits(off) != _bits(held))
    at = np.argwhere(differs)
    return Finding(
        value=float(len(at)),
        compared=off.size,
        expected=off.size,
        nonfinite=int((~np.isfinite(on)).sum()),
        detail=f"{len(trace)} names traced",
        whys=[("Where does it first differ?", f"at position {at[0][0]}, token {at[0][1]}")] if len(at) else (),
        reference="tracing off",
        inconclusive="both runs returned one array" if np.may_share_memory(off, on) else "",
    )


@act("F-PAR-008")
def distribution_of_reference(subject: Subject) -> Finding:
    """Hold mean KL and NMSE to the reference against what rounding to the subject's types costs this very model."""
    pair = _once(subject, "reference", _against_reference)
    if isinstance(pair, str):
        return Finding(None, 0, BUDGET_POSITIONS, inconclusive=pair)
    measure, ratios = pair.measure, pair.measure.ratios(pair.subject)
    # the bound decides where our encoder wrote the yardstick; noise in its place is wide enough as it is
    value = max(ratio if measure.unwritten else low for ratio, low, _ in ratios.values())
    return Finding(
        value=value,
        compared=pair.found.kl.size,
        expected=pair.subject.positions,
        nonfinite=pair.subject.only(LOGITS).nonfinite,
        rows=[*measure.rows(pair.subject), *explain.budget_rows(pair.subject, pair.copy)],
        arrays={**explain.distribution_arrays(pair.found), "kl_copy": pair.price.kl},
        whys=[("How far is it?", measure.said(pair.subject)), *_why_dear(pair)] if not value <= 1 else (),
        reference=str(_reference(subject).path),
        noise_floor=1 / measure.factor,
    )


@act("F-PAR-009")
def top_token_of_reference(subject: Subject) -> Finding:
    """Hold the share of decisive flips against that of the reference's noisy copy."""
    pair = _once(subject, "reference", _against_reference)
    if isinstance(pair, str):
        return Finding(None, 0, BUDGET_POSITIONS, inconclusive=pair)
    budget = flip_budget(pair.price)
    share, decisive = 1 - pair.found.top1_agreement, int(pair.found.decisive.sum())
    return Finding(
        value=share / budget.limit,
        compared=decisive,
        expected=decisive,
        nonfinite=pair.subject.only(LOGITS).nonfinite,
        detail=f"{pair.found.kl.size - decisive} of {pair.found.kl.size} positions are near-ties",
        rows=[
            {
                "name": "disagreement",
                "subject": share,
                "copy": 1 - pair.price.top1_agreement,
                "limit": budget.limit,
                "source": budget.source,
            }
        ],
        arrays=explain.flip_arrays(pair.found),
        whys=[*explain.why_flips(pair.found), *_why_dear(pair)] if not share <= budget.limit else (),
        reference=str(_reference(subject).path),
        noise_floor=(1 - pair.price.top1_agreement) / budget.limit,
    )


@act("F-PAR-010")
def cuda_equals_cpu(subject: Subject) -> Finding:
    """Hold every traced activation of the CUDA forward against the CPU's."""
    cuda = load_model(subject.path, device="cuda")
    report = _trace_both(subject, subject.model, cuda)
    # An engine that fell back in silence would agree with itself.
    doubt = attest(cuda, _stimulus(subject, POSITIONS), weight_bytes(subject.admission.require())).doubt
    return _rel_l2_finding(subject, report, "the same model on the CPU", doubt)


def floor(subject: Subject) -> Floor:
    """
    How far honest float32 arithmetic lies from float64 on this model, name by name: the source of the limits.

    The numpy forward measures it, in four orders of summation: neither the torch forward that is judged, nor CUDA.
    """
    return _once(subject, "floor", _honest_floor)


def _honest_floor(subject: Subject) -> Floor:
    ids = _stimulus(subject, POSITIONS)
    return honest_floor(subject.admission.require(), path(ids, ids.size))


def floor_rows(subject: Subject) -> list[dict[str, object]]:
    """Return the noise floor and the limit of each name; nothing for a refused model."""
    return [] if subject.refusal is not None else floor(subject).rows()


def backend_rows(subject: Subject) -> list[dict[str, object]]:
    """
    Hold every other engine of this processor against the reference on one prefill; nothing for a refused model.

    Where `speed` rounds activations on purpose it is held to what that costs the reference (0012).
    """
    if subject.refusal is not None:
        return []
    validated, ids, rows = subject.admission.require(), _stimulus(subject, POSITIONS), list[dict[str, object]]()
    run, names = path(ids, ids.size), mandatory_names(subject.model.config.num_hidden_layers)
    truth = run(subject.model)
    for precision in sorted(p for p, device in ENGINES if device == "cpu" and p != "reference"):
        place = rounding(validated, precision, "cpu")
        limits = (floor(subject) if place is None else noise_floor(validated, run, place)).limits
        try:
            found = run(build(subject.admission, precision=precision))
        except (Unavailable, LoadError) as error:
            rows.append({"engine": precision, "verdict": f"not available: {error}"})
            continue
        report = compare(truth, found, expect=names, tau=decisive_margin(truth[LOGITS], limits[LOGITS])).only(*names)
        verdict, _ = report.judge(limits, fewest=FEWEST)
        first = str(report.first_divergence(limits) or "none")
        worst = {"rel_l2": report.required_tolerance, "over_limit": report.over(limits)}
        rows.append({"engine": precision, "verdict": str(verdict), **worst, "first_divergence": first})
    return rows


def decision_limit(subject: Subject) -> float:
    """Limit on rel_l2 of the logits beyond which a forward of this subject is wrong and not merely rounded."""
    return allowed(floor(subject).limits[LOGITS])


def _near_tie(subject: Subject, logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Margins that rounding can overturn, per row."""
    return decisive_margin(logits, decision_limit(subject))


def _two_forwards(subject: Subject) -> ParityReport:
    return _trace_both(subject, subject.plain, subject.model)


def _trace_both(subject: Subject, reference: TracedForward, candidate: TracedForward) -> ParityReport:
    """Trace both forwards; near-ties are what the limit of F-PAR-001 lets rounding overturn."""
    ids, traces = _stimulus(subject, POSITIONS), (Trace(), Trace())
    logits = reference.forward(ids, trace=traces[0])
    candidate.forward(ids, trace=traces[1])
    names = mandatory_names(reference.config.num_hidden_layers)
    return compare(*traces, expect=names, tau=_near_tie(subject, logits)).only(*names)


def _decode_against_prefill(subject: Subject) -> ParityReport:
    model, ids = subject.model, _stimulus(subject, POSITIONS)
    whole = model.forward(ids)
    cache = model.new_cache()
    steps = [model.forward(ids[:PROMPT], cache)]
    steps += [model.forward(ids[at : at + 1], cache) for at in range(PROMPT, ids.size)]
    return compare({LOGITS: whole}, {LOGITS: np.concatenate(steps)}, expect=(LOGITS,), tau=_near_tie(subject, whole))


def _greedy(model: TracedForward, prompt: NDArray[np.int64], steps: int) -> tuple[NDArray[np.int64], int]:
    """Decode greedily through the cache, past end tokens; also count logits that are not finite."""
    cache, ids = model.new_cache(), prompt
    path, nonfinite = np.zeros(steps, np.int64), 0
    for step in range(steps):
        logits = model.forward(ids, cache)[-1]
        nonfinite += int((~np.isfinite(logits)).sum())
        path[step] = logits.argmax()
        ids = path[step : step + 1]
    return path, nonfinite


def _replay(model: TracedForward, prompt: NDArray[np.int64], path: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the logits that stood before each token of the path, read through the cache in chunks."""
    cache = model.new_cache()
    parts = [model.forward(prompt, cache)[-1:]]
    parts += [model.forward(path[at : min(at + CHUNK, path.size - 1)], cache) for at in range(0, path.size - 1, CHUNK)]
    return np.concatenate(parts)[: path.size]


def _against_reference(subject: Subject) -> AgainstReference | str:
    """Trace subject, reference and rounded copy on the same tokens, or say why that could mean nothing."""
    reference = _reference(subject)
    why_not = _no_second_side(subject, reference)
    if why_not:
        return why_not
    length = min(BUDGET_POSITIONS, *(s.model.config.max_position_embeddings for s in (subject, reference)))
    ids = reference.stimulus(length).ids
    truth, found = Trace(), Trace()
    reference.model.forward(ids, trace=truth)
    subject.model.forward(ids, trace=found)
    measure = yardstick(reference, subject.checkpoint, truth, ids, ids.size)
    names = mandatory_names(reference.model.config.num_hidden_layers)
    report = compare(truth, found, expect=names, tau=QUANTISED_TAU)
    if report.logits is None or measure.report.logits is None:
        return f"the logits were not compared: {', '.join(report.missing) or 'none of the copy'}"
    return AgainstReference(report, measure, report.logits, measure.report.logits)


def _no_second_side(subject: Subject, reference: Subject) -> str:
    """Say why subject and reference cannot be held against each other, or nothing."""
    if reference.refusal is None and subject.checkpoint.content_hash == reference.checkpoint.content_hash:
        return "subject and reference are the same bytes"
    return incomparable(reference, subject)


def _reference(subject: Subject) -> Subject:
    assert subject.reference is not None  # the claim needs it, so `act` has probed it
    return subject.reference


def _why_dear(pair: AgainstReference) -> list[tuple[str, str]]:
    return explain.why_over_budget(pair.subject, pair.copy)


def _rel_l2_finding(subject: Subject, report: ParityReport, reference: str, inconclusive: str = "") -> Finding:
    """Turn a report into a finding whose value is the largest ``rel_l2`` of any row over the limit of its name."""
    measured = floor(subject)
    limits = measured.limits
    whys = explain.why_rel_l2(report, limits)
    if whys and not report.nonfinite:
        whys.append(("How far is honest float32 from float64 here?", explain.floor_line(measured, report)))
    return Finding(
        value=report.over(limits),
        compared=report.compared,
        expected=report.expected,
        nonfinite=report.nonfinite,
        missing=report.missing,
        detail=f"{len(report.names)} names at {report.positions} positions" if len(report.names) > 1 else "",
        rows=explain.table(report, measured),
        arrays=explain.rel_l2_arrays(report, limits),
        whys=whys,
        reference=reference,
        noise_floor=1 / FACTOR,
        inconclusive=inconclusive or _worthless(report) or _undecidable(report, limits),
    )


def _undecidable(report: ParityReport, limits: Mapping[str, float]) -> str:
    """
    Say that float32 itself is beyond the contract on this model, and explains what was measured; or nothing.

    Large key biases do it: scores of thousands turn a rounding into another softmax.
    """
    within = all(n.required_tolerance <= allowed(limits[n.name]) for n in report.names.values())
    if not within or not report.required_tolerance > CONTRACT:
        return ""
    found = f"rel_l2 {report.required_tolerance:.1g} is what rounding alone can do to this model"
    return f"float32 cannot decide at {CONTRACT:g}: {found}"


def _nothing(report: ParityReport) -> Finding:
    return Finding(None, 0, report.expected, missing=report.missing, inconclusive="; ".join(report.missing))


def _same_sides(subject: Subject) -> str:
    plain, model = subject.plain, subject.model
    return f"both sides are the {model.backend} forward" if type(plain) is type(model) else ""


def _worthless(report: ParityReport) -> str:
    """Say why no agreement of this report could corroborate anything, or nothing."""
    if report.same_object:
        return "both sides are one object"
    return f"{report.positions} positions, at least {FEWEST} are needed" if report.positions < FEWEST else ""


def _stimulus(subject: Subject, tokens: int) -> NDArray[np.int64]:
    """Return ids, at most as many as the model has positions."""
    ids: NDArray[np.int64] = subject.stimulus(min(tokens, subject.model.config.max_position_embeddings)).ids
    return ids


def _flip_line(row: dict[str, object]) -> str:
    return f"token {row['step']}: {row['candidate']} instead of {row['reference']}, margin {row['margin']:.3g} nat"


def _bits(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)

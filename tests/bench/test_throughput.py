"""The meter of throughput: what is timed, what is thrown away, and tokens that void a rate."""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import numpy as np
import pytest

from apr_core.bench import throughput
from apr_core.bench.acts import time_engine
from apr_core.bench.claimed import judge_claim, parse_claim
from apr_core.bench.profile import profile_model, shortfall
from apr_core.bench.roofline import StreamBandwidth
from apr_core.bench.throughput import Plan, couple, measure, private_bytes, use_threads, warm_up
from apr_core.bench.versus import Comparison, cost_of_rounding, interleave, open_peers
from apr_core.contract.admit import Admission, admit
from apr_core.engines.load import build
from apr_core.engines.subject import Subject
from apr_core.errors import UsageError
from apr_core.falsify.verdict import Verdict
from apr_core.model.trace import TracedForward
from apr_core.parity.floor import BFloat16, EightBit
from apr_core.peers.rates import Rates
from tests.bench.conftest import Clock, Counting

PROMPT = np.array([3, 4, 5])
PLAN = Plan(prefill=16, decode=5, repeats=3, contexts=(20,), steps=2)


@pytest.fixture(scope="module")
def admission(pygmy: Path) -> Admission:
    """The bundled model."""
    return admit(pygmy)


@pytest.fixture(scope="module")
def fast(admission: Admission) -> TracedForward:
    """Its compiled engine."""
    return build(admission, precision="speed")


@pytest.fixture(scope="module")
def prompt() -> np.ndarray:
    """Sixteen drawn tokens."""
    return np.random.default_rng(0).integers(0, 1000, 16)


def test_every_sample_is_kept_and_every_token(fast: TracedForward, prompt: np.ndarray) -> None:
    """Per repeat one prompt, one first token, and a step for each token behind it."""
    turns: list[int] = []
    timed = measure(fast, prompt, PLAN, threads=1, between=lambda: turns.append(1))
    assert (timed.prefill.n, timed.ttft.n, timed.steps.n) == (3, 3, 12)
    assert (timed.ttft.seconds >= timed.prefill.seconds).all()
    assert [len(made) for made in timed.tokens] == [5, 5, 5]
    assert len(set(timed.tokens)) == 1
    assert timed.at_context[20].n == 2
    assert len(turns) == 3
    assert timed.threads == 1
    assert timed.private_bytes
    body = timed.figures()
    low, high = body["decode_tok_s_interval"]
    assert low <= body["decode_tok_s"] <= high
    assert body["tpot_p99_s"] <= timed.steps.maximum
    assert float(timed.steps.seconds.sum()) <= timed.wall_s


def test_every_sample_has_the_length_that_it_took(counting: Counting) -> None:
    """On a clock that is told what to show: prompts of 7 ms, tokens of 2 ms; the wall is that of the answers alone."""

    def between() -> None:
        counting.clock.now += 500_000_000

    counting.cost = lambda tokens: 7_000_000 if tokens == 3 else 2_000_000
    run = measure(counting, PROMPT, Plan(3, 5, 2), warm_ups=1, clock=counting.clock, between=between)
    assert run.tokens == ((6, 7, 8, 9, 10),) * 2
    assert run.prefill.seconds == pytest.approx([0.007] * 2)
    assert run.ttft.seconds == pytest.approx([0.007] * 2)
    assert run.steps.seconds == pytest.approx([0.002] * 8)
    assert run.warm_ups == pytest.approx((0.007,))
    assert run.wall_s == pytest.approx(0.03)
    assert (run.decode_tok_s, run.prefill_tok_s) == (pytest.approx(500), pytest.approx(3 / 0.007))
    assert counting.calls == [3, *[3, 1, 1, 1, 1] * 2]
    assert [row.argmax() for row in run.logits] == [6, 6]


def test_a_delay_is_inside_the_sample() -> None:
    """A sleep in each step shows in each sample, on a real clock."""
    run = measure(Counting(), PROMPT, Plan(3, 3, 1), warm_ups=0, delay_s=0.002)
    assert run.steps.minimum >= 0.002
    assert run.ttft.minimum < 0.002


def test_a_clock_that_runs_backwards_is_kept_visible(counting: Counting) -> None:
    """A negative sample stays what it is: the meter repairs nothing."""
    costs = iter([5_000_000, 1_000_000, -3_000_000, 1_000_000])
    counting.cost = lambda tokens: next(costs)
    run = measure(counting, PROMPT, Plan(3, 4, 1), warm_ups=0, clock=counting.clock)
    assert run.steps.seconds == pytest.approx([0.001, -0.003, 0.001])


def test_a_stopped_clock_gives_no_rate() -> None:
    """Zero seconds are no rate of infinity."""
    run = measure(Counting(), PROMPT, Plan(3, 4, 1), warm_ups=0, clock=Clock())
    assert math.isnan(run.decode_tok_s)
    assert math.isnan(run.prefill_tok_s)


def test_warm_up_ends_when_two_runs_agree() -> None:
    """Compilation and cold pages make the first runs slow; a machine that never settles is given up on."""
    readings = iter([0, 100, 100, 120, 120, 131, 131, 142, 142, 999])
    assert warm_up(lambda: None, lambda: next(readings)) == pytest.approx((1e-7, 2e-8, 1.1e-8, 1.1e-8))
    assert len(warm_up(lambda: None, lambda: 0, 4)) == 4
    wild = iter(2**n for n in range(40))
    assert len(warm_up(lambda: None, lambda: next(wild))) == 6


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (Plan(prefill=0), "an empty one"),
        (Plan(decode=1), "2 tokens and 1 repeat"),
        (Plan(repeats=0), "2 tokens and 1 repeat"),
        (Plan(prefill=4000, decode=100), "at most 4096 positions .* found 4100"),
        (Plan(contexts=(5000,)), "found 5008"),
    ],
)
def test_what_a_model_cannot_hold_is_refused(plan: Plan, said: str) -> None:
    """Before anything runs."""
    with pytest.raises(UsageError, match=said):
        plan.require(4096)


def test_threads_are_set_where_a_backend_can_be_told(fast: TracedForward, admission: Admission) -> None:
    """The compiled engine refuses more than there are cores; torch takes its own; others say None."""
    assert use_threads(fast, 1) == 1
    with pytest.raises(UsageError, match="cores of this process"):
        use_threads(fast, 10_000)
    reference = build(admission)
    assert use_threads(reference, 1) == 1

    class Other:
        backend = "other"

    assert use_threads(Other(), 1) is None  # type: ignore[arg-type]


def test_memory_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Counted where the system tells, and None where it does not."""
    before = private_bytes()
    assert before is not None
    size = 30_000_000
    # pages of its own: an allocator would hand out again what an earlier test has written and freed
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held.write(b"1" * size)
        after = private_bytes()
    assert after is not None
    assert after - before >= 0.9 * size
    monkeypatch.setattr(throughput, "Path", lambda _: tmp_path / "absent")
    assert private_bytes() is None


def test_coupling_counts_wrong_tokens_and_nothing(admission: Admission, prompt: np.ndarray) -> None:
    """Right tokens pass, a constant one does not, and an empty output compares nothing."""
    reference = build(admission)
    timed = measure(reference, prompt, Plan(16, 6, 1))
    assert couple(reference, prompt, timed.tokens[0], 0.0) == ([], 6)
    wrong, compared = couple(reference, prompt, (7,) * 6, 0.0)
    assert (compared, len(wrong)) == (6, 6)
    assert couple(reference, prompt, (), 0.0) == ([], 0)
    assert len(couple(reference, prompt, (7,) * 6, 100.0)[0]) == 0


def test_rounding_is_measured_and_excuses_little(pygmy: Path, admission: Admission, fast: TracedForward) -> None:
    """BF16 weights meet activations in bfloat16 in `speed` alone; that moves logits less than 8 bits would."""
    subject = Subject(pygmy, admission, reference=None, device="cpu", seed=0, max_new_tokens=8)
    reference, plan = build(admission), Plan(8, 2, 1)
    for engine, place in ((fast, BFloat16), (reference, type(None))):
        made = time_engine(subject, engine, subject.stimulus(8).ids, plan, threads=1)
        assert type(made.rounds) is place
    costs = [cost_of_rounding(admission, reference, place) for place in (BFloat16(), EightBit())]
    assert 0 < costs[0] < costs[1] < 1


class _Peer:
    name, build, features = "other", "other 1", "AVX512 = 1"

    def __init__(self, fair: bool) -> None:
        self.fair = fair

    def round(self, threads: int, prompt: list[int], tokens: int) -> Rates:
        """As fast as it says."""
        return Rates(100.0 * len(prompt), 10.0 * tokens, "random")


def test_peers_take_turns_with_the_candidate(fast: TracedForward, prompt: np.ndarray) -> None:
    """A ratio per round; none for a peer that is not fair."""
    run = interleave(fast, prompt, PLAN, threads=1, peers=[_Peer(True), _Peer(False)], elements=1)
    body = run.body()
    fair, unfair = body["peers"]
    assert fair["samples"]["decode_tok_s"] == [50.0, 50.0, 50.0]
    steps = run.timed.steps.seconds.reshape(3, -1)
    assert fair["decode_ratio"] == pytest.approx(np.median(1 / np.median(steps, axis=1)) / 50)
    assert (unfair["decode_ratio"], unfair["prefill_ratio"]) == (None, None)
    assert body["share_of_ceiling"] == pytest.approx(
        run.timed.decode_tok_s * fast.bytes_per_token / 1e9 / run.read_gb_s  # type: ignore[attr-defined]
    )
    assert len(run.bandwidth) == 12


def test_shares_of_the_ceiling(fast: TracedForward, prompt: np.ndarray) -> None:
    """The best sample is the ceiling, and the distance of the quartiles its spread."""
    timed = measure(fast, prompt, Plan(16, 3, 1), threads=1)
    at = timed.decode_tok_s * 1000 / 1e9
    run = Comparison(timed, 1, 1000, np.array([0.5, 0.8, 1.0, 0.9, 0.7]) * at, [])
    assert (run.share_of_ceiling, run.ceiling_tok_s) == (pytest.approx(1.0), pytest.approx(timed.decode_tok_s))
    assert run.spread == pytest.approx(0.2)
    assert run.ratios() == {}


def test_a_peer_that_is_not_here_is_named(pygmy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a row with its reason, not the end of the run; a name that no peer has is a mistake."""
    monkeypatch.setenv("APR_LLAMA_BENCH", "/nowhere/llama-bench")
    opened, absent = open_peers(["llama.cpp"], pygmy, 1)
    assert (opened, absent) == ([], {"llama.cpp": "peer absent: no native llama-bench"})
    with pytest.raises(UsageError, match="expected a peer"):
        open_peers(["vllm"], pygmy, 1)


def test_claims_are_read_and_judged() -> None:
    """The ceiling is the first argument; wrong tokens leave a claim undecided; a slow time refutes one of speed."""
    assert parse_claim("decode_tok_s=285.5") == ("decode_tok_s", 285.5)
    for bad in ("decode_tok_s", "decode_tok_s=fast", "speed=3", "ttft_s=-1", "ttft_s=inf"):
        with pytest.raises(UsageError, match="expected --claim"):
            parse_claim(bad)

    def judged(metric: str, claimed: float, right: bool = True) -> tuple[Verdict, str]:
        found = judge_claim(metric, claimed, 20.0, (19.0, 21.0), read_gb_s=30.0, read_bytes=10**9, tokens_right=right)
        return found.verdict, found.reason

    assert judged("decode_tok_s", 285.5) == (
        Verdict.FALSIFIED,
        "285.5 tok/s needs 286 GB/s; this machine reads 30",
    )
    assert judged("decode_tok_s", 25.0)[0] is Verdict.FALSIFIED
    assert judged("decode_tok_s", 20.5) == (Verdict.CORROBORATED, "")
    assert judged("decode_tok_s", 10.0, right=False)[0] is Verdict.INCONCLUSIVE
    assert judged("ttft_s", 25.0)[0] is Verdict.CORROBORATED
    assert judged("ttft_s", 10.0)[0] is Verdict.FALSIFIED


def test_a_profile_splits_the_time(fast: TracedForward, admission: Admission) -> None:
    """Every phase, the types that are read, and the ceiling."""
    body = profile_model(fast, admission, Plan(8, 3, 1), threads=1)
    assert [row["phase"] for row in body["phases"]][-2:] == ["head", "waiting"]
    assert body["types"] == [{"type": "BF16", "matrices": 15, "bytes_per_token": fast.bytes_per_token}]  # type: ignore[attr-defined]
    assert 0 < body["gb_s"] < 2 * body["ceiling_gb_s"]
    assert body["token_ms"] > 0
    plain = profile_model(build(admission), admission, Plan(8, 2, 1), threads=1)
    assert (plain["phases"], plain["types"], plain["fallbacks"]) == ([], [], [])
    assert [question for question, _ in shortfall(plain)][-1] == "Which types are read?"


def test_a_shortfall_is_explained_from_the_profile() -> None:
    """Bandwidth, the largest operation, waiting threads, what lies outside of the kernels, and widened types."""
    phases = {"gate, up": 4.0, "head": 3.0, "waiting": 2.0}
    profile = {
        "token_ms": 10.0, "read_bytes": 50_000_000, "ceiling_gb_s": 20.0, "threads": 2, "fallbacks": ["a"],
        "phases": [{"phase": name, "decode_ms_per_token": ms} for name, ms in phases.items()],
        "types": [{"type": "Q4_K", "matrices": 3, "bytes_per_token": 50_000_000}],
    }  # fmt: skip
    answers = [answer for _, answer in shortfall(profile)]
    assert answers == [
        "2.5 of 10 ms, 50 MB at 20 GB/s",
        "gate, up: 4 of 10 ms",
        "2 of 10 ms, with 2 threads",
        "1 of 10 ms",
        "Q4_K 50 MB; 1 matrices widened to F32",
    ]


def test_a_small_buffer_is_read_faster_than_it_is_long() -> None:
    """Samples of a tiny buffer are made of many passes, so that they can be timed."""
    ceiling = StreamBandwidth(10, 1)
    ceiling.sample()
    assert len(ceiling.samples) == 3
    assert min(ceiling.samples) > 0.1

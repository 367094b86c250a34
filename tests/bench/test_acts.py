"""Each claim of notebook 30: corroborated by an honest run, refuted by a meter or a model that is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr_core.bench import acts
from apr_core.bench.acts import TimedRun, plan_for
from apr_core.bench.claimed import WRONG_TOKENS
from apr_core.bench.throughput import Throughput
from apr_core.bench.timing import Samples
from apr_core.engines.subject import Subject, obtain
from apr_core.errors import UsageError
from apr_core.falsify.claims import claims_of
from apr_core.falsify.finding import ACTS, Finding
from apr_core.falsify.verdict import Verdict
from apr_core.parity.floor import BFloat16
from apr_core.peers.rates import Rates

HERE = (*(f"F-THR-00{n}" for n in range(1, 9)), "F-THR-012")


@pytest.fixture(scope="module")
def timed(tiny: Path) -> Subject:
    """A subject that has been timed once, alone, and then asked about a peer."""
    subject = obtain(str(tiny), device="cpu")
    acts.timed_run(subject)
    subject.peers = ("other",)
    return subject


@pytest.fixture
def edited(timed: Subject) -> Iterator[Callable[..., Subject]]:
    """Put an edited run in the place of the timed one, for one test."""
    honest = acts.timed_run(timed)

    def put(change: Callable[[TimedRun], TimedRun]) -> Subject:
        acts.keep(timed, change(honest))
        return timed

    yield put
    acts.keep(timed, honest)


def verdict(finding: Finding) -> Verdict:
    """Judge a finding."""
    return finding.judge()[0]


def timed_with(**changes: Any) -> Callable[[TimedRun], TimedRun]:
    """Edit what was timed; a value may be a function of it."""

    def edit(made: TimedRun) -> TimedRun:
        timed = made.run.timed
        new = {name: value(timed) if callable(value) else value for name, value in changes.items()}
        return replace(made, run=replace(made.run, timed=replace(timed, **new)))

    return edit


def run_with(**changes: Any) -> Callable[[TimedRun], TimedRun]:
    """Edit the run beside its ceiling and its peers."""
    return lambda made: replace(made, run=replace(made.run, **changes))


def test_every_claim_has_its_act() -> None:
    """No claim of the notebook is without a measurement."""
    assert {c.id for c in claims_of("30_throughput")} <= set(ACTS)


@pytest.mark.parametrize("claim", HERE)
def test_honest_run_is_corroborated(timed: Subject, claim: str) -> None:
    """An honest meter on an honest model holds each claim, without whys, without timing in the compared line."""
    finding = ACTS[claim](timed)
    assert verdict(finding) is Verdict.CORROBORATED
    assert not finding.whys
    assert "." not in finding.detail


def test_run_is_timed_once_and_of_the_engine_of_apr_run(timed: Subject) -> None:
    """All claims speak about the same samples, and not about the reference that judges them."""
    made = acts.timed_run(timed)
    assert acts.timed_run(timed) is made
    assert made.run.timed.backend == timed.engine.backend != timed.model.backend
    assert acts.clock_sees_a_token(timed).arrays["decode_s_per_token"].size == 5 * 31
    rows = {row["quantity"]: row["value"] for row in acts.no_faster_than_the_machine(timed).rows}
    assert {"ttft_s", "tpot_p99_s", "peak private MB", "ms: head", "share of the ceiling"} <= set(rows)


def test_a_run_is_excused_what_its_own_rounding_costs(
    edited: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens that float32 does not explain are wrong, unless the engine rounds and the reference moves so far by it."""
    place, asked = BFloat16(), list[object]()

    def cost(admission: object, reference: object, how: object) -> float:
        asked.append(how)
        return 100.0

    monkeypatch.setattr(acts, "cost_of_rounding", cost)
    constant = timed_with(tokens=lambda timed: tuple((7,) * len(made) for made in timed.tokens))
    for how, right in ((None, False), (place, True)):
        subject = edited(lambda made, how=how: replace(constant(made), rounds=how, judged={}))
        assert (acts.wrong_tokens(subject, acts.timed_run(subject))[0] == 0) is right
    assert asked == [place]


def test_plan_follows_from_size_alone() -> None:
    """Larger models get fewer repeats and tokens, by fixed rules: counts are compared across machines."""
    plans = [plan_for(n, 32768) for n in (10**6, 5 * 10**8, 7 * 10**9)]
    assert [(p.prefill, p.decode, p.repeats) for p in plans] == [(64, 32, 5), (512, 32, 3), (512, 16, 3)]
    assert [p.contexts for p in plans] == [(128, 1024, 4000), (128, 1024, 4000), (128, 1024)]
    short = plan_for(10**6, 40)
    assert (short.prefill, short.decode, short.contexts) == (8, 32, ())


def test_wrong_token_refutes(edited: Callable[..., Subject]) -> None:
    """One token that the reference would not choose makes the rate worthless."""

    def swap(timed: Throughput) -> tuple[tuple[int, ...], ...]:
        tokens = [list(made) for made in timed.tokens]
        tokens[3][9] = (tokens[3][9] + 1) % 331
        return tuple(map(tuple, tokens))

    subject = edited(timed_with(tokens=swap))
    finding = acts.timed_tokens_are_right(subject)
    assert verdict(finding) is Verdict.FALSIFIED
    assert {"repeat": 3, "step": 9} in finding.rows
    assert finding.whys[0][1] == "token 9 of repeat 3"
    assert acts.wrong_tokens(subject, acts.timed_run(subject))[0] >= 1


def test_garbage_refutes(edited: Callable[..., Subject]) -> None:
    """A model that emits one token forever is fast and wrong."""
    finding = acts.timed_tokens_are_right(edited(timed_with(tokens=((7,) * 32,) * 5)))
    assert verdict(finding) is Verdict.FALSIFIED
    assert finding.value > 100


def test_another_device_decides_nothing(edited: Callable[..., Subject]) -> None:
    """A run that fell back, or forward, is not the one that was asked for."""
    finding = acts.timed_tokens_are_right(edited(lambda made: replace(made, device="cuda:0")))
    assert finding.judge() == (Verdict.INCONCLUSIVE, "it ran on cuda:0")


@pytest.mark.parametrize("tokens", [(), ((),) * 5])
def test_no_tokens_at_all_do_not_pass(edited: Callable[..., Subject], tokens: Any) -> None:
    """An immediate end leaves nothing to compare, which is not agreement."""
    finding = acts.timed_tokens_are_right(edited(timed_with(tokens=tokens)))
    assert verdict(finding) is not Verdict.CORROBORATED
    assert finding.value == 160


def test_lost_sample_is_counted(edited: Callable[..., Subject]) -> None:
    """A meter that drops a sample, a token or a first token is seen, each by its name."""
    finding = acts.no_sample_is_missing(edited(timed_with(steps=lambda timed: Samples(timed.steps.seconds[:-1]))))
    assert verdict(finding) is Verdict.FALSIFIED
    assert "decode steps: 154 of 155" in finding.whys[0][1]
    assert verdict(acts.no_sample_is_missing(edited(timed_with(ttft=Samples.of([]))))) is Verdict.FALSIFIED


@pytest.mark.parametrize("seconds", [0.0, -0.001])
def test_sample_that_took_no_time_is_missing(edited: Callable[..., Subject], seconds: float) -> None:
    """A sample of zero or negative length timed nothing."""

    def broken(timed: Throughput) -> Samples:
        steps = timed.steps.seconds.copy()
        steps[4] = seconds
        return Samples(steps)

    subject = edited(timed_with(steps=broken))
    assert verdict(acts.no_sample_is_missing(subject)) is Verdict.FALSIFIED
    assert verdict(acts.clock_sees_a_token(subject)) is Verdict.FALSIFIED


def test_overlapping_samples_refute(edited: Callable[..., Subject]) -> None:
    """Samples that add up to more than the wall around them overlap, or the clock jumped back."""
    finding = acts.parts_fit_the_whole(edited(timed_with(wall_s=1e-4)))
    assert verdict(finding) is Verdict.FALSIFIED
    assert "exceed the whole" in finding.whys[0][1]


def test_coarse_clock_refutes(edited: Callable[..., Subject]) -> None:
    """A clock of 15 ms cannot see a token of one, and one that stands sees nothing."""
    finding = acts.clock_sees_a_token(edited(lambda made: replace(made, tick_s=0.015)))
    assert verdict(finding) is Verdict.FALSIFIED
    assert finding.whys
    assert (
        verdict(acts.clock_sees_a_token(edited(lambda made: replace(made, tick_s=float("inf"))))) is Verdict.FALSIFIED
    )


def test_rate_beyond_the_ceiling_refutes(edited: Callable[..., Subject]) -> None:
    """By more than the ceiling's own spread: tokens or bytes are miscounted."""
    at = acts.timed_run(edited(lambda made: made)).run.share_of_ceiling
    best = acts.timed_run(edited(lambda made: made)).run.read_gb_s

    def ceiling(*shares: float) -> Callable[[TimedRun], TimedRun]:
        return run_with(bandwidth=np.array(shares) * at * best)

    finding = acts.no_faster_than_the_machine(edited(ceiling(0.8, 0.8, 0.8)))
    assert verdict(finding) is Verdict.FALSIFIED
    assert finding.value == pytest.approx(1.25)
    assert "GB/s" in finding.whys[0][1]
    assert verdict(acts.no_faster_than_the_machine(edited(ceiling(0.5, 0.95, 0.9)))) is Verdict.CORROBORATED


def test_wrong_prefill_refutes(edited: Callable[..., Subject]) -> None:
    """One value that differs in one repeat is seen, and the repeat named; a repeat less is undecided."""

    def damaged(timed: Throughput) -> tuple[Any, ...]:
        rows = [row.copy() for row in timed.logits]
        rows[2][5] = np.nextafter(rows[2][5], np.float32(9))
        return tuple(rows)

    finding = acts.timed_prefill_is_right(edited(timed_with(logits=damaged)))
    assert verdict(finding) is Verdict.FALSIFIED
    assert "[0, 0, 1, 0, 0]" in finding.whys[0][1]
    finding = acts.timed_prefill_is_right(edited(timed_with(logits=lambda timed: timed.logits[:4])))
    assert verdict(finding) is Verdict.INCONCLUSIVE


def test_mismatches_are_bits_and_shapes() -> None:
    """One bit is a mismatch, equal NaN bits are none, another shape is everything."""
    x = np.array([[1, np.nan, 3]], np.float32)
    y = x.copy()
    assert acts._mismatches(x, y) == 0
    y[0, 2] = np.nextafter(np.float32(3), np.float32(4))
    assert acts._mismatches(x, y) == 1
    assert acts._mismatches(x, x[:, :2]) == 3


def test_meter_that_ignores_the_delay_refutes(timed: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A meter that times something else than what it runs does not see the sleep."""
    real = acts.measure
    monkeypatch.setattr(acts, "measure", lambda *a, delay_s, **k: real(*a, delay_s=0.0, **k))
    monkeypatch.setattr(acts, "SHORTEST_DELAY_S", 0.5)
    finding = acts.planted_delay_is_seen(timed)
    assert verdict(finding) is Verdict.FALSIFIED
    assert finding.value < 1


def test_unexplained_byte_refutes(timed: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that counts a tensor twice, or a byte more, does not fit the architecture."""
    tensors = dict(timed.checkpoint.tensors)
    name = "model.norm.weight"
    tensors[name] = replace(tensors[name], nbytes=tensors[name].nbytes + 1)
    monkeypatch.setattr(timed.checkpoint, "tensors", tensors)
    finding = acts.bytes_accounted_for(timed)
    assert verdict(finding) is Verdict.FALSIFIED
    assert finding.value == 1
    tensors["model.twice"] = tensors[name]
    assert acts.bytes_accounted_for(timed).value > 1


class Peer:
    """A runtime of fixed rates."""

    name, build, features = "other", "other 1", "AVX2"

    def __init__(self, rate: float, fair: bool = True) -> None:
        self.rate, self.fair = rate, fair

    def round(self, threads: int, prompt: list[int], tokens: int) -> Rates:
        """As fast as it says."""
        return Rates(self.rate, self.rate, "random")


def against(*peers: Peer, **absent: str) -> Callable[[TimedRun], TimedRun]:
    """Put peers beside the run of a subject that was asked about some."""
    return run_with(peers=[(peer, [peer.round(1, [], 1)] * 5) for peer in peers], absent=absent)


def test_a_peer_that_is_faster_refutes_and_the_profile_explains(edited: Callable[..., Subject]) -> None:
    """Slower peers corroborate; an absent one leaves a hole; an unfair one, or none, is no peer at all."""
    ask = acts.no_slower_than_its_peers
    finding = ask(edited(against(Peer(1e9))))
    assert verdict(finding) is Verdict.FALSIFIED
    assert finding.whys[0][0] == "Than which peer?"
    assert finding.whys[1][1].endswith("GB/s")
    assert verdict(ask(edited(against(Peer(1e-3))))) is Verdict.CORROBORATED
    assert ask(edited(against(Peer(1e-3), ollama="none answers"))).judge() == (
        Verdict.INCONCLUSIVE,
        "compared 2 of 2; missing: ollama",
    )
    for nobody in (against(), against(Peer(1e9, fair=False)), against(ollama="none answers")):
        assert ask(edited(nobody)).judge() == (Verdict.NOT_RUN, "peer absent")
    assert ask(edited(against(Peer(1e9, fair=False)))).rows[0]["decode ratio"] == "not a fair peer"


def test_rates_of_wrong_tokens_are_void(edited: Callable[..., Subject]) -> None:
    """Neither a ratio nor a claimed number is decided by them; the ceiling refutes a number all the same."""
    garbage = timed_with(tokens=((7,) * 32,) * 5)
    subject = edited(lambda made: garbage(against(Peer(1e-3))(made)))
    assert acts.no_slower_than_its_peers(subject).judge() == (Verdict.INCONCLUSIVE, WRONG_TOKENS)
    subject = edited(lambda made: replace(garbage(made), claims=[("ttft_s", 1e9)]))
    assert verdict(acts.claimed_numbers_hold(subject)) is Verdict.INCONCLUSIVE
    subject = edited(lambda made: replace(garbage(made), claims=[("decode_tok_s", 1e12)]))
    assert verdict(acts.claimed_numbers_hold(subject)) is Verdict.FALSIFIED


def test_claimed_numbers_are_tried(edited: Callable[..., Subject]) -> None:
    """One that holds, one that the ceiling refutes with its reason first; the controls are counted in any case."""
    finding = acts.claimed_numbers_hold(edited(lambda made: replace(made, claims=[("ttft_s", 1e9)])))
    assert (verdict(finding), finding.compared, finding.rows[0]["verdict"]) == (Verdict.CORROBORATED, 3, "CORROBORATED")
    claims = [("decode_tok_s", 1e12), ("ttft_s", 1e9)]
    finding = acts.claimed_numbers_hold(edited(lambda made: replace(made, claims=claims)))
    assert (verdict(finding), finding.value) == (Verdict.FALSIFIED, 1)
    assert finding.detail == "2 claimed, 1 refuted; 2 controls"
    assert "needs" in finding.whys[0][1]
    assert len(finding.whys) > 3


def test_what_a_person_asks_is_read_before_anything_runs(tiny: Path) -> None:
    """Peers and claims by commas; a claim of no metric is an error, and so is a peer of no kind."""
    subject = obtain(str(tiny), device="cpu")
    acts.ask(subject, peers="llama.cpp, ollama:qwen2.5:0.5b", claims="decode_tok_s=285.5,ttft_s=0.2")
    assert subject.peers == ("llama.cpp", "ollama:qwen2.5:0.5b")
    assert acts.claimed_of(subject) == (("decode_tok_s", 285.5), ("ttft_s", 0.2))
    with pytest.raises(UsageError, match="expected --claim"):
        acts.ask(subject, claims="speed=1")
    with pytest.raises(UsageError, match="expected a peer"):
        acts.ask(subject, peers="vllm")
    subject.close()


def test_cuda_tokens(timed: Subject, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device: not run. A side that fell back: undecided. The right tokens on a device: corroborated."""
    assert acts.cuda_tokens_are_right(timed).judge() == (Verdict.NOT_RUN, "no CUDA device")
    subject = obtain(str(tiny), device="cpu")
    subject.lacks = {}
    engine = obtain(str(tiny), device="cpu").model
    monkeypatch.setattr(acts, "load_model", lambda path, device: engine)
    assert acts.cuda_tokens_are_right(subject).judge() == (Verdict.INCONCLUSIVE, "the CUDA side ran on cpu")

    class OnDevice:
        device, backend = "cuda:0", "torch"
        config, tokenizer = engine.config, engine.tokenizer
        new_cache, forward = staticmethod(engine.new_cache), staticmethod(engine.forward)

    monkeypatch.setattr(acts, "load_model", lambda path, device: OnDevice())
    assert verdict(acts.cuda_tokens_are_right(subject)) is Verdict.CORROBORATED

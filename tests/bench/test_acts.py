"""Each claim of notebook 30: corroborated by an honest run, refuted by a meter or a model that is not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr_core.bench import acts
from apr_core.bench.acts import TimedRun, effort
from apr_core.bench.roofline import Roofline
from apr_core.bench.timing import Samples
from apr_core.engines.subject import Subject, obtain
from apr_core.falsify.claims import claims_of
from apr_core.falsify.finding import ACTS, Finding
from apr_core.falsify.verdict import Verdict

HERE = (*(f"F-THR-00{n}" for n in range(1, 9)), "F-THR-010")


@pytest.fixture(scope="module")
def timed(tiny: Path) -> Subject:
    """A subject that has been timed once."""
    subject = obtain(str(tiny), device="cpu")
    acts.timed_run(subject)
    return subject


@pytest.fixture
def edited(timed: Subject) -> Iterator[Callable[..., Subject]]:
    """Put an edited run in the place of the timed one, for one test."""
    honest = acts.timed_run(timed)

    def put(change: Callable[[TimedRun], TimedRun]) -> Subject:
        acts._runs[timed] = change(honest)
        return timed

    yield put
    acts._runs[timed] = honest


def verdict(finding: Finding) -> Verdict:
    """Judge a finding."""
    return finding.judge()[0]


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


def test_run_is_timed_once(timed: Subject) -> None:
    """All claims speak about the same samples."""
    assert acts.timed_run(timed) is acts.timed_run(timed)
    arrays = acts.no_faster_than_the_machine(timed).arrays
    assert set(arrays) == {"decode_s_per_token", "prefill_s", "bandwidth_gb_s"}
    assert arrays["decode_s_per_token"].size == 5 * 31


def test_effort_follows_from_size_alone() -> None:
    """Larger models get fewer repeats and tokens, by fixed rules: counts are compared across machines."""
    sizes = [effort(n) for n in (10**6, 5 * 10**8, 7 * 10**9)]
    assert [s.repeats * s.tokens for s in sizes] == [160, 48, 16]


def decode_with(**changes: Any) -> Callable[[TimedRun], TimedRun]:
    """Edit the decode of a run."""
    return lambda run: replace(run, decode=replace(run.decode, **changes))


def test_wrong_token_refutes(edited: Callable[..., Subject]) -> None:
    """One token that a forward without a cache would not choose makes the rate worthless."""

    def swap(run: TimedRun) -> TimedRun:
        tokens = [list(made) for made in run.decode.tokens]
        tokens[3][9] = (tokens[3][9] + 1) % 331
        return replace(run, decode=replace(run.decode, tokens=tuple(map(tuple, tokens))))

    finding = acts.timed_tokens_are_right(edited(swap))
    assert verdict(finding) is Verdict.FALSIFIED
    assert {"repeat": 3, "step": 9} in finding.rows
    assert finding.whys[0][1] == "token 9 of repeat 3"


def test_garbage_refutes(edited: Callable[..., Subject]) -> None:
    """A model that emits one token forever is fast and wrong."""
    finding = acts.timed_tokens_are_right(edited(decode_with(tokens=((7,) * 32,) * 5)))
    assert verdict(finding) is Verdict.FALSIFIED
    assert finding.value > 100


@pytest.mark.parametrize("tokens", [(), ((),) * 5])
def test_no_tokens_at_all_do_not_pass(edited: Callable[..., Subject], tokens: Any) -> None:
    """An immediate end leaves nothing to compare, which is not agreement."""
    finding = acts.timed_tokens_are_right(edited(decode_with(tokens=tokens)))
    assert verdict(finding) is not Verdict.CORROBORATED
    assert finding.value == 160


def test_lost_sample_is_counted(edited: Callable[..., Subject]) -> None:
    """A meter that drops a sample, a token or a first token is seen, each by its name."""
    steps = Samples(acts.timed_run(edited(lambda run: run)).decode.steps.seconds[:-1])
    finding = acts.no_sample_is_missing(edited(decode_with(steps=steps)))
    assert verdict(finding) is Verdict.FALSIFIED
    assert "decode steps: 154 of 155" in finding.whys[0][1]
    assert verdict(acts.no_sample_is_missing(edited(decode_with(ttft=Samples.of([]))))) is Verdict.FALSIFIED


@pytest.mark.parametrize("seconds", [0.0, -0.001])
def test_sample_that_took_no_time_is_missing(edited: Callable[..., Subject], seconds: float) -> None:
    """A sample of zero or negative length timed nothing."""
    steps = acts.timed_run(edited(lambda run: run)).decode.steps.seconds.copy()
    steps[4] = seconds
    subject = edited(decode_with(steps=Samples(steps)))
    assert verdict(acts.no_sample_is_missing(subject)) is Verdict.FALSIFIED
    assert verdict(acts.clock_sees_a_token(subject)) is Verdict.FALSIFIED


@pytest.mark.parametrize("part", ["decode", "prefill"])
def test_overlapping_samples_refute(edited: Callable[..., Subject], part: str) -> None:
    """Samples that add up to more than the wall around them overlap, or the clock jumped back."""
    subject = edited(lambda run: replace(run, **{part: replace(getattr(run, part), wall_s=1e-4)}))
    finding = acts.parts_fit_the_whole(subject)
    assert verdict(finding) is Verdict.FALSIFIED
    assert "exceed the whole" in finding.whys[0][1]


def test_coarse_clock_refutes(edited: Callable[..., Subject]) -> None:
    """A clock of 15 ms cannot see a token of one."""
    finding = acts.clock_sees_a_token(edited(lambda run: replace(run, tick_s=0.015)))
    assert verdict(finding) is Verdict.FALSIFIED
    assert finding.whys
    assert verdict(acts.clock_sees_a_token(edited(lambda run: replace(run, tick_s=float("inf"))))) is Verdict.FALSIFIED


def test_rate_beyond_the_ceiling_refutes(edited: Callable[..., Subject]) -> None:
    """Miscounted bytes or tokens show as more bandwidth than the machine has."""

    def slow_machine(run: TimedRun) -> TimedRun:
        return replace(run, roofline=Roofline(run.roofline.read_bytes, np.array([1e-6])))

    finding = acts.no_faster_than_the_machine(edited(slow_machine))
    assert verdict(finding) is Verdict.FALSIFIED
    assert "GB/s" in finding.whys[0][1]


def test_wrong_prefill_refutes(edited: Callable[..., Subject]) -> None:
    """One value that differs in one repeat is seen, and the repeat named; a repeat less is undecided."""
    finding = acts.timed_prefill_is_right(edited(lambda run: replace(run, mismatched=(0, 0, 1, 0, 0))))
    assert verdict(finding) is Verdict.FALSIFIED
    assert "[0, 0, 1, 0, 0]" in finding.whys[0][1]
    finding = acts.timed_prefill_is_right(edited(lambda run: replace(run, mismatched=(0, 0, 0, 0))))
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
    real = acts.measure_decode
    monkeypatch.setattr(acts, "measure_decode", lambda *a, delay_s, **k: real(*a, delay_s=0.0, **k))
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


def test_script_prints_one_json_line(root: Path, tiny: Path) -> None:
    """The benchmark script speaks JSON, with rates, bytes and the ceiling."""
    done = subprocess.run(
        [sys.executable, root / "benchmarks" / "bench_reference.py", str(tiny), "--repeats", "1", "--tokens", "3"],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    line = json.loads(done.stdout)
    assert line["decode_tok_s"] > 0
    assert line["mbu"] > 0
    assert line["bytes_read_per_token"] == line["bytes_stored_per_token"]

"""Faults of the backend and of the meter: each changes something, and the claim that it is for refutes it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

import apr_core.bench.acts
import apr_core.parity.acts
from apr_core.bench import throughput, versus
from apr_core.engines.subject import obtain
from apr_core.engines.wrap import At, wrap
from apr_core.falsify.claims import claims_of
from apr_core.falsify.finding import ACTS
from apr_core.falsify.verdict import Verdict
from apr_core.model.config import Qwen2Config
from apr_core.model.trace import mandatory_names
from apr_core.zoo.backend import DEFECTS, REDUNDANT, Seen
from apr_core.zoo.meter import METER_FAULTS

CONFIG = Qwen2Config.from_mapping(
    {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 512,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
)
WIDTHS = {"q": 64, "k": 32, "v": 32, "logits": 300}
BY_ID = {d.id: d for d in DEFECTS}
ON_A_CPU = [f"F-PAR-00{n}" for n in range(1, 8)]
ALONE = {
    "F-PAR-001": "logits-offset-normalised",
    "F-PAR-002": "cancels-in-scores-factor",
    "F-PAR-003": "cache-overwritten-prompt-end",
    "F-PAR-006": "hears-itself-second",
    "F-PAR-007": "traced-only-ulp",
}


def forwards():
    """Starts, tokens, cache and trace of: a text again and again, with and without a trace; a prompt four times."""
    for run in range(6):
        yield 0, 90, False, run % 2 == 0
    for steps in (20, 0, 0, 2):
        yield 0, 17, True, False
        for start in range(17, 17 + steps):
            yield start, 1, True, False


def changed(hook) -> int:
    """Activations that a hook changes in a life of made-up forwards; every step is fed the argmax before it."""
    random, count, token = np.random.default_rng(7), 0, 3.0
    prompt = random.integers(0, 300, (90, 1)).astype(np.float32)
    for start, tokens, cached, traced in forwards():
        at = At(start, cached, traced)
        for name in ("ids", *mandatory_names(CONFIG.num_hidden_layers)):
            values = random.standard_normal((tokens, WIDTHS.get(name.split(".")[-1], 64))).astype(np.float32)
            if name == "ids":
                values = np.full((1, 1), token, np.float32) if start else prompt[:tokens]
            planted = hook(name, values, at)
            if name == "logits":
                token = float(values[-1].argmax())
            count += planted is not None and not np.array_equal(values, planted)
            assert planted is None or (planted.shape, planted.dtype) == (values.shape, np.float32)
    return count


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.id)
def test_every_fault_changes_something(defect):
    """A hook that never acts would be a defect that nothing can kill."""
    assert changed(defect.hook(CONFIG)) > 0


@pytest.mark.parametrize("name", ["timed-prefill-ulp", "cache-stale-late", "hears-itself-second", "noise-logits"])
def test_two_hooks_of_one_defect_share_no_memory(name):
    """Or a defect would be another one the second time that it is planted."""
    assert changed(BY_ID[name].hook(CONFIG)) == changed(BY_ID[name].hook(CONFIG))


def test_classes_are_many_and_not_padded():
    """26 classes, four of each at most, 80 defects."""
    classes = Counter(d.klass for d in DEFECTS)

    assert max(classes.values()) <= 4
    assert len(classes) >= 26
    assert len(DEFECTS) == len(BY_ID) >= 80


@pytest.mark.parametrize("claim", ON_A_CPU)
def test_every_claim_of_the_parity_notebook_has_defects_of_its_own(claim):
    """At least three, of at least two classes, promise to be refuted by it."""
    mine = [d for d in DEFECTS if claim in d.kills]

    assert len(mine) >= 3
    assert len({d.klass for d in mine}) >= 2


def test_a_claim_is_covered_or_alone():
    """Every claim that a CPU can run has a defect that it alone refutes, or says which other claim covers it."""
    parity = {c.id for c in claims_of("20_parity") if "cuda" not in c.needs}

    assert {*ALONE, *REDUNDANT} == parity - {
        "F-PAR-008",
        "F-PAR-011",
    }  # no backend fails them alone; files do (zoo/files, words)
    assert {*REDUNDANT.values()} <= parity - {*REDUNDANT}


@pytest.fixture(scope="module")
def healthy(pygmy):
    """Model and independent forward of the bundled file, made once."""
    subject = obtain(str(pygmy), device="cpu", max_new_tokens=32)
    yield subject.model, subject.plain
    subject.close()


@pytest.fixture
def judge(pygmy, healthy):
    """The claims that refute a hook in the bundled model, and those that decide nothing."""
    opened = []

    def ask(hook, claims, *, compiled=False):
        subject = obtain(str(pygmy), device="cpu", max_new_tokens=32)
        opened.append(subject)
        subject.model, subject.plain = wrap(healthy[0], hook), healthy[1]
        if not compiled:
            subject.engine = subject.model
        return [c for c in claims if ACTS[c](subject).judge()[0] == Verdict.FALSIFIED]

    yield ask
    for subject in opened:
        subject.close()


@pytest.mark.parametrize("claim", ALONE)
def test_one_claim_and_no_other_sees_it(claim, judge):
    """Take the claim away, and this fault of a backend passes notebook 20."""
    assert judge(BY_ID[ALONE[claim]].hook(CONFIG), ON_A_CPU) == [claim]


@pytest.mark.parametrize("name", ["rope-missing-everywhere", "logits-permuted-same-norm", "uniform-log-v", "nan-late"])
def test_a_covered_claim_is_refuted_with_the_one_that_covers_it(name, judge):
    """What F-PAR-004 or F-PAR-005 refutes, F-PAR-001 refutes."""
    refuted = judge(BY_ID[name].hook(CONFIG), ["F-PAR-001", *(c for c in REDUNDANT if c in ON_A_CPU)])

    assert "F-PAR-001" in refuted
    assert set(BY_ID[name].kills) & set(ON_A_CPU) - {"F-PAR-002"} <= set(refuted)


def test_another_answer_at_a_near_tie_is_no_defect(judge):
    """Noise of float32's size may turn a near-tie over; a suite that cries then would be switched off (K5)."""
    random = np.random.default_rng(1)

    def noise(name, values, at):
        return values * (1 + 2e-6 * random.standard_normal(values.shape)) if name == "logits" else None

    assert judge(noise, ON_A_CPU[:6]) == []


@pytest.mark.parametrize("name", ["timed-decode-zero", "timed-prefill-ulp"])
def test_a_fault_of_the_timed_run_alone_is_seen_there(name, judge):
    """A backend that is right until it is measured: throughput of garbage."""
    assert judge(BY_ID[name].hook(CONFIG), BY_ID[name].kills) == list(BY_ID[name].kills)


@pytest.mark.parametrize("fault", METER_FAULTS[::3], ids=lambda f: f.id)
def test_a_broken_meter_is_seen_and_mended(fault, judge):
    """Every third here, all of them in the suite's own faults; afterwards the meter is what it was."""
    before = {m: dict(vars(m)) for m in (apr_core.bench.acts, throughput, versus)}
    with fault.plant():
        refuted = judge(lambda name, values, at: None, [fault.claim], compiled=True)

    assert refuted == [fault.claim]
    assert all(vars(module) == names for module, names in before.items())


def test_the_meter_is_mended_after_an_error():
    """A fault that outlives its test would refute every later claim."""
    right = throughput._answer
    planted = next(f for f in METER_FAULTS if f.id == "meter-token-zero").plant()
    planted.__enter__()
    assert throughput._answer is not right
    planted.__exit__(ZeroDivisionError, ZeroDivisionError(), None)

    assert throughput._answer is right


def test_every_claim_of_the_timing_notebook_has_a_broken_meter():
    """F-THR-009 needs CUDA."""
    assert {f.claim for f in METER_FAULTS} == {c.id for c in claims_of("30_throughput") if "cuda" not in c.needs}


def test_the_memory_of_a_hook_is_that_of_one_stream():
    """The row before, the length of the prompt, tokens of its own and runs of one prompt; a new start forgets."""
    seen, ids = Seen(CONFIG), np.array([[5.0], [6.0]], np.float32)
    logits = np.eye(2, 10, 3, dtype=np.float32)
    for _ in range(3):
        seen.look("ids", ids, At(0, True, False))
        seen.look("logits", logits, At(0, True, False))

    assert (seen.prompt, seen.runs, seen.fed, seen.before) == (2, 3, 0, {})
    seen.look("ids", np.array([[4.0]], np.float32), At(2, True, False))  # the argmax of the last row
    seen.look("logits", logits[:1], At(2, True, False))
    assert (seen.fed, seen.positions.tolist()) == (1, [2])
    assert np.array_equal(seen.earlier("logits"), logits[1:])
    seen.look("ids", np.array([[9.0]], np.float32), At(3, True, False))
    assert seen.fed == 0
    seen.look("ids", ids, At(0, False, False))
    assert (seen.runs, seen.before) == (1, {})

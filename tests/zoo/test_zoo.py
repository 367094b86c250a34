"""The counter-examples, the benign twins, and the acts of notebook 10."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from apr_core.contract.admit import admit
from apr_core.dtypes import FORMATS
from apr_core.engines.subject import Subject, obtain
from apr_core.engines.wrap import wrap
from apr_core.falsify.claims import claims_of
from apr_core.falsify.finding import ACTS, Finding
from apr_core.falsify.verdict import Verdict
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.zoo import acts
from apr_core.zoo.draft import put_together, take_apart
from apr_core.zoo.plants import BENIGN, DEFECTS, DOWN

PADDING = "F-LAYOUT-CONTRACT-005"  # judged on generated text, which the twin has none of
GATES = [c.id for c in claims_of("10_contract_gates") if c.id != PADDING]


@pytest.fixture
def healthy(tmp_path):
    """The twin as a subject."""
    subject = obtain(str(put_together(acts.twin(), tmp_path / "healthy")))
    yield subject
    subject.close()


def subject_with(recipe, folder) -> Subject:
    """A subject made by a recipe on the twin."""
    draft = acts.twin().copy()
    recipe(draft)
    return obtain(str(put_together(draft, folder)))


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.id)
def test_each_counter_example_is_refused_by_its_gate(defect):
    """A gate that misses its own counter-example cannot fail."""
    assert acts.kill_table()[defect.id][defect.gate] >= 1


@pytest.mark.parametrize("twin", BENIGN, ids=lambda b: b.id)
def test_no_benign_twin_raises_an_alarm(twin):
    """A false alarm would get the gate switched off."""
    assert acts.planted(twin.recipe, acts._gates_against) == Counter()


def test_every_gate_but_byte_length_has_two_counter_examples():
    """The table is what makes each gate's claim refutable."""
    counts = Counter(d.gate for d in DEFECTS)
    with_plants = [g for g in GATES if g not in ("F-LAYOUT-CONTRACT-004", "F-BENIGN-001", "F-ADMIT-001")]

    assert [g for g in with_plants if counts[g] < 2] == []
    assert len({d.id for d in DEFECTS} | {b.id for b in BENIGN}) == len(DEFECTS) + len(BENIGN)


@pytest.mark.parametrize("gate", GATES)
def test_a_healthy_subject_is_corroborated(gate, healthy):
    """Every act of notebook 10 on a healthy file."""
    finding = ACTS[gate](healthy)

    assert finding.judge() == (Verdict.CORROBORATED, "")
    assert finding.compared > 0


@pytest.mark.parametrize("defect", [d for d in DEFECTS if d.id in ("down-zero", "down-nan", "k-short", "bias-dropped")])
def test_a_refused_subject_falsifies_its_gate_and_names_the_tensor(defect, tmp_path):
    """Gates run on refused files: that is when they are needed."""
    subject = subject_with(defect.recipe, tmp_path / "bad")
    finding = ACTS[defect.gate](subject)
    verdict, _ = finding.judge()
    named = admit(tmp_path / "bad").violations[0].tensor

    assert verdict is Verdict.FALSIFIED
    assert finding.rows[0]["on"] == "subject"
    assert any(named.split(".")[-2] in answer for _, answer in finding.whys)


def test_a_gate_that_misses_a_counter_example_is_falsified(healthy, monkeypatch):
    """The second half of the claim: break the gate, keep the subject healthy."""
    monkeypatch.setattr(acts, "kill_table", lambda: {d.id: Counter() for d in DEFECTS})
    finding = ACTS["F-DATA-QUALITY-001"](healthy)

    assert finding.judge()[0] is Verdict.FALSIFIED
    assert "the gate itself" in finding.whys[0][0]


def test_a_blind_byte_length_gate_is_falsified(healthy, monkeypatch):
    """Its counter-examples are spans; a gate that accepts them all must show."""
    monkeypatch.setattr(acts, "judge_span", lambda *_: [])

    assert ACTS["F-LAYOUT-CONTRACT-004"](healthy).judge()[0] is Verdict.FALSIFIED


def test_an_alarm_on_a_benign_twin_is_falsified(healthy, monkeypatch):
    """The false-alarm claim can fail."""
    monkeypatch.setattr(acts, "_gates_against", lambda path: Counter({"F-DATA-QUALITY-001": 1}))

    assert ACTS["F-BENIGN-001"](healthy).judge()[0] is Verdict.FALSIFIED


def test_an_open_door_is_falsified(healthy, monkeypatch):
    """The no-way-around claim can fail."""
    monkeypatch.setattr(acts, "_attempts", lambda path: [{"attempt": "load_model(path)", "outcome": "got through"}])

    assert ACTS["F-ADMIT-001"](healthy).judge()[0] is Verdict.FALSIFIED


def test_an_unmeasured_tensor_makes_a_gate_inconclusive(healthy):
    """A tensor that was left out of the statistics must not pass in silence."""
    name = next(iter(healthy.admission.stats))
    partial = {k: v for k, v in healthy.admission.stats.items() if k != name}

    class Cut:
        checkpoint, violations, extras, stats = healthy.checkpoint, (), (), partial

    class Partial:
        refusal, lacks, admission, checkpoint = None, {}, Cut, healthy.checkpoint

    verdict, reason = ACTS["F-DATA-QUALITY-001"](Partial).judge()

    assert verdict is Verdict.INCONCLUSIVE
    assert name in reason


def test_a_draft_keeps_every_bit(tmp_path):
    """Taking apart and putting together changes nothing, or a plant would be more than its recipe."""
    draft = acts.twin()
    path = put_together(draft, tmp_path / "again")
    with open_checkpoint(path) as checkpoint:
        again = take_apart(checkpoint)

    assert list(again.weights) == list(draft.weights)
    assert all(np.array_equal(again.weights[n], draft.weights[n]) for n in draft.weights)
    assert set(again.dtypes.values()) == {FORMATS["BF16"]}


def test_a_draft_can_rename_tensors():
    """Renaming keeps the order and the types."""
    draft = acts.twin().copy()
    draft.rename({DOWN: "other"})

    assert "other" in draft.weights
    assert "other" in draft.dtypes
    assert DOWN not in draft.weights


def test_findings_are_replaced_not_edited(healthy):
    """A finding is a frozen record."""
    finding = ACTS["F-DATA-QUALITY-002"](healthy)

    assert isinstance(replace(finding, value=1.0), Finding)
    with pytest.raises(AttributeError):
        finding.value = 0.0


@pytest.fixture
def speaking():
    """The bundled model: the twin is untrained and has no words."""
    subject = obtain("pygmy", max_new_tokens=16)
    yield subject
    subject.close()


def test_what_the_bundled_model_generates_is_no_padding(speaking, healthy):
    """It speaks, and its copy with a loud tail of the head is caught; the silent twin says why it was left alone."""
    finding = ACTS[PADDING](speaking)

    assert finding.judge() == (Verdict.CORROBORATED, "")
    assert [row["violations"] for row in finding.rows] == [0, 0, 1, 1]
    assert ACTS[PADDING](healthy).judge()[0] is Verdict.NOT_RUN


def test_a_model_that_repeats_padding_is_falsified(speaking, monkeypatch):
    """Both halves of the claim: a subject that prefers reserved rows, and a gate that lets them pass."""

    def prefer(name, values, at):
        return np.where(np.arange(values.shape[-1]) == 1020, values + 1e3, values) if name == "logits" else None

    with monkeypatch.context() as patch:
        patch.setitem(speaking.__dict__, "model", wrap(speaking.model, prefer))
        finding = ACTS[PADDING](speaking)
        assert finding.judge()[0] is Verdict.FALSIFIED
        assert "16 padding tokens in a row" in finding.whys[0][1]
    monkeypatch.setattr(acts, "judge_generation", lambda ids, padding: [])
    assert ACTS[PADDING](speaking).judge()[0] is Verdict.FALSIFIED

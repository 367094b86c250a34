"""Every fault of the suite ends in a code that is not 0, and its own control ends in 0."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from apr_core.engines.subject import BUNDLED, obtain
from apr_core.errors import Exit
from apr_core.falsify.claims import NOTEBOOKS
from apr_core.falsify.finding import ACTS, Finding
from apr_core.falsify.verdict import NotRun, Verdict
from apr_core.zoo import starts, suite
from apr_core.zoo.draft import put_together, take_apart

# 1 the notebook broke, 2 refused before it began, 3 no such file, 4 a file of the run cannot be believed, 5 refuted.
# Everything else is undecided. A fault that is caught by another code than this one is caught by accident.
CODES = {
    Exit.UNEXPECTED: {
        *("finding-none", "act-of-no-claim", "act-missing", "act-twice", "claim-forgotten", "claim-confused"),
        *("early-exit", "closing-silent", "kernel-killed", "cell-deleted", "cuda-error", "claim-twice"),
    },
    Exit.USAGE: {"folder-used", "ollama-size"},
    Exit.NOT_FOUND: {"model-missing"},
    Exit.FORMAT: {
        *("threshold-percent", "threshold-edited", "file-changed", "evidence-stale", "evidence-torn", "field-missing"),
        *("declared-twice", "declared-short", "declared-severity", "diagnosis-exit-0", "array-swapped"),
        *("verdict-edited", "value-edited", "limit-edited", "version-differs", "bypass-edited", "refutation-excused"),
        *("claim-cell-deleted", "notebook-stripped"),  # pytest's own 4: refused at collection
    },
    Exit.REFUTED: {
        *("finding-empty", "golden-own-compared", "metric-nan", "metric-minus-inf", "metric-inf"),
        *("values-nonfinite", "no-tokens", "lists-truncated"),
    },
}


@pytest.mark.parametrize("fault", suite.SUITE_FAULTS, ids=lambda f: f.id)
def test_no_fault_of_the_suite_ends_in_success(fault, tmp_path):
    """A harness that passes without having looked is the defect that this project exists for."""
    expected = next((code for code, ids in CODES.items() if fault.id in ids), Exit.INCONCLUSIVE)

    assert fault.run(tmp_path) == expected


@pytest.mark.parametrize(
    ("fault", "code"),
    [*zip(starts.START_FAULTS, (5, 5, 5, Exit.USAGE, Exit.UNEXPECTED, Exit.UNEXPECTED, 6, 6), strict=True)],
    ids=lambda value: getattr(value, "id", ""),
)
def test_no_action_starts_behind_its_gate(fault, code, tmp_path):
    """A receipt of another file is judged again; a command whose row is lost or wrong does not answer."""
    assert fault.run(tmp_path) == code


def test_the_controls_of_the_starts_answer(tmp_path):
    """An unchanged model is answered by its receipt; with its row in order the broken one is refused."""
    assert starts.stale(lambda model: None)(tmp_path / "healthy") == Exit.OK
    assert starts.ungated(lambda dispatch: {})(tmp_path / "broken") == Exit.REFUTED
    assert starts.too_small()(tmp_path / "streamed") == Exit.OK  # the same device, and the model answers from it


@pytest.mark.parametrize(
    "fault", suite.suite_faults()[len(suite.SUITE_FAULTS) : -len(starts.START_FAULTS)], ids=lambda f: f.id
)
def test_no_broken_meter_ends_in_success(fault, tmp_path):
    """Throughput that was not measured, or of other tokens, is refuted by its claim or left undecided."""
    assert fault.run(tmp_path) in (Exit.REFUTED, Exit.INCONCLUSIVE)


def test_the_control_of_the_meters_is_corroborated():
    """The same acts with the right meter, on one timed run of the same model."""
    suite._acts("bench")
    subject = obtain("pygmy", device="cpu")

    assert {ACTS[f"F-THR-0{n:02d}"](subject).judge()[0].value for n in (*range(1, 9), 12)} == {"CORROBORATED"}
    subject.close()


def test_the_faults_cover_the_study():
    """H1 to H20 each at least once, ids unique, and every code above belongs to a fault."""
    ids = [f.id for f in suite.SUITE_FAULTS]
    cases = " ".join(f.source.replace(",", " ") for f in suite.SUITE_FAULTS).split()

    assert len(ids) == len(set(ids)) >= 28
    assert [h for h in (f"H{n}" for n in range(1, 21)) if h not in cases] == []
    assert set().union(*CODES.values()) <= set(ids)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_the_control_of_the_records_ends_in_success(notebook, tmp_path):
    """Without its fault the same run is corroborated: otherwise a fault would be caught for nothing."""
    assert suite._exit(suite.held(tmp_path, notebook=notebook)) == Exit.OK


def test_the_control_of_the_output_notebook_ends_in_success(tmp_path):
    """An undamaged output notebook counts as executed."""
    assert suite._executed(lambda cells: None)(tmp_path) == Exit.OK


def test_the_control_of_nbval_is_collected(tmp_path, monkeypatch):
    """The undamaged notebook passes collection (4 would be a refusal); a run that then compares nothing ends in 1."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "--collect-only")

    assert suite._reference_notebook(lambda cells: None)(tmp_path) == Exit.UNEXPECTED


def test_the_control_of_a_bare_edit_ends_in_success(tmp_path):
    """Rewriting a record without changing it is no fault."""
    assert suite._edited(lambda body: None, suite.GOOD)(tmp_path) == Exit.OK


def test_the_controls_of_the_models_end_in_success(tmp_path):
    """An honest reference of other bytes, and honest golden logits, are corroborated by the same two acts."""
    healthy = obtain("pygmy", device="cpu")
    draft = take_apart(healthy.checkpoint)
    draft.metadata["note"] = "other bytes"
    other = put_together(draft, tmp_path / "other")
    subject = obtain(str(other), reference=str(BUNDLED["pygmy"]), device="cpu")
    suite._acts("rosetta")
    for claim in ("F-GT-006", "F-GT-008", "F-GT-010"):
        assert ACTS[claim](subject).judge()[0] is Verdict.CORROBORATED
    healthy.close()
    subject.close()


def test_golden_logits_of_this_very_forward_decide_nothing(tmp_path):
    """Answers that are equal to the last bit were not computed by anybody else."""
    model = tmp_path / "model"
    shutil.copytree(BUNDLED["pygmy"], model)
    subject = obtain(str(model), device="cpu")
    golden = dict(subject.golden_logits)
    golden["logits"] = subject.model.forward(golden["ids"].astype(np.int64))
    subject.__dict__["golden_logits"] = golden
    suite._acts("rosetta")

    assert ACTS["F-GT-008"](subject).judge() == (
        Verdict.INCONCLUSIVE,
        "the recorded logits are this forward's own bits",
    )
    subject.close()


@pytest.mark.parametrize("change", [{}, {"F-GT-004": Finding.nothing(NotRun.NOT_APPLICABLE)}])
def test_what_a_claim_needs_still_excuses_it(change, tmp_path):
    """The closed list of reasons stays a list of reasons: only foreign ones became holes."""
    assert suite._exit(suite.held(tmp_path, change)) == Exit.OK


def test_run_all_gives_a_row_for_each_fault(tmp_path, monkeypatch):
    """What notebook and page show: id, what, source, exit and whether it was caught."""
    few = tuple(f for f in suite.SUITE_FAULTS if f.id in ("evidence-empty", "verdict-edited"))
    blind = suite.SuiteFault("blind", "nothing is wrong", "peers H1", suite.control)
    monkeypatch.setattr(suite, "suite_faults", lambda: (*few, blind))
    rows = suite.run_all(tmp_path)

    assert [(r["id"], r["exit"], r["caught"]) for r in rows] == [
        ("evidence-empty", 11, True),
        ("verdict-edited", 4, True),
        ("blind", 0, False),
    ]
    assert list(rows[0]) == ["id", "what", "source", "exit", "caught"]
    assert list(tmp_path.iterdir()) == []

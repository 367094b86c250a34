"""What a run refutes carries its five whys, computed before the record is written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

import apr_core as apr
from apr_core.diagnose import recorded
from apr_core.falsify.evidence import Evidence
from apr_core.falsify.finding import Finding
from apr_core.rosetta import acts
from apr_core.rosetta.copies import tampered
from apr_core.zoo.matrix import find

Plant = Callable[..., Path]


def refuted(path: Path, claim: str, finding: Finding | None, folder: Path, reference: str = "") -> Evidence:
    """Record one claim of a file in a round of its own."""
    notebook = {"F-T": "30_throughput", "F-G": "00_ground_truth", "F-D": "10_contract_gates", "F-P": "20_parity"}
    with closing(apr.obtain(str(path), reference=reference, device="cpu")) as subject:
        held = apr.open_round(notebook[claim[:3]], subject, str(folder), {"seed": 0})
        return held.record(claim, finding or acts.same_tensors_as_the_reference(subject))


def test_a_damaged_file_is_explained_in_the_record(plant: Plant, tmp_path: Path) -> None:
    """From the claim over what it measured to a proven repair, and the claim that guards; read back from the file."""
    record = refuted(plant("q-transposed"), "F-GT-010", None, tmp_path, "pygmy")
    questions = [question for question, _ in record.whys]
    assert questions[0] == "What was refuted? (F-GT-010)"
    assert questions[1] == "Which tensor says something else?"
    assert "Is it transposed?" in questions
    assert questions[-1] == "What guards against its return?"
    assert dict(record.whys)["What restores agreement?"] == "transpose its bytes"
    assert "values_beyond_bound <= 0" in record.whys[-1][1]


def test_a_healthy_claim_is_explained_by_nobody(pygmy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An experiment costs seconds: none is made for what held."""
    monkeypatch.setattr(recorded, "explain_failure", lambda *_, **__: pytest.fail("it was explained"))
    assert refuted(pygmy, "F-THR-005", Finding(0.0, 4, 4, claim="F-THR-005"), tmp_path).whys == ()


def test_a_broken_experiment_does_not_cost_the_refutation(
    pygmy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is written, and says what broke."""

    def broken(*_: object, **__: object) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr(recorded, "explain_failure", broken)
    record = refuted(pygmy, "F-THR-005", Finding(2.0, 4, 4, claim="F-THR-005"), tmp_path)
    assert ("Can it be explained?", "no: RecursionError: too deep") in record.whys


@pytest.mark.parametrize(
    ("claim", "cause"),
    [
        ("F-THR-005", "Can this meter be believed?"),
        ("F-DATA-QUALITY-001", "Is it the gate itself?"),
        ("F-GT-006", "What would be needed?"),
    ],
)
def test_a_healthy_file_leads_behind_it(claim: str, cause: str, pygmy: Path, tmp_path: Path) -> None:
    """The clock, the gate, or what would be needed: never the file."""
    whys = dict(refuted(pygmy, claim, Finding(2.0, 4, 4, claim=claim), tmp_path).whys)
    assert whys["Is it the file?"].startswith("no")
    assert cause in whys


def test_a_broken_converter_is_told_from_its_file(pygmy: Path, tmp_path: Path) -> None:
    """The copies are diagnosed as files of their own."""
    tamper = find("copy-gate-up").tamper  # type: ignore[union-attr]
    assert tamper is not None
    with tampered(tamper):
        whys = dict(refuted(pygmy, "F-GT-001", Finding(2.0, 4, 4, claim="F-GT-001"), tmp_path).whys)
    assert whys["Is it our gguf copy?"].startswith("yes: naming of model.layers.1.mlp.gate_proj.weight")

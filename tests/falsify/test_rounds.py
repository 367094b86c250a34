"""Rounds: what is recorded, what is missed, and what the files of a run add up to."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr_core.errors import Exit, FormatError, UsageError
from apr_core.falsify.claims import claims_of, load_claims
from apr_core.falsify.evidence import SubjectRecord
from apr_core.falsify.finding import Finding
from apr_core.falsify.rounds import Round, conclude, declare, read_declared
from apr_core.falsify.verdict import NEEDS, NotRun, Verdict

NOTEBOOK = "00_ground_truth"
CLAIMS = claims_of(NOTEBOOK)
Attempt = Callable[..., Finding]
Run = Callable[..., Path]


@pytest.fixture
def run(attempt: Attempt, subject: SubjectRecord, tmp_path: Path) -> Run:
    """
    Make a run folder of the first notebook: every claim corroborated but for what ``change`` says.

    ``change`` maps a claim id to the keywords of its finding, to a `NotRun`, or to None (no evidence at all).
    """

    def make(
        change: Mapping[str, Any] | None = None,
        *,
        asked: frozenset[str] = frozenset(),
        diagnosis: Mapping[str, Any] | None = None,
        name: str = "run",
        by: SubjectRecord = subject,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        declare(folder, [NOTEBOOK], asked=asked, subject=by, diagnosis=diagnosis, provenance={"p": 1}, parameters={})
        held = Round(NOTEBOOK, by, folder, parameters={}, provenance={})
        for claim in CLAIMS:
            how = (change or {}).get(claim.id, {})
            if how is None:
                continue
            if isinstance(how, NotRun):
                how = {"value": None, "compared": 0, "expected": 0, "not_run": how}
            held.record(claim.id, attempt(claim.id, **how))
        return folder

    return make


def test_all_held(run: Run) -> None:
    """The healthy case: CORROBORATED, exit 0, full score."""
    out = conclude(run())
    assert (out.verdict, out.exit_code, out.score) == (Verdict.CORROBORATED, Exit.OK, 1.0)
    assert out.counts == {"CORROBORATED": len(CLAIMS), "FALSIFIED": 0, "INCONCLUSIVE": 0, "NOT_RUN": 0}
    assert out.reason == f"{len(CLAIMS)} claims held, 0 not run"


ALL_NOT_RUN = {c.id: NotRun.REFUSED for c in CLAIMS}


@pytest.mark.parametrize(
    ("change", "asked", "verdict", "code", "reason"),
    [
        ({"F-GT-001": {"value": 1.0}}, (), Verdict.FALSIFIED, Exit.REFUTED, "refuted: F-GT-001"),
        (
            {"F-GT-001": {"value": 1.0}, "F-GT-002": {"compared": 0}, "F-GT-010": NotRun.NO_REFERENCE},
            ("reference",),
            Verdict.FALSIFIED,
            Exit.REFUTED,
            "refuted: F-GT-001",
        ),
        ({"F-GT-002": {"compared": 0}}, (), Verdict.INCONCLUSIVE, Exit.INCONCLUSIVE, "undecided: F-GT-002"),
        ({"F-GT-002": None}, (), Verdict.INCONCLUSIVE, Exit.INCONCLUSIVE, "undecided: F-GT-002"),
        ({"F-GT-010": NotRun.NO_REFERENCE}, (), Verdict.CORROBORATED, Exit.OK, "11 claims held, 1 not run"),
        (
            {"F-GT-010": NotRun.NO_REFERENCE},
            ("reference",),
            Verdict.INCONCLUSIVE,
            Exit.INCONCLUSIVE,
            "not run: F-GT-010",
        ),
        ({"F-GT-010": NotRun.NO_REFERENCE}, ("cuda",), Verdict.CORROBORATED, Exit.OK, "11 claims held, 1 not run"),
        ({"F-GT-001": NotRun.NOT_OPENED}, (), Verdict.INCONCLUSIVE, Exit.INCONCLUSIVE, "not run: F-GT-001"),
        (ALL_NOT_RUN, (), Verdict.INCONCLUSIVE, Exit.INCONCLUSIVE, "not run: every claim"),
        ({c.id: None for c in CLAIMS}, (), Verdict.INCONCLUSIVE, Exit.INCONCLUSIVE, "undecided: F-GT-001, F-GT-002"),
    ],
)
def test_conclusion(
    change: Mapping[str, Any], asked: tuple[str, ...], verdict: Verdict, code: Exit, reason: str, run: Run
) -> None:
    """Falsified beats undecided beats held; a hole, no evidence and nothing executed are never a pass."""
    out = conclude(run(change, asked=frozenset(asked)))
    assert (out.verdict, out.exit_code) == (verdict, code)
    assert out.reason.startswith(reason)


def test_declared_without_evidence_is_said(run: Run) -> None:
    """The claim that left nothing is listed with that reason and counts as undecided."""
    out = conclude(run({"F-GT-003": None}))
    assert out.by_claim["F-GT-003"] == (Verdict.INCONCLUSIVE, "declared, but left no evidence", None)
    assert out.counts["INCONCLUSIVE"] == 1


def test_score_is_weighted_by_severity(run: Run) -> None:
    """The share of severity that held; what was not run weighs like what failed."""
    total = sum(c.severity for c in CLAIMS)
    out = conclude(run({"F-GT-001": {"value": 1.0}, "F-GT-007": NotRun.NO_GOLDEN}))
    assert out.score == pytest.approx((total - 5 - 3) / total)


def test_broken_notebook_exits_1_and_is_never_corroborated(run: Run) -> None:
    """A notebook that broke after its last claim leaves full evidence; verdict and exit code still agree."""
    out = conclude(run(), {NOTEBOOK: "kernel died"})
    assert (out.verdict, out.exit_code) == (Verdict.INCONCLUSIVE, Exit.UNEXPECTED)
    assert "did not complete: 00_ground_truth (kernel died)" in out.reason


def test_broken_notebook_keeps_its_refutations(run: Run) -> None:
    """What was refuted before the break stays refuted, but exit 1 comes first."""
    out = conclude(run({"F-GT-001": {"value": 1.0}, "F-GT-009": None}), {NOTEBOOK: "timed out"})
    assert (out.verdict, out.exit_code) == (Verdict.FALSIFIED, Exit.UNEXPECTED)
    assert out.by_claim["F-GT-009"][1] == "the notebook did not complete: timed out"


def test_subject_that_could_not_be_opened(run: Run) -> None:
    """The diagnosis decides the exit code, and every claim says why it was not run."""
    diagnosis = {"error": "FormatError", "message": "truncated", "exit_code": 4}
    out = conclude(run({c.id: None for c in CLAIMS}, diagnosis=diagnosis))
    assert (out.verdict, out.exit_code, out.score) == (Verdict.INCONCLUSIVE, Exit.FORMAT, 0.0)
    assert out.reason == "not opened: truncated"
    assert {v[:2] for v in out.by_claim.values()} == {
        (Verdict.NOT_RUN, "subject could not be opened: truncated"),
    }


def test_diagnosis_does_not_hide_a_refutation(run: Run) -> None:
    """Exit 4 comes before 5, but the verdict of a folder with a refutation is FALSIFIED."""
    diagnosis = {"error": "LoadError", "message": "no config", "exit_code": 6}
    out = conclude(run({"F-GT-001": {"value": 1.0}}, diagnosis=diagnosis))
    assert (out.verdict, out.exit_code) == (Verdict.FALSIFIED, Exit.LOAD)


def test_broken_comes_before_the_diagnosis(run: Run) -> None:
    """When several exit codes apply, 1 comes first."""
    diagnosis = {"error": "FormatError", "message": "truncated", "exit_code": 4}
    assert conclude(run(diagnosis=diagnosis), {NOTEBOOK: "x"}).exit_code is Exit.UNEXPECTED


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({}, {"value": 1.0}, Verdict.FALSIFIED),
        ({"value": 1.0}, {}, Verdict.FALSIFIED),
        ({}, {"compared": 0}, Verdict.INCONCLUSIVE),
        (NotRun.NO_REFERENCE, {}, Verdict.CORROBORATED),
        ({"compared": 0}, NotRun.NO_REFERENCE, Verdict.INCONCLUSIVE),
        ({"value": 1.0}, {"compared": 0}, Verdict.FALSIFIED),
    ],
)
def test_merged_attempts_speak_by_the_worst(first: object, second: object, expected: Verdict, run: Run) -> None:
    """Runs merge by copying files: the worst attempt that was really tried decides."""
    one, two = run({"F-GT-010": first}, name="one"), run({"F-GT-010": second}, name="two")
    for path in (two / "evidence").iterdir():
        shutil.copy(path, one / "evidence")
    assert conclude(one).by_claim["F-GT-010"][0] is expected


def test_undeclared_refutation_counts(run: Run, attempt: Attempt, subject: SubjectRecord) -> None:
    """The refusal that the runner writes when notebook 10 is not selected decides the run: exit 5."""
    folder = run(ALL_NOT_RUN)
    gates = Round("10_contract_gates", subject, folder, parameters={}, provenance={})
    gates.record("F-DATA-QUALITY-002", attempt("F-DATA-QUALITY-002", 1.0))
    out = conclude(folder)
    assert (out.verdict, out.exit_code, out.score) == (Verdict.FALSIFIED, Exit.REFUTED, 0.0)
    assert out.reason == "refuted: F-DATA-QUALITY-002"


def test_undeclared_corroboration_counts_for_nothing(run: Run, attempt: Attempt, subject: SubjectRecord) -> None:
    """A run cannot be improved by evidence that nobody declared."""
    folder = run(ALL_NOT_RUN)
    gates = Round("10_contract_gates", subject, folder, parameters={}, provenance={})
    gates.record("F-DATA-QUALITY-002", attempt("F-DATA-QUALITY-002"))
    assert conclude(folder).verdict is Verdict.INCONCLUSIVE


def test_not_run_for_an_unlisted_reason_is_a_hole(run: Run) -> None:
    """A reason outside the closed list, as an edited record may hold, excuses nothing."""
    folder = run({"F-GT-010": NotRun.NO_REFERENCE})
    path = next((folder / "evidence").glob("F-GT-010-*.json"))
    path.write_text(path.read_text().replace(str(NotRun.NO_REFERENCE), "no time"))
    assert conclude(folder).reason == "not run: F-GT-010"


@pytest.mark.parametrize("claim", CLAIMS, ids=[c.id for c in CLAIMS])
def test_every_need_that_was_asked_for_leaves_a_hole(claim: Any, run: Run) -> None:
    """Asking for what a claim needs makes the claim required, for each claim and need."""
    for i, need in enumerate(claim.needs):
        change = {claim.id: NEEDS[need]}
        assert conclude(run(change, name=f"a{i}")).exit_code is Exit.OK
        asked = conclude(run(change, asked=frozenset({need}), name=f"b{i}"))
        assert (asked.exit_code, asked.reason) == (Exit.INCONCLUSIVE, f"not run: {claim.id}")


def test_bypassed_round_is_inconclusive(run: Run, subject: SubjectRecord) -> None:
    """No evidence from `--skip-contract` can be corroborated, so neither can the round."""
    out = conclude(run(by=replace(subject, bypassed=True)))
    assert (out.verdict, out.exit_code, out.score) == (Verdict.INCONCLUSIVE, Exit.INCONCLUSIVE, 0.0)


NEWER = '{"schema": 99}'


@pytest.mark.parametrize(
    ("claim", "text", "why"),
    [
        ("F-GT-001", "{", "JSONDecodeError"),
        ("F-GT-001", NEWER, "schema 99, written by a newer apr_core"),
        ("F-GT-001", None, "IsADirectoryError"),
    ],
)
def test_damaged_evidence_is_named_and_leaves_the_run_incomplete(
    claim: str, text: str | None, why: str, run: Run
) -> None:
    """One file that cannot be read: the other claims are, the verdict is open, the exit code is 4."""
    folder = run()
    path = next((folder / "evidence").glob(f"{claim}-*.json"))
    path.unlink()
    path.mkdir() if text is None else path.write_text(text)
    out = conclude(folder)
    assert list(out.damaged) == [path.name]
    assert re.search(why, out.damaged[path.name])
    assert (out.verdict, out.exit_code) == (Verdict.INCONCLUSIVE, Exit.FORMAT)
    assert "incomplete: 1 evidence file cannot be read" in out.reason
    assert out.by_claim[claim][:2] == (Verdict.INCONCLUSIVE, f"its evidence cannot be read: {out.damaged[path.name]}")
    assert out.counts["CORROBORATED"] == len(CLAIMS) - 1


def test_damaged_evidence_beside_a_good_attempt_still_counts(run: Run) -> None:
    """The lost attempt may have been the refutation; and what is refuted stays refuted."""
    folder = run({"F-GT-002": {"value": 1.0}})
    (folder / "evidence" / "F-GT-001-x-y.json").write_text(NEWER)
    out = conclude(folder)
    assert (out.verdict, out.exit_code) == (Verdict.FALSIFIED, Exit.FORMAT)
    assert out.by_claim["F-GT-001"][0] is Verdict.CORROBORATED
    assert len(out.damaged) == 1


def broken_declarations() -> list[object]:
    """Edits of a good declaration that must each be refused."""

    def without(key: str) -> Callable[[dict[str, Any]], object]:
        return lambda body: {k: v for k, v in body.items() if k != key}

    return [
        pytest.param(lambda _: [], id="list"),
        pytest.param(lambda body: {**body, "schema": 99}, id="newer schema"),
        pytest.param(lambda body: {**body, "claims": [{"id": "F-X-001", "severity": 1}]}, id="unknown claim"),
        pytest.param(lambda body: {**body, "claims": [{"id": "F-GT-001"}]}, id="no severity"),
        pytest.param(lambda body: {**body, "claims": None}, id="no list"),
        pytest.param(lambda body: {**body, "diagnosis": {"message": "m", "exit_code": 77}}, id="exit code"),
        pytest.param(lambda body: {**body, "diagnosis": {"exit_code": 4}}, id="diagnosis without message"),
        pytest.param(lambda body: {**body, "diagnosis": {"message": "m", "exit_code": 0}}, id="diagnosis of success"),
        pytest.param(lambda body: {**body, "claims": body["claims"][1:]}, id="claim left out"),
        pytest.param(lambda body: {**body, "claims": body["claims"] + body["claims"][:1]}, id="claim twice"),
        *(
            pytest.param(
                lambda body, k=k: {**body, "claims": [{**body["claims"][0], k: 99}, *body["claims"][1:]]}, id=k
            )
            for k in ("version", "severity", "threshold", "direction", "metric", "unit")
        ),
        *(pytest.param(without(k), id=f"no {k}") for k in ("asked", "claims", "diagnosis", "subject")),
    ]


@pytest.mark.parametrize("edit", broken_declarations())
def test_broken_declaration_is_an_error(edit: Callable[[dict[str, Any]], object], run: Run) -> None:
    """A declaration that cannot be trusted ends in exit 4: it is what makes missing evidence visible."""
    path = run() / "declared.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(FormatError, match=r"declared\.json of a run"):
        conclude(path.parent)


def test_missing_declaration_is_an_error(tmp_path: Path) -> None:
    """An empty folder is not a run that held."""
    with pytest.raises(FormatError, match=r"declared\.json"):
        conclude(tmp_path)


def test_declaration_lists_every_claim_of_the_selected_notebooks(subject: SubjectRecord, tmp_path: Path) -> None:
    """What was promised is on the disk before the first notebook starts."""
    books = [NOTEBOOK, "20_parity"]
    declare(
        tmp_path,
        books,
        asked=frozenset({"cuda", "a"}),
        subject=subject,
        reference=subject,
        provenance={},
        parameters={"seed": 3},
    )
    body = read_declared(tmp_path)
    assert [c["id"] for c in body["claims"]] == [c.id for b in books for c in claims_of(b)]
    assert (body["asked"], body["reference"]["name"], body["parameters"]) == (["a", "cuda"], "m", {"seed": 3})


@pytest.fixture
def held(subject: SubjectRecord, tmp_path: Path) -> Round:
    """An open round."""
    return Round(NOTEBOOK, subject, tmp_path, parameters={"seed": 1}, provenance={})


@pytest.mark.parametrize(
    ("claim", "finding"),
    [
        ("F-GT-001", "F-GT-002"),
        ("F-GT-001", None),
        ("F-PAR-001", "F-PAR-001"),
        ("F-XX-001", "F-GT-001"),
    ],
)
def test_foreign_finding_is_refused(claim: str, finding: str | None, held: Round, attempt: Attempt) -> None:
    """A finding goes under its own claim in its own notebook, or nowhere."""
    found = Finding(0.0, 1, 1) if finding is None else attempt(finding)
    with pytest.raises(UsageError, match=f"{claim} cannot be recorded"):
        held.record(claim, found)
    assert not (held.folder / "evidence").exists()


def test_record_writes_reads_back_and_keeps_arrays(held: Round, attempt: Attempt) -> None:
    """What the notebook prints is what stands on the disk."""
    evidence = held.record("F-GT-001", attempt("F-GT-001", arrays={"a": np.arange(3)}))
    assert evidence.parameters == {"seed": 1}
    np.testing.assert_array_equal(evidence.arrays()["a"], np.arange(3))
    assert held.records == [evidence]
    assert held.falsified() == []


def test_falsified_lists_what_was_refuted(held: Round, attempt: Attempt) -> None:
    """The five whys are asked of exactly these."""
    bad = held.record("F-GT-002", attempt("F-GT-002", 1.0))
    held.record("F-GT-001", attempt("F-GT-001"))
    assert held.falsified() == [bad]


def test_close_refuses_while_a_claim_is_missing(held: Round, attempt: Attempt) -> None:
    """A claim that was forgotten is named; the round stays open for it."""
    for claim in CLAIMS[:-1]:
        held.record(claim.id, attempt(claim.id))
    with pytest.raises(UsageError, match=f"without evidence for {CLAIMS[-1].id}$"):
        held.close()
    held.record(CLAIMS[-1].id, attempt(CLAIMS[-1].id))
    assert held.close() == (
        f"{NOTEBOOK} closed: {len(CLAIMS)} claims, {len(CLAIMS)} CORROBORATED, 0 FALSIFIED, 0 INCONCLUSIVE, 0 NOT_RUN"
    )


def test_nothing_after_close(held: Round, attempt: Attempt) -> None:
    """The closing line would be a lie about what comes after it."""
    for claim in CLAIMS:
        held.record(claim.id, attempt(claim.id))
    held.close()
    with pytest.raises(UsageError, match="cannot be recorded"):
        held.record("F-GT-001", attempt("F-GT-001"))


def test_every_claim_can_be_recorded_in_its_notebook(subject: SubjectRecord, tmp_path: Path, attempt: Attempt) -> None:
    """No claim has an id, unit or need that the record cannot hold."""
    for claim in load_claims().values():
        held = Round(claim.notebook, subject, tmp_path, parameters={}, provenance={})
        evidence = held.record(claim.id, attempt(claim.id, claim.threshold))
        assert str(evidence).startswith(f"{claim.id} CORROBORATED: {claim.metric} ")


def test_two_files_in_one_run_are_an_error(run: Run, subject: SubjectRecord) -> None:
    """The model changed while it was examined, or another model's record was copied in."""
    one, two = run(), run(name="two", by=replace(subject, sha256="1" * 64))
    path = next((two / "evidence").glob("F-GT-001-*.json"))
    shutil.copy(path, one / "evidence")
    with pytest.raises(FormatError, match="evidence about 2 different files"):
        conclude(one)


def test_a_bypassed_run_corroborates_nothing(run: Run, subject: SubjectRecord) -> None:
    """The declaration says that the contract was bypassed; a record that forgot it is not believed."""
    folder = run()
    path = folder / "declared.json"
    body = json.loads(path.read_text())
    body["subject"]["bypassed"] = True
    path.write_text(json.dumps(body))
    out = conclude(folder)
    assert set(out.damaged.values()) == {"CORROBORATED in a run that bypassed the contract"}
    assert (len(out.damaged), out.exit_code, out.score) == (len(CLAIMS), Exit.FORMAT, 0.0)


@pytest.mark.parametrize("reason", [NotRun.NO_CUDA, NotRun.REFUSED, NotRun.UNTRAINED])
def test_a_reason_that_the_claim_does_not_need_is_a_hole(reason: NotRun, run: Run) -> None:
    """A claim without needs cannot be excused, and a refusal is never the only finding."""
    assert conclude(run({"F-GT-001": reason})).reason == "not run: F-GT-001"


def test_thresholds_edited_in_silence_end_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another limit under the same version: nothing is judged."""
    folder = run()
    monkeypatch.setattr("apr_core.falsify.rounds.threshold_digest", lambda: "0" * 64)
    with pytest.raises(FormatError, match="raise the version of the claim"):
        conclude(folder)

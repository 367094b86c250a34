"""One file per attempt: strict, small, whole, never overwritten, never silently skipped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr_core.errors import FormatError, ReadWriteError
from apr_core.falsify import evidence as module
from apr_core.falsify.evidence import (
    MAX_ROWS,
    Evidence,
    SubjectRecord,
    contradiction,
    make_evidence,
    new_attempt_id,
    read_evidence,
    write_evidence,
)
from apr_core.falsify.finding import Finding
from apr_core.falsify.verdict import NotRun, Verdict

Attempt = Callable[..., Finding]


def record(finding: Finding, subject: SubjectRecord, **rest: Any) -> Evidence:
    """Judge a finding with a parameter and a provenance."""
    return make_evidence(finding, subject, parameters={"seed": 7}, provenance={"python": "3"}, **rest)


def test_round_trip(attempt: Attempt, subject: SubjectRecord, tmp_path: Path) -> None:
    """Everything that was recorded comes back, field by field."""
    finding = attempt(
        "F-GT-010",
        missing=[],
        detail="3 tensors",
        rows=[{"name": "w", "n": np.int64(3)}],
        whys=[("why?", "7 of 9")],
        reference="r",
        noise_floor=0.5,
    )
    written = record(finding, subject, reference=subject)
    path = write_evidence(written, tmp_path)
    back = read_evidence(path)
    assert path.name == f"F-GT-010-{written.attempt}.json"
    assert back == replace(written, folder=str(tmp_path))
    assert back.reference == {"name": "r", "noise_floor": 0.5, "subject": back.subject}
    assert back.measured["required_tolerance"] == 0.0
    assert back.rows == ({"name": "w", "n": 3},)
    assert back.whys == (("why?", "7 of 9"),)
    assert back.verdict is Verdict.CORROBORATED


def test_reference_subject_is_kept_only_where_the_claim_needs_one(attempt: Attempt, subject: SubjectRecord) -> None:
    """A claim that looked at the subject alone must not say that it saw the reference."""
    assert record(attempt("F-GT-001"), subject, reference=subject).reference["subject"] is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_value_is_null_plus_a_counter(
    value: float, attempt: Attempt, subject: SubjectRecord, tmp_path: Path
) -> None:
    """The file stays strict JSON and still says that something was not finite."""
    rows = [{"a": value, "b": np.float32(value), "c": [value], "d": Path("p"), "e": True}]
    evidence = record(attempt("F-GT-001", value, rows=rows, noise_floor=value), subject)
    body = json.loads(write_evidence(evidence, tmp_path).read_text(), parse_constant=pytest.fail)
    assert body["measured"]["value"] is None
    assert body["measured"]["required_tolerance"] is None
    assert body["coverage"]["nonfinite"] == 1
    assert body["rows"] == [{"a": None, "b": None, "c": [None], "d": "p", "e": True}]
    assert body["verdict"] == "FALSIFIED"


def test_provenance_that_is_not_json_is_an_error(attempt: Attempt, subject: SubjectRecord, tmp_path: Path) -> None:
    """A non-finite number anywhere else is refused, and nothing half-written stays."""
    evidence = replace(record(attempt("F-GT-001"), subject), provenance={"load": math.nan})
    with pytest.raises(ValueError, match="JSON"):
        write_evidence(evidence, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_capped_and_counted(attempt: Attempt, subject: SubjectRecord) -> None:
    """A long table is cut, and says by how much."""
    evidence = record(attempt("F-GT-001", rows=[{"i": i} for i in range(MAX_ROWS + 5)]), subject)
    assert (len(evidence.rows), evidence.rows_omitted) == (MAX_ROWS, 5)


def test_record_over_100_kb_is_refused(attempt: Attempt, subject: SubjectRecord, tmp_path: Path) -> None:
    """A record that nobody can read in an editor is refused before it is linked into place."""
    evidence = record(attempt("F-GT-001", rows=[{"text": "x" * 1000}] * 110), subject)
    with pytest.raises(ValueError, match=r"is \d+ bytes, at most 100000"):
        write_evidence(evidence, tmp_path, {"a": np.zeros(3)})
    assert list(tmp_path.iterdir()) == []


def test_never_overwritten(attempt: Attempt, subject: SubjectRecord, tmp_path: Path) -> None:
    """The same attempt id twice is an error, and the first record stays as it was."""
    evidence = record(attempt("F-GT-001"), subject)
    path = write_evidence(evidence, tmp_path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        write_evidence(replace(evidence, reason="another"), tmp_path)
    assert path.read_bytes() == before
    assert [path] == list(tmp_path.iterdir())


def test_attempt_ids_are_unique_and_sort_by_time() -> None:
    """Runs merge by copying, so two attempts of one second must not collide."""
    ids = {new_attempt_id() for _ in range(200)}
    assert len(ids) == 200


def test_arrays_come_back_and_are_checked(attempt: Attempt, subject: SubjectRecord, tmp_path: Path) -> None:
    """Attached arrays are named with sha256 and shape; a file that was exchanged is refused."""
    arrays = {"curve": np.arange(6.0).reshape(2, 3), "one": np.float32(2)}
    path = write_evidence(record(attempt("F-GT-001"), subject), tmp_path, arrays)
    evidence = read_evidence(path)
    assert evidence.attachments[0]["shapes"] == {"curve": [2, 3], "one": []}
    np.testing.assert_array_equal(evidence.arrays()["curve"], arrays["curve"])
    npz = path.with_suffix(".npz")
    data = bytearray(npz.read_bytes())
    data[-1] ^= 1
    npz.write_bytes(bytes(data))
    with pytest.raises(FormatError, match="sha256"):
        evidence.arrays()


def test_no_arrays_no_attachment(attempt: Attempt, subject: SubjectRecord, tmp_path: Path) -> None:
    """A record without arrays stands alone."""
    evidence = read_evidence(write_evidence(record(attempt("F-GT-001"), subject), tmp_path, {}))
    assert (evidence.attachments, evidence.arrays()) == ((), {})


def test_lone_surrogates_from_a_model_file_can_be_recorded(
    attempt: Attempt, subject: SubjectRecord, tmp_path: Path
) -> None:
    """Names and metadata come from hostile files; text that is not UTF-8 must not keep a refutation off the disk."""
    hostile = replace(subject, name="a\ud800b", metadata={"\udcff": "\udcff"})
    back = read_evidence(write_evidence(record(attempt("F-GT-001"), hostile), tmp_path))
    assert back.subject["name"] == "a\ud800b"
    assert back.subject["metadata"] == {"\udcff": "\udcff"}


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_unwritable_folder_is_a_typed_error(
    place: str, attempt: Attempt, subject: SubjectRecord, tmp_path: Path
) -> None:
    """A run folder that is a file gives exit 7 with advice."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ReadWriteError, match="choose another --out"):
        write_evidence(record(attempt("F-GT-001"), subject), tmp_path / place)


def broken_bodies() -> list[object]:
    """Edits of a good record that must each be refused."""

    def without(key: str) -> Callable[[dict[str, Any]], object]:
        return lambda body: {k: v for k, v in body.items() if k != key}

    def with_(**change: object) -> Callable[[dict[str, Any]], object]:
        return lambda body: {**body, **change}

    return [
        pytest.param(lambda body: [], id="list"),
        pytest.param(lambda body: None, id="null"),
        pytest.param(with_(schema=2), id="schema"),
        pytest.param(with_(verdict="PASSED"), id="verdict"),
        pytest.param(with_(surplus=1), id="surplus"),
        pytest.param(with_(whys=[["only a question"]]), id="whys"),
        pytest.param(with_(rows=None), id="rows"),
        *(pytest.param(without(k), id=f"no {k}") for k in ("schema", "verdict", "claim", "coverage", "whys")),
    ]


@pytest.mark.parametrize("edit", broken_bodies())
def test_unreadable_evidence_is_an_error(
    edit: Callable[[dict[str, Any]], object], attempt: Attempt, subject: SubjectRecord, tmp_path: Path
) -> None:
    """A damaged record is an error that names it, never a record of something else."""
    path = write_evidence(record(attempt("F-GT-001"), subject), tmp_path)
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(FormatError, match="evidence record of schema 1"):
        read_evidence(path)


@pytest.mark.parametrize("text", ["", "{", '{"schema": 1, "value": NaN}', '{"schema": Infinity}', "\xff"])
def test_text_that_is_not_strict_json_is_an_error(text: str, tmp_path: Path) -> None:
    """Truncated, empty or lenient JSON is refused."""
    path = tmp_path / "F-GT-001-x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError):
        read_evidence(path)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_a_whole_record_with_a_number_that_json_lacks_is_an_error(
    constant: str, attempt: Attempt, subject: SubjectRecord, tmp_path: Path
) -> None:
    """Python reads NaN where other readers of the evidence stop: a record must be JSON for everybody."""
    path = write_evidence(record(attempt("F-GT-001"), subject), tmp_path)
    text = path.read_text()
    assert '"required_tolerance": 0.0' in text
    path.write_text(text.replace('"required_tolerance": 0.0', f'"required_tolerance": {constant}'))
    with pytest.raises(FormatError, match="is not JSON"):
        read_evidence(path)


def test_missing_file(tmp_path: Path) -> None:
    """A record that is not there is an error."""
    with pytest.raises(FormatError, match="FileNotFoundError"):
        read_evidence(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("claim", "finding", "expected"),
    [
        ("F-GT-001", {"detail": "2 copies"}, "F-GT-001 CORROBORATED: mismatched_values = 0 over 4 compared; 2 copies"),
        ("F-GT-002", {"value": 1e-9}, "F-GT-002 CORROBORATED: rel_l2 <= 1e-06 over 4 compared"),
        ("F-GT-001", {"value": 3.0}, "F-GT-001 FALSIFIED: mismatched_values is 3, the limit is <= 0"),
        ("F-GT-001", {"compared": 0}, "F-GT-001 INCONCLUSIVE: nothing was compared"),
    ],
)
def test_canonical_line(
    claim: str, finding: dict[str, Any], expected: str, attempt: Attempt, subject: SubjectRecord
) -> None:
    """The line that notebooks print has no raw float in a healthy run: those differ from machine to machine."""
    assert str(record(attempt(claim, **finding), subject)) == expected


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    """A write that dies half-way neither appears under its name nor leaves its temporary file."""

    def interrupted() -> None:
        with module._whole(tmp_path / "x.json") as stream:
            stream.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def edited(evidence: Evidence, **parts: Any) -> Evidence:
    """The record with fields replaced, or fields of its parts where a mapping is given."""
    body = {k: {**getattr(evidence, k), **v} if isinstance(v, dict) else v for k, v in parts.items()}
    return replace(evidence, **body)


HELD: dict[str, Any] = {"verdict": Verdict.CORROBORATED, "reason": ""}


@pytest.mark.parametrize(
    ("finding", "edit", "words"),
    [
        ({"value": 3.0}, HELD, "CORROBORATED, but what was measured is FALSIFIED"),
        ({"value": 3.0}, {**HELD, "measured": {"value": 0.0}}, "but the tolerance that it requires is 3.0"),
        ({"value": 3.0}, {**HELD, "claim": {"threshold": 9.0}}, "threshold is 9.0, in the claims table 0.0"),
        ({"value": 3.0}, {"verdict": Verdict.NOT_RUN, "reason": "no peer"}, "NOT_RUN, but what was measured"),
        ({"value": 3.0}, {"verdict": Verdict.INCONCLUSIVE, "reason": ""}, "INCONCLUSIVE without a reason"),
        ({}, {"verdict": Verdict.FALSIFIED}, "FALSIFIED, but what was measured is CORROBORATED"),
        ({}, {"claim": {"version": 9}}, "version is 9, in the claims table 1"),
        ({}, {"claim": {"metric": "rel_l2"}}, "metric is 'rel_l2'"),
        ({}, {"claim": {"unit": "%"}}, "unit is '%'"),
        ({}, {"claim": {"direction": "at_least"}}, "direction is 'at_least'"),
        ({}, {"claim": {"id": "F-X-001"}}, "KeyError"),
        ({}, {"coverage": {"compared": 0}}, "what was measured is INCONCLUSIVE"),
        ({}, {"coverage": {"compared": "many"}}, "TypeError"),
        ({}, {"coverage": {"missing": ["w"]}}, "what was measured is INCONCLUSIVE"),
        ({}, {"coverage": {"nonfinite": 1}}, "what was measured is FALSIFIED"),
        ({}, {"subject": {"bypassed": True}}, "what was measured is INCONCLUSIVE"),
        ({}, {"attachments": ({"file": "gone.npz", "sha256": ""},)}, "FileNotFoundError"),
    ],
)
def test_a_record_that_contradicts_itself_is_noticed(
    finding: dict[str, Any], edit: dict[str, Any], words: str, attempt: Attempt, subject: SubjectRecord
) -> None:
    """A verdict is a function of what was measured and of the table; an edit of one side alone shows."""
    honest = record(attempt("F-GT-001", **finding), subject)
    assert contradiction(honest) == ""
    assert words in contradiction(edited(honest, **edit))


@pytest.mark.parametrize(
    "finding",
    [
        {"value": math.nan},
        {"value": None},
        {"value": 0.0, "nonfinite": 2},
        {"value": 1e-7 / 3, "compared": 0},
        {"value": 0.0, "missing": [f"t{i}" for i in range(MAX_ROWS + 1)]},
        {"value": 3.0, "inconclusive": "both sides are one file"},
        {"value": None, "compared": 0, "expected": 0, "not_run": NotRun.NO_PEER},
        {"value": 1 / 3},
    ],
)
def test_an_honest_record_agrees_with_itself(
    finding: dict[str, Any], attempt: Attempt, subject: SubjectRecord, tmp_path: Path
) -> None:
    """Whatever a finding holds, what is read back is judged as it was written."""
    for claim in ("F-GT-001", "F-PAR-005"):
        path = write_evidence(record(attempt(claim, **finding), subject), tmp_path, {"a": np.zeros(2)})
        assert contradiction(read_evidence(path)) == ""

"""The release matrix: six files made in the run, each judged; a broken converter, a refused model, a missing device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from apr_core.bench import release
from apr_core.engines.subject import Subject, obtain, open_round
from apr_core.falsify.finding import Finding
from apr_core.falsify.verdict import Verdict
from apr_core.rosetta.convert import convert
from apr_core.rosetta.copies import tampered
from apr_core.zoo.matrix import find

FILES = [r.name for r in release.RELEASES]


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    """The bundled model."""
    found = obtain("pygmy", device="cpu")
    yield found
    found.close()


@pytest.fixture(scope="module")
def on_cpu(subject: Subject) -> Finding:
    """The matrix of the bundled model, made once."""
    return release.release_on_cpu(subject)


def test_six_files_hold_on_the_cpu(on_cpu: Finding, subject: Subject) -> None:
    """Each answers every golden prompt and keeps its limit; the subject's own file is one of them, by its hash."""
    assert on_cpu.judge() == (Verdict.CORROBORATED, "")
    assert (on_cpu.value, on_cpu.compared, on_cpu.expected, on_cpu.missing) == (0.0, 6, 6, [])
    cases = len(subject.golden["cases"])
    assert on_cpu.detail == f"6 files, {cases} golden prompts each"
    rows = {str(row["file"]): row for row in on_cpu.rows}
    assert list(rows) == FILES
    assert {(row["asked"], row["right"], row["verdict"]) for row in rows.values()} == {(cases, cases, "CORROBORATED")}
    assert all(0 < float(str(row["of its limit"])) <= 1 for row in rows.values())
    assert [n for n, row in rows.items() if row["judged by"] == "noise floor"] == ["SafeTensors direct"]
    assert rows["SafeTensors direct"]["sha256"] == subject.checkpoint.content_hash[:16]
    assert len({row["sha256"] for row in rows.values()}) == 6


def test_a_broken_converter_is_seen_in_the_file_and_in_what_is_made_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the matrix only the Q4_K row and the APR made from it are wrong; each says what."""
    monkeypatch.setattr(release, "RELEASES", [r for r in release.RELEASES if "F16" not in f"{r.name}{r.made_from}"])
    subject = obtain("pygmy", device="cpu")
    with tampered(find("q4-template-lost").tamper):
        found = release.release_on_cpu(subject)
    subject.close()
    assert found.judge() == (Verdict.FALSIFIED, "wrong_files is 2, the limit is <= 0")
    wrong = [row["file"] for row in found.rows if row["verdict"] == "FALSIFIED"]
    assert wrong == ["GGUF Q4_K", "APR Q4_K from GGUF"]
    assert [q for q, _ in found.whys] == [f"What is wrong with {name}?" for name in wrong]


@pytest.mark.parametrize(("answers", "limit"), [(False, True), (True, False)])
def test_answers_and_logits_both_decide(
    answers: bool, limit: bool, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong words with right logits are refuted, and right words with wrong logits are too."""
    monkeypatch.setattr(release, "RELEASES", [r for r in release.RELEASES if r.name == "SafeTensors direct"])
    if not answers:
        said = Finding(1.0, 23, 23, whys=[("What does it answer to sum-2-2?", "'5', expected '4'")])
        monkeypatch.setattr(release, "answers", lambda *_: said)
    if not limit:
        pair = release.Pair(Verdict.FALSIFIED, "mean KL 3, 9 times its limit")
        monkeypatch.setattr(release, "hold", lambda *_: pair)
    (row,) = release.release_on_cpu(subject).rows
    assert row["verdict"] == "FALSIFIED"
    assert row["reason"] == (
        "mean KL 3, 9 times its limit" if answers else "1 of 23 golden answers are wrong: '5', expected '4'"
    )


def test_without_a_compiler_no_file_is_held_against_itself(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The subject's own file meets the independent forward, any other file torch."""
    chosen = [r for r in release.RELEASES if r.name in ("SafeTensors direct", "SafeTensors F16")]
    monkeypatch.setattr(release, "RELEASES", chosen)
    monkeypatch.setattr("apr_core.engines.load.features.has_numba", lambda: False)
    found = {row["file"]: (row["engine"], row["verdict"]) for row in release.release_on_cpu(subject).rows}
    assert found == {"SafeTensors direct": ("plain", "CORROBORATED"), "SafeTensors F16": ("torch", "CORROBORATED")}


def test_what_cannot_be_made_is_missing_with_its_reason(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And so is what would be made from it; nothing else is touched."""
    unknown = release.Release("GGUF Q9", "", "gguf", "Q9")
    onward = release.Release("APR from GGUF", "GGUF Q9", "apr", None)
    monkeypatch.setattr(release, "RELEASES", (unknown, onward))
    found = release.release_on_cpu(subject)
    assert found.judge()[0] is Verdict.INCONCLUSIVE
    assert [m.split(": ")[:2] for m in found.missing] == [
        ["GGUF Q9", "no such file can be made"],
        ["APR from GGUF", "no such file can be made"],
    ]


def test_every_cell_names_its_record_and_row(subject: Subject, on_cpu: Finding, tmp_path: Path) -> None:
    """Verdicts come out of the records, ids name them; a device that is not there says so in each of its cells."""
    held = open_round("20_parity", subject, str(tmp_path), {})
    records = [
        held.record("F-PAR-011", on_cpu),
        held.record("F-PAR-012", release.release_on_gpu(subject)),
    ]
    rows = release.cells(*records)
    assert [row["release"] for row in rows] == FILES
    assert {row["CPU"] for row in rows} == {"CORROBORATED"}
    assert {row["GPU"] for row in rows} == {"NOT_RUN: no CUDA device"}
    for number, row in enumerate(rows, 1):
        name, _, at = str(row["evidence CPU"]).partition("#")
        assert (tmp_path / "evidence" / f"{name}.json").is_file()
        assert int(at) == number
        assert records[0].rows[number - 1]["file"] == row["release"]
    assert len({row["evidence GPU"] for row in rows}) == 6


def test_the_same_weights_in_other_containers_are_bit_equal(subject: Subject) -> None:
    """Every value is compared, and both other containers are there."""
    rows = release.format_rows(subject)
    assert [(r["format"], r["logits"], r["values that differ"]) for r in rows] == [
        ("gguf", "bit-equal", 0),
        ("apr", "bit-equal", 0),
    ]
    assert {r["values"] for r in rows} == {1_837_312}


def test_a_damaged_copy_is_beyond_the_floor() -> None:
    """And the values that differ are counted."""
    subject = obtain("pygmy", device="cpu")
    with tampered(find("copy-older").tamper):
        rows = release.format_rows(subject)
    subject.close()
    assert {r["logits"] for r in rows} == {"beyond the floor"}
    assert all(int(str(r["values that differ"])) > 0 for r in rows)


def test_the_ladder_rises_and_its_flips_are_listed(subject: Subject) -> None:
    """More bits cost less; margins and flips are the coarsest recipe's, and the scatter has both ends."""
    found = release.quantised(subject)
    costs = [float(str(row["kl_mean"])) for row in found.rows]
    assert [row["recipe"] for row in found.rows] == list(release.LADDER)
    assert costs == sorted(costs)
    assert [row["order"] for row in found.rows] == ["", *["costs no less than the finer one"] * 4]
    last, flipped = found.rows[-1], found.arrays["flipped"]
    assert int(flipped.sum()) == int(str(last["decisive flips"])) + int(str(last["near-tie flips"]))
    assert sorted(k for k in found.arrays if k.startswith("logits_")) == [
        "logits_F16",
        "logits_Q4_K_M",
        "logits_reference",
    ]
    near, far = (
        np.abs(found.arrays[f"logits_{n}"] - found.arrays["logits_reference"]).max() for n in ("F16", "Q4_K_M")
    )
    assert near < 1e-4 < far


def test_a_ladder_out_of_order_is_said(monkeypatch: pytest.MonkeyPatch, subject: Subject) -> None:
    """A finer recipe that costs more than a coarser one."""
    monkeypatch.setattr(release, "LADDER", ("Q4_K_M", "Q8_0"))
    (_, row) = release.quantised(subject).rows
    assert "with more bits per weight" in str(row["order"])


def test_nothing_of_a_refused_model_is_shown(tmp_path: Path) -> None:
    """Each table is empty or says why; the claim is NOT_RUN."""
    from apr_core.zoo.acts import twin
    from apr_core.zoo.draft import put_together
    from apr_core.zoo.plants import DOWN

    draft = twin().copy()
    draft.weights[DOWN][...] = 0
    refused = obtain(str(put_together(draft, tmp_path / "bad")), device="cpu")
    assert release.format_rows(refused) == []
    assert release.quantised(refused).not_run is not None
    assert release.release_on_cpu(refused).judge()[0] is Verdict.NOT_RUN
    refused.close()


def test_a_quantised_subject_has_its_matrix_too(pygmy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF of Q8_0: its SafeTensors is a copy in F32 of the same values, judged by the noise floor."""
    import shutil

    path = convert(pygmy, tmp_path / "copy.gguf", quantize="Q8_0")
    shutil.copy(pygmy / "golden.json", tmp_path)
    monkeypatch.setattr(release, "RELEASES", [r for r in release.RELEASES if r.name == "SafeTensors direct"])
    subject = obtain(str(path), device="cpu")
    (row,) = release.release_on_cpu(subject).rows
    subject.close()
    assert (row["verdict"], row["judged by"]) == ("CORROBORATED", "noise floor")

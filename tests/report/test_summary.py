"""summary.json and summary.md: strict, complete, in step with the conclusion."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from apr_core.errors import FormatError, ReadWriteError
from apr_core.falsify.claims import load_claims
from apr_core.falsify.finding import Finding
from apr_core.falsify.rounds import conclude
from apr_core.report.summary import (
    Metric,
    evidence_file,
    markdown,
    read_summary,
    summarise,
    write_summary,
    write_whole,
)
from tests.report.conftest import build


def refuse(name: str) -> None:
    """NaN and Infinity are not JSON."""
    raise ValueError(name)


def write(run: Any) -> Any:
    """Write the summary of a run and read its JSON strictly."""
    path = write_summary(run.folder, summarise(run.folder, run.conclusion, run.notebooks))
    return json.loads(path.read_text(), parse_constant=refuse)


def test_everything_declared(make_run: Callable[..., Any]) -> None:
    """Verdict, code, score, counts; per claim what was measured against what; per notebook its end."""
    run = make_run(changes={"F-GT-001": Finding(float("nan"), 3, 3)}, broken={"20_parity": "died"})
    body = write(run)
    assert (body["verdict"], body["exit_code"]) == ("FALSIFIED", 1)
    assert body["counts"] == dict(run.conclusion.counts)
    assert body["score"] == run.conclusion.score
    assert list(body["claims"]) == list(load_claims())
    end = {"seconds": 4.25, "complete": False, "reason": "died", "html": "20_parity.html"}
    assert body["notebooks"]["20_parity"] == end
    one = body["claims"]["F-PAR-003"]
    evidence = run.conclusion.by_claim["F-PAR-003"][2]
    assert one["measured"] == evidence.measured["value"]
    assert one["limit"] == {"direction": "at_most", "threshold": 1.0, "text": "≤ 1"}
    assert one["coverage"] == {"compared": 63, "expected": 63}
    assert (run.folder / one["evidence"]).is_file()
    assert one["evidence"] == evidence_file(evidence)
    assert body["claims"]["F-GT-001"]["measured"] is None
    assert (body["missing"], body["damaged"]) == ([], {})
    assert read_summary(run.folder) == summarise(run.folder, run.conclusion, run.notebooks)


def test_what_is_known_of_the_noise(make_run: Callable[..., Any]) -> None:
    """A count is exact, a floor is a width, rows bring their interval, and nothing else is sure."""
    rows = [
        {"quantity": "tpot_s median", "value": 0.01},
        {"quantity": "tpot_s 95 % low", "value": 0.009},
        {"quantity": "tpot_s 95 % high", "value": 0.012},
        {"quantity": "backend", "value": "cpu"},
        {"quantity": "decode_tok_s", "value": 100},
    ]
    run = make_run(changes={"F-THR-006": Finding(0.5, 5, 5, rows=rows)})
    claims = summarise(run.folder, run.conclusion, run.notebooks).claims
    assert claims["F-GT-001"].metrics == {"mismatched_values": Metric(0.0, 0.0, 0.0)}
    floored = claims["F-PAR-002"].metrics[load_claims()["F-PAR-002"].metric]
    assert floored.high - floored.low == pytest.approx(1.2e-7)
    assert claims["F-THR-006"].metrics == {
        load_claims()["F-THR-006"].metric: Metric(0.5, None, None),
        "tpot_s": Metric(0.01, 0.009, 0.012),
        "decode_tok_s": Metric(100.0, None, None),
    }


def test_hostile_strings(hostile: Any) -> None:
    """They come back as they were, in ASCII; in Markdown they are text."""
    body = write(hostile)
    assert (hostile.folder / "summary.json").read_bytes().isascii()
    assert body["subject"]["name"] == "<script>window.PWN=1</script>"
    text = (hostile.folder / "summary.md").read_text("utf-8")
    assert "<script" not in text
    assert "<img" not in text
    assert "\x1b" not in text
    assert all(line.count("|") - line.count("\\|") in (0, 4, 7) for line in text.splitlines())


def test_markdown(make_run: Callable[..., Any]) -> None:
    """The verdict first, then refuted, undecided and not run in that order, and what held folded away."""
    run = make_run(changes={"F-PAR-007": Finding(3.0, 9, 9), "F-GT-001": None})
    (run.folder / "evidence" / "F-GT-002-x-y.json").write_text("{")
    run.conclusion = conclude(run.folder)
    text = markdown(summarise(run.folder, run.conclusion, run.notebooks))
    assert text.startswith("## FALSIFIED: pygmy\n")
    assert "\nsafetensors, " in text
    assert f"sha256 {run.conclusion.by_claim['F-PAR-007'][2].subject['sha256'][:16]}; no reference." in text
    assert "**Incomplete:** 1 evidence files cannot be read, 1 declared claims left no evidence." in text
    assert text.index("| F-PAR-007 |") < text.index("| F-GT-001 |") < text.index("| F-GT-010 |")
    assert f"<summary>{run.conclusion.counts['CORROBORATED']} held</summary>" in text


def test_no_evidence_no_file(make_run: Callable[..., Any]) -> None:
    """A subject that was not opened has claims without evidence, and says why."""
    run = make_run(diagnosis={"error": "E", "message": "m", "exit_code": 4})
    body = write(run)
    assert {c["evidence"] for c in body["claims"].values()} == {None}
    assert body["claims"]["F-GT-001"]["reason"] == "subject could not be opened: m"
    assert body["diagnosis"]["message"] == "m"
    assert body["missing"] == []


def test_an_undeclared_refutation_is_in_it(make_run: Callable[..., Any]) -> None:
    """A run of one notebook into which a refutation of another was copied."""
    run = make_run(notebooks=("00_ground_truth",))
    (run.folder / "two").mkdir()
    two = build(run.folder / "two", changes={"F-PAR-007": Finding(3.0, 9, 9)})
    path = next((two.folder / "evidence").glob("F-PAR-007-*.json"))
    (run.folder / "evidence" / path.name).write_bytes(path.read_bytes())
    run.conclusion = conclude(run.folder)
    body = write(run)
    assert body["verdict"] == "FALSIFIED"
    assert body["claims"]["F-PAR-007"]["verdict"] == "FALSIFIED"


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 99}', '{"schema": 2}', None])
def test_a_summary_that_cannot_be_read(text: str | None, tmp_path: Any) -> None:
    """Named, with what to do."""
    if text is not None:
        (tmp_path / "summary.json").write_text(text)
    with pytest.raises(FormatError, match="write it again with `apr report page"):
        read_summary(tmp_path)


def test_a_write_that_fails_is_typed(make_run: Callable[..., Any]) -> None:
    """A vanished folder is an I/O error with advice."""
    with pytest.raises(ReadWriteError, match="choose another --out"):
        write_whole(make_run().folder / "no" / "x.json", "{}")


def test_the_summary_shows_each_chain_with_its_numbers(make_run: Callable[..., Any]) -> None:
    """Markdown for a pull request: the table of whys, every answer linked to its record."""
    run = make_run(changes={"F-GT-001": Finding(2.0, 3, 3, whys=[("Why <so>?", "2 of 3 | lost")])})
    write_summary(run.folder, summarise(run.folder, run.conclusion, run.notebooks))
    text = (run.folder / "summary.md").read_text("utf-8")
    assert "Five whys of F-GT-001" in text
    assert "| 1 | Why &lt;so&gt;? | 2 of 3 \\| lost [numbers](evidence/F-GT-001-" in text

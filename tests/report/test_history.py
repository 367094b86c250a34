"""Two runs, and many: what got worse is named, noise is not, and another machine's clock is nobody's regression."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from apr_core.cli.app import main
from apr_core.errors import FormatError, NotFound
from apr_core.falsify.verdict import Verdict
from apr_core.report.history import Run, changes, differences, read_run, read_runs, regressions
from apr_core.report.summary import Metric, Summary, summarise, write_summary
from apr_core.report.trend import write_trend

Make = Callable[..., Run]
MBU, LAYERS, COUNT = "F-THR-006", "F-PAR-002", "F-GT-001"


@pytest.fixture(scope="module")
def base(good: Any) -> Summary:
    """The summary of a run in which nothing is refuted."""
    return summarise(good.folder, good.conclusion, good.notebooks)


@pytest.fixture
def run(base: Summary) -> Make:
    """Make a run like the good one, another day: verdicts and metrics changed by claim."""

    def make(name: str, day: int = 1, *, cpu: str = "a", verdict: Any = None, metrics: Any = None, **more: Any) -> Run:
        claims = dict(base.claims)
        for claim, said in (verdict or {}).items():
            claims[claim] = replace(claims[claim], verdict=said, reason=f"{claim} said so")
        for claim, found in (metrics or {}).items():
            claims[claim] = replace(claims[claim], metrics=found)
        provenance = {**base.provenance, "time": f"2026-11-{day:02d}T10:00:00+00:00", "cpu": cpu}
        return Run(name, replace(base, claims=claims, provenance=provenance, **more))

    return make


def kinds(found: Any) -> list[tuple[str, str, str]]:
    """Claim, what, and how it turned."""
    return [(c.claim, c.what, c.kind) for c in found]


def test_the_same_run_changed_nothing(run: Make) -> None:
    """Nothing, and nothing else differs."""
    assert changes(run("a"), run("b")) == []
    assert differences(run("a"), run("b")) == {}


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        (Verdict.CORROBORATED, Verdict.FALSIFIED, "worse"),
        (Verdict.NOT_RUN, Verdict.FALSIFIED, "worse"),
        (Verdict.CORROBORATED, Verdict.INCONCLUSIVE, "undecided"),
        (Verdict.CORROBORATED, Verdict.NOT_RUN, "undecided"),
        (Verdict.FALSIFIED, Verdict.CORROBORATED, "better"),
        (Verdict.FALSIFIED, Verdict.NOT_RUN, "moved"),
    ],
)
def test_verdicts(run: Make, before: Verdict, after: Verdict, kind: str) -> None:
    """Each change by what it means; a claim that is no longer tried is not better."""
    (found,) = changes(run("a", verdict={COUNT: before}), run("b", verdict={COUNT: after}))
    assert (found.claim, found.what, found.kind, found.run) == (COUNT, "verdict", kind, "b")
    assert (found.before, found.after, found.note) == (before, after, "F-GT-001 said so")


@pytest.mark.parametrize(
    ("claim", "name", "before", "after", "kind"),
    [
        (COUNT, "mismatched_values", Metric(0, 0, 0), Metric(1, 1, 1), "worse"),
        (COUNT, "mismatched_values", Metric(2, 2, 2), Metric(1, 1, 1), "better"),
        (LAYERS, "rel_l2_over_limit", Metric(2e-7, 1e-7, 3e-7), Metric(3e-7, 2e-7, 4e-7), None),
        (LAYERS, "rel_l2_over_limit", Metric(2e-7, 1e-7, 3e-7), Metric(9e-7, 8e-7, 1e-6), "worse"),
        (MBU, "decode_tok_s", Metric(100, 95, 105), Metric(80, 75, 85), "worse"),
        (MBU, "decode_tok_s", Metric(100, None, None), Metric(80, None, None), "unsure"),
        (MBU, "tpot_s", Metric(0.01, 0.009, 0.011), Metric(0.005, 0.004, 0.006), "better"),
        (MBU, "bytes", Metric(1, 1, 1), Metric(2, 2, 2), "moved"),
    ],
)
def test_numbers(run: Make, claim: str, name: str, before: Metric, after: Metric, kind: str | None) -> None:
    """Intervals that touch are noise; without an interval nobody knows; the direction is the claim's, or the unit's."""
    found = changes(run("a", metrics={claim: {name: before}}), run("b", metrics={claim: {name: after}}))
    assert kinds(found) == ([(claim, name, kind)] if kind else [])


def test_a_turned_verdict_says_its_number_itself(run: Make) -> None:
    """One line for a refuted claim; its other numbers are still held against the old ones."""
    before = {"mismatched_values": Metric(0, 0, 0), "bytes": Metric(1, 1, 1)}
    after = {"mismatched_values": Metric(5, 5, 5), "bytes": Metric(2, 2, 2)}
    b = run("b", verdict={COUNT: Verdict.FALSIFIED}, metrics={COUNT: after})
    assert kinds(changes(run("a", metrics={COUNT: before}), b)) == [
        (COUNT, "verdict", "worse"),
        (COUNT, "bytes", "moved"),
    ]


def test_numbers_of_unknown_noise_are_counted(run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They decide nothing and fill no table; the JSON has each."""
    many = {f"n{i}": Metric(i, None, None) for i in range(5)}
    more = {f"n{i}": Metric(i + 1, None, None) for i in range(5)}
    a = write(tmp_path, run("before", metrics={MBU: many}))
    b = write(tmp_path, run("after", metrics={MBU: more}))
    assert main(["report", "compare", str(a), str(b)]) == 0
    said = capsys.readouterr().out
    assert "no verdict changed, and no number moved beyond its noise" in said
    assert "5 numbers differ whose noise was not recorded: F-THR-006 n0, F-THR-006 n1, F-THR-006 n2 and 2 more" in said
    assert main(["report", "compare", str(a), str(b), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["changes"]) == 5


def test_clocks_of_two_machines_are_not_compared(run: Make) -> None:
    """A slower machine is no regression; a wrong count there is one."""
    slow = run("b", cpu="b", metrics={MBU: {"tpot_s": Metric(9, 9, 9)}, COUNT: {"mismatched_values": Metric(1, 1, 1)}})
    fast = run("a", metrics={MBU: {"tpot_s": Metric(1, 1, 1)}})
    assert kinds(changes(fast, slow)) == [(COUNT, "mismatched_values", "worse")]
    assert "machine" in differences(fast, slow)


def test_another_version_is_another_claim(run: Make, base: Summary) -> None:
    """Its numbers are not held against the old ones, its verdict is; a claim of one run alone is named."""
    a, b = run("a"), run("b", metrics={COUNT: {"mismatched_values": Metric(9, 9, 9)}})
    newer = replace(b.summary.claims[COUNT], version=99)
    left = {k: v for k, v in b.summary.claims.items() if k != MBU}
    b = Run("b", replace(b.summary, claims={**left, COUNT: newer}))
    assert kinds(changes(a, b)) == [(MBU, "verdict", "moved")]


def test_the_spread_of_earlier_runs_is_noise(run: Make) -> None:
    """A value inside what the machine did before is no regression; one far outside is one, where it came."""
    values = [1.0, 1.1, 0.9, 1.05, 1.15, 3.0]
    runs = [run(f"r{i}", i + 1, metrics={MBU: {"tpot_s": Metric(v, None, None)}}) for i, v in enumerate(values)]
    (found,) = regressions(runs)
    assert (found.claim, found.what, found.kind, found.run) == (MBU, "tpot_s", "worse", "r5")
    assert "5 earlier runs within 1.05" in found.note
    assert regressions(runs[:5]) == []


def write(folder: Path, run: Run) -> Path:
    """Put a run where `apr report` finds it."""
    (folder / run.name).mkdir()
    write_summary(folder / run.name, run.summary)
    return folder / run.name


def test_runs_are_read_in_order_and_damaged_ones_named(run: Make, tmp_path: Path) -> None:
    """By time, not by name; a newer schema is named; folders that are no runs are left alone."""
    for one in (run("b", 1), run("a", 2)):
        write(tmp_path, one)
    (tmp_path / "notes").mkdir()
    newer = write(tmp_path, run("c", 3)) / "summary.json"
    newer.write_text(json.dumps({**json.loads(newer.read_text()), "schema": 99}))
    runs, damaged = read_runs(tmp_path)
    assert [r.name for r in runs] == ["b", "a"]
    assert damaged == {"c": "ValueError: schema 99, written by a newer apr_core"}
    with pytest.raises(NotFound):
        read_runs(tmp_path / "absent")
    with pytest.raises(NotFound):
        read_run(tmp_path / "absent")
    with pytest.raises(FormatError):
        read_run(tmp_path / "c")


def test_compare_on_the_command_line(run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A defect between two runs: what is refuted is named, exit 5; the other way round it got better, exit 0."""
    subject = replace(run("x").summary.subject, sha256="ee" * 32)
    a = write(tmp_path, run("before", 1))
    b = write(tmp_path, run("after", 2, subject=subject, verdict={LAYERS: Verdict.FALSIFIED}, missing=("F-GT-003",)))
    assert main(["report", "compare", str(a), str(b)]) == 5
    said = capsys.readouterr().out
    assert "got worse (1)\nclaim" in said
    assert "F-PAR-002  verdict  CORROBORATED  FALSIFIED  F-PAR-002 said so" in said
    assert "ee" * 32 in said
    assert "after is incomplete: F-GT-003" in said
    assert main(["report", "compare", str(b), str(a), "--json"]) == 11
    body = json.loads(capsys.readouterr().out)
    assert [c["kind"] for c in body["changes"]] == ["better"]
    assert body["incomplete"] == {"after": ["F-GT-003"]}
    assert main(["report", "compare", str(a), str(a)]) == 0
    assert "no verdict changed" in capsys.readouterr().out


def test_trend(run: Make, tmp_path: Path, parse: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Every run in the matrix with its machine, the regression named, figures of what moved, nothing remote."""
    for i, value in enumerate((1.0, 1.1, 0.9, 1.05, 3.0)):
        write(tmp_path, run(f"r{i}", i + 1, metrics={MBU: {"tpot_s": Metric(value, None, None)}}))
    write(tmp_path, run("other", 9, cpu="b", verdict={LAYERS: Verdict.FALSIFIED}))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text("{")
    assert main(["report", "trend", str(tmp_path)]) == 5
    said = capsys.readouterr().out
    assert "r4" in said
    assert "6 runs, 2 regressions, 1 not read" in said
    page = parse((tmp_path / "trend.html").read_text("utf-8"))
    assert page.faults() == []
    assert "6 runs of 1 release: 2 regressions; 1 run could not be read." in page.text
    assert "This page is incomplete." in page.text
    assert "A : a, 2 cores" in page.text.replace("A: ", "A : ")
    assert next(a["alt"] for a in page.every("img")).startswith("1 panels over 6 runs on 2 machines")
    assert main(["report", "trend", str(tmp_path), "--json"]) == 5
    assert len(json.loads(capsys.readouterr().out)["regressions"]) == 2


def test_an_empty_folder_is_no_green_trend(tmp_path: Path) -> None:
    """No run at all decides nothing."""
    assert main(["report", "trend", str(tmp_path)]) == 11


def test_hostile_names_in_a_trend(hostile: Any, tmp_path: Path, parse: Callable[[str], Any]) -> None:
    """A model's name, a run's name and a reason are text."""
    summary = summarise(hostile.folder, hostile.conclusion, hostile.notebooks)
    for name in ("<img src=x onerror=window.PWN=1>", "b"):
        write(tmp_path, Run(name, summary))
    page, _ = write_trend(tmp_path)
    assert parse(page.read_text("utf-8")).faults() == []


def test_pages_again_after_copying(good: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same verdict from a copied folder; without a record of how the notebooks ended, exit 1."""
    import shutil

    shutil.copytree(good.folder, tmp_path / "run")
    write_summary(tmp_path / "run", summarise(good.folder, good.conclusion, good.notebooks))
    assert main(["report", "page", str(tmp_path / "run")]) == 0
    assert f"CORROBORATED: {good.conclusion.counts['CORROBORATED']} claims held" in capsys.readouterr().out
    assert {"index.html", "junit.xml", "summary.md"} <= {p.name for p in (tmp_path / "run").iterdir()}
    (tmp_path / "run" / "summary.json").unlink()
    assert main(["report", "page", str(tmp_path / "run")]) == 1
    assert "how it ended is not recorded" in (tmp_path / "run" / "index.html").read_text()
    assert asdict(read_run(tmp_path / "run").summary)["verdict"] == "INCONCLUSIVE"

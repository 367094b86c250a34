"""Runs beside each other: which verdicts changed, and which numbers moved by more than their noise."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apr_core.errors import FormatError, NotFound
from apr_core.falsify.verdict import Verdict
from apr_core.report.summary import ClaimResult, Metric, Summary, read_summary
from apr_core.report.text import clean

TIMED = "30_throughput"  # what its numbers are worth depends on the machine
SPREAD, LEAST = 3 * 1.4826, 4  # median absolute deviations that count as noise; earlier runs that make a spread


@dataclass(frozen=True)
class Run:
    """One run folder by its summary."""

    name: str
    summary: Summary

    @property
    def time(self) -> str:
        """When it was declared, UTC."""
        return str(self.summary.provenance.get("time", ""))

    @property
    def machine(self) -> str:
        """What its timings are comparable on."""
        p = self.summary.provenance
        words = (p.get("cpu") or p.get("platform"), p.get("cores"))
        return f"{clean(words[0] or 'unknown machine', 60)}, {words[1] or '?'} cores"

    @property
    def release(self) -> str:
        """The file in the sense of a release: its name, format and types, whatever its bytes are today."""
        s = self.summary.subject
        return f"{clean(s.name, 60)}, {s.format or 'not opened'}, {' '.join(sorted(s.quant)[:4]) or 'no types'}"


@dataclass(frozen=True)
class Change:
    """
    One claim or number that is not what it was.

    Attributes:
        claim: Its id.
        what: ``verdict`` or the name of the metric.
        before: As printed.
        after: As printed.
        kind: ``worse``, ``better``, ``undecided`` (no longer corroborated, not refuted either), ``moved`` (beyond its
            noise, neither better nor worse) or ``unsure`` (differs, and its noise was not recorded).
        note: The reason of a verdict, the noise of a number.
        run: The name of the run in which it changed.
    """

    claim: str
    what: str
    before: str
    after: str
    kind: str
    note: str
    run: str


def read_run(folder: Path) -> Run:
    """
    Read a run by its ``summary.json``, which stays readable when the claims have moved on.

    Raises:
        NotFound: There is no such folder.
        FormatError: It has no summary, a damaged one, or one of another schema.
    """
    if not folder.is_dir():
        raise NotFound(f"no run folder {folder}", advice="give the folder that `apr suite` named")
    return Run(folder.resolve().name, read_summary(folder))


def read_runs(folder: Path) -> tuple[list[Run], dict[str, str]]:
    """
    Read every run below a folder, oldest first; and the folders that look like runs and cannot be read, with why.

    Raises:
        NotFound: There is no such folder.
    """
    if not folder.is_dir():
        raise NotFound(f"no folder {folder}", advice="give the folder that holds the run folders")
    runs, damaged = [], {}
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.is_symlink()):
        if (path / "declared.json").exists() or (path / "summary.json").exists():
            try:
                runs.append(read_run(path))
            except FormatError as error:
                damaged[path.name] = error.found
    return sorted(runs, key=lambda r: (r.time, r.name)), damaged


def differences(a: Run, b: Run) -> dict[str, tuple[str, str]]:
    """What else than the outcome differs between two runs: files, machine, code; a fair comparison has one line."""
    x, y = a.summary, b.summary
    sides = {
        "file": (x.subject.path, y.subject.path),
        "sha256": (x.subject.sha256, y.subject.sha256),
        "reference": (x.reference.sha256 if x.reference else "none", y.reference.sha256 if y.reference else "none"),
        "machine": (a.machine, b.machine),
        "commit": (str(x.provenance.get("commit", "")), str(y.provenance.get("commit", ""))),
        "packages": tuple(
            ", ".join(f"{k} {v}" for k, v in dict(s.provenance.get("packages") or {}).items()) for s in (x, y)
        ),
    }
    return {k: (v[0], v[1]) for k, v in sides.items() if v[0] != v[1]}


def changes(a: Run, b: Run, earlier: Sequence[Run] = ()) -> list[Change]:
    """
    Say what changed from one run to another.

    A number moved when its recorded intervals do not touch; where four or more earlier runs on the same machine are
    known, it must lie beyond their spread too. Timings of two machines are never held against each other.

    Args:
        a: The run before.
        b: The run after.
        earlier: Further runs before ``b`` of the same release, for the spread.
    """
    found: list[Change] = []
    for name in dict.fromkeys([*a.summary.claims, *b.summary.claims]):
        x, y = a.summary.claims.get(name), b.summary.claims.get(name)
        if x is None or y is None:
            found.append(Change(name, "verdict", _said(x), _said(y), "moved", "declared in one run alone", b.name))
            continue
        if x.verdict is not y.verdict:
            found.append(Change(name, "verdict", _said(x), _said(y), _turn(x.verdict, y.verdict), y.reason, b.name))
        if x.version == y.version and (y.notebook != TIMED or a.machine == b.machine):
            pool = [r for r in earlier if r.machine == b.machine]
            told = {y.metric} if x.verdict is not y.verdict else set()  # the turn of the verdict says it already
            for metric in (m for m in y.metrics if m in x.metrics and m not in told):
                past = [
                    c.metrics[metric].value for r in pool if (c := r.summary.claims.get(name)) and metric in c.metrics
                ]
                if (moved := _moved(x.metrics[metric], y.metrics[metric], past, better(y, metric))) is not None:
                    before, after = (f"{m.metrics[metric].value:.4g}" for m in (x, y))
                    found.append(Change(name, metric, before, after, *moved, b.name))
    return found


def regressions(runs: Sequence[Run]) -> list[Change]:
    """What got worse from one run of a release to the next, oldest first."""
    found: list[Change] = []
    for series in by_release(runs).values():
        for i, run in enumerate(series[1:], 1):
            found += [c for c in changes(series[i - 1], run, series[:i]) if c.kind in ("worse", "undecided")]
    return found


def by_release(runs: Iterable[Run]) -> Mapping[str, list[Run]]:
    """The runs of each release, in their order."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.release, []).append(run)
    return found


def _said(claim: ClaimResult | None) -> str:
    return str(claim.verdict) if claim else "not declared"


def _turn(before: Verdict, after: Verdict) -> str:
    if after is Verdict.FALSIFIED:
        return "worse"
    if before is Verdict.CORROBORATED:
        return "undecided"
    return "better" if after is Verdict.CORROBORATED else "moved"


def better(claim: ClaimResult, metric: str) -> int:
    """1 where more is better, -1 where less is, 0 where neither is known."""
    if metric == claim.metric:
        return 1 if claim.limit.direction == "at_least" else -1
    return 1 if metric.split(",")[0].endswith(("tok_s", "gb_s")) else -1 if metric.endswith("_s") else 0


def _moved(a: Metric, b: Metric, past: Sequence[float], better: int) -> tuple[str, str] | None:
    """Kind and note of a number that moved beyond its noise; None for one that did not."""
    if a.value == b.value:
        return None
    if None not in (a.low, a.high, b.low, b.high):
        if a.low <= b.high and b.low <= a.high:  # type: ignore[operator]
            return None
        note = f"{a.low:.4g} to {a.high:.4g}, then {b.low:.4g} to {b.high:.4g}" if a.low != a.high else "exact"
    elif len(past) >= LEAST:
        note = ""
    else:
        return "unsure", "its noise was not recorded"
    if len(past) >= LEAST:
        middle = statistics.median(past)
        off = [abs(v - middle) for v in past]
        spread = max(SPREAD * statistics.median(off), *off)  # few runs make a small deviation: none of them was worse
        if abs(b.value - middle) <= spread:
            return None
        note = f"{len(past)} earlier runs within {middle:.4g} ± {spread:.2g}"
    kind = "moved" if not better else "better" if (b.value - a.value) * better > 0 else "worse"
    return kind, note

"""trend.html: the release matrix over time, what got worse and when, and every number that moved, over the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from apr_core.report.figures import label
from apr_core.report.history import Run, better, by_release, read_runs, regressions
from apr_core.report.page import image, stylesheet, template
from apr_core.report.style import COLOURS, INK, MARKERS, MUTED, finish, style
from apr_core.report.summary import write_whole
from apr_core.report.text import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_PANELS = 24


def write_trend(folder: Path) -> tuple[Path, dict[str, Any]]:
    """
    Write ``trend.html`` into a folder of run folders.

    Returns:
        The page, and what it says as JSON: runs, regressions, damaged.

    Raises:
        NotFound: There is no such folder.
        ReadWriteError: The page cannot be written.
    """
    runs, damaged = read_runs(folder)
    worse = regressions(runs)
    releases = by_release(runs)
    machines = list(dict.fromkeys(r.machine for r in runs))
    context = {
        "css": stylesheet("palette.css", "index.css"),
        "sentence": _sentence(len(runs), len(releases), len(worse), len(damaged)),
        "damaged": damaged,
        "worse": worse,
        "times": {r.name: r.time[:16].replace("T", " ") for r in runs},
        "links": {r.name: f"{quote(r.name)}/index.html" for r in runs if (folder / r.name / "index.html").is_file()},
        "machines": {machine: chr(ord("A") + i % 26) for i, machine in enumerate(machines)},
        "runs": runs,
        "releases": [
            {"name": name, "cells": {r.name: _cell(r) for r in series}, **_numbers(series, runs)}
            for name, series in releases.items()
        ],
    }
    page = write_whole(folder / "trend.html", template("trend.html.j2").render(context))
    body = {
        "runs": [
            {"name": r.name, "time": r.time, "release": r.release, "machine": r.machine, **_cell(r)} for r in runs
        ],
        "regressions": [vars(c) for c in worse],
        "damaged": damaged,
    }
    return page, body


def _sentence(runs: int, releases: int, worse: int, damaged: int) -> str:
    def many(n: int, word: str) -> str:
        return f"{n} {word}{'s' * (n != 1)}"

    said = f"{many(runs, 'run')} of {many(releases, 'release')}: "
    said += many(worse, "regression") if worse else "nothing got worse"
    return f"{said}; {many(damaged, 'run')} could not be read." if damaged else f"{said}."


def _cell(run: Run) -> dict[str, Any]:
    s = run.summary
    incomplete = bool(s.damaged or s.missing)
    kind = str(s.verdict).lower().replace("_", "-")
    return {"verdict": str(s.verdict), "kind": kind, "score": f"{s.score:.2f}", "incomplete": incomplete}


def _numbers(series: Sequence[Run], runs: Sequence[Run]) -> dict[str, Any]:
    """The numbers of a release: those that moved as a figure and a table, the others as a count."""
    values: dict[tuple[str, str], list[float | None]] = {}
    for i, run in enumerate(series):
        for claim, result in run.summary.claims.items():
            for name, metric in result.metrics.items():
                values.setdefault((claim, name), [None] * len(series))[i] = metric.value
    moving = {k: v for k, v in values.items() if len({x for x in v if x is not None}) > 1}
    figure, note = (
        image(lambda: plot_trend(series, moving, [runs.index(r) + 1 for r in series])) if moving else (None, "")
    )
    return {
        "figure": figure,
        "note": note,
        "still": len(values) - len(moving),
        "heads": [r.name for r in series],
        "rows": [(claim, name, [number(x) for x in v]) for (claim, name), v in moving.items()],
    }


def plot_trend(
    series: Sequence[Run], moving: Mapping[tuple[str, str], Sequence[float | None]], ticks: Sequence[int]
) -> Figure | None:
    """
    Draw each number over the runs, one panel per number, one mark and colour per machine, dashed its limit.

    Args:
        series: The runs of one release, in their order.
        moving: (claim, metric) -> its value in each run, None where there is none.
        ticks: The number of each run in the release matrix.
    """
    judged = {c: r for run in series for c, r in run.summary.claims.items()}
    shown = [(k, v) for k, v in moving.items() if better(judged[k[0]], k[1])][:_MOST_PANELS]
    if not shown:
        return None
    from matplotlib.figure import Figure

    machines = list(dict.fromkeys(r.machine for r in series))
    rows = (len(shown) + 1) // 2
    with style():
        figure = Figure(figsize=(6.6, 1.1 + 1.15 * rows))
        for k, ((claim, name), values) in enumerate(shown):
            ax = figure.add_subplot(rows, 2, k + 1)
            known = [(i, v) for i, v in enumerate(values) if v is not None]
            ax.plot([i for i, _ in known], [v for _, v in known], "-", color=MUTED, lw=0.8)
            for m, machine in enumerate(machines):
                mine = [(i, v) for i, v in known if series[i].machine == machine]
                ax.plot([i for i, _ in mine], [v for _, v in mine], MARKERS[m % 6], ms=4, color=COLOURS[m % 6])
            result = judged[claim]
            near = max(abs(v) for _, v in known)
            if name == result.metric and near / 10 <= abs(result.limit.threshold) <= near * 10:
                ax.axhline(result.limit.threshold, color=INK, ls="--", lw=1)
            ax.set_title(f"{claim} {label(name, 28)}", loc="left", fontsize=8)
            ax.set_xlim(-0.5, len(series) - 0.5)
            ax.set_xticks(range(len(series)), [str(n) for n in ticks])
            ax.margins(y=0.2)
            if min(v for _, v in known) >= 0:
                ax.set_ylim(0, 1.2 * near or 1)  # a percent of noise must not look like a cliff
        left_out = len(moving) - len(shown)
        finish(
            figure,
            alt=f"{len(shown)} panels over {len(series)} runs on {len(machines)} machines: "
            + "; ".join(
                f"{c} {n} from {number(_first(v))} to {number(_first(list(v)[::-1]))}" for (c, n), v in shown[:6]
            ),
            caption="One panel per number that moved and has a better side, over the runs in order of time; another "
            "mark is another machine, dashed is the limit where it is near. Had nothing but noise happened, no panel "
            "would show a step." + (f" {left_out} more are in the table alone." if left_out else ""),
            left=0.65,
        )
        figure.subplots_adjust(hspace=0.85, wspace=0.3)
        return figure


def _first(values: Sequence[float | None]) -> float | None:
    return next((v for v in values if v is not None), None)

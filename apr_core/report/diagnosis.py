"""How often diagnoses name the planted cause: the confusion matrix as a figure, and the published page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apr_core.report.style import INK, finish, style, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SAID = {
    "reference": "class right, with a reference (files) or the independent forward (backends)",
    "place": "tensor or activation right, of those",
    "alone": "class right alone, of what is visible alone",
    "benign": "legal oddities with nothing to explain",
    "pair one": "two defects at once: at least one cause right",
    "pair both": "two defects at once: both causes right",
    "copies": "our own converter named, from its broken copies",
    "meter": "meter or engine named, from what a broken meter says",
    "held out": "first held-out set, after what it taught was mended: class right",
    "held out place": "tensor or activation right, of those",
    "unseen": "second held-out set, first try: class right",
    "unseen place": "tensor or activation right, of those",
}


def plot_confusion(cells: Sequence[Mapping[str, Any]]) -> Figure | None:
    """
    Draw planted causes against named ones; None without any.

    Args:
        cells: ``planted``, ``named`` and ``count`` of each pair that occurred.
    """
    if not cells:
        return None
    from matplotlib.figure import Figure

    planted = list(dict.fromkeys(str(c["planted"]) for c in cells))
    named = [*planted, *(n for n in dict.fromkeys(str(c["named"]) for c in cells) if n not in planted)]
    grid = np.zeros((len(planted), len(named)))
    for cell in cells:
        grid[planted.index(str(cell["planted"])), named.index(str(cell["named"]))] = cell["count"]
    share = grid / grid.sum(axis=1, keepdims=True)
    with style():
        figure = Figure(figsize=(6.6, 1.9 + 0.2 * len(planted)))
        axes = figure.subplots()
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
        for row, column in zip(*np.nonzero(grid), strict=True):
            axes.text(column, row, f"{int(grid[row, column])}", ha="center", va="center", color=INK, fontsize=7)
        axes.set_xticks(range(len(named)), named, rotation=60, ha="right")
        axes.set_yticks(range(len(planted)), planted)
        axes.set_xlabel("named cause (count of defects)")
        axes.set_ylabel("planted cause")
        right = int(sum(grid[i, i] for i in range(len(planted))))
        return finish(
            figure,
            alt=f"Confusion of {len(planted)} causes: {right} of {int(grid.sum())} defects are on the diagonal.",
            caption="A row is the defects of one planted cause. A diagnosis that guessed would fill the rows; what is "
            "off the diagonal is listed with its reason.",
            left=1.5,
        )


def write_diagnosis(folder: Path, body: Mapping[str, Any]) -> None:
    """Write ``diagnosis.json``, the page made from it, and its figure."""
    (folder / "diagnosis.json").write_text(json.dumps(body, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "diagnosis.md").write_text(diagnosis_page(body), encoding="utf-8")
    figure = plot_confusion(body["confusion"])
    if figure is not None:
        (folder / "diagnosis.svg").write_text(svg(figure), encoding="utf-8")


def diagnosis_page(body: Mapping[str, Any]) -> str:
    """Write the published page: rates against targets, times, what was missed."""
    lines = [
        "# What a diagnosis gets right, and what it confuses",
        "",
        "Made by `apr zoo diagnose pygmy --publish` from `docs/diagnosis.json`. Every planted file has a random name,",
        "carries no metadata, and is explained by a process that has never seen the zoo.",
        "",
        "![confusion of planted and named causes](diagnosis.svg)",
        "",
        "| rate | measured | target | of |",
        "|---|---|---|---|",
    ]
    counts = body["counts"]
    place = "those with a place"
    of = {"reference": counts["reference"] + counts["backend"]} | dict.fromkeys(
        ("place", "held out place", "unseen place"), place
    )
    of |= {"pair one": counts["pair"], "pair both": counts["pair"]}
    for name, said in _SAID.items():
        if (rate := body["rates"].get(name)) is not None:
            target = f"{100 * body['targets'][name]:.0f} %" if name in body["targets"] else "none"
            lines.append(f"| {said} | {100 * rate:.1f} % | {target} | {of.get(name, counts.get(name))} |")
    times = ", ".join(f"{kind} {row['median']:.2f} s" for kind, row in body["seconds"].items())
    lines += ["", f"Median time of one diagnosis: {times}.", "", "## Missed", ""]
    lines += ["| defect | examined | planted | named | the deciding experiment |", "|---|---|---|---|---|"]
    for m in body["missed"]:
        answer = " ".join(str(m["answer"]).split())[:160].replace("|", "\\|")
        lines.append(f"| `{m['id']}` | {m['kind']} | {m['wanted'][0]} | {m['found'][0]} | {answer} |")
    return "\n".join(lines) + "\n"

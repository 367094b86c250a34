"""``apr report``: the pages of a run again, two runs beside each other, many runs over time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apr_core.errors import Exit

if TYPE_CHECKING:
    from apr_core.report.history import Change

app = typer.Typer(help="Read what runs left behind: one again, two beside each other, many over time.")
Folder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print strict JSON.")]

_HEADS = {
    "worse": "got worse",
    "undecided": "no longer decided",
    "better": "got better",
    "moved": "changed",
}


@app.command()
def page(run: Folder) -> None:
    """Write the pages of a run again from its evidence. After copying, merging, or an update."""
    from apr_core.cli.output import show
    from apr_core.report.run import write_again

    conclusion = write_again(run)
    show(f"{conclusion.verdict}: {conclusion.reason}\n{run / 'index.html'}")
    raise typer.Exit(int(conclusion.exit_code))


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="The run before.", show_default=False)],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The run after.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Say what changed between two runs. Exit 5 when something got worse, 11 when something is no longer decided."""
    from apr_core.cli.output import show, show_json, show_table
    from apr_core.report.history import changes, differences, read_run

    a, b = read_run(run_a), read_run(run_b)
    found, other = changes(a, b), differences(a, b)
    holes = {r.name: [*r.summary.damaged, *r.summary.missing] for r in (a, b) if r.summary.damaged or r.summary.missing}
    if as_json:
        sides = {"a": a.name, "b": b.name, "differs": {k: list(v) for k, v in other.items()}, "incomplete": holes}
        show_json({**sides, "changes": [vars(c) for c in found]})
    else:
        rows = [(r.name, str(r.summary.verdict), f"{r.summary.score:.2f}", r.time, r.release) for r in (a, b)]
        show_table(("run", "verdict", "score", "time", "release"), rows)
        if other:
            show("")
            show_table(("differs", "before", "after"), [(k, *v) for k, v in other.items()])
        for kind, title in _HEADS.items():
            if some := [c for c in found if c.kind == kind]:
                show(f"\n{title} ({len(some)})")
                show_table(("claim", "what", "before", "after", ""), [_row(c) for c in some])
        unsure = [f"{c.claim} {c.what}" for c in found if c.kind == "unsure"]
        if len(unsure) == len(found):
            show("\nno verdict changed, and no number moved beyond its noise")
        if unsure:
            more = f" and {len(unsure) - 3} more (`--json` has all)" if unsure[3:] else ""
            show(f"\n{len(unsure)} numbers differ whose noise was not recorded: {', '.join(unsure[:3])}{more}")
        for name, files in holes.items():
            show(f"\n{name} is incomplete: {', '.join(files)}")
    raise typer.Exit(_code(found, incomplete=bool(holes)))


@app.command()
def trend(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of run folders.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Write trend.html over the runs in a folder. Exit 5 when a release got worse, 11 when a run cannot be read."""
    from apr_core.cli.output import show, show_json, show_table
    from apr_core.report.history import Change
    from apr_core.report.trend import write_trend

    path, body = write_trend(folder)
    worse = [Change(**c) for c in body["regressions"]]
    if as_json:
        show_json(body)
    else:
        if worse:
            show_table(("run", "claim", "what", "before", "after", ""), [(c.run, *_row(c)) for c in worse])
        for name, why in body["damaged"].items():
            show(f"{name} cannot be read: {why}")
        show(f"{len(body['runs'])} runs, {len(worse)} regressions, {len(body['damaged'])} not read\n{path}")
    raise typer.Exit(_code(worse, incomplete=bool(body["damaged"]) or not body["runs"]))


def _row(c: Change) -> tuple[str, str, str, str, str]:
    return c.claim, c.what, c.before, c.after, c.note


def _code(found: list[Change], *, incomplete: bool) -> int:
    kinds = {c.kind for c in found}
    if "worse" in kinds:
        return Exit.REFUTED
    return Exit.INCONCLUSIVE if incomplete or "undecided" in kinds else Exit.OK

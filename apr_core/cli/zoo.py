"""``apr zoo``: hold broken models in the hand, and let every claim speak about each."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apr_core.errors import Exit, UsageError

if TYPE_CHECKING:
    from apr_core.zoo.registry import Benign, Defect
    from apr_core.zoo.score import Outcome

app = typer.Typer(help="Planted defects, legal oddities, and which claim kills what.", rich_markup_mode=None)

Id = Annotated[str, typer.Argument(metavar="ID", help="As `apr zoo list` names it.", show_default=False)]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A healthy model, or 'pygmy'.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print strict JSON.")]
SAY_EVERY_S = 5.0


@app.command("list")
def list_items(as_json: AsJson = False) -> None:
    """List what can be planted, and what cannot yet."""
    from dataclasses import asdict

    from apr_core.cli.output import show, show_json, show_table
    from apr_core.zoo.registry import load_zoo
    from apr_core.zoo.score import describe

    zoo = load_zoo()
    defects = [describe(d) for d in zoo.defects.values()]
    benign = [{"id": b.id, "what": b.what, "why": b.why} for b in zoo.benign.values()]
    later = [asdict(item) for item in zoo.later.values()]
    if as_json:
        show_json({"defects": defects, "benign": benign, "not_plantable": later})
        return
    columns = ("id", "class", "planted_in", "kills", "what")
    rows = [[", ".join(d[c]) if c == "kills" else d[c] for c in columns] for d in defects]
    show_table(("defect", "class", "in", "must be killed by", "what"), rows)
    show_table(("legal oddity", "what"), [(b["id"], b["what"]) for b in benign])
    show_table(("not yet", "issue", "what"), [(i["klass"], i["issue"], i["what"]) for i in later])
    classes = len({d["class"] for d in defects})
    show(f"{len(defects)} defects of {classes} classes, {len(benign)} legal oddities, {len(later)} classes not yet")


@app.command()
def plant(
    id_: Id,
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.", show_default=False)],
) -> None:
    """Write the broken model that an item stands for."""
    from apr_core.cli.output import show
    from apr_core.engines.subject import obtain
    from apr_core.zoo import matrix
    from apr_core.zoo.registry import Defect, NotApplicable

    item = matrix.find(id_)
    if item.recipe is None or item.hook is not None:
        way = "backend" if item.hook is not None else "converter"
        raise UsageError(f"{id_} is a fault of the {way}, not of a file: {item.what}", advice=_from_python(item))
    if out.exists():
        raise UsageError(f"{out} exists", advice="name a new folder: nothing is overwritten")
    subject = obtain(model, device="cpu")
    try:
        path, _ = matrix.plant(item, matrix.mark(subject), out, out)
    except NotApplicable as error:
        raise UsageError(f"{id_} cannot be planted on {model}: {error}", advice="plant it on pygmy") from error
    finally:
        subject.close()
    show(f"{path}: {item.what}")
    if isinstance(item, Defect):
        show(f"to be killed by {', '.join(item.kills)}; look at it with `apr qa {path} --claims --reference {model}`")


def _from_python(item: Defect | Benign) -> str:
    if item.hook is None:
        return f"from Python: with apr_core.rosetta.copies.tampered(load_zoo().defects[{item.id!r}].tamper): ..."
    kind = "defects" if hasattr(item, "kills") else "benign"
    return f"from Python: apr_core.engines.wrap.wrap(model, load_zoo().{kind}[{item.id!r}].hook(model.config))"


@app.command()
def run(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Which items to plant.", show_default=False)],
    model: Model,
    as_json: AsJson = False,
) -> None:
    """Plant some items and show what every claim says; exit 5 when one survives or a legal one is refused."""
    from apr_core.cli.output import note, show_json, show_table
    from apr_core.engines.subject import resolve_model
    from apr_core.zoo import matrix

    path = resolve_model(model).resolve()
    items = [matrix.find(i) for i in dict.fromkeys(ids)]
    rows: list[dict[str, Any]] = []
    for item in items:
        rows.append(_verdict(item, matrix.evaluate(item, path)))
        note(f"{item.id}: {rows[-1]['outcome']}, {rows[-1]['seconds']:.1f} s")
    if as_json:
        show_json({"model": str(path), "items": rows})
    else:
        for row in rows:
            said = [(j["claim"], j["verdict"], "yes" if j["behind_gate"] else "", j["reason"]) for j in row["judged"]]
            show_table((row["id"], "verdict", "behind the gate", "reason"), said)
    raise typer.Exit(Exit.OK if all(row["good"] for row in rows) else Exit.REFUTED)


@app.command("matrix")
def whole(
    model: Model,
    quick: Annotated[bool, typer.Option("--quick", help="Some defects of each claim and of many classes.")] = False,
    out: Annotated[str, typer.Option(metavar="DIR", help="Where to write, and to go on from.")] = "",
    publish: Annotated[bool, typer.Option("--publish", help="Keep the rates for the reports of every run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Plant everything; exit 5 for a survivor or a false alarm, 11 for a claim without a planted defect."""
    import json

    from apr_core.cli.output import note, plain, show_json
    from apr_core.engines.subject import ROOT, resolve_model
    from apr_core.report.zoo import write_zoo_page
    from apr_core.zoo.matrix import run_matrix
    from apr_core.zoo.power import power

    folder = Path(out).expanduser() if out else ROOT / "reports" / "zoo"
    found = run_matrix(model, out=folder, quick=quick, progress=_teller())
    body = plain(found.as_json() | {"power": [] if quick else power(resolve_model(model))})
    (folder / "matrix.json").write_text(json.dumps(body, indent=1, allow_nan=False), encoding="utf-8")
    write_zoo_page(folder, body)
    show_json(body) if as_json else _show_matrix(body)
    note(f"written to {folder}")
    if publish:
        note(f"rates published in {_publish(body)}")
    raise typer.Exit(found.exit_code)


@app.command("diagnose")
def confusion(
    model: Model,
    quick: Annotated[bool, typer.Option("--quick", help="One item of sixteen.")] = False,
    out: Annotated[str, typer.Option(metavar="DIR", help="Where to write.")] = "",
    publish: Annotated[
        bool, typer.Option("--publish", help="Write docs/diagnosis.md, its figure and records.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Diagnose everything that can be planted; exit 5 when a target is missed."""
    from apr_core.cli.output import note, plain, show, show_json, show_table
    from apr_core.engines.subject import ROOT
    from apr_core.report.diagnosis import write_diagnosis
    from apr_core.zoo.confusion import measure, summarise

    folder = Path(out).expanduser() if out else ROOT / "reports" / "zoo"
    folder.mkdir(parents=True, exist_ok=True)
    body = plain(summarise(measure(model, quick=quick, progress=note)))
    write_diagnosis(ROOT / "docs" if publish and not quick else folder, body)
    if as_json:
        show_json(body)
    else:
        show_table(("rate", "measured", "target"), [(n, body["rates"][n], t) for n, t in body["targets"].items()])
        show_table(("item", "planted", "named"), [(m["id"], m["wanted"][0], m["found"][0]) for m in body["missed"]])
        show(f"seconds: {body['seconds']}")
    raise typer.Exit(Exit.OK if all(body["met"].values()) else Exit.REFUTED)


@app.command("rounds")
def rounds() -> None:
    """Diagnose the twin of every root cause of the specification, and write docs/rounds.md and its records."""
    from apr_core.cli.output import show
    from apr_core.engines.subject import ROOT
    from apr_core.report.whys import whys_markdown
    from apr_core.zoo.rounds import diagnose_rounds, rounds_markdown

    records = diagnose_rounds(folder=ROOT / "docs")
    page = rounds_markdown(records, [whys_markdown(record["whys"]) for record in records])
    (ROOT / "docs" / "rounds.md").write_text(page, encoding="utf-8")
    show(f"{len(records)} root causes in {ROOT / 'docs' / 'rounds.md'}")


def _publish(body: dict[str, Any]) -> Path:
    """
    Write the rates into the package, where the index page of every run finds them.

    Raises:
        UsageError: The matrix is a quick one, or of another model than the bundled: its rates are not the suite's.
    """
    import json

    import apr_core.zoo
    from apr_core.engines.subject import BUNDLED
    from apr_core.formats.checkpoint import open_checkpoint

    with open_checkpoint(BUNDLED["pygmy"]) as bundled:
        own = body["model"]["sha256"] == bundled.content_hash
    if body["quick"] or not own:
        raise UsageError("only a whole matrix of the bundled model can be published", advice="run it without --quick")
    path = Path(apr_core.zoo.__file__).parent / "rates.json"
    rates = {
        "rates": body["rates"],
        "model": body["model"]["name"],
        "date": body["provenance"]["time"][:10],
        "code_digest": body["code_digest"],
        "counts": {
            "defects": len(body["defects"]),
            "classes": len({d["class"] for d in body["defects"]}),
            "legal_oddities": len(body["benign"]),
            "suite_faults": len(body["suite_faults"]),
        },
    }
    path.write_text(json.dumps(rates, indent=1) + "\n", encoding="utf-8")
    return path


def _verdict(item: Defect | Benign, outcome: Outcome) -> dict[str, Any]:
    """What became of one item, and whether it is as it should be."""
    from dataclasses import asdict

    from apr_core.falsify.claims import load_claims

    killers = [j.claim for j in outcome.killers(load_claims())]
    if outcome.crash or outcome.not_applicable:
        said = f"CRASH, {outcome.crash}" if outcome.crash else f"not applicable, {outcome.not_applicable}"
        good = not outcome.crash
    elif hasattr(item, "kills"):
        missed = [claim for claim in item.kills if claim not in killers]
        said = f"killed by {', '.join(killers)}" if killers else "SURVIVED"
        said += f"; not by {', '.join(missed)}, as it must be" if missed else ""
        good = bool(killers) and not missed
    else:
        said, good = f"ALARM by {', '.join(killers)}" if killers else "no alarm", not killers
    return {**asdict(outcome), "what": item.what, "kills": killers, "outcome": said, "good": good}


def _teller() -> Callable[[int, int, Outcome], None]:
    """Say on stderr how far it is, now and then; a survivor at once."""
    from apr_core.cli.output import note

    started = said = time.monotonic()

    def tell(done: int, total: int, outcome: Outcome) -> None:
        nonlocal said
        now = time.monotonic()
        if outcome.crash:
            note(f"{outcome.id}: CRASH, {outcome.crash}")
        if now - said >= SAY_EVERY_S or done == total:
            said = now
            note(f"zoo: {done} of {total} planted, {now - started:.0f} s")

    return tell


def _show_matrix(body: dict[str, Any]) -> None:
    from apr_core.cli.output import show, show_table

    columns = ("claim", "verdict", "defects", "classes", "only", "reason")
    rows = [[len(c[k]) if isinstance(c[k], list) else c[k] for k in columns] for c in body["claims"]]
    show_table(("claim", "row", "kills", "classes", "alone of its notebook", "reason"), rows)
    for name, matrix in body["matrices"].items():
        show(
            f"{name}: {matrix['killed']} of {matrix['of']} killed ({_percent(matrix['kill_rate'])}), "
            f"{_percent(matrix['second_killer_rate'])} by a second claim too"
        )
    for kind in ("survivors", "alarms", "crashes", "broken_promises"):
        for row in body[kind]:
            show(f"{kind}: {', '.join(str(v) for v in row.values())}")
    for fault in [f for f in body["suite_faults"] if not f["caught"]]:
        show(f"the suite let pass: {fault['id']}, {fault['what']}")
    rates = body["rates"]
    show(
        f"{len(body['defects'])} defects, {len(body['survivors'])} survivors; {len(body['benign'])} legal oddities, "
        f"{len(body['alarms'])} alarms; suite faults caught: {_percent(rates['suite_fault_rate'])}; "
        f"{_percent(rates['share_invisible_alone'])} invisible alone; {body['seconds']:.0f} s"
    )


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.1f} %"

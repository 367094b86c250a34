"""The zoo's page: which claim kills which planted defect, what survives, and what cannot be planted yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from markupsafe import Markup

from apr_core.report.page import image, stylesheet, template
from apr_core.report.summary import write_whole
from apr_core.report.text import clean, columns, machine_facts, number, percent, seconds

# Name in the JSON -> what a person had. The letter is the style that shows a kill in this view.
VIEWS: dict[str, tuple[str, str, str]] = {
    "with_reference": ("r", "With a reference", "the file, its companions, and the healthy file it was made from"),
    "without_identity": ("i", "Without identity", "the same, with the claims that compare content taken out"),
    "alone": ("a", "Alone", "the file with its own tokenizer and configuration, nothing else"),
}

# What is wrong with the suite, by its list in the JSON: heading, and what a row of it means.
FAULTS = {
    "survivors": ("Survivors", "Planted, and killed by no claim that should see it."),
    "alarms": ("False alarms", "Legal, and alarmed all the same."),
    "crashes": ("Crashes of a gate", "Not a verdict but an untyped exception: the gate itself is broken."),
    "broken_promises": ("Broken promises", "The defect names a claim that must kill it, and this claim did not."),
    "unnoticed": (
        "Unnoticed faults of the suite",
        "The suite itself was broken, and the exit code was 0 all the same.",
    ),
}
_EXIT = {
    0: ("corroborated", "every defect that can be seen was killed, and nothing legal raised an alarm"),
    5: ("falsified", "something survived, cried wolf, crashed or went unnoticed"),
    11: ("inconclusive", "a claim that can run here has no planted defect"),
}
PARTS = {
    "suite_faults": ("Faults of the suite itself", "Each must end in a non-zero exit."),
    "benign": ("Legal oddities", "None of these may raise an alarm."),
    "not_plantable": ("Not yet plantable", "Classes of real defects, each with the issue that brings what it needs."),
    "not_applicable": ("Not applicable", "The model has nothing that the recipe could damage."),
}
_TEXT = 400  # characters of any cell


def write_zoo_page(folder: Path, matrix: Mapping[str, Any]) -> Path:
    """
    Write ``index.html`` of a kill matrix: one page that needs nothing else.

    Args:
        folder: Where to; must exist.
        matrix: The JSON that ``apr zoo matrix`` writes.

    Raises:
        ReadWriteError: The page cannot be written.
    """
    matrix = {**matrix, "unnoticed": [s for s in matrix["suite_faults"] if not s["caught"]]}
    claims = _claims(matrix)
    views = [_view(name, matrix, claims) for name in VIEWS]
    faults = [_part(matrix, key, *words) for key, words in FAULTS.items()]
    context = {
        "css": stylesheet("palette.css", "index.css", "zoo.css") + _hiding(views),
        "head": _head(matrix, views, {f["key"]: f["count"] for f in faults}),
        "views": views,
        "faults": [f for f in faults if f["count"]],
        "claims": claims,
        "classes": _classes(matrix, claims),
        "rows": [_claim(c) for c in matrix["claims"]],
        "parts": [p for p in (_part(matrix, key, *words) for key, words in PARTS.items()) if p["count"]],
        "power": _power(matrix.get("power", [])),
        "made": _made(matrix),
    }
    return write_whole(folder / "index.html", template("zoo.html.j2").render(context))


def _planted(matrix: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The defects that the model could be given."""
    return [d for d in matrix["defects"] if not d["not_applicable"]]


def _rows(matrix: Mapping[str, Any], view: str) -> dict[str, dict[str, Any]]:
    """Defect -> its row in this view; ``kills`` holds the killers, the first first."""
    return {r["defect"]: r for r in matrix["matrices"][view]["kills"]}


def _claims(matrix: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The columns in the order of asking: the preflight, the gates, then every other claim that could run here."""
    asked = sorted(matrix["claims"], key=lambda c: c["notebook"] != "10_contract_gates")
    known = {c["claim"]: c for c in asked}
    killers = {k for view in VIEWS for row in _rows(matrix, view).values() for k in row["kills"]}
    kept = sorted(killers - known.keys())
    kept += [n for n in known if n in killers or known[n]["verdict"] != "NOT_RUN"]
    books = [str(known.get(n, {}).get("notebook", "")) for n in kept]
    return [
        {"id": n, "title": clean(known.get(n, {}).get("title", ""), 80), "new": i > 0 and books[i] != books[i - 1]}
        for i, n in enumerate(kept)
    ]


def _view(name: str, matrix: Mapping[str, Any], claims: list[dict[str, Any]]) -> dict[str, Any]:
    """One of the three matrices: its rates, and the columns that it does not have."""
    letter, title, what = VIEWS[name]
    found, rows = matrix["matrices"][name], _rows(matrix, name)
    killers = {k for r in rows.values() for k in r["kills"]}
    times = [r["time_to_kill_s"] for r in rows.values() if r.get("time_to_kill_s") is not None]
    mine = {*found["claims"], *killers}
    return {
        "letter": letter,
        "title": title,
        "what": what,
        "killed": found["killed"],
        "of": found["of"],
        "killers": len(killers),
        "rate": percent(found["kill_rate"]),
        "second": percent(found["second_killer_rate"]),
        "time": seconds(median(times)) if times else "–",
        "hidden": [i for i, c in enumerate(claims, 2) if c["id"] not in mine],
    }


def _hiding(views: Iterable[dict[str, Any]]) -> Markup:
    """Rules that hide, in each view, the columns and the kills of the others."""
    rules = []
    for v in views:
        on = f"#view-{v['letter']}:checked ~ .matrix"
        rules.append(f"{on} b:not(.{v['letter']}){{display:none}}")
        rules.append(
            f"#view-{v['letter']}:checked ~ .views [for=view-{v['letter']}]"
            "{border-color:var(--ink);box-shadow:inset 0 0 0 1px var(--ink);font-weight:620}"
        )
        cells = [f"{on} tr:not(.class) > :nth-child({i})" for i in v["hidden"]]
        rules += [f"{','.join(cells)}{{display:none}}"] if cells else []
    return Markup("\n".join(rules))


def _head(matrix: Mapping[str, Any], views: list[dict[str, Any]], faults: Mapping[str, int]) -> dict[str, Any]:
    planted, benign, suite, rates = _planted(matrix), matrix["benign"], matrix["suite_faults"], matrix["rates"]
    invisible = sum(bool(d["invisible_alone"]) for d in planted)
    alarmed = len({a["benign"] for a in matrix["alarms"]})
    caught = sum(bool(s["caught"]) for s in suite)
    reference, alone = views[0], views[2]
    words = {
        "survivors": ("survives", "survive"),
        "alarms": ("false alarm", "false alarms"),
        "crashes": ("crash of a gate", "crashes of gates"),
        "broken_promises": ("broken promise", "broken promises"),
        "unnoticed": ("fault of the suite unnoticed", "faults of the suite unnoticed"),
    }
    bad = [f"{faults[k]} {one if faults[k] == 1 else many}" for k, (one, many) in words.items() if faults[k]]
    return {
        "sentence": f"The suite kills {reference['rate']} of {reference['of']} planted defects with a reference, "
        f"{alone['rate']} of {alone['of']} without; "
        + (", ".join(bad) or f"none of {len(benign)} legal oddities alarms it")
        + ".",
        "exit": matrix["exit_code"],
        "exit_kind": _EXIT[matrix["exit_code"]][0],
        "exit_words": _EXIT[matrix["exit_code"]][1],
        "quick": bool(matrix.get("quick")),
        "classes": len({d["class"] for d in planted}),
        "alone": f"{len(planted) - invisible} of {len(planted)} defects can be seen in the file itself; the other "
        f"{invisible} cannot by their nature, and count only where there is a reference."
        if invisible
        else "",
        "alarms": f"{alarmed} of {len(benign)}",
        "alarm_rate": percent(rates["false_alarm_rate"]),
        "suite": f"{caught} of {len(suite)}",
        "suite_rate": percent(rates["suite_fault_rate"]),
        "time": str(matrix.get("provenance", {}).get("time", "")).replace("T", " ").replace("+00:00", " UTC"),
        "model": clean(matrix["model"]["name"], 120),
    }


def _classes(matrix: Mapping[str, Any], claims: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the matrix under their classes, in the order of the JSON."""
    ranks: dict[str, dict[str, dict[str, int]]] = {}
    for view, (letter, _, _) in VIEWS.items():
        for name, row in _rows(matrix, view).items():
            for rank, claim in enumerate(row["kills"], 1):
                ranks.setdefault(name, {}).setdefault(claim, {})[letter] = rank
    behind = {(k["defect"], k["claim"]) for k in matrix["kills"] if k["behind_gate"]}
    missed = {(b["defect"], b["claim"]) for b in matrix["broken_promises"]}
    marks = {
        "survivor": ("falsified", {s["defect"] for s in matrix["survivors"]}),
        "crash": ("falsified", {s["item"] for s in matrix["crashes"]}),
        "broken promise": ("inconclusive", {name for name, _ in missed}),
        "not applicable": ("not-run", {d["id"] for d in matrix["defects"] if d["not_applicable"]}),
        "invisible alone": ("not-run", {d["id"] for d in matrix["defects"] if d["invisible_alone"]}),
    }
    groups: dict[str, list[dict[str, Any]]] = {}
    for defect in matrix["defects"]:
        name = defect["id"]
        row = {
            "id": clean(name, 120),
            "what": clean(defect["what"], _TEXT),
            "flags": [(word, kind) for word, (kind, names) in marks.items() if name in names],
            "facts": _facts(defect),
            "cells": Markup("").join(
                _cell(
                    ranks.get(name, {}).get(c["id"], {}),
                    behind=(name, c["id"]) in behind,
                    missed=(name, c["id"]) in missed,
                    new=c["new"],
                )
                for c in claims
            ),
        }
        groups.setdefault(defect["class"], []).append(row)
    return [{"name": clean(k.replace("-", " "), 120), "rows": rows} for k, rows in groups.items()]


def _facts(defect: Mapping[str, Any]) -> dict[str, str]:
    """What a row of the matrix opens to."""
    facts = {
        "Id": defect["id"],
        "Source": defect["source"],
        "Cause": defect["cause"],
        "Planted in": " ".join(str(defect[k]) for k in ("planted_in", "role", "tensor") if defect[k]),
        "Must be killed by": _said(defect["kills"]),
        "Invisible alone": defect["invisible_alone"],
        "Not applicable": defect["not_applicable"],
    }
    return {k: clean(v, _TEXT) for k, v in facts.items() if v}


def _cell(ranks: Mapping[str, int], *, behind: bool, missed: bool, new: bool) -> Markup:
    """A cell says as how manieth this claim killed; equal ranks of several views are written once."""
    words = Markup("<s>missed</s>") if missed and not ranks else Markup("")
    for rank in dict.fromkeys(ranks.values()):
        kinds = [v for v, r in ranks.items() if r == rank] + ["first"] * (rank == 1) + ["behind"] * behind
        words += Markup('<b class="{}">{}</b>').format(" ".join(kinds), rank)
    return Markup("<td{}>{}</td>").format(Markup(' class="new"') if new else Markup(""), words)


def _claim(claim: Mapping[str, Any]) -> dict[str, Any]:
    """Whether a claim has earned its row."""
    kinds = {"earned": "corroborated", "redundant": "not-run", "NOT_RUN": "not-run"}
    return {
        "id": claim["claim"],
        "title": claim["title"],
        "notebook": claim["notebook"],
        "row": claim["verdict"],
        "kind": kinds.get(claim["verdict"], "inconclusive"),
        "counts": [len(claim[k]) for k in ("defects", "classes", "only")],
        "reason": clean(claim["reason"], _TEXT),
    }


def _part(matrix: Mapping[str, Any], key: str, title: str, note: str) -> dict[str, Any]:
    """A list of the JSON as a table with whatever columns its records have."""
    rows = matrix[key]
    heads = columns(rows)
    return {
        "key": key,
        "title": title,
        "note": note,
        "count": len(rows),
        "heads": [clean(h.replace("klass", "class").replace("_", " "), 80) for h in heads],
        "rows": [[_said(r.get(h)) for h in heads] for r in rows],
    }


def _said(value: object) -> str:
    if isinstance(value, list | tuple):
        return clean(", ".join(_said(v) for v in value), _TEXT)
    if isinstance(value, Mapping):
        return clean(", ".join(f"{k} {_said(v)}" for k, v in value.items()), _TEXT)
    return clean(number(value), _TEXT)


def _power(rows: list[dict[str, Any]]) -> dict[str, Any]:
    if not rows:
        return {"figure": None, "note": ""}
    from apr_core.report.figures import plot_power

    figure, note = image(lambda: plot_power(rows))
    return {"figure": figure, "note": note}


def _made(matrix: Mapping[str, Any]) -> dict[str, str]:
    """Which model, which code, which machine, how long."""
    took = matrix.get("seconds")
    facts = {
        "Model": matrix["model"]["name"],
        "Model sha256": matrix["model"]["sha256"],
        "Code digest": matrix.get("code_digest"),
        **machine_facts(matrix.get("provenance", {})),
        "Took": seconds(took) if took is not None else "",
    }
    return {k: clean(v, _TEXT) for k, v in facts.items() if v}

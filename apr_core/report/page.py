"""index.html: one run on one page that needs nothing else, written from declared.json and the evidence alone."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from markupsafe import Markup

from apr_core.errors import Exit
from apr_core.falsify.claims import NOTEBOOKS
from apr_core.falsify.evidence import Evidence
from apr_core.falsify.rounds import WORST_FIRST, Conclusion, read_declared
from apr_core.falsify.verdict import NotRun, Verdict
from apr_core.report.summary import NotebookStatus, evidence_file, examined, write_whole
from apr_core.report.text import clean, esc, limit_of, machine_facts, nbytes, number, percent, quantity, seconds, table
from apr_core.report.whys import whys_html

if TYPE_CHECKING:
    import jinja2
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).resolve().parent / "templates"

SHOWN = ("id", "title", "statement", "prediction", "falsifier", "severity", "round", "metric", "source")

MEANING: dict[Exit, str] = {
    Exit.OK: "nothing was refuted",
    Exit.UNEXPECTED: "something broke that is not the model's doing",
    Exit.USAGE: "wrong arguments",
    Exit.NOT_FOUND: "no such file",
    Exit.FORMAT: "not recognised, or malformed",
    Exit.REFUTED: "a claim is refuted, or the contract refuses the model",
    Exit.LOAD: "a companion of the weights is missing, or the model is too large",
    Exit.IO: "reading or writing failed",
    Exit.INFERENCE: "a forward pass failed",
    Exit.UNAVAILABLE: "a feature or a device that was asked for is not there",
    Exit.NETWORK: "the network failed",
    Exit.INCONCLUSIVE: "the run decides nothing",
}
REMEDY: dict[NotRun, str] = {
    NotRun.NO_CUDA: "run on a machine with a CUDA device",
    NotRun.NO_PEER: "install the peer",
    NotRun.NO_REFERENCE: "give --reference, the file that the model was made from",
    NotRun.NO_GOLDEN: "put golden answers beside the weights",
    NotRun.NO_TOKENIZER: "put the tokenizer beside the weights",
    NotRun.UNTRAINED: "nothing to do: these claims are about trained models",
    NotRun.NOT_APPLICABLE: "nothing to do: the format has no such thing",
    NotRun.REFUSED: "mend what the gate refused; until then nothing else can be measured",
    NotRun.NOT_OPENED: "see the diagnosis above",
}


def write_index(folder: Path, conclusion: Conclusion, *, notebooks: Mapping[str, NotebookStatus]) -> Path:
    """
    Write ``index.html`` of a run.

    Loads matplotlib only when there is evidence that has a figure, so a subject that could not be opened is reported
    at once.

    Args:
        folder: The run folder with ``declared.json`` and ``evidence/``.
        conclusion: Of the same folder, see ``apr_core.falsify.rounds.conclude``.
        notebooks: How each notebook ended; one that is not named did not run.

    Raises:
        FormatError: ``declared.json`` cannot be read.
        ReadWriteError: The page cannot be written.
    """
    declared = examined(read_declared(folder), conclusion)
    context = {
        "css": stylesheet("palette.css", "index.css"),
        "script": stylesheet("index.js"),
        "nonce": hashlib.sha256((folder / "declared.json").read_bytes()).hexdigest()[:24],
        "head": _head(declared, conclusion, notebooks),
        "suite": _suite(conclusion),
        "diagnosis": {"error": "", "advice": "", **declared["diagnosis"]} if declared["diagnosis"] else None,
        "subject": _subject(declared["subject"]),
        "reference": _subject(declared["reference"]) if declared["reference"] else None,
        "machine": _machine(declared),
        "incomplete": {
            "damaged": conclusion.damaged,
            "files": len(list((folder / "evidence").glob("*.json"))),
            "missing": [] if declared["diagnosis"] else conclusion.missing,
        },
        "filters": _filters(declared),
        "groups": [_group(name, folder, declared, conclusion, notebooks.get(name)) for name in declared["notebooks"]],
        "left_out": [n for n in NOTEBOOKS if n not in declared["notebooks"]],
        "not_run": _not_run(conclusion),
        "total_seconds": seconds(sum(s.seconds for s in notebooks.values())),
    }
    return write_whole(folder / "index.html", template("index.html.j2").render(context))


def stylesheet(*names: str) -> Markup:
    """The style sheets or scripts of a page, to be put into it."""
    return Markup("".join((TEMPLATES / name).read_text("utf-8") for name in names))


@cache
def template(name: str) -> jinja2.Template:
    """A page's template; every value that it writes is cleaned and escaped."""
    import jinja2

    # finalize sees every expression of the template, so that no value can reach the page without being cleaned
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=esc,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _head(
    declared: Mapping[str, Any], conclusion: Conclusion, notebooks: Mapping[str, NotebookStatus]
) -> dict[str, Any]:
    """The verdict in a sentence, the exit code in words, the score with what it is made of."""
    counts = conclusion.counts
    total = max(1, sum(counts.values()))
    name = clean(declared["subject"]["name"] or "the model", 120)
    return {
        "name": name,
        "verdict": str(conclusion.verdict),
        "kind": _kind(conclusion.verdict),
        "sentence": _sentence(declared, conclusion, name),
        "reason": conclusion.reason,
        "exit_code": int(conclusion.exit_code),
        "exit_meaning": "evidence cannot be read"
        if conclusion.damaged and conclusion.exit_code is Exit.FORMAT
        else MEANING[conclusion.exit_code],
        "score": f"{conclusion.score:.2f}",
        "counts": [
            {
                "verdict": str(v),
                "kind": _kind(v),
                "count": counts[str(v)],
                "share": f"{100 * counts[str(v)] / total:.2f}",
            }
            for v in Verdict
        ],
        "total": sum(counts.values()),
        "bypassed": declared["subject"]["bypassed"],
        "refusal": declared["subject"]["refusal"],
        "time": _clock(declared),
        "glance": _glance(declared, notebooks),
        "broken": [n for n in declared["notebooks"] if n in notebooks and not notebooks[n].complete],
        "refuted": {
            c["id"]: c["title"] for c in declared["claims"] if conclusion.by_claim[c["id"]][0] is Verdict.FALSIFIED
        },
    }


def _suite(conclusion: Conclusion) -> dict[str, Any]:
    """What is known of the suite itself: the published rates, and what notebook 10 planted in this run."""
    found = [e for _, _, e in conclusion.by_claim.values() if e is not None]
    caught = [re.fullmatch(r"(\d+) of (\d+) counter-examples caught", str(e.coverage.get("detail"))) for e in found]
    benign = next((e for e in found if e.id == "F-BENIGN-001"), None)
    own = []
    if any(caught):
        own.append(
            f"{sum(int(m[1]) for m in caught if m)} of {sum(int(m[2]) for m in caught if m)} planted "
            "counter-examples were caught"
        )
    if benign is not None:
        own.append(
            f"{number(benign.measured['value'])} of {benign.coverage['compared']} legal oddities raised an alarm"
        )
    return {"published": published_rates(), "own": ", ".join(own)}


def published_rates() -> dict[str, Any] | None:
    """
    The rates of the last published kill matrix of the bundled model, from ``apr_core/zoo/rates.json``.

    Returns:
        What to show, or None when none was published or the file cannot be read.
    """
    try:
        body = json.loads(resources.files("apr_core").joinpath("zoo", "rates.json").read_text("utf-8"))
        rates = body["rates"]
        return {
            "kill": percent(rates["kill_rate"]),
            "second": percent(rates["second_killer_rate"]),
            "alarm": percent(rates["false_alarm_rate"]),
            "alone": percent(rates["kill_rate_alone"]),
            "model": body["model"],
            "date": body["date"],
            "code": body["code_digest"][:12],
            "counts": {k.replace("_", " "): v for k, v in body["counts"].items()},
        }
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _glance(declared: Mapping[str, Any], notebooks: Mapping[str, NotebookStatus]) -> list[str]:
    """File, reference, machine and duration in a line."""
    subject, reference, machine = declared["subject"], declared["reference"], declared["provenance"]
    words = [
        subject["format"],
        f"sha256 {subject['sha256'][:12]}" if subject["sha256"] else "",
        ", ".join(map(str, list(subject["quant"])[:4])),
        nbytes(int(subject["file_bytes"])) if subject["file_bytes"] else "",
        f"reference {clean(reference['name'], 80)}" if reference else "no reference",
        str(machine.get("cpu") or machine.get("platform") or ""),
        seconds(sum(s.seconds for s in notebooks.values())) if notebooks else "",
    ]
    return [word for word in words if word]


def _filters(declared: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the claims can be filtered by: verdicts by their rank, worst first, severities and rounds as declared."""
    severities, rounds = ({int(row[key]) for row in declared["claims"]} for key in ("severity", "round"))
    return {
        "verdict": {"label": "Verdict", "options": {i: str(v) for i, v in enumerate(WORST_FIRST)}},
        "severity": {"label": "Severity", "options": {n: n for n in sorted(severities, reverse=True)}},
        "round": {"label": "Round", "options": {n: n for n in sorted(rounds)}},
    }


def _clock(declared: Mapping[str, Any]) -> str:
    """When the run was declared, as people write it."""
    return str(declared["provenance"].get("time", "")).replace("T", " ").replace("+00:00", " UTC")


def _sentence(declared: Mapping[str, Any], conclusion: Conclusion, name: str) -> str:
    if declared["diagnosis"]:
        return f"{name} could not be opened, so nothing about it was tried."
    counts = conclusion.counts
    refuted, held, left = counts[Verdict.FALSIFIED], counts[Verdict.CORROBORATED], counts[Verdict.NOT_RUN]
    if conclusion.verdict is Verdict.FALSIFIED:
        return f"1 claim about {name} is refuted." if refuted == 1 else f"{refuted} claims about {name} are refuted."
    if conclusion.verdict is Verdict.INCONCLUSIVE:
        return f"This run does not decide about {name}."
    rest = f", {left} could not be run" if left else ""
    return f"No attempt refuted {name}: {held} {'claim' if held == 1 else 'claims'} held{rest}."


def _not_run(conclusion: Conclusion) -> list[dict[str, Any]]:
    """Claims that were not run, by their reason, with what it would take to run them."""
    by_reason: dict[str, list[str]] = {}
    for claim, (verdict, reason, _) in conclusion.by_claim.items():
        if verdict is Verdict.NOT_RUN:
            by_reason.setdefault(reason, []).append(claim)
    return [
        {
            "reason": reason,
            "claims": claims,
            "all": len(claims) == len(conclusion.by_claim),
            "remedy": next((v for k, v in REMEDY.items() if reason.startswith(k)), ""),
        }
        for reason, claims in by_reason.items()
    ]


def _subject(record: Mapping[str, Any]) -> dict[str, Any]:
    """Passport of a model file: where, which bytes, which types, which device; and what it says about itself."""
    parameters, size = int(record["parameters"]), int(record["file_bytes"])
    facts: dict[str, object] = {
        "Path": record["path"],
        "File sha256": record["sha256"],
        "Format": record["format"],
        "Size": f"{nbytes(size)} ({size:,} bytes)" if size else "",
        "Parameters": f"{parameters:,}" if parameters else "",
        "Types": ", ".join(f"{k} × {v}" for k, v in record["quant"].items()),
        "Bits per weight": f"{8 * size / parameters:.2f} (whole file)" if parameters and size else "",
        "Device": record["device"],
        "Template sha256": record["template_sha256"],
        "Refused by": record["refusal"],
    }
    return {
        "name": clean(record["name"], 120),
        "facts": {k: v for k, v in facts.items() if v},
        "metadata": {clean(k, 200): v for k, v in record["metadata"].items()},
    }


def _machine(declared: Mapping[str, Any]) -> dict[str, object]:
    facts = {
        "Time": _clock(declared),
        **machine_facts(declared["provenance"]),
        "Asked for": ", ".join(declared["asked"]),
        "Parameters": ", ".join(f"{k} = {v!r}" for k, v in declared["parameters"].items()),
    }
    return {k: v for k, v in facts.items() if v}


def _group(
    name: str, folder: Path, declared: Mapping[str, Any], conclusion: Conclusion, status: NotebookStatus | None
) -> dict[str, Any]:
    """One notebook: how it ended, and its claims."""
    rows = [row for row in declared["claims"] if row["notebook"] == name]
    html = quote(status.html) if status and status.html else None
    verdicts = [conclusion.by_claim[row["id"]][0] for row in rows]
    if status is None:
        state, reason = "not executed", ""
    else:
        state, reason = ("complete", "") if status.complete else ("did not complete", status.reason)
    return {
        "name": name,
        "html": html,
        "state": state,
        "reason": reason,
        "seconds": seconds(status.seconds) if status else "–",
        "counts": ", ".join(f"{verdicts.count(v)} {v}" for v in Verdict if verdicts.count(v)),
        "claims": [_claim(row, folder, declared, conclusion, html) for row in rows],
    }


def _claim(
    row: Mapping[str, Any], folder: Path, declared: Mapping[str, Any], conclusion: Conclusion, html: str | None
) -> dict[str, Any]:
    """One row of the claims table and what it opens to."""
    verdict, reason, evidence = conclusion.by_claim[row["id"]]
    view = {
        **{k: row[k] for k in SHOWN},
        "verdict": str(verdict),
        "rank": WORST_FIRST.index(verdict),
        "kind": _kind(verdict),
        "reason": reason,
        "limit": limit_of(row),
        "measured": quantity(evidence.measured["value"], row["unit"]) if evidence else "–",
        "coverage": f"{evidence.coverage['compared']} / {evidence.coverage['expected']}" if evidence else "–",
        "evidence": quote(evidence_file(evidence)) if evidence else None,
        "attempts": len(list((folder / "evidence").glob(f"{row['id']}-*.json"))),
        "cell": f"{html}#cell-id=claim-{row['id'].lower()}" if html else None,
        "reused": bool(evidence and evidence.provenance.get("reused")),
        "command": _command(declared, row["notebook"]),
        "open": verdict is Verdict.FALSIFIED,
        "facts": {},
        "rows": "",
        "listed": (0, 0),
        "whys": "",
        "figure": None,
        "figure_note": "",
    }
    return {**view, **_evidence(evidence)} if evidence else view


def _evidence(e: Evidence) -> dict[str, Any]:
    """What a record adds to its claim: numbers, rows, whys, figure."""
    unit = str(e.measured.get("unit", ""))
    missing = list(e.coverage.get("missing") or [])
    if missing[12:]:
        missing = [*missing[:11], f"and {len(missing) - 11} more"]
    facts: dict[str, object] = {
        "Not compared": ", ".join(clean(n, 80) for n in missing[:12]),
        "Not finite": e.coverage.get("nonfinite") or "",
        "Detail": e.coverage.get("detail"),
        "Reference": e.reference.get("name"),
        "Reused from": e.provenance.get("reused"),
        "Noise floor": quantity(e.reference["noise_floor"], unit) if e.reference.get("noise_floor") is not None else "",
        "Least tolerance that holds": quantity(e.measured["required_tolerance"], unit)
        if e.measured.get("required_tolerance") is not None
        else "",
    }
    figure, note = _figure(e)
    return {
        "facts": {k: v for k, v in facts.items() if v},
        "rows": table(e.rows),
        "listed": (len(e.rows), len(e.rows) + e.rows_omitted),
        "whys": whys_html(
            e.whys, {"numbers": quote(evidence_file(e)), **({"figure": f"#fig-{e.id}"} if figure else {})}
        ),
        "figure": figure,
        "figure_note": note,
    }


def _figure(e: Evidence) -> tuple[dict[str, Any] | None, str]:
    """The claim's figure as an image, or why there is none: a damaged attachment must not cost the page."""
    if not e.attachments and not e.rows:
        return None, ""
    from apr_core.report.figures import FIGURES

    if e.id not in FIGURES:
        return None, ""
    return image(lambda: FIGURES[e.id](e))


def image(draw: Callable[[], Figure | None]) -> tuple[dict[str, Any] | None, str]:
    """A drawn figure as an image with its words, or a sentence that says why it could not be drawn."""
    from apr_core.report import style

    try:
        drawn = draw()
        if drawn is None:
            return None, ""
        caption, alt = style.caption_of(drawn), style.alt_text(drawn)
        source = style.data_uri(style.adaptive(style.svg(style.without_caption(drawn))))
    except Exception as error:  # whatever is wrong with one npz, the verdicts of all claims still have to be read
        return None, f"The figure could not be drawn: {type(error).__name__}: {clean(error, 300)}"
    return {"src": Markup(source), "alt": alt, "caption": caption}, ""


def _command(declared: Mapping[str, Any], notebook: str) -> str:
    """The one line that runs this claim's notebook again on the same file, with the same parameters."""
    given = declared["parameters"]
    words = ["apr", "suite", "--model", str(given.get("model") or declared["subject"]["path"])]
    if declared["reference"]:
        words += ["--reference", str(given.get("reference") or declared["reference"]["path"])]
    if given.get("device") in ("cpu", "cuda"):
        words += ["--device", str(given["device"])]
    own = ("model", "reference", "device", "out_dir", "skip_contract", "peers", "claims")
    for option in ("peer", "claim"):
        given_ = str(given.get(f"{option}s") or "")
        words += [word for value in given_.split(",") if value for word in (f"--{option}", value)]
    for name in (n for n in given if n not in own):
        words += ["-p", str(name), str(given[name])]
    words += ["--skip-contract"] * bool(given.get("skip_contract"))
    return shlex.join([*words, "--only", notebook[:2]])


def _kind(verdict: Verdict) -> str:
    """Verdict as the name of a style."""
    return str(verdict).lower().replace("_", "-")

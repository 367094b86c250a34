"""
How findings, records and rounds look in Jupyter.

JupyterLab executes scripts in the output of a cell that a person ran, so escaping here is the only defence against a
hostile model file. A repr never raises: an exception in one would fail a whole notebook.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from apr_core.diagnose.cause import Diagnosis
from apr_core.falsify.claims import load_claims
from apr_core.falsify.evidence import Evidence
from apr_core.falsify.finding import Finding
from apr_core.falsify.rounds import Round
from apr_core.report import shell as shell_
from apr_core.report.summary import evidence_file
from apr_core.report.text import aligned, clean, columns, esc, limit_of, machine_facts, number, quantity, table
from apr_core.report.whys import whys_html


@dataclass(frozen=True)
class Shown:
    """Something to show: HTML for Jupyter, the same as plain text for everything else."""

    html: Markup
    text: str

    def _repr_html_(self) -> str:
        return str(self.html)

    def __repr__(self) -> str:
        return self.text


# Objects of lower rooms by where they live, so that nothing is imported before there is one to show.
_OBJECTS = {
    ("apr_core.contract.types", "Admission"): "show_admission",
    ("apr_core.engines.subject", "Subject"): "show_subject",
    ("apr_core.formats.checkpoint", "Checkpoint"): "show_checkpoint",
    ("apr_core.model.trace", "Trace"): "show_trace",
    ("apr_core.parity.compare", "ParityReport"): "show_parity",
}


def install() -> bool:
    """
    Register displays, completion of keys and short errors in the running IPython; imports nothing outside of one.

    Returns:
        Whether there was an IPython to register with.
    """
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    shell = get_ipython()
    if shell is None:
        return False
    formats = shell.display_formatter.formatters
    own: dict[type, Callable[[Any], Shown]] = {
        Finding: show_finding,
        Evidence: show_evidence,
        Round: show_claims,
        Diagnosis: show_diagnosis,
    }
    for kind, shown in own.items():
        formats["text/html"].for_type(kind, functools.partial(_html, shown))
        formats["text/plain"].for_type(kind, functools.partial(_plain, shown))
    for (module, name), how in _OBJECTS.items():
        formats["text/html"].for_type_by_name(module, name, functools.partial(_html, functools.partial(_object, how)))
        formats["text/plain"].for_type_by_name(module, name, functools.partial(_plain, functools.partial(_object, how)))
    shell_.short_errors(shell)
    shell_.keys_on_tab(shell)
    formats["image/svg+xml"].for_type_by_name("matplotlib.figure", "Figure", _figure)
    formats["text/plain"].for_type_by_name("matplotlib.figure", "Figure", _figure_text)
    return True


def show_finding(finding: Finding) -> Shown:
    """A measurement before it is judged: value against limit, coverage, rows, whys."""
    if not finding.claim:  # shown beside the claims, judged by none
        reason = f"{finding.not_run}: {finding.blame}" if finding.not_run is not None else finding.inconclusive
        return compose([f"not shown: {reason}" if reason else finding.detail], finding.rows)
    claim = load_claims()[finding.claim]
    if finding.not_run is not None:
        said = f"{finding.claim} not run: {finding.not_run}{f': {finding.blame}' if finding.blame else ''}"
        return compose([said])
    value = "not finite" if finding.value is not None and number(finding.value) == "not finite" else finding.value
    lines = [
        f"{finding.claim} {claim.title}",
        f"{claim.metric} = {quantity(value, claim.unit)} (limit {limit_of(claim.as_json())}), "
        f"compared {finding.compared} of {finding.expected}",
    ]
    if finding.nonfinite:
        lines.append(f"{finding.nonfinite} values are not finite")
    if finding.missing:
        lines.append(f"not compared: {', '.join(clean(n, 80) for n in list(finding.missing)[:5])}")
    if finding.reference:
        lines.append(f"reference: {finding.reference}")
    if finding.noise_floor is not None:
        lines.append(f"noise floor: {quantity(finding.noise_floor, claim.unit)}")
    if finding.reused:
        lines.append(f"reused: measured in attempt {finding.reused}, with the same file, code and machine")
    if finding.inconclusive:
        lines.append(f"decides nothing: {finding.inconclusive}")
    return compose(lines, finding.rows, finding.whys)


def show_diagnosis(diagnosis: Diagnosis) -> Shown:
    """A diagnosis: outcome, provenance, and the chain of each cause that was found."""
    head = [f"{diagnosis.outcome}{f'; {diagnosis.provenance}' if diagnosis.provenance else ''}"]
    if not diagnosis.causes:
        return compose(head, whys=diagnosis.whys)
    proved = ("measured", "proved by repair")
    parts = [compose([f"{c.klass}: {c.place} ({proved[c.proved]})"], whys=c.whys) for c in diagnosis.causes]
    shown = [compose(head), *parts]
    return together(shown)


def show_evidence(evidence: Evidence) -> Shown:
    """A judged record: its canonical line, and the whys where it is falsified."""
    return compose([str(evidence)], whys=evidence.whys, links=_links(evidence))


def show_claims(round_: Round) -> Shown:
    """The claims of a round as a table, and under it the whys of what is falsified."""
    by_id = {e.id: e for e in round_.records}
    rows: list[Mapping[str, Any]] = []
    for claim in round_.claims:
        e = by_id.get(claim.id)
        rows.append(
            {
                "claim": claim.id,
                "title": claim.title,
                "verdict": str(e.verdict) if e else "not recorded yet",
                "measured": quantity(e.measured["value"], claim.unit) if e else "–",
                "limit": limit_of(claim.as_json()),
                "compared": f"{e.coverage['compared']} of {e.coverage['expected']}" if e else "–",
                **({"reason": e.reason} if e and e.reason else {}),
            }
        )
    whys = show_whys(round_) if round_.falsified() else Shown(Markup(""), "")
    return Shown(
        table(rows, f"Claims of {round_.notebook}") + whys.html,
        "\n".join([_text_table(rows), *([whys.text] if whys.text else [])]),
    )


def show_whys(round_: Round) -> Shown:
    """Five whys of each falsified claim: questions and the answers that experiments gave."""
    parts = [
        compose([f"{e.id} {e.verdict}: {e.reason}"], whys=e.whys or _NO_WHYS, links=_links(e))
        for e in round_.falsified()
    ]
    if not parts:
        return compose(["No claim of this round is falsified: there is nothing to explain."])
    return together(parts)


def show_rounds(records: Sequence[Mapping[str, Any]]) -> Shown:
    """The root causes of the specification: a table, and the chain that was measured on the twin of each."""
    columns = ("round", "id", "twin", "cause", "place")
    rows = [
        {**{c: r[c] for c in columns}, "proved": "by repair" if r["proved"] else "", "guards": ", ".join(r["guards"])}
        for r in records
    ]
    said = [(f"Round {r['round']}, {r['id']}", r["what"], f"Planted: {r['planted']}.") for r in records]
    parts = [
        compose([f"{len(records)} root causes, each diagnosed on a planted twin"], rows),
        *(compose(lines, whys=r["whys"]) for lines, r in zip(said, records, strict=True)),
    ]
    return together(parts)


def show_provenance(round_: Round) -> Shown:
    """Which bytes were examined, and by what code on which machine."""
    s = round_.subject
    facts: dict[str, object] = {
        "model": s.name,
        "format": s.format,
        "sha256": s.sha256,
        "types": ", ".join(f"{k} × {v}" for k, v in s.quant.items()),
        "parameters": f"{s.parameters:,}",
        "device": s.device,
        "refused": s.refusal,
        "contract": "bypassed (--skip-contract): nothing here can be corroborated" if s.bypassed else "",
        "reference": f"{round_.reference.name} (sha256 {round_.reference.sha256})" if round_.reference else "",
        **{heading.lower(): known for heading, known in machine_facts(round_.provenance).items()},
        "parameters given": ", ".join(f"{k}={v}" for k, v in round_.parameters.items()),
    }
    known = {k: clean(v, 400) for k, v in facts.items() if v not in ("", None)}
    body = Markup("").join(
        Markup('<tr><th scope="row">{}</th><td>{}</td></tr>').format(esc(k), esc(v)) for k, v in known.items()
    )
    wide = max(len(k) for k in known)
    return Shown(
        Markup('<table class="apr-facts"><tbody>{}</tbody></table>').format(body),
        "\n".join(f"{k:<{wide}}  {v}" for k, v in known.items()),
    )


def show_matrix(matrix: Mapping[str, Any]) -> Shown:
    """
    Show which claim refuses which counter-example.

    Args:
        matrix: Counter-example -> claim -> how often it was refused, or a kill matrix as JSON.
    """
    cells: dict[str, dict[str, object]] = {}
    for name, claim, said in _kills(matrix):
        cells.setdefault(name, {})[claim] = said
    claims = sorted({c for row in cells.values() for c in row})
    if not claims:
        return compose(["No counter-example was planted."])
    head = Markup("").join(
        Markup('<th scope="col"><span style="writing-mode:vertical-rl">{}</span></th>').format(esc(c, 80))
        for c in claims
    )
    body = Markup("").join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            esc(name, 200),
            Markup("").join(Markup("<td>{}</td>").format(esc(number(row.get(c, "")), 80)) for c in claims),
        )
        for name, row in cells.items()
    )
    grid = Markup(
        '<table class="apr-rows"><thead><tr><th scope="col">counter-example</th>{}</tr></thead>'
        "<tbody>{}</tbody></table>"
    ).format(head, body)
    text = [{"counter-example": n, "refused by": ", ".join(row)} for n, row in cells.items()]
    return Shown(_scrolled(grid, len(cells)), _text_table(text))


def _kills(matrix: Mapping[str, Any]) -> Iterator[tuple[str, str, object]]:
    """Counter-example, claim, and what the cell says: a count, or "refused"."""
    if isinstance(matrix.get("kills"), list):
        yield from ((str(k["defect"]), str(k["claim"]), "refused") for k in matrix["kills"])
        return
    for name, row in matrix.items():
        yield from ((str(name), str(claim), count) for claim, count in row.items() if count)


_NO_WHYS = (("Why?", "No experiment has been recorded for this claim."),)


def _links(e: Evidence) -> dict[str, str]:
    """Where the numbers of a record lie, seen from its run folder, and its figure on the page of the run."""
    from apr_core.report.figures import FIGURES

    drawn = e.id in FIGURES and (e.attachments or e.rows)
    return {"numbers": quote(evidence_file(e)), **({"figure": f"index.html#fig-{e.id}"} if drawn else {})}


def compose(
    said: Sequence[str],
    rows: Sequence[Mapping[str, Any]] = (),
    whys: Sequence[tuple[str, str]] = (),
    links: Mapping[str, str] | None = None,
) -> Shown:
    """Put lines (the first as a heading), a table of rows and a chain of whys into one display, all of it escaped."""
    first, *rest = [clean(line, 1000) for line in said]
    html = Markup("<p><strong>{}</strong></p>").format(esc(first))
    if rest:
        html += Markup("<p>{}</p>").format(Markup("<br>").join(esc(line) for line in rest))
    html += _scrolled(table([dict(r) for r in rows]), len(rows))
    if whys:
        html += whys_html(whys, links)
    text = [first, *rest, *([_text_table(rows)] if rows else [])]
    return Shown(html, "\n".join([*text, *(f"  {i}. {clean(q)} {clean(a)}" for i, (q, a) in enumerate(whys, 1))]))


def together(parts: Sequence[Shown]) -> Shown:
    """Put displays under each other."""
    return Shown(Markup("").join(p.html for p in parts), "\n".join(p.text for p in parts))


def _scrolled(inner: Markup, rows: int) -> Markup:
    """Keep a long table from pushing the argument off the screen; focusable, so that a keyboard can scroll it."""
    if rows <= 14:
        return inner
    return Markup(
        '<div class="apr-scroll" style="max-height:24rem;overflow:auto" tabindex="0" role="region" '
        'aria-label="{} rows">{}</div>'
    ).format(rows, inner)


def _text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows in aligned columns, a cell never more than some 60 characters wide."""
    names = columns(rows)
    return aligned(names, [[number(r.get(n)) for n in names] for r in rows], 36)


def _object(how: str, thing: object) -> Shown:
    from apr_core.report import objects

    shown: Shown = getattr(objects, how)(thing)
    return shown


def _html(show: Callable[[Any], Shown], thing: object) -> str:
    return str(_total(show, thing).html)


def _plain(show: Callable[[Any], Shown], thing: object, printer: Any, cycle: bool) -> None:
    printer.text("..." if cycle else _total(show, thing).text)


def _total(show: Callable[[Any], Shown], thing: object) -> Shown:
    """Show, whatever happens: an exception in a display is recorded as a failed cell and would fail the run."""
    try:
        return show(thing)
    except Exception as error:
        return compose([f"{type(thing).__name__} could not be shown: {type(error).__name__}: {clean(error, 200)}"])


def _figure(figure: Any) -> tuple[str, dict[str, str]] | None:
    """SVG of a figure and its alternative text; nbconvert's page takes the latter from the output's metadata."""
    from apr_core.report.style import alt_text, svg

    try:
        return svg(figure), {"alt": alt_text(figure)}
    except Exception as error:
        sys.stderr.write(f"figure not drawn: {clean(error, 200)}\n")
        return None


def _figure_text(figure: Any, printer: Any, cycle: bool) -> None:
    from apr_core.report.style import alt_text

    printer.text("..." if cycle else alt_text(figure))

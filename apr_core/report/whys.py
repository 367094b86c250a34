"""A chain of causes as the specification prints it: Why, Question, Answer; in HTML and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from apr_core.report.text import clean, esc

Whys = Sequence[tuple[str, str]]
HEADS = ("Why", "Question", "Answer")


def whys_html(whys: Whys, figure: str = "") -> Markup:
    """
    Render a chain as a table; nothing for an empty one.

    Args:
        whys: Question and answer, from the symptom to its cause; whatever a model file supplied is escaped.
        figure: Anchor of the figure that shows the numbers, without ``#``; the last answer links to it.
    """
    if not whys:
        return Markup("")
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in HEADS)
    link = Markup(' <a href="#{}">figure</a>').format(esc(figure)) if figure else Markup("")
    rows = Markup("").join(
        Markup('<tr><th scope="row">{}</th><td>{}</td><td>{}{}</td></tr>').format(
            at, esc(question), esc(answer), link if at == len(whys) else ""
        )
        for at, (question, answer) in enumerate(whys, 1)
    )
    return Markup('<table class="apr-whys"><thead><tr>{}</tr></thead><tbody>{}</tbody></table>').format(head, rows)


def whys_markdown(whys: Whys) -> str:
    """Render a chain as a Markdown table; bars and line ends of a foreign text cannot break a cell."""
    lines = [f"| {' | '.join(HEADS)} |", "|---|---|---|"]
    lines += [f"| {at} | {_cell(question)} | {_cell(answer)} |" for at, (question, answer) in enumerate(whys, 1)]
    return "\n".join(lines)


def _cell(text: str) -> str:
    safe = " ".join(clean(text).split())
    for sign in "\\`*_[]<>|":
        safe = safe.replace(sign, f"\\{sign}")
    return safe

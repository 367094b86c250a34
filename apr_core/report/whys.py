"""A chain of causes as the specification prints it: Why, Question, Answer; in HTML and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup

from apr_core.report.text import clean, esc

Whys = Sequence[tuple[str, str]]
HEADS = ("Why", "Question", "Answer")


def whys_html(whys: Whys, links: Mapping[str, str] | None = None) -> Markup:
    """
    Render a chain as a table; nothing for an empty one.

    Args:
        whys: Question and answer, from the symptom to its cause; whatever a model file supplied is escaped.
        links: Word -> address of what each answer rests on: the record with its numbers, the figure.
    """
    if not whys:
        return Markup("")
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in HEADS)
    link = Markup("").join(
        Markup(' <a href="{}">{}</a>').format(esc(address), esc(word)) for word, address in (links or {}).items()
    )
    rows = Markup("").join(
        Markup('<tr><th scope="row">{}</th><td>{}</td><td>{}{}</td></tr>').format(at, esc(question), esc(answer), link)
        for at, (question, answer) in enumerate(whys, 1)
    )
    return Markup('<table class="apr-whys"><thead><tr>{}</tr></thead><tbody>{}</tbody></table>').format(head, rows)


def whys_markdown(whys: Whys, links: Mapping[str, str] | None = None, safe: Callable[[str], str] | None = None) -> str:
    """Render a chain as a Markdown table; bars and line ends of a foreign text cannot break a cell."""
    cell = safe or _cell
    link = "".join(f" [{word}]({address})" for word, address in (links or {}).items())
    rows = [f"| {at} | {cell(question)} | {cell(answer)}{link} |" for at, (question, answer) in enumerate(whys, 1)]
    return "\n".join([f"| {' | '.join(HEADS)} |", "|---|---|---|", *rows])


def _cell(text: str) -> str:
    safe = " ".join(clean(text).split())
    for sign in "\\`*_[]<>|":
        safe = safe.replace(sign, f"\\{sign}")
    return safe

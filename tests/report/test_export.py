"""A notebook as a page: folded, marked, inert."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from apr_core.errors import FormatError
from apr_core.report.export import export_html
from apr_core.report.figures import plot
from apr_core.report.style import alt_text, svg


def cell(source: str, outputs: list[Any], cell_id: str, *tags: str) -> Any:
    """An executed code cell."""
    made = new_code_cell(source, outputs=outputs, execution_count=1, id=cell_id)
    made.metadata.tags = list(tags)
    return made


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Export a notebook made of these cells."""

    def export(*cells: Any, declared: bool = False) -> str:
        folder = tmp_path_factory.mktemp("nb")
        if declared:
            (folder / "declared.json").write_text("{}")
        nbformat.write(new_notebook(cells=list(cells)), folder / "20_parity.ipynb")
        export_html(folder / "20_parity.ipynb", folder / "20_parity.html")
        assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == []
        return (folder / "20_parity.html").read_text(encoding="utf-8")

    return export


CLAIM = cell(
    'print(round.record("F-PAR-001", finding))',
    [new_output("stream", text="F-PAR-001 FALSIFIED: rel_l2 is 1 1, the limit is <= 1e-05\n")],
    "claim-f-par-001",
    "claim",
    "nbval-check-output",
)


def test_the_claim_cell_can_be_linked_and_seen(page: Callable[..., str], parse: Callable[[str], Any]) -> None:
    """Its id is the anchor of the report, its verdict is its style, the page lists it."""
    source = page(new_markdown_cell("# Parity <of two>\n\ntext", id="c00"), CLAIM, declared=True)
    shown = parse(source)
    (claim,) = [a for _, a in shown.tags if "celltag_claim" in a.get("class", "")]
    assert claim["id"] == "cell-id=claim-f-par-001"
    assert "celltag_verdict-FALSIFIED" in source
    assert {"href": "#cell-id=claim-f-par-001"} in shown.every("a")
    assert {"href": "index.html"} in shown.every("a")
    assert "1 claims on this page" in shown.text
    assert "<title>Parity &lt;of two&gt;</title>" in source


def test_alone_it_links_to_no_report(page: Callable[..., str], parse: Callable[[str], Any]) -> None:
    """A page that is not beside a run has no dead link, and takes the file's name when it has no heading."""
    source = page(cell("x = 1", [], "c1"), cell("y", [new_output("stream", text="no verdict")], "c2", "claim"))
    assert parse(source).every("a") == []
    assert "<title>20_parity</title>" in source
    assert "claims on this page" not in source


def test_code_is_folded(page: Callable[..., str], parse: Callable[[str], Any]) -> None:
    """Behind its first line, opened by one button whose script is the only one."""
    shown = parse(page(cell("first_line = 1\nsecond = 2", [], "c1"), CLAIM))
    folded = [a for a in shown.every("details") if a.get("class") == "apr-code"]
    assert len(folded) == 2
    assert all("open" not in a for a in folded)
    assert "first_line = 1" in shown.text
    assert len(shown.every("script")) == 1
    assert [a["id"] for a in shown.every("button")] == ["apr-toggle"]


def test_figures_have_words(page: Callable[..., str], parse: Callable[[str], Any], finding: Any) -> None:
    """From the metadata of the output, else its text; ours follow light and dark, others are left as they are."""
    figure = plot(finding("F-PAR-001"))
    png = base64.b64encode(b"not really").decode()
    outputs = [
        new_output(
            "display_data", {"image/svg+xml": svg(figure)}, metadata={"image/svg+xml": {"alt": alt_text(figure)}}
        ),
        new_output("display_data", {"image/svg+xml": "<svg/>", "text/plain": 'a "plot"'}),
        new_output("display_data", {"image/png": png}, metadata={"alt": "a photo"}),
        new_output("display_data", {"image/png": png}),
    ]
    images = parse(page(cell("plot(finding)", outputs, "c1"))).every("img")
    assert [a["alt"] for a in images] == [alt_text(figure), 'a "plot"', "a photo", "figure"]
    drawn = base64.b64decode(images[0]["src"].split(",")[1]).decode()
    assert "prefers-color-scheme:dark" in drawn


def test_hostile_outputs_are_inert(
    page: Callable[..., str], parse: Callable[[str], Any], strings: tuple[str, ...]
) -> None:
    """Text of a model in streams, plain text, errors, tags and alternative texts is text; JavaScript is dropped."""
    text = "\n".join(s.replace("\ud800", "") for s in strings)
    outputs = [
        new_output("stream", text=text),
        new_output("execute_result", {"text/plain": text}, execution_count=1),
        new_output("error", ename=strings[0], evalue=strings[1], traceback=[text]),
        new_output("display_data", {"image/svg+xml": "<svg/>"}, metadata={"image/svg+xml": {"alt": text}}),
        new_output("display_data", {"application/javascript": "window.PWN=1"}),
        new_output("display_data", {"text/vnd.mermaid": "graph TD"}),
    ]
    source = page(cell(strings[0], outputs, "c1", "x<script>"), new_markdown_cell("# " + "x" * 9000, id="c2"))
    shown = parse(source)
    assert shown.faults() == []
    assert len(shown.every("script")) == 1
    assert "window.PWN=1</script>" in shown.text
    assert "graph TD" not in source


def test_raw_html_meets_the_policy(page: Callable[..., str], parse: Callable[[str], Any]) -> None:
    """HTML of an output is kept (tables need it), so the policy has to hold: only the nonce's script."""
    source = page(cell("x", [new_output("display_data", {"text/html": "<table><tr><td>1</td></tr></table>"})], "c1"))
    shown = parse(source)
    policy = next(a["content"] for a in shown.every("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'nonce-")
    assert policy.endswith("'; base-uri 'none'; form-action 'none'")
    assert shown.every("script")[0]["nonce"] in policy
    assert source.index("Content-Security-Policy") < source.index("<style")
    assert len(shown.every("td")) == 1


def test_nothing_remote_and_nothing_heavy(page: Callable[..., str], parse: Callable[[str], Any]) -> None:
    """No address at all, no icon sheet, no require.js, no MathJax, no widgets; tens of kilobytes."""
    source = page(new_markdown_cell("# T\n\n$x^2$ and `code`", id="c0"), CLAIM)
    assert parse(source).faults() == []
    assert not re.search(r"https?://|@import|jp-icon|require\.js|mathjax", source, re.IGNORECASE)
    assert len(source) < 60_000
    assert "prefers-color-scheme: dark" in source


@pytest.mark.parametrize(
    "content", [None, b"", b"not json", b"\xff\xfe", b'{"cells": 3, "nbformat": 4, "nbformat_minor": 5}']
)
def test_what_is_no_notebook(content: bytes | None, tmp_path: Path) -> None:
    """An error with a name, and no page."""
    source = tmp_path / "x.ipynb"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(FormatError, match="a Jupyter notebook"):
        export_html(source, tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()

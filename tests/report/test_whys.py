"""Chains of causes as tables."""

from __future__ import annotations

from apr_core.report.whys import whys_html, whys_markdown

CHAIN = [("Which <tensor>?", "down_proj | 3 of 9\nvalues"), ("Proved?", "transposing it restores 9 of 9")]


def test_a_chain_is_a_numbered_table_of_questions_and_answers() -> None:
    """Three columns, one row per why, foreign text escaped, numbers and figure linked from each answer."""
    html = str(whys_html(CHAIN, {"numbers": "evidence/1.json", "figure": "#fig-1"}))
    assert html.count("<tr>") == 3
    assert html.count('<th scope="col">') == 3
    assert "Which &lt;tensor&gt;?" in html
    assert "<tensor>" not in html
    assert html.count('<a href="evidence/1.json">numbers</a> <a href="#fig-1">figure</a>') == len(CHAIN)
    assert str(whys_html([])) == ""


def test_markdown_cells_hold_whatever_a_file_says() -> None:
    """A bar or a line end in an answer stays inside its cell."""
    lines = whys_markdown(CHAIN).splitlines()
    assert lines[0] == "| Why | Question | Answer |"
    assert len(lines) == 4
    assert lines[2] == r"| 1 | Which \<tensor\>? | down\_proj \| 3 of 9 values |"
    assert whys_markdown(CHAIN, {"numbers": "e.json"}).count("[numbers](e.json) |") == len(CHAIN)

"""The published page of diagnoses and its figure."""

from __future__ import annotations

import json
from pathlib import Path

from apr_core.report.diagnosis import diagnosis_page, plot_confusion
from apr_core.report.style import alt_text


def test_the_figure_counts_what_is_on_the_diagonal() -> None:
    """A cause that was never planted, and named, gets a column of its own."""
    cells = [
        {"planted": "codec", "named": "codec", "count": 4},
        {"planted": "codec", "named": "layout", "count": 1},
    ]
    figure = plot_confusion(cells)
    assert figure is not None
    assert "4 of 5 defects are on the diagonal" in alt_text(figure)
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["codec", "layout"]
    assert plot_confusion([]) is None


def test_the_published_page_is_made_from_its_records(root: Path) -> None:
    """Neither was edited by hand, every target that it states is met, and every miss is listed."""
    body = json.loads((root / "docs" / "diagnosis.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "diagnosis.md").read_text(encoding="utf-8")
    assert page == diagnosis_page(body)
    assert all(f"`{m['id']}`" in page for m in body["missed"])
    assert (root / "docs" / "diagnosis.svg").is_file()

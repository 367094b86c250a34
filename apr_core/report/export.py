"""A notebook as one page: our own template, code folded away, nothing remote, nothing that a model wrote executed."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from apr_core.errors import FormatError
from apr_core.falsify.verdict import Verdict
from apr_core.report.style import adaptive
from apr_core.report.summary import write_whole
from apr_core.report.text import clean

TEMPLATES = Path(__file__).resolve().parent / "templates"
_VERDICTS = "|".join(Verdict)


def export_html(notebook: Path, html: Path) -> None:
    """
    Write a notebook as a self-contained page.

    Every cell has ``id="cell-id=<cell id>"``. A page beside a ``declared.json`` links back to the report. The page
    holds a content security policy: only its own button's script runs.

    Args:
        notebook: An executed notebook.
        html: Where the page goes; replaced in one step.

    Raises:
        FormatError: The file is not a notebook.
        ReadWriteError: The page cannot be written.
    """
    import nbformat
    from nbconvert import HTMLExporter

    try:
        source = notebook.read_bytes()
        book = nbformat.reads(source.decode("utf-8"), as_version=4)
    except (OSError, ValueError, TypeError, AttributeError, nbformat.ValidationError) as error:
        raise FormatError(
            expected="a Jupyter notebook",
            found=f"{type(error).__name__}: {error}",
            file=notebook,
            advice="run it again",
        ) from error
    claims = _prepare(book)
    exporter = HTMLExporter(template_name="apr", extra_template_basedirs=[str(TEMPLATES)], exclude_anchor_links=True)
    exporter.register_filter("clean", clean)
    resources = {
        "metadata": {"name": notebook.stem},
        "apr_nonce": hashlib.sha256(source).hexdigest()[:24],  # a text cannot hold its own hash, so it cannot forge it
        "apr_css": (TEMPLATES / "palette.css").read_text("utf-8") + (TEMPLATES / "notebook.css").read_text("utf-8"),
        "apr_title": _title(book, notebook.stem),
        "apr_claims": claims,
        "apr_index": (html.parent / "declared.json").is_file(),
    }
    page, _ = exporter.from_notebook_node(book, resources=resources)
    write_whole(html, page)


def _prepare(book: Any) -> list[dict[str, str]]:
    """Mark each claim cell with its verdict, let our figures follow light and dark, and list the claims."""
    claims = []
    for cell in book.cells:
        outputs = cell.get("outputs", [])
        for output in outputs:
            data = output.get("data", {})
            if isinstance(data.get("image/svg+xml"), str):
                data["image/svg+xml"] = adaptive(data["image/svg+xml"])
        if "claim" in cell.get("metadata", {}).get("tags", []):
            said = "".join(o.get("text", "") for o in outputs if o.get("output_type") == "stream")
            found = re.match(rf"(F-[A-Z0-9-]+) ({_VERDICTS})\b", said)
            if found:
                cell.metadata.tags = [*cell.metadata.tags, f"verdict-{found[2]}"]
                claims.append({"cell": cell.get("id", ""), "claim": found[1], "verdict": found[2]})
    return claims


def _title(book: Any, name: str) -> str:
    """The first heading of the notebook, or its name."""
    for cell in book.cells:
        if cell.cell_type == "markdown" and (found := re.match(r"\s*#\s+(.+)", cell.source)):
            return clean(found[1].strip(), 200)
    return name

"""Execute the committed notebooks in place with no diff noise; --check writes nothing and says what would change."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # grammars for 1.1 s that nothing here uses

import nbformat  # noqa: E402
from nbclient import NotebookClient  # noqa: E402

from apr_core.cli.kernels import IpcKernelManager  # noqa: E402

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def executed(path: Path) -> str:
    """Run a notebook from a clean slate and return its text without timestamps, paths and machine versions."""
    book = nbformat.read(path, as_version=4)
    for cell in book.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(
        book,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        kernel_manager_class=IpcKernelManager,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    book.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    )
    book.nbformat, book.nbformat_minor = 4, 5
    nbformat.validate(book)
    return nbformat.writes(book) + "\n"


def comparable(text: str) -> list[tuple[Any, ...]]:
    """What must not change: sources, tags, counts, and the outputs of cells that are compared."""
    rows = []
    for c in nbformat.reads(text, as_version=4).cells:
        tags = c.metadata.get("tags", [])
        outputs = None if "nbval-ignore-output" in tags else c.get("outputs")
        rows.append((c.id, c.cell_type, c.source, tags, outputs, c.get("execution_count")))
    return rows


def main() -> int:
    """Refresh the notebooks named on the command line, or all four."""
    os.environ |= {"SOURCE_DATE_EPOCH": "0", "PYTHONHASHSEED": "0"}
    check = "--check" in sys.argv
    names = [a for a in sys.argv[1:] if a != "--check"]
    stale = []
    for path in [Path(n) for n in names] or sorted(FOLDER.glob("*.ipynb")):
        new, old = executed(path), path.read_text(encoding="utf-8")
        changed = [a[0] for a, b in zip(comparable(old), comparable(new), strict=True) if a != b]
        print(f"{path.name}: {'same' if not changed else 'changed ' + ', '.join(changed)}", flush=True)
        if changed:
            stale.append(path.name)
        if not check and new != old:
            path.write_text(new, encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())

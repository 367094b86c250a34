"""Everything that is written about a run, and the same again from a folder that was copied here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from apr_core.errors import FormatError
from apr_core.falsify.rounds import Conclusion, conclude, read_declared
from apr_core.report.junit import write_junit
from apr_core.report.page import write_index
from apr_core.report.summary import NotebookStatus, read_summary, summarise, write_summary


def write_reports(folder: Path, notebooks: Mapping[str, NotebookStatus]) -> Conclusion:
    """
    Conclude a run from its files and write ``summary.json``, ``summary.md``, ``junit.xml`` and ``index.html``.

    Args:
        folder: The run folder.
        notebooks: How each notebook ended; one that is not named did not run.

    Raises:
        FormatError: As ``conclude``.
        ReadWriteError: The folder cannot be written.
    """
    conclusion = conclude(folder, {name: s.reason for name, s in notebooks.items() if not s.complete})
    write_summary(folder, summarise(folder, conclusion, notebooks))
    write_junit(folder, conclusion, notebooks)
    write_index(folder, conclusion, notebooks=notebooks)
    return conclusion


def write_again(folder: Path) -> Conclusion:
    """
    Write the reports of an old or merged run again, from its evidence.

    How its notebooks ended stands in ``summary.json`` alone; without one they count as broken, since a page that does
    not know must not look complete.

    Raises:
        FormatError: As ``conclude``.
        ReadWriteError: The folder cannot be written.
    """
    try:
        known: dict[str, NotebookStatus] = dict(read_summary(folder).notebooks)
    except FormatError:
        known = {}
    declared = read_declared(folder)
    if not declared["diagnosis"]:
        for name in declared["notebooks"]:
            known.setdefault(name, NotebookStatus(0.0, False, "how it ended is not recorded in this folder"))
    return write_reports(folder, known)

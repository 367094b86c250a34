"""summary.json: a whole run for a machine to read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apr_core.errors import ReadWriteError
from apr_core.falsify.evidence import Evidence
from apr_core.falsify.rounds import Conclusion, read_declared
from apr_core.report.text import limit_of

if TYPE_CHECKING:
    from apr_core.report.page import NotebookStatus

SCHEMA = 1


def write_summary(folder: Path, conclusion: Conclusion, notebooks: Mapping[str, NotebookStatus]) -> Path:
    """
    Write ``summary.json``: verdict, reason, exit code, score, counts, every declared claim, every notebook.

    Strict JSON in ASCII, so that a lone surrogate from a model's metadata cannot break the file.

    Raises:
        FormatError: ``declared.json`` cannot be read.
        ReadWriteError: The folder cannot be written.
    """
    declared = read_declared(folder)
    body = {
        "schema": SCHEMA,
        "verdict": str(conclusion.verdict),
        "reason": conclusion.reason,
        "exit_code": int(conclusion.exit_code),
        "score": conclusion.score,
        "counts": dict(conclusion.counts),
        "subject": {k: declared["subject"][k] for k in ("name", "path", "format", "sha256")},
        "diagnosis": declared["diagnosis"],
        "claims": {row["id"]: _claim(row, conclusion) for row in declared["claims"]},
        "notebooks": {
            name: {"seconds": round(status.seconds, 3), "complete": status.complete, "reason": status.reason}
            for name, status in notebooks.items()
        },
    }
    return write_whole(folder / "summary.json", json.dumps(body, indent=1, allow_nan=False) + "\n")


def evidence_file(evidence: Evidence) -> str:
    """Path of an evidence record relative to its run folder."""
    return f"{Path(evidence.folder).name}/{evidence.id}-{evidence.attempt}.json"


def write_whole(path: Path, text: str) -> Path:
    """
    Replace a page in one step: a reader, or a browser that reloads, never sees half of it.

    Raises:
        ReadWriteError: The folder cannot be written.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as stream:
            stream.write(text.encode("utf-8"))
        Path(stream.name).chmod(0o644)
        Path(stream.name).replace(path)
    except OSError as error:
        raise ReadWriteError(f"cannot write {path}: {error}", advice="choose another --out") from error
    return path


def _claim(row: Mapping[str, Any], conclusion: Conclusion) -> dict[str, Any]:
    verdict, reason, evidence = conclusion.by_claim[row["id"]]
    coverage = evidence.coverage if evidence else {}
    return {
        "notebook": row["notebook"],
        "title": row["title"],
        "severity": row["severity"],
        "verdict": str(verdict),
        "reason": reason,
        "metric": row["metric"],
        "unit": row["unit"],
        "measured": evidence.measured["value"] if evidence else None,
        "limit": {"direction": row["direction"], "threshold": row["threshold"], "text": limit_of(row)},
        "coverage": {"compared": coverage.get("compared", 0), "expected": coverage.get("expected", 0)},
        "evidence": evidence_file(evidence) if evidence else None,
    }

"""Evidence that was gathered on a machine with a device and is committed: shown as imported, never as a run's own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from apr_core.errors import FormatError
from apr_core.report.display import Shown, compose, together

FOLDER = Path(__file__).resolve().parents[2] / "reports" / "gpu"
_RATES = (
    "decode_tok_s", "roofline_tok_s", "eager_decode_tok_s", "prefill_tok_s", "share_of_read_bandwidth", "figure_tok_s",
    "rel_l2", "top1_agreement", "torch_equal",
)  # fmt: skip


_NONE = "No evidence from a device: none has been imported into reports/gpu."


def show_device(folder: Path = FOLDER) -> Shown:
    """
    Show rates on a device: graph against eager, the share of read bandwidth, and the time by kernel.

    Args:
        folder: Unpacked records of ``ci/run_gpu.sh --bench``.

    Raises:
        FormatError: A record is unreadable: silence would look like none.
    """
    every = list(_records(folder))
    records = [r for r in every if r["part"] == "models" and "decode_tok_s" in r["measured"]]
    if not records:
        return compose([_NONE])
    said = [_origin(records), "not measured by this run"]
    if any(r["device"] == "cpu" for r in records):
        said.append("a rehearsal on the CPU: rates of an interpreter, which say nothing about a device")
    bandwidth = next((r["measured"]["read_gb_s"] for r in every if r["part"] == "ceilings"), None)
    rows, kernels = [], []
    for r in records:
        found = dict(r["measured"])
        if bandwidth:  # what no decoding exceeds: every weight is read once per token
            found["roofline_tok_s"] = 1e9 * bandwidth / found["bytes_per_token"]
        rows.append({"model": r["name"], "verdict": r["verdict"], **{key: found.get(key) for key in _RATES}})
        if found.get("us_by_kernel"):
            kernels.append({"model": r["name"]} | {f"{name} us": us for name, us in found["us_by_kernel"].items()})
    tables = [
        (said, rows),
        (["Microseconds per token by kernel"], kernels),
        (["Predicted against measured"], [row for r in every if r["part"] == "figures" for row in r["rows"]]),
    ]
    shown = [compose(lines, table) for lines, table in tables if table]
    return together(shown)


def show_imported(folder: Path = FOLDER) -> Shown:
    """
    Show every verdict that was imported from a device: which machine and commit, and that this run measured none of it.

    Args:
        folder: Unpacked records of ``ci/run_gpu.sh``.

    Raises:
        FormatError: A record is unreadable: silence would look like none.
    """
    records = list(_records(folder))
    if not records:
        return compose([_NONE])
    kept = ("part", "name", "verdict")
    rows = [
        {k: r[k] for k in kept}
        | {"rel_l2": r["measured"].get("parity", {}).get("required_tolerance"), "reason": r.get("reason")}
        for r in records
    ]
    return compose([_origin(records), "not measured by this run, no part of its verdict"], rows)


def _origin(records: Sequence[Mapping[str, Any]]) -> str:
    about = {f"{r.get('device_name', r['device'])}, commit {r['provenance']['commit']}" for r in records}
    return f"Imported from {'; '.join(sorted(about))}"


def _records(folder: Path) -> Iterator[Mapping[str, Any]]:
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            [body[key] for key in ("part", "name", "verdict", "measured", "rows", "device", "provenance")]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(
                expected="a record of ci/run_gpu.sh", found=str(error), file=path, advice="unpack the archive again"
            ) from error
        yield body

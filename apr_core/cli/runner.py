"""
The suite: preflight, four notebooks under papermill, and an exit code that follows from the evidence files alone.

Success is never taken from a kernel's or papermill's status: an early ``sys.exit(0)``, an unexecuted cell, a dead
kernel or a missing closing line make the run incomplete (exit 1), and a claim without evidence makes it inconclusive.
"""

from __future__ import annotations

import ast
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from apr_core import provenance
from apr_core.engines.subject import DEVICES, REUSE, ROOT, resolve_model
from apr_core.errors import AprError, LoadError, NotFound, ReadWriteError, UsageError
from apr_core.falsify.claims import NOTEBOOKS, load_claims
from apr_core.falsify.evidence import SubjectRecord
from apr_core.falsify.rounds import Conclusion, declare
from apr_core.formats.checkpoint import Checkpoint, open_checkpoint
from apr_core.report.summary import NotebookStatus

OWN = ("model", "reference", "device", "out_dir", "peers", "claims")  # set by options; -p may not contradict them
METADATA_CUT = 200
# Timings share no core with anything else, so this notebook runs alone, after the others.
ALONE = "30_throughput"


@dataclass(frozen=True)
class Order:
    """One run as it was asked for, checked and resolved."""

    model: Path
    reference: Path | None
    device: str
    notebooks: tuple[str, ...]
    folder: Path
    timeout_s: int
    parameters: Mapping[str, str]
    skip_contract: bool = False
    peers: tuple[str, ...] = ()
    claims: tuple[str, ...] = ()
    reuse: bool = False


def run_suite(
    *,
    model: str = "pygmy",
    reference: str = "",
    device: str = "auto",
    only: str = "",
    out: str = "",
    timeout_s: int = 600,
    parameters: Mapping[str, str] | None = None,
    skip_contract: bool = False,
    peers: Sequence[str] = (),
    claims: Sequence[str] = (),
    reuse: bool = False,
) -> int:
    """
    Run the selected notebooks on a model and write the run folder.

    Args:
        model: Path of a model, or ``pygmy``.
        reference: What the model claims to be made from; empty for none.
        device: ``auto``, ``cpu`` or ``cuda``.
        only: Comma-separated notebook prefixes, e.g. ``00,20``; empty for all.
        out: The run folder itself, new or empty; empty for ``reports/<run-id>``.
        timeout_s: Per cell.
        parameters: Name -> text, typed by the notebook's own annotations.
        skip_contract: The explicit bypass; nothing can be corroborated.
        peers: Runtimes that notebook 30 holds its rates against, as `apr bench --peer` names them.
        claims: Numbers that it tries to refute, ``METRIC=NUMBER``.
        reuse: Take over what runs beside this one decided with the same bytes, claims, parameters, code and machine.

    Returns:
        The exit code of house section 8.

    Raises:
        UsageError: Unknown notebook, device or parameter, or a folder that is not empty: before anything is written.
    """
    order = _order(model, reference, device, only, out, timeout_s, parameters or {}, skip_contract)
    order = replace(order, peers=_known_peers(peers), claims=_sound_claims(claims), reuse=reuse)
    typed = {name: typed_parameters(name, order.parameters) for name in order.notebooks}
    order.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    subject, made_from, diagnosis = _preflight(order)
    _declare(order, subject, made_from, diagnosis)
    status: dict[str, NotebookStatus] = {}
    if diagnosis is None:
        status = _execute(order, typed)
        if "10_contract_gates" not in order.notebooks:
            _record_refusal(order)
    conclusion = _write_reports(order, status)
    _point_latest(order.folder)
    print(
        f"{conclusion.verdict}: {conclusion.reason}\n"
        f"score {conclusion.score:.2f}, {conclusion.counts['NOT_RUN']} of {len(conclusion.by_claim)} claims not run, "
        f"exit {int(conclusion.exit_code)}, {time.monotonic() - started:.0f} s\n{order.folder / 'index.html'}",
        flush=True,
    )
    return int(conclusion.exit_code)


def _order(
    model: str,
    reference: str,
    device: str,
    only: str,
    out: str,
    timeout_s: int,
    parameters: Mapping[str, str],
    skip_contract: bool,
) -> Order:
    if device not in DEVICES:
        raise UsageError(f"expected a device of {', '.join(DEVICES)}, found {device!r}")
    if bad := sorted(set(parameters) & set(OWN)):
        raise UsageError(
            f"parameter {bad[0]} is set by an option",
            advice="use --model, --reference, --device, --out, --peer or --claim",
        )
    prefixes = [p.strip() for p in only.split(",") if p.strip()]
    for prefix in prefixes:
        if not any(n.startswith(prefix) for n in NOTEBOOKS):
            raise UsageError(f"expected notebooks of {', '.join(NOTEBOOKS)}, found {prefix!r}")
    chosen = tuple(n for n in NOTEBOOKS if not prefixes or any(n.startswith(p) for p in prefixes))
    path = resolve_model(model).absolute()
    run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{path.stem[:40]}-{secrets.token_hex(2)}"
    folder = Path(out).expanduser().absolute() if out else ROOT / "reports" / run_id
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} is not an empty folder", advice="give --out a new one: evidence is never overwritten"
        )
    made_from = resolve_model(reference).absolute() if reference else None
    return Order(path, made_from, device, chosen, folder, timeout_s, parameters, skip_contract)


def _known_peers(names: Sequence[str]) -> tuple[str, ...]:
    from apr_core.peers.rates import peer_kind

    for name in names:
        peer_kind(name)
    return tuple(names)


def _sound_claims(texts: Sequence[str]) -> tuple[str, ...]:
    from apr_core.bench.claimed import parse_claim

    for text in texts:
        parse_claim(text)
    return tuple(texts)


def notebook_path(name: str) -> Path:
    """
    Where a notebook lies.

    Raises:
        NotFound: The package was installed without its checkout.
    """
    path = ROOT / "notebooks" / f"{name}.ipynb"
    if not path.is_file():
        raise NotFound(f"no notebook {path}", advice="run from a checkout of the repository")
    return path


def typed_parameters(notebook: str, given: Mapping[str, str]) -> dict[str, Any]:
    """
    Type ``-p`` values by the annotations in the notebook's parameters cell.

    papermill only logs an unknown name and injects any type, so a typo would run the defaults: both are errors here.

    Raises:
        UsageError: Unknown name, or a value of another type.
    """
    if not given:
        return {}
    cell = next(c for c in _cells(notebook) if "parameters" in c["metadata"].get("tags", []))
    kinds = {
        node.target.id: (ast.unparse(node.annotation), ast.literal_eval(node.value) if node.value else None)
        for node in ast.parse("".join(cell["source"])).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    typed: dict[str, Any] = {}
    for name, text in given.items():
        if name not in kinds:
            raise UsageError(f"unknown parameter {name}", advice=f"{notebook} has {', '.join(sorted(kinds))}")
        kind = kinds[name][0]
        try:
            value = text if kind == "str" else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        value = float(value) if kind == "float" and type(value) is int else value
        if type(value).__name__ != kind:
            raise UsageError(f"expected {kind}, found {text!r}, in parameter {name}")
        typed[name] = value
    return typed


def _cells(notebook: str) -> list[dict[str, Any]]:
    import json

    cells: list[dict[str, Any]] = json.loads(notebook_path(notebook).read_text(encoding="utf-8"))["cells"]
    return cells


def _preflight(order: Order) -> tuple[SubjectRecord, SubjectRecord | None, dict[str, Any] | None]:
    """Open the headers of subject and reference; a bad one becomes a diagnosis, before any kernel starts."""
    records: list[SubjectRecord | None] = []
    diagnosis: dict[str, Any] | None = None
    for path in (order.model, order.reference):
        if path is None:
            records.append(None)
            continue
        record = SubjectRecord(name=path.name, path=str(path))
        try:
            record = _look(path)
        except AprError as error:
            diagnosis = diagnosis or {
                "error": type(error).__name__,
                "message": str(error),
                "advice": error.advice,
                "exit_code": int(error.exit_code),
            }
            print(f"error: {error}", file=sys.stderr, flush=True)
        records.append(record)
    subject, made_from = records
    assert subject is not None
    return subject, made_from, diagnosis


def _look(path: Path) -> SubjectRecord:
    """What the header alone says; raises what the notebooks' ``obtain`` would raise."""
    from collections import Counter

    from apr_core.contract.layout import read_geometry
    from apr_core.model.config import Qwen2Config

    with open_checkpoint(path) as checkpoint:
        if checkpoint.config is None:
            raise LoadError(
                f"expected a config.json beside {checkpoint.path}, found none",
                advice="copy it from the model's own folder",
            )
        if not read_geometry(checkpoint.config)[1]:  # missing sizes are a matter of the gate, and its exit code
            Qwen2Config.from_mapping(checkpoint.config)
        tensors = checkpoint.tensors.values()
        return SubjectRecord(
            name=path.name,
            path=str(path),
            format=checkpoint.format,
            quant=dict(Counter(str(t.dtype) for t in tensors)),
            parameters=sum(_count(t.shape) for t in tensors),
            file_bytes=sum(f.stat().st_size for f in checkpoint.files),
            metadata=_own_metadata(checkpoint),
        )


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _own_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """The file's own keys as text, long values cut (a vocabulary would fill the page)."""
    out = {}
    for key in checkpoint.metadata:
        value = checkpoint.metadata[key]
        text = f"[{len(value)} values]" if isinstance(value, list) and len(value) > 16 else str(value)
        out[str(key)] = text if len(text) <= METADATA_CUT else f"{text[:METADATA_CUT]} ... ({len(text)} characters)"
    return out


def _declare(
    order: Order, subject: SubjectRecord, made_from: SubjectRecord | None, diagnosis: Mapping[str, Any] | None
) -> None:
    asked = {"cuda"} if order.device == "cuda" else set()
    if order.reference is not None:
        asked.add("reference")
    if order.peers:
        asked.add("peer")
    try:
        declare(
            order.folder,
            order.notebooks,
            asked=frozenset(asked),
            subject=replace(subject, bypassed=order.skip_contract),
            reference=made_from,
            diagnosis=diagnosis,
            provenance=provenance.collect(),
            parameters={**_injected(order), **order.parameters, **_rated(order)},
        )
    except OSError as error:
        raise ReadWriteError(f"cannot write to {order.folder}: {error}", advice="choose another --out") from error


def _injected(order: Order) -> dict[str, Any]:
    return {
        "model": str(order.model),
        "reference": str(order.reference) if order.reference else "",
        "device": order.device,
        "out_dir": str(order.folder),
        "skip_contract": order.skip_contract,
    }


def _rated(order: Order) -> dict[str, str]:
    """What notebook 30 is given beside the others."""
    asked = {"peers": ",".join(order.peers), "claims": ",".join(order.claims)}
    return {name: value for name, value in asked.items() if value}


def _execute(order: Order, typed: Mapping[str, Mapping[str, Any]]) -> dict[str, NotebookStatus]:
    """Run the notebooks, as many at once as there are cores, the timed one alone at the end."""
    from apr_core.cli.kernels import kill_all

    together = [n for n in order.notebooks if n != ALONE]
    workers = max(1, min(len(together), os.cpu_count() or 1))
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    os.environ.pop(REUSE, None)
    if order.reuse:
        os.environ[REUSE] = str(order.folder.parent)
    status: dict[str, NotebookStatus] = {}
    try:
        with ThreadPoolExecutor(workers) as pool:
            jobs: dict[Future[NotebookStatus], str] = {pool.submit(_run, order, n, typed[n]): n for n in together}
            try:
                for job in as_completed(jobs):
                    status[jobs[job]] = job.result()
                    _say(jobs[job], status[jobs[job]])
            except BaseException:
                for job in jobs:
                    job.cancel()
                kill_all()
                raise
        os.environ.pop("OMP_NUM_THREADS")
        if ALONE in order.notebooks:
            status[ALONE] = _run(order, ALONE, typed[ALONE])
            _say(ALONE, status[ALONE])
    except KeyboardInterrupt:
        kill_all()
        print(f"interrupted; what was measured so far is in {order.folder}", file=sys.stderr, flush=True)
        raise
    finally:
        os.environ.pop(REUSE, None)
    return status


def _say(name: str, status: NotebookStatus) -> None:
    end = "complete" if status.complete else f"NOT COMPLETE: {status.reason}"
    print(f"{name}: {end}, {status.seconds:.1f} s", flush=True)


def _run(order: Order, name: str, typed: Mapping[str, Any]) -> NotebookStatus:
    """Execute one notebook; whatever happens, say whether it really ran to its end."""
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # 1.1 s of grammars that nothing here uses
    import papermill
    from jupyter_core.utils import ensure_event_loop

    from apr_core.cli.kernels import IpcKernelManager

    source, out = notebook_path(name), order.folder / f"{name}.ipynb"
    parameters = {**_injected(order), **typed}
    if name == ALONE:
        parameters |= _rated(order)
    started, reason = time.monotonic(), ""
    try:
        papermill.execute_notebook(
            str(source),
            str(out),
            parameters,
            kernel_name="python3",
            kernel_manager_class=IpcKernelManager,
            progress_bar=False,
            start_timeout=120,
            execution_timeout=order.timeout_s,
            autosave_cell_every=0,
            record_timing=False,
        )
    except Exception as error:
        last = (str(error).strip().splitlines() or [""])[-1]
        reason = f"{type(error).__name__}: {last[:200]}"
    finally:
        ensure_event_loop().close()  # nbclient leaves this thread's loop, and its sockets, open
    reason = reason or why_incomplete(out, expected=_code_cells(name) + 1, name=name)
    return NotebookStatus(seconds=time.monotonic() - started, complete=not reason, reason=reason, html=None)


def _code_cells(notebook: str) -> int:
    return sum(c["cell_type"] == "code" and bool("".join(c["source"]).strip()) for c in _cells(notebook))


def why_incomplete(path: Path, *, expected: int, name: str) -> str:
    """
    Say why an output notebook does not count as executed; empty when every cell ran in order to the closing line.

    papermill's own status says ``completed`` for a killed kernel, and takes ``sys.exit(0)`` for success.

    Args:
        path: The output notebook.
        expected: Code cells that must be there, the injected one included.
        name: The notebook, as its closing line begins.
    """
    import nbformat

    if not path.exists():
        return "no output notebook"
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code" and c.source.strip()]
    if len(code) < expected:
        return f"{len(code)} code cells of {expected}"
    for k, cell in enumerate(code, 1):
        if any(o.output_type == "error" for o in cell.outputs):
            return f"code cell {k} raised"
        if cell.execution_count != k:
            return f"code cell {k} was not executed in order (count {cell.execution_count})"
    closing = "".join(o.get("text", "") for o in code[-1].outputs)
    return "" if closing.startswith(f"{name} closed:") else "the closing cell did not close the round"


def _record_refusal(order: Order) -> None:
    """
    Write the refusal itself as FALSIFIED evidence of its gates when notebook 10 is not there to do it.

    'Refused by the contract' is never the only finding: a run of NOT_RUN claims alone would look merely incomplete.
    """
    from collections import Counter

    from apr_core.diagnose.recorded import Explainer
    from apr_core.engines.subject import obtain
    from apr_core.falsify.evidence import make_evidence, write_evidence
    from apr_core.falsify.finding import Finding

    subject = obtain(str(order.model), skip_contract=order.skip_contract)
    if subject.refusal is None:
        return
    explained = Explainer(subject)
    counts = Counter(v.gate for v in subject.admission.violations)
    gates = [g for g in counts if g in load_claims()]
    for gate in gates:
        rows = [
            {"tensor": v.tensor, "measured": v.measured, "limit": v.limit, "message": v.message}
            for v in subject.admission.violations
            if v.gate == gate
        ]
        finding = Finding(
            value=float(counts[gate]), compared=len(subject.checkpoint.tensors), expected=1, rows=rows, claim=gate
        )
        evidence = make_evidence(finding, subject.record, parameters=_injected(order), provenance=provenance.collect())
        evidence = replace(evidence, whys=tuple(explained(evidence)))
        write_evidence(evidence, order.folder / "evidence")


def _write_reports(order: Order, status: dict[str, NotebookStatus]) -> Conclusion:
    from apr_core.report.run import write_reports

    for name in list(status):
        out = order.folder / f"{name}.ipynb"
        if out.exists():
            from apr_core.report.export import export_html

            html = order.folder / f"{name}.html"
            export_html(out, html)
            status[name] = replace(status[name], html=html.name)
    return write_reports(order.folder, status)


def _point_latest(folder: Path) -> None:
    """Point ``reports/latest`` at this run, wherever the folder is; replaced in one step."""
    latest = ROOT / "reports" / "latest"
    latest.parent.mkdir(exist_ok=True)
    temp = latest.with_name(f".latest-{secrets.token_hex(4)}")
    temp.symlink_to(folder if folder.parent != latest.parent else folder.name, target_is_directory=True)
    temp.replace(latest)

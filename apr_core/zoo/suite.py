"""
Faults of the suite itself: situations in which a harness says "passed" without having looked. None may end in exit 0.

Each fault builds its situation in a folder through the entry points that a run uses, and returns the exit code that
the suite gives it. The control, the same run without a fault, ends in 0: otherwise nothing would have been shown.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch

import numpy as np

from apr_core.engines.subject import BUNDLED, ROOT, Subject, obtain
from apr_core.engines.wrap import At, wrap
from apr_core.errors import AprError, Exit
from apr_core.falsify import claims as table
from apr_core.falsify.claims import claims_of, load_claims
from apr_core.falsify.evidence import SubjectRecord
from apr_core.falsify.finding import ACTS, Finding, act
from apr_core.falsify.rounds import Round, conclude, declare
from apr_core.falsify.verdict import NotRun

if TYPE_CHECKING:
    from apr_core.zoo.meter import MeterFault

NOTEBOOK = "00_ground_truth"
GATES = "10_contract_gates"
PARITY = "20_parity"
FIRST, CUDA = "F-GT-001", "F-PAR-010"
SUBJECT = SubjectRecord(name="m", path="/m", format="safetensors", sha256="0" * 64)
BYPASSED = replace(SUBJECT, bypassed=True)
GOOD, BAD = Finding(0.0, 4, 4), Finding(3.0, 4, 4)
DRAWN = Finding(0.0, 4, 4, arrays={"curve": np.arange(9)})
LOST: Mapping[str, Finding | None] = {FIRST: None}
PYGMY = str(BUNDLED["pygmy"])
_IDS = [c.id for c in claims_of(NOTEBOOK)]
NAN, INF = float("nan"), float("inf")

Body = dict[str, Any]
Cell = Callable[[Path], object]
Run = Callable[[Path], int]


@dataclass(frozen=True)
class SuiteFault:
    """
    One fault of the harness.

    Attributes:
        id: Stable name.
        what: What is wrong, in a phrase.
        source: The case in the study of peers (C7 H1 to H20, section 1 V1 to V28) or the thread that it reproduces.
        run: Builds the situation in an empty folder and returns the exit code of the suite.
    """

    id: str
    what: str
    source: str
    run: Callable[[Path], int]


def held(
    folder: Path,
    change: Mapping[str, Finding | None] | None = None,
    *,
    asked: Sequence[str] = (),
    by: SubjectRecord = SUBJECT,
    notebook: str = NOTEBOOK,
) -> Path:
    """Write a run in which every claim of one notebook held, but for ``change``; None leaves no evidence."""
    declare(folder, [notebook], asked=frozenset(asked), subject=by, provenance={}, parameters={})
    this_round = Round(notebook, by, folder, parameters={}, provenance={})
    for claim in this_round.claims:
        finding = (change or {}).get(claim.id, Finding(claim.threshold, 4, 4))
        if finding is not None:
            this_round.record(claim.id, replace(finding, claim=claim.id))
    return folder


def control(folder: Path) -> int:
    """The run that every fault damages, undamaged."""
    return _exit(held(folder))


def _exit(folder: Path, broken: Mapping[str, str] | None = None) -> int:
    """What the suite makes of a run folder; a typed error ends the command with its own code."""
    try:
        return int(conclude(folder, broken).exit_code)
    except AprError as error:
        return int(error.exit_code)


def _measured(change: Mapping[str, Finding | None], **rest: Any) -> Run:
    return lambda folder: _exit(held(folder, change, **rest))


def _judged(finding: Finding, claim: str = "F-GT-002", notebook: str = NOTEBOOK) -> Run:
    return _measured({claim: finding}, notebook=notebook)


def _left_alone(reason: NotRun, *ids: str, asked: Sequence[str] = ()) -> Run:
    notebook = load_claims()[ids[0]].notebook
    return _measured(dict.fromkeys(ids, Finding.nothing(reason)), notebook=notebook, asked=asked)


def _edited(edit: Callable[[Body], object], finding: Finding | None = None, claim: str = FIRST) -> Run:
    """A run whose record of one claim was edited on the disk; the claim was refuted unless said otherwise."""

    def run(folder: Path) -> int:
        held(folder, {claim: finding or BAD}, notebook=load_claims()[claim].notebook)
        _edit(next((folder / "evidence").glob(f"{claim}-*.json")), edit)
        return _exit(folder)

    return run


def _declared(edit: Callable[[Body], object], change: Mapping[str, Finding | None] | None = None) -> Run:
    """A run whose declaration was edited on the disk."""

    def run(folder: Path) -> int:
        held(folder, change)
        _edit(folder / "declared.json", edit)
        return _exit(folder)

    return run


def _edit(path: Path, edit: Callable[[Body], object]) -> None:
    body = json.loads(path.read_text(encoding="utf-8"))
    edit(body)
    path.write_text(json.dumps(body), encoding="utf-8")


def _on_disk(change: Callable[[Path], object], finding: Finding) -> Run:
    """A run one file of which was changed: the arrays of a claim if it has some, else its record."""

    def run(folder: Path) -> int:
        held(folder, {FIRST: finding})
        change(next((folder / "evidence").glob(f"{FIRST}-*.{'npz' if finding.arrays else 'json'}")))
        return _exit(folder)

    return run


def _bypassed(folder: Path) -> int:
    for record in (held(folder, by=BYPASSED) / "evidence").iterdir():
        _edit(record, _forged())
    return _exit(folder)


def _in_notebook(cell: Cell, notebook: str = NOTEBOOK) -> Run:
    """A run that ends with this cell: what it raises breaks the notebook, as papermill reports it."""

    def run(folder: Path) -> int:
        held(folder, notebook=notebook)
        try:
            cell(folder)
        except Exception as error:
            return _exit(folder, {notebook: type(error).__name__})
        return _exit(folder)

    return run


def _open_round(folder: Path) -> Round:
    return Round(NOTEBOOK, SUBJECT, folder, parameters={}, provenance={})


def _record_none(folder: Path) -> object:
    return _open_round(folder).record(FIRST, cast(Finding, None))


def _record_other(folder: Path) -> object:
    return _open_round(folder).record(FIRST, Finding(0.0, 4, 4, claim="F-GT-002"))


def _forged(**parts: Mapping[str, object]) -> Callable[[Body], None]:
    """Mark a record CORROBORATED and change fields of its parts to match."""

    def edit(body: Body) -> None:
        body.update(verdict="CORROBORATED", reason="")
        for part, values in parts.items():
            body[part].update(values)

    return edit


def _excused(reason: str) -> Callable[[Body], None]:
    """Turn a record into one of a measurement that was never tried."""

    def edit(body: Body) -> None:
        body.update(verdict="NOT_RUN", reason=reason)
        body["measured"].update(value=None, required_tolerance=None)
        body["coverage"].update(compared=0, expected=0)

    return edit


def _not_run(body: Body) -> None:
    body.update(verdict="NOT_RUN", reason=str(NotRun.NO_REFERENCE))


def _other_hash(body: Body) -> None:
    body["subject"].update(sha256="1" * 64)


def _harmless(body: Body) -> None:
    body.update(diagnosis={"message": "truncated", "exit_code": 0})


def _without_evidence(folder: Path) -> int:
    held(folder)
    shutil.rmtree(folder / "evidence")
    (folder / "evidence").mkdir()
    return _exit(folder)


def _undeclared(folder: Path) -> int:
    """Nothing declared was run; the evidence that holds belongs to a claim of another notebook."""
    held(folder, dict.fromkeys(_IDS, Finding.nothing(NotRun.NO_GOLDEN)))
    other = Round(GATES, SUBJECT, folder, parameters={}, provenance={})
    other.record("F-ADMIT-001", Finding(0.0, 4, 4, claim="F-ADMIT-001"))
    return _exit(folder)


def _rescaled(factor: float, only: str = "") -> Run:
    """Judge a whole run by a table whose thresholds were edited without a new version."""

    def run(folder: Path) -> int:
        edited = {
            k: replace(c, threshold=c.threshold * factor) if only in (k, "") else c for k, c in load_claims().items()
        }
        held(folder)
        with patch.object(table, "load_claims", lambda: edited):
            return _exit(folder)

    return run


def _twice(folder: Path) -> object:
    """Load a claims table in which one id stands twice."""
    text = Path(table.__file__).with_name("claims.toml").read_text(encoding="utf-8")
    (folder / "claims.toml").write_text(text + text[text.index("[[claim]]") :], encoding="utf-8")
    with patch.object(table, "files", lambda _: folder):
        return cast(Any, load_claims).__wrapped__()


def _acts(room: str) -> None:
    import_module(f"apr_core.{room}.acts")


def _try(claim: str, subject: Subject, folder: Path, notebook: str, asked: Sequence[str] = ()) -> int:
    """Let the real act speak for its claim in a run that otherwise held."""
    try:
        return _exit(held(folder, {claim: ACTS[claim](subject)}, asked=asked, notebook=notebook))
    finally:
        subject.close()


def _other_size(folder: Path) -> int:
    """Hold the bundled model against a model of another size that Ollama serves."""
    from apr_core.peers.rates import Ollama

    _acts("bench")
    from apr_core.bench.acts import ask

    told = {"version": "0", "model_info": {"general.parameter_count": 7_615_616_512}}
    subject = obtain("pygmy", device="cpu")
    ask(subject, peers="ollama:pygmy")
    with patch.object(Ollama, "_ask", lambda *asked: told):
        try:
            return _try("F-THR-011", subject, folder, "30_throughput", asked=["peer"])
        except AprError as error:
            return int(error.exit_code)


def _same_reference(make: Callable[[Path, Path], object]) -> Run:
    """Hold a model against a reference that is the model itself."""

    def run(folder: Path) -> int:
        _acts("rosetta")
        model, other = folder / "model", folder / "other"
        shutil.copytree(BUNDLED["pygmy"], model)
        make(model, other)
        subject = obtain(str(model), reference=str(other if other.exists() else model), device="cpu")
        return _try("F-GT-010", subject, folder, NOTEBOOK, ["reference"])

    return run


def _linked(model: Path, other: Path) -> None:
    shutil.copytree(model, other, copy_function=os.link)


def _changed_file(folder: Path) -> int:
    """Examine a model, change its file, examine it again into the same run."""
    model = folder / "model"
    shutil.copytree(BUNDLED["pygmy"], model)
    records = []
    for _ in range(2):
        subject = obtain(str(model), device="cpu")
        records.append(subject.record)
        subject.close()
        with (model / "model.safetensors").open("r+b") as stream:
            stream.seek(-2, os.SEEK_END)
            stream.write(b"\x11\x3c")
    held(folder, {"F-GT-001": None}, by=records[0])
    again = Round(NOTEBOOK, records[1], folder, parameters={}, provenance={})
    again.record("F-GT-001", Finding(0.0, 4, 4, claim="F-GT-001"))
    return _exit(folder)


def _broken_candidate(folder: Path, reference: str = "") -> Subject:
    """A model with a rescaled tensor, and golden logits that were recorded from it."""
    from apr_core.formats.checkpoint import open_checkpoint
    from apr_core.zoo.draft import put_together, take_apart

    with open_checkpoint(BUNDLED["pygmy"]) as checkpoint:
        draft = take_apart(checkpoint)
    draft.weights["model.layers.0.mlp.down_proj.weight"] *= 1.5
    subject = obtain(str(put_together(draft, folder / "model")), reference=reference, device="cpu")
    golden = dict(subject.golden_logits or {})
    golden["logits"] = subject.model.forward(golden["ids"].astype(np.int64)).astype(golden["logits"].dtype)
    np.savez(folder / "model" / "transformers_f64.npz", allow_pickle=False, **golden)
    del subject.__dict__["golden_logits"]
    return subject


def _regenerated(claim: str, reference: str = "") -> Run:
    def run(folder: Path) -> int:
        _acts("rosetta")
        return _try(claim, _broken_candidate(folder, reference), folder, NOTEBOOK)

    return run


def _ends_at_once(folder: Path) -> int:
    """A model whose first token is always the end: nothing is generated, so nothing differs."""
    _acts("rosetta")
    subject = obtain("pygmy", device="cpu")
    assert subject.tokenizer is not None  # the bundled model has one
    end = min(subject.tokenizer.eos_ids)

    def stop(name: str, values: Any, at: At) -> Any:
        if name != "logits":
            return None
        values[:, end] = values.max() + 10
        return values

    subject.__dict__["model"] = wrap(subject.model, stop)
    return _try("F-GT-006", subject, folder, NOTEBOOK)


def _ran_on_cpu(folder: Path) -> int:
    """CUDA was asked for; the engine fell back in silence and agrees with itself."""
    from apr_core.parity import acts

    subject = obtain("pygmy", device="cpu")
    subject.lacks = {}
    with patch.object(acts, "load_model", lambda *_, **__: subject.model):
        return _try("F-PAR-010", subject, folder, PARITY, ["cuda"])


def _runner() -> Any:
    # The command line lies above the zoo; its faults can be planted only by calling it as a person does.
    return import_module("apr_core.cli.runner")


def _suite(out: Callable[[Path], Path], model: str) -> Run:
    """Run the whole suite; the situation ends it before a kernel starts."""

    def run(folder: Path) -> int:
        runner = _runner()
        quiet = (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()))
        with patch.object(runner, "ROOT", folder), quiet[0], quiet[1]:
            try:
                return int(runner.run_suite(model=str(folder / model), out=str(out(folder))))
            except AprError as error:
                return int(error.exit_code)

    return run


def _earlier(folder: Path) -> Path:
    """A run folder in which an earlier run left its output notebook."""
    (folder / "out").mkdir()
    _output(folder / "out", lambda cells: None)
    shutil.copytree(BUNDLED["pygmy"], folder / "model")
    return folder / "out"


def _output(folder: Path, damage: Callable[[list[Body]], object]) -> Path:
    """An output notebook of three cells, the last of which closes the round."""
    closing = {"output_type": "stream", "name": "stdout", "text": f"{NOTEBOOK} closed: 11 claims\n"}
    cells: list[Body] = [
        {"cell_type": "code", "id": f"c{n}", "metadata": {}, "source": "1", "execution_count": n, "outputs": []}
        for n in (1, 2, 3)
    ]
    cells[-1]["outputs"] = [closing]
    damage(cells)
    path = folder / f"{NOTEBOOK}.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    return path


def _executed(damage: Callable[[list[Body]], object], *, evidence: bool = True) -> Run:
    """Conclude a run by its output notebook and its evidence, as the runner does."""

    def run(folder: Path) -> int:
        held(folder, None if evidence else dict.fromkeys(_IDS))
        why = _runner().why_incomplete(_output(folder, damage), expected=3, name=NOTEBOOK)
        return _exit(folder, {NOTEBOOK: why} if why else None)

    return run


def _unexecuted(first: int) -> Callable[[list[Body]], None]:
    def damage(cells: list[Body]) -> None:
        for cell in cells[first:]:
            cell.update(execution_count=None, outputs=[])

    return damage


def _reference_notebook(damage: Callable[[list[Body]], object]) -> Run:
    """Damage the committed notebook and hand it to nbval, whose exit code is the answer."""

    def run(folder: Path) -> int:
        shutil.copy(ROOT / "notebooks" / "conftest.py", folder)
        body = json.loads((ROOT / "notebooks" / f"{GATES}.ipynb").read_text(encoding="utf-8"))
        damage(body["cells"])
        (folder / f"{GATES}.ipynb").write_text(json.dumps(body), encoding="utf-8")
        (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "--nbval-current-env", "."]
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=60, check=False)
        return done.returncode

    return run


def _strip(cells: list[Body]) -> None:
    for cell in (c for c in cells if c["cell_type"] == "code"):
        cell.update(execution_count=None, outputs=[])


def _delete_claim(cells: list[Body]) -> None:
    cells.remove(next(c for c in cells if "claim" in c["metadata"].get("tags", [])))


def _unregistered(folder: Path) -> object:
    _acts("rosetta")
    with patch.dict(ACTS):
        del ACTS["F-GT-001"]
        return ACTS["F-GT-001"](SUBJECT)


def _registered_twice(folder: Path) -> object:
    _acts("rosetta")
    return act("F-GT-001")(lambda subject: Finding(0.0, 1, 1))


def _zip_truncated(folder: Path) -> int:
    from apr_core.rosetta.copies import mismatches

    wrong = mismatches([5, 6, 7], [5, 6])
    return _exit(held(folder, {"F-GT-003": Finding(float(wrong), 2, 2)}))


# (id, what, case in the study of peers, run). Codes of the cases: C7 H1 to H20, section 1 V1 to V28.
_ROWS: tuple[tuple[str, str, str, Callable[[Path], int]], ...] = (
    ("evidence-empty", "the evidence folder is empty", "H1, V2", _without_evidence),
    ("all-not-run", "every claim was left alone", "H2, V1", _left_alone(NotRun.NO_GOLDEN, *_IDS)),
    ("not-run-not-needed", "a claim excused by what it never needs", "V7", _left_alone(NotRun.NO_CUDA, FIRST)),
    ("refused-alone", "a claim says refused, and no gate does", "V2", _left_alone(NotRun.REFUSED, FIRST)),
    ("model-missing", "the model file is not there", "H3, V9", _suite(lambda f: f / "out", "none.gguf")),
    ("exception-swallowed", "a measurement raised and left nothing", "H4, V17", _measured(LOST)),
    ("finding-empty", "a measurement without a value", "H4, V8", _judged(Finding(None, 4, 4))),
    ("finding-none", "a measurement that returned nothing", "H4, V9", _in_notebook(_record_none)),
    ("threshold-percent", "every limit read as percent", "H5, V11", _rescaled(100)),
    ("threshold-edited", "one limit edited without a version", "H20", _rescaled(2, "F-GT-002")),
    ("ollama-size", "a peer that serves another size of the model", "round 48", _other_size),
    ("reference-same-path", "the reference is the candidate", "H6", _same_reference(lambda m, o: None)),
    ("reference-hard-link", "the reference is a hard link", "H6", _same_reference(_linked)),
    ("reference-copy", "the reference is a copy of the same bytes", "H6", _same_reference(shutil.copytree)),
    ("file-changed", "the model file changed between two notebooks", "H7", _changed_file),
    ("evidence-stale", "the record of another model lies in the run", "H7", _edited(_other_hash, GOOD)),
    ("golden-own", "golden logits recorded from the broken candidate", "H8", _regenerated("F-GT-008")),
    ("golden-own-compared", "the same, with the reference given", "H8", _regenerated("F-GT-010", PYGMY)),
    ("metric-nan", "the metric is NaN", "H9, V19", _judged(Finding(NAN, 4, 4))),
    ("metric-minus-inf", "the metric is -Inf under an upper limit", "H9", _judged(Finding(-INF, 4, 4))),
    ("metric-inf", "the metric is Inf over a lower limit", "H9", _judged(Finding(INF, 4, 4), "F-PAR-005", PARITY)),
    ("values-nonfinite", "a good metric over values with a NaN", "H9", _judged(Finding(0.0, 4, 4, nonfinite=1))),
    ("nothing-compared", "nothing was compared", "V9, V21", _judged(Finding(0.0, 0, 0))),
    ("no-tokens", "the model ends at once: no token generated", "H10, V20", _ends_at_once),
    ("lists-truncated", "two lists of unequal length, zipped", "H11, V20", _zip_truncated),
    ("coverage-short", "half of what was promised was compared", "H11, V21", _judged(Finding(0.0, 2, 4))),
    ("act-of-no-claim", "a measurement registered for no claim", "H12", _in_notebook(lambda f: act("F-NONE-001"))),
    ("act-missing", "a claim without a measurement", "H12", _in_notebook(_unregistered)),
    ("act-twice", "a second measurement of one claim", "H12, H19", _in_notebook(_registered_twice)),
    ("claim-forgotten", "a notebook closes without its claims", "H12", _in_notebook(lambda f: _open_round(f).close())),
    ("claim-confused", "a finding recorded under another claim", "H12", _in_notebook(_record_other)),
    ("claim-cell-deleted", "a claim cell was deleted", "H12", _reference_notebook(_delete_claim)),
    ("folder-used", "the run folder holds an earlier output notebook", "H13", _suite(_earlier, "model")),
    ("notebook-stale", "an earlier output notebook, no evidence", "H13", _executed(lambda c: None, evidence=False)),
    ("notebook-stripped", "the reference notebook was stripped", "H14, V23", _reference_notebook(_strip)),
    ("early-exit", "sys.exit(0) in the first cell", "H15, V24", _executed(_unexecuted(1))),
    ("closing-silent", "the last cell ran and closed nothing", "H15", _executed(lambda c: c[-1].update(outputs=[]))),
    ("kernel-killed", "the kernel died in the last cell", "H16", _executed(_unexecuted(2))),
    ("cell-deleted", "the output lacks its last cell", "H16", _executed(lambda cells: cells.pop())),
    ("cuda-absent", "CUDA was asked for and is not there", "H17", _left_alone(NotRun.NO_CUDA, CUDA, asked=["cuda"])),
    ("cuda-fell-back", "CUDA was asked for, the CPU answered", "H17", _ran_on_cpu),
    ("cuda-error", "an error that says cuda, as a skip", "H18, V7", _in_notebook(lambda f: NotRun("CUDA_ERROR"))),
    ("cuda-error-told", "the same behind legal words", "H18", _edited(_excused("no CUDA device: ERROR"), claim=CUDA)),
    ("claim-twice", "two claims with one id", "H19", _in_notebook(_twice)),
    ("declared-twice", "one claim declared twice", "H19", _declared(lambda b: b["claims"].append(b["claims"][0]))),
    ("declared-short", "the claim that failed is not declared", "V2", _declared(lambda b: b["claims"].pop(0), LOST)),
    ("declared-severity", "a severity was edited", "V6", _declared(lambda b: b["claims"][1].update(severity=1))),
    ("declared-nothing", "a score over nothing", "V1, V21", _declared(lambda b: b.update(claims=[], notebooks=[]))),
    ("diagnosis-exit-0", "a model that did not open, with exit code 0", "V19", _declared(_harmless)),
    ("evidence-torn", "a record is cut short", "V8", _on_disk(lambda f: f.write_bytes(f.read_bytes()[:400]), GOOD)),
    ("evidence-deleted", "the refutation was deleted", "V2", _on_disk(lambda f: f.unlink(), BAD)),
    ("evidence-undeclared", "what held was never declared", "V2", _undeclared),
    ("array-swapped", "an array file is not the recorded one", "H7", _on_disk(lambda f: f.write_bytes(b"PK"), DRAWN)),
    ("field-missing", "a record lacks a field", "V8", _edited(lambda b: b["coverage"].clear(), GOOD)),
    ("verdict-edited", "FALSIFIED became CORROBORATED by hand", "V6", _edited(_forged())),
    ("value-edited", "value and verdict edited by hand", "V6", _edited(_forged(measured={"value": 0.0}))),
    ("limit-edited", "the record's own limit was raised", "V11", _edited(_forged(claim={"threshold": 9.0}))),
    ("version-differs", "judged by another version", "H20", _edited(_forged(claim={"version": 9}), GOOD)),
    ("bypass-edited", "--skip-contract, marked CORROBORATED by hand", "V16", _bypassed),
    ("refutation-excused", "a refutation became NOT_RUN by hand", "V7", _edited(_not_run, claim="F-GT-010")),
    ("reason-unlisted", "NOT_RUN for a reason not on the list", "V7", _edited(_excused("no time"), claim="F-GT-010")),
)
SUITE_FAULTS: tuple[SuiteFault, ...] = tuple(SuiteFault(i, what, f"peers {case}", run) for i, what, case, run in _ROWS)


def _metered(claim: str, plant: Callable[[], contextlib.AbstractContextManager[None]]) -> Run:
    """Measure a tiny model with a broken meter; the act of its claim must not corroborate."""

    def run(folder: Path) -> int:
        for room in ("bench", "zoo"):
            _acts(room)
        subject = obtain("pygmy", device="cpu")
        with plant():
            return _try(claim, subject, folder, load_claims()[claim].notebook)

    return run


@cache
def suite_faults() -> tuple[SuiteFault, ...]:
    """Every fault of the suite, broken meters, gates and starts included."""
    from apr_core.zoo.starts import START_FAULTS

    tools = (
        SuiteFault(i, what, "peers V15, V26, C7", _metered(claim, plant)) for i, what, claim, plant in broken_tools()
    )
    return (*SUITE_FAULTS, *tools, *START_FAULTS)


def broken_tools() -> tuple[MeterFault, ...]:
    """Faults of the meter and of the gates: each names the claim that must refute it."""
    from apr_core.zoo.meter import METER_FAULTS
    from apr_core.zoo.strictness import GATE_FAULTS

    return (*METER_FAULTS, *GATE_FAULTS)


def run_all(folder: Path) -> list[dict[str, object]]:
    """
    Build every fault in a folder of its own.

    Returns:
        One row per fault: id, what, source, exit, caught.
    """
    return list(_rows(folder))


def _rows(folder: Path) -> Iterator[dict[str, object]]:
    for fault in suite_faults():
        place = folder / fault.id
        place.mkdir(parents=True)
        code = fault.run(place)
        shutil.rmtree(place)
        yield {"id": fault.id, "what": fault.what, "source": fault.source, "exit": code, "caught": code != Exit.OK}

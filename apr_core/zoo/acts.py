"""
The claims of notebook 10: each gate on the subject, and on counter-examples that it alone must refuse.

Counter-examples are planted on a synthetic twin (pygmy's shape, seeded weights, healthy by construction), so a broken
subject cannot hide a broken gate, and every model meets the same ones.
"""

from __future__ import annotations

import pickle
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from apr_core.contract.admit import Admission, admit
from apr_core.contract.gates import judge_generation, judge_span, load_gates
from apr_core.contract.layout import role_of
from apr_core.contract.types import ValidatedWeight
from apr_core.dtypes import FORMATS
from apr_core.engines.subject import Subject
from apr_core.engines.wrap import At, wrap
from apr_core.errors import AprError, ContractViolation
from apr_core.falsify.finding import Finding, act
from apr_core.falsify.verdict import NotRun
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.model.generate import padding_of
from apr_core.rosetta.copies import BROKE_OFF, greedy, greedy_prompts
from apr_core.zoo.draft import Draft, put_together, take_apart
from apr_core.zoo.plants import BENIGN, DEFECTS, DOWN, EMBED
from apr_core.zoo.registry import Recipe

TWIN_SEED = 20


@cache
def twin() -> Draft:
    """The healthy model that every counter-example is made from; 1.8 million parameters, made once per process."""
    from apr_core.model.synth import synthesise

    folder = Path(tempfile.mkdtemp(prefix="apr-twin-"))
    try:
        path = synthesise(
            "pygmy", format="safetensors", dtype="bf16", tokenizer=None, seed=TWIN_SEED, out=folder / "twin"
        )
        with open_checkpoint(path) as checkpoint:
            return take_apart(checkpoint)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def planted(recipe: Recipe, look: Callable[[Path], Any]) -> Any:
    """Apply a recipe to the twin, write it as a file, look at it through the entry point that people use."""
    draft = twin().copy()
    recipe(draft)
    folder = Path(tempfile.mkdtemp(prefix="apr-plant-"))
    try:
        return look(put_together(draft, folder / "model"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _gates_against(path: Path) -> Counter[str]:
    """The gates that refuse a file, with the number of violations of each."""
    admission = admit(path)
    try:
        return Counter(v.gate for v in admission.violations)
    finally:
        admission.checkpoint.close()


@cache
def kill_table() -> Mapping[str, Counter[str]]:
    """Defect id -> the gates that refused it; planted once per process."""
    return {d.id: planted(d.recipe, _gates_against) for d in DEFECTS if d.recipe is not None}


def _gate_finding(subject: Subject, gate: str, values: np.ndarray[Any, Any] | None = None) -> Finding:
    """Judge one gate on the subject and on its counter-examples."""
    admission = subject.admission
    violations = [v for v in admission.violations if v.gate == gate]
    unmeasured = sorted(set(subject.checkpoint.tensors) - set(admission.stats) - set(admission.extras))
    mine = [d for d in DEFECTS if d.gate == gate]
    missed = [d for d in mine if not kill_table()[d.id][gate]]
    rows: list[dict[str, object]] = [
        {"on": "subject", "what": v.tensor or v.about, "measured": v.measured, "limit": v.limit, "outcome": v.message}
        for v in violations
    ]
    rows += [
        {
            "on": "counter-example",
            "what": d.what,
            "measured": kill_table()[d.id][gate],
            "limit": 1,
            "outcome": "missed" if d in missed else "caught",
        }
        for d in mine
    ]
    return Finding(
        value=float(len(violations) + len(missed)),
        compared=len(admission.stats) + len(mine),
        expected=len(admission.stats) + len(unmeasured) + len(mine),
        missing=unmeasured,
        detail=f"{len(mine) - len(missed)} of {len(mine)} counter-examples caught",
        rows=rows,
        arrays={} if values is None else {"measured": values, "limit": _limits(gate)},
        whys=_whys(violations, admission, [d.what for d in missed]),
        reference="counter-examples on a synthetic twin",
    )


def _limits(gate: str) -> np.ndarray[Any, Any]:
    return np.array([g.threshold for g in load_gates().gates if g.id == gate])


def _whys(violations: list[Any], admission: Admission, missed: list[str]) -> list[tuple[str, str]]:
    if missed:
        return [("Why is the gate itself refuted?", f"it let pass: {'; '.join(missed)}")]
    if not violations:
        return []
    first = violations[0]
    where = f"{first.tensor or 'the configuration'}"
    stats = admission.stats.get(first.tensor)
    answers = [("Why is the model refused?", f"[{first.gate}] {where}: {first.message}")]
    if stats is not None:
        answers.append(
            (
                f"What does {where} hold?",
                f"{stats.count} values, {stats.zeros} zeros, {stats.nans} NaN, {stats.infs} infinite, "
                f"L2 {stats.l2:.6g}, minimum {stats.minimum:.6g}, maximum {stats.maximum:.6g}",
            )
        )
    others = {v.tensor for v in violations} - {first.tensor}
    answers.append(
        ("Is it alone?", f"{len(others)} other tensors break the same gate of {len(admission.stats)} measured")
    )
    return answers


@act("F-DATA-QUALITY-001")
def density(subject: Subject) -> Finding:
    """Share of zeros of every tensor, in percent."""
    values = np.array([s.zero_percent for s in subject.admission.stats.values()])
    return _gate_finding(subject, "F-DATA-QUALITY-001", values)


@act("F-DATA-QUALITY-002")
def finite(subject: Subject) -> Finding:
    """Non-finite values and block scales of every tensor."""
    values = np.array([s.nans + s.infs + s.nonfinite_scales for s in subject.admission.stats.values()])
    return _gate_finding(subject, "F-DATA-QUALITY-002", values)


@act("F-DATA-QUALITY-003")
def variation(subject: Subject) -> Finding:
    """L2 norm of every tensor, and that none is constant where variation is due."""
    values = np.array([s.l2 for s in subject.admission.stats.values()])
    return _gate_finding(subject, "F-DATA-QUALITY-003", values)


@act("F-DATA-QUALITY-004")
def spot_rows(subject: Subject) -> Finding:
    """L2 norm of the rows at 10, 50 and 90 % of the vocabulary."""
    rows = [norm for s in subject.admission.stats.values() for _, norm in s.row_l2]
    return _gate_finding(subject, "F-DATA-QUALITY-004", np.array(rows))


@act("F-DATA-QUALITY-005")
def dead_rows(subject: Subject) -> Finding:
    """Share of dead rows of each vocabulary matrix, in percent."""
    values = np.array([s.dead_row_percent for s in subject.admission.stats.values() if s.rows])
    return _gate_finding(subject, "F-DATA-QUALITY-005", values)


@act("F-CONTAINER-COVER-001")
def cover(subject: Subject) -> Finding:
    """Bytes of the container that no tensor explains."""
    return _gate_finding(subject, "F-CONTAINER-COVER-001")


@act("F-LAYOUT-CONTRACT-001")
def shapes(subject: Subject) -> Finding:
    """The shape of every tensor against its role."""
    return _gate_finding(subject, "F-LAYOUT-CONTRACT-001")


@act("F-LAYOUT-CONTRACT-002")
def head(subject: Subject) -> Finding:
    """The head: its shape, and its equality with a tied embedding."""
    return _gate_finding(subject, "F-LAYOUT-CONTRACT-002")


@act("F-LAYOUT-CONTRACT-003")
def vectors(subject: Subject) -> Finding:
    """The length of every norm and bias."""
    return _gate_finding(subject, "F-LAYOUT-CONTRACT-003")


@act("F-LAYOUT-CONTRACT-004")
def byte_length(subject: Subject) -> Finding:
    """
    The stored bytes of every tensor against type and shape.

    The readers refuse a wrong length before the gate sees it, so its counter-examples are spans, one for each type that
    has blocks: a byte short, a byte long, and the bytes of another type.
    """
    gate = "F-LAYOUT-CONTRACT-004"
    finding = _gate_finding(subject, gate)
    info = next(iter(subject.checkpoint.tensors.values()))
    role = role_of(EMBED)
    assert role is not None
    shape = (4, 512)
    caught, tried, missed = 0, 0, []
    for name in ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_K", "Q6_K"):
        dtype = FORMATS[name]
        right = dtype.nbytes(shape)
        for length in (right - 1, right + 1, 0, right * 2):
            span = replace(info, dtype=dtype, shape=shape, nbytes=length)
            refused = any(v.gate == gate for v in judge_span(span, role, shape))
            tried, caught = tried + 1, caught + refused
            missed += [] if refused else [f"{name}, {length} bytes for {right}"]
    rows = [
        *finding.rows,
        {"on": "counter-example", "what": f"{tried} wrong lengths", "outcome": f"{caught} caught"},
    ]
    return replace(
        finding,
        value=(finding.value or 0) + tried - caught,
        compared=finding.compared + tried,
        expected=finding.expected + tried,
        detail=f"{caught} of {tried} counter-examples caught",
        rows=rows,
        whys=[*finding.whys, ("Which lengths passed?", "; ".join(missed))] if missed else finding.whys,
    )


@act("F-LAYOUT-CONTRACT-005")
def padding(subject: Subject) -> Finding:
    """Judge greedy continuations of the subject, and of itself with a head that prefers rows that are no token."""
    model, tokenizer = subject.model, subject.tokenizer
    assert tokenizer is not None  # the claim needs one, and `act` has looked
    reserved = np.arange(model.config.vocab_size) >= tokenizer.vocab_size
    if not reserved.any():  # every id is text: there is nothing that could be repeated
        return Finding.nothing(NotRun.NOT_APPLICABLE)

    def prefer(name: str, values: np.ndarray[Any, Any], at: At) -> np.ndarray[Any, Any] | None:
        return np.where(reserved, values + 1e3, values) if name == "logits" else None

    rows: list[dict[str, object]] = []
    for on, candidate in (("subject", model), ("counter-example", wrap(model, prefer))):
        for number, prompt in enumerate(greedy_prompts(subject)):
            ids = [id_ for id_ in greedy(candidate, prompt, subject.max_new_tokens) if id_ != BROKE_OFF]
            found = judge_generation(ids, padding_of(candidate))
            said = "; ".join(v.message for v in found) or "none"
            rows.append({"on": on, "prompt": number, "tokens": len(ids), "violations": len(found), "outcome": said})
    mine, planted_ = ([r for r in rows if r["on"] == on] for on in ("subject", "counter-example"))
    broken, missed = [r for r in mine if r["violations"]], [r for r in planted_ if not r["violations"]]
    whys = [("What does it repeat?", f"prompt {r['prompt']}: {r['outcome']}") for r in broken]
    whys += [("Why is the gate itself refuted?", "it let reserved rows pass")] if missed else []
    return Finding(
        value=float(len(broken) + len(missed)),
        compared=len(rows),
        expected=len(rows),
        detail=f"{len(planted_) - len(missed)} of {len(planted_)} counter-examples caught",
        rows=rows,
        whys=whys,
        reference="the subject with a head that prefers reserved rows",
    )


@act("F-ARCH-COMPLETE-001")
def completeness(subject: Subject) -> Finding:
    """All tensors of the architecture, by name."""
    return _gate_finding(subject, "F-ARCH-COMPLETE-001")


@act("F-CONFIG-PLAUSIBLE-001")
def plausible(subject: Subject) -> Finding:
    """The configuration, and its fit to the tensors."""
    return _gate_finding(subject, "F-CONFIG-PLAUSIBLE-001")


@act("F-BENIGN-001")
def no_false_alarm(subject: Subject) -> Finding:
    """Legal oddities on the twin: none may be refused."""
    rows: list[dict[str, object]] = []
    for twin_ in BENIGN:
        gates = planted(twin_.recipe, _gates_against)
        rows.append(
            {"benign twin": twin_.what, "alarms": sum(gates.values()), "gates": ", ".join(sorted(gates)) or "none"}
        )
    alarms = [r for r in rows if r["alarms"]]
    return Finding(
        value=float(len(alarms)),
        compared=len(rows),
        expected=len(BENIGN),
        rows=rows,
        whys=[("Which legal model was refused?", f"{r['benign twin']}, by {r['gates']}") for r in alarms],
        reference="benign twins of a synthetic model",
    )


@act("F-ADMIT-001")
def no_way_around(subject: Subject) -> Finding:
    """Every way to get at refused weights, tried on a twin with a dead down_proj; each must raise."""

    def refuse(draft: Draft) -> None:
        draft.weights[DOWN][...] = 0

    rows: list[dict[str, object]] = planted(refuse, _attempts)
    passed = [r for r in rows if r["outcome"] == "got through"]
    return Finding(
        value=float(len(passed)),
        compared=len(rows),
        expected=len(rows),
        rows=rows,
        whys=[("Which way is open?", str(r["attempt"])) for r in passed],
        reference="a synthetic twin with an all-zero down_proj",
    )


def _attempts(path: Path) -> list[dict[str, object]]:
    from apr_core.engines.load import build, load_model, load_plain

    admission = admit(path)
    checkpoint = admission.checkpoint
    bad, good = checkpoint.raw(DOWN), checkpoint.raw(DOWN.replace("layers.1", "layers.0"))
    geometry = admission.geometry
    assert geometry is not None
    healthy = ValidatedWeight(good, geometry)

    def tampered_pickle() -> object:
        stolen = pickle.dumps(healthy)
        return pickle.loads(stolen.replace(good.data.tobytes(), bytes(good.data.nbytes)))

    attempts: dict[str, Callable[[], object]] = {
        "admit(path).require()": admission.require,
        "load_model(path)": lambda: load_model(path),
        "engines.build(admission)": lambda: build(admission),
        "engines.load_plain(admission)": lambda: load_plain(admission),
        "ValidatedWeight(raw of the dead tensor)": lambda: ValidatedWeight(bad, geometry),
        "dataclasses.replace(healthy, raw=dead)": lambda: replace(healthy, raw=bad),
        "unpickle a record whose bytes were zeroed": tampered_pickle,
        "write into the bytes of a validated tensor": lambda: healthy.raw.data.__setitem__(0, 0),
        "assign another tensor to a validated one": lambda: setattr(healthy, "raw", bad),
    }
    rows: list[dict[str, object]] = []
    for name, attempt in attempts.items():
        try:
            attempt()
            outcome = "got through"
        except (ContractViolation, AttributeError, ValueError, TypeError) as error:
            outcome = f"refused by {type(error).__name__}"
        except AprError as error:
            outcome = f"got through as far as {type(error).__name__}"
        rows.append({"attempt": name, "outcome": outcome})
    checkpoint.close()
    return rows

"""
The specification's root causes, each with a planted twin that is diagnosed here: from round to claim to proven cause.

``docs/rounds.md`` is made from the records of this module (``docs/rounds.json``) by ``python -m apr_core zoo rounds``.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apr_core.diagnose.backend import POSITIONS, explain_backend
from apr_core.diagnose.cause import EXPLAINED, NOTHING, Cause, Chain, Diagnosis
from apr_core.diagnose.explain import explain_failure
from apr_core.engines.subject import Subject, obtain, resolve_model
from apr_core.engines.wrap import wrap
from apr_core.errors import Exit
from apr_core.falsify.evidence import jsonable
from apr_core.zoo.confusion import plant
from apr_core.zoo.draft import take_apart
from apr_core.zoo.matrix import find
from apr_core.zoo.registry import Defect
from apr_core.zoo.suite import suite_faults


@dataclass(frozen=True)
class RootCause:
    """
    One root cause of the specification.

    Attributes:
        round: Its number.
        id: The specification's name for it.
        what: What was wrong, in a sentence.
        twin: A defect of the zoo, or a fault of the suite, that is the same mistake.
        guards: Claims that a return would refute.
    """

    round: int
    id: str
    what: str
    twin: str
    guards: tuple[str, ...]


ROOT_CAUSES: tuple[RootCause, ...] = (
    RootCause(53, "PMAT-237", "An action started without the gate: each command judged for itself, or did not.",
              "skipped-command", ("F-ADMIT-001",)),
    RootCause(52, "PMAT-236", "One format forgot the chat template, and the first token ended the answer.",
              "template-dropped", ("F-GT-004", "F-GT-011")),
    RootCause(52, "PMAT-236 (file)", "The weights were 99.9 % zeros under a right size and a right header.",
              "all-999-zero", ("F-DATA-QUALITY-001",)),
    RootCause(51, "PMAT-235", "An embedding of 94.5 % zeros passed every structural check.",
              "embedding-945-zero", ("F-DATA-QUALITY-001", "F-ADMIT-001")),
    RootCause(50, "P0-QA-001", "Gates that skipped in silence counted as passed.",
              "all-not-run", ("F-GT-006", "F-GT-008")),
    RootCause(49, "GH-205", "F16 was decoded with the wrong exponent on its way through F32.",
              "exponent-clamped", ("F-GT-001", "F-GT-010")),
    RootCause(48, "PMAT-216", "Two arguments were exchanged, and the head was read along its other axis.",
              "logits-permuted-transposed", ("F-PAR-001", "F-LAYOUT-CONTRACT-002")),
    RootCause(48, "PMAT-216 (RoPE)", "The same backend had no RoPE.", "rope-missing-everywhere", ("F-PAR-002",)),
    RootCause(48, "PMAT-216 (tracing)", "Tracing took another path than the answers, so it could not show the fault.",
              "traced-only-logits", ("F-PAR-007",)),
    RootCause(47, "GH-208", "A stale file from before the contract had its shapes reversed.",
              "stale-apr", ("F-LAYOUT-CONTRACT-001",)),
    RootCause(46, "GH-208 (embedding)", "The embedding was transposed once too often.",
              "embedding-transposed-bytes", ("F-GT-010", "F-PAR-008")),
    RootCause(48, "GH-5", "Attention's tile was narrower than a head, and the rest of each head was lost.",
              "head-beyond-tile-queries", ("F-PAR-002",)),
    RootCause(48, "GH-201", "A layer ran before its streamed weights had arrived.",
              "streamed-layer-half", ("F-PAR-001", "F-PAR-002")),
    RootCause(48, "wrong comparison with Ollama", "A model of another size was what the peer had loaded.",
              "ollama-size", ("F-THR-011", "F-THR-012")),
)  # fmt: skip


def diagnose_rounds(model: str = "pygmy", folder: Path | None = None) -> list[dict[str, Any]]:
    """
    Plant the twin of each root cause and diagnose it.

    Args:
        model: A healthy model; also the reference.
        folder: Of a run, which keeps the records as ``rounds.json``.

    Returns:
        One record each, chain included.
    """
    records = []
    subject = obtain(model, device="cpu")
    with closing(subject):
        for root in ROOT_CAUSES:
            found, planted = _diagnosed(root, subject, resolve_model(model).resolve())
            first = found.causes[0] if found.causes else None
            records.append(
                {
                    "round": root.round,
                    "id": root.id,
                    "what": root.what,
                    "twin": root.twin,
                    "planted": planted,
                    "guards": list(root.guards),
                    "cause": first.klass if first else found.outcome,
                    "place": first.place if first else "",
                    "proved": first.proved if first else False,
                    "whys": [list(why) for why in found.whys],
                }
            )
    if folder is not None:
        write_rounds(folder, records)
    return records


def write_rounds(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write the records as ``rounds.json``."""
    text = json.dumps(jsonable(list(records)), indent=1, ensure_ascii=True)
    (folder / "rounds.json").write_text(text + "\n", encoding="utf-8")


def _diagnosed(root: RootCause, subject: Subject, reference: Path) -> tuple[Diagnosis, str]:
    """Diagnose a twin: a file by itself and its reference, a backend by its forward, the suite by its exit code."""
    fault = next((f for f in suite_faults() if f.id == root.twin), None)
    if fault is not None:
        return _of_suite(root, fault.run, fault.what), fault.what
    defect = find(root.twin)
    assert isinstance(defect, Defect)
    if defect.hook is not None:
        chain = Chain([("Is it the file?", "no: the same file, computed by the reference, is right")])
        with np.errstate(all="ignore"):
            candidate = wrap(subject.model, defect.hook(subject.model.config))
            causes = explain_backend(candidate, subject.plain, subject.stimulus(POSITIONS).ids, chain)
        return Diagnosis(EXPLAINED if causes else NOTHING, tuple(causes), steps=tuple(chain.steps)), defect.what
    planted = plant([defect.recipe] if defect.recipe else [], take_apart(subject.checkpoint))
    assert planted is not None
    folder, path, _ = planted
    try:
        return explain_failure(path, reference=reference), defect.what
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _of_suite(root: RootCause, run: Any, what: str) -> Diagnosis:
    """Take the check away, and see whether the suite still ends well: that is what the root cause looked like."""
    with tempfile.TemporaryDirectory() as folder:
        code = int(run(Path(folder)))
    chain = Chain([("Is it the file, or its backend?", "no: both are right; the check is what was taken away")])
    answer = f"with {what}, the suite ends with exit {code}"
    repair = f"the check put back: {', '.join(root.guards)} must hold before exit 0" if code != Exit.OK else ""
    cause = chain.close(Cause("suite", "Does the suite notice?", answer, repair, op=root.twin))
    return Diagnosis(EXPLAINED, (cause,))


def rounds_markdown(records: Sequence[Mapping[str, Any]], chains: Sequence[str]) -> str:
    """
    Write the page of rounds.

    Args:
        records: As `diagnose_rounds` makes them.
        chains: Each record's whys as a Markdown table.
    """
    lines = [
        "# Rounds: from a root cause to the claim that guards against its return",
        "",
        "Made by `apr zoo rounds` from `docs/rounds.json`; a test fails when the two differ. Each root cause of the",
        "specification has a planted twin, and the chain below it was measured on that twin, not written.",
        "",
        "| round | root cause | planted twin | cause found | where | proved by repair | guarded by |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        proved = "yes" if r["proved"] else "no"
        guards = ", ".join(r["guards"])
        lines.append(
            f"| {r['round']} | {r['id']} | `{r['twin']}` | {r['cause']} | {r['place']} | {proved} | {guards} |"
        )
    for r, chain in zip(records, chains, strict=True):
        head = ["", f"## Round {r['round']}, {r['id']}", "", r["what"], "", f"Planted: {r['planted']}.", ""]
        lines += [*head, chain, "", f"Guarded by {', '.join(r['guards'])}."]
    return "\n".join(lines) + "\n"

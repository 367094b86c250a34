"""
The specification's release matrix: six files made of the subject in this run, each run on a device and judged.

A cell holds when the golden prompts are answered word for word by the engine that `apr run` takes there, and when the
logits of the engine that owes float32 its limits (`exact`) keep them: the noise floor where the weights are the same,
what our encoder costs this very model where they are rounded (`parity.pair`). The reference of every cell is the
subject's own float32 torch forward on the CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apr_core.contract.admit import admit
from apr_core.engines.cuda import attest
from apr_core.engines.load import build, fastest_precision, has_compiler
from apr_core.engines.subject import Subject
from apr_core.errors import ContractViolation, FormatError, LoadError
from apr_core.falsify.evidence import Evidence
from apr_core.falsify.finding import Finding, act
from apr_core.falsify.verdict import NotRun, Verdict
from apr_core.model.trace import TracedForward
from apr_core.parity.acts import floor
from apr_core.parity.compare import LOGITS
from apr_core.parity.distribution import DistributionParity, compare_logits
from apr_core.parity.explain import flip_arrays
from apr_core.parity.pair import Pair, hold, is_rung
from apr_core.parity.suite import POSITIONS, PREFILL
from apr_core.parity.tolerances import QUANTISED_TAU
from apr_core.rosetta.acts import answers
from apr_core.rosetta.copies import NoCopyError, copies_of, load_copy

# From the finest recipe to the coarsest; more bits must not cost more.
LADDER = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
# Logits of both sides that a scatter shows.
SAMPLE = 400

Row = dict[str, object]


@dataclass(frozen=True)
class Release:
    """
    One row of the matrix.

    Attributes:
        name: As the specification has it.
        made_from: The row whose file is converted, or empty: the subject.
        format: Container.
        quantize: The recipe, or None where no value changes.
    """

    name: str
    made_from: str
    format: str
    quantize: str | None


# Source: the release criteria of the specification (Round 53).
RELEASES = (
    Release("GGUF Q4_K", "", "gguf", "Q4_K_M"),
    Release("SafeTensors F16", "", "safetensors", "F16"),
    Release("SafeTensors direct", "", "safetensors", None),
    Release("APR Q4_K from GGUF", "GGUF Q4_K", "apr", None),
    Release("APR F16 from SafeTensors", "SafeTensors F16", "apr", None),
    Release("GGUF Q4_K from SafeTensors", "SafeTensors F16", "gguf", "Q4_K_M"),
)


@act("F-PAR-011")
def release_on_cpu(subject: Subject) -> Finding:
    """Make the six files and judge each on the CPU."""
    return _column(subject, "cpu")


@act("F-PAR-012")
def release_on_gpu(subject: Subject) -> Finding:
    """Make the six files and judge each on the CUDA device."""
    return _column(subject, "cuda")


def cells(*columns: Evidence) -> list[Row]:
    """
    Put the records of the devices into one table: a verdict and the id of its evidence per file and device.

    Args:
        columns: The record of each device. One that was not run has no rows of its own: each of its cells says why.
    """
    table: list[Row] = []
    for number, release in enumerate(RELEASES):
        row: Row = {"release": release.name}
        for record in columns:
            device = "CPU" if record.id == "F-PAR-011" else "GPU"
            found = record.rows[number] if record.rows else {}
            row[device] = found.get("verdict") or f"{record.verdict}: {record.reason}"
            row[f"evidence {device}"] = f"{record.id}-{record.attempt}#{number + 1}"
        table.append(row)
    return table


def _column(subject: Subject, device: str) -> Finding:
    rows, whys, asked = list[Row](), list[tuple[str, str]](), 0
    for release, path in _files(subject):
        row: Row = {"file": release.name, "made from": release.made_from or "the subject"}
        undecided: Row = {"verdict": str(Verdict.INCONCLUSIVE), "reason": path}
        row |= undecided if isinstance(path, str) else _cell(subject, path, device)
        asked = max(asked, int(str(row.get("asked", 0))))
        rows.append(row)
        if row["verdict"] == Verdict.FALSIFIED:
            whys.append((f"What is wrong with {release.name}?", str(row["reason"])))
    found = Counter(str(row["verdict"]) for row in rows)
    return Finding(
        value=float(found[Verdict.FALSIFIED]),
        compared=found[Verdict.CORROBORATED] + found[Verdict.FALSIFIED],
        expected=len(RELEASES),
        missing=[f"{row['file']}: {row['reason']}" for row in rows if row["verdict"] == Verdict.INCONCLUSIVE],
        detail=f"{len(rows)} files, {asked} golden prompts each",
        rows=rows,
        whys=whys,
        reference="the subject in float32, torch on the CPU",
    )


def _files(subject: Subject) -> Iterator[tuple[Release, Path | str]]:
    """Yield each row with its file, or why there is none."""
    copies, made = copies_of(subject), dict[str, Path | str]()
    for release in RELEASES:
        source = made.get(release.made_from)
        try:
            if isinstance(source, str):
                made[release.name] = source
            elif source is not None:
                made[release.name] = copies.onward(source, release.format, release.quantize)
            elif release.quantize is None and subject.checkpoint.format == release.format:
                made[release.name] = subject.path
            else:
                made[release.name] = copies.path(release.format, release.quantize)
        except NoCopyError as error:
            made[release.name] = f"no such file can be made: {error.line:.200}"
        yield release, made[release.name]


def _cell(subject: Subject, path: Path, device: str) -> Row:
    """Judge one file on one device; that it opens, is admitted and loads is part of it."""
    try:
        admission = admit(path, skip=subject.admission.bypassed)
        copy = Subject(path, admission, reference=None, device=device, seed=subject.seed, max_new_tokens=0)
        with closing(copy):
            return _judged(subject, copy, device)
    except (FormatError, ContractViolation, LoadError) as error:
        return {"verdict": str(Verdict.FALSIFIED), "reason": f"{error.line:.250}"}


def _judged(subject: Subject, copy: Subject, device: str) -> Row:
    spoken = answers(subject, build(copy.admission, device=device, precision=fastest_precision(device)), "")
    ids = subject.stimulus(min(POSITIONS, subject.model.config.max_position_embeddings)).ids
    strict = _strict(subject, copy, device)
    pair = hold(subject, copy, ids, min(PREFILL, ids.size), strict)
    # an engine that fell back in silence would agree with the CPU; how it packs its weights is its own affair
    doubt = attest(strict, ids, expected_bytes=1).doubt if device == "cuda" else ""
    wrong = int(spoken.value or 0)
    verdict, reason = (pair.verdict, pair.reason) if not doubt else (Verdict.INCONCLUSIVE, doubt)
    if wrong:
        first = spoken.whys[0]
        verdict, reason = Verdict.FALSIFIED, f"{wrong} of {spoken.compared} golden answers are wrong: {first[1]}"
    return {
        "verdict": str(verdict),
        "of its limit": _over(pair),
        "judged by": "noise floor" if pair.same_weights else "price of its types",
        "asked": spoken.compared,
        "right": spoken.compared - wrong,
        "engine": strict.backend,
        "sha256": copy.checkpoint.content_hash[:16],
        "reason": reason,
    }


def _strict(subject: Subject, copy: Subject, device: str) -> TracedForward:
    """
    Return the engine that owes float32 its limits.

    Without a compiler that is the torch forward; of the subject's own file it would be held against itself, so there
    the independent numpy forward stands in.
    """
    if has_compiler(device):
        return build(copy.admission, device=device, precision="exact")
    if device == "cpu" and copy.checkpoint.content_hash == subject.checkpoint.content_hash:
        return copy.plain
    return build(copy.admission, device=device)


def _over(pair: Pair) -> float | None:
    """The largest of what was measured over its limit: rel_l2 for the same weights, else mean KL and NMSE."""
    if pair.ratios is not None:
        return max(low for _, low, _ in pair.ratios.values())
    return pair.report.over(pair.limits) if pair.report is not None and pair.limits is not None else None


def format_rows(subject: Subject) -> list[Row]:
    """
    Hold the same weights in the other containers against the subject's file: bit-equal, or within the noise floor.

    Judges nothing (F-GT-001 and F-GT-002 do, on the same copies); nothing for a refused model.
    """
    if subject.refusal is not None:
        return []
    copies, limit = copies_of(subject), floor(subject).limits[LOGITS]
    try:
        runs = copies.runs(subject)
    except NoCopyError as error:
        return [{"format": "none", "logits": f"no copy can be made: {error.line:.200}"}]
    rows: list[Row] = []
    for run in runs:
        diff, worst = copies.diffs[run.format], float(run.rel_l2.max(initial=0.0))
        equal = "bit-equal" if worst == 0.0 else "within the floor" if worst <= limit else "beyond the floor"
        row = {"values": diff.expected, "values that differ": diff.mismatched + diff.expected - diff.compared}
        rows.append({"format": run.format, **row, "rel_l2": worst, "limit": limit, "logits": run.refusal or equal})
    return rows


def quantised(subject: Subject) -> Finding:
    """
    Run the subject rounded to one recipe after the other, each against its own float32 forward: shown, judged by none.

    Rows from the finest recipe to the coarsest, each with what `parity.pair.is_rung` says of it and the one before.
    Arrays: KL per position of each recipe; margins and flips of the coarsest; a sample of the logits of both ends.
    """
    if subject.refusal is not None:
        return Finding.nothing(NotRun.REFUSED, subject.refusal)
    ids = subject.stimulus(min(POSITIONS, subject.model.config.max_position_embeddings)).ids
    truth, rows, arrays = subject.model.forward(ids), list[Row](), dict[str, np.ndarray[Any, Any]]()
    chosen = np.sort(np.random.default_rng(subject.seed).choice(truth.size, min(SAMPLE, truth.size), replace=False))
    arrays["logits_reference"] = truth.reshape(-1)[chosen]
    finer: DistributionParity | None = None
    for recipe in LADDER:
        try:
            path = copies_of(subject).path("gguf", recipe)
            found = load_copy(path, subject).forward(ids)
        except (NoCopyError, FormatError, ContractViolation) as error:
            rows.append({"recipe": recipe, "order": f"not made: {error.line:.120}"})
            continue
        seen = compare_logits(truth, found, QUANTISED_TAU)
        order = "" if finer is None else is_rung(finer, seen)[1] or "costs no less than the finer one"
        finer = seen
        flips = {"decisive flips": len(seen.decisive_flips), "near-tie flips": len(seen.near_tie_flips)}
        rows.append({"recipe": recipe, "kl_mean": seen.kl_mean, "kl_max": seen.kl_max, **flips, "order": order})
        if recipe != LADDER[0]:  # at the level of float32 rounding, decades below the others
            arrays[f"kl_{recipe}"] = seen.kl
        if recipe in (LADDER[0], LADDER[-1]):
            arrays[f"logits_{recipe}"] = found.reshape(-1)[chosen]
    arrays |= flip_arrays(finer) if finer is not None else {}
    return Finding(None, ids.size, ids.size, rows=rows, arrays=arrays, detail="The subject rounded to coarser types")

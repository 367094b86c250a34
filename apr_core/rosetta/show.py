"""What notebook 00 shows beside its claims: one fingerprint in three formats and on the way back, and the passport."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import wraps
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING

from apr_core.errors import AprError
from apr_core.falsify.finding import Finding
from apr_core.falsify.verdict import NotRun
from apr_core.formats.checkpoint import Checkpoint, open_checkpoint
from apr_core.rosetta.convert import GGUF_DEFAULT, convert, lossless, named
from apr_core.rosetta.copies import copies_of
from apr_core.rosetta.fingerprint import fingerprint
from apr_core.rosetta.passport import passport

if TYPE_CHECKING:
    from apr_core.engines.subject import Subject


def _shown(measure: Callable[[Subject], Finding]) -> Callable[[Subject], Finding]:
    """Give a finding for a refused subject too, and for one that cannot be converted: a notebook's page is whole."""

    @wraps(measure)
    def attempt(subject: Subject) -> Finding:
        if subject.refusal is not None:
            return Finding.nothing(NotRun.REFUSED, subject.refusal)
        try:
            return measure(subject)
        except AprError as error:
            return Finding(None, 0, 0, inconclusive=error.line[:300])

    return attempt


@_shown
def round_trips(subject: Subject) -> Finding:
    """Fingerprint the subject, its copy in each other format, and what each copy becomes back in the first format."""
    copies, own = copies_of(subject), subject.checkpoint
    files = {f"{own.format} (subject)": (own.path, False)}
    for container in copies.formats:
        path = copies.path(container)
        back = named(copies.folder / f"back-from-{container}", own.format)
        if not back.exists():
            with open_checkpoint(path) as copy:
                convert(copy, back, quantize=lossless(copy, own.format), bare=True)
        files |= {container: (path, False), f"back from {container}": (back, True)}
    rows, first = [], ""
    for step, (path, made_here) in files.items():
        with open_checkpoint(path) as opened:
            digest = fingerprint(opened).digest
            first = first or digest
            size = sum(file.stat().st_size for file in opened.files)
            rows.append({"step": step, "fingerprint": digest, "bytes": size, "same": digest == first})
        if made_here:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    unlike = sum(not row["same"] for row in rows)
    detail = f"{len(rows) - unlike} of {len(rows)} files have the fingerprint of the subject's own"
    return Finding(float(unlike), len(rows), len(files), detail=detail, rows=rows)


@_shown
def quant_passport(subject: Subject) -> Finding:
    """Say what the subject's tensors are stored in; a plain one is quantised as ``apr convert`` would, and measured."""
    own = subject.checkpoint
    if any(info.dtype.block_elements > 1 for info in own.tensors.values()):
        return _passport(own, subject.reference.checkpoint if subject.reference is not None else None)
    path = copies_of(subject).folder / f"{GGUF_DEFAULT}-passport.gguf"
    convert(own, path, quantize=GGUF_DEFAULT, bare=True)
    try:
        with open_checkpoint(path) as copy:
            return _passport(copy, own)
    finally:
        Path(path).unlink()


def _passport(file: Checkpoint, reference: Checkpoint | None) -> Finding:
    found = passport(file, reference)
    rows = []
    for name, info in file.tensors.items():
        distance = found.distances.get(name)
        sqnr = distance.sqnr_db if distance is not None and isfinite(distance.sqnr_db) else None
        rows.append({"tensor": name, "type": str(info.dtype), "parameters": prod(info.shape), "sqnr_db": sqnr})
    detail = "; ".join(found.sentences())
    return Finding(float(len(found.strange)), len(rows), len(rows), detail=detail, rows=rows, reference=found.label)

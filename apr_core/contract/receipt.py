"""
The cached proof of an admission, so that a second start does not read every weight again.

A receipt lies in the person's cache folder, never beside the model. It holds what was measured (the digest of each
tensor among it) and what the files looked like: device, inode, size, both dates to the nanosecond, the header, one
4-KiB sample from each 64th of a file, drawn with a seed of its own, the configuration, and the dates of the companions.
Any difference, and the file is judged again.

It guards against accident (a file rewritten, replaced, truncated, half copied), not against somebody who edits a model
and its receipt: who can write to the cache folder can write the program. Rewriting single bytes without leaving a date
is such an edit; `recheck` reads everything.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

from apr_core.contract.admit import Progress, admit, geometry_of
from apr_core.contract.gates import load_gates
from apr_core.contract.stats import TensorStats
from apr_core.contract.types import ADMIT, Admission
from apr_core.errors import AprError
from apr_core.formats.checkpoint import Checkpoint, open_checkpoint
from apr_core.formats.sink import replacing
from apr_core.formats.strict_json import parse_object

SCHEMA = 1
SAMPLES, SAMPLE_BYTES = 64, 4096
# Dates of some file systems move in steps: a file written this shortly before it was judged could be written again
# within the same step, so it gets no receipt yet.
SETTLED_NS = 2_000_000_000
_CHUNK = 1 << 20
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def cache_folder() -> Path:
    """Return ``$APR_CACHE``, else ``apr`` in ``$XDG_CACHE_HOME`` (an absolute one, as its rules say), else ~/.cache."""
    own = os.environ.get("APR_CACHE", "")
    if own:
        return Path(own).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "apr"


def receipt_of(checkpoint: Checkpoint) -> Path:
    """Return where the receipt of an opened model lies, whether or not there is one."""
    name = sha256(os.fsencode(checkpoint.path.resolve())).hexdigest()[:32]
    return cache_folder() / "receipts" / f"{name}.json"


def admit_by_receipt(
    source: str | Path | Checkpoint, *, skip: bool = False, recheck: bool = False, progress: Progress | None = None
) -> Admission:
    """
    Admit a model by its receipt if that still holds; else judge it as `admit` does, and leave a receipt if it is clean.

    Args:
        source: A path that `open_checkpoint` takes, or an opened checkpoint.
        skip: The explicit bypass, as for `admit`.
        recheck: Read everything, whatever the receipt says, and renew it.
        progress: Called after each tensor that is measured.

    Returns:
        The admission; ``receipt`` names the file that proves it, or is None when everything was read.

    Raises:
        AprError: As `admit`.

    Cost: with a receipt the header and 64 samples; else that of `admit`. Without a writable cache folder always that.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    place = receipt_of(checkpoint)
    if not recheck:
        held = _recall(checkpoint, place, skip)
        if held is not None:
            return held
    started = time.time_ns()
    before = _identity(checkpoint, secrets.randbits(64))
    admission = admit(checkpoint, skip=skip, progress=progress)
    if admission.ok and before is not None and before == _identity(checkpoint, before["seed"]):
        newest = max(max(file["dates"][3:]) for file in before["files"])
        if started - newest >= SETTLED_NS:
            _issue(admission, before, place)
    return admission


def _issue(admission: Admission, identity: Mapping[str, Any], place: Path) -> None:
    """Write a receipt; a cache folder that cannot be written to is no reason to fail."""
    body = {
        "schema": SCHEMA,
        "gate_version": admission.gate_version,
        "model": str(admission.checkpoint.path),
        "written_at": time.strftime("%Y-%m-%d %H:%M:%S"),
        "identity": identity,
        "extras": admission.extras,
        "stats": [asdict(stats) for stats in admission.stats.values()],
    }
    text = json.dumps(body, allow_nan=False)
    sealed = f'{{"sha256": "{sha256(text.encode()).hexdigest()}", "body": {text}}}'
    with suppress(AprError, OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as sink:
            sink.write(sealed.encode())


def _recall(checkpoint: Checkpoint, place: Path, skip: bool) -> Admission | None:
    """Return the admission that a receipt proves, or None when there is none or anything differs."""
    try:
        data = place.read_bytes()
        body: Any = parse_object(data, file=place, what="receipt", at=0)["body"]
        # the seal is over the text as it was written: a torn or edited receipt proves nothing
        head, text = data[: data.index(b'"body": ') + 8], data[data.index(b'"body": ') + 8 : -1]
        if head.decode() != f'{{"sha256": "{sha256(text).hexdigest()}", "body": ':
            return None
        if (body["schema"], body["gate_version"]) != (SCHEMA, load_gates().version):
            return None
        if body["identity"] != _identity(checkpoint, body["identity"]["seed"]):
            return None
        stats = [TensorStats(**{key: _frozen(value) for key, value in row.items()}) for row in body["stats"]]
        return Admission(
            checkpoint=checkpoint,
            geometry=geometry_of(checkpoint, checkpoint.config or {})[0],
            stats=MappingProxyType({row.name: row for row in stats}),
            violations=(),
            gate_version=body["gate_version"],
            extras=tuple(body["extras"]),
            bypassed=skip,
            receipt=place,
            token=ADMIT,
        )
    except (AprError, OSError, ValueError, KeyError, TypeError):  # of another version, torn, or not ours
        return None


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _identity(checkpoint: Checkpoint, seed: int) -> dict[str, Any] | None:
    """Describe what the model's files look like now; None when one cannot be read."""
    ends = dict.fromkeys(checkpoint.files, -1)
    for info in checkpoint.tensors.values():
        ends[info.file] = info.offset if ends[info.file] < 0 else min(ends[info.file], info.offset)
    try:
        return {
            "seed": seed,
            "files": [_look(path, end, seed) for path, end in ends.items()],
            "index": _dates(checkpoint.path),
            "config": sha256(json.dumps(checkpoint.config, sort_keys=True, default=str).encode()).hexdigest(),
            "companions": [[name, _dates(checkpoint.folder / name)] for name in COMPANIONS],
        }
    except OSError:
        return None


def _dates(path: Path | int) -> list[int] | None:
    """Return what the file system says: device, inode, size, mtime_ns, ctime_ns; None when there is no such file."""
    try:
        status = os.stat(path)  # noqa: PTH116  it takes an open file as well
    except FileNotFoundError:
        return None
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _look(path: Path, header_end: int, seed: int) -> dict[str, Any]:
    """Describe one weight file: the file system's view of it, its header, and the samples."""
    header, samples = sha256(), sha256()
    with path.open("rb", buffering=0) as stream:
        dates = _dates(stream.fileno())
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        left = header_end if header_end >= 0 else size
        while left > 0 and (piece := stream.read(min(left, _CHUNK))):
            header.update(piece)
            left -= len(piece)
        for offset in _offsets(size, seed):
            stream.seek(offset)
            samples.update(stream.read(SAMPLE_BYTES))
    return {
        "file": path.name,
        "dates": dates,
        "size": size,
        "header_sha256": header.hexdigest(),
        "samples_sha256": samples.hexdigest(),
    }


def _offsets(size: int, seed: int) -> Iterator[int]:
    """Draw one place in each 64th of a file: a change of two 64ths in a row cannot fall between them."""
    draw = random.Random(seed)
    for k in range(SAMPLES):
        low, high = size * k // SAMPLES, size * (k + 1) // SAMPLES
        yield draw.randrange(low, max(low + 1, high - SAMPLE_BYTES))

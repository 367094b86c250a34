"""
Run the parts that need a CUDA device, and keep what each found the moment that it found it.

A part is a generator of `Record`; each record becomes one JSON file, and the archive in the output folder is whole
after every one of them, so that a run that is killed leaves what it had. A part that breaks is recorded and the next
begins; what the time no longer suffices for is recorded as NOT_RUN. Device ``cpu`` rehearses the same code and
corroborates nothing. `PARTS` is the list: a mode is a name and its parts, in the order in which they run.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apr_core.errors import Exit
from apr_core.falsify.evidence import jsonable
from apr_core.falsify.verdict import Verdict
from apr_core.model.synth import SHAPES
from apr_core.provenance import collect, version_of

SCHEMA = 1
BUDGET_S = 540
LARGE = ("qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")
# Mode -> module in this folder and the functions in it.
PARTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "parity": ("gpu_parity", ("products", "bundled", "large", "random_weights")),
    "bench": ("gpu_bench", ("ceilings", "kernels", "models")),
}


@dataclass(frozen=True)
class Setup:
    """
    What every part is given.

    Attributes:
        device: ``cuda``, or ``cpu`` to rehearse.
        scratch: A folder for models that are made on the spot.
        shapes: Names of the large models.
        formats: ``container:type`` of the small ones; empty for all.
    """

    device: str
    scratch: Path
    shapes: Sequence[str]
    formats: Sequence[str]


@dataclass(frozen=True)
class Record:
    """
    What one part found about one thing.

    Attributes:
        name: What was examined; unique in a run.
        verdict: What follows.
        reason: Why not CORROBORATED, or empty.
        measured: Numbers that belong to the whole.
        rows: A table, where there is one.
    """

    name: str
    verdict: Verdict
    reason: str = ""
    measured: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()


Part = Callable[[Setup], Iterator[Record]]


class Archive:
    """Records as JSON in one ``.tar.gz`` that is written anew after each."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self.about = path, about
        self.records: list[tuple[str, bytes, Verdict]] = []
        self.began = time.monotonic()

    def add(self, part: str, record: Record) -> None:
        """Keep a record; the time that it took is what passed since the last one."""
        now = time.monotonic()
        body = {
            "schema": SCHEMA,
            "part": part,
            "name": record.name,
            "verdict": str(record.verdict),
            "reason": record.reason,
            "measured": record.measured,
            "rows": record.rows,
            "seconds": round(now - self.began, 2),
            **self.about,
        }
        self.began = now
        data = json.dumps(jsonable(body), indent=1, allow_nan=False).encode()
        self.records.append((f"{len(self.records):02d}-{part}-{record.name}.json", data, record.verdict))
        print(f"{record.verdict} {part} {record.name} ({body['seconds']} s) {record.reason}", flush=True)
        self._flush()

    def _flush(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with tarfile.open(temporary, "w:gz") as archive:
            for name, data, _ in self.records:
                entry = tarfile.TarInfo(name)
                entry.size, entry.mtime = len(data), int(time.time())
                archive.addfile(entry, io.BytesIO(data))
        temporary.replace(self.path)

    @property
    def code(self) -> Exit:
        """Exit code by the evidence."""
        found = {verdict for _, _, verdict in self.records}
        if Verdict.FALSIFIED in found:
            return Exit.REFUTED
        return Exit.OK if found == {Verdict.CORROBORATED} else Exit.INCONCLUSIVE


class OutOfTimeError(Exception):
    """The budget ended within a part."""


def _ring(number: int, frame: object) -> None:
    raise OutOfTimeError


def run_parts(archive: Archive, setup: Setup, parts: Sequence[Part], budget_s: int) -> Exit:
    """Run the parts in turn within the budget; a part that breaks is recorded, and exit 1 tells so."""
    broke = late = False
    signal.signal(signal.SIGALRM, _ring)
    signal.alarm(max(1, budget_s))
    for part in parts:
        name = part.__name__
        try:
            if late:
                archive.add(name, Record("all", Verdict.NOT_RUN, "out of time"))
                continue
            for record in part(setup):
                archive.add(name, rehearsed(record) if setup.device == "cpu" else record)
        except OutOfTimeError:
            late = True
            archive.add(name, Record("rest", Verdict.NOT_RUN, f"out of time after {budget_s} s"))
        except Exception as error:  # whatever it is, the next part is worth running
            broke = True
            trail = {"traceback": traceback.format_exc()[-4000:]}
            archive.add(name, Record("error", Verdict.INCONCLUSIVE, f"{type(error).__name__}: {error}", trail))
    signal.alarm(0)
    return Exit.UNEXPECTED if broke else archive.code


def rehearsed(record: Record) -> Record:
    """What ran on the CPU says nothing about a device, unless it is wrong already."""
    if record.verdict is not Verdict.CORROBORATED:
        return record
    return Record(record.name, Verdict.INCONCLUSIVE, "a rehearsal on the cpu", record.measured, record.rows)


def about(device: str, commit: str) -> dict[str, Any]:
    """Describe code, machine and device; every record carries it, for records are looked at one by one."""
    provenance = collect()
    provenance["commit"] = commit or provenance["commit"]
    provenance["packages"] |= {"triton": version_of("triton"), "numpy": np.__version__, "torch": torch.__version__}
    found: dict[str, Any] = {"device": device}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device_name": properties.name,
            "device_memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return found | {"provenance": provenance}


def main(arguments: Sequence[str]) -> int:
    """Parse, run, and return the exit code."""
    parser = argparse.ArgumentParser(prog="run_gpu.sh", description="Parity, or rates, on a CUDA device.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the archive")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses")
    parser.add_argument("--shapes", default=",".join(LARGE), help=f"large models: {', '.join(SHAPES)}")
    parser.add_argument("--formats", default="", help="container:type of the small models, e.g. gguf:Q4_K_M; all")
    parser.add_argument("--budget-s", type=int, default=BUDGET_S, help="seconds for everything")
    parser.add_argument("--commit", default="", help="of the code, where the checkout has no repository")
    parser.add_argument("--bench", action="store_true", help="time the fused kernels instead")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device here; rehearse with --device cpu", file=sys.stderr)
        return Exit.UNAVAILABLE
    given.out.mkdir(parents=True, exist_ok=True)
    mode = "bench" if given.bench else "parity"
    module, names = PARTS[mode]
    parts = [getattr(importlib.import_module(module), name) for name in names]
    archive = Archive(given.out / f"gpu-{mode}.tar.gz", {"mode": mode} | about(given.device, given.commit))
    with tempfile.TemporaryDirectory(prefix="apr-gpu-") as scratch:
        shapes, formats = (tuple(filter(None, text.split(","))) for text in (given.shapes, given.formats))
        code = run_parts(archive, Setup(given.device, Path(scratch), shapes, formats), parts, given.budget_s)
    print(f"{archive.path}: {len(archive.records)} records, exit {int(code)}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

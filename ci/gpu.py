"""
Run the parts that need a CUDA device, and keep what each found the moment that it found it.

A part yields `Record`s; each becomes one JSON file, and the archive in the output folder is whole after every one of
them, so that a run that is killed leaves what it had. Each part has a share of the time, and leaves what it does not
need to those behind it. A part that breaks is recorded and the next begins, in a new process where the device was lost;
what the time or the machine does not suffice for is recorded as NOT_RUN. Device ``cpu`` rehearses the same code and
corroborates nothing.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import multiprocessing
import os
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apr_core.errors import Exit, Unavailable
from apr_core.falsify.evidence import jsonable
from apr_core.falsify.verdict import Verdict
from apr_core.model.synth import SHAPES
from apr_core.provenance import collect, version_of

SCHEMA = 1
BUDGET_S = 540
LARGE = ("qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")
# Mode -> module in this folder whose `parts` lists what runs.
MODES = {"parity": "gpu_parity", "bench": "gpu_bench"}


@dataclass(frozen=True)
class Setup:
    """
    What every part is given.

    Attributes:
        device: ``cuda``, or ``cpu`` to rehearse.
        scratch: A folder for models that are made on the spot.
        shapes: Names of the large models.
        formats: ``container:type`` of the small ones; empty for all.
        pool: Processes that work ahead on the host; None to do everything when its turn comes.
        made: What they were given to make, by name.
        rates: Tokens per second that parts measured, by name.
    """

    device: str
    scratch: Path
    shapes: Sequence[str]
    formats: Sequence[str]
    pool: Any = None
    made: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)

    def begin(self, name: str, work: Callable[..., Any], *given: Any) -> None:
        """Have something made, by a process of the pool if there is one."""
        if self.pool is not None:
            self.made[name] = self.pool.apply_async(work, given).get
        else:
            self.made[name] = partial(work, *given)


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


@dataclass(frozen=True)
class Part:
    """
    What yields records, within its share of the time.

    Attributes:
        name: Of the part; unique in a run.
        seconds: Its share, in proportion to the others; what it leaves is for those behind it.
        run: Yields the records.
    """

    name: str
    seconds: int
    run: Callable[[Setup], Iterator[Record]]


class Archive:
    """Records as JSON in one ``.tar.gz`` that is written anew after each; ``go_on`` keeps those that are there."""

    def __init__(self, path: Path, about: Mapping[str, Any], *, go_on: bool = False) -> None:
        self.path, self.about = path, about
        self.records: list[tuple[str, bytes, Verdict]] = []
        if go_on:
            with tarfile.open(path) as archive:
                for name in archive.getnames():
                    data = archive.extractfile(name).read()  # type: ignore[union-attr]
                    self.records.append((name, data, Verdict(json.loads(data)["verdict"])))
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
        """Exit code by the evidence; 1 where a part broke."""
        if any(name.endswith("-error.json") for name, _, _ in self.records):
            return Exit.UNEXPECTED
        found = {verdict for _, _, verdict in self.records}
        if Verdict.FALSIFIED in found:
            return Exit.REFUTED
        return Exit.OK if found == {Verdict.CORROBORATED} else Exit.INCONCLUSIVE


class OutOfTimeError(BaseException):
    """A part has used its share up; no handler of errors inside it may hold that back."""


class DeviceLostError(Exception):
    """
    The device answers no more in this process.

    Attributes:
        done: Parts that have run.
        left_s: Seconds that are left for the rest.
    """

    def __init__(self, done: int, left_s: float) -> None:
        super().__init__(f"after {done} parts")
        self.done, self.left_s = done, left_s


def _ring(number: int, frame: object) -> None:
    raise OutOfTimeError


def run_parts(archive: Archive, setup: Setup, parts: Sequence[Part], budget_s: float) -> Exit:
    """
    Run the parts in turn, each within its share of the budget and what those before it left.

    A part that breaks is recorded, and exit 1 tells so.

    Raises:
        DeviceLostError: A kernel took the device with it: another process may go on.
    """
    signal.signal(signal.SIGALRM, _ring)
    began, total, share = time.monotonic(), sum(part.seconds for part in parts), 0
    for done, part in enumerate(parts, 1):
        share += part.seconds
        left = began + budget_s * share / total - time.monotonic()
        try:
            if left <= 0:
                raise OutOfTimeError
            signal.setitimer(signal.ITIMER_REAL, left)
            try:
                for record in part.run(setup):
                    archive.add(part.name, rehearsed(record) if setup.device == "cpu" else record)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except OutOfTimeError:
            archive.add(part.name, Record("rest", Verdict.NOT_RUN, f"out of time, its share was {part.seconds} s"))
        except Unavailable as error:
            archive.add(part.name, Record("all", Verdict.NOT_RUN, str(error)))
        except Exception as error:  # whatever it is, the next part is worth running
            trail = {"traceback": traceback.format_exc()[-4000:]}
            archive.add(part.name, Record("error", Verdict.INCONCLUSIVE, f"{type(error).__name__}: {error}", trail))
            if setup.device == "cuda" and lost():
                raise DeviceLostError(done, began + budget_s - time.monotonic()) from error
    return archive.code


def lost() -> bool:
    """Say whether the device fails at everything, as it does in a process one of whose kernels read what is not its."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


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
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for everything")
    parser.add_argument("--commit", default="", help="of the code, where the checkout has no repository")
    parser.add_argument("--bench", action="store_true", help="time the fused kernels instead")
    parser.add_argument("--done", type=int, default=0, help="go on behind so many parts of the archive that is there")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device here; rehearse with --device cpu", file=sys.stderr)
        return Exit.UNAVAILABLE
    if given.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel is imported
    given.out.mkdir(parents=True, exist_ok=True)
    mode = "bench" if given.bench else "parity"
    shapes, formats = (tuple(filter(None, text.split(","))) for text in (given.shapes, given.formats))
    path, said = given.out / f"gpu-{mode}.tar.gz", {"mode": mode} | about(given.device, given.commit)
    archive = Archive(path, said, go_on=given.done > 0)
    try:
        with tempfile.TemporaryDirectory(prefix="apr-gpu-") as scratch, workers(given.bench) as pool:
            setup = Setup(given.device, Path(scratch), shapes, formats, pool)
            parts = importlib.import_module(MODES[mode]).parts(setup)
            code = run_parts(archive, setup, parts[given.done :], given.budget_s)
    except DeviceLostError as error:
        again = [*arguments, "--done", str(given.done + error.done), "--budget-s", f"{error.left_s:.0f}"]
        print(f"the device is lost {error}; another process goes on: {' '.join(again)}", flush=True)
        os.execv(sys.executable, [sys.executable, __file__, *again])
    print(f"{archive.path}: {len(archive.records)} records, exit {int(code)}")
    return code


@contextmanager
def workers(wanted: bool) -> Iterator[Any]:
    """Yield processes that work beside this one, a few threads each; they end with it."""
    count = min(12, os.cpu_count() or 1)
    if not wanted or count < 2:
        yield None
        return
    with multiprocessing.get_context("spawn").Pool(count, _modest) as pool:
        yield pool


def _modest() -> None:
    torch.set_num_threads(4)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""
Every planted defect against every claim: the proof that the suite can fail, and that it is silent on legal oddities.

One evaluation serves three matrices: *alone* (what needs neither a reference nor golden answers), *with_reference*
(everything) and *without_identity* (everything but the two claims that compare contents). A file that the contract
refuses is examined again past the gate; what refutes it there is a further killer, marked ``behind_gate``.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from apr_core import provenance
from apr_core.contract.admit import admit
from apr_core.diagnose import behind
from apr_core.engines.subject import Subject, obtain, resolve_model
from apr_core.engines.wrap import Hook, wrap
from apr_core.errors import AprError, ContractViolation, UsageError
from apr_core.falsify.claims import claims_of, load_claims
from apr_core.falsify.finding import ACTS, load_acts
from apr_core.falsify.verdict import Verdict
from apr_core.model.config import Qwen2Config
from apr_core.rosetta.copies import tampered
from apr_core.zoo.draft import CARRIED, EDITABLE, Draft, put_together, take_apart
from apr_core.zoo.registry import Benign, Defect, NotApplicable, Zoo, load_zoo
from apr_core.zoo.score import BEYOND_THE_FILE, CRASH, PREFLIGHT, Judged, Matrix, Outcome

# In the order of work: gates read what is measured already, conversation and parity follow, the meter comes last.
NOTEBOOKS = ("10_contract_gates", "00_ground_truth", "20_parity", "30_throughput")
TIMED = "30_throughput"
# Claims that make six files more and run them: asked only where a defect is of those.
RELEASE = frozenset({"F-PAR-011", "F-PAR-012"})
# Claims about the gates themselves, on a synthetic twin: they look at nothing of the subject, so one judgement serves
# every item of a process.
OF_THE_GATES = frozenset({"F-BENIGN-001", "F-ADMIT-001"})
# The only claims that look at copies, and the one of them that runs no forward of the subject: what an item cannot
# reach is judged on the healthy file once per process.
OF_COPIES = frozenset(behind.OF_COPIES)
OF_COPIES_ALONE = "F-GT-007"
# Free-running comparisons keep the length that `apr qa` and the notebooks use: nothing is cut for speed.
NEW_TOKENS = 64
LOG = "items.jsonl"
ABOVE = ("cli", "report")  # rooms that no outcome depends on
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
ON_CPU = "the matrix is computed on the CPU"
QUICK_DEFECTS = 64
QUICK_BENIGN = 12
HEALTHY = Benign("healthy", "the model itself, written again", lambda draft: None)

Progress = Callable[[int, int, Outcome], None]


@dataclass(frozen=True, eq=False)
class Stand:
    """What all items of one process share: the healthy model taken apart, opened, and written again elsewhere."""

    draft: Draft
    reference: Subject
    again: Path


@cache
def stand_for(model: Path) -> Stand:
    """Take the healthy model apart once per process."""
    for notebook in NOTEBOOKS:
        load_acts(notebook)
    reference = obtain(str(model), device="cpu", max_new_tokens=NEW_TOKENS)
    folder = Path(tempfile.mkdtemp(prefix="healthy-", dir=_own_folder()))
    return Stand(mark(reference), reference, put_together(mark(reference), folder / "again"))


def mark(healthy: Subject) -> Draft:
    """Take a model apart; the mark makes its bytes others, as no claim compares a file with itself."""
    draft = take_apart(healthy.checkpoint)
    draft.metadata["zoo"] = "written again"
    return draft


@cache
def _own_folder() -> Path:
    """A folder for this process, removed when it ends."""
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="apr-zoo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def claims_for(item: Defect | Benign) -> tuple[str, ...]:
    """
    Choose the claims that an item meets, in the order of asking.

    The timed ones only for faults of the meter, the release matrix only for faults of its files; oddities that change
    values on purpose are not held against the healthy model or its golden answers.
    """
    kills = set(item.kills) if isinstance(item, Defect) else set[str]()
    timed = any(k.startswith("F-THR") for k in kills)
    alone = isinstance(item, Benign) and (item.twin or item.alone)
    claims = [c for notebook in NOTEBOOKS if notebook != TIMED or timed for c in claims_of(notebook)]
    claims = [c for c in claims if c.id not in RELEASE or RELEASE & kills]
    return tuple(c.id for c in claims if not (alone and BEYOND_THE_FILE & set(c.needs)))


def evaluate(item: Defect | Benign, model: Path, *, claims: Sequence[str] | None = None) -> Outcome:
    """
    Plant one item on a healthy model and hold every claim against it.

    Args:
        item: A defect or a legal oddity.
        model: The healthy model; also the reference.
        claims: Which claims to ask; None for those of `claims_for`.
    """
    started, stand = time.monotonic(), stand_for(model)
    wanted = claims_for(item) if claims is None else tuple(claims)
    folder = Path(tempfile.mkdtemp(prefix="item-", dir=_own_folder()))
    judged: list[Judged] = []
    reason = crash = ""
    try:
        path, hook = plant(item, stand.draft, folder / "model", stand.again)
        tamper = item.tamper if isinstance(item, Defect) else None
        # planted NaN and Inf meet arithmetic that would warn about each
        with tampered(tamper) if tamper else nullcontext(), np.errstate(all="ignore"):
            judged = _examine(path, stand, hook, wanted, out_of_reach(item, wanted))
        crash = next((f"{row.claim}: {row.reason}" for row in judged if row.verdict == CRASH), "")
    except NotApplicable as error:
        reason = str(error) or "nothing to damage"
    except Exception as error:
        crash = f"planting: {_named(error)}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        gc.collect()  # a subject is part of a cycle, and its copies lie on the disk until it is collected
    return Outcome(item.id, tuple(judged), reason, crash, round(time.monotonic() - started, 4))


def out_of_reach(item: Defect | Benign, claims: Sequence[str]) -> frozenset[str]:
    """Choose the claims that a damaged copy or backend cannot change: they look at the healthy file without it."""
    if item.recipe is not None:
        return frozenset()
    if item.hook is not None:
        return frozenset(claims) & {OF_COPIES_ALONE}
    return frozenset(claims) - OF_COPIES


def plant(item: Defect | Benign, draft: Draft, folder: Path, healthy: Path) -> tuple[Path, Hook | None]:
    """
    Write the damaged model, or make the hook that damages the healthy one.

    Raises:
        NotApplicable: The model has nothing that the item could damage.
    """
    hook = item.hook(Qwen2Config.from_mapping(draft.config)) if item.hook is not None else None
    if item.recipe is None:
        return healthy, hook
    damaged = draft.copy()
    item.recipe(damaged)
    return put_together(damaged, folder), hook


def touched(defect: Defect, draft: Draft) -> tuple[str, ...]:
    """Name the tensors that a recipe changes in a draft; empty for everything that damages something else."""
    damaged = draft.copy()
    try:
        if defect.recipe is not None:
            with np.errstate(all="ignore"):
                defect.recipe(damaged)
    except NotApplicable:
        return ()
    return tuple(draft.differing(damaged))


def _examine(
    path: Path, stand: Stand, hook: Hook | None, claims: Sequence[str], settled: frozenset[str]
) -> list[Judged]:
    """Ask the claims; when the contract refuses the file, ask them again behind the gate."""
    judged, refused = _ask(path, stand, hook, claims, settled)
    if not refused:
        return judged
    known = {row.claim for row in judged if row.verdict == Verdict.FALSIFIED}
    behind, _ = _ask(path, stand, hook, [c for c in claims if c not in known], skip=True)
    return judged + [row for row in behind if row.verdict in (Verdict.FALSIFIED, CRASH)]


def _ask(
    path: Path,
    stand: Stand,
    hook: Hook | None,
    claims: Sequence[str],
    settled: frozenset[str] = frozenset(),
    *,
    skip: bool = False,
) -> tuple[list[Judged], bool]:
    """Open a file and ask each claim; the second value says whether the contract refused it."""
    started = time.monotonic()

    def opening(verdict: str, error: BaseException) -> tuple[list[Judged], bool]:
        return [Judged(PREFLIGHT, verdict, _named(error), time.monotonic() - started, skip)], False

    try:
        subject = _open(path, stand, hook, skip=skip)
    except ContractViolation as error:  # behind the gate the same gate is no second killer
        return opening(Verdict.NOT_RUN if skip else Verdict.FALSIFIED, error)
    except AprError as error:
        return opening(Verdict.FALSIFIED, error)
    except Exception as error:
        return opening(CRASH, error)
    try:
        healthy = dict.fromkeys(settled, stand)
        return [_judge(claim, subject, skip, healthy.get(claim)) for claim in claims], subject.refusal is not None
    finally:
        subject.close()


def _open(path: Path, stand: Stand, hook: Hook | None, *, skip: bool) -> Subject:
    """
    Open as `obtain` does, with the shared reference; an admitted file must also become a model.

    Behind the gate it need not: the claims about contents speak about files that no forward can run.
    """
    subject = obtain(str(path), device="cpu", max_new_tokens=NEW_TOKENS, skip_contract=skip)
    subject.reference = stand.reference
    if subject.refusal is None and not skip:
        model = subject.model
        if hook is not None:
            subject.model = subject.engine = wrap(model, hook)
    return subject


@cache
def _judged_gates(claim: str, reference: Subject) -> tuple[str, str]:
    verdict, reason = ACTS[claim](reference).judge()
    return str(verdict), reason


@cache
def _untouched(stand: Stand) -> Subject:
    """The healthy file, opened once per process for what no item can reach."""
    return _open(stand.again, stand, None, skip=False)


@cache
def _judged_untouched(claim: str, stand: Stand) -> tuple[str, str]:
    verdict, reason = ACTS[claim](_untouched(stand)).judge()
    return str(verdict), reason


def _judge(claim: str, subject: Subject, behind: bool, settled: Stand | None = None) -> Judged:
    """Ask one claim. A typed error decides nothing, as in `apr qa`; any other is the claim's own failure."""
    started = time.monotonic()
    try:
        if claim in OF_THE_GATES and subject.reference is not None:
            verdict, reason = _judged_gates(claim, subject.reference)
        elif settled is not None:
            verdict, reason = _judged_untouched(claim, settled)
        else:
            found, reason = ACTS[claim](subject).judge(bypassed=subject.admission.bypassed)
            verdict = str(found)
    except AprError as error:
        verdict, reason = str(Verdict.INCONCLUSIVE), f"not measured: {_named(error)}"
    except Exception as error:
        verdict, reason = CRASH, _named(error)
    return Judged(claim, verdict, reason, round(time.monotonic() - started, 5), behind)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def code_digest(model: Path) -> str:
    """
    Hash what an outcome depends on: the sources below the reports, and the model with its companions.

    An interrupted matrix goes on only where both are the same.
    """
    root = Path(__file__).resolve().parents[1]
    sources = [p for p in root.rglob("*") if p.suffix in (".py", ".toml") and p.relative_to(root).parts[0] not in ABOVE]
    beside = model if model.is_dir() else model.parent
    names = ("config.json", *EDITABLE, *CARRIED)
    digest = hashlib.sha256()
    for path in [*sorted(sources), *(beside / name for name in names if (beside / name).is_file())]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def choose(zoo: Zoo, *, quick: bool) -> tuple[list[Defect], list[Benign]]:
    """
    Choose what a matrix plants: everything, or two defects of each claim and then one of each class in turn.

    The quick choice follows from the registry alone, so it is the same everywhere.
    """
    defects, benign = list(zoo.defects.values()), [HEALTHY, *zoo.benign.values()]
    if not quick:
        return defects, benign
    chosen: dict[str, Defect] = {}
    for claim in load_claims():
        for defect in [d for d in defects if claim in d.kills][:2]:
            chosen[defect.id] = defect
    for turn in range(len(defects)):
        seen: Counter[str] = Counter(d.klass for d in chosen.values())
        for defect in defects:
            if len(chosen) < QUICK_DEFECTS and defect.id not in chosen and seen[defect.klass] == turn:
                chosen[defect.id] = defect
                seen[defect.klass] += 1
    step = max(1, len(benign) // QUICK_BENIGN)
    return [d for d in defects if d.id in chosen], benign[::step][:QUICK_BENIGN]


def run_matrix(
    model: str | Path, *, out: Path, quick: bool = False, progress: Progress | None = None, workers: int = 0
) -> Matrix:
    """
    Plant everything on a model and let every claim speak.

    Args:
        model: A healthy model: a path, or ``pygmy``.
        out: Folder of ``items.jsonl``, one line per finished item: a run that was interrupted goes on from there.
        quick: Plant the choice of the quick tier.
        progress: Called after each item with how many are done, how many there are, and the outcome.
        workers: Processes; 0 for one per core, 1 for this process.

    Raises:
        ContractViolation: The model itself is refused: nothing planted on it would mean anything.
        AprError: It cannot be opened.
    """
    started, path = time.monotonic(), resolve_model(str(model)).resolve()
    admission = admit(path)
    with admission.checkpoint as checkpoint:
        admission.require()
        sha256 = checkpoint.content_hash
    digest = code_digest(path)
    defects, benign = choose(load_zoo(), quick=quick)
    chosen: list[Defect | Benign] = [*benign, *defects]
    items = {item.id: item for item in chosen}
    outcomes = _finished(out / LOG, f"{digest}-{sha256}", items)
    workers = workers or os.cpu_count() or 1
    todo = [item for id_, item in items.items() if id_ not in outcomes]
    with (out / LOG).open("a", encoding="utf-8") as log:
        for outcome in _all(todo, path, workers):
            log.write(json.dumps({"key": f"{digest}-{sha256}", **asdict(outcome)}) + "\n")
            log.flush()
            outcomes[outcome.id] = outcome
            if progress is not None:
                progress(len(outcomes), len(items), outcome)
    draft = stand_for(path).draft
    about = {
        "touched": {d.id: touched(d, draft) for d in defects},
        "model": {"name": path.name, "sha256": sha256},
        "code_digest": digest,
        "quick": quick,
        "provenance": provenance.collect(),
        "seconds": round(time.monotonic() - started, 3),
    }
    return Matrix(
        defects,
        benign,
        list(load_zoo().later.values()),
        outcomes,
        suite_faults(),
        redundant(),
        unavailable(outcomes[HEALTHY.id]),
        about,
    )


def _finished(log: Path, key: str, items: Mapping[str, object]) -> dict[str, Outcome]:
    """Read back what an earlier run finished with the same code and model; drop the rest, crashes included."""
    log.parent.mkdir(parents=True, exist_ok=True)
    outcomes, kept = dict[str, Outcome](), list[str]()
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        try:
            body = json.loads(line)
            found = Outcome.of_json({k: v for k, v in body.items() if k != "key"})
        except (ValueError, KeyError, TypeError):  # the line that an interruption cut
            continue
        if body.get("key") == key and not found.crash:
            kept.append(line)
            if found.id in items:
                outcomes[found.id] = found
    temp = log.with_suffix(".part")
    temp.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temp.replace(log)
    return outcomes


def _all(items: Sequence[Defect | Benign], model: Path, workers: int) -> Iterator[Outcome]:
    """Evaluate items, in this process or in several; what kills its process is tried again alone, then recorded."""
    if workers == 1 or not items:
        yield from (evaluate(item, model) for item in items)
        return
    with _one_thread_each():
        left, suspects = deque(item.id for item in items), list[str]()
        while left:
            flying: dict[Future[Outcome], str] = {}
            try:
                with _pool(min(workers, len(left)), model) as pool:
                    while left or flying:
                        while left and len(flying) < 2 * workers:
                            flying[pool.submit(_work, left[0], model)] = left[0]
                            left.popleft()
                        for job in wait(flying, return_when=FIRST_COMPLETED).done:
                            yield job.result()
                            del flying[job]
            except BrokenProcessPool:
                suspects += flying.values()
        for id_ in suspects:
            try:
                with _pool(1, model) as pool:
                    yield pool.submit(_work, id_, model).result()
            except BrokenProcessPool:
                yield Outcome(id_, crash="the process died")


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let each worker start with one thread: a tiny model gains nothing from more, and loses much to waking them."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _pool(workers: int, model: Path) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (model,))


def _start_worker(model: Path) -> None:
    """Import and take apart once; leave Ctrl-C to the parent, which waits for the items in flight."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stand_for(model)
    load_zoo()
    gc.collect()
    gc.freeze()  # what lives as long as the worker need not be searched after every item


def _work(id_: str, model: Path) -> Outcome:
    return evaluate(find(id_), model)


def find(id_: str) -> Defect | Benign:
    """
    Look an item up.

    Raises:
        UsageError: The zoo has no such item.
    """
    zoo = load_zoo()
    items: dict[str, Defect | Benign] = {HEALTHY.id: HEALTHY, **zoo.benign, **zoo.defects}
    if id_ not in items:
        near = ", ".join(get_close_matches(id_, items)) or "none is near"
        raise UsageError(f"the zoo holds no {id_!r}; near: {near}", advice="see `apr zoo list`")
    return items[id_]


def unavailable(healthy: Outcome) -> dict[str, str]:
    """Say which claims cannot run here: those that did not run on the healthy model, and what needs a device."""
    out = {row.claim: row.reason for row in healthy.judged if row.verdict == Verdict.NOT_RUN}
    return out | {c.id: ON_CPU for c in load_claims().values() if "cuda" in c.needs}


def redundant() -> dict[str, str]:
    """Collect the claims that other claims cover, as the rooms of the zoo say."""
    modules = [import_module(f"apr_core.zoo.{name}") for name in ("words", "backend")]
    return {claim: by for module in modules for claim, by in getattr(module, "REDUNDANT", {}).items()}


def suite_faults() -> list[dict[str, Any]]:
    """Build every fault of the suite itself; the row of a broken meter says whose claim it is."""
    from apr_core.zoo.suite import broken_tools, run_all

    of = {f.id: [f.claim] for f in broken_tools()}
    folder = Path(tempfile.mkdtemp(prefix="apr-suite-"))
    try:
        rows: list[dict[str, Any]] = [dict(row) for row in run_all(folder)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [{"klass": row["id"], "claims": of.get(row["id"], []), **row} for row in rows]

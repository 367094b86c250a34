"""
How often a diagnosis names the planted cause: every defect of a file or of a backend, every legal oddity, and pairs.

Files get random names, lose their metadata, and are diagnosed in another process, which has never seen the zoo and is
replaced every so many files. A fault of a backend is a hook, so its model is wrapped and explained here.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from apr_core.diagnose.backend import explain_backend
from apr_core.diagnose.behind import explain_copies
from apr_core.diagnose.cause import NOTHING, Cause, Chain, Diagnosis
from apr_core.diagnose.explain import explain_failure
from apr_core.diagnose.rates import explain_rate
from apr_core.engines.subject import Subject, obtain, resolve_model
from apr_core.engines.wrap import At, Hook, wrap
from apr_core.errors import AprError, UsageError
from apr_core.falsify.finding import ACTS
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.rosetta.copies import tampered
from apr_core.zoo.draft import Draft, put_together, take_apart
from apr_core.zoo.held_out import HELD_OUT, UNSEEN
from apr_core.zoo.matrix import HEALTHY, find
from apr_core.zoo.meter import METER_FAULTS, MeterFault
from apr_core.zoo.registry import Benign, Defect, NotApplicable, Recipe, load_zoo

PAIRS, SEED, FILES_PER_PROCESS = 100, 9, 50
PARTS = ("reference", "alone", "benign", "pair", "backend", "copies", "meter", "held out", "unseen")
HELD = {"held out": HELD_OUT, "unseen": UNSEEN}
# What the issue asks for: share of classes right, share of places right among those; no alarm on a legal oddity.
TARGETS = {"reference": 0.95, "place": 0.95, "alone": 0.80, "benign": 1.0, "pair one": 0.90, "pair both": 0.60}
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """
    One planted item and what was said about it.

    Attributes:
        id: The item's, two ids for a pair.
        kind: One of ``PARTS``.
        wanted: Planted causes.
        found: Causes that were named, the first one first; ``nothing to explain`` or ``unexplained`` where none was.
        right: Whether the first is the planted one; for a pair how many of both were named.
        placed: Whether it was found in the right tensor or activation; None where the fault has no such place.
        seconds: Of the diagnosis; once in fifty files the start of a process is in it.
        answer: What the deciding experiment said.
    """

    id: str
    kind: str
    wanted: tuple[str, ...]
    found: tuple[str, ...]
    right: int
    placed: bool | None
    seconds: float
    answer: str = ""


def measure(model: str | Path, *, quick: bool = False, progress: Progress | None = None) -> list[Case]:
    """
    Diagnose everything that can be planted on a model.

    Args:
        model: A healthy model; also the reference.
        quick: Take every sixteenth item, and pairs in proportion.
        progress: Called with a line for each item.
    """
    cases = []
    for part in PARTS:
        for case in measure_part(model, part, step=16 if quick else 1):
            cases.append(case)
            if progress is not None:
                progress(f"{case.kind} {case.id}: {', '.join(case.found)}, {case.seconds:.1f} s")
    return cases


def measure_part(model: str | Path, part: str, *, step: int = 1) -> Iterator[Case]:
    """Diagnose one of ``PARTS``, every ``step``-th item of it."""
    path = resolve_model(str(model)).resolve()
    zoo = load_zoo()
    files = [d for d in zoo.defects.values() if d.recipe is not None]
    oddities = [HEALTHY, *(b for b in zoo.benign.values() if b.hook is None)]
    everything: list[Defect | Benign] = [*zoo.defects.values(), *zoo.benign.values()]
    subject = obtain(str(path), device="cpu")
    draft = take_apart(subject.checkpoint)
    if part == "backend":
        yield from (_backend(item, subject) for item in [i for i in everything if i.hook is not None][::step])
    if part in HELD:
        yield from (_backend(item, subject, part) for item in [i for i in HELD[part] if i.hook is not None][::step])
    subject.close()
    if part == "copies":
        yield from (_copies(item, path) for item in [d for d in zoo.defects.values() if d.tamper is not None][::step])
    if part == "meter":
        yield from (_meter(fault, path) for fault in METER_FAULTS[::step])
    if part in ("backend", "copies", "meter"):
        return
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=FILES_PER_PROCESS) as pool:
        if part == "pair":
            drawn = np.random.default_rng(SEED)
            for _ in range(PAIRS // step):
                first, second = (files[i] for i in drawn.choice(len(files), 2, replace=False))
                yield from _pair(first, second, draft, path, pool)
            return
        chosen: list[Defect | Benign] = [*files] if part != "benign" else [*oddities]
        chosen = [d for d in HELD[part] if d.recipe is not None] if part in HELD else chosen
        for item in chosen[::step]:
            if part != "alone" or (isinstance(item, Defect) and not item.invisible_alone):
                yield from _single(item, part, draft, path, pool)


def _single(item: Defect | Benign, kind: str, draft: Draft, reference: Path, pool: Executor) -> Iterator[Case]:
    """Plant one item and diagnose it; nothing where the model cannot have it."""
    alone = kind == "alone" or (isinstance(item, Benign) and (item.twin or item.alone))
    planted = plant([item.recipe] if item.recipe else [], draft)
    if planted is None:
        return
    folder, path, touched = planted
    body, seconds = diagnose(path, None if alone else reference, pool)
    shutil.rmtree(folder, ignore_errors=True)
    found = _classes(body)
    wanted = item.cause if isinstance(item, Defect) else NOTHING
    right = found[0] == wanted
    placed = body["tensor"] in touched if right and touched and body["tensor"] else None
    yield Case(item.id, kind, (wanted,), found, right, placed, seconds, str(body["experiment"]))


def _pair(first: Defect, second: Defect, draft: Draft, reference: Path, pool: Executor) -> Iterator[Case]:
    """Plant two defects in one file; nothing where the second does not find what the first has taken away."""
    planted = plant([r for r in (first.recipe, second.recipe) if r is not None], draft)
    if planted is None:
        return
    folder, path, _ = planted
    body, seconds = diagnose(path, reference, pool)
    shutil.rmtree(folder, ignore_errors=True)
    found = _classes(body)
    right = (first.cause in found) + (second.cause in found)  # two of one cause may be named once, as one damage
    wanted = (first.cause, second.cause)
    yield Case(f"{first.id} + {second.id}", "pair", wanted, found, right, None, seconds, str(body["experiment"]))


def plant(recipes: Sequence[Recipe], draft: Draft) -> tuple[Path, Path, tuple[str, ...]] | None:
    """
    Write a damaged model under a random name, without metadata.

    Returns:
        The folder to remove, the model in it, and the tensors that differ; None where the recipes do not apply.
    """
    damaged = draft.copy()
    damaged.stem = f"{secrets.token_hex(6)}.{{container}}"
    damaged.metadata = {}
    folder = Path(tempfile.mkdtemp(prefix="apr-"))
    try:
        with np.errstate(all="ignore"):
            for recipe in recipes:
                recipe(damaged)
            return folder, put_together(damaged, folder / secrets.token_hex(6)), tuple(draft.differing(damaged))
    except (NotApplicable, AprError, ValueError, KeyError, IndexError, OSError):
        # the second of two recipes may not find what the first has taken away
        shutil.rmtree(folder, ignore_errors=True)
        return None


def planted_copy(defect: str, folder: str, model: str = "pygmy") -> Path:
    """Write a model with one planted defect into ``folder``, for a person who wants to see it explained."""
    recipe = find(defect).recipe
    with open_checkpoint(resolve_model(model)) as checkpoint:
        planted = plant([recipe] if recipe else [], take_apart(checkpoint))
    if planted is None or recipe is None:
        raise UsageError(f"{defect} cannot be planted in a file of {model}", advice="see `apr zoo list`")
    made, path, _ = planted
    target = Path(folder) / path.name
    shutil.move(path, target)
    shutil.rmtree(made, ignore_errors=True)
    return target


def diagnose(path: Path, reference: Path | None, pool: Executor) -> tuple[dict[str, Any], float]:
    """Diagnose in a process that has never seen the zoo; an error there names nothing."""
    started = time.monotonic()
    try:
        body = pool.submit(explain_failure, path, reference=reference).result().as_json()
    except AprError as error:
        body = Diagnosis("error").as_json() | {"experiment": f"{type(error).__name__}: {error.message}"}
    return body, round(time.monotonic() - started, 3)


def _classes(body: Mapping[str, Any]) -> tuple[str, ...]:
    if not body["class"]:
        return (str(body["outcome"]),)
    return (body["class"], *(other["class"] for other in body["others"]))


def _copies(item: Defect, path: Path) -> Case:
    """Explain our own copies of a healthy file while a converter is broken."""
    assert item.tamper is not None
    with closing(obtain(str(path), device="cpu")) as subject, tampered(item.tamper):
        started = time.monotonic()
        causes = explain_copies(subject, Chain())
        return _case(item.id, "copies", item.cause, causes, started)


def _meter(fault: MeterFault, path: Path) -> Case:
    """Explain what a run says while its meter, or the engine that it times, is broken."""
    wanted = "meter" if fault.id.startswith(("meter", "claimed")) else "backend-kernel"
    with closing(obtain(str(path), device="cpu")) as subject, fault.plant():
        finding = ACTS[fault.claim](subject)
    started = time.monotonic()
    causes = explain_rate(fault.claim, finding.rows, finding.judge()[1])
    return _case(fault.id, "meter", wanted, causes, started)


def _case(
    id_: str, kind: str, wanted: str, causes: Sequence[Cause], started: float, placed: bool | None = None
) -> Case:
    found = tuple(c.klass for c in causes) or (NOTHING,)
    seconds = round(time.monotonic() - started, 3)
    answer = causes[0].found if causes else ""
    return Case(id_, kind, (wanted,), found, found[0] == wanted, placed, seconds, answer)


def _backend(item: Defect | Benign, subject: Subject, kind: str = "") -> Case:
    """Explain one fault of a backend; its place is the first activation that the hook changes."""
    assert item.hook is not None
    touched: list[str] = []
    hook = _noted(item.hook(subject.model.config), touched)
    started = time.monotonic()
    with np.errstate(all="ignore"):
        causes = explain_backend(wrap(subject.model, hook), subject.plain, subject.stimulus(96).ids, Chain())
    wanted = item.cause if isinstance(item, Defect) else NOTHING
    # what is fed shows in the first thing that is computed from it
    places = {"layers.0.q" if name == "ids" else name for name in touched}
    placed = causes[0].op in places if causes and causes[0].klass == wanted else None
    return _case(
        item.id, kind or ("backend" if isinstance(item, Defect) else "benign"), wanted, causes, started, placed
    )


def _noted(hook: Hook, touched: list[str]) -> Hook:
    """Note which activations a hook changes first: of each forward the first."""
    state = {"open": True}

    def noting(name: str, values: np.ndarray[Any, np.dtype[np.float32]], at: At) -> Any:
        if name == "ids":
            state["open"] = True
        changed = hook(name, values, at)
        if state["open"] and changed is not None and not np.array_equal(changed, values, equal_nan=True):
            touched.append(name)
            state["open"] = False
        return changed

    return noting


def summarise(cases: Sequence[Case]) -> dict[str, Any]:
    """Count: rates against their targets, the confusion of causes, what was missed, and times."""
    of = {kind: [c for c in cases if c.kind == kind] for kind in PARTS}
    planted = [*of["reference"], *of["backend"]]
    placed = [c.placed for c in planted if c.placed is not None]
    rates = {
        "reference": _share([c.right > 0 for c in planted]),
        "place": _share(placed),
        "alone": _share([c.right > 0 for c in of["alone"]]),
        "benign": _share([c.right > 0 for c in of["benign"]]),
        "pair one": _share([c.right > 0 for c in of["pair"]]),
        "pair both": _share([c.right > 1 for c in of["pair"]]),
        **{kind: _share([c.right > 0 for c in of[kind]]) for kind in ("copies", "meter", *HELD)},
        **{f"{kind} place": _share([c.placed for c in of[kind] if c.placed is not None]) for kind in HELD},
    }
    confusion = Counter((c.wanted[0], c.found[0]) for c in planted)
    alone = Counter((c.wanted[0], c.found[0]) for c in of["alone"])
    missed = [asdict(c) for c in cases if c.kind != "pair" and not c.right]
    return {
        "counts": {kind: len(rows) for kind, rows in of.items()},
        "rates": rates,
        "targets": TARGETS,
        "met": {name: (rates[name] or 0.0) >= target for name, target in TARGETS.items()},
        "seconds": {
            kind: {"median": round(median(c.seconds for c in rows), 3), "max": max(c.seconds for c in rows)}
            for kind, rows in of.items()
            if rows
        },
        "confusion": [{"planted": a, "named": b, "count": n} for (a, b), n in sorted(confusion.items())],
        "confusion_alone": [{"planted": a, "named": b, "count": n} for (a, b), n in sorted(alone.items())],
        "missed": missed,
        "misplaced": [c.id for c in planted if c.placed is False],
    }


def _share(held: Sequence[bool]) -> float | None:
    return round(sum(held) / len(held), 4) if held else None

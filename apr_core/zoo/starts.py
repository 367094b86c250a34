"""
Faults of the start of an action: a receipt of a model that is another by now, a command without its gate, a model that
is larger than where it is to live.

Each fault starts `apr run` as a person does, with the fault planted, and returns the exit code.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from apr_core.contract import receipt
from apr_core.contract.admit import admit
from apr_core.contract.types import Validated
from apr_core.engines import streaming
from apr_core.engines.streaming import Estimate, Plan
from apr_core.engines.streaming import choose as honest_choice
from apr_core.engines.subject import BUNDLED
from apr_core.errors import Exit
from apr_core.model.linear import Place
from apr_core.zoo.suite import SuiteFault

TAIL = 4096  # bytes at the end of the weights that become NaN
PROMPT = "What is 7-3?"


def _apr(*words: str) -> int:
    """Call the command line, which lies above the zoo, without its output."""
    quiet = (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()))
    with quiet[0], quiet[1]:
        return int(import_module("apr_core.cli.app").main(list(words)))


def stale(change: Callable[[Path], object]) -> Callable[[Path], int]:
    """Change a model that has a receipt, then start an action on it."""

    def run(folder: Path) -> int:
        model = folder / "model"
        shutil.copytree(BUNDLED["pygmy"], model)
        with patch.dict(os.environ, APR_CACHE=str(folder / "cache")), patch.object(receipt, "SETTLED_NS", 0):
            for _ in range(2):
                admission = receipt.admit_by_receipt(model)
                admission.checkpoint.close()
            if admission.receipt is None:  # a receipt that is never used would show nothing
                return int(Exit.OK)
            change(model)
            return _apr("run", str(model), PROMPT)

    return run


def ungated(edit: Callable[[Any], Mapping[str, Any]]) -> Callable[[Path], int]:
    """Change the registry of the gate, then start an action on a broken model."""

    def run(folder: Path) -> int:
        dispatch = import_module("apr_core.cli.dispatch")
        shutil.copytree(BUNDLED["pygmy"], folder / "model")
        rewrite(folder / "model")
        with patch.object(dispatch, "COMMANDS", {**dispatch.COMMANDS, **edit(dispatch)}):
            return _apr("run", str(folder / "model"), PROMPT)

    return run


def too_small(choose: Callable[..., Plan] = honest_choice) -> Callable[[Path], int]:
    """Start an action on a device that holds the head and one layer, with another way to choose the mode."""

    def run(folder: Path) -> int:
        held, honest = 0, Place.take

        def let_go(nbytes: int) -> None:
            nonlocal held
            held -= nbytes

        def take(place: Place, tensor: Validated) -> torch.Tensor:
            nonlocal held
            taken = honest(place, tensor)
            held += taken.nbytes
            weakref.finalize(taken, let_go, taken.nbytes)
            if held > room:
                raise torch.OutOfMemoryError(f"{held} bytes asked for, {room} there")
            return taken

        with admit(BUNDLED["pygmy"]).checkpoint as checkpoint:
            found = streaming.estimate(admit(checkpoint).require())
        room = found.head + found.layer + found.norm
        budget = str((found.full + found.streaming(0)) // 2 * 10 // 9 // streaming.MB)
        with patch.object(Place, "take", take), patch.object(streaming, "choose", choose):
            return _apr("run", "pygmy", PROMPT, "-n", "1", "--device", "cpu", "--budget-mb", budget)

    return run


def _all_at_once(found: Estimate, budget_bytes: int, *, ahead: int = 1) -> Plan:
    return Plan("full", "nobody asked how much memory there is", found, budget_bytes)


def _half_counted(found: Estimate, budget_bytes: int, *, ahead: int = 1) -> Plan:
    return honest_choice(replace(found, layers=found.layers // 2), budget_bytes, ahead=ahead)


def rewrite(model: Path) -> None:
    """Fill the end of the weights with NaN in place, and set the dates back."""
    _break(model / "model.safetensors")


def _break(weights: Path) -> None:
    dates = weights.stat()
    with weights.open("r+b") as stream:
        stream.seek(-TAIL, os.SEEK_END)
        stream.write(b"\xff" * TAIL)
    os.utime(weights, ns=(dates.st_atime_ns, dates.st_mtime_ns))


def _move(model: Path) -> None:
    other = model / "other"
    shutil.copy2(model / "model.safetensors", other)
    _break(other)
    other.replace(model / "model.safetensors")


def _lose_config(model: Path) -> None:
    path = model / "config.json"
    body = json.loads(path.read_text(encoding="utf-8"))
    body.pop("rope_parameters", None)
    path.write_text(json.dumps({**body, "rope_theta": 10000.0}), encoding="utf-8")


_SOURCE = "peers C7, apr.md 3.1"
START_FAULTS = (
    SuiteFault("stale-receipt", "a receipt of a model that was rewritten in place", _SOURCE, stale(rewrite)),
    SuiteFault("stale-receipt-moved", "a receipt of a file that another was moved over", _SOURCE, stale(_move)),
    SuiteFault("stale-receipt-config", "a receipt of another configuration", _SOURCE, stale(_lose_config)),
    SuiteFault("skipped-command", "an action without a class", "round 53", ungated(lambda d: {"run": None})),
    SuiteFault(
        "skipped-action", "an action taken for a diagnostic", "round 53", ungated(lambda d: {"run": d.COMMANDS["qa"]})
    ),
    SuiteFault(
        "skipped-model",
        "an action whose model is not named",
        "round 53",
        ungated(lambda d: {"run": d.CommandClass(d.Kind.ACTION)}),
    ),
    SuiteFault("memory-overflow", "a model beyond the memory, not streamed", "GH-201", too_small(_all_at_once)),
    SuiteFault("memory-half-counted", "an estimate of half of the layers", "GH-201", too_small(_half_counted)),
)

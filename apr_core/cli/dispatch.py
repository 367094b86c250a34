"""
The one gate before every action: what each command is, and who may start.

A command is an **action** (it acts on a model, so every model it names must be admitted first), a **diagnostic** (it
must work on a corrupt file, and gates inside, where it acts) or **none** (it takes no model, or makes one). `attach`
puts the gate in front of every leaf of the command tree, and the gate's own options behind every action, so no command
can leave them out; one without a row here does not start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apr_core.errors import UsageError

if TYPE_CHECKING:
    from apr_core.contract.admit import Admission


class Kind(StrEnum):
    """What a command does to a model."""

    ACTION = "action"
    DIAGNOSTIC = "diagnostic"
    NONE = "none"


@dataclass(frozen=True)
class CommandClass:
    """
    The class of one command.

    Attributes:
        kind: As the module says.
        models: Parameters that name a model, for an action; each one that is given is admitted before it starts.
    """

    kind: Kind
    models: tuple[str, ...] = ()


def _action(*models: str) -> CommandClass:
    return CommandClass(Kind.ACTION, models)


_DIAGNOSTIC = CommandClass(Kind.DIAGNOSTIC)
_NONE = CommandClass(Kind.NONE)

COMMANDS: Mapping[str, CommandClass] = {
    "run": _action("model"),
    "chat": _action("model"),
    "check": _action("model"),
    "trace": _action("model", "reference"),
    "parity": _action("model", "reference"),
    "eval": _action("model", "base", "finer"),
    "bench": _action("model"),
    "profile": _action("model"),
    "qa": _DIAGNOSTIC,
    "validate": _DIAGNOSTIC,
    "inspect": _DIAGNOSTIC,
    "tensors": _DIAGNOSTIC,
    "lint": _DIAGNOSTIC,
    "explain": _DIAGNOSTIC,
    "diagnose": _DIAGNOSTIC,
    "canary create": _DIAGNOSTIC,
    "canary check": _DIAGNOSTIC,
    "convert": _action("source"),
    "import": _action("source"),
    "export": _action("source"),
    "rosetta convert": _action("source"),
    "rosetta chain": _action("source"),
    "rosetta verify": _action("source", "against"),
    "rosetta compare-inference": _action("a", "b"),
    "diff": _DIAGNOSTIC,
    "rosetta inspect": _DIAGNOSTIC,
    "rosetta diff-tensors": _DIAGNOSTIC,
    "rosetta fingerprint": _DIAGNOSTIC,
    "rosetta validate-stats": _DIAGNOSTIC,
    "suite": _DIAGNOSTIC,
    "lab": _DIAGNOSTIC,
    "zoo matrix": _DIAGNOSTIC,
    "zoo plant": _DIAGNOSTIC,
    "zoo run": _DIAGNOSTIC,
    "zoo diagnose": _DIAGNOSTIC,
    "zoo rounds": _NONE,
    "zoo list": _NONE,
    "report page": _NONE,
    "report compare": _NONE,
    "report trend": _NONE,
    "tools": _NONE,
    "synth": _NONE,
}


SkipContract = Annotated[
    bool,
    typer.Option("--skip-contract", help="Run a refused model all the same; marks every output. Diagnosis ignores it."),
]
Recheck = Annotated[
    bool, typer.Option("--recheck", help="Read every weight again, whatever the receipt of an earlier start says.")
]


def attach(root: Any) -> Any:
    """
    Put the gate in front of every leaf of a command tree, and its options behind every action.

    Args:
        root: The click group that typer built.

    Returns:
        The same group.
    """
    for path, leaf in leaves(root):
        entry, own = COMMANDS.get(path), {param.name for param in leaf.params}
        added = [p for p in _gate_options() if p.name not in own] if entry and entry.kind is Kind.ACTION else []
        leaf.params.extend(added)
        leaf.invoke = partial(_dispatch, path, leaf.invoke, frozenset(param.name for param in added))
    return root


def _gate_options() -> list[Any]:
    """Build the options as typer builds them, by a command that has nothing else."""

    def carrier(skip_contract: SkipContract = False, recheck: Recheck = False) -> None: ...

    app = typer.Typer(add_completion=False)
    app.command()(carrier)
    return [param for param in typer.main.get_command(app).params if param.name in ("skip_contract", "recheck")]


def leaves(group: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every command that is no group, with the words that call it."""
    for name, command in group.commands.items():
        words = f"{path} {name}".strip()
        if hasattr(command, "commands"):
            yield from leaves(command, words)
        else:
            yield words, command


def admission_of(context: Any, parameter: str = "model") -> Admission:
    """
    Return the admission that the gate made of a model parameter of the running action.

    Raises:
        KeyError: The parameter is not among the models of the command's class, or was not given.
    """
    admission: Admission = context.obj["admissions"][parameter]
    return admission


def _dispatch(path: str, proceed: Any, added: frozenset[str], context: Any) -> Any:
    """Start a command, its models admitted first when it is an action."""
    entry = COMMANDS.get(path)
    if entry is None:
        raise UsageError(f"the command {path} has no class, so it does not start", advice="give it one in cli/dispatch")
    context.ensure_object(dict)
    # beside the bypass that stands before the command, the one behind it counts as well
    skip = bool(context.obj.get("skip_contract")) or bool(context.params.get("skip_contract"))
    recheck = bool(context.params.get("recheck"))
    for name in added:  # they are the gate's: the command's function does not take them
        context.params.pop(name, None)
    context.obj["skip_contract"] = skip
    if entry.kind is Kind.ACTION:
        _require_device(context.params.get("device"))  # before minutes of judging
        given = {name: context.params.get(name) for name in entry.models}
        context.obj["admissions"] = {
            name: gate(str(model), skip=skip, recheck=recheck) for name, model in given.items() if model
        }
    return proceed(context)


def _require_device(device: str | None) -> None:
    from apr_core.engines.load import DEVICES, engine_for

    if device is not None and device != "auto":
        if device not in DEVICES:
            raise UsageError(f"expected a device of auto, {', '.join(DEVICES)}, found {device!r}")
        engine_for("reference", device)


def gate(model: str, *, skip: bool, recheck: bool = False) -> Admission:
    """
    Admit a model, or refuse to start.

    Raises:
        NotFound, FormatError, UsageError, LoadError, ReadWriteError: It cannot be opened.
        ContractViolation: A gate refuses it.
    """
    from apr_core.cli.output import note
    from apr_core.cli.progress import progress
    from apr_core.contract.receipt import admit_by_receipt
    from apr_core.engines.subject import resolve_model

    with progress("measuring") as step:
        admission = admit_by_receipt(
            resolve_model(model), skip=skip, recheck=recheck, progress=lambda done, total, _: step(done, total)
        )
    admission.require()
    if admission.receipt is not None:
        note("contract: admitted by receipt, which guards against accident; --recheck reads every weight")
    if skip:
        found = len(admission.violations)
        note(f"contract bypassed (--skip-contract): {found} violations are ignored; nothing can be concluded from this")
    return admission

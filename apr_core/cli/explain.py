"""``apr explain``: what a code means: a gate, a claim, an error, an exit code, a planted defect, a root cause."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from apr_core.errors import AprError, Exit, UsageError

_EXITS = {
    Exit.OK: ("nothing was refuted", "nothing to do"),
    Exit.UNEXPECTED: ("something that nobody foresaw", "run `apr --debug ...` and report the traceback"),
    Exit.USAGE: ("the call itself is wrong", "read `apr COMMAND --help`"),
    Exit.NOT_FOUND: ("there is no such file", "check the path"),
    Exit.FORMAT: ("not a model file, or a malformed one", "read the message; get a fresh copy of the file"),
    Exit.REFUTED: ("a gate, a claim or an --assert-... failed", "see the violations with `apr validate MODEL`"),
    Exit.LOAD: ("a companion is missing, or the model is too large", "copy what the message names beside the weights"),
    Exit.IO: ("the operating system refused to read or write", "check permissions and free space"),
    Exit.INFERENCE: ("a forward pass or a generation failed", "look for the first layer that is not finite"),
    Exit.UNAVAILABLE: ("a feature or a device that was asked for is not there", "ask for another device"),
    Exit.NETWORK: ("a network that was needed did not answer", "try again, or give a local file"),
    Exit.INCONCLUSIVE: ("nothing was refuted, and not enough was shown", "read which checks were not run, and why"),
}


def explain(
    code: Annotated[
        str, typer.Argument(metavar="[CODE]", help="A gate, claim, error, exit code, defect or cause; all if left out.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print strict JSON.")] = False,
) -> None:
    """Say what a code means. What breaks it, and what to do next."""
    from apr_core.cli.output import show, show_json, show_table

    table = catalogue()
    if not code:
        rows = [{"code": key, "kind": e["kind"], "says": e["says"]} for key, found in table.items() for e in found[:1]]
        if as_json:
            show_json({"codes": rows})
        else:
            show_table(("code", "kind", "says"), [tuple(row.values()) for row in rows])
        return
    entries = _look_up(table, code)
    if as_json:
        show_json({"code": code, "entries": entries})
        return
    for entry in entries:
        show(f"{entry['code']}: {entry['says']}")
        for key, value in entry.items():
            if key not in ("code", "says") and value not in ("", [], ()):
                said = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
                show(f"  {key.replace('_', ' '):12} {said}")


def _look_up(table: dict[str, list[dict[str, Any]]], code: str) -> list[dict[str, Any]]:
    """
    Return what is known of a code, whatever its case.

    Raises:
        UsageError: Nothing is; near ones are named.
    """
    from difflib import get_close_matches

    known = {key.lower(): key for key in table}
    if code.lower() in known:
        return table[known[code.lower()]]
    near = [key for low, key in known.items() if low.startswith(code.lower())][:5]
    near = near or [known[key] for key in get_close_matches(code.lower(), known, n=3, cutoff=0.5)]
    meant = f"did you mean {', '.join(near)}? " if near else ""
    raise UsageError(f"nothing is known of {code!r}", advice=f"{meant}`apr explain` lists every code")


def catalogue() -> dict[str, list[dict[str, Any]]]:
    """Collect every code with what is known of it: a gate's rows and the claim of the same id stand together."""
    table: dict[str, list[dict[str, Any]]] = {}
    for entry in (*_gates(), *_claims(), *_lints(), *_errors(), *_exits(), *_causes(), *_defects()):
        table.setdefault(entry["code"], []).append(entry)
    return table


def _gates() -> Iterator[dict[str, Any]]:
    from apr_core.contract.gates import load_gates

    for gate in load_gates().gates:
        sign = "at most" if gate.direction == "at_most" else "at least"
        yield {
            "code": gate.id,
            "says": gate.says.replace("{measured}", "N").replace("{limit}", f"{gate.threshold:g}"),
            "kind": "gate",
            "rule": gate.rule,
            "limit": f"{sign} {gate.threshold:g} {gate.unit}".strip(),
            "of": gate.applies_to,
            "not_of": gate.exempt,
            "families": getattr(gate, "families", ()),
            "severity": gate.severity,
            "bypass": "--skip-contract may run it" if gate.waivable else "cannot be bypassed: there is nothing to run",
            "source": gate.source,
            "next": "see every violation with `apr validate MODEL`",
        }


def _claims() -> Iterator[dict[str, Any]]:
    from apr_core.falsify.claims import load_claims

    for claim in load_claims().values():
        sign = "at most" if claim.direction == "at_most" else "at least"
        yield {
            "code": claim.id,
            "says": claim.statement,
            "kind": "claim",
            "prediction": claim.prediction,
            "falsifier": claim.falsifier,
            "limit": f"{claim.metric} {sign} {claim.threshold:g} {claim.unit}",
            "severity": claim.severity,
            "needs": claim.needs,
            "source": claim.source,
            "argued_in": f"notebooks/{claim.notebook}.ipynb",
            "next": "try to refute it with `apr qa MODEL --claims`, or run its notebook with `apr suite`",
        }


def _lints() -> Iterator[dict[str, Any]]:
    from apr_core.cli.lint import RULES

    for name, (level, do, rule) in RULES.items():
        yield {"code": name, "says": rule.__doc__ or "", "kind": "lint rule", "level": level, "next": do}


def _errors() -> Iterator[dict[str, Any]]:
    from inspect import getdoc

    errors: list[type[AprError]] = [AprError, *AprError.__subclasses__()]
    for error in errors:
        said = (getdoc(error) or "").split("\n\n")[0].replace("\n", " ")
        yield {
            "code": error.__name__,
            "says": said,
            "kind": "error",
            "exit_code": int(error.exit_code),
            "next": _EXITS[error.exit_code][1],
        }


def _exits() -> Iterator[dict[str, Any]]:
    for code, (says, following) in _EXITS.items():
        yield {"code": str(int(code)), "says": says, "kind": "exit code", "next": following}


def _causes() -> Iterator[dict[str, Any]]:
    from apr_core.diagnose.cause import CAUSES
    from apr_core.zoo.registry import load_zoo

    for cause in CAUSES:
        planted = [d.id for d in load_zoo().defects.values() if d.cause == cause]
        says = f"a root cause that {len(planted)} planted defects have"
        yield {"code": cause, "says": says, "kind": "cause", "defects": planted}


def _defects() -> Iterator[dict[str, Any]]:
    from apr_core.zoo.registry import load_zoo

    for defect in load_zoo().defects.values():
        yield {
            "code": defect.id,
            "says": defect.what,
            "kind": "defect",
            "class": defect.klass,
            "cause": defect.cause,
            "killed_by": defect.kills,
            "source": defect.source,
            "next": f"hold it in the hand with `apr zoo plant {defect.id} pygmy DIR`" if defect.recipe else "",
        }

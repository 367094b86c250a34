"""``apr validate``: judge files, list every violation, and say how much was judged; a CI job reads the exit code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apr_core.errors import AprError, Exit

if TYPE_CHECKING:
    from apr_core.contract.gates import Gate
    from apr_core.contract.types import Admission

# Rules that look at the header of a tensor; every other rule of a tensor needs its values.
_OF_HEADERS = ("shape", "byte_difference", "element_type", "switched_off")
# When several models end differently: a broken program, then an unreadable file, then a refused one.
_WORST = (Exit.UNEXPECTED, Exit.FORMAT, Exit.LOAD, Exit.IO, Exit.NOT_FOUND, Exit.USAGE, Exit.REFUTED)


def validate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Model files or folders, or 'pygmy'.", show_default=False)
    ],
    quality: Annotated[
        bool, typer.Option("--quality", help="Show each rule: its limit, how many it judged, how many failed.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse what is only told otherwise: tensors outside the contract.")
    ] = False,
    min_score: Annotated[
        float | None,
        typer.Option("--min-score", min=0, max=100, metavar="PERCENT", help="Least share of checks that must pass."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print strict JSON.")] = False,
) -> None:
    """Judge files by every gate. All violations are listed; exit 5 when a file is refused."""
    from apr_core.cli.output import show_json

    judge = judgement if len(models) == 1 else _attempt
    bodies = [judge(model, strict=strict, min_score=min_score) for model in models]
    codes = [Exit(body["exit_code"]) for body in bodies]
    if as_json:
        show_json(bodies[0] if len(bodies) == 1 else {"models": bodies})
    else:
        for body in bodies:
            show_judgement(body, quality=quality)
    raise typer.Exit(next((code for code in _WORST if code in codes), max(codes)))


def _attempt(model: str, *, strict: bool, min_score: float | None) -> dict[str, Any]:
    """Judge one of the models; what cannot be opened does not keep the others from being judged."""
    from apr_core.cli.output import note

    try:
        return judgement(model, strict=strict, min_score=min_score)
    except AprError as error:
        note(f"error: {error}")
        return {"model": model, "admitted": False, "error": str(error), "exit_code": error.exit_code}


def judgement(model: str, *, strict: bool = False, min_score: float | None = None) -> dict[str, Any]:
    """
    Judge a model by the contract.

    Args:
        model: Path, or ``pygmy``.
        strict: Refuse tensors outside the contract too.
        min_score: Least share of the executed checks that must pass, in percent.

    Returns:
        model, format, admitted, refused_for (of the demands beyond the gates), exit_code, gate_version, tensors
        (measured, expected, passed), checks (executed, passed, score), gates (id -> number of violations, in the order
        of judging), rules (gate, rule, limit, unit, applies_to, checked, failed), violations, extras.

    Raises:
        AprError: The file cannot be opened, or has no config.
    """
    from apr_core.cli.progress import progress
    from apr_core.contract.admit import admit
    from apr_core.engines.subject import resolve_model

    path = resolve_model(model)
    with progress("measuring") as step:
        admission = admit(path, progress=lambda done, total, _: step(done, total))
    with admission.checkpoint as checkpoint:
        rules = breakdown(admission)
        executed, failed = sum(r["checked"] for r in rules), sum(r["failed"] for r in rules)
        score = 100 * (executed - failed) / executed if executed else 0.0
        refused_for = [f"{len(admission.extras)} tensors outside the contract (--strict)"] if strict else []
        refused_for = refused_for if admission.extras else []
        if min_score is not None and not score >= min_score:
            refused_for.append(f"{score:.4g} % of the checks passed, at least {min_score:g} % (--min-score)")
        gates: dict[str, int] = {}
        for violation in admission.violations:
            gates[violation.gate] = gates.get(violation.gate, 0) + 1
        broken = {name for v in admission.violations for name in (v.tensor, *v.names)}
        return {
            "model": str(path),
            "format": checkpoint.format,
            "admitted": admission.ok,
            "refused_for": refused_for,
            "exit_code": Exit.OK if admission.ok and not refused_for else Exit.REFUTED,
            "gate_version": admission.gate_version,
            "tensors": {
                "measured": admission.measured,
                "expected": admission.expected,
                "passed": sum(name not in broken for name in admission.stats),
            },
            "checks": {"executed": executed, "passed": executed - failed, "score": score},
            "gates": gates,
            "rules": rules,
            "violations": [_violation(v) for v in admission.violations],
            "extras": admission.extras,
        }


def _violation(v: Any) -> dict[str, Any]:
    fields = ("gate", "tensor", "rule", "measured", "limit", "unit", "message", "names", "about")
    return {field: getattr(v, field) for field in fields}


def breakdown(admission: Admission) -> list[dict[str, Any]]:
    """
    Count, rule by rule, what was judged and what failed; a rule that nothing in this model asks has checked 0.

    One check is one rule on one tensor, or on the model, its config or its file. Completeness is one check for each
    tensor that must be there.
    """
    from apr_core.contract.gates import load_gates

    rows: list[dict[str, Any]] = []
    for gate in load_gates().gates:
        own = [v for v in admission.violations if (v.gate, v.rule, v.limit) == (gate.id, gate.rule, gate.threshold)]
        failed = sum(max(1, len(v.names)) for v in own) if gate.rule == "missing" else len(own)
        checked = _checked(gate, admission)
        rows.append(
            {
                "gate": gate.id,
                "rule": gate.rule,
                "applies_to": gate.applies_to,
                "direction": gate.direction,
                "limit": gate.threshold,
                "unit": gate.unit,
                "checked": max(checked, failed),
                "failed": failed,
            }
        )
    return rows


def _checked(gate: Gate, admission: Admission) -> int:
    from apr_core.contract.layout import HEAD, KINDS

    geometry = admission.geometry
    if geometry is None:  # the config does not say what the model should be: that one rule was judged, and data
        return 1 if gate.rule == "config_keys" else 0
    if gate.families and geometry.family not in gate.families:
        return 0
    if gate.rule == "missing":
        return admission.expected
    if gate.rule == "head_differs":
        return int(geometry.tied and HEAD in admission.checkpoint.tensors)
    if gate.applies_to[0] not in KINDS:
        return 0 if "generation" in gate.applies_to else 1
    names: Sequence[str] = tuple(admission.checkpoint.tensors if gate.rule in _OF_HEADERS else admission.stats)
    roles = (geometry.role_of(name) for name in names)
    return sum(role is not None and role.kind in gate.applies_to for role in roles)


def show_judgement(body: dict[str, Any], *, quality: bool = False) -> None:
    """Print a judgement for a person."""
    from apr_core.cli.output import show, show_table

    if "error" in body:
        show(f"{body['model']}: not judged, exit {int(body['exit_code'])}")
        return
    for gate, count in body["gates"].items():
        show(f"{gate}: {count} violation{'s' * (count != 1)}")
        for v in body["violations"]:
            if v["gate"] == gate:
                show(f"  {v['tensor'] or v['about']}: {v['message']}")
    if body["extras"]:
        show(f"outside the contract, used by nothing: {', '.join(body['extras'])}")
    if quality:
        signs = {"at_most": "<=", "at_least": ">="}
        rows = [
            (
                r["gate"],
                r["rule"],
                f"{signs[r['direction']]} {r['limit']:g} {r['unit']}".strip(),
                ", ".join(r["applies_to"]),
                r["checked"] or "none here",
                r["failed"],
            )
            for r in body["rules"]
        ]
        show_table(("gate", "rule", "limit", "of", "checked", "failed"), rows)
        checks = body["checks"]
        show(f"{checks['passed']} of {checks['executed']} checks passed, {checks['score']:.4g} %")
    measured, expected = body["tensors"]["measured"], body["tensors"]["expected"] or "an unknown number"
    tensors = len({v["tensor"] for v in body["violations"]})
    found = f"{len(body['violations'])} violations in {tensors} tensors"
    outcome = "admitted, no violation" if body["admitted"] else f"refused, {found}"
    for demand in body["refused_for"]:
        outcome += f"; refused: {demand}"
    show(f"{body['model']}: {outcome}; {measured} tensors measured of {expected} expected")

"""``apr validate``: judge a file and list every violation, gate by gate."""

from __future__ import annotations

from typing import Any

from apr_core.cli.output import show, show_json
from apr_core.cli.progress import progress
from apr_core.contract.admit import admit
from apr_core.engines.subject import resolve_model
from apr_core.errors import Exit


def judgement(model: str) -> dict[str, Any]:
    """
    Judge a model by the contract.

    Returns:
        model, format, admitted, gate_version, tensors (measured, expected), gates (id -> number of violations, in the
        order of judging), violations (gate, tensor, rule, measured, limit, unit, message, names), extras.

    Raises:
        AprError: The file cannot be opened, or has no config.
    """
    path = resolve_model(model)
    with progress("measuring") as step:
        admission = admit(path, progress=lambda done, total, _: step(done, total))
    with admission.checkpoint as checkpoint:
        gates: dict[str, int] = {}
        for violation in admission.violations:
            gates[violation.gate] = gates.get(violation.gate, 0) + 1
        return {
            "model": str(path),
            "format": checkpoint.format,
            "admitted": admission.ok,
            "gate_version": admission.gate_version,
            "tensors": {"measured": admission.measured, "expected": admission.expected},
            "gates": gates,
            "violations": [
                {
                    "gate": v.gate,
                    "tensor": v.tensor,
                    "rule": v.rule,
                    "measured": v.measured,
                    "limit": v.limit,
                    "unit": v.unit,
                    "message": v.message,
                    "names": v.names,
                }
                for v in admission.violations
            ],
            "extras": admission.extras,
        }


def show_judgement(body: dict[str, Any], *, as_json: bool) -> Exit:
    """Print a judgement; return 5 for a refused model, 0 otherwise."""
    code = Exit.OK if body["admitted"] else Exit.REFUTED
    if as_json:
        show_json(body)
        return code
    for gate, count in body["gates"].items():
        show(f"{gate}: {count} violation{'s' * (count != 1)}")
        for v in body["violations"]:
            if v["gate"] == gate:
                show(f"  {v['tensor'] or 'config'}: {v['message']}")
    if body["extras"]:
        show(f"outside the contract, used by nothing: {', '.join(body['extras'])}")
    measured, expected = body["tensors"]["measured"], body["tensors"]["expected"] or "an unknown number"
    tensors = len({v["tensor"] for v in body["violations"]})
    found = f"{len(body['violations'])} violations in {tensors} tensors"
    outcome = "admitted, no violation" if body["admitted"] else f"refused, {found}"
    show(f"{body['model']}: {outcome}; {measured} tensors measured of {expected} expected")
    return code

"""
Detection power: how small a random defect a claim still sees.

A planted defect shows that a claim can fail; this shows from where on. Recipes are drawn from a grammar of kind,
severity and seed; kind and seed alone choose the tensor and the places, so that draws of one seed differ in nothing but
their severity. A draw that changes no stored value (a factor below the resolution of BF16) is no defect and is not
counted.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apr_core.contract.admit import admit
from apr_core.engines.subject import Subject, obtain, resolve_model
from apr_core.falsify.claims import load_claims
from apr_core.falsify.finding import ACTS, load_acts
from apr_core.falsify.verdict import Verdict
from apr_core.zoo.draft import Draft, put_together, take_apart
from apr_core.zoo.registry import Recipe

KINDS = ("zeros", "noise", "scale", "permuted")
SEVERITIES: Mapping[str, Sequence[float]] = {
    "zeros": (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    "noise": (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    "scale": (1e-3, 1e-2, 3e-2, 1e-1, 1.0),
    "permuted": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
}
CLAIMS = ("F-DATA-QUALITY-001", "F-DATA-QUALITY-003", "F-GT-006", "F-GT-008", "F-GT-010", "F-PAR-008", "F-PAR-009")
# What needs no forward: for notebook 10.
QUICK = ("F-DATA-QUALITY-001", "F-DATA-QUALITY-003", "F-GT-010")


def draw(kind: str, severity: float, seed: int) -> Recipe:
    """
    Draw a recipe that damages one random tensor.

    Args:
        kind: ``zeros`` sets a share of the values to zero; ``noise`` adds a normal error of this share of the tensor's
            root mean square; ``scale`` multiplies by 1 + severity; ``permuted`` rotates a share of the rows.
        severity: The share, in 0 to 1.
        seed: With the kind, chooses the tensor and the places.

    Raises:
        KeyError: Unknown kind.
    """
    damage = _DAMAGE[kind]

    def recipe(draft: Draft) -> None:
        rng = np.random.default_rng([seed, KINDS.index(kind)])
        name = sorted(draft.weights)[int(rng.integers(len(draft.weights)))]
        draft.weights[name] = damage(draft.weights[name].copy(), severity, rng).astype(np.float32)

    return recipe


def _zeros(values: Any, severity: float, rng: np.random.Generator) -> Any:
    values.reshape(-1)[rng.permutation(values.size)[: max(1, round(severity * values.size))]] = 0
    return values


def _noise(values: Any, severity: float, rng: np.random.Generator) -> Any:
    return values + severity * float(np.sqrt(np.mean(values**2))) * rng.standard_normal(values.shape)


def _scale(values: Any, severity: float, rng: np.random.Generator) -> Any:
    return values * (1 + severity)


def _permuted(values: Any, severity: float, rng: np.random.Generator) -> Any:
    rows = rng.permutation(len(values))[: max(2, round(severity * len(values)))]
    values[rows] = values[np.roll(rows, 1)]
    return values


_DAMAGE: Mapping[str, Callable[[Any, float, np.random.Generator], Any]] = {
    "zeros": _zeros,
    "noise": _noise,
    "scale": _scale,
    "permuted": _permuted,
}


def power(
    model: str | Path,
    claims: Sequence[str] = CLAIMS,
    kinds: Sequence[str] = KINDS,
    severities: Mapping[str, Sequence[float]] = SEVERITIES,
    draws: int = 2,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, object]]:
    """
    Plant random defects in a healthy model and let claims look for them; the healthy model is the reference.

    Args:
        model: A healthy model, golden answers beside it where the claims ask for them.
        claims: Whose acts are tried.
        kinds: Of the grammar.
        severities: Kind -> severities, ascending.
        draws: Per kind and severity.
        seed: Of the first draw.
        progress: Called with (defects done, defects in all).

    Returns:
        Rows of claim, kind, severity, seen (draws that the claim refuted) and draws (that changed the file).

    Cost: on one core, 40 draws on pygmy take about 25 s with all claims and 2 s with ``QUICK``.
    """
    for claim in claims:
        load_acts(load_claims()[claim].notebook)
    reference = obtain(str(resolve_model(str(model))), device="cpu")
    healthy = take_apart(reference.checkpoint)
    grid = [(k, s) for k in kinds for s in severities[k]]
    rows: list[dict[str, object]] = []
    try:
        for n, (kind, severity) in enumerate(grid):
            seen, real = dict.fromkeys(claims, 0), 0
            for i in range(draws):
                killed = _killed(healthy, draw(kind, severity, seed + i), reference, claims)
                if progress is not None:
                    progress(n * draws + i + 1, len(grid) * draws)
                if killed is None:
                    continue
                real += 1
                for claim in killed:
                    seen[claim] += 1
            rows += [{"claim": c, "kind": kind, "severity": severity, "seen": seen[c], "draws": real} for c in claims]
    finally:
        reference.close()
    return rows


def _killed(healthy: Draft, recipe: Recipe, reference: Subject, claims: Sequence[str]) -> list[str] | None:
    """The claims that refute a planted file, looked at behind the contract; None when nothing stored has changed."""
    draft = healthy.copy()
    recipe(draft)
    folder = Path(tempfile.mkdtemp(prefix="apr-power-"))
    try:
        path = put_together(draft, folder / "model")
        subject = Subject(
            path, admit(path, skip=True), reference=reference, device="cpu", seed=reference.seed, max_new_tokens=64
        )
        try:
            if not _differs(subject, reference):
                return None
            return [c for c in claims if ACTS[c](subject).judge()[0] is Verdict.FALSIFIED]
        finally:
            subject.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _differs(subject: Subject, reference: Subject) -> bool:
    """Tell whether any tensor is stored otherwise; the header alone may differ between two writers."""
    left, right = subject.checkpoint, reference.checkpoint
    return any(not np.array_equal(left.raw(n).data, right.raw(n).data) for n in right.tensors)

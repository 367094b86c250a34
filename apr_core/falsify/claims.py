"""The claims table: what is asserted about a model, what would refute it, and the threshold that decides."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from apr_core.falsify.verdict import NEEDS, NotRun

# Digest of the thresholds: a limit edited without a version bump ends every run. Who moves one on purpose raises its
# version, writes a decision note and puts the digest of the test's message here.
PINNED = "c77e3ec4da95a7c2f2299acc36d8bca6615f5688f09412d7649b286f092e7ff2"
NOTEBOOKS = ("00_ground_truth", "10_contract_gates", "20_parity", "30_throughput")


@dataclass(frozen=True)
class Claim:
    """
    One refutable statement about a model file.

    Attributes:
        id: Stable name, e.g. ``F-GT-001``; gates keep the ids of the specification.
        version: Raised whenever statement or threshold changes.
        notebook: The notebook that argues it.
        title: A few words for tables.
        statement: What is claimed.
        prediction: What will be seen when the claim is true.
        falsifier: What would be seen when it is false.
        severity: 1 to 5; the weight in the score.
        round: The round of the specification that taught it.
        metric: Name of the measured value.
        unit: Its unit.
        direction: ``at_most`` or ``at_least`` the threshold.
        threshold: The limit.
        source: Where the limit comes from: bit-exactness, a measured noise floor, or a decision note.
        needs: What must be there for the claim to run; a missing one makes it NOT_RUN with its reason.
        on_refused: True for gates, which speak about a refused file too.
    """

    id: str
    version: int
    notebook: str
    title: str
    statement: str
    prediction: str
    falsifier: str
    severity: int
    round: int
    metric: str
    unit: str
    direction: str
    threshold: float
    source: str
    needs: tuple[str, ...] = ()
    on_refused: bool = False

    @property
    def limit(self) -> str:
        """The threshold as it is printed: ``<= 1e-05``."""
        return f"{'<=' if self.direction == 'at_most' else '>='} {self.threshold:g}"

    @property
    def suffix(self) -> str:
        """The unit as it follows a number; counts and ratios have none."""
        return "" if self.unit in ("count", "1") else f" {self.unit}"

    def required(self, reason: NotRun, asked: frozenset[str]) -> bool:
        """
        Say whether not running for ``reason`` leaves a hole in the round.

        A precondition that is absent excuses the claim, unless the person asked for it (``--device cuda``,
        ``--reference``): then the hole is theirs to see.
        """
        return any(need in asked for need in self.needs if NEEDS[need] is reason) or reason is NotRun.NOT_OPENED

    def as_json(self) -> dict[str, Any]:
        """The claim as plain values, tuples as lists."""
        return {**asdict(self), "needs": list(self.needs)}


@cache
def load_claims() -> Mapping[str, Claim]:
    """Read the table from package data (never from the working directory), in the order of the notebooks."""
    table = tomllib.loads(files("apr_core.falsify").joinpath("claims.toml").read_text(encoding="utf-8"))
    claims: dict[str, Claim] = {}
    for row in table["claim"]:
        claim = Claim(**{**row, "needs": tuple(row.get("needs", ()))})
        if claim.id in claims:
            raise ValueError(f"claims.toml holds {claim.id} twice: one of the two would never be judged")
        if claim.notebook not in NOTEBOOKS or not set(claim.needs) <= set(NEEDS):
            raise ValueError(f"claims.toml, {claim.id}: unknown notebook or need")
        claims[claim.id] = claim
    return claims


def claims_of(notebook: str) -> tuple[Claim, ...]:
    """The claims that one notebook argues, in order."""
    return tuple(c for c in load_claims().values() if c.notebook == notebook)


def threshold_digest() -> str:
    """
    Digest of every threshold with its version.

    ``PINNED`` holds what it must be: `conclude` refuses to judge by limits that were edited in silence.
    """
    rows = [(c.id, c.version, c.metric, c.unit, c.direction, c.threshold) for c in load_claims().values()]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

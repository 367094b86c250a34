"""What notebook 10 shows besides its claims: numbers by role, gates at their limits, cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apr_core.contract import gates
from apr_core.contract.gates import load_gates
from apr_core.engines.subject import obtain
from apr_core.zoo import portrait


def test_by_role(pygmy: Path) -> None:
    """Every tensor has its row, and the numbers are those of the values."""
    subject = obtain(str(pygmy))
    rows = portrait.by_role(subject)
    assert [row["tensor"] for row in rows] == list(subject.admission.stats)
    embedding = subject.admission.require().tensors[str(rows[0]["tensor"])].values()
    assert (rows[0]["role"], rows[0]["zeros (%)"]) == ("embedding", 100 * float((embedding == 0).mean()))
    assert rows[0]["rms"] == pytest.approx(np.sqrt((embedding.astype(np.float64) ** 2).mean()), rel=1e-6)
    assert (rows[0]["minimum"], rows[0]["maximum"]) == (embedding.min(), embedding.max())


def test_every_data_gate_stands_at_its_limit() -> None:
    """A value equal to its limit passes in every gate that judges values, and the next one beyond is refused."""
    rows = portrait.at_the_limits()
    data = {(g.id, g.rule) for g in load_gates().gates if g.rule in gates._TENSOR_RULES}
    assert {(row["gate"], row["rule"]) for row in rows} == data
    assert {row["outcome"] for row in rows if row["where"] != portrait.BEYOND} == {"passes"}
    assert {row["outcome"] for row in rows if row["where"] == portrait.BEYOND} == {"refused"}
    for row in rows:
        if row["where"] == portrait.AT:
            assert row["value"] == pytest.approx(row["limit"], rel=1e-6)


def test_a_comparison_that_is_off_by_one_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were `at most` to mean `less than`, what stands at the limit would be refused."""
    monkeypatch.setattr(
        gates.Gate, "holds", lambda gate, x: x < gate.threshold if gate.direction == "at_most" else True
    )
    rows = portrait.at_the_limits()
    assert "refused" in {row["outcome"] for row in rows if row["where"] == portrait.AT}
    assert "passes" in {row["outcome"] for row in rows if row["where"] == portrait.BEYOND}


def test_zero_limits() -> None:
    """Both limits of the density gate."""
    assert portrait.zero_limits() == [50.0, 80.0]


def test_cost(pygmy: Path) -> None:
    """Five steps, each with its time; those that read the weights say how many bytes."""
    rows = portrait.cost(obtain(str(pygmy)), repeats=1)
    total = sum(info.nbytes for info in obtain(str(pygmy)).checkpoint.tensors.values())
    assert [row["bytes"] for row in rows] == [0, 0, total, total, total]
    assert all(float(str(row["seconds"])) > 0 for row in rows)

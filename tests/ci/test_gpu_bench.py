"""The timing parts of the script for a device, rehearsed in the interpreter on a tiny shape."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr_core.contract.admit import admit
from apr_core.contract.layout import Geometry
from apr_core.kernels.gpu import has_triton
from apr_core.model.synth import SHAPES, Shape, synthesise

pytestmark = [
    pytest.mark.no_cover,  # a tracer takes several times as long as the interpreter
    pytest.mark.skipif(not has_triton(), reason="NOT_RUN: triton is not installed"),
]


@pytest.fixture
def bench(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The parts as a module."""
    monkeypatch.setattr(sys, "path", [str(root / "ci"), *sys.path])
    import gpu_bench

    return gpu_bench


@pytest.fixture
def setup(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A rehearsal on one layer and one type."""
    monkeypatch.setitem(SHAPES, "small", Shape(Geometry(64, 64, 1, 2, 1, 32, 64, tied=True), 128, 50, 3))
    return bench.Setup("cpu", tmp_path, ("small",), ("Q8_0",))


def test_every_part_leaves_its_records(bench: Any, setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings above zero, kernels compared, a model held and timed, peers that are absent named."""
    monkeypatch.setattr(bench.shutil, "which", lambda _: None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    (machine,) = bench.ceilings(setup)
    assert all(value > 0 for value in machine.measured.values())
    correct, sweep = bench.kernels(setup)
    assert correct.measured["compared"] == len(correct.rows) > 0
    assert str(correct.verdict) == "CORROBORATED"
    assert {row["digits"] for row in sweep.rows} == {1, 3}
    speed, exact, llama, peer = bench.models(setup)
    for record in (speed, exact):
        assert str(record.verdict) == "CORROBORATED", record.reason
        assert record.measured["torch_equal"]
        assert record.measured["decode_tok_s"] > 0
    assert exact.measured["rel_l2"] <= 1e-5 < speed.measured["rel_l2"]
    assert [(str(r.verdict), r.reason) for r in (llama, peer)] == [
        ("NOT_RUN", "no llama-bench on the PATH"),
        ("NOT_RUN", "transformers is not installed"),
    ]


def test_a_wrong_engine_is_refuted(bench: Any, setup: Any, tmp_path: Path) -> None:
    """A rate counts only beside its correctness."""
    synthesise("small", format="gguf", dtype="q8_0", tokenizer=None, seed=1, out=tmp_path / "m.gguf")
    ids = np.arange(9)
    other = np.random.default_rng(0).standard_normal((9, 64))
    record = bench.held_and_timed(
        setup, admit(tmp_path / "m.gguf").require(), ("small", "q8_0", "exact"), ids, other, 1.0
    )
    assert str(record.verdict) == "FALSIFIED"
    assert "against the reference, at most 0.0001" in record.reason

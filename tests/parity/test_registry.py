"""Every registered backend goes through the parity suite by being registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr_core.contract.admit import admit
from apr_core.engines.load import ENGINES, build, load_plain
from apr_core.falsify.verdict import Verdict
from apr_core.model.trace import require_traced
from apr_core.parity.suite import POSITIONS, Bench, examine, prepare

HERE = [key for key in ENGINES if key[1] == "cpu"]
REFERENCE = ("reference", "cpu")


@pytest.fixture(scope="module")
def bench(pygmy: Path) -> tuple[Any, Bench]:
    """The bundled model: real biases, grouped heads, head_dim 64."""
    admission = admit(pygmy)
    ids = np.random.default_rng(11).integers(0, 1000, POSITIONS)
    return admission, prepare(admission.require(), build(admission), ids)


def test_the_registry_is_not_empty() -> None:
    """A loop over nothing would be green."""
    assert REFERENCE in HERE
    assert {key[1] for key in ENGINES} == {"cpu", "cuda"}


@pytest.mark.parametrize("key", HERE, ids=lambda key: f"{key[0]} on {key[1]}")
def test_a_registered_backend_matches_the_reference(key: tuple[str, str], bench: tuple[Any, Bench]) -> None:
    """All parts, each over as many rows as it promises; the reference against itself is called a control."""
    admission, held = bench
    model = require_traced(build(admission, device=key[1], precision=key[0]))
    report = examine(held, model, key[0])
    assert (report.verdict, report.reason) == (Verdict.CORROBORATED, "")
    assert report.control is (key == REFERENCE)
    assert {p.name: p.compared for p in report.parts} == {
        "prefill": 64 * 14,
        "decode": 64 * 14,
        "far 4000": 24 * 14,
        "cached against full": 64 * 14,
        "singly": 64 * 14,
        "isolation": report.part("isolation").compared,
        "tracing": 2 * (64 + 8) * 1024,
    }
    assert report.part("isolation").compared > 0
    assert report.notes == ["far 30000: beyond the context of this model"]


def test_the_independent_forward_matches_too(bench: tuple[Any, Bench]) -> None:
    """It is no engine of the registry, and the second opinion of every machine."""
    report = examine(bench[1], load_plain(bench[0]))
    assert (report.verdict, report.reason, report.control) == (Verdict.CORROBORATED, "", False)


@pytest.mark.parametrize("quantize", [None, "Q8_0"])
def test_eight_bit_activations_are_priced_against_blocks_alone(
    quantize: str | None, pygmy: Path, tmp_path: Path
) -> None:
    """An engine that rounds activations keeps the limits of `speed` where weights lie in blocks, and no others."""
    from apr_core.model.linear import Weights
    from apr_core.model.qwen2 import Qwen2
    from apr_core.parity.floor import EightBit
    from apr_core.rosetta.convert import convert

    class Rounding(Qwen2):
        pass

    admission = admit(convert(pygmy, tmp_path / "copy.gguf", quantize=quantize))
    validated = admission.require()
    rounding = Rounding(validated, weights=Weights(validated, EightBit()))
    held = prepare(validated, build(admission), np.random.default_rng(11).integers(0, 1000, POSITIONS))
    for precision in ("exact", "speed"):
        report = examine(held, rounding, precision)
        priced = report.rounding
        assert priced is (precision == "speed" and quantize == "Q8_0")
        assert report.part("decode").verdict is (Verdict.CORROBORATED if priced else Verdict.FALSIFIED)
        assert (str(report.first) if report.first else "").startswith("" if priced else "layers.0.q")

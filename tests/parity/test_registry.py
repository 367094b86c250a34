"""Every registered backend goes through the parity suite by being registered."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from apr_core.contract.admit import admit
from apr_core.dtypes import FORMATS
from apr_core.engines.load import ENGINES, build, load_plain
from apr_core.falsify.verdict import Verdict
from apr_core.model.linear import Weights
from apr_core.model.qwen2 import Qwen2
from apr_core.model.trace import require_traced
from apr_core.parity import floor
from apr_core.parity.floor import BFloat16, EightBit, Rounding, rounding
from apr_core.parity.suite import POSITIONS, Bench, examine, prepare
from apr_core.rosetta.convert import convert

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
        **({"steps alone": 64 * 14} if key[0] == "speed" else {}),
        "isolation": report.part("isolation").compared,
        "tracing": 2 * (64 + 8) * 1024,
    }
    assert report.part("isolation").compared > 0
    assert report.notes == ["far 30000: beyond the context of this model"]


def test_the_independent_forward_matches_too(bench: tuple[Any, Bench]) -> None:
    """It is no engine of the registry, and the second opinion of every machine."""
    report = examine(bench[1], load_plain(bench[0]))
    assert (report.verdict, report.reason, report.control) == (Verdict.CORROBORATED, "", False)


@pytest.mark.parametrize(
    ("recipe", "place", "excused"),
    [("Q8_0", EightBit, {EightBit, BFloat16}), ("BF16", BFloat16, {BFloat16}), ("F16", None, set())],
)
def test_rounded_activations_are_priced_against_the_types_that_meet_them(
    recipe: str, place: type[Rounding] | None, excused: set[type[Rounding]], pygmy: Path, tmp_path: Path
) -> None:
    """`speed` excuses 8 bits against blocks, bfloat16 against BF16 in prompts, nothing else; `exact` none."""

    class Rounded(Qwen2):
        pass

    admission = admit(convert(pygmy, tmp_path / "copy.gguf", quantize=recipe))
    validated = admission.require()
    held = prepare(validated, build(admission), np.random.default_rng(11).integers(0, 1000, POSITIONS))
    for kind in (EightBit, BFloat16):
        engine = Rounded(validated, weights=Weights(validated, kind()))
        for precision, owed in (("exact", None), ("speed", place)):
            report = examine(held, engine, precision)
            right = precision == "speed" and kind in excused
            refuted = {part.name for part in report.parts if part.verdict is Verdict.FALSIFIED}
            assert {part.name for part in report.parts if part.over is not None and part.over > 1} == refuted
            if right:  # these engines round a step too
                assert refuted == ({"steps alone"} if owed is BFloat16 else set())
            else:
                assert refuted - {"steps alone"}
            assert type(report.rounding) is (type(None) if owed is None else owed)
            assert [name for name in report.floor.measured if "activations" in name] == ([owed.name] if owed else [])
            assert owed is not None or str(report.first).startswith("layers.0.q at position 0")


@pytest.mark.parametrize(
    ("types", "place"),
    [
        (["Q4_K"], EightBit),
        (["F32", "Q5_K"], EightBit),
        (["Q6_K", "BF16"], EightBit),
        (["BF16", "Q2_K"], BFloat16),
        (["F16", "BF16"], BFloat16),
        (["F16", "F32"], None),
        (["Q5_1", "Q2_K"], None),
    ],
)
def test_the_types_that_are_multiplied_say_how_activations_are_rounded(
    types: list[str], place: type[Rounding] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block type without a kernel is widened to F32 and rounds nothing, nor does a table that is only looked up."""

    class Tensor:
        def __init__(self, kind: str) -> None:
            self.raw = SimpleNamespace(info=SimpleNamespace(dtype=FORMATS[kind]))

    class Matrix(Tensor):
        pass

    monkeypatch.setattr(floor, "ValidatedWeight", Matrix)
    tensors = {"table": Tensor("Q8_0"), **{kind: Matrix(kind) for kind in types[:-1]}}
    validated: Any = SimpleNamespace(tensors=tensors, head=Tensor(types[-1]))
    assert type(rounding(validated, "speed", "cpu")) is (place or type(None))
    assert rounding(validated, "exact", "cuda") is rounding(validated, "reference", "cpu") is None
    assert type(rounding(validated, "speed", "cuda")) is EightBit

"""The files of the specification: 290 tensors shaped like Qwen2.5-0.5B, healthy, and zeroed as in round 52."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from apr_core.cli.app import main
from apr_core.contract.admit import admit
from apr_core.contract.layout import Geometry, expected_tensors
from apr_core.dtypes import FORMATS
from apr_core.errors import ContractViolation, Exit
from apr_core.formats.apr import write_apr
from apr_core.formats.checkpoint import TensorSource, open_checkpoint
from apr_core.formats.names import apr_metadata
from apr_core.model.synth import synthesise

from .conftest import CONFIG, Save, Tensors

# The 0.5B an eighth as wide: 24 layers, 14 heads and 2 key-value heads, tied.
SMALL = CONFIG | {
    "hidden_size": 112,
    "intermediate_size": 152,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "vocab_size": 1187,
}
# 155 tensors broke 217 rules: 3 * 31 + 124. An all-zero matrix breaks three (density, norm, variation), one of which a
# thousandth is left breaks one.
EMPTY, THIN = 31, 124


def small_tensors() -> Tensors:
    """Healthy values in float32."""
    rng = np.random.default_rng(52)
    shapes = expected_tensors(Geometry.from_config(SMALL))
    return {name: (rng.standard_normal(shape) * 0.05).astype(np.float32) for name, (_, shape) in shapes.items()}


def chosen(names: list[str]) -> tuple[list[str], list[str]]:
    """Choose the projections that are emptied and those that are thinned: 155 of the 168."""
    projections = [name for name in names if name.endswith("proj.weight")]
    assert len(projections) == 168
    return projections[:EMPTY], projections[EMPTY : EMPTY + THIN]


def thin(values: np.ndarray) -> None:
    """Zero all but each thousandth value, in place."""
    flat = values.reshape(-1)
    kept = flat[::1000].copy()
    flat[:] = 0
    flat[::1000] = kept


def test_the_healthy_model_passes_290_of_290(save: Save) -> None:
    """Every tensor is measured, none is refused."""
    admission = admit(save(small_tensors(), SMALL))
    assert (admission.violations, admission.measured, admission.expected) == ((), 290, 290)


def test_the_zeroed_model_breaks_217_rules_in_155_tensors(save: Save, capfd: pytest.CaptureFixture[str]) -> None:
    """With its breakdown by rule; the library and the command line refuse it with the same words."""
    tensors = small_tensors()
    empty, thinned = chosen(list(tensors))
    for name in empty:
        tensors[name][:] = 0
    for name in thinned:
        thin(tensors[name])
    folder = save(tensors, SMALL)
    admission = admit(folder)
    assert Counter((v.gate, v.rule) for v in admission.violations) == {
        ("F-DATA-QUALITY-001", "zero_percent"): 155,
        ("F-DATA-QUALITY-003", "l2"): 31,
        ("F-DATA-QUALITY-003", "spread"): 31,
    }
    assert {v.tensor for v in admission.violations} == {*empty, *thinned}
    assert str(admission.refusal).endswith("(217 violations in 155 tensors)")
    with pytest.raises(ContractViolation):
        admission.require()
    assert main(["validate", str(folder)]) == Exit.REFUTED
    said = capfd.readouterr().out
    assert "F-DATA-QUALITY-001: 155 violations" in said
    assert "F-DATA-QUALITY-003: 62 violations" in said
    assert "217 violations in 155 tensors; 290 tensors measured of 290 expected" in said


def test_the_corrupt_apr_breaks_12_rules_in_12_tensors(tmp_path: Path) -> None:
    """The converted file of round 53: a dozen projections of which a thousandth is left."""
    tensors = small_tensors()
    names = chosen(list(tensors))[1][:12]
    for name in names:
        thin(tensors[name])
    sources = [TensorSource(n, FORMATS["F32"], v.shape, lambda v=v: [v]) for n, v in tensors.items()]
    write_apr(tmp_path / "m.apr", sources, apr_metadata(SMALL))
    refusal = admit(tmp_path / "m.apr").refusal
    assert refusal is not None
    assert refusal.startswith(f"[F-DATA-QUALITY-001] tensor {names[0]}: 99.9 % zeros, at most 80 %")
    assert refusal.endswith("(12 violations in 12 tensors)")


@pytest.mark.slow
def test_the_same_at_full_size(tmp_path: Path) -> None:
    """988 MB of BF16: 290 of 290 pass; zeroed in place, 217 rules are broken in 155 tensors."""
    folder = synthesise("qwen2.5-coder-0.5b", format="safetensors", dtype="bf16", tokenizer=None, out=tmp_path / "m")
    admission = admit(folder)
    assert (admission.violations, admission.measured, admission.expected) == ((), 290, 290)
    admission.checkpoint.close()
    empty, thinned = chosen(list(admission.stats))
    with open_checkpoint(folder) as checkpoint:
        spans = {name: checkpoint.tensors[name] for name in (*empty, *thinned)}
    for name, span in spans.items():
        values = np.memmap(span.file, np.uint16, "r+", span.offset, span.nbytes // 2)
        if name in empty:
            values[:] = 0
        else:
            thin(values)
        values.flush()
    refusal = admit(folder).refusal
    assert str(refusal).endswith("(217 violations in 155 tensors)")

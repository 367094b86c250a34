"""Every registered kernel against its numpy reference, on the examples that it brings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from apr_core.kernels import registry
from apr_core.kernels.registry import Kernel, load_kernels, register

PHASES = ("gate_up", "qkv", "attention", "head")


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    return float(np.linalg.norm(found.astype(np.float64) - expected.astype(np.float64))) / (norm or 1.0)


def _keys() -> list[object]:
    """A tracer takes several times as long as Triton's interpreter: it sees each phase once."""
    traced = {("decode", "F16", "exact"), ("residual", "F16", "speed"), *((op, "any", "speed") for op in PHASES)}
    return [
        pytest.param(
            key,
            marks=() if key[2] == "cpu" or (key[0], key[1], key[4]) in traced else pytest.mark.no_cover,
            id="-".join(key),
        )
        for key in load_kernels()
    ]


@pytest.mark.parametrize("key", _keys())
def test_a_kernel_equals_its_reference(key: tuple[str, ...]) -> None:
    """Bit for bit where it promises that, else within its stated distance, on every example."""
    kernel: Kernel = registry.KERNELS[key]
    compared = 0
    for arguments in kernel.examples():
        found, expected = kernel.run(*arguments), kernel.reference(*arguments)
        if kernel.rel_l2 == 0.0:
            np.testing.assert_array_equal(found, expected)
        else:
            assert _distance(np.asarray(found), np.asarray(expected)) <= kernel.rel_l2
        compared += 1
    assert compared > 0


def test_a_kernel_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kernels of one key would leave it to the order of imports which of them runs."""
    monkeypatch.setattr(registry, "KERNELS", {})
    kernel = Kernel("op", "F32", "cpu", "numba", "exact", abs, abs, lambda: iter([(1,)]))
    register(kernel)
    with pytest.raises(ValueError, match="registered twice"):
        register(replace(kernel, rel_l2=1.0))

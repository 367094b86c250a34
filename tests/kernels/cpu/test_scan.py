"""The compiled scan where it takes a shorter way: squares and sums rounded once, and runs that count nothing."""

from __future__ import annotations

import numpy as np
import pytest

from apr_core.kernels import stats
from apr_core.kernels.stats import Limits, Part

scan = pytest.importorskip("apr_core.kernels.cpu.scan")


def bf16(values: np.ndarray) -> np.ndarray:
    """Cut float32 that BF16 holds exactly."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def both(data: np.ndarray, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    """Scan one row with numpy, and compiled."""
    part = Part(stats.BF16, data, 1, data.size // 2)
    return stats.scan(part, limits)[0], scan.scan_many([part], limits)[0][0]


def test_squares_that_round_are_not_fused() -> None:
    """
    One subnormal bit decides the last bit of a sum: fused, 2 ** -149 more lifts 2 ** -80 over a tie.

    The four squares of lane 16 are 2 ** -133 when each is rounded; the third is a tie that a fused addition breaks.
    """
    lanes = np.zeros((4, 32), np.float64)
    lanes[0, 0] = 2.0**-40
    lanes[:, 16] = [140 * 2.0**-74, 133 * 2.0**-76, 183 * 2.0**-75, 243 * 2.0**-76]
    reference, found = both(bf16(lanes.reshape(-1)), Limits(0.0, 0.0))
    np.testing.assert_array_equal(found, reference)
    assert reference[stats.SQUARES] == 2.0**-80


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("zeros", [(), (4095,), (4096,), (0, 20_000)])
def test_a_zero_anywhere_is_counted(sign: int, zeros: tuple[int, ...]) -> None:
    """Runs without zeros, of one sign too, and runs with one, before and behind each other."""
    values = np.round(np.exp(2 * np.random.default_rng(3).standard_normal(6 * stats.RUN)) * 64) / 8 + 0.125
    values[list(zeros)] = 0
    reference, found = both(bf16(sign * values), Limits(1e-10, 0.0))
    np.testing.assert_array_equal(found, reference)
    assert found[stats.ZEROS] == len(zeros)

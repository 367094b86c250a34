"""Quantised activations: their digits, their sums, and what must not vanish in an integer."""

from __future__ import annotations

import numpy as np
import pytest

from apr_core.kernels.cpu.activations import largest_integer, quantise_reference, quantise_token, tile_block_bytes
from apr_core.kernels.cpu.features import PORTABLE
from apr_core.kernels.cpu.vec import Mode


def _tile(x: np.ndarray, digits: int, width: int = 1, token: int = 0) -> np.ndarray:
    blocks = x.size // 32
    tile = np.zeros(blocks * tile_block_bytes(width, digits), np.uint8)
    quantise_token(Mode(PORTABLE, digits), x.ctypes.data, blocks, tile.ctypes.data, width, token)
    return tile.reshape(blocks, -1)


def _read(tile: np.ndarray, digits: int, width: int, token: int) -> tuple[np.ndarray, ...]:
    """Digits [blocks, digits, 32], scale, half sums [blocks, digits, 2] and total of one token."""
    blocks, after = len(tile), width * 32 * digits
    q = tile[:, :after].reshape(blocks, width, digits, 32)[:, token].view(np.int8)
    scale = tile[:, after : after + 4 * width].copy().view(np.float32)[:, token]
    sums = tile[:, after + 4 * width : after + 4 * width + 8 * width * digits].copy().view(np.int32)
    total = tile[:, -4 * width :].copy().view(np.float32)[:, token]
    return q, scale, sums.reshape(blocks, width, digits, 2)[:, token], total


@pytest.mark.parametrize("digits", [1, 3])
@pytest.mark.parametrize(("width", "token"), [(1, 0), (8, 5)])
def test_digits_stand_for_the_values(digits: int, width: int, token: int) -> None:
    """To half a unit of the last digit; sums and totals are those of the digits."""
    x = np.random.default_rng(0).standard_normal(96).astype(np.float32)
    x[:32] *= 1e4
    q, scale, sums, total = _read(_tile(x, digits, width, token), digits, width, token)
    powers = 256.0 ** np.arange(digits - 1, -1, -1)
    values = (q.astype(np.float64) * powers[None, :, None]).sum(axis=1) * scale[:, None]
    np.testing.assert_allclose(values.reshape(-1), quantise_reference(x, digits), rtol=2e-7, atol=0)
    top = np.abs(x.reshape(-1, 32)).max(axis=1, keepdims=True)
    units = 0.51 if digits == 1 else 2  # three digits are as fine as float32, whose roundings then count as well
    assert (np.abs(values - x.reshape(-1, 32)) <= units * top / largest_integer(digits)).all()
    np.testing.assert_array_equal(sums, q.reshape(3, digits, 2, 16).sum(axis=3, dtype=np.int32))
    np.testing.assert_allclose(total, values.sum(axis=1), rtol=1e-5)


def test_other_tokens_of_a_tile_are_left_alone() -> None:
    """A tile is filled token by token."""
    tile = _tile(np.ones(32, np.float32), 1, 8, 3)
    others = [token for token in range(8) if token != 3]
    for token in others:
        assert not any(part.any() for part in _read(tile, 1, 8, token))


def test_the_largest_value_keeps_its_sign_in_three_digits() -> None:
    """With every digit at 127, rounding up by half a unit would carry into the sign of the first."""
    for seed in range(200):
        x = np.zeros(32, np.float32)
        x[7] = np.random.default_rng(seed).uniform(0.5, 1.0)
        q, *_ = _read(_tile(x, 3), 3, 1, 0)
        assert q[0, 0, 7] == 127


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 20])
def test_a_value_that_is_not_finite_shows_in_its_block(bad: float, at: int) -> None:
    """An integer cannot hold NaN, so the scale does; other blocks are untouched."""
    x = np.ones(64, np.float32)
    x[at] = bad
    _, scale, _, _ = _read(_tile(x, 1), 1, 1, 0)
    assert not np.isfinite(scale[0])
    assert np.isfinite(scale[1])


def test_tiny_and_zero_blocks_are_zero() -> None:
    """The reciprocal of a subnormal scale would be infinite, and 0 times it NaN."""
    for value in (0.0, 1e-42, -1e-38):
        q, scale, sums, total = _read(_tile(np.full(32, value, np.float32), 3), 3, 1, 0)
        assert not q.any()
        assert not sums.any()
        assert np.isfinite(scale).all()
        assert total[0] == 0

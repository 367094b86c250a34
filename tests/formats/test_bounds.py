"""The error bounds hold on what the codecs and llama.cpp really do, and are tight enough to mean something."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_core.dtypes import FORMATS
from apr_core.errors import Unavailable
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.formats.codecs import decode, decode_bytes, round_to, step_bound

QUICK = settings(max_examples=80, deadline=None, derandomize=True)
VALUES = st.lists(st.floats(-60000, 60000, width=32), min_size=64, max_size=64)
SCALES = st.sampled_from([0.0, 1e-42, 1e-9, 1e-6, 1e-3, 1.0])


def gguf_round(values: np.ndarray, dtype: str) -> np.ndarray:
    """Quantise and decode with the gguf package."""
    kind = gguf.GGMLQuantizationType[dtype]
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q8_0"])
@given(values=VALUES, scale=SCALES)
@QUICK
def test_holds_for_our_encoders(dtype: str, values: list[float], scale: float) -> None:
    """No element moves further than its bound, subnormals included."""
    array = (np.array(values, np.float32) * np.float32(scale)).reshape(2, 32)
    moved = np.abs(round_to(array, FORMATS[dtype]).astype(np.float64) - array)
    assert (moved <= step_bound(array, FORMATS[dtype])).all()


@pytest.mark.parametrize("dtype", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@given(values=VALUES, scale=SCALES)
@QUICK
def test_holds_for_the_gguf_packages_encoders(dtype: str, values: list[float], scale: float) -> None:
    """The legacy block types as the gguf package writes them stay within the bound (float32 arithmetic aside)."""
    array = (np.array(values, np.float32) * np.float32(scale)).reshape(2, 32)
    moved = np.abs(gguf_round(array, dtype).astype(np.float64) - array)
    slack = 2.0**-20 * np.abs(array).max()
    assert (moved <= step_bound(array, FORMATS[dtype]) + slack).all()


@pytest.mark.parametrize(
    ("file", "worst"),
    [("F16", {"F16": 1.0}), ("Q8_0", {"Q8_0": 1.0}), ("Q6_K", {"Q6_K": 0.65}), ("Q4_K_M", {"Q4_K": 0.8})],
)
def test_holds_for_llama_cpp(file: str, worst: dict[str, float], oracle: Path) -> None:
    """llama.cpp's own quantisation stays within the bound, and comes near enough that the bound is no blank cheque."""
    reached = dict.fromkeys(worst, 0.0)
    with (
        open_checkpoint(oracle / "mini") as source,
        open_checkpoint(oracle / "mini" / "gguf" / f"{file}.gguf") as other,
    ):
        for name, info in other.tensors.items():
            values = decode(source.raw(name))
            moved, bound = np.abs(decode(other.raw(name)) - values), step_bound(values, info.dtype)
            assert (moved <= bound).all()
            if str(info.dtype) in worst:
                reached[str(info.dtype)] = max(
                    reached[str(info.dtype)], float((moved[bound > 0] / bound[bound > 0]).max())
                )
    assert all(0.5 < reached[dtype] <= limit for dtype, limit in worst.items()), reached


@pytest.mark.parametrize("dtype", ["Q4_K", "Q6_K", "Q8_0", "BF16", "AprQ4", "AprQ8", "Q5_K"])
def test_a_value_lost_breaks_the_bound(dtype: str) -> None:
    """Setting the largest elements to zero, or swapping two rows, is outside the bound."""
    values = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    bound = step_bound(values, FORMATS[dtype])
    assert bound.shape == values.shape
    assert np.abs(values).max() > bound.ravel()[np.abs(values).argmax()]
    assert (np.abs(values[::-1] - values) > bound).any()


def apr_q4(values: np.ndarray) -> np.ndarray:
    """Round as APR's int4 writer does, by the rule in its documentation."""
    flat = np.pad(values.reshape(-1), (0, -values.size % 32)).reshape(-1, 32)
    scale = np.abs(flat).max(1, keepdims=True) / 7
    codes = np.clip(np.round(flat / np.where(scale == 0, 1, scale)), -8, 7).astype(np.int64) + 8
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)
    data = np.concatenate([scale.astype(np.float16).view(np.uint8), packed], axis=1)
    return decode_bytes(FORMATS["AprQ4"], data.reshape(-1), values.shape)


@given(values=VALUES, scale=SCALES)
@QUICK
def test_holds_for_apr_types(values: list[float], scale: float) -> None:
    """AprQ4 (flat blocks across rows) and AprQ8 (one scale) stay within their bounds."""
    array = (np.array(values[:63], np.float32) * np.float32(scale)).reshape(3, 21)
    assert (np.abs(apr_q4(array) - array) <= step_bound(array, FORMATS["AprQ4"])).all()
    step = np.abs(array).max() / np.float32(127)
    codes = np.clip(np.round(array / (step or 1)), -127, 127).astype(np.int8)
    data = np.concatenate([np.float32([step]).view(np.uint8), codes.reshape(-1).view(np.uint8)])
    moved = np.abs(decode_bytes(FORMATS["AprQ8"], data, array.shape).astype(np.float64) - array)
    assert (moved <= step_bound(array, FORMATS["AprQ8"]) + np.abs(array) * 2.0**-22 + 2.0**-142).all()


def test_overflow_and_poison() -> None:
    """The bound is infinite where the type overflows, and never comforting where the reference is not finite."""
    assert step_bound(np.float32([65504, 70000]), FORMATS["F16"]).tolist() == [
        np.nextafter(np.float32(16), np.inf),
        np.inf,
    ]
    values = np.full((1, 256), np.nan, np.float32)
    for dtype in ("Q4_K", "Q8_0"):
        assert not (np.float32(0) <= step_bound(values, FORMATS[dtype])).any()


def test_unknown_bound() -> None:
    """A type without a derived bound says so instead of guessing."""
    with pytest.raises(Unavailable, match="no error bound is known for Q2_K"):
        step_bound(np.zeros((1, 256), np.float32), FORMATS["Q2_K"])


def test_scalar_and_odd_rows() -> None:
    """Padding is cut off again: scalars and rows that are no multiple of a block keep their shape."""
    assert step_bound(np.float32(1.5).reshape(()), FORMATS["Q8_0"]).shape == ()
    assert step_bound(np.ones((3, 63), np.float32), FORMATS["Q4_K"]).shape == (3, 63)

"""K-quant and APR encoders against llama.cpp and its files, hand-computed blocks, and the bounds of their types."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_core.dtypes import FORMATS
from apr_core.errors import Unavailable, UsageError
from apr_core.formats import blocks, codecs, encoders
from apr_core.formats.bounds import step_bound
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.peers.ggml import quantise

K_QUANTS = ("Q4_K", "Q5_K", "Q6_K")
LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
QUICK = settings(max_examples=80, deadline=None, derandomize=True)
VALUES = st.lists(st.floats(-65000, 65000, width=32), min_size=64, max_size=64)


def hard_rows() -> np.ndarray:
    """Zeros, ties, constants, one sign, lone outliers, denormal and huge values, noise of many magnitudes: [n, 256]."""
    rng = np.random.default_rng(11)
    rows = [
        np.zeros((2, 256)),
        rng.integers(-8, 9, (40, 256)) / 4,
        rng.integers(-127, 128, (20, 256)) / 2,
        np.full((3, 256), [[0.37], [-0.37], [65000]]),
        np.abs(rng.standard_normal((20, 256))) * [[(-1.0) ** k] for k in range(20)],
        np.where(rng.random((20, 256)) < 1 / 64, rng.standard_normal((20, 256)), 0),
        rng.standard_normal((60, 256)) * 10.0 ** rng.uniform(-12, 4, (60, 1)),
        np.linspace(-65000, 65000, 256)[None, :],
        rng.standard_normal((20, 256)) * 1e-41,
    ]
    return np.concatenate(rows).astype(np.float32)


def llama_cpp(values: np.ndarray, dtype: str) -> np.ndarray:
    """Quantise with the library of llama.cpp itself; a machine without it skips."""
    try:
        return quantise(values, FORMATS[dtype], threads=3)
    except Unavailable as missing:
        pytest.skip(str(missing))


def test_legacy_types_equal_the_gguf_package() -> None:
    """Byte for byte on the hard rows."""
    for dtype in LEGACY:
        with np.errstate(all="ignore"):
            expected = gguf.quants.quantize(hard_rows(), gguf.GGMLQuantizationType[dtype])
        assert codecs.encode(hard_rows(), FORMATS[dtype]).tobytes() == expected.tobytes(), dtype


@pytest.mark.parametrize("dtype", LEGACY)
@given(values=VALUES, scale=st.sampled_from([0.0, 1e-40, 1e-8, 1e-3, 1.0]))
@QUICK
def test_legacy_types_equal_the_gguf_package_anywhere(dtype: str, values: list[float], scale: float) -> None:
    """Byte for byte on what hypothesis finds."""
    array = (np.array(values, np.float32) * np.float32(scale)).reshape(2, 32)
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(array, gguf.GGMLQuantizationType[dtype])
    assert codecs.encode(array, FORMATS[dtype]).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [*LEGACY, *K_QUANTS])
def test_equals_the_library_of_llama_cpp(dtype: str) -> None:
    """
    Against `ggml_quantize_chunk`: hard rows, and noise like the weights of a 0.5B.

    At least 98 % of the blocks are identical and the square error is at most 1.001 of llama.cpp's; where a range is
    denormal, bytes may differ, since both store a scale of zero.
    """
    rng = np.random.default_rng(12)
    noise = rng.standard_normal((256, 1024)).astype(np.float32) * np.float32(0.02)
    noise[::7, ::97] *= np.float32(20)
    for rows in (hard_rows()[:-20], noise):
        ours, theirs = codecs.encode(rows, FORMATS[dtype]), llama_cpp(rows, dtype)
        width = FORMATS[dtype].block_bytes
        same = (ours.reshape(-1, width) == theirs.reshape(-1, width)).all(axis=1).mean()
        errors = [
            float(((codecs.decode_bytes(FORMATS[dtype], data, rows.shape).astype(np.float64) - rows) ** 2).sum())
            for data in (ours, theirs)
        ]
        assert same >= 0.98
        assert errors[0] <= 1.001**2 * errors[1]
    tiny = hard_rows()[-20:]
    for data in (codecs.encode(tiny, FORMATS[dtype]), llama_cpp(tiny, dtype)):
        assert not codecs.decode_bytes(FORMATS[dtype], data, tiny.shape).any()


@pytest.mark.parametrize(
    ("recipe", "dtype"), [("Q4_K_M", "Q4_K"), ("Q4_K_M", "Q6_K"), ("Q6_K", "Q6_K"), ("Q8_0", "Q8_0")]
)
def test_equals_the_files_of_llama_cpp(recipe: str, dtype: str, oracle: Path) -> None:
    """Every block of that type in the oracle's file comes out of our encoder byte for byte."""
    compared = 0
    with (
        open_checkpoint(oracle / "mini") as source,
        open_checkpoint(oracle / "mini" / "gguf" / f"{recipe}.gguf") as theirs,
    ):
        for name, info in theirs.tensors.items():
            if info.dtype.name == dtype:
                encoded = codecs.encode(codecs.decode(source.raw(name)), info.dtype)
                assert np.array_equal(encoded, theirs.raw(name).data), name
                compared += encoded.size // info.dtype.block_bytes
    assert compared > 500


@pytest.mark.parametrize("dtype", [q for q in codecs.WRITABLE if not FORMATS[q].plain])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_stays_within_the_bound_of_the_type(dtype: str, scale: float) -> None:
    """Normal noise, a ramp, a constant, zeros, negatives, one outlier: each value comes back within its step bound."""
    rng = np.random.default_rng(3)
    rows = np.stack(
        [
            *rng.standard_normal((6, 512)),
            np.linspace(-1, 1, 512),
            np.full(512, 0.37),
            np.full(512, -0.37),
            np.zeros(512),
            -np.abs(rng.standard_normal(512)),
            np.where(np.arange(512) == 300, 50.0, rng.standard_normal(512)),
        ]
    ).astype(np.float32) * np.float32(scale)
    back = codecs.round_to(rows, FORMATS[dtype])
    assert (np.abs(back - rows) <= step_bound(rows, FORMATS[dtype])).all()


@pytest.mark.parametrize("dtype", K_QUANTS)
def test_the_search_is_worth_its_time(dtype: str) -> None:
    """The search leaves less square error on normal noise than scales taken from the range alone, its grid included."""
    rows = np.random.default_rng(4).standard_normal((64, 256)).astype(np.float32)
    width, levels = (16, 32) if dtype == "Q6_K" else (32, 2 ** int(dtype[1]) - 1)
    parts = rows.reshape(-1, width)
    if dtype == "Q6_K":
        step = np.abs(parts).max(axis=1, keepdims=True) / levels
        naive = np.rint(parts / step).clip(-32, 31) * step
    else:
        low = parts.min(axis=1, keepdims=True)
        step = (parts.max(axis=1, keepdims=True) - low) / levels
        naive = np.rint((parts - low) / step) * step + low
    searched = codecs.round_to(rows, FORMATS[dtype]) - rows
    assert (searched**2).sum() < ((naive - parts) ** 2).sum()


@pytest.mark.parametrize("dtype", K_QUANTS)
def test_a_block_of_zeros_is_zeros(dtype: str) -> None:
    """Nothing divides by zero, and zeros stay exact; so do blocks whose other half is not zero."""
    assert not codecs.encode(np.zeros((1, 256), np.float32), FORMATS[dtype]).any()
    half = np.zeros((1, 256), np.float32)
    half[0, :128] = np.linspace(-1, 1, 128)
    assert not codecs.round_to(half, FORMATS[dtype])[0, 128:].any()


def test_six_bit_scales_by_hand() -> None:
    """Scale 4 = 0b110101 goes to the low nibble of byte 8 and the top of byte 0; reading gives it back."""
    scale = np.arange(1, 9, dtype=np.uint8)[None, :]
    scale[0, 4] = 0b110101
    minimum = np.full((1, 8), 63, np.uint8)
    packed = encoders.pack_six_bits(scale, minimum)[0]
    assert packed[0] == 1 | (0b11 << 6)
    assert packed[8] == 0b0101 | (15 << 4)
    one = np.array([1.0], np.float16).view(np.uint8)
    block = np.concatenate([one, one, packed, np.zeros(128, np.uint8)])[None, :]
    read, low = blocks.q4_k_scales(block)
    assert read.reshape(-1).tolist() == scale[0].tolist()
    assert low.reshape(-1).tolist() == [63] * 8


def test_apr_q4_by_hand() -> None:
    """Scale 1 for a largest value of 7; even elements in the low nibble; half-way cases go away from zero."""
    values = np.zeros(33, np.float32)
    values[:4] = [7, -7, 2.5, -2.5]
    values[32] = 14
    encoded = codecs.encode(values, FORMATS["AprQ4"])
    assert encoded.size == 2 * 18
    assert encoded[:2].view("<f2")[0] == 1.0
    assert encoded[2:4].tolist() == [15 | (1 << 4), 11 | (5 << 4)]
    assert encoded[18:20].view("<f2")[0] == 2.0
    assert codecs.encode(np.zeros(32, np.float32), FORMATS["AprQ4"])[:2].view("<f2")[0] == 1.0


def test_apr_q8_by_hand() -> None:
    """One scale for the whole tensor, then signed bytes."""
    encoded = codecs.encode(np.float32([[127, -127], [1.5, 0]]), FORMATS["AprQ8"])
    assert encoded[:4].view("<f4")[0] == 1.0
    assert encoded[4:].view(np.int8).tolist() == [127, -127, 2, 0]
    assert not codecs.encode(np.zeros(3, np.float32), FORMATS["AprQ8"]).any()


def test_encoding_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of blocks at a time gives the bytes of all at once."""
    rows = np.random.default_rng(5).standard_normal((3, 512)).astype(np.float32)
    whole = codecs.encode(rows, FORMATS["Q4_K"])
    monkeypatch.setattr(codecs, "_CHUNK_BYTES", 1)
    assert np.array_equal(codecs.encode(rows, FORMATS["Q4_K"]), whole)


@pytest.mark.parametrize("dtype", K_QUANTS)
def test_a_row_that_is_no_whole_number_of_blocks(dtype: str) -> None:
    """896 columns are no multiple of 256: refused, and the advice is what recipes do."""
    with pytest.raises(UsageError, match="rows of a multiple of 256, found 896"):
        codecs.encode(np.zeros((1, 896), np.float32), FORMATS[dtype])

"""The choice between compiled and plain codecs: the same bytes, values and errors on both sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apr_core.dtypes import FORMATS
from apr_core.errors import UsageError
from apr_core.formats import blocks, codecs, encoders
from apr_core.formats.checkpoint import RawTensor, TensorInfo
from apr_core.kernels import codecs as chosen
from apr_core.kernels.cpu import decode, encode, split


def values_of(shape: tuple[int, ...]) -> np.ndarray:
    """Normal noise."""
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


def test_every_block_type_has_both() -> None:
    """What numpy encodes or decodes by blocks, a kernel does too."""
    assert set(encode.ENCODERS) == set(encoders.ENCODERS)
    assert set(decode.DECODERS) == set(blocks.DECODERS)


@pytest.mark.parametrize("dtype", codecs.WRITABLE)
def test_the_choice_changes_nothing(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes and values are those of the numpy codecs, with kernels for everything and for nothing."""
    q, shape = FORMATS[dtype], (33, 512)
    plain = codecs.encode(values_of(shape), q)
    for worth in (0, 1 << 40):
        monkeypatch.setattr(chosen, "WORTH", worth)
        assert chosen.encode(values_of(shape), q).tobytes() == plain.tobytes()
        back = chosen.decode_bytes(q, plain, shape)
        assert back.tobytes() == codecs.decode_bytes(q, plain, shape).tobytes()
        raw = RawTensor(TensorInfo("w", q, shape, Path("f"), 0, plain.size, "w"), plain)
        assert np.array_equal(chosen.decode(raw), back)
        if q.layout == "row":
            assert np.array_equal(chosen.decode_rows(raw, 3, 9), back[3:9])


def test_kernels_are_chosen_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large tensor gets a kernel, a small one, an unknown type and a machine without numba do not."""
    assert chosen._encoder(FORMATS["Q4_K"], chosen.WORTH) is encode.ENCODERS["Q4_K"]
    assert chosen._decoder(FORMATS["Q6_K"], chosen.WORTH) is decode.DECODERS["Q6_K"]
    assert chosen._encoder(FORMATS["F16"], chosen.WORTH) is None
    assert chosen._decoder(FORMATS["IQ4_XS"], chosen.WORTH) is None
    assert chosen._decoder(FORMATS["Q6_K"], 256) is None
    monkeypatch.setattr(chosen, "has_numba", lambda: False)
    assert chosen._encoder(FORMATS["Q4_K"], chosen.WORTH) is None


def test_errors_are_those_of_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN, broken rows and rows that do not exist are refused before a kernel sees them."""
    monkeypatch.setattr(chosen, "WORTH", 0)
    poisoned = values_of((2, 256))
    poisoned[1, 7] = np.nan
    for dtype in encode.ENCODERS:
        with pytest.raises(UsageError, match=f"{dtype} cannot hold nan"):
            chosen.encode(poisoned, FORMATS[dtype])
    with pytest.raises(UsageError, match="rows of a multiple of 256"):
        chosen.encode(values_of((2, 896)), FORMATS["Q4_K"])
    raw = RawTensor(TensorInfo("w", FORMATS["F32"], (2, 3), Path("f"), 0, 24, "w"), np.zeros(24, np.uint8))
    with pytest.raises(UsageError, match=r"rows within 0\.\.2"):
        chosen.decode_rows(raw, 0, 3)


@pytest.mark.parametrize("name", sorted(encode.ENCODERS))
def test_threads_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread or five, on a number of blocks that five do not divide: equal, and nothing is left out."""
    monkeypatch.setattr(split, "_WORTH_A_THREAD", 1)
    values = values_of((43, FORMATS[name].block_elements))
    one = encode.encode_blocks(name, values, 1)
    assert one.tobytes() == encode.encode_blocks(name, values, 5).tobytes()
    assert decode.decode_blocks(name, one, 1).tobytes() == decode.decode_blocks(name, one, 5).tobytes()


def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails in a second thread is not lost."""
    monkeypatch.setattr(split, "_WORTH_A_THREAD", 1)

    def run(start: int, stop: int) -> None:
        if start:
            raise MemoryError

    with pytest.raises(MemoryError):
        split.in_threads(run, 100, 100, 2)


def test_half_bits_of_every_exponent() -> None:
    """The integer rounding to float16 equals numpy's: all exponents, ties, subnormal halves, overflow, both signs."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 31, 20_000, dtype=np.uint32)
    halves = np.arange(0, 0x7C00, 7, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[:-1] + np.nextafter(halves[:-1].astype(np.float16), np.float16(np.inf)).astype(np.float32)) / 2
    values = np.concatenate([bits.view(np.float32), halves, ties, np.float32([65504, 65519, 65520, 65536, 1e38])])
    values = values[np.isfinite(values)]
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    found = np.array([encode._half_bits(value) for value in values])
    assert np.array_equal(found, expected)
    assert encode._half_bits(np.float32(-1.5)) == 0xBE00

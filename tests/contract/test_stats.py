"""Statistics against float64 numpy, and what each storage type does to them."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from apr_core.contract import stats as stats_module
from apr_core.contract.stats import TensorStats, measure, measure_all, measure_values
from apr_core.dtypes import FORMATS
from apr_core.errors import UsageError
from apr_core.formats import codecs
from apr_core.formats.checkpoint import RawTensor, TensorInfo
from apr_core.kernels import stats as kernel


def raw_of(dtype: str, data: np.ndarray, shape: tuple[int, ...], name: str = "t") -> RawTensor:
    """Wrap bytes as a reader would."""
    flat = np.frombuffer(data.tobytes(), np.uint8)
    return RawTensor(TensorInfo(name, FORMATS[dtype], shape, Path("made.up"), 0, flat.size, name), flat)


def agrees(found: TensorStats, values: np.ndarray) -> bool:
    """Compare with plain float64 numpy over the finite values."""
    wide = values.astype(np.float64).reshape(-1)
    finite = wide[np.isfinite(wide)]
    scale = np.abs(finite).max(initial=0.0)
    return (
        found.count == wide.size
        and found.zeros == int((np.abs(wide) < np.float32(1e-10)).sum())
        and found.nans == int(np.isnan(wide).sum())
        and found.infs == int(np.isinf(wide).sum())
        and (found.minimum, found.maximum) == (finite.min(), finite.max())
        and found.mean == pytest.approx(finite.mean(), rel=1e-5, abs=1e-6 * scale)
        and found.std == pytest.approx(finite.std(ddof=1) if finite.size > 1 else 0.0, rel=1e-5, abs=1e-6 * scale)
        and found.l2 == pytest.approx(np.linalg.norm(finite), rel=1e-5, abs=1e-30)
    )


@pytest.mark.parametrize("shape", [(1,), (63,), (131, 64), (7, 70001), (3, 5, 7), (65537,)])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_plain_types_match_float64(dtype: str, shape: tuple[int, ...]) -> None:
    """Odd lengths, lengths past one chunk, and rows longer than a chunk give what float64 numpy gives."""
    values = (np.random.default_rng(1).standard_normal(shape) * 0.02 + 0.001).astype(np.float32)
    if dtype == "BF16":
        stored = (values.view(np.uint32) >> 16).astype(np.uint16)
        values = (stored.astype(np.uint32) << 16).view(np.float32)
    elif dtype == "F16":
        stored = values.astype(np.float16)
        values = stored.astype(np.float32)
    else:
        stored = values
    assert agrees(measure(raw_of(dtype, stored, shape)), values)


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=1, max_dims=2, min_side=1, max_side=40),
        elements=st.floats(width=32, min_value=-(2.0**60), max_value=2.0**60, allow_subnormal=True)
        | st.sampled_from([0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1e-10, 1e-11, 1e-40]),
    ).filter(lambda a: np.isfinite(a).any())
)
def test_any_values(values: np.ndarray) -> None:
    """NaN, infinities, denormals and large magnitudes in any mixture are counted, and the rest is measured."""
    assert agrees(measure_values("t", values), values)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "Q8_0"])
def test_cutting_changes_nothing(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tensor in pieces of one row and in one piece has the same counts and digest, and to rounding moments."""
    values = (np.random.default_rng(2).standard_normal((50, 96)) + 5).astype(np.float32)
    values[3, 4], values[40, 1], values[7] = np.nan, np.inf, 0
    broken = values if dtype != "Q8_0" else np.nan_to_num(values, posinf=1)  # the encoder refuses what is not finite
    stored = codecs.encode(broken, FORMATS[dtype])
    if dtype == "Q8_0":
        stored.reshape(-1, 34)[[10, 121], :2] = np.frombuffer(np.array([np.nan, np.inf], np.float16), np.uint8).reshape(
            2, 2
        )
    raw = raw_of(dtype, stored, values.shape)
    whole = measure(raw, spot_rows=True)
    for name, small in (("CHUNK", 96), ("PIECE", 1), ("_CHUNKS", 1)):
        monkeypatch.setattr(stats_module, name, small)
    rows = measure(raw, spot_rows=True)
    for counted in ("zeros", "nans", "infs", "minimum", "maximum", "dead_rows", "rows", "row_l2", "digest"):
        assert getattr(whole, counted) == getattr(rows, counted), counted
    assert [row for row, _ in rows.row_l2] == [5, 25, 45]
    assert whole.nonfinite_scales == rows.nonfinite_scales == (2 if dtype == "Q8_0" else 0)
    assert (rows.mean, rows.std, rows.l2) == pytest.approx((whole.mean, whole.std, whole.l2), rel=1e-12)


def any_tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> RawTensor:
    """Random bytes: for every type also NaN with payloads, infinities, broken scales and subnormals."""
    data = np.random.default_rng(seed).integers(0, 256, FORMATS[dtype].nbytes(shape), np.uint8)
    return raw_of(dtype, data, shape)


def shapes_of(dtype: str) -> list[tuple[int, ...]]:
    """Whole blocks in a matrix and a vector; padded rows and odd lengths where the type can have them."""
    block = FORMATS[dtype].block_elements
    return [
        (24, 2 * block),
        (3 * block,),
        (5, block + 7),
        (1, 1),
        (3, 5, block),
        (9, 9000 if block == 1 else 36 * block),
    ]


@pytest.fixture
def compiled() -> Any:
    """The scan of the compiled path."""
    return pytest.importorskip("apr_core.kernels.cpu.scan").scan_many


@pytest.mark.parametrize("dtype", FORMATS)
def test_no_verdict_depends_on_the_path(dtype: str, compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every type, with and without numba, on one thread and on three: the same bits of every number."""
    tensors = [
        (any_tensor(dtype, shape, n), rows) for n, shape in enumerate(shapes_of(dtype)) for rows in (True, False)
    ]
    found = []
    for scan, threads in ((kernel.scan_many, 1), (compiled, 1), (compiled, 3), (kernel.scan_many, 2)):
        monkeypatch.setattr(kernel, "scanner", lambda nbytes, scan=scan: scan)
        monkeypatch.setattr(stats_module, "_BATCH", 1)
        with np.errstate(all="ignore"):
            found.append([repr(each) for each in measure_all(tensors, threads=threads)])
    assert found[0] == found[1] == found[2] == found[3]
    measured = sum(each.startswith("TensorStats") for each in found[0])
    assert measured in ((len(tensors),) if codecs.decoder_name(FORMATS[dtype]) == "apr_core" else (0, len(tensors)))


def test_the_errors_of_one_tensor_are_its_own() -> None:
    """A tensor that cannot be measured has its error in its place, and the others their statistics."""
    good = any_tensor("F32", (4, 4))
    short = RawTensor(good.info, good.data[:-4])
    first, second, third = measure_all([(good, False), (short, True), (good, True)])
    assert isinstance(first, TensorStats)
    assert isinstance(third, TensorStats)
    assert isinstance(second, UsageError)
    assert "expected 64 bytes for F32 [4, 4], found 60" in str(second)
    with pytest.raises(UsageError, match="found 60"):
        measure(short)


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without numba measures all the same."""
    monkeypatch.setitem(sys.modules, "apr_core.kernels.cpu.scan", None)
    assert kernel.scanner(1 << 40) is kernel.scan_many


def test_small_models_do_not_wait_for_the_compiler(pygmy: Path) -> None:
    """The bundled model is measured before numba would be imported."""
    code = f"import sys; from apr_core import admit; admit({str(pygmy)!r}); sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("dtype", "shape", "limit"), [("BF16", (1 << 21,), 1), ("Q8_0", (1 << 21,), 4), ("TQ2_0", (1 << 21,), 4)]
)
def test_memory_is_bounded(dtype: str, shape: tuple[int, ...], limit: int, compiled: Any) -> None:
    """A tensor is measured a chunk at a time, however long it is (limit in MiB)."""
    raw = raw_of(dtype, np.zeros(FORMATS[dtype].nbytes(shape), np.uint8), shape)
    measure(raw)
    tracemalloc.start()
    try:
        measure(raw, spot_rows=True)
        assert tracemalloc.get_traced_memory()[1] < limit << 20
    finally:
        tracemalloc.stop()


def test_deviation_of_a_norm_around_one() -> None:
    """Gains of 1.0 +- 1e-3 keep their deviation: the difference of two float32 sums would lose it."""
    values = (1 + 1e-3 * np.random.default_rng(3).standard_normal(100_000)).astype(np.float32)
    assert measure_values("n", values).std == pytest.approx(values.astype(np.float64).std(ddof=1), rel=1e-6)


def test_a_large_legal_value_is_not_infinite() -> None:
    """1e30 squared overflows float32; the norm must not."""
    found = measure_values("t", np.full((4, 4), 1e30, np.float32), spot_rows=True)
    assert (found.l2, found.spot_l2, found.infs) == (pytest.approx(4e30), pytest.approx(2e30), 0)


def test_the_norm_of_tiny_values_does_not_vanish() -> None:
    """1e-25 squared is zero in float32; the norm is 1e-24 all the same."""
    assert measure_values("t", np.full(100, 1e-25, np.float32)).l2 == pytest.approx(1e-24, rel=1e-6, abs=0.0)


@pytest.mark.parametrize("scale", [1e-30, 3e-20, 1e25])
def test_sixteen_bits_beyond_the_squares_of_float32(scale: float) -> None:
    """BF16 whose squares vanish, lose bits or overflow in float32 have the moments of float64."""
    values = (scale * np.random.default_rng(7).standard_normal((3, 4096))).astype(np.float32)
    stored = (values.view(np.uint32) >> 16).astype(np.uint16)
    wide = (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    found = measure(raw_of("BF16", stored, stored.shape), spot_rows=True)
    assert (found.std, found.l2, found.row_l2[0][1]) == pytest.approx(
        (wide.std(ddof=1), np.linalg.norm(wide), np.linalg.norm(wide[0])), rel=1e-9, abs=0.0
    )


def test_sixteen_bits_around_one_keep_their_deviation() -> None:
    """Gains in F16: their squares, added in float32, would leave a deviation of rounding."""
    stored = (1 + 0.002 * np.random.default_rng(8).standard_normal(65_536)).astype(np.float16)
    found = measure(raw_of("F16", stored, stored.shape))
    assert found.std == pytest.approx(stored.astype(np.float64).std(ddof=1), rel=1e-9)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "Q8_0", "AprQ8"])
@pytest.mark.parametrize("spot_rows", [True, False])
def test_the_digest_does_not_know_of_pieces(dtype: str, spot_rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a tensor is cut, the digest is that of its bytes, the last incomplete stripe too."""
    for name, small in (("CHUNK", 96), ("PIECE", 200), ("_CHUNKS", 2)):
        monkeypatch.setattr(stats_module, name, small)
    raw = any_tensor(dtype, (7, 96) if dtype == "Q8_0" else (7, 97))
    assert raw.data.size % 64
    whole = kernel.fold_lanes(kernel.digest_lanes(raw.data), raw.data.size)
    assert measure(raw, spot_rows=spot_rows).digest == whole


@pytest.mark.parametrize(("value", "zeros"), [(0.0, 4), (-0.0, 4), (9e-11, 4), (2e-10, 0), (1e-42, 4)])
def test_what_counts_as_zero(value: float, zeros: int) -> None:
    """Below 1e-10 is zero: integers read as floats at a wrong offset are denormals, not zeros."""
    assert measure_values("t", np.full(4, value, np.float32)).zeros == zeros


def test_nothing_finite() -> None:
    """A tensor of NaN has no minimum: every comparison with it fails."""
    found = measure_values("t", np.full((2, 3), np.nan, np.float32), spot_rows=True)
    assert (found.nans, found.l2, found.dead_rows) == (6, 0.0, 2)
    assert np.isnan([found.minimum, found.maximum, found.mean, found.spread, found.spot_l2]).all()


@pytest.mark.parametrize("shape", [(0,), (0, 64), (5, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    """An empty tensor has a density of NaN, which no limit allows; from a file and from memory alike."""
    for found in (measure(raw_of("F32", np.empty(shape, np.float32), shape)), measure_values("t", np.empty(shape))):
        assert (found.count, found.l2) == (0, 0.0)
        assert np.isnan(found.zero_percent)


def test_scalar() -> None:
    """A tensor without axes has one value."""
    assert measure(raw_of("F32", np.float32(3.0), ())).l2 == 3.0


def test_spot_rows_and_dead_rows() -> None:
    """Rows floor(V p / 100) are measured, and rows without a norm are counted."""
    values = np.ones((131, 4), np.float32)
    values[13], values[65] = 0, 3
    found = measure_values("e", values, spot_rows=True)
    assert found.row_l2 == ((13, 0.0), (65, 6.0), (117, 2.0))
    assert (found.dead_rows, found.spot_l2) == (1, 0.0)


def test_rows_are_not_measured_unasked() -> None:
    """Without spot rows there is no row norm to pass the gate with: it is NaN."""
    found = measure_values("e", np.ones((131, 4), np.float32))
    assert (found.row_l2, found.dead_rows) == ((), None)
    assert np.isnan(found.spot_l2)


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0", "Q5_0"])
def test_quantised_values_are_decoded(dtype: str) -> None:
    """A quantised tensor is judged on what it decodes to, as the gguf package decodes it."""
    values = np.random.default_rng(4).standard_normal((12, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[dtype]
    stored = quants.quantize(values, kind)
    assert agrees(measure(raw_of(dtype, stored, values.shape)), quants.dequantize(stored, kind))


def test_whole_tensor_layouts() -> None:
    """APR's own types have no rows to stream: one scale per tensor, or one stream of blocks over an odd length."""
    codes = np.arange(-31, 32, dtype=np.int8)
    one_scale = np.frombuffer(np.float32(0.5).tobytes() + codes.tobytes(), np.uint8)
    assert agrees(measure(raw_of("AprQ8", one_scale, (7, 9))), codes * np.float32(0.5))
    block = np.float16(0.25).tobytes() + bytes([0x9A] * 16)  # low nibble 10 is 2, high nibble 9 is 1
    stream = np.frombuffer(block * 2, np.uint8)
    assert agrees(measure(raw_of("AprQ4", stream, (7, 9))), np.resize(np.array([0.5, 0.25], np.float32), 63))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(("dtype", "size", "at"), [("Q8_0", 34, 0), ("AprQ4", 18, 0), ("Q4_K", 144, 2)])
def test_a_broken_block_scale_is_counted(dtype: str, size: int, at: int, bad: float) -> None:
    """A decoder may turn a NaN scale into zeros (AprQ4 does), so scales are looked at themselves."""
    data = np.full(size, 1, np.uint8)
    data[at : at + 2] = np.frombuffer(np.float16(bad).tobytes(), np.uint8)
    assert measure(raw_of(dtype, data, (FORMATS[dtype].block_elements,))).nonfinite_scales == 1


@pytest.mark.parametrize("dtype", ["TQ1_0", "TQ2_0"])
def test_ternary_zeros_are_whole_blocks(dtype: str) -> None:
    """A ternary matrix of mostly zero codes is legal: only blocks of nothing but zeros count."""
    values = np.zeros((2, 512), np.float32)
    values[0, ::9] = 1.0
    stored = quants.quantize(values, gguf.GGMLQuantizationType[dtype])
    assert measure(raw_of(dtype, stored, values.shape)).zeros == 512


def test_fast_enough() -> None:
    """A tenth of the 150 million BF16 weights per second that the gate needs: a slip into Python loops goes red."""
    stored = np.random.default_rng(5).integers(0x3C00, 0x3D00, (2048, 2048), dtype=np.uint16)
    raw = raw_of("BF16", stored, stored.shape)
    start = time.process_time()
    measure(raw, spot_rows=True)
    assert time.process_time() - start < stored.size / 15e6


def test_the_digest_is_of_the_stored_bytes() -> None:
    """32 hexadecimal digits that a changed bit changes; the same bytes have the same, whatever their type."""
    stored = np.random.default_rng(6).integers(0x3C00, 0x3D00, (33, 64), dtype=np.uint16)
    before = measure(raw_of("BF16", stored, stored.shape)).digest
    assert before == measure(raw_of("F16", stored, stored.shape), spot_rows=True).digest
    stored[32, 63] ^= 1
    assert (len(before), int(before, 16) > 0) == (32, True)
    assert measure(raw_of("BF16", stored, stored.shape)).digest != before
    values = np.ones((3, 5), np.float32)
    assert measure_values("t", values).digest == measure(raw_of("F32", values, (3, 5))).digest

"""The 16-lane vectors against numpy, on both paths."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from numba import njit

from apr_core.formats.blocks import encode_bf16
from apr_core.kernels.cpu import vec
from apr_core.kernels.cpu.features import available_paths
from apr_core.kernels.cpu.vec import Mode

PATHS = available_paths()


@njit
def _dot(mode: Any, total: int, codes: int, digits: int, out: int) -> None:
    vec.store_i32(out, vec.dot_bytes(mode, vec.load_i32(total), vec.load_i32(codes), vec.load_i32(digits)))


@njit
def _halves(mode: Any, at: int, out: int, groups: int) -> None:
    for group in range(groups):
        vec.store_f32(out + 64 * group, vec.load_f16(mode, at + 32 * group))


@njit
def _digits(mode: Any) -> int:
    return vec.digits_of(mode)


_anywhere = vec._define(vec.i32x16, (vec.i32x16,) * 3, vec._dot_portable)
_by_integers = vec._define(vec.f32x16, (vec.i32x16,), vec._half_to_float)


@njit
def _dot_anywhere(_: Any, total: int, codes: int, digits: int, out: int) -> None:
    vec.store_i32(out, _anywhere(vec.load_i32(total), vec.load_i32(codes), vec.load_i32(digits)))


@njit
def _halves_by_integers(_: Any, at: int, out: int, groups: int) -> None:
    for group in range(groups):
        vec.store_f32(out + 64 * group, _by_integers(vec.load_u16(at + 32 * group)))


@pytest.mark.parametrize("dot", [_dot, _dot_anywhere])
@pytest.mark.parametrize("path", PATHS)
def test_dot_of_bytes_is_exact_at_its_extremes(path: str, dot: Any) -> None:
    """255 times -128 four times, where a saturating instruction would be wrong, and random bytes."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (16, 4), dtype=np.uint8)
    digits = random.integers(-128, 128, (16, 4), dtype=np.int8)
    codes[:4], digits[:2], digits[2:4] = 255, -128, 127
    total = random.integers(-(2**30), 2**30, 16, dtype=np.int32)
    out = np.full(16, -1, np.int32)
    dot(Mode(path), total.ctypes.data, codes.ctypes.data, digits.ctypes.data, out.ctypes.data)
    expected = total + (codes.astype(np.int32) * digits.astype(np.int32)).sum(axis=1)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("convert", [_halves, _halves_by_integers])
@pytest.mark.parametrize("path", PATHS)
def test_every_float16_converts_exactly(path: str, convert: Any) -> None:
    """All 65536 patterns: subnormal, infinite and NaN ones too."""
    bits = np.arange(65536, dtype=np.uint16)
    out = np.empty(65536, np.float32)
    convert(Mode(path), bits.ctypes.data, out.ctypes.data, 4096)
    np.testing.assert_array_equal(out, bits.view(np.float16).astype(np.float32))


@njit
def _pairs(mode: Any, total: int, x: int, y: int, out: int) -> None:
    a, b = vec.load_i32(x), vec.load_i32(y)
    if vec.has_pairs(mode):
        vec.store_f32(out, vec.dot_pairs(mode, vec.load_f32(total), a, b))
    vec.store_f32(out + 64, vec.lower_bf16(a))
    vec.store_f32(out + 128, vec.upper_bf16(a))


@pytest.mark.parametrize("path", PATHS)
def test_pairs_of_bfloat16(path: str) -> None:
    """Both halves exactly, and the sum of their products where there is one; a NaN and an infinity show."""
    random = np.random.default_rng(5)
    x, y = (random.standard_normal((16, 2)).astype(np.float32) for _ in range(2))
    x[0, 0], x[1, 1] = np.nan, np.inf
    bits = [encode_bf16(values.reshape(-1)).view(np.uint16).reshape(16, 2) for values in (x, y)]
    wide = [(b.astype(np.uint32) << 16).view(np.float32) for b in bits]
    total, out = random.standard_normal(16).astype(np.float32), np.zeros((3, 16), np.float32)
    _pairs(Mode(path), total.ctypes.data, bits[0].ctypes.data, bits[1].ctypes.data, out.ctypes.data)
    expected = total + (wide[0].astype(np.float64) * wide[1]).sum(axis=1)
    np.testing.assert_allclose(out[0], expected if vec.multiplies_pairs(Mode(path)) else 0, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(out[1:], wide[0].T)


@njit
def _to_bf16(at: int, out: int) -> None:
    vec.store_u16(out, vec.bf16_bits(vec.load_f32(at)))


def test_rounding_to_bfloat16() -> None:
    """As the numpy encoder: ties to even, over to infinity, and a NaN whose bits would carry away stays one."""
    patterns = np.array([
        0x3F808000, 0x3F818000, 0x3F808001, 0xBF817FFF, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FFFFFFF,
        0xFFFFFFFF, 0x7F800001, 0x00000001, 0x80000000, 0x00008000, 0x00018000, 0x40490FDB, 0xC0490FDB,
    ], np.uint32)  # fmt: skip
    out = np.zeros(16, np.uint16)
    _to_bf16(patterns.ctypes.data, out.ctypes.data)
    np.testing.assert_array_equal(out, encode_bf16(patterns.view(np.float32)).view(np.uint16))
    assert np.isnan((out.astype(np.uint32) << 16).view(np.float32))[7:10].all()


@pytest.mark.parametrize("digits", [1, 3])
def test_a_mode_carries_its_digits(digits: int) -> None:
    """As a constant of the compiled code."""
    assert _digits(Mode("portable", digits)) == digits


def test_no_other_mode_exists() -> None:
    """A misspelt path or two digits must not compile to something."""
    for path, digits in (("avx", 1), ("portable", 2)):
        with pytest.raises(ValueError, match="no mode"):
            Mode(path, digits)


@njit
def _integers(x: int, y: int, out: int) -> None:
    a, b = vec.load_i32(x), vec.load_i32(y)
    vec.store_i32(out, vec.add_i32(a, b))
    vec.store_i32(out + 64, vec.sub_i32(a, b))
    vec.store_i32(out + 128, vec.mul_i32(a, b))
    vec.store_i32(out + 192, vec.bit_xor(vec.bit_and(a, b), vec.bit_or(a, b)))
    vec.store_i32(out + 256, vec.shift_left(a, 3))
    vec.store_i32(out + 320, vec.shift_right(a, 3))
    vec.store_i32(out + 384, vec.min_i32(a, b))
    vec.store_i32(out + 448, vec.max_i32(a, b))
    vec.store_i32(out + 512, vec.equal_i32(a, b))
    vec.store_i32(out + 576, vec.splat_i32(vec.sum_i32(a)))
    vec.store_i32(out + 640, vec.add_i32(vec.broadcast_i32(x), vec.zero_i32()))


def test_integer_operations() -> None:
    """Each against numpy; wrapping where numpy wraps."""
    random = np.random.default_rng(1)
    x, y = random.integers(-(2**31), 2**31, (2, 16)).astype(np.int32)
    y[3] = x[3]
    out = np.empty((11, 16), np.int32)
    _integers(x.ctypes.data, y.ctypes.data, out.ctypes.data)
    with np.errstate(over="ignore"):
        expected = [
            x + y,
            x - y,
            x * y,
            x ^ y,
            x << 3,
            (x.view(np.uint32) >> 3).view(np.int32),
            np.minimum(x, y),
            np.maximum(x, y),
            (x == y).astype(np.int32),
            np.full(16, x.sum(dtype=np.int64).astype(np.int32)),
            np.full(16, x[0]),
        ]
    np.testing.assert_array_equal(out, expected)


@njit
def _floats(x: int, y: int, out: int) -> None:
    a, b = vec.load_f32(x), vec.load_f32(y)
    vec.store_f32(out, vec.add_f32(a, b))
    vec.store_f32(out + 64, vec.sub_f32(a, b))
    vec.store_f32(out + 128, vec.mul_f32(a, b))
    vec.store_f32(out + 192, vec.div_f32(a, b))
    vec.store_f32(out + 256, vec.sqrt_f32(vec.abs_f32(a)))
    vec.store_f32(out + 320, vec.min_f32(a, b))
    vec.store_f32(out + 384, vec.max_f32(a, b))
    vec.store_f32(out + 448, vec.select_less(a, b, vec.zero_f32(), vec.broadcast_f32(y)))
    vec.store_f32(out + 512, vec.round_f32(a))
    vec.store_f32(out + 576, vec.splat_f32(vec.max_of_f32(a) - vec.min_of_f32(a)))
    vec.store_f32(out + 640, vec.to_f32(vec.to_i32(a)))
    vec.store_f32(out + 704, vec.as_f32(vec.as_i32(a)))
    vec.store_f32(out + 768, vec.fma(a, b, vec.splat_f32(vec.sum_f32(a))))


def test_float_operations() -> None:
    """Each against numpy's float32, bit for bit; the sum in the order of its tree."""
    random = np.random.default_rng(2)
    x, y = (random.standard_normal((2, 16)) * 9).astype(np.float32)
    x[:4] = (0.5, 1.5, -0.5, 2.5)  # ties go to even
    out = np.empty((13, 16), np.float32)
    _floats(x.ctypes.data, y.ctypes.data, out.ctypes.data)
    total = x.copy()
    while total.size > 1:
        total = total[: total.size // 2] + total[total.size // 2 :]
    expected = [
        x + y,
        x - y,
        x * y,
        x / y,
        np.sqrt(np.abs(x)),
        np.minimum(x, y),
        np.maximum(x, y),
        np.where(x < y, np.float32(0), y[0]),
        np.rint(x),
        np.full(16, x.max() - x.min()),
        np.trunc(x),
        x,
        (x.astype(np.float64) * y + np.float64(total[0])).astype(np.float32),
    ]
    np.testing.assert_array_equal(out, expected)


@njit
def _memory(at: int, out: int) -> None:
    vec.store_i32(out, vec.load_u8(at))
    vec.store_i32(out + 64, vec.load_i8(at))
    vec.store_i32(out + 128, vec.load_u16(at))
    vec.prefetch(at + (1 << 40))  # where nothing is
    vec.store_i8(out + 256, vec.load_i8(at))
    vec.store_u16(out + 272, vec.load_u16(at))
    vec.write_u8(out + 312, vec.read_u8(at))
    vec.write_u16(out + 313, vec.read_u16(at))
    vec.write_i32(out + 304, vec.read_i32(at + 1))
    vec.write_f32(out + 308, vec.read_f32(at + 1))


def test_loads_and_stores_at_any_address() -> None:
    """Widening, narrowing, and an odd address throughout."""
    raw = np.random.default_rng(3).integers(0, 256, 64, dtype=np.uint8)
    raw[4:6] = (0, 0x40)  # a float that is no NaN at the address that is read as one
    out = np.zeros(320, np.uint8)
    _memory(raw.ctypes.data + 1, out.ctypes.data)
    byte, word = raw[1:17], raw[1:33].view(np.uint16)
    np.testing.assert_array_equal(out[:64].view(np.int32), byte.astype(np.int32))
    np.testing.assert_array_equal(out[64:128].view(np.int32), byte.view(np.int8).astype(np.int32))
    np.testing.assert_array_equal(out[128:192].view(np.int32), word.astype(np.int32))
    np.testing.assert_array_equal(out[256:272], byte)
    np.testing.assert_array_equal(out[272:304].view(np.uint16), word)
    np.testing.assert_array_equal(out[304:308], raw[2:6])
    np.testing.assert_array_equal(out[308:312], raw[2:6])
    np.testing.assert_array_equal(out[312:316], [raw[1], raw[1], raw[2], 0])


@njit
def _half(value: float) -> tuple[int, float]:
    bits = vec.f16_bits(np.float32(value))
    return bits, vec.f16_value(bits)


@pytest.mark.skipif(PATHS[:1] != ("avx512vnni",), reason="needs the processor's own float16 conversion")
def test_one_float16_and_back() -> None:
    """Rounded to even, as numpy does."""
    for value in (1.0, 1.0004883, 65504.0, 6e-8, -0.1):
        bits, back = _half(value)
        assert bits == int(np.float32(value).astype(np.float16).view(np.uint16))
        assert back == float(np.float32(value).astype(np.float16))


@njit
def _counter(at: int) -> int:
    before = vec.atomic_add(at, 5)
    vec.atomic_store(at, vec.atomic_load(at) + before)
    vec.give_way()
    return vec.atomic_load(at)


def test_atomics_in_one_thread() -> None:
    """The old value comes back, and the new one is there."""
    cell = np.array([7], np.int64)
    assert _counter(cell.ctypes.data) == 19
    assert cell[0] == 19


@pytest.mark.parametrize("intrinsic", ["load_f16", "digits_of", "is_wide", "has_pairs", "dot_bytes", "dot_pairs"])
def test_a_kernel_without_a_mode_does_not_compile(intrinsic: str) -> None:
    """A number in the mode's place is a type error, not the portable path."""
    from numba.core.errors import TypingError

    function = getattr(vec, intrinsic)
    three = "(1, f(), f(), f())"
    arguments = {"load_f16": "(1, 2)", "dot_bytes": three, "dot_pairs": three}.get(intrinsic, "(1)")
    space: dict[str, Any] = {"intrinsic": function, "f": vec.zero_i32}
    exec(f"def wrong():\n    return intrinsic{arguments}\n", space)
    with pytest.raises(TypingError):
        njit(space["wrong"])()


def test_asking_for_a_path_does_not_load_numba() -> None:
    """`apr --help` and reports stay light."""
    script = "import sys, apr_core.kernels.cpu.features as f; f.available_paths(); assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@njit
def _clock() -> tuple[int, int]:
    return vec.now_ns(), vec.now_ns()


def test_the_clock_is_the_monotonic_one() -> None:
    """In nanoseconds, between two readings of Python's."""
    before = time.monotonic_ns()
    first, second = _clock()
    _clock()
    assert first <= second
    before = time.monotonic_ns()
    first, second = _clock()
    assert before <= first <= second <= time.monotonic_ns()

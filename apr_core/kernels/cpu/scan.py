"""
One pass over stored bytes at the speed of memory: `kernels.stats.scan` and its digest, compiled.

The arithmetic is that of the reference, operation by operation and in the same order, so that both give the same bits:
which path ran can never decide whether a model is admitted. A run of `stats.RUN` elements is taken 32 lanes at a time
by a loop that is written down in LLVM's own terms: numba does not vectorise sums whose order is fixed, and has no
16-bit lanes.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import event
from numba.extending import intrinsic
from numpy.typing import NDArray

from apr_core.kernels import stats
from apr_core.kernels.cpu.features import instructions
from apr_core.kernels.cpu.jit import JIT
from apr_core.kernels.cpu.vec import read_i32
from apr_core.kernels.registry import Kernel, register
from apr_core.kernels.stats import Bytes, Limits, Part, Scanned

_LANES = 32
# Bytes that are asked for ahead. The loop is long enough to starve the processor's own prefetching: without this a pass
# ran at 0.45 of the read bandwidth of a Xeon (Sapphire Rapids), with 512 at 0.56, 2048 at 0.76, 4096 to 12288 at 0.81.
_AHEAD = 4096
_I16, _I32, _I64 = (ir.IntType(bits) for bits in (16, 32, 64))
_HALF, _FLOAT, _DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()


def _vector(kind: Any, count: int) -> Any:
    return ir.VectorType(kind, count)


def _same(kind: Any, value: float) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _take(builder: Any, x: Any, lanes: list[int], y: Any = None) -> Any:
    """Pick lanes of ``x``, or of ``x`` followed by ``y``."""
    return builder.shuffle_vector(x, x if y is None else y, ir.Constant(_vector(_I32, len(lanes)), lanes))


def _at(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    return builder.inttoptr(builder.add(address, ir.Constant(_I64, offset)), kind.as_pointer())


def _load(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    loaded = builder.load(_at(builder, address, offset, kind))
    loaded.align = 1
    return loaded


def _store(builder: Any, value: Any, address: Any, offset: int) -> None:
    builder.store(value, _at(builder, address, offset, value.type)).align = 1


def _prefetch(b: Any, address: Any, offset: int) -> None:
    """Ask for a line of memory; one that does not exist is not an error."""
    line, word = _at(b, address, offset, ir.IntType(8)), ir.Constant(_I32, 0)
    name = "llvm.prefetch.p0"
    function = b.module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(ir.VoidType(), [line.type, _I32, _I32, _I32])
        function = ir.Function(b.module, kind, name)
    b.call(function, [line, word, ir.Constant(_I32, 3), ir.Constant(_I32, 1)])


def _splat(builder: Any, scalar: Any, kind: Any) -> Any:
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return _take(builder, first, [0] * kind.count)


def _extreme(builder: Any, sign: str, x: Any, y: Any, compare: Callable[..., Any] | None = None) -> Any:
    """Return lane by lane what compares so, as signed numbers or by another comparison."""
    return builder.select((compare or builder.icmp_signed)(sign, x, y), x, y)


class _Kind:
    """How the elements of one type are read: ``words`` (integers as stored), ``floats`` (their values, in order)."""

    code: int
    size: int
    wide: bool  # sums in float64 lane by lane; else in float32 within a run

    def words(self, b: Any, at: Any) -> list[Any]:
        """Load one step."""
        return [_load(b, at, 0, _vector(_I16, _LANES))]

    def floats(self, b: Any, words: list[Any]) -> list[Any]:
        """Two vectors of 16 float32."""
        raise NotImplementedError

    def ordered(self, b: Any, pair: list[Any]) -> list[Any]:
        """Bring two accumulators of `floats` into the order of the elements."""
        return pair


class _F32Kind(_Kind):
    code, size, wide = stats.F32, 4, True

    def words(self, b: Any, at: Any) -> list[Any]:
        return [_load(b, at, 64 * half, _vector(_I32, 16)) for half in (0, 1)]

    def floats(self, b: Any, words: list[Any]) -> list[Any]:
        return [b.bitcast(word, _vector(_FLOAT, 16)) for word in words]


class _BF16Kind(_Kind):
    code, size, wide = stats.BF16, 2, False

    def floats(self, b: Any, words: list[Any]) -> list[Any]:
        pairs = b.bitcast(words[0], _vector(_I32, 16))
        even = b.shl(pairs, _same(pairs.type, 16))
        odd = b.and_(pairs, _same(pairs.type, 0xFFFF0000))
        return [b.bitcast(half, _vector(_FLOAT, 16)) for half in (even, odd)]

    def ordered(self, b: Any, pair: list[Any]) -> list[Any]:
        lanes = [lane // 2 + 16 * (lane % 2) for lane in range(_LANES)]
        return [_take(b, pair[0], lanes[:16], pair[1]), _take(b, pair[0], lanes[16:], pair[1])]


class _F16Kind(_Kind):
    code, size, wide = stats.F16, 2, False

    def floats(self, b: Any, words: list[Any]) -> list[Any]:
        halves = [_take(b, words[0], list(range(16 * half, 16 * half + 16))) for half in (0, 1)]
        return [_from_half(b, half) for half in halves]


def _from_half(b: Any, words: Any) -> Any:
    """Sixteen float16 as float32, exactly; by integers where the processor has no conversion of its own."""
    floats, ints = _vector(_FLOAT, 16), _vector(_I32, 16)
    if "f16c" in instructions() or platform.machine() in ("aarch64", "arm64"):
        return b.fpext(b.bitcast(words, _vector(_HALF, 16)), floats)
    bits = b.zext(words, ints)
    shifted = b.shl(b.and_(bits, _same(ints, 0x7FFF)), _same(ints, 13))
    scaled = b.bitcast(b.fmul(b.bitcast(shifted, floats), _same(floats, 2.0**112)), ints)
    special = b.icmp_unsigned(">=", shifted, _same(ints, 0x0F800000))
    scaled = b.select(special, b.or_(shifted, _same(ints, 0x7F800000)), scaled)
    return b.bitcast(b.or_(scaled, b.shl(b.and_(bits, _same(ints, 0x8000)), _same(ints, 16))), floats)


def _repeat(b: Any, times: Any, carried: list[Any], body: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """Write down a loop, taken at least once, that turns the carried values into the next ones; return the last."""
    begin, loop = b.block, b.append_basic_block("loop")
    done = b.append_basic_block("done")
    b.branch(loop)
    b.position_at_end(loop)
    left, values = b.phi(_I64), [b.phi(value.type) for value in carried]
    now = body(list(values))
    left_now = b.sub(left, ir.Constant(_I64, 1))
    for phi, before, later in zip([left, *values], [times, *carried], [left_now, *now], strict=True):
        phi.add_incoming(before, begin)
        phi.add_incoming(later, loop)
    b.cbranch(b.icmp_signed(">", left_now, ir.Constant(_I64, 0)), loop, done)
    b.position_at_end(done)
    return now


def _ask_ahead(b: Any, kind: _Kind, address: Any) -> None:
    for offset in range(0, _LANES * kind.size, stats.STRIPE):
        _prefetch(b, address, _AHEAD + offset)


def _emit_run(
    b: Any, kind: _Kind, at: Any, steps: Any, sums: Any, counts: Any, lanes: Any, first: Any, zero: Any
) -> None:
    """
    Write down the loop over one run of whole steps, at least one.

    Writes sum and sum of squares (float64) to ``sums``; zeros, smallest and largest key (int64) to ``counts``; adds the
    stripes, from number ``first`` on, to the eight lanes of the digest at ``lanes``.
    """
    bits = 8 * kind.size
    scalar = ir.IntType(bits)
    word = _vector(scalar, 16 if kind.wide else _LANES)
    total = _vector(_DOUBLE if kind.wide else _FLOAT, 16)
    zero = _splat(b, zero if kind.wide else b.trunc(zero, _I16), word)
    twice, most = b.add(zero, zero), (1 << (bits - 1)) - 1

    def step(carried: list[Any]) -> list[Any]:
        address, zeros, low, high, key, digest, *adds = carried
        _ask_ahead(b, kind, address)
        words = kind.words(b, address)
        for stored in words:
            # two's complement in the order of the numbers: -0.0 is -1, and what is below 0 counts on downwards
            order = b.xor(stored, b.and_(b.ashr(stored, _same(word, bits - 1)), _same(word, most)))
            low, high = _extreme(b, "<", order, low), _extreme(b, ">", order, high)
            mask = b.bitcast(b.icmp_unsigned("<", b.add(order, zero), twice), ir.IntType(word.count))
            zeros = b.add(zeros, b.zext(b.ctpop(mask), _I64))
            digest, key = _stripe(b, b.bitcast(stored, key.type), digest, key)
        for half, value in enumerate(kind.floats(b, words)):
            x = b.fpext(value, total) if kind.wide else value
            adds[half] = b.fadd(adds[half], x)
            # exact for every type here: the square of 24 bits fits a float64, that of 11 bits a float32
            adds[2 + half] = b.fadd(adds[2 + half], b.fmul(x, x))
        return [b.add(address, ir.Constant(_I64, _LANES * kind.size)), zeros, low, high, key, digest, *adds]

    begin = [at, ir.Constant(_I64, 0), _same(word, most), _same(word, -most - 1), _keys(b, first)]
    begin += [_load(b, lanes, 0, _vector(_I64, 8)), *[_same(total, 0.0)] * 4]
    _, zeros, low, high, _, digest, *adds = _repeat(b, steps, begin, step)
    for part in (0, 1):
        _store(b, _tree(b, kind.ordered(b, adds[2 * part : 2 * part + 2])), sums, 8 * part)
    _store(b, digest, lanes, 0)
    _store(b, zeros, counts, 0)
    for place, (sign, keys) in enumerate((("<", low), (">", high)), start=1):
        _store(b, b.sext(_reduce(b, sign, keys), _I64), counts, 8 * place)


def _emit_lean(
    b: Any, kind: _Kind, at: Any, steps: Any, sums: Any, counts: Any, state: Any, lanes: Any, first: Any, least: Any
) -> None:
    """
    Write down the loop over one run of 16-bit elements that counts nothing: for a run without zeros, as most are.

    Does as `_emit_run`, but writes to ``counts`` only whether a magnitude is below the code ``least``; such a run must
    be taken again. The bit patterns in ``state`` grow: the largest as signed numbers (of what is positive, the
    largest), the largest as unsigned ones (of what is negative, the lowest), twice the smallest magnitude; behind them
    stands what they were.
    """
    word, total = _vector(_I16, _LANES), _vector(_FLOAT, 16)

    def step(carried: list[Any]) -> list[Any]:
        address, near, high, low, key, digest, *adds = carried
        _ask_ahead(b, kind, address)
        (stored,) = kind.words(b, address)
        near = _extreme(b, "<", b.add(stored, stored), near, b.icmp_unsigned)
        high = _extreme(b, ">", stored, high)
        low = _extreme(b, ">", stored, low, b.icmp_unsigned)
        digest, key = _stripe(b, b.bitcast(stored, key.type), digest, key)
        for half, x in enumerate(kind.floats(b, [stored])):
            adds[half] = b.fadd(adds[half], x)
            # a square is exact, so that one instruction gives what two do
            adds[2 + half] = _multiply_add(b, x, adds[2 + half])
        return [b.add(address, ir.Constant(_I64, _LANES * kind.size)), near, high, low, key, digest, *adds]

    before = [_load(b, state, 64 * place, word) for place in range(3)]
    begin = [at, _same(word, -1), *before[:2], _keys(b, first), _load(b, lanes, 0, _vector(_I64, 8))]
    _, near, high, low, _, digest, *adds = _repeat(b, steps, [*begin, *[_same(total, 0.0)] * 4], step)
    for part in (0, 1):
        _store(b, _tree(b, kind.ordered(b, adds[2 * part : 2 * part + 2])), sums, 8 * part)
    _store(b, digest, lanes, 0)
    limit = b.trunc(b.shl(least, ir.Constant(_I32, 1)), _I16)
    small = b.bitcast(b.icmp_unsigned("<", near, _splat(b, limit, word)), ir.IntType(_LANES))
    _store(b, b.zext(small, _I64), counts, 0)
    now = [high, low, _extreme(b, "<", near, before[2], b.icmp_unsigned)]
    for place, patterns in enumerate([*now, *before]):
        _store(b, patterns, state, 64 * place)


def _multiply_add(b: Any, x: Any, y: Any) -> Any:
    """Return ``x * x + y``, rounded once or twice, whichever the processor does faster."""
    name = "llvm.fmuladd.v16f32"
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(x.type, [x.type] * 3), name)
    return b.call(function, [x, x, y])


def _keys(b: Any, first: Any) -> Any:
    """Return the keys of the eight lanes of a stripe."""
    word = _vector(_I64, 8)
    moved = b.mul(first, ir.Constant(_I64, stats.KEY_STEP))
    return b.add(ir.Constant(word, stats.LANE_KEYS.tolist()), _splat(b, moved, word))


def _stripe(b: Any, data: Any, digest: Any, key: Any) -> tuple[Any, Any]:
    """Add one stripe to the lanes of the digest; return them and the keys of the next stripe."""
    word = data.type
    mixed = b.xor(data, key)
    product = b.mul(b.and_(mixed, _same(word, 0xFFFFFFFF)), b.lshr(mixed, _same(word, 32)))
    digest = b.add(b.add(digest, product), _take(b, data, [lane ^ 1 for lane in range(8)]))
    return digest, b.add(key, _same(word, stats.KEY_STEP))


def _reduce(b: Any, sign: str, x: Any) -> Any:
    """Return the smallest or the largest lane."""
    width = x.type.count
    while width > 1:
        width //= 2
        x = _extreme(b, sign, _take(b, x, list(range(width))), _take(b, x, list(range(width, 2 * width))))
    return b.extract_element(x, ir.Constant(_I32, 0))


def _tree(b: Any, pair: list[Any]) -> Any:
    """Sum 32 lanes in float64: the upper half on the lower, until one is left."""
    wide = _vector(_DOUBLE, 16)
    low, high = (half if half.type == wide else b.fpext(half, wide) for half in pair)
    x, width = b.fadd(low, high), 16
    while width > 1:
        width //= 2
        x = b.fadd(_take(b, x, list(range(width))), _take(b, x, list(range(width, 2 * width))))
    return b.extract_element(x, ir.Constant(_I32, 0))


def _run_of(kind: _Kind) -> Any:
    signature = types.void(*[types.int64] * 6, types.int32)

    def emit(context: Any, builder: Any, _signature: Any, values: tuple[Any, ...]) -> Any:
        _emit_run(builder, kind, *values)
        return context.get_dummy_value()

    def run(context: Any, at: Any, steps: Any, sums: Any, counts: Any, lanes: Any, first: Any, zero: Any) -> Any:
        return signature, emit

    return intrinsic(run)


def _lean_of(kind: _Kind) -> Any:
    signature = types.void(*[types.int64] * 7, types.int32)

    def emit(context: Any, builder: Any, _signature: Any, values: tuple[Any, ...]) -> Any:
        _emit_lean(builder, kind, *values)
        return context.get_dummy_value()

    def lean(
        context: Any, at: Any, steps: Any, sums: Any, counts: Any, state: Any, lanes: Any, first: Any, least: Any
    ) -> Any:
        return signature, emit

    return intrinsic(lean)


_run_f32, _run_f16, _run_bf16 = (_run_of(kind) for kind in (_F32Kind(), _F16Kind(), _BF16Kind()))
_lean_f16, _lean_bf16 = (_lean_of(kind) for kind in (_F16Kind(), _BF16Kind()))


@intrinsic
def _stripes(typing_context: Any, at: Any, count: Any, first: Any, lanes: Any) -> Any:
    """Add ``count`` stripes, at least one, from number ``first`` on to the eight lanes at ``lanes``."""

    def emit(context: Any, b: Any, _signature: Any, values: tuple[Any, ...]) -> Any:
        _emit_stripes(b, *values)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), emit


def _emit_stripes(b: Any, at: Any, count: Any, first: Any, lanes: Any) -> None:
    def step(carried: list[Any]) -> list[Any]:
        address, key, digest = carried
        digest, key = _stripe(b, _load(b, address, 0, key.type), digest, key)
        return [b.add(address, ir.Constant(_I64, stats.STRIPE)), key, digest]

    begin = [at, _keys(b, first), _load(b, lanes, 0, _vector(_I64, 8))]
    _store(b, _repeat(b, count, begin, step)[-1], lanes, 0)


@intrinsic
def _read_u8(typing_context: Any, at: Any) -> Any:
    """Read one byte."""

    def emit(_context: Any, b: Any, _signature: Any, values: tuple[Any, ...]) -> Any:
        return _load(b, values[0], 0, ir.IntType(8))

    return types.uint8(types.int64), emit


@intrinsic
def _read_u16(typing_context: Any, at: Any) -> Any:
    """Read 16 bits at any address."""

    def emit(_context: Any, b: Any, _signature: Any, values: tuple[Any, ...]) -> Any:
        return b.zext(_load(b, values[0], 0, _I16), _I32)

    return types.int32(types.int64), emit


@intrinsic
def _float_of(typing_context: Any, bits: Any) -> Any:
    """Return the float32 of 32 bits."""

    def emit(_context: Any, b: Any, _signature: Any, values: tuple[Any, ...]) -> Any:
        return b.bitcast(values[0], _FLOAT)

    return types.float32(types.int32), emit


@intrinsic
def _half_of(typing_context: Any, bits: Any) -> Any:
    """Return the float32 of a float16."""

    def emit(_context: Any, b: Any, _signature: Any, values: tuple[Any, ...]) -> Any:
        word = b.trunc(values[0], _I16)
        return b.extract_element(_from_half(b, _splat(b, word, _vector(_I16, 16))), ir.Constant(_I32, 0))

    return types.float32(types.int32), emit


_jit: Callable[..., Any] = njit(**JIT)
_F32, _F16, _BF16 = stats.F32, stats.F16, stats.BF16
_RUN, _SMALLEST = stats.RUN, stats.SMALLEST_SQUARES
_EXACT_SQUARES = 0x2000  # BF16 code of 2 ** -63: the square of a smaller number may be subnormal, and rounded
_ZEROS, _NANS, _INFS, _LOW, _HIGH, _SUM, _SQUARES, _DEAD, _SPOT = range(9)


@_jit
def _element(kind: Any, bits: Any) -> Any:
    """Return the float32 of one stored element."""
    if kind == _F32:
        return _float_of(bits)
    return _half_of(bits) if kind == _F16 else _float_of(bits << 16)


@_jit
def _slowly(kind: Any, at: Any, count: Any, zero: Any, record: Any, lanes: Any, sums: Any) -> Any:
    """Add the finite values of one run in float64; return what in it is not finite: 0, infinite or NaN."""
    lanes[:] = 0.0
    size = 4 if kind == _F32 else 2
    low, high, broken, zeros = np.inf, -np.inf, 0.0, 0
    for i in range(count):
        bits = read_i32(at + size * i) if kind == _F32 else _read_u16(at + size * i)
        x = np.float64(_element(kind, bits))
        zeros += (bits & (0x7FFFFFFF if kind == _F32 else 0x7FFF)) < zero
        if abs(x) < np.inf:
            low, high = min(low, x), max(high, x)
            lanes[0, i % 32] += x
            lanes[1, i % 32] += x * x
        else:
            record[_NANS if x != x else _INFS] += 1
            broken += abs(x)
    record[_ZEROS] += zeros
    record[_LOW], record[_HIGH] = min(record[_LOW], low + 0.0), max(record[_HIGH], high + 0.0)
    for part in range(2):
        width = 16
        while width:
            for lane in range(width):
                lanes[part, lane] += lanes[part, lane + width]
            width //= 2
        sums[part] = lanes[part, 0]
    return broken


@_jit
def _run(
    kind: Any, at: Any, steps: Any, zero: Any, record: Any, sums: Any, counts: Any, digest: Any, first: Any
) -> Any:
    """Scan whole steps; False, and nothing recorded, when this run must be added in float64."""
    out, out_counts, lanes = sums.ctypes.data, counts.ctypes.data, digest.ctypes.data
    if kind == _F32:
        _run_f32(at, steps, out, out_counts, lanes, first, zero)
    elif kind == _F16:
        _run_f16(at, steps, out, out_counts, lanes, first, zero)
    else:
        _run_bf16(at, steps, out, out_counts, lanes, first, zero)
    kept = sums[1] < np.inf if kind == _F32 else _holds(sums, 32 * steps)
    if kept:
        record[_ZEROS] += counts[0]
        record[_LOW] = min(record[_LOW], _of_key(kind, counts[1]) + 0.0)
        record[_HIGH] = max(record[_HIGH], _of_key(kind, counts[2]) + 0.0)
    return kept


@_jit
def _holds(sums: Any, count: Any) -> Any:
    """Say whether float32 was enough for the sums of a run."""
    total, squares = sums[0], sums[1]
    return squares >= _SMALLEST and squares < np.inf and squares - total * total / count >= 0.5 * squares


@_jit
def _lean(
    kind: Any, at: Any, steps: Any, least: Any, state: Any, sums: Any, counts: Any, digest: Any, first: Any
) -> Any:
    """Scan whole steps without counting; False, and nothing but the digest taken, when something must be counted."""
    out, out_counts, grown, lanes = sums.ctypes.data, counts.ctypes.data, state.ctypes.data, digest.ctypes.data
    if kind == _F16:
        _lean_f16(at, steps, out, out_counts, grown, lanes, first, least)
    else:
        _lean_bf16(at, steps, out, out_counts, grown, lanes, first, least)
    kept = counts[0] == 0 and _holds(sums, 32 * steps)
    if not kept:
        state[:3] = state[3:]
    return kept


@_jit
def _add_extremes(kind: Any, state: Any, record: Any) -> None:
    """Record the smallest and the largest value of all lean runs of a part."""
    high: Any = -0x8000
    low: Any = 0
    near: Any = 0xFFFF
    for lane in range(32):
        high = max(high, np.int64(state[0, lane]))
        low = max(low, np.int64(state[1, lane]) & 0xFFFF)
        near = min(near, np.int64(state[2, lane]) & 0xFFFF)
    if near < 0xFFFF:  # there was one; where all signs are equal, the smallest magnitude is the other extreme
        lowest = low if low >= 0x8000 else near >> 1
        highest = high if high >= 0 else near >> 1 | 0x8000
        record[_LOW] = min(record[_LOW], np.float64(_element(kind, np.int32(lowest))))
        record[_HIGH] = max(record[_HIGH], np.float64(_element(kind, np.int32(highest))))


@_jit
def _of_key(kind: Any, key: Any) -> Any:
    """Turn the key that orders bit patterns as their values back into the value."""
    most = 0x7FFFFFFF if kind == _F32 else 0x7FFF
    return _element(kind, np.int32(key ^ ((key >> 63) & most)))


@_jit
def _digest_rest(part: Any, done: Any, lanes: Any) -> None:
    """Take the digest of the stored bytes from stripe ``done`` on, the last stripe filled with zeros."""
    at, nbytes = part[_STORED], part[_STORED_BYTES]
    whole = nbytes // 64
    if done < whole:
        _stripes(at + 64 * done, whole - done, part[_STRIPE] + done, lanes.ctypes.data)
    if 64 * whole < nbytes:
        rest = np.zeros(64, np.uint8)
        for i in range(64 * whole, nbytes):
            rest[i - 64 * whole] = _read_u8(at + i)
        _stripes(rest.ctypes.data, 1, part[_STRIPE] + whole, lanes.ctypes.data)


# Fields of a part as the compiled loop reads it, int64.
_KIND, _AT, _ROWS, _COLUMNS, _FIRST_ROW, _ZERO, _STORED, _STORED_BYTES, _STRIPE = range(9)
_FIELDS = 9


@_jit
def _scan_part(part: Any, spots: Any, dead_below: Any, record: Any, digest: Any) -> None:
    kind, at, columns, zero = part[_KIND], part[_AT], part[_COLUMNS], np.int32(part[_ZERO])
    size = 4 if kind == _F32 else 2
    sums, counts, lanes = np.empty(2), np.empty(3, np.int64), np.empty((2, 32))
    # Where the elements are the stored bytes, and runs begin at whole stripes, the digest is taken in the same loop;
    # else what that loop adds is thrown away.
    together = part[_STORED] == at and (part[_ROWS] == 1 or columns % 32 == 0)
    taken = digest if together else np.empty(8, np.uint64)
    stripe, stripes = part[_STRIPE], 0
    lean, least = kind != _F32, max(zero, _EXACT_SQUARES) if kind == _BF16 else zero
    state, thrown = np.empty((6, 32), np.int16), np.empty(8, np.uint64)
    state[0], state[1], state[2] = -0x8000, 0, -1
    for row in range(part[_ROWS] if columns else 0):
        row_squares, broken = 0.0, 0.0
        for start in range(0, columns, _RUN):
            count = min(_RUN, columns - start)
            steps = count // 32
            if steps:
                if not (lean and _lean(kind, at, steps, least, state, sums, counts, taken, stripe + stripes)):
                    to = thrown if lean else taken  # a lean run that was in vain has taken the digest
                    kept = _run(kind, at, steps, zero, record, sums, counts, to, stripe + stripes)
                    lean = kept and counts[0] == 0 and kind != _F32
                    if not kept:
                        broken += _slowly(kind, at, 32 * steps, zero, record, lanes, sums)
                record[_SUM] += sums[0]
                row_squares += sums[1]
                stripes += steps * size // 2
            if 32 * steps < count:
                rest = at + size * 32 * steps
                broken += _slowly(kind, rest, count - 32 * steps, zero, record, lanes, sums)
                record[_SUM] += sums[0]
                row_squares += sums[1]
            at += size * count
        record[_SQUARES] += row_squares
        norm = np.sqrt(row_squares + broken)
        record[_DEAD] += not norm >= dead_below
        for place in range(spots.size):
            if spots[place] == part[_FIRST_ROW] + row:
                record[_SPOT + place] = norm
    _add_extremes(kind, state, record)
    _digest_rest(part, stripes if together else 0, digest)


@_jit
def _scan_parts(parts: Any, spots: Any, dead_below: Any, records: Any, digests: Any) -> None:
    for i in range(parts.shape[0]):
        _scan_part(parts[i], spots[i], dead_below, records[i], digests[i])


def scan_many(parts: Sequence[Part], limits: Limits) -> list[tuple[NDArray[np.float64], NDArray[np.uint64]]]:
    """Measure parts as `stats.scan` does, all in one call that holds no lock of Python."""
    data = [(np.ascontiguousarray(part.data), np.ascontiguousarray(part.stored)) for part in parts]
    fields = np.array(
        [
            (
                part.kind,
                elements.ctypes.data,
                part.rows,
                part.columns,
                part.first_row,
                _zero_codes(part.kind, limits.zero_below),
                stored.ctypes.data,
                stored.size,
                part.stripe,
            )
            for part, (elements, stored) in zip(parts, data, strict=True)
        ],
        np.int64,
    ).reshape(len(parts), _FIELDS)
    most = max((len(part.spots) for part in parts), default=0)
    spots = np.array([part.spots + (-1,) * (most - len(part.spots)) for part in parts], np.int64).reshape(
        len(parts), most
    )
    records, digests = np.zeros((len(parts), _SPOT + most)), np.zeros((len(parts), 8), np.uint64)
    records[:, _LOW], records[:, _HIGH], records[:, _SPOT:] = np.inf, -np.inf, np.nan
    _scan_parts(fields, spots, limits.dead_below, records, digests)
    return [(records[i, : _SPOT + len(part.spots)], digests[i]) for i, part in enumerate(parts)]


_zero_codes = cache(stats.zero_codes)


class _Notice(event.Listener):
    """Says once that something is being compiled, before the seconds that it takes."""

    def __init__(self) -> None:
        self.said = False

    def on_start(self, _event: Any) -> None:
        """Hear of the start of one function; there are twenty."""
        if not self.said:
            logging.getLogger("apr_core").warning("compiling the scan (once; later starts load it from the cache)")
        self.said = True

    def on_end(self, _event: Any) -> None:
        """Nothing to say."""


@cache
def prepare() -> None:
    """Compile the scan, or load it from the cache, before threads ask for it."""
    with event.install_listener("numba:compile", _Notice()):
        scan_many([Part(_BF16, np.zeros(64, np.uint8), 1, 32)], Limits(0.0, 0.0))


def _examples(kind: int) -> Iterator[tuple[Bytes, int, int]]:
    """
    Stored elements, rows and columns: odd lengths around a step and a run, at an odd address.

    Healthy values, with a mean too; NaN with payloads, infinities, both zeros and subnormals; values around 1, of one
    sign, or whose squares vanish or overflow in float32.
    """
    random = np.random.default_rng(kind)
    shapes = ((1, 1), (3, 63), (1, 64), (5, 896), (2, 5000), (7, 4096), (1, 4 * stats.RUN + 33), (0, 5), (5, 0))
    for rows, columns in shapes:
        healthy = (0.02 * random.standard_normal((rows, columns))).astype(np.float32)
        strange = healthy.copy().reshape(-1)
        for at, value in enumerate((np.nan, -np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-40, 6e-8, 1e-11, -3e38)):
            strange[at :: 37 + 5 * at] = value
        strange.view(np.uint32)[3::97] = 0xFF812345  # a signalling NaN with its sign and a payload
        with np.errstate(all="ignore"):
            for values in (
                healthy,
                strange,
                np.float32(1) + healthy / np.float32(64),
                healthy + np.float32(0.012),
                np.full(healthy.shape, 0.02, np.float32),
                healthy * np.float32(1e-30),
                healthy * np.float32(1e25),
                np.exp(np.float32(100) * healthy),
                -np.exp(np.float32(100) * healthy),
            ):
                yield _unaligned(_encoded(kind, values)), rows, columns


def _encoded(kind: int, values: NDArray[np.float32]) -> Bytes:
    flat = np.ascontiguousarray(values).reshape(-1)
    if kind == stats.F16:
        return flat.astype(np.float16).view(np.uint8)
    return flat.view(np.uint8) if kind == stats.F32 else (flat.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def _unaligned(data: Bytes) -> Bytes:
    """Copy to an odd address, as a SafeTensors header of odd length leaves a tensor."""
    room = np.empty(data.size + 1, np.uint8)
    room[1:] = data
    return room[1:]


def _record(
    scanner: Callable[[Sequence[Part], Limits], list[Scanned]], kind: int
) -> Callable[..., NDArray[np.float64]]:
    def run(data: Bytes, rows: int, columns: int) -> NDArray[np.float64]:
        part = Part(kind, data, rows, columns, 2, (2, 3, 6))
        return scanner([part], Limits(1e-10, 1e-6))[0][0]

    return run


def _digest(scanner: Callable[[Sequence[Part], Limits], list[Scanned]]) -> Callable[..., NDArray[np.uint64]]:
    def run(kind: int, data: Bytes, rows: int, columns: int) -> NDArray[np.uint64]:
        # taken with the scan where rows are whole stripes, behind it where they are not or another piece is meant
        whole = Part(kind, data, rows, columns, 0, (), data, 5)
        shifted = Part(kind, data, rows, columns, 0, (), data[3:], 6)
        return np.stack([lanes for _, lanes in scanner([whole, shifted], Limits(1e-10, 1e-6))])

    return run


for _name, _code in stats.KINDS.items():
    _reference = _record(stats.scan_many, _code)
    register(
        Kernel("scan", _name, "cpu", "numba", "exact", _record(scan_many, _code), _reference, partial(_examples, _code))
    )
register(
    Kernel(
        "digest",
        "any",
        "cpu",
        "numba",
        "exact",
        _digest(scan_many),
        _digest(stats.scan_many),
        lambda: ((kind, *example) for kind in stats.KINDS.values() for example in _examples(kind)),
    )
)

"""
Vectors of 16 lanes for numba, with the operations that its loops do not give: explicit loads, dot products of bytes,
conversions of float16, atomics.

LLVM does not find the byte dot product (VNNI) in plain numba loops, which therefore read 5 to 10 times less per second
than these. Each function is an `intrinsic`: it may be called from ``@njit`` code only, and becomes one or a few LLVM
instructions. Addresses are int64, e.g. ``array.ctypes.data``; loads and stores need no alignment, and nothing checks
bounds.

All but the dot products and `load_f16` are generic LLVM, legal on every target that numba has (a 16-lane vector becomes
two AVX2 or four NEON registers). Those take a `Mode` as first argument, whose *type* chooses the instructions when the
caller is compiled: one source serves both paths, and a machine without AVX-512 never sees its instructions.

The byte order is little-endian throughout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import (
    NativeValue,
    intrinsic,
    models,
    register_model,
    typeof_impl,
    unbox,
)

from apr_core.kernels.cpu.features import AVX512, PATHS, instructions, multiplies_bf16

LANES = 16

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F16, _F32, _F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
_BYTES, _WORDS, _INTS = (ir.VectorType(kind, LANES) for kind in (_I8, _I16, _I32))
_HALVES, _FLOATS = ir.VectorType(_F16, LANES), ir.VectorType(_F32, LANES)
_WORDS32, _INTS32 = ir.VectorType(_I16, 32), ir.VectorType(_I32, 32)
_BYTES64 = ir.VectorType(_I8, 64)

Emit = Callable[..., Any]


# ---- types


class VectorType(types.Type):
    """A vector of 16 lanes in numba's type system."""

    def __init__(self, name: str, llvm: ir.VectorType) -> None:
        self.llvm = llvm
        super().__init__(name=name)


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: VectorType) -> None:
        super().__init__(manager, vector, vector.llvm)


i32x16 = VectorType("i32x16", _INTS)
f32x16 = VectorType("f32x16", _FLOATS)
_address = types.int64
_int = types.int32
_float = types.float32


@dataclass(frozen=True)
class Mode:
    """
    How a kernel is compiled; kernels take one as their first argument, and each combination is compiled once.

    Attributes:
        path: ``avx512vnni`` or ``portable``.
        digits: Signed 8-bit digits per activation: 1 (``speed``, as llama.cpp's 8-bit activations) or 3 (``exact``:
            24 bits, as many as a float32 has).
    """

    path: str
    digits: int = 1

    def __post_init__(self) -> None:
        if self.path not in PATHS or self.digits not in (1, 3):
            raise ValueError(f"no mode of path {self.path} and {self.digits} digits")


class ModeType(types.Type):
    """The type of one `Mode`; it has no value at run time."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        super().__init__(name=f"mode_{mode.path}_{mode.digits}")


register_model(ModeType)(models.OpaqueModel)


@typeof_impl.register(Mode)
def _type_of_mode(mode: Mode, _context: Any) -> ModeType:
    return ModeType(mode)


@unbox(ModeType)
def _unbox_mode(_type: ModeType, _mode: Any, c: Any) -> NativeValue:
    return NativeValue(c.context.get_dummy_value())


# ---- how an operation is written down


def _define(result: types.Type, arguments: tuple[types.Type, ...], emit: Emit) -> Any:
    """
    Make an intrinsic of fixed types. ``emit(builder, *values)`` returns the LLVM value; None for a void one.

    numba reads the number of arguments off the Python function, hence one spelling for each.
    """
    signature = result(*arguments)

    def generate(context: Any, builder: Any, _signature: Any, values: tuple[Any, ...]) -> Any:
        value = emit(builder, *values)
        return context.get_dummy_value() if result is types.void else value

    def none(typing_context: Any) -> Any:
        return signature, generate

    def one(typing_context: Any, a: Any) -> Any:
        return signature, generate

    def two(typing_context: Any, a: Any, b: Any) -> Any:
        return signature, generate

    def three(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
        return signature, generate

    def four(typing_context: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        return signature, generate

    return intrinsic((none, one, two, three, four)[len(arguments)])


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: Any, address: Any, kind: Any) -> Any:
    loaded = builder.load(_pointer(builder, address, kind))
    loaded.align = 1
    return loaded


def _store(builder: Any, value: Any, address: Any, kind: Any) -> None:
    builder.store(value, _pointer(builder, address, kind)).align = 1


def _splat(builder: Any, scalar: Any, vector: ir.VectorType) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count))


def _same(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def _call(builder: Any, name: str, result: Any, *values: Any) -> Any:
    """Call an LLVM intrinsic or a C function, declaring it once per module."""
    module = builder.module
    function = module.globals.get(name)
    if function is None:
        function = ir.Function(module, ir.FunctionType(result, [value.type for value in values]), name)
    return builder.call(function, values)


# ---- loads and stores


def _prefetch(builder: Any, address: Any) -> None:
    """To be read, and to be kept in every cache: the constants of LLVM's intrinsic."""
    to_read, keep, data = (ir.Constant(_I32, value) for value in (0, 3, 1))
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), _pointer(builder, address, _I8), to_read, keep, data)


load_i32 = _define(i32x16, (_address,), lambda b, at: _load(b, at, _INTS))
"""Load 16 int32."""
load_f32 = _define(f32x16, (_address,), lambda b, at: _load(b, at, _FLOATS))
"""Load 16 float32."""
load_u8 = _define(i32x16, (_address,), lambda b, at: b.zext(_load(b, at, _BYTES), _INTS))
"""Load 16 unsigned bytes, each widened to a lane."""
load_i8 = _define(i32x16, (_address,), lambda b, at: b.sext(_load(b, at, _BYTES), _INTS))
"""Load 16 signed bytes, each widened to a lane."""
load_u16 = _define(i32x16, (_address,), lambda b, at: b.zext(_load(b, at, _WORDS), _INTS))
"""Load 16 unsigned 16-bit words, each widened to a lane."""
store_i32 = _define(types.void, (_address, i32x16), lambda b, at, v: _store(b, v, at, _INTS))
"""Store 16 int32."""
store_f32 = _define(types.void, (_address, f32x16), lambda b, at, v: _store(b, v, at, _FLOATS))
"""Store 16 float32."""
store_i8 = _define(types.void, (_address, i32x16), lambda b, at, v: _store(b, b.trunc(v, _BYTES), at, _BYTES))
"""Store the low byte of each lane."""
store_u16 = _define(types.void, (_address, i32x16), lambda b, at, v: _store(b, b.trunc(v, _WORDS), at, _WORDS))
"""Store the low 16 bits of each lane."""
read_i32 = _define(_int, (_address,), lambda b, at: _load(b, at, _I32))
"""Read one int32 at any address."""
read_f32 = _define(_float, (_address,), lambda b, at: _load(b, at, _F32))
"""Read one float32 at any address."""
read_u8 = _define(_int, (_address,), lambda b, at: b.zext(_load(b, at, _I8), _I32))
"""Read one unsigned byte."""
read_u16 = _define(_int, (_address,), lambda b, at: b.zext(_load(b, at, _I16), _I32))
"""Read one unsigned 16-bit word at any address."""
write_u8 = _define(types.void, (_address, _int), lambda b, at, v: _store(b, b.trunc(v, _I8), at, _I8))
"""Write the low byte."""
write_u16 = _define(types.void, (_address, _int), lambda b, at, v: _store(b, b.trunc(v, _I16), at, _I16))
"""Write the low 16 bits at any address."""
write_i32 = _define(types.void, (_address, _int), lambda b, at, v: _store(b, v, at, _I32))
"""Write one int32 at any address."""
write_f32 = _define(types.void, (_address, _float), lambda b, at, v: _store(b, v, at, _F32))
"""Write one float32 at any address."""
splat_i32 = _define(i32x16, (_int,), lambda b, v: _splat(b, v, _INTS))
"""Copy one int32 into all lanes."""
splat_f32 = _define(f32x16, (_float,), lambda b, v: _splat(b, v, _FLOATS))
"""Copy one float32 into all lanes."""
broadcast_i32 = _define(i32x16, (_address,), lambda b, at: _splat(b, _load(b, at, _I32), _INTS))
"""Load one int32 (four bytes of activations) into all lanes."""
broadcast_f32 = _define(f32x16, (_address,), lambda b, at: _splat(b, _load(b, at, _F32), _FLOATS))
"""Load one float32 into all lanes."""
prefetch = _define(types.void, (_address,), _prefetch)
"""Ask for the cache line at an address, which need not be there."""
zero_i32 = _define(i32x16, (), lambda b: _same(_INTS, 0))
"""Sixteen zeros."""
zero_f32 = _define(f32x16, (), lambda b: _same(_FLOATS, 0.0))
"""Sixteen zeros."""

# ---- integers

add_i32 = _define(i32x16, (i32x16, i32x16), lambda b, x, y: b.add(x, y))
"""Add lane by lane, wrapping."""
sub_i32 = _define(i32x16, (i32x16, i32x16), lambda b, x, y: b.sub(x, y))
"""Subtract lane by lane, wrapping."""
mul_i32 = _define(i32x16, (i32x16, i32x16), lambda b, x, y: b.mul(x, y))
"""Multiply lane by lane, keeping the low 32 bits."""
bit_and = _define(i32x16, (i32x16, i32x16), lambda b, x, y: b.and_(x, y))
"""AND lane by lane."""
bit_or = _define(i32x16, (i32x16, i32x16), lambda b, x, y: b.or_(x, y))
"""OR lane by lane."""
bit_xor = _define(i32x16, (i32x16, i32x16), lambda b, x, y: b.xor(x, y))
"""XOR lane by lane."""
shift_left = _define(i32x16, (i32x16, _int), lambda b, x, n: b.shl(x, _splat(b, n, _INTS)))
"""Shift each lane left by ``n`` < 32 bits."""
shift_right = _define(i32x16, (i32x16, _int), lambda b, x, n: b.lshr(x, _splat(b, n, _INTS)))
"""Shift each lane right by ``n`` < 32 bits, filling with zeros."""
min_i32 = _define(i32x16, (i32x16, i32x16), lambda b, x, y: b.select(b.icmp_signed("<", x, y), x, y))
"""The smaller of each pair of lanes."""
max_i32 = _define(i32x16, (i32x16, i32x16), lambda b, x, y: b.select(b.icmp_signed(">", x, y), x, y))
"""The larger of each pair of lanes."""
equal_i32 = _define(i32x16, (i32x16, i32x16), lambda b, x, y: b.zext(b.icmp_signed("==", x, y), _INTS))
"""1 in each lane where both are equal, else 0."""
sum_i32 = _define(_int, (i32x16,), lambda b, x: _call(b, "llvm.vector.reduce.add.v16i32", _I32, x))
"""Sum of the lanes, wrapping."""

# ---- floats


def _reduce_sum(builder: Any, x: Any) -> Any:
    """Sum of the lanes in a fixed tree: the same bits on every call."""
    width = LANES
    while width > 1:
        width //= 2
        kind = ir.VectorType(_I32, width)
        low = builder.shuffle_vector(x, x, ir.Constant(kind, list(range(width))))
        high = builder.shuffle_vector(x, x, ir.Constant(kind, list(range(width, 2 * width))))
        x = builder.fadd(low, high)
    return builder.extract_element(x, ir.Constant(_I32, 0))


def _fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return _call(builder, "llvm.fma.v16f32", _FLOATS, x, y, z)


def _absolute(builder: Any, x: Any) -> Any:
    bits = builder.and_(builder.bitcast(x, _INTS), _same(_INTS, 0x7FFFFFFF))
    return builder.bitcast(bits, _FLOATS)


add_f32 = _define(f32x16, (f32x16, f32x16), lambda b, x, y: b.fadd(x, y))
"""Add lane by lane."""
sub_f32 = _define(f32x16, (f32x16, f32x16), lambda b, x, y: b.fsub(x, y))
"""Subtract lane by lane."""
mul_f32 = _define(f32x16, (f32x16, f32x16), lambda b, x, y: b.fmul(x, y))
"""Multiply lane by lane."""
div_f32 = _define(f32x16, (f32x16, f32x16), lambda b, x, y: b.fdiv(x, y))
"""Divide lane by lane."""
fma = _define(f32x16, (f32x16, f32x16, f32x16), _fma)
"""``x * y + z``, rounded once."""
abs_f32 = _define(f32x16, (f32x16,), _absolute)
"""Clear each sign."""
min_f32 = _define(f32x16, (f32x16, f32x16), lambda b, x, y: b.select(b.fcmp_ordered("<", y, x), y, x))
"""``y`` where it is smaller, else ``x``: a NaN in ``x`` stays, one in ``y`` is passed over."""
max_f32 = _define(f32x16, (f32x16, f32x16), lambda b, x, y: b.select(b.fcmp_ordered(">", y, x), y, x))
"""``y`` where it is larger, else ``x``: a NaN in ``x`` stays, one in ``y`` is passed over."""
select_less = _define(
    f32x16, (f32x16, f32x16, f32x16, f32x16), lambda b, x, y, yes, no: b.select(b.fcmp_ordered("<", x, y), yes, no)
)
"""``yes`` where x < y, else ``no`` (also where either is NaN)."""
sqrt_f32 = _define(f32x16, (f32x16,), lambda b, x: _call(b, "llvm.sqrt.v16f32", _FLOATS, x))
"""Square root lane by lane."""
round_f32 = _define(f32x16, (f32x16,), lambda b, x: _call(b, "llvm.rint.v16f32", _FLOATS, x))
"""Round to the nearest integer, ties to even."""
sum_f32 = _define(_float, (f32x16,), _reduce_sum)
"""Sum of the lanes, always in the same order."""
max_of_f32 = _define(_float, (f32x16,), lambda b, x: _call(b, "llvm.vector.reduce.fmax.v16f32", _F32, x))
"""Largest lane; NaN lanes are passed over."""
min_of_f32 = _define(_float, (f32x16,), lambda b, x: _call(b, "llvm.vector.reduce.fmin.v16f32", _F32, x))
"""Smallest lane; NaN lanes are passed over."""

# ---- conversions

to_f32 = _define(f32x16, (i32x16,), lambda b, x: b.sitofp(x, _FLOATS))
"""Convert each int32, rounding to nearest."""
to_i32 = _define(i32x16, (f32x16,), lambda b, x: b.fptosi(x, _INTS))
"""Convert each float32 towards zero; the result is undefined beyond int32."""
as_i32 = _define(i32x16, (f32x16,), lambda b, x: b.bitcast(x, _INTS))
"""The bits of 16 floats."""
as_f32 = _define(f32x16, (i32x16,), lambda b, x: b.bitcast(x, _FLOATS))
"""Sixteen floats from their bits."""


def _lower_bf16(builder: Any, pairs: Any) -> Any:
    return builder.bitcast(builder.shl(pairs, _same(_INTS, 16)), _FLOATS)


def _upper_bf16(builder: Any, pairs: Any) -> Any:
    return builder.bitcast(builder.and_(pairs, _same(_INTS, -(1 << 16))), _FLOATS)


def _bf16_bits(builder: Any, x: Any) -> Any:
    """Add half a unit less the tie, then cut; a NaN would be carried into an infinity or a zero and is made quiet."""
    bits, sixteen = builder.bitcast(x, _INTS), _same(_INTS, 16)
    cut = builder.lshr(bits, sixteen)
    half = builder.add(_same(_INTS, 0x7FFF), builder.and_(cut, _same(_INTS, 1)))
    rounded = builder.lshr(builder.add(bits, half), sixteen)
    return builder.select(builder.fcmp_unordered("uno", x, x), builder.or_(cut, _same(_INTS, 0x40)), rounded)


lower_bf16 = _define(f32x16, (i32x16,), _lower_bf16)
"""The float32 of the bfloat16 in the lower half of each lane, exactly."""
upper_bf16 = _define(f32x16, (i32x16,), _upper_bf16)
"""The float32 of the bfloat16 in the upper half of each lane, exactly."""
bf16_bits = _define(i32x16, (f32x16,), _bf16_bits)
"""Round each float32 to bfloat16 (ties to even) and return its 16 bits; a NaN stays one."""


def _f16_bits(builder: Any, value: Any) -> Any:
    return builder.zext(builder.bitcast(builder.fptrunc(value, _F16), _I16), _I32)


def _f16_value(builder: Any, bits: Any) -> Any:
    return builder.fpext(builder.bitcast(builder.trunc(bits, _I16), _F16), _F32)


f16_bits = _define(_int, (_float,), _f16_bits)
"""Round one float32 to float16 (ties to even) and return its 16 bits; needs the processor's own conversion."""
f16_value = _define(_float, (_int,), _f16_value)
"""The float32 of a float16 given by its 16 bits; needs the processor's own conversion."""

# ---- what depends on the path


def _dot(builder: Any, name: str, total: Any, x: Any, y: Any, elements: ir.VectorType) -> Any:
    """Call a dot product of LLVM's; older versions of it take the operands as integers."""
    kind = elements if _accepts(name, total.type, elements) else x.type
    return _call(builder, name, total.type, total, builder.bitcast(x, kind), builder.bitcast(y, kind))


@functools.cache
def _accepts(name: str, result: ir.VectorType, operand: ir.VectorType) -> bool:
    """Ask LLVM itself, by a module with nothing but the call."""
    arguments = f"({result} %a, {operand} %b, {operand} %b)"
    text = f"""
        declare {result} @{name}({result}, {operand}, {operand})
        define {result} @f({result} %a, {operand} %b) {{
            %c = call {result} @{name}{arguments}
            ret {result} %c
        }}"""
    try:
        binding.parse_assembly(text).verify()
    except RuntimeError:  # of another signature
        return False
    return True


def _dot_vnni(builder: Any, total: Any, codes: Any, digits: Any) -> Any:
    return _dot(builder, "llvm.x86.avx512.vpdpbusd.512", total, codes, digits, _BYTES64)


def _dot_halves(builder: Any, total: Any, codes: Any, digits: Any) -> Any:
    """The instruction on two vectors of half the width: AVX-VNNI, of processors without AVX-512."""
    bytes32, ints8 = ir.VectorType(_I8, 32), ir.VectorType(_I32, 8)
    done = []
    for first in (0, 8):
        at = ir.Constant(ints8, list(range(first, first + 8)))
        part, x, y = (builder.shuffle_vector(value, value, at) for value in (total, codes, digits))
        done.append(_dot(builder, "llvm.x86.avx512.vpdpbusd.256", part, x, y, bytes32))
    return builder.shuffle_vector(*done, ir.Constant(_INTS, list(range(LANES))))


def _multiply_add(builder: Any, x: Any, y: Any) -> Any:
    """Products of 32 pairs of int16, neighbours added: [16] int32. LLVM makes one instruction of it where it can."""
    product = builder.mul(builder.sext(x, _INTS32), builder.sext(y, _INTS32))
    even, odd = (builder.shuffle_vector(product, product, ir.Constant(_INTS, list(range(at, 32, 2)))) for at in (0, 1))
    return builder.add(even, odd)


def _dot_portable(builder: Any, total: Any, codes: Any, digits: Any) -> Any:
    """Even bytes, then odd ones, as 16-bit integers: no intermediate saturates (255 * 128 * 2 < 2 ** 31)."""
    words, others = builder.bitcast(codes, _WORDS32), builder.bitcast(digits, _WORDS32)
    eight = _same(_WORDS32, 8)
    low = builder.and_(words, _same(_WORDS32, 0xFF))
    even = _multiply_add(builder, low, builder.ashr(builder.shl(others, eight), eight))
    odd = _multiply_add(builder, builder.lshr(words, eight), builder.ashr(others, eight))
    return builder.add(total, builder.add(even, odd))


class _Bfloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not spell."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat)

    def __hash__(self) -> int:
        return hash(_Bfloat)


def _pairs_native(builder: Any, total: Any, x: Any, y: Any) -> Any:
    return _dot(builder, "llvm.x86.avx512bf16.dpbf16ps.512", total, x, y, ir.VectorType(_Bfloat(), 32))


def _half_to_float(builder: Any, words: Any) -> Any:
    """
    Convert 16 float16 (in the low halves of lanes) by integer arithmetic.

    The exponent moves by a product with 2 ** 112, which is exact and right for subnormal numbers too; infinity and NaN
    get their own exponent back.
    """
    shifted = builder.shl(builder.and_(words, _same(_INTS, 0x7FFF)), _same(_INTS, 13))
    scaled = builder.fmul(builder.bitcast(shifted, _FLOATS), _same(_FLOATS, 2.0**112))
    bits = builder.bitcast(scaled, _INTS)
    special = builder.icmp_unsigned(">=", shifted, _same(_INTS, 0x0F800000))
    bits = builder.select(special, builder.or_(shifted, _same(_INTS, 0x7F800000)), bits)
    sign = builder.shl(builder.and_(words, _same(_INTS, 0x8000)), _same(_INTS, 16))
    return builder.bitcast(builder.or_(bits, sign), _FLOATS)


def _generator(emit: Emit) -> Callable[..., Any]:
    def generate(_context: Any, builder: Any, _signature: Any, values: tuple[Any, ...]) -> Any:
        return emit(builder, *values[1:])  # the mode has no value

    return generate


def _constant(result: types.Type, kind: Any, value: Callable[[Mode], int]) -> Any:
    """Make an intrinsic that gives what a mode says, a constant of the compiled code."""

    def constant(typing_context: Any, mode: Any) -> Any:
        if not isinstance(mode, ModeType):
            return None
        said = ir.Constant(kind, value(mode.mode))
        return result(mode), lambda context, builder, signature, values: said

    return intrinsic(constant)


@intrinsic
def dot_bytes(typing_context: Any, mode: Any, total: Any, codes: Any, digits: Any) -> Any:
    """
    Per lane: ``total`` plus the four products of unsigned bytes of ``codes`` with signed bytes of ``digits``.

    Exact however it is done: 4 * 255 * 128 fits int32, and nothing saturates on the way.
    """
    if not isinstance(mode, ModeType):
        return None
    emit = _dot_vnni if mode.mode.path == AVX512 else _dot_halves if "avxvnni" in instructions() else _dot_portable
    return i32x16(mode, i32x16, i32x16, i32x16), _generator(emit)


def multiplies_pairs(mode: Mode) -> bool:
    """Say whether `dot_pairs` runs here."""
    return mode.path == AVX512 and multiplies_bf16()


has_pairs = _constant(types.boolean, ir.IntType(1), multiplies_pairs)
"""Whether `dot_pairs` may be called."""


@intrinsic
def dot_pairs(typing_context: Any, mode: Any, total: Any, x: Any, y: Any) -> Any:
    """
    Per lane: ``total`` plus the two products of a pair of bfloat16 in ``x`` with one in ``y``, in float32.

    AVX512-BF16, which takes subnormal numbers for zero; elsewhere, where `has_pairs` is False, it gives ``total``.
    """
    if not isinstance(mode, ModeType):
        return None
    emit = _pairs_native if multiplies_pairs(mode.mode) else lambda builder, total, x, y: total
    return f32x16(mode, f32x16, i32x16, i32x16), _generator(emit)


@intrinsic
def load_f16(typing_context: Any, mode: Any, address: Any) -> Any:
    """Load 16 float16 as float32, exactly; by the processor's own conversion where it has one (F16C)."""
    if not isinstance(mode, ModeType):
        return None

    def native(builder: Any, at: Any) -> Any:
        return builder.fpext(_load(builder, at, _HALVES), _FLOATS)

    def portable(builder: Any, at: Any) -> Any:
        return _half_to_float(builder, builder.zext(_load(builder, at, _WORDS), _INTS))

    return f32x16(mode, _address), _generator(native if "f16c" in instructions() else portable)


is_wide = _constant(types.boolean, ir.IntType(1), lambda mode: mode.path == AVX512)
"""Whether 32 vectors fit the registers: with AVX-512; else 8 do at most."""
digits_of = _constant(types.int64, _I64, lambda mode: mode.digits)
"""The mode's number of digits."""


# ---- threads


def _fetch_add(builder: Any, address: Any, amount: Any) -> Any:
    return builder.atomic_rmw("add", _pointer(builder, address, _I64), amount, "seq_cst")


atomic_add = _define(types.int64, (_address, types.int64), _fetch_add)
"""Add to an aligned int64 and return what it was; sequentially consistent."""
atomic_load = _define(types.int64, (_address,), lambda b, at: b.load_atomic(_pointer(b, at, _I64), "acquire", 8))
"""Read an aligned int64 that another thread writes; what it wrote before is visible behind this."""
atomic_store = _define(
    types.void, (_address, types.int64), lambda b, at, v: b.store_atomic(v, _pointer(b, at, _I64), "release", 8)
)
"""Write an aligned int64 for another thread to read; what was written before is visible to it."""


def _now(builder: Any) -> Any:
    """Read the monotonic clock by ``clock_gettime``: seconds and nanoseconds in a pair of int64."""
    with builder.goto_entry_block():  # one place on the stack, also for a call in a loop
        pair = builder.alloca(ir.ArrayType(_I64, 2))
    address = builder.ptrtoint(pair, _I64)
    _call(builder, "clock_gettime", _I32, ir.Constant(_I32, 1), address)
    seconds = _load(builder, address, _I64)
    rest = _load(builder, builder.add(address, ir.Constant(_I64, 8)), _I64)
    return builder.add(builder.mul(seconds, ir.Constant(_I64, 10**9)), rest)


now_ns = _define(types.int64, (), _now)
"""Nanoseconds of the monotonic clock (POSIX ``clock_gettime``)."""
give_way = _define(types.int32, (), lambda b: _call(b, "sched_yield", _I32))
"""Let another thread have this core (POSIX ``sched_yield``)."""

"""
The inner parts of the kernels: a tile of packed weights, its dot product with an activation, and a new activation.

An activation of K values is one buffer of 4-byte words, of which a kernel reads what its weights need:

    values [K] float32 | digits [DIGITS][2 halves][K / 32][16] int8 | scale [K / 32] | sums [2 halves][K / 32] float32

A block of 32 values is ``scale * (sum of digits[s] * 256 ** (DIGITS - 1 - s))``: three digits hold 24 bits, as many as
float32, one is what llama.cpp multiplies with. The dot product of bytes is exact in int32, in any order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from apr_core.kernels.gpu import interpreted
from apr_core.kernels.gpu.planes import PLANES

Q8_0, Q4_0, Q5_0, Q4_K, Q5_K, Q6_K, BF16, F16, F32 = (tl.constexpr(code) for code in range(9))
_BY_CODE = {planes.code: planes for planes in PLANES.values()}
_NIBBLE = tl.constexpr(0x0F0F0F0F)
_FIFTH = tl.constexpr(0x10101010)
_PAIRS = tl.constexpr(0x30303030)


@triton.jit
def trigger(PDL: tl.constexpr):
    """Let the next kernel begin; it waits by itself before it reads what this one writes."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait for all earlier kernels. Every program must: completion is transitive only so."""
    if PDL:
        gdc_wait()


@triton.jit
def dot4(a, b, c, SIGNED: tl.constexpr):
    """``c`` plus four bytes of ``a`` (signed or not) times four signed bytes of ``b``, a word per column."""
    b = tl.broadcast_to(b[None, :], a.shape)
    if SIGNED:
        c = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        c = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    return c


if interpreted():
    from apr_core.kernels.gpu import emulate

    emulate.mend()
    dot4 = emulate.dot4


@triton.jit
def _four(words, ROWS: tl.constexpr, C: tl.constexpr):
    """The four words of each 16 bytes, without moving data: [ROWS, 4 C] -> four of [ROWS, C]."""
    even, odd = tl.split(tl.reshape(words, (ROWS, C, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _four_of_vector(words, C: tl.constexpr):
    even, odd = tl.split(tl.reshape(words, (C, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.constexpr_function
def _begins(code, rows, blocks):
    """Bytes where bits, scales and supers of a matrix begin."""
    return _BY_CODE[code].sections(rows, 32 * blocks)[:3]


@triton.jit
def _load_floats(w, rows, k, stop, CODE: tl.constexpr, NB: tl.constexpr, C: tl.constexpr):
    kind: tl.constexpr = tl.bfloat16 if CODE == BF16 else (tl.float16 if CODE == F16 else tl.float32)
    columns = 32 * k + tl.arange(0, 32 * C)
    at = rows[:, None] * (32 * NB) + columns[None, :]
    return tl.load(w.to(tl.pointer_type(kind)) + at, mask=(columns < 32 * stop)[None, :], other=0.0)


@triton.jit
def _load_blocks(w, rows, k, stop, CODE: tl.constexpr, ROWS: tl.constexpr, NB: tl.constexpr, C: tl.constexpr):
    BEGINS: tl.constexpr = _begins(CODE, ROWS, NB)
    SUPER: tl.constexpr = tl.int16 if CODE == Q6_K else tl.int32
    WORDS: tl.constexpr = 8 * NB if CODE == Q8_0 else 4 * NB
    blocks = k + tl.arange(0, C)
    words = 4 * k + tl.arange(0, 4 * C)
    seen = (blocks < stop)[None, :]
    w32 = w.to(tl.pointer_type(tl.int32))
    at = rows[:, None] * WORDS + words[None, :]
    codes = tl.load(w32 + at, mask=(words < 4 * stop)[None, :], other=0)
    bits = tl.zeros((1, 1), tl.int32)
    supers = tl.zeros((1, 1), tl.int32)
    if CODE == Q8_0:
        bits = tl.load(w32 + (at + 4 * NB), mask=(words < 4 * stop)[None, :], other=0)
    elif CODE == Q5_0 or CODE == Q5_K:
        bits = tl.load(w32 + BEGINS[0] // 4 + (rows[:, None] * NB + blocks[None, :]), mask=seen, other=0)
    elif CODE == Q6_K:
        pairs = 2 * k + tl.arange(0, 2 * C)
        at = rows[:, None] * (2 * NB) + pairs[None, :]
        bits = tl.load(w32 + BEGINS[0] // 4 + at, mask=(pairs < 2 * stop)[None, :], other=0)
    at = rows[:, None] * NB + blocks[None, :]
    # widened by the load: pairs of 16-bit values that a loop carries get spilled
    scales = tl.load((w + BEGINS[1]).to(tl.pointer_type(tl.int16)) + at, mask=seen, other=0).to(tl.int32)
    if CODE >= Q4_K:
        at = rows[:, None] * (NB // 8) + (blocks // 8)[None, :]
        supers = tl.load((w + BEGINS[2]).to(tl.pointer_type(SUPER)) + at, mask=seen, other=0).to(tl.int32)
    return codes, bits, scales, supers


@triton.jit
def load_tile(w, rows, k, stop, CODE: tl.constexpr, ROWS: tl.constexpr, NB: tl.constexpr, C: tl.constexpr):
    """
    Load ``C`` blocks of each row, those before block ``stop``.

    Returns:
        Four tensors: codes (Q8_0: of the first halves); bits (Q8_0: codes of the second halves); scales; supers. What
        a type does not have is a zero.
    """
    if CODE >= BF16:
        nothing = tl.zeros((1, 1), tl.int32)
        tile = (_load_floats(w, rows, k, stop, CODE, NB, C), nothing, nothing, nothing)
    else:
        tile = _load_blocks(w, rows, k, stop, CODE, ROWS, NB, C)
    return tile


@triton.jit
def _half(word):
    """The float16 in the low two bytes of each word."""
    return (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _unpacked(codes, bits, CODE: tl.constexpr, BN: tl.constexpr, C: tl.constexpr):
    """Eight words of byte codes per block, in the order of the columns: [BN, C] each."""
    a, b, c, d = _four(codes, BN, C)
    if CODE == Q8_0:
        e, f, g, h = _four(bits, BN, C)
    else:
        e, f, g, h = (a >> 4) & _NIBBLE, (b >> 4) & _NIBBLE, (c >> 4) & _NIBBLE, (d >> 4) & _NIBBLE
        a, b, c, d = a & _NIBBLE, b & _NIBBLE, c & _NIBBLE, d & _NIBBLE
    if CODE == Q5_0 or CODE == Q5_K:
        a, b = a | ((bits << 4) & _FIFTH), b | ((bits << 3) & _FIFTH)
        c, d = c | ((bits << 2) & _FIFTH), d | ((bits << 1) & _FIFTH)
        e, f = e | (bits & _FIFTH), f | ((bits >> 1) & _FIFTH)
        g, h = g | ((bits >> 2) & _FIFTH), h | ((bits >> 3) & _FIFTH)
    if CODE == Q6_K:
        x, y = tl.split(tl.reshape(bits, (BN, C, 2)))
        a, b, c, d = a | ((x << 4) & _PAIRS), b | ((x << 2) & _PAIRS), c | (x & _PAIRS), d | ((x >> 2) & _PAIRS)
        e, f, g, h = e | ((y << 4) & _PAIRS), f | ((y << 2) & _PAIRS), g | (y & _PAIRS), h | ((y >> 2) & _PAIRS)
    return a, b, c, d, e, f, g, h


@triton.jit
def _dot_floats(codes, x, k, stop, BN: tl.constexpr, C: tl.constexpr):
    columns = 32 * k + tl.arange(0, 32 * C)
    values = tl.load(x + columns, mask=columns < 32 * stop, other=0.0)
    return tl.sum(tl.reshape(codes.to(tl.float32) * values[None, :], (BN, 4 * C, 8)), 2)


@triton.jit
def _dot_blocks(
    codes, bits, scales, supers, x, k, stop,
    CODE: tl.constexpr, DIGITS: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    NB: tl.constexpr = K // 32
    SIGNED: tl.constexpr = CODE == Q8_0
    a, b, c, d, e, f, g, h = _unpacked(codes, bits, CODE, BN, C)
    words = 4 * k + tl.arange(0, 4 * C)
    digits = (x + K).to(tl.pointer_type(tl.int32))
    low = tl.zeros((BN, C), tl.int32)
    high = low
    first = tl.zeros((BN, C), tl.float32)
    second = first
    for s in tl.static_range(DIGITS):
        x0, x1, x2, x3 = _four_of_vector(tl.load(digits + 8 * s * NB + words, mask=words < 4 * stop, other=0), C)
        y0, y1, y2, y3 = _four_of_vector(tl.load(digits + (8 * s + 4) * NB + words, mask=words < 4 * stop, other=0), C)
        # two digits fit int32 (2 ** 27 at most), the third does not
        if s == 2:
            first, second = low.to(tl.float32) * 256, high.to(tl.float32) * 256
            low, high = tl.zeros((BN, C), tl.int32), tl.zeros((BN, C), tl.int32)
        low = dot4(a, x0, low * 256, SIGNED)
        low = dot4(d, x3, dot4(c, x2, dot4(b, x1, low, SIGNED), SIGNED), SIGNED)
        if CODE == Q6_K:
            high = dot4(e, y0, high * 256, SIGNED)
            high = dot4(h, y3, dot4(g, y2, dot4(f, y1, high, SIGNED), SIGNED), SIGNED)
        else:
            low = dot4(h, y3, dot4(g, y2, dot4(f, y1, dot4(e, y0, low, SIGNED), SIGNED), SIGNED), SIGNED)
    blocks = k + tl.arange(0, C)
    behind = x + (K + DIGITS * (K // 4))
    scale = tl.load(behind + blocks, mask=blocks < stop, other=0.0)[None, :]
    sums0 = tl.load(behind + NB + blocks, mask=blocks < stop, other=0.0)[None, :]
    sums1 = tl.load(behind + 2 * NB + blocks, mask=blocks < stop, other=0.0)[None, :]
    first = (first + low.to(tl.float32)) * scale
    if CODE <= Q5_0:
        ZERO: tl.constexpr = 0 if CODE == Q8_0 else (8 if CODE == Q4_0 else 16)
        result = _half(scales) * (first - ZERO * (sums0 + sums1))
    elif CODE == Q6_K:
        second = (second + high.to(tl.float32)) * scale
        s0, s1 = ((scales << 24) >> 24).to(tl.float32), (scales >> 8).to(tl.float32)
        result = _half(supers) * (s0 * (first - 32 * sums0) + s1 * (second - 32 * sums1))
    else:
        factor = (scales & 255).to(tl.float32)
        minimum = ((scales >> 8) & 255).to(tl.float32)
        result = _half(supers) * factor * first - _half(supers >> 16) * minimum * (sums0 + sums1)
    return result


@triton.jit
def dot_tile(
    tile, x, k, stop, CODE: tl.constexpr, DIGITS: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, C: tl.constexpr
):
    """Multiply a tile with its part of an activation: float32 [BN, C], of a float type [BN, 4 C]."""
    codes, bits, scales, supers = tile
    if CODE >= BF16:
        result = _dot_floats(codes, x, k, stop, BN, C)
    else:
        result = _dot_blocks(codes, bits, scales, supers, x, k, stop, CODE, DIGITS, K, BN, C)
    return result


@triton.jit
def finish(
    tile, w, x, rows, k, stop, CODE: tl.constexpr, DIGITS: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr,
    BN: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Multiply ``BN`` rows from block ``k`` to ``stop``, of which ``tile`` is loaded already: float32 [BN]."""
    ACC: tl.constexpr = 4 * C if CODE >= BF16 else C
    total = tl.zeros((BN, ACC), tl.float32)
    for at in range(k, stop, C):
        later = load_tile(w, rows, at + C, stop, CODE, ROWS, K // 32, C)
        total += dot_tile(tile, x, at, stop, CODE, DIGITS, K, BN, C)
        tile = later
    return tl.sum(total, 1)


@triton.jit
def inverse_rms(squares, eps, K: tl.constexpr, SPAN: tl.constexpr):
    """One over the root mean square of an activation, from the sums of squares of its blocks, in fixed order."""
    at = tl.arange(0, SPAN)
    return tl.rsqrt(tl.sum(tl.load(squares + at, mask=at < K // 32, other=0.0), 0) / K + eps)


@triton.jit
def publish(x, blocks, values, seen, K: tl.constexpr, DIGITS: tl.constexpr):
    """
    Write blocks of a new activation: float32 values and digits.

    Args:
        x: The activation.
        blocks: Which of its blocks, [R].
        values: float32 [R, 32].
        seen: Which of them to write, [R].
    """
    NB: tl.constexpr = K // 32
    column = tl.arange(0, 32)[None, :]
    here = seen[:, None] & (column < 32)
    tl.store(x + blocks[:, None] * 32 + column, values, mask=here)
    largest: tl.constexpr = 127 * 256 ** (DIGITS - 1)
    top = tl.max(tl.abs(values), 1)
    # 0 * x is NaN for NaN and infinity: neither may vanish in an integer
    scale = top / largest + tl.sum(values * 0.0, 1)
    inverse = tl.where(top > 1e-30, largest / tl.where(top > 1e-30, top, 1.0), 0.0)
    rest = tl.floor(values * inverse[:, None] + 0.5).to(tl.int32)
    digits = (x + K).to(tl.pointer_type(tl.int8))
    total = tl.zeros(values.shape, tl.float32)
    for back in tl.static_range(DIGITS):
        digit = ((rest + 128) & 255) - 128
        rest = (rest - digit) >> 8
        plane = 2 * (DIGITS - 1 - back) + column // 16
        tl.store(digits + (plane * NB + blocks[:, None]) * 16 + column % 16, digit.to(tl.int8), mask=here)
        total += digit.to(tl.float32) * (256.0**back)
    behind = x + (K + DIGITS * (K // 4))
    total = total * scale[:, None]
    tl.store(behind + blocks, scale, mask=seen)
    tl.store(behind + NB + blocks, tl.sum(tl.where(column < 16, total, 0.0), 1), mask=seen)
    tl.store(behind + 2 * NB + blocks, tl.sum(tl.where(column < 16, 0.0, total), 1), mask=seen)


@triton.jit
def values_at(w, row, column, seen, CODE: tl.constexpr, ROWS: tl.constexpr, NB: tl.constexpr):
    """Decode single weights, float32; ``row`` and ``column`` of any shapes that broadcast."""
    if CODE >= BF16:
        kind: tl.constexpr = tl.bfloat16 if CODE == BF16 else (tl.float16 if CODE == F16 else tl.float32)
        at = row * (32 * NB) + column
        value = tl.load(w.to(tl.pointer_type(kind)) + at, mask=seen, other=0.0).to(tl.float32)
    else:
        value = _value_of_block(w, row, column, seen, CODE, ROWS, NB)
    return value


@triton.jit
def _value_of_block(w, row, column, seen, CODE: tl.constexpr, ROWS: tl.constexpr, NB: tl.constexpr):
    BEGINS: tl.constexpr = _begins(CODE, ROWS, NB)
    block = row * NB + column // 32
    at = column % 32
    scales = w + BEGINS[1]
    if CODE == Q8_0:
        place = row * (32 * NB) + (at // 16) * (16 * NB) + (column // 32) * 16 + at % 16
        code = tl.load(w.to(tl.pointer_type(tl.int8)) + place, mask=seen, other=0).to(tl.int32)
    else:
        code = (tl.load(w + block * 16 + at % 16, mask=seen, other=0).to(tl.int32) >> (4 * (at // 16))) & 15
    if CODE == Q5_0 or CODE == Q5_K:
        bits = tl.load(w + BEGINS[0] + block * 4 + at % 4, mask=seen, other=0).to(tl.int32)
        code = code | (((bits >> (at // 4)) & 1) << 4)
    if CODE <= Q5_0:
        zero: tl.constexpr = 0 if CODE == Q8_0 else (8 if CODE == Q4_0 else 16)
        d = tl.load(scales.to(tl.pointer_type(tl.float16)) + block, mask=seen, other=0.0).to(tl.float32)
        value = (code - zero).to(tl.float32) * d
    elif CODE == Q6_K:
        bits = tl.load(w + BEGINS[0] + block * 8 + (at // 16) * 4 + at % 4, mask=seen, other=0).to(tl.int32)
        code = code | (((bits >> (2 * ((at % 16) // 4))) & 3) << 4)
        scale = tl.load(scales.to(tl.pointer_type(tl.int8)) + block * 2 + at // 16, mask=seen, other=0).to(tl.float32)
        d = tl.load((w + BEGINS[2]).to(tl.pointer_type(tl.float16)) + block // 8, mask=seen, other=0.0).to(tl.float32)
        value = (code - 32).to(tl.float32) * (d * scale)
    else:
        factor = tl.load(scales + block * 2, mask=seen, other=0).to(tl.float32)
        minimum = tl.load(scales + block * 2 + 1, mask=seen, other=0).to(tl.float32)
        supers = tl.load((w + BEGINS[2]).to(tl.pointer_type(tl.int32)) + block // 8, mask=seen, other=0)
        value = code.to(tl.float32) * (_half(supers) * factor) - _half(supers >> 16) * minimum
    return value

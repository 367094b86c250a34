"""
Panels times many tokens: the product that a prefill consists of.

A panel is unpacked once into a scratch area that fits the second-level cache, and met by all tokens, eight at a time:
the codes of a block stay in registers while eight tokens pass. Quantised weights are never widened to floats: the
byte dot product does four multiplications where a float instruction does one.

A block of the scratch area of a type with codes, 640 bytes: 512 codes; 16 float32 scales; then 16 more scales (Q6_K,
whose halves differ) or 16 minima (Q4_K, Q5_K). A column of a float type: 16 float32.
"""

from __future__ import annotations

from numba import njit

from apr_core.kernels.cpu import codes, vec
from apr_core.kernels.cpu.activations import TILE, block_bytes, scale_at, total_at
from apr_core.kernels.cpu.jit import INLINE, JIT
from apr_core.kernels.cpu.matvec import load_column, part_product, whole_product

SCRATCH = 2048
"""Bytes of scratch per block of 32 columns; that of a float type is the largest."""
_UNPACKED = 640


@njit(**INLINE)
def _keep(chunks: codes.Chunks, out: int) -> None:
    vec.store_i32(out, chunks[0])
    vec.store_i32(out + 64, chunks[1])
    vec.store_i32(out + 128, chunks[2])
    vec.store_i32(out + 192, chunks[3])
    vec.store_i32(out + 256, chunks[4])
    vec.store_i32(out + 320, chunks[5])
    vec.store_i32(out + 384, chunks[6])
    vec.store_i32(out + 448, chunks[7])


@njit(**JIT)
def _unpack_small(mode: vec.Mode, code: int, w: int, blocks: int, out: int) -> None:
    """Q8_0, Q5_0 and Q4_0."""
    for _ in range(blocks):
        vec.store_f32(out + 512, vec.load_f16(mode, w))
        if code == 0:
            _keep(codes.bytes_at(w + 32), out)
            w += 544
        elif code == 1:
            _keep(codes.five_bits_at(w + 32), out)
            w += 352
        else:
            _keep(codes.nibbles_at(w + 32), out)
            w += 288
        out += _UNPACKED


@njit(**JIT)
def _unpack_super(mode: vec.Mode, code: int, w: int, blocks: int, out: int) -> None:
    """Q4_K and Q5_K: products of d and scale, of dmin and minimum."""
    for _ in range(blocks // 8):
        d, dmin = vec.load_f16(mode, w), vec.load_f16(mode, w + 32)
        w += 64
        for _j in range(8):
            vec.store_f32(out + 512, vec.mul_f32(d, vec.to_f32(vec.load_u8(w))))
            vec.store_f32(out + 576, vec.mul_f32(dmin, vec.to_f32(vec.load_u8(w + 16))))
            if code == 3:
                _keep(codes.nibbles_at(w + 32), out)
                w += 288
            else:
                _keep(codes.five_bits_at(w + 32), out)
                w += 352
            out += _UNPACKED


@njit(**JIT)
def _unpack_q6_k(mode: vec.Mode, w: int, blocks: int, out: int) -> None:
    for _ in range(blocks // 8):
        d = vec.load_f16(mode, w)
        w += 32
        for _j in range(8):
            vec.store_f32(out + 512, vec.mul_f32(d, vec.to_f32(vec.load_i8(w))))
            vec.store_f32(out + 576, vec.mul_f32(d, vec.to_f32(vec.load_i8(w + 16))))
            _keep(codes.six_bits_at(w + 32), out)
            w += 416
            out += _UNPACKED


@njit(**JIT)
def _unpack_floats(mode: vec.Mode, code: int, w: int, blocks: int, out: int) -> None:
    for k in range(32 * blocks):
        if code == 6:
            column = load_column(mode, w + 32 * k, 6)
        elif code == 7:
            column = load_column(mode, w + 32 * k, 7)
        else:
            column = load_column(mode, w + 64 * k, 8)
        vec.store_f32(out + 64 * k, column)


@njit(**INLINE)
def _add_whole(mode: vec.Mode, w: int, zero: int, x: int, token: int, result: codes.Vector) -> codes.Vector:
    """Add one block of one token; the loads of the weights are the same for every token, so they happen once."""
    product = whole_product(mode, codes.bytes_at(w), zero, x, TILE, token)
    scale = vec.broadcast_f32(scale_at(x, TILE, vec.digits_of(mode), token))
    return vec.fma(vec.mul_f32(vec.load_f32(w + 512), scale), product, result)


@njit(**INLINE)
def _add_halves(mode: vec.Mode, w: int, zero: int, x: int, token: int, result: codes.Vector) -> codes.Vector:
    """The same where the two halves of a block have a scale each."""
    chunks = codes.bytes_at(w)
    scale = vec.broadcast_f32(scale_at(x, TILE, vec.digits_of(mode), token))
    first = part_product(mode, chunks, zero, 0, x, TILE, token)
    result = vec.fma(vec.mul_f32(vec.load_f32(w + 512), scale), first, result)
    second = part_product(mode, chunks, zero, 1, x, TILE, token)
    return vec.fma(vec.mul_f32(vec.load_f32(w + 576), scale), second, result)


@njit(**JIT)
def _tile_whole(mode: vec.Mode, w: int, blocks: int, zero: int, x: int, out: int, stride: int) -> None:
    """Eight tokens times one unpacked panel; ``stride`` is the bytes from a token's results to the next one's."""
    a, b, c, d = vec.zero_f32(), vec.zero_f32(), vec.zero_f32(), vec.zero_f32()
    e, f, g, h = vec.zero_f32(), vec.zero_f32(), vec.zero_f32(), vec.zero_f32()
    for _ in range(blocks):
        a = _add_whole(mode, w, zero, x, 0, a)
        b = _add_whole(mode, w, zero, x, 1, b)
        c = _add_whole(mode, w, zero, x, 2, c)
        d = _add_whole(mode, w, zero, x, 3, d)
        e = _add_whole(mode, w, zero, x, 4, e)
        f = _add_whole(mode, w, zero, x, 5, f)
        g = _add_whole(mode, w, zero, x, 6, g)
        h = _add_whole(mode, w, zero, x, 7, h)
        w += _UNPACKED
        x += block_bytes(TILE, vec.digits_of(mode))
    _keep_tile(a, b, c, d, e, f, g, h, out, stride)


@njit(**JIT)
def _tile_halves(mode: vec.Mode, w: int, blocks: int, zero: int, x: int, out: int, stride: int) -> None:
    """As `_tile_whole` for Q6_K."""
    a, b, c, d = vec.zero_f32(), vec.zero_f32(), vec.zero_f32(), vec.zero_f32()
    e, f, g, h = vec.zero_f32(), vec.zero_f32(), vec.zero_f32(), vec.zero_f32()
    for _ in range(blocks):
        a = _add_halves(mode, w, zero, x, 0, a)
        b = _add_halves(mode, w, zero, x, 1, b)
        c = _add_halves(mode, w, zero, x, 2, c)
        d = _add_halves(mode, w, zero, x, 3, d)
        e = _add_halves(mode, w, zero, x, 4, e)
        f = _add_halves(mode, w, zero, x, 5, f)
        g = _add_halves(mode, w, zero, x, 6, g)
        h = _add_halves(mode, w, zero, x, 7, h)
        w += _UNPACKED
        x += block_bytes(TILE, vec.digits_of(mode))
    _keep_tile(a, b, c, d, e, f, g, h, out, stride)


@njit(**JIT)
def _subtract_minima(mode: vec.Mode, w: int, blocks: int, x: int, out: int, stride: int) -> None:
    """Q4_K and Q5_K: the sum over blocks of minimum times sum of activations, taken off each token's results."""
    digits = vec.digits_of(mode)
    for token in range(TILE):
        total = vec.zero_f32()
        for b in range(blocks):
            sums = vec.broadcast_f32(total_at(x + b * block_bytes(TILE, digits), TILE, digits, token))
            total = vec.fma(vec.load_f32(w + 576 + b * _UNPACKED), sums, total)
        at = out + token * stride
        vec.store_f32(at, vec.sub_f32(vec.load_f32(at), total))


@njit(**INLINE)
def _keep_tile(
    a: codes.Vector, b: codes.Vector, c: codes.Vector, d: codes.Vector,
    e: codes.Vector, f: codes.Vector, g: codes.Vector, h: codes.Vector, out: int, stride: int,
) -> None:  # fmt: skip
    vec.store_f32(out, a)
    vec.store_f32(out + stride, b)
    vec.store_f32(out + 2 * stride, c)
    vec.store_f32(out + 3 * stride, d)
    vec.store_f32(out + 4 * stride, e)
    vec.store_f32(out + 5 * stride, f)
    vec.store_f32(out + 6 * stride, g)
    vec.store_f32(out + 7 * stride, h)


@njit(**JIT)
def _tile_of_floats(w: int, columns: int, x: int, row: int, out: int, stride: int) -> None:
    """Eight tokens of float32 values, ``row`` bytes apart, times one unpacked panel of floats."""
    a, b, c, d = vec.zero_f32(), vec.zero_f32(), vec.zero_f32(), vec.zero_f32()
    e, f, g, h = vec.zero_f32(), vec.zero_f32(), vec.zero_f32(), vec.zero_f32()
    for _ in range(columns):
        column = vec.load_f32(w)
        a = vec.fma(column, vec.broadcast_f32(x), a)
        b = vec.fma(column, vec.broadcast_f32(x + row), b)
        c = vec.fma(column, vec.broadcast_f32(x + 2 * row), c)
        d = vec.fma(column, vec.broadcast_f32(x + 3 * row), d)
        e = vec.fma(column, vec.broadcast_f32(x + 4 * row), e)
        f = vec.fma(column, vec.broadcast_f32(x + 5 * row), f)
        g = vec.fma(column, vec.broadcast_f32(x + 6 * row), g)
        h = vec.fma(column, vec.broadcast_f32(x + 7 * row), h)
        w += 64
        x += 4
    _keep_tile(a, b, c, d, e, f, g, h, out, stride)


@njit(**JIT)
def matmul(
    mode: vec.Mode,
    code: int,
    w: int,
    blocks: int,
    first: int,
    stop: int,
    tiles: int,
    values: int,
    count: int,
    scratch: int,
    out: int,
    stride: int,
) -> None:
    """
    Multiply panels ``first`` to ``stop`` with tiles of eight tokens.

    Args:
        mode: Path and digits.
        code: `Layout.code` of the type.
        w: Address of panel 0.
        blocks: Blocks of 32 columns.
        first: First panel.
        stop: Panel behind the last.
        tiles: Address of the quantised tokens in tiles of `TILE` (read by types with codes).
        values: Address of the tokens, float32 [TILE * count, 32 * blocks] (read by float types).
        count: Tiles.
        scratch: Address of `SCRATCH` * blocks bytes for this thread alone.
        out: Address of float32 [TILE * count, stride / 4]; the columns of these panels are written.
        stride: Bytes of one row of ``out``.

    Exactness: as `matvec`; the float order within a row is the same whatever the number of tokens or threads.
    """
    units = blocks // 8
    tile_bytes = blocks * block_bytes(TILE, vec.digits_of(mode))
    row = 128 * blocks
    zero = 128 if code == 0 else 16 if code == 1 else 8 if code == 2 else 0
    for panel in range(first, stop):
        if code == 0:
            _unpack_small(mode, code, w + panel * blocks * 544, blocks, scratch)
        elif code == 1:
            _unpack_small(mode, code, w + panel * blocks * 352, blocks, scratch)
        elif code == 2:
            _unpack_small(mode, code, w + panel * blocks * 288, blocks, scratch)
        elif code == 3:
            _unpack_super(mode, code, w + panel * units * 2368, blocks, scratch)
        elif code == 4:
            _unpack_super(mode, code, w + panel * units * 2880, blocks, scratch)
        elif code == 5:
            _unpack_q6_k(mode, w + panel * units * 3360, blocks, scratch)
        else:
            _unpack_floats(mode, code, w + panel * blocks * (2048 if code == 8 else 1024), blocks, scratch)
        to = out + 64 * panel
        for tile in range(count):
            x = tiles + tile * tile_bytes
            if code == 5:
                _tile_halves(mode, scratch, blocks, 32, x, to, stride)
            elif code < 5:
                _tile_whole(mode, scratch, blocks, zero, x, to, stride)
                if code > 2:
                    _subtract_minima(mode, scratch, blocks, x, to, stride)
            else:
                _tile_of_floats(scratch, 32 * blocks, values + TILE * tile * row, row, to, stride)
            to += TILE * stride

"""
Panels times many tokens: the product that a prefill consists of.

A panel is unpacked once into a scratch area that fits the second-level cache, and met by all tokens, eight at a time:
the codes of a block stay in registers while eight tokens pass. Quantised weights are never widened to floats: the
byte dot product does four multiplications where a float instruction does one.

A block of the scratch area of a type with codes, 640 bytes: 512 codes; 16 float32 scales; then 16 more scales (Q6_K,
whose halves differ) or 16 minima (Q4_K, Q5_K). A column of a float type: 16 float32.

BF16 in `speed` meets activations that are rounded to bfloat16, as llama.cpp has them. Where the processor has a dot
product of pairs it reads the panels as they lie, two at a time, which is enough chains to hide its latency.
"""

from __future__ import annotations

from numba import njit

from apr_core.kernels.cpu import codes, vec
from apr_core.kernels.cpu.activations import TILE, block_bytes, scale_at, total_at
from apr_core.kernels.cpu.elementwise import add_four, four_zeros
from apr_core.kernels.cpu.jit import INLINE, JIT
from apr_core.kernels.cpu.matvec import load_column, part_product, whole_product

SCRATCH = 4096
"""Bytes of scratch per block of 32 columns; those of a float type, for two panels, are the most."""
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
    """Q4_K and Q5_K: products of d and scale, of minus dmin and minimum."""
    for _ in range(blocks // 8):
        d, dmin = vec.load_f16(mode, w), vec.sub_f32(vec.zero_f32(), vec.load_f16(mode, w + 32))
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
    if code == 7:
        for k in range(16 * blocks):
            pair = vec.load_i32(w + 64 * k)
            vec.store_f32(out + 128 * k, vec.lower_bf16(pair))
            vec.store_f32(out + 128 * k + 64, vec.upper_bf16(pair))
        return
    for k in range(32 * blocks):
        column = load_column(mode, w + 32 * k, 6) if code == 6 else load_column(mode, w + 64 * k, 8)
        vec.store_f32(out + 64 * k, column)


@njit(**INLINE)
def _add_whole(
    mode: vec.Mode, w: int, zero: int, minima: bool, x: int, token: int, result: codes.Vector
) -> codes.Vector:
    """Add one block of one token; the loads of the weights are the same for every token, so they happen once."""
    digits = vec.digits_of(mode)
    product = whole_product(mode, codes.bytes_at(w), zero, x, TILE, token)
    scale = vec.broadcast_f32(scale_at(x, TILE, digits, token))
    if minima:
        result = vec.fma(vec.load_f32(w + 576), vec.broadcast_f32(total_at(x, TILE, digits, token)), result)
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


@njit(**INLINE)
def _zeros() -> codes.Chunks:
    """The sums of a tile: a vector of 16 rows for each of its tokens."""
    z = vec.zero_f32()
    return z, z, z, z, z, z, z, z


@njit(**INLINE)
def _keep_tile(sums: codes.Chunks, out: int, stride: int) -> None:
    vec.store_f32(out, sums[0])
    vec.store_f32(out + stride, sums[1])
    vec.store_f32(out + 2 * stride, sums[2])
    vec.store_f32(out + 3 * stride, sums[3])
    vec.store_f32(out + 4 * stride, sums[4])
    vec.store_f32(out + 5 * stride, sums[5])
    vec.store_f32(out + 6 * stride, sums[6])
    vec.store_f32(out + 7 * stride, sums[7])


@njit(**INLINE)
def _tile_whole(mode: vec.Mode, w: int, blocks: int, zero: int, minima: bool, x: int, out: int, stride: int) -> None:
    """Eight tokens times one unpacked panel; ``stride`` is the bytes from a token's results to the next one's."""
    sums = _zeros()
    for _ in range(blocks):
        sums = (
            _add_whole(mode, w, zero, minima, x, 0, sums[0]),
            _add_whole(mode, w, zero, minima, x, 1, sums[1]),
            _add_whole(mode, w, zero, minima, x, 2, sums[2]),
            _add_whole(mode, w, zero, minima, x, 3, sums[3]),
            _add_whole(mode, w, zero, minima, x, 4, sums[4]),
            _add_whole(mode, w, zero, minima, x, 5, sums[5]),
            _add_whole(mode, w, zero, minima, x, 6, sums[6]),
            _add_whole(mode, w, zero, minima, x, 7, sums[7]),
        )
        w += _UNPACKED
        x += block_bytes(TILE, vec.digits_of(mode))
    _keep_tile(sums, out, stride)


@njit(**JIT)
def _tile_halves(mode: vec.Mode, w: int, blocks: int, zero: int, x: int, out: int, stride: int) -> None:
    """As `_tile_whole` for Q6_K."""
    sums = _zeros()
    for _ in range(blocks):
        sums = (
            _add_halves(mode, w, zero, x, 0, sums[0]),
            _add_halves(mode, w, zero, x, 1, sums[1]),
            _add_halves(mode, w, zero, x, 2, sums[2]),
            _add_halves(mode, w, zero, x, 3, sums[3]),
            _add_halves(mode, w, zero, x, 4, sums[4]),
            _add_halves(mode, w, zero, x, 5, sums[5]),
            _add_halves(mode, w, zero, x, 6, sums[6]),
            _add_halves(mode, w, zero, x, 7, sums[7]),
        )
        w += _UNPACKED
        x += block_bytes(TILE, vec.digits_of(mode))
    _keep_tile(sums, out, stride)


@njit(**INLINE)
def _add_column(column: codes.Vector, x: int, row: int, sums: codes.Chunks) -> codes.Chunks:
    """Add one column of 16 rows times one float32 of each token; the tokens lie ``row`` bytes apart."""
    return (
        vec.fma(column, vec.broadcast_f32(x), sums[0]),
        vec.fma(column, vec.broadcast_f32(x + row), sums[1]),
        vec.fma(column, vec.broadcast_f32(x + 2 * row), sums[2]),
        vec.fma(column, vec.broadcast_f32(x + 3 * row), sums[3]),
        vec.fma(column, vec.broadcast_f32(x + 4 * row), sums[4]),
        vec.fma(column, vec.broadcast_f32(x + 5 * row), sums[5]),
        vec.fma(column, vec.broadcast_f32(x + 6 * row), sums[6]),
        vec.fma(column, vec.broadcast_f32(x + 7 * row), sums[7]),
    )


@njit(**INLINE)
def _add_pair(mode: vec.Mode, pair: codes.Vector, x: int, row: int, sums: codes.Chunks) -> codes.Chunks:
    """As `_add_column` for two columns of BF16 and two bfloat16 of each token."""
    return (
        vec.dot_pairs(mode, sums[0], pair, vec.broadcast_i32(x)),
        vec.dot_pairs(mode, sums[1], pair, vec.broadcast_i32(x + row)),
        vec.dot_pairs(mode, sums[2], pair, vec.broadcast_i32(x + 2 * row)),
        vec.dot_pairs(mode, sums[3], pair, vec.broadcast_i32(x + 3 * row)),
        vec.dot_pairs(mode, sums[4], pair, vec.broadcast_i32(x + 4 * row)),
        vec.dot_pairs(mode, sums[5], pair, vec.broadcast_i32(x + 5 * row)),
        vec.dot_pairs(mode, sums[6], pair, vec.broadcast_i32(x + 6 * row)),
        vec.dot_pairs(mode, sums[7], pair, vec.broadcast_i32(x + 7 * row)),
    )


@njit(**JIT)
def _tile_of_floats(w: int, other: int, columns: int, x: int, out: int, other_out: int, stride: int) -> None:
    """Eight tokens of float32 times two unpacked panels of floats."""
    sums, others, row = _zeros(), _zeros(), 4 * columns
    for _ in range(columns):
        sums = _add_column(vec.load_f32(w), x, row, sums)
        others = _add_column(vec.load_f32(other), x, row, others)
        w, other, x = w + 64, other + 64, x + 4
    _keep_tile(sums, out, stride)
    _keep_tile(others, other_out, stride)


@njit(**JIT)
def _four_of_floats(w: int, columns: int, x: int, out: int, stride: int) -> None:
    """As `_tile_of_floats` for four tokens and one panel: what fits 16 registers of 8 lanes."""
    row, sums = 4 * columns, four_zeros()
    at = (x, x + row, x + 2 * row, x + 3 * row)
    for k in range(columns):
        sums = add_four(vec.load_f32(w + 64 * k), at, 4 * k, sums)
    vec.store_f32(out, sums[0])
    vec.store_f32(out + stride, sums[1])
    vec.store_f32(out + 2 * stride, sums[2])
    vec.store_f32(out + 3 * stride, sums[3])


@njit(**JIT)
def _tile_of_pairs(
    mode: vec.Mode, w: int, other: int, columns: int, x: int, out: int, other_out: int, stride: int
) -> None:
    """Eight tokens of bfloat16 times two panels of BF16 as they lie."""
    sums, others, row = _zeros(), _zeros(), 2 * columns
    for _ in range(columns // 2):
        sums = _add_pair(mode, vec.load_i32(w), x, row, sums)
        others = _add_pair(mode, vec.load_i32(other), x, row, others)
        w, other, x = w + 64, other + 64, x + 4
    _keep_tile(sums, out, stride)
    _keep_tile(others, other_out, stride)


@njit(**INLINE)
def meets_bf16(mode: vec.Mode, code: int) -> bool:
    """Whether this type meets activations rounded to bfloat16."""
    return code == 7 and vec.digits_of(mode) == 1


@njit(**JIT)
def _floats(
    mode: vec.Mode, code: int, w: int, blocks: int, first: int, stop: int, values: int, count: int, scratch: int,
    out: int, stride: int,
) -> None:  # fmt: skip
    """`matmul` of a float type: two panels at a time; an odd last one is met twice, with the same results."""
    columns, nbytes = 32 * blocks, blocks * (2048 if code == 8 else 1024)
    as_they_lie = meets_bf16(mode, code) and vec.has_pairs(mode)
    for panel in range(first, stop, 2):
        second = min(panel + 1, stop - 1)
        a, b = w + panel * nbytes, w + second * nbytes
        to, other_to = out + 64 * panel, out + 64 * second
        if not as_they_lie:
            _unpack_floats(mode, code, a, blocks, scratch)
            _unpack_floats(mode, code, b, blocks, scratch + 64 * columns)
            a, b = scratch, scratch + 64 * columns
        x = values
        for _ in range(count):
            if as_they_lie:
                _tile_of_pairs(mode, a, b, columns, x, to, other_to, stride)
                x += TILE * 2 * columns
            else:
                if vec.is_wide(mode):
                    _tile_of_floats(a, b, columns, x, to, other_to, stride)
                else:
                    four, rest = 16 * columns, 4 * stride
                    _four_of_floats(a, columns, x, to, stride)
                    _four_of_floats(b, columns, x, other_to, stride)
                    _four_of_floats(a, columns, x + four, to + rest, stride)
                    _four_of_floats(b, columns, x + four, other_to + rest, stride)
                x += TILE * 4 * columns
            to, other_to = to + TILE * stride, other_to + TILE * stride


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
        values: Address of the tokens (read by float types): float32 [TILE * count, 32 * blocks]; where
            `meets_bf16` rounded, and in bfloat16 where `vec.has_pairs`.
        count: Tiles.
        scratch: Address of `SCRATCH` * blocks bytes for this thread alone.
        out: Address of float32 [TILE * count, stride / 4]; the columns of these panels are written.
        stride: Bytes of one row of ``out``.

    Exactness: as `matvec`; the float order within a row is the same whatever the number of tokens or threads.
    """
    if code > 5:
        _floats(mode, code, w, blocks, first, stop, values, count, scratch, out, stride)
        return
    units = blocks // 8
    tile_bytes = blocks * block_bytes(TILE, vec.digits_of(mode))
    zero = 128 if code == 0 else 16 if code == 1 else 8
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
        else:
            _unpack_q6_k(mode, w + panel * units * 3360, blocks, scratch)
        to = out + 64 * panel
        for tile in range(count):
            x = tiles + tile * tile_bytes
            if code == 5:
                _tile_halves(mode, scratch, blocks, 32, x, to, stride)
            elif code > 2:
                _tile_whole(mode, scratch, blocks, 0, True, x, to, stride)
            else:
                _tile_whole(mode, scratch, blocks, zero, False, x, to, stride)
            to += TILE * stride

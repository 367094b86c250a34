"""
One decode step as a chain of kernels, five per layer: each begins with its weights and ends with what the next needs.

RMSNorm costs no kernel: a producer publishes ``gain * h`` and the squares of ``h``, a consumer multiplies its result by
one over the root of their mean. ``state`` is [token, position, held] int32 on the device: position of the token that is
computed, and its place in the cache. Sums of several programs are added by the last to arrive, in the order of their
numbers: no float atomics, the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from apr_core.kernels.gpu.product import finish, inverse_rms, load_tile, publish, trigger, values_at, wait


@triton.jit
def _arrive(counter, COUNT: tl.constexpr):
    """Count this program; true for the last, which resets the counter for the next kernel."""
    tl.debug_barrier()  # all stores of this program come before it is counted
    last = tl.atomic_add(counter, 1, sem="acq_rel") == COUNT - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def embed(
    table, state, h, squares, gain, x, CODE: tl.constexpr, DIGITS: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Decode the row of the token; one block of 32 columns per program."""
    trigger(PDL)
    block = tl.program_id(0) + tl.arange(0, 1)
    column = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    scaled = tl.load(gain + column)
    wait(PDL)
    token = tl.maximum(tl.load(state), 0)
    value = values_at(table, token, column, column < K, CODE, ROWS, K // 32)
    tl.store(h + column, value)
    tl.store(squares + block, tl.sum(value * value, 1))
    publish(x, block, value * scaled, block >= 0, K, DIGITS)


@triton.jit
def _project(
    w, bias, x, squares, eps, cos, sin, state, out, head, part,
    CODE: tl.constexpr, ROWS: tl.constexpr, ROTATED: tl.constexpr, CAPACITY: tl.constexpr, DIGITS: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    Rows of one head of q, k or v: ``BN / 2`` of its first half and their partners of the second, which RoPE pairs.

    Args:
        out: [heads][CAPACITY][D]; the capacity of q is 1.
    """
    lane = tl.arange(0, BN)
    rows = head * D + part * (BN // 2) + lane % (BN // 2) + (lane // (BN // 2)) * (D // 2)
    tile = load_tile(w, rows, 0, K // 32, CODE, ROWS, K // 32, C)
    offset = tl.load(bias + rows)
    wait(PDL)
    y = finish(tile, w, x, rows, 0, K // 32, CODE, DIGITS, ROWS, K, BN, C)
    y = y * inverse_rms(squares, eps, K, SPAN) + offset
    first, second = tl.split(tl.trans(tl.reshape(y, (2, BN // 2))))
    pair = part * (BN // 2) + tl.arange(0, BN // 2)
    if ROTATED:
        angle = tl.load(state + 1) * (D // 2) + pair
        c, s = tl.load(cos + angle), tl.load(sin + angle)
        first, second = first * c - second * s, second * c + first * s
    to = out + head * (CAPACITY * D) + pair
    if CAPACITY > 1:
        to += tl.load(state + 2) * D
    tl.store(to, first.to(out.dtype.element_ty))
    tl.store(to + D // 2, second.to(out.dtype.element_ty))


@triton.jit
def qkv(
    wq, wk, wv, bq, bk, bv, x, squares, eps, cos, sin, state, q, keys, values,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, CAPACITY: tl.constexpr,
    CODE_Q: tl.constexpr, CODE_K: tl.constexpr, CODE_V: tl.constexpr,
    DIGITS: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Project, add the bias, rotate, and put k and v into the cache; ``BN`` rows per program."""
    trigger(PDL)
    head, part = tl.program_id(0) // (D // BN), tl.program_id(0) % (D // BN)
    if head < HEADS:
        _project(
            wq, bq, x, squares, eps, cos, sin, state, q, head, part,
            CODE_Q, HEADS * D, True, 1, DIGITS, K, D, BN, C, SPAN, PDL,
        )  # fmt: skip
    elif head < HEADS + KV:
        _project(
            wk, bk, x, squares, eps, cos, sin, state, keys, head - HEADS, part,
            CODE_K, KV * D, True, CAPACITY, DIGITS, K, D, BN, C, SPAN, PDL,
        )  # fmt: skip
    else:
        _project(
            wv, bv, x, squares, eps, cos, sin, state, values, head - HEADS - KV, part,
            CODE_V, KV * D, False, CAPACITY, DIGITS, K, D, BN, C, SPAN, PDL,
        )  # fmt: skip


@triton.jit
def attention(
    q, keys, values, x, mixed, peaks, shares, counter, state, scale,
    GROUP: tl.constexpr, G: tl.constexpr, D: tl.constexpr, CAPACITY: tl.constexpr, SPLITS: tl.constexpr,
    BP: tl.constexpr, DIGITS: tl.constexpr, K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    Mix the values for all query heads of one key-value head, over one piece of the positions.

    Args:
        mixed: Unscaled sums [kv heads][SPLITS][G][D] of the pieces.
        peaks: Their largest scores [kv heads][SPLITS][G].
        shares: Their sums of exponentials.
        GROUP: Query heads per key-value head; ``G`` is the power of two above.
        BP: Positions at a time.
    """
    trigger(PDL)
    kv, piece = tl.program_id(0), tl.program_id(1)
    member, lane = tl.arange(0, G), tl.arange(0, D)
    wait(PDL)
    held = tl.load(state + 2)
    LENGTH: tl.constexpr = CAPACITY // SPLITS
    seen = (member < GROUP)[:, None] & (lane < D)[None, :]
    query = tl.load(q + (kv * GROUP + member)[:, None] * D + lane[None, :], mask=seen, other=0.0) * scale
    peak = tl.full((G,), float("-inf"), tl.float32)
    share = tl.zeros((G,), tl.float32)
    total = tl.zeros((G, D), tl.float32)
    stop = tl.minimum((piece + 1) * LENGTH, held + 1)
    for at in range(piece * LENGTH, stop, BP):
        position = at + tl.arange(0, BP)
        place = (kv * CAPACITY + position)[:, None] * D + lane[None, :]
        here = (position < stop)[:, None]
        k = tl.load(keys + place, mask=here, other=0.0).to(tl.float32)
        v = tl.load(values + place, mask=here, other=0.0).to(tl.float32)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee")
        scores = tl.where((position < stop)[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        old, new = tl.exp(peak - higher), tl.exp(scores - higher[:, None])
        share = share * old + tl.sum(new, 1)
        total = total * old[:, None] + tl.dot(new, v, input_precision="ieee")
        peak = higher
    base = (kv * SPLITS + piece) * G + member
    tl.store(mixed + base[:, None] * D + lane[None, :], total)
    tl.store(peaks + base, peak)
    tl.store(shares + base, share)
    if _arrive(counter + kv, SPLITS):
        top = tl.full((G,), float("-inf"), tl.float32)
        for other in range(SPLITS):  # past the first cache: another program wrote them
            top = tl.maximum(top, tl.load(peaks + (kv * SPLITS + other) * G + member, cache_modifier=".cg"))
        share = tl.zeros((G,), tl.float32)
        total = tl.zeros((G, D), tl.float32)
        for other in range(SPLITS):
            base = (kv * SPLITS + other) * G + member
            weight = tl.exp(tl.load(peaks + base, cache_modifier=".cg") - top)
            share += weight * tl.load(shares + base, cache_modifier=".cg")
            total += weight[:, None] * tl.load(mixed + base[:, None] * D + lane[None, :], cache_modifier=".cg")
        per_head: tl.constexpr = D // 32
        block = tl.arange(0, G * per_head)
        out = tl.reshape(total / share[:, None], (G * per_head, 32))
        publish(x, kv * GROUP * per_head + block, out, block < GROUP * per_head, K, DIGITS)


@triton.jit
def residual(
    w, x, y, h, squares, gain, out, partial, counter,
    CODE: tl.constexpr, DIGITS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
    BN: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    Multiply, and add to the residual; ``SPLIT`` programs share 32 rows.

    Args:
        y: The product [N], kept for whoever traces.
        h: The residual [N].
        squares: Sums of its squares by block [N / 32].
        gain: Of the norm that comes next [N].
        out: The activation ``gain * h``.
        partial: [SPLIT][N].
    """
    trigger(PDL)
    block, piece = tl.program_id(0), tl.program_id(1)
    rows = block * BN + tl.arange(0, BN)
    SHARE: tl.constexpr = (K // 32 + SPLIT - 1) // SPLIT
    start = piece * SHARE
    stop = tl.minimum(start + SHARE, K // 32)
    tile = load_tile(w, rows, start, stop, CODE, N, K // 32, C)
    scaled = tl.load(gain + rows)
    wait(PDL)
    value = finish(tile, w, x, rows, start, stop, CODE, DIGITS, N, K, BN, C)
    if SPLIT > 1:
        tl.store(partial + piece * N + rows, value)
        last = _arrive(counter + block, SPLIT)
        if last:
            value = tl.zeros((BN,), tl.float32)
            for other in range(SPLIT):
                value += tl.load(partial + other * N + rows, cache_modifier=".cg")
    else:
        last = block >= 0
    if last:
        tl.store(y + rows, value)
        value += tl.load(h + rows)
        tl.store(h + rows, value)
        tl.store(squares + block, tl.sum(value * value, 0))
        one = block + tl.arange(0, 1)
        publish(out, one, (value * scaled)[None, :], one >= 0, N, DIGITS)


@triton.jit
def gate_up(
    wg, wu, x, squares, eps, out,
    CODE_G: tl.constexpr, CODE_U: tl.constexpr, DIGITS: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BN: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Multiply both matrices and publish ``silu(gate) * up``; a block of 32 rows per program."""
    trigger(PDL)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    gates = load_tile(wg, rows, 0, K // 32, CODE_G, N, K // 32, C)
    ups = load_tile(wu, rows, 0, K // 32, CODE_U, N, K // 32, C)
    wait(PDL)
    inverse = inverse_rms(squares, eps, K, SPAN)
    gate = inverse * finish(gates, wg, x, rows, 0, K // 32, CODE_G, DIGITS, N, K, BN, C)
    up = inverse * finish(ups, wu, x, rows, 0, K // 32, CODE_U, DIGITS, N, K, BN, C)
    one = tl.program_id(0) + tl.arange(0, 1)
    publish(out, one, (gate / (1 + tl.exp(-gate)) * up)[None, :], one >= 0, N, DIGITS)


@triton.jit
def head(
    w, x, squares, eps, logits, tops, places,
    CODE: tl.constexpr, DIGITS: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr,
    BN: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write the logits of ``BN`` rows, and the largest of them with its row."""
    trigger(PDL)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tile = load_tile(w, rows, 0, K // 32, CODE, ROWS, K // 32, C)
    wait(PDL)
    value = finish(tile, w, x, rows, 0, K // 32, CODE, DIGITS, ROWS, K, BN, C) * inverse_rms(squares, eps, K, SPAN)
    tl.store(logits + rows, value, mask=rows < N)
    value = tl.where(rows < N, value, float("-inf"))
    top = tl.max(value, 0)
    tl.store(tops + tl.program_id(0), top)
    tl.store(places + tl.program_id(0), tl.min(tl.where(value == top, rows, N), 0))


@triton.jit
def pick(tops, places, state, made, COUNT: tl.constexpr, SPAN: tl.constexpr, N: tl.constexpr, PDL: tl.constexpr):
    """
    Make the row of the largest logit (the first of equal ones) the next token, and step on.

    Args:
        made: int32 by place in the cache: the token chosen behind it; -1 when no logit is a number.
    """
    wait(PDL)
    at = tl.arange(0, SPAN)
    value = tl.load(tops + at, mask=at < COUNT, other=float("-inf"))
    row = tl.load(places + at, mask=at < COUNT, other=N)
    token = tl.min(tl.where(value == tl.max(value, 0), row, N), 0)
    token = tl.where(token < N, token, -1)
    held = tl.load(state + 2)
    tl.store(made + held, token)
    tl.store(state, token)
    tl.store(state + 1, tl.load(state + 1) + 1)
    tl.store(state + 2, held + 1)


@triton.jit(do_not_specialize=["first", "count"])  # else it is compiled anew for each way that they divide
def decode(
    w, first, count, ids, out, CODE: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, GATHER: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Decode ``BN`` rows per program to the type of ``out``: rows ``ids[i]``, else ``first + i``, of ``count``."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    source = tl.load(ids + row, mask=row < count, other=0) if GATHER else first + row
    for at in range(0, K, 128):
        column = (at + tl.arange(0, 128))[None, :]
        seen = (row < count)[:, None] & (column < K)
        value = values_at(w, source[:, None], column, seen, CODE, ROWS, K // 32)
        tl.store(out + row[:, None] * K + column, value.to(out.dtype.element_ty), mask=seen)

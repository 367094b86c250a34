"""
A whole forward in one compiled call per thread: no trip through Python between two operations.

Every thread runs `run` with its own number; they share the buffers, split rows and heads among themselves, claim
panels from a common counter (a thread that was held up takes fewer), and meet at barriers. A barrier spins for a
bounded number of polls and then gives its core away at each poll: with a pure spin, decoding collapses as soon as
another process takes one of the cores.

With one token (a decode step) each thread prepares its own copy of the small inputs, which is cheaper than a barrier.
With several (a prefill) tokens are prepared by all threads together and multiplied in tiles of eight.

Addresses and sizes come in int64 tables, laid out by the names below.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit, types

from apr_core.kernels.cpu import vec
from apr_core.kernels.cpu.activations import TILE, block_bytes, quantise_token
from apr_core.kernels.cpu.elementwise import add_rows, attend, cache_position, rms_norm, rotate, swiglu
from apr_core.kernels.cpu.jit import INLINE, JIT
from apr_core.kernels.cpu.linkage import call_matmul, call_matvec
from apr_core.kernels.cpu.matmul import meets_bf16

# Columns of the table of matrices, one row each; the head's row also has the address of the last norm's gain.
CODE, ADDRESS, BLOCKS, PANELS, GAIN = range(5)
# Rows of that table within a layer.
Q, K, V, OUTPUT, GATE, UP, DOWN = range(7)
# Columns of the table of vectors, one row per layer: addresses of gains and biases.
INPUT_GAIN, POST_GAIN, Q_BIAS, K_BIAS, V_BIAS = range(5)
# The table of sizes. Widths are padded values per row of a buffer; rows of the cache are bytes.
HIDDEN, HIDDEN_WIDTH, QUERY_WIDTH, KEY_WIDTH, INNER_WIDTH, HEADS, KV_HEADS, HEAD_DIM, VALUE_ROW, CAPACITY = range(10)
# The table of buffers that all threads share: addresses.
(
    RESIDUAL, NORMED, QUERY, KEY, VALUE, MIXED, ATTENTION, MIDDLE, GATED, UPPER, INNER, SHRUNK, TILES, ROUNDED, KEYS,
    VALUES, ROPE,
) = range(17)  # fmt: skip
# The table of buffers of one thread: addresses.
OWN_NORMED, OWN_TILE, OWN_SCRATCH, OWN_SCORES, OWN_CLOCK = range(5)
PHASES = (
    "norms and rounding",
    "q, k, v",
    "RoPE and cache",
    "attention",
    "output",
    "gate, up",
    "down",
    "head",
    "waiting",
)
"""What a thread's time is split into; OWN_CLOCK is int64: the last reading, then nanoseconds by phase."""
_PREPARE, _INPUTS, _ROPE, _ATTEND, _OUTPUT, _GATES, _DOWN, _HEAD, _WAIT = range(9)
# Words of the barrier, on different cache lines: threads that are here, how often all were, and what is claimed.
BARRIER_WORDS = 48
_GENERATION, _CLAIMED = 8 * 16, 8 * 32

SPINS = 4096
"""Polls of a barrier before it gives its core away: some tens of microseconds."""
_FLOATS = 6  # codes from here on are float types


@njit(**JIT)
def barrier(words: int, threads: int, spins: int) -> None:
    """
    Wait until every thread is here, and let the next claims begin at 0.

    ``words`` is the address of `BARRIER_WORDS` int64, zero at first.
    """
    if threads == 1:
        vec.atomic_store(words + _CLAIMED, 0)
        return
    generation = vec.atomic_load(words + _GENERATION)
    if vec.atomic_add(words, 1) == threads - 1:
        vec.atomic_store(words, 0)
        vec.atomic_store(words + _CLAIMED, 0)
        vec.atomic_store(words + _GENERATION, generation + 1)
        return
    polls = 0
    while vec.atomic_load(words + _GENERATION) == generation:
        polls += 1
        if polls > spins:
            vec.give_way()


@njit(**INLINE)
def _lap(clock: int, phase: int) -> None:
    """Book the time since the last reading to a phase."""
    now = vec.now_ns()
    at = clock + 8 + 8 * phase
    vec.atomic_store(at, vec.atomic_load(at) + now - vec.atomic_load(clock))
    vec.atomic_store(clock, now)


@njit(**INLINE)
def _meet(clock: int, phase: int, words: int, threads: int, spins: int) -> None:
    """Book the work before a barrier, wait there, and book the waiting."""
    _lap(clock, phase)
    barrier(words, threads, spins)
    _lap(clock, _WAIT)


@njit(**INLINE)
def _claim(words: int, count: int, single: bool, threads: int) -> tuple[int, int]:
    """
    Claim the next of ``count`` panels, the same count for all claims between two barriers; none when first >= stop.

    For several tokens an even number of them: products of floats take two at a time.

    Large pieces first, then smaller ones. The size comes from a reading that may be old by now: pieces differ then, and
    still each panel is claimed once.
    """
    left = count - vec.atomic_load(words + _CLAIMED)
    unit = 1 if single else 2
    size = count if threads == 1 else max(unit, left // (2 * threads) // unit * unit)
    first = vec.atomic_add(words + _CLAIMED, size)
    return first, min(first + size, count)


@njit(**INLINE)
def _share(count: int, thread: int, threads: int) -> tuple[int, int]:
    """The part of ``count`` items that a thread takes."""
    return count * thread // threads, count * (thread + 1) // threads


@njit(**JIT)
def _quantise(
    mode: vec.Mode, values: int, blocks: int, tokens: int, single: bool, tiles: int, thread: int, threads: int
) -> None:
    """Quantise rows of 32 * blocks values: the one row into the thread's own tile, or its share of many into all."""
    if single:
        quantise_token(mode, values, blocks, tiles, 1, 0)
        return
    size = blocks * block_bytes(TILE, vec.digits_of(mode))
    first, stop = _share(tokens, thread, threads)
    for t in range(first, stop):
        quantise_token(mode, values + 128 * blocks * t, blocks, tiles + t // TILE * size, TILE, t % TILE)


@njit(**JIT)
def _to_bf16(mode: vec.Mode, values: int, out: int, blocks: int, tokens: int, thread: int, threads: int) -> None:
    """Round a thread's share of rows to bfloat16; in float32 again where there is no product of pairs."""
    first, stop = _share(tokens * blocks * 2, thread, threads)
    for i in range(first, stop):
        bits = vec.bf16_bits(vec.load_f32(values + 64 * i))
        if vec.has_pairs(mode):
            vec.store_u16(out + 32 * i, bits)
        else:
            vec.store_f32(out + 64 * i, vec.lower_bf16(bits))


@njit(**JIT)
def _round(
    mode: vec.Mode,
    matrices: np.ndarray,
    values: int,
    rounded: int,
    tokens: int,
    single: bool,
    tiles: int,
    clock: int,
    words: int,
    spins: int,
    thread: int,
    threads: int,
) -> None:
    """Round the values that these matrices are about to multiply as their types want them, for every thread to see."""
    to_digits = to_bf16 = False
    for m in range(len(matrices)):
        to_digits |= matrices[m, CODE] < _FLOATS
        to_bf16 |= not single and meets_bf16(mode, matrices[m, CODE])
    if to_digits:
        _quantise(mode, values, matrices[0, BLOCKS], tokens, single, tiles, thread, threads)
    if to_bf16:
        _to_bf16(mode, values, rounded, matrices[0, BLOCKS], tokens, thread, threads)
    if (to_digits or to_bf16) and not single:
        _meet(clock, _PREPARE, words, threads, spins)
    _lap(clock, _PREPARE)


@njit(**JIT)
def _multiply(
    mode: vec.Mode,
    matrix: np.ndarray,
    first: int,
    stop: int,
    tokens: int,
    single: bool,
    tiles: int,
    values: int,
    rounded: int,
    scratch: int,
    out: int,
    width: int,
) -> None:
    """One thread's panels of one matrix, times one token or several."""
    code, address, blocks = matrix[CODE], matrix[ADDRESS], matrix[BLOCKS]
    if single:
        call_matvec(mode, code, address, blocks, first, stop, tiles, values, out)
    else:
        count = (tokens + TILE - 1) // TILE
        met = rounded if meets_bf16(mode, code) else values
        call_matmul(mode, code, address, blocks, first, stop, tiles, met, count, scratch, out, 4 * width)


@njit(**JIT)
def _attention_inputs(
    mode: vec.Mode,
    matrices: np.ndarray,
    vectors: np.ndarray,
    sizes: np.ndarray,
    shared: np.ndarray,
    own: np.ndarray,
    tokens: int,
    single: bool,
    tiles: int,
    normed: int,
    words: int,
    threads: int,
) -> None:
    """Queries, keys and values with their biases; their panels are claimed as if they were one matrix."""
    count = matrices[Q, PANELS] + matrices[K, PANELS] + matrices[V, PANELS]
    scratch, rounded = own[OWN_SCRATCH], shared[ROUNDED]
    while True:
        first, stop = _claim(words, count, single, threads)
        if first >= stop:
            break
        for m in range(3):
            panels = matrices[Q + m, PANELS]
            low, high = max(first, 0), min(stop, panels)
            first, stop = first - panels, stop - panels
            if low >= high:
                continue
            out = shared[QUERY + m]
            width = sizes[QUERY_WIDTH] if m == 0 else sizes[KEY_WIDTH]
            _multiply(mode, matrices[Q + m], low, high, tokens, single, tiles, normed, rounded, scratch, out, width)
            for t in range(tokens):
                row = out + 4 * width * t
                add_rows(row, vectors[Q_BIAS + m], row, low, high)


@njit(**JIT)
def _rotate_and_cache(
    sizes: np.ndarray, shared: np.ndarray, layer: int, tokens: int, start: int, thread: int, threads: int
) -> None:
    """RoPE of every query and key head, and the new positions of the cache; items are heads of tokens."""
    heads, kv_heads, dim = sizes[HEADS], sizes[KV_HEADS], sizes[HEAD_DIM]
    first, stop = _share(tokens * (heads + kv_heads), thread, threads)
    for item in range(first, stop):
        t, head = item // (heads + kv_heads), item % (heads + kv_heads)
        table = shared[ROPE] + 4 * dim * t
        if head < heads:
            rotate(shared[QUERY] + 4 * (sizes[QUERY_WIDTH] * t + dim * head), table, dim)
        else:
            head -= heads
            at = 4 * (sizes[KEY_WIDTH] * t + dim * head)
            rotate(shared[KEY] + at, table, dim)
            place = (layer * kv_heads + head) * sizes[CAPACITY]
            keys, values = shared[KEYS] + 4 * dim * place, shared[VALUES] + sizes[VALUE_ROW] * place
            cache_position(shared[KEY] + at, shared[VALUE] + at, keys, values, start + t, dim, sizes[VALUE_ROW])


@njit(**INLINE)
def _query(sizes: np.ndarray, tokens: int, start: int, group: int, kv_head: int, item: int) -> tuple[int, int]:
    """Where the query of one item lies, bytes from the first, and its positions; behind the last item the last."""
    item = min(item, group * tokens - 1)
    t = item // group
    return 4 * (sizes[QUERY_WIDTH] * t + sizes[HEAD_DIM] * (kv_head * group + item % group)), start + t + 1


@njit(**JIT)
def _attention(
    sizes: np.ndarray,
    shared: np.ndarray,
    own: np.ndarray,
    layer: int,
    tokens: int,
    start: int,
    words: int,
    threads: int,
) -> None:
    """Every query head of every token against the positions up to its own: four queries of a key-value head at once."""
    kv_heads, dim = sizes[KV_HEADS], sizes[HEAD_DIM]
    group = sizes[HEADS] // kv_heads
    fours = (group * tokens + 3) // 4
    while True:
        first, stop = _claim(words, kv_heads * fours, True, threads)
        if first >= stop:
            break
        for item in range(first, stop):
            kv_head, four = item // fours, item % fours
            place = (layer * kv_heads + kv_head) * sizes[CAPACITY]
            a, m = _query(sizes, tokens, start, group, kv_head, 4 * four)
            b, n = _query(sizes, tokens, start, group, kv_head, 4 * four + 1)
            c, o = _query(sizes, tokens, start, group, kv_head, 4 * four + 2)
            d, p = _query(sizes, tokens, start, group, kv_head, 4 * four + 3)
            query, mixed = shared[QUERY], shared[MIXED]
            attend(
                (query + a, query + b, query + c, query + d), (m, n, o, p),
                shared[KEYS] + 4 * dim * place, shared[VALUES] + sizes[VALUE_ROW] * place, dim, sizes[VALUE_ROW],
                own[OWN_SCORES], (mixed + a, mixed + b, mixed + c, mixed + d),
            )  # fmt: skip


@njit(**JIT)
def _norm_rows(
    x: int, gain: int, out: int, sizes: np.ndarray, tokens: int, single: bool, eps: float, thread: int, threads: int
) -> None:
    """RMSNorm of one row by every thread, or of a thread's share of many."""
    n, width = sizes[HIDDEN], sizes[HIDDEN_WIDTH]
    if single:
        rms_norm(x, gain, out, n, width, np.float32(eps))
        return
    first, stop = _share(tokens, thread, threads)
    for t in range(first, stop):
        rms_norm(x + 4 * width * t, gain, out + 4 * width * t, n, width, np.float32(eps))


@njit(**JIT)
def _add_product(
    mode: vec.Mode,
    matrix: np.ndarray,
    sizes: np.ndarray,
    tokens: int,
    single: bool,
    tiles: int,
    values: int,
    rounded: int,
    scratch: int,
    product: int,
    x: int,
    out: int,
    words: int,
    threads: int,
) -> None:
    """``out = x + product`` of the hidden size, panels as they are claimed."""
    width = sizes[HIDDEN_WIDTH]
    while True:
        first, stop = _claim(words, matrix[PANELS], single, threads)
        if first >= stop:
            break
        _multiply(mode, matrix, first, stop, tokens, single, tiles, values, rounded, scratch, product, width)
        for t in range(tokens):
            at = 4 * width * t
            add_rows(x + at, product + at, out + at, first, stop)


@njit(**JIT)
def _gated(
    mode: vec.Mode,
    matrices: np.ndarray,
    sizes: np.ndarray,
    shared: np.ndarray,
    tokens: int,
    single: bool,
    tiles: int,
    normed: int,
    scratch: int,
    words: int,
    threads: int,
) -> None:
    """Gate, up and SwiGLU, panels as they are claimed."""
    width, rounded = sizes[INNER_WIDTH], shared[ROUNDED]
    while True:
        first, stop = _claim(words, matrices[GATE, PANELS], single, threads)
        if first >= stop:
            break
        for m in range(2):
            out = shared[GATED + m]
            _multiply(
                mode, matrices[GATE + m], first, stop, tokens, single, tiles, normed, rounded, scratch, out, width
            )
        for t in range(tokens):
            at = 4 * width * t
            swiglu(shared[GATED] + at, shared[UPPER] + at, shared[INNER] + at, first, stop)


@njit(**JIT)
def _layer(
    mode: vec.Mode,
    matrices: np.ndarray,
    vectors: np.ndarray,
    sizes: np.ndarray,
    shared: np.ndarray,
    own: np.ndarray,
    eps: float,
    layer: int,
    tokens: int,
    single: bool,
    start: int,
    words: int,
    spins: int,
    thread: int,
    threads: int,
) -> None:
    """One decoder layer; buffers keep everything that a trace records until the next one."""
    normed = own[OWN_NORMED] if single else shared[NORMED]
    tiles = own[OWN_TILE] if single else shared[TILES]
    rounded, scratch, clock = shared[ROUNDED], own[OWN_SCRATCH], own[OWN_CLOCK]

    _norm_rows(shared[RESIDUAL], vectors[INPUT_GAIN], normed, sizes, tokens, single, eps, thread, threads)
    if not single:
        _meet(clock, _PREPARE, words, threads, spins)
    _round(
        mode, matrices[Q:OUTPUT], normed, rounded, tokens, single, tiles, clock, words, spins, thread, threads
    )  # fmt: skip
    _attention_inputs(mode, matrices, vectors, sizes, shared, own, tokens, single, tiles, normed, words, threads)
    _meet(clock, _INPUTS, words, threads, spins)
    _rotate_and_cache(sizes, shared, layer, tokens, start, thread, threads)
    _meet(clock, _ROPE, words, threads, spins)
    _attention(sizes, shared, own, layer, tokens, start, words, threads)
    _meet(clock, _ATTEND, words, threads, spins)

    mixed = shared[MIXED]
    _round(
        mode, matrices[OUTPUT:GATE], mixed, rounded, tokens, single, tiles, clock, words, spins, thread, threads
    )  # fmt: skip
    _add_product(
        mode, matrices[OUTPUT], sizes, tokens, single, tiles, mixed, rounded, scratch,
        shared[ATTENTION], shared[RESIDUAL], shared[MIDDLE], words, threads,
    )  # fmt: skip
    _meet(clock, _OUTPUT, words, threads, spins)

    _norm_rows(shared[MIDDLE], vectors[POST_GAIN], normed, sizes, tokens, single, eps, thread, threads)
    if not single:
        _meet(clock, _PREPARE, words, threads, spins)
    _round(
        mode, matrices[GATE:DOWN], normed, rounded, tokens, single, tiles, clock, words, spins, thread, threads
    )  # fmt: skip
    _gated(mode, matrices, sizes, shared, tokens, single, tiles, normed, scratch, words, threads)
    _meet(clock, _GATES, words, threads, spins)

    inner = shared[INNER]
    _round(
        mode, matrices[DOWN:], inner, rounded, tokens, single, tiles, clock, words, spins, thread, threads
    )  # fmt: skip
    _add_product(
        mode, matrices[DOWN], sizes, tokens, single, tiles, inner, rounded, scratch,
        shared[SHRUNK], shared[MIDDLE], shared[RESIDUAL], words, threads,
    )  # fmt: skip
    _meet(clock, _DOWN, words, threads, spins)


@njit(**JIT)
def _head(
    mode: vec.Mode,
    head: np.ndarray,
    sizes: np.ndarray,
    shared: np.ndarray,
    own: np.ndarray,
    eps: float,
    skip: int,
    tokens: int,
    single: bool,
    logits: int,
    words: int,
    spins: int,
    thread: int,
    threads: int,
) -> None:
    """The last norm and the head on ``tokens`` rows of RESIDUAL behind the first ``skip``."""
    clock = own[OWN_CLOCK]
    x = shared[RESIDUAL] + 4 * sizes[HIDDEN_WIDTH] * skip
    normed = own[OWN_NORMED] if single else shared[NORMED]
    tiles = own[OWN_TILE] if single else shared[TILES]
    _norm_rows(x, head[GAIN], normed, sizes, tokens, single, eps, thread, threads)
    if not single:
        _meet(clock, _PREPARE, words, threads, spins)
    rounded, scratch = shared[ROUNDED], own[OWN_SCRATCH]
    _round(
        mode, head.reshape((1, head.size)), normed, rounded, tokens, single, tiles, clock, words, spins, thread, threads
    )  # fmt: skip
    width = 16 * head[PANELS]
    while True:
        first, stop = _claim(words, head[PANELS], single, threads)
        if first >= stop:
            break
        _multiply(mode, head, first, stop, tokens, single, tiles, normed, rounded, scratch, logits, width)
    _meet(clock, _HEAD, words, threads, spins)


@njit(**JIT)
def run(
    mode: vec.Mode,
    matrices: np.ndarray,
    vectors: np.ndarray,
    head: np.ndarray,
    sizes: np.ndarray,
    shared: np.ndarray,
    own: np.ndarray,
    logits: np.ndarray,
    eps: float,
    first: int,
    stop: int,
    tokens: int,
    single: bool,
    start: int,
    wanted: int,
    alone: bool,
    words: int,
    spins: int,
    thread: int,
    threads: int,
) -> None:
    """
    Run layers ``first`` to ``stop`` on the rows of the buffer RESIDUAL, and the head on the last of them.

    Every thread calls it with the same arguments but for ``own`` and ``thread``.

    Args:
        mode: Path and digits.
        matrices: int64 [layers, 7, 4].
        vectors: int64 [layers, 5].
        head: int64 [5].
        sizes: int64 [10].
        shared: int64 [17].
        own: int64 [5], this thread's.
        logits: float32 [wanted up to a multiple of 8 (one row when ``alone``), 16 * panels of the head].
        eps: Of the norms.
        first: First layer.
        stop: Layer behind the last.
        tokens: Rows.
        single: One token by matrix-vector products; else tiles, whatever the number of tokens, so that a token's bits
            do not depend on how a prompt is cut.
        start: Positions that the cache holds; the buffer ROPE begins with the rotation of the first token.
        wanted: Rows that the head is to be run on, the last ones; with 0 it is not.
        alone: The head by matrix-vector products: one row is wanted.
        words: Address of the barrier.
        spins: Polls before a barrier gives its core away.
        thread: Which thread this is.
        threads: How many there are.
    """
    vec.atomic_store(own[OWN_CLOCK], vec.now_ns())
    for layer in range(first, stop):
        _layer(
            mode, matrices[layer], vectors[layer], sizes, shared, own, eps,
            layer, tokens, single, start, words, spins, thread, threads,
        )  # fmt: skip
    if wanted > 0:
        _head(
            mode, head, sizes, shared, own, eps, tokens - wanted, wanted, alone, logits.ctypes.data,
            words, spins, thread, threads,
        )  # fmt: skip


def compiled(mode: vec.Mode) -> Callable[..., None]:
    """
    Compile `run` for a mode, or load it from the disk, and return what its dispatcher would call.

    The dispatcher looks at every argument's type on every call. After a step has swept the caches that costs a tenth of
    a millisecond, which is 1 % of a step.
    """
    table, integer = types.int64[::1], types.int64
    arguments = (
        vec.ModeType(mode), types.int64[:, :, ::1], types.int64[:, ::1], table, table, table, table,
        types.float32[:, ::1], types.float64, integer, integer, integer, types.boolean, integer, integer, types.boolean,
        integer, integer, integer, integer,
    )  # fmt: skip
    run.compile(arguments)
    entry: Callable[..., None] = run.overloads[arguments].entry_point
    return entry

"""
Faults of a backend, planted through the seam of ``engines.wrap``; ``zoo.meter`` has those of the meter that times it.

A fault is an edit of an activation at the names that match a pattern, at the positions where a condition holds. What a
fault must remember (a stale cache, the third run of a prompt) it keeps in ``Seen``, one per hook, whose stream begins
anew wherever a forward starts at position 0. RoPE is undone by turning back, so a fault of it can be made after it.

Some of these faults leave the answer alone: each is there because one claim, and no other of its notebook, sees it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apr_core.engines.wrap import At, Hook
from apr_core.model.config import Qwen2Config
from apr_core.zoo.registry import Defect, MakeHook

F32 = NDArray[np.float32]
SEED = 44

# Claim -> the claim of notebook 20 that refutes whatever it refutes.
REDUNDANT = {
    # F-PAR-004 is INCONCLUSIVE while rel_l2 keeps within the limit of F-PAR-001: beyond it both are refuted.
    "F-PAR-004": "F-PAR-001",
    # A margin beyond sqrt(2) * limit * norm can be overturned only by a row whose rel_l2 is beyond the limit.
    "F-PAR-005": "F-PAR-001",
    # Measured: whatever flipped more top tokens than the type explains also cost more KL than it explains.
    "F-PAR-009": "F-PAR-008",
}


class Seen:
    """
    What a hook knows when it is called.

    Attributes:
        name: The activation that it is called with.
        now: Activations of this forward so far, by name, as the backend computed them.
        before: Those of the last position of the forward before in this stream; empty at its start.
        positions: Position of each row.
        prompt: Tokens in the first forward of the stream.
        fed: Steps in a row whose token was the argmax of the step before: the backend hears itself.
        runs: Streams (or whole forwards) in a row that began with the same tokens in the same way.
    """

    def __init__(self, config: Qwen2Config) -> None:
        self.config, self.noise = config, np.random.default_rng(SEED)
        self.at, self.positions = At(0, False, False), np.zeros(0, np.int64)
        self.name, self.now = "", dict[str, F32]()
        self.before: dict[str, F32] = {}
        self.prompt = self.fed = self.runs = 0
        self._opening: tuple[bool, bytes] = False, b""

    def look(self, name: str, values: F32, at: At) -> None:
        """Take note of an activation; the ids begin a forward."""
        if name == "ids":
            self.at, self.positions = at, at.start + np.arange(len(values))
            self.before = {n: v[-1:] for n, v in self.now.items()} if at.start else {}
            self.now = {}
            said = self.before.get("logits")
            self.fed = self.fed + 1 if said is not None and said.argmax() == values[0, 0] else 0
            if not at.start:
                opening = at.cached, values.tobytes()
                self.prompt, self.runs = len(values), self.runs + 1 if opening == self._opening else 1
                self._opening = opening
        self.name, self.now[name] = name, values

    def earlier(self, name: str) -> F32:
        """Return the rows of ``name`` one position earlier; zeros before the first."""
        values = self.now[name]
        return np.concatenate([self.before.get(name, np.zeros_like(values[:1])), values[:-1]])


Edit = Callable[[F32, Seen], Any]  # numpy's stubs lose the type on the way; the hook casts
Rows = NDArray[np.bool_]
Where = Callable[[Seen], Rows | bool]


def _always(seen: Seen) -> bool:
    return True


def _on(names: str, edit: Edit, where: Where = _always) -> MakeHook:
    """Make the hook that edits the activations whose name matches; LAST is the last layer's number."""

    def make(config: Qwen2Config) -> Hook:
        pattern = re.compile(names.replace("LAST", str(config.num_hidden_layers - 1)))
        seen = Seen(config)

        def hook(name: str, values: F32, at: At) -> F32 | None:
            seen.look(name, values, at)
            rows = np.broadcast_to(where(seen), len(values))
            if not rows.any() or not pattern.fullmatch(name):
                return None
            with np.errstate(all="ignore"):  # overflow is what some of these faults are about
                return np.where(rows[:, None], edit(values, seen), values).astype(np.float32)

        return hook

    return make


QK, KV = r"layers\.\d+\.[qk]", r"layers\.\d+\.[kv]"
Q, K, V = (rf"layers\.\d+\.{n}" for n in "qkv")
ATTN, RESID_ATTN, RESID = (rf"layers\.\d+\.{n}" for n in ("attn_output", "resid_attn", "resid_ffn"))
LAST = r"layers\.LAST\."
MIXED, MID, BELOW = "layers.{i}.attn_output", "layers.{i}.resid_attn", "layers.{j}.resid_ffn"


# Where.
def _decode(seen: Seen) -> bool:
    return seen.at.start > 0


def _prefill(seen: Seen) -> bool:
    return seen.at.start == 0


def _cached_prefill(seen: Seen) -> bool:
    return seen.at.cached and seen.at.start == 0


def _traced(seen: Seen) -> bool:
    return seen.at.traced


def _untraced(seen: Seen) -> bool:
    return not seen.at.traced


def _odd(seen: Seen) -> Rows:
    odd: Rows = seen.positions % 2 == 1
    return odd


def _from(first: int) -> Where:
    return lambda seen: seen.positions >= first


def _late_steps(seen: Seen) -> bool:
    return seen.at.start >= seen.prompt + 8


def _tile(seen: Seen) -> Rows:
    return np.logical_and(seen.positions >= 16, seen.positions < 32)


def _at_80(seen: Seen) -> Rows:
    late: Rows = seen.positions == 80
    return late


def _end_of_prompt(seen: Seen) -> Rows:
    last: Rows = seen.positions == (seen.prompt - 1 if _cached_prefill(seen) else -1)
    return last


def _partial_tile(seen: Seen) -> Rows:
    rows = np.arange(len(seen.positions))
    return np.logical_and(rows >= len(rows) // 64 * 64, len(rows) > 64)


def _hears_itself(steps: int) -> Where:
    return lambda seen: seen.fed >= steps


def _timed(runs: int, *, prompt: bool = False) -> Where:
    """Hold from the given cached run of one prompt on: a person runs it once, a meter again and again."""
    return lambda seen: seen.runs >= runs and seen.at.cached and not (prompt and seen.at.start)


# Edits.
def _scale(factor: float) -> Edit:
    return lambda x, seen: x * np.float32(factor)


def _add(offset: float) -> Edit:
    return lambda x, seen: x + np.float32(offset)


def _noise(size: float) -> Edit:
    """Add normal noise of ``size`` times each row's root mean square, another at every call."""
    return lambda x, seen: (
        x + size * np.sqrt((x**2).mean(axis=1, keepdims=True)) * seen.noise.standard_normal(x.shape).astype(np.float32)
    )


def _fill(value: float, columns: slice = slice(None)) -> Edit:
    def edit(x: F32, seen: Seen) -> Any:
        x = x.copy()
        x[:, columns] = value
        return x

    return edit


def _columns(order: Callable[[int], NDArray[Any]]) -> Edit:
    return lambda x, seen: x[:, order(x.shape[1])]


def _as(name: str) -> Edit:
    """Take the rows of another activation of this forward; ``{i}`` is this layer, ``{j}`` the one before."""

    def edit(x: F32, seen: Seen) -> Any:
        layer = int(m[1]) if (m := re.search(r"\.(\d+)\.", seen.name)) else seen.config.num_hidden_layers
        return seen.now.get(name.format(i=layer, j=layer - 1), x)

    return edit


def _minus(name: str, factor: float = 1.0) -> Edit:
    take = _as(name)
    return lambda x, seen: x - np.float32(factor) * take(x, seen)


def _past(x: F32, seen: Seen) -> Any:
    """Take what stood one position earlier."""
    return seen.earlier(seen.name)


def _stale(x: F32, seen: Seen) -> Any:
    """Take what the forward before left."""
    return np.broadcast_to(seen.before.get(seen.name, x[:1]), x.shape)


def _next(x: F32, seen: Seen) -> Any:
    return np.concatenate([x[1:], x[-1:]])


def _heads(edit: Callable[[F32, Seen], Any]) -> Edit:
    """Edit [tokens, heads, head_dim]."""
    return lambda x, seen: edit(x.reshape(len(x), -1, seen.config.head_dim), seen).reshape(x.shape)


def _tail(share: int) -> Edit:
    """Zero the last part of each head: a head longer than the attention tile."""

    def edit(heads: F32, seen: Seen) -> Any:
        size = seen.config.head_dim
        return heads * (np.arange(size) < size - max(1, size // share))

    return _heads(edit)


def _loud(rows: int) -> Edit:
    """Let the last rows of the head outscore all others."""
    return lambda x, seen: np.where(np.arange(x.shape[1]) >= x.shape[1] - rows, x.max(1, keepdims=True) + 1, x)


def _modulo(heads: F32, seen: Seen) -> Any:
    """Deal query heads to key-value heads as h % n instead of h // group."""
    kv = seen.config.num_key_value_heads
    return heads[:, np.argsort(np.arange(heads.shape[1]) % kv, kind="stable")]


def _blocks(edit: Callable[[F32], Any], size: int = 32) -> Edit:
    """Edit [tokens, blocks, size] of a projection's output."""
    return lambda x, seen: edit(x.reshape(len(x), -1, size)).reshape(x.shape)


def _nibbles(blocks: F32) -> Any:
    return blocks.reshape(*blocks.shape[:2], -1, 2)[..., ::-1].reshape(blocks.shape)


def _no_minimum(blocks: F32) -> Any:
    return blocks - blocks.min(axis=2, keepdims=True)


def _half_arrived(before: str) -> Edit:
    """Add nothing to the second half of the columns: the rows of the matrix that writes them are still zero."""
    take = _as(before)
    return lambda x, seen: np.where(np.arange(x.shape[1]) < x.shape[1] // 2, x, take(x, seen))


def _partial_columns(x: F32, seen: Seen) -> Any:
    return x * (np.arange(x.shape[1]) < x.shape[1] // 96 * 96)


def _power(square: Callable[[Qwen2Config], float]) -> Edit:
    """Scale by the root of something of the configuration."""
    return lambda x, seen: x * np.float32(square(seen.config) ** 0.5)


def _two_and_half(x: F32, seen: Seen) -> Any:
    return x * np.float32(2 if seen.name.endswith("q") else 0.5)


def _twice_mlp(x: F32, seen: Seen) -> Any:
    return 2 * x - _as(MID)(x, seen)


def _lead(token: int) -> Edit:
    """Make a token lead."""
    return lambda x, seen: np.where(np.arange(x.shape[1]) == token % x.shape[1], np.float32(1e4), x)


def _raise_one(x: F32, seen: Seen) -> Any:
    return x + np.float32(5) * (np.arange(x.shape[1]) == 65)


def _move_one(x: F32, seen: Seen) -> Any:
    return x * (1 + np.float32(1e-6) * (np.arange(x.shape[1]) == 5))


def _first_row(x: F32, seen: Seen) -> Any:
    return x[:1] + 0 * x


def _log_softmax(x: F32, seen: Seen) -> Any:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def _next_scale(blocks: F32) -> Any:
    largest = np.abs(blocks).max(axis=2, keepdims=True) + np.float32(1e-9)
    return blocks / largest * np.roll(largest, -1, axis=1)


def _narrow(mantissa: int) -> Edit:
    """Keep so many bits of the mantissa: 10 are float16's and TF32's, 7 are bfloat16's."""
    drop = np.uint32(23 - mantissa)

    def edit(x: F32, seen: Seen) -> Any:
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32) + (np.uint32(1) << (drop - np.uint32(1)))
        return (bits >> drop << drop).view(np.float32)

    return edit


def _integers(levels: int) -> Edit:
    """Round each row to so many levels on either side of zero."""

    def edit(x: F32, seen: Seen) -> Any:
        step = np.abs(x).max(axis=1, keepdims=True) / levels
        return np.round(x / step) * step

    return edit


def _overflow(room: float) -> Edit:
    """Accumulate in float16 where the largest sums exceed it: infinite there, and infinity minus itself is NaN."""

    def edit(x: F32, seen: Seen) -> Any:
        unit = np.float32(65504 / (room * max(1e-9, float(np.abs(x).max()))))
        half = (x * unit).astype(np.float16).astype(np.float32)
        return half / unit + (half - half)

    return edit


def _ulp(x: F32, seen: Seen) -> Any:
    return np.nextafter(x, np.float32(np.inf))


def _second(x: F32, seen: Seen) -> Any:
    """Exchange the two largest logits."""
    x, rows, best = x.copy(), np.arange(len(x)), np.argsort(x, axis=1)
    first, second = best[:, -1], best[:, -2]
    x[rows, first], x[rows, second] = x[rows, second], x[rows, first]
    return x


def _shuffled_but_top(x: F32, seen: Seen) -> Any:
    """Permute all logits but the largest: equal norm, equal argmax (V12)."""
    turned = np.sort(x, axis=1)[:, ::-1]
    rows, top = np.arange(len(x)), x.argmax(axis=1)
    turned = np.roll(turned[:, 1:], 7, axis=1)
    return np.stack([np.insert(turned[i], top[i], x[i, top[i]]) for i in rows])


def _renorm(eps: float) -> Edit:
    """Normalise the last residual with another epsilon."""

    def edit(x: F32, seen: Seen) -> Any:
        square = (seen.now[f"layers.{seen.config.num_hidden_layers - 1}.resid_ffn"] ** 2).mean(axis=1, keepdims=True)
        return x * np.sqrt((square + seen.config.rms_norm_eps) / (square + eps))

    return edit


def _over_all(x: F32, seen: Seen) -> Any:
    """Normalise over the whole tile instead of over a row."""
    square = (seen.now[f"layers.{seen.config.num_hidden_layers - 1}.resid_ffn"] ** 2).mean(axis=1, keepdims=True)
    return x * np.sqrt(square / square.mean())


def _constant(size: float) -> Edit:
    """Add one seeded vector to every row: a bias that is lost or comes twice."""
    return lambda x, seen: x + size * np.random.default_rng(SEED).standard_normal(x.shape[1], np.float32)


# RoPE.
Angles = Callable[[Seen], NDArray[np.float64]]  # [tokens, head_dim / 2]


def _angles(theta: float = 0.0, spread: float = 1.0) -> Angles:
    def angles(seen: Seen) -> NDArray[np.float64]:
        size = seen.config.head_dim
        exponents = np.arange(0, size, 2) / size * spread
        return np.outer(seen.positions, (theta or seen.config.rope_theta) ** -exponents)

    return angles


def _turn(heads: F32, angles: NDArray[np.float64], *, pairs: bool = False) -> Any:
    """Rotate halves (or neighbouring pairs) of each head by [tokens, head_dim / 2] angles."""
    cos, sin = (np.asarray(f(angles), np.float32)[:, None] for f in (np.cos, np.sin))
    if pairs:
        heads = np.concatenate([heads[..., 0::2], heads[..., 1::2]], axis=-1)
    a, b = np.split(heads, 2, axis=-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    return np.stack([a, b], axis=-1).reshape(heads.shape) if pairs else np.concatenate([a, b], axis=-1)


def _rope(angles: Angles, *, pairs: bool = False) -> Edit:
    """Undo RoPE, and turn by other angles."""
    right = _angles()
    return _heads(lambda heads, seen: _turn(_turn(heads, -right(seen)), angles(seen), pairs=pairs))


def _moved(shift: Callable[[NDArray[np.int64], Seen], NDArray[np.int64]]) -> Edit:
    """Rotate for other positions."""

    def angles(seen: Seen) -> NDArray[np.float64]:
        size = seen.config.head_dim
        return np.outer(shift(seen.positions, seen), seen.config.rope_theta ** -(np.arange(0, size, 2) / size))

    return _rope(angles)


def _by(offset: int) -> Edit:
    return _moved(lambda at, seen: at + offset)


def _yarn(original: int, *, turns: bool = True, heat: bool = True) -> Edit:
    """
    Extend the context by 4 as YaRN does: slow pairs turn a quarter as fast, and scores are hotter.

    Source: arXiv:2309.00071, with the bounds of the Hugging Face implementation (32 and 1 turns of the old context).
    """

    def angles(seen: Seen) -> NDArray[np.float64]:
        size, theta = seen.config.head_dim, seen.config.rope_theta
        bounds = [size * np.log(original / (2 * np.pi * n)) / (2 * np.log(theta)) for n in (32, 1)]
        low, high = np.floor(bounds[0]), np.ceil(bounds[1])
        slow = np.clip((np.arange(size // 2) - low) / (high - low), 0, 1)
        return _angles()(seen) * (1 - 0.75 * slow if turns else 1)

    turn, hotter = _rope(angles), _scale(1 + 0.1 * np.log(4) if heat else 1)
    return lambda x, seen: hotter(turn(x, seen), seen)


def _coarse(bits: int) -> Edit:
    """Turn by angles of so few bits of mantissa."""
    narrow = _narrow(bits)
    return _rope(lambda seen: narrow(_angles()(seen).astype(np.float32), seen).astype(np.float64))


def _some(turns: Callable[[NDArray[Any], int], NDArray[Any]]) -> Edit:
    """Turn some pairs only."""
    return _rope(lambda seen: _angles()(seen) * turns(np.arange(seen.config.head_dim // 2), seen.config.head_dim // 2))


def _prompt_end(at: NDArray[np.int64], seen: Seen) -> NDArray[np.int64]:
    return np.full_like(at, seen.prompt)


_NO_TURN: Angles = lambda seen: 0 * _angles()(seen)  # noqa: E731


def _twice(width: int) -> NDArray[Any]:
    return np.concatenate([np.arange(64), np.arange(64), np.arange(128, width)])


def _transposed(width: int) -> NDArray[Any]:
    """Read the vocabulary along the other axis, in tiles of 32."""
    whole = width // 32 * 32
    return np.concatenate([np.arange(whole).reshape(-1, 32).T.ravel(), np.arange(whole, width)])


def _reversed(width: int) -> NDArray[Any]:
    return np.arange(width)[::-1]


def _rolled(width: int) -> NDArray[Any]:
    return np.roll(np.arange(width), 1)


_P1, _P2, _P3, _P5, _P6, _P7 = (tuple(f"F-PAR-00{n}" for n in ns) for ns in ("1", "2", "3", "15", "6", "7"))
_SEE, _KL = ("F-PAR-001", "F-PAR-002"), ("F-PAR-001", "F-PAR-004")


def _class(head: tuple[str, str, str, tuple[str, ...]], *rows: tuple[Any, ...]) -> Iterator[Defect]:
    """
    Make the defects of one class: its name, root cause, source and killers, and a row for each.

    A row is (name, what, names of activations, edit, where, killers of its own); the last two may be left out. What
    holds in cached steps alone is for the claim that holds them against a prefill.
    """
    klass, cause, source, kills = head
    for name, what, names, edit, *rest in rows:
        where = rest[0] if rest else _always
        own = rest[1] if len(rest) > 1 else _P3 if where in (_decode, _late_steps) else kills
        yield Defect(f"{klass}-{name}", klass, what, source, cause, own, hook=_on(names, edit, where))


_HEAD = (
    *_class(
        ("head-tail", "layout", "GH-202", ("F-LAYOUT-CONTRACT-005",)),
        ("garbage", "the last tile of the head holds what lay in memory before", "logits", _loud(16)),
        ("row", "the head reads one row too far", "logits", _loud(1)),
        (
            "in-decode",
            "the last tile of the head is garbage in cached steps",
            "logits",
            _loud(16),
            _decode,
            ("F-LAYOUT-CONTRACT-005", "F-PAR-003"),
        ),
    ),
)
_POSITIONS = (
    *_class(
        ("rope-missing", "backend-position", "Round 48, PMAT-216", _SEE),
        ("everywhere", "no RoPE on queries and keys", QK, _rope(_NO_TURN)),
        ("keys", "no RoPE on keys", K, _rope(_NO_TURN)),
        ("last-layer", "no RoPE in the last layer", LAST + "[qk]", _rope(_NO_TURN)),
        ("in-decode", "no RoPE in cached steps", QK, _rope(_NO_TURN), _decode),
    ),
    *_class(
        ("rope-pairs", "backend-position", "llama.cpp 22611", _SEE),
        ("interleaved", "neighbours turned instead of halves", QK, _rope(_angles(), pairs=True)),
        ("interleaved-keys", "neighbours turned on keys alone", K, _rope(_angles(), pairs=True)),
        ("backwards", "turned the other way", QK, _rope(lambda seen: -_angles()(seen))),
        ("queries-backwards", "queries turned the other way", Q, _rope(lambda seen: -_angles()(seen))),
    ),
    *_class(
        ("rope-theta", "backend-position", "llama.cpp 2768", _SEE),
        ("default", "theta 1e4, the default of other models", QK, _rope(_angles(10000.0))),
        ("half", "theta 5e5", QK, _rope(_angles(500000.0))),
        ("spread", "exponents i / head_dim instead of 2i / head_dim", QK, _rope(_angles(spread=0.5))),
        ("in-decode", "theta 1e4 in cached steps", QK, _rope(_angles(10000.0)), _decode),
    ),
    *_class(
        ("rope-precision", "backend-position", "llama.cpp 12957", _SEE),
        ("bfloat16", "angles kept in bfloat16", QK, _coarse(7)),
        ("float16", "angles kept in float16", QK, _coarse(10)),
    ),
    # No model with YaRN is run here, so one side has it and the other has not: which one, no statistic can tell.
    *_class(
        ("yarn-lost", "backend-position", "peers K7, llama.cpp 12957", _SEE),
        ("whole", "one side extends its context by YaRN, the other does not", QK, _yarn(32768)),
        ("turns", "the slow pairs turn as fast as without the extension", QK, _yarn(32768, heat=False)),
        ("heat", "the scores are as hot as without the extension", QK, _yarn(32768, turns=False)),
        ("original", "extended from another original context", QK, _yarn(2048)),
    ),
    *_class(
        ("rope-partial", "backend-position", "Round 48, PMAT-216", _SEE),
        ("half", "only the first half of the pairs turns", QK, _some(lambda pair, half: pair < half // 2)),
        ("odd", "every second pair stands still", QK, _some(lambda pair, half: pair % 2)),
    ),
    *_class(
        ("position-off-by-one", "backend-position", "aprender 2337", _SEE),
        ("keys", "keys one position on", K, _by(1)),
        ("queries", "queries one position back", Q, _by(-1)),
        ("keys-in-decode", "keys one position on in cached steps", K, _by(1), _decode),
        ("wrong-layer", "the length advances before the later layers", LAST + "[qk]", _by(1), _decode),
    ),
    *_class(
        ("position-restart", "backend-position", "aprender 2337", _P3),
        ("zero", "positions begin anew after the prefill", QK, _moved(lambda at, seen: at - seen.prompt), _decode),
        ("stuck", "every cached step stands behind the prompt", QK, _moved(_prompt_end), _decode),
        ("gap", "a position is left out after the prefill", QK, _by(1), _decode),
        ("chunk", "positions count within the forward", QK, _moved(lambda at, seen: at - seen.at.start)),
    ),
    *_class(
        ("position-table", "backend-position", "llama.cpp 12957", _SEE),
        ("wraps", "a table of 64 angles that wraps around", QK, _moved(lambda at, seen: at % 64)),
        ("ends", "a table of 64 angles whose last serves the rest", QK, _moved(lambda at, seen: np.minimum(at, 63))),
        ("doubles", "two positions for every token", QK, _moved(lambda at, seen: at * 2)),
        ("halves", "one position for two tokens", QK, _moved(lambda at, seen: at // 2)),
    ),
)
_ATTENTION = (
    *_class(
        ("attention-scale", "backend-attention", "Round 48, PMAT-216", _SEE),
        ("missing", "scores are not divided", Q, _power(lambda c: c.head_dim)),
        ("twice", "scores divided twice", Q, _power(lambda c: 1 / c.head_dim)),
        ("hidden", "scores divided by the root of the hidden size", Q, _power(lambda c: c.head_dim / c.hidden_size)),
        ("in-decode", "scores are not divided in cached steps", Q, _scale(8), _decode),
    ),
    *_class(
        ("gqa-map", "backend-attention", "transformers 31766", _SEE),
        ("modulo", "query head h reads h % n instead of h // group", Q, _heads(_modulo)),
        ("swapped", "key-value heads exchanged", KV, _heads(lambda h, seen: h[:, ::-1])),
        ("first", "all query heads read the first key-value head", KV, _heads(lambda h, seen: h[:, :1] + 0 * h)),
        ("values", "the heads of the values exchanged", V, _heads(lambda h, seen: h[:, ::-1])),
    ),
    *_class(
        ("head-beyond-tile", "backend-attention", "llama.cpp 3750", _SEE),
        ("queries", "the last quarter of each query head is zero", Q, _tail(4)),
        ("values", "the last quarter of each value head is zero", V, _tail(4)),
        ("one", "the last element of each key head is zero", K, _tail(1000)),
        ("in-decode", "the last half of each value head is zero in cached steps", V, _tail(2), _decode),
    ),
    *_class(
        ("attention-mask", "backend-attention", "Round 48, PMAT-216", _SEE),
        ("future", "each position reads the next key and value", KV, _next),
        ("first", "nobody reads position 0", KV, _fill(0), lambda seen: seen.positions == 0),
    ),
    *_class(
        ("kv-swapped", "backend-attention", "Round 48, PMAT-216", _SEE),
        ("values", "the keys stand where values belong", V, _as("layers.{i}.k")),
        ("values-in-decode", "the keys stand where values belong, in cached steps", V, _as("layers.{i}.k"), _decode),
    ),
    *_class(
        ("bias-dropped", "backend-attention", "Round 50", _SEE),
        ("queries", "a vector is missing from every query", Q, _constant(-0.05)),
        ("values", "a vector is missing from every value", V, _constant(-0.05)),
        ("twice", "a vector too much in the values of the last layer", LAST + "v", _constant(0.05)),
    ),
)
_CACHE = (
    *_class(
        ("cache-shifted", "backend-cache", "aprender 2337", _SEE),
        ("both", "keys and values stand one slot on", KV, _past),
        ("values", "values stand one slot on", V, _past),
        ("keys-in-decode", "new keys are those of the step before", K, _past, _decode),
        ("values-in-decode", "new values are those of the step before", V, _past, _decode),
    ),
    *_class(
        ("cache-stale", "backend-cache", "aprender 2337", _P3),
        ("always", "a step writes what the step before wrote", KV, _stale, _decode),
        ("last-layer", "the last layer's slot is never written anew", LAST + "[kv]", _stale, _decode),
        ("odd", "every second step does not write", KV, _stale, lambda seen: _odd(seen) & _decode(seen)),
        ("late", "nothing is written from the ninth step on", KV, _stale, _late_steps),
    ),
    *_class(
        ("cache-overwritten", "backend-cache", "aprender 2337", _P3),
        ("zero", "the new slot is zeroed", KV, _fill(0), _decode),
        ("keys", "the new key slot is zeroed", K, _fill(0), _decode),
        ("values", "the new value slot is zeroed in the last layer", LAST + "v", _fill(0), _decode),
        ("prompt-end", "the last slot of the prompt is zeroed", KV, _fill(0), _end_of_prompt),
    ),
    *_class(
        ("cache-layer", "backend-cache", "aprender 2337", _SEE),
        ("keys", "the keys of the layer before", K, _as("layers.{j}.k")),
        ("values", "the values of the layer before", V, _as("layers.{j}.v")),
        ("in-decode", "the values of the layer before, in cached steps", V, _as("layers.{j}.v"), _decode),
    ),
    *_class(
        ("cache-narrow", "backend-cache", "llama.cpp 7805", _P3),
        ("int8", "cached steps store 8-bit keys and values", KV, _integers(127), _decode),
        ("int4", "cached steps store 4-bit keys and values", KV, _integers(7), _decode),
        ("bfloat16", "cached steps store bfloat16", KV, _narrow(7), _decode),
        ("float16", "a cache in float16", KV, _narrow(10), lambda seen: seen.at.cached),
    ),
    *_class(
        ("decode-only", "backend-cache", "aprender 2337", _P3),
        ("noise", "noise of 1e-4 in the logits of cached steps", "logits", _noise(0.0001), _decode),
        ("attention", "the last layer loses attention in cached steps", LAST + "resid_attn", _minus(MIXED), _decode),
        ("late", "logits of cached steps shrink from the ninth on", "logits", _scale(0.9), _late_steps),
    ),
    *_class(
        ("prefill-only", "backend-cache", "vllm 14715", _P3),
        ("cached", "noise of 1e-4 in a prefill that fills a cache", "logits", _noise(0.0001), _cached_prefill),
        ("values", "a prefill rounds its values to bfloat16", V, _narrow(7), _prefill),
    ),
)
_KERNELS = (
    *_class(
        ("f16-overflow", "backend-kernel", "llama.cpp 8412", _P1),
        ("attention", "the largest attention sums overflow float16", ATTN, _overflow(0.9)),
        ("residual", "the largest residuals overflow float16", LAST + "resid_ffn", _overflow(0.5)),
        ("logits", "the largest logits overflow float16", "logits", _overflow(0.99)),
        ("in-decode", "attention overflows float16 in cached steps", ATTN, _overflow(0.9), _decode),
    ),
    *_class(
        ("narrow-sums", "backend-kernel", "aprender 3922", _SEE),
        ("float16", "residuals kept in float16", RESID, _narrow(10)),
        ("bfloat16", "attention sums kept in bfloat16", ATTN, _narrow(7)),
        ("logits", "logits kept in bfloat16", "logits", _narrow(7), _always, _P1),
    ),
    *_class(
        ("nan", "backend-kernel", "vllm 14126", _P1),
        ("late", "NaN in the logits from position 80 on", "logits", _fill(np.nan), _from(80)),
        ("one", "one NaN among the logits of position 80", "logits", _fill(np.nan, slice(17, 18)), _at_80),
        ("in-decode", "NaN in the logits of cached steps", "logits", _fill(np.nan), _decode),
        ("infinite", "the last logit is infinite", "logits", _fill(np.inf, slice(-1, None))),
    ),
    *_class(
        ("row-tile", "backend-kernel", "llama.cpp 27007", _SEE),
        ("zero", "attention of rows 16 to 31 is zero", ATTN, _fill(0), _tile),
        ("other", "rows 16 to 31 of the MLP get the row before", RESID, _past, _tile),
        ("partial", "the last partial tile of 64 rows is skipped", RESID, _as(MID), _partial_tile),
        ("partial-logits", "the last partial tile of logits is zero", "logits", _fill(0), _partial_tile, _P1),
    ),
    *_class(
        ("column-tile", "backend-kernel", "llama.cpp 27007", _SEE),
        ("logits", "the last partial tile of 96 logits is zero", "logits", _partial_columns, _always, _P1),
        ("attention", "the last 32 columns of attention are zero", ATTN, _fill(0, slice(-32, None))),
        ("twice", "the first tile of 64 logits stands twice", "logits", _columns(_twice), _always, _P1),
    ),
    *_class(
        ("block-scale", "backend-kernel", "llama.cpp 27007", _SEE),
        ("values", "each block of values has the next block's scale", V, _blocks(_next_scale)),
        ("attention", "each block of attention has the next block's scale", ATTN, _blocks(_next_scale)),
        ("nibbles", "halves of each block exchanged", V, _blocks(lambda b: np.roll(b, 16, axis=2))),
        ("neighbours", "nibbles of each byte exchanged", ATTN, _blocks(_nibbles)),
    ),
    *_class(
        ("block-minimum", "backend-kernel", "llama.cpp 27007", _SEE),
        ("values", "the blocks of values lose their minimum", V, _blocks(_no_minimum)),
        ("attention", "the blocks of attention lose their minimum", ATTN, _blocks(_no_minimum)),
    ),
    *_class(
        ("norm", "backend-kernel", "peers.md N10", _SEE),
        ("eps", "the last norm adds 1e-2 instead of its epsilon", "final_hidden", _renorm(0.01)),
        ("skipped", "the last norm is skipped", "final_hidden", _as(BELOW)),
        ("tile", "the last norm runs over the whole tile", "final_hidden", _over_all),
    ),
    *_class(
        ("layer-skipped", "backend-kernel", "aprender 3413", _SEE),
        ("whole", "the last layer is skipped", LAST + "resid_ffn", _as(BELOW)),
        ("attention", "attention of the first layer is skipped", r"layers\.0\.resid_attn", _minus(MIXED)),
        ("ffn", "the MLP of the last layer is skipped", LAST + "resid_ffn", _as(MID)),
        ("in-decode", "the last layer is skipped in cached steps", LAST + "resid_ffn", _as(BELOW), _decode),
    ),
    *_class(
        ("streamed-layer", "backend-kernel", "GH-201", _SEE),
        ("half", "the last layer runs while half of down_proj is on its way", LAST + "resid_ffn", _half_arrived(MID)),
        ("values", "the first layer runs before its v_proj is there", r"layers\.0\.v", _fill(0)),
        ("buffer", "o_proj's buffer still holds half of zeros", LAST + "resid_attn", _half_arrived(BELOW)),
        ("in-decode", "in cached steps half of down_proj is missing", LAST + "resid_ffn", _half_arrived(MID), _decode),
    ),
    *_class(
        ("layer-repeated", "backend-kernel", "peers.md N5", _SEE),
        ("attention", "attention of the last layer is added twice", LAST + "resid_attn", _minus(MIXED, -1)),
        ("ffn", "the MLP of the last layer is added twice", LAST + "resid_ffn", _twice_mlp),
    ),
    *_class(
        ("residual-dropped", "backend-kernel", "aprender 3413", _SEE),
        ("attention", "nothing is added to the attention", RESID_ATTN, _as(MIXED)),
        ("ffn", "nothing is added to the MLP of the last layer", LAST + "resid_ffn", _minus(MID)),
        ("in-decode", "the same, in cached steps", RESID_ATTN, _as(MIXED), _decode),
    ),
    *_class(
        ("noise", "backend-kernel", "Round 48, PMAT-216", _SEE),
        ("residual", "noise of 1e-3 in the residual", RESID, _noise(0.001)),
        ("logits", "noise of 1e-3 in the logits", "logits", _noise(0.001), _always, _P1),
        ("loud", "logits drowned in noise", "logits", _noise(1.0), _always, _P5),
    ),
    *_class(
        ("odd-positions", "backend-kernel", "vllm 14715", _SEE),
        ("attention", "odd positions lose their attention", RESID_ATTN, _minus(MIXED), _odd),
        ("logits", "odd positions have the logits of the one before", "logits", _past, _odd, _P1),
        ("residual", "odd positions are scaled", LAST + "resid_attn", _scale(1.01), _odd),
    ),
    *_class(
        ("long-only", "backend-kernel", "llama.cpp 12957", _SEE),
        ("keys", "keys above position 64 are zero", K, _fill(0), _from(64)),
        ("residual", "the residual above position 64 is scaled", LAST + "resid_attn", _scale(1.1), _from(64)),
        ("logits", "logits above position 64 are those of the position before", "logits", _past, _from(64), _P1),
    ),
    *_class(
        ("cancels-in-scores", "backend-kernel", "peers.md N4", _P2),
        ("factor", "queries doubled, keys halved", QK, _two_and_half),
        ("positions", "queries and keys seven positions on", QK, _by(7)),
        ("shift", "one vector added to all keys after RoPE", K, _constant(0.05)),
    ),
    *_class(
        ("cancels-in-norm", "backend-kernel", "peers.md N7", _P2),
        ("double", "the last residual doubled before its norm", LAST + "resid_ffn", _scale(2)),
        ("tenfold", "the last residual tenfold before its norm", LAST + "resid_ffn", _scale(10)),
    ),
)
_ANSWERS = (
    *_class(
        ("logits-scaled", "backend-kernel", "Round 48, PMAT-216", _P1),
        ("1.3", "logits times 1.3", "logits", _scale(1.3), _always, _KL),
        ("thousandth", "logits a thousandth larger", "logits", _scale(1.001), _always, _KL),
        ("in-decode", "logits times 1.3 in cached steps", "logits", _scale(1.3), _decode),
    ),
    *_class(
        ("logits-offset", "backend-kernel", "peers.md V25", _P1),
        ("all", "3 subtracted from every logit", "logits", _add(-3)),
        ("normalised", "log-probabilities instead of logits", "logits", _log_softmax),
        ("largest", "the largest logit subtracted", "logits", lambda x, seen: x - x.max(1, keepdims=True)),
        ("one", "one logit raised by 5", "logits", _raise_one, _always, _KL),
    ),
    *_class(
        ("logits-permuted", "backend-kernel", "peers.md V12", _KL),
        ("same-norm", "all but the largest permuted: equal norm, equal argmax", "logits", _shuffled_but_top),
        ("transposed", "arguments of the head exchanged", "logits", _columns(_transposed), _always, _P5),
        ("reversed", "logits in reverse", "logits", _columns(_reversed), _always, _P5),
        ("rolled", "logits of the token before", "logits", _columns(_rolled), _always, _P5),
    ),
    *_class(
        ("sign", "backend-kernel", "Round 48, PMAT-216", _P5),
        ("logits", "logits with the other sign", "logits", _scale(-1)),
        ("hidden", "the last hidden state with the other sign", "final_hidden", _scale(-1)),
        ("lost", "logits without their sign", "logits", lambda x, seen: np.abs(x)),
        ("values", "values with the other sign", V, _scale(-1), _always, _SEE),
    ),
    *_class(
        ("uniform", "backend-kernel", "sglang 38363", _P5),
        ("log-v", "every logit is -ln V", "logits", lambda x, seen: np.full_like(x, -np.log(x.shape[1]))),
        ("zero", "every logit is zero", "logits", _fill(0)),
        ("first", "every position has the logits of the first", "logits", _first_row, _always, _P1),
        ("hidden", "the last hidden state is zero", "final_hidden", _fill(0)),
    ),
    *_class(
        ("traced-only", "backend-kernel", "Round 48, PMAT-216", _P7),
        ("ulp", "tracing moves logits by one unit in the last place", "logits", _ulp, _traced),
        ("logits", "tracing scales the logits", "logits", _scale(1.001), _traced),
        ("value", "tracing moves one logit", "logits", _move_one, _traced),
    ),
    *_class(
        ("untraced-only", "backend-kernel", "aprender 1427", _P7),
        ("noise", "the path without a trace is noisy", "logits", _scale(1 + 2 ** (-20)), _untraced),
        ("scale", "the path without a trace scales its logits", "logits", _scale(1.3), _untraced),
        ("permuted", "the path without a trace permutes its logits", "logits", _columns(_rolled), _untraced, _P7 + _P6),
    ),
    *_class(
        ("token-fed", "backend-sampling", "aprender 2337", _SEE),
        ("off-by-one", "the next id is fed", "ids", lambda x, seen: np.minimum(x + 1, seen.config.vocab_size - 1)),
        ("stale", "a step is fed the token of the step before", "ids", _stale, _decode),
        ("first-lost", "the first token is lost", "ids", _next, _prefill),
        ("masked", "ids lose their high bits", "ids", lambda x, seen: x % 256),
    ),
    *_class(
        ("token-taken", "backend-sampling", "Round 52, PMAT-236", _P5),
        ("second", "the second best token leads", "logits", _second),
        ("padded", "a padded id leads", "logits", _lead(-1)),
        ("zero", "token 0 leads", "logits", _lead(0)),
        ("second-in-decode", "the second best token leads in cached steps", "logits", _second, _decode, _P3 + _P6),
    ),
    *_class(
        ("hears-itself", "backend-sampling", "QwenLM/Qwen3 485", _P6),
        ("repeats", "after 8 of its own tokens it repeats the first", "logits", _lead(71), _hears_itself(8)),
        ("second", "after 16 of its own tokens it takes the second best", "logits", _second, _hears_itself(16)),
        ("values", "after 12 of its own tokens it attends to nothing new", V, _fill(0), _hears_itself(12)),
    ),
    *_class(
        ("timed-decode", "backend-sampling", "aprender 3413", ("F-THR-003",)),
        ("zero", "from its fourth run on a prompt decodes to token 0", "logits", _lead(0), _timed(4)),
        ("second", "from its fourth run on a prompt takes second best tokens", "logits", _second, _timed(4)),
    ),
    *_class(
        ("timed-prefill", "backend-sampling", "aprender 2785", ("F-THR-004",)),
        ("ulp", "from its third run on a prefill differs in the last place", "logits", _ulp, _timed(3, prompt=True)),
        ("narrow", "from its third run on a prefill rounds to float16", "logits", _narrow(10), _timed(3, prompt=True)),
    ),
)

DEFECTS: tuple[Defect, ...] = (*_HEAD, *_POSITIONS, *_ATTENTION, *_CACHE, *_KERNELS, *_ANSWERS)

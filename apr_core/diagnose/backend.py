"""
A backend that computes something else than the independent forward: where it begins, in which way, and what repairs it.

The candidate runs the same tokens at once, through its cache, and on its own answers, more than once. The first
activation that differs holds the fault, since everything before it is right; its relation to what should stand there
(turned, moved, scaled, shifted by a position, another layer's) names the class. The proof puts the reference's values
in the place of the faulty ones and watches the logits return.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apr_core.diagnose.cause import Cause, Chain
from apr_core.engines.wrap import At, Hook, wrap
from apr_core.model.generate import follow
from apr_core.model.trace import Trace, TracedForward

Ids = NDArray[np.int64]
F32 = NDArray[np.float32]
Mask = NDArray[np.bool_]
PROMPT, POSITIONS, OWN, RUNS = 32, 96, 24, 6
ROUNDING = 2e-5  # rel_l2 of float32 against float64 on these models is near 1e-6; the claims' own limit is 1e-5
SMALL = 0.02


@dataclass(frozen=True, eq=False)
class Fault:
    """
    The first divergence of a run.

    Attributes:
        run: ``at once`` or ``through the cache``.
        op: Name of the activation.
        found: What the candidate has there, [tokens, dim].
        given: What the independent forward has there.
        rows: Which positions differ.
        mine: The whole trace of the candidate.
        right: The whole trace of the reference.
        head_dim: Width of a head.
        steps: The candidate's trace through the cache.
    """

    run: str
    op: str
    found: F32
    given: F32
    rows: Mask
    mine: Trace
    right: Trace
    head_dim: int
    steps: Trace

    @property
    def prompt_alone(self) -> bool:
        """Whether cached steps are right where a prompt at once is not; only the first layer's are its own."""
        layer = self.op.split(".")[1]
        behind = differing(self.steps[self.op], self.given)[PROMPT:]
        return self.run == "at once" and layer == "0" and bool(self.rows[PROMPT:].any() and not behind.any())

    @property
    def kind(self) -> str:
        """``q``, ``resid_ffn``, ``logits`` and so on, without the layer."""
        return self.op.rsplit(".", 1)[-1]

    @property
    def f(self) -> F32:
        """The rows that differ."""
        return self.found[self.rows]

    @property
    def r(self) -> F32:
        """What should stand there."""
        return self.given[self.rows]

    def wrong(self, name: str, limit: float = ROUNDING) -> Mask:
        """Which positions of another activation differ."""
        return differing(self.mine[name], self.right[name], limit)

    def sibling(self, kind: str, layer: int = 0) -> str:
        """Name another activation of this layer, or of one ``layer`` further."""
        parts = self.op.split(".")
        return f"layers.{int(parts[1]) + layer}.{kind}" if parts[0] == "layers" else kind

    @property
    def steps_alone(self) -> bool:
        """Whether the fault shows in cached steps only."""
        return self.run != "at once" and not self.rows[:PROMPT].any()


def differing(found: F32, given: F32, limit: float = ROUNDING) -> Mask:
    """Tell which rows are beyond the limit; what is not a number is."""
    with np.errstate(all="ignore"):
        far = np.linalg.norm(found.astype(np.float64) - given, axis=1)
        size = np.maximum(np.linalg.norm(given.astype(np.float64), axis=1), 1e-12)
        beyond: Mask = ~(far <= limit * size)
    return beyond


def explain_backend(candidate: TracedForward, reference: TracedForward, ids: Ids, chain: Chain) -> list[Cause]:
    """
    Find the fault of a backend.

    Args:
        candidate: What is suspected; wrapped or not.
        reference: An independent forward of the same file: the numpy one in float64.
        ids: At least ``PROMPT`` + 2 tokens; ``POSITIONS`` show more.
        chain: The questions so far.

    Returns:
        One cause, or none where nothing differs beyond rounding.

    Cost: about twenty forwards of ``ids``.
    """
    ids = ids[: min(POSITIONS, candidate.config.max_position_embeddings)]
    right, mine = Trace(), Trace()
    reference.forward(ids, None, right)
    candidate.forward(ids, None, mine)
    again = [candidate.forward(ids) for _ in range(RUNS)]
    if cause := _unsteady(again, mine, right, chain):
        return [chain.close(cause)]
    stepped = follow(candidate, ids, PROMPT, full=True)
    fault = _first("at once", mine, right, stepped, candidate.config.head_dim)
    if fault is None:
        chain.ask("Is a prompt at once right?", f"yes: {len(right)} activations at {ids.size} positions agree")
        fault = _first("through the cache", stepped, right, stepped, candidate.config.head_dim)
    if fault is not None:
        return [chain.close(_located(fault, candidate, reference, ids, chain))]
    chain.ask("Are cached steps right?", f"yes: {ids.size - PROMPT} steps behind {PROMPT} tokens agree")
    cause = _own_answers(candidate, reference, ids) or _repeated(candidate, ids, stepped["logits"])
    return [chain.close(cause)] if cause else []


def _first(run: str, mine: Trace, right: Trace, steps: Trace, head_dim: int) -> Fault | None:
    """Find the first activation, in forward order, with a row beyond rounding."""
    for name in right:
        if name in mine and (rows := differing(mine[name], right[name])).any():
            return Fault(run, name, mine[name], right[name], rows, mine, right, head_dim, steps)
    return None


def _unsteady(again: Sequence[F32], mine: Trace, right: Trace, chain: Chain) -> Cause | None:
    """Ask the same thing several times, with tracing and without: the answers must have the same bits."""
    changed = [n for n, logits in enumerate(again) if not np.array_equal(logits, again[0], equal_nan=True)]
    if changed and changed[0] > 1:
        answer = f"run {changed[0] + 2} of the same prompt gives other logits than the {changed[0] + 1} before it"
        return Cause("backend-sampling", "Is the answer the same each time?", answer, op="logits")
    if not changed and not np.array_equal(mine["logits"], again[0], equal_nan=True):
        traced, plain = (differing(x, right["logits"]).mean() for x in (mine["logits"], again[0]))
        answer = f"with tracing {traced:.0%} of the positions are off the reference, without it {plain:.0%}"
        return Cause("backend-kernel", "Does tracing change the logits?", answer, "take the other path", op="logits")
    chain.ask("Is the answer the same each time?", f"{'no, each run differs' if changed else 'yes'}: {len(again)} runs")
    return None


def _own_answers(candidate: TracedForward, reference: TracedForward, ids: Ids) -> Cause | None:
    """Let it hear itself, and ask the reference for the same tokens."""
    cache, feed, said, scores = candidate.new_cache(), ids[:PROMPT], list[int](), list[F32]()
    for _ in range(OWN):
        logits = candidate.forward(feed, cache)
        scores.append(logits[-1])
        said.append(int(logits[-1].argmax()))
        feed = np.array(said[-1:], np.int64)
    whole = np.concatenate([ids[:PROMPT], np.array(said[:-1], np.int64)])
    wanted = reference.forward(whole)[PROMPT - 1 :]
    off = differing(np.stack(scores), wanted)
    if not off.any():
        return None
    answer = f"from its token {int(off.argmax())} on, {int(off.sum())} of {OWN} steps; on given tokens none is"
    return Cause("backend-sampling", "Does it go wrong on its own answers?", answer, op="logits")


def _repeated(candidate: TracedForward, ids: Ids, before: F32) -> Cause | None:
    """Run the same cached steps again and again; ``before`` are the logits of the first time."""
    ids = ids[: PROMPT + 8]
    runs = [before[: ids.size], *(follow(candidate, ids, PROMPT, full=True)["logits"] for _ in range(RUNS))]
    changed = [n for n, logits in enumerate(runs) if not np.array_equal(logits, runs[0], equal_nan=True)]
    if not changed:
        return None
    answer = f"run {changed[0] + 1} of the same cached steps gives other logits"
    return Cause("backend-sampling", "Are cached steps the same each time?", answer, op="logits")


# --- what kind of fault


def _located(fault: Fault, candidate: TracedForward, reference: TracedForward, ids: Ids, chain: Chain) -> Cause:
    """Name the fault at the first divergence, and prove it by putting the reference's values there."""
    at = np.flatnonzero(fault.rows)
    with np.errstate(all="ignore"):
        far = float(np.nanmax(np.linalg.norm(fault.f - fault.r, axis=1) / (np.linalg.norm(fault.r, axis=1) + 1e-12)))
    where = f"{fault.op} {fault.run}, {at.size} of {fault.rows.size} positions, the first {at[0]}; rel_l2 {far:.3g}"
    chain.ask("Where does it first differ?", where)
    kind = {"q": _of_scores, "k": _of_scores, "v": _of_values, "logits": _of_logits}.get(fault.kind, _of_sums)
    klass, answer = _of_input(fault, reference, ids) or kind(fault)
    position = f"{at[0]} to {at[-1]}" if at.size > 1 else str(at[0])
    cause = Cause(klass, "In which way does it differ?", answer, op=fault.op, position=position)
    return _proved(cause, fault, candidate, ids)


def _close(a: F32, b: F32, limit: float = 1e-3) -> bool:
    """Whether nearly all rows agree."""
    return a.shape == b.shape and a.size > 0 and bool((~differing(a, b, limit)).mean() > 0.95)


def _of_input(fault: Fault, reference: TracedForward, ids: Ids) -> tuple[str, str] | None:
    """Where queries, keys and values of the first layer all differ, other tokens went in: find which."""
    first = fault.op == "layers.0.q" and all((fault.wrong(f"layers.0.{x}") == fault.rows).all() for x in "kv")
    if not first or _close(fault.found, 0 * fault.found):
        return None
    vocabulary = reference.config.vocab_size
    tries = {
        "the token before": np.concatenate([ids[:1], ids[:-1]]),
        "the token behind": np.concatenate([ids[1:], ids[-1:]]),
        "the next id": np.minimum(ids + 1, vocabulary - 1),
        "the id before": np.maximum(ids - 1, 0),
        **{f"the low {bits} bits of the id": ids % 2**bits for bits in (8, 16)},
    }
    for how, other in tries.items():
        trace = Trace()
        reference.forward(other, None, trace)
        if _close(fault.mine["layers.0.v"][fault.rows], trace["layers.0.v"][fault.rows]):
            return "backend-sampling", f"{how} was fed at {int(fault.rows.sum())} positions"
    return None


def _heads(values: F32, width: int) -> F32:
    return values.reshape(len(values), -1, width)


def _moved_heads(fault: Fault) -> str:
    """Say whether each head is another head of the same row."""
    f, r = _heads(fault.f, fault.head_dim), _heads(fault.r, fault.head_dim)
    source = []
    for h in range(f.shape[1]):
        match = [o for o in range(r.shape[1]) if _close(f[:, h], r[:, o])]
        if not match:
            return ""
        source.append(match[0])
    return "" if source == list(range(len(source))) else f"head h holds head {source}"


def _dropped_part(fault: Fault) -> str:
    """Say whether the same elements of every head are zero."""
    f = _heads(fault.f, fault.head_dim)
    zero = (f == 0).all(axis=(0, 1))
    rest = ~zero
    if (
        not zero.any()
        or zero.all()
        or not np.allclose(f[..., rest], _heads(fault.r, fault.head_dim)[..., rest], 1e-3, 1e-5)
    ):
        return ""
    return f"{int(zero.sum())} of the {fault.head_dim} elements of every head are zero"


def _shifted(fault: Fault) -> int:
    """By how many positions the rows are shifted: -1 for those of the position before, 1 for the one behind, else 0."""
    at = np.flatnonzero(fault.rows)
    for by in (-1, 1):
        inside = at[(at + by >= 0) & (at + by < len(fault.given))]
        if inside.size > 1 and inside.size >= at.size - 2 and _close(fault.found[inside], fault.given[inside + by]):
            return by
    return 0


def _factor(fault: Fault) -> float | None:
    """The one factor between what stands there and what should, or None."""
    f, r = fault.f.astype(np.float64), fault.r.astype(np.float64)
    c = float((f * r).sum() / max(float((r * r).sum()), 1e-300))
    return c if _close(fault.f, (c * r).astype(np.float32), 1e-4) else None


def _common(fault: Fault) -> tuple[str, str] | None:
    """What can befall queries, keys and values alike: heads, zeros, positions, layers, one vector too much."""
    if moved := _moved_heads(fault):
        return "backend-attention", moved
    if not fault.f.any():
        return _emptied(fault)
    if part := _dropped_part(fault):
        return "backend-attention", part
    by = _shifted(fault)
    if by < 0:
        return "backend-cache", "each row is that of the position before: a slot too far"
    if by > 0:
        return "backend-attention", "each row is that of the position behind: the mask lets the future in"
    below = fault.sibling(fault.kind, -1)
    if below in fault.right and _close(fault.f, fault.right[below][fault.rows]):
        return "backend-cache", f"it is {below}: the slot of another layer"
    stale = _held(fault)
    if stale:
        return "backend-cache", stale
    offset = fault.f - fault.r
    if len(offset) > 2 and _close(offset, np.broadcast_to(np.median(offset, axis=0), offset.shape), 0.05):
        return "backend-attention", f"one vector is added to every row, of norm {np.linalg.norm(offset[0]):.3g}: a bias"
    return None


def _held(fault: Fault) -> str:
    """Say whether a row repeats an earlier one of the candidate's own: a slot that was never written anew."""
    at = np.flatnonzero(fault.rows)
    at = at[at > 0]
    if fault.run == "at once" or at.size < 2 or not _close(fault.found[at], fault.found[at - 1]):
        return ""
    return "each row repeats what the step before left"


def _emptied(fault: Fault) -> tuple[str, str]:
    at = np.flatnonzero(fault.rows)
    if at.tolist() == [0]:
        return "backend-attention", "position 0 is zero: nobody can read it"
    if fault.run != "at once":
        return "backend-cache", f"the slots of {at.size} positions are zero, which a prompt at once fills"
    return "backend-kernel", f"{at.size} positions from {at[0]} on are zero"


def _of_scores(fault: Fault) -> tuple[str, str]:
    """Queries and keys: what cancels, what turns, what scales."""
    attended = fault.sibling("attn_output")
    if fault.run == "at once" and not fault.wrong(attended).any():
        return "backend-kernel", f"it cancels: {attended} is right, so the scores are; another convention of q and k"
    if common := _common(fault):
        return common
    if (c := _factor(fault)) is not None:
        keys = fault.sibling("k")
        if fault.kind == "q" and (fault.wrong(keys) == fault.rows).all() and c > 0:
            return "backend-position", f"queries and keys times {c:.5g}: RoPE makes both, as YaRN's temperature does"
        return "backend-attention", f"each value times {c:.5g}: the scale of the scores"
    if _turned(fault):
        return "backend-position", f"every head keeps its length and points elsewhere: {_angle(fault)}"
    if fault.run != "at once" and fault.kind == "k":
        return "backend-cache", "only the keys that a cached run stores are off"
    if fault.op == "layers.0.q" and all((fault.wrong(fault.sibling(x)) == fault.rows).all() for x in "kv"):
        return "backend-kernel", "queries, keys and values are off at the same positions: so is what goes into them"
    return "backend-attention", "no turn, no factor, no exchange explains it"


def _turned(fault: Fault) -> bool:
    """Whether each head has its length and another direction: RoPE is the one thing that does so."""
    f, r = (_heads(x, fault.head_dim).astype(np.float64) for x in (fault.f, fault.r))
    factor = float(np.median(np.linalg.norm(f, axis=2) / np.maximum(np.linalg.norm(r, axis=2), 1e-12)))
    f = f / factor if factor > 0 else f  # YaRN turns and stretches
    grown = np.abs(np.linalg.norm(f, axis=2) - np.linalg.norm(r, axis=2))
    moved = np.linalg.norm(f - r, axis=2)
    clear = moved > 1e-6 * np.linalg.norm(r, axis=2)
    return bool(clear.any() and np.median(grown[clear] / moved[clear]) < SMALL)


def _angle(fault: Fault) -> str:
    """Describe the largest turn of a pair at the last position that differs."""
    f, r = (_heads(x, fault.head_dim)[-1, 0].astype(np.float64) for x in (fault.f, fault.r))
    half = fault.head_dim // 2
    turn = np.angle((f[:half] + 1j * f[half:]) * np.conj(r[:half] + 1j * r[half:]))
    pair = int(np.abs(turn).argmax())
    at = int(np.flatnonzero(fault.rows)[-1])
    return f"pair {pair} of head 0 is {float(turn[pair]):.3g} rad off at position {at}"


def _of_values(fault: Fault) -> tuple[str, str]:
    """Values: what the cache does to them, what attention mixes up, what a kernel spoils."""
    keys = fault.sibling("k")
    if _close(fault.f, fault.mine[keys][fault.rows]):
        return "backend-attention", f"it is {keys}: keys stand where values belong"
    if common := _common(fault):
        return common
    if (c := _factor(fault)) is not None:
        return "backend-kernel", f"each value times {c:.5g}"
    if fault.run != "at once":
        return "backend-cache", "only the values that a cached run stores are off"
    if fault.prompt_alone:
        return "backend-cache", "only the values of a prompt are off, those of cached steps are right"
    return "backend-kernel", "no exchange of heads, positions or layers explains it"


def _of_sums(fault: Fault) -> tuple[str, str]:
    """Sums: attention's output, the residuals, the last hidden state."""
    if not np.isfinite(fault.f).all():
        return "backend-kernel", f"{int((~np.isfinite(fault.f)).sum())} values are not finite"
    if fault.kind == "resid_attn" and fault.steps_alone:
        without = fault.given - fault.right[fault.sibling("attn_output")]
        if _close(fault.f, without[fault.rows]):
            return "backend-cache", "the residual lacks its attention in cached steps alone"
    if (c := _factor(fault)) is not None:
        return "backend-kernel", f"each value times {c:.5g}"
    before = _summands(fault)
    return "backend-kernel", before or "what goes in is right and what comes out is not"


def _summands(fault: Fault) -> str:
    """Say which summand of a residual is missing or stands there alone."""
    names = {
        "resid_attn": (fault.sibling("attn_output"), fault.sibling("resid_ffn", -1)),
        "resid_ffn": (fault.sibling("resid_attn"), fault.sibling("resid_ffn", -1)),
        "final_hidden": tuple(list(fault.right)[-3:-2]),
    }.get(fault.kind, ())
    for name in names:
        if name in fault.right:
            value, whole = fault.right[name][fault.rows], fault.r
            if _close(fault.f, value):
                return f"it is {name} alone"
            if _close(fault.f, whole - value):
                return f"{name} is missing from it"
            if _close(fault.f, whole + value):
                return f"{name} is in it twice"
    return ""


def _of_logits(fault: Fault) -> tuple[str, str]:
    """Logits: few columns are what becomes of them, all columns are arithmetic."""
    f, r = fault.f.astype(np.float64), fault.r.astype(np.float64)
    if not np.isfinite(f).all():
        return "backend-kernel", f"{int((~np.isfinite(f)).sum())} logits are not finite"
    moved = np.abs(f - r) > 1e-3 * np.abs(r).max(axis=1, keepdims=True)
    count, top = moved.sum(axis=1), f.argmax(axis=1)
    if (count == 1).all() and moved[np.arange(len(f)), top].all() and (top == top[0]).all() and fault.rows.mean() > 0.3:
        return "backend-sampling", f"token {top[0]} leads at every position, all other logits are right"
    best = np.argsort(r, axis=1)[:, -2:]
    swapped = np.take_along_axis(f, best, 1) - np.take_along_axis(r, best, 1)[:, ::-1]
    if (count <= 2).all() and (np.abs(swapped) <= 1e-3 * np.abs(r).max()).all():
        return "backend-sampling", "the two best logits are exchanged, all others are right"
    touched = np.abs(f - r) > 1e-5 * np.abs(r).max()
    some = touched.sum(axis=1)
    one_tile = some.min() > 0.5 * some.max() and touched.any(axis=0).sum() < 1.5 * some.max()
    if count.min() and some.max() < r.shape[1] / 4 and not one_tile:
        few = f"{int(some.min())} to {int(some.max())} of {r.shape[1]} logits a row are changed"
        return "backend-sampling", f"{few}, others in each row, and all the rest are right"
    if fault.run != "at once":
        far = np.linalg.norm(f - r, axis=1) / np.linalg.norm(r, axis=1)
        late = int(np.flatnonzero(fault.rows)[0]) > PROMPT
        if far.max() < 1e-2 or late:
            when = "late steps" if late else "a cached run"
            return "backend-cache", f"only {when} are off, by rel_l2 {far.max():.3g}; the hidden state is right"
    if (c := _factor(fault)) is not None:
        return "backend-kernel", f"each logit times {c:.5g}"
    offset = float(np.median(f - r))
    if _close(fault.f, (r + offset).astype(np.float32)):
        return "backend-kernel", f"{offset:.4g} is added to each logit"
    return "backend-kernel", "the hidden state is right, the product with the head is not"


# --- proof


def _proved(cause: Cause, fault: Fault, candidate: TracedForward, ids: Ids) -> Cause:
    """Put the reference's values in the place of the faulty activations; the logits must return."""
    kinds = {fault.kind} | ({"q", "k", "v"} if fault.kind in "qkv" else set())
    hook = _replacing({n: v for n, v in fault.right.items() if n.rsplit(".", 1)[-1] in kinds})

    def logits(model: TracedForward) -> F32:
        if fault.run == "at once":
            return model.forward(ids, None, Trace())
        return follow(model, ids, PROMPT, full=True)["logits"]

    after = logits(wrap(candidate, hook))
    before, left = (int(differing(x, fault.right["logits"]).sum()) for x in (fault.mine["logits"], after))
    if left or not before:
        return cause
    parts = ", ".join(sorted(kinds))
    text = f"{parts} computed by the reference: logits of {before} positions were off, {left} are"
    return replace(cause, repair=text, proved=True)


def _replacing(right: dict[str, Any]) -> Hook:
    """Make a hook that computes with the reference's activations."""

    def hook(name: str, values: F32, at: At) -> F32 | None:
        if name not in right:
            return None
        rows: F32 = right[name][at.start : at.start + len(values)]
        return rows

    return hook

"""
Experiments on one tensor and what should stand there: each undoes one kind of damage and counts what comes back.

Ordered from the container over naming and layout to codec, numerics and plain numbers. The first that succeeds speaks.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod

import numpy as np
from numpy.typing import NDArray

from apr_core.contract.gates import load_gates
from apr_core.contract.layout import layer_of, role_of
from apr_core.dtypes import FORMATS
from apr_core.errors import AprError
from apr_core.formats.bounds import step_bound
from apr_core.formats.checkpoint import Checkpoint
from apr_core.formats.codecs import decode, decode_bytes

F32 = NDArray[np.float32]
Mask = NDArray[np.bool_]
ALL = 0.999  # share of the values that a repair must bring back
BLOCK = 32
REACH = 1 << 16  # bytes before and behind a tensor's place


@dataclass(frozen=True)
class Proof:
    """What an experiment found: class, question, answer, and the repair that restored agreement."""

    klass: str
    question: str
    answer: str
    repair: str = ""
    proved: bool = False


class Pair:
    """
    One tensor of the subject and what the reference has under its name.

    Attributes:
        name: Canonical name.
        other: Its name in the reference: a tied head is the embedding.
        dtype: The subject's type.
        source: The reference's type.
        head_dim: Width of a head, for orders of rows.
    """

    def __init__(self, name: str, subject: Checkpoint, reference: Checkpoint, other: str, head_dim: int) -> None:
        self.name, self.subject, self.reference, self.head_dim = name, subject, reference, head_dim
        self.dtype, self.source = subject.tensors[name].dtype, reference.tensors[other].dtype
        self.other = other

    @cached_property
    def found(self) -> F32:
        """The subject's values."""
        return decode(self.subject.raw(self.name))

    @cached_property
    def given(self) -> F32:
        """The reference's."""
        return decode(self.reference.raw(self.other))

    @cached_property
    def slack(self) -> F32:
        """How far each value may be from the reference's in the subject's type."""
        try:
            bound = step_bound(self.given, self.dtype)
        except AprError:
            return np.zeros(self.given.shape, np.float32)
        return bound

    @property
    def blocked(self) -> bool:
        """Whether the subject's type is one of blocks."""
        return self.dtype.block_elements > 1

    @property
    def same_shape(self) -> bool:
        """Whether values can be compared one by one."""
        return self.found.shape == self.given.shape

    @cached_property
    def wrong(self) -> Mask:
        """Where the subject says something else."""
        return ~self._within(self.found)

    def _within(self, values: F32) -> Mask:
        with np.errstate(all="ignore"):
            close: Mask = np.abs(values.astype(np.float64) - self.given) <= self.slack
        return close

    def left(self, values: F32) -> int:
        """How many values still say something else after a repair."""
        if values.shape != self.given.shape:
            return self.given.size
        if self.blocked:  # blocks run along other values then: rounding differs, the direction does not
            near = self.same_shape and correlation(self.found, self.given) > 0.98  # before any repair
            return 0 if correlation(values, self.given) > 0.98 and not near else self.given.size
        return int((~self._within(values)).sum())

    def repairs(self, values: F32) -> bool:
        """Whether a repair brings back nearly everything that was wrong."""
        before = int(self.wrong.sum()) if self.same_shape else self.given.size
        return self.left(values) <= min((1 - ALL) * self.given.size, 0.02 * before)

    def answers(self, values: F32) -> str:
        """Say how much a repair brought back."""
        before = int(self.wrong.sum()) if self.same_shape else self.given.size
        return f"{before} values differed, {self.left(values)} do after it"


def correlation(left: F32, right: F32) -> float:
    """Correlate two arrays of one size, means taken out; 0 where one does not vary."""
    with np.errstate(all="ignore"):
        a, b = (x.reshape(-1).astype(np.float64) for x in (left, right))
        a, b = a - a.mean(), b - b.mean()
        norm = float(np.sqrt((a @ a) * (b @ b)))
        value = float(a @ b) / norm if norm > 0 else 0.0
    return value if np.isfinite(value) else 0.0


Experiment = Callable[[Pair], Proof | None]


def _reread(pair: Pair) -> Proof | None:
    """Read the stored bytes as another type, or in the other byte order."""
    data = pair.subject.raw(pair.name).data
    shape = pair.given.shape
    for name, swap in [("BF16", False), ("F16", False), ("F32", False), ("BF16", True), ("F16", True), ("F32", True)]:
        width = FORMATS[name].block_bytes
        if data.size != width * prod(shape) or (not swap and name == pair.dtype.name):
            continue
        stored = data.reshape(-1, width)[:, ::-1].reshape(-1).copy() if swap else data
        values = decode_bytes(FORMATS[name], stored, shape)
        if pair.repairs(values):
            how = f"{'byte-swapped ' if swap else ''}{name}"
            question = "Are the bytes right under another label?"
            return Proof("container", question, f"as {how}: {pair.answers(values)}", f"read {pair.name} as {how}", True)
    if pair.dtype.name[0] in "IU" or (pair.dtype.name.startswith("F8") and pair.given.ndim == 1):
        answer = f"stored as bare {pair.dtype}, correlation with the reference {_like(pair):.4f}: scales are lost"
        return Proof("codec", "Is the type one that can hold it?", answer, "store it in a float type")
    return None


def _like(pair: Pair) -> float:
    return correlation(pair.found, pair.given) if pair.found.size == pair.given.size else 0.0


def _far(pair: Pair) -> float:
    with np.errstate(all="ignore"):
        return float(np.linalg.norm(pair.found - pair.given)) / max(float(np.linalg.norm(pair.given)), 1e-30)


def _elsewhere(pair: Pair) -> Proof | None:
    """Look for the values under other names of the reference."""
    flat = pair.found.reshape(-1)
    for name, info in pair.reference.tensors.items():
        if name == pair.other or prod(info.shape) != flat.size or flat.size < 2:
            continue
        values = decode(pair.reference.raw(name)).reshape(-1)
        probe = slice(None, None, max(1, flat.size // 512))
        if pair.blocked:
            same = correlation(flat[probe], values[probe]) > 0.9 and correlation(flat, values) > 0.98
        else:
            same = np.array_equal(flat[probe], values[probe]) and np.array_equal(flat, values)
        if same and not np.array_equal(values, pair.given.reshape(-1)):
            question = "Does it hold another tensor's values?"
            backwards = _out_of_order(pair.subject, pair.name, name)
            if backwards:
                return Proof("container", question, f"those of {name}, and {backwards}", "exchange the offsets", True)
            answer = f"those of {name}: {flat.size} of {flat.size} values"
            return Proof("naming", question, answer, f"take {pair.name} from its own place in the source", True)
    return None


def _out_of_order(subject: Checkpoint, name: str, other: str) -> str:
    """Say whether two tensors alone lie against the order of the header: then places were exchanged, not names."""
    if subject.format != "safetensors" or len(subject.files) != 1:
        return ""
    with subject.path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    order = [n for n in header if n != "__metadata__"]

    def backward(names: list[str]) -> int:
        return sum(header[b]["data_offsets"][0] < header[a]["data_offsets"][0] for a, b in pairwise(names))

    swapped = [{name: other, other: name}.get(n, n) for n in order]
    return "only these two lie against the order of the header" if backward(order) and not backward(swapped) else ""


def _late(pair: Pair) -> Proof | None:
    """Look for the reference's own bytes a little before or behind the tensor's place in the file."""
    info, right = pair.subject.tensors[pair.name], pair.reference.raw(pair.other)
    data, middle = right.data, right.data.size // 2
    probe = data[middle : middle + 64].tobytes()
    if (info.dtype, info.shape) != (right.info.dtype, right.info.shape) or len(set(probe)) < 16:
        return None
    with info.file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        at = whole.find(probe, max(0, info.offset + middle - REACH), info.offset + middle + REACH)
        start = at - middle
        if at < 0 or start in (info.offset, -1) or start < 0:
            return None
        other = np.frombuffer(whole[start : start + data.size], np.uint8)
    by, same = start - info.offset, int((other == data[: other.size]).sum())
    if same == other.size and same > 0.98 * data.size:
        answer = f"{same} of its {data.size} bytes stand {by:+d} bytes on"
        return Proof("container", "Does it begin where the header says?", answer, f"move its offset by {by:+d}", True)
    row = data.size // max(1, len(pair.found))
    if by % row or same < 0.9 * data.size or pair.found.ndim < 2:
        return None
    answer = f"{same} of its {data.size} bytes stand {by // row:+d} rows on"
    return Proof("layout", "Do the rows begin at the first?", answer, f"read it {by // row:+d} rows on", True)


def _dealt(pair: Pair) -> Proof | None:
    """Look for wrong rows among all rows of the reference's layer, and for wrong columns among the tensor's own."""
    if not pair.same_shape or pair.found.ndim != 2 or min(pair.found.shape) < 8:
        return None
    layer, reference = layer_of(pair.name), pair.reference
    width = pair.found.shape[1]
    others = [
        n
        for n, t in reference.tensors.items()
        if n != pair.other and layer is not None and layer_of(n) == layer and len(t.shape) == 2 and t.shape[1] == width
    ]
    wrong = pair.wrong
    for what, found, given, bad in (
        ("rows", pair.found, [pair.given, *(decode(reference.raw(n)) for n in others)], wrong.any(axis=1)),
        ("columns", pair.found.T, [pair.given.T], wrong.any(axis=0)),
    ):
        at = np.flatnonzero(bad)
        at = at[:: max(1, len(at) // 64)][:64]
        best = [_nearest(found[at], matrix) for matrix in given]
        like = np.stack([score for _, score in best])
        home = like.argmax(axis=0)
        there = np.stack([row for row, _ in best])[home, np.arange(len(at))]
        moved = (like.max(axis=0) > (0.95 if pair.blocked else 0.995)) & ((home > 0) | (there != at))
        if len(at) > 1 and moved.mean() > 0.95:
            names = [([pair.other, *others])[h] for h in dict.fromkeys(home.tolist())]
            answer = f"{int(moved.sum())} of {len(at)} that were looked at are {what} of {', '.join(names)}"
            return Proof(
                "layout", f"Are {what} in another order?", f"{answer}, elsewhere", f"put the {what} back", False
            )
    return None


def _nearest(rows: F32, matrix: F32) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Find the row of a matrix that is most like each of some rows: index and cosine."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    cosine = unit @ matrix.T / np.maximum(np.linalg.norm(matrix, axis=1), 1e-30)
    cosine = np.where(np.isfinite(cosine), cosine, -1)
    best = cosine.argmax(axis=1)
    return best, cosine[np.arange(len(rows)), best]


def _stale(pair: Pair) -> Proof | None:
    """Look for the tensor's bytes at another place of its own file."""
    info, data = pair.subject.tensors[pair.name], pair.subject.raw(pair.name).data
    middle = data.size // 2
    probe = data[middle : middle + 64].tobytes()
    if data.size < 8192 or len(set(probe)) < 16:
        return None
    with info.file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        at = whole.find(probe)
        if at == info.offset + middle:
            at = whole.find(probe, at + 1)
        if at < 0:
            return None
        start = at - middle
        skip = max(0, -start)
        other = np.frombuffer(whole[start + skip : start + data.size], np.uint8)
    same = int((other == data[skip : skip + other.size]).sum())
    if same < data.size / 2:
        return None
    answer = f"{same} of its {data.size} bytes stand at byte {start + skip} of the file as well"
    return Proof("missing-data", "Was it ever written?", answer, f"take {pair.name} from the source", True)


def _shape(pair: Pair) -> Proof | None:
    """Undo reversed, flattened, short and empty shapes."""
    found, given = pair.found, pair.given
    if pair.same_shape:
        return None
    question = "Is it the shape?"
    said = f"shape {list(found.shape)}, the reference has {list(given.shape)}"
    if found.size == given.size:
        for how, values in (("transposed", found.T), ("read under the reference's shape", found.reshape(given.shape))):
            if pair.repairs(np.ascontiguousarray(values)):
                return Proof("layout", question, f"{said}; {how}: {pair.answers(values)}", f"store it {how}", True)
    shared = tuple(slice(0, min(a, b)) for a, b in zip(found.shape, given.shape, strict=False))
    if found.ndim == given.ndim and found.size > 1 and np.array_equal(found[shared], given[shared]):
        return Proof("layout", question, f"{said}; what both have is equal", "store every row", True)
    return Proof("layout", question, said)


def _transposed(pair: Pair) -> Proof | None:
    """Undo a transposition of the bytes under the same shape."""
    if pair.found.ndim != 2 or min(pair.found.shape) < 2:
        return None
    values = np.ascontiguousarray(pair.found.reshape(pair.found.shape[::-1]).T)
    if not pair.repairs(values):
        return None
    return Proof("layout", "Is it transposed?", pair.answers(values), "transpose its bytes", True)


def _heads(pair: Pair) -> Proof | None:
    """Undo the orders of heads and of the halves of a head that other RoPEs and other groupings ask for."""
    width, rows = pair.head_dim, len(pair.found) if pair.found.ndim else 0
    role = role_of(pair.name)
    if role is None or role.name[:2] not in ("q_", "k_", "v_") or width < 2 or rows % width or pair.found.ndim < 1:
        return None
    heads = pair.found.reshape(rows // width, width, -1)
    n = len(heads)
    pairs = heads.reshape(n, width // 2, 2, -1)
    tries = {
        "halves put back from pairs": pairs.swapaxes(1, 2),
        "pairs put back from halves": heads.reshape(n, 2, width // 2, -1).swapaxes(1, 2),
        "heads in reverse": heads[::-1],
        "heads regrouped": np.concatenate([heads[: (n + 1) // 2], heads[(n + 1) // 2 :]], axis=1).reshape(heads.shape),
    }
    for how, values in tries.items():
        values = np.ascontiguousarray(values).reshape(pair.found.shape)
        if pair.repairs(values):
            return Proof(
                "layout", "Are the rows of a head in another order?", f"{how}: {pair.answers(values)}", how, True
            )
    return None


def _unpacked(pair: Pair) -> Proof | None:
    """Look for the same values in another order within each block of 32."""
    if not pair.same_shape or pair.found.size % BLOCK or pair.found.size < 8 * BLOCK:
        return None
    f, g = (x.reshape(-1, BLOCK).astype(np.float64) for x in (pair.found, pair.given))
    bad = pair.wrong.reshape(-1, BLOCK).any(axis=1)
    f, g = f[bad], g[bad]
    scale = np.abs(g).max(axis=1) + 1e-30
    moved = np.abs(f - g).max(axis=1) > 0.2 * scale
    same = np.abs(np.sort(f, axis=1) - np.sort(g, axis=1)).max(axis=1) <= 0.02 * scale
    if len(f) < 8 or (moved & same).mean() < 0.98:
        return None
    answer = f"in {int(same.sum())} of {len(f)} blocks of 32 the same values in another order"
    return Proof("codec", "Does the damage follow blocks?", answer, "unpack the codes in their order")


def _permuted(pair: Pair) -> Proof | None:
    """Match rows, then columns, with the reference's: the same ones in another order."""
    if pair.blocked or not pair.same_shape or not pair.found.ndim:
        return None
    for what, found, given in (("rows", pair.found, pair.given), ("columns", pair.found.T, pair.given.T)):
        found, given = (np.ascontiguousarray(x).reshape(len(x), -1) for x in (found, given))
        left, right = ([row.tobytes() for row in x] for x in (found, given))
        moved = sum(a != b for a, b in zip(left, right, strict=True))
        if moved and len(set(left)) > 2 and sorted(left) == sorted(right):
            answer = f"{moved} of {len(left)} {what} stand elsewhere, each is there once"
            return Proof("layout", "Are rows or columns in another order?", answer, f"put the {what} back", True)
    return None


def _nonfinite(pair: Pair) -> Proof | None:
    """Look at numbers that are none."""
    bad = ~np.isfinite(pair.found) & np.isfinite(pair.given)
    count = int(bad.sum())
    if not count:
        return None
    question = "Is every value a number?"
    infinite = int(np.isinf(pair.found).sum())
    answer = f"{count} of {pair.found.size} are not, {infinite} of them infinite"
    if pair.blocked:
        blocks = int(bad.reshape(-1, BLOCK).any(axis=1).sum())
        return Proof("codec", question, f"{answer}, in {blocks} whole blocks: a scale", "encode it again")
    if pair.dtype.name == "F16" and infinite == count:
        return Proof("numerics", question, f"{answer}: more than the 65504 that F16 holds", "store it in BF16 or F32")
    return Proof("tensor-values", question, answer, "take it from the source")


def _zeros(pair: Pair) -> Proof | None:
    """Look for values that are gone: zeros and rows of nothing."""
    found, given, wrong = pair.found, pair.given, pair.wrong
    count = int(wrong.sum())
    gone = wrong & (np.abs(found) < load_gates().zero_below)
    if found.ndim == 2 and not pair.blocked:
        gone |= wrong & (np.linalg.norm(found.astype(np.float64), axis=1) < load_gates().dead_row_l2)[:, None]
    exactly = int((found[gone] == 0).sum())
    if not count or gone.sum() < 0.98 * count or (gone.all() and 2 * exactly < count):
        return None
    question = "Are the values there at all?"
    answer = f"{int(gone.sum())} of {count} wrong values are zero, of {found.size}"
    kept = np.abs(given[~wrong & (given != 0)])
    lost = np.abs(given[gone])
    if kept.size and count > 1 and float(lost.max()) <= float(kept.min()) and count > found.size // 1000:
        return Proof(
            "numerics", question, f"{answer}: exactly those below {float(lost.max()):.3g}", "do not flush them"
        )
    if pair.blocked and not (found == 0).all():
        return Proof("codec", question, f"{answer}, in the blocks of {pair.dtype}", "encode it again")
    return Proof("missing-data", question, answer, "take them from the source")


def _constant(pair: Pair) -> Proof | None:
    """Look for one value throughout."""
    flat = pair.found.reshape(-1)
    if flat.size < 8 or not (flat == flat[0]).all() or (pair.given == pair.given.reshape(-1)[0]).all():
        return None
    return Proof(
        "tensor-values", "Does it vary?", f"no: {float(flat[0]):.3g} {flat.size} times", "take it from the source"
    )


def _exponent(pair: Pair) -> Proof | None:
    """Compare sign and mantissa with those of the same value in F16: a decoder that makes the exponent wrong."""
    with np.errstate(all="ignore"):
        half = pair.given.astype(np.float16)
    bits, codes = pair.found.view(np.uint32), half.view(np.uint16)
    same = ((bits >> 13 & 0x3FF) == (codes & 0x3FF)) & ((bits >> 31) == (codes >> 15))
    exponents = (bits >> 23 & 255).astype(np.int64) - (pair.given.view(np.uint32) >> 23 & 255).astype(np.int64)
    if (
        pair.blocked
        or same.mean() < ALL
        or (exponents == exponents.reshape(-1)[0]).all()
        or not pair.wrong.mean() > 0.5
    ):
        return None
    answer = f"sign and mantissa are those of F16, the exponents are {exponents.min()} to {exponents.max()} off"
    return Proof("codec", "Is it a decoder of F16?", answer, "decode F16 with exponent + 112, subnormals apart", True)


def _simple(pair: Pair) -> Proof | None:
    """Fit what arithmetic on the way does: a factor, an offset, a lost sign, a limit, a cut mantissa."""
    found, given = pair.found.astype(np.float64), pair.given.astype(np.float64)
    if not np.isfinite(found).all():
        return None
    question = "Is it simple arithmetic?"

    def fits(made: NDArray[np.float64]) -> bool:
        return bool((np.abs(found - made) <= np.maximum(np.abs(found), np.abs(made)) * 2.0**-8).mean() >= ALL)

    if np.array_equal(found, np.abs(given)) and (given < 0).any():
        return Proof("numerics", question, "each value without its sign", "keep the sign bit", True)
    low, high = found.min(), found.max()
    if np.array_equal(found, np.clip(given, low, high)) and pair.wrong.sum() > 1:
        return Proof("numerics", question, f"each value held between {low:.4g} and {high:.4g}", "do not clip", True)
    cut = _cut_mantissa(pair)
    if cut:
        return Proof("numerics", question, cut, "round to the type's own mantissa", True)
    factor = float((found * given).sum() / max(float((given * given).sum()), 1e-300))
    if pair.wrong.mean() > 0.5 and not pair.blocked and fits(factor * given):
        answer = f"each value times {factor:.6g}"
        narrowed = pair.dtype.name == "F16" and pair.source.name != "F16" and abs(factor - 1) < 0.01
        repair = f"divide by {factor:.6g}"
        return Proof("numerics" if narrowed else "tensor-values", question, answer, repair, True)
    offset = float(np.median(found - given))
    if pair.wrong.mean() > 0.5 and not pair.blocked and fits(given + offset):
        return Proof("tensor-values", question, f"{offset:.6g} added to each value", f"subtract {offset:.6g}", True)
    return None


def _cut_mantissa(pair: Pair) -> str:
    """Say how many bits of mantissa are left, where fewer than the type has; empty otherwise."""
    if pair.blocked or pair.wrong.mean() < 0.5:
        return ""
    bits, exponent = pair.found.view(np.uint32), np.frexp(pair.given)[1]
    off = np.abs(pair.found.astype(np.float64) - pair.given)
    for kept in range(1, 7):
        short = (bits & np.uint32((1 << (23 - kept)) - 1)) == 0
        if short.all() and (off <= np.ldexp(1.0, exponent - 1 - kept)).all():
            grown = (np.abs(pair.found) > np.abs(pair.given)).any()
            return f"each value {'rounded' if grown else 'cut'} to {kept} bits of mantissa"
    return ""


def _blocks(pair: Pair) -> Proof | None:
    """Fit what decoders of blocks do wrong: scales and minima of other blocks, codes without a sign."""
    if not pair.same_shape or pair.found.size % BLOCK or pair.found.size < 4 * BLOCK:
        return None
    found, given = (x.reshape(-1, BLOCK).astype(np.float64) for x in (pair.found, pair.given))
    bad = pair.wrong.reshape(-1, BLOCK).any(axis=1) & np.isfinite(found).all(axis=1)
    if bad.sum() < 2:
        return None
    f, g = found[bad], given[bad]
    question = "Does the damage follow blocks of 32?"
    scale = np.abs(g).max(axis=1, keepdims=True) + 1e-30
    mean_f, mean_g = f.mean(axis=1, keepdims=True), g.mean(axis=1, keepdims=True)
    spread = ((g - mean_g) ** 2).sum(axis=1)
    slope = ((f - mean_f) * (g - mean_g)).sum(axis=1) / np.maximum(spread, 1e-300)
    shift = mean_f[:, 0] - slope * mean_g[:, 0]
    left = np.abs(f - slope[:, None] * g - shift[:, None]).max(axis=1)
    size = np.maximum(np.abs(f).max(axis=1), 1e-300)
    straight = (left <= 0.03 * size) & (spread > 0) & (np.ptp(f, axis=1) > 0)
    moved = np.abs(f - g).max(axis=1) / scale[:, 0]
    typical = float(np.median(np.abs(slope)))
    varied = max(float(np.ptp(slope)) / max(typical, 1e-300), float(np.abs(shift / scale[:, 0]).max()))
    if straight.mean() > 0.95 and varied > 0.05 and float(np.median(moved)) > 0.05 and _more_than_noise(left, f, g):
        answer = (
            f"{int(straight.sum())} of {len(f)} blocks are their originals times {slope.min():.3g} to "
            f"{slope.max():.3g} plus {shift.min():.3g} to {shift.max():.3g}"
        )
        return Proof("codec", question, answer, "decode each block with its own scale and minimum")
    jump = f - g
    step = np.abs(jump).max(axis=1, keepdims=True)
    stays = np.abs(jump) <= 0.02 * step
    wrapped = (stays | (np.abs(np.abs(jump) - step) <= 0.02 * step)).all(axis=1) & stays.any(axis=1)
    if wrapped.mean() > 0.95 and float(np.median(step / scale)) > 1:
        return Proof(
            "codec", question, f"in {int(wrapped.sum())} blocks codes are off by one whole range", "read codes signed"
        )
    return None


def _more_than_noise(left: NDArray[np.float64], f: NDArray[np.float64], g: NDArray[np.float64]) -> bool:
    """Tell a block that is straight from one that is merely close to what it should be."""
    return bool(np.median(left / (np.abs(f - g).max(axis=1) + 1e-300)) < 0.5)


def grid_bits(values: F32, tolerance: float) -> int | None:
    """
    Find the fewest bits, 2 to 8, whose steps explain every value of nearly all runs of 32; None when 8 do not.

    Args:
        values: Any shape; runs are taken in storage order.
        tolerance: Of a value, in units of the run's largest magnitude.
    """
    flat = values.reshape(-1)
    blocks = flat[: flat.size // BLOCK * BLOCK].reshape(-1, BLOCK).astype(np.float64)
    blocks = blocks[np.isfinite(blocks).all(axis=1) & (np.ptp(blocks, axis=1) > 0)][:4096]
    if len(blocks) < 2:
        return None
    low = blocks.min(axis=1, keepdims=True)
    top = np.abs(blocks).max(axis=1, keepdims=True)
    for bits in range(2, 9):
        for base, span, steps in (
            (0 * low, top, 2 ** (bits - 1) - 1),
            (low, blocks.max(1, keepdims=True) - low, 2**bits - 1),
        ):
            step = span / steps
            off = np.abs((blocks - base) / step - np.round((blocks - base) / step)) * step
            allowed = tolerance * (np.abs(blocks) + top / 64)
            clear = allowed < 0.2 * step  # a tolerance near the step would take anything for a grid
            if clear.mean() > 0.3 and (off <= allowed)[clear].mean() > 0.97:
                return bits
    return 5 if _own_grids(blocks, top, tolerance) else None


def _own_grids(blocks: NDArray[np.float64], top: NDArray[np.float64], tolerance: float) -> bool:
    """Whether each run has a grid through zero of its own, of at most 16 steps: codes that do not reach their limit."""
    on_one = np.zeros(len(blocks), bool)
    for steps in range(3, 17):
        step = top / steps
        off = np.abs(blocks / step - np.round(blocks / step)) * step
        allowed = tolerance * (np.abs(blocks) + top / 64)
        on_one |= ((off <= allowed) & (allowed < 0.2 * step)).all(axis=1)
    return bool(on_one.mean() > 0.5)


def _grid(pair: Pair) -> Proof | None:
    """Look for values on a coarse grid that the type did not ask for."""
    if not pair.same_shape or _far(pair) > 0.7 or pair.wrong.mean() < 0.3:
        return None
    tolerance = {"F32": 2.0**-20, "F16": 2.0**-10, "BF16": 2.0**-8, "Q8_0": 1 / 250}.get(pair.dtype.name)
    if tolerance is None:
        return None
    bits = grid_bits(pair.found, tolerance)
    before = grid_bits(pair.given, tolerance)
    if bits is None or (before is not None and before <= bits):
        return None
    answer = f"runs of 32 lie on grids of {bits} bits, those of the reference do not; stored as {pair.dtype}"
    if pair.dtype.name == "F32" and pair.source.name in ("BF16", "F16") and pair.found.ndim > 1:
        return Proof(
            "converter", "Was it rounded before?", f"{answer}, widened from {pair.source}", "widen without rounding"
        )
    return Proof("codec", "Was it quantised before?", answer, "make it from the source again")


def _type_change(pair: Pair) -> Proof | None:
    """Blame the conversion where types differ and the values almost agree."""
    like = _like(pair)
    if pair.dtype.name == "F32" and pair.source.name in ("BF16", "F16") and like > 0.99:
        answer = f"{pair.source} to F32 changes no value; {int(pair.wrong.sum())} of {pair.found.size} are others"
        return Proof("converter", "Was it widened?", answer, "copy the values without arithmetic")
    return None


def _encoded(pair: Pair) -> Proof | None:
    """Blame the encoder where a quantised tensor is further off than its type explains."""
    if not pair.blocked:
        return None
    answer = (
        f"{int(pair.wrong.sum())} of {pair.found.size} values are beyond what {pair.dtype} explains, "
        f"correlation {_like(pair):.4f}"
    )
    return Proof("codec", "Does the type explain the distance?", answer, "encode it again from the source")


def _numbers(pair: Pair) -> Proof | None:
    """Describe what no structure explains."""
    count = int(pair.wrong.sum())
    far = _far(pair)
    answer = f"{count} of {pair.found.size} values differ, correlation {_like(pair):.6f}, rel_l2 {far:.3g}"
    if count == 1:
        at = np.unravel_index(int(pair.wrong.argmax()), pair.found.shape)
        bits = int(pair.found[at].view(np.uint32)) ^ int(pair.given[at].view(np.uint32))
        answer = f"one value of {pair.found.size}, bits {bits:#010x}"
    return Proof(
        "tensor-values", "Is there a structure in the damage?", f"none found: {answer}", "take it from the source"
    )


EXPERIMENTS: tuple[Experiment, ...] = (
    _reread,
    _shape,
    _elsewhere,
    _transposed,
    _heads,
    _unpacked,
    _permuted,
    _late,
    _stale,
    _dealt,
    _nonfinite,
    _zeros,
    _constant,
    _exponent,
    _simple,
    _grid,
    _blocks,
    _type_change,
    _encoded,
    _numbers,
)


def examine(pair: Pair) -> Proof:
    """Try the experiments in order and return what the first that succeeds has found."""
    with np.errstate(all="ignore"):
        return next(proof for experiment in EXPERIMENTS if (proof := experiment(pair)) is not None)

"""
What one pass over stored bytes computes, in plain numpy: the portable path, and the reference of the fast one.

The order of every sum is part of the definition, so that both paths give the same bits on any number of threads: which
one ran can never decide whether a model is admitted. Elements are taken in runs of 4096, a run in steps of 32 lanes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Wide = NDArray[np.float64]
Lanes = NDArray[np.uint64]

# Types that are scanned as they are stored; everything else is decoded to F32 first.
F32, F16, BF16 = 0, 1, 2
KINDS = {"F32": F32, "F16": F16, "BF16": BF16}
SIZES = (4, 2, 2)

LANES = 32
RUN = 128 * LANES  # elements that are summed lane by lane before the lanes are summed in float64
SMALLEST_SQUARES = 2.0**-80  # below this, squares of a run in float32 may have lost bits to underflow
_BLOCK = 1 << 16  # elements at a time: 256 kB of float32 and two temporaries stay in the second-level cache

# Fields of a record.
ZEROS, NANS, INFS, LOW, HIGH, SUM, SQUARES, DEAD, SPOT = range(9)

STRIPE = 64  # bytes that the eight lanes of the digest take in one step
# The fraction of pi, as Blowfish has it: keys that nobody chose.
LANE_KEYS: Lanes = np.array(
    [
        0x243F6A8885A308D3,
        0x13198A2E03707344,
        0xA4093822299F31D0,
        0x082EFA98EC4E6C89,
        0x452821E638D01377,
        0xBE5466CF34E90C6C,
        0xC0AC29B7C97C50DD,
        0x3F84D5B5B5470917,
    ],
    np.uint64,
)
KEY_STEP = 0x9E3779B97F4A7C15  # 2 ** 64 over the golden ratio: the keys of one lane repeat after 2 ** 64 stripes
_MASK = (1 << 64) - 1
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)
_NEIGHBOUR = np.arange(8) ^ 1
_STEP = 1 << 11  # stripes at a time: 128 kB and two temporaries of that size stay in the second-level cache


def digest_lanes(data: Bytes, stripe: int = 0) -> Lanes:
    """
    Sum the eight lanes of the digest over a piece of a tensor.

    Lane l adds, modulo 2 ** 64 and for every 64-bit word w of its stripe, the product of the two halves of w xor a key
    that depends on lane and stripe, and the word of its neighbour as it is. A changed word therefore always changes a
    lane; that several changes cancel has a chance of about 2 ** -32 for two of one bit in one lane, and far less for
    anything larger. Sums commute: pieces may be added in any order. Against accident, not malice.

    Args:
        data: uint8 [n]; the last stripe counts as filled with zeros.
        stripe: Number of the first stripe within the tensor; a piece begins at a whole stripe.

    Returns:
        uint64 [8], to be added to those of the other pieces.

    Source: the accumulation step of XXH3 (BSD licence, Y. Collet), with keys that are computed and not a table.
    """
    lanes: Lanes = np.zeros(8, np.uint64)
    whole = data.size // STRIPE * STRIPE
    for start in range(0, whole, _STEP * STRIPE):
        stop = min(start + _STEP * STRIPE, whole)
        lanes += _stripes(np.ascontiguousarray(data[start:stop]), stripe + start // STRIPE)
    if whole < data.size:
        rest = np.zeros(STRIPE, np.uint8)
        rest[: data.size - whole] = data[whole:]
        lanes += _stripes(rest, stripe + whole // STRIPE)
    return lanes


def _stripes(data: Bytes, first: int) -> Lanes:
    """Sum whole stripes."""
    words = data.view("<u8").reshape(-1, 8)
    steps = np.arange(words.shape[0], dtype=np.uint64) * np.uint64(KEY_STEP)
    steps += np.uint64(first * KEY_STEP & _MASK)
    mixed = steps[:, None] + LANE_KEYS
    mixed ^= words
    halves = mixed >> _HIGH
    mixed &= _LOW
    mixed *= halves
    lanes: Lanes = mixed.sum(axis=0, dtype=np.uint64) + words.sum(axis=0, dtype=np.uint64)[_NEIGHBOUR]
    return lanes


def fold_lanes(lanes: Lanes, nbytes: int) -> str:
    """Fold the eight lanes and the length of the tensor into 32 hexadecimal digits (BLAKE2b of 128 bits)."""
    return blake2b(lanes.astype("<u8").tobytes() + nbytes.to_bytes(8, "little"), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Limits:
    """
    What is counted.

    Attributes:
        zero_below: Magnitude below which a value counts as zero, a float32.
        dead_below: Norm below which a row is dead.
    """

    zero_below: float
    dead_below: float


class Part(NamedTuple):
    """
    A piece of a tensor for one pass.

    Attributes:
        kind: `F32`, `F16` or `BF16`.
        data: uint8, the elements: rows x columns of that kind, at any address.
        rows: Rows of which the norms are wanted; 1 where they are not, and everything in one row.
        columns: Elements per row.
        first_row: Number of the first row in the tensor.
        spots: Row numbers in the tensor whose norms are kept.
        stored: uint8, the stored bytes whose digest this part takes; empty when another part does.
        stripe: Number of their first stripe.
    """

    kind: int
    data: Bytes
    rows: int
    columns: int
    first_row: int = 0
    spots: tuple[int, ...] = ()
    stored: Bytes = np.zeros(0, np.uint8)
    stripe: int = 0


Scanned = tuple[Wide, Lanes]
# Stored bytes from which the compiled path pays for itself: see `scanner`.
COMPILED_FROM = 192 << 20


def scanner(nbytes: int) -> Callable[[Sequence[Part], Limits], list[Scanned]]:
    """
    Return what scans many parts: compiled where that pays and numba is there, else numpy. Both give the same bits.

    Args:
        nbytes: Stored bytes that will be scanned in all.

    Cost: import of numba and load from its cache take 0.45 s of one core, what numpy needs for 100 MB on one core;
        compiling, once per installation, takes 2.5 s. Once loaded it is used for everything.
    """
    name = "apr_core.kernels.cpu.scan"
    if nbytes < COMPILED_FROM and name not in sys.modules:
        return scan_many
    try:
        compiled = importlib.import_module(name)
    except ImportError:  # no numba: slower, and the same numbers
        return scan_many
    compiled.prepare()
    found: Callable[[Sequence[Part], Limits], list[Scanned]] = compiled.scan_many
    return found


def scan_many(parts: Sequence[Part], limits: Limits) -> list[Scanned]:
    """Measure parts one after the other."""
    return [scan(part, limits) for part in parts]


def scan(part: Part, limits: Limits) -> Scanned:
    """
    Measure a part.

    Returns:
        float64 [8 + spots]: zeros, NaN, infinities, smallest and largest finite value (plus and minus infinity when
        there is none), sum and sum of squares of the finite values, rows that are not at or above ``dead_below``, and
        the norms of the spot rows (NaN for a row that is elsewhere, or has a NaN in it); and the lanes of the digest.

    Exactness: counts and extremes are exact. A sum of F32 is rounded as float64 is. For F16 and BF16 a lane adds at
        most 128 values in float32, so that a sum is off by at most 2 ** -17 of the sum of magnitudes, and far less in
        practice; runs that squares in float32, or the difference of two sums, would spoil are added in float64.
    """
    record = np.zeros(SPOT + len(part.spots))
    record[LOW], record[HIGH], record[SPOT:] = inf, -inf, np.nan
    size = SIZES[part.kind]
    table = part.data.reshape(part.rows, part.columns * size)
    step = max(1, _BLOCK // max(1, part.columns))
    # overflow and invalid operations are what is being looked for here, not a surprise
    with np.errstate(all="ignore"):
        for start in range(0, part.rows if part.columns else 0, step):
            rows = table[start : start + step]
            _add_rows(record, rows, part.kind, limits.zero_below)
            norms = _add_sums(record, rows, part.kind)
            record[DEAD] += np.count_nonzero(~(norms >= limits.dead_below))
            for place, spot in enumerate(part.spots):
                at = spot - part.first_row - start
                if 0 <= at < norms.size:
                    record[SPOT + place] = norms[at]
    return record, digest_lanes(part.stored, part.stripe)


def values_of(kind: int, data: Bytes) -> Floats:
    """Read stored elements as float32, 1-D."""
    data = np.ascontiguousarray(data).reshape(-1)
    if kind == F32:
        return data.view("<f4")
    if kind == F16:
        return data.view("<f2").astype(np.float32)
    bits = data.view("<u2").astype(np.uint32)
    bits <<= np.uint32(16)
    return bits.view(np.float32)


def zero_codes(kind: int, zero_below: float) -> int:
    """Count the bit patterns of a positive sign whose value is below ``zero_below``: they are the lowest ones."""
    if kind == F32:
        return int(np.float32(zero_below).view(np.uint32))
    patterns = np.arange(0x8000, dtype=np.uint16).view(np.uint8)
    return int(np.count_nonzero(values_of(kind, patterns) < np.float32(zero_below)))


def _add_rows(record: Wide, rows: Bytes, kind: int, zero_below: float) -> None:
    """Count, and find the extremes, in pieces that stay in the cache."""
    flat = rows.reshape(-1)
    for start in range(0, flat.size, _BLOCK * SIZES[kind]):
        values = values_of(kind, flat[start : start + _BLOCK * SIZES[kind]])
        record[ZEROS] += np.count_nonzero(np.abs(values) < np.float32(zero_below))
        low, high = float(values.min()), float(values.max())
        if not -inf < low <= high < inf:
            record[NANS] += np.count_nonzero(np.isnan(values))
            record[INFS] += np.count_nonzero(np.isinf(values))
            values = values[np.isfinite(values)]
            low, high = float(values.min(initial=inf)), float(values.max(initial=-inf))
        # + 0.0: of two zeros of different sign, numpy may find either the smaller
        record[LOW], record[HIGH] = min(record[LOW], low) + 0.0, max(record[HIGH], high) + 0.0


def _add_sums(record: Wide, rows: Bytes, kind: int) -> Wide:
    """Add sum and squares of some rows, row by row and run by run; return the norm of each row."""
    size, count = SIZES[kind], rows.shape[0]
    found: list[tuple[Wide, Wide, Wide]] = []
    for start, stop, each in _runs(rows.shape[1] // size):
        values = values_of(kind, rows[:, start * size : stop * size]).reshape(-1, each)
        found.append(tuple(part.reshape(count, -1) for part in _run(values, kind)))  # type: ignore[arg-type]
    total, by_run, broken = (np.concatenate(part, axis=1) for part in zip(*found, strict=True))
    by_row = np.add.accumulate(by_run, axis=1)[:, -1]
    record[SUM] = np.add.accumulate(np.concatenate([[record[SUM]], total.reshape(-1)]))[-1]
    record[SQUARES] = np.add.accumulate(np.concatenate([[record[SQUARES]], by_row]))[-1]
    # the sum of what is not finite is NaN or infinite, and so is the norm of its row
    norms: Wide = np.sqrt(by_row + broken.sum(axis=1))
    return norms


def _runs(columns: int) -> Iterator[tuple[int, int, int]]:
    """Cut a row: whole runs, some at a time, then the whole steps that are left, then the rest (start, stop, each)."""
    whole, steps = columns // RUN * RUN, columns // LANES * LANES
    for start in range(0, whole, _BLOCK):
        yield start, min(start + _BLOCK, whole), RUN
    if whole < steps:
        yield whole, steps, steps - whole
    if steps < columns:
        yield steps, columns, columns - steps


def _run(values: Floats, kind: int) -> tuple[Wide, Wide, Wide]:
    """Return sum and squares of one run of each row, and what in it is not finite: 0, infinite or NaN."""
    rows, count = values.shape
    broken = np.zeros(rows)
    if kind == F32 or count < LANES:
        return *_wide_run(values), _broken(values)
    lanes = values.reshape(rows, -1, LANES)
    sums, squares = _tree(np.add.reduce(lanes, axis=1)), _tree(np.add.reduce(lanes * lanes, axis=1))
    kept = (squares >= SMALLEST_SQUARES) & (squares < inf) & (squares - sums * sums / count >= 0.5 * squares)
    if not kept.all():
        again = values[~kept]
        sums[~kept], squares[~kept] = _wide_run(again)
        broken[~kept] = _broken(again)
    return sums, squares, broken


def _wide_run(values: Floats) -> tuple[Wide, Wide]:
    """Add the finite values in float64."""
    rows, count = values.shape
    padded = np.zeros((rows, -(-count // LANES) * LANES))
    padded[:, :count] = np.where(np.isfinite(values), values, np.float32(0))
    lanes = padded.reshape(rows, -1, LANES)
    return _tree(np.add.reduce(lanes, axis=1)), _tree(np.add.reduce(lanes * lanes, axis=1))


def _broken(values: Floats) -> Wide:
    bad: Wide = np.where(np.isfinite(values), np.float32(0), np.abs(values)).sum(axis=1, dtype=np.float64)
    return bad


def _tree(lanes: NDArray[np.floating]) -> Wide:
    """Sum 32 lanes, [n, 32], in float64: the upper half on the lower, until one is left."""
    wide = lanes.astype(np.float64)
    width = LANES
    while width > 1:
        width //= 2
        wide = wide[:, :width] + wide[:, width : 2 * width]
    found: Wide = wide[:, 0]
    return found

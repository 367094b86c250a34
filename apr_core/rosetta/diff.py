"""
Does one file hold the other's tensors? Value by value, streamed, with the codec's own error bound as the only slack.

A tensor that stands in one file alone counts with all its values: leaving it out is how a diff of 27 missing tensors
once passed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from apr_core.dtypes import QuantFormat
from apr_core.errors import Unavailable
from apr_core.formats.bounds import step_bound
from apr_core.formats.checkpoint import Checkpoint, TensorInfo
from apr_core.formats.codecs import round_to
from apr_core.rosetta.fingerprint import EMBEDDING, HEAD, Distance, Gauge, paired_chunks

WORST_ROWS = 40
_ROUNDED = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorRow:
    """
    One tensor of the comparison.

    Attributes:
        name: Canonical name.
        subject: Type in the subject, empty where it is missing.
        reference: Type in the reference, empty where it is missing.
        values: How many values it has.
        mismatched: How many of them say something else; all of them when the tensor or the shape is not there.
        max_abs: Largest difference to what was expected, over the finite ones.
        first: Index of the first mismatch, row-major, or None.
        expected: What should stand there, rounded to the subject's type.
        found: What stands there.
        problem: ``missing in the subject``, shapes that differ, ``not compared: ...``, or empty.
        compared: False where nothing could be compared.
        distance: How far the subject's values are from the reference's; None where the stored bytes are the same.
    """

    name: str
    subject: str
    reference: str
    values: int
    mismatched: int = 0
    max_abs: float = 0.0
    first: tuple[int, ...] | None = None
    expected: float | None = None
    found: float | None = None
    problem: str = ""
    compared: bool = True
    distance: Distance | None = None

    def sentence(self) -> str:
        """Say what is wrong with numbers, for a person who looks for the place."""
        if self.problem:
            return f"{self.name}: {self.problem}"
        where = ", ".join(map(str, self.first or ()))
        return (
            f"{self.name} ({self.reference} to {self.subject}): {self.mismatched} of {self.values} values, "
            f"the first at [{where}], expected {self.expected!r}, found {self.found!r}"
        )

    def as_row(self) -> dict[str, object]:
        """The row as an evidence record holds it."""
        return {
            "tensor": self.name,
            "subject": self.subject,
            "reference": self.reference,
            "values": self.values,
            "mismatched": self.mismatched,
            "max_abs": self.max_abs,
            "first": list(self.first) if self.first is not None else None,
            "expected": self.expected,
            "found": self.found,
            "problem": self.problem,
        }


@dataclass(frozen=True)
class TensorDiff:
    """
    The comparison of two files.

    Attributes:
        rows: One per tensor name of either side, worst first.
        tied: Heads that one side stores and the other ties to its embedding; they were compared with it.
    """

    rows: Sequence[TensorRow]
    tied: Sequence[str] = field(default=())

    @cached_property
    def mismatched(self) -> int:
        """Values that say something else, missing tensors counted whole."""
        return sum(row.mismatched for row in self.rows)

    @cached_property
    def expected(self) -> int:
        """Values that should have been compared."""
        return sum(row.values for row in self.rows)

    @cached_property
    def compared(self) -> int:
        """Values that were compared."""
        return sum(row.values for row in self.rows if row.compared)

    @property
    def missing(self) -> list[str]:
        """Tensors that stand on one side alone, with the side, and those that could not be compared."""
        return [f"{row.name} ({row.problem})" for row in self.rows if not row.compared]

    @property
    def pairs(self) -> dict[str, int]:
        """How many tensors went from which type to which: ``BF16 -> Q4_K``."""
        counts: dict[str, int] = {}
        for row in self.rows:
            if row.compared:
                pair = f"{row.reference} -> {row.subject}"
                counts[pair] = counts.get(pair, 0) + 1
        return counts

    def worst(self, count: int = WORST_ROWS) -> list[TensorRow]:
        """The rows that matter most."""
        return list(self.rows[:count])


def compare_tensors(subject: Checkpoint, reference: Checkpoint, *, exact: bool = False) -> TensorDiff:
    """
    Compare every tensor of two files by canonical name.

    A float type of the subject must hold the reference's values rounded to it, bit for bit. A quantised type must hold
    each value within the codec's own bound (`step_bound`). A tied head that only one side stores is compared with the
    other side's embedding. A type without a known bound is not compared, and named.

    Args:
        subject: The file that claims to hold the reference's tensors.
        reference: Where they come from.
        exact: Demand the same float32 bits whatever the types are, as for a copy that changed nothing.

    Cost: one pass over both files, a few megabytes decoded at a time (a whole tensor for AprQ4 and AprQ8).
    """
    rows: list[TensorRow] = []
    tied: list[str] = []
    for name in dict.fromkeys([*reference.tensors, *subject.tensors]):
        left, right = _partner(subject, name), _partner(reference, name)
        if left is None or right is None:
            side = "subject" if left is None else "reference"
            present = subject.tensors.get(name) or reference.tensors[name]
            count = prod(present.shape)
            types = ("", str(present.dtype)) if left is None else (str(present.dtype), "")
            rows.append(TensorRow(name, *types, count, count, problem=f"missing in the {side}", compared=False))
            continue
        if name not in subject.tensors or name not in reference.tensors:
            tied.append(name)
        rows.append(_compare(name, subject, left, reference, right, exact))
    rows.sort(key=lambda row: (not row.problem, -row.mismatched, -row.max_abs))
    return TensorDiff(tuple(rows), tuple(tied))


def unreadable(original: Checkpoint, why: str) -> TensorDiff:
    """Describe a copy that does not open: every tensor of the original differs whole."""
    rows = [
        TensorRow(t.name, "", str(t.dtype), count := prod(t.shape), count, problem=f"the copy does not open: {why}")
        for t in original.tensors.values()
    ]
    return TensorDiff(tuple(rows))


def typed_as(found: TensorDiff, types: Mapping[str, QuantFormat]) -> TensorDiff:
    """Count a tensor whole that is stored in another type than was asked: values that are equal hide a widening."""
    rows = [
        row
        if row.problem or row.name not in types or row.subject == str(types[row.name])
        else replace(row, mismatched=row.values, problem=f"stored as {row.subject}, asked {types[row.name]}")
        for row in found.rows
    ]
    rows.sort(key=lambda row: (not row.problem, -row.mismatched, -row.max_abs))
    return TensorDiff(tuple(rows), found.tied)


def _partner(checkpoint: Checkpoint, name: str) -> TensorInfo | None:
    """Find the tensor that plays a role: a head that is not stored is the embedding, which is what tying means."""
    info = checkpoint.tensors.get(name)
    return checkpoint.tensors.get(EMBEDDING) if info is None and name == HEAD else info


def _compare(
    name: str, subject: Checkpoint, left: TensorInfo, reference: Checkpoint, right: TensorInfo, exact: bool
) -> TensorRow:
    """Compare one pair chunk by chunk."""
    types, count = (str(left.dtype), str(right.dtype)), prod(right.shape)
    if left.shape != right.shape:
        problem = f"shape {list(left.shape)}, expected {list(right.shape)}"
        return TensorRow(name, *types, count, max(count, prod(left.shape)), problem=problem)
    if left.dtype is right.dtype and _same_bytes(subject, left, reference, right):
        return TensorRow(name, *types, count)
    mismatched, max_abs, start = 0, 0.0, 0
    first: tuple[int, float, float] | None = None
    gauge = Gauge()
    try:
        for found, given in paired_chunks(subject, left.name, reference, right.name):
            expected, wrong = _judge(found, given, left.dtype, exact)
            gauge.add(given, found, wrong)
            found = found.reshape(-1)
            with np.errstate(invalid="ignore"):
                distance = np.abs(found.astype(np.float64) - expected)
            max_abs = max(max_abs, float(distance[np.isfinite(distance)].max(initial=0.0)))
            if first is None and wrong.any():
                at = int(wrong.argmax())
                first = (start + at, float(expected[at]), float(found[at]))
            mismatched += int(wrong.sum())
            start += found.size
    except Unavailable as error:
        return TensorRow(name, *types, count, problem=f"not compared: {error.message}", compared=False)
    if first is None:
        return TensorRow(name, *types, count, 0, max_abs, distance=gauge.read())
    index = tuple(int(i) for i in np.unravel_index(first[0], left.shape))
    return TensorRow(name, *types, count, mismatched, max_abs, index, first[1], first[2], distance=gauge.read())


def _same_bytes(subject: Checkpoint, left: TensorInfo, reference: Checkpoint, right: TensorInfo) -> bool:
    """Compare stored bytes: equal ones of one type decode equally, so nothing need be decoded."""
    return bool(np.array_equal(subject.raw(left.name).data, reference.raw(right.name).data))


def _judge(
    found: NDArray[np.float32], given: NDArray[np.float32], dtype: QuantFormat, exact: bool
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """
    Say what was expected and where something else was found.

    Args:
        found: The subject's values, [rows, columns].
        given: The reference's.
        dtype: The subject's type.
        exact: As in `compare_tensors`.

    Returns:
        The expected values and a mask of mismatches, both flat.
    """
    if exact or dtype.name in _ROUNDED or not _has_blocks(dtype):
        expected = given if exact or dtype.name not in _ROUNDED else round_to(given, dtype)
        # Bits, not numbers: -0.0 is not 0.0, and a NaN that was carried along is the same NaN.
        wrong = np.ascontiguousarray(found).view(np.uint32) != np.ascontiguousarray(expected).view(np.uint32)
        return expected.reshape(-1), wrong.reshape(-1)
    bound = step_bound(given, dtype)
    with np.errstate(invalid="ignore"):
        within = np.abs(found.astype(np.float64) - given) <= bound  # NaN is not within
    return given.reshape(-1), ~within.reshape(-1)


def _has_blocks(dtype: QuantFormat) -> bool:
    """Tell types that quantise from plain numbers (F64 and integers), which must be equal."""
    return dtype.block_elements > 1 or dtype.layout == "tensor" or dtype.name.startswith("F8")

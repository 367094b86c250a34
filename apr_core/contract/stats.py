"""
What one pass over a tensor measures: pure numbers, no opinion (`gates.judge_tensor` has that).

A tensor is decoded in pieces that stay in the cache, so that a 988 MB file is read once from memory and a pass costs
little more than the reading. Measured on one core of an AMD EPYC: see `measure`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite, nan, prod, sqrt

import numpy as np
from numpy.typing import NDArray

from apr_core.contract.gates import load_gates
from apr_core.formats import codecs
from apr_core.formats.checkpoint import RawTensor
from apr_core.kernels.stats import digest_lanes, fold_lanes

Floats = NDArray[np.float32]

# 65536 float32 are 256 kB: with the stored bytes and one temporary they stay in a 1 MB second-level cache.
CHUNK = 1 << 16
_RUN = 1 << 12


@dataclass(frozen=True)
class TensorStats:
    """
    One tensor in numbers. Moments are taken over the finite values only, so that one NaN does not hide the rest.

    Attributes:
        name: Canonical name.
        count: Elements.
        zeros: Elements that are zero (`measure.zero_below` in gates.toml; for ternary types all elements of every
            block that holds nothing but zeros).
        nans: NaN values.
        infs: Values that are plus or minus infinity.
        minimum: Smallest finite value; NaN when there is none.
        maximum: Largest finite value; NaN when there is none.
        mean: Mean of the finite values; NaN when there is none.
        std: Sample deviation (n - 1) of the finite values; 0 for a single value.
        l2: Euclidean norm of the finite values.
        nonfinite_scales: Block scales that are NaN or infinite; 0 for types without scales.
        row_l2: Norm of each spot row by row number, when asked for.
        dead_rows: Rows whose norm is below `measure.dead_row_l2`, when spot rows were asked for.
        rows: Rows whose norm was measured; 0 when spot rows were not asked for.
        digest: 128-bit digest of the stored bytes, 32 hexadecimal digits (`kernels.stats.digest_lanes`).
    """

    name: str
    count: int
    zeros: int
    nans: int
    infs: int
    minimum: float
    maximum: float
    mean: float
    std: float
    l2: float
    nonfinite_scales: int = 0
    row_l2: tuple[tuple[int, float], ...] = ()
    dead_rows: int | None = None
    digest: str = ""
    rows: int = 0

    @property
    def dead_row_percent(self) -> float:
        """Share of dead rows in percent; NaN when no row was measured, which therefore fails its gate."""
        return 100.0 * self.dead_rows / self.rows if self.rows and self.dead_rows is not None else nan

    @property
    def zero_percent(self) -> float:
        """Share of zeros in percent; NaN for an empty tensor, which therefore fails its gate."""
        return 100.0 * self.zeros / self.count if self.count else nan

    @property
    def spread(self) -> float:
        """Largest minus smallest finite value."""
        return self.maximum - self.minimum

    @property
    def spot_l2(self) -> float:
        """Smallest norm among the spot rows; NaN when none was measured, which therefore fails its gate."""
        return min((norm for _, norm in self.row_l2), default=nan)


@dataclass
class _Running:
    """Sums that grow chunk by chunk; float64 between chunks, float32 within one."""

    zero_below: np.float32
    zero_block: int = 1
    count: int = 0
    zeros: int = 0
    nans: int = 0
    infs: int = 0
    finite: int = 0
    low: float = nan
    high: float = nan
    mean: float = 0.0
    squares: float = 0.0
    spread_squares: float = 0.0
    rows: list[NDArray[np.floating]] = field(default_factory=list)

    def add(self, values: Floats) -> None:
        """Take in one chunk, 1-D."""
        self.count += values.size
        self.zeros += self._count_zeros(values)
        low, high = float(values.min()), float(values.max())
        if not (isfinite(low) and isfinite(high)):
            self.nans += int(np.isnan(values).sum())
            self.infs += int(np.isinf(values).sum())
            values = values[np.isfinite(values)]
            if not values.size:
                return
            low, high = float(values.min()), float(values.max())
        # min and max of Python with a NaN depend on the order of the arguments: the first chunk is taken as it is
        self.low = low if self.finite == 0 else min(self.low, low)
        self.high = high if self.finite == 0 else max(self.high, high)
        self._add_moments(values)

    def add_rows(self, values: Floats) -> None:
        """Take in whole rows, [n, columns], and keep the norm of each."""
        squares = np.vecdot(values, values)
        if not np.isfinite(squares).all():
            # 1e30 squared is infinite in float32: without this a legal large row would have the norm of a broken one
            wide = values.astype(np.float64)
            squares = np.vecdot(wide, wide)
        self.rows.append(np.sqrt(squares))

    def _count_zeros(self, values: Floats) -> int:
        small = np.less(np.abs(values), self.zero_below)
        if self.zero_block > 1:
            return int(small.reshape(-1, self.zero_block).all(axis=1).sum()) * self.zero_block
        return int(np.count_nonzero(small))

    def _add_moments(self, values: Floats) -> None:
        """Merge mean and squared deviations with those of the chunks before (Chan, Golub and LeVeque 1983)."""
        n = values.size
        total, squares = float(np.add.reduce(values)), _squares(values)
        if not (isfinite(total) and 1e-20 < squares < np.inf):
            # float32 squares overflow above 1e19 and vanish below 1e-19
            wide = values.astype(np.float64)
            total, squares = float(wide.sum()), _squares(wide)
        mean = total / n
        deviation = squares - n * mean * mean
        if deviation < 0.5 * squares:
            # norms lie around 1.0: the difference of two large sums would leave only rounding of their deviation
            wide = values.astype(np.float64)
            mean = float(wide.mean())
            wide -= mean
            deviation = _squares(wide)
        step = mean - self.mean
        merged = self.finite + n
        self.spread_squares += deviation + step * step * self.finite * n / merged
        self.mean += step * n / merged
        self.squares += squares
        self.finite = merged

    def finish(self, name: str, nonfinite_scales: int, digest: str) -> TensorStats:
        """Turn the sums into statistics."""
        table = load_gates()
        norms = np.concatenate(self.rows) if self.rows else None
        spots: tuple[tuple[int, float], ...] = ()
        if norms is not None:
            spots = tuple((row, float(norms[row])) for row in (norms.size * p // 100 for p in table.spot_percent))
        return TensorStats(
            name=name,
            count=self.count,
            zeros=self.zeros,
            nans=self.nans,
            infs=self.infs,
            minimum=self.low,
            maximum=self.high,
            mean=self.mean if self.finite else nan,
            std=sqrt(self.spread_squares / (self.finite - 1)) if self.finite > 1 else 0.0,
            l2=sqrt(self.squares),
            nonfinite_scales=nonfinite_scales,
            row_l2=spots,
            # not written as norm < limit: a row with a NaN in it is not alive
            rows=0 if norms is None else norms.size,
            dead_rows=None if norms is None else int((~(norms >= table.dead_row_l2)).sum()),
            digest=digest,
        )


def _squares(values: NDArray[np.floating]) -> float:
    """
    Sum the squares of a 1-D array, the partial sums in float64.

    In runs of 4096: above 10000 elements OpenBLAS starts threads for a dot product, and two of them that wait for each
    other on a busy machine made a pass 50 times slower.
    """
    whole = values.size // _RUN * _RUN
    runs = values[:whole].reshape(-1, _RUN)
    rest = values[whole:]
    return float(np.vecdot(runs, runs).sum(dtype=np.float64)) + float(np.vecdot(rest, rest))


def measure(raw: RawTensor, *, spot_rows: bool = False) -> TensorStats:
    """
    Measure a stored tensor in one pass over its decoded values, and its block scales.

    Args:
        raw: The stored bytes.
        spot_rows: Also measure the norm of every row of a 2-D tensor (for vocabulary matrices).

    Raises:
        FormatError: When the bytes cannot be decoded.
        Unavailable: When nothing here decodes the type.

    Cost: measured on one core of an AMD EPYC, in million weights per second: BF16 and F32 800, F16 330, Q8_0 450, Q4_K
    290, Q6_K 250; types that the gguf package decodes about 50.
    """
    scales = codecs.scales(raw)
    bad_scales = 0 if scales is None else int(np.count_nonzero(~np.isfinite(scales)))
    dtype = raw.info.dtype
    zero_block = dtype.block_elements if dtype.name in load_gates().ternary else 1
    digest = digest_of(raw.data)
    return _run(raw.info.name, _chunks(raw), spot_rows and len(raw.info.shape) == 2, zero_block, bad_scales, digest)


def digest_of(data: NDArray[np.uint8]) -> str:
    """Return the digest of the stored bytes of a tensor, as `TensorStats.digest` has it."""
    return fold_lanes(digest_lanes(data), data.size)


def measure_values(name: str, values: Floats, *, spot_rows: bool = False) -> TensorStats:
    """Measure an array of float32 in memory, as `measure` does for stored bytes."""
    flat = np.ascontiguousarray(values, dtype=np.float32)
    columns = flat.shape[-1] if flat.ndim else 1
    table = flat.reshape(-1, columns) if flat.size else flat.reshape(0, max(columns, 1))
    digest = digest_of(table.reshape(-1).view(np.uint8))
    return _run(name, _pieces(table), spot_rows and values.ndim == 2, 1, 0, digest)


def _run(
    name: str, chunks: Iterator[Floats], spot_rows: bool, zero_block: int, bad_scales: int, digest: str
) -> TensorStats:
    running = _Running(np.float32(load_gates().zero_below), zero_block)
    # overflow and invalid operations are what is being looked for here, not a surprise
    with np.errstate(all="ignore"):
        for chunk in chunks:
            if spot_rows:
                running.add_rows(chunk)
            running.add(chunk.reshape(-1))
    return running.finish(name, bad_scales, digest)


def _chunks(raw: RawTensor) -> Iterator[Floats]:
    """Decode a tensor as whole rows, [n, columns], about CHUNK elements at a time."""
    shape = raw.info.shape
    if not prod(shape):
        return
    if len(shape) != 2 or raw.info.dtype.layout != "row":
        # vectors are small, and the whole-tensor layouts of APR have no rows to stream
        values = codecs.decode(raw)
        yield from _pieces(values.reshape(-1, shape[-1] if shape else 1))
        return
    rows, columns = shape
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        yield codecs.decode_rows(raw, start, min(start + step, rows))


def _pieces(values: Floats) -> Iterator[Floats]:
    """Cut [rows, columns] into whole rows, about CHUNK elements at a time."""
    step = max(1, CHUNK // values.shape[1])
    for start in range(0, values.shape[0], step):
        yield values[start : start + step]

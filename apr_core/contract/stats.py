"""
What one pass over a tensor measures: pure numbers, no opinion (`gates.judge_tensor` has that).

A tensor is cut into pieces, which any number of threads may take: what is summed in which order depends on the tensor
alone. F32, F16 and BF16 are scanned as they are stored; everything else is decoded a cache-sized piece at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from math import inf, nan, prod, sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from apr_core.contract.gates import load_gates
from apr_core.dtypes import FORMATS
from apr_core.errors import AprError, UsageError
from apr_core.formats import codecs
from apr_core.formats.checkpoint import RawTensor, TensorInfo
from apr_core.kernels import stats as kernel
from apr_core.kernels.codecs import decode_bytes, load_decoders
from apr_core.kernels.cpu.features import available_cores
from apr_core.kernels.stats import Limits, Part, Scanned

Floats = NDArray[np.float32]

PIECE = 1 << 22  # stored bytes of a plain type that a thread takes at a time: a third of a millisecond
CHUNK = 1 << 16  # elements decoded at a time: 256 kB of float32 stay in the second-level cache
_CHUNKS = 16  # of them in one piece
_BATCH = 1 << 23  # elements handed to a thread together


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


class _Cut(NamedTuple):  # there are hundreds: a tuple takes a fifth of the time of a frozen record
    """
    How one tensor is cut: into units that can be read by themselves (elements, blocks, or rows).

    Attributes:
        raw: The stored bytes.
        unit: Elements per unit.
        width: Stored bytes per unit.
        header: Bytes before the first unit that every unit needs.
        columns: Elements per row when row norms are wanted, else 0.
        spots: Rows whose norm is kept.
    """

    raw: RawTensor
    unit: int
    width: int
    header: int = 0
    columns: int = 0
    spots: tuple[int, ...] = ()

    @property
    def plain(self) -> bool:
        """Scanned as it is stored."""
        return self.raw.info.dtype.name in kernel.KINDS

    def pieces(self) -> Iterator[_Piece]:
        """Yield all of it, in order."""
        count = prod(self.raw.info.shape)
        units = -(-count // self.unit) if count else 0
        step = PIECE // self.width if self.plain else _CHUNKS * self.chunk
        for start in range(0, units, max(1, step)):
            yield _Piece(self, start, min(start + max(1, step), units))

    @property
    def chunk(self) -> int:
        """Units decoded at a time."""
        return max(1, CHUNK // self.unit)

    def part(self, start: int, stop: int, kind: int, values: NDArray[np.uint8]) -> Part:
        """Describe units ``start`` to ``stop``, whose elements are ``values``, for the scan."""
        count = values.size // kernel.SIZES[kind]
        rows, columns = (count // self.columns, self.columns) if self.columns else (1, count)
        # stripes of the digest belong to the piece in which they begin
        first, last = self._byte(start), self._byte(stop)
        first, last = (-(-at // kernel.STRIPE) * kernel.STRIPE for at in (first if start else 0, last))
        first_row = start * self.unit // self.columns if self.columns else 0
        stored = self.raw.data[first:last]
        return Part(kind, values, rows, columns, first_row, self.spots, stored, first // kernel.STRIPE)

    def stored(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return the bytes of units ``start`` to ``stop``, behind the header that they need."""
        found = self.raw.data[self._byte(start) : self._byte(stop)]
        return np.concatenate([self.raw.data[: self.header], found]) if self.header else found

    def decoded(self, start: int, stop: int) -> Floats:
        """Decode units ``start`` to ``stop``, 1-D."""
        dtype, count = self.raw.info.dtype, prod(self.raw.info.shape)
        by_rows = dtype.layout == "row" and self.width != dtype.block_bytes
        elements = min(stop * self.unit, count) - start * self.unit
        shape = (stop - start, self.unit) if by_rows else (elements,)
        return decode_bytes(dtype, self.stored(start, stop), shape).reshape(-1)

    def _byte(self, unit: int) -> int:
        return min(self.header + unit * self.width, self.raw.data.size)


class _Piece(NamedTuple):
    """Units ``start`` to ``stop`` of one tensor."""

    cut: _Cut
    start: int
    stop: int


# What the scan found in a chunk, broken block scales, and zeros where the type has its own way to count them.
_Found = tuple[Scanned, int, int | None]


def measure(raw: RawTensor, *, spot_rows: bool = False) -> TensorStats:
    """
    Measure a stored tensor in one pass over its decoded values, and its block scales.

    Args:
        raw: The stored bytes.
        spot_rows: Also measure the norm of every row of a 2-D tensor (for vocabulary matrices).

    Raises:
        FormatError: When the bytes cannot be decoded.
        UsageError: When there are more or fewer bytes than the shape demands.
        Unavailable: When nothing here decodes the type.
    """
    (found,) = measure_all([(raw, spot_rows)])
    if isinstance(found, AprError):
        raise found
    return found


def measure_values(name: str, values: Floats, *, spot_rows: bool = False) -> TensorStats:
    """Measure an array of float32 in memory, as `measure` does for stored bytes."""
    stored = np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.uint8)
    info = TensorInfo(name, FORMATS["F32"], values.shape, Path("memory"), 0, stored.size, name)
    return measure(RawTensor(info, stored), spot_rows=spot_rows)


def measure_all(
    tensors: Sequence[tuple[RawTensor, bool]], *, threads: int | None = None
) -> Generator[TensorStats | AprError]:
    """
    Measure tensors, each with whether its row norms are wanted, on all cores; what comes out depends on neither.

    Args:
        tensors: Stored bytes, and `measure`'s ``spot_rows``.
        threads: How many; as many as this process may use when not given.

    Yields:
        The statistics of each tensor in the given order, or the error that it met. A caller that stops, by an exception
        or Ctrl-C too, waits for no more than the pieces that are being scanned; close the iterator for that.

    Cost: `benchmarks/bench_gate.py` measures it. A thread holds one chunk of decoded values, whatever a header claims.
    """
    nbytes = sum(raw.data.size for raw, _ in tensors)
    threads = (threads or available_cores()) if sum(prod(raw.info.shape) for raw, _ in tensors) >= _BATCH else 1
    if nbytes >= kernel.COMPILED_FROM:
        load_decoders()
    plans = [_plan(raw, rows) for raw, rows in tensors]
    pieces = chain.from_iterable(plan for plan in plans if not isinstance(plan, AprError))
    table = load_gates()
    work = partial(_scan_batch, kernel.scanner(nbytes), Limits(table.zero_below, table.dead_row_l2))
    with closing(_in_order(work, _batches(pieces), threads)) as batches:
        results = chain.from_iterable(batches)
        for (raw, _), plan in zip(tensors, plans, strict=True):
            if isinstance(plan, AprError):
                yield plan
                continue
            found = list(islice(results, len(plan)))
            error = next((each for each in found if isinstance(each, AprError)), None)
            chunks = [chunk for each in found if not isinstance(each, AprError) for chunk in each]
            yield error or _merge(raw, plan, chunks)


def _plan(raw: RawTensor, spot_rows: bool) -> list[_Piece] | AprError:
    """Cut a tensor, or say why it cannot be."""
    info, dtype = raw.info, raw.info.dtype
    demanded = dtype.nbytes(info.shape)
    if raw.data.size != demanded:
        return UsageError(
            f"expected {demanded} bytes for {dtype} {list(info.shape)}, found {raw.data.size} "
            f"in {info.file}, tensor {info.name}",
            advice="pass the whole tensor",
        )
    columns = info.shape[-1] if info.shape else 1
    rows = spot_rows and len(info.shape) == 2 and prod(info.shape) > 0
    unit, width, header = dtype.block_elements, dtype.block_bytes, 0
    if dtype.layout == "tensor":
        unit, width, header = 1, 1, dtype.block_bytes
    if rows or columns % unit:
        # a row that ends within a block can be read only with the whole row; in one stream of blocks, only with all
        whole = columns % unit == 0 or dtype.layout == "row"
        unit, width = (columns, dtype.nbytes((columns,)) - header) if whole else (prod(info.shape), raw.data.size)
    spots = tuple(info.shape[0] * percent // 100 for percent in load_gates().spot_percent) if rows else ()
    return list(_Cut(raw, unit, width, header, columns if rows else 0, spots).pieces())


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Put pieces together until a thread has enough to do."""
    batch: list[_Piece] = []
    elements = 0
    for piece in pieces:
        batch.append(piece)
        elements += (piece.stop - piece.start) * piece.cut.unit
        if elements >= _BATCH:
            yield batch
            batch, elements = [], 0
    if batch:
        yield batch


_Batch = list[list[_Found] | AprError]


def _in_order(
    work: Callable[[list[_Piece]], _Batch], batches: Iterator[list[_Piece]], threads: int
) -> Generator[_Batch]:
    """Yield what each batch gives, in their order, with a few of them ahead."""
    if threads == 1:
        yield from map(work, batches)
        return
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[_Batch]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(work, batch))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _scan_batch(scan: Callable[[Sequence[Part], Limits], list[Scanned]], limits: Limits, batch: list[_Piece]) -> _Batch:
    """Scan pieces: the plain ones in one call, the others chunk by chunk as they are decoded."""
    plain = [piece for piece in batch if piece.cut.plain]
    scanned = iter(scan([_as_stored(piece) for piece in plain], limits))
    found: _Batch = []
    for piece in batch:
        try:
            found.append([(next(scanned), 0, None)] if piece.cut.plain else list(_decode_and_scan(scan, limits, piece)))
        except AprError as error:
            found.append(error)
    return found


def _as_stored(piece: _Piece) -> Part:
    cut = piece.cut
    kind = kernel.KINDS[cut.raw.info.dtype.name]
    return cut.part(piece.start, piece.stop, kind, cut.stored(piece.start, piece.stop))


def _decode_and_scan(
    scan: Callable[[Sequence[Part], Limits], list[Scanned]], limits: Limits, piece: _Piece
) -> Iterator[_Found]:
    cut = piece.cut
    info = cut.raw.info
    block = info.dtype.block_elements if info.dtype.name in load_gates().ternary else 0
    for start in range(piece.start, piece.stop, cut.chunk):
        stop = min(start + cut.chunk, piece.stop)
        values = cut.decoded(start, stop)
        scales = None
        if start == 0 or not cut.header:  # one header is one scale
            stored = cut.stored(start, stop)
            scales = codecs.scales(RawTensor(replace(info, nbytes=stored.size), stored))
        broken = 0 if scales is None else int(np.count_nonzero(~np.isfinite(scales)))
        (scanned,) = scan([cut.part(start, stop, kernel.F32, values.view(np.uint8))], limits)
        zeros = None
        if block and values.size % block == 0:
            small = (np.abs(values) < np.float32(limits.zero_below)).reshape(-1, block)
            zeros = block * int(np.count_nonzero(small.all(axis=1)))
        yield scanned, broken, zeros


def _merge(raw: RawTensor, plan: list[_Piece], found: list[_Found]) -> TensorStats:
    """Put together what was found in the pieces of one tensor, in their order."""
    info, count = raw.info, prod(raw.info.shape)
    spots = plan[0].cut.spots if plan else ()  # nothing is measured of an empty tensor
    zeros = nans = infs = dead = scales = 0
    low, high, total, squares = inf, -inf, 0.0, 0.0
    norms = [nan] * len(spots)
    lanes = np.zeros(8, np.uint64)
    for (record, digest), broken, counted in found:
        values = record.tolist()
        zeros += int(values[kernel.ZEROS]) if counted is None else counted
        nans, infs = nans + int(values[kernel.NANS]), infs + int(values[kernel.INFS])
        low, high = min(low, values[kernel.LOW]), max(high, values[kernel.HIGH])
        total, squares = total + values[kernel.SUM], squares + values[kernel.SQUARES]
        dead, scales = dead + int(values[kernel.DEAD]), scales + broken
        lanes += digest
        # a piece says NaN of the rows that it does not have
        norms = [now if norm != norm else norm for norm, now in zip(norms, values[kernel.SPOT :], strict=True)]
    finite = count - nans - infs
    spread = max(0.0, squares - total * total / finite) if finite else 0.0
    return TensorStats(
        name=info.name,
        count=count,
        zeros=zeros,
        nans=nans,
        infs=infs,
        minimum=low if finite else nan,
        maximum=high if finite else nan,
        mean=total / finite if finite else nan,
        std=sqrt(spread / (finite - 1)) if finite > 1 else 0.0,
        l2=sqrt(squares),
        nonfinite_scales=scales,
        row_l2=tuple(zip(spots, norms, strict=True)),
        dead_rows=dead if spots else None,
        rows=info.shape[0] if spots else 0,
        digest=kernel.fold_lanes(lanes, raw.data.size),
    )

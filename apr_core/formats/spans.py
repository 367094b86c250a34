"""Does a set of tensor spans cover a data section: overlaps, holes and tails, with exact byte counts."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

from apr_core.errors import FormatError
from apr_core.formats.checkpoint import Gap, TensorInfo

MAX_AXES = 64  # numpy's limit, and torch's
MAX_ELEMENTS = 1 << 59  # eight bytes each fill the address space


def find_gaps(tensors: Sequence[TensorInfo], *, file: Path, start: int, stop: int, alignment: int) -> tuple[Gap, ...]:
    """
    Return the bytes of ``start..stop`` that no tensor explains.

    Args:
        tensors: Any order; sorted here by offset.
        file: The file concerned.
        start: First byte of the data section.
        stop: One past its last byte.
        alignment: Up to this multiple, padding behind a tensor is explained.

    Raises:
        FormatError: Two tensors overlap, or one reaches beyond ``stop`` (the message says how many bytes are missing).
    """
    ordered = sorted(tensors, key=lambda info: (info.offset, info.offset + info.nbytes))
    require_extent(ordered, file=file, stop=stop)
    gaps = []
    position = reached = start
    for info in ordered:
        if info.offset < position:
            raise FormatError(
                expected=f"data that starts at byte {position} or later, behind the tensor before it",
                found=f"an overlap of {position - info.offset} bytes",
                file=file,
                tensor=info.stored_name,
                at=info.offset,
                advice="export the model again; one of the two tensors is not what it says",
            )
        if info.offset > reached:
            gaps.append(Gap(file, reached, info.offset - reached))
        position = info.offset + info.nbytes
        reached = start + align_up(position - start, alignment)
    if stop > reached:
        gaps.append(Gap(file, reached, stop - reached))
    return tuple(gaps)


def require_extent(tensors: Sequence[TensorInfo], *, file: Path, stop: int) -> None:
    """Refuse tensors that end behind byte ``stop``: the commonest truncation, so the message counts what is missing."""
    last = max(tensors, key=lambda info: info.offset + info.nbytes, default=None)
    if last is None or last.offset + last.nbytes <= stop:
        return
    end = last.offset + last.nbytes
    raise FormatError(
        expected=f"tensor data up to byte {end}",
        found=f"only {stop} bytes: the file is truncated, {end - stop} bytes are missing",
        file=file,
        tensor=last.stored_name,
        at=last.offset,
        advice="download it again",
    )


def is_addressable(shape: Sequence[int]) -> bool:
    """Tell whether an array can have a shape: zero elements do not excuse axes that no index reaches."""
    return len(shape) <= MAX_AXES and prod(max(1, extent) for extent in shape) < MAX_ELEMENTS


def align_up(value: int, alignment: int) -> int:
    """Round up to a multiple; Python integers cannot wrap around."""
    return -(-value // alignment) * alignment

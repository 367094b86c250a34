"""Exact cover of a data section: a bitmap of bytes is the witness."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apr_core.dtypes import FORMATS
from apr_core.errors import FormatError
from apr_core.formats.checkpoint import TensorInfo
from apr_core.formats.spans import align_up, find_gaps, require_extent

FILE = Path("f")


def infos(spans: list[tuple[int, int]]) -> list[TensorInfo]:
    """Make tensors of given offsets and sizes."""
    return [TensorInfo(f"t{i}", FORMATS["U8"], (n,), FILE, at, n, f"t{i}") for i, (at, n) in enumerate(spans)]


@settings(suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault of the code
@given(st.lists(st.tuples(st.integers(10, 40), st.integers(1, 8)), max_size=5), st.integers(0, 12))
def test_against_a_bitmap(spans: list[tuple[int, int]], tail: int) -> None:
    """Overlap exactly where a byte is claimed twice; gaps are exactly the bytes that nobody claims."""
    stop = max((at + n for at, n in spans), default=10) + tail
    claims = [sum(at <= byte < at + n for at, n in spans) for byte in range(10, stop)]
    if any(claim > 1 for claim in claims):
        with pytest.raises(FormatError, match="overlap"):
            find_gaps(infos(spans), file=FILE, start=10, stop=stop, alignment=1)
        return
    gaps = find_gaps(infos(spans), file=FILE, start=10, stop=stop, alignment=1)
    free = [byte for gap in gaps for byte in range(gap.offset, gap.offset + gap.nbytes)]
    assert free == [byte for byte, claim in enumerate(claims, start=10) if claim == 0]


def test_padding_is_explained() -> None:
    """Bytes up to the next multiple of the alignment, counted from the section's start, are no gap."""
    assert find_gaps(infos([(10, 5), (18, 1)]), file=FILE, start=10, stop=26, alignment=8) == ()
    (gap,) = find_gaps(infos([(10, 5), (26, 1)]), file=FILE, start=10, stop=27, alignment=8)
    assert (gap.offset, gap.nbytes) == (18, 8)


def test_missing_bytes_are_counted() -> None:
    """A tensor that ends behind the file says how many bytes are missing; huge offsets do not wrap."""
    with pytest.raises(FormatError, match="3 bytes are missing"):
        require_extent(infos([(0, 5), (8, 5)]), file=FILE, stop=10)
    with pytest.raises(FormatError, match="bytes are missing"):
        require_extent(infos([(2**64 - 1, 2**64)]), file=FILE, stop=10)
    require_extent([], file=FILE, stop=0)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (1, 64), (64, 64), (65, 128), (2**64 - 1, 2**64)])
def test_align_up(value: int, expected: int) -> None:
    """Rounding up is exact for any integer."""
    assert align_up(value, 64) == expected

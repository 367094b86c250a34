"""Whether the head that a tied model stores is its embedding, within what their two types lose."""

from __future__ import annotations

import numpy as np

from apr_core.contract.layout import EMBEDDING, HEAD
from apr_core.dtypes import QuantFormat
from apr_core.formats import codecs
from apr_core.formats.checkpoint import Checkpoint

_CHUNK = 1 << 18  # values at a time


def values_beyond(checkpoint: Checkpoint) -> tuple[int, int]:
    """
    Count the head's values that lie outside the joint error bound of both types around the embedding's.

    Returns:
        How many, and of how many.

    Raises:
        FormatError, Unavailable: A type without a decoder or a bound.
    """
    head, embedding = checkpoint.raw(HEAD), checkpoint.raw(EMBEDDING)
    rows, columns = head.info.shape
    if head.info.dtype == embedding.info.dtype and np.array_equal(head.data, embedding.data):
        return 0, rows * columns
    both: list[QuantFormat] = [head.info.dtype, embedding.info.dtype]
    streamed = all(dtype.layout == "row" for dtype in both)
    step = max(1, _CHUNK // columns) if streamed else rows
    beyond = 0
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        a = codecs.decode_rows(head, start, stop) if streamed else codecs.decode(head)
        b = codecs.decode_rows(embedding, start, stop) if streamed else codecs.decode(embedding)
        with np.errstate(all="ignore"):
            # both are roundings of one unknown matrix, so their bounds add up
            bound = codecs.step_bound(a, head.info.dtype) + codecs.step_bound(b, embedding.info.dtype)
            beyond += int(np.count_nonzero(~(np.abs(a - b) <= bound)))
    return beyond, rows * columns

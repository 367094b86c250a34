"""A range of blocks over threads, and float16 as a table: what the block codecs share."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from apr_core.kernels.cpu.features import available_cores

HALVES: NDArray[np.float32] = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
"""The float32 of every float16, by its bits."""

_WORTH_A_THREAD = 1 << 19  # bytes of the wider side below which starting a thread costs more than it saves


def in_threads(run: Callable[[int, int], None], count: int, nbytes: int, threads: int | None = None) -> None:
    """
    Call ``run(start, stop)`` on contiguous parts of ``count`` blocks, one per thread.

    Args:
        run: A compiled kernel that releases the GIL; parts may not share what they write.
        count: Blocks.
        nbytes: Bytes of the wider side, from which the number of threads follows.
        threads: At most so many; by default all cores of this process.
    """
    parts = max(1, min(threads or available_cores(), nbytes // _WORTH_A_THREAD))
    if parts == 1:
        run(0, count)
        return
    # an even number of blocks each: the K-quant encoders take two at a time
    edges = [count * part // parts // 2 * 2 for part in range(parts)] + [count]
    with ThreadPoolExecutor(parts - 1) as pool:
        rest = [pool.submit(run, edges[part], edges[part + 1]) for part in range(1, parts)]
        run(0, edges[1])
        for part in rest:
            part.result()

"""llama.cpp's own quantiser, from the library inside the xllamacpp wheel: a witness for codecs and a peer in timing."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apr_core.dtypes import QuantFormat
from apr_core.errors import Unavailable


@functools.cache
def _function() -> Any:
    spec = importlib.util.find_spec("xllamacpp")
    folders = [] if spec is None else spec.submodule_search_locations or []
    libraries = [path for folder in folders for path in Path(folder).glob("xllamacpp*.so")]
    for path in libraries:
        function = getattr(ctypes.CDLL(str(path)), "ggml_quantize_chunk", None)
        if function is not None:
            function.restype = ctypes.c_size_t
            pointers, counts = [ctypes.c_void_p] * 2, [ctypes.c_int64] * 3
            function.argtypes = [ctypes.c_int, *pointers, *counts, ctypes.c_void_p]
            return function
    raise Unavailable("no library of llama.cpp that quantises", advice="pip install 'apr_core[peers]'")


def quantise(values: NDArray[np.float32], dtype: QuantFormat, threads: int = 1) -> NDArray[np.uint8]:
    """
    Quantise [rows, columns] as ``ggml_quantize_chunk`` does without an importance matrix.

    Args:
        values: Finite; columns a multiple of the block.
        dtype: A GGML block type.
        threads: How many share the rows; the call releases the GIL.

    Returns:
        uint8 [dtype.nbytes(values.shape)].

    Raises:
        Unavailable: xllamacpp is not installed, or exports no quantiser.
    """
    quantise_rows = _function()
    values = np.ascontiguousarray(values, dtype=np.float32)
    rows, columns = values.shape
    out = np.zeros(dtype.nbytes(values.shape), np.uint8)

    def part(number: int) -> None:
        first, last = rows * number // threads, rows * (number + 1) // threads
        if first < last:
            start = first * columns
            quantise_rows(dtype.gguf, values.ctypes.data, out.ctypes.data, start, last - first, columns, None)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, range(threads)))
    return out

"""Reading memory as fast as it goes: the ceiling of every product with a vector."""

from __future__ import annotations

import numpy as np
from numba import njit

from apr_core.kernels.cpu import vec
from apr_core.kernels.cpu.jit import JIT


@njit(**JIT)
def read_all(address: int, nbytes: int) -> np.int32:
    """Read ``nbytes`` (a multiple of 256) once, in one stream, and return a sum that needs every byte."""
    a, b, c, d = vec.zero_i32(), vec.zero_i32(), vec.zero_i32(), vec.zero_i32()
    for at in range(address, address + nbytes, 256):
        a = vec.add_i32(a, vec.load_i32(at))
        b = vec.add_i32(b, vec.load_i32(at + 64))
        c = vec.add_i32(c, vec.load_i32(at + 128))
        d = vec.add_i32(d, vec.load_i32(at + 192))
    return vec.sum_i32(vec.add_i32(vec.add_i32(a, b), vec.add_i32(c, d)))

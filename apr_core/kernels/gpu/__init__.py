"""
Kernels in Triton, which is an extra: nothing here imports it before somebody computes on a device.

`planes` lays weights out, `product` multiplies them, `phases` fuses a decode step into a few kernels, `launch` calls
them; `emulate` mends the interpreter, in which a machine without a device runs them.
"""

from __future__ import annotations

import functools
import importlib.util
import os


@functools.cache
def has_triton() -> bool:
    """Say whether the compiler is installed."""
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # hidden by a finder, or by an entry of None: not there either way
        return False


def interpreted() -> bool:
    """Say whether kernels run in Triton's interpreter, on the CPU: how a machine without a device tests them."""
    return has_triton() and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")

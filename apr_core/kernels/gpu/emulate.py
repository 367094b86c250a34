"""
What Triton's interpreter lacks or does too slowly; imported in its place alone, on machines without a device.

The interpreter of 3.6 knows no inline assembly, calls ``int`` on arrays of one element, which NumPy 2.4 refuses, and
patches the language anew for each function that a kernel calls, which takes more time than the arithmetic.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def dot4(a: Any, b: Any, c: Any, SIGNED: Any) -> Any:
    """As `product.dot4`, on the arrays behind the interpreter's tensors."""
    kind = np.int8 if SIGNED else np.uint8
    weights = np.ascontiguousarray(a.handle.data).view(kind).reshape(*a.handle.data.shape, 4).astype(np.int32)
    digits = np.ascontiguousarray(b.handle.data).view(np.int8).reshape(-1, 4).astype(np.int32)
    total = c.handle.data + (weights * digits).sum(axis=-1, dtype=np.int32)
    return tl.core.tensor(interpreter.TensorHandle(total, tl.int32), a.type)


def mend() -> None:
    """Let scalars bound loops, and patch the language once per launch."""
    patch_tensor: Any = interpreter._patch_lang_tensor
    patch_all: Any = interpreter._patch_lang
    patched: dict[bool, Any] = {}
    quiet: list[Any] = []

    def scalars(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    class Once:
        """What a launch patched; the functions that it calls, of kernels or of the language itself, add to it once."""

        def __init__(self, function: Any) -> None:
            if not patched:
                quiet.append(warnings.catch_warnings())  # a device overflows without a word
                quiet[-1].__enter__()
                warnings.simplefilter("ignore", RuntimeWarning)
            inside = function.__module__.startswith("triton.")
            if inside not in patched:
                patched[inside] = patch_all(function)

        def restore(self) -> None:
            """Undo it, at the end of the launch."""
            while patched:
                patched.popitem()[1].restore()
            quiet.pop().__exit__(None, None, None)

    interpreter._patch_lang_tensor = scalars
    interpreter._patch_lang = Once

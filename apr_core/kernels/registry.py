"""
Every fast operation beside its numpy reference. Registering one without the other is a type error.

The tests of this room run over `KERNELS`: a kernel that nobody compares cannot exist.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from apr_core.kernels.gpu import has_triton

# Modules that register kernels when they are imported.
MODULES: tuple[str, ...] = (
    "apr_core.kernels.cpu.register",
    "apr_core.kernels.cpu.scan",
    "apr_core.kernels.cpu.decode",
    "apr_core.kernels.cpu.encode",
)
GPU_MODULES: tuple[str, ...] = ("apr_core.kernels.gpu.register",)


@dataclass(frozen=True)
class Kernel:
    """
    One fast operation on one stage of the arithmetic.

    Attributes:
        op: What it computes, e.g. ``matvec``, ``decode``, ``scan``.
        format: Name of the element type (`apr_core.dtypes.FORMATS`), or ``any``.
        device: ``cpu`` or ``cuda``.
        path: Instruction set or compiler path: ``numba``, ``avx512vnni``, ``portable``, ``triton``.
        precision: ``exact`` (equal to the reference within its stated bound) or ``speed`` (8-bit activations).
        run: The kernel.
        reference: A plain numpy function of the same arguments and result.
        examples: Yields argument tuples that cover odd lengths, partial blocks and extreme values; tests feed both.
        rel_l2: Largest allowed relative distance between the two; 0.0 means bit for bit.
    """

    op: str
    format: str
    device: str
    path: str
    precision: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    examples: Callable[[], Iterator[tuple[Any, ...]]]
    rel_l2: float = 0.0

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What makes it unique."""
        return self.op, self.format, self.device, self.path, self.precision


KERNELS: dict[tuple[str, str, str, str, str], Kernel] = {}


def register(kernel: Kernel) -> Kernel:
    """
    Add a kernel.

    Raises:
        ValueError: There is one of the same key.
    """
    if kernel.key in KERNELS:
        raise ValueError(f"kernel {kernel.key} is registered twice")
    KERNELS[kernel.key] = kernel
    return kernel


def load_kernels() -> dict[tuple[str, str, str, str, str], Kernel]:
    """
    Import every module that registers kernels, and return them all; numba is needed for most.

    Those in Triton are registered where Triton is installed, and runs: on a device or in its interpreter.
    """
    for module in (*MODULES, *(GPU_MODULES if has_triton() else ())):
        importlib.import_module(module)
    return KERNELS

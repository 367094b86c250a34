"""
Calls from one compiled kernel to another by symbol, as between object files.

numba copies what a function calls into it and compiles the copy once more, at every level of a call tree: the two
products, below five levels of the step, were compiled seven times (100 s instead of 15). A call by symbol compiles the
callee once, per `Mode`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from apr_core.kernels.cpu.matmul import matmul
from apr_core.kernels.cpu.matvec import matvec
from apr_core.kernels.cpu.vec import Mode, ModeType

_CALLEES = {"matvec": (matvec, 8), "matmul": (matmul, 11)}
"""Kernel, and its int64 arguments behind the mode."""


def _symbol(name: str, mode: Mode) -> str:
    return f"apr_core_{name}_{mode.path}_{mode.digits}"


def link(mode: Mode) -> None:
    """Compile the products for a mode, or load them from the disk, and make their symbols known; once per process."""
    for name, (kernel, count) in _CALLEES.items():
        arguments = (ModeType(mode), *[types.int64] * count)
        kernel.compile(arguments)
        compiled = kernel.overloads[arguments]
        address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
        binding.add_symbol(_symbol(name, mode), address)


def _call(name: str, mode: ModeType) -> Any:
    """The type and the code of a call; the callee never raises, so its status is not looked at."""
    signature = types.void(mode, *[types.int64] * _CALLEES[name][1])

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        convention = context.call_conv
        kind = convention.get_function_type(sig.return_type, sig.args)
        callee = cgutils.get_or_insert_function(builder.module, kind, _symbol(name, mode.mode))
        convention.call_function(builder, callee, sig.return_type, sig.args, values)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def call_matvec(
    context: Any, mode: Any, code: Any, w: Any, blocks: Any, first: Any, stop: Any, tile: Any, values: Any, out: Any
) -> Any:
    """Call `matvec.matvec` of this mode; `link` must have run."""
    return _call("matvec", mode)


@intrinsic
def call_matmul(
    context: Any,
    mode: Any,
    code: Any,
    w: Any,
    blocks: Any,
    first: Any,
    stop: Any,
    tiles: Any,
    values: Any,
    count: Any,
    scratch: Any,
    out: Any,
    stride: Any,
) -> Any:
    """Call `matmul.matmul` of this mode; `link` must have run."""
    return _call("matmul", mode)

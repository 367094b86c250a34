"""
Which instructions this processor has, and which path the kernels therefore take.

Nothing here needs numba: a command that only reports may ask. The portable path can be forced, by a parameter or by the
environment, so that one machine can test both.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable

from apr_core.errors import Unavailable, UsageError

AVX512 = "avx512vnni"
PORTABLE = "portable"
PATHS = (AVX512, PORTABLE)
VARIABLE = "APR_CPU_PATH"
"""Environment variable that chooses a path where no parameter does."""

# What the AVX-512 path executes: 512-bit integers and floats, bytes and words, and the dot product of bytes.
_NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "f16c", "fma")


@functools.cache
def instructions() -> frozenset[str]:
    """
    Return the vector instruction sets that numba compiles for, by LLVM's names, e.g. ``avx2`` and ``avx512vnni``.

    Those of this processor, or what numba was told: ``NUMBA_CPU_FEATURES`` (``+avx2,-avx512f``), or none where
    ``NUMBA_CPU_NAME`` is ``generic``. Empty when llvmlite is not there to ask, or does not know the processor.
    """
    if importlib.util.find_spec("llvmlite") is None:
        return frozenset()
    from llvmlite import binding

    chosen = os.environ.get("NUMBA_CPU_FEATURES")
    if chosen is None and os.environ.get("NUMBA_CPU_NAME", "").lower() == "generic":
        chosen = ""
    if chosen is not None:
        return frozenset(name.strip()[1:] for name in chosen.split(",") if name.strip().startswith("+"))
    try:
        features = binding.get_host_cpu_features()
    except RuntimeError:  # LLVM knows no features of this kind of processor
        return frozenset()
    return frozenset(name for name, there in features.items() if there)


def multiplies_bf16() -> bool:
    """Say whether this processor has the dot product of bfloat16 pairs, twice as fast as one in float32."""
    return "avx512bf16" in instructions()


@functools.cache
def bytes_ahead() -> int:
    """
    Return how far ahead of itself a stream of weights asks for memory; 0 where the processor does it well alone.

    Measured, one thread, 700 MB: Zen 5 reads Q4_K at 28 GB/s alone and at 40 with this, Q6_K at 30 and 39, Q5_0 at 34
    and 40, of 43 that reading alone reaches; on Zen 4 every distance from 1 to 8 kB made each type slower.
    """
    if importlib.util.find_spec("llvmlite") is None:
        return 0
    from llvmlite import binding

    return 4096 if binding.get_host_cpu_name() == "znver5" else 0


@functools.cache
def has_numba() -> bool:
    """Say whether the compiler is installed; without it there is the reference and nothing faster."""
    try:
        return importlib.util.find_spec("numba") is not None
    except ImportError:  # a finder that refuses it by name
        return False


def available_paths() -> tuple[str, ...]:
    """Return the paths that run here, the fastest first; none without numba."""
    if not has_numba():
        return ()
    fast = sys.byteorder == "little" and all(name in instructions() for name in _NEEDED)
    return (AVX512, PORTABLE) if fast else (PORTABLE,)


def choose_path(forced: str | None = None) -> str:
    """
    Return the path to take: the forced one, else that of the environment (`VARIABLE`), else the fastest.

    Raises:
        UsageError: There is no path of that name.
        Unavailable: This processor cannot run it, or numba is missing.
    """
    asked = forced or os.environ.get(VARIABLE) or None
    if asked is not None and asked not in PATHS:
        raise UsageError(f"expected a CPU path of {', '.join(PATHS)}, found {asked!r}", advice=f"unset {VARIABLE}")
    there = available_paths()
    if not there:
        raise Unavailable("numba is not installed, so there are no fast kernels", advice="use --precision reference")
    if asked is None:
        return there[0]
    if asked not in there:
        missing = ", ".join(name for name in _NEEDED if name not in instructions())
        raise Unavailable(f"the path {asked} needs {missing}, which this processor lacks", advice=f"use {PORTABLE}")
    return asked


listeners: list[Callable[[str], object]] = []
"""Called with a line of text before something that takes long and happens once; a command line puts its own here."""


def announce(text: str) -> None:
    """Tell whoever listens."""
    for listener in listeners:
        listener(text)


def available_cores() -> int:
    """Return the cores that this process may use (its affinity, where the system has one)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

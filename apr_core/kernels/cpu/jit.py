"""
How kernels are compiled, and where the result is kept.

numba keeps compiled functions on disk and looks at the time stamp of their own file alone: after a change to a part
that is copied in from another file it would run the old code. Hence a folder named by a digest of all kernel sources.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numba

JIT: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy", "boundscheck": False}
"""Options of every kernel: without the GIL, kept on disk, no check of bounds, no reordering of floats."""
INLINE: dict[str, Any] = {**JIT, "forceinline": True}
"""Options of parts of kernels: copied into each caller, so that its constants fold."""


def sources_digest() -> str:
    """Return 16 hex digits that change with any source of this folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Return where compiled kernels of exactly these sources are kept, as the XDG convention has it."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "apr_core" / f"kernels-{sources_digest()}"


if not numba.config.CACHE_DIR:  # NUMBA_CACHE_DIR was not set: a person's own choice stands
    numba.config.CACHE_DIR = str(cache_folder())

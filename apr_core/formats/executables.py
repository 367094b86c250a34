"""
Find executable content: pickles, which run code when they are loaded. Recognised by their bytes; nothing is unpickled.

A pickle beside weights is legal (hubs keep both), so `open_checkpoint` does not mind it and inspect lists it.
Source: ``pickletools`` (opcodes; its lexer executes nothing); PyTorch's zip container (``archive/data.pkl``).
"""

from __future__ import annotations

import pickletools
from contextlib import suppress
from pathlib import Path

from apr_core.errors import AprError
from apr_core.formats.checkpoint import map_file

_HEAD = 4096
_TAIL = 1 << 16
_ENOUGH = 16  # opcodes in a row that make a pickle; text and weights fail at the first or second
_SUSPECTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".model", ".npy", ".npz", ".zip")
_MOST = 1000


def executable_kind(view: memoryview) -> str | None:
    """Say what kind of executable content a file is; None when it is not recognised as such."""
    head = bytes(view[:_HEAD])
    if head.startswith(b"PK\x03\x04"):
        listing = head + bytes(view[max(0, view.nbytes - _TAIL) :])
        return "a PyTorch checkpoint (a zip archive with a pickle)" if b".pkl" in listing else None
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return f"a Python pickle (protocol {head[1]})"
    return "a Python pickle (protocol 0 or 1)" if _is_old_pickle(head) else None


def _is_old_pickle(head: bytes) -> bool:
    """Tell a pickle without a protocol byte: only its opcodes give it away."""
    if head[:1] not in (b"(", b"]", b"}", b"c"):
        return False
    with suppress(ValueError, OverflowError):  # no opcode, or a broken argument
        for seen, (opcode, _, _) in enumerate(pickletools.genops(head), start=1):
            if opcode.name == "STOP" or seen == _ENOUGH:
                return seen > 1
    return False


def find_executables(folder: Path) -> list[tuple[str, str]]:
    """
    List the executable content of a folder: [(file name, kind)], sorted by name.

    Looks at the names that pickles have (``pytorch_model.bin``, ``.pt``, ``.ckpt``, ...) and at the bytes behind them;
    a file that cannot be read is left out.
    """
    found = []
    for path in sorted(folder.iterdir())[:_MOST]:
        if path.suffix.lower() in _SUSPECTS:
            try:
                kind = executable_kind(map_file(path).view)
            except AprError:
                continue
            if kind:
                found.append((path.name, kind))
    return found

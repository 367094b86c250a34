"""Kernels over unix sockets in a private folder: nothing to race for, and all of them can be killed at once."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import weakref
from typing import Any

from jupyter_client import AsyncKernelManager
from traitlets import default

_LIVE: weakref.WeakSet[Any] = weakref.WeakSet()


class IpcKernelManager(AsyncKernelManager):
    """
    An ``AsyncKernelManager`` over ipc.

    Over TCP, kernels that start at once race for ports (1 of 160 runs died); over ipc with the default connection file
    they share one socket name (15 of 16 died). A private folder per kernel ends both.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _LIVE.add(self)

    @default("transport")
    def _transport(self) -> str:
        return "ipc"

    @default("connection_file")
    def _connection_file(self) -> str:
        # The short system folder: a socket path holds 107 bytes, and a deep --out would not fit.
        self._folder = tempfile.mkdtemp(prefix="apr-", dir=tempfile.gettempdir())
        return os.path.join(self._folder, "k.json")  # noqa: PTH118  traitlets wants text

    async def _async_cleanup_resources(self, restart: bool = False) -> None:
        await super()._async_cleanup_resources(restart=restart)
        if not restart:
            shutil.rmtree(getattr(self, "_folder", ""), ignore_errors=True)

    cleanup_resources = _async_cleanup_resources


def kill_all() -> None:
    """Kill every kernel of this process, so that threads that wait for one come back (used on Ctrl-C)."""
    for manager in list(_LIVE):
        pid = getattr(getattr(manager, "provisioner", None), "pid", None)
        if pid:
            try:
                os.killpg(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue

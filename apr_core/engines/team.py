"""A few threads that run the same compiled function at the same time, each with its own number."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from weakref import finalize

from apr_core.errors import UsageError
from apr_core.kernels.cpu.features import available_cores

Work = Callable[[int], None]


class Team:
    """
    Runs a piece of work once per thread; the caller's thread is number 0.

    The threads live as long as the team: starting one per token would cost more than a small layer. What they run must
    not raise: a thread that fails to arrive at a barrier leaves the others waiting.

    Args:
        threads: How many, at most the cores that this process may use: more would wait for each other at barriers.

    Raises:
        UsageError: Fewer than one, or more than there are cores.
    """

    def __init__(self, threads: int | None = None) -> None:
        cores = available_cores()
        count = cores if threads is None else threads
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= cores:
            raise UsageError(f"expected 1 to {cores} threads (the cores of this process), found {count!r}")
        self.size = count
        self._inboxes: list[SimpleQueue[Work | None]] = [SimpleQueue() for _ in range(count - 1)]
        self._done: SimpleQueue[None] = SimpleQueue()
        for number, inbox in enumerate(self._inboxes, start=1):
            # daemons: a program that ends must not wait for them
            threading.Thread(target=_serve, args=(number, inbox, self._done), daemon=True).start()
        finalize(self, _dismiss, self._inboxes)

    def run(self, work: Work) -> None:
        """Call ``work(number)`` in every thread, and return when all have."""
        for inbox in self._inboxes:
            inbox.put(work)
        work(0)
        for _ in self._inboxes:
            self._done.get()


def _serve(number: int, inbox: SimpleQueue[Work | None], done: SimpleQueue[None]) -> None:
    while (work := inbox.get()) is not None:
        work(number)
        del work  # it holds the model
        done.put(None)


def _dismiss(inboxes: list[SimpleQueue[Work | None]]) -> None:
    for inbox in inboxes:
        inbox.put(None)

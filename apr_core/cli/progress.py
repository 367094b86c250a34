"""How long work says that it is alive: a bar on a terminal, a line per tenth elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from apr_core.report.text import nbytes, seconds

QUIET_S = 2.0  # work that ends sooner says nothing


@contextmanager
def progress(label: str, total: int = 0, *, quiet_s: float = QUIET_S) -> Iterator[Callable[..., None]]:
    """
    Show the progress of one piece of work.

    Args:
        label: What is being done, e.g. ``writing``.
        total: Bytes in all; a call may state it later.
        quiet_s: Not on a terminal: say nothing before this many seconds.

    Yields:
        ``step(done, total=None)``: bytes done so far. Cheap enough for every chunk.
    """
    if sys.stderr.isatty():
        with _bar(label, total) as step:
            yield step
    else:
        yield _lines(label, total, quiet_s)


@contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[..., None]]:
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True, markup=False), transient=True) as shown:
        task = shown.add_task(label, total=total or None)

        def step(done: int, total: int | None = None) -> None:
            shown.update(task, completed=done) if total is None else shown.update(task, completed=done, total=total)

        yield step


def _lines(label: str, total: int, quiet_s: float) -> Callable[..., None]:
    started, said, known = time.monotonic(), 0, total

    def step(done: int, total: int | None = None) -> None:
        nonlocal said, known
        known = total or known
        tenth = 10 * done // known if known else 0
        elapsed = time.monotonic() - started
        if tenth > said and elapsed >= quiet_s:
            print(f"{label}: {10 * tenth} % of {nbytes(known)}, {seconds(elapsed)}", file=sys.stderr, flush=True)
            said = tenth

    return step

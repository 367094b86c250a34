"""
Open every hostile file in a process that may take 100 MB and a second for each, and say what happened.

Run as a module (the tests do, in a process of its own: the limit would stay): prints one JSON object, id to
``[outcome, seconds]``. The limit is one of address space, so that what C libraries allocate counts as well.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from apr_core.errors import AprError
from apr_core.formats.checkpoint import open_checkpoint, read_companion

SECONDS, MEGABYTES = 1.0, 100


def limit_memory(megabytes: int = MEGABYTES) -> None:
    """Let this process have no more address space than it has now, and so many megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def timed_out(*_: object) -> None:
    """End a hang (the handler of SIGALRM)."""
    raise TimeoutError("a hang")


def tried(act: Callable[[], object], patience: float = 10 * SECONDS) -> tuple[str, float]:
    """
    Do something once.

    Returns:
        The name of what it raised, or ``opened``; ``TimeoutError`` when it took more than ``patience`` seconds of the
        wall's clock. And the seconds of processor time that it took: others on the machine do not count.
    """
    signal.setitimer(signal.ITIMER_REAL, patience)
    start = time.process_time()
    outcome = _outcome(act)
    taken = time.process_time() - start
    signal.setitimer(signal.ITIMER_REAL, 0)
    return outcome, round(taken, 4)


def _outcome(act: Callable[[], object]) -> str:
    try:
        act()
    except AprError as error:
        return f"AprError {error.exit_code}"
    except Exception as error:
        return type(error).__name__
    return "opened"


def _busy() -> None:
    end = time.process_time() + 1.1 * SECONDS
    while time.process_time() < end:
        pass


def main() -> None:
    """Run as a program."""
    from tests.attacks.build import VALID
    from tests.attacks.folders import REFUSALS
    from tests.attacks.hostile import ATTACKS, PACKED

    signal.signal(signal.SIGALRM, timed_out)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.bin"
        for data in (*VALID.values(), *PACKED.values()):  # what opening imports is imported before the limit
            path.write_bytes(data)
            open_checkpoint(path)
        limit_memory()
        found: dict[str, tuple[str, float]] = {}
        for kind, attacks in ATTACKS.items():
            for attack in attacks:
                path.write_bytes(attack.data)
                found[f"{kind}-{attack.id}"] = tried(lambda: open_checkpoint(path))
        for build in REFUSALS:
            folder = Path(name) / build.__name__
            folder.mkdir()
            target = build(folder)
            found[build.__name__] = tried(partial(open_checkpoint, target))
        path.write_bytes(b"{}")
        found["healthy-companion"] = tried(partial(read_companion, path))
    # What the limits are for: all must be noticed, or nothing above means anything.
    found["control-memory"] = tried(lambda: bytearray((MEGABYTES + 10) << 20))
    found["control-time"] = tried(_busy)
    found["control-hang"] = tried(lambda: time.sleep(60), 0.2)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

"""
Run nbval on the committed notebooks again and again: at one thread, at two, and on the portable kernels.

`python ci/nbval_stability.py [REPEATS] [NOTEBOOK...]`: 20 repeats of all four unless told otherwise. Exit 1 when a run
compared fewer lines than are committed, or found another.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from apr_core.falsify.claims import NOTEBOOKS, claims_of
from apr_core.kernels.cpu.features import PORTABLE, VARIABLE

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "1 thread": {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"},
    "portable kernels": {"OMP_NUM_THREADS": "1", VARIABLE: PORTABLE},
}
NBVAL = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout", "240", "-p", "no:cacheprovider", "-q"]


def compared(names: list[str], settings: dict[str, str]) -> tuple[int, str]:
    """Claim lines that compared equal in one run, and what failed."""
    command = [sys.executable, "-m", "pytest", *NBVAL, *(f"notebooks/{name}.ipynb" for name in names)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    count = re.search(r"nbval: (\d+) of \d+ claim lines", done.stdout)
    failed = "; ".join(line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR")))
    return int(count[1]) if count else 0, failed


def main() -> int:
    """Repeat, count and print."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    names = sys.argv[2:] or list(NOTEBOOKS)
    wanted, bad = sum(len(claims_of(name)) for name in names), 0
    for title, settings in SETTINGS.items():
        start, equal = time.monotonic(), 0
        for _ in range(repeats):
            count, failed = compared(names, settings)
            equal += count == wanted and not failed
            if count != wanted or failed:
                print(f"{title}: {count} of {wanted}; {failed}", flush=True)
        bad += repeats - equal
        print(
            f"{title}: {equal} of {repeats} runs compared {wanted} lines equal, {time.monotonic() - start:.0f} s",
            flush=True,
        )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

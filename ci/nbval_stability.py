"""
Run nbval on the committed notebooks again and again: at one thread, at two, and on the portable kernels.

`python ci/nbval_stability.py [REPEATS] [NOTEBOOK...]`: 20 repeats of all four unless told otherwise. Counts are kept
in reports/nbval-stability.json after every run, and a second call goes on where the first stopped; other code or other
committed notebooks start again from nothing. Exit 1 when a run compared fewer lines than are committed, or found
another; 11 while repeats are missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from apr_core.falsify.claims import NOTEBOOKS, claims_of
from apr_core.kernels.cpu.features import PORTABLE, VARIABLE

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "reports" / "nbval-stability.json"
SETTINGS = {
    "1 thread": {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"},
    "portable kernels": {"OMP_NUM_THREADS": "1", VARIABLE: PORTABLE},
}
NBVAL = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout", "240", "-p", "no:cacheprovider", "-q"]


def digest() -> str:
    """16 hex digits of what is repeated: the package, the notebooks, the bundled model's weights."""
    found = hashlib.sha256()
    for path in sorted([*ROOT.glob("apr_core/**/*.py"), *ROOT.glob("notebooks/*.*"), *ROOT.glob("models/*/*.s*")]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def kept(code: str) -> dict[str, Any]:
    """The counts so far; none where they are of other code."""
    if KEPT.is_file():
        found: dict[str, Any] = json.loads(KEPT.read_text("utf-8"))
        if found["code"] == code:
            return found
        print(f"{KEPT.name} is of other code ({found['code']}, now {code}): starting again", flush=True)
    counts = {title: {name: {"runs": 0, "equal": 0} for name in NOTEBOOKS} for title in SETTINGS}
    return {"code": code, "counts": counts, "differed": []}


def compared(name: str, settings: dict[str, str]) -> tuple[int, str]:
    """Claim lines that compared equal in one run of a notebook, and what failed."""
    command = [sys.executable, "-m", "pytest", *NBVAL, f"notebooks/{name}.ipynb"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    count = re.search(r"nbval: (\d+) of \d+ claim lines", done.stdout)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "  - ", "  + "))]
    return int(count[1]) if count else 0, "; ".join(failed)


def summary(found: dict[str, Any], repeats: int, names: list[str]) -> int:
    """Print a line per setting and notebook; return the exit code."""
    equal, runs = 0, 0
    for title, books in found["counts"].items():
        for name in names:
            row, lines = books[name], len(claims_of(name))
            equal, runs = equal + row["equal"], runs + row["runs"]
            print(f"{title:<17} {name:<18} {row['equal']:>2} of {row['runs']:>2} runs compared {lines} lines equal")
    wanted = repeats * len(SETTINGS) * len(names)
    print(f"{equal} of {runs} runs equal, {wanted} wanted; counts in {KEPT.relative_to(ROOT)}")
    for line in found["differed"]:
        print(f"differed: {line}")
    return 1 if equal < runs else 11 if runs < wanted else 0


def main() -> int:
    """Repeat in turns, so that a part of the repeats speaks about every setting; keep the counts after each run."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    names = sys.argv[2:] or list(NOTEBOOKS)
    found = kept(digest())
    try:
        for turn in range(repeats):
            for title, settings in SETTINGS.items():
                for name in names:
                    row = found["counts"][title][name]
                    if row["runs"] > turn:
                        continue
                    count, failed = compared(name, settings)
                    equal = count == len(claims_of(name)) and not failed
                    row["runs"], row["equal"] = row["runs"] + 1, row["equal"] + equal
                    if not equal:
                        found["differed"].append(f"{title}, {name}: {count} lines; {failed}")
                    KEPT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except KeyboardInterrupt:
        print("stopped; the next call goes on from here")
    return summary(found, repeats, names)


if __name__ == "__main__":
    sys.exit(main())

"""Who ran what: code, machine and package versions, gathered once per run and kept in every evidence record."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("apr_core", "numpy", "torch", "tokenizers", "safetensors", "gguf", "jinja2", "papermill")


@cache
def _fixed() -> dict[str, Any]:
    """The part that does not change while a process lives."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 1,
        "packages": {name: version_of(name) for name in PACKAGES},
        **git_state(),
        "code": code_digest(),
    }


def collect() -> dict[str, Any]:
    """
    Describe this run: python, machine, packages, commit (with a dirty flag), command and UTC time.

    Costs a few milliseconds once; package versions come from metadata, so nothing is imported.
    """
    return {
        **_fixed(),
        "packages": dict(_fixed()["packages"]),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:300] if sys.argv else "",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def code_digest() -> str:
    """Hash every file of the package: a commit says little of an edited tree, and nothing of an installed one."""
    root, digest = Path(__file__).resolve().parent, hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.suffix != ".pyc"):
        digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def version_of(package: str) -> str:
    """Installed version of a package, or ``absent``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def cpu_model() -> str:
    """Name of the processor as the kernel gives it, or the architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_state() -> dict[str, Any]:
    """Commit of the code that runs and whether it was edited; empty strings where there is no repository."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return {"commit": "", "dirty": False}
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": "", "dirty": False}


def _git(root: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=5, check=True)
    return done.stdout.strip()

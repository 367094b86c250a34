"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

# jsonschema imports it optionally and builds grammars for 1.1 s; nothing here checks IRIs.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

# Tiny models gain nothing from threads, and a busy machine loses a factor of ten to their waking up.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Kernels in Triton run in its interpreter, which is chosen when it is first imported, by whomever.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Receipts of the tests stay with the tests.
os.environ["APR_CACHE"] = tempfile.mkdtemp(prefix="apr-test-cache-")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def oracle() -> Path:
    """The answers that others computed, beside the checkout; absent in a public clone, which is said, not hidden."""
    folder = ROOT.parent / "shared" / "oracle"
    if not folder.is_dir():
        pytest.skip("NOT_RUN: no ../shared/oracle beside this checkout")
    return folder


@pytest.fixture(scope="session")
def pygmy() -> Path:
    """The bundled model."""
    return ROOT / "models" / "pygmy"

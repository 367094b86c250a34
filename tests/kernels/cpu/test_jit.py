"""Where compiled kernels are kept."""

from __future__ import annotations

from pathlib import Path

import numba
import pytest

from apr_core.kernels.cpu import jit


def test_the_folder_follows_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba itself would run old code after a change in a file that another one copies in."""
    (tmp_path / "a.py").write_text("1")
    monkeypatch.setattr(jit, "__file__", str(tmp_path / "jit.py"))
    before = jit.cache_folder()
    (tmp_path / "b.py").write_text("2")
    assert jit.cache_folder() != before


def test_the_cache_is_outside_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package may be read-only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert jit.cache_folder().is_relative_to(tmp_path)
    assert numba.config.CACHE_DIR

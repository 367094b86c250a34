"""Damaged copies of the bundled model under names that say nothing."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from apr_core.engines.subject import resolve_model
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.zoo.draft import Draft, put_together, take_apart
from apr_core.zoo.matrix import find

Plant = Callable[[str | Callable[[Draft], object]], Path]


@pytest.fixture(scope="session")
def healthy() -> Draft:
    """The bundled model taken apart."""
    with open_checkpoint(resolve_model("pygmy")) as checkpoint:
        return take_apart(checkpoint)


@pytest.fixture
def plant(healthy: Draft, tmp_path: Path) -> Plant:
    """Plant a defect of the zoo, by its id, or a recipe of the test's own."""

    def make(what: str | Callable[[Draft], object]) -> Path:
        draft, folder = healthy.copy(), tmp_path / secrets.token_hex(6)
        recipe = find(what).recipe if isinstance(what, str) else what
        assert recipe is not None
        with np.errstate(all="ignore"):
            recipe(draft)
            return put_together(draft, folder)

    return make

"""One headless chromium, and a tab that writes down whatever a page asks for, says or throws."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or ""
FLAGS = ["sandbox", "gpu", "quic", "dev-shm-usage", "background-networking", "component-update", "sync"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless chromium, Debian's own; where it is absent the tests are NOT_RUN, and say so."""
    if not CHROMIUM:
        pytest.skip("NOT_RUN: no chromium on PATH")
    from playwright.sync_api import sync_playwright

    args = ["--no-first-run", *(f"--{'no' if flag == 'sandbox' else 'disable'}-{flag}" for flag in FLAGS)]
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=args)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a page of a run; when the test ends, fail if it asked for anything else, complained, or ran its texts."""
    contexts, faults = [], []

    def open_page(path: Path, *, width: int = 1200, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        tab, address = context.new_page(), path.resolve().as_uri()
        tab.on(
            "request",
            lambda r: (
                faults.append(r.url) if not r.url.startswith("data:") and r.url.split("#")[0] != address else None
            ),
        )
        tab.on("console", lambda m: faults.append(m.text) if m.type in ("error", "warning") else None)
        tab.on("pageerror", lambda e: faults.append(str(e)))
        tab.on("dialog", lambda d: faults.append(d.message))
        tab.goto(address)
        assert tab.evaluate("window.PWN") is None
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []

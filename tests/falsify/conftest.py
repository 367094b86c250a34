"""A subject and a way to measure it, without any model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from apr_core.falsify import finding as module
from apr_core.falsify.evidence import SubjectRecord
from apr_core.falsify.finding import Finding


@dataclass
class FakeSubject:
    """The two things that `act` looks at."""

    refusal: str | None = None
    lacks: dict[str, str] = field(default_factory=dict)


@pytest.fixture
def subject() -> SubjectRecord:
    """A record with every kind of field filled."""
    return SubjectRecord(name="m", path="/m", format="gguf", sha256="0" * 64, quant={"F32": 2}, metadata={"k": "v"})


@pytest.fixture
def fake_subject() -> type[FakeSubject]:
    """The class, for tests that refuse it or take something away."""
    return FakeSubject


@pytest.fixture
def attempt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finding]:
    """Make the finding of a claim through `act`, with a registry of its own so that the real acts stay untouched."""
    monkeypatch.setattr(module, "ACTS", {})

    def make(claim: str, value: float | None = 0.0, compared: int = 4, expected: int = 4, **rest: Any) -> Finding:
        module.ACTS.pop(claim, None)
        measured = Finding(value, compared, expected, **rest)
        return module.act(claim)(lambda _: measured)(FakeSubject())

    return make

"""Faults of a backend: the first activation that differs, in which way, and the proof by replacing it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from apr_core.diagnose.backend import explain_backend
from apr_core.diagnose.cause import Chain
from apr_core.diagnose.explain import explain_failure
from apr_core.engines.subject import Subject, obtain
from apr_core.engines.wrap import At, wrap
from apr_core.zoo.matrix import find

# A fault of each kind: what must be named, and where.
FAULTS = {
    "rope-theta-half": ("backend-position", "layers.0.q"),
    "position-restart-chunk": ("backend-position", "layers.0.q"),
    "attention-scale-missing": ("backend-attention", "layers.0.q"),
    "gqa-map-swapped": ("backend-attention", "layers.0.k"),
    "head-beyond-tile-values": ("backend-attention", "layers.0.v"),
    "cache-stale-last-layer": ("backend-cache", "layers.1.k"),
    "cache-narrow-int8": ("backend-cache", "layers.0.k"),
    "decode-only-late": ("backend-cache", "logits"),
    "block-scale-attention": ("backend-kernel", "layers.0.attn_output"),
    "residual-dropped-ffn": ("backend-kernel", "layers.1.resid_ffn"),
    "traced-only-ulp": ("backend-kernel", "logits"),
    "token-fed-off-by-one": ("backend-sampling", "layers.0.q"),
    "token-taken-second": ("backend-sampling", "logits"),
    "hears-itself-second": ("backend-sampling", "logits"),
    "timed-decode-zero": ("backend-sampling", "logits"),
}


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    """The bundled model, healthy."""
    opened = obtain("pygmy", device="cpu")
    yield opened
    opened.close()


QUICK = {"rope-theta-half", "gqa-map-swapped", "cache-narrow-int8", "traced-only-ulp", "token-fed-off-by-one"}


@pytest.mark.parametrize("fault", [pytest.param(f, marks=[] if f in QUICK else [pytest.mark.slow]) for f in FAULTS])
def test_the_first_divergence_names_class_and_activation(fault: str, subject: Subject) -> None:
    """The class follows from what stands there; whatever a prompt shows is proved by the reference's values."""
    hook = find(fault).hook
    assert hook is not None
    candidate = wrap(subject.model, hook(subject.model.config))
    with np.errstate(all="ignore"):
        (cause,) = explain_backend(candidate, subject.plain, subject.stimulus(96).ids, Chain())
    assert (cause.klass, cause.op) == FAULTS[fault]
    shown_at_once = cause.experiment == "In which way does it differ?" and not fault.startswith("token-fed")
    assert cause.proved == shown_at_once


@pytest.mark.parametrize("steady", [True, False])
def test_rounding_is_nothing_to_explain(steady: bool, subject: Subject) -> None:
    """The float32 forward, and one with noise of the last bits, agree with float64 within rounding."""

    def hook(name: str, values: np.ndarray, at: At) -> np.ndarray | None:  # type: ignore[type-arg]
        grid = np.arange(at.start, at.start + len(values))[:, None] + np.arange(values.shape[1])
        return None if steady else (values * (1 + 1e-7 * np.sin(grid))).astype(np.float32) if name == "logits" else None

    assert explain_backend(wrap(subject.model, hook), subject.plain, subject.stimulus(96).ids, Chain()) == []


def test_a_healthy_file_leads_to_its_backend(subject: Subject) -> None:
    """The chain asks the file first, then the backend that was given."""
    hook = find("residual-dropped-ffn").hook
    assert hook is not None
    found = explain_failure("pygmy", backend=wrap(subject.model, hook(subject.model.config)))
    assert found.causes[0].klass == "backend-kernel"
    questions = [question for question, _ in found.whys]
    assert questions.index("Is it the file?") < questions.index("Where does it first differ?")
    assert questions[-1] == "What restores agreement?"

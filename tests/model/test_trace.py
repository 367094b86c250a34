"""Trace: names, ownership, one forward each."""

from __future__ import annotations

import numpy as np
import pytest

from apr_core.model.trace import MANDATORY, SKETCH, Fingerprints, Trace, lacking, mandatory_names, require_traced


def test_mandatory_names_in_forward_order() -> None:
    """Six per layer, then the two of the whole model."""
    names = mandatory_names(2)
    assert len(names) == 2 * 6 + 2
    assert names[:2] == ("layers.0.q", "layers.0.k")
    assert names[-3:] == ("layers.1.resid_ffn", "final_hidden", "logits")
    assert MANDATORY[-1] == "logits"


def test_a_trace_owns_what_it_records() -> None:
    """The caller's array may change afterwards; the record may not."""
    values = np.ones((3, 2))
    trace = Trace()
    trace.record("logits", values)
    values[:] = 7
    assert (list(trace), len(trace), trace["logits"].dtype) == (["logits"], 1, np.float32)
    assert trace["logits"].tolist() == [[1, 1]] * 3
    with pytest.raises(ValueError, match="read-only"):
        trace["logits"][0, 0] = 2


def test_a_second_forward_into_one_trace_is_refused() -> None:
    """Otherwise the second run would overwrite the evidence of the first."""
    trace = Trace()
    trace.record("q", np.zeros((1, 1)))
    with pytest.raises(ValueError, match="one Trace per forward"):
        trace.record("q", np.zeros((1, 1)))


def test_a_wrong_shape_is_refused() -> None:
    """Everything in a trace is [tokens, dim]."""
    with pytest.raises(ValueError, match=r"\[tokens, dim\]"):
        Trace().record("q", np.zeros(3))


def test_chosen_positions_of_a_forward_that_starts_late() -> None:
    """Positions count from 0 of the stream; those that this forward does not hold are left out."""
    trace = Trace(positions=(2, 11, 13), start=10)
    trace.record("q", np.arange(8.0).reshape(4, 2))
    assert trace["q"].tolist() == [[2, 3], [6, 7]]


@pytest.mark.parametrize("kind", [Trace, Fingerprints])
def test_parts_of_a_run_are_joined_in_order(kind: type[Trace]) -> None:
    """A prefill and two steps become one trace of all positions; the whole forward gives the same."""
    values = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    parts, whole = [], kind()
    whole.record("q", values)
    for rows in (values[:3], values[3:4], values[4:]):
        parts.append(kind())
        parts[-1].record("q", rows)
    joined = kind.joined(parts)
    assert list(joined) == ["q"]
    assert np.allclose(joined["q"], whole["q"])
    if isinstance(joined, Fingerprints) and isinstance(whole, Fingerprints):
        assert joined.rows == whole.rows


def test_a_fingerprint_says_what_a_person_asks_first() -> None:
    """Size, offset, largest and what is not finite; equal bits have equal digests."""
    trace = Fingerprints()
    trace.record("q", np.array([[3.0, -4.0], [3.0, -4.0], [np.nan, 2.0], [np.inf, np.nan]]))
    first, again, holed, empty = trace.rows["q"]
    assert first == again
    assert (first.rms, first.mean, first.max_abs, first.nonfinite) == (12.5**0.5, -0.5, 4.0, 0)
    assert (holed.rms, holed.nonfinite, empty.rms, empty.nonfinite) == (2.0, 1, 0.0, 2)
    assert holed.digest != first.digest
    assert trace["q"].shape == (4, SKETCH)
    assert np.isnan(trace["q"][2]).all()


def test_sketches_estimate_a_distance() -> None:
    """Within a third over a hundred draws, and exactly nothing for nothing."""
    random = np.random.default_rng(1)
    x = random.standard_normal((100, 900)).astype(np.float32)
    y = x + 1e-3 * random.standard_normal(x.shape).astype(np.float32)
    a, b, c = Fingerprints(), Fingerprints(), Fingerprints()
    a.record("q", x), b.record("q", y), c.record("q", x)
    found = np.linalg.norm(a["q"] - b["q"], axis=1) / np.linalg.norm(a["q"], axis=1)
    assert 0.67e-3 < np.median(found) < 1.33e-3
    assert 3e-4 < found.min() < found.max() < 3e-3
    assert np.array_equal(a["q"], c["q"])


def test_what_is_no_traced_forward_is_told_what_it_lacks() -> None:
    """A forward without a trace, a cache without an offset, no configuration: each is named."""

    class Half:
        backend, device, tokenizer = "half", "cpu", None

        def new_cache(self) -> None: ...

        def forward(self, ids: object, cache: object = None) -> None: ...

    assert lacking(Half) == ("new_cache(start)", "forward(trace)")
    with pytest.raises(TypeError, match=r"lacks new_cache\(start\), forward\(trace\), config"):
        require_traced(Half())

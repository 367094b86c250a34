"""Trace: names, ownership, one forward each."""

from __future__ import annotations

import numpy as np
import pytest

from apr_core.model.trace import MANDATORY, Trace, mandatory_names


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

"""The figure of the compiled engine: its three panels, and nothing where nothing was timed."""

from __future__ import annotations

import numpy as np
import pytest

from apr_core.falsify.finding import Finding
from apr_core.report.figures import plot
from apr_core.report.speed import plot_compiled
from apr_core.report.style import PAPER, alt_text, caption_of

VALUES = {
    "backend": "cpu speed",
    "decode_tok_s": 20.0,
    "prefill_tok_s": 200.0,
    "read_gb_s, best": 25.0,
    "bytes per token": 4e8,
    "operations per token": 1e9,
    "prompt": 32,
    "ms: head": 10.0,
    "ms: gate, up": 30.0,
}


def finding(**other: object) -> Finding:
    """Of F-THR-006."""
    rows = [{"quantity": name, "value": value} for name, value in {**VALUES, **other}.items()]
    arrays = {"context_tokens": np.array([128, 1024, 4000]), "context_s": np.array([0.05, 0.1, 0.0])}
    return Finding(0.0, 1, 1, rows=rows, arrays=arrays, claim="F-THR-006")


def test_roofline_split_and_context() -> None:
    """Decode below the slanted line by its share; the longest bar on top; a context without a time is left out."""
    figure = plot(finding())
    assert figure is not None
    roof, split, context = figure.axes
    decode = next(line for line in roof.lines if line.get_label() == "decode")
    assert (decode.get_xdata()[0], decode.get_ydata()[0]) == (pytest.approx(2.5), pytest.approx(20.0))
    line = roof.lines[0]
    assert np.allclose(line.get_ydata() / line.get_xdata(), 25.0)
    assert [tick.get_text() for tick in split.get_yticklabels()] == ["head", "gate, up"]
    assert list(context.lines[0].get_ydata()) == [pytest.approx(20.0), pytest.approx(10.0)]
    assert "decoding reaches 32% of the measured bandwidth" in alt_text(figure)
    assert caption_of(figure).startswith("Were the claim false")


def test_peers_stand_beside_the_candidate() -> None:
    """Each peer is a hollow point of its own rate, under its own name, in decode and in prefill."""
    rates = {"decode_tok_s of llama.cpp": 15.0, "prefill_tok_s of llama.cpp": 150.0}
    figure = plot(finding(**rates))
    assert figure is not None
    peers = {str(line.get_label()): line for line in figure.axes[0].lines if "llama.cpp" in str(line.get_label())}
    assert sorted(peers) == ["decode, llama.cpp", "prefill, llama.cpp"]
    assert peers["decode, llama.cpp"].get_ydata()[0] == pytest.approx(15.0)
    assert peers["prefill, llama.cpp"].get_ydata()[0] == pytest.approx(150.0)
    assert {line.get_markerfacecolor() for line in peers.values()} == {PAPER}


def test_nothing_timed_is_no_figure() -> None:
    """A refused subject has no rates; a rate of zero is none."""
    assert plot_compiled(Finding(None, 0, 0, claim="F-THR-006")) is None
    assert plot_compiled(finding(decode_tok_s=0.0)) is None

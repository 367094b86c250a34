"""Foreign opinions: who differs from whom, each by its own noise, and who is the odd one out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apr_core.engines.subject import obtain
from apr_core.errors import UsageError
from apr_core.falsify.verdict import Verdict
from apr_core.parity.opinions import OURS, Opinion, gather, hear


def opinion(name: str, shift: float = 0.0, noise: float = 1e-6) -> Opinion:
    """Distributions that are further off the larger the shift is."""
    x = np.random.default_rng(0).standard_normal((8, 20))
    return Opinion(name, x + shift * np.random.default_rng(len(name)).standard_normal(x.shape), noise, "made")


@pytest.mark.parametrize(
    ("others", "verdict", "odd"),
    [
        ((opinion("a"), opinion("b")), Verdict.CORROBORATED, ""),
        ((opinion("a", 0.1), opinion("b")), Verdict.INCONCLUSIVE, "a"),
        ((opinion("a", 0.1), opinion("bb", 0.1)), Verdict.INCONCLUSIVE, ""),
        ((opinion("a", 0.1, noise=0.1), opinion("b")), Verdict.CORROBORATED, ""),
        ((opinion("a"),), Verdict.INCONCLUSIVE, ""),
    ],
)
def test_the_odd_one_out(others: tuple[Opinion, ...], verdict: Verdict, odd: str) -> None:
    """One against two that agree; none where all differ; noise that is stated excuses; two opinions accuse nobody."""
    found = hear([opinion(OURS), *others])
    assert (found.verdict, found.odd) == (verdict, odd)


def test_ours_as_the_odd_one_out_is_refuted_and_nan_agrees_with_nobody() -> None:
    """Ours against two that agree is FALSIFIED; NaN and another length agree with nobody."""
    found = hear([opinion(OURS, 0.1), opinion("a"), opinion("b")])
    assert (found.verdict, found.odd) == (Verdict.FALSIFIED, OURS)
    assert "odd one out is torch" in found.reason
    bad = opinion(OURS)
    bad.log_p[3, 2] = np.nan
    assert hear([bad, opinion("a"), opinion("b")]).odd == OURS
    short = Opinion("short", opinion("a").log_p[:4], 1.0, "made")
    assert hear([opinion(OURS), opinion("a"), short]).odd == "short"


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "gguf/Q8_0.gguf"])
def test_implementations_of_others_agree_on_the_oracle(name: str, oracle: Path) -> None:
    """Both forwards with the saved answers and transformers in two precisions, or with llama.cpp."""
    pytest.importorskip("transformers", reason="NOT_RUN: no transformers")
    pytest.importorskip("xllamacpp", reason="NOT_RUN: no xllamacpp")
    subject = obtain(str(oracle / "mini" / name), device="cpu")
    opinions = gather(subject, ["llama.cpp" if name else "transformers"], 48)
    found = hear(opinions)
    assert (found.verdict, found.reason) == (Verdict.CORROBORATED, "")
    names = ["llama.cpp"] if name else ["saved", "transformers float64", "transformers float32"]
    assert [o.name for o in opinions][2:] == names


def test_an_unknown_peer_is_a_usage_error(pygmy: Path) -> None:
    """The peers that exist are named."""
    with pytest.raises(UsageError, match=r"transformers, llama\.cpp"):
        gather(obtain(str(pygmy), device="cpu"), ["ollama"])

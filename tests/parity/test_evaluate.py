"""The bundled text and how it is scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apr_core.engines.subject import obtain
from apr_core.parity import evaluate as module
from apr_core.parity.evaluate import FEWEST, evaluate, read_text


def test_the_bundled_text_is_long_enough_for_the_real_vocabulary(oracle: Path) -> None:
    """At least 2,000 tokens of Qwen2.5-Coder's own tokenizer, prose and code."""
    from tokenizers import Tokenizer

    text = read_text(None)
    assert len(Tokenizer.from_file(str(oracle / "qwen2.5-coder" / "tokenizer.json")).encode(text).ids) >= FEWEST == 2000
    assert "def gcd" in text
    assert "We hold these truths" in text


@pytest.mark.parametrize("tokens", [2, 511, 512, 513, 1000, 1537])
def test_every_token_but_the_first_is_scored_once(tokens: int) -> None:
    """Whatever the length; from the second window on with context before it."""
    scored: list[int] = []
    for begin, first, end in module._windows(4096, tokens):
        assert end - begin <= module.WINDOW
        assert first - begin >= (module.CONTEXT if begin else 1)
        scored += range(first, end)
    assert scored == list(range(1, tokens))


def test_perplexity_of_one_window_by_hand(pygmy: Path) -> None:
    """The exponential of the mean surprise, from the logits before each token."""
    subject = obtain(str(pygmy), device="cpu")
    assert subject.tokenizer is not None
    text = "def fib(n):\n    return n"
    ids = np.array(subject.tokenizer.encode(text))
    logits = subject.model.forward(ids)[:-1].astype(np.float64)
    surprise = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(ids) - 1), ids[1:]]
    found = evaluate(subject, text)
    assert found.perplexity == pytest.approx(np.exp(surprise.mean()))
    assert (found.tokens, found.scored, found.base) == (len(ids), len(ids) - 1, None)

"""
Perplexity of a model on a text, and its divergence from a base model on the same text.

The bundled text is in the public domain: the Declaration of Independence, the Gettysburg Address, openings of Carroll,
Austen, Dickens and Melville, and short programs in six languages that were written for this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apr_core.engines.subject import Subject
from apr_core.errors import InferenceError, LoadError, NotFound, UsageError
from apr_core.model.trace import TracedForward
from apr_core.parity.distribution import DistributionParity, bootstrap, compare_logits
from apr_core.parity.pair import incomparable
from apr_core.parity.tolerances import QUANTISED_TAU

TEXT = Path(__file__).with_name("text.txt")
FEWEST = 2000
"""Tokens that the bundled text has at least under a vocabulary of Qwen2's size."""
WINDOW = 512
# Tokens of each window that are read and not scored: without them the first tokens of a window have no context.
CONTEXT = 128


@dataclass(frozen=True, eq=False)
class Evaluation:
    """
    A model on a text.

    Attributes:
        perplexity: exp of the mean surprise at the scored tokens.
        interval: 95 % bootstrap interval of it.
        tokens: Tokens of the text.
        scored: Tokens that counted.
        base: The base model's distributions against this model's, or None without a base.
    """

    perplexity: float
    interval: tuple[float, float]
    tokens: int
    scored: int
    base: DistributionParity | None = None


def read_text(path: Path | None) -> str:
    """
    Read a text, or the bundled one.

    Raises:
        NotFound: There is no such file.
        UsageError: It is not UTF-8.
    """
    try:
        return (path or TEXT).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFound(f"there is no text {path}", advice="name a text file, or leave --text out") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 text: {error}", advice="convert it") from error


def evaluate(subject: Subject, text: str, base: Subject | None = None) -> Evaluation:
    """
    Score a text in windows of ``WINDOW`` tokens, each with ``CONTEXT`` tokens before what is scored.

    Args:
        subject: The model.
        text: What it reads.
        base: Another model of the same vocabulary, as reference of the divergence.

    Raises:
        LoadError: The model has no tokenizer.
        UsageError: The text is too short, or the base is of another vocabulary.
        InferenceError: Logits are not finite.
    """
    if subject.tokenizer is None:
        raise LoadError("this model came without a tokenizer, so it cannot read text", advice="add tokenizer.json")
    if base is not None and (why := incomparable(base, subject)):
        raise UsageError(why, advice="name a base of the same vocabulary")
    ids = np.array(subject.tokenizer.encode(text), np.int64)
    if ids.size < 2:
        raise UsageError(f"expected a text of at least 2 tokens, found {ids.size}", advice="name a longer text")
    room = min(side.model.config.max_position_embeddings for side in (subject, base) if side is not None)
    parts = [_score(subject.model, base.model if base else None, ids, w) for w in _windows(room, ids.size)]
    surprise = np.concatenate([part.nll[1] for part in parts])
    low, high = bootstrap(surprise)
    return Evaluation(
        perplexity=float(np.exp(surprise.mean())),
        interval=(float(np.exp(low)), float(np.exp(high))),
        tokens=ids.size,
        scored=surprise.size,
        base=joined(parts) if base else None,
    )


def joined(parts: list[DistributionParity]) -> DistributionParity:
    """Put the positions of several comparisons behind each other."""
    names = ("kl", "total_variation", "margin", "tau", "flipped", "top_k_overlap", "delta_p", "norm_difference")
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return DistributionParity(**columns, nll=np.concatenate([part.nll for part in parts], axis=1))


def _windows(room: int, tokens: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, first scored, end) of each window; every token but the first of the text is scored once."""
    size = min(WINDOW, room)
    begin, scored, end = 0, 1, min(size, tokens)
    while scored < end:
        yield begin, scored, end
        begin, scored, end = end - min(CONTEXT, size // 2), end, min(end - min(CONTEXT, size // 2) + size, tokens)


def _score(
    model: TracedForward, base: TracedForward | None, ids: NDArray[np.int64], window: tuple[int, int, int]
) -> DistributionParity:
    """Compare the distributions before each scored token; without a base the model is its own."""
    begin, scored, end = window
    rows = slice(scored - 1 - begin, end - 1 - begin)
    logits = model.forward(ids[begin:end])[rows]
    truth = logits if base is None else base.forward(ids[begin:end])[rows]
    if not (np.isfinite(logits).all() and np.isfinite(truth).all()):
        raise InferenceError(
            f"logits of tokens {begin} to {end} are not finite", advice="look for the first layer with NaN: apr trace"
        )
    return compare_logits(truth, logits, QUANTISED_TAU, tokens=ids[scored:end])

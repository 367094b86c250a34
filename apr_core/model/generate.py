"""
What a person does with a model: logits, a trace, a continuation. Works with every `TracedForward`.

Decoding, in this order, on the logits of the last position in float64:

1. Repetition penalty: the logit of every token that occurs in the prompt or the answer is divided by it when positive
   and multiplied by it when negative.
2. ``temperature`` 0 ends here: the largest logit, of equal ones the lowest id. Otherwise logits are divided by it.
3. ``top_k``: the k largest logits stay, of equal ones the lower ids.
4. ``top_p``: of those, the shortest run of the most probable whose probabilities (after step 3) sum to top_p or more.
5. One uniform double from a generator that is seeded once per generation picks among what is left.

Source: the order and the penalty are those of the Hugging Face logits processors; ties are decided by id here, so that
    a run can be repeated anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from apr_core.contract.gates import Violation, judge_generation
from apr_core.errors import InferenceError, UsageError
from apr_core.model.tokens import PreparedTokens
from apr_core.model.trace import Cache, Fingerprints, Trace, TracedForward, last_logits

PREFILL_TOKENS = 512  # positions per forward of a long prompt: bounds logits and attention scores in memory


def logits(model: TracedForward, prepared: PreparedTokens) -> NDArray[np.float32]:
    """
    Return the logits at every position, float32 [tokens, vocab_size].

    Raises:
        UsageError: ``prepared`` does not come from `prepare_tokens`.
        InferenceError: The model cannot take these ids.
    """
    return model.forward(_ids_of(prepared))


def trace(
    model: TracedForward, prepared: PreparedTokens, *, full: bool = False, positions: Sequence[int] | None = None
) -> Trace:
    """
    Trace one forward over ``prepared``; the last name is its logits.

    Args:
        model: Any backend.
        prepared: The prompt.
        full: Keep whole activations; without it `Fingerprints`, which are small enough to keep and to send.
        positions: Keep these only; None for all.

    Raises:
        UsageError, InferenceError: As `logits`.
    """
    recorded = Trace(positions) if full else Fingerprints(positions)
    model.forward(_ids_of(prepared), trace=recorded)
    return recorded


def follow(
    model: TracedForward,
    ids: NDArray[np.int64],
    prompt: int,
    *,
    start: int = 0,
    full: bool = False,
    positions: Sequence[int] | None = None,
) -> Trace:
    """
    Trace a teacher-forced run through the cache: ``prompt`` tokens at once, each further one as a cached step.

    Args:
        model: Any backend.
        ids: int64 [tokens]; what follows the prompt is fed whatever the model says.
        prompt: Tokens of the prefill; as many as there are for no step at all.
        start: Position of the first token: an offset reaches far positions at the cost of near ones.
        full: As `trace`.
        positions: As `trace`; they count from 0, the offset included.

    Raises:
        InferenceError: As `logits`.
    """
    kind = Trace if full else Fingerprints
    cache, parts = model.new_cache(start), []
    edges = [0, *range(prompt, ids.size + 1)]
    for first, last in pairwise(edges):
        parts.append(kind(positions, start + first))
        model.forward(ids[first:last], cache, parts[-1])
    return kind.joined(parts)


def prefill(model: TracedForward, prepared: PreparedTokens) -> tuple[Cache, NDArray[np.float32]]:
    """
    Run the prompt into a fresh cache; return the cache and the logits of the last position, float32 [vocab_size].

    Raises:
        UsageError, InferenceError: As `logits`.
    """
    ids = _ids_of(prepared)
    # Whole and at once, before anything is computed: a prompt that is too long must not fail after a minute.
    model.config.check_input(ids, 0)
    cache = model.new_cache()
    for start in range(0, ids.size, PREFILL_TOKENS):
        last = last_logits(model, ids[start : start + PREFILL_TOKENS], cache)
    return cache, last


def decode_step(model: TracedForward, cache: Cache, token: int) -> NDArray[np.float32]:
    """
    Append one token to ``cache`` and return the logits behind it, float32 [vocab_size].

    Raises:
        InferenceError: The token is outside the vocabulary, or the context is full.
    """
    scores = model.forward(np.array([token], dtype=np.int64), cache)
    last: NDArray[np.float32] = scores[0]
    return last


class Generation(Iterator[int]):
    """
    An answer in the making: iterate it for token ids, ``list(generation)`` runs it to its end.

    Attributes:
        ids: What was generated so far, an end token included.
        stopped: ``end`` (an end token), ``length`` (``max_new_tokens``, or the model's context is full), or None
            while it can go on.
        seed: What sampling was seeded with; drawn when none was given, so that every run can be repeated.
    """

    def __init__(self, model: TracedForward, prepared: PreparedTokens, limit: int, sampler: Sampler, seed: int) -> None:
        self.ids: list[int] = []
        self.stopped: Literal["end", "length"] | None = None if limit else "length"
        self.seed = seed
        self._model, self._prompt, self._limit, self._sampler = model, prepared, limit, sampler
        self._random = np.random.default_rng(seed)
        self._ends = ends_of(model)
        self._cache: Cache | None = None

    @property
    def text(self) -> str:
        """
        The answer so far as text, without control tokens.

        Raises:
            UsageError: The model came without a tokenizer.
        """
        if self._model.tokenizer is None:
            raise UsageError("this model came without a tokenizer, so its answer has no text", advice="read .ids")
        return self._model.tokenizer.decode(self.ids)

    @property
    def violations(self) -> list[Violation]:
        """What F-LAYOUT-CONTRACT-005 finds in the answer so far: repeated padding; an empty answer is no pass."""
        return judge_generation(self.ids, padding_of(self._model))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        if self.stopped is not None:
            raise StopIteration
        if self._cache is None:
            self._cache, scores = prefill(self._model, self._prompt)
        else:
            scores = decode_step(self._model, self._cache, self.ids[-1])
        _require_finite(scores, len(self.ids))
        seen = np.concatenate((self._prompt.ids, np.array(self.ids, dtype=np.int64)))
        token = self._sampler(scores, seen, self._random)
        self.ids.append(token)
        if token in self._ends:
            self.stopped = "end"
        elif len(self.ids) >= self._limit or self._cache.length >= self._model.config.max_position_embeddings:
            self.stopped = "length"
        return token


def generate(
    model: TracedForward,
    prepared: PreparedTokens,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> Generation:
    """
    Continue ``prepared`` token by token; greedy unless ``temperature`` is above 0 (the steps stand above).

    Args:
        model: Any backend.
        prepared: The prompt.
        max_new_tokens: At most so many; 0 is legal and computes nothing.
        temperature: 0 for the largest logit.
        top_k: Keep so many candidates.
        top_p: Keep candidates up to this probability.
        repetition_penalty: Above 1 discourages tokens that have occurred.
        seed: Of the sampling; None draws one (see ``Generation.seed``).

    Raises:
        UsageError: A parameter out of its range, or ``prepared`` not from `prepare_tokens`.
        InferenceError: While iterating: ids the model cannot take, or logits that are not finite.
    """
    _ids_of(prepared)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise UsageError(f"expected max_new_tokens of 0 or more, found {max_new_tokens!r}")
    sampler = Sampler(temperature, top_k, top_p, repetition_penalty)
    drawn = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
    if isinstance(drawn, bool) or not isinstance(drawn, int) or drawn < 0:
        raise UsageError(f"expected a seed of 0 or more, found {seed!r}")
    return Generation(model, prepared, max_new_tokens, sampler, drawn)


class Sampler:
    """Picks the next token from logits [vocab_size]; the steps stand at the top of this file."""

    def __init__(self, temperature: float, top_k: int | None, top_p: float | None, repetition_penalty: float) -> None:
        if not 0 <= temperature < math.inf:
            raise UsageError(f"expected a temperature of 0 or more, found {temperature}")
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise UsageError(f"expected top_k of 1 or more, found {top_k!r}", advice="leave it out to keep all")
        if top_p is not None and not 0 < top_p <= 1:
            raise UsageError(f"expected top_p above 0 and up to 1, found {top_p}", advice="leave it out to keep all")
        if not 0 < repetition_penalty < math.inf:
            raise UsageError(f"expected a repetition_penalty above 0, found {repetition_penalty}")
        self._temperature, self._top_k, self._top_p, self._penalty = temperature, top_k, top_p, repetition_penalty

    def __call__(self, scores: NDArray[np.float32], seen: NDArray[np.int64], random: np.random.Generator) -> int:
        """Return the next token id; ``seen`` are the ids so far."""
        penalised = scores.astype(np.float64)
        if self._penalty != 1.0:
            chosen = penalised[seen]  # read before anything is written: a token that occurs twice is penalised once
            penalised[seen] = np.where(chosen > 0, chosen / self._penalty, chosen * self._penalty)
        if self._temperature == 0:
            return int(penalised.argmax())
        # Shifted first, so that a tiny temperature sends all but the largest to minus infinity, never to NaN.
        with np.errstate(over="ignore"):
            scaled = (penalised - penalised.max()) / self._temperature
        order = np.argsort(-scaled, kind="stable")[: self._top_k]
        weights = np.exp(scaled[order])
        cumulative = np.cumsum(weights / weights.sum())
        if self._top_p is not None:
            kept = int(np.searchsorted(cumulative, self._top_p)) + 1
            cumulative = cumulative[:kept]
        # Scaled by the last sum, and at most the last index: rounding must not pick behind the end.
        at = int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
        return int(order[min(at, cumulative.size - 1)])


def ends_of(model: TracedForward) -> frozenset[int]:
    """Return the end tokens: the union of what the configuration and the tokenizer's files name."""
    named = model.tokenizer.eos_ids if model.tokenizer is not None else frozenset()
    return frozenset(model.config.eos_token_ids) | named


def padding_of(model: TracedForward) -> frozenset[int]:
    """Return the ids that stand for no text: the padding token, and rows of the vocabulary behind the last token."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return frozenset()
    named = tokenizer.special_ids.get(tokenizer.template_variables.get("pad_token", ""))
    return frozenset(range(tokenizer.vocab_size, model.config.vocab_size)) | ({named} if named is not None else set())


def _ids_of(prepared: PreparedTokens) -> NDArray[np.int64]:
    if not isinstance(prepared, PreparedTokens):
        raise UsageError(
            f"expected PreparedTokens, found {type(prepared).__name__}", advice="call prepare_tokens(model, ...) first"
        )
    return prepared.ids


def _require_finite(scores: NDArray[np.float32], step: int) -> None:
    """Refuse to pick a token from NaN: argmax would answer with token 0, and text full of ``!`` looks like a model."""
    bad = int(scores.size - np.isfinite(scores).sum())
    if bad:
        raise InferenceError(
            f"{bad} of {scores.size} logits are not finite at generated token {step}",
            advice="look for the first layer with such values: trace(model, prepared)",
        )

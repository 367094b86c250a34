"""Decoding: greedy, sampled, stopped; with every backend."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_core.engines.load import load_model
from apr_core.engines.wrap import At, wrap
from apr_core.errors import InferenceError, UsageError
from apr_core.model import generate as module
from apr_core.model.generate import (
    Generation,
    Sampler,
    decode_step,
    ends_of,
    generate,
    logits,
    padding_of,
    prefill,
    trace,
)
from apr_core.model.tokens import PreparedTokens, prepare_tokens
from apr_core.model.trace import mandatory_names

from .conftest import write_tiny

IDS = [5, 300, 17, 17, 260, 9, 44]


class Scripted:
    """A model whose logits are written down: after position n it prefers ``script[n]``."""

    backend, device, tokenizer = "scripted", "cpu", None

    def __init__(self, script: list[int], *, ends: tuple[int, ...] = (), window: int = 50) -> None:
        from apr_core.model.config import Qwen2Config
        from tests.model.conftest import tiny_config

        changes = {"vocab_size": 8, "max_position_embeddings": window, "eos_token_id": list(ends)}
        self.config = Qwen2Config.from_mapping(tiny_config(**changes))
        self.script, self.calls, self.bad = script, list[int](), np.nan

    def new_cache(self) -> Any:
        return SimpleNamespace(length=0)

    def forward(self, ids: np.ndarray, cache: Any = None, trace: object = None) -> np.ndarray:
        cache = cache or self.new_cache()
        ids = self.config.check_input(ids, cache.length)
        self.calls.append(len(ids))
        out = np.zeros((len(ids), 8), np.float32)
        for row in range(len(ids)):
            token = self.script[cache.length + row]
            out[row, abs(token)] = 1.0 if token >= 0 else self.bad
        cache.length += len(ids)
        return out


def run(model: Any, ids: list[int], **options: Any) -> Generation:
    """Generate to the end."""
    answer = generate(model, prepare_tokens(model, ids=ids), **options)
    list(answer)
    return answer


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    """The tiny model with its tokenizer."""
    return load_model(tiny)


def test_logits_trace_prefill_and_steps_agree(model: Any) -> None:
    """Four ways to the same numbers."""
    prepared = prepare_tokens(model, ids=IDS)
    whole = logits(model, prepared)
    recorded = trace(model, prepared, full=True)
    assert tuple(recorded) == mandatory_names(2)
    assert np.array_equal(recorded["logits"], whole)
    cache, last = prefill(model, prepare_tokens(model, ids=IDS[:-1]))
    np.testing.assert_allclose(last, whole[-2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(decode_step(model, cache, IDS[-1]), whole[-1], rtol=1e-4, atol=1e-4)
    assert cache.length == len(IDS)


def test_a_long_prompt_goes_in_by_pieces(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for logits is bounded, the answer is not changed."""
    prepared = prepare_tokens(model, ids=IDS)
    _, whole = prefill(model, prepared)
    monkeypatch.setattr(module, "PREFILL_TOKENS", 3)
    cache, last = prefill(model, prepared)
    np.testing.assert_allclose(last, whole, rtol=1e-4, atol=1e-4)
    assert cache.length == len(IDS)
    scripted: Any = Scripted([0] * 9)
    prefill(scripted, prepare_tokens(scripted, ids=[1] * 7))
    assert scripted.calls == [3, 3, 1]


def test_greedy_is_the_argmax_at_each_step(model: Any) -> None:
    """Each token is the argmax of a full prefill of everything before it."""
    answer = run(model, IDS, max_new_tokens=12)
    for n, token in enumerate(answer.ids):
        assert token == int(logits(model, prepare_tokens(model, ids=IDS + answer.ids[:n]))[-1].argmax())
    assert len(answer.ids) == 12 or answer.stopped == "end"


def test_stops_at_an_end_token_and_keeps_it() -> None:
    """The end token is the last id; a model that is asked again stays silent."""
    model: Any = Scripted([0, 0, 3, 4, 5, 6], ends=(5, 7))
    answer = run(model, [1, 1, 1], max_new_tokens=9)
    assert (answer.ids, answer.stopped) == ([3, 4, 5], "end")
    assert list(answer) == []
    assert model.calls == [3, 1, 1]


def test_stops_at_the_length() -> None:
    """Not one forward more than needed; zero tokens need none."""
    model: Any = Scripted([2] * 9)
    answer = run(model, [1], max_new_tokens=2)
    assert (answer.ids, answer.stopped, model.calls) == ([2, 2], "length", [1, 1])
    nothing = run(model, [1], max_new_tokens=0)
    assert (nothing.ids, nothing.stopped, len(model.calls)) == ([], "length", 2)


def test_stops_when_the_context_is_full() -> None:
    """The last position is used; then the answer ends instead of failing."""
    model: Any = Scripted([2] * 9, window=5)
    answer = run(model, [1, 1, 1], max_new_tokens=9)
    assert (answer.ids, answer.stopped) == ([2, 2, 2], "length")
    with pytest.raises(InferenceError, match="at most 5 positions"):
        run(model, [1] * 6, max_new_tokens=1)


def test_ends_are_the_union_of_config_and_tokenizer(model: Any) -> None:
    """config.json names 317; generation_config.json names 315 too."""
    assert ends_of(model) == {315, 317}


@pytest.mark.parametrize(
    ("ids", "measured"),
    [([321, 5, 330], []), ([5, 321, 330, 7], [2.0]), ([330] * 9, [9.0]), ([315, 315, 4], [2.0]), ([], [None])],
)
def test_repeated_padding_is_a_violation(tmp_path: Path, ids: list[int], measured: list[float | None]) -> None:
    """Rows behind the last token and the padding token: one alone is legal, a run is not, and silence is no pass."""
    folder = write_tiny(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<|endoftext|>"}))
    model = load_model(folder)
    assert padding_of(model) == {315, *range(321, 331)}
    answer = generate(model, prepare_tokens(model, ids=IDS), max_new_tokens=0)
    answer.ids += ids
    assert [(v.gate, v.measured) for v in answer.violations] == [("F-LAYOUT-CONTRACT-005", m) for m in measured]
    scripted: Any = Scripted([2] * 9)
    assert padding_of(scripted) == frozenset()


def test_a_head_that_prefers_reserved_rows_is_seen(tmp_path: Path) -> None:
    """The GH-202 symptom planted in the backend: the rows behind the last token win every argmax."""

    def prefer(name: str, values: np.ndarray, at: At) -> np.ndarray | None:
        return None if name != "logits" else np.where(np.arange(331) >= 321, values + 1e3, values)

    model = load_model(write_tiny(tmp_path))
    answers = [run(m, IDS, max_new_tokens=6) for m in (wrap(model, prefer), model)]
    assert [[v.measured for v in answer.violations] for answer in answers] == [[6.0], []]


def test_text_leaves_control_tokens_out(model: Any) -> None:
    """The answer as a person reads it."""
    answer = generate(model, prepare_tokens(model, ids=IDS), max_new_tokens=0)
    answer.ids += [*model.tokenizer.encode("hello"), 317]
    assert answer.text == "hello"
    scripted: Any = Scripted([2] * 9)
    with pytest.raises(UsageError, match="without a tokenizer"):
        _ = run(scripted, [1], max_new_tokens=1).text


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    """The argmax of NaN would be token 0, and text full of one token looks like a model."""
    model: Any = Scripted([0, 2, -1, 0])
    model.bad = bad
    with pytest.raises(InferenceError, match="1 of 8 logits are not finite at generated token 1"):
        run(model, [1, 1], max_new_tokens=5)


def test_only_prepared_tokens_go_in(model: Any) -> None:
    """Ids, text and arrays are refused with the way to go."""
    for thing in ([1, 2], "hello", np.array([1]), None):
        for action in (logits, trace, prefill, lambda m, p: generate(m, p, max_new_tokens=1)):
            with pytest.raises(UsageError, match="call prepare_tokens"):
                action(model, thing)  # type: ignore[arg-type]
    with pytest.raises(InferenceError, match="non-empty"):
        logits(model, prepare_tokens(model, ids=[]))
    assert isinstance(prepare_tokens(model, ids=IDS), PreparedTokens)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("max_new_tokens", [-1, True, 1.5]),
        ("temperature", [-0.1, float("nan"), float("inf")]),
        ("top_k", [0, -1, True, 2.0]),
        ("top_p", [0, 1.01, float("nan")]),
        ("repetition_penalty", [0, -1, float("nan"), float("inf")]),
        ("seed", [-1, 1.5, True]),
    ],
)
def test_options_out_of_range(model: Any, option: str, values: list[Any]) -> None:
    """Each is named; NaN passes no comparison."""
    prepared = prepare_tokens(model, ids=IDS)
    for value in values:
        with pytest.raises(UsageError, match=option):
            generate(model, prepared, **{"max_new_tokens": 1, option: value})


def test_a_seed_repeats_a_run_and_a_drawn_one_is_told(model: Any) -> None:
    """Same seed, same tokens; another seed, other tokens; without a seed the run can be repeated by what it says."""
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 3.0}
    one, again, other = (run(model, IDS, seed=seed, **options).ids for seed in (1, 1, 2))
    assert one == again != other
    drawn = run(model, IDS, **options)
    assert run(model, IDS, seed=drawn.seed, **options).ids == drawn.ids


SCORES = np.array([1.0, 3.0, 3.0, -2.0, 0.5], np.float32)
NONE_SEEN = np.array([], np.int64)


def draws(sampler: Sampler, count: int = 400, seen: np.ndarray = NONE_SEEN) -> np.ndarray:
    """Return how often each token is drawn."""
    random = np.random.default_rng(0)
    return np.bincount([sampler(SCORES, seen, random) for _ in range(count)], minlength=5)


def test_temperature_zero_takes_the_lowest_of_equal_logits() -> None:
    """A tie is decided by id, everywhere alike."""
    assert draws(Sampler(0.0, None, None, 1.0), 3).tolist() == [0, 3, 0, 0, 0]


def test_top_k_keeps_exactly_k() -> None:
    """Of equal logits the lower ids stay; k beyond the vocabulary keeps all."""
    assert np.flatnonzero(draws(Sampler(1.0, 1, None, 1.0))).tolist() == [1]
    assert np.flatnonzero(draws(Sampler(1.0, 3, None, 1.0))).tolist() == [0, 1, 2]
    assert (draws(Sampler(9.0, 99, None, 1.0)) > 0).all()


def test_top_p_keeps_the_shortest_run_that_reaches_p() -> None:
    """The two 3.0 hold 0.84 of the probability: 0.4 needs one of them, 0.8 both, 0.9 one more; tiny p keeps one."""
    kept = [np.flatnonzero(draws(Sampler(1.0, None, p, 1.0))).tolist() for p in (1e-9, 0.4, 0.8, 0.9)]
    assert kept == [[1], [1], [1, 2], [0, 1, 2]]


def test_top_p_counts_what_top_k_left() -> None:
    """Probabilities are taken anew after top_k: with two left, each holds half."""
    assert np.flatnonzero(draws(Sampler(1.0, 2, 0.5, 1.0))).tolist() == [1]
    assert np.flatnonzero(draws(Sampler(1.0, 2, 0.51, 1.0))).tolist() == [1, 2]


def test_frequencies_follow_the_softmax() -> None:
    """Chi-square of 20000 draws at temperature 2 against the exact probabilities (critical value at 1e-6: 33)."""
    weights = np.exp(SCORES.astype(float) / 2)
    expected = weights / weights.sum() * 20000
    found = draws(Sampler(2.0, None, None, 1.0), 20000)
    assert ((found - expected) ** 2 / expected).sum() < 33


def test_the_repetition_penalty_is_the_papers() -> None:
    """Positive logits are divided, negative multiplied, once however often a token occurred; unseen stay."""
    sampler = Sampler(0.0, None, None, 4.0)
    random = np.random.default_rng(0)
    assert sampler(SCORES, np.array([1, 1, 2]), random) == 0  # 0.75, 0.75 lose against 1.0
    assert sampler(SCORES, np.array([1]), random) == 2
    negative = Sampler(0.0, None, None, 2.0)
    assert negative(np.array([-1.0, -1.5, -9.0], np.float32), np.array([0]), random) == 1  # -2 loses against -1.5
    assert SCORES.tolist() == [1.0, 3.0, 3.0, -2.0, 0.5]


def test_a_penalty_keeps_a_model_from_repeating_itself() -> None:
    """Through generate: the prompt counts as seen."""
    model: Any = Scripted([1] * 9)
    assert run(model, [1], max_new_tokens=2, repetition_penalty=1.0).ids == [1, 1]
    answer = run(model, [1], max_new_tokens=1, temperature=1e-9, repetition_penalty=2.0, seed=0)
    assert answer.ids == [1]  # 0.5 is still the largest


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=30),
    st.floats(0, 1e6),
    st.none() | st.integers(1, 40),
    st.none() | st.floats(1e-12, 1),
    st.floats(1e-3, 1e3),
    st.integers(0, 2**32),
)
def test_the_sampler_is_total(
    scores: list[float], temperature: float, top_k: int | None, top_p: float | None, penalty: float, seed: int
) -> None:
    """For any finite logits and legal options it returns a token, one of the top k."""
    array = np.array(scores, np.float32)
    token = Sampler(temperature, top_k, top_p, penalty)(array, np.array([0]), np.random.default_rng(seed))
    assert 0 <= token < len(scores)
    if penalty == 1.0 and top_k is not None:
        assert (array > array[token]).sum() < top_k

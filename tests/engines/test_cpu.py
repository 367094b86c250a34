"""The CPU engine against the reference: both precisions, both paths, any threads, odd shapes."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from apr_core.contract.admit import admit
from apr_core.engines import cpu_weights
from apr_core.engines.cpu import CpuQwen2
from apr_core.engines.load import load_model
from apr_core.engines.team import Team
from apr_core.errors import InferenceError, LoadError, UsageError
from apr_core.kernels.cpu import features, step
from apr_core.kernels.cpu.features import available_paths
from apr_core.model.generate import generate
from apr_core.model.qwen2 import Qwen2
from apr_core.model.synth import synthesise
from apr_core.model.tokens import prepare_tokens
from apr_core.model.trace import Trace, mandatory_names

LIMITS = {"exact": 1e-5, "speed": 6e-2}


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    wide = expected.astype(np.float64)
    return float(np.linalg.norm(found.astype(np.float64) - wide) / np.linalg.norm(wide))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained models of the bundled one's shape: two float types, a quantised one, and the types of Q4_K_M."""
    folder = tmp_path_factory.mktemp("models")
    made = {"f32": "f32", "bf16": "bf16", "q8_0": "q8_0", "mixed": "q4_k_m"}
    for kind, dtype in made.items():
        synthesise("pygmy", format="gguf", dtype=dtype, tokenizer=None, seed=3, out=folder / f"{kind}.gguf")
    return {kind: folder / f"{kind}.gguf" for kind in made}


@pytest.mark.parametrize("precision", ["exact", "speed"])
@pytest.mark.parametrize("path", available_paths())
@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0", "mixed"])
def test_logits_and_trace_follow_the_reference(models: dict[str, Path], kind: str, path: str, precision: str) -> None:
    """Every mandatory name, of a prompt with a rest behind its tiles; the trace leaves the logits' bits alone."""
    validated = admit(models[kind]).require()
    reference, engine = Qwen2(validated), CpuQwen2(validated, precision, path=path, threads=1)
    ids = np.random.default_rng(0).integers(0, reference.config.vocab_size, 21)
    expected, found = Trace(), Trace()
    reference.forward(ids, trace=expected)
    logits = engine.forward(ids, trace=found)
    assert tuple(found) == mandatory_names(reference.config.num_hidden_layers)
    limit = LIMITS["exact" if kind == "f32" else precision]
    assert {name: value for name in found if not (value := _distance(found[name], expected[name])) <= limit} == {}
    np.testing.assert_array_equal(engine.forward(ids), logits)
    assert engine.backend == f"cpu {precision} ({path})"
    assert engine.device == "cpu"


@pytest.mark.parametrize("kind", ["f32", "mixed"])
def test_a_cached_run_equals_the_reference(models: dict[str, Path], kind: str) -> None:
    """Prefill, then steps, then several tokens on top; across the edge of a panel of positions and of the cache."""
    validated = admit(models[kind]).require()
    reference, engine = Qwen2(validated), CpuQwen2(validated, "exact", threads=1)
    ids = np.random.default_rng(1).integers(0, reference.config.vocab_size, 40)
    expected = reference.forward(ids)
    cache = engine.new_cache()
    parts = [engine.forward(ids[:14], cache), *(engine.forward(ids[i : i + 1], cache) for i in range(14, 33))]
    parts.append(engine.forward(ids[33:], cache))
    assert cache.length == 40
    assert _distance(np.concatenate(parts), expected) <= 1e-5


def test_a_cache_grows_and_may_begin_anywhere(models: dict[str, Path]) -> None:
    """More positions than its first piece, cut into chunks; and an offset reaches far positions."""
    validated = admit(models["mixed"]).require()
    reference, engine = Qwen2(validated), CpuQwen2(validated, "exact", threads=1)
    ids = np.random.default_rng(2).integers(0, reference.config.vocab_size, 530)
    assert _distance(engine.forward(ids), reference.forward(ids)) <= 1e-5
    cache, other = engine.new_cache(200), reference.new_cache(200)
    assert _distance(engine.forward(ids[:9], cache), reference.forward(ids[:9], other)) <= 1e-5
    assert cache.length == 209


@pytest.mark.parametrize("kind", ["bf16", "mixed"])
def test_threads_do_not_change_bits(models: dict[str, Path], kind: str) -> None:
    """Rows, heads and panels are shared, sums are not."""
    cores = features.available_cores()
    if cores < 2:
        pytest.skip("NOT_RUN: one core")
    engine = CpuQwen2(admit(models[kind]).require(), "speed", threads=1)
    ids = np.random.default_rng(3).integers(0, engine.config.vocab_size, 19)
    alone, step = engine.forward(ids), engine.forward(ids[:1])
    engine.use_threads(2)
    engine.spins = 1  # so that barriers give way
    np.testing.assert_array_equal(engine.forward(ids), alone)
    np.testing.assert_array_equal(engine.forward(ids[:1]), step)
    assert engine.threads == 2


@pytest.mark.parametrize("kind", ["f32", "bf16", "mixed"])
def test_the_cut_of_a_prompt_does_not_change_bits(models: dict[str, Path], kind: str) -> None:
    """Tokens meet in eights and queries in fours, wherever a part begins."""
    engine = CpuQwen2(admit(models[kind]).require(), "speed", threads=1)
    ids, cache = np.random.default_rng(5).integers(0, engine.config.vocab_size, 41), engine.new_cache()
    parts = [engine.forward(ids[first:stop], cache) for first, stop in ((0, 13), (13, 15), (15, 38), (38, 41))]
    np.testing.assert_array_equal(np.concatenate(parts), engine.forward(ids))


@pytest.mark.parametrize("path", available_paths())
def test_a_prompt_in_bf16_is_rounded_in_speed_alone(models: dict[str, Path], path: str) -> None:
    """Its activations are, as llama.cpp's; a step's are not, nor those of `exact`; both paths round alike."""
    validated = admit(models["bf16"]).require()
    reference, ids = Qwen2(validated), np.random.default_rng(6).integers(0, 1000, 16)
    speed, exact = (CpuQwen2(validated, precision, path=path, threads=1) for precision in ("speed", "exact"))
    expected = reference.forward(ids)
    assert 1e-4 < _distance(speed.forward(ids), expected) < LIMITS["speed"]
    assert _distance(exact.forward(ids), expected) < LIMITS["exact"]
    np.testing.assert_array_equal(speed.forward(ids[:1]), exact.forward(ids[:1]))


def test_the_last_logits_alone(models: dict[str, Path]) -> None:
    """What a prefill is for; the cache holds the whole prompt."""
    engine = CpuQwen2(admit(models["q8_0"]).require(), "exact", threads=1)
    ids = np.random.default_rng(4).integers(0, engine.config.vocab_size, 23)
    cache = engine.new_cache()
    assert _distance(engine.forward_last(ids, cache), engine.forward(ids)[-1]) <= 1e-5
    assert cache.length == 23
    with pytest.raises(InferenceError, match="non-empty"):
        engine.forward_last(ids[:0])


def test_pygmy_answers_as_the_reference_does(pygmy: Path) -> None:
    """Greedy tokens through `generate`, which does not know which engine it holds."""
    answers = []
    for precision in ("reference", "exact", "speed"):
        model = load_model(pygmy, precision=precision)
        prepared = prepare_tokens(model, messages=[{"role": "user", "content": "Which way is north?"}])
        answers.append(list(generate(model, prepared, max_new_tokens=12)))
    assert answers[1] == answers[0]
    assert answers[2] == answers[0]


def test_a_nan_reaches_no_token_before_it(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries are met in fours; what a later one sees must not be multiplied by zero for an earlier one."""
    engine = CpuQwen2(admit(models["f32"]).require(), "exact", threads=1)
    right, ids = engine.weights.embed, np.arange(1, 8)
    expected = engine.forward(ids)

    def embed(ids: np.ndarray) -> np.ndarray:
        found = right(ids)
        found[5] = np.nan
        return found

    monkeypatch.setattr(engine.weights, "embed", embed)
    found = engine.forward(ids)
    np.testing.assert_array_equal(found[:5], expected[:5])
    assert np.isnan(found[5:]).all()


def test_nothing_is_written_behind_the_last_token(models: dict[str, Path]) -> None:
    """Three tokens of two heads per group make six queries, and two fours."""
    engine = CpuQwen2(admit(models["f32"]).require(), "exact", threads=1)
    assert engine.config.num_attention_heads == 2 * engine.config.num_key_value_heads
    engine.forward(np.arange(3))
    mixed = engine._buffers[step.MIXED]
    assert len(mixed) == 8
    assert mixed[:3].any(axis=1).all()
    assert not mixed[3:].any()


def test_a_nan_reaches_the_logits(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight-bit activations cannot hold one, so their scale must."""
    engine = CpuQwen2(admit(models["q8_0"]).require(), "speed", threads=1)
    right = engine.weights.embed
    monkeypatch.setattr(engine.weights, "embed", lambda ids: right(ids) * np.float32(np.nan))
    assert np.isnan(engine.forward(np.array([1, 2]))).all()
    assert np.isnan(engine.forward(np.array([1]))).all()


def test_time_is_split_into_phases(models: dict[str, Path]) -> None:
    """What thread 0 did adds up to no more than the clock around it, and is counted once."""
    engine = CpuQwen2(admit(models["mixed"]).require(), "speed", threads=1)
    engine.forward(np.array([1]))
    engine.seconds_by_phase()
    start = time.perf_counter()
    engine.forward(np.arange(1, 20))
    wall = time.perf_counter() - start
    spent = engine.seconds_by_phase()
    assert all(seconds > 0 for seconds in spent.values())
    assert 0.05 * wall < sum(spent.values()) <= wall
    assert sum(engine.seconds_by_phase().values()) == 0
    assert engine.bytes_per_token == engine.weights.nbytes


def test_more_threads_than_cores_are_refused() -> None:
    """They would wait for each other at every barrier."""
    cores = features.available_cores()
    for wrong in (0, cores + 1, True, "2"):
        with pytest.raises(UsageError, match=f"expected 1 to {cores} threads"):
            Team(wrong)  # type: ignore[arg-type]


def test_a_model_beyond_the_memory_is_refused_before_any_work(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is needed and what is there."""
    validated = admit(models["f32"]).require()
    monkeypatch.setattr(cpu_weights, "available_memory", lambda: 100_000_000)
    monkeypatch.setattr(cpu_weights, "panels", lambda tensor: pytest.fail("work began"))
    with pytest.raises(LoadError, match=r"expected 0\.3 GB of free memory for .*, found 0\.1 GB"):
        CpuQwen2(validated, "speed")


def test_unknown_memory_is_no_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A system that does not say how much is free is trusted."""
    assert cpu_weights.available_memory()
    (tmp_path / "meminfo").write_text("MemTotal: 1 kB\n")
    for file in ("meminfo", "absent"):
        monkeypatch.setattr(cpu_weights, "Path", lambda _, file=file: tmp_path / file)
        assert cpu_weights.available_memory() is None
    cpu_weights.require_memory(10**18, "x")


def test_a_type_without_a_kernel_is_widened_and_named(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The profile must be able to say why a model is slow."""
    known = {name: layout for name, layout in cpu_weights.LAYOUTS.items() if name != "Q8_0"}
    monkeypatch.setattr(cpu_weights, "LAYOUTS", known)
    validated = admit(models["q8_0"]).require()
    engine = CpuQwen2(validated, "speed", threads=1)
    assert len(engine.weights.fallbacks) == 7 * engine.config.num_hidden_layers + 1
    assert set(engine.weights.types.values()) == {"F32"}
    ids = np.arange(1, 12)
    assert _distance(engine.forward(ids), Qwen2(validated).forward(ids)) <= LIMITS["exact"]


def test_panels_lie_together_and_the_file_is_let_go(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One allocation has huge pages, hundreds have not; and the file's pages do not stay beside their copy."""
    released: list[str] = []
    monkeypatch.setattr("apr_core.formats.checkpoint.Checkpoint.release", lambda _, name: released.append(name))
    validated = admit(models["mixed"]).require()
    weights = cpu_weights.CpuWeights(validated, 1)
    assert sorted(released) == sorted(weights.types)
    starts = sorted([*weights.matrices[..., step.ADDRESS].ravel().tolist(), int(weights.head[step.ADDRESS])])
    assert all(start % 64 == 0 for start in starts)
    assert starts[-1] - starts[0] < weights.nbytes + 64 * len(starts), "further apart than their own bytes"


@pytest.mark.parametrize("shape", ["tiny", "untied"])
def test_odd_shapes(shape: str, request: pytest.FixtureRequest) -> None:
    """Sizes that fill neither blocks nor panels, and a head of its own."""
    validated = admit(request.getfixturevalue(shape)).require()
    reference, engine = Qwen2(validated), CpuQwen2(validated, "speed", threads=1)
    ids = np.random.default_rng(5).integers(0, reference.config.vocab_size, 13)
    cache = engine.new_cache()
    found = np.concatenate(
        [engine.forward(ids[:9], cache), *(engine.forward(ids[i : i + 1], cache) for i in range(9, 13))]
    )
    assert _distance(found, reference.forward(ids)) <= LIMITS["exact"]


def test_the_first_compilation_is_announced(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It takes a while and happens once: whoever listens hears of it before it begins."""
    heard: list[str] = []
    monkeypatch.setattr("apr_core.engines.cpu.cache_folder", lambda: tmp_path / "absent")
    monkeypatch.setattr(features, "listeners", [heard.append])
    CpuQwen2(admit(models["f32"]).require(), "exact", threads=1)
    assert len(heard) == 1
    assert "once per machine" in heard[0]


def test_a_team_ends_with_its_owner() -> None:
    """Threads that outlive every model would add up."""
    numbers: list[int] = []
    before = threading.active_count()
    team = Team(min(2, features.available_cores()))
    team.run(numbers.append)
    assert sorted(numbers) == list(range(team.size))
    del team
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before

"""The engine for a CUDA device, in Triton's interpreter: arithmetic, bookkeeping, and what it refuses."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apr_core.contract.admit import admit
from apr_core.contract.layout import Geometry
from apr_core.contract.types import ValidatedModel
from apr_core.engines import gpu, gpu_weights
from apr_core.engines.load import engine_for
from apr_core.engines.streaming import MB, USABLE, Plan
from apr_core.errors import InferenceError, LoadError, Unavailable
from apr_core.kernels import gpu as kernels
from apr_core.kernels.gpu.planes import PLANES
from apr_core.model.qwen2 import Qwen2
from apr_core.model.synth import SHAPES, Shape, synthesise
from apr_core.model.trace import Trace, mandatory_names
from tests.model.conftest import write_tiny

pytestmark = pytest.mark.skipif(not kernels.has_triton(), reason="NOT_RUN: triton is not installed")

# A tracer takes several times as long as the interpreter; `test_a_step_is_five_kernels_per_layer` runs the same lines.
interpreted = pytest.mark.no_cover

VOCAB = 70
SHAPE = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCAB, "eos_token_id": 3, "bos_token_id": 2}
LIMITS = {"exact": 1e-5, "speed": 6e-2}
IDS = np.random.default_rng(0).integers(0, VOCAB, 9)


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    wide = expected.astype(np.float64)
    return float(np.linalg.norm(found.astype(np.float64) - wide) / np.linalg.norm(wide))


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> ValidatedModel:
    """Two layers, heads of 32, a hidden size that is no multiple of 128."""
    folder = write_tiny(tmp_path_factory.mktemp("tiny"), tokenizer=False, **SHAPE)
    return admit(folder).require()


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> ValidatedModel:
    """The same with one layer: a step takes time in the interpreter."""
    folder = write_tiny(tmp_path_factory.mktemp("shallow"), tokenizer=False, num_hidden_layers=1, **SHAPE)
    return admit(folder).require()


@pytest.fixture(autouse=True)
def _small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of attention that hold nothing take time as well, in the interpreter."""
    monkeypatch.setattr(gpu, "_SMALLEST", 16)


@pytest.fixture(scope="module")
def reference(validated: ValidatedModel) -> Qwen2:
    """What everything is compared with."""
    return Qwen2(validated)


def _engine(validated: ValidatedModel, precision: str = "exact", **options: Any) -> gpu.GpuQwen2:
    return gpu.GpuQwen2(validated, precision, device="cpu", **options)


@interpreted
@pytest.mark.parametrize("precision", ["exact", "speed"])
def test_prompts_and_steps_follow_the_reference(validated: ValidatedModel, reference: Qwen2, precision: str) -> None:
    """A prompt, a step, tokens on top; every mandatory name; and the trace leaves the logits' bits alone."""
    engine, limit = _engine(validated, precision), LIMITS[precision]
    cache, other = engine.new_cache(), reference.new_cache()
    for part in (IDS[:3], IDS[3:4], IDS[4:6]):
        found, expected = Trace(), Trace()
        before = cache.held
        logits = engine.forward(part, cache, found)
        want = reference.forward(part, other, expected)
        assert tuple(found) == mandatory_names(2)
        assert {name for name in found if not _distance(found[name], expected[name]) <= limit} == set()
        assert _distance(logits, want) <= limit
        cache.length = cache.start + before
        np.testing.assert_array_equal(engine.forward(part, cache), logits)
    assert cache.length == other.length == 6
    assert engine.backend == f"gpu {precision}"


@interpreted
@pytest.mark.parametrize("dtype", ["q4_k_m", "q8_0", "bf16"])
def test_stored_types_follow_the_reference(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a recipe mixes in one file, in the one layer that all of it goes through."""
    monkeypatch.setitem(SHAPES, "small", Shape(Geometry(256, 256, 1, 4, 2, 64, 96, tied=True), 128, 80, 3))
    synthesise("small", format="gguf", dtype=dtype, tokenizer=None, seed=3, out=tmp_path / "m.gguf")
    model = admit(tmp_path / "m.gguf").require()
    engine, reference = _engine(model), Qwen2(model)
    found, expected = engine.forward(IDS[:1]), reference.forward(IDS[:1])
    assert _distance(found, expected) <= LIMITS["exact"]
    assert engine.bytes_per_token == sum(
        PLANES[t.raw.info.dtype.name].nbytes(*t.shape) for t in model.tensors.values() if len(t.shape) == 2
    )


@interpreted
def test_a_head_of_its_own_and_no_biases(tmp_path: Path) -> None:
    """The table is packed beside the head; the last logits alone are those of the whole."""
    folder = write_tiny(tmp_path, tokenizer=False, tie_word_embeddings=False, **SHAPE)
    model = admit(folder).require()
    engine, reference = _engine(model, "speed"), Qwen2(model)
    expected = reference.forward(IDS)
    assert _distance(engine.forward_last(IDS), expected[-1]) <= LIMITS["speed"]
    assert _distance(engine.forward(IDS[:1]), expected[:1]) <= LIMITS["speed"]
    with pytest.raises(InferenceError, match="non-empty"):
        engine.forward_last(IDS[:0])


class Recorder:
    """A device that captures and replays nothing but counts both."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, work: gpu.Work) -> gpu.Work:
        """Run the work as a warm-up does, and return what counts its replays."""
        self.captures += 1
        work()

        def replay() -> None:
            self.replays += 1
            work()

        return replay


@interpreted
def test_one_graph_per_memory_of_a_cache(shallow: ValidatedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured once, replayed per step, inherited by the next cache, made anew where the cache outgrows its memory."""
    monkeypatch.setattr(gpu, "_SMALLEST", 2)
    device, reference = Recorder(), Qwen2(shallow)
    engine = _engine(shallow, capture=device)
    cache = engine.new_cache()
    found = [engine.forward(IDS[i : i + 1], cache) for i in range(2)]
    assert (device.captures, device.replays, cache.slot.capacity) == (1, 2, 2)
    found += [engine.forward(IDS[i : i + 1], cache) for i in range(2, 4)]
    assert (device.captures, device.replays, cache.slot.capacity) == (2, 4, 4)
    # a warm-up writes to the last place of the cache: it must not be seen
    assert _distance(np.concatenate(found), reference.forward(IDS[:4])) <= LIMITS["exact"]
    memory = cache.slot
    del cache
    gc.collect()
    heir = engine.new_cache(100)
    with torch.inference_mode():
        assert heir.reserve(4) is memory
    other = reference.new_cache(100)
    assert _distance(engine.forward(IDS[:1], heir), reference.forward(IDS[:1], other)) <= LIMITS["exact"]
    assert device.captures == 2


@interpreted
def test_tokens_stay_on_the_device(shallow: ValidatedModel) -> None:
    """Chosen there, they are the largest logits of the reference, step by step."""
    engine = _engine(shallow)
    cache = engine.new_cache()
    made = [*engine.greedy(cache, int(IDS[3]), 3), *engine.greedy(cache, 5, 1)]
    assert cache.length == 4
    fed = np.array([IDS[3], *made[:2], 5])
    assert Qwen2(shallow).forward(fed).argmax(axis=1).tolist() == made
    with pytest.raises(InferenceError, match="positions"):
        engine.greedy(cache, 1, 1000)


@interpreted
def test_nothing_left_over_is_read(shallow: ValidatedModel) -> None:
    """Whatever the buffers hold before a step, NaN included, its bits are the same."""
    engine = _engine(shallow)
    clean = engine.forward(IDS[:1])
    pieces = [buffer for p in engine._pieces.values() for buffer in (p.mixed, p.peaks, p.shares)]
    floats = [buffer for buffer in engine._buffers.values() if buffer.is_floating_point()]
    assert len(pieces) == 3
    assert len(floats) == 10
    with torch.inference_mode():
        for buffer in (*pieces, *floats):
            buffer.fill_(float("nan"))
    np.testing.assert_array_equal(engine.forward(IDS[:1]), clean)


@interpreted
@pytest.mark.parametrize("precision", ["exact", "speed"])
def test_a_nan_reaches_the_logits(shallow: ValidatedModel, precision: str) -> None:
    """Eight-bit digits cannot hold one, so their scale must; and no token is chosen from it."""
    engine = _engine(shallow, precision)
    engine.weights.vectors[0]["q_proj"].fill_(float("nan"))
    assert np.isnan(engine.forward(IDS[:1])).all()
    assert np.isnan(engine.forward(IDS[:2])).all()
    with pytest.raises(InferenceError, match="no logit is a number at step 0"):
        engine.greedy(engine.new_cache(), 1, 2)


@interpreted
def test_streamed_layers_give_the_same_bits(tmp_path: Path) -> None:
    """The first of four stays, three take turns; a prompt and a step are those of a model that is all here."""
    model = admit(write_tiny(tmp_path, tokenizer=False, num_hidden_layers=4, **SHAPE)).require()
    whole, device = _engine(model), Recorder()
    found = whole.plan.estimate
    budget = int((found.streaming() + found.layer) / USABLE) + 2
    streamed = _engine(model, budget_bytes=budget, capture=device)
    assert streamed.weights.resident == 1
    assert streamed.plan.mode == "streaming"
    assert streamed.backend == "gpu exact, 3 layers streamed"
    caches = whole.new_cache(), streamed.new_cache()
    for part in (IDS[:2], IDS[2:3]):
        np.testing.assert_array_equal(streamed.forward(part, caches[1]), whole.forward(part, caches[0]))
    assert device.captures == 0  # its layers are elsewhere each time
    slim = Plan("streaming", "", found, int(found.streaming() / USABLE) + 2)
    assert gpu_weights.resident_layers(slim) == 0


def test_too_little_memory_is_said_before_any_work(validated: ValidatedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is needed, what is there, and the way out."""
    monkeypatch.setattr(gpu_weights.GpuWeights, "_packed", lambda *_: pytest.fail("work began"))
    with pytest.raises(LoadError, match=r"expected \d+ MB for one layer at a time .*--device cpu"):
        _engine(validated, budget_bytes=MB)


def test_a_type_without_a_kernel_is_refused(validated: ValidatedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the tensor's name, before any work."""
    monkeypatch.setattr(gpu_weights, "PLANES", {"Q8_0": None})
    monkeypatch.setattr(gpu_weights, "choose", lambda *_: pytest.fail("planned"))
    with pytest.raises(LoadError, match=r"expected a type of Q8_0, found F32, tensor .*q_proj.* --precision reference"):
        _engine(validated)


def test_a_shape_without_a_kernel_is_refused(tiny: Path) -> None:
    """Heads of 16 fill no block."""
    with pytest.raises(LoadError, match=r"head_dim a power of two from 32 on, found 64, 96 and 16"):
        _engine(admit(tiny).require())


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"triton": False}, r"need triton, which is not installed.*--precision reference"),
        ({"cuda": False}, r"no CUDA device here.*device cpu"),
        ({"capability": (7, 5)}, r"expected compute capability 8\.0 or newer, found 7\.5"),
    ],
    ids=["no triton", "no device", "too old"],
)
def test_a_machine_that_cannot_is_refused(broken: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the file is read; nothing falls back."""
    monkeypatch.setattr(gpu, "has_triton", lambda: broken.get("triton", True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: broken.get("cuda", True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: broken.get("capability", (9, 0)))
    for precision in ("exact", "speed"):
        with pytest.raises(Unavailable, match=said) as caught:
            engine_for(precision, "cuda")
        assert caught.value.exit_code == 9


def test_on_the_cpu_there_is_only_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are compiled need a device."""
    monkeypatch.setattr(gpu, "interpreted", lambda: False)
    with pytest.raises(Unavailable, match="interpreter"):
        gpu.require_device("cpu")


def test_a_device_that_can_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The builders stand in the registry."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert engine_for("speed", "cuda") is not engine_for("exact", "cuda")


class Phases:
    """Kernels that do nothing but write down their names."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return _Launched(self.seen, name)


class _Launched:
    def __init__(self, seen: list[str], name: str) -> None:
        self._seen, self._name = seen, name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(size > 0 for size in grid)
        return lambda *_, **__: self._seen.append(self._name)


def test_a_step_is_five_kernels_per_layer(validated: ValidatedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order, with three around them, traced or not, streamed or not; a prompt launches none but decoders."""
    from apr_core.kernels.gpu import launch

    phases = Phases()
    monkeypatch.setattr(launch, "phases", phases)
    step = ["embed", *["qkv", "attention", "residual", "gate_up", "residual"] * 2, "head", "pick"]
    engine = _engine(validated)
    monkeypatch.setattr(engine.weights, "resident", 1)
    monkeypatch.setattr(engine.weights, "_courier", gpu_weights.Courier(torch.device("cpu"), 1 << 20))
    cache, trace = engine.new_cache(), Trace()
    engine.forward(IDS[:1], cache, trace)
    assert phases.seen == step
    assert tuple(trace) == mandatory_names(2)
    phases.seen.clear()
    assert engine.greedy(cache, 1, 3) == [0, 0, 0]
    assert phases.seen == step * 3  # nothing is captured of a model whose layers come and go
    phases.seen.clear()
    for precision in ("exact", "speed"):
        other = _engine(validated, precision)
        assert other.forward_last(IDS, other.new_cache(4)).shape == (VOCAB,)
        cache = other.new_cache()
        assert other.forward(IDS, cache, Trace()).shape == (9, VOCAB)
        other.forward(IDS, cache)
        assert cache.slot.capacity == 32
    assert set(phases.seen) == {"decode"}


class FakeCuda:
    """Streams and events that write down what is asked of them."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self._name = "compute"

    def Stream(self, *_: object) -> FakeCuda:
        """A second stream."""
        other = FakeCuda()
        other.log, other._name = self.log, "copy"
        return other

    def Event(self) -> FakeCuda:
        """An event that carries the stream that it was recorded on."""
        event = FakeCuda()
        event.log = self.log
        return event

    def record(self, stream: FakeCuda) -> None:
        """Remember the stream."""
        self._name = stream._name

    def wait_event(self, event: FakeCuda) -> None:
        """Write down who waits for whom."""
        self.log.append(f"{self._name} waits for {event._name}")

    def current_stream(self) -> FakeCuda:
        """The one that computes."""
        return self

    def stream(self, _: object) -> Any:
        """A context that changes nothing."""
        return nullcontext()


def test_copies_and_computation_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer is not computed before it has arrived, and its buffer not filled before it has been computed."""
    courier, fake = gpu_weights.Courier(torch.device("cpu"), 4), FakeCuda()
    monkeypatch.setattr(courier, "_cuda", fake)
    monkeypatch.setattr(courier, "_stream", fake.Stream())
    blob = torch.arange(4, dtype=torch.uint8)
    courier.send(blob, 0)
    for number in range(3):
        courier.receive(number)
        courier.send(blob, number + 1)
        courier.release(number)
    assert fake.log == ["compute waits for copy"] * 2 + ["copy waits for compute", "compute waits for copy"] + [
        "copy waits for compute"
    ]


class Streams:
    """Streams of a device, and a graph whose replay is nothing."""

    replay = staticmethod(lambda: None)

    def wait_stream(self, _: object) -> None:
        """There is one stream."""


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that records: what is launched meanwhile does not run."""
    from apr_core.kernels.gpu import launch

    @contextmanager
    def recording(_: object) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "phases", Phases())
            yield

    for name in ("current_stream", "Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Streams)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", recording)


@pytest.mark.usefixtures("recorder")
def test_a_capture_warms_up_once_and_records_once() -> None:
    """The first run compiles, the second is recorded; a replay runs nothing on the host."""
    runs: list[int] = []
    replay = gpu.captured(lambda: runs.append(1))
    replay()
    assert len(runs) == 2


@interpreted
@pytest.mark.usefixtures("recorder")
def test_what_a_capture_runs_stays_at_the_last_place(tmp_path: Path) -> None:
    """A step moves the state on: a second warm-up would write behind the cache, over the next head's first position."""
    shape = SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}
    model = admit(write_tiny(tmp_path, tokenizer=False, num_hidden_layers=1, **shape)).require()
    engine = _engine(model, capture=gpu.captured)
    cache = engine.new_cache()
    engine.forward(IDS[:3], cache)
    slot = cache.slot
    before = slot.keys.clone(), slot.values.clone()
    with torch.inference_mode():
        engine._step(slot)
    assert engine._buffers["state"][1:].tolist() == [1, slot.capacity]
    for now, then in zip((slot.keys, slot.values), before, strict=True):
        assert now[:, :, -1].any()
        assert torch.equal(now[:, :, :-1], then[:, :, :-1])

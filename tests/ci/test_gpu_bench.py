"""The timing parts of the script for a device, rehearsed in the interpreter on a tiny shape."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr_core.contract.admit import admit
from apr_core.contract.layout import Geometry
from apr_core.kernels.gpu import has_triton
from apr_core.model.qwen2 import attend
from apr_core.model.synth import SHAPES, Shape, synthesise

pytestmark = [
    pytest.mark.no_cover,  # a tracer takes several times as long as the interpreter
    pytest.mark.skipif(not has_triton(), reason="NOT_RUN: triton is not installed"),
]


@pytest.fixture
def bench(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The parts as a module."""
    monkeypatch.setattr(sys, "path", [str(root / "ci"), *sys.path])
    import gpu_bench

    return gpu_bench


@pytest.fixture
def setup(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A rehearsal on one layer and one type."""
    monkeypatch.setitem(SHAPES, "small", Shape(Geometry(64, 64, 1, 2, 1, 32, 64, tied=True), 128, 50, 3))
    return bench.Setup("cpu", tmp_path, ("small",), ("Q8_0",))


def records(bench: Any, setup: Any, name: str) -> list[Any]:
    """What the parts of one name yield."""
    return [record for part in bench.parts(setup) if part.name == name for record in part.run(setup)]


def test_every_part_leaves_its_records(bench: Any, setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings above zero, kernels compared, a model held and timed, peers that are absent named."""
    monkeypatch.setattr(bench.shutil, "which", lambda _: None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    (machine,) = records(bench, setup, "ceilings")
    assert all(value > 0 for value in machine.measured.values())
    (correct,), (sweep,) = (records(bench, setup, name) for name in ("correct", "sweep"))
    assert correct.measured["compared"] == len(correct.rows) > 0
    assert str(correct.verdict) == "CORROBORATED"
    assert {row["digits"] for row in sweep.rows} == {1, 3}
    speed, exact = records(bench, setup, "models")
    for record in (speed, exact):
        assert str(record.verdict) == "CORROBORATED", record.reason
        assert record.measured["torch_equal"]
        assert record.measured["decode_tok_s"] > 0
        assert record.measured["share_of_read_bandwidth"] > 0
    assert exact.measured["rel_l2"] <= 1e-5 < speed.measured["rel_l2"]
    found = [(str(r.verdict), r.reason) for name in ("peers", "suite", "figures") for r in records(bench, setup, name)]
    assert found == [
        ("NOT_RUN", "transformers is not installed"),
        ("NOT_RUN", "no llama-bench on the PATH"),
        ("NOT_RUN", "hundreds of steps: too many for the interpreter"),
        ("INCONCLUSIVE", "no rate was measured"),
    ]


def test_half_of_a_model_streams(bench: Any, setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit; and a file that nobody had the time to make is said."""
    monkeypatch.setitem(SHAPES, "small", Shape(Geometry(64, 64, 5, 2, 1, 32, 64, tied=True), 128, 50, 3))
    monkeypatch.setattr("apr_core.engines.gpu._SMALLEST", 16)
    (missing,) = bench.streaming("small", setup)
    assert (str(missing.verdict), missing.reason) == ("NOT_RUN", "its file was not made in time")
    synthesise("small", format="gguf", dtype="q8_0", tokenizer=None, seed=1, out=tmp_path / "small-q4_k_m.gguf")
    (record,) = bench.streaming("small", setup)
    assert str(record.verdict) == "CORROBORATED", record.reason
    assert record.measured["layers_away"] == 3
    assert record.measured["streamed_tok_s"] > 0


def test_everything_launched_was_compiled_ahead(bench: Any, setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `warm` hands to the pool covers what a prompt and steps launch, or each would wait for its compiler."""
    from apr_core.kernels.gpu import launch

    jobs: list[Any] = []

    class Pool:
        def apply_async(self, work: Any, given: Any) -> Any:
            assert work is bench.build_ahead
            jobs.append(given)
            return self

        def get(self, timeout: int) -> None:
            raise RuntimeError("a kernel that does not compile fails again where it is launched")

    synthesise("small", format="gguf", dtype="q8_0", tokenizer=None, seed=1, out=setup.scratch / "m.gguf")
    engine = bench.GpuQwen2(admit(setup.scratch / "m.gguf").require(), "speed", device="cpu")
    ids = np.arange(4)
    monkeypatch.setattr(bench.torch.cuda, "get_device_capability", lambda: (9, 0))
    bench.warm(bench.Setup("cuda", setup.scratch, (), (), Pool()), engine, ids)
    with bench.recording() as seen:
        engine.forward_last(ids, cache := engine.new_cache())
        engine.greedy(cache, 1, 1)
    assert {capability for _, capability in jobs} == {90}
    assert {repr(one) for one, _ in jobs} == {repr(one) for one in seen}
    assert launch.phases.__name__.endswith("phases")


def test_figures_are_put_beside_what_was_measured(bench: Any, setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H200 they judge; a ratio needs both of its sides."""
    large, setup = bench.LARGE, bench.Setup("cuda", setup.scratch, (), ())
    monkeypatch.setattr(bench.torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    setup.rates.update({f"{large}-bf16-speed": 900.0, f"{large}-bf16-transformers": 80.0, "read_gb_s": 4300.0})
    setup.rates[f"{large}-bf16-speed-read_gb_s"] = 2900.0
    (good,) = bench.figures(setup)
    assert [(row["measured"], row["at_least"]) for row in good.rows] == [
        (900, 800), (11.25, 10), (2900 / 4300, 0.65)
    ]  # fmt: skip
    assert str(good.verdict) == "CORROBORATED"
    setup.rates.update({f"{large}-bf16-exact": 600.0, f"{large}-bf16-llama.cpp": 700.0})
    (short,) = bench.figures(setup)
    assert str(short.verdict) == "FALSIFIED"
    assert short.reason == f"short of: {large}-bf16-exact {large}-bf16-speed, {large}-bf16-speed {large}-bf16-llama.cpp"
    monkeypatch.setattr(bench.torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    (elsewhere,) = bench.figures(setup)
    assert (str(elsewhere.verdict), elsewhere.reason) == ("INCONCLUSIVE", "the figures are those of an H200")


def test_the_suite_holds_both_precisions(bench: Any, setup: Any, pygmy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is the reference passes; one whose attention is scaled is refuted, and where."""

    class Engine(bench.Qwen2):  # type: ignore[misc]
        def __init__(self, validated: Any, precision: str, device: str) -> None:
            scale = 1 if precision == "exact" else 2
            super().__init__(validated, attend=lambda q, k, v: attend(q * scale, k, v))

        def forward_last(self, ids: Any) -> Any:
            return self.forward(ids)[-1]

    monkeypatch.setattr(bench, "GpuQwen2", Engine)
    validated = admit(pygmy).require()
    right, wrong = bench.examined(setup, "pygmy", validated)
    assert (str(right.verdict), right.reason) == ("CORROBORATED", "")
    assert right.measured["required_tolerance"] <= 1e-6
    assert [row["comparison"] for row in right.rows][:2] == ["prefill", "decode"]
    assert str(wrong.verdict) == "FALSIFIED"
    assert wrong.measured["first_divergence"].startswith("layers.0.attn_output at position 1")


def test_a_wrong_engine_is_refuted(bench: Any, setup: Any, tmp_path: Path) -> None:
    """A rate counts only beside its correctness."""
    synthesise("small", format="gguf", dtype="q8_0", tokenizer=None, seed=1, out=tmp_path / "m.gguf")
    ids = np.arange(9)
    other = np.random.default_rng(0).standard_normal((9, 64))
    record = bench.held_and_timed(setup, admit(tmp_path / "m.gguf").require(), ("small", "q8_0", "exact"), ids, other)
    assert str(record.verdict) == "FALSIFIED"
    assert "against the reference, at most 0.0001" in record.reason

"""Layer streaming: the estimators, the choice, the same bits as the full model, and less memory."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from apr_core.cli.app import main
from apr_core.contract.admit import admit
from apr_core.contract.layout import Geometry
from apr_core.contract.types import Validated
from apr_core.engines import streaming as module
from apr_core.engines.cuda import (
    Attestation,
    CudaQwen2,
    attest,
    count_kernels,
    exact_products,
    fused_attend,
    weight_bytes,
)
from apr_core.engines.load import build
from apr_core.engines.streaming import (
    MB,
    Arena,
    Estimate,
    Layers,
    StreamedCudaQwen2,
    StreamedQwen2,
    available_bytes,
    choose,
    estimate,
    estimate_of,
    fit,
)
from apr_core.errors import LoadError
from apr_core.falsify.verdict import Verdict
from apr_core.model.generate import follow
from apr_core.model.linear import Place
from apr_core.model.qwen2 import DecoderLayer, Qwen2, attend
from apr_core.parity.compare import compare
from apr_core.parity.suite import POSITIONS, examine, prepare
from tests.model.conftest import write_tiny

IDS = np.random.default_rng(8).integers(0, 331, 40)
PUBLISHED = {  # hidden, layers, heads, kv heads, vocabulary, ffn -> MiB of layer, head, cache, all, streaming
    "0.5B": ((896, 24, 14, 2, 151936, 4864), (56.9, 519.3, 48, 1932.5, 624.2)),
    "1.5B": ((1536, 28, 12, 2, 151936, 8960), (178.5, 890.2, 112, 6000.6, 1180.8)),
    "7B": ((3584, 28, 28, 4, 152064, 18944), (889.0, 2079, 224, 27195.8, 3192.0)),
}


def sizes(name: str) -> Estimate:
    """The estimate of a published shape."""
    h, layers, heads, kv, vocab, ffn = PUBLISHED[name][0]
    return estimate_of(Geometry(h, ffn, layers, heads, kv, h // heads, vocab, tied=True))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_specifications_numbers(name: str) -> None:
    """Layer, head, cache, full and streaming in MiB, as the specification prints them; it leaves activations out."""
    found, published = sizes(name), PUBLISHED[name][1]
    made = [found.layer, found.head, found.cache]
    made += [found.full - found.activations, found.streaming(0) - found.activations]
    assert [x / MB for x in made] == pytest.approx(published, rel=1e-3)


def test_the_specifications_boundaries() -> None:
    """1.5B: 2 GiB streams, 12 GiB holds all, half a GiB is an error with the numbers and three remedies."""
    found = sizes("1.5B")
    assert choose(found, 2048 * MB, ahead=0).mode == "streaming"
    assert choose(found, 12 * 1024 * MB, ahead=0).mode == "full"
    with pytest.raises(
        LoadError, match=r"expected 14\d\d MB.*6\d\d\d MB for all.*found 460 MB usable of 512"
    ) as caught:
        choose(found, 512 * MB, ahead=0)
    assert all(remedy in str(caught.value) for remedy in ("quantised GGUF", "--device cpu", "free memory"))
    assert found.streaming(0) < found.full / 2
    exact = int(np.ceil(found.full / 0.9))
    assert (choose(found, exact).mode, choose(found, exact - 2).mode) == ("full", "streaming")


def test_what_the_specification_leaves_out(tiny: Path, untied: Path) -> None:
    """Biases, activations, the embedding of an untied model, and the bytes that the file really holds."""
    for path, tied in ((tiny, True), (untied, False)):
        found = estimate(admit(path).require(), 128, 32)
        matrices = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96
        assert found.layer == 4 * (matrices + 2 * 64 + (64 + 32 + 32))
        assert (found.cache, found.head, found.layers) == (4 * 2 * 2 * 128 * 32, 4 * 331 * 64, 2)
        assert found.embedding == (0 if tied else found.head)
        assert found.activations >= 4 * 32 * 331
        assert found.stored == 2 * found.layer  # float32 as stored


@pytest.mark.parametrize("kind", [StreamedQwen2, StreamedCudaQwen2])
@pytest.mark.parametrize("model", ["tiny", "untied", "pygmy"])
def test_streamed_layers_give_the_same_bits(kind: Any, model: str, request: pytest.FixtureRequest) -> None:
    """Every name, in a prefill and in cached steps; twice, because the layers are built anew."""
    validated = admit(request.getfixturevalue(model)).require()
    whole = (CudaQwen2 if kind is StreamedCudaQwen2 else Qwen2)(validated, "cpu")
    streamed = kind(validated, "cpu")
    for _ in range(2):
        ours, theirs = (follow(side, IDS, 24, full=True) for side in (whole, streamed))
        assert list(ours) == list(theirs)
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("heads", "kv", "head_dim"), [(4, 2, 64), (4, 2, 128), (6, 1, 16), (2, 2, 8)])
@pytest.mark.parametrize(("tokens", "positions"), [(1, 1), (1, 63), (63, 63), (7, 40)])
def test_fused_attention_has_the_right_mask_and_scale(
    heads: int, kv: int, head_dim: int, tokens: int, positions: int
) -> None:
    """Against the written-out one; a chunk of several tokens in the middle of a stream is where masks go wrong."""
    random = torch.Generator().manual_seed(3)
    q = torch.randn(heads, tokens, head_dim, generator=random)
    k, v = (torch.randn(kv, positions, head_dim, generator=random) for _ in "kv")
    torch.testing.assert_close(fused_attend(q, k, v), attend(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_cuda_forward_runs_on_the_cpu_and_agrees(head_dim: int, tmp_path: Path) -> None:
    """Both head sizes of the published models, grouped heads, real biases; the same code that a device runs."""
    path = write_tiny(tmp_path, hidden_size=4 * head_dim, intermediate_size=96, max_position_embeddings=32768)
    validated = admit(path).require()
    bench = prepare(validated, Qwen2(validated), np.random.default_rng(2).integers(0, 331, POSITIONS))
    report = examine(bench, CudaQwen2(validated, "cpu"))
    assert (report.verdict, report.reason) == (Verdict.CORROBORATED, "")
    assert [p.name for p in report.parts][2:4] == ["far 4000", "far 30000"]


def test_precision_switches_are_off_inside_and_restored_behind() -> None:
    """Whatever they were."""
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        for was in (True, False):
            matmul.allow_tf32 = was
            with exact_products():
                assert matmul.allow_tf32 is False
                assert torch.backends.cudnn.allow_tf32 is False
                assert torch.backends.cuda.math_sdp_enabled()
                assert not torch.backends.cuda.mem_efficient_sdp_enabled()
            assert matmul.allow_tf32 is was
            assert torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        matmul.allow_tf32 = before


def test_an_engine_that_did_not_run_on_the_device_is_doubted(tiny: Path) -> None:
    """Its name, its allocations and its kernels are each asked for."""
    model = CudaQwen2(admit(tiny).require(), "cpu")
    assert attest(model, IDS, 1).doubt == "the CUDA side ran on cpu"
    assert "the weights alone take 9" in Attestation("cuda", 8, 9, 5).doubt
    assert Attestation("cuda", 9, 9, 0).doubt == "no kernel ran on the device"
    assert Attestation("cuda", 9, 9, 1).doubt == ""


def test_copies_to_a_device_are_no_computation(untied: Path, tiny: Path) -> None:
    """A forward on the host that fetches its ids from a device would else count as one that ran there."""
    names = ("Memcpy HtoD (Pageable -> Device)", "Memset (Device)", "sgemm_128x64", "aten::mm")
    places = ("DeviceType.CUDA", "DeviceType.CUDA", "DeviceType.CUDA", "DeviceType.CPU")
    events = [SimpleNamespace(name=name, device_type=place) for name, place in zip(names, places, strict=True)]
    assert (count_kernels(events), count_kernels(events[:2]), count_kernels([])) == (1, 0, 0)
    for path in (tiny, untied):
        validated = admit(path).require()
        stored = sum(info.nbytes for info in validated.checkpoint.tensors.values())
        assert weight_bytes(validated) == stored  # float32 as stored


@pytest.mark.parametrize("error", [MemoryError("no"), torch.OutOfMemoryError("CUDA out of memory.\nTried to")])
def test_a_model_beyond_the_memory_is_said_to_be(error: Exception, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever says so, machine or device, and whatever the plan had promised: exit 6 with the ways out."""

    def take(place: Place, tensor: object) -> None:
        raise error

    monkeypatch.setattr(Place, "take", take)
    admission = admit(tiny)
    for start in (lambda: build(admission), lambda: fit(admission.require(), "cpu", None)):
        with pytest.raises(LoadError, match=r"does not fit into memory: (no|CUDA out of memory\.); use .*--budget-mb"):
            start()


@pytest.mark.parametrize("kind", [StreamedQwen2, StreamedCudaQwen2])
def test_a_layer_that_has_not_arrived_is_seen(kind: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of one matrix still zero: the residual behind it is the first that is wrong, and what is before is right."""
    validated = admit(tiny).require()
    honest = Arena.take

    def late(arena: Arena, tensor: Validated) -> torch.Tensor:
        taken = honest(arena, tensor)
        if tensor.name == "model.layers.1.mlp.down_proj.weight":
            taken[len(taken) // 2 :] = 0
        return taken

    monkeypatch.setattr(Arena, "take", late)
    traces = [follow(side, IDS, 24, full=True) for side in (Qwen2(validated), kind(validated, "cpu"))]
    first = compare(*traces).first_divergence(1e-4)
    assert first is not None
    assert (first.name, first.position) == ("layers.1.resid_ffn", 0)


def test_the_choice_is_made_by_the_budget_and_says_why(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full, streamed and refused, by a parameter and by what is free."""
    validated = admit(tiny).require()
    found = estimate(validated, 128)
    for budget, kind in ((10 * found.full, Qwen2), (int(found.streaming(0) / 0.9) + 9, StreamedQwen2)):
        model, plan = fit(validated, "cpu", None, budget)
        assert type(model) is kind
        assert plan.mode in plan.reason or plan.reason.startswith(("all layers", "layer by layer"))
    with pytest.raises(LoadError, match="one layer at a time"):
        fit(validated, "cpu", None, 1000)
    monkeypatch.setattr(module, "available_bytes", lambda device: 10 * found.full)
    assert fit(validated, "cpu", None)[1].mode == "full"
    assert available_bytes("cpu") > 0


def test_available_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that are free, where the kernel says no more."""
    monkeypatch.setattr(module, "Path", lambda name: Path("/nothing"))
    assert available_bytes("cpu") > 0


def test_run_prints_the_choice(pygmy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same answer in both modes; too small a budget is exit 6."""
    said = []
    found = estimate(admit(pygmy).require())
    budgets = (2 * found.full // MB, (found.full + found.streaming(0)) // 2 * 10 // 9 // MB)
    for budget, mode in zip(map(str, budgets), ("all layers at once", "layer by layer"), strict=True):
        arguments = ["run", str(pygmy), "What is 2+2?", "-n", "4", "--device", "cpu", "--budget-mb", budget]
        assert main(arguments) == 0
        out = capsys.readouterr()
        said.append(out.out)
        assert mode in out.err
    assert said[0] == said[1]
    assert main(["run", str(pygmy), "x", "--budget-mb", "1"]) == 6


def test_one_layer_at_a_time(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer is built on the CPU, the one before it is gone: that is what the estimate counts on."""
    built: list[weakref.ref[DecoderLayer]] = []
    alive = []
    honest = Layers._build

    def build_layer(layers: Layers, at: int) -> DecoderLayer:
        alive.append(sum(ref() is not None for ref in built))
        layer = honest(layers, at)
        built.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(Layers, "_build", build_layer)
    model = StreamedQwen2(admit(tiny).require())
    for _ in range(2):
        model.forward(IDS)
    assert alive == [0, 0, 0, 0]


SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
from apr_core.contract.admit import admit
from apr_core.engines.streaming import StreamedQwen2
from apr_core.model.qwen2 import Qwen2

def memory_mb(what):  # not ru_maxrss: a child begins with its parent's
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(l for l in lines if l.startswith(what)).split()[1]) / 1024

before = memory_mb("VmRSS")
validated = admit(sys.argv[1]).require()
model = {"full": Qwen2, "streamed": StreamedQwen2}[sys.argv[2]](validated)
model.forward(np.arange(8))
Path("/proc/self/clear_refs").write_text("5")
logits = model.forward(np.arange(8))
print(json.dumps({"peak_mb": memory_mb("VmHWM") - before, "sum": float(np.abs(logits).sum())}))
"""


def test_streaming_takes_less_memory_on_the_cpu(tmp_path: Path, root: Path) -> None:
    """12 layers of 13 MB, float32 as stored: the whole model holds them and their file, the streamed one a layer."""
    path = write_tiny(
        tmp_path, tokenizer=False, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, vocab_size=331
    )
    found = {}
    for mode in ("full", "streamed"):
        command = [sys.executable, "-c", SCRIPT, str(path), mode]
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
        assert done.returncode == 0, done.stderr
        found[mode] = json.loads(done.stdout)
    layer_mb = estimate(admit(path).require()).layer / MB
    assert found["full"]["sum"] == found["streamed"]["sum"]
    assert found["full"]["peak_mb"] > 24 * layer_mb
    assert found["streamed"]["peak_mb"] < 6 * layer_mb, found

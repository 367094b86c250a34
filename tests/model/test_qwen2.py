"""The reference: against transformers, against its own cache, and what tracing must not change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apr_core.engines.load import load_model
from apr_core.errors import InferenceError
from apr_core.model.generate import generate, logits, trace
from apr_core.model.linear import Embedding, Linear, RMSNorm, Sealed
from apr_core.model.qwen2 import Qwen2, Rotary
from apr_core.model.tokens import prepare_tokens
from apr_core.model.trace import Trace, mandatory_names

IDS = np.random.default_rng(3).integers(0, 331, 63)


def rel_l2(candidate: np.ndarray, reference: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference."""
    return float(np.linalg.norm(candidate.astype(float) - reference) / np.linalg.norm(reference.astype(float)))


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request: pytest.FixtureRequest) -> Any:
    """The tiny model, both ways."""
    return load_model(request.getfixturevalue("tiny" if request.param == "tied" else "untied"))


def weights_of(part: object) -> Iterator[tuple[str, torch.Tensor]]:
    """Walk every tensor of a model."""
    for name, value in vars(part).items():
        if isinstance(value, torch.Tensor):
            yield name, value
        for child in value if isinstance(value, tuple) else (value,):
            if isinstance(child, Sealed):
                yield from weights_of(child)


def digest(model: Any) -> str:
    """Hash all weights."""
    sha = hashlib.sha256()
    for name, tensor in weights_of(model):
        sha.update(name.encode() + tensor.numpy().tobytes())
    return sha.hexdigest()


def test_shapes_and_names(model: Any) -> None:
    """Logits are float32 [tokens, vocab]; parts carry their Hugging Face names."""
    assert (model.backend, model.device, model.bypassed) == ("torch", "cpu", False)
    out = model.forward(IDS)
    assert (out.shape, out.dtype) == ((63, 331), np.float32)
    layer = model.layers[1]
    assert isinstance(layer.self_attn.q_proj, Linear)
    assert isinstance(layer.post_attention_layernorm, RMSNorm)
    assert isinstance(model.embed_tokens, Embedding)
    assert len(model.layers) == 2


def test_tracing_changes_no_bit_and_records_every_name(model: Any) -> None:
    """Same forward, in prefill and in decode; the trace holds exactly the mandatory names in order."""
    recorded = Trace()
    assert np.array_equal(model.forward(IDS, trace=recorded), model.forward(IDS))
    assert tuple(recorded) == mandatory_names(2)
    assert recorded["layers.0.q"].shape == (63, 64)
    assert recorded["layers.0.k"].shape == recorded["layers.1.v"].shape == (63, 32)
    assert np.array_equal(recorded["logits"], model.forward(IDS))
    on, off = model.new_cache(), model.new_cache()
    for token in IDS[:9]:
        traced = model.forward(np.array([token]), on, Trace())
        assert np.array_equal(traced, model.forward(np.array([token]), off))


@pytest.mark.parametrize("cuts", [(1,), (62,), (20, 21, 40), tuple(range(1, 63))])
def test_the_cache_continues_where_the_prompt_ended(model: Any, cuts: tuple[int, ...]) -> None:
    """However the tokens are cut into forwards, logits and traced values are those of one prefill."""
    whole = Trace()
    model.forward(IDS, trace=whole)
    cache, pieces = model.new_cache(), []
    for chunk in np.split(IDS, cuts):
        piece = Trace()
        model.forward(chunk, cache, piece)
        pieces.append(piece)
    assert cache.length == 63
    for name in whole:
        joined = np.concatenate([piece[name] for piece in pieces])
        assert rel_l2(joined, whole[name]) < 2e-6, name


def test_no_position_sees_a_later_one(model: Any) -> None:
    """Changing the last token changes its own logits alone, in the first bit or not at all."""
    changed = IDS.copy()
    changed[-1] = (changed[-1] + 1) % 331
    one, other = model.forward(IDS), model.forward(changed)
    assert np.array_equal(one[:-1], other[:-1])
    assert not np.array_equal(one[-1], other[-1])


def test_a_failed_forward_leaves_the_cache_usable(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of a forward that died in the second layer are not in the first one's keys afterwards."""
    cache = model.new_cache()
    model.forward(IDS[:5], cache)

    def explode(self: object, *args: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("apr_core.model.qwen2.MLP.__call__", explode)
        with pytest.raises(RuntimeError, match="out of memory"):
            model.forward(IDS[40:44], cache)
    assert cache.length == 5
    assert rel_l2(model.forward(IDS[5:20], cache), model.forward(IDS[:20])[5:]) < 2e-6


def test_positions_beyond_the_context_are_refused(model: Any) -> None:
    """In one forward, and one token at a time."""
    cache = model.new_cache()
    model.forward(np.resize(IDS, 128), cache)
    for ids, used in ((np.array([1]), cache), (np.resize(IDS, 129), None)):
        with pytest.raises(InferenceError, match="max_position_embeddings"):
            model.forward(ids, used)
    assert cache.length == 128


@pytest.mark.parametrize("ids", [[-1], [331], [], [[1]], [0.5]])
def test_ids_that_no_embedding_has(model: Any, ids: list[Any]) -> None:
    """A typed error, not a row from the end of the table."""
    with pytest.raises(InferenceError):
        model.forward(np.array(ids))


def test_rotation_keeps_lengths_and_depends_on_the_distance_alone(model: Any) -> None:
    """Two properties that define RoPE; and position 0 is not turned."""
    x = torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(0))
    at_0, at_40 = (Rotary(model.config, start, 9, torch.device("cpu"))(x) for start in (0, 40))
    assert torch.equal(at_0[:, 0], x[:, 0])
    assert torch.allclose(at_40.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(at_0 @ at_0.transpose(1, 2), at_40 @ at_40.transpose(1, 2), atol=1e-4)
    assert not torch.allclose(at_0, at_40, atol=0.1)


def test_rotation_pairs_halves_by_hand(model: Any) -> None:
    """Element i turns with element i + 8, by position * theta ** (-i / 8)."""
    x = torch.zeros(1, 1, 16)
    x[0, 0, 3] = 1.0
    turned = Rotary(model.config, 5, 1, torch.device("cpu"))(x)[0, 0]
    angle = 5 * 50000.0 ** (-3 / 8)
    assert turned[3].item() == pytest.approx(np.cos(angle), abs=1e-6)
    assert turned[11].item() == pytest.approx(np.sin(angle), abs=1e-6)
    assert torch.count_nonzero(turned) == 2


def test_a_run_changes_no_weight(model: Any) -> None:
    """All weights hash the same before and after a prefill, a trace and a generation."""
    before = digest(model)
    prepared = prepare_tokens(model, ids=IDS[:9])
    logits(model, prepared), trace(model, prepared), list(generate(model, prepared, max_new_tokens=5))
    assert digest(model) == before
    assert len(list(weights_of(model))) == 2 * 12 + 3  # every tensor, and the head


def test_results_belong_to_the_caller(model: Any) -> None:
    """Writing into returned logits changes neither the model nor the next answer."""
    before = model.forward(IDS[:3]).copy()
    model.forward(IDS[:3])[:] = 0
    assert np.array_equal(model.forward(IDS[:3]), before)


def test_global_settings_of_torch_stay_as_they_were() -> None:
    """Importing the model changes no thread count, no default type, no gradient mode."""
    import subprocess
    import sys

    code = (
        "import torch; s = lambda: (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),"
        " torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()); before = s();"
        " import apr_core.model.qwen2, apr_core.engines.load; assert s() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def golden(oracle: Path) -> dict[str, np.ndarray]:
    """What transformers computed in float64 from the BF16 weights."""
    with np.load(oracle / "mini" / "transformers_f64.npz") as npz:
        return dict(npz)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["safetensors", "F16", "Q4_K_M", "Q6_K", "Q8_0"])
def test_logits_of_transformers_at_every_position(oracle: Path, golden: dict[str, np.ndarray], name: str) -> None:
    """rel_l2 at most 1e-5 at each of 160 positions (measured: 1.3e-6 over all, 2.7e-6 at the worst)."""
    if name == "safetensors":
        model, reference = load_model(oracle / "mini"), golden["logits"]
    else:
        with np.load(oracle / "mini" / "dequant_f64.npz") as npz:
            model, reference = load_model(oracle / "mini" / "gguf" / f"{name}.gguf"), npz[name]
    assert isinstance(model, Qwen2)
    found = logits(model, prepare_tokens(model, ids=golden["ids"]))
    assert found.shape == reference.shape == (160, 1024)
    worst = max(rel_l2(a, b) for a, b in zip(found, reference, strict=True))
    assert worst <= 1e-5


@pytest.mark.oracle
def test_greedy_tokens_of_transformers(oracle: Path, golden: dict[str, np.ndarray]) -> None:
    """All 48 tokens, free-running through the cache."""
    model = load_model(oracle / "mini")
    answer = generate(model, prepare_tokens(model, ids=golden["prompt"]), max_new_tokens=48)
    assert list(answer) == golden["greedy"].tolist()
    assert answer.stopped == "length"

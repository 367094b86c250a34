"""Weights in torch: the arithmetic of the parts, and that nothing puts other weights into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apr_core.contract.admit import admit
from apr_core.contract.stats import measure
from apr_core.contract.types import RepackedHead, ValidatedEmbedding, ValidatedVector, ValidatedWeight
from apr_core.engines.load import build, load_model
from apr_core.model.generate import generate
from apr_core.model.linear import Embedding, Head, Linear, Place, RMSNorm, Weights
from apr_core.model.tokens import prepare_tokens


def test_parts_compute_what_they_say(tiny: Path, untied: Path) -> None:
    """Against numpy in float64, each on the tensor of a real file."""
    model, other = admit(tiny).require(), admit(untied).require()
    q = "model.layers.1.self_attn.q_proj"
    weight, bias = model.take(f"{q}.weight", ValidatedWeight), model.take(f"{q}.bias", ValidatedVector)
    w, b = weight.values(), bias.values()
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    wide, tx = x.astype(float), torch.from_numpy(x)
    np.testing.assert_allclose(Linear(weight, bias)(tx).numpy(), wide @ w.T + b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(Linear(weight)(tx).numpy(), wide @ w.T, rtol=1e-5, atol=1e-5)
    norm = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 0.5) * b
    np.testing.assert_allclose(RMSNorm(bias, 0.5)(tx).numpy(), norm, rtol=1e-5, atol=1e-6)
    table = model.take("model.embed_tokens.weight", ValidatedEmbedding)
    assert np.array_equal(Embedding(table)(torch.tensor([6, 0])).numpy(), table.values()[[6, 0]])
    for head in (model.head, other.head):
        np.testing.assert_allclose(Head(head)(tx).numpy(), wide @ head.values().T, rtol=1e-5, atol=1e-5)


def test_a_tied_head_is_the_same_memory(tiny: Path, untied: Path) -> None:
    """The largest tensor of a small model is held once; an untied head is its own."""
    for folder, same in ((tiny, True), (untied, False)):
        weights = Weights(admit(folder).require())
        table = weights.embedding("model.embed_tokens")
        head = weights.head(table)
        assert (head._weight.data_ptr() == table._weight.data_ptr()) is same


def test_parts_take_their_own_type_alone(tiny: Path) -> None:
    """Neither an array, nor a torch tensor, nor a validated tensor of another role, nor a repacked head gets in."""
    model = admit(tiny).require()
    weight = model.take("model.layers.0.mlp.up_proj.weight", ValidatedWeight)
    gain = model.take("model.norm.weight", ValidatedVector)
    table = model.take("model.embed_tokens.weight", ValidatedEmbedding)
    loose = [weight.values(), torch.from_numpy(weight.values()), weight.raw, None, RepackedHead(model.head)]
    own: dict[Any, Any] = {Linear: weight, Embedding: table, Head: model.head, lambda t: RMSNorm(t, 1e-6): gain}
    for part, right in own.items():
        part(right)
        for wrong in [*loose, *(other for other in own.values() if other is not right)]:
            with pytest.raises(TypeError, match="expected a Validated"):
                part(wrong)
    with pytest.raises(TypeError, match="expected a ValidatedVector"):
        Linear(weight, weight)
    for name in ("lm_head", "model.embed_tokens", "model.norm"):
        with pytest.raises((TypeError, KeyError)):
            Weights(model).linear(name)


def test_projections_take_their_bias_where_there_is_one(tiny: Path) -> None:
    """q, k and v have one, o has none."""
    weights = Weights(admit(tiny).require())
    biases = [weights.linear(f"model.layers.1.self_attn.{name}_proj")._bias is not None for name in "qkvo"]
    assert biases == [True, True, True, False]


def parts(model: Any) -> list[Any]:
    """Return one of each kind of part."""
    layer = model.layers[0]
    return [
        model,
        layer,
        layer.self_attn,
        layer.mlp,
        layer.input_layernorm,
        layer.mlp.up_proj,
        model.embed_tokens,
        model.lm_head,
    ]


def test_no_part_takes_other_weights(tiny: Path) -> None:
    """Assignment, deletion and state dicts raise on every part and name the way that is open."""
    for part in parts(load_model(tiny)):
        for name in ("weight", "_weight", "layers", "q_proj"):
            with pytest.raises(AttributeError, match="cannot be assigned; weights are admitted once"):
                setattr(part, name, torch.zeros(1))
        with pytest.raises(AttributeError, match="cannot be deleted"):
            del part._weight
        with pytest.raises(TypeError, match="takes no state dict"):
            part.load_state_dict({})


def test_another_order_of_summation_and_another_precision(tiny: Path) -> None:
    """Same product but for rounding; the bias is added once; float64 is closer."""
    model, x = admit(tiny).require(), torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    name = "model.layers.0.self_attn.k_proj"
    plain, split = (Weights(model, place).linear(name)(x) for place in (Place(), Place(parts=5)))
    exact = Weights(model, Place(dtype=torch.float64)).linear(name)(x.double())
    assert exact.dtype == torch.float64
    assert not torch.equal(plain, split)
    for rounded in (plain, split):
        torch.testing.assert_close(rounded.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_run_changes_no_stored_byte(tiny: Path) -> None:
    """The digest of every tensor after a generation is the one that the gate measured before it."""
    admission = admit(tiny)
    model = build(admission)
    list(generate(model, prepare_tokens(model, ids=[5, 6, 7]), max_new_tokens=4))
    after = {name: measure(admission.checkpoint.raw(name)).digest for name in admission.stats}
    assert after == {name: stats.digest for name, stats in admission.stats.items()}
    assert len(after) == 26

"""Weights in torch: the arithmetic of the parts, and that nothing puts other weights into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apr_core.contract.admit import admit
from apr_core.engines.load import load_model
from apr_core.model.linear import Embedding, Linear, RMSNorm, Weights


def test_parts_compute_what_they_say() -> None:
    """Against numpy in float64, on odd shapes."""
    random = np.random.default_rng(0)
    x, w, b = (random.standard_normal(shape).astype(np.float32) for shape in ((3, 5), (7, 5), (7,)))
    tx, tw, tb = map(torch.from_numpy, (x, w, b))
    np.testing.assert_allclose(Linear(tw, tb)(tx).numpy(), x.astype(float) @ w.T + b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(Linear(tw, None)(tx).numpy(), x.astype(float) @ w.T, rtol=1e-5, atol=1e-6)
    norm = x / np.sqrt((x.astype(float) ** 2).mean(1, keepdims=True) + 0.5) * w[0]
    np.testing.assert_allclose(RMSNorm(tw[0], 0.5)(tx).numpy(), norm, rtol=1e-5, atol=1e-6)
    assert torch.equal(Embedding(tw)(torch.tensor([6, 0])), tw[[6, 0]])


def test_a_tied_head_is_the_same_memory(tiny: Path) -> None:
    """The largest tensor of a small model is held once."""
    table = Weights(admit(tiny).require(), torch.device("cpu")).embedding("model.embed_tokens")
    assert table.as_head()._weight.data_ptr() == table._weight.data_ptr()


def test_projections_take_their_bias_where_there_is_one(tiny: Path) -> None:
    """q, k and v have one, o has none."""
    weights = Weights(admit(tiny).require(), torch.device("cpu"))
    biases = [weights.linear(f"model.layers.1.self_attn.{name}_proj")._bias is not None for name in "qkvo"]
    assert biases == [True, True, True, False]


def parts(model: Any) -> list[Any]:
    """Return one of each kind of part."""
    layer = model.layers[0]
    return [model, layer, layer.self_attn, layer.mlp, layer.input_layernorm, layer.mlp.up_proj, model.embed_tokens]


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

"""A tiny Qwen2 (hidden 64, 2 layers, 4 heads, 2 key-value heads, ffn 96, vocab 131), written by safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]
Save = Callable[..., Path]

CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 512,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
# written out by hand, not taken from layout.py: the contract's own table is what is being tested
LAYER = {
    "input_layernorm.weight": (64,),
    "self_attn.q_proj.weight": (64, 64),
    "self_attn.q_proj.bias": (64,),
    "self_attn.k_proj.weight": (32, 64),
    "self_attn.k_proj.bias": (32,),
    "self_attn.v_proj.weight": (32, 64),
    "self_attn.v_proj.bias": (32,),
    "self_attn.o_proj.weight": (64, 64),
    "post_attention_layernorm.weight": (64,),
    "mlp.gate_proj.weight": (96, 64),
    "mlp.up_proj.weight": (96, 64),
    "mlp.down_proj.weight": (64, 96),
}


@pytest.fixture
def config() -> dict[str, object]:
    """A config that passes; tests change it."""
    return dict(CONFIG)


@pytest.fixture
def tensors() -> Tensors:
    """The 26 tensors of the tied model, float32, healthy; tests change them."""
    shapes = {"model.embed_tokens.weight": (131, 64), "model.norm.weight": (64,)}
    shapes |= {f"model.layers.{n}.{name}": shape for n in (0, 1) for name, shape in LAYER.items()}
    rng = np.random.default_rng(51)
    made = {name: (rng.standard_normal(shape) * 0.02).astype(np.float32) for name, shape in shapes.items()}
    for name in made:
        if name.endswith("norm.weight"):
            made[name] = np.ones(64, np.float32)  # how RMSNorm starts: legal
    return made


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a folder with model.safetensors and config.json; ``config=None`` leaves the config out."""

    def write(tensors: Mapping[str, np.ndarray], config: Mapping[str, object] | None) -> Path:
        folder = tmp_path / f"model{sum(1 for _ in tmp_path.iterdir())}"
        folder.mkdir()
        # save_file writes the memory of a transposed view as it lies, not as it reads
        laid_out = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
        save_file(laid_out, folder / "model.safetensors")
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write

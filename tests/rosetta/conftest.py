"""A tiny Qwen2 with its tokenizer, written by the ``safetensors`` package, and ways to spoil a copy of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from apr_core.engines.subject import Subject, obtain
from apr_core.model.synth_tokenizer import generate_tokenizer

Tensors = dict[str, torch.Tensor]
HIDDEN, FFN, ROWS, KV, LAYERS = 64, 96, 323, 32, 2
CONFIG: dict[str, object] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": ROWS,
    "max_position_embeddings": 256,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 315,
    "eos_token_id": 317,
    "sliding_window": 256,
    "use_sliding_window": False,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices on several threads spend their time in waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw() -> Tensors:
    """Draw the 26 tensors of the tied model; biases and norms away from their neutral values."""
    random = torch.Generator().manual_seed(11)

    def values(*shape: int, std: float = 0.05, mean: float = 0.0) -> torch.Tensor:
        return (mean + std * torch.randn(shape, generator=random)).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": values(ROWS, HIDDEN, std=0.3)}
    tensors["model.norm.weight"] = values(HIDDEN, mean=1.0)
    for n in range(LAYERS):
        at = f"model.layers.{n}"
        for name, rows in (("q", HIDDEN), ("k", KV), ("v", KV)):
            tensors[f"{at}.self_attn.{name}_proj.weight"] = values(rows, HIDDEN, std=0.2)
            tensors[f"{at}.self_attn.{name}_proj.bias"] = values(rows, std=0.3)
        tensors[f"{at}.self_attn.o_proj.weight"] = values(HIDDEN, HIDDEN, std=0.2)
        for name, shape in (("gate", (FFN, HIDDEN)), ("up", (FFN, HIDDEN)), ("down", (HIDDEN, FFN))):
            tensors[f"{at}.mlp.{name}_proj.weight"] = values(*shape, std=0.2)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{name}.weight"] = values(HIDDEN, mean=1.0)
    return tensors


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a folder, BF16, with tokenizer, template and two end tokens. Read only: spoil a copy of it."""
    folder = tmp_path_factory.mktemp("rosetta") / "tiny"
    folder.mkdir()
    save_file(draw(), folder / "model.safetensors", {"format": "pt", "license": "MIT", "apr.untrained": "true"})
    tokenizer, settings = generate_tokenizer(315, 3, context=256)
    documents: dict[str, object] = {
        "config.json": CONFIG,
        "generation_config.json": {"bos_token_id": 315, "eos_token_id": [317, 315]},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": settings,
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document), encoding="utf-8")
    return folder


Edit = Callable[..., Path]


@pytest.fixture
def edited(tiny: Path, tmp_path: Path) -> Edit:
    """
    Write a changed copy of the tiny model.

    ``edited(tensors=f, drop=names, **{"config.json": {...}})``: ``f`` changes the tensors in place, ``drop`` leaves
    companions out, mappings are merged into a companion and None removes a key.
    """

    def write(
        tensors: Callable[[Tensors], object] | None = None,
        drop: tuple[str, ...] = (),
        **companions: Mapping[str, Any],
    ) -> Path:
        folder = tmp_path / f"edited{sum(1 for _ in tmp_path.iterdir())}"
        folder.mkdir()
        held = load_file(tiny / "model.safetensors")
        if tensors is not None:
            tensors(held)
        save_file({k: v.contiguous() for k, v in held.items()}, folder / "model.safetensors", {"apr.untrained": "true"})
        for path in tiny.glob("*.json"):
            if path.name in drop:
                continue
            document = {**json.loads(path.read_text()), **companions.get(path.name, {})}
            text = json.dumps({k: v for k, v in document.items() if v is not None})
            (folder / path.name).write_text(text, encoding="utf-8")
        return folder

    return write


@pytest.fixture
def open_subject() -> Iterator[Callable[..., Subject]]:
    """Obtain a subject on the CPU and close it at the end of the test."""
    opened: list[Subject] = []

    def make(path: Path, reference: Path | None = None, **options: Any) -> Subject:
        options = {"max_new_tokens": 8, "device": "cpu", **options}
        opened.append(obtain(str(path), reference=str(reference) if reference else "", **options))
        return opened[-1]

    yield make
    for subject in opened:
        subject.close()


def bits(values: np.ndarray) -> np.ndarray:
    """The float32 bits of an array: what bit-exactness is about."""
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)

"""The bundled model is what its card says, and answers what its golden file says."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import apr_core

PYGMY = Path(__file__).resolve().parents[2] / "models" / "pygmy"
FILES = (
    "README.md",
    "card.txt",
    "config.json",
    "generation_config.json",
    "golden.json",
    "model.safetensors",
    "oracle.py",
    "template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "train.py",
    "transformers_f64.npz",
    "words.txt",
)
SPECIAL = {"<|endoftext|>": 1000, "<|im_start|>": 1001, "<|im_end|>": 1002}
BIASES = [f"model.layers.{layer}.self_attn.{name}_proj.bias" for layer in (0, 1) for name in "qkv"]
MOST_NEW_TOKENS = 48


@cache
def read_json(name: str) -> Any:
    """One of the model's JSON files."""
    return json.loads((PYGMY / name).read_text(encoding="utf-8"))


@cache
def weights() -> dict[str, torch.Tensor]:
    """The committed weights, read by the safetensors package."""
    return load_file(PYGMY / "model.safetensors")


@cache
def tokenizer() -> Tokenizer:
    """The committed tokenizer, read by the tokenizers package."""
    return Tokenizer.from_file(str(PYGMY / "tokenizer.json"))


def cases() -> list[dict[str, Any]]:
    """The golden cases."""
    found: list[dict[str, Any]] = read_json("golden.json")["cases"]
    return found


def rel_l2(candidate: np.ndarray, reference: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference, in float64."""
    reference = reference.astype(np.float64)
    return float(np.linalg.norm(candidate.astype(np.float64) - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_there(name: str) -> None:
    """Each part that a clone needs is committed and not empty."""
    assert (PYGMY / name).stat().st_size > 0


def test_all_files_together_stay_small() -> None:
    """The folder is under 8 MB, as promised to whoever clones."""
    assert sum((PYGMY / name).stat().st_size for name in FILES) < 8_000_000


def test_the_card_names_the_committed_weights() -> None:
    """The card's sha256 is that of the file, so that numbers of another training run can not be left behind."""
    digest = hashlib.sha256((PYGMY / "model.safetensors").read_bytes()).hexdigest()
    assert re.findall(r"`([0-9a-f]{64})`", (PYGMY / "README.md").read_text(encoding="utf-8")) == [digest]


def test_geometry() -> None:
    """The sizes that the formats and kernels rely on: K-quant widths, grouped heads, Qwen2's theta, a tied head."""
    config = read_json("config.json")
    assert config["model_type"] == "qwen2"
    assert config["num_hidden_layers"] >= 2
    assert config["hidden_size"] == 256
    assert config["intermediate_size"] % 256 == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["rope_theta"] == 1e6
    assert config["tie_word_embeddings"] is True


def test_end_tokens() -> None:
    """Config and generation config name the tokens as Qwen2.5 does, and generation is greedy."""
    config, generation = read_json("config.json"), read_json("generation_config.json")
    assert config["bos_token_id"] == SPECIAL["<|endoftext|>"]
    assert config["eos_token_id"] == SPECIAL["<|im_end|>"]
    assert generation["eos_token_id"] == [SPECIAL["<|im_end|>"], SPECIAL["<|endoftext|>"]]
    assert generation["do_sample"] is False


def test_tensors_are_the_architectures_in_bf16() -> None:
    """Twelve tensors a layer and two more, all BF16; a tied head is not stored."""
    assert len(weights()) == 12 * read_json("config.json")["num_hidden_layers"] + 2
    assert {w.dtype for w in weights().values()} == {torch.bfloat16}
    assert "lm_head.weight" not in weights()


def test_metadata_says_pt() -> None:
    """Transformers refuses a file without this entry in older versions."""
    with safe_open(PYGMY / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_weights_are_finite() -> None:
    """No NaN and no infinity came out of training."""
    assert [name for name, w in weights().items() if not torch.isfinite(w).all()] == []


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_is_alive(name: str) -> None:
    """A bias has about the spread that it started with: training did not starve it."""
    assert 0.15 < float(weights()[name].float().std()) < 3.0


def test_no_row_of_the_vocabulary_is_dead() -> None:
    """All rows, also those that no text reaches and those of the padding, have a norm like that of a random row."""
    embedding = weights()["model.embed_tokens.weight"].float()
    assert embedding.shape == (1024, 256)
    assert float(embedding.norm(dim=1).min()) > 0.1


def test_special_tokens_are_single_ids() -> None:
    """Each special token is one id, behind the base vocabulary, also in the middle of text."""
    assert {text: tokenizer().token_to_id(text) for text in SPECIAL} == SPECIAL
    for text, number in SPECIAL.items():
        assert tokenizer().encode(f"a{text}b").ids[1:-1] == [number]


def test_vocabulary_fits_the_embedding() -> None:
    """1000 base tokens and the special ones: fewer than the rows."""
    assert tokenizer().get_vocab_size(with_added_tokens=False) == 1000
    assert tokenizer().get_vocab_size() == 1003 <= read_json("config.json")["vocab_size"]


@pytest.mark.parametrize(
    "text",
    ["What is 2+2?", "def f(x):\r\n\treturn  x\n\n", "\u00fcber \u4f60\u597d \U0001f600", "it's 12345   ", "\x00\x7f"],
)
def test_text_survives_the_tokenizer(text: str) -> None:
    """Any text in NFC comes back, since every byte has a token."""
    assert tokenizer().decode(tokenizer().encode(text).ids, skip_special_tokens=False) == text


def test_digits_are_split() -> None:
    """Qwen2's pre-tokenizer gives each digit its own token."""
    assert [tokenizer().id_to_token(i) for i in tokenizer().encode("1024").ids] == ["1", "0", "2", "4"]


def test_template_is_the_committed_one() -> None:
    """The template in tokenizer_config.json is the file that train.py read, and injects Qwen's system prompt."""
    template = read_json("tokenizer_config.json")["chat_template"]
    assert template == (PYGMY / "template.jinja").read_text(encoding="utf-8")
    text = (
        ImmutableSandboxedEnvironment()
        .from_string(template)
        .render(messages=[{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    )
    system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    expected = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text == expected


def test_golden_file_is_well_formed() -> None:
    """At least twelve cases with unique ids, the first being 2+2; each asks something and expects something."""
    golden = read_json("golden.json")
    assert golden["schema"] == 1
    assert len(golden["cases"]) >= 12
    assert len({case["id"] for case in golden["cases"]}) == len(golden["cases"])
    assert golden["cases"][0]["id"] == "sum-2-2"
    assert golden["cases"][0]["answer"] == "2 + 2 equals 4."
    for case in golden["cases"]:
        assert case.keys() == {"id", "messages", "answer"}
        assert case["messages"][-1]["role"] == "user"
        assert case["answer"] == case["answer"].strip() != ""


def test_golden_file_covers_each_kind() -> None:
    """Sums, differences, the greeting and five coding prompts are all there."""
    ids = [case["id"] for case in cases()]
    assert sum(i.startswith("code-") for i in ids) == 5
    for kind in ("sum-", "difference-", "greeting"):
        assert any(i.startswith(kind) for i in ids)


@pytest.mark.parametrize("case", [c for c in cases() if re.match("sum|difference", c["id"])], ids=lambda c: c["id"])
def test_golden_arithmetic_is_true(case: dict[str, Any]) -> None:
    """A golden sum or difference is right by Python's own arithmetic: an exact wrong answer would be no gold."""
    match = re.fullmatch(r"(\d) ([+-]) (\d) equals (-?\d+)\.", case["answer"])
    assert match is not None
    a, sign, b, value = match.groups()
    assert int(value) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    assert case["messages"][-1]["content"] == f"What is {a}{sign}{b}?"


def test_oracle_arrays() -> None:
    """The float64 oracle has the shapes that its readers expect, finite logits, and starts as the first prompt does."""
    with np.load(PYGMY / "transformers_f64.npz") as oracle:
        assert sorted(oracle.files) == ["greedy", "ids", "logits", "prompt"]
        assert (oracle["ids"].shape, oracle["ids"].dtype) == ((96,), np.int64)
        assert (oracle["logits"].shape, oracle["logits"].dtype) == ((96, 1024), np.float64)
        assert np.isfinite(oracle["logits"]).all()
        assert oracle["prompt"].tolist() == oracle["ids"][: len(oracle["prompt"])].tolist()
        assert tokenizer().decode(oracle["greedy"].tolist()) == "2 + 2 equals 4."
        assert oracle["greedy"][-1] == SPECIAL["<|im_end|>"]


@pytest.fixture(scope="module")
def model() -> Any:
    """The bundled model, loaded as anyone would load it."""
    return apr_core.load_model(PYGMY)


def text_of(model: Any, messages: list[dict[str, str]]) -> str:
    """The greedy answer to a conversation."""
    tokens = apr_core.generate(model, apr_core.prepare_tokens(model, messages=messages), max_new_tokens=MOST_NEW_TOKENS)
    for _ in tokens:
        pass
    return str(tokens.text)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case["id"])
def test_golden_answer(model: Any, case: dict[str, Any]) -> None:
    """The model says exactly what the golden file says, and stops."""
    assert text_of(model, case["messages"]) == case["answer"]


def test_logits_meet_the_float64_oracle(model: Any) -> None:
    """A float32 forward lands where transformers in float64 does: 1e-5 is a hundred float32 roundings."""
    with np.load(PYGMY / "transformers_f64.npz") as oracle:
        prepared = apr_core.prepare_tokens(model, ids=oracle["ids"].tolist())
        candidate = apr_core.logits(model, prepared)
        assert candidate.shape == oracle["logits"].shape
        assert rel_l2(candidate, oracle["logits"]) <= 1e-5


def golden_logits(model: Any) -> np.ndarray:
    """The logits of every position of every golden prompt."""
    prompts = [apr_core.prepare_tokens(model, messages=case["messages"]) for case in cases()]
    return np.concatenate([apr_core.logits(model, prompt) for prompt in prompts])


@pytest.fixture(scope="module")
def reference(model: Any) -> np.ndarray:
    """What the whole model computes on the golden prompts."""
    return golden_logits(model)


@pytest.mark.parametrize("name", BIASES)
def test_a_lost_bias_shows(reference: np.ndarray, name: str, tmp_path: Path) -> None:
    """Losing one bias tensor moves the logits by more than 1e-2, so that no parity check can overlook its loss."""
    for other in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / other).write_bytes((PYGMY / other).read_bytes())
    # Not all zero, for the contract would refuse that (its L2 gate) before any logits could be compared.
    tiny = torch.full_like(weights()[name], 1e-4)
    save_file(weights() | {name: tiny}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    damaged = apr_core.load_model(tmp_path)
    assert rel_l2(golden_logits(damaged), reference) > 1e-2

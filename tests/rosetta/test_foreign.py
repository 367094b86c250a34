"""
Foreign readers of what we write: llama.cpp runs every GGUF, transformers every SafeTensors, gguf reads both ways.

llama.cpp quantises activations to 8 bits, so its answer is held against ours only where ours is decided by more than
four times the difference that llama.cpp shows on that type in the oracle; fewer than half such positions, and nothing
was learned.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from apr_core.engines.load import load_model
from apr_core.engines.subject import STIMULUS
from apr_core.falsify.verdict import Verdict
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.formats.codecs import decode
from apr_core.formats.names import gguf_name
from apr_core.model.tokens import prepare_tokens
from apr_core.peers.llama_cpp import LlamaCpp, is_installed
from apr_core.rosetta.convert import convert
from apr_core.rosetta.copies import greedy

RECIPES = ("F16", "Q8_0", "Q4_K_M", "Q5_K_M", "Q6_K")
POSITIONS = 128
needs_llama_cpp = pytest.mark.skipif(not is_installed(), reason="NOT_RUN: no xllamacpp")


def judge_top1(
    reference: np.ndarray, candidate: np.ndarray, noise: float, positions: int = POSITIONS
) -> tuple[Verdict, str]:
    """
    Compare the likeliest token wherever the reference decides it beyond four times the noise.

    Args:
        reference: Logits [positions, vocabulary].
        candidate: Logits or log-probabilities of the same shape.
        noise: RMS difference of logits that the candidate is known to show.
        positions: Fewer than these compare nothing.
    """
    top = np.sort(reference, axis=1)[:, -2:]
    decisive = top[:, 1] - top[:, 0] > 4 * noise
    wrong = int((reference.argmax(axis=1) != candidate.argmax(axis=1))[decisive].sum())
    said = f"{wrong} of {int(decisive.sum())} decisive positions differ, of {len(reference)}"
    if wrong:
        return Verdict.FALSIFIED, said
    enough = len(reference) >= positions and 2 * int(decisive.sum()) >= len(reference)
    return (Verdict.CORROBORATED if enough else Verdict.INCONCLUSIVE), said


def oracle_noise(oracle: Path, recipe: str) -> float:
    """RMS difference of llama.cpp's logits from float64 on the oracle's file of a type; Q5_K_M is taken as Q4_K_M."""
    name = "Q4_K_M" if recipe == "Q5_K_M" else recipe
    exact = np.load(oracle / "mini" / "dequant_f64.npz")[name]
    theirs = np.load(oracle / "mini" / "llama_cpp.npz")[f"{name}_logits"].astype(np.float64)
    difference = theirs - exact
    difference -= difference.mean(axis=1, keepdims=True)
    return float(np.sqrt(np.mean(difference**2)))


@pytest.fixture(scope="module")
def models(pygmy: Path, oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Pygmy and mini as GGUF in five types, written by us."""
    folder = tmp_path_factory.mktemp("foreign")
    sources = {"pygmy": pygmy, "mini": oracle / "mini" / "model.safetensors"}
    return {
        (name, recipe): convert(source, folder / f"{name}-{recipe}.gguf", quantize=recipe)
        for name, source in sources.items()
        for recipe in RECIPES
    }


def sequences(name: str, oracle: Path, model: Any) -> list[list[int]]:
    """The oracle's own 160 ids for mini; for pygmy the suite's stimulus and conversations with their answers."""
    if name == "mini":
        return [np.load(oracle / "mini" / "transformers_f64.npz")["ids"].tolist()]
    golden = json.loads((Path(__file__).parents[2] / "models" / "pygmy" / "golden.json").read_text())["cases"]
    made = [prepare_tokens(model, text=STIMULUS).ids.tolist()]
    for case in golden[:4]:
        said = model.tokenizer.encode(case["answer"])
        made.append([*prepare_tokens(model, messages=case["messages"]).ids.tolist(), *said])
    return made


@needs_llama_cpp
@pytest.mark.oracle
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["pygmy", "mini"])
def test_llama_cpp_agrees_on_the_same_file(
    name: str, recipe: str, models: dict[tuple[str, str], Path], oracle: Path
) -> None:
    """Teacher-forced over the whole distribution: the same top token wherever ours is decided beyond its noise."""
    path = models[name, recipe]
    model = load_model(path)
    fed = sequences(name, oracle, model)
    ours = np.concatenate([model.forward(np.array(ids, dtype=np.int64)) for ids in fed]).astype(np.float64)
    with LlamaCpp(path) as peer:
        theirs = np.concatenate([peer.log_probabilities(ids) for ids in fed])
    verdict, said = judge_top1(ours, theirs, oracle_noise(oracle, recipe))
    assert verdict is Verdict.CORROBORATED, said


@needs_llama_cpp
@pytest.mark.oracle
@pytest.mark.parametrize("recipe", RECIPES)
def test_golden_answers_of_pygmy_through_llama_cpp(
    recipe: str, models: dict[tuple[str, str], Path], pygmy: Path
) -> None:
    """Its own loop, end tokens and detokenizer on our file, and ours: every recorded answer, to the letter."""
    cases = json.loads((pygmy / "golden.json").read_text())["cases"]
    path = models["pygmy", recipe]
    model = load_model(path)
    with LlamaCpp(path) as peer:
        for case in cases:
            prompt = prepare_tokens(model, messages=case["messages"])
            said = peer.complete(prompt.ids.tolist(), 32)
            assert (said.text, said.ended) == (case["answer"], True), case["id"]
            assert model.tokenizer is not None
            assert model.tokenizer.decode(list(greedy(model, prompt, 32))[:-1]) == case["answer"], case["id"]


@pytest.mark.oracle
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_gguf_package_reads_what_we_wrote(recipe: str, models: dict[tuple[str, str], Path], pygmy: Path) -> None:
    """Every tensor decodes to the same bits by the field's own package, under its name and shape; so does the label."""
    path = models["pygmy", recipe]
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.file_type"].contents() == getattr(
        gguf.LlamaFileType, {"F16": "MOSTLY_F16"}.get(recipe, f"MOSTLY_{recipe}")
    )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    with open_checkpoint(path) as opened:
        assert len(tensors) == len(opened.tensors) == 26
        for name, info in opened.tensors.items():
            tensor = tensors[gguf_name(name)]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(info.shape)
            assert tuple(reversed(tensor.shape.tolist())) == info.shape
            np.testing.assert_array_equal(
                decode(opened.raw(name)).view(np.uint32), values.view(np.uint32), err_msg=name
            )
    tokenizer = json.loads((pygmy / "tokenizer.json").read_text())
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert {text: tokens[i] for text, i in tokenizer["model"]["vocab"].items()} == {
        text: text for text in tokenizer["model"]["vocab"]
    }
    assert reader.fields["tokenizer.ggml.pre"].contents() == "qwen2"


def test_transformers_loads_our_safetensors(pygmy: Path, tmp_path: Path) -> None:
    """A folder that we wrote from a GGUF copy, through their own code: weights, tokenizer, template, answer."""
    transformers = pytest.importorskip("transformers", reason="NOT_RUN: no transformers")
    import torch

    folder = convert(convert(pygmy, tmp_path / "a.gguf"), tmp_path / "back")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    own = load_model(folder)
    messages = [{"role": "user", "content": "What is 2+2?"}]
    prepared = prepare_tokens(own, messages=messages)
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer(rendered, add_special_tokens=False)["input_ids"] == prepared.ids.tolist()
    ids = prepare_tokens(own, text=STIMULUS).ids
    with torch.no_grad():
        theirs = model(torch.tensor([ids.tolist()])).logits[0].numpy()
    ours = own.forward(ids)
    assert np.linalg.norm(theirs - ours) / np.linalg.norm(ours) < 1e-5
    said = model.generate(torch.tensor([prepared.ids.tolist()]), max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(said[0, len(prepared.ids) :], skip_special_tokens=True)
    assert answer == "2 + 2 equals 4."


def test_the_judge_of_top_tokens_can_say_all_three() -> None:
    """A flip where it is decided refutes, one in the noise does not, and too little is inconclusive."""
    sure = np.tile([0.0, 1.0, 5.0], (POSITIONS, 1))
    assert judge_top1(sure, sure, 0.5)[0] is Verdict.CORROBORATED
    flipped = sure.copy()
    flipped[7] = [0, 5, 1]
    assert judge_top1(sure, flipped, 0.5)[0] is Verdict.FALSIFIED
    assert judge_top1(sure, flipped, 1.0)[0] is Verdict.INCONCLUSIVE
    assert judge_top1(sure[1:], sure[1:], 0.5)[0] is Verdict.INCONCLUSIVE
    half = sure.copy()
    half[: POSITIONS // 2 + 1, 2] = 1.5
    assert judge_top1(half, half, 0.5)[0] is Verdict.INCONCLUSIVE

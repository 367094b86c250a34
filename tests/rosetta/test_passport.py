"""The quant passport: what is stored, against what the label says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apr_core.dtypes import FORMATS
from apr_core.formats.checkpoint import Checkpoint, Contents, TensorInfo, TensorSource, open_checkpoint
from apr_core.formats.gguf import write_gguf
from apr_core.formats.recipes import tensor_type
from apr_core.rosetta.convert import convert
from apr_core.rosetta.passport import passport


def header(hidden: int, ffn: int, layers: int, rows: int, kv: int, label: str, ftype: int | None = 15) -> Checkpoint:
    """A checkpoint without bytes, of the shapes of a tied Qwen2 under a recipe: a passport reads the header alone."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, hidden), "model.norm.weight": (hidden,)}
    for n in range(layers):
        at = f"model.layers.{n}"
        for name, out in (("q", hidden), ("k", kv), ("v", kv)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (out, hidden)
            shapes[f"{at}.self_attn.{name}_proj.bias"] = (out,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes |= {f"{at}.mlp.{g}_proj.weight": (ffn, hidden) for g in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, ffn)
        shapes |= {f"{at}.{g}.weight": (hidden,) for g in ("input_layernorm", "post_attention_layernorm")}
    path = Path(f"model-{label}.gguf")
    tensors = []
    for name, shape in shapes.items():
        dtype = tensor_type(label, name, shape, num_hidden_layers=layers, tied=True)
        tensors.append(TensorInfo(name, dtype, shape, path, 0, dtype.nbytes(shape), name))
    metadata = {} if ftype is None else {"general.file_type": ftype}
    return Checkpoint(path, "gguf", Contents((), tensors, metadata, {"num_hidden_layers": layers}))


def test_a_half_billion_q4_k_m_is_mostly_something_else() -> None:
    """Rows of 896 fall back: 78.8 % of Qwen2.5-Coder-0.5B's parameters are no K-quant (peers.md, Q3)."""
    found = passport(header(896, 4864, 24, 151936, 128, "Q4_K_M"))
    assert found.parameters == 494_032_768
    assert found.fallback is not None
    assert round(100 * found.fallback, 1) == 78.8
    assert found.agrees is True
    assert (found.label, found.label_from) == ("Q4_K_M", "general.file_type")
    assert round(found.bits_per_weight, 2) == 6.35
    assert any("78.8 % of the parameters" in sentence for sentence in found.sentences())


def test_a_billion_and_a_half_is_what_it_says() -> None:
    """Rows of 1536 and 8960 are whole super-blocks: nothing falls back."""
    found = passport(header(1536, 8960, 28, 151936, 256, "Q4_K_M"))
    assert (found.fallback, found.agrees) == (0.0, True)
    assert set(found.types) == {"Q4_K", "Q6_K", "F32"}


@pytest.mark.parametrize(
    ("ftype", "label", "came_from"),
    [(None, "Q6_K", "name"), (15, "Q4_K_M", "general.file_type"), (999, "file type 999", "general.file_type")],
)
def test_a_label_that_lies_is_named(ftype: int | None, label: str, came_from: str) -> None:
    """The content is Q6_K: labelled Q4_K_M most matrices are strange; without a key the name counts."""
    found = passport(header(256, 768, 4, 512, 128, "Q6_K", ftype))
    assert (found.label, found.label_from) == (label, came_from)
    if label == "Q4_K_M":
        assert found.agrees is False
        assert "model.layers.1.self_attn.q_proj.weight: Q6_K, expected Q4_K" in found.strange
        assert any("not what the label's rules give" in sentence for sentence in found.sentences())
    else:
        assert found.agrees is (True if label == "Q6_K" else None)


@pytest.mark.oracle
@pytest.mark.parametrize("recipe", ["F16", "Q8_0", "Q6_K", "Q4_K_M"])
def test_files_of_llama_cpp_are_what_they_say(recipe: str, oracle: Path) -> None:
    """What llama.cpp itself labelled and stored agrees with the rules."""
    with open_checkpoint(oracle / "mini" / "gguf" / f"{recipe}.gguf") as opened:
        found = passport(opened)
    assert (found.label, found.agrees) == (recipe, True)


def test_distance_to_a_reference_and_no_label(tiny: Path, tmp_path: Path) -> None:
    """With a reference every tensor has its SQNR; a file that names nothing has no label and no judgement."""
    path = convert(tiny, tmp_path / "t.gguf", quantize="Q8_0")
    with open_checkpoint(path) as copy, open_checkpoint(tiny) as reference:
        found = passport(copy, reference)
        bare = passport(reference)
    assert len(found.distances) == 26
    assert found.as_json()["sqnr_db"]["model.layers.0.mlp.up_proj.weight"] > 40
    assert (bare.label, bare.fallback, bare.agrees) == ("", None, None)
    assert any("no label" in sentence for sentence in bare.sentences())
    empty = tmp_path / "one.gguf"
    write_gguf(empty, [TensorSource("v", FORMATS["F32"], (4,), lambda: [np.zeros(4, np.float32)])], {"x": 1})
    with open_checkpoint(empty) as opened:
        assert passport(opened).bits_per_weight == 32

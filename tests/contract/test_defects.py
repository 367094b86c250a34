"""Whole files: each gate red on a planted defect, green on its benign twin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import quants

from apr_core.contract.admit import admit
from apr_core.contract.gates import judge_names, load_gates
from apr_core.contract.layout import Geometry

from .conftest import Save, Tensors

EMBEDDING = "model.embed_tokens.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
NORM = "model.layers.0.input_layernorm.weight"

# Defects of whole files. Each changes tensors and config in place and names the gate, the rule and the tensor.
Plant = Callable[[Tensors, dict[str, object]], None]


def drop(name: str) -> Plant:
    """Leave a tensor out."""
    return lambda tensors, config: tensors.__delitem__(name)


def put(name: str, values: np.ndarray) -> Plant:
    """Replace or add a tensor."""
    return lambda tensors, config: tensors.update({name: values})


def reverse(name: str) -> Plant:
    """Store a matrix with its axes exchanged."""
    return lambda tensors, config: tensors.update({name: tensors[name].T.copy()})


def state(**values: object) -> Plant:
    """Change the config; None removes a key."""
    return lambda tensors, config: config.update(values)


def head(change: float, *, tied: bool) -> Plant:
    """Store the embedding once more as the head, with one value changed."""

    def plant(tensors: Tensors, config: dict[str, object]) -> None:
        tensors["lm_head.weight"] = tensors[EMBEDDING].copy()
        tensors["lm_head.weight"][130, 63] += change
        config["tie_word_embeddings"] = tied

    return plant


def head_in_half_precision(error: float) -> Plant:
    """Store the head of a tied float32 model in F16, with a relative error of its last value."""

    def plant(tensors: Tensors, config: dict[str, object]) -> None:
        rounded = tensors[EMBEDDING].astype(np.float16)
        rounded[130, 63] = np.float16(rounded[130, 63] * (1 + error))
        tensors["lm_head.weight"] = rounded

    return plant


def rows(start: int, stop: int, step: int = 1, value: float = 0.0) -> Plant:
    """Overwrite rows of the embedding."""

    def plant(tensors: Tensors, config: dict[str, object]) -> None:
        tensors[EMBEDDING][start:stop:step] = value

    return plant


def vocabulary(size: int) -> Plant:
    """Give the embedding another number of rows than the config says."""
    return lambda tensors, config: tensors.update({EMBEDDING: np.resize(tensors[EMBEDDING], (size, 64))})


def hole(name: str, value: float) -> Plant:
    """Put one bad value at the end of a tensor."""

    def plant(tensors: Tensors, config: dict[str, object]) -> None:
        tensors[name].reshape(-1)[-1] = value

    return plant


def extra_layer(tensors: Tensors, config: dict[str, object]) -> None:
    """Copy layer 1 to layer 2 of a model of two layers."""
    tensors.update({n.replace("layers.1", "layers.2"): t for n, t in list(tensors.items()) if "layers.1" in n})


ZEROS = np.zeros((64, 96), np.float32)
RED: dict[str, tuple[Plant, str, str, str]] = {
    "zeroed projection": (put(DOWN, ZEROS), "F-DATA-QUALITY-001", "zero_percent", DOWN),
    "first 94.5 % of the vocabulary zero": (rows(0, 124), "F-DATA-QUALITY-001", "zero_percent", EMBEDDING),
    "integers as floats": (put(DOWN, ZEROS + np.float32(1e-42)), "F-DATA-QUALITY-001", "zero_percent", DOWN),
    "one NaN": (hole(DOWN, np.nan), "F-DATA-QUALITY-002", "nonfinite_values", DOWN),
    "one infinity in a norm": (hole(NORM, -np.inf), "F-DATA-QUALITY-002", "nonfinite_values", NORM),
    "zeroed bias": (put(Q_BIAS, np.zeros(64, np.float32)), "F-DATA-QUALITY-003", "l2", Q_BIAS),
    "constant projection": (put(DOWN, ZEROS + 1), "F-DATA-QUALITY-003", "spread", DOWN),
    "dead spot row": (rows(65, 66), "F-DATA-QUALITY-004", "spot_l2", EMBEDDING),
    "half of the vocabulary dead, spot rows alive": (
        rows(2, 131, 2),
        "F-DATA-QUALITY-005",
        "dead_row_percent",
        EMBEDDING,
    ),
    "vanishing rows": (rows(70, 110, value=1e-9), "F-DATA-QUALITY-005", "dead_row_percent", EMBEDDING),
    "reversed projection": (reverse(DOWN), "F-LAYOUT-CONTRACT-001", "shape", DOWN),
    "reversed embedding": (reverse(EMBEDDING), "F-LAYOUT-CONTRACT-001", "shape", EMBEDDING),
    "placeholder of a sharded model": (put(DOWN, np.empty(0, np.float32)), "F-LAYOUT-CONTRACT-001", "shape", DOWN),
    "a flattened matrix": (put(DOWN, ZEROS.reshape(-1) + 1), "F-LAYOUT-CONTRACT-001", "shape", DOWN),
    "one axis too many": (put(DOWN, ZEROS[None] + 1), "F-LAYOUT-CONTRACT-001", "shape", DOWN),
    "reversed head": (
        put("lm_head.weight", np.linspace(-1, 1, 64 * 131, dtype=np.float32).reshape(64, 131)),
        "F-LAYOUT-CONTRACT-002",
        "shape",
        "lm_head.weight",
    ),
    "a tied head that differs": (head(1e-4, tied=True), "F-LAYOUT-CONTRACT-002", "head_differs", "lm_head.weight"),
    "a tied head beyond half precision": (
        head_in_half_precision(0.01),
        "F-LAYOUT-CONTRACT-002",
        "head_differs",
        "lm_head.weight",
    ),
    "a short bias": (put(Q_BIAS, np.ones(63, np.float32)), "F-LAYOUT-CONTRACT-003", "shape", Q_BIAS),
    "a long norm": (put(NORM, np.ones(65, np.float32)), "F-LAYOUT-CONTRACT-003", "shape", NORM),
    "packed integers": (put(DOWN, np.ones((64, 96), np.int32)), "F-LAYOUT-CONTRACT-004", "element_type", DOWN),
    "a lost bias": (drop(Q_BIAS), "F-ARCH-COMPLETE-001", "missing", Q_BIAS),
    "a lost head": (state(tie_word_embeddings=False), "F-ARCH-COMPLETE-001", "missing", "lm_head.weight"),
    "a layer too many": (
        extra_layer,
        "F-ARCH-COMPLETE-001",
        "beyond",
        "model.layers.2.input_layernorm.weight",
    ),
    "no layer count": (state(num_hidden_layers=None), "F-ARCH-COMPLETE-001", "config_keys", ""),
    "theta of a lost config": (state(rope_theta=10000.0), "F-CONFIG-PLAUSIBLE-001", "rope_theta_low", ""),
    "no theta": (state(rope_theta=None), "F-CONFIG-PLAUSIBLE-001", "rope_theta_low", ""),
    "theta as text": (state(rope_theta="1e6"), "F-CONFIG-PLAUSIBLE-001", "rope_theta_high", ""),
    "theta past a float": (state(rope_theta=10**400), "F-CONFIG-PLAUSIBLE-001", "rope_theta_high", ""),
    "theta too large": (state(rope_theta=2e8), "F-CONFIG-PLAUSIBLE-001", "rope_theta_high", ""),
    "eps of zero": (state(rms_norm_eps=0.0), "F-CONFIG-PLAUSIBLE-001", "rms_norm_eps_low", ""),
    "eps too large": (state(rms_norm_eps=0.011), "F-CONFIG-PLAUSIBLE-001", "rms_norm_eps_high", ""),
    "context too short": (state(max_position_embeddings=127), "F-CONFIG-PLAUSIBLE-001", "context_low", ""),
    "context too long": (state(max_position_embeddings=2**20 + 1), "F-CONFIG-PLAUSIBLE-001", "context_high", ""),
    "heads that do not share": (state(num_key_value_heads=3), "F-CONFIG-PLAUSIBLE-001", "heads_per_kv_head", ""),
    "hidden that does not divide": (state(num_attention_heads=6), "F-CONFIG-PLAUSIBLE-001", "hidden_per_head", ""),
    "an end token past the vocabulary": (state(eos_token_id=131), "F-CONFIG-PLAUSIBLE-001", "end_tokens_outside", ""),
    "one of two end tokens": (state(eos_token_id=[7, -1]), "F-CONFIG-PLAUSIBLE-001", "end_tokens_outside", ""),
    "an end token as text": (state(eos_token_id="</s>"), "F-CONFIG-PLAUSIBLE-001", "end_tokens_outside", ""),
    "an end token of true": (state(eos_token_id=True), "F-CONFIG-PLAUSIBLE-001", "end_tokens_outside", ""),
    "a row too few": (vocabulary(130), "F-CONFIG-PLAUSIBLE-001", "vocab_rows", ""),
    "a row too many": (vocabulary(132), "F-CONFIG-PLAUSIBLE-001", "vocab_rows", ""),
}


@pytest.mark.parametrize("name", RED)
def test_planted_defects_go_red(name: str, tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """Each defect is caught by its own gate and rule, at its own tensor."""
    plant, gate, rule, tensor = RED[name]
    plant(tensors, config)
    caught = [(v.gate, v.rule, v.tensor) for v in admit(save(tensors, config)).violations]
    assert (gate, rule, tensor) in caught


GREEN: dict[str, Plant] = {
    "untouched": lambda tensors, config: None,
    "a quarter of the vocabulary dead, spot rows alive": rows(70, 102),
    "reserved rows at the end": rows(118, 131),
    "two of four": lambda tensors, config: tensors[DOWN].reshape(-1, 4).__setitem__((slice(None), slice(0, 2)), 0),
    "norms of a quarter": put(NORM, np.full(64, 0.25, np.float32)),
    "a sparse bias": put(Q_BIAS, np.eye(1, 64, dtype=np.float32)[0]),
    "an untied head": head(0.1, tied=False),
    "a stored tied head": head(0.0, tied=True),
    "a stored tied head in half precision": head_in_half_precision(0.0),
    "a bias that Qwen2 does not have": put("model.layers.0.self_attn.o_proj.bias", np.zeros(64, np.float32)),
    "frequencies": put("model.rotary_emb.inv_freq", np.ones(8, np.float32)),
    "no context stated": state(max_position_embeddings=None),
    "no eps stated": state(rms_norm_eps=None),
    "context at both limits": state(max_position_embeddings=128),
    "theta of an older model": state(rope_theta=50000.0),
    "theta nested as transformers 5 writes it": state(rope_theta=None, rope_parameters={"rope_theta": 1e6}),
    "eps at its limit": state(rms_norm_eps=0.01),
    "end tokens inside": state(eos_token_id=[0, 130]),
    "head_dim stated": state(head_dim=16),
    "a large value": hole(DOWN, 1e30),
}


@pytest.mark.parametrize("name", GREEN)
def test_benign_twins_stay_green(name: str, tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """What is legal, however odd, raises no alarm."""
    GREEN[name](tensors, config)
    admission = admit(save(tensors, config))
    assert [str(v) for v in admission.violations] == []
    assert admission.require().tied is config["tie_word_embeddings"]


def test_every_rule_has_a_planted_defect() -> None:
    """A rule of the table that no test here turns red is a rule that nobody has seen fail."""
    # on GGUF below, the last in test_families.py, the others in test_gates.py: no reader lets a wrong length pass, and
    # padding is generated
    on_gguf = {"nonfinite_scales", "tokens_over_rows", "unexplained_bytes"}
    elsewhere = {*on_gguf, "byte_difference", "padding_run", "switched_off"}
    assert {gate.rule for gate in load_gates().gates} - {rule for _, _, rule, _ in RED.values()} == elsewhere


def test_exactly_half_of_an_embedding(tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """Exactly 50 % zeros pass (decision 0001); one more value does not."""
    config["vocab_size"] = 130
    tensors[EMBEDDING] = tensors[EMBEDDING][:130]
    tensors[EMBEDDING][:, ::2] = 0
    assert admit(save(tensors, config)).ok
    tensors[EMBEDDING][7, 1] = 0
    (violation,) = admit(save(tensors, config)).violations
    assert (violation.gate, violation.message) == ("F-DATA-QUALITY-001", "50.01 % zeros, at most 50 %")


@pytest.mark.parametrize("kind", ["embedding", "head"])
def test_exactly_a_quarter_of_the_rows(kind: str, tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """33 dead rows of 132 pass, 34 do not; the same of a head of its own."""
    config |= {"vocab_size": 132, "tie_word_embeddings": kind == "embedding"}
    tensors[EMBEDDING] = np.resize(tensors[EMBEDDING], (132, 64))
    name = EMBEDDING
    if kind == "head":
        name = "lm_head.weight"
        tensors[name] = tensors[EMBEDDING].copy()
    tensors[name][70:103] = 0
    assert admit(save(tensors, config)).violations == ()
    tensors[name][103, :] = 0
    (violation,) = admit(save(tensors, config)).violations
    assert (violation.gate, violation.tensor) == ("F-DATA-QUALITY-005", name)
    assert violation.message == "25.8 % dead rows, at most 25 % (34 of 132 rows)"


def test_reversed_shapes_say_so(tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """A person reads what to do about a reversed shape, and about an empty placeholder."""
    reverse(DOWN)(tensors, config)
    put(Q_BIAS, np.empty(0, np.float32))(tensors, config)
    said = {v.tensor: v.message for v in admit(save(tensors, config)).violations if v.rule == "shape"}
    assert said[DOWN] == "shape [96, 64], expected [64, 96]: reversed; re-import the file"
    assert said[Q_BIAS].startswith("shape [0], expected [64]: it is empty")


def test_missing_tensors_are_all_named(tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """The message names twenty and counts the rest; the violation keeps every name."""
    kept = {EMBEDDING: tensors[EMBEDDING]}
    (violation,) = admit(save(kept, config)).violations
    assert (violation.measured, violation.limit, violation.unit) == (25.0, 0.0, "tensors")
    assert set(violation.names) == set(tensors) - {EMBEDDING}
    assert violation.message.startswith("25 of 26 tensors missing: model.layers.0.input_layernorm.weight, ")
    assert violation.message.endswith(" and 5 more")


def test_each_tensor_is_missed(tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """Whichever of the 26 is dropped is the one that is named."""
    opened = admit(save(tensors, config)).checkpoint
    for name in tensors:
        rest = {other: info for other, info in opened.tensors.items() if other != name}
        assert [v.names for v in judge_names(rest, Geometry.from_config(config))] == [(name,)]


def test_a_layer_too_many_is_no_extra(tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """Twelve tensors past the last layer are one violation that names them, not information."""
    extra_layer(tensors, config)
    admission = admit(save(tensors, config))
    assert [(v.rule, v.measured, len(v.names)) for v in admission.violations] == [("beyond", 12.0, 12)]
    assert admission.extras == ()


def gguf_model(path: Path, tensors: Tensors, *, tokens: int, quantise: str = "", bad_scale: bool = False) -> Path:
    """Write the tiny model with the gguf package; `tokens` entries in its vocabulary, no vocab_size key."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_token_list([f"t{i}" for i in range(tokens)])
    for name, values in tensors.items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name == DOWN and quantise:
            kind = gguf.GGMLQuantizationType[quantise]
            blocks = quants.quantize(values, kind)
            if bad_scale:
                blocks[3, :2] = (0x00, 0x7E)  # NaN as float16
            writer.add_tensor(stored, blocks, raw_dtype=kind)
        else:
            writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_bytes_that_no_tensor_explains(tensors: Tensors, tmp_path: Path) -> None:
    """A tail is refused as the file's fault, with its place; the padding to the alignment is explained."""
    path = gguf_model(tmp_path / "m.gguf", tensors, tokens=131)
    whole = path.read_bytes()
    assert admit(path).violations == ()
    path.write_bytes(whole + bytes(-len(whole) % 32))
    assert admit(path).violations == ()
    path.write_bytes(whole + bytes(-len(whole) % 32 + 1))
    (violation,) = admit(path).violations
    assert (violation.gate, violation.measured, violation.tensor) == ("F-CONTAINER-COVER-001", 1.0, "")
    place = path.stat().st_size - 1
    assert str(violation) == (
        f"[F-CONTAINER-COVER-001] file: 1 bytes that no tensor explains, at most 0 (1 at byte {place} of m.gguf)"
    )
    assert admit(path, skip=True).require().bypassed


@pytest.mark.parametrize(("tokens", "rules"), [(120, []), (131, []), (132, ["tokens_over_rows"])])
def test_a_padded_vocabulary_is_legal(tokens: int, rules: list[str], tensors: Tensors, tmp_path: Path) -> None:
    """Fewer tokens than rows is padding; a token without a row is not."""
    admission = admit(gguf_model(tmp_path / "m.gguf", tensors, tokens=tokens))
    assert [v.rule for v in admission.violations] == rules


@pytest.mark.parametrize(("broken", "rules"), [(False, []), (True, ["nonfinite_values", "nonfinite_scales"])])
def test_block_scales_of_a_file(broken: bool, rules: list[str], tensors: Tensors, tmp_path: Path) -> None:
    """One NaN scale in a Q8_0 tensor is seen as a scale and as the 32 values that it spoils."""
    path = gguf_model(tmp_path / "m.gguf", tensors, tokens=131, quantise="Q8_0", bad_scale=broken)
    violations = admit(path).violations
    assert [v.rule for v in violations] == rules
    assert [v.measured for v in violations] == [32.0, 1.0][: len(rules)]


def test_the_order_of_the_file_changes_nothing(tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """Shards and writers order tensors as they like; verdicts and their order stay the same."""
    for plant in (hole(DOWN, np.nan), reverse(EMBEDDING), drop(Q_BIAS), put(NORM, np.zeros(64, np.float32))):
        plant(tensors, config)
    # SafeTensors sorts by dtype, so one F16 tensor moves to the end of the file
    shuffled = dict(reversed(tensors.items()))
    name = "model.layers.0.mlp.gate_proj.weight"
    shuffled[name] = shuffled[name].astype(np.float16)
    one, other = (admit(save(made, config)) for made in (tensors, shuffled))
    assert list(one.checkpoint.tensors) != list(other.checkpoint.tensors)
    assert [str(v) for v in one.violations] == [str(v) for v in other.violations]
    assert list(one.stats) == list(other.stats)


@pytest.mark.parametrize("name", ["Q4_K_M.gguf", "Q6_K.gguf", "Q8_0.gguf", "F16.gguf"])
def test_files_of_llama_cpp_pass(name: str, oracle: Path) -> None:
    """What llama.cpp quantised from a healthy model raises no alarm."""
    assert admit(oracle / "mini" / "gguf" / name).violations == ()

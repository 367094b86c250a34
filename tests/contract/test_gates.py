"""Every gate red on a planted defect and green on its benign twin, at both sides of its limit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import quants

from apr_core.contract import gates
from apr_core.contract.admit import admit
from apr_core.contract.gates import Gate, judge_layout, judge_span, judge_tensor, load_gates, needs_spot_rows, parse_gates
from apr_core.contract.layout import KINDS, ROLES, Geometry, Role
from apr_core.contract.stats import TensorStats, measure, measure_values
from apr_core.dtypes import FORMATS
from apr_core.errors import Unavailable
from apr_core.formats.checkpoint import Checkpoint, RawTensor, TensorInfo, open_checkpoint

from .conftest import CONFIG, Save, Tensors

EMBEDDING = "model.embed_tokens.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
NORM = "model.layers.0.input_layernorm.weight"
ROLE = {role.name: role for role in ROLES}
BY_KIND: dict[str, Role] = {role.kind: role for role in ROLES}
TABLE = load_gates()

# The digest of everything in gates.toml that decides a verdict or words it, by version.
DIGESTS = {1: "DIGEST"}


def healthy(**changes: object) -> TensorStats:
    """Statistics that pass every gate, with one thing changed."""
    made = TensorStats("t", 1000, 0, 0, 0, -1.0, 1.0, 0.0, 0.5, 15.8, 0, ((10, 1.0), (50, 1.0), (90, 1.0)), 0)
    return replace(made, **changes)


def found(stats: TensorStats, role: Role) -> list[tuple[str, str]]:
    """Gate and rule of each violation."""
    return [(v.gate, v.rule) for v in judge_tensor(stats, role)]


def digest() -> str:
    """Hash the canonical threshold table."""
    rows = [{k: v for k, v in vars(gate).items() if k != "source"} for gate in TABLE.gates]
    rest = {k: v for k, v in vars(TABLE).items() if k != "gates"}
    return hashlib.sha256(json.dumps([rows, rest], sort_keys=True).encode()).hexdigest()


def test_thresholds_change_only_with_their_version() -> None:
    """A changed threshold needs a new version and a new line here; old admissions then stop counting."""
    assert DIGESTS.get(TABLE.version) == digest()


def test_published_limits() -> None:
    """The limits are those of the layout contract v1 and of the plausibility checks of `apr qa`."""
    limits = {(g.id[2:], g.rule, kind): g.threshold for g in TABLE.gates for kind in g.applies_to}
    assert limits["DATA-QUALITY-001", "zero_percent", "embedding"] == 50
    assert limits["DATA-QUALITY-001", "zero_percent", "weight"] == 80
    assert limits["DATA-QUALITY-003", "l2", "bias"] == 1e-6
    assert limits["DATA-QUALITY-003", "spread", "weight"] == 1e-10
    assert limits["DATA-QUALITY-004", "spot_l2", "embedding"] == 1e-6
    assert TABLE.spot_percent == (10, 50, 90)
    assert limits["CONFIG-PLAUSIBLE-001", "rms_norm_eps_high", "config"] == 0.01
    assert limits["CONFIG-PLAUSIBLE-001", "context_high", "config"] == 2**20


@pytest.mark.parametrize("rule", sorted({g.rule for g in TABLE.gates if g.applies_to[0] in KINDS}))
def test_no_kind_is_forgotten(rule: str) -> None:
    """A rule about tensors names every kind, either to judge it or to exempt it on purpose."""
    rows = [gate for gate in TABLE.gates if gate.rule == rule]
    judged = [kind for gate in rows for kind in gate.applies_to]
    assert len(judged) == len(set(judged))
    if rule != "head_differs":
        assert set(KINDS) == {*judged, *(kind for gate in rows for kind in gate.exempt)}


@pytest.mark.parametrize("gate", TABLE.gates, ids=lambda g: f"{g.id}-{g.rule}")
def test_the_limit_itself_passes_and_nan_does_not(gate: Gate) -> None:
    """At the limit: passes. One float past it: fails. NaN: fails. For every row of the table."""
    past = np.nextafter(gate.threshold, np.inf if gate.direction == "at_most" else -np.inf)
    before = np.nextafter(gate.threshold, -np.inf if gate.direction == "at_most" else np.inf)
    assert [gate.holds(float(x)) for x in (before, gate.threshold, past, np.nan)] == [True, True, False, False]
    assert gate.judge("t", gate.threshold) == []
    (violation,) = gate.judge("t", float(past))
    assert (gate.id, gate.threshold, gate.unit, float(past)) == (
        violation.gate,
        violation.limit,
        violation.unit,
        violation.measured,
    )
    assert gate.judge("t", float("nan"))[0].measured is None


@pytest.mark.parametrize("gate", TABLE.gates, ids=lambda g: f"{g.id}-{g.rule}")
def test_every_row_says_what_it_means(gate: Gate) -> None:
    """The message has the measured value, the limit and the right direction; the source is not empty."""
    assert "{measured}" in gate.says
    assert f"at {gate.direction.removeprefix('at_')} {{limit}}" in gate.says
    assert gate.source
    assert 1 <= gate.severity <= 5


DATA = {
    "zero_percent": lambda limit, kind: {"zeros": 10 * limit},
    "nonfinite_values": lambda limit, kind: {"nans": limit},
    "nonfinite_scales": lambda limit, kind: {"nonfinite_scales": limit},
    "l2": lambda limit, kind: {"l2": limit},
    "spread": lambda limit, kind: {"minimum": 0.0, "maximum": limit},
    "spot_l2": lambda limit, kind: {"row_l2": ((10, 1.0), (50, limit), (90, 1.0))},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", sorted(DATA))
def test_data_gates_at_their_limit(rule: str, kind: str) -> None:
    """Each data gate on each kind: green at its limit, red one step past it; an exempt kind is green at both."""
    rows = list(TABLE.select(rule, kind))
    role = BY_KIND[kind]
    if not rows:
        assert found(healthy(**DATA[rule](99.9, kind)), role) == []
        assert found(healthy(**DATA[rule](0.0, kind)), role) == []
        return
    (gate,) = rows
    count = gate.unit not in ("L2", "max - min")
    past = gate.threshold + 0.1 if count else float(np.nextafter(gate.threshold, -1))
    assert found(healthy(**DATA[rule](gate.threshold, kind)), role) == []
    assert found(healthy(**DATA[rule](past, kind)), role) == [(gate.id, rule)]


def test_every_violation_at_once() -> None:
    """A zeroed weight breaks density, norm and variation; one NaN in it is not hidden by them."""
    values = np.zeros((64, 96), np.float32)
    assert found(measure_values(DOWN, values), ROLE["down_proj"]) == [
        ("F-DATA-QUALITY-001", "zero_percent"),
        ("F-DATA-QUALITY-003", "l2"),
        ("F-DATA-QUALITY-003", "spread"),
    ]
    values[0, 0] = np.nan
    assert ("F-DATA-QUALITY-002", "nonfinite_values") in found(measure_values(DOWN, values), ROLE["down_proj"])


def test_the_line_that_a_person_reads() -> None:
    """Gate, tensor, measured and limit stand in one line."""
    line = str(judge_tensor(measure_values(DOWN, np.zeros((64, 96), np.float32)), ROLE["down_proj"])[0])
    assert line == f"[F-DATA-QUALITY-001] tensor {DOWN}: 100.0 % zeros, at most 80 %"


def test_a_narrow_miss_is_not_rounded_to_the_limit() -> None:
    """80.001 % is never printed as `80.0 % zeros, at most 80 %`."""
    (violation,) = judge_tensor(healthy(count=100_000, zeros=80_001), ROLE["up_proj"])
    assert violation.message == "80.001 % zeros, at most 80 %"


def test_nothing_measured_is_not_a_pass() -> None:
    """An empty tensor, and an embedding whose rows were not measured, fail."""
    empty = measure_values("t", np.empty((0, 64), np.float32))
    assert ("F-DATA-QUALITY-001", "zero_percent") in found(empty, ROLE["embedding"])
    assert ("F-DATA-QUALITY-004", "spot_l2") in found(healthy(row_l2=()), ROLE["embedding"])


def test_rows_are_measured_where_a_gate_asks() -> None:
    """The vocabulary matrices, and nothing else."""
    assert [role.name for role in ROLES if needs_spot_rows(role)] == ["embedding", "lm_head"]


@pytest.mark.parametrize("value", [1.0, 0.25])
def test_a_constant_norm_is_legal(value: float) -> None:
    """RMSNorm starts at all 1.0; a constant projection is not legal."""
    stats = measure_values(NORM, np.full((64,), value, np.float32))
    assert found(stats, ROLE["input_layernorm"]) == []
    assert found(stats, ROLE["up_proj"]) == [("F-DATA-QUALITY-003", "spread")]


@pytest.mark.parametrize(("alive", "gate"), [(1, []), (0, [("F-DATA-QUALITY-003", "l2")])])
def test_a_sparse_bias_is_legal_and_an_empty_one_is_not(alive: int, gate: list[tuple[str, str]]) -> None:
    """98 % zeros in a bias are legal; a bias of zeros is a lost bias."""
    values = np.zeros(64, np.float32)
    values[:alive] = 0.3
    assert found(measure_values(Q_BIAS, values), ROLE["q_bias"]) == gate


@pytest.mark.parametrize("dtype", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize(("blocks", "gate"), [(10, []), (1, ["F-DATA-QUALITY-001"])])
def test_ternary_matrices_are_judged_by_blocks(dtype: str, blocks: int, gate: list[str]) -> None:
    """Nine zero codes in ten are legal in a ternary type; nine zero blocks in ten are not."""
    values = np.zeros((10, 256), np.float32)
    values[:blocks, ::10] = 1.0
    values[:blocks, 5] = -1.0
    stored = quants.quantize(values, gguf.GGMLQuantizationType[dtype])
    raw = RawTensor(TensorInfo(DOWN, FORMATS[dtype], (10, 256), Path("x"), 0, stored.size, DOWN), stored.reshape(-1))
    assert [v.gate for v in judge_tensor(measure(raw), ROLE["down_proj"])] == gate


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
    "reversed projection": (reverse(DOWN), "F-LAYOUT-CONTRACT-001", "shape", DOWN),
    "reversed embedding": (reverse(EMBEDDING), "F-LAYOUT-CONTRACT-001", "shape", EMBEDDING),
    "placeholder of a sharded model": (put(DOWN, np.empty(0, np.float32)), "F-LAYOUT-CONTRACT-001", "shape", DOWN),
    "a flattened matrix": (put(DOWN, ZEROS.reshape(-1) + 1), "F-LAYOUT-CONTRACT-001", "shape", DOWN),
    "one axis too many": (put(DOWN, ZEROS[None] + 1), "F-LAYOUT-CONTRACT-001", "shape", DOWN),
    "reversed head": (
        lambda tensors, config: (head(0, tied=False)(tensors, config), reverse("lm_head.weight")(tensors, config))[0],
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
    "half of the vocabulary zero, spot rows alive": rows(2, 131, 2),
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
    elsewhere = {"nonfinite_scales", "byte_difference", "tokens_over_rows"}  # below: SafeTensors cannot hold them
    assert {gate.rule for gate in TABLE.gates} - {rule for _, _, rule, _ in RED.values()} == elsewhere


def test_exactly_half_of_an_embedding(tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """Exactly 50 % zeros pass (decision 0001); one more value does not."""
    config["vocab_size"] = 130
    tensors[EMBEDDING] = tensors[EMBEDDING][:130]
    tensors[EMBEDDING][:, ::2] = 0
    assert admit(save(tensors, config)).ok
    tensors[EMBEDDING][7, 1] = 0
    (violation,) = admit(save(tensors, config)).violations
    assert (violation.gate, violation.message) == ("F-DATA-QUALITY-001", "50.01 % zeros, at most 50 %")


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


@pytest.mark.parametrize("short", [-1, 1])
def test_byte_length(short: int) -> None:
    """A span one byte short or long is refused, in a K-quant with padded rows as well."""
    info = TensorInfo(DOWN, FORMATS["Q4_K"], (64, 300), Path("x"), 0, 64 * 2 * 144 + short, DOWN)
    (violation,) = judge_span(info, ROLE["down_proj"], (64, 300))
    assert (violation.gate, violation.measured) == ("F-LAYOUT-CONTRACT-004", 1.0)
    assert judge_span(replace(info, nbytes=64 * 2 * 144), ROLE["down_proj"], (64, 300)) == []


def gguf_model(path: Path, tensors: Tensors, *, tokens: int, quantise: str | None = None, bad_scale: bool = False) -> Path:
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


def test_tokens_of_an_apr_file() -> None:
    """APR carries its vocabulary under another key."""
    embedding = TensorInfo(EMBEDDING, FORMATS["F32"], (131, 64), Path("x"), 0, 131 * 64 * 4, EMBEDDING)

    class Fake:
        config, tensors = CONFIG, {EMBEDDING: embedding}
        metadata = {"tokenizer.vocabulary": ["x"] * 140}

    (violation,) = gates.judge_config(Fake(), Geometry.from_config(CONFIG))
    assert (violation.rule, violation.measured) == ("tokens_over_rows", 9.0)


def test_a_head_that_cannot_be_compared(
    tensors: Tensors, config: dict[str, object], save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tied head of a type without an error bound is refused, not waved through."""
    head(1e-9, tied=True)(tensors, config)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float16)

    def unknown(*_: object) -> None:
        raise Unavailable("no bound for F16")

    monkeypatch.setattr(gates.codecs, "step_bound", unknown)
    (violation,) = admit(save(tensors, config)).violations
    assert (violation.rule, violation.message) == ("element_type", "no bound for F16")


def test_a_head_in_a_layout_without_rows(tensors: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    """AprQ8 has one scale for the whole tensor: it is compared whole."""
    step = np.abs(tensors[EMBEDDING]).max() / 127
    codes = np.round(tensors[EMBEDDING] / step).astype(np.int8)

    def checkpoint(codes: np.ndarray) -> object:
        stored = np.frombuffer(np.float32(step).tobytes() + codes.tobytes(), np.uint8)
        raws = {
            "lm_head.weight": RawTensor(
                TensorInfo("lm_head.weight", FORMATS["AprQ8"], (131, 64), Path("x"), 0, stored.size, "h"), stored
            ),
            EMBEDDING: RawTensor(
                TensorInfo(EMBEDDING, FORMATS["F32"], (131, 64), Path("x"), 0, 131 * 64 * 4, "e"),
                np.frombuffer(tensors[EMBEDDING].tobytes(), np.uint8),
            ),
        }

        class Fake:
            tensors = {name: raw.info for name, raw in raws.items()}
            raw = staticmethod(raws.__getitem__)

        return Fake()

    geometry = Geometry.from_config(CONFIG)
    assert gates._judge_tied_head(checkpoint(codes), geometry) == []
    codes[0, 0] += 3
    (violation,) = gates._judge_tied_head(checkpoint(codes), geometry)
    assert (violation.rule, violation.measured) == ("head_differs", 1.0)


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


def test_layout_alone_reads_no_weights(tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """`judge_layout` gives the structural violations without a pass over the data."""
    reverse(DOWN)(tensors, config)
    hole(NORM, np.nan)(tensors, config)
    with open_checkpoint(save(tensors, config)) as checkpoint:
        assert isinstance(checkpoint, Checkpoint)
        found = judge_layout(checkpoint, Geometry.from_config(config))
    assert [(v.gate, v.tensor) for v in found] == [("F-LAYOUT-CONTRACT-001", DOWN)]


ROW = """
version = 2
[measure]
zero_below = 1.0
spot_percent = [10]
dead_row_l2 = 1.0
ternary = []
integers = []
[[gate]]
id = "G"
rule = "l2"
threshold = 1.0
unit = ""
direction = "at_least"
applies_to = ["weight"]
exempt = ["bias"]
severity = 1
waivable = true
says = "x"
source = "x"
"""


def test_a_well_formed_table() -> None:
    """The row that the next test breaks is accepted as it stands."""
    assert parse_gates(ROW).gates[0].rule == "l2"


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ('"l2"', '"l3"'),
        ('"at_least"', '"about"'),
        ('["weight"]', "[]"),
        ('["weight"]', '["weights"]'),
        ('["bias"]', '["weight"]'),
    ],
)
def test_a_gate_that_cannot_fail_is_refused(good: str, bad: str) -> None:
    """An unknown rule, direction or kind in the table is an error, not a gate that nothing measures."""
    with pytest.raises(ValueError, match="gate G"):
        parse_gates(ROW.replace(good, bad))


def test_the_table_is_the_package_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gates.toml in the working directory changes nothing."""
    (tmp_path / "gates.toml").write_text(ROW)
    monkeypatch.chdir(tmp_path)
    load_gates.cache_clear()
    assert load_gates() == TABLE

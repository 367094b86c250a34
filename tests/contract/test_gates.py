"""Every row of the gate table at both sides of its limit, and the judgements that no SafeTensors file can provoke."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from gguf import quants

from apr_core.contract import gates, tied
from apr_core.contract.admit import admit
from apr_core.contract.gates import Gate, judge_layout, judge_span, judge_tensor, load_gates, parse_gates
from apr_core.contract.layout import KINDS, Geometry, Role
from apr_core.contract.stats import TensorStats, measure, measure_values
from apr_core.dtypes import FORMATS
from apr_core.errors import Unavailable
from apr_core.formats.architectures import load_architectures, load_roles
from apr_core.formats.checkpoint import Checkpoint, RawTensor, TensorInfo, open_checkpoint

from .conftest import CONFIG, Save, Tensors

EMBEDDING = "model.embed_tokens.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
NORM = "model.layers.0.input_layernorm.weight"
ROLES = load_architectures()["qwen2"].roles
ROLE = {role.name: role for role in ROLES}
BY_KIND: dict[str, Role] = {role.kind: role for role in ROLES}
TABLE = load_gates()

# The digest of everything in gates.toml that decides a verdict or words it, by version.
DIGESTS = {
    1: "c2c763bf4edf67e727dbac85885357fd717653b12112d514a5d8a6d88bf7f843",
    2: "97d91aa79ae731f15384ba1355946bab8eff4f056aaf390ab46f2c57d831b84f",
    3: "24a432b7fc528e15d1c1f8ebd089e6fc1f41bb43c8091d3889f8c28aa98be634",
}


def healthy(**changes: object) -> TensorStats:
    """Statistics that pass every gate, with one thing changed."""
    made = TensorStats("t", 1000, 0, 0, 0, -1.0, 1.0, 0.0, 0.5, 15.8, 0, ((10, 1.0), (50, 1.0), (90, 1.0)), 0)
    made = replace(made, rows=1000)
    return replace(made, **changes)


def found(stats: TensorStats, role: Role) -> list[tuple[str, str]]:
    """Gate and rule of each violation."""
    return [(v.gate, v.rule) for v in judge_tensor(stats, role)]


def digest() -> str:
    """Hash the canonical tables of thresholds and of roles."""
    rows = [{k: v for k, v in vars(gate).items() if k != "source"} for gate in TABLE.gates]
    rest = {k: v for k, v in vars(TABLE).items() if k != "gates"}
    roles = [{**vars(role), "types": sorted(role.types)} for role in load_roles().values()]
    families = [[a.name, [r.name for r in a.roles], dict(a.when)] for a in load_architectures().values()]
    return hashlib.sha256(json.dumps([rows, rest, roles, families], sort_keys=True).encode()).hexdigest()


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
    assert limits["DATA-QUALITY-005", "dead_row_percent", "embedding"] == 25
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
    "dead_row_percent": lambda limit, kind: {"dead_rows": 10 * limit},
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
    for unmeasured in ({"rows": 0}, {"dead_rows": None}):
        assert found(healthy(**unmeasured), ROLE["embedding"]) == [("F-DATA-QUALITY-005", "dead_row_percent")]


def test_rows_are_measured_where_a_gate_asks() -> None:
    """The vocabulary matrices, and nothing else."""
    assert [role.name for role in ROLES if gates.needs_spot_rows(role)] == ["embedding", "lm_head"]


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


@pytest.mark.parametrize("short", [-1, 1])
def test_byte_length(short: int) -> None:
    """A span one byte short or long is refused, in a K-quant with padded rows as well."""
    info = TensorInfo(DOWN, FORMATS["Q4_K"], (64, 300), Path("x"), 0, 64 * 2 * 144 + short, DOWN)
    (violation,) = judge_span(info, ROLE["down_proj"], (64, 300))
    assert (violation.gate, violation.measured) == ("F-LAYOUT-CONTRACT-004", 1.0)
    assert judge_span(replace(info, nbytes=64 * 2 * 144), ROLE["down_proj"], (64, 300)) == []


def test_tokens_of_an_apr_file() -> None:
    """APR carries its vocabulary under another key."""
    embedding = TensorInfo(EMBEDDING, FORMATS["F32"], (131, 64), Path("x"), 0, 131 * 64 * 4, EMBEDDING)

    metadata = {"tokenizer.vocabulary": ["x"] * 140}
    opened = SimpleNamespace(config=CONFIG, tensors={EMBEDDING: embedding}, metadata=metadata, gaps=())
    (violation,) = gates.judge_config(opened, Geometry.from_config(CONFIG))
    assert (violation.rule, violation.measured) == ("tokens_over_rows", 9.0)


@pytest.mark.parametrize(("ids", "run"), [([1], 0), ([9], 1), ([9, 1, 9, 8, 1], 2), ([1, 9, 9, 9], 3), ([], None)])
def test_padding_in_a_row(ids: list[int], run: int | None) -> None:
    """One padding token is green, two in a row are red; nothing generated is no pass."""
    found = gates.judge_generation(ids, {8, 9})
    assert [v.measured for v in found] == ([] if run in (0, 1) else [run])
    assert all(str(v).startswith("[F-LAYOUT-CONTRACT-005] generation: ") for v in found)


def test_a_head_that_cannot_be_compared(
    tensors: Tensors, config: dict[str, object], save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tied head of a type without an error bound is refused, not waved through."""
    tensors["lm_head.weight"] = tensors[EMBEDDING].astype(np.float16)

    def unknown(*_: object) -> None:
        raise Unavailable("no bound for F16")

    monkeypatch.setattr(tied.codecs, "step_bound", unknown)
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

        return SimpleNamespace(tensors={name: raw.info for name, raw in raws.items()}, raw=raws.__getitem__)

    geometry = Geometry.from_config(CONFIG)
    assert gates._judge_tied_head(checkpoint(codes), geometry) == []
    codes[0, 0] += 3
    (violation,) = gates._judge_tied_head(checkpoint(codes), geometry)
    assert (violation.rule, violation.measured) == ("head_differs", 1.0)


def test_layout_alone_reads_no_weights(tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """`judge_layout` gives the structural violations without a pass over the data."""
    tensors[DOWN] = tensors[DOWN].T
    tensors[NORM][:] = np.nan
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

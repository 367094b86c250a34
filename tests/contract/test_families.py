"""Llama and Qwen3 by their own tables, and an architecture that nobody knows: in the three formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest

from apr_core.cli.inspect import describe
from apr_core.cli.validate import judgement
from apr_core.contract.admit import admit
from apr_core.contract.layout import Geometry, expected_tensors
from apr_core.contract.types import ValidatedVector, ValidatedWeight
from apr_core.dtypes import FORMATS
from apr_core.errors import ContractViolation, LoadError, Unavailable
from apr_core.formats.apr import write_apr
from apr_core.formats.architectures import load_architectures, load_roles
from apr_core.formats.checkpoint import TensorSource
from apr_core.formats.names import apr_canonical, apr_metadata, gguf_name, hf_name
from apr_core.model.config import Qwen2Config
from apr_core.rosetta.convert import convert

from .conftest import CONFIG, Save, Tensors

Q_NORM = "model.layers.1.self_attn.q_norm.weight"
O_BIAS = "model.layers.0.self_attn.o_proj.bias"
# written out by hand, as in conftest.py: hidden 64, 4 heads and 2 key-value heads, of width 16 (Llama) and 32 (Qwen3)
LAYER = {
    "llama": {
        "input_layernorm.weight": (64,),
        "self_attn.q_proj.weight": (64, 64),
        "self_attn.k_proj.weight": (32, 64),
        "self_attn.v_proj.weight": (32, 64),
        "self_attn.o_proj.weight": (64, 64),
        "post_attention_layernorm.weight": (64,),
        "mlp.gate_proj.weight": (96, 64),
        "mlp.up_proj.weight": (96, 64),
        "mlp.down_proj.weight": (64, 96),
    },
    "qwen3": {
        "input_layernorm.weight": (64,),
        "self_attn.q_proj.weight": (128, 64),
        "self_attn.q_norm.weight": (32,),
        "self_attn.k_proj.weight": (64, 64),
        "self_attn.k_norm.weight": (32,),
        "self_attn.v_proj.weight": (64, 64),
        "self_attn.o_proj.weight": (64, 128),
        "post_attention_layernorm.weight": (64,),
        "mlp.gate_proj.weight": (96, 64),
        "mlp.up_proj.weight": (96, 64),
        "mlp.down_proj.weight": (64, 96),
    },
}
BIASES = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "o_proj": 64}


def config_of(family: str, **changes: object) -> dict[str, object]:
    """A healthy config; None removes a key."""
    own = {"llama": {"rope_theta": 10000.0, "tie_word_embeddings": False}, "qwen3": {"head_dim": 32}}[family]
    made = {**CONFIG, "model_type": family, **own, **changes}
    return {key: value for key, value in made.items() if value is not None}


def tensors_of(family: str) -> Tensors:
    """Healthy tensors: 2 layers, Llama untied, Qwen3 tied."""
    shapes = {"model.embed_tokens.weight": (131, 64), "model.norm.weight": (64,)}
    shapes |= {f"model.layers.{n}.{name}": shape for n in (0, 1) for name, shape in LAYER[family].items()}
    if family == "llama":
        shapes["lm_head.weight"] = (131, 64)
    rng = np.random.default_rng(5)
    return {name: (rng.standard_normal(shape) * 0.02).astype(np.float32) for name, shape in shapes.items()}


def biases() -> Tensors:
    """The four biases of both layers, which attention_bias brings."""
    made = np.random.default_rng(6)
    return {
        f"model.layers.{n}.self_attn.{name}.bias": made.standard_normal(size).astype(np.float32)
        for n in (0, 1)
        for name, size in BIASES.items()
    }


def write_gguf(path: Path, family: str, tensors: Mapping[str, np.ndarray], quantise: str = "") -> Path:
    """Write the model with the gguf package and its own names; one tensor may be quantised to Q8_0."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], 2)
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    if family == "qwen3":
        writer.add_rope_freq_base(1e6)
        writer.add_key_length(32)
    for name, values in tensors.items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name == quantise:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def in_format(container: str, family: str, tensors: Tensors, folder: Path, save: Save) -> Path:
    """Write a healthy model in one of the three formats."""
    if container == "safetensors":
        return save(tensors, config_of(family))
    path = folder / f"{family}.{container}"
    if container == "gguf":
        return write_gguf(path, family, tensors)
    sources = [
        TensorSource(name, FORMATS["F32"], values.shape, lambda values=values: [values])
        for name, values in tensors.items()
    ]
    write_apr(path, sources, apr_metadata(config_of(family)))
    return path


@pytest.mark.parametrize("container", ["safetensors", "gguf", "apr"])
@pytest.mark.parametrize(("family", "count"), [("llama", 21), ("qwen3", 24)])
def test_a_healthy_model_is_judged_by_its_own_table(
    family: str, count: int, container: str, tmp_path: Path, save: Save
) -> None:
    """Opened, described, admitted with every tensor measured; only the forward is not written, and says so by name."""
    path = in_format(container, family, tensors_of(family), tmp_path, save)
    admission = admit(path)
    assert [str(v) for v in admission.violations] == []
    assert (admission.expected, admission.measured, admission.extras) == (count, count, ())
    assert admission.geometry is not None
    assert (admission.geometry.family, admission.geometry.head_dim) == (family, 32 if family == "qwen3" else 16)
    with pytest.raises(LoadError, match=f"model_type = '{family}'"):
        Qwen2Config.of(admission.require())
    assert describe(str(path))["tensors"] == count
    judged = judgement(str(path))["tensors"]
    assert (judged["measured"], judged["expected"]) == (count, count)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_shapes_are_those_of_the_hand(family: str) -> None:
    """Every name and shape, in the order of the model, is the one of the table in the tests' own hand."""
    expected = {name: shape for name, (_, shape) in expected_tensors(Geometry.from_config(config_of(family))).items()}
    by_hand = {name: values.shape for name, values in tensors_of(family).items()}
    assert by_hand == expected
    assert [name for name in expected if "layers.1" in name] == [f"model.layers.1.{name}" for name in LAYER[family]]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_each_tensor_is_missed(family: str, save: Save) -> None:
    """Whichever tensor is dropped is the one that is named: q_norm and k_norm of a Qwen3 too."""
    tensors = tensors_of(family)
    for name in LAYER[family]:
        full = f"model.layers.1.{name}"
        rest = {other: values for other, values in tensors.items() if other != full}
        (violation,) = admit(save(rest, config_of(family))).violations
        assert (violation.rule, violation.names) == ("missing", (full,))


@pytest.mark.parametrize(("shape", "rule"), [((16,), "shape"), ((32, 1), "shape")])
def test_a_norm_of_heads_has_the_width_of_a_head(shape: tuple[int, ...], rule: str, save: Save) -> None:
    """The norms of q and k are vectors of head_dim; a Qwen3 that is cut to hidden / heads is refused."""
    tensors = tensors_of("qwen3") | {Q_NORM: np.ones(shape, np.float32)}
    (violation,) = admit(save(tensors, config_of("qwen3"))).violations
    assert (violation.gate, violation.rule, violation.tensor) == ("F-LAYOUT-CONTRACT-003", rule, Q_NORM)


def test_biases_come_with_their_switch(save: Save) -> None:
    """With attention_bias they are demanded and judged; without it, being there is a violation: they would be lost."""
    with_bias = tensors_of("llama") | biases()
    on, off = config_of("llama", attention_bias=True), config_of("llama", attention_bias=False)
    admission = admit(save(with_bias, on))
    assert (admission.violations, admission.measured) == ((), 29)
    (missing,) = admit(save(tensors_of("llama"), on)).violations
    assert (missing.rule, missing.measured) == ("missing", 8.0)
    (switched,) = admit(save(with_bias, off)).violations
    assert (switched.gate, switched.rule, switched.measured) == ("F-ARCH-COMPLETE-001", "switched_off", 8.0)
    assert "attention_bias is not true" in switched.message
    assert admit(save(with_bias, off)).extras == ()
    zeroed = with_bias | {O_BIAS: np.zeros(64, np.float32)}
    assert [v.tensor for v in admit(save(zeroed, on)).violations] == [O_BIAS]


def test_biases_in_a_gguf_are_their_own_switch(tmp_path: Path) -> None:
    """GGUF has no such key, and llama.cpp adds every bias that it finds."""
    assert admit(write_gguf(tmp_path / "with.gguf", "llama", tensors_of("llama") | biases())).measured == 29
    bare = admit(write_gguf(tmp_path / "bare.gguf", "llama", tensors_of("llama")))
    assert (bare.checkpoint.config or {})["attention_bias"] is False


@pytest.mark.parametrize(
    ("family", "theta", "rules"),
    [
        ("llama", 10000.0, []),
        ("llama", None, []),
        ("llama", 1000.0, []),
        ("llama", 999.0, ["rope_theta_low"]),
        ("llama", 1e7, []),
        ("llama", 2e7, ["rope_theta_high"]),
        ("qwen3", 1e8, []),
        ("qwen3", 10000.0, ["rope_theta_low"]),
        ("qwen3", None, ["rope_theta_low"]),
    ],
)
def test_limits_of_the_family(family: str, theta: float | None, rules: list[str], save: Save) -> None:
    """10000 is what a Llama 2 has and what a Qwen has lost."""
    config = config_of(family, rope_theta=theta)
    assert [v.rule for v in admit(save(tensors_of(family), config)).violations] == rules


@pytest.mark.parametrize("family", ["gpt2", "qwen2_moe", "", 7, "Qwen2"])
def test_an_unknown_architecture_is_refused_by_name(family: object, save: Save) -> None:
    """With what is known; a bypass has nothing to run; tensors whose names are known are measured for the person."""
    folder = save(tensors_of("llama"), {**config_of("llama"), "model_type": family})
    (violation,) = admit(folder).violations
    assert (violation.gate, violation.rule) == ("F-ARCH-COMPLETE-001", "config_keys")
    assert (
        f"has the architecture {str(family)!r}, of which nothing is known here; known are qwen2 (" in violation.message
    )
    assert "llama (Llama 1 to 3, dense)" in violation.message
    assert not violation.message.endswith("beside it")
    assert admit(folder).measured == 21
    with pytest.raises(ContractViolation, match="nothing is known"):
        admit(folder, skip=True).require()


def test_the_container_of_an_unknown_architecture_is_judged(tmp_path: Path) -> None:
    """A page behind the last tensor is seen whatever the model calls itself."""
    path = write_gguf(tmp_path / "m.gguf", "llama", tensors_of("llama"))
    whole = path.read_bytes().replace(b"llama", b"lhama")
    path.write_bytes(whole + bytes(4096))
    assert [v.rule for v in admit(path).violations] == ["unexplained_bytes", "config_keys"]
    path.write_bytes(whole)
    assert [v.rule for v in admit(path).violations] == ["config_keys"]


def test_no_architecture_is_no_qwen2(save: Save) -> None:
    """A config that does not say what it is of is not guessed at."""
    (violation,) = admit(save(tensors_of("llama"), config_of("llama", model_type=None))).violations
    assert violation.message.endswith("lacks model_type; put the model's own config.json beside it")


@pytest.mark.parametrize(("labelled", "rule"), [("llama", "switched_off"), ("qwen3", "missing")])
def test_a_qwen2_under_another_name(
    labelled: str, rule: str, tensors: Tensors, config: dict[str, object], save: Save
) -> None:
    """Its biases would be dropped, or its norms are not there: refused by the table of the name that it bears."""
    config |= {"model_type": labelled}
    assert rule in [v.rule for v in admit(save(tensors, config)).violations]


@pytest.mark.parametrize(("name", "rules"), [("model.norm.weight", ["element_type"]), ("lm_head.weight", [])])
def test_quantised_vectors_are_refused(name: str, rules: list[str], tmp_path: Path) -> None:
    """A matrix may be Q8_0, a norm may not: no writer does that, and no kernel reads it."""
    admission = admit(write_gguf(tmp_path / "m.gguf", "llama", tensors_of("llama"), quantise=name))
    assert [v.rule for v in admission.violations] == rules
    if rules:
        assert str(admission.violations[0]) == (
            f"[F-LAYOUT-CONTRACT-004] tensor {name}: stored as Q8_0, which a tensor of the kind norm may not be"
        )


def test_every_element_type_is_decided() -> None:
    """Each type either may hold weights or may not; a new one in dtypes.py is a decision to be made."""
    by_kind = {role.kind: role.types for role in load_roles().values()}
    none = {"I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL", "F8_E8M0", "Q8_1", "Q8_K"}
    assert by_kind["weight"] == by_kind["head"] == by_kind["embedding"] == set(FORMATS) - none
    assert by_kind["norm"] == by_kind["bias"] == {name for name, dtype in FORMATS.items() if dtype.plain}


@pytest.mark.parametrize("family", load_architectures())
def test_names_are_those_of_the_gguf_package(family: str) -> None:
    """Every role of every architecture has the name that llama.cpp's own table gives it, and comes back."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], 40)
    for role in load_architectures()[family].roles:
        name = role.hf.replace("{n}", "37")
        assert names.get_name(name, try_suffixes=(".weight", ".bias")) == role.gguf.replace("{n}", "37")
        assert gguf_name(name) == role.gguf.replace("{n}", "37")
        assert hf_name(gguf_name(name)) == name
        for stored in (role.apr, role.apr.removeprefix("model."), role.gguf):
            assert apr_canonical(stored.replace("{n}", "37")) == name


@pytest.mark.parametrize("family", load_architectures())
def test_the_roles_of_a_layer_stand_together(family: str) -> None:
    """The order of the model: what is before the layers, the layers, what is behind them."""
    architecture = load_architectures()[family]
    assert "".join("L" if role.per_layer else "-" for role in architecture.roles).strip("-").strip("L") == ""
    assert set(architecture.when) <= {role.name for role in architecture.roles}
    assert architecture.says


@pytest.mark.parametrize(
    ("source", "target", "refused"),
    [
        ("safetensors", "gguf", True),
        ("gguf", "safetensors", True),
        ("gguf", "apr", True),
        ("safetensors", "apr", False),
        ("gguf", "gguf", False),
    ],
)
def test_a_llama_is_not_carried_over_where_its_rows_lie_otherwise(
    source: str, target: str, refused: bool, tmp_path: Path, save: Save
) -> None:
    """llama.cpp turns the halves of each head of a Llama into pairs: a copy of the bytes would be fluent noise."""
    for family in ("llama", "qwen3"):
        path = in_format(source, family, tensors_of(family), tmp_path, save)
        out = tmp_path / (f"copy-{family}" if target == "safetensors" else f"copy-{family}.{target}")
        if refused and family == "llama":
            with pytest.raises(Unavailable, match="rows of q_proj"):
                convert(path, out, bare=True)
        else:
            assert admit(convert(path, out, bare=True)).violations == ()


def test_a_validated_tensor_is_of_its_family(save: Save) -> None:
    """q_norm is a vector of a Qwen3, and nothing at all in a Qwen2."""
    checkpoint = admit(save(tensors_of("qwen3"), config_of("qwen3"))).checkpoint
    geometry = Geometry.from_config(config_of("qwen3"))
    assert ValidatedVector(checkpoint.raw(Q_NORM), geometry).shape == (32,)
    assert ValidatedWeight(checkpoint.raw("model.layers.0.self_attn.o_proj.weight"), geometry).shape == (64, 128)
    with pytest.raises(TypeError, match="q_norm"):
        ValidatedVector(checkpoint.raw(Q_NORM), Geometry.from_config(CONFIG))

"""Budgets that come from measurements: of types, of a rounded copy, of honest float32."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from apr_core.dtypes import FORMATS
from apr_core.engines.load import load_model
from apr_core.engines.subject import Subject, obtain
from apr_core.falsify.verdict import Verdict
from apr_core.formats.codecs import round_to
from apr_core.parity import noise
from apr_core.parity.compare import compare
from apr_core.parity.distribution import compare_logits
from apr_core.parity.floor import path
from apr_core.parity.noise import trace_copy
from apr_core.parity.pair import hold, is_rung, yardstick
from apr_core.parity.tolerances import (
    _MEASURED,
    CONTRACT,
    FACTOR,
    TAIL,
    allowed,
    decisive_margin,
    flip_budget,
    noisy,
    rounding_error,
)
from apr_core.rosetta.convert import convert
from tests.model.conftest import write_tiny

WITNESSED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal variates, float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", WITNESSED)
def test_rounding_error_equals_the_foreign_codec(name: str) -> None:
    """The table agrees with what the gguf package's own encoder does to normal variates."""
    kind = gguf.GGMLQuantizationType[name]
    x = normal(32, 1024)
    y = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    assert rounding_error(FORMATS[name]) == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=0.04)


@pytest.mark.parametrize("name", [n for n in _MEASURED if n[0] == "Q"])
def test_estimate_for_unmeasured_types_is_near_every_measured_one(name: str) -> None:
    """The formula that stands in for a measurement is within a third of each measured quantised type."""
    estimate = 2 * 2 ** -FORMATS[name].bits_per_weight
    assert estimate == pytest.approx(rounding_error(FORMATS[name]), rel=0.33)


def test_unmeasured_type_gets_the_estimate() -> None:
    """Q2_K, which nothing here encodes, has an error between that of Q4_K and one."""
    assert rounding_error(FORMATS["Q4_K"]) < rounding_error(FORMATS["Q2_K"]) < 1


def test_one_scale_for_a_tensor_depends_on_its_largest_value() -> None:
    """AprQ8 has one scale: an outlier costs every other value."""
    calm, wild = normal(64, 64), normal(64, 64)
    wild[0, 0] = 100
    assert rounding_error(FORMATS["AprQ8"], wild) > 10 * rounding_error(FORMATS["AprQ8"], calm)


def test_noise_has_the_size_it_says_row_by_row() -> None:
    """A quiet row gets quiet noise; the same seed gives the same noise; no error means no noise."""
    x = normal(4, 4096) * np.array([[1], [100], [0.01], [0]], np.float32)
    y = noisy(x, 0.05, np.random.default_rng(1))
    assert np.linalg.norm(y - x, axis=1)[:3] / np.linalg.norm(x, axis=1)[:3] == pytest.approx(0.05, rel=0.1)
    assert not y[3].any()
    assert (y == noisy(x, 0.05, np.random.default_rng(1))).all()
    assert noisy(x, 0.0, np.random.default_rng(1)) is x


def test_flip_budget_allows_what_chance_allows() -> None:
    """A copy without flips leaves room for a few, one that flips often for more; both stay below one half more."""
    x = normal(256, 100)
    none = flip_budget(compare_logits(x, x, 0.05)).limit
    some = compare_logits(x, x + 0.5 * normal(256, 100, seed=1), 0.05)
    share = 1 - some.top1_agreement
    assert 0.005 < none < 0.03
    assert 0.2 < share < flip_budget(some).limit < share + 0.25
    assert flip_budget(compare_logits(x, x, 1e9)).limit <= 1


def test_no_candidate_within_the_limit_overturns_a_decisive_margin() -> None:
    """The bound is sharp: the worst difference of the allowed norm just reaches it."""
    x = normal(1, 50)
    limit = 1e-3
    tau = decisive_margin(x, limit)[0]
    norm = limit * np.linalg.norm(x.astype(np.float64))
    assert tau == pytest.approx(2 * norm / math.sqrt(2))


def test_beyond_the_contract_a_row_is_allowed_more() -> None:
    """A limit within the contract is the limit; a chaotic model's is wider, so that it alarms nobody."""
    assert allowed(2e-5) == 2e-5
    assert allowed(CONTRACT) == CONTRACT
    assert allowed(2 * CONTRACT) == 2 * TAIL * CONTRACT


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["", "gguf/F16.gguf", "gguf/Q4_K_M.gguf"])
@pytest.mark.parametrize("threads", [1, 2])
def test_healthy_forwards_are_within_half_their_limits(name: str, threads: int, oracle: Path) -> None:
    """The torch forward and its cached steps, on any number of threads: 4 floors leave a factor of two."""
    from apr_core.parity.floor import honest_floor

    subject = obtain(str(oracle / "mini" / name), device="cpu")
    ids = subject.stimulus(96).ids
    limits = honest_floor(subject.admission.require(), path(ids, ids.size)).limits
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole, cached = path(ids, ids.size)(subject.model), path(ids, 32)(subject.model)
    finally:
        torch.set_num_threads(before)
    assert compare(path(ids, ids.size)(subject.plain), whole).over(limits) < 0.5
    assert compare(whole, cached).only("logits").over(limits) < 0.5


LADDER = ("F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0")


@pytest.fixture(scope="module")
def source(oracle: Path) -> Subject:
    """The oracle's BF16 model."""
    return obtain(str(oracle / "mini"), device="cpu")


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q6_K", "Q4_K_M"])
def test_the_files_of_llama_cpp_pin_the_level_of_the_yardstick(name: str, source: Subject, oracle: Path) -> None:
    """Its files cost what ours cost, so a worse encoder of ours, which would excuse worse files, is seen here."""
    subject = obtain(str(oracle / "mini" / "gguf" / f"{name}.gguf"), device="cpu")
    found = hold(source, subject, source.stimulus(128).ids, 64)
    assert found.verdict is Verdict.CORROBORATED
    assert found.yardstick is not None
    assert found.yardstick.unwritten == ()
    assert found.ratios is not None
    if name != "F16":
        assert found.ratios["kl"][0] == pytest.approx(1 / 1.5, rel=0.02)
        assert found.ratios["nmse"][0] == pytest.approx(1 / 1.5, rel=0.02)


@pytest.mark.oracle
def test_a_file_of_ours_is_held_to_the_plain_reference(source: Subject, tmp_path: Path) -> None:
    """The compiled encoder writes it and names itself; plain numpy rounds the yardstick, and they agree to the bit."""
    convert(source.checkpoint, tmp_path / "ours.gguf", quantize="Q4_K_M")
    subject = obtain(str(tmp_path / "ours.gguf"), device="cpu")
    found = hold(source, subject, source.stimulus(128).ids, 64)
    assert found.verdict is Verdict.CORROBORATED
    assert found.yardstick is not None
    assert found.yardstick.source.endswith("(decision 0013), which the file names as its writer")
    assert found.ratios is not None
    assert found.ratios["kl"][0] == pytest.approx(1 / 1.5)


def test_the_ladder_of_types_is_monotone(source: Subject) -> None:
    """Fewer bits never cost less: the check that catches a mislabelled or mistaken encoder without any limit."""
    ids, weights = source.stimulus(96).ids, source.admission.require()
    run = path(ids, ids.size)
    truth = run(source.model)
    costs = []
    for name in LADDER:
        change = lambda at, tensor, x, kind=FORMATS[name]: round_to(x, kind) if x.ndim == 2 else x  # noqa: E731
        costs.append(compare_logits(truth["logits"], trace_copy(weights, change, load_model, run)["logits"]))
    for finer, coarser in pairwise(costs):
        assert finer.kl_mean <= coarser.kl_mean
        assert is_rung(finer, coarser) == (Verdict.CORROBORATED, "")
    verdict, reason = is_rung(costs[2], costs[1])
    assert verdict is Verdict.FALSIFIED
    assert "with more bits per weight" in reason
    assert is_rung(costs[1], costs[1])[0] is Verdict.CORROBORATED


def test_an_offset_that_kl_cannot_see_is_refuted_by_nmse(tmp_path: Path) -> None:
    """One vector added to every row of the head moves all logits of a position alike, which KL does not see."""
    files = [write_tiny(tmp_path / name, tie_word_embeddings=False) for name in ("source", "copy", "offset")]
    tensors = {n: t.astype(np.float16) for n, t in load_file(files[0] / "model.safetensors").items()}
    save_file(tensors, str(files[1] / "model.safetensors"))
    tensors["lm_head.weight"] += np.float16(0.05) * np.sign(normal(1, 64)).astype(np.float16)
    save_file(tensors, str(files[2] / "model.safetensors"))
    source, copy, offset = (obtain(str(path), device="cpu") for path in files)
    ids = source.stimulus(96).ids
    healthy, found = hold(source, copy, ids, 64), hold(source, offset, ids, 64)
    assert (healthy.verdict, found.verdict) == (Verdict.CORROBORATED, Verdict.FALSIFIED)
    assert "mean NMSE" in found.reason
    assert found.ratios is not None
    assert found.ratios["kl"][1] <= 1 < found.ratios["nmse"][1]


def test_a_type_without_an_encoder_gets_noise_and_a_wider_limit(
    source: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a wider limit, whose source names the type."""
    monkeypatch.setattr(noise, "is_writable", lambda dtype: str(dtype) != "BF16")
    ids = source.stimulus(64).ids
    measure = yardstick(source, source.checkpoint, path(ids, 64)(source.model), ids, 64)
    assert measure.unwritten == ("BF16",)
    assert measure.factor == FACTOR
    assert "noise for BF16" in measure.source


def test_the_same_bytes_are_a_control_and_the_same_weights_need_no_yardstick(source: Subject) -> None:
    """Two openings of one file agree bit for bit; judged by the numbers."""
    again = obtain(str(source.path), device="cpu")
    found = hold(source, again, source.stimulus(128).ids, 64)
    assert (found.verdict, found.control, found.same_weights, found.yardstick) == (
        Verdict.CORROBORATED,
        True,
        True,
        None,
    )
    assert found.report is not None
    assert found.report.required_tolerance == 0


def test_the_finer_file_is_the_reference_whatever_the_order(source: Subject, oracle: Path) -> None:
    """A quantised file named first does not make its source look wrong."""
    coarse = obtain(str(oracle / "mini" / "gguf" / "Q4_K_M.gguf"), device="cpu")
    found = hold(coarse, source, source.stimulus(128).ids, 64)
    assert (found.verdict, found.turned) == (Verdict.CORROBORATED, True)

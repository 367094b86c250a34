"""Each claim of notebook 20: corroborated by a healthy subject, refuted by a planted fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from apr_core.engines.cuda import Attestation
from apr_core.engines.subject import Subject, obtain
from apr_core.errors import Unavailable
from apr_core.falsify.claims import claims_of
from apr_core.falsify.finding import ACTS, Finding
from apr_core.falsify.verdict import Verdict
from apr_core.model.trace import Trace
from apr_core.parity import acts
from apr_core.parity.tolerances import CONTRACT
from tests.model.conftest import write_tiny
from tests.parity.conftest import Edit, Tampered

ALONE = tuple(f"F-PAR-00{n}" for n in range(1, 8))


def verdict(finding: Finding) -> Verdict:
    """Judge a finding."""
    return finding.judge()[0]


def keep(name: str, values: NDArray[np.float32], start: int) -> NDArray[np.float32]:
    """Change nothing."""
    return values


def on(target: str, change: Any) -> Edit:
    """Edit one name."""
    return lambda name, values, start: change(values) if name == target else values


@pytest.fixture
def subject(tiny: Path) -> Iterator[Subject]:
    """A fresh subject: measurements are remembered per subject."""
    found = obtain(str(tiny), device="cpu")
    yield found
    found.close()


def tamper(subject: Subject, edit: Edit = keep, **kwargs: Any) -> Subject:
    """Put a tampering forward in the place of the torch one."""
    subject.__dict__["model"] = Tampered(subject.model, edit, **kwargs)
    return subject


def test_every_claim_has_its_act() -> None:
    """No claim of the notebook is without a measurement; those of the release matrix lie above this room."""
    assert {c.id for c in claims_of("20_parity")} - {"F-PAR-011", "F-PAR-012"} <= set(ACTS)


def test_healthy_subject_is_corroborated(subject: Subject) -> None:
    """All seven claims hold, over at least 64 positions, with tables and arrays to show."""
    found = {claim: ACTS[claim](subject) for claim in ALONE}
    assert {claim: verdict(f) for claim, f in found.items()} == dict.fromkeys(ALONE, Verdict.CORROBORATED)
    assert found["F-PAR-001"].arrays["rel_l2"].shape == (1, 96)
    assert found["F-PAR-002"].compared == 96 * 13
    assert found["F-PAR-006"].compared == 64
    assert {type(f.noise_floor) for f in (found["F-PAR-001"], found["F-PAR-002"])} == {float}
    assert not any(f.whys for f in found.values())


def shifted(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same rows one position late."""
    return np.roll(values, 1, axis=0)


def late_scale(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Right at position 0, a hundredth too large after it."""
    out = values.copy()
    out[1:] *= np.float32(1.01)
    return out


def poisoned(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """One NaN."""
    out = values.copy()
    out[-1, 3] = np.nan
    return out


@pytest.mark.parametrize("change", [np.negative, shifted, late_scale, poisoned, lambda x: x + np.float32(2)])
def test_wrong_logits_refute(subject: Subject, change: Any) -> None:
    """Sign, shift, scale, NaN and offset in the logits each refute the first claim and leave the second alone."""
    tamper(subject, on("logits", change))
    finding = acts.same_logits(subject)
    assert verdict(finding) is Verdict.FALSIFIED
    assert finding.whys[0][0] == "Where does it first differ?"
    assert verdict(acts.same_layers(subject)) is Verdict.CORROBORATED


def test_scale_is_called_a_scale(subject: Subject) -> None:
    """The whys tell a wrong size, its first position, and that position 0 does not show it."""
    whys = dict(acts.same_logits(tamper(subject, on("logits", late_scale))).whys)
    assert "so a scale" in whys["A wrong size or a wrong direction?"]
    assert "logits at position 1" in whys["Where does it first differ?"]
    assert "position 0 is within it" in whys["At every position?"]
    other = dict(acts.same_logits(tamper(obtain(str(subject.path), device="cpu"), on("logits", shifted))).whys)
    assert "another direction" in other["A wrong size or a wrong direction?"]


def test_wrong_layer_is_named(subject: Subject) -> None:
    """A fault in one layer's keys refutes the second claim and names layer, operation and position."""
    finding = acts.same_layers(tamper(subject, on("layers.1.k", late_scale)))
    assert verdict(finding) is Verdict.FALSIFIED
    assert dict(finding.whys)["Where does it first differ?"].startswith("layers.1.k at position 1, rel_l2 0.01")


def test_lost_layer_is_not_agreement(subject: Subject) -> None:
    """A name that was not traced leaves the claim undecided and is listed."""
    finding = acts.same_layers(tamper(subject, lost="layers.0.v"))
    assert verdict(finding) is Verdict.INCONCLUSIVE
    assert finding.missing == ("layers.0.v: absent in the candidate",)


def test_truncated_forward_is_not_agreement(subject: Subject) -> None:
    """A forward that drops its last position is not compared as far as it goes."""
    tamper(subject, lambda name, values, start: values[:-1])
    for claim in ("F-PAR-001", "F-PAR-002", "F-PAR-004", "F-PAR-005"):
        finding = ACTS[claim](subject)
        assert verdict(finding) is Verdict.INCONCLUSIVE
        assert finding.compared == 0


def test_stale_cache_refutes_decode_and_greedy_path(subject: Subject) -> None:
    """A decode that forgets what it has seen breaks the cache claim and the greedy path, not the prefill."""
    tamper(subject, stale=True)
    assert verdict(acts.same_logits(subject)) is Verdict.CORROBORATED
    assert verdict(acts.cached_equals_prefill(subject)) is Verdict.FALSIFIED
    path = acts.same_greedy_path(subject)
    assert verdict(path) is Verdict.FALSIFIED
    assert path.whys[0][0] == "Which token differs first?"


def test_the_floor_widens_what_counts_as_a_tie(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rounding alone could overturn every margin, another token on the path is a near-tie, and listed as one."""
    monkeypatch.setattr(acts, "decision_limit", lambda subject: 1e3)
    path = acts.same_greedy_path(tamper(subject, stale=True))
    assert verdict(path) is Verdict.CORROBORATED
    assert path.rows
    assert all(row["near_tie"] for row in path.rows)


def test_noise_refutes_distribution_and_top_token(subject: Subject) -> None:
    """Noise of the size of the logits changes distributions and decisive top tokens."""
    noise = np.random.default_rng(0)
    tamper(subject, on("logits", lambda x: x + noise.standard_normal(x.shape).astype(np.float32) * x.std()))
    for claim in ("F-PAR-004", "F-PAR-005"):
        finding = ACTS[claim](subject)
        assert verdict(finding) is Verdict.FALSIFIED
        assert finding.whys


def test_offset_leaves_distribution_alone(subject: Subject) -> None:
    """An offset is no other distribution: claim 4 holds where claim 1 is refuted, so both are needed."""
    tamper(subject, on("logits", lambda x: x + np.float32(2)))
    assert verdict(acts.same_logits(subject)) is Verdict.FALSIFIED
    assert verdict(acts.same_distribution(subject)) is not Verdict.FALSIFIED


def test_hook_that_writes_refutes_tracing(subject: Subject) -> None:
    """A trace that changes one bit of the result is seen."""
    model = subject.model

    class Writes(Tampered):
        def forward(self, ids: Any, cache: Any = None, trace: Trace | None = None) -> NDArray[np.float32]:
            logits = model.forward(ids, cache, trace).copy()
            if trace is not None:
                logits[5, 7] = np.nextafter(logits[5, 7], np.float32(np.inf))
            return logits

    subject.__dict__["model"] = Writes(model, keep)
    finding = acts.tracing_changes_nothing(subject)
    assert verdict(finding) is Verdict.FALSIFIED
    assert finding.value == 1
    assert "position 5, token 7" in finding.whys[0][1]


def test_untraced_logits_decide_nothing(subject: Subject) -> None:
    """A trace without logits cannot show that tracing is harmless."""
    assert verdict(acts.tracing_changes_nothing(tamper(subject, lost="logits"))) is Verdict.INCONCLUSIVE


def test_one_forward_on_both_sides_is_inconclusive(subject: Subject) -> None:
    """The numpy forward against itself agrees perfectly and shows nothing."""
    subject.__dict__["model"] = subject.plain
    for claim in ("F-PAR-001", "F-PAR-002", "F-PAR-004", "F-PAR-005", "F-PAR-006"):
        finding = ACTS[claim](subject)
        assert verdict(finding) is Verdict.INCONCLUSIVE
        assert "both sides are the plain forward" in finding.judge()[1]


def test_a_model_of_zeros_shows_nothing(tmp_path: Path) -> None:
    """Zeros on both sides are no agreement, and no crash: they have no rounding that a limit could be made of."""
    weights = write_tiny(tmp_path) / "model.safetensors"
    save_file({name: 0 * values for name, values in load_file(weights).items()}, weights)
    zeros = obtain(str(tmp_path), device="cpu", skip_contract=True)
    found = {claim: verdict(ACTS[claim](zeros)) for claim in ("F-PAR-001", "F-PAR-003", "F-PAR-004", "F-PAR-005")}
    assert set(found.values()) == {Verdict.INCONCLUSIVE}, found


def test_few_positions_are_inconclusive(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stimulus of 40 positions shows neither cache nor mask long enough."""
    monkeypatch.setattr(acts, "POSITIONS", 40)
    for claim in ("F-PAR-001", "F-PAR-002", "F-PAR-003", "F-PAR-004", "F-PAR-005"):
        assert ACTS[claim](subject).judge() == (Verdict.INCONCLUSIVE, "40 positions, at least 64 are needed")


def test_path_beyond_the_context_is_inconclusive(tiny: Path) -> None:
    """A greedy path that the context cuts short is not as long as was asked."""
    finding = acts.same_greedy_path(obtain(str(tiny), device="cpu", max_new_tokens=100))
    assert (finding.compared, finding.expected) == (96, 100)
    assert verdict(finding) is Verdict.INCONCLUSIVE


def test_rounding_of_an_ill_conditioned_model_is_no_refutation(tmp_path: Path) -> None:
    """
    Huge key biases take float32 itself beyond the contract: undecided, with that as the reason.

    A fault beyond it still refutes the same model.
    """
    write_tiny(tmp_path, num_hidden_layers=8)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, values in tensors.items():
        if "k_proj.bias" in name:
            values *= 450
    save_file(tensors, str(tmp_path / "model.safetensors"))
    wild = obtain(str(tmp_path), device="cpu")
    finding = acts.same_logits(wild)
    assert finding.arrays["rel_l2"].max() > CONTRACT
    assert verdict(finding) is Verdict.INCONCLUSIVE
    assert "float32 cannot decide at 0.0001" in finding.judge()[1]
    assert verdict(acts.same_distribution(wild)) in (Verdict.INCONCLUSIVE, Verdict.CORROBORATED)
    assert verdict(acts.same_top_token(wild)) is not Verdict.FALSIFIED
    broken = tamper(obtain(str(tmp_path), device="cpu"), on("logits", np.negative))
    assert verdict(acts.same_logits(broken)) is Verdict.FALSIFIED


def test_a_torch_forward_that_rounds_too_much_is_not_excused_by_its_own_noise(subject: Subject) -> None:
    """Limits come from the numpy forward: activations of 8 bits, which the torch floor would price, are refuted."""
    from apr_core.model.linear import Weights
    from apr_core.model.qwen2 import Qwen2
    from apr_core.parity.floor import EightBit

    validated = subject.admission.require()
    subject.__dict__["model"] = Qwen2(validated, weights=Weights(validated, EightBit()))
    finding = acts.same_layers(subject)
    assert verdict(finding) is Verdict.FALSIFIED
    assert dict(finding.whys)["Where does it first differ?"].startswith("layers.0.q at position 0")
    assert "so its limit is" in dict(finding.whys)["How far is honest float32 from float64 here?"]


def test_refused_and_referenceless_subjects_are_not_run(subject: Subject) -> None:
    """Without a reference or a device the claims that need one say so."""
    assert acts.distribution_of_reference(subject).judge() == (Verdict.NOT_RUN, "no reference given")
    assert acts.cuda_equals_cpu(subject).judge() == (Verdict.NOT_RUN, "no CUDA device")


@pytest.fixture
def copy_of(tiny: Path, tmp_path: Path) -> Any:
    """Write an F16 copy of the tiny model with edited tensors, and obtain it against its source."""

    def make(edit: Any = lambda tensors: None, dtype: Any = np.float16, **config: object) -> Subject:
        tensors = load_file(tiny / "model.safetensors")
        edit(tensors)
        tensors = {name: values.astype(dtype) for name, values in tensors.items()}
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny / name, tmp_path / name)
        body = json.loads((tmp_path / "config.json").read_text()) | config
        (tmp_path / "config.json").write_text(json.dumps(body))
        save_file(tensors, str(tmp_path / "model.safetensors"))
        return obtain(str(tmp_path), reference=str(tiny), device="cpu")

    return make


def test_rounded_copy_stays_within_its_budget(copy_of: Any) -> None:
    """An F16 copy costs what F16 costs: both claims hold and the noisy copy is shown beside it."""
    subject = copy_of()
    for claim in ("F-PAR-008", "F-PAR-009"):
        finding = ACTS[claim](subject)
        assert verdict(finding) is Verdict.CORROBORATED
        assert not finding.whys
    finding = acts.distribution_of_reference(subject)
    assert finding.value < 1
    assert [row["name"] for row in finding.rows[:2]] == ["kl_mean", "nmse_mean"]
    assert finding.noise_floor == pytest.approx(1 / 1.5)


def test_negated_key_bias_breaks_the_budget_and_is_named(copy_of: Any) -> None:
    """The smallest semantic fault of a conversion is far beyond the price of F16, and its layer is named."""

    def negate(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.self_attn.k_proj.bias"] *= -1

    finding = acts.distribution_of_reference(copy_of(negate))
    assert verdict(finding) is Verdict.FALSIFIED
    assert finding.value > 10
    assert dict(finding.whys)["Where is it first further off than its types explain?"].startswith("layers.1.k:")


def test_an_offset_that_the_divergence_cannot_see_breaks_the_budget(copy_of: Any) -> None:
    """The same distributions from logits that are all too large: NMSE refutes where KL is at its floor."""
    subject = tamper(copy_of(), on("logits", lambda x: x + np.float32(1)))
    finding = acts.distribution_of_reference(subject)
    assert verdict(finding) is Verdict.FALSIFIED
    kl, nmse = finding.rows[:2]
    assert kl["subject"] < kl["limit"]
    assert nmse["subject"] > nmse["limit"]


def test_other_model_breaks_both_budgets(copy_of: Any) -> None:
    """Another model's weights are no rounding of the reference."""

    def reverse(tensors: dict[str, Any]) -> None:
        tensors["model.embed_tokens.weight"] = np.ascontiguousarray(tensors["model.embed_tokens.weight"][::-1])

    subject = copy_of(reverse)
    assert verdict(acts.distribution_of_reference(subject)) is Verdict.FALSIFIED
    finding = acts.top_token_of_reference(subject)
    assert verdict(finding) is Verdict.FALSIFIED
    assert finding.whys[0][0] == "How many decisive positions flip?"


def test_same_bytes_on_both_sides_are_inconclusive(tiny: Path) -> None:
    """A file held against itself agrees and shows nothing."""
    finding = acts.distribution_of_reference(obtain(str(tiny), reference=str(tiny), device="cpu"))
    assert finding.judge() == (Verdict.INCONCLUSIVE, "subject and reference are the same bytes")


def test_other_vocabulary_is_inconclusive(copy_of: Any) -> None:
    """Distributions over another vocabulary are not held against each other."""

    def cut(tensors: dict[str, Any]) -> None:
        tensors["model.embed_tokens.weight"] = np.ascontiguousarray(tensors["model.embed_tokens.weight"][:330])

    finding = acts.top_token_of_reference(copy_of(cut, vocab_size=330))
    assert finding.judge()[0] is Verdict.INCONCLUSIVE
    assert "a vocabulary of 330" in finding.judge()[1]


def test_refused_reference_is_inconclusive(tiny: Path, tmp_path: Path) -> None:
    """A reference that the contract refuses is no measure of anything."""
    shutil.copytree(tiny, tmp_path / "bad")
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.norm.weight"][:] = np.nan
    save_file(tensors, str(tmp_path / "bad" / "model.safetensors"))
    finding = acts.distribution_of_reference(obtain(str(tiny), reference=str(tmp_path / "bad"), device="cpu"))
    assert finding.judge()[0] is Verdict.INCONCLUSIVE
    assert "the reference was refused" in finding.judge()[1]


def test_cuda_side_that_fell_back_is_inconclusive(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that says cuda and runs on the CPU corroborates nothing; a real difference refutes."""
    subject.lacks = {}
    elsewhere = obtain(str(subject.path), device="cpu").model
    monkeypatch.setattr(acts, "load_model", lambda path, device: elsewhere)
    finding = acts.cuda_equals_cpu(subject)
    assert finding.judge() == (Verdict.INCONCLUSIVE, "the CUDA side ran on cpu")
    device = Tampered(elsewhere, on("layers.1.resid_ffn", np.negative))
    device.device = "cuda:0"
    monkeypatch.setattr(acts, "load_model", lambda path, device_=device, **_: device_)
    assert "0 bytes on the device" in acts.cuda_equals_cpu(subject).judge()[1]
    monkeypatch.setattr(acts, "attest", lambda model, ids, least: Attestation("cuda:0", least, least, 9))
    assert verdict(acts.cuda_equals_cpu(subject)) is Verdict.FALSIFIED
    device.edit = keep
    assert verdict(acts.cuda_equals_cpu(subject)) is Verdict.CORROBORATED


@pytest.mark.oracle
@pytest.mark.parametrize("quant", ["F16", "Q4_K_M"])
def test_files_of_llama_cpp_are_within_the_budget_of_their_types(oracle: Path, quant: str) -> None:
    """Healthy files by another's quantiser, on a random model, cost what ours cost: two thirds of the budget."""
    mini = oracle / "mini"
    subject = obtain(str(mini / "gguf" / f"{quant}.gguf"), reference=str(mini), device="cpu")
    assert verdict(acts.distribution_of_reference(subject)) is Verdict.CORROBORATED
    assert acts.distribution_of_reference(subject).value <= 1.02 / 1.5
    assert verdict(acts.top_token_of_reference(subject)) is Verdict.CORROBORATED


def test_deep_table_keeps_the_worst_name_of_each_layer() -> None:
    """More names than evidence holds become one row per layer and none is chosen twice."""
    from apr_core.model.trace import mandatory_names
    from apr_core.parity.compare import compare
    from apr_core.parity.explain import table
    from apr_core.parity.floor import Floor

    random = np.random.default_rng(0)
    reference = {n: random.standard_normal((3, 4)).astype(np.float32) for n in mandatory_names(40)}
    candidate = {n: x * np.float32(2 if n.endswith(".v") else 1) for n, x in reference.items()}
    floor = Floor({"float32": dict.fromkeys(mandatory_names(40), 1e-6)})
    rows = table(compare(reference, candidate), floor)
    assert {row["limit"] for row in rows} == {4e-6}
    assert len(rows) == 42
    assert {r["op"] for r in rows} == {"v", "final_hidden", "logits"}


def test_engines_against_the_reference_and_nothing_for_a_refused_model(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that is wrong is refuted with its place, one that is not there is named."""
    wrong = Tampered(obtain(str(subject.path), device="cpu").model, on("layers.1.k", late_scale))

    def build(admission: Any, precision: str) -> Any:
        if precision == "speed":
            raise Unavailable("no numba")
        return wrong

    monkeypatch.setattr(acts, "build", build)
    exact, speed = acts.backend_rows(subject)
    assert exact["verdict"] == "FALSIFIED"
    assert str(exact["first_divergence"]).startswith("layers.1.k at position 1")
    assert "no numba" in speed["verdict"]
    assert [row["name"] for row in acts.floor_rows(subject)][-1] == "logits"
    monkeypatch.setattr(Subject, "refusal", "F-X on t")
    assert acts.backend_rows(subject) == acts.floor_rows(subject) == []


def test_an_engine_that_rounds_to_bfloat16_is_excused_in_speed_alone(
    pygmy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against BF16 weights `speed` is held to what that costs the reference, `exact` to honest float32."""
    from apr_core.model.linear import Weights
    from apr_core.model.qwen2 import Qwen2
    from apr_core.parity.floor import BFloat16

    subject = obtain(str(pygmy), device="cpu")
    validated = subject.admission.require()
    rounded = Qwen2(validated, weights=Weights(validated, BFloat16()))
    monkeypatch.setattr(acts, "build", lambda admission, precision: rounded)
    rows = {row["engine"]: row["verdict"] for row in acts.backend_rows(subject)}
    assert rows == {"exact": "FALSIFIED", "speed": "CORROBORATED"}

"""The pre-dispatch gate as a whole: what it returns, what it raises, and what a bypass may do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apr_core.contract.admit import admit
from apr_core.contract.gates import load_gates
from apr_core.errors import ContractViolation, Exit, FormatError, LoadError, NotFound
from apr_core.formats.checkpoint import open_checkpoint

from .conftest import Save, Tensors

DOWN = "model.layers.1.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def test_a_healthy_model(tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """26 of 26 tensors measured, no violation, and a model with all of them in the order of the model."""
    admission = admit(save(tensors, config))
    assert (admission.ok, admission.measured, admission.expected, admission.refusal) == (True, 26, 26, None)
    assert (admission.gate_version, admission.bypassed, admission.extras) == (load_gates().version, False, ())
    model = admission.require()
    assert next(iter(model.tensors)) == EMBEDDING
    assert sorted(model.tensors) == sorted(tensors)
    assert all(np.array_equal(model.tensors[name].values(), tensors[name]) for name in tensors)
    assert (model.tied, model.bypassed, model.config["hidden_size"], model.checkpoint) == (
        True,
        False,
        64,
        admission.checkpoint,
    )
    assert repr(model).endswith("26 tensors)")
    assert model.geometry == admission.geometry


def test_violations_are_collected_and_required_raises(tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """Every violation is in the one error, each with gate, tensor, measured and limit; exit code 5."""
    tensors[DOWN][:] = 0
    tensors["model.norm.weight"][5] = np.nan
    config["rope_theta"] = 10000
    admission = admit(save(tensors, config))
    assert [v.gate[2:] for v in admission.violations] == [
        "CONFIG-PLAUSIBLE-001",
        "DATA-QUALITY-001",
        "DATA-QUALITY-003",
        "DATA-QUALITY-003",
        "DATA-QUALITY-002",
    ]
    assert admission.refusal is not None
    assert admission.refusal.startswith("[F-CONFIG-PLAUSIBLE-001] config: rope_theta is 10000, at least 10001")
    assert admission.refusal.endswith("(5 violations in 3 tensors)")
    with pytest.raises(ContractViolation) as caught:
        admission.require()
    assert caught.value.violations == admission.violations
    assert caught.value.exit_code == Exit.REFUTED == 5
    assert f"[F-DATA-QUALITY-001] tensor {DOWN}: 100.0 % zeros, at most 80 %" in str(caught.value)


def test_one_violation_is_one_line(tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """A refusal with a single violation says nothing about others."""
    tensors[DOWN][0, 0] = np.inf
    refusal = admit(save(tensors, config)).refusal
    expected = f"[F-DATA-QUALITY-002] tensor {DOWN}: 1 NaN or infinite values, at most 0 (0 NaN, 1 infinite, of 6144)"
    assert expected == refusal


def test_an_opened_checkpoint_is_taken_as_it_is(tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """The admission is about this mapping, not about another opening of the same path."""
    checkpoint = open_checkpoint(save(tensors, config))
    assert admit(checkpoint).checkpoint is checkpoint


def test_extras_are_information(tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """Tensors outside the contract are listed, neither measured nor refused, NaN or not."""
    tensors["model.layers.0.self_attn.o_proj.bias"] = np.full(64, np.nan, np.float32)
    tensors["adapter.weight"] = np.zeros((2, 2), np.float32)
    admission = admit(save(tensors, config))
    assert set(admission.extras) == {"model.layers.0.self_attn.o_proj.bias", "adapter.weight"}
    assert (admission.ok, admission.measured, len(admission.require().tensors)) == (True, 26, 26)


def test_a_stored_tied_head_is_measured(tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """27 measured where 26 are demanded: the 291-tensor case of the 0.5B."""
    tensors["lm_head.weight"] = tensors[EMBEDDING]
    admission = admit(save(tensors, config))
    assert (admission.measured, admission.expected, admission.extras) == (27, 26, ())
    tensors["lm_head.weight"] = np.full_like(tensors[EMBEDDING], np.nan)
    gates = {v.rule for v in admit(save(tensors, config)).violations}
    assert {"head_differs", "nonfinite_values"} <= gates


def test_progress_reaches_the_end(tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """Progress grows to the number of bytes, one call per tensor."""
    calls: list[tuple[int, int, str]] = []
    admission = admit(save(tensors, config), progress=lambda done, total, name: calls.append((done, total, name)))
    total = sum(values.nbytes for values in tensors.values())
    assert [name for _, _, name in calls] == list(admission.stats)
    assert calls[-1][:2] == (total, total)
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)


def test_no_config_is_a_load_error(tensors: Tensors, save: Save) -> None:
    """Without a config nothing says what the model should be; exit code 6 and what to do."""
    with pytest.raises(LoadError, match=r"config\.json") as caught:
        admit(save(tensors, None))
    assert caught.value.exit_code == 6


def test_malformed_and_missing_files_raise(tmp_path: Path) -> None:
    """A file that is no model is not a violation: exit codes 4 and 3."""
    (tmp_path / "x.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(FormatError):
        admit(tmp_path / "x.safetensors")
    with pytest.raises(NotFound):
        admit(tmp_path / "none.gguf")


def test_an_incomplete_config_is_refused(tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """Missing sizes are one violation that names them; what can be judged is judged all the same."""
    del config["num_hidden_layers"], config["hidden_size"]
    tensors[DOWN][:] = np.nan
    tensors["spare"] = tensors[DOWN]
    admission = admit(save(tensors, config), skip=True)
    first = admission.violations[0]
    assert (first.gate, first.measured, first.names) == (
        "F-ARCH-COMPLETE-001",
        2.0,
        ("lacks hidden_size", "lacks num_hidden_layers"),
    )
    assert "F-DATA-QUALITY-002" in {v.gate for v in admission.violations}
    assert (admission.geometry, admission.expected, admission.measured, admission.extras) == (None, 0, 26, ("spare",))
    with pytest.raises(ContractViolation, match="num_hidden_layers"):
        admission.require()


def test_the_minimal_apr_file_is_incomplete(oracle: Path) -> None:
    """A valid container with two tensors and half a config opens, and is refused as incomplete."""
    admission = admit(oracle / "apr" / "minimal_v2.apr")
    assert [v.gate for v in admission.violations] == ["F-ARCH-COMPLETE-001"]


def test_a_foreign_healthy_model(oracle: Path) -> None:
    """The BF16 model of the oracle, which transformers and llama.cpp run, is admitted whole."""
    admission = admit(oracle / "mini")
    assert (admission.violations, admission.measured, admission.expected) == ((), 38, 38)


def test_the_bypass_is_marked_and_still_judges(tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """A bypass lists the same violations, builds the model in spite of them, and is not `ok`."""
    tensors[DOWN][:] = 0
    folder = save(tensors, config)
    judged, bypassed = admit(folder), admit(folder, skip=True)
    assert [str(v) for v in judged.violations] == [str(v) for v in bypassed.violations]
    assert (bypassed.ok, bypassed.bypassed, bypassed.refusal) == (False, True, judged.refusal)
    model = bypassed.require()
    assert model.bypassed
    assert not model.tensors[DOWN].values().any()


@pytest.mark.parametrize("defect", ["missing", "reversed"])
def test_the_bypass_cannot_waive_structure(
    defect: str, tensors: Tensors, config: dict[str, object], save: Save
) -> None:
    """Where there is nothing to run, a bypass has nothing to bypass; only the structural violations are named."""
    tensors["model.norm.weight"][:] = np.nan
    if defect == "missing":
        del tensors[DOWN]
    else:
        tensors[DOWN] = tensors[DOWN].T
    with pytest.raises(ContractViolation) as caught:
        admit(save(tensors, config), skip=True).require()
    assert {v.tensor for v in caught.value.violations} == {DOWN}


def test_a_span_of_the_wrong_length_is_not_measured(
    tensors: Tensors, config: dict[str, object], save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that let a short span through would be caught here, once, without an error of the decoder."""
    from dataclasses import replace
    from types import MappingProxyType

    checkpoint = open_checkpoint(save(tensors, config))
    short = replace(checkpoint.tensors[DOWN], nbytes=checkpoint.tensors[DOWN].nbytes - 4)
    monkeypatch.setattr(checkpoint, "tensors", MappingProxyType({**checkpoint.tensors, DOWN: short}))
    admission = admit(checkpoint)
    assert [(v.gate, v.tensor) for v in admission.violations] == [("F-LAYOUT-CONTRACT-004", DOWN)]
    assert DOWN not in admission.stats


def test_what_cannot_be_decoded_is_refused(
    tensors: Tensors, config: dict[str, object], save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A type without a decoder is a violation, never a tensor that is silently left out."""
    from apr_core.contract import stats
    from apr_core.errors import Unavailable

    def decode(*_: object) -> None:
        raise Unavailable("no decoder for F64", advice="upgrade it")

    monkeypatch.setattr(stats, "decode_bytes", decode)
    tensors[DOWN] = tensors[DOWN].astype(np.float64)
    admission = admit(save(tensors, config))
    assert (len(admission.violations), admission.measured) == (1, 25)
    assert str(admission.violations[0]).endswith("no decoder for F64; upgrade it")


def test_ctrl_c_stops_the_threads(
    tensors: Tensors, config: dict[str, object], save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception out of the progress ends the pass: no thread is left that measures for nobody."""
    import threading

    from apr_core.contract import stats

    monkeypatch.setattr(stats, "available_cores", lambda: 3)
    monkeypatch.setattr(stats, "_BATCH", 1)
    before = set(threading.enumerate())
    seen: list[str] = []

    def interrupt(done: int, total: int, name: str) -> None:
        seen.append(name)
        assert set(threading.enumerate()) > before
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        admit(save(tensors, config), progress=interrupt)
    assert seen == [EMBEDDING]
    assert set(threading.enumerate()) == before

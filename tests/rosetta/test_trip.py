"""Round trips: corroborated when nothing changed, refuted by name when something did."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from apr_core.errors import UsageError
from apr_core.falsify.verdict import Verdict
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.rosetta import trip
from apr_core.rosetta.convert import convert

Edit = Callable[..., Path]


def data_digest(path: Path) -> str:
    """The sha256 of all tensor bytes of a file, in the order of their names."""
    with open_checkpoint(path) as opened:
        whole = hashlib.sha256()
        for name in sorted(opened.tensors):
            whole.update(opened.raw(name).data)
        return whole.hexdigest()


def test_a_chain_through_all_formats_is_corroborated(tiny: Path, tmp_path: Path) -> None:
    """Equal fingerprints at every step, the copies are kept where asked, and the end has the bytes of the start."""
    seen: list[tuple[str, int, int]] = []
    with open_checkpoint(tiny) as source:
        found = trip.chain(source, ["gguf", "apr", "safetensors"], folder=tmp_path, progress=lambda *s: seen.append(s))
    assert found.verdict is Verdict.CORROBORATED
    assert len({step.fingerprint for step in found.steps}) == 1
    assert [step.format for step in found.steps] == ["safetensors", "gguf", "apr", "safetensors"]
    assert found.comparison.tensors.compared == found.comparison.tensors.expected > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1-gguf.gguf", "2-apr.apr", "3-safetensors"]
    assert data_digest(tmp_path / "3-safetensors") == data_digest(tiny)
    assert {label for label, _, _ in seen} == {"writing gguf", "writing apr", "writing safetensors"}
    assert found.as_json()["verdict"] == "CORROBORATED"


@pytest.mark.oracle
def test_bytes_of_f16_and_of_k_quants_survive_apr(oracle: Path, tiny: Path, tmp_path: Path) -> None:
    """SafeTensors F16 and a GGUF of llama.cpp in Q4_K_M, through APR and back: the very bytes."""
    half = convert(tiny, tmp_path / "half", quantize="F16")
    back = convert(convert(half, tmp_path / "half.apr"), tmp_path / "back")
    assert data_digest(back) == data_digest(half)
    quantised = oracle / "mini" / "gguf" / "Q4_K_M.gguf"
    again = convert(convert(quantised, tmp_path / "q.apr"), tmp_path / "q.gguf")
    assert data_digest(again) == data_digest(quantised)
    with open_checkpoint(again) as copy:
        assert copy.metadata["general.file_type"] == 15


def test_a_quantised_chain_is_judged_by_the_bound(tiny: Path) -> None:
    """Asked to quantise, the first copy may differ within the codec's bound, the later ones not at all."""
    with open_checkpoint(tiny) as source:
        found = trip.chain(source, ["gguf", "gguf"][:1], quantize="Q8_0")
    assert found.verdict is Verdict.CORROBORATED
    assert found.steps[0].fingerprint != found.steps[1].fingerprint


@pytest.mark.parametrize("formats", [[], ["onnx"], ["gguf", "gguf"]])
def test_formats_that_make_no_way_are_refused(formats: list[str], tiny: Path) -> None:
    """None, an unknown one, and the same one twice in a row."""
    with open_checkpoint(tiny) as source, pytest.raises(UsageError, match="none twice in a row"):
        trip.chain(source, formats)


def test_a_round_trip_chooses_a_format_that_holds_it(tiny: Path, tmp_path: Path) -> None:
    """BF16 goes through GGUF; Q8_0 has no other home, and says so."""
    with open_checkpoint(tiny) as source:
        found = trip.round_trip(source)
        assert [step.format for step in found.steps] == ["safetensors", "gguf", "safetensors"]
        assert found.verdict is Verdict.CORROBORATED
        assert trip.round_trip(source, "apr").verdict is Verdict.CORROBORATED
    with open_checkpoint(convert(tiny, tmp_path / "q.gguf", quantize="Q8_0")) as source:
        with pytest.raises(UsageError, match="no other format holds"):
            trip.round_trip(source)
        with pytest.raises(UsageError, match="safetensors cannot hold Q8_0"):
            trip.round_trip(source, "safetensors")


def test_a_broken_converter_is_refuted(tiny: Path, monkeypatch: pytest.MonkeyPatch, edited: Edit) -> None:
    """A copy with one other value, and one that only lost its configuration on the way."""
    spoilt = {
        "value": edited(lambda held: held["model.norm.weight"].__setitem__(3, 2.0)),
        "config": edited(**{"config.json": {"rope_theta": 10000.0}}),
    }
    for kind, path in spoilt.items():
        monkeypatch.setattr(trip, "convert", lambda before, target, path=path, **_: convert(path, target))
        with open_checkpoint(tiny) as source:
            found = trip.chain(source, ["apr"])
        assert found.verdict is Verdict.FALSIFIED
        assert ("model.norm.weight" if kind == "value" else "rope_theta") in found.reason


def test_a_fault_that_a_later_step_repairs_is_refuted(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, edited: Edit
) -> None:
    """Two swaps in a row give the original back; the fingerprint between them does not."""

    def swapped(held: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        held[name] = held[name].flip(0)

    wrong = edited(swapped)
    monkeypatch.setattr(
        trip, "convert", lambda before, target, **_: convert(wrong if target.suffix == ".gguf" else tiny, target)
    )
    with open_checkpoint(tiny) as source:
        found = trip.chain(source, ["gguf", "apr"])
    assert found.comparison.verdict is Verdict.CORROBORATED
    assert found.verdict is Verdict.FALSIFIED
    assert found.reason == "the fingerprint changed on the way to gguf"


def test_missing_and_extra_tensors_are_failures(tiny: Path, edited: Edit) -> None:
    """In either direction; and nothing compared is never corroborated."""
    less = edited(lambda held: held.pop("model.layers.0.self_attn.k_proj.bias"))
    with open_checkpoint(tiny) as whole, open_checkpoint(less) as part:
        for subject, reference in ((part, whole), (whole, part)):
            found = trip.compare(subject, reference)
            assert found.verdict is Verdict.FALSIFIED
            assert "k_proj.bias: missing" in found.reason
        nothing = trip.compare(whole, whole, pattern="no such name", identity=False)
    assert (nothing.verdict, nothing.reason) == (Verdict.INCONCLUSIVE, "no value was compared")


def test_what_could_not_be_compared_is_inconclusive(tiny: Path, edited: Edit) -> None:
    """One side without a tokenizer: no difference was found, and no match either."""
    bare = edited(drop=("tokenizer.json", "tokenizer_config.json"))
    with open_checkpoint(tiny) as reference, open_checkpoint(bare) as subject:
        found = trip.compare(subject, reference)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "tokenizer" in found.reason
    assert found.as_json()["not_compared"]

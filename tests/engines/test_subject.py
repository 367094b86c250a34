"""Subjects: what they lack, what they hold, and how they are refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from apr_core.engines.subject import ROOT, STIMULUS, obtain, open_round, resolve_model
from apr_core.errors import FormatError, NotFound, UsageError
from apr_core.falsify.claims import load_claims
from apr_core.zoo.acts import twin
from apr_core.zoo.draft import put_together
from apr_core.zoo.plants import DOWN

# On the bundled model on a CPU, these and no others may be NOT_RUN.
NOT_RUN_ON_PYGMY = [
    *("F-GT-010", "F-GT-011", "F-PAR-008", "F-PAR-009", "F-PAR-010", "F-PAR-012"),
    *("F-THR-009", "F-THR-011"),
]
NOT_RUN_WITH_REFERENCE = ["F-PAR-010", "F-PAR-012", "F-THR-009", "F-THR-011"]


def lacking(subject) -> list[str]:
    """The claims that a subject cannot be asked."""
    return [c.id for c in load_claims().values() if any(need in subject.lacks for need in c.needs)]


def test_only_cuda_and_reference_claims_are_not_run_on_the_bundled_model():
    """The pinned list: a claim that falls silent changes it."""
    subject = obtain("pygmy", device="cpu")

    assert lacking(subject) == NOT_RUN_ON_PYGMY
    assert subject.refusal is None
    subject.close()


def test_with_a_reference_no_reference_claim_is_not_run(pygmy, tmp_path):
    """A GGUF made from the bundled model, held against it."""
    from apr_core.rosetta.convert import convert

    path = convert(pygmy, tmp_path / "copy.gguf")
    shutil.copy(pygmy / "golden.json", tmp_path)
    shutil.copy(pygmy / "transformers_f64.npz", tmp_path)
    subject = obtain(str(path), reference="pygmy", device="cpu")

    assert lacking(subject) == NOT_RUN_WITH_REFERENCE
    assert subject.reference.record.sha256 != subject.record.sha256
    subject.close()


def test_the_bundled_name_works_from_any_folder(tmp_path, monkeypatch):
    """`pygmy` is not a path of the working directory."""
    monkeypatch.chdir(tmp_path)

    assert resolve_model("pygmy") == ROOT / "models" / "pygmy"
    assert resolve_model("pygmy").is_dir()
    assert str(resolve_model("./pygmy")) == "pygmy"


def test_a_refused_model_is_a_subject_with_its_refusal(tmp_path):
    """Notebooks go on with it: the report is always written."""
    draft = twin().copy()
    draft.weights[DOWN][...] = 0
    subject = obtain(str(put_together(draft, tmp_path / "bad")))

    assert DOWN in subject.refusal
    assert DOWN in subject.record.refusal
    subject.close()


def test_a_bypassed_subject_is_marked(tmp_path):
    """--skip-contract: not refused, but marked for every record."""
    draft = twin().copy()
    draft.weights[DOWN][...] = 0
    subject = obtain(str(put_together(draft, tmp_path / "bad")), skip_contract=True)

    assert subject.refusal is None
    assert subject.record.bypassed
    assert np.isfinite(subject.model.forward(np.arange(4))).all()
    subject.close()


def test_a_synthetic_model_lacks_training_and_draws_seeded_ids(tmp_path):
    """Its mark is in the file; text would mean nothing to it."""
    from apr_core.model.synth import synthesise

    out = synthesise("pygmy", format="safetensors", dtype="bf16", tokenizer=None, seed=1, out=tmp_path / "s")
    one, two = obtain(str(out), seed=5), obtain(str(out), seed=6)

    assert "trained" in one.lacks
    assert one.lacks["trained"] == "untrained model"
    assert one.lacks["tokenizer"] == "no tokenizer"
    assert set(one.lacks) == {
        "tokenizer",
        "template",
        "golden",
        "golden_logits",
        "trained",
        "reference",
        "cuda",
        "peer",
    } - (set() if "cuda" in one.lacks else {"cuda"})
    assert len(one.lacks) == len(set(one.lacks))
    assert one.stimulus(50).ids.tolist() == one.stimulus(50).ids.tolist()
    assert one.stimulus(50).ids.tolist() != two.stimulus(50).ids.tolist()


def test_a_stimulus_is_text_where_there_is_a_tokenizer():
    """Code, prose, digits and CJK, repeated until there are enough tokens."""
    subject = obtain("pygmy")
    prepared = subject.stimulus(300)

    assert prepared.ids.size == 300
    assert STIMULUS.startswith(subject.tokenizer.decode(prepared.ids[:60].tolist()))
    subject.close()


@pytest.mark.parametrize("text", ["{", "[]", '{"cases": [{"id": "a"}]}', '{"cases": 3}'])
def test_a_broken_golden_file_is_an_error(tmp_path, text):
    """Silence would skip the claim."""
    folder = put_together(twin(), tmp_path / "m")
    (folder / "golden.json").write_text(text)
    with pytest.raises(FormatError, match=r"golden\.json"):
        _ = obtain(str(folder)).golden


def test_wrong_arguments_are_typed_errors(tmp_path):
    """A device that is none, a path that is none."""
    with pytest.raises(UsageError, match="expected a device"):
        obtain("pygmy", device="tpu")
    with pytest.raises(NotFound):
        obtain(str(tmp_path / "none.gguf"))


def test_a_round_keeps_parameters_and_subject(tmp_path):
    """What a record needs to be repeated."""
    subject = obtain("pygmy", reference="pygmy")
    this_round = open_round("10_contract_gates", subject, str(tmp_path), {"seed": 0})

    assert this_round.parameters == {"seed": 0}
    assert json.loads(json.dumps(this_round.provenance))["python"]
    assert this_round.reference.sha256 == this_round.subject.sha256
    assert open_round("20_parity", subject, "", {}).folder.is_dir()

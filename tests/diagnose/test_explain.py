"""The way from a failure to its cause, on files that open and on files that do not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from apr_core.diagnose.cause import EXPLAINED, NOTHING, UNEXPLAINED, Cause
from apr_core.diagnose.explain import explain_failure
from apr_core.errors import NotFound, UsageError
from apr_core.falsify.evidence import SubjectRecord, make_evidence, write_evidence
from apr_core.falsify.finding import Finding
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.zoo.draft import Draft

# One defect of each kind: what must be named, and where to look.
WITH_REFERENCE = {
    "cut-1-percent": ("container", ""),
    "bf16-as-f16-one": ("container", "model.layers.1.mlp.down_proj.weight"),
    "offset-gate-up": ("container", "gate_proj"),
    "stale-pages": ("missing-data", ""),
    "row-zero": ("missing-data", "model.layers.1.mlp.down_proj.weight"),
    "scaled-1.1": ("tensor-values", "model.layers.1.mlp.down_proj.weight"),
    "q-transposed": ("layout", "model.layers.0.self_attn.q_proj.weight"),
    "qk-interleaved": ("layout", "_proj.weight"),
    "gate-up-swapped": ("naming", "_proj.weight"),
    "one-name-misspelt": ("naming", "o_proj.weight"),
    "theta-half": ("configuration", "rope_theta"),
    "exponent-clamped": ("codec", "down_proj.weight"),
    "bf16-of-4-bits": ("codec", "_proj.weight"),
    "all-scales-shifted": ("codec", "_proj.weight"),
    "small-flushed": ("numerics", "down_proj.weight"),
    "f32-drift": ("converter", "_proj.weight"),
    "merges-swapped": ("tokenizer", "merges"),
    "default-system-other": ("template", "chat template"),
    "ends-none": ("stop", "end tokens"),
    "golden-answer-other": ("suite", "golden.json"),
}
ALONE = {
    "down-zero": "missing-data",
    "bytes-swapped": "container",
    "kv-heads-doubled": "configuration",
    "all-reversed": "layout",
    "biases-dropped": "naming",
    "int8-without-scale": "codec",
    "f16-overflow-one": "numerics",
    "end-takes-space": "tokenizer",
    "roles-exchanged": "template",
    "template-broken": "template",
    "values-1e37": "tensor-values",
    "word-beyond-rows": "tokenizer",
    "yarn": "configuration",
    "key-says-q4": "converter",
}

Plant = Callable[[str | Callable[[Draft], object]], Path]


@pytest.mark.parametrize("defect", WITH_REFERENCE)
def test_a_reference_names_class_and_place(defect: str, plant: Plant) -> None:
    """The first cause is the planted one, and its chain ends with what was measured."""
    klass, place = WITH_REFERENCE[defect]
    found = explain_failure(plant(defect), reference="pygmy")
    assert found.outcome == EXPLAINED
    assert found.causes[0].klass == klass
    assert place in found.causes[0].place
    assert len(found.whys) >= 2


@pytest.mark.parametrize("defect", ALONE)
def test_alone_the_file_speaks_for_itself(defect: str, plant: Plant) -> None:
    """What the gates refuse, or the words contradict, is named without a reference."""
    found = explain_failure(plant(defect))
    assert [cause.klass for cause in found.causes][:1] == [ALONE[defect]]


@pytest.mark.parametrize("oddity", ["gguf-q8", "tied-head-stored", "weights-f32", "rope-nested", "template-crlf"])
def test_a_legal_variant_has_nothing_to_explain(oddity: str, plant: Plant) -> None:
    """Containers, types and spellings are no damage; provenance says what they are."""
    found = explain_failure(plant(oddity), reference="pygmy")
    assert found.outcome == NOTHING
    assert found.causes == ()
    assert found.provenance.startswith(("a legal variant", "the same tensors"))


def test_another_quantiser_is_told_from_ours(plant: Plant) -> None:
    """Other bytes within the bound of the type are another quantiser's, and no damage."""
    assert "another quantiser" in explain_failure(plant("q8-of-another"), reference="pygmy").provenance
    assert "another quantiser" not in explain_failure(plant("gguf-q8"), reference="pygmy").provenance


def test_another_model_is_not_called_corrupt(plant: Plant) -> None:
    """Where every tensor differs without a structure it is another model, or another revision of this one."""

    def other(share: float) -> Callable[[Draft], None]:
        def recipe(draft: Draft) -> None:
            random = np.random.default_rng(0)
            for name, values in draft.weights.items():
                drawn = random.normal(values.mean(), values.std(), values.shape).astype(np.float32)
                draft.weights[name] = np.float32(1 - share) * values + np.float32(share) * drawn

        return recipe

    for share, said in ((1.0, "a different model"), (0.05, "another revision")):
        found = explain_failure(plant(other(share)), reference="pygmy")
        assert found.outcome == UNEXPLAINED
        assert found.provenance.startswith(said)
        assert found.causes == ()
        assert found.whys[-1] == ("What would be needed?", "the reference that it was made from")


def test_two_defects_are_both_named(plant: Plant) -> None:
    """Damage of two tensors, and of the words, comes as several causes."""

    def both(draft: Draft) -> None:
        down, q = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"
        draft.weights[down] *= np.float32(1.5)
        draft.weights[q] = draft.weights[q].T.copy()
        draft.config["rope_theta"] = 10000.0

    found = explain_failure(plant(both), reference="pygmy")
    assert {c.klass for c in found.causes} == {"tensor-values", "layout", "configuration"}
    assert len(found.as_json()["others"]) == 2


def test_evidence_must_be_of_this_file_and_refute_something(plant: Plant, tmp_path: Path) -> None:
    """A record of another file, or of a claim that held, is no symptom; the right one begins the chain."""
    path = plant("scaled-1.1")
    with open_checkpoint(path) as checkpoint:
        sha256 = checkpoint.content_hash

    def record(value: float, sha: str) -> Path:
        finding = Finding(value, 9, 9, claim="F-GT-010")
        subject = SubjectRecord("x", str(path), sha256=sha)
        return write_evidence(make_evidence(finding, subject, parameters={}, provenance={}), tmp_path / "run")

    found = explain_failure(path, reference="pygmy", evidence=record(3.0, sha256))
    assert found.whys[0][0] == "What was refuted? (F-GT-010)"
    with pytest.raises(UsageError, match="is CORROBORATED in this record"):
        explain_failure(path, evidence=record(0.0, sha256))
    with pytest.raises(UsageError, match="the evidence is of a file of sha256 000000000000"):
        explain_failure(path, evidence=record(3.0, "0" * 64))


def test_what_cannot_be_explained_is_no_guess(plant: Plant, tmp_path: Path) -> None:
    """No file is an error, an empty folder and noise are causes of the container, a healthy model has none."""
    with pytest.raises(NotFound):
        explain_failure(tmp_path / "nothing")
    noise = tmp_path / "noise.gguf"
    noise.write_bytes(np.random.default_rng(0).bytes(5000))
    assert explain_failure(noise).causes[0].klass == "container"
    healthy = plant("metadata")
    assert explain_failure(healthy).outcome == NOTHING
    assert explain_failure(healthy, reference="pygmy").outcome == NOTHING
    shutil.rmtree(healthy)


def test_a_reference_of_another_architecture_is_refused(plant: Plant) -> None:
    """Every difference would be called a cause, so nothing is compared."""

    def smaller(draft: Draft) -> None:
        for name, values in draft.weights.items():
            if "v_proj.bias" not in name:  # two sizes of a family share the width of their keys and values
                draft.weights[name] = values[tuple(slice(0, n * 3 // 4) for n in values.shape)].copy()

    with pytest.raises(UsageError, match="is of another architecture"):
        explain_failure(plant("metadata"), reference=plant(smaller))


def test_a_cause_is_of_the_closed_list() -> None:
    """A class that the glossary does not have cannot be named."""
    with pytest.raises(ValueError, match="not on the closed list"):
        Cause("gremlins", "Who?", "they did it")

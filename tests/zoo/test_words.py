"""Planted defects of words and converters: the table is sound, and a few of them end where they must."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from apr_core.diagnose.cause import CAUSES
from apr_core.engines.subject import BUNDLED
from apr_core.falsify.claims import load_claims
from apr_core.falsify.verdict import Verdict
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.rosetta.convert import convert
from apr_core.zoo import files, words
from apr_core.zoo.draft import Draft, take_apart
from apr_core.zoo.matrix import evaluate
from apr_core.zoo.registry import NotApplicable

PYGMY = BUNDLED["pygmy"]
GROUND_TRUTH = {c for c in load_claims() if c.startswith("F-GT-")}


@pytest.fixture(scope="module")
def healthy() -> Draft:
    """The bundled model, taken apart."""
    with open_checkpoint(PYGMY) as checkpoint:
        return take_apart(checkpoint)


def test_the_table_is_sound() -> None:
    """At least sixty defects of 22 classes, at most four of a class, causes and claims that exist."""
    counted = Counter(d.klass for d in words.DEFECTS)
    assert len(counted) >= 22
    assert len(words.DEFECTS) >= 60
    assert max(counted.values()) <= 4
    assert {d.cause for d in words.DEFECTS} <= set(CAUSES)
    assert {claim for d in words.DEFECTS for claim in d.kills} <= {*GROUND_TRUTH, "F-PAR-011", "preflight"}


def test_every_claim_of_ground_truth_is_the_purpose_of_a_defect() -> None:
    """Each of the claims must kill three defects of two classes, or say why it stays."""
    for claim in sorted(GROUND_TRUTH - set(words.REDUNDANT)):
        meant = [d for d in (*words.DEFECTS, *files.DEFECTS) if claim in d.kills]
        assert len(meant) >= 3, claim
        assert len({d.klass for d in meant}) >= 2, claim


@pytest.mark.parametrize("defect", [d for d in words.DEFECTS if d.recipe], ids=lambda d: d.id)
def test_a_recipe_damages_the_draft_it_is_given(defect, healthy: Draft) -> None:
    """A recipe that changes nothing would be a survivor for the wrong reason."""
    draft = healthy.copy()
    if defect.id == "fim-exchanged":
        with pytest.raises(NotApplicable, match="fim_prefix"):
            defect.recipe(draft)
        return
    defect.recipe(draft)
    same = all(
        np.array_equal(draft.weights[n].view(np.uint32), healthy.weights[n].view(np.uint32)) for n in draft.weights
    )
    told = [(d.config, d.companions, list(d.carried)) for d in (draft, healthy)]
    assert not same or told[0] != told[1] or draft.after


def test_a_tamper_leaves_other_copies_alone(tmp_path: Path) -> None:
    """A fault of the exact copies is none of the Q8_0 copy, and the other way round; folders stay as they are."""
    defects = {d.id: d for d in words.DEFECTS}
    path = convert(PYGMY, tmp_path / "Q8_0.gguf", quantize="Q8_0")
    before = path.read_bytes()
    defects["copy-gate-up"].tamper(path)
    assert path.read_bytes() == before
    defects["q8-unsigned"].tamper(path)
    assert path.read_bytes() != before
    defects["copy-gate-up"].tamper(tmp_path)


@pytest.mark.parametrize(
    ("chosen", "claim"),
    [
        ("copy-through-f16", "F-GT-001"),
        ("copy-eps-five", "F-GT-002"),
        ("copy-template-lost", "F-GT-003"),
        ("copy-truncated-file", "F-GT-001"),
        ("start-takes-space", "F-GT-004"),
        ("template-llama3", "F-GT-004"),
        ("trigger-word", "F-GT-004"),
        ("injectable-end", "F-GT-005"),
        ("decoder-missing", "F-GT-006"),
        ("q8-theta-lost", "F-GT-007"),
        ("golden-logits-noisy", "F-GT-008"),
        ("golden-greedy-other", "F-GT-009"),
        ("last-bit-embedding", "F-GT-010"),
        ("pre-gpt2", "F-GT-011"),
    ],
)
def test_the_claim_that_is_meant_kills_it(chosen: str, claim: str) -> None:
    """One defect of its own for each claim of notebook 00."""
    defect = next(d for d in words.DEFECTS if d.id == chosen)
    outcome = evaluate(defect, PYGMY, claims=[claim])
    assert [(row.claim, row.verdict) for row in outcome.judged] == [(claim, Verdict.FALSIFIED)]

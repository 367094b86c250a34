"""Legal oddities: enough of them, each one really odd, and those that once raised an alarm do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apr_core.contract.admit import admit
from apr_core.engines.subject import BUNDLED
from apr_core.falsify.verdict import Verdict
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.zoo import benign, plants
from apr_core.zoo.draft import Draft, put_together, take_apart
from apr_core.zoo.matrix import claims_for, evaluate
from apr_core.zoo.registry import NotApplicable

PYGMY = BUNDLED["pygmy"]


@pytest.fixture(scope="module")
def healthy() -> Draft:
    """The bundled model, taken apart."""
    with open_checkpoint(PYGMY) as checkpoint:
        return take_apart(checkpoint)


def test_there_are_enough_of_them() -> None:
    """Sixty with those of the gates, each id once."""
    ids = [b.id for b in (*benign.BENIGN, *plants.BENIGN)]
    assert len(benign.BENIGN) >= 50
    assert len(ids) >= 60
    assert len(set(ids)) == len(ids)


def test_what_changes_values_is_held_against_nothing() -> None:
    """An oddity of its own values meets no claim that needs a reference or golden answers."""
    alone = next(b for b in benign.BENIGN if b.alone)
    other = next(b for b in benign.BENIGN if not b.alone)
    assert {"F-GT-008", "F-GT-010", "F-PAR-008"}.isdisjoint(claims_for(alone))
    assert {"F-GT-008", "F-GT-010", "F-PAR-008"} <= set(claims_for(other))


@pytest.mark.parametrize("item", [b for b in benign.BENIGN if b.alone], ids=lambda b: b.id)
def test_the_contract_admits_it(item, healthy: Draft, tmp_path: Path) -> None:
    """No gate refuses legal values; the oddities of form are held against all claims by the matrix."""
    draft = healthy.copy()
    item.recipe(draft)
    admission = admit(put_together(draft, tmp_path / "model"))
    assert list(admission.violations) == []
    admission.checkpoint.close()


@pytest.mark.parametrize("chosen", ["near-ties", "special-flag-off", "template-crlf", "turned"])
def test_no_claim_is_alarmed(chosen: str) -> None:
    """Words and logits of the oddities that need more than the gates."""
    item = next(b for b in benign.BENIGN if b.id == chosen)
    claims = [c for c in claims_for(item) if c.startswith(("F-GT-00", "F-GT-011", "F-PAR-00"))]
    outcome = evaluate(item, PYGMY, claims=claims)
    assert outcome.crash == ""
    assert [row.claim for row in outcome.judged if row.verdict == Verdict.FALSIFIED] == []


def test_another_quantiser_writes_other_bytes(healthy: Draft, tmp_path: Path) -> None:
    """The point of the oddity is that no byte comparison would hold."""
    items = {b.id: b for b in benign.BENIGN}
    raws = []
    for name in ("gguf-q8", "q8-of-another"):
        draft = healthy.copy()
        items[name].recipe(draft)
        with open_checkpoint(put_together(draft, tmp_path / name)) as checkpoint:
            raws.append(checkpoint.raw(plants.DOWN).data.copy())
    assert not np.array_equal(*raws)


def test_an_oddity_that_needs_what_the_model_lacks_says_so(healthy: Draft) -> None:
    """Without companions there is no template to rewrite."""
    draft = healthy.copy()
    draft.companions.clear()
    with pytest.raises(NotApplicable, match="tokenizer_config"):
        next(b for b in benign.BENIGN if b.id == "template-crlf").recipe(draft)

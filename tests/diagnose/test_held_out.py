"""What the first held-out set taught: one case for each experiment that it brought, at once and through the cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from apr_core.diagnose.backend import explain_backend
from apr_core.diagnose.cause import Chain
from apr_core.diagnose.explain import explain_failure
from apr_core.engines.subject import obtain
from apr_core.engines.wrap import wrap
from apr_core.zoo.held_out import HELD_OUT, UNSEEN
from apr_core.zoo.registry import load_zoo

ALL = {d.id: d for d in (*HELD_OUT, *UNSEEN)}
FILES = {
    "held-data-late": "Does it begin where the header says?",
    "held-rows-late": "Do the rows begin at the first?",
    "held-gate-up-zipped": "Are rows in another order?",
    "held-offset-seven": "Was it quantised before?",
    "held-five-bits": "Was it quantised before?",
    "held-eighths": "Is it simple arithmetic?",
    "held-clipped": "Is it simple arithmetic?",
    "unseen-q8-rows-shuffled": "Are rows in another order?",
}


@pytest.mark.parametrize("defect", FILES)
def test_a_file_is_named_by_the_experiment_that_was_made_for_it(
    defect: str, plant: Callable[..., Path], pygmy: Path
) -> None:
    """Class, and which experiment told."""
    recipe = ALL[defect].recipe
    assert recipe is not None
    (cause,) = explain_failure(plant(recipe), reference=pygmy).causes
    assert (cause.klass, cause.experiment) == (ALL[defect].cause, FILES[defect])


@pytest.mark.parametrize("fault", ["held-penalty", "held-ids-clamped"])
def test_a_backend_is_named_by_what_stands_beside(fault: str) -> None:
    """Few logits that differ from row to row are chosen; what q, k and v share is what goes into them."""
    hook = ALL[fault].hook
    assert hook is not None
    with closing(obtain("pygmy", device="cpu")) as subject, np.errstate(all="ignore"):
        candidate = wrap(subject.model, hook(subject.model.config))
        (cause,) = explain_backend(candidate, subject.plain, subject.stimulus(96).ids, Chain())
    assert cause.klass == ALL[fault].cause


def test_none_of_them_is_of_the_zoo() -> None:
    """A defect that a claim promises to kill is no longer held out."""
    assert not ALL.keys() & load_zoo().defects.keys()
    assert len(ALL) == len(HELD_OUT) + len(UNSEEN)

"""The registry: ids, classes, causes, and a glossary that says what each cause means."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from apr_core.diagnose.cause import CAUSES
from apr_core.falsify.claims import load_claims
from apr_core.zoo.draft import Draft
from apr_core.zoo.registry import Benign, Defect, Zoo, load_zoo


def nothing(draft: Draft) -> None:
    """A recipe that does nothing."""


def test_the_glossary_explains_every_cause_and_no_other(root):
    """The closed list lives in code; people read the glossary."""
    table = (root / "docs" / "glossary.md").read_text(encoding="utf-8").split("## Root causes")[1]

    assert re.findall(r"^\| ([a-z-]+) \|", table, re.MULTILINE)[1:] == list(CAUSES)


def test_the_zoo_is_large_enough_and_its_classes_are_not_padded():
    """80 classes and 250 defects, of which at most four of a class count; 60 benign oddities."""
    zoo = load_zoo()
    classes = Counter(d.klass for d in zoo.defects.values())

    assert len(classes) >= 80
    assert sum(min(4, n) for n in classes.values()) >= 250
    assert len(zoo.benign) >= 60


def test_every_promise_names_a_claim():
    """A defect that promises a claim that does not exist would promise nothing."""
    known = {*load_claims(), "preflight"}
    unknown = {d.id: set(d.kills) - known for d in load_zoo().defects.values() if set(d.kills) - known}

    assert unknown == {}


@pytest.mark.parametrize(
    "item",
    [
        Defect("a", "k", "w", "s", "nonsense", ("F-GT-001",), recipe=nothing),
        Defect("a", "k", "w", "s", "layout", (), recipe=nothing),
        Defect("a", "k", "w", "s", "layout", ("F-GT-001",)),
        Defect("a", "k", "w", "s", "layout", ("F-GT-001",), recipe=nothing, tamper=print),
    ],
)
def test_a_defect_that_says_too_little_is_refused(item):
    """Cause from the closed list, one way in, at least one claim that must kill it."""
    with pytest.raises(ValueError, match="a: cause"):
        Zoo().add(item)


def test_ids_are_unique():
    """Two defects with one id: the second would overwrite the first's outcome."""
    zoo = Zoo()
    zoo.add(Benign("same", "x", nothing))
    with pytest.raises(ValueError, match="twice"):
        zoo.add(Defect("same", "k", "w", "s", "layout", ("F-GT-001",), recipe=nothing))

"""The claims table: sane, complete, and not edited in silence."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest

from apr_core.falsify import claims as module
from apr_core.falsify.claims import NOTEBOOKS, PINNED, Claim, claims_of, load_claims, threshold_digest
from apr_core.falsify.verdict import NEEDS, NotRun


def test_threshold_digest_is_pinned() -> None:
    """
    A threshold does not change without a version bump.

    When this fails: raise ``version`` of the claim you changed in apr_core/falsify/claims.toml, write a decision note
    that says why the limit moved, then put the digest printed below into claims.PINNED.
    """
    found = threshold_digest()
    assert found == PINNED, f"bump the claim's version, write a decision note, then pin {found}"


@pytest.mark.parametrize("field", ["threshold", "version", "metric", "unit", "direction"])
def test_digest_moves_with_every_field_that_decides(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pin would be worthless if a field could change without moving it."""
    before = threshold_digest()
    table = dict(load_claims())
    claim = table["F-GT-002"]
    change: object = getattr(claim, field) * 2 if field in ("threshold", "version") else "other"
    table["F-GT-002"] = replace(claim, **{field: change})  # type: ignore[arg-type]
    monkeypatch.setattr(module, "load_claims", lambda: table)
    assert before != threshold_digest()


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_each_notebook_argues_at_least_seven_claims(notebook: str) -> None:
    """A notebook with fewer would be a demonstration, not an attempt at refutation."""
    assert len(claims_of(notebook)) >= 7


def test_every_claim_belongs_to_exactly_one_notebook() -> None:
    """The four notebooks together argue the whole table, each claim once."""
    argued = Counter(c.id for n in NOTEBOOKS for c in claims_of(n))
    assert argued == dict.fromkeys(load_claims(), 1)


@pytest.mark.parametrize("claim", load_claims().values(), ids=list(load_claims()))
def test_claim_is_refutable_as_written(claim: Claim) -> None:
    """Every claim says what it predicts, what refutes it, how it is measured and where its limit comes from."""
    assert re.fullmatch(r"F-[A-Z]+(-[A-Z]+)*-\d{3}", claim.id)
    assert claim.severity in range(1, 6)
    assert claim.version >= 1
    assert claim.round in range(44, 54)
    assert claim.direction in ("at_most", "at_least")
    assert set(claim.needs) <= set(NEEDS)
    for field in ("title", "statement", "prediction", "falsifier", "source", "metric", "unit"):
        text = getattr(claim, field)
        assert text.strip() == text
        assert text
    assert claim.threshold >= 0
    assert claim.as_json()["needs"] == list(claim.needs)


def test_limit_prints_direction_and_number() -> None:
    """The canonical line shows the limit as a person writes it."""
    claims = load_claims()
    assert claims["F-GT-002"].limit == "<= 1e-06"
    assert claims["F-PAR-005"].limit == ">= 1"


@pytest.mark.parametrize(
    ("claim", "reason", "asked", "expected"),
    [
        ("F-PAR-010", NotRun.NO_CUDA, set(), False),
        ("F-PAR-010", NotRun.NO_CUDA, {"cuda"}, True),
        ("F-PAR-010", NotRun.NO_CUDA, {"reference"}, False),
        ("F-PAR-010", NotRun.NO_REFERENCE, {"reference"}, False),
        ("F-GT-010", NotRun.NO_REFERENCE, {"reference"}, True),
        ("F-GT-006", NotRun.UNTRAINED, {"golden"}, False),
        ("F-GT-006", NotRun.NO_GOLDEN, {"golden"}, True),
        ("F-GT-008", NotRun.NO_GOLDEN, {"golden_logits"}, True),
        ("F-GT-001", NotRun.REFUSED, set(), False),
        ("F-GT-001", NotRun.NOT_OPENED, set(), True),
        ("F-PAR-010", NotRun.NOT_OPENED, set(), True),
    ],
)
def test_required(claim: str, reason: NotRun, asked: set[str], expected: bool) -> None:
    """An absent precondition excuses a claim unless the person asked for it; an unopened subject excuses nothing."""
    assert load_claims()[claim].required(reason, frozenset(asked)) is expected


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text + text[text.index("[[claim]]") :], "twice"),
        (lambda text: text.replace('"00_ground_truth"', '"05_elsewhere"'), "unknown notebook or need"),
        (lambda text: text.replace('needs = ["reference"]', 'needs = ["moon"]'), "unknown notebook or need"),
    ],
)
def test_a_broken_table_is_refused(edit: object, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim twice, of no notebook, or with a need that nothing probes, would never be judged."""
    text = edit(module.files("apr_core.falsify").joinpath("claims.toml").read_text(encoding="utf-8"))  # type: ignore[operator]

    class Fake:
        def joinpath(self, _: str) -> Fake:
            return self

        def read_text(self, encoding: str) -> str:
            return text

    monkeypatch.setattr(module, "files", lambda _: Fake())
    with pytest.raises(ValueError, match=message):
        load_claims.__wrapped__()

"""Detection power: draws are seeded and nested, and the smallest severity that is seen is found."""

from __future__ import annotations

import numpy as np
import pytest

from apr_core.engines.subject import obtain
from apr_core.zoo import power as module
from apr_core.zoo.acts import twin
from apr_core.zoo.power import CLAIMS, KINDS, QUICK, SEVERITIES, draw, power


def changed(kind, severity, seed):
    """The drawn tensor's name, what it was and what it became."""
    draft = twin().copy()
    draw(kind, severity, seed)(draft)
    [name] = [n for n, v in draft.weights.items() if not np.array_equal(v, twin().weights[n])]
    return name, twin().weights[name], draft.weights[name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_draw_damages_one_tensor_the_same_way_each_time(kind, seed):
    """The seed decides tensor and places; severity alone moves the rest."""
    name, before, after = changed(kind, 0.1, seed)
    again, _, twice = changed(kind, 0.1, seed)

    assert (name, after.dtype, after.shape) == (again, np.float32, before.shape)
    assert np.array_equal(after, twice)
    assert changed(kind, 0.5, seed)[0] == name


@pytest.mark.parametrize("kind", KINDS)
def test_the_places_of_a_milder_draw_lie_within_those_of_a_harsher_one(kind):
    """Otherwise a share of draws could fall while the severity rises."""
    places = [np.flatnonzero(after != before) for _, before, after in (changed(kind, s, 3) for s in (0.01, 0.3))]

    assert 0 < len(places[0]) <= len(places[1])
    assert kind == "permuted" or set(places[0]) <= set(places[1])


def test_severity_is_what_it_says():
    """A share of zeros, a relative error, a factor, a share of rows."""
    _, before, zeros = changed("zeros", 0.25, 0)
    assert (zeros == 0).sum() == pytest.approx(0.25 * before.size, abs=1 + int((before == 0).sum()))
    _, before, noisy = changed("noise", 0.1, 0)
    assert np.linalg.norm(noisy - before) / np.linalg.norm(before) == pytest.approx(0.1, rel=0.2)
    _, before, scaled = changed("scale", 0.5, 0)
    np.testing.assert_allclose(scaled, 1.5 * before, rtol=1e-6)
    _, before, moved = changed("permuted", 0.5, 0)
    np.testing.assert_array_equal(np.sort(moved, axis=0), np.sort(before, axis=0))
    rows = (moved != before).reshape(len(before), -1).any(axis=1).sum()
    assert rows <= max(2, round(0.5 * len(before)))


def test_an_unknown_kind_is_refused():
    """A typo must not draw nothing."""
    with pytest.raises(KeyError):
        draw("rotten", 0.1, 0)


def test_the_identity_claim_sees_every_change_of_the_file(pygmy):
    """With the reference given no drawn defect is too small; one that rounds away is none."""
    told = []
    grid = {"zeros": (1e-4, 1.0), "noise": (1e-3, 1.0), "scale": (1e-4, 0.01, 1.0), "permuted": (1e-2, 1.0)}
    rows = power(pygmy, ("F-GT-010",), severities=grid, draws=2, progress=lambda done, of: told.append((done, of)))

    assert told == [(n, 18) for n in range(1, 19)]
    assert [r for r in rows if r["seen"] < r["draws"]] == []
    assert {(r["kind"], r["severity"]) for r in rows if r["draws"] == 0} == {("scale", 1e-4)}


def test_each_claim_reports_what_it_alone_sees(pygmy):
    """A doubled tensor is invisible to the gates, and seen by every comparison of numbers."""
    rows = power(pygmy, CLAIMS, kinds=("scale",), severities={"scale": (1.0,)}, draws=1)
    seen = {r["claim"] for r in rows if r["seen"]}

    assert [r["claim"] for r in rows] == list(CLAIMS)
    assert {"F-GT-008", "F-GT-010", "F-PAR-008"} <= seen
    assert not seen & {"F-DATA-QUALITY-001", "F-DATA-QUALITY-003"}


def test_the_gates_see_an_empty_tensor(pygmy):
    """All values zero: the gates of notebook 10, whatever the tensor."""
    rows = power(pygmy, QUICK, kinds=("zeros",), severities={"zeros": (1.0,)}, draws=1)

    assert {r["claim"]: r["seen"] for r in rows}["F-DATA-QUALITY-003"] == 1
    assert {r["claim"]: r["seen"] for r in rows}["F-GT-010"] == 1


def test_a_recipe_that_changes_nothing_is_no_defect(pygmy):
    """Rewriting the healthy file is not a draw that a claim could miss."""
    reference = obtain(str(pygmy), device="cpu")
    healthy = module.take_apart(reference.checkpoint)

    assert module._killed(healthy, lambda draft: None, reference, QUICK) is None
    reference.close()


def test_the_default_grid_is_small():
    """Five severities of each kind, ascending: about forty seconds on one core with two draws."""
    assert list(SEVERITIES) == list(KINDS)
    assert all(len(s) == 5 and list(s) == sorted(s) for s in SEVERITIES.values())

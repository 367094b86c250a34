"""How a diagnosis is measured: what a case counts, and what the summary promises."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from apr_core.formats.checkpoint import open_checkpoint
from apr_core.zoo.confusion import Case, diagnose, plant, summarise
from apr_core.zoo.draft import take_apart
from apr_core.zoo.matrix import find


def _case(kind: str, wanted: str, *found: str, right: int = 1, placed: bool | None = None) -> Case:
    return Case("x", kind, (wanted,), found, right, placed, 1.0)


def test_rates_count_what_was_right_and_where() -> None:
    """A class that is wrong lowers its rate, a wrong place another; a pair counts by how many were named."""
    cases = [
        _case("reference", "codec", "codec", placed=True),
        _case("reference", "codec", "layout", right=0),
        _case("backend", "backend-cache", "backend-cache", placed=False),
        _case("alone", "naming", "naming"),
        _case("benign", "nothing to explain", "nothing to explain"),
        _case("unseen", "stop", "stop", placed=True),
        Case("a + b", "pair", ("codec", "layout"), ("codec",), 1, None, 3.0),
    ]
    body = summarise(cases)
    assert {name: rate for name, rate in body["rates"].items() if rate is not None} == {
        "reference": round(2 / 3, 4),
        "place": 0.5,
        "alone": 1.0,
        "benign": 1.0,
        "pair one": 1.0,
        "pair both": 0.0,
        "unseen": 1.0,
        "unseen place": 1.0,
    }
    assert {name for name, rate in body["rates"].items() if rate is None} == {
        *("copies", "meter", "held out", "held out place"),
    }
    assert {"planted": "codec", "named": "layout", "count": 1} in body["confusion"]
    assert [m["found"] for m in body["missed"]] == [("layout",)]
    assert body["misplaced"] == ["x"]
    assert body["met"]["alone"]
    assert not body["met"]["pair both"]


def test_a_planted_file_says_nothing_of_its_defect(pygmy: Path) -> None:
    """Its names are random, it carries no mark, and another process finds the cause all the same, or says its error."""
    with open_checkpoint(pygmy) as checkpoint:
        draft = take_apart(checkpoint)
    recipe = find("q-transposed").recipe
    assert recipe is not None
    planted = plant([recipe], draft)
    assert planted is not None
    _, path, touched = planted
    assert "q-transposed" not in str(path)
    with open_checkpoint(path) as written:
        assert "zoo" not in written.metadata
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        body, seconds = diagnose(path, pygmy, pool)
        error, _ = diagnose(path / "nothing", None, pool)
    assert error["class"] == ""
    assert "no such file" in error["experiment"]
    assert (body["class"], body["tensor"]) == ("layout", "model.layers.0.self_attn.q_proj.weight")
    assert body["tensor"] in touched
    assert seconds > 0


def test_recipes_that_do_not_fit_are_left_out(pygmy: Path) -> None:
    """A second defect may find nothing where the first has been."""
    with open_checkpoint(pygmy) as checkpoint:
        draft = take_apart(checkpoint)
    dropped, shifted = find("norm-dropped").recipe, find("norm-tiny").recipe
    assert dropped is not None
    assert shifted is not None
    assert plant([dropped, shifted], draft) is None

"""The zoo's commands on a tiny zoo: listing, planting, running, and the matrix with its exit codes."""

from __future__ import annotations

import json
from functools import partial

import pytest

from apr_core.cli.app import main
from apr_core.zoo import matrix, registry
from apr_core.zoo.registry import Benign, Defect, Later, NotApplicable, Zoo

DOWN = "model.layers.1.mlp.down_proj.weight"


def _dead(draft):
    draft.weights[DOWN][...] = 0


def _nothing(draft):
    raise NotApplicable("no such tensor")


def _defect(id_, kills, **way):
    return Defect(id_, "class", "what it is", "here", "tensor-values", kills, **way)


@pytest.fixture(autouse=True)
def own_zoo(monkeypatch):
    """A zoo of a few items, few claims, and no faults of the suite."""
    zoo = Zoo()
    zoo.add(
        _defect("dead", ("F-DATA-QUALITY-003",), recipe=_dead),
        _defect("blind", ("F-GT-010",), recipe=lambda draft: None),
        _defect("absent", ("F-GT-010",), recipe=_nothing),
        _defect("kernel", ("F-PAR-003",), hook=lambda config: lambda name, values, at: None),
        _defect("converter", ("F-GT-001",), tamper=lambda path: None),
        Benign("note", "a note", lambda draft: draft.metadata.update(note="x")),
        Later("later", "not yet", "here", 9),
    )
    for module in (matrix, registry):
        monkeypatch.setattr(module, "load_zoo", lambda: zoo)
    monkeypatch.setattr(matrix, "suite_faults", list)
    monkeypatch.setattr(matrix, "redundant", dict)
    few = ("F-DATA-QUALITY-003", "F-GT-010", "F-GT-011")
    monkeypatch.setattr(matrix, "evaluate", partial(matrix.evaluate, claims=few))
    return zoo


def test_list_names_everything(capsys):
    """A table for people, strict JSON for programs."""
    assert main(["zoo", "list"]) == 0
    assert "5 defects of 1 classes, 1 legal oddities, 1 classes not yet" in capsys.readouterr().out
    assert main(["zoo", "list", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert [d["planted_in"] for d in body["defects"]] == ["file", "file", "file", "backend", "copies"]
    assert body["not_plantable"][0]["issue"] == 9


def test_plant_writes_a_model_that_the_gate_refuses(healthy, tmp_path, capsys):
    """A broken model to hold in the hand."""
    assert main(["zoo", "plant", "dead", str(healthy), str(tmp_path / "dead")]) == 0
    assert "to be killed by F-DATA-QUALITY-003" in capsys.readouterr().out
    assert main(["validate", str(tmp_path / "dead")]) == 5


@pytest.mark.parametrize(
    ("id_", "said"),
    [
        ("kernel", "fault of the backend"),
        ("converter", "fault of the converter"),
        ("absent", "no such tensor"),
        ("daed", "near: dead"),
    ],
)
def test_what_cannot_be_planted_in_a_file_says_how(id_, said, healthy, tmp_path, capsys):
    """A backend fault has no file; the message gives the way from Python."""
    assert main(["zoo", "plant", id_, str(healthy), str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err


def test_plant_overwrites_nothing(healthy, tmp_path, capsys):
    """The folder of another model is not a place to plant in."""
    assert main(["zoo", "plant", "dead", str(healthy), str(tmp_path)]) == 2
    assert "exists" in capsys.readouterr().err


def test_run_says_who_killed_what(healthy, capsys):
    """A killed defect and a silent oddity are 0."""
    assert main(["zoo", "run", "dead", "note", "absent", str(healthy), "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    dead, *others = [item["outcome"] for item in body["items"]]
    assert dead.startswith("killed by F-DATA-QUALITY-003")
    assert others == ["no alarm", "not applicable, no such tensor"]


def test_a_survivor_is_exit_5(healthy, capsys):
    """What no claim sees is the finding."""
    assert main(["zoo", "run", "blind", str(healthy)]) == 5
    assert "SURVIVED; not by F-GT-010, as it must be" in capsys.readouterr().err


def test_matrix_writes_its_json_and_its_page(healthy, tmp_path, monkeypatch, capsys):
    """Exit 5 for the survivor; the same numbers on stdout, in the file and on the page."""
    monkeypatch.setattr(matrix, "run_matrix", partial(matrix.run_matrix, workers=1))
    assert main(["zoo", "matrix", str(healthy), "--out", str(tmp_path / "zoo"), "--json"]) == 5
    body = json.loads(capsys.readouterr().out)
    assert body == json.loads((tmp_path / "zoo" / "matrix.json").read_text())
    assert [s["defect"] for s in body["survivors"]] == ["blind", "kernel", "converter"]
    assert "blind" in (tmp_path / "zoo" / "index.html").read_text()

    assert main(["zoo", "matrix", "--quick", str(healthy), "--out", str(tmp_path / "zoo")]) == 5
    out = capsys.readouterr().out
    assert "with_reference: 1 of 4 killed (25.0 %)" in out
    assert "survivors: blind" in out


def test_only_a_whole_matrix_of_the_bundled_model_is_published(tmp_path, monkeypatch, pygmy):
    """The rates beside every score are the suite's, so a quick or foreign matrix must not pass for it."""
    import apr_core.zoo
    from apr_core.cli.zoo import _publish
    from apr_core.errors import UsageError
    from apr_core.formats.checkpoint import open_checkpoint
    from apr_core.report.page import published_rates

    with open_checkpoint(pygmy) as checkpoint:
        model = {"name": "pygmy", "sha256": checkpoint.content_hash}
    body = {
        "quick": False,
        "model": model,
        "rates": {"kill_rate": 1.0},
        "provenance": {"time": "2026-01-02T03:04:05"},
        "code_digest": "ab",
        "defects": [{"class": "a"}, {"class": "a"}],
        "benign": [],
        "suite_faults": [1],
    }
    monkeypatch.setattr(apr_core.zoo, "__file__", str(tmp_path / "__init__.py"))
    for wrong in ({"quick": True}, {"model": {"name": "pygmy", "sha256": "0"}}):
        with pytest.raises(UsageError, match="whole matrix"):
            _publish(body | wrong)
    written = json.loads(_publish(body).read_text())

    assert written["counts"] == {"defects": 2, "classes": 1, "legal_oddities": 0, "suite_faults": 1}
    assert (written["date"], written["rates"]) == ("2026-01-02", {"kill_rate": 1.0})
    assert published_rates()["model"] == "pygmy"

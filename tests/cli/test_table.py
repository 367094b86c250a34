"""
The registry as a table: every action refuses a corrupt model before any engine is built, every diagnostic reads it.

The words of each call are made from the command's own parameters, so that a new row is covered when it is registered.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from apr_core.cli import dispatch
from apr_core.cli.app import app, main
from apr_core.engines import load
from apr_core.formats.checkpoint import TensorSource, open_checkpoint
from apr_core.formats.safetensors import write_safetensors

DIAGNOSTIC = dispatch.Kind.DIAGNOSTIC
LEAVES = dict(dispatch.leaves(dispatch.attach(typer.main.get_command(app))))
ACTIONS = [
    (path, model)
    for path, entry in dispatch.COMMANDS.items()
    if entry.kind is dispatch.Kind.ACTION
    for model in entry.models
]
# Names that commands give to a parameter that is a model.
MODELS = {"model", "models", "path", "paths", "file", "a", "b", "first", "second", "candidate", "source", "reference"}
# What a diagnostic of another shape is asked.
ASKED = {
    "explain": ["F-DATA-QUALITY-002"],
    "canary create": ["MODEL", "--out", "OUT"],
    "canary check": ["MODEL", "--canary", "CANARY"],
}
CANARY = (
    *("schema", "sha256", "prompt", "max_tokens", "mode", "template_sha256", "prompt_ids", "ids", "answer"),
    "activations",
)
# These take minutes, start a server, or need a healthy model to damage: their own tests are named.
ELSEWHERE = {
    "lab": "tests/cli/test_lab.py",
    "suite": "tests/cli/test_runner.py",
    "rosetta validate-stats": "tests/cli/test_rosetta.py",
    "zoo diagnose": "tests/zoo/test_confusion.py",
    "zoo matrix": "tests/cli/test_zoo.py",
    "zoo plant": "tests/cli/test_zoo.py",
    "zoo run": "tests/cli/test_zoo.py",
}


def _value(param: Any, out: Path) -> str:
    """Return something that the parameter's type takes."""
    of = getattr(param, "type", None)  # typer parameters may have none
    kind = str(getattr(of, "name", ""))
    if getattr(of, "choices", None):
        return str(next(iter(of.choices)))
    if "int" in kind or "float" in kind:
        return str(max(1, getattr(of, "min", None) or 1))
    if "path" in kind or any(word in param.name for word in ("out", "dst", "target", "to")):
        return str(out / "out")
    return "x"


def words_of(path: str, given: dict[str, Path], out: Path) -> list[str]:
    """Build a call of a command: the given models, and something for whatever else it demands."""
    words = path.split()
    for param in LEAVES[path].params:
        if param.name in given or param.required:
            value = str(given[param.name]) if param.name in given else _value(param, out)
            words += [value] if param.param_type_name == "argument" else [max(param.opts, key=len), value]
    return words


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Engines that are built; building one is an error."""
    made: list[object] = []

    def explode(*arguments: object, **_: object) -> None:
        made.append(arguments)
        raise AssertionError("an engine was built for a model that no gate admitted")

    monkeypatch.setattr(load, "ENGINES", dict.fromkeys(load.ENGINES, explode))
    monkeypatch.setattr(load, "build", explode)
    monkeypatch.setattr(load, "load_plain", explode)
    yield made
    assert made == []


@pytest.mark.parametrize(("path", "model"), ACTIONS, ids=lambda value: value)
def test_every_action_refuses_a_corrupt_model(
    path: str,
    model: str,
    healthy: Path,
    refused: Path,
    built: list[object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit 5 for each model that the command names, the second as the first; no engine, no output, no file."""
    given = dict.fromkeys(dispatch.COMMANDS[path].models, healthy) | {model: refused}
    assert main(words_of(path, given, tmp_path)) == 5
    out, err = capsys.readouterr()
    assert out == ""
    assert f"error: {refused}/model.safetensors is refused by the contract, " in err
    assert " violations in 2 tensors" in err
    assert "[F-DATA-QUALITY-002] tensor model.layers.1.mlp.down_proj.weight: 3 NaN" in err
    assert "`apr validate " in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("path", sorted({path for path, _ in ACTIONS}))
def test_every_action_takes_the_bypass_on_both_sides(
    path: str, before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--skip-contract reaches the gate from before the command and from behind it; --recheck from behind."""
    seen: list[tuple[bool, bool]] = []

    def gate(model: str, *, skip: bool, recheck: bool) -> None:
        seen.append((skip, recheck))
        raise SystemExit(42)

    monkeypatch.setattr(dispatch, "gate", gate)
    words = words_of(path, dict.fromkeys(dispatch.COMMANDS[path].models, tmp_path / "m"), tmp_path)
    with pytest.raises(SystemExit):
        main(["--skip-contract"] * before + words + ["--skip-contract"] * (not before) + ["--recheck"])
    with pytest.raises(SystemExit):
        main(words)
    assert seen == [(True, True), (False, False)]


@pytest.mark.parametrize("path", [p for p, c in dispatch.COMMANDS.items() if c.kind is dispatch.Kind.DIAGNOSTIC])
def test_every_diagnostic_reads_a_corrupt_model(
    path: str, healthy: Path, refused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It answers, with 0, or with 5 or 11 where judging is its work; the only error is a refusal that names it."""
    if path in ELSEWHERE:
        assert Path(__file__).parents[2].joinpath(ELSEWHERE[path]).is_file()
        return
    places = {"MODEL": refused, "OUT": tmp_path / "out", "CANARY": tmp_path / "canary.json"}
    if path == "canary check":
        assert main(["canary", "create", str(healthy), "-o", str(places["CANARY"])]) == 0
    models = {p.name: refused for p in LEAVES[path].params if p.name in MODELS and p.required}
    asked = [str(places.get(word, word)) for word in ASKED.get(path, [])]
    code = main([*path.split(), *asked] if asked else words_of(path, models, tmp_path))
    out, err = capsys.readouterr()
    assert code in (0, 5, 11), err
    assert out.strip() or " violations in 2 tensors" in err
    assert "error: " not in err.replace(f"error: {refused}/model.safetensors is refused by the contract", "")


def _empty(at: Path) -> None:
    at.mkdir()


def _pickle(at: Path) -> None:
    at.write_bytes(pickle.dumps({"weights": 1}))


def _pickles(at: Path) -> None:
    at.mkdir()
    _pickle(at / "pytorch_model.bin")


def _circle(at: Path) -> None:
    at.symlink_to(at.with_name("other"))
    at.with_name("other").symlink_to(at)


def _locked(at: Path) -> None:
    at.write_bytes(b"GGUF" + bytes(60))


HOSTILE = {
    "a folder without a model": (_empty, 3, "no model.safetensors, .gguf or .apr in "),
    "a pickle": (_pickle, 4, "executable content: a Python pickle"),
    "a folder of pickles": (_pickles, 4, "executable content alone: pytorch_model.bin"),
    "a circle of links": (_circle, 7, "symbolic links lead in a circle"),
    "an unreadable file": (_locked, 7, "ermission"),
}
# `diagnose` answers with a cause where others end (tests/diagnose/test_explain.py).
OPENING = sorted({path for path, _ in ACTIONS} | {p for p, c in dispatch.COMMANDS.items() if c.kind is DIAGNOSTIC})


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("path", [p for p in OPENING if p not in {*ELSEWHERE, "explain", "diagnose"}])
def test_what_is_no_model_has_its_own_message_and_code(
    path: str,
    kind: str,
    built: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every command that opens a model says what lies in its place, on one line of stderr, and writes nothing."""
    make, code, says = HOSTILE[kind]
    at = tmp_path / "hostile.gguf"
    make(at)
    real = os.open

    def refuse(name: Any, *rest: Any, **more: Any) -> int:
        if kind == "an unreadable file" and str(name) == str(at):  # whoever runs this may read everything
            raise PermissionError(13, "Permission denied", str(name))
        return real(name, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    canary = tmp_path / "canary.json"
    if path == "canary check":
        (tmp_path / "canary.json").write_text(json.dumps(dict.fromkeys(CANARY, 1) | {"tensors": {"a": 1}}))
    there = sorted(tmp_path.iterdir())
    places = {"MODEL": at, "OUT": tmp_path / "out", "CANARY": canary}
    names = dispatch.COMMANDS[path].models or [p.name for p in LEAVES[path].params if p.name in MODELS and p.required]
    asked = [str(places.get(word, word)) for word in ASKED.get(path, [])]
    words = [*path.split(), *asked] if asked else words_of(path, dict.fromkeys(names, at), tmp_path)
    assert main(words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("error: ") == 1
    assert sorted(tmp_path.iterdir()) == there


def _sharded(source: Path, folder: Path) -> Path:
    """Write the same tensors as two shards with an index, the two broken ones apart."""
    folder.mkdir()
    weight_map = {}
    with open_checkpoint(source) as checkpoint:
        second = {name for name in checkpoint.tensors if name.startswith("model.layers.1.")}
        for k, own in enumerate((checkpoint.tensors.keys() - second, second), start=1):
            name_of = f"model-0000{k}-of-00002.safetensors"
            infos = [checkpoint.tensors[name] for name in sorted(own)]
            sources = [
                TensorSource(i.name, i.dtype, i.shape, lambda name=i.name: [checkpoint.raw(name).data]) for i in infos
            ]
            write_safetensors(folder / name_of, sources)
            weight_map |= dict.fromkeys(own, name_of)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copy(source / "config.json", folder)
    return folder


@pytest.mark.parametrize("name", ["model.bin", "weights", "a.gguf", "b.txt"])
def test_a_model_is_known_by_its_content(
    name: str, refused: Path, built: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A corrupt model under another name or none does not escape the gate."""
    shutil.copy(refused / "config.json", tmp_path)
    shutil.copy(refused / "model.safetensors", tmp_path / name)
    assert main(["run", str(tmp_path / name), "x"]) == 5
    assert "F-DATA-QUALITY-002" in capsys.readouterr().err


@pytest.mark.parametrize("by", ["folder", "index"])
def test_shards_are_gated_one_by_one(
    by: str, refused: Path, built: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The violations of both shards are found, by whichever name the model is given."""
    folder = _sharded(refused, tmp_path / "sharded")
    asked = folder if by == "folder" else folder / "model.safetensors.index.json"
    assert main(["run", str(asked), "x"]) == 5
    err = capsys.readouterr().err
    assert "tensor model.layers.1.mlp.down_proj.weight" in err
    assert "tensor model.norm.weight" in err


def test_the_first_violations_are_shown_and_all_are_counted(
    healthy: Path, tmp_path: Path, built: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    """A zeroed model has too many to list; the message counts them and names the command that lists all."""
    folder = tmp_path / "zeroed"
    shutil.copytree(healthy, folder)
    with open_checkpoint(folder) as checkpoint:
        start = min(info.offset for info in checkpoint.tensors.values())
    data = np.fromfile(folder / "model.safetensors", dtype=np.uint8)
    data[start:] = 0
    data.tofile(folder / "model.safetensors")
    assert main(["run", str(folder), "x"]) == 5
    err = capsys.readouterr().err
    assert err.count("[F-") == 8
    assert "in 26 tensors" in err
    assert " more\n" in err
    assert "apr validate" in err

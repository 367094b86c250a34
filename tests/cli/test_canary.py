"""canary: what is recorded is compared, and each kind of change is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr_core.cli.app import main
from apr_core.formats.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def recorded(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A canary of the bundled model."""
    out = tmp_path_factory.mktemp("canary") / "pygmy.json"
    assert main(["canary", "create", str(root / "models" / "pygmy"), "--out", str(out)]) == 0
    return out


def _check(model: Path, canary: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    capsys.readouterr()
    code = main(["canary", "check", str(model), "--canary", str(canary), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_an_unchanged_model_has_no_changes(recorded: Path, pygmy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tensors, activations and tokens were compared, all of them."""
    code, body = _check(pygmy, recorded, capsys)
    assert (code, body["changes"], body["same_bits"]) == (0, [], True)
    assert body["compared"] == {"tensors": 26, "activations": 14, "tokens": 9}
    assert main(["canary", "check", str(pygmy), "-c", str(recorded)]) == 0
    assert "14 of 14 activations have the same bits" in capsys.readouterr().out


def test_it_is_small_and_strict(recorded: Path) -> None:
    """A file that can be committed: the answer in words, below 100 kB."""
    body = json.loads(recorded.read_text(), parse_constant=pytest.fail)
    assert body["answer"] == "2 + 2 equals 4."
    assert recorded.stat().st_size < 100_000


def _scaled(model: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        info = checkpoint.tensors["model.layers.1.mlp.down_proj.weight"]
    data = np.fromfile(model / "model.safetensors", np.uint8)
    span = data[info.offset : info.offset + info.nbytes].view(np.uint16)
    span[:] = span ^ 0x8000  # every sign turned
    data.tofile(model / "model.safetensors")


def _nan(model: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        info = checkpoint.tensors["model.layers.1.mlp.down_proj.weight"]
    data = np.fromfile(model / "model.safetensors", np.uint8)
    data[info.offset : info.offset + 2] = 0xFF
    data.tofile(model / "model.safetensors")


def _template(model: Path) -> None:
    path = model / "tokenizer_config.json"
    body = json.loads(path.read_text())
    if "chat_template" in body:
        body["chat_template"] = "X" + body["chat_template"]
        path.write_text(json.dumps(body))
    else:
        other = model / "chat_template.jinja"
        other.write_text("X" + other.read_text())


def _rounded(model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (_scaled, {"tensor", "answer", "activation"}),
        (_nan, {"tensor", "contract"}),
        (_template, {"answer", "activation"}),
        (_rounded, {"activation"}),
    ],
)
def test_each_change_is_found(
    change: Callable[[Path], None],
    parts: set[str],
    recorded: Path,
    pygmy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Turned signs, a NaN (refused, and still compared), another template, another epsilon: 5, with what changed."""
    model = tmp_path / "model"
    shutil.copytree(pygmy, model)
    change(model)
    code, body = _check(model, recorded, capsys)
    assert code == 5
    assert parts <= {c["part"] for c in body["changes"]}
    assert main(["canary", "check", str(model), "-c", str(recorded)]) == 5
    assert " changes" in capsys.readouterr().out


def test_another_model_differs_in_its_tensors(
    recorded: Path, healthy: Path, mute: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every tensor is named; a model without a tokenizer has a canary of ids, and another has other tensors."""
    code, body = _check(healthy, recorded, capsys)
    assert code == 5
    assert sum(c["part"] == "tensor" for c in body["changes"]) >= 20
    out = tmp_path / "mute.json"
    assert main(["canary", "create", str(mute), "-o", str(out)]) == 0
    assert json.loads(out.read_text())["mode"] == "ids"
    assert _check(mute, out, capsys)[0] == 0


def test_a_refused_model_is_recorded_nowhere(refused: Path, tmp_path: Path) -> None:
    """Exit 5 and no file."""
    assert main(["canary", "create", str(refused), "-o", str(tmp_path / "c.json")]) == 5
    assert list(tmp_path.iterdir()) == []


def test_missing_and_extra_tensors_are_told(
    recorded: Path, pygmy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A canary with another list of tensors or activations is not passed over."""
    body = json.loads(recorded.read_text())
    body["tensors"]["gone"] = body["tensors"].pop("model.norm.weight")
    body["activations"]["layers.9.q"] = body["activations"].pop("layers.0.q")
    body["tensors"]["model.embed_tokens.weight"] |= {"shape": [1], "dtype": "F32"}
    (tmp_path / "c.json").write_text(json.dumps(body))
    code, found = _check(pygmy, tmp_path / "c.json", capsys)
    names = {c["name"] for c in found["changes"]}
    assert code == 5
    assert {"gone", "model.norm.weight", "layers.9.q", "layers.0.q", "model.embed_tokens.weight shape"} <= names


@pytest.mark.parametrize("text", ["{}", '{"schema": 9}', "no"])
def test_what_is_no_canary_is_4(text: str, pygmy: Path, tmp_path: Path) -> None:
    """An unreadable canary compares nothing, so it is an error."""
    (tmp_path / "c.json").write_text(text)
    assert main(["canary", "check", str(pygmy), "-c", str(tmp_path / "c.json")]) == 4


def test_nothing_is_overwritten(recorded: Path, pygmy: Path) -> None:
    """A canary is made once."""
    assert main(["canary", "create", str(pygmy), "-o", str(recorded)]) == 2

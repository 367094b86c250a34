"""lint: each rule speaks for its own fault and is silent on a healthy model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from apr_core.cli.app import main
from apr_core.cli.lint import RULES, findings
from apr_core.formats.checkpoint import Gap, open_checkpoint


def test_the_bundled_model_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 0 is possible, and every rule was asked."""
    assert main(["lint", "pygmy", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["findings"], list(body["rules"])) == ([], list(RULES))
    assert all(body["rules"].values())
    assert main(["lint", "pygmy"]) == 0
    assert f"0 warnings, 0 notes, of {len(RULES)} rules" in capsys.readouterr().out


def _edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


FAULTS: dict[str, Callable[[Path], object]] = {
    "LINT-CONFIG": lambda m: _edit(m / "config.json", lambda b: b.pop("max_position_embeddings")),
    "LINT-EXECUTABLE": lambda m: _edit(m / "config.json", lambda b: b.update(auto_map={"AutoModel": "x.Y"})),
    "LINT-TOKENIZER": lambda m: (m / "tokenizer.json").unlink(),
    "LINT-TEMPLATE": lambda m: _edit(m / "tokenizer_config.json", lambda b: b.pop("chat_template")),
    "LINT-LICENCE": lambda m: [path.unlink() for path in m.glob("README*")],
}


@pytest.mark.parametrize("rule", FAULTS)
def test_each_rule_finds_its_fault(rule: str, healthy: Path, tmp_path: Path) -> None:
    """One fault, one finding, with what to do; a warning ends in 5, a note in 0."""
    model = tmp_path / "model"
    shutil.copytree(healthy, model)
    (model / "README.md").write_text("licence: MIT")
    assert findings(str(model))["findings"] == []
    FAULTS[rule](model)
    (found,) = findings(str(model))["findings"]
    assert (found["rule"], found["level"]) == (rule, RULES[rule][0])
    assert found["do"]
    assert main(["lint", str(model)]) == (5 if found["level"] == "warning" else 0)


def test_a_pickle_beside_the_weights_is_found(healthy: Path, tmp_path: Path) -> None:
    """Executable content is named, whoever put it there."""
    import pickle

    model = tmp_path / "model"
    shutil.copytree(healthy, model)
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    (found,) = [f for f in findings(str(model))["findings"] if f["rule"] == "LINT-EXECUTABLE"]
    assert "pytorch_model.bin" in found["says"]


def _rule(name: str, **fields: object) -> list[str]:
    return list(RULES[name][2](SimpleNamespace(**fields)))  # type: ignore[arg-type]


def test_names_places_and_shards(healthy: Path) -> None:
    """Rules on the container, on made-up files: names of no role, odd places, holes, shards by other names."""
    with open_checkpoint(healthy) as checkpoint:
        info = next(iter(checkpoint.tensors.values()))
    odd = [SimpleNamespace(name=f"odd.{k}", stored_name=f"odd.{k}", offset=64 * k, file=info.file) for k in range(7)]
    (names,) = _rule("LINT-NAMES", tensors={o.name: o for o in odd})
    assert names.startswith("7 tensors have names of no known role: odd.0, ")
    assert names.endswith("and 2 more")
    placed = {o.name: o for o in odd}
    assert _rule("LINT-ALIGNMENT", format="gguf", tensors=placed, metadata={"general.alignment": 32}) == []
    (places,) = _rule("LINT-ALIGNMENT", format="gguf", tensors=placed, metadata={"general.alignment": 128})
    assert places.startswith("3 do not begin at a multiple of 128 bytes: odd.1, odd.3, odd.5")
    odd[0].offset = 3
    assert _rule("LINT-ALIGNMENT", format="safetensors", tensors=placed, metadata={})
    (hole,) = _rule("LINT-COVER", gaps=(Gap(info.file, 10, 4),))
    assert hole == "4 unexplained bytes at 10 in model.safetensors"
    assert _rule("LINT-SHARDS", files=(Path("a"), Path("b")))
    assert _rule("LINT-SHARDS", files=(Path("m-00001-of-00002.x"), Path("m-00002-of-00002.x"))) == []
    assert _rule("LINT-CONFIG", config=None) == ["no config.json, so nothing says what the model is"]


def test_a_refused_model_can_be_linted(refused: Path) -> None:
    """Nothing here judges weights."""
    assert main(["lint", str(refused)]) == 0

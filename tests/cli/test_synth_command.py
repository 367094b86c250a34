"""synth: the command around `synthesise`, with its tokenizer option and its short names."""

from __future__ import annotations

from pathlib import Path

import pytest

from apr_core.cli import synth
from apr_core.cli.app import main
from apr_core.engines.subject import obtain
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.model.tokens import load_tokenizer


def test_defaults_write_an_admitted_untrained_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One option and a name are enough; the model is whole, marked, and able to take text."""
    assert main(["synth", str(tmp_path / "m"), "--shape", "pygmy"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "26 tensors, 3.7 MB of bf16 weights, seed 0" in err
    subject = obtain(str(tmp_path / "m"), device="cpu")
    assert (subject.refusal, subject.trained) == (None, False)
    assert subject.lacks["trained"] == "untrained model"
    assert "tokenizer" not in subject.lacks


def test_options_reach_the_file(oracle: Path, tmp_path: Path) -> None:
    """Format, type, seed and a given tokenizer are those of the file."""
    path = tmp_path / "m.gguf"
    options = f"--format gguf --dtype q8_0 --seed 9 --tokenizer {oracle / 'mini'} --shape pygmy"
    assert main(["synth", str(path), *options.split()]) == 0
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.format, checkpoint.metadata["apr.seed"]) == ("gguf", 9)
        assert str(checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].dtype) == "Q8_0"
        assert load_tokenizer(checkpoint).encode(" the") == load_tokenizer(open_checkpoint(oracle / "mini")).encode(
            " the"
        )


def test_none_means_no_tokenizer(tmp_path: Path) -> None:
    """`--tokenizer none` writes no tokenizer files."""
    assert main(["synth", str(tmp_path / "m"), "--shape", "pygmy", "--tokenizer", "none"]) == 0
    names = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("given", "meant"), [("1.5b", "qwen2.5-coder-1.5b"), ("qwen2.5-coder-7b", "qwen2.5-coder-7b"), ("pygmy", "pygmy")]
)
def test_sizes_alone_name_a_shape(given: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`1.5b` is the 1.5B shape; full names stay themselves."""
    seen: list[str] = []
    monkeypatch.setattr(synth, "synthesise", lambda shape, **_: seen.append(shape))
    assert main(["synth", str(tmp_path / "m"), "--shape", given]) == 0
    assert seen == [meant]

"""run: the answer on stdout, everything else on stderr, and an exit code for each way it can go wrong."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from apr_core.cli import dispatch, run
from apr_core.cli.app import main
from apr_core.engines import load
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.model.tokens import load_tokenizer, prepare_tokens


def _expected(path: Path, count: int, **prompt: object) -> str:
    """The continuation by the public interface, without the command line."""
    from apr_core.engines.load import load_model
    from apr_core.model.generate import generate

    model = load_model(path)
    generation = generate(model, prepare_tokens(model, **prompt), max_new_tokens=count)  # type: ignore[arg-type]
    list(generation)
    return generation.text


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_stdout_is_the_answer_alone(healthy: Path, stream: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A chat prompt goes through the template; what stands on stdout is what `generate` says, streamed or not."""
    assert main(["run", str(healthy), "hello", "-n", "9", stream, "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out == _expected(healthy, 9, messages=[{"role": "user", "content": "hello"}]) + "\n"
    assert "chat: the model's own template" in err
    assert "untrained model" in err
    assert "cpu speed (" in err
    assert "9 generated, stopped by length" in err


def test_system_messages_come_first(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--system is a message of its own, before the user's."""
    assert main(["run", str(healthy), "--prompt", "hello", "-n", "5", "--system", "be brief"]) == 0
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert capsys.readouterr().out == _expected(healthy, 5, messages=messages) + "\n"


def test_the_bundled_model_gives_its_golden_answer(pygmy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trained model answers from any folder by its name, and nothing calls it untrained."""
    cases = json.loads((pygmy / "golden.json").read_text(encoding="utf-8"))["cases"]
    case = next(c for c in cases if len(c["messages"]) == 1)
    assert main(["run", "pygmy", case["messages"][0]["content"], "-n", "64"]) == 0
    out, err = capsys.readouterr()
    assert out == case["answer"] + "\n"
    assert "untrained" not in err


@pytest.mark.parametrize(("fixture", "raw", "why"), [("healthy", ["--raw"], "--raw"), ("base", [], "base model")])
def test_unwrapped_prompts_say_so(
    fixture: str, raw: list[str], why: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Raw mode and a base model give the text as it is, and say that and why."""
    path = request.getfixturevalue(fixture)
    assert main(["run", str(path), "hello", "-n", "4", *raw]) == 0
    out, err = capsys.readouterr()
    assert out == _expected(path, 4, text="hello") + "\n"
    assert "not wrapped" in err
    assert why in err


@pytest.mark.parametrize(("fixture", "raw"), [("healthy", ["--raw"]), ("base", [])])
def test_a_system_message_needs_a_template(fixture: str, raw: list[str], request: pytest.FixtureRequest) -> None:
    """A system message that would be lost is a usage error."""
    assert main(["run", str(request.getfixturevalue(fixture)), "x", "--system", "s", *raw]) == 2


def test_a_seed_repeats_a_sample(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs with one seed agree; the seed is told, also when it was drawn."""
    answers = []
    for _ in range(2):
        assert main(["run", str(healthy), "x", "-n", "8", "--temperature", "1", "--top-k", "50", "--seed", "3"]) == 0
        out, err = capsys.readouterr()
        answers.append(out)
        assert "--seed 3" in err
    assert answers[0] == answers[1]
    assert main(["run", str(healthy), "x", "-n", "2", "--temperature", "1", "--top-p", "0.9"]) == 0
    assert "sampled with --seed" in capsys.readouterr().err


def test_a_refused_model_is_5_and_says_nothing(refused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is generated from a refused model; every violation is listed."""
    assert main(["run", str(refused), "hello"]) == 5
    out, err = capsys.readouterr()
    assert out == ""
    assert "F-DATA-QUALITY-002" in err
    assert "model.norm.weight" in err
    assert "untrained" not in err  # nothing is said about a model that does not run


def test_a_bypassed_model_is_marked_or_fails(refused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bypass says that nothing can be concluded; NaN in the weights then ends as a failed inference, exit 8."""
    assert main(["--skip-contract", "run", str(refused), "hello"]) == 8
    out, err = capsys.readouterr()
    assert out.strip() == ""
    assert "contract bypassed" in err
    assert "not finite" in err


def test_the_bypass_marks_healthy_models_too(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mark follows from the option, not from what was found."""
    assert main(["run", str(healthy), "hello", "-n", "2", "--skip-contract"]) == 0
    assert "contract bypassed (--skip-contract): 0 violations" in capsys.readouterr().err


@pytest.mark.parametrize(("fixture", "said"), [("mute", "tokenizer.json"), ("lost_config", "config")])
def test_missing_companions_are_6(
    fixture: str, said: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a tokenizer or a config there is no text: a load error that names the file."""
    assert main(["run", str(request.getfixturevalue(fixture)), "hello"]) == 6
    assert said in capsys.readouterr().err


def test_a_prompt_beyond_the_context_is_8(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More tokens than the model has positions is a failed inference."""
    assert main(["run", str(healthy), "7 " * 3000]) == 8
    assert "4096" in capsys.readouterr().err


def test_a_missing_device_is_9(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """CUDA that was asked for and is not there is an error, never a silent CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dispatch, "gate", None)  # before minutes of judging
    assert main(["run", str(healthy), "x", "--device", "cuda"]) == 9
    out, err = capsys.readouterr()
    assert out == ""
    assert "CUDA" in err


@pytest.mark.parametrize("there", [True, False])
def test_auto_takes_what_is_there(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is the GPU where there is one, else the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert run.device_for("auto") == ("cuda" if there else "cpu")
    assert run.device_for("cpu") == "cpu"


def test_streams_never_cut_a_character(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A character of several tokens appears when it is complete; what was printed is never taken back."""
    text = "naïve 漢字 🙂 end"
    tokenizer = load_tokenizer(open_checkpoint(healthy))
    ids = tokenizer.encode(text)

    class Spoken:
        """A generation that says ``text``."""

        def __init__(self) -> None:
            self.ids: list[int] = []

        @property
        def text(self) -> str:
            return tokenizer.decode(self.ids)

        def __iter__(self):
            for i in ids:
                self.ids.append(i)
                yield i

    pieces: list[str] = []
    monkeypatch.setattr(run, "_write", pieces.append)
    run.print_answer(Spoken(), stream=True)  # type: ignore[arg-type]
    assert "".join(pieces) == text + "\n"
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 5


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_obeys_no_model(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control characters that a model says are shown on a terminal and exact in a pipe."""
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", screen)
    run._write("a\x1b[2Jb\n")
    assert screen.getvalue() == ("a\\x1b[2Jb\n" if terminal else "a\x1b[2Jb\n")


def test_the_fastest_engine_answers_and_says_so(pygmy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless another is asked for; without numba the reference does."""
    for asked, backend in (("auto", "cpu speed"), ("exact", "cpu exact"), ("reference", "torch on cpu")):
        assert main(["run", str(pygmy), "hello", "-n", "2", "--device", "cpu", "--precision", asked]) == 0
        assert backend in capsys.readouterr().err
    assert main(["run", str(pygmy), "hello", "--precision", "fast"]) == 2
    assert "expected a precision" in capsys.readouterr().err


def test_without_numba_the_reference_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is slower, and nothing else changes."""
    from apr_core.kernels.cpu import features

    monkeypatch.setattr(features, "has_numba", lambda: False)
    monkeypatch.setattr(load, "has_triton", lambda: False)
    assert run.precision_for("auto", "cpu") == "reference"
    assert run.precision_for("auto", "cuda") == "reference"

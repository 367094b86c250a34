"""chat: a conversation through the template, by hand and by pipe, and what Ctrl-C does."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apr_core.cli import chat, run
from apr_core.cli.app import main
from apr_core.engines.load import load_model

GREEDY = {"max_new_tokens": 24, "temperature": 0.0, "top_k": None, "top_p": None, "seed": None}


@pytest.fixture(scope="module")
def model(root: Path) -> Any:
    """The bundled model."""
    return load_model(root / "models" / "pygmy")


def _talk(model: Any, said: Any, system: str | None = None) -> list[dict[str, str]]:
    return chat.converse(model, iter(said), system=system, sampling=GREEDY)


def test_a_pipe_gets_the_answers_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line in, one answer out; nothing else on stdout; empty lines are nothing; the end of the pipe ends it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 7-3?\n\n/new\nWhat is 2+2?"))
    assert main(["chat", "pygmy"]) == 0
    out, err = capsys.readouterr()
    assert out == "7 - 3 equals 4.\n2 + 2 equals 4.\n"
    assert "a new conversation" in err
    assert "> " not in err


def test_the_conversation_goes_through_the_template(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The second question is asked with the first and its answer before it; ids are those of the whole conversation."""
    from apr_core.model.generate import generate
    from apr_core.model.tokens import prepare_tokens

    messages = _talk(model, ["What is 7-3?", "What is 9+8?"], system="Be brief.")
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    whole = generate(model, prepare_tokens(model, messages=messages[:-1]), max_new_tokens=24)
    list(whole)
    assert messages[-1]["content"] == whole.text
    assert capsys.readouterr().out.splitlines()[-1] == whole.text


@pytest.mark.parametrize("word", ["/quit", "/exit"])
def test_words_that_are_no_messages(word: str, model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """/quit ends, /new forgets all but the system message, /help helps."""
    assert _talk(model, ["/help", word, "What is 2+2?"]) == []
    assert chat.HELP in capsys.readouterr().err
    assert _talk(model, ["What is 2+2?", "/new"], system="s") == [{"role": "system", "content": "s"}]


def test_ctrl_c_stops_an_answer_and_keeps_what_there_is(
    model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The conversation goes on behind it."""
    real = run.print_answer
    calls: list[int] = []

    def stopped(generation: Any, *, stream: bool) -> float:
        calls.append(1)
        if len(calls) == 1:
            next(generation)
            raise KeyboardInterrupt
        return real(generation, stream=stream)

    monkeypatch.setattr(run, "print_answer", stopped)
    messages = _talk(model, ["What is 7-3?", "What is 2+2?"])
    assert messages[1]["content"] == "7"
    assert len(messages) == 4
    assert "stopped" in capsys.readouterr().err


def test_ctrl_c_at_the_prompt_ends(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a traceback."""

    def said() -> Iterator[str]:
        yield "What is 2+2?"
        raise KeyboardInterrupt

    assert len(_talk(model, said())) == 2
    assert "ended" in capsys.readouterr().err


def test_a_full_context_takes_the_last_message_back(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """What was too long is said, and the conversation before it stays."""
    messages = _talk(model, ["What is 2+2?", "x " * 5000])
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert "not answered: " in capsys.readouterr().err


def test_a_terminal_shows_a_prompt_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stdout stays the answers' own."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal("hello\n"))
    assert list(chat._said()) == ["hello"]
    out, err = capsys.readouterr()
    assert (out, err) == ("", "> > ")


@pytest.mark.parametrize("fixture", ["base", "mute"])
def test_without_a_template_there_is_no_conversation(fixture: str, request: pytest.FixtureRequest) -> None:
    """A base model, or one without a tokenizer: exit 6 and what to do instead."""
    assert main(["chat", str(request.getfixturevalue(fixture))]) == 6

"""The border of the command line: exit codes, one line on stderr, and nothing heavy imported to say hello."""

from __future__ import annotations

import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apr_core import errors
from apr_core.cli import app, commands, dispatch, inspect
from apr_core.cli.app import main

COMMANDS = tuple(sorted(path for path in dispatch.COMMANDS if " " not in path))


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("model", ["nothing", "no/such/model.gguf"])
@pytest.mark.parametrize("command", [["inspect"], ["validate"], ["run", "x"], ["qa"]], ids=lambda c: c[0])
def test_a_missing_file_is_3(command: list[str], model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command that takes a model says that it is not there, on stderr, and exits 3."""
    code = main([command[0], model, *command[1:]])
    out, err = capsys.readouterr()
    assert (code, out) == (3, "")
    assert len(_lines(err)) == 1
    assert model in err


HOSTILE = {
    "empty": b"",
    "zeros": bytes(4096),
    "text": b"hello, this is not a model at all\n" * 20,
    "html": b"<!DOCTYPE html><html><body>Not found</body></html>",
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 988097824\n",
    "gguf header alone": b"GGUF\x03\x00\x00\x00",
    "apr header alone": b"APR\x00\x02\x00" + bytes(20),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("command", [["inspect"], ["validate"], ["run", "x"], ["qa"]], ids=lambda c: c[0])
def test_what_is_no_model_is_4(
    command: list[str], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is not a model is named as such, whatever its extension, and exits 4."""
    path = tmp_path / "model.gguf"
    path.write_bytes(HOSTILE[kind])
    code = main([command[0], str(path), *command[1:]])
    out, err = capsys.readouterr()
    assert (code, out) == (4, "")
    assert len(_lines(err)) == 1
    assert str(path) in err


@pytest.mark.parametrize("command", [["inspect"], ["validate"], ["run", "x"], ["qa"]], ids=lambda c: c[0])
def test_a_truncated_model_is_4(command: list[str], truncated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that was cut says how many bytes are missing."""
    assert main([command[0], str(truncated), *command[1:]]) == 4
    assert "bytes are missing" in capsys.readouterr().err


def test_several_models_in_a_folder_are_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which one is meant is the person's to say."""
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "a.gguf, b.gguf" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nosuch"],
        ["--nosuch"],
        ["inspect"],
        ["inspect", "pygmy", "--nosuch"],
        ["run", "pygmy", "x", "--max-tokens", "0"],
        ["run", "pygmy", "x", "--max-tokens", "many"],
        ["run", "pygmy", "x", "--temperature", "-1"],
        ["run", "pygmy", "x", "--top-p", "2"],
        ["run", "pygmy", "x", "--device", "tpu"],
        ["run", "pygmy"],
        ["run", "pygmy", "x", "--prompt", "y"],
        ["qa", "pygmy", "--device", "tpu"],
        ["synth", "out"],
        ["synth", "/tmp", "--shape", "pygmy"],
        ["suite", "-p", "seed"],
        ["suite", "-p", "seed", "1", "-p", "seed", "2"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Arguments that cannot be meant exit 2 with one line and without output."""
    code = main(arguments)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert len(_lines(err)) == 1


@pytest.mark.parametrize(
    "error",
    [
        errors.UsageError("u"),
        errors.NotFound("n"),
        errors.FormatError(expected="a", found="b", file="f", advice="c"),
        errors.ContractViolation("m", ["v"]),
        errors.LoadError("l"),
        errors.ReadWriteError("r"),
        errors.InferenceError("i"),
        errors.Unavailable("a"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_each_error_has_its_exit_code(
    error: errors.AprError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever typed error a command ends with, its own code comes out and its words go to stderr."""
    _raising(monkeypatch, error)
    assert main(["inspect", "x"]) == error.exit_code
    assert capsys.readouterr().err.startswith(f"error: {error}".splitlines()[0])


def _raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def describe(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(inspect, "describe", describe)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PermissionError(13, "Permission denied", "secret.gguf"), 7, "secret.gguf"),
        (MemoryError(), 6, "not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (EOFError(), 130, "interrupted"),
        (ZeroDivisionError("division\nby zero"), 1, "unexpected ZeroDivisionError: division; run `apr --debug"),
        (ValueError(), 1, "without a message"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_foreign_errors_become_one_line(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What nobody typed is one line too, without a traceback."""
    _raising(monkeypatch, error)
    assert main(["inspect", "x"]) == code
    out, err = capsys.readouterr()
    assert (out, len(err.strip().splitlines())) == ("", 1)
    assert said in err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With --debug the traceback stands above the line, which then gives no advice about --debug."""
    _raising(monkeypatch, ZeroDivisionError("by zero"))
    assert main(["--debug", "inspect", "x"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: unexpected ZeroDivisionError: by zero\n")


def test_errors_cannot_command_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An escape sequence in a name from a file is shown, not obeyed."""
    _raising(monkeypatch, errors.NotFound("\x1b[31mred\x07"))
    assert main(["inspect", "x"]) == 3
    assert capsys.readouterr().err == "error: \\x1b[31mred\\x07\n"


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True), (False, False)])
@pytest.mark.parametrize("command", ["run", "qa", "suite"])
def test_the_bypass_counts_before_and_after(
    command: str, before: bool, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--skip-contract reaches the command from either place, and only when it is given."""
    seen: list[bool] = []

    def note(*_: Any, skip_contract: bool, **__: Any) -> int:
        seen.append(skip_contract)
        return 0

    from apr_core.cli import claims, dispatch, run, runner

    monkeypatch.setattr(dispatch, "gate", lambda _, *, skip, **__: seen.append(skip))
    monkeypatch.setattr(run, "answer", lambda *_, **__: 0)
    monkeypatch.setattr(claims, "examine", note)
    monkeypatch.setattr(claims, "show_examination", lambda *_, **__: 0)
    monkeypatch.setattr(runner, "run_suite", note)
    model = {"run": ["m", "hello"], "qa": ["m", "--claims"], "suite": ["--model", "m"]}[command]
    bypass = ["--skip-contract"]
    assert main([*bypass * before, command, *model, *bypass * after]) == 0
    assert seen == [before or after]


def test_suite_hands_everything_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of the suite arrives under its name, -p in pairs; the code of the suite comes out."""
    from apr_core.cli import runner

    seen: dict[str, Any] = {}

    def run_suite(**options: Any) -> int:
        seen.update(options)
        return 11

    monkeypatch.setattr(runner, "run_suite", run_suite)
    options = "--model m --reference r --device cpu --only 00,20 --out o --timeout-s 5 -p seed -3 -p text a=b"
    asked = "--peer llama.cpp --peer transformers --claim ttft_s=1 --reuse"
    assert main(["suite", *options.split(), *asked.split()]) == 11
    assert seen == {
        "model": "m",
        "reference": "r",
        "device": "cpu",
        "only": "00,20",
        "out": "o",
        "timeout_s": 5,
        "parameters": {"seed": "-3", "text": "a=b"},
        "skip_contract": False,
        "peers": ["llama.cpp", "transformers"],
        "claims": ["ttft_s=1"],
        "reuse": True,
    }
    assert main(["suite"]) == 11
    assert (seen["model"], seen["parameters"]) == ("pygmy", {})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command explains itself and exits 0."""
    assert main([command, "--help"]) == 0
    assert f"apr {command}" in capsys.readouterr().out


def test_version_names_program_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    """One line: the program, the version, the commit when there is one."""
    assert main(["--version"]) == 0
    words = capsys.readouterr().out.split()
    assert words[0] == "apr"
    assert len(words) in (2, 3)


@pytest.mark.parametrize("commit", ["0123456789abcdef", ""])
def test_version_shows_the_commit(
    commit: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a checkout the commit is told, outside there is none to tell."""
    from apr_core import provenance

    monkeypatch.setattr(provenance, "git_state", lambda: {"commit": commit, "dirty": False})
    monkeypatch.setattr(provenance, "version_of", lambda _: "1.2")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == ("apr 1.2 (012345678)\n" if commit else "apr 1.2\n")


def _python(root: Path, program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)


def test_help_imports_nothing_heavy(root: Path) -> None:
    """`apr --help` loads neither numpy nor torch nor rich nor anything of the field: it has 0.3 seconds."""
    heavy = "numpy torch rich matplotlib gguf tokenizers transformers jinja2 papermill"
    program = (
        "import sys; from apr_core.cli.app import main; code = main(['--help']); "
        f"sys.exit(code or ' '.join(m for m in {heavy.split()!r} if m in sys.modules) or None)"
    )
    done = _python(root, program)
    assert (done.returncode, done.stderr) == (0, "")
    for command in COMMANDS:
        assert command in done.stdout


def test_the_program_stops_on_sigterm(root: Path, tmp_path: Path) -> None:
    """A process that is terminated while it writes cleans up and exits 143."""
    program = (
        "import os, signal, sys; from apr_core.cli import app; from apr_core.formats import sink\n"
        "sink.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"sys.argv = ['apr', 'synth', {str(tmp_path / 'out')!r}, '--shape', 'pygmy']\n"
        "sys.exit(app.main())"
    )
    done = _python(root, program)
    assert (done.returncode, done.stderr) == (app.TERMINATED, "")
    assert list(tmp_path.iterdir()) == []


def test_the_package_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m apr_core` is `apr`: `ci/run_papermill.sh` starts it so."""
    monkeypatch.setattr(sys, "argv", ["apr_core", "--version"])
    monkeypatch.setattr(app.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as left:
        runpy.run_module("apr_core", run_name="__main__")
    assert (left.value.code, capsys.readouterr().out.split()[0]) == (0, "apr")


def test_sigterm_becomes_an_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a real process takes over the signal; the handler raises, so that every clean-up runs."""
    handlers: dict[int, Any] = {}
    monkeypatch.setattr(app.signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(sys, "argv", ["apr", "nosuch"])
    assert main(["nosuch"]) == 2
    assert handlers == {}
    assert main() == 2
    with pytest.raises(SystemExit) as stopped:
        handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert stopped.value.code == 143


def test_every_command_is_registered() -> None:
    """The list that these tests go through is the list of the application."""
    assert sorted(COMMANDS) == sorted(c.name or c.callback.__name__ for c in app.app.registered_commands if c.callback)
    assert commands.SkipContract is not None

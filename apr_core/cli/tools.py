"""``apr tools``: which of the seventeen tools are there, found by running each, with its help and two fixtures."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from apr_core.errors import Exit

# The specification counts 17 and lists none of them; docs/decisions/0007-command-line.md says how this list was made.
# A fixture is the words of a call: HEALTHY and BROKEN are copies of the bundled model, OUT a new path, and a dot and a
# suffix behind OUT make a file of that format; TORN is cut in the middle.
QUICK = ("-n", "4")
SHORT = ("--prefill", "16", "--decode", "4", "--repeats", "2", "--threads", "1")


@dataclass(frozen=True)
class Tool:
    """
    One tool of the specification.

    Attributes:
        name: As `apr tools` lists it.
        command: The command in the registry that it is.
        passes: Arguments of a call that must end in 0; empty until the command is built.
        fails: Arguments of a call that must not.
        code: How the second one must end.
    """

    name: str
    command: str
    passes: tuple[str, ...] = ()
    fails: tuple[str, ...] = ()
    code: int = int(Exit.REFUTED)


TOOLS: tuple[Tool, ...] = (
    Tool("run", "run", ("HEALTHY", "What is 7-3?", *QUICK), ("BROKEN", "What is 7-3?")),
    Tool("chat", "chat", ("HEALTHY", *QUICK), ("BROKEN",)),
    Tool("serve", "serve"),
    Tool("inspect", "inspect", ("BROKEN",), ("TORN",), int(Exit.FORMAT)),
    Tool("validate", "validate", ("HEALTHY",), ("BROKEN",)),
    Tool("bench", "bench", ("HEALTHY", *SHORT), ("BROKEN",)),
    Tool("profile", "profile", ("HEALTHY",), ("BROKEN",)),
    Tool("trace", "trace", ("HEALTHY",), ("BROKEN",)),
    Tool("check", "check", ("HEALTHY",), ("BROKEN",)),
    Tool("canary", "canary create", ("HEALTHY", "--out", "OUT.json", *QUICK), ("BROKEN", "--out", "OUT.json")),
    Tool("convert", "convert", ("HEALTHY", "OUT.gguf"), ("BROKEN", "OUT.gguf")),
    Tool("tune", "tune"),
    Tool("qa", "qa", ("HEALTHY", "--iterations", "1"), ("BROKEN",)),
    Tool("export", "export", ("HEALTHY", "-o", "OUT.gguf"), ("BROKEN", "-o", "OUT.gguf")),
    Tool("rosetta", "rosetta verify", ("HEALTHY",), ("BROKEN",)),
    Tool("pull", "pull"),
    Tool("contract gate", "run", ("HEALTHY", "x", "--recheck", *QUICK), ("BROKEN", "x", "--recheck")),
)


def tools(
    as_json: Annotated[bool, typer.Option("--json", help="Print strict JSON.")] = False,
) -> None:
    """Run each of the seventeen tools. Its help, a fixture that passes and one that fails."""
    from apr_core.cli.output import show, show_json, show_table

    body = coverage()
    if as_json:
        show_json(body)
    else:
        rows = [(t["name"], t["command"], t["status"], t["reason"], f"{t['seconds']:.1f} s") for t in body["tools"]]
        show_table(("tool", "command", "status", "", "took"), rows)
        show(f"{body['covered']} of {body['of']} tools: help, one passing and one failing fixture each")
        show(f"missing: {', '.join(body['missing']) or 'none'}; broken: {', '.join(body['broken']) or 'none'}")
    raise typer.Exit(Exit.REFUTED if body["broken"] else Exit.OK)


def coverage(chosen: Sequence[Tool] = TOOLS) -> dict[str, Any]:
    """
    Run every tool that the registry has.

    Returns:
        tools (name, command, status covered, missing or broken, reason, help, passing, failing (words, exit_code,
        expected), seconds), covered, of, missing, broken.
    """
    from apr_core.cli.output import note

    found = []
    with tempfile.TemporaryDirectory(prefix="apr-tools-") as folder:
        places = _fixtures(Path(folder))
        for number, tool in enumerate(chosen):
            found.append(_try(tool, places, Path(folder) / str(number)))
            note(f"{tool.name}: {found[-1]['status']}")
    by = {status: [t["name"] for t in found if t["status"] == status] for status in ("covered", "missing", "broken")}
    return {
        "tools": found,
        "covered": len(by["covered"]),
        "of": len(found),
        "missing": by["missing"],
        "broken": by["broken"],
    }


def _fixtures(folder: Path) -> dict[str, str]:
    """Copy the bundled model: healthy, with NaN in its weights, and cut in the middle."""
    import shutil

    from apr_core.engines.subject import BUNDLED

    for name in ("HEALTHY", "BROKEN", "TORN"):
        shutil.copytree(BUNDLED["pygmy"], folder / name)
    weights = folder / "BROKEN" / "model.safetensors"
    with weights.open("r+b") as stream:
        stream.seek(-4096, 2)
        stream.write(b"\xff" * 4096)
    torn = folder / "TORN" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    return {name: str(folder / name) for name in ("HEALTHY", "BROKEN", "TORN")}


def _try(tool: Tool, places: dict[str, str], out: Path) -> dict[str, Any]:
    from apr_core.cli.dispatch import COMMANDS

    row: dict[str, Any] = {"name": tool.name, "command": tool.command, "help": False, "passing": None, "failing": None}
    if tool.command not in COMMANDS:
        return {**row, "status": "missing", "reason": "not built", "seconds": 0.0}
    started = time.monotonic()
    code, said = _call([*tool.command.split(), "--help"])
    row["help"] = code == 0 and tool.command.split()[-1] in said
    reason = "" if row["help"] else f"--help ended with {code}"
    for key, words, expected in (("passing", tool.passes, 0), ("failing", tool.fails, tool.code)):
        out_ = f"{out}-{key}"
        call = [*tool.command.split(), *(places.get(word, word.replace("OUT", out_, 1)) for word in words)]
        code, said = _call(call)
        row[key] = {"words": [tool.command, *words], "exit_code": code, "expected": expected}
        if code != expected:
            last = said.strip().splitlines()[-1:] or [""]
            reason = reason or f"the {key} fixture ended with {code}, expected {expected}: {last[0][:120]}"
    status = "broken" if reason else "covered"
    return {**row, "status": status, "reason": reason, "seconds": time.monotonic() - started}


def _call(words: list[str]) -> tuple[int, str]:
    """Call the command line in this process, without a keyboard; return exit code and everything that it said."""
    from apr_core.cli.app import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), _piped(""):
        code = main(words)
    return code, said.getvalue()


@contextlib.contextmanager
def _piped(text: str) -> Iterator[None]:
    """Put a text in the place of the keyboard for a while."""
    import sys

    kept, sys.stdin = sys.stdin, io.StringIO(text)
    try:
        yield
    finally:
        sys.stdin = kept
